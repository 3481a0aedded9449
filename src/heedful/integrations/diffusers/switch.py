"""The switch "use flash attention" of a plug-in, told truthfully: a configuration value in, what runs and why out.

For plug-ins with a checkbox. Flash that cannot run is no error, unless ``strict``: torch's own attention computes then,
and the status says so with the plan's reason. What a layer will run is found by planning a plain call with its sizes,
dtype and device; what it ran is counted. Refuses the VAE: its one head of 512 has no flash kernel. Text encoders of
transformers are left alone in a pipeline: their sequences are short and their masks are refused by flash kernels.
"""

from __future__ import annotations

import glob
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from heedful.dispatch import default_dispatcher
from heedful.errors import InvalidArgument, NothingCovered
from heedful.factory import AttentionStrategyFactory
from heedful.integrations.diffusers.names import plain
from heedful.integrations.diffusers.switch_status import OFF, Cause, FlashStatus, language_of, status_of
from heedful.layer_report import LayerReport, wish_text
from heedful.models import attention_report, modules, set_attention_backend
from heedful.models import components as components_of
from heedful.policy import Wish, as_wish
from heedful.problem import problem_for_shapes
from heedful.routing import Order, Route, route_of
from heedful.select import Plan

SWITCH = "use_flash_attention"
STRICT = f"{SWITCH}, strict"
_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # weights may be stored in others
_LENGTH, _HEADS, _DIM = 1024, 8, 64  # of a layer that does not tell its own
_VAE = ("autoencoder", "vae", "vqmodel")


class Ordered(NamedTuple):
    """What a layer is set to, and who ordered it; the switch's own orders are told by that: ``SWITCH: flash``."""

    wish: Wish
    origin: str
    replaced: Ordered | None = None  # by the switch, which puts it back


@dataclass(frozen=True)
class SwitchedOrder(Order):
    """An order, and what the switch replaced by it; both go with copies of the model."""

    replaced: Ordered | None = None


Orders = Mapping[str, Ordered]  # by a layer's path


def enable_flash_attention(
    pipeline: Any,
    use_flash_attention: bool = True,
    *,
    backend: str | list[str] | tuple[str, ...] = "flash",
    fallback: str = "native",
    components: Iterable[str] | None = None,
    strict: bool = False,
    language: str = "en",
) -> FlashStatus:
    """Switch flash attention on or off for a pipeline or model that is loaded, at any time, and say what is so.

    Switching off puts the layers back that the switch had set, exactly, and no others. Switching on again changes
    nothing. What ``heedful.set_attention_backend`` had set for a layer is replaced until then; other layers keep it.

    Args:
        pipeline: a module, or anything with a dict ``components`` that holds modules, as diffusers' pipelines.
        use_flash_attention: the value of the plug-in's checkbox.
        backend: "flash", or another backend of its family ("flash_3", "flash_hub"), or several in order of preference.
        fallback: what computes where flash cannot.
        components: names of the pipeline's components to switch; None for all but text encoders and VAE.
        strict: raise instead of falling back, here or at the call that flash cannot compute.
        language: of the status, "en" or "zh".

    Returns:
        What was requested, what will run, the reason, and how many layers are covered; ``refreshed()`` after a run.

    Raises:
        InvalidArgument, UnknownBackend: an argument is malformed.
        NothingCovered: there is no attention layer to switch.
        Refused: with ``strict``, flash cannot compute a plain call of a layer here. The model is then as it was before,
            as after any other exception.
    """
    language = language_of(language)
    if not isinstance(use_flash_attention, bool):
        raise InvalidArgument(SWITCH, repr(use_flash_attention), "give True or False")
    before = _orders(pipeline)
    off = {path: order for path, found in before.items() if (order := _without_switch(found)) is not None}
    if not use_flash_attention:
        _configure(pipeline, before, off)
        return flash_status(pipeline, language)
    names = _names(backend)
    order = Ordered(names if strict else (*names, fallback), f"{STRICT if strict else SWITCH}: {wish_text(names)}")
    switched = {path: order._replace(replaced=off.get(path)) for path in _paths(pipeline, components)}
    _configure(pipeline, before, {**off, **switched})
    if strict:
        _checked(pipeline, before)
    return flash_status(pipeline, language)


