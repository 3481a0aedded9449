"""Whether a strategy's kernels run here: imported, then tried on a tiny problem, once for a device and process.

A package that imports is not yet one that works: a wheel for another torch or another GPU fails at its first launch, or
answers noise. So before a strategy with a source of its own is called available, it computes one small problem, and the
answer is held to the formula. What goes wrong is kept as the text of a refusal. A strategy without sources is torch's
own and is taken at its word.

The trial runs in a thread of its own, where none of the caller's modes, scopes and streams hold, and leaves random
states as they were. Against three things it is no guard: a kernel that ends the process or never returns; an illegal
access to GPU memory, after which CUDA refuses every call of this process; and numbers that another thread draws from
torch's CPU generator during the trial, which come a second time.

Shapes: B batch, S length, H heads, D head dim, T packed tokens.
"""

from __future__ import annotations

import contextvars
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from heedful.errors import CannotLoad
from heedful.facts import DeviceFacts, Facts
from heedful.masks import Varlen
from heedful.problem import problem_for_shapes
from heedful.refusal import Refusal
from heedful.strategy import AttentionStrategy, Limits, mask_arguments

Refusals = tuple[Refusal, ...]
_LENGTH, _HEADS, _DIM = 64, 2, 64
_NAMES = ("query", "key", "value")
_SIMILAR = 0.98  # cosine: kernels with eight bits reach 0.999 on such inputs, noise none
_LONGER = 1.25  # an answer may be as much longer, or shorter, than the formula's
_one_at_a_time = threading.RLock()


class _Here(threading.local):
    trying = False  # whether this thread is a trial


_here = _Here()


def ready(strategy: AttentionStrategy, facts: Facts, device: torch.device, *, downloads: bool = False) -> Refusals:
    """Load a strategy's kernels and try them on a device; empty where they work. Remembered by the strategy object.

    On a meta device, during a graph capture, and inside another trial they are only loaded.
    """
    if not strategy.sources:
        return ()
    known: dict[Any, Refusals] = strategy.__dict__.setdefault("_tried", {})
    place = (str(device), torch.are_deterministic_algorithms_enabled())
    if (found := known.get(place)) is not None:
        return found
    if _here.trying:
        return _loaded(strategy, facts, downloads)
    with _one_at_a_time:
        if (found := known.get(place)) is not None:
            return found
        found = _loaded(strategy, facts, downloads)
        if not found:
            if device.type == "meta" or _capturing(device):
                return ()
            try:
                found = _apart(lambda: _tried(strategy, facts.device(device), device))
            except torch.OutOfMemoryError as error:  # says nothing about the kernel: the next plan tries again
                return (_raised(error),)
        known[place] = found
        return found


def _loaded(strategy: AttentionStrategy, facts: Facts, downloads: bool) -> Refusals:
    try:
        strategy.load(facts, downloads)
    except CannotLoad as error:
        return (Refusal("import", str(error), "kernels that can be loaded", "reinstall it"),)
    return ()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _apart(trial: Callable[[], Refusals]) -> Refusals:
    """What it returns or raises, called in a thread and a context of its own."""
    future: Future[Refusals] = Future()

    def call() -> None:
        _here.trying = True
        try:
            future.set_result(trial())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=contextvars.Context().run, args=(call,), name="heedful-trial", daemon=True).start()
    return future.result()


def _tried(strategy: AttentionStrategy, here: DeviceFacts, device: torch.device) -> Refusals:
    """What a tiny problem says against the strategy; nothing where it takes no plain one."""
    try:
        with _undisturbed(device):
            limits = strategy.limits_for(here.type)
            for dtype, layout in itertools.product(limits.dtypes, limits.layouts):
                drawn = [_laid_out(layout, tensor) for tensor in _draw(limits, dtype)]
                given = {name: tensor.to(device) for name, tensor in zip(_NAMES, drawn, strict=True)}
                packed = _one_sequence(device) if layout == "THD" else None
                if _takes(strategy, here, layout, given, packed):
                    out = strategy.compute_attention(*given.values(), **mask_arguments(packed))
                    return _held_to_the_formula(out, drawn, layout, device)
    except torch.OutOfMemoryError:
        raise
    except (Exception, SystemExit) as error:  # whatever a kernel raises here keeps it from being used
        return (_raised(error),)
    return ()


