"""``--record FOLDER`` writes what becomes of the checks to FOLDER/<device>/contract.json; ``make gpu-test`` gives it.

Without a GPU it ends the run with an error: nothing would have been tested. A GPU on which a kernel broke something
for good (an illegal access) ends the worker, so that what comes next is not blamed; pytest-xdist starts another. The
contract's checks stand under their backend, all other tests of the run (our own kernels') under "tests".
"""

from __future__ import annotations

import datetime
import os
import platform
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu.record import Outcome, Record

from heedful.measuring import folder_name

CHECKS = "test_real_packages.py"
OTHERS = "tests"
BROKEN_GPU = 70  # the exit status of a worker


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="folder for <device>/contract.json; demands a GPU")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(Watch(), "gpu-watch")  # over all folders of the run
    folder = config.getoption("--record", default=None)
    if folder is None:
        return
    if not torch.cuda.is_available():
        raise pytest.UsageError(f"no GPU: torch {torch.__version__} sees none here, so nothing was tested")
    if not hasattr(config, "workerinput"):
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # an interruption like any other: it is recorded
        about = machine()
        path = folder / folder_name(about["machine"]["device"]) / "contract.json"
        config.pluginmanager.register(Recorder(Record(path, about)), "gpu-recorder")


class Watch:
    """Ends a worker whose GPU is broken."""

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        if item.get_closest_marker("gpu") and torch.cuda.is_available():
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                os._exit(BROKEN_GPU)  # pytest-xdist reports this very test as the one that crashed it


class Recorder:
    """The hooks that fill a record. With pytest-xdist it lives where the workers' reports arrive."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.record.wanted = len(session.items) or self.record.wanted

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        self.record.wanted = len(ids)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.record.start(nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.record.stop(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        found = outcome_of(report)
        if found is not None:
            self.record.add(*found)
        if report.when not in {"setup", "call", "teardown"}:  # a worker's crash: its test is never finished
            self.record.stop(report.nodeid)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        words = {0: "completed", 1: "completed", 2: "interrupted"}
        self.record.write(words.get(int(exitstatus), f"exit status {int(exitstatus)}"))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        counts = ", ".join(f"{number} {word}" for word, number in self.record.counts.items())
        terminalreporter.write_line(f"{counts}; written to {self.record.path}")


def outcome_of(report: Any) -> tuple[str, str, Outcome, str] | None:
    """Backend, check, outcome and detail of a test's report; None where the report says nothing of these."""
    backend, check = name_of(report.nodeid)
    if report.failed:
        return backend, check, "wrong", str(report.longrepr)
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        absent = check == "package"
        return backend, check, "absent" if absent else "refused", reason.removeprefix("Skipped: ")
    return (backend, check, "right", "") if report.when == "call" else None


def name_of(nodeid: str) -> tuple[str, str]:
    """Backend and check of a test's name; OTHERS, and the test's own name, where it is none of the contract."""
    if CHECKS not in nodeid:
        return OTHERS, nodeid.removeprefix("tests/")
    backend, _, check = nodeid.partition("[")[2].removesuffix("]").partition("-cuda-")
    return backend, check


def machine() -> dict[str, Any]:
    """What the outcomes depend on: the GPU, and the versions of what computes on it."""
    from heedful import AttentionStrategyFactory
    from heedful.facts import probe

    facts = probe()
    device = facts.device(torch.device("cuda"))
    packages = {}
    for strategy in AttentionStrategyFactory.strategies().values():
        for source in strategy.sources:
            name = getattr(source, "distribution", "") or getattr(source, "module", "")
            found = facts.package(name, getattr(source, "module", name)) if name else None
            packages |= {} if found is None else {name: found}
    return {
        "machine": {
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "device": device.name,
            "architecture": device.architecture,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda or torch.version.hip,
        },
        "packages": packages,
    }
