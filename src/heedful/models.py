"""A backend for one model: its attention layers are found, routed by rules, reported on, and put back.

Knows no library: what an attention layer is, each integration says for its own library, and is asked only once that
library has been imported. Nothing outside of the model is touched.
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from heedful.dispatch import default_dispatcher
from heedful.errors import InvalidArgument, NothingCovered
from heedful.factory import AttentionStrategyFactory
from heedful.layer_report import AttentionReport, LayerReport, wish_text
from heedful.layers import UNDO, Layer, leads_to
from heedful.policy import Wish, as_wish
from heedful.routing import Order, Route, ran_by_layer, route_of
from heedful.rules import Rule, check_that_all_decide, deciding, rule
from heedful.run_report import RunReport, run_report
from heedful.tally import Tally, joined_guard

_log = logging.getLogger("heedful")

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
    model_or_pipeline: Any,
    backend: Backend,
    rules: Mapping[str, Backend] | None = None,
    *,
    exclude: str | Sequence[str] | None = None,
) -> AttentionReport:
    """Have every attention layer of one model computed by a backend, until ``reset_attention_backend``.

    A layer's wish comes before a scope's, and after a call's own. Setting again replaces what was set before; what
    others have set since is left as it is, and is what a reset will then put back. Processors keep their class.

    Args:
        model_or_pipeline: a module, or anything with a dict ``components`` that holds modules, as diffusers' pipelines.
        backend: a name (obeyed, or the layer's call raises Refused), a list of names (the fallback order), "auto", or
            None or "keep": leave the layers alone that no rule names. The layers of an autoencoder fall back to
            "native" where the name refuses, with one line of log, as no fast kernel takes their head dim of 512; a
            rule for them is obeyed.
        rules: the same for the layers that a pattern means, such as ``{"cross": "native", "unet.mid*": None}``.
            A pattern is a role ("self", "cross", "joint", "text", "image" or "vae", see ``heedful.layers.ROLES``), or a
            glob over the path, in which ``*`` also stands for dots, or "re:" and a regular expression, searched in it.
            A path starts with the component's name: ``unet.mid_block.attentions.0.transformer_blocks.0.attn1``.
            The first pattern that means a layer decides.
        exclude: patterns of layers to leave alone, before all rules.

    Returns:
        A row for every layer that was found, those that cannot be reached with the reason. As a context manager it
        undoes this call when its block ends: what held before it holds again, an earlier backend included. Where blocks
        of one model overlap, the last one set decides until it ends, and after all have ended what held before them.

    Raises:
        UnknownBackend, InvalidArgument: a name is unknown, or a rule or an exclusion decides about no layer.
        NothingCovered: no layer would be routed. The model is then as it was before, as after any other exception.
    """
    ordered = _rules(rules, exclude)
    default = _wish(backend, "backend")
    before = _routes(model_or_pipeline)
    for route in before:
        route.undo()
    try:
        routes = _planned(model_or_pipeline, ordered, default)
    except BaseException:
        for route in before:
            route.apply()
        raise
    for route in routes:
        route.apply()
    made = attention_report(model_or_pipeline)
    for text, count in Counter(layer.conflict for layer in made.conflicts).items():
        _log.warning("heedful: %d layers: %s", count, text)
    return replace(made, block=_Block(model_or_pipeline, routes, before))


def reset_attention_backend(model_or_pipeline: Any, replaced: Literal["restore", "keep"] = "restore") -> int:
    """Put every attention layer back to what it was before ``set_attention_backend``; how many had been set.

    A layer that was never set, or has been reset, is left alone. What
    ``heedful.integrations.diffusers.fuse_qkv_projections`` fused is unfused, too.

    Args:
        model_or_pipeline: as for ``set_attention_backend``.
        replaced: what becomes of processors and backends that others have set on routed layers since, as
            ``enable_xformers_memory_efficient_attention()`` does. "restore" puts back what was there before, and logs
            what it took away; "keep" leaves them. Processors with weights of their own (an IP-Adapter that was loaded,
            or unloaded) are left in either case, and named, because the model would not run with the old ones.

    Raises:
        InvalidArgument: ``replaced`` is neither.
    """
    if replaced not in ("restore", "keep"):
        raise InvalidArgument("replaced", repr(replaced), "give 'restore' or 'keep'")
    routes = _routes(model_or_pipeline)
    _undo(routes, replaced == "restore")
    for _, _, module in modules(model_or_pipeline):
        for done in reversed(vars(module).pop(UNDO, [])):
            done.undo()
    return len(routes)


def attention_report(model_or_pipeline: Any) -> AttentionReport:
    """What holds for every attention layer now, and what ran there since ``set_attention_backend``.

    A layer that ran without calling SDPA bypasses heedful: it says so, and is not covered. A layer whose processor,
    whose processor's backend, or whose forward somebody else has set since (also by taking away an offloading hook that
    was there before) shows a conflict, and whether heedful still computes it.
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


