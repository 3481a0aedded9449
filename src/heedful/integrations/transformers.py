"""transformers: its attention layers, which call SDPA where the model's attention implementation is "sdpa".

Refuses every other implementation: ``model.set_attn_implementation("sdpa")`` is the way in.
"""

from __future__ import annotations

from torch import nn

from heedful.integrations.calls import names_called
from heedful.layers import Layer

_WANTED = frozenset({"ALL_ATTENTION_FUNCTIONS", "scaled_dot_product_attention", "softmax"})
_REACHABLE = ("sdpa", "heedful")


def attention_layer(module: nn.Module) -> Layer | None:
    """What the module is as an attention layer; None if it is none."""
    kind = type(module)
    if not kind.__name__.endswith("Attention") or not kind.__module__.startswith("transformers"):
        return None
    called = names_called(kind, "forward", _WANTED)
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if "ALL_ATTENTION_FUNCTIONS" in called:
        return Layer() if implementation in _REACHABLE else Layer(_unreachable(implementation))
    if "scaled_dot_product_attention" in called:
        return Layer()
    return Layer(f"{kind.__name__} computes attention by matrix products only") if called else None


def _unreachable(implementation: object) -> str:
    return (
        f"its attention implementation is {implementation!r}, which heedful cannot see into; "
        "model.set_attn_implementation('sdpa') makes it reachable"
    )