def _raised(error: BaseException) -> Refusal:
    observed = f"a tiny problem raised {type(error).__name__}: {error}"
    return Refusal("probe", observed, "a right answer", "see the package's own installation notes")


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """What threads have in common, warnings and random states, kept from the trial; and its device as the first one."""
    with ExitStack() as within:
        within.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        within.enter_context(torch.no_grad())
        if device.type in {"cuda", "xpu"}:
            module = getattr(torch, device.type)
            index = module.current_device() if device.index is None else device.index
            within.enter_context(module.device(index))
            within.enter_context(torch.random.fork_rng(devices=[index], device_type=device.type))
        else:
            within.enter_context(torch.random.fork_rng(devices=[]))
        yield


def _draw(limits: Limits, dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value (B, S, H, D) in a head dim that the limits take, on the CPU."""
    unit = limits.head_dim_multiple
    dim = -(-max(_DIM, limits.min_head_dim) // unit) * unit
    if limits.max_head_dim is not None and dim > limits.max_head_dim:
        dim = limits.max_head_dim // unit * unit
    draw = torch.Generator().manual_seed(0)
    shape = (1, _LENGTH, _HEADS, dim)
    return [torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu").to(dtype) for _ in range(3)]


def _laid_out(layout: str, tensor: Tensor) -> Tensor:
    """A tensor (1, S, H, D) in a layout."""
    return tensor.squeeze(0) if layout == "THD" else tensor.transpose(1, 2).contiguous() if layout == "BHSD" else tensor


def _one_sequence(device: torch.device) -> Varlen:
    ends = torch.tensor([0, _LENGTH], dtype=torch.int32, device=device)
    return Varlen(ends).with_lengths((_LENGTH,), (_LENGTH,))


def _takes(
    strategy: AttentionStrategy, here: DeviceFacts, layout: str, given: dict[str, Tensor], packed: Varlen | None
) -> bool:
    """Whether the strategy has nothing itself against this plain call."""
    shapes = (tuple(tensor.shape) for tensor in given.values())
    problem = problem_for_shapes(*shapes, dtype=given["query"].dtype, device=here, mask=packed, layout=layout)
    if strategy.refusals(problem):
        return False
    if strategy.has_own_validation():
        try:
            strategy.validate_constraints(**given, attn_mask=packed, layout=layout)
        except (ValueError, TypeError, RuntimeError):
            return False
    return True


def _held_to_the_formula(out: object, drawn: list[Tensor], layout: str, device: torch.device) -> Refusals:
    """What the answer to a tiny problem says against a kernel."""
    like = drawn[0]
    if not isinstance(out, Tensor):
        observed, wanted = type(out).__name__, "a tensor"
    elif (out.shape, out.dtype, out.device.type) != (like.shape, like.dtype, device.type):
        observed = f"{_short(out.dtype)} of shape {tuple(out.shape)} on {out.device.type}"
        wanted = f"{_short(like.dtype)} of shape {tuple(like.shape)} on {device.type}"
    else:
        exact = _formula(*(_by_heads(layout, tensor.double()) for tensor in drawn))
        answer = _by_heads(layout, out.cpu().double())
        similar = torch.cosine_similarity(answer.flatten(), exact.flatten(), dim=0).item()
        longer = (answer.norm() / exact.norm()).item()
        if similar >= _SIMILAR and 1 / _LONGER <= longer <= _LONGER:
            return ()
        observed, wanted = f"cosine {similar:.3f} to the formula, length {longer:.3f}", f"at least {_SIMILAR}, and 1"
    text = f"{observed} on a tiny problem"
    return (Refusal("probe", text, wanted, "install a build for this torch and this device"),)


def _by_heads(layout: str, tensor: Tensor) -> Tensor:
    """(H, S, D)."""
    return tensor.squeeze(0) if layout == "BHSD" else tensor.reshape(tensor.shape[-3:]).transpose(0, 1)


def _formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, dim=-1) @ value


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