class _Block:
    """One call of ``set_attention_backend``, undone when its block ends: the routes that held before hold again.

    Blocks of one model may overlap, as those of asyncio's tasks do: one that ends first leaves the routes of an open
    one in place, and is no longer among what that one puts back. A report keeps no model alive, unless the call
    replaced an earlier one.
    """

    def __init__(self, model: Any, made: Sequence[Route], before: Sequence[Route]) -> None:
        self.roots = [weakref.ref(root) for _, root in components(model)]
        self.made, self.before = weakref.WeakSet(made), tuple(before)

    def __enter__(self) -> None:
        _open.update(self.made)

    def __exit__(self, *_error: object) -> None:
        earlier = {route.module: route for route in self.before}
        for route in self.made:
            _open.discard(route)
            _ended[route] = earlier.get(route.module)
        roots = [root for reference in self.roots if (root := reference()) is not None]
        modules = dict.fromkeys(module for root in roots for module in root.modules())
        now = {module: found for module in modules if (found := route_of(module))}
        _undo([found for found in now.values() if found not in _open], restore=True)
        for replaced in self.before:
            standing = _standing(replaced)
            if standing is not None and now.get(replaced.module) not in _open:
                standing.apply()


_open: weakref.WeakSet[Route] = weakref.WeakSet()  # set for blocks that have begun and not ended
_ended: weakref.WeakKeyDictionary[Route, Route | None] = weakref.WeakKeyDictionary()  # with what was there before them


def _standing(route: Route | None) -> Route | None:
    """A route, or what held before it where its block has ended."""
    while route is not None and route in _ended:
        route = _ended[route]
    return route


def _routes(model: Any) -> list[Route]:
    return [route for _, _, module in modules(model) if (route := route_of(module))]


def _undo(routes: Iterable[Route], restore: bool) -> None:
    """Undo them, and say what others had set since: a line for what was taken away, a line for what was left."""
    away: Counter[str] = Counter()
    left: Counter[str] = Counter()
    for route in routes:
        for patch in route.replaced():
            (away if restore and patch.restorable else left)[patch.told()] += 1
        route.undo(restore=restore)
    for what, told in (("put back what was there before", away), ("left that as it is", left)):
        for text, count in told.items():
            _log.warning("heedful: %d layers had been changed since they were set: %s; reset %s", count, text, what)


def _rules(rules: Mapping[str, Backend] | None, exclude: str | Sequence[str] | None) -> list[Rule]:
    if rules is not None and not (isinstance(rules, Mapping) and all(_may_be_pattern(one) for one in rules)):
        raise InvalidArgument("rules", repr(rules), "give a mapping from patterns to backends, or None")
    excluded = (exclude,) if isinstance(exclude, str) else () if exclude is None else exclude
    if not isinstance(excluded, (list, tuple, set, frozenset)):
        raise InvalidArgument("exclude", repr(exclude), "give patterns or roles in a list, one of them, or None")
    left_alone = [rule(pattern, None, "exclude") for pattern in excluded]
    ordered = [(rule(one, None), one, wish) for one, wish in (rules or {}).items()]
    return left_alone + [replace(made, wish=_wish(wish, f"rules[{one!r}]")) for made, one, wish in ordered]


def _may_be_pattern(key: object) -> bool:
    return isinstance(key, (str, re.Pattern))


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