def flash_status(pipeline: Any, language: str = "en") -> FlashStatus:
    """What the switch is at, what runs or ran, and why. Changes nothing. Raises InvalidArgument."""
    language = language_of(language)
    routes = dict(_routes(pipeline))
    requested = next(filter(None, (_requested(route.order.origin) for route in routes.values())), OFF)
    plans: dict[Any, Plan] = {}
    states = [_state(pipeline, row, routes.get(row.path), plans) for row in attention_report(pipeline)]
    return replace(status_of(requested, states, language), again=_Again(pipeline))


class _Again:
    """The status anew, of a pipeline that is not kept alive for it."""

    def __init__(self, pipeline: Any) -> None:
        try:
            self._pipeline: Any = weakref.ref(pipeline)
        except TypeError:  # its class has no room for weak references
            self._pipeline = lambda: None

    def __call__(self, language: str) -> FlashStatus:
        pipeline = self._pipeline()
        if pipeline is None:
            raise InvalidArgument("pipeline", "one that is gone", "call flash_status(pipeline)")
        return flash_status(pipeline, language)


def _routes(pipeline: Any) -> Iterator[tuple[str, Route]]:
    for path, _, module in modules(pipeline):
        route = route_of(module)
        if route is not None:
            yield path, route


def _orders(pipeline: Any) -> dict[str, Ordered]:
    found = ((path, route.order) for path, route in _routes(pipeline))
    return {
        path: Ordered(order.wish, order.origin, order.replaced if isinstance(order, SwitchedOrder) else None)
        for path, order in found
        if order.wish is not None
    }


def _without_switch(order: Ordered) -> Ordered | None:
    return order.replaced if _requested(order.origin) else order


def _configure(pipeline: Any, before: Orders, wanted: Orders) -> None:
    """Have the layers ordered so, and no others."""
    if wanted == before:
        return
    if not wanted:
        for _, route in _routes(pipeline):
            route.undo()  # and no more: a reset would also undo what others did
        return
    set_attention_backend(pipeline, None, _rules(pipeline, wanted))
    for path, route in _routes(pipeline):
        if path in wanted:
            _, origin, replaced = wanted[path]
            route.order = SwitchedOrder(**{**vars(route.order), "origin": origin}, replaced=replaced)


def _rules(pipeline: Any, wanted: Orders) -> dict[str, Any]:
    """A rule for each layer. That of a model which is a layer itself has no path: a star, after all others."""
    rules: dict[str, Any] = {_only(path): order.wish for path, order in wanted.items() if path}
    if "" in wanted:
        every = (row.path for row in attention_report(pipeline) if row.path)
        rules |= {_only(path): None for path in every if path not in wanted}
        rules["*"] = wanted[""].wish
    return rules


def _only(path: str) -> str:
    """The pattern of one path, which is never taken for a word that rules have."""
    return f"[{path[0]}]{glob.escape(path[1:])}"


def _names(backend: Any) -> tuple[str, ...]:
    """The backends that are asked for, by their strategies' names. Raises InvalidArgument and UnknownBackend."""
    wish = as_wish(plain(backend))
    resolve = AttentionStrategyFactory.default().resolve
    return tuple(resolve(name) for name in ((wish,) if isinstance(wish, str) else wish))


def _requested(origin: str) -> str:
    """What the switch was asked for in an order of its own; "" in those of others."""
    who, _, requested = origin.partition(": ")
    return requested if who in (SWITCH, STRICT) else ""


def _paths(pipeline: Any, components: Iterable[str] | None) -> list[str]:
    """The layers to switch. Raises InvalidArgument and NothingCovered."""
    parts = dict(components_of(pipeline))
    named = None if components is None else [components] if isinstance(components, str) else list(components)
    for name in named or ():
        if name not in parts or _is_vae(parts[name]):
            able = ", ".join(repr(known) for known, part in parts.items() if not _is_vae(part))
            raise InvalidArgument("components", repr(name), f"give names out of {able}; a VAE has no flash kernel")
    rows = attention_report(pipeline)
    vaes = tuple(path for path, _, module in modules(pipeline) if _is_vae(module))
    chosen = [row.path for row in rows if _is_switched(row, parts, named) and not _is_within(row.path, vaes)]
    if not chosen:
        found = "; ".join(sorted({f"{row.component or row.path}: {row.module}" for row in rows})) or "none"
        raise NothingCovered(f"no attention layer of {type(pipeline).__name__} may be switched to flash; found {found}")
    return chosen


