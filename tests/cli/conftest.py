"""What the tests of commands share: the process's own dispatcher, as a new process would have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from heedful import AttentionDispatcher, Policy
from heedful.dispatch import default_dispatcher


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Callable[..., AttentionDispatcher]:
    """Have the process's dispatcher know nothing yet, under this policy; afterwards it is what it was."""

    def begin(**policy: Any) -> AttentionDispatcher:
        default_dispatcher.forget_plans()
        for name, value in (("_experience", None), ("_made", None), ("_policy", Policy(**policy))):
            monkeypatch.setattr(default_dispatcher, name, value)
        return default_dispatcher

    yield begin
    default_dispatcher.forget_plans()
    monkeypatch.undo()
    default_dispatcher.forget_plans()
