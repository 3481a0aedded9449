"""Every ``scaled_dot_product_attention`` of a block of code sent to heedful, for models of any library.

A torch function mode, and no monkeypatch: it holds for one thread, from ``with`` to its end. Some of torch's functions
are one call to a mode, which sees nothing of what is inside: ``F.multi_head_attention_forward``, and ``backward``, in
which checkpointed layers are computed anew. Of these, copies are run that do not ask for modes at their door. Torch
itself takes no fused path of ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` while a mode listens.

Passed on untouched, and counted with the reason: attention that must return its weights, nested tensors, tensor
subclasses with rules of their own (``CausalBias``), and torch's fused operators where they are called themselves.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from heedful.dispatch import attention, attention_backend
from heedful.errors import InvalidArgument
from heedful.policy import mirror
from heedful.routing import Caller, Listener, take_off
from heedful.tally import Tally

P = ParamSpec("P")
R = TypeVar("R")
_compiling = torch.compiler.is_compiling
_sdpa = torch.nn.functional.scaled_dot_product_attention
_heads = torch.nn.functional.multi_head_attention_forward
_unflatten = Tensor.unflatten
_NEED_WEIGHTS = list(inspect.signature(_heads).parameters).index("need_weights")
_FUSED = (torch._native_multi_head_attention, torch._transformer_encoder_layer_fwd)
_OF_WEIGHTS = "nn.MultiheadAttention was asked for its weights (need_weights=True), which no backend makes"
_OF_NESTED = "nested tensors"
_OF_FUSED = "one of torch's fused operators was called itself"


class patch_sdpa(Caller):
    """Have every SDPA call of this thread computed by heedful, within a ``with`` block or a decorated function.

    ::

        with heedful.patch_sdpa() as seen:
            model(x)
        print(seen)

    The object says what it saw: ``covered``, ``passed``, ``backends``, ``to_dict()``. It may be entered again, also in
    other threads, and goes on counting. Layers that ``set_attention_backend`` has set keep their own backends; an
    ``attention_backend`` that is entered inside decides about its calls.

    Enter it outside of compiled code. Blocks may end in any order, as those of generators and asyncio tasks do. But
    tasks take turns on one thread: during an ``await`` inside, the others' calls are seen, too, and of several blocks
    that are open the last one counts the calls. Other threads are untouched, but for autograd's while they recompute
    for this one.

    Args:
        backend: a name (obeyed, or the call raises Refused), a list of names (the fallback order), or "auto"; None
            leaves it to the scope around, ``HEEDFUL_BACKEND`` or auto.

    Raises:
        InvalidArgument, UnknownBackend: at once.
    """

    def __init__(self, backend: str | list[str] | tuple[str, ...] | None = None) -> None:
        super().__init__()
        self._scope = None if backend is None else attention_backend(backend)
        self._passed: Counter[str] = Counter()
        self._routed = 0
        self._lock = threading.Lock()
        self._mode = _Listener(self)
        self.compiled = False

    @property
    def backends(self) -> Mapping[str, int]:
        """The calls that heedful computed, by backend; without those of layers that are set themselves."""
        found: Counter[str] = Counter()
        for tally, calls in list(self.ran.items()):
            found["none" if tally is None else tally.plan.backend] += calls
        return dict(sorted(found.items()))

    @property
    def passed(self) -> Mapping[str, int]:
        """The calls that were passed on untouched, by the reason."""
        return dict(sorted(self._passed.items()))

    @property
    def covered(self) -> int:
        """How many attention calls heedful computed."""
        return sum(self.backends.values()) + self._routed

    @property
    def total(self) -> int:
        """How many attention calls there were."""
        return self.covered + sum(self.passed.values())

    def to_dict(self) -> dict[str, Any]:
        """All of it in types that JSON has."""
        counts = {"covered": self.covered, "total": self.total, "by_layers": self._routed}
        return {**counts, "backends": dict(self.backends), "passed": dict(self.passed), "compiled": self.compiled}

    def __str__(self) -> str:
        by = [f"{backend} {calls}" for backend, calls in self.backends.items()]
        by += [f"layers set by set_attention_backend {self._routed}"] if self._routed else []
        lines = [f"covered {self.covered} of {self.total} attention calls" + (f": {', '.join(by)}" if by else "")]
        lines += [f"passed on untouched {calls}: {reason}" for reason, calls in self.passed.items()]
        lines += ["compiled code computed attention, too, and does not count its calls"] if self.compiled else []
        return "\n".join(lines)

    def __enter__(self) -> patch_sdpa:
        _open.patches.append((self, mirror.route))
        if self._scope is not None:
            self._scope.__enter__()
        mirror.route = self
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        if _open.leave(self):
            take_off(self._mode)
        if self._scope is not None:
            self._scope.__exit__(*error)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """The function, run within it. What runs between calls, or awaits, is refused."""
        kinds = (inspect.isgeneratorfunction, inspect.isasyncgenfunction, inspect.iscoroutinefunction)
        if any(kind(function) for kind in kinds):
            raise InvalidArgument("patch_sdpa", "a generator or an async function", "use it in a with statement inside")

        @functools.wraps(function)
        def within(*args: P.args, **kwargs: P.kwargs) -> R:
            with self:
                return function(*args, **kwargs)

        return within

    def resumed(self) -> Caller | None:
        """See the base class: another patch, where this one was left within the layer."""
        open_ones = [patch for patch, _ in _open.patches]
        return self if self in open_ones else open_ones[-1] if open_ones else None

    def attend(self, *args: Any, **kwargs: Any) -> Any:
        """SDPA by the backend that is wished for here."""
        return attention(*args, **kwargs)

    def count(self, tally: Tally | None) -> None:
        """One more call; threads may share the object."""
        with self._lock:
            super().count(tally)

    def visited(self) -> bool:
        """Whether this thread never entered it: autograd's threads run under the modes of the thread that asked."""
        return mirror.route is None and not _open.holds(self) and not _visit.going_on

    def visit(self, call: Callable[..., Any], *operands: Any) -> Any:
        """A call in such a thread, as if it had been entered there."""
        _visit.going_on = True
        try:
            with self:
                return call(*operands)
        finally:
            _visit.going_on = False

    def answer(self, types: Iterable[type], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An SDPA call: by the innermost layer that is set, else by the scope's wish, else untouched."""
        route = mirror.route
        if route is None:  # heedful computes, or a layer that is kept as it is
            return _sdpa(*args, **kwargs)
        why = _obstacle(types, args, kwargs)
        if why:
            return self.pass_on(_sdpa, why, args, kwargs)
        out = route.attend(*args, **kwargs)
        if _compiling():
            self.compiled = True
        elif not isinstance(route, patch_sdpa):
            with self._lock:
                self._routed += 1
        return out

    def answer_heads(self, types: Iterable[type], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of ``multi_head_attention_forward``: the SDPA call inside of it is seen, where it has one."""
        if mirror.route is None:
            return _heads(*args, **kwargs)
        weights = args[_NEED_WEIGHTS] if len(args) > _NEED_WEIGHTS else kwargs.get("need_weights", True)
        why = _OF_WEIGHTS if weights else _foreign(types)
        if why:
            return self.pass_on(_heads, why, args, kwargs)
        return self.enter(_heads_inside, args, kwargs)

    def enter(self, inside: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What a mode does not see into, under the mode."""
        with self._mode:
            return inside(*args, **kwargs)

    def pass_on(self, function: Callable[..., Any], why: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """A call as it is. SDPA calls that it makes itself are nobody's."""
        if _compiling():
            self.compiled = True
        else:
            with self._lock:
                self._passed[why] += 1
        before, mirror.route = mirror.route, None
        try:
            return function(*args, **kwargs)
        finally:
            mirror.route = before


class _Listener(Listener):
    """Hands attention to its owner."""

    def __init__(self, owner: patch_sdpa) -> None:
        super().__init__()
        self.owner = owner

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not _compiling() and func not in _KNOWN:  # dynamo's idea of a set of functions is another
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        if func is _unflatten:  # which dynamo traces as a method only, until at least torch 2.13
            return args[0].unflatten(*args[1:], **kwargs)
        if func is _sdpa:
            return self._handed(self.owner.answer, types, args, kwargs)
        if func is _heads:
            return self._handed(self.owner.answer_heads, types, args, kwargs)
        for backward, inside in _BACKWARDS:
            if func is backward and not _foreign(types):
                return self.owner.enter(inside, args, kwargs)
        if func in _FUSED and mirror.route is not None:
            return self.owner.pass_on(func, _OF_FUSED, args, kwargs)
        return func(*args, **kwargs)

    def _handed(self, answer: Callable[..., Any], *call: Any) -> Any:
        if not _compiling() and self.owner.visited():
            return self.owner.visit(answer, *call)
        return answer(*call)


class _Open(threading.local):
    """The patches that this thread has entered and not left, in that order, each with the route that stood before."""

    def __init__(self) -> None:
        self.patches: list[tuple[patch_sdpa, Any]] = []

    def holds(self, patch: patch_sdpa) -> bool:
        return any(entered is patch for entered, _ in self.patches)

    def leave(self, patch: patch_sdpa) -> bool:
        """Undo the last entry of a patch, whatever was entered since; whether there was one in this thread."""
        place = next((place for place in reversed(range(len(self.patches))) if self.patches[place][0] is patch), None)
        if place is None:
            return False
        _, before = self.patches.pop(place)
        if place == len(self.patches):
            if mirror.route is patch:
                mirror.route = before
        elif self.patches[place][1] is patch:  # the next one is to put back what this one would have
            self.patches[place] = (self.patches[place][0], before)
        return True


class _Visit(threading.local):
    """Whether this thread is within a call of a patch that it did not enter."""

    def __init__(self) -> None:
        self.going_on = False


_open = _Open()
_visit = _Visit()


def _obstacle(types: Iterable[type], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Why a call cannot go to heedful; empty where it can."""
    tensors = [given for given in (*args, *kwargs.values()) if isinstance(given, Tensor)]
    if any(tensor.is_nested for tensor in tensors):
        return _OF_NESTED
    if not _compiling() and torch._C._get_tracing_state() is not None:
        return "torch.jit.trace, to which sizes are tensors"
    return _foreign(types)


def _foreign(types: Iterable[type]) -> str:
    names = sorted(kind.__name__ for kind in types if kind not in (Tensor, torch.nn.Parameter))
    return f"{', '.join(names)} has rules of its own" if names else ""


def _never(*_tensors: Any) -> bool:
    return False


_DOORS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


def _without_a_door(function: Any) -> FunctionType:
    """A function of torch that does not look for modes when it is entered: the same code, other names for its door."""
    names = {**function.__globals__, **dict.fromkeys(_DOORS, _never)}
    del names["__name__"]  # or dynamo takes them for those of torch's module
    made = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


_heads_inside = _without_a_door(_heads)
_BACKWARDS = tuple(
    (one, _without_a_door(one)) for one in (Tensor.backward, torch.autograd.backward, torch.autograd.grad)
)
_KNOWN = frozenset({_sdpa, _heads, _unflatten, *_FUSED, *(function for function, _ in _BACKWARDS)})
