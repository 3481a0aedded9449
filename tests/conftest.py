"""Fixtures that several test files share: test files cannot import each other."""

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from heedful import AttentionDispatcher, AttentionStrategyFactory, Policy

# Before the first call reads them: what is measured goes nowhere near the user's cache, nothing is tried on live calls,
# and strategies of the tests that are wrong on purpose, to be told apart, may be. A ``Policy()`` has the guard on.
os.environ["HEEDFUL_CACHE"] = tempfile.mkdtemp(prefix="heedful-tests-")
os.environ["HEEDFUL_TUNE"] = os.environ["HEEDFUL_GUARD"] = "off"

SOURCES = Path(__file__).parent.parent / "src"


def _naive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    seen: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Out and LSE in float64, straight from the formula, of (…, H, length, dim); heads may be grouped."""
    query, key, value = (tensor.double() for tensor in (query, key, value))
    if query.dim() > 2:
        heads = max(query.shape[-3], key.shape[-3])
        key, value = (tensor.repeat_interleave(heads // tensor.shape[-3], dim=-3) for tensor in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double()
    if seen is not None:
        scores = torch.where(seen, scores, -math.inf)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True).nan_to_num(neginf=0.0))
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights / total, 0.0) @ value, torch.logsumexp(scores, -1)


@pytest.fixture(scope="session")
def naive_attention() -> Callable[..., tuple[Tensor, Tensor]]:
    """The formula in float64; shares no code with the library."""
    return _naive_attention


@pytest.fixture
def factory() -> AttentionStrategyFactory:
    """A registry of its own, with heedful's strategies and no plug-ins."""
    return AttentionStrategyFactory(plugins=False)


@pytest.fixture
def dispatcher(factory: AttentionStrategyFactory) -> AttentionDispatcher:
    """A dispatcher of its own, deaf to the environment."""
    return AttentionDispatcher(factory, policy=Policy())


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of strategies that are wrong on purpose, while it can be imported here, and in processes
    that are started from here.
    """
    monkeypatch.syspath_prepend(Path(__file__).parent / "verify" / "plugins")
    return "strategies_to_verify"


@pytest.fixture(scope="session")
def fresh_python() -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Run a script in a new interpreter with this checkout's heedful: ``fresh_python(text, *paths, NAME="value")``.

    The paths come before all others on ``sys.path``; the keywords are set in its environment.
    """

    def run(script: str, *paths: Path, **environ: str) -> "subprocess.CompletedProcess[str]":
        kept = ("HEEDFUL_CACHE", "HEEDFUL_TUNE", "HEEDFUL_GUARD")  # as they are set above
        inherited = {name: text for name, text in os.environ.items() if name in kept or not name.startswith("HEEDFUL_")}
        found = {"PYTHONPATH": os.pathsep.join(map(str, [*paths, SOURCES])), **environ}
        return subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env={**inherited, **found}
        )

    return run
