"""ComfyUI: the attention override of one model, on heedful's strategies; the node pack in integrations/comfyui uses it.

ComfyUI asks ``model_options["transformer_options"]["optimized_attention_override"](func, *args, **kwargs)`` at each
attention call of the diffusion model, where ``func(*args, **kwargs)`` is what it would have done. Its text encoders and
its VAE never ask. Imports nothing of ComfyUI: a model is whatever has ``clone()`` and ``model_options``.

What is not understood is never computed by guess: an argument, or a mask's shape, that heedful does not know goes the
way that the fallback says, as does a call that the backend refuses.

Shapes: B batch, N tokens (Q of queries, K of keys), H heads, D head dim. q, k, v are (B, N, H*D), or (B, H, N, D) with
``skip_reshape``; so is the answer, with ``skip_output_reshape``.
"""

from __future__ import annotations

import fnmatch
import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from heedful.dispatch import attention, default_dispatcher
from heedful.errors import HeedfulError, InvalidArgument
from heedful.factory import AttentionStrategyFactory
from heedful.layer_report import wish_text
from heedful.models import exact_only
from heedful.policy import Wish, mirror
from heedful.problem import problem_for_shapes
from heedful.routing import Caller
from heedful.run_report import stars
from heedful.select import Plan
from heedful.tally import Tally

_log = logging.getLogger("heedful")
_compiling = torch.compiler.is_compiling

OPTIONS, KEY = "transformer_options", "optimized_attention_override"
OFF = "heedful_attention_off"  # in a model's own options: an override of heedful's below a foreign one does nothing
DISABLED, KEEP = "disabled", "keep"
Fallback = Literal["strict", "warn", "silent"]
UNCOVERED = (
    "CLIP and VAE are not covered: ComfyUI asks for an override in the diffusion model only, so they compute attention "
    "as ComfyUI was started to."
)
_IGNORED = {OPTIONS, "_inside_attn_wrapper"}  # who calls, and not how to compute
_MOST_KINDS = 4096


class _Call(NamedTuple):
    """The arguments of ComfyUI's attention functions, by its names and in its order."""

    q: Tensor
    k: Tensor
    v: Tensor
    heads: int
    mask: Tensor | None = None
    attn_precision: torch.dtype | None = None
    skip_reshape: bool = False
    skip_output_reshape: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    low_precision_attention: bool = True


_POSITIONAL = _Call._fields[:8]
_REQUIRED = _Call._fields[:4]


@dataclass(frozen=True)
class Rule:
    """Which backend computes the calls whose address matches a pattern; None leaves them to ComfyUI."""

    pattern: str
    wish: Wish | None


