"""Fused QKV projections: diffusers' own fusion, which leaves out active adapters, with that minded, and undone exactly.

Refuses to fuse where adapters are active, unless they are to be merged in; where a processor would be lost (diffusers
sets its fused processor over any other, an IP-Adapter's as well); and what is fused, or routed, already.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from heedful.errors import InvalidArgument
from heedful.integrations.diffusers.adapters import KEPT, active_adapters, fused_state, merged, projections
from heedful.layers import UNDO
from heedful.models import components
from heedful.routing import route_of

_ORIGINAL = "original_attn_processors"  # where diffusers keeps the processors that it replaced


def fuse_qkv_projections(model_or_pipeline: Any, adapters: Literal["refuse", "merge"] = "refuse") -> int:
    """Have query, key and value computed by one matrix product, in every model that can; how many layers were fused.

    Fuse before ``set_attention_backend``. ``unfuse_qkv_projections`` and ``reset_attention_backend`` undo it.

    Args:
        model_or_pipeline: a model of diffusers, or a pipeline: its UNet or transformer, its VAE, its ControlNets.
        adapters: what becomes of active adapters (LoRA) on the projections. "refuse" raises. "merge" puts what they add
            now into the fused weights, and leaves the adapters themselves as they are; another scale (that of
            ``cross_attention_kwargs``, too), another adapter or further training reaches the layer after the next
            fusion only. ``attention_report`` shows a conflict where the active adapters or their scales are others than
            those merged, also where none is active any more.

    Raises:
        InvalidArgument: adapters are active and not to be merged, a processor would be lost, or there is nothing to
            fuse. Nothing has been changed then.
    """
    if adapters not in ("refuse", "merge"):
        raise InvalidArgument("adapters", repr(adapters), "give 'refuse' or 'merge'")
    models = _fusable(model_or_pipeline)
    layers = [layer for model in models for layer in _layers(model)]
    _check(model_or_pipeline, layers)
    if adapters == "refuse":
        _check_adapters(layers)
    for model in models:
        fusion = Fusion(model)
        vars(model).setdefault(UNDO, []).append(fusion)
        fusion.apply()
    return len(layers)


def unfuse_qkv_projections(model_or_pipeline: Any) -> int:
    """Undo ``fuse_qkv_projections``; how many models had been fused. Raises InvalidArgument while it is routed."""
    undone = 0
    _check_unrouted(model_or_pipeline, [layer for model in _fusable(model_or_pipeline) for layer in _layers(model)])
    for model in _fusable(model_or_pipeline):
        kept = vars(model).get(UNDO, [])
        for fusion in [one for one in kept if isinstance(one, Fusion)]:
            fusion.undo()
            kept.remove(fusion)
            undone += 1
        if not kept:
            vars(model).pop(UNDO, None)
    return undone


class Fusion:
    """One model's fusion: what its layers were before, and how to get there again."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = [(layer, set(layer._modules), layer.processor, _own(layer)) for layer in _layers(model)]
        self.had_original = _ORIGINAL in vars(model)
        self.fused: list[Any] = []

    def apply(self) -> None:
        """Fuse, by diffusers' own code; then anew, with the adapters in the weights, where any are active."""
        fuse: Any = self.model.fuse_qkv_projections
        fuse()
        for layer, *_ in self.before:
            state = fused_state(layer)
            if state["merged in"]:
                layer.fused_projections = False
                with merged(layer):
                    layer.fuse_projections()
            vars(layer)[KEPT] = state
        self.fused = [layer.processor for layer, *_ in self.before]

    def undo(self) -> None:
        """Take the fused projections away. A processor that somebody set since stays."""
        for (layer, names, processor, own), fused in zip(self.before, self.fused, strict=True):
            for name in set(layer._modules) - names:
                if name in ("to_qkv", "to_kv", "to_added_qkv", "to_added_kv"):
                    del layer._modules[name]
            if layer.processor is fused and fused is not processor:
                vars(layer)["processor"] = processor
            vars(layer).pop(KEPT, None)
            vars(layer).pop("fused_projections", None)
            vars(layer).update(own)
        if not self.had_original:
            vars(self.model).pop(_ORIGINAL, None)


def _own(layer: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(layer).items() if name == "fused_projections"}


def _fusable(model_or_pipeline: Any) -> list[nn.Module]:
    """The models that diffusers can fuse."""
    roots = [root for _, root in components(model_or_pipeline)]
    found = [one for root in roots for one in root.modules() if hasattr(type(one), "fuse_qkv_projections")]
    return list(dict.fromkeys(found))


def _layers(model: nn.Module) -> list[Any]:
    """The layers of a model that its fusion reaches."""
    can = (one for one in model.modules() if hasattr(type(one), "fuse_projections"))
    return [one for one in can if getattr(one, "_supports_qkv_fusion", True)]


def _check(given: Any, layers: list[Any]) -> None:
    """Raise InvalidArgument where nothing can be fused, or not without harm."""
    name = type(given).__name__
    if not layers:
        raise InvalidArgument("model_or_pipeline", name, "give a model of diffusers that has fuse_qkv_projections()")
    if any(getattr(layer, "fused_projections", False) for layer in layers):
        raise InvalidArgument("model_or_pipeline", name, "it is fused already; unfuse it first")
    _check_unrouted(given, layers)
    lost = sorted({type(layer.processor).__name__ for layer in layers if not _has_twin(layer)})
    if lost:
        remedy = f"fusing would replace {', '.join(lost)}, which has no form for fused projections; do not fuse"
        raise InvalidArgument("model_or_pipeline", name, remedy)


def _check_unrouted(given: Any, layers: list[Any]) -> None:
    if any(route_of(layer) is not None for layer in layers):
        remedy = "it has a backend set; reset_attention_backend first, and set it again afterwards"
        raise InvalidArgument("model_or_pipeline", type(given).__name__, remedy)


def _has_twin(layer: Any) -> bool:
    """Whether its processor computes fused projections, or diffusers has another form of it that does."""
    from diffusers.models import attention_processor
    from diffusers.models.attention import AttentionModuleMixin

    if isinstance(layer, AttentionModuleMixin):
        return True
    return hasattr(attention_processor, f"Fused{type(layer.processor).__name__}")


def _check_adapters(layers: list[Any]) -> None:
    active = [name for layer in layers for one in projections(layer).values() for name in active_adapters(one)]
    if active:
        names = ", ".join(map(repr, sorted(set(active))))
        remedy = f"the adapters {names} are active on {len(active)} projections, and fusing would leave them out; "
        raise InvalidArgument("adapters", "'refuse'", remedy + "give adapters='merge', or disable or unload them first")
