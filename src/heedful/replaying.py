"""A failed call run again out of its bundle, by the backend that failed or another one, and held to the formula."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from heedful.bundle import Bundle
from heedful.call import mask_of_call, problem_of_call
from heedful.dispatch import AttentionDispatcher
from heedful.errors import HeedfulError, Refused
from heedful.lowering import OPTIONAL
from heedful.policy import Policy
from heedful.rows import RowsVerdict, check_rows
from heedful.sampling import choose_rows

MAX_ROWS = 4096
_MASK_WORDS = ("is_causal", "causal_alignment", "window")


@dataclass(frozen=True)
class Replay:
    """One backend's answer to the call of a bundle. ``steps``: the rewrites it took.

    ``verdict`` is None where there is no answer: ``refused`` then says why it takes no such call here, or ``raised``
    what it raised.
    """

    backend: str
    steps: tuple[str, ...] = ()
    verdict: RowsVerdict | None = None
    refused: str = ""
    raised: str = ""

    @property
    def right(self) -> bool:
        """Whether it answered, and rightly."""
        return self.verdict is not None and self.verdict.right

    @property
    def wrong(self) -> bool:
        """Whether it took the call and did not answer it rightly."""
        return not self.right and not self.refused


def run_again(bundle: Bundle, backend: str | None = None, dispatcher: AttentionDispatcher | None = None) -> Replay:
    """Run a bundle's call, on the recorded type of device where there is one, and hold it to the formula.

    ``backend``: by default the recorded one, with the rewrites that it had. At most ``MAX_ROWS`` queries are looked at.
    """
    name = bundle.strategy if backend is None else backend
    dispatcher = dispatcher or AttentionDispatcher(policy=replace(Policy.from_environment(), guard="off", tune="off"))
    device = torch.device(bundle.problem.device if _is_here(bundle.problem.device) else "cpu")
    there, words = bundle.on(device), dict(bundle.call)
    call = (there.query, there.key, there.value, there.mask)
    autocast = torch.autocast(device.type, bundle.problem.dtype) if bundle.problem.autocast else nullcontext()
    with torch.no_grad(), autocast:
        try:
            dispatcher.explain(*call, **words, backend=name).checked()  # asks a strategy with checks of its own, too
            plan, calls = dispatcher.rivals(*call, **words, backend=name)
            label = recorded_label(bundle) if name == bundle.strategy else ""
            label = label if label in calls else next(iter(calls))
            answer = calls[label]()
        except Refused as error:
            return Replay(name, refused="; ".join(str(one) for of in error.refusals.values() for one in of))
        except HeedfulError as error:
            return Replay(name, refused=str(error))
        except Exception as error:  # a kernel may raise anything: that is what a replay is to show
            return Replay(name, raised=f"{type(error).__name__}: {error}")
        problem = problem_of_call(*call, **words)
    ran = next(verdict for verdict in plan.contenders if verdict.label == label)
    steps = tuple(step.name for step in ran.steps)
    if problem.dropout_p > 0:
        return Replay(name, steps, refused=f"dropout {problem.dropout_p}: no formula knows what was dropped")
    joined = mask_of_call(attn_mask=there.mask, **{word: words[word] for word in _MASK_WORDS if word in words})
    rows = choose_rows(problem, joined, MAX_ROWS, seed=0)
    judged = dispatcher.factory.create_strategy(ran.name)
    bound = None if judged.exactness == "exact" else words.get("max_error") or judged.relative_error
    return Replay(name, steps, check_rows(problem, *call[:3], joined, answer, rows=rows, max_error=bound))


def recorded_label(bundle: Bundle) -> str:
    """The candidate that gave the recorded answer."""
    return "+".join([bundle.strategy, *(step for step in bundle.steps if step in OPTIONAL)])


def _is_here(device: str) -> bool:
    module = getattr(torch, device, None)
    return device == "cpu" or (device in ("cuda", "xpu", "mps") and module is not None and module.is_available())
