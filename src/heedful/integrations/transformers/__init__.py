"""transformers: heedful as an attention implementation of its models, and which of their layers can be reached.

After ``register()`` models take the name: ``model.set_attn_implementation("heedful")``, or
``from_pretrained(..., attn_implementation="heedful")``. Layers whose implementation is "sdpa" are reached by
``set_attention_backend`` and ``patch_sdpa`` without it; those of every other implementation are out of reach.
"""

from __future__ import annotations

import sys

from torch import nn

from heedful.errors import RegistrationError
from heedful.integrations.calls import names_called
from heedful.layers import Layer

NAME = "heedful"
_WANTED = frozenset({"ALL_ATTENTION_FUNCTIONS", "scaled_dot_product_attention", "softmax"})
_REACHABLE = ("sdpa", NAME)
_ROLES = {"input_ids": "text", "pixel_values": "image"}  # of a model's layers, by its main input


def register() -> str:
    """Have transformers know heedful as an attention implementation; its name, "heedful". Once a process is enough.

    Both of its parts are registered, attention and masks: without the second, transformers drops padding masks without
    a word. Nothing else changes: models use it where they are told to. Raises RegistrationError where the name is
    taken by somebody else's function.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    from heedful.integrations.transformers.attention import attention_forward
    from heedful.integrations.transformers.masks import attention_mask

    parts = ((AttentionMaskInterface, attention_mask), (AttentionInterface, attention_forward))
    for interface, function in parts:
        taken = interface().get(NAME, function)
        if taken is not function:
            raise RegistrationError(f"transformers' {interface.__name__} knows another {NAME!r}: {taken}")
    for interface, function in parts:
        interface.register(NAME, function)
    return NAME


def home_role(module: nn.Module) -> str:
    """The role of all layers within a model of transformers: "text" or "image", or nothing for other inputs."""
    loaded = sys.modules.get("transformers.modeling_utils")  # not loaded: there are no models of it
    if loaded is None or not isinstance(module, loaded.PreTrainedModel):
        return ""
    return _ROLES.get(module.main_input_name, "")


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
        "heedful.integrations.transformers.register() and model.set_attn_implementation('heedful') make it reachable"
    )
