"""diffusers: its attention layers, whether their processors call SDPA or go through its dispatcher.

A processor that goes through the dispatcher is held at diffusers' own ``native`` while it is routed, on a copy of the
processor: processors are shared between layers, and between models. Refuses processors that compute attention by matrix
products, those that hand FlexAttention block masks to the dispatcher, and context parallelism.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from heedful.integrations.calls import names_called
from heedful.layers import Layer, Patch

_SDPA, _DISPATCHER = "scaled_dot_product_attention", "dispatch_attention_fn"
_WANTED = frozenset({_SDPA, _DISPATCHER})
_HELD = "_attention_backend"


def attention_layer(module: nn.Module) -> Layer | None:
    """What the module is as an attention layer; None if it is none."""
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention, MochiAttention

    processor = getattr(module, "processor", None)
    if isinstance(module, (Attention, MochiAttention, AttentionModuleMixin)) and processor is not None:
        return _with_processor(module, processor)
    if type(module).__module__.partition(".")[0] != "diffusers":
        return None
    called = names_called(type(module), "forward", _WANTED)
    return _dispatched(module, module) if _DISPATCHER in called else Layer() if called else None


def _with_processor(module: nn.Module, processor: Any) -> Layer:
    name = type(processor).__name__
    called = names_called(type(processor), "forward" if isinstance(processor, nn.Module) else "__call__", _WANTED)
    if getattr(processor, "_parallel_config", None) is not None:
        return Layer("diffusers' context parallelism is on, which computes attention by itself")
    if _DISPATCHER in called:
        return _dispatched(module, processor)
    if called:
        return Layer(patches=_expanding_once(module))
    return Layer(f"{name} calls neither SDPA nor diffusers' dispatcher; module.set_processor(...) with one that does")


class ExpandOnce:
    """diffusers' ``prepare_attention_mask``, computed once a mask: the layers of a model then share what it makes.

    It repeats the mask over the heads in every layer anew, and each new tensor would have to be read again.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, attention_mask: Any, target_length: int, batch_size: int, out_dim: int = 3) -> Any:
        """See diffusers' ``Attention.prepare_attention_mask``."""
        kind_of_module: Any = type(self.module)
        make = kind_of_module.prepare_attention_mask
        call = (target_length, batch_size, out_dim)
        mask = attention_mask
        if type(mask) is not Tensor or mask.requires_grad or mask.is_inference() or torch.compiler.is_compiling():
            return make(self.module, mask, *call)
        made = _expanded.setdefault(mask, {})
        kind = (mask._version, self.module.heads, *call)
        if kind not in made:
            new = make(self.module, mask, *call)
            if new.untyped_storage()._cdata == mask.untyped_storage()._cdata:
                return new  # nothing was repeated, and what is kept here must not keep its own key
            made[kind] = new
        return made[kind]


_expanded: Any = WeakTensorKeyDictionary()


def _expanding_once(module: nn.Module) -> tuple[Patch, ...]:
    name = "prepare_attention_mask"
    usual = hasattr(type(module), name) and name not in vars(module)
    return (Patch(module, name, ExpandOnce(module)),) if usual else ()


def _dispatched(module: nn.Module, holder: Any) -> Layer:
    """A layer that asks diffusers' dispatcher, which must end in SDPA. ``holder`` may say which backend it wants."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    native, name = AttentionBackendName.NATIVE, type(holder).__name__
    if getattr(type(holder), _HELD, None) not in (None, native):
        return Layer(f"{name} is written for diffusers' {getattr(type(holder), _HELD)!r} kernel")
    if hasattr(holder, _HELD):
        return Layer(patches=(_hold(module, holder, native),))
    active = _AttentionBackendRegistry._active_backend
    if active == native:
        return Layer()
    return Layer(f"{name} obeys diffusers' process-wide backend only, which is {active.value!r}; set it to 'native'")


def _hold(module: nn.Module, holder: Any, native: Any) -> Patch:
    """Processors with weights are a layer's own and are held in place, as is a module without processor."""
    if isinstance(holder, nn.Module):
        return Patch(holder, _HELD, native)
    held = copy.copy(holder)
    setattr(held, _HELD, native)
    return Patch(module, "processor", held)