def _is_switched(row: LayerReport, parts: Mapping[str, nn.Module], named: list[str] | None) -> bool:
    if named is not None:
        return row.component in named
    encoder = type(parts[row.component]).__module__.partition(".")[0] == "transformers"
    return not (row.component and encoder)


def _is_vae(module: nn.Module) -> bool:
    names = (kind.__name__.lower() for kind in type(module).__mro__)
    return any(word in name for name in names for word in _VAE)


def _is_within(path: str, roots: tuple[str, ...]) -> bool:
    return any(not root or path == root or path.startswith(f"{root}.") for root in roots)


def _checked(pipeline: Any, before: Orders) -> None:
    """Raises Refused, after putting back what was before, where flash alone cannot compute some layer."""
    plans: dict[Any, Plan] = {}
    try:
        for _, route in _routes(pipeline):
            if route.order.origin.startswith(STRICT):
                _expected(pipeline, route, plans).checked()
    except BaseException:
        _configure(pipeline, _orders(pipeline), before)
        raise


def _state(
    pipeline: Any, row: LayerReport, route: Route | None, plans: dict[Any, Plan]
) -> tuple[str, tuple[str, ...], int, tuple[Cause, ...]]:
    """A layer's component, the backends that computed it or would, its calls, and why these are not flash."""
    if route is None or route.order.wish is None:
        return row.component, (), 0, ()
    requested = _requested(route.order.origin)
    names = tuple(requested.split(" > ")) if requested else ()
    note = "" if row.reason == route.order.origin else row.reason
    if not row.covered:
        return row.component, (), row.calls, ((Cause(names[0], note=note),) if names else ())
    seen = [tally.plan for tally in route.ran if tally is not None] or [_expected(pipeline, route, plans)]
    causes = [_cause(plan, names) for plan in seen] if names else []
    active = tuple(dict.fromkeys(plan.backend for plan in seen))
    return row.component, active, row.calls, tuple(cause for cause in causes if cause is not None)


def _cause(plan: Plan, names: tuple[str, ...]) -> Cause | None:
    """Why a plan's backend is none of these; the first one's reasons, since that was wished for first."""
    if plan.backend in names:
        return None
    found = {verdict.name: verdict.refusals for verdict in plan.verdicts if verdict.refusals}
    name = next((name for name in names if name in found), names[0])
    return Cause(name, found.get(name, ()))


def _expected(pipeline: Any, route: Route, plans: dict[Any, Plan]) -> Plan:
    """The plan of a plain call of a layer, as it would be if it came now. Kernels are loaded and tried for it."""
    heads, dim = _sizes(route.module)
    dtype, device = _place(pipeline, route.module)
    key = (heads, dim, dtype, device, route.wish)
    if key not in plans:
        shape, facts = (1, heads, _LENGTH, dim), default_dispatcher.facts.device(device)
        problem = problem_for_shapes(shape, shape, shape, dtype=dtype, device=facts)
        plans[key] = default_dispatcher.plan(problem, route.wish, device=device)
    return plans[key]


def _sizes(module: Any) -> tuple[int, int]:
    """Heads and head dim, by the names that diffusers and transformers have for them."""
    heads = _number(module, "heads", "num_heads", "num_attention_heads") or _HEADS
    inner, dim = _number(module, "inner_dim", "embed_dim"), _number(module, "head_dim")
    return heads, dim or (inner // heads if inner else 0) or _DIM


def _number(module: Any, *names: str) -> int:
    found = (getattr(module, name, None) for name in names)
    return next((value for value in found if type(value) is int and value > 0), 0)


def _place(pipeline: Any, module: nn.Module) -> tuple[torch.dtype, torch.device]:
    """The dtype and device of a layer's calls; where weights wait on the CPU, the device that they are moved to."""
    first = next(module.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    if device.type in ("cpu", "meta"):
        device = torch.device(getattr(pipeline, "_execution_device", None) or device)
    roots = (_dtype(root) for _, root in components_of(pipeline))
    return _dtype(module) or next(filter(None, roots), torch.float32), device


def _dtype(module: nn.Module) -> torch.dtype | None:
    """The first dtype of its weights that attention is computed in: they may be stored in others."""
    return next((weight.dtype for weight in module.parameters() if weight.dtype in _PLAIN), None)
