"""A backend for one model: its attention layers are found, routed by rules, reported on, and put back.

Knows no library: what an attention layer is, each integration says for its own library, and is asked only once that
library has been imported. Nothing outside of the model is touched.
"""

from __future__ import annotations

import fnmatch
import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from heedful.dispatch import default_dispatcher
from heedful.errors import InvalidArgument, NothingCovered
from heedful.factory import AttentionStrategyFactory
from heedful.layer_report import AttentionReport, LayerReport, wish_text
from heedful.layers import Layer
from heedful.policy import Wish, as_wish
from heedful.routing import Order, Route, ran_by_layer, route_of
from heedful.run_report import RunReport, run_report
from heedful.tally import joined_guard

KEEP = "keep"
OWN = "its own"
# The library, and the module that knows its layers; the first to know one decides. "torch" has been imported always.
ADAPTERS = (
    ("diffusers", "heedful.integrations.diffusers.layers"),
    ("transformers", "heedful.integrations.transformers"),
    ("torch", "heedful.integrations.torch_sdpa"),
)
Backend = str | list[str] | tuple[str, ...] | None
Found = tuple[str, str, nn.Module, Layer]  # path, component, module, what it is


def set_attention_backend(
    model_or_pipeline: Any, backend: Backend, rules: Mapping[str, Backend] | None = None
) -> AttentionReport:
    """Have every attention layer of one model computed by a backend, until ``reset_attention_backend``.

    A layer's wish comes before a scope's, and after a call's own. Setting again replaces what was set before.

    Args:
        model_or_pipeline: a module, or anything with a dict ``components`` that holds modules, as diffusers' pipelines.
        backend: a name (obeyed, or the layer's call raises Refused), a list of names (the fallback order), "auto", or
            None or "keep": leave the layers alone that no rule names.
        rules: the same for the layers whose path matches a pattern, such as ``{"*.attn2": "native", "vae*": None}``.
            A path starts with the component's name: ``unet.mid_block.attentions.0.transformer_blocks.0.attn1``.
            ``*`` also stands for dots. The first pattern that matches decides.

    Returns:
        A row for every layer that was found, those that cannot be reached with the reason.

    Raises:
        UnknownBackend, InvalidArgument: a name is unknown, or a rule decides about no layer.
        NothingCovered: no layer would be routed. The model is then as it was before, as after any other exception.
    """
    if rules is not None and not (isinstance(rules, Mapping) and all(isinstance(pattern, str) for pattern in rules)):
        raise InvalidArgument("rules", repr(rules), "give a mapping from path patterns to backends, or None")
    wishes = {pattern: _wish(wish, f"rules[{pattern!r}]") for pattern, wish in (rules or {}).items()}
    default = _wish(backend, "backend")
    before = [route for _, _, module in _modules(model_or_pipeline) if (route := route_of(module))]
    for route in before:
        route.undo()
    try:
        routes = _planned(model_or_pipeline, wishes, default)
    except BaseException:
        for route in before:
            route.apply()
        raise
    for route in routes:
        route.apply()
    return attention_report(model_or_pipeline)


def reset_attention_backend(model_or_pipeline: Any) -> int:
    """Put every attention layer back to what it was before ``set_attention_backend``; how many had been set.

    A layer that was never set, or has been reset, is left alone.
    """
    routes = [route for _, _, module in _modules(model_or_pipeline) if (route := route_of(module))]
    for route in routes:
        route.undo()
    return len(routes)


def attention_report(model_or_pipeline: Any) -> AttentionReport:
    """What holds for every attention layer now, and what ran there since ``set_attention_backend``.

    A layer that runs without calling SDPA bypasses heedful: it shows 0 calls, and says so.
    """
    rows = []
    for path, component, module, layer in _layers(model_or_pipeline):
        rows.append(_row(path, component, module, layer, route_of(module)))
    return AttentionReport(tuple(rows))


def report() -> RunReport:
    """What this process computed through ``heedful.attention`` so far, by layer where layers are routed.

    Prints as a table: calls, share of the time, lowerings, and what the guard found. Compiled calls are not counted.
    """
    return run_report(list(default_dispatcher.experience.tallies.values()), ran_by_layer())


def _wish(backend: Backend, origin: str) -> Wish | None:
    if backend is None or backend == KEEP:
        return None
    try:
        wish = as_wish(backend)
    except InvalidArgument:
        raise InvalidArgument(origin, repr(backend), "give a name, a list of names, 'auto', or None to keep") from None
    resolve = AttentionStrategyFactory.default().resolve
    if isinstance(wish, str):
        return wish if wish == "auto" else resolve(wish, origin)
    return tuple(name if name == "auto" else resolve(name, origin) for name in wish)


