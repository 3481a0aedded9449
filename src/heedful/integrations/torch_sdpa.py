"""Modules of any library that call torch's SDPA, or ``heedful.attention``, in their own forward.

Refuses ``nn.MultiheadAttention``: its SDPA call is inside of a torch function that no function mode can look into.
"""

from __future__ import annotations

from torch import nn

from heedful.integrations.calls import names_called
from heedful.layers import Layer

_WANTED = frozenset({"scaled_dot_product_attention", "heedful"})


def home_role(_module: nn.Module) -> str:
    """None is known for modules of any library."""
    return ""


def attention_layer(module: nn.Module) -> Layer | None:
    """What the module is as an attention layer; None if it is none."""
    if isinstance(module, nn.MultiheadAttention):
        return Layer(
            "nn.MultiheadAttention calls SDPA inside multi_head_attention_forward; heedful.patch_sdpa() reaches it"
        )
    if type(module).__module__.partition(".")[0] == "torch":
        return None
    return Layer() if names_called(type(module), "forward", _WANTED) else None
