"""PEFT adapters (LoRA and its kin) on the projections of attention layers: whether they are active, merged for a while.

diffusers' ``fuse_qkv_projections()`` copies ``to_q.weight`` and so on, which are the base weights of a layer with
adapters: what an active adapter adds is then left out, without a word.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
KEPT = "_heedful_fused"  # in a module's __dict__: ``fused_state`` when heedful fused it
State = dict[str, dict[str, Any]]  # by projection and adapter: the scale


def projections(module: nn.Module) -> dict[str, nn.Module]:
    """The projections of an attention layer that fusing copies, by name."""
    found = {name: getattr(module, name, None) for name in PROJECTIONS}
    return {name: one for name, one in found.items() if isinstance(one, nn.Module)}


def active_adapters(projection: nn.Module) -> tuple[str, ...]:
    """The adapters that add to what a projection computes now and are not part of its weights; none without PEFT."""
    layer = _adapted(projection)
    if layer is None or layer.disable_adapters or layer.merged:
        return ()
    here = {name for names in layer.adapter_layer_names for name in getattr(layer, names)}
    return tuple(name for name in layer.active_adapters if name in here)


def fused_state(module: nn.Module) -> dict[str, State]:
    """What to keep of a layer that is fused now: what its projections compute, and what of it fusing merges in."""
    return {"all": _state(module, _computed), "merged in": _state(module, active_adapters)}


def lost_adapters(module: nn.Module) -> str:
    """How a fused layer's adapters are others than those that its projections compute, in words; empty if they are not.

    diffusers' own fusion copies weights: what had been merged into them is in, and what was active is left out.
    """
    if not getattr(module, "fused_projections", False):
        return ""
    kept: dict[str, State] | None = vars(module).get(KEPT)
    now = _state(module, active_adapters) if kept is None else {**_left(module, kept), **_state(module, _computed)}
    had = {} if kept is None else kept["all"]
    if now == had:
        return ""
    if now:
        told = f"do not compute what the active adapters ({_names(now)}) add"
    else:
        told = f"still compute what adapters ({_names(had)}) add that are no longer active"
    return (
        f"its fused projections {told}; unfuse them, then "
        "heedful.integrations.diffusers.fuse_qkv_projections(..., adapters='merge')"
    )


def _adapted(projection: nn.Module) -> Any:
    """The projection, if it is a layer of PEFT's."""
    if "peft" not in sys.modules:
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer

    return projection if isinstance(projection, BaseTunerLayer) else None


def _computed(projection: nn.Module) -> tuple[str, ...]:
    """The adapters that are part of what a projection computes, by its weights or beside them."""
    layer = _adapted(projection)
    if layer is None or layer.disable_adapters or not layer.merged:
        return active_adapters(projection)
    return tuple(layer.merged_adapters)


def _state(module: nn.Module, of: Callable[[nn.Module], tuple[str, ...]]) -> State:
    """Some of the adapters of a layer's projections, and how strong they are; not what their weights are."""
    found = {name: (one, of(one)) for name, one in projections(module).items()}
    return {
        name: {adapter: getattr(one, "scaling", {}).get(adapter) for adapter in adapters}
        for name, (one, adapters) in found.items()
        if adapters
    }


def _left(module: nn.Module, kept: dict[str, State]) -> State:
    """What is in the weights of projections that PEFT has left since: what was merged into them before the fusion."""
    plain = [name for name, one in projections(module).items() if _adapted(one) is None]
    return {name: kept["all"][name] for name in plain if name in kept["all"] and name not in kept["merged in"]}


def _names(state: State) -> str:
    return ", ".join(sorted({repr(adapter) for adapters in state.values() for adapter in adapters}))


@contextlib.contextmanager
def merged(module: nn.Module) -> Iterator[None]:
    """Have a layer's active adapters in the weights of its projections for the block; then bit for bit as before."""
    found: list[Any] = [one for one in projections(module).values() if active_adapters(one)]
    kept = [{name: one.detach().clone() for name, one in layer.get_base_layer().named_parameters()} for layer in found]
    try:
        for layer in found:
            layer.merge(safe_merge=True)
        yield
    finally:
        with torch.no_grad():
            for layer, weights in zip(found, kept, strict=True):
                if layer.merged:
                    layer.unmerge()
                for name, parameter in layer.get_base_layer().named_parameters():
                    parameter.copy_(weights[name])
