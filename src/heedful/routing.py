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
_depth, _mode_at = torch._C._len_torch_function_stack, torch._C._get_function_stack_at
_pop, _push = torch._C._pop_torch_function_stack, torch._C._push_on_torch_function_stack
_sdpa = torch.nn.functional.scaled_dot_product_attention
_unflatten = Tensor.unflatten
_MOST_KINDS = 4096
# Where every exact kernel keeps the scores of half-precision queries and keys in float32, as the products of two half
# numbers are exact in it; the tests show it for the CPU's. On others, such as MPS, matrix products round.
KEEP_FLOAT32_SCORES = frozenset({"cpu", "cuda", "xpu"})
_HALVES = frozenset({torch.float16, torch.bfloat16})
_KEY = "_heedful_route"  # in the module's __dict__: a wrapper put over ``forward`` later would hide the route


@dataclass(frozen=True)
class Order:
    """What was ordered for one layer. ``wish`` None leaves it alone; ``obstacle`` says why it cannot be routed.

    ``float32_scores``: its scores are to be float32 whatever the dtype of query and key.
    """

    path: str
    component: str
    wish: Wish | None
    origin: str
    obstacle: str = ""
    float32_scores: bool = False

    @property
    def routed(self) -> bool:
        """Whether the layer's calls go to heedful."""
        return self.wish is not None and not self.obstacle


class Caller:
    """Whose calls the dispatcher computes aside: what stands in ``mirror.route`` meanwhile, and counts what ran."""

    def __init__(self) -> None:
        self.ran: dict[Tally | None, int] = {}  # None: an empty call, which needs no kernel

    def aside(self, run: Callable[..., Any], *operands: Any) -> Any:
        """A call of the caller's, by its bound function: SDPA calls of the backend's own are not the caller's."""
        mirror.route = None
        try:
            while (pick := getattr(run, "pick", None)) is not None:  # whose turn it is, or whom it passes the call to
                run = pick(*operands)
            out = run(*operands)
        finally:
            mirror.route = self
        self.count(getattr(run, "tally", None))
        return out

    def resumed(self) -> Caller | None:
        """Whose calls are seen once a layer within it has ended: its own, unless it has ended meanwhile."""
        return self

    def count(self, tally: Tally | None) -> None:
        """One more call that ran."""
        if tally not in self.ran and len(self.ran) >= _MOST_KINDS:
            self._fold()
        self.ran[tally] = self.ran.get(tally, 0) + 1

    def _fold(self) -> None:
        """Count calls where their tallies are counted, once there are so many that these have been folded."""
        ran: dict[Tally | None, int] = {}
        for tally, calls in self.ran.items():
            home = None if tally is None else tally.home
            ran[home] = ran.get(home, 0) + calls
        self.ran = ran


class Route(Caller):
    """A layer's order, carried out. ``patches`` are attributes that an integration wants held meanwhile.

    A layer that is kept while a module around it is routed (``shielded``) runs as if outside of any route.
    """

    def __init__(
        self, module: nn.Module, order: Order, patches: Sequence[Patch] = (), *, shielded: bool = False
    ) -> None:
        super().__init__()
        self.module, self.order = module, order
        self.wish = order.wish
        self.float32_scores = order.float32_scores
        self.scope = scope(order.wish)
        self.inner: Callable[..., Any] = module.forward
        self.enabled = False
        self.compiled = False
        self.forwards = 0
        _routes.add(self)
        own = (*patches, Patch(module, "forward", self)) if order.routed or shielded else ()
        self.patches = (*own, Patch(module, _KEY, self))

    def __getstate__(self) -> dict[str, Any]:
        """A pickled bound method is looked up by its name, and would find the route itself. Copies start at 0 calls."""
        own = isinstance(self.inner, MethodType) and self.inner.__func__ is type(self.module).forward
        left = {"ran", "forwards", *(["inner"] if own else [])}
        return {name: value for name, value in vars(self).items() if name not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.ran, self.forwards = {}, 0
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

    def undo(self, *, restore: bool = False) -> None:
        """Remove it. Where a wrapper was put over it since (by an offloading hook), it passes calls through.

        ``restore``: what is watched and was set by somebody else since is put back, too, unless weights would be lost.
        """
        self.enabled = False
        for patch in reversed(self.patches):
            patch.undo(restore=restore)

    def replaced(self) -> list[Patch]:
        """The watched attributes that somebody else has set since."""
        return [patch for patch in self.patches if patch.watched and patch.displaced]

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
            with self.scope:
                if before is not None and listens():  # `before` may be what a patch left that ended out of turn
                    out = self.inner(*args, **kwargs)
                else:
                    _push(_redirect)
                    try:
                        out = self.inner(*args, **kwargs)
                    finally:
                        take_off(_redirect)
            self.forwards += 1  # one that raised may have called SDPA, and is not counted there either
            return out
        finally:
            mirror.route = before if before is None or _compiling() else before.resumed()

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
        if self.float32_scores and query.device.type not in KEEP_FLOAT32_SCORES and query.dtype in _HALVES:
            dtype, query, key, value = query.dtype, query.float(), key.float(), value.float()
            call = (attn_mask, dropout_p, is_causal, scale, enable_gqa)
            return attention(query, key, value, *call, backend=self.wish).to(dtype)
        return attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend=self.wish)


class Listener(TorchFunctionMode):
    """Hands SDPA calls to heedful; all else goes on as it is."""


class _Redirect(Listener):
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


def listens() -> bool:
    """Whether a mode of heedful's is on this thread's stack; if so it is the innermost as a rule."""
    return any(isinstance(_mode_at(place), Listener) for place in range(_depth() - 1, -1, -1))


def take_off(mode: Listener) -> None:
    """Take a mode from this thread's stack, and leave those that were put over it and are still open."""
    over = []
    while _depth():
        top = _pop()
        if top is mode:
            break
        over.append(top)
    for other in reversed(over):
        _push(other)


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