def components(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a pipeline by name, or the one model under no name. Raises InvalidArgument."""
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


def modules(model: Any) -> Iterator[tuple[str, str, nn.Module]]:
    """Every module once, with its path and component; torch.compile's wrappers leave no trace in the path."""
    seen: set[nn.Module] = set()
    for component, root in components(model):
        for inner, module in root.named_modules(memo=seen):
            yield ".".join(filter(None, (component, inner))).replace("_orig_mod.", ""), component, module


def _layers(model: Any) -> Iterator[Found]:
    """The attention layers. Within an encoder or an autoencoder a layer's role is that of the innermost."""
    adapters = [importlib.import_module(name) for library, name in ADAPTERS if library in sys.modules]
    homes: list[tuple[str, str]] = []  # the modules around this one that give a role, and it
    for path, component, module in modules(model):
        homes = [(around, role) for around, role in homes if not around or path.startswith(f"{around}.")]
        home = next((role for adapter in adapters if (role := adapter.home_role(module))), "")
        if home:
            homes.append((path, home))
        found = (adapter.attention_layer(module) for adapter in adapters)
        layer: Layer | None = next((layer for layer in found if layer is not None), None)
        if layer is not None:
            yield path, component, module, replace(layer, role=homes[-1][1]) if homes else layer


def _planned(model: Any, rules: Sequence[Rule], default: Wish | None) -> list[Route]:
    found = list(_layers(model))
    if not found:
        asked = ", ".join(library for library, _ in ADAPTERS if library in sys.modules)
        raise NothingCovered(
            f"{type(model).__name__} has no attention layer: none of its {sum(1 for _ in modules(model))} modules is "
            f"one by the rules of {asked}, such as an attention class with a processor, or a forward that calls SDPA"
        )
    check_that_all_decide(rules, [(path, layer.role) for path, _, _, layer in found])
    orders = [_order(path, component, layer, rules, default) for path, component, _, layer in found]
    if not any(order.routed for order in orders):
        reasons = Counter(order.obstacle or f"kept, by {order.origin}" for order in orders)
        told = "; ".join(f"{count} layers: {reason}" for reason, count in reasons.items())
        raise NothingCovered(f"none of the {len(found)} attention layers of {type(model).__name__} is covered: {told}")
    return [
        Route(module, order, layer.patches, shielded=_is_shielded(order, orders))
        for (_, _, module, layer), order in zip(found, orders, strict=True)
    ]


def _order(path: str, component: str, layer: Layer, rules: Sequence[Rule], default: Wish | None) -> Order:
    rule = deciding(rules, path, layer.role)
    wish, origin = (default, "backend") if rule is None else (rule.wish, rule.origin)
    if wish is None or layer.obstacle:
        return Order(path, component, wish, origin, layer.obstacle)
    if layer.float32_scores:
        exact = exact_only(wish)
        if exact is None:
            return Order(path, component, wish, origin, f"{wish_text(wish)} {_ROUNDS}")
        wish = exact
    if rule is None and layer.role == "vae":
        wish = _or_native(wish)
    return Order(path, component, wish, origin, float32_scores=layer.float32_scores)


_ROUNDS = "does not keep scores in float32, as its upcast_attention asks; name an exact backend for it"


def exact_only(wish: Wish) -> Wish | None:
    """The wish without the backends that are not exact; None where nothing is left."""
    create = AttentionStrategyFactory.default().create_strategy
    names = (wish,) if isinstance(wish, str) else wish
    exact = tuple(name for name in names if name == "auto" or create(name).exactness == "exact")
    return wish if exact == names else exact or None


def _or_native(wish: Wish) -> Wish:
    """The wish, and native after it, unless it may come to native anyway."""
    names = (wish,) if isinstance(wish, str) else wish
    return wish if {"auto", "native"} & set(names) else (*names, "native")


def _is_shielded(order: Order, orders: list[Order]) -> bool:
    """Whether a kept layer lies within a routed one, whose route would reach it."""
    around = (f"{other.path}." if other.path else "" for other in orders if other.routed)
    return order.wish is None and not order.obstacle and any(order.path.startswith(path) for path in around)


def _row(path: str, component: str, module: nn.Module, layer: Layer, route: Route | None) -> LayerReport:
    order = Order(path, component, None, "not set", layer.obstacle) if route is None else route.order
    replaced = [patch.told() for patch in route.replaced()] if route is not None and order.routed else []
    lost = (layer.obstacle or layer.elsewhere) if order.routed else ""
    if route is not None and order.routed and not leads_to(module.forward, route):
        replaced.append("its forward was replaced")
        lost = lost or "the new one does not call the one that was set; set the backend again"
    conflict = _conflict(layer, replaced, lost, order)
    covered = order.routed and not lost and not _is_bypassed(route)
    tallies = dict(route.ran) if route is not None else {}
    known = [tally for tally in tallies if tally is not None]
    ran: Counter[str] = Counter()
    for tally, calls in tallies.items():
        ran["none" if tally is None else tally.plan.backend] += calls
    return LayerReport(
        path=path,
        component=component,
        module=type(module).__name__,
        role=layer.role,
        requested=KEEP if order.wish is None else wish_text(order.wish),
        active=", ".join(sorted(ran)) or wish_text(order.wish or ()) if covered else OWN,
        reason=f"conflict: {conflict}" if conflict else _reason(order, route, known),
        covered=covered,
        counted=layer.softmax,
        conflict=conflict,
        ran=tuple(sorted(ran.items())),
        lowerings=tuple(sorted({step for tally in known for step in tally.lowerings})),
        seconds=sum(tally.time_of(calls) for tally, calls in tallies.items() if tally is not None),
        guard=joined_guard(known),
    )


def _conflict(layer: Layer, replaced: Sequence[str], lost: str, order: Order) -> str:
    told = "; ".join(dict.fromkeys(replaced))
    if not told and not lost:
        return layer.conflict
    still = f"so heedful does not compute it: {lost}" if lost else f"heedful still computes it ({order.origin})"
    return "; ".join(filter(None, (f"{told or 'it was changed'} since it was set, {still}", layer.conflict)))


def _is_bypassed(route: Route | None) -> bool:
    """Whether it ran and never called SDPA."""
    return route is not None and route.order.routed and route.forwards > 0 and not route.ran


def _reason(order: Order, route: Route | None, known: Sequence[Tally]) -> str:
    if order.obstacle and order.wish is not None:
        return order.obstacle
    if route is not None and _is_bypassed(route):
        return f"bypassed: it ran {route.forwards} times and never called SDPA"
    if route is not None and order.routed and not route.ran and route.compiled:
        return f"{order.origin}; compiled, and compiled code does not count its calls"
    if isinstance(order.wish, tuple):
        passed = dict.fromkeys(f"{one.name} {one}" for tally in known for one in tally.plan.passed_over)
        return "; ".join([order.origin, *passed])
    return order.origin