class AttentionOverride:
    """Computes a model's attention calls by a backend, and counts what ran.

    ``backend``: a name, a list, or "auto". ``before``: the override that was there, asked in place of ``func`` wherever
    this one does not compute. ``fallback``: "strict" raises what kept the backend from computing, "warn" logs it once
    and passes the call on, "silent" passes it on; the report holds it in every case. Other errors are always raised.
    Copies of a model share it, and its counts.
    """

    def __init__(
        self,
        backend: Any = "auto",
        fallback: str = "warn",
        rules: tuple[Rule, ...] = (),
        before: Callable[..., Any] | None = None,
    ) -> None:
        if fallback not in get_args(Fallback):
            raise InvalidArgument("fallback", repr(fallback), f"give one of {', '.join(get_args(Fallback))}")
        self.wish, self.fallback, self.rules, self.before = wish_of(backend, "backend"), fallback, rules, before
        self.ran: Counter[tuple[str, str]] = Counter()  # by address and backend
        self.passed_on: Counter[tuple[str, str]] = Counter()  # by address and reason
        self.compiled = False
        self._counting = threading.Lock()

    def __copy__(self) -> AttentionOverride:
        return self

    def __deepcopy__(self, _memo: Any) -> AttentionOverride:
        return self

    def __call__(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One attention call. Raises HeedfulError with the fallback "strict"."""
        options = kwargs.get(OPTIONS) or {}
        if options.get(OFF):
            return self._passed_on(func, args, kwargs)
        address = "model"
        try:
            call = _read(args, kwargs)
            query, key, value, layout = _operands(call)
            address = _address(options, query, key, layout)
            wish = self._wish_for(address)
            if wish is not None:
                mask = _mask(call, query, key, layout)
                exact = _precise(call, wish)
                words = {"scale": call.scale, "enable_gqa": call.enable_gqa, "layout": layout, "backend": exact}
                out = self._computed(address, query, key, value, mask, words)
                return _shaped(out, layout, call.skip_output_reshape)
        except HeedfulError as error:
            if self.fallback == "strict":
                raise
            self._tell(address, " ".join(str(error).split()))
        else:
            self._tell(address, "kept, by a rule", quiet=True)
        return self._passed_on(func, args, kwargs)

    def _computed(
        self, address: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, words: Mapping[str, Any]
    ) -> Tensor:
        if _compiling():
            self.compiled = True
            out: Tensor = attention(query, key, value, mask, **words)
            return out
        before, watch = mirror.route, _Watch()
        mirror.route = watch
        try:
            out = attention(query, key, value, mask, **words)
        finally:
            mirror.route = before
        with self._counting:
            if len(self.ran) < _MOST_KINDS or (address, watch.backend) in self.ran:
                self.ran[address, watch.backend] += 1
        return out

    def _wish_for(self, address: str) -> Wish | None:
        for rule in self.rules:
            if fnmatch.fnmatchcase(address, rule.pattern):
                return rule.wish
        return self.wish

    def _passed_on(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs) if self.before is None else self.before(func, *args, **kwargs)

    def _tell(self, address: str, reason: str, *, quiet: bool = False) -> None:
        if _compiling():
            self.compiled = True
            return
        with self._counting:
            known = any(reason == told for _, told in self.passed_on)
            if len(self.passed_on) < _MOST_KINDS or (address, reason) in self.passed_on:
                self.passed_on[address, reason] += 1
        if not known and not quiet and self.fallback == "warn":
            _log.warning("heedful: ComfyUI's own attention computes calls of %s: %s", address, reason)

    def report(self) -> str:
        """What ran so far, and what was passed on and why, as text."""
        rows = [("calls", "where", "computed by", "reason")]
        rows += [(str(calls), where, by, why) for (where, by, why), calls in self._rows().items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        unused = [rule.pattern for rule in self.rules if not self._matched(rule)]
        told = [f"no call matched the rule {pattern!r}" for pattern in unused if len(rows) > 1]
        compiled = ["compiled code does not count its calls"] if self.compiled else []
        nothing = ["no attention call yet: run the sampler first"] if len(rows) == 1 and not compiled else []
        return "\n".join([str(self), *(nothing or lines), *told, *compiled, UNCOVERED])

    def _rows(self) -> Counter[tuple[str, str, str]]:
        own = "ComfyUI" if self.before is None else "the override before"
        rows: Counter[tuple[str, str, str]] = Counter()
        with self._counting:
            for (where, backend), calls in self.ran.items():
                rows[stars(where), backend, ""] += calls
            for (where, reason), calls in self.passed_on.items():
                rows[stars(where), own, reason] += calls
        return rows

    def _matched(self, rule: Rule) -> bool:
        """Whether it decided about a call; an earlier rule may have been first."""
        seen = {where for where, _ in (*self.ran, *self.passed_on)}
        first = (next((one for one in self.rules if fnmatch.fnmatchcase(where, one.pattern)), None) for where in seen)
        return any(one is rule for one in first)

    def __str__(self) -> str:
        told = [f"{rule.pattern} = {KEEP if rule.wish is None else wish_text(rule.wish)}" for rule in self.rules]
        wish = KEEP if self.wish is None else wish_text(self.wish)
        return f"heedful: backend {wish}, fallback {self.fallback}" + (f", rules {'; '.join(told)}" if told else "")


class _Watch(Caller):
    """Makes one call, so that its tally says what ran; an empty call needs no kernel."""

    backend = "none"

    def count(self, tally: Tally | None) -> None:
        """Remember it."""
        self.backend = self.backend if tally is None else tally.plan.backend


def with_override(model: Any, backend: Any, fallback: str = "warn", rules: str = "") -> tuple[Any, str]:
    """A clone of a ComfyUI model whose attention a backend computes, and a report; the model itself stays as it is.

    An override of heedful's that is there is replaced, a foreign one is asked wherever heedful does not compute.
    "disabled" takes heedful's away and leaves foreign ones. ``rules``: see ``parsed_rules``.
    Raises InvalidArgument and UnknownBackend.
    """
    clone = model.clone()
    options = dict(clone.model_options)
    inner = dict(options.get(OPTIONS) or {})
    top = inner.pop(KEY, None)
    before = top
    while isinstance(before, AttentionOverride):
        before = before.before
    inner.pop(OFF, None)
    if backend == DISABLED:
        if before is not None:
            inner[KEY] = before
        if before is not None and before is top:
            inner[OFF] = True  # a foreign override, with perhaps one of heedful's below it that cannot be seen
        text = "heedful: disabled; attention is computed by " + (
            "ComfyUI" if before is None else "the override that was there before"
        )
    else:
        inner[KEY] = override = AttentionOverride(backend, fallback, parsed_rules(rules), before)
        text = "\n".join([str(override), *_outlook(override), UNCOVERED])
    options[OPTIONS] = inner
    clone.model_options = options
    return clone, text


def override_of(model: Any) -> AttentionOverride | None:
    """heedful's override of a ComfyUI model, where it is the first to be asked."""
    found = (model.model_options.get(OPTIONS) or {}).get(KEY)
    return found if isinstance(found, AttentionOverride) else None


def override_report(model: Any) -> str:
    """What ran in a ComfyUI model so far, as text."""
    found = override_of(model)
    if found is not None:
        return found.report()
    foreign = (model.model_options.get(OPTIONS) or {}).get(KEY)
    told = (
        "none" if foreign is None else f"not heedful's but {getattr(foreign, '__qualname__', type(foreign).__name__)}"
    )
    return f"heedful: this model's attention override is {told}; put the node Attention Backend before the sampler"


def parsed_rules(text: str) -> tuple[Rule, ...]:
    """Rules from lines ``pattern = backend``; a comma makes a list of backends, ``keep`` leaves calls to ComfyUI.

    A pattern is matched against a call's address, ``model.<block>.<self or cross>``, such as ``model.input.4.cross``;
    ``*`` stands for anything. The first that matches decides. Empty lines and what follows ``#`` are skipped.
    Raises InvalidArgument and UnknownBackend.
    """
    rules = []
    for number, line in enumerate(text.splitlines(), 1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        pattern, equals, wish = (part.strip() for part in content.partition("="))
        if not (pattern and equals and wish):
            raise InvalidArgument(
                "rules", f"{content!r} in line {number}", "write pattern = backend, as *.cross = native"
            )
        rules.append(Rule(pattern, wish_of(wish, f"rules, line {number}")))
    return tuple(rules)


def wish_of(backend: Any, origin: str) -> Wish | None:
    """A wish from a name, names with commas between, or a list; None for "keep". Raises as the registry does."""
    names = backend.split(",") if isinstance(backend, str) else backend
    if (
        not isinstance(names, (list, tuple))
        or not names
        or not all(isinstance(name, str) and name.strip() for name in names)
    ):
        raise InvalidArgument(origin, repr(backend), "give a backend's name, names with commas, 'auto' or 'keep'")
    words = tuple(name.strip() for name in names)
    if words == (KEEP,):
        return None
    resolve = AttentionStrategyFactory.default().resolve
    resolved = tuple(word if word == "auto" else resolve(word, origin) for word in words)
    return resolved[0] if len(resolved) == 1 else resolved


def backend_names() -> list[str]:
    """What the node offers: auto, every strategy, keep (for rules alone), disabled."""
    return ["auto", *AttentionStrategyFactory.default().strategies(), KEEP, DISABLED]


def _outlook(override: AttentionOverride) -> list[str]:
    """What a plain call would be computed by on this machine, for each wish."""
    wishes = dict.fromkeys(wish for wish in (override.wish, *(rule.wish for rule in override.rules)) if wish)
    lines = []
    for wish in wishes:
        plan = _plain_plan(wish)
        told = "; ".join(
            f"{verdict.name} {verdict}" for verdict in plan.passed_over or plan.verdicts if verdict.refusals
        )
        why = f" ({told})" if told and wish != "auto" else ""
        end = {"strict": "the call raises"}.get(override.fallback, "the call is passed on")
        lines.append(
            f"a plain call under {wish_text(wish)}: " + (f"{end}{why}" if plan.refused else plan.backend + why)
        )
    return lines


def _plain_plan(wish: Wish) -> Plan:
    """The plan of a plain call, in half precision on the first GPU, or in float32 on the CPU."""
    names = default_dispatcher.facts.devices
    name = next((name for name in names if not name.startswith("cpu")), "cpu")
    device = torch.device(name)
    dtype, shape = torch.float32 if name == "cpu" else torch.float16, (1, 8, 1024, 64)
    facts = default_dispatcher.facts.device(device)
    problem = problem_for_shapes(shape, shape, shape, dtype=dtype, device=facts)
    return default_dispatcher.plan(problem, wish, device=device)


def _read(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Call:
    """The call's arguments by name. Raises InvalidArgument for one that heedful does not know."""
    if len(args) > len(_POSITIONAL):
        raise InvalidArgument("args", f"{len(args)} of them", f"heedful knows {', '.join(_POSITIONAL)}")
    given = dict(zip(_POSITIONAL, args, strict=False))
    for name, value in kwargs.items():
        if name in given or name not in (*_Call._fields, *_IGNORED):
            raise InvalidArgument(name, repr(value), f"heedful knows {', '.join(_Call._fields)}, each once")
        if name not in _IGNORED:
            given[name] = value
    missing = [name for name in _REQUIRED if name not in given]
    if missing:
        raise InvalidArgument(missing[0], "nothing", f"give {', '.join(_REQUIRED)}")
    return _Call(**given)


def _operands(call: _Call) -> tuple[Tensor, Tensor, Tensor, str]:
    """Query, key and value with their heads apart, and their layout; views, never copies of whole ones."""
    if type(call.heads) is not int or call.heads < 1:
        raise InvalidArgument("heads", repr(call.heads), "give the number of heads")
    rank, named = (4, "(B, H, N, D)") if call.skip_reshape else (3, "(B, N, H*D)")
    for name, tensor in zip("qkv", call[:3], strict=True):
        if not isinstance(tensor, Tensor) or tensor.dim() != rank:
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InvalidArgument(name, shape, f"give {named}, as skip_reshape={call.skip_reshape} means")
        wrong = name == "q" and tensor.shape[1] != call.heads if call.skip_reshape else tensor.shape[-1] % call.heads
        if wrong:
            raise InvalidArgument(name, tuple(tensor.shape), f"give {named} of {call.heads} heads")
    if call.skip_reshape:
        return call.q, call.k, call.v, "BHSD"
    query, key, value = (tensor.unflatten(-1, (call.heads, -1)) for tensor in call[:3])
    return query, key, value, "BSHD"


def _address(options: Mapping[str, Any], query: Tensor, key: Tensor, layout: str) -> str:
    """Where a call comes from, as far as the model says: ``model``, its block, and self or cross by the lengths."""
    axis = 2 if layout == "BHSD" else 1
    block = options.get("block")
    parts = block if isinstance(block, (list, tuple)) else [options.get("block_type")] if block is None else [block]
    role = "self" if query.shape[axis] == key.shape[axis] else "cross"
    return ".".join(["model", *(str(part) for part in (*parts, options.get("block_index")) if part is not None), role])


def _mask(call: _Call, query: Tensor, key: Tensor, layout: str) -> Tensor | None:
    """The mask with four dims, as SDPA means it; ComfyUI's have no head dim where they have three or fewer."""
    mask = call.mask
    if mask is None:
        return None
    axis = 2 if layout == "BHSD" else 1
    sizes = (query.shape[0], query.shape[3 - axis], query.shape[axis], key.shape[axis])
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 3, 4):
        shown = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InvalidArgument("mask", shown, "give a bool or float tensor (Q, K), (B, Q, K) or (B, H, Q, K)")
    whole = mask.unsqueeze(-3) if mask.dim() < 4 else mask
    whole = whole.unsqueeze(0) if whole.dim() == 3 else whole
    if any(have not in (1, want) for have, want in zip(whole.shape, sizes, strict=True)):
        raise InvalidArgument("mask", tuple(mask.shape), f"give one that fits (B, H, Q, K) = {sizes}")
    return whole


def _precise(call: _Call, wish: Wish) -> Wish:
    """The wish, less approximate backends where precision is asked for. Raises InvalidArgument if none is left."""
    if call.low_precision_attention and call.attn_precision in (None, torch.float16, torch.bfloat16):
        return wish
    exact = exact_only(wish)
    if exact is None:
        asked = "low_precision_attention" if not call.low_precision_attention else "attn_precision"
        told = f"{wish_text(wish)} is approximate: use an exact backend"
        raise InvalidArgument(asked, repr(getattr(call, asked)), told)
    return exact


def _shaped(out: Tensor, layout: str, skip_output_reshape: bool) -> Tensor:
    """(B, H, N, D) where the call wants it so, else (B, N, H*D)."""
    if skip_output_reshape:
        return out if layout == "BHSD" else out.transpose(1, 2)
    return (out.transpose(1, 2) if layout == "BHSD" else out).flatten(2)