def _components(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a pipeline by name, or the one model under no name."""
    if isinstance(model, nn.Module):
        yield "", model
        return
    components = getattr(model, "components", None)
    if not isinstance(components, Mapping):
        raise InvalidArgument(
            "model_or_pipeline", type(model).__name__, "give a torch.nn.Module or a pipeline with a dict of components"
        )
    for name, part in components.items():
        for index, one in enumerate(part if isinstance(part, (list, tuple)) else (part,)):
            if isinstance(one, nn.Module):
                yield f"{name}.{index}" if isinstance(part, (list, tuple)) else name, one


def _modules(model: Any) -> Iterator[tuple[str, str, nn.Module]]:
    """Every module once, with its path and component; torch.compile's wrappers leave no trace in the path."""
    seen: set[nn.Module] = set()
    for component, root in _components(model):
        for inner, module in root.named_modules(memo=seen):
            yield ".".join(filter(None, (component, inner))).replace("_orig_mod.", ""), component, module


def _layers(model: Any) -> Iterator[Found]:
    adapters = [_adapter(name) for library, name in ADAPTERS if library in sys.modules]
    for path, component, module in _modules(model):
        layer = next((layer for adapter in adapters if (layer := adapter(module)) is not None), None)
        if layer is not None:
            yield path, component, module, layer


def _adapter(name: str) -> Callable[[nn.Module], Layer | None]:
    find: Callable[[nn.Module], Layer | None] = importlib.import_module(name).attention_layer
    return find


def _planned(model: Any, wishes: Mapping[str, Wish | None], default: Wish | None) -> list[Route]:
    found = list(_layers(model))
    if not found:
        asked = ", ".join(library for library, _ in ADAPTERS if library in sys.modules)
        raise NothingCovered(
            f"{type(model).__name__} has no attention layer: none of its {sum(1 for _ in _modules(model))} modules is "
            f"one by the rules of {asked}, such as an attention class with a processor, or a forward that calls SDPA"
        )
    orders = [_order(path, component, layer, wishes, default) for path, component, _, layer in found]
    _check_rules(wishes, orders)
    if not any(order.routed for order in orders):
        reasons = Counter(order.obstacle or f"kept, by {order.origin}" for order in orders)
        told = "; ".join(f"{count} layers: {reason}" for reason, count in reasons.items())
        raise NothingCovered(f"none of the {len(found)} attention layers of {type(model).__name__} is covered: {told}")
    return [
        Route(module, order, layer.patches, shielded=_is_shielded(order, orders))
        for (_, _, module, layer), order in zip(found, orders, strict=True)
    ]


def _order(path: str, component: str, layer: Layer, wishes: Mapping[str, Wish | None], default: Wish | None) -> Order:
    for pattern, wish in wishes.items():
        if fnmatch.fnmatchcase(path, pattern):
            return Order(path, component, wish, f"rule {pattern!r}", layer.obstacle)
    return Order(path, component, default, "backend", layer.obstacle)


def _check_rules(wishes: Mapping[str, Wish | None], orders: list[Order]) -> None:
    deciding = {order.origin for order in orders}
    for pattern in wishes:
        if f"rule {pattern!r}" not in deciding:
            shadowed = any(fnmatch.fnmatchcase(order.path, pattern) for order in orders)
            what = "only layers that an earlier rule decides about" if shadowed else f"none of {len(orders)} layers"
            raise InvalidArgument("rules", repr(pattern), f"it matches {what}; the first path is {orders[0].path!r}")


def _is_shielded(order: Order, orders: list[Order]) -> bool:
    """Whether a kept layer lies within a routed one, whose route would reach it."""
    around = (f"{other.path}." if other.path else "" for other in orders if other.routed)
    return order.wish is None and not order.obstacle and any(order.path.startswith(path) for path in around)


def _row(path: str, component: str, module: nn.Module, layer: Layer, route: Route | None) -> LayerReport:
    order = Order(path, component, None, "not set", layer.obstacle) if route is None else route.order
    tallies = dict(route.ran) if route is not None else {}
    ran: Counter[str] = Counter()
    for tally, calls in tallies.items():
        ran["none" if tally is None else tally.plan.backend] += calls
    return LayerReport(
        path=path,
        component=component,
        module=type(module).__name__,
        requested=KEEP if order.wish is None else wish_text(order.wish),
        active=_active(order, ran),
        reason=_reason(order, route),
        covered=order.routed,
        ran=tuple(sorted(ran.items())),
        lowerings=tuple(sorted({step for tally in tallies if tally is not None for step in tally.lowerings})),
        seconds=sum(tally.time_of(calls) for tally, calls in tallies.items() if tally is not None),
        guard=joined_guard([tally for tally in tallies if tally is not None]),
    )


def _active(order: Order, ran: Mapping[str, int]) -> str:
    if order.wish is None or order.obstacle:
        return OWN
    return ", ".join(sorted(ran)) or wish_text(order.wish)


def _reason(order: Order, route: Route | None) -> str:
    if order.obstacle and order.wish is not None:
        return order.obstacle
    if route is not None and order.routed and not route.ran:
        if route.forwards:
            return f"bypassed: it ran {route.forwards} times and never called SDPA"
        if route.compiled:
            return f"{order.origin}; compiled, and compiled code does not count its calls"
    return order.origin
