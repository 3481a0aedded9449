"""diffusers: its attention layers, whether their processors call SDPA or go through its dispatcher.

A processor that goes through the dispatcher is held at diffusers' own ``native`` while it is routed, on a copy of the
processor: processors are shared between layers, and between models. Refuses processors that compute attention by matrix
products or by another library, those that hand FlexAttention block masks to the dispatcher, and context parallelism.

``upcast_attention`` (SD 2): diffusers' ``AttnProcessor2_0`` ignores it, ``AttnProcessor`` computes the scores in
float32 for it. A routed layer has them in float32, too: kernels of CPUs, CUDA and XPUs keep them so for half-precision
queries and keys, on other devices these are cast first, and backends that are not exact are not used for the layer.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from heedful.integrations.calls import names_called
from heedful.integrations.diffusers.adapters import lost_adapters
from heedful.layers import Layer, Patch, watch

_SDPA, _DISPATCHER = "scaled_dot_product_attention", "dispatch_attention_fn"
_WANTED = frozenset({_SDPA, _DISPATCHER})
_HELD = "_attention_backend"
_LINEAR = ("SanaLinear", "SanaMultiscale")  # in the names of processors that compute linear attention
# Processors that join two sequences themselves, where the layer has no projections of its own for the second.
_JOINING = frozenset(
    {
        "CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0", "CogView4AttnProcessor",
        "EasyAnimateAttnProcessor2_0", "GlmImageAttnProcessor", "HunyuanImageAttnProcessor",
        "HunyuanVideoAttnProcessor2_0", "MotifVideoAttnProcessor2_0",
    }
)  # fmt: skip


def home_role(module: nn.Module) -> str:
    """The role of all layers within a module: "vae" in an autoencoder, else nothing."""
    package = type(module).__module__
    return "vae" if package.startswith(("diffusers.models.autoencoders", "diffusers.models.vq_model")) else ""


def attention_layer(module: nn.Module) -> Layer | None:
    """What the module is as an attention layer; None if it is none."""
    from diffusers.models import attention_processor as processors
    from diffusers.models.attention import AttentionModuleMixin

    processor = getattr(module, "processor", None)
    kinds = (processors.Attention, processors.MochiAttention, AttentionModuleMixin)
    linear = getattr(processors, "SanaMultiscaleLinearAttention", ())  # since diffusers 0.32
    if isinstance(module, kinds) and processor is not None:
        return _with_processor(module, processor)
    if isinstance(module, linear):
        return _linear()
    if type(module).__module__.partition(".")[0] != "diffusers":
        return None
    called = names_called(type(module), "forward", _WANTED)
    return _dispatched(module, module) if _DISPATCHER in called else Layer() if called else None


def _with_processor(module: nn.Module, processor: Any) -> Layer:
    found = replace(_reached(module, processor), role=_role(module, processor), conflict=lost_adapters(module))
    if found.obstacle:
        return found
    watched = () if any(patch.name == "processor" for patch in found.patches) else (watch(module, "processor"),)
    upcast = bool(getattr(module, "upcast_attention", False))
    return replace(found, patches=(*found.patches, *watched), float32_scores=upcast)


def _reached(module: nn.Module, processor: Any) -> Layer:
    name = type(processor).__name__
    plain = type(processor).__call__ is nn.Module.__call__  # an IP-Adapter's processor is a module, and has its own
    called = names_called(type(processor), "forward" if plain else "__call__", _WANTED)
    if getattr(processor, "_parallel_config", None) is not None:
        return Layer("diffusers' context parallelism is on, which computes attention by itself")
    if _DISPATCHER in called:
        return _dispatched(module, processor)
    if called:
        return Layer(patches=_expanding_once(module))
    if any(part in name for part in _LINEAR):
        return _linear()
    return Layer(f"{name} calls neither SDPA nor diffusers' dispatcher; module.set_processor(...) with one that does")


def _linear() -> Layer:
    return Layer("linear attention has no softmax, and no attention backend computes it", softmax=False)


def _role(module: nn.Module, processor: Any) -> str:
    """What it attends to, as its attributes say; nothing where they do not."""
    name, kind = type(processor).__name__, type(module).__name__
    added = getattr(module, "add_k_proj", None) is not None
    if "AddedKV" in name:
        return "cross" if getattr(module, "only_cross_attention", False) else "joint"
    if getattr(module, "is_cross_attention", None):
        return "cross"
    if added or name in _JOINING:
        return "joint"
    if hasattr(module, "is_cross_attention") or hasattr(module, "added_kv_proj_dim"):
        return "self"
    if getattr(module, "cross_attention_dim", None) not in (None, getattr(module, "query_dim", None)):
        return "cross"
    return "cross" if "CrossAttention" in kind else "self" if "SelfAttention" in kind else ""


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
        return Layer(patches=_hold(module, holder, native), elsewhere=_elsewhere(getattr(holder, _HELD)))
    active = _AttentionBackendRegistry._active_backend
    if active == native:
        return Layer()
    return Layer(f"{name} obeys diffusers' process-wide backend only, which is {active.value!r}; set it to 'native'")


def _elsewhere(own: Any) -> str:
    """Where diffusers' dispatcher sends calls of a processor with this backend, if not to SDPA or to heedful."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    from heedful.integrations.diffusers.installation import is_installed

    goes = own or _AttentionBackendRegistry._active_backend
    name = getattr(goes, "value", goes)
    return "" if name == "native" or is_installed() else f"diffusers' dispatcher sends it to {name!r}"


def _hold(module: nn.Module, holder: Any, native: Any) -> tuple[Patch, ...]:
    """Processors with weights are a layer's own and are held in place, as is a module without processor."""
    if isinstance(holder, nn.Module):
        return (Patch(holder, _HELD, native, watched=True),)
    held = copy.copy(holder)
    setattr(held, _HELD, native)
    return (Patch(module, "processor", held, watched=True), Patch(held, _HELD, native, watched=True))
