"""One layer's attention calls sent to heedful: what happens inside a routed module, and how it is undone.

A route is the module's ``forward``. It runs the forward that was there before, under a torch function mode that sees
every ``scaled_dot_product_attention`` of this thread. The mode is shared and reads which route is running from a
thread-local, so the innermost route decides and other threads see nothing. SDPA calls made while heedful computes
(its strategies' own) are left alone.

A route is a plain object that refers to its module, so copies and pickles of a routed model are routed themselves.
``nn.DataParallel`` and ``copy.copy`` share the route of the original, as they share any ``forward`` of an instance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from heedful.dispatch import attention
from heedful.layers import Patch
from heedful.policy import Wish, mirror, scope
from heedful.tally import Tally

_compiling = torch.compiler.is_compiling
_sdpa = torch.nn.functional.scaled_dot_product_attention
_unflatten = Tensor.unflatten
_MOST_KINDS = 4096
_KEY = "_heedful_route"  # in the module's __dict__: a wrapper put over ``forward`` later would hide the route


@dataclass(frozen=True)
class Order:
    """What was ordered for one layer. ``wish`` None leaves it alone; ``obstacle`` says why it cannot be routed."""

    path: str
    component: str
    wish: Wish | None
    origin: str
    obstacle: str = ""

    @property
    def routed(self) -> bool:
        """Whether the layer's calls go to heedful."""
        return self.wish is not None and not self.obstacle


class Route:
    """A layer's order, carried out. ``patches`` are attributes that an integration wants held meanwhile.

    A layer that is kept while a module around it is routed (``shielded``) runs as if outside of any route.
    """

    def __init__(
        self, module: nn.Module, order: Order, patches: Sequence[Patch] = (), *, shielded: bool = False
    ) -> None:
        self.module, self.order = module, order
        self.wish = order.wish
        self.scope = scope(order.wish)
        self.inner: Callable[..., Any] = module.forward
        self.enabled = False
        self.compiled = False
        self.forwards = 0
        self.ran: dict[Tally | None, int] = {}  # None: an empty call, which needs no kernel
        _routes.add(self)
        own = (*patches, Patch(module, "forward", self)) if order.routed or shielded else ()
        self.patches = (*own, Patch(module, _KEY, self))

    def __getstate__(self) -> dict[str, Any]:
        """A pickled bound method is looked up by its name, and would find the route itself. Copies start at 0 calls."""
        own = isinstance(self.inner, MethodType) and self.inner.__func__ is type(self.module).forward
        left = {"ran", *(["inner"] if own else [])}
        return {name: value for name, value in vars(self).items() if name not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.ran = {}
        _routes.add(self)
        if "inner" not in state:
            self.inner = MethodType(type(self.module).forward, self.module)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The forward that was there before; ``inspect.signature`` reads it."""
        return self.inner

    def apply(self) -> None:
        """Install it. It holds from the module's next call on."""
        for patch in self.patches:
            patch.apply()
        self.enabled = True

    def undo(self) -> None:
        """Remove it. Where a wrapper was put over it since (by an offloading hook), it passes calls through."""
        self.enabled = False
        for patch in reversed(self.patches):
            patch.undo()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        if not self.enabled:
            return self.inner(*args, **kwargs)
        before = mirror.route
        mirror.route = None if self.wish is None else self
        try:
            if _compiling():
                return self._traced(args, kwargs)
            if self.wish is None:
                with self.scope:  # of no wish: the layers around it are not this one's
                    return self.inner(*args, **kwargs)
            self.forwards += 1
            with self.scope:
                if before is not None:  # the mode is on already
                    return self.inner(*args, **kwargs)
                with _redirect:
                    return self.inner(*args, **kwargs)
        finally:
            mirror.route = before

    def _traced(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``__call__`` as dynamo traces it: a ContextVar it cannot trace, its mirror it can."""
        self.compiled = True
        before, mirror.wish = mirror.wish, self.wish
        try:
            with _redirect:
                return self.inner(*args, **kwargs)
        finally:
            mirror.wish = before

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        """SDPA, as the layer meant it, by the route's backend."""
        return attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend=self.wish)

    def aside(self, run: Callable[..., Any], *operands: Any) -> Any:
        """A call within the layer, by its bound function: SDPA calls of the backend's own are not the layer's."""
        mirror.route = None
        try:
            while (pick := getattr(run, "pick", None)) is not None:  # whose turn it is, or whom it passes the call to
                run = pick(*operands)
            out = run(*operands)
        finally:
            mirror.route = self
        tally = getattr(run, "tally", None)
        if tally not in self.ran and len(self.ran) >= _MOST_KINDS:
            self._fold()
        self.ran[tally] = self.ran.get(tally, 0) + 1
        return out

    def _fold(self) -> None:
        """Count calls where their tallies are counted, once there are so many that these have been folded."""
        ran: dict[Tally | None, int] = {}
        for tally, calls in self.ran.items():
            home = None if tally is None else tally.home
            ran[home] = ran.get(home, 0) + calls
        self.ran = ran


class _Redirect(TorchFunctionMode):
    """Sends SDPA to the running route; all else goes on as it is. Stateless: threads share it."""

    def __torch_function__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _sdpa and mirror.route is not None:
            return mirror.route.attend(*args, **(kwargs or {}))
        if func is _unflatten:  # dynamo traces it as a method only, until at least torch 2.13
            return args[0].unflatten(*args[1:], **(kwargs or {}))
        return func(*args, **kwargs) if kwargs else func(*args)


_redirect = _Redirect()
_routes: WeakSet[Route] = WeakSet()


def ran_by_layer() -> dict[Tally, dict[str, int]]:
    """Of every tally, how many of its calls were whose layer's, by path."""
    found: dict[Tally, dict[str, int]] = {}
    for route in list(_routes):
        for tally, calls in route.ran.items():
            if tally is not None:
                layers = found.setdefault(tally.home, {})
                layers[route.order.path] = layers.get(route.order.path, 0) + calls
    return found


def route_of(module: nn.Module) -> Route | None:
    """The route that a module has, if any."""
    return vars(module).get(_KEY)
