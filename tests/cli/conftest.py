"""What the tests of commands share: the process's own dispatcher, as a new process would have it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from heedful import AttentionDispatcher, Policy
from heedful.dispatch import default_dispatcher

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


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


@pytest.fixture
def browser(tmp_path: Path) -> Callable[..., str]:
    """Open a page in headless Chromium with these flags; what it prints."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None and os.environ.get("CI") == "true":
        pytest.fail("no Chromium on the path: .ci/run installs it where there is apt-get and root")
    if found is None:
        pytest.skip("no Chromium on the path")

    def opened(page: Path, *flags: str) -> str:
        quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
        usual = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *quiet)
        command = [found, *usual, f"--user-data-dir={tmp_path / 'profile'}", *flags, page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return opened
