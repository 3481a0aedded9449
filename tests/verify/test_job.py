"""What a worker is told, and how somebody's own class is found."""

from __future__ import annotations

import json

import pytest
import torch

from heedful import AttentionStrategyFactory
from heedful.errors import InvalidArgument
from heedful.verify.job import Job, plugin_class, plugin_name, register


def test_a_job_goes_through_json() -> None:
    job = Job(plugin="a.b:C", device="cuda:1", size="quick", dtypes=("float16",), only=("x-*",), seed=3, done=7)
    assert Job.from_dict(json.loads(json.dumps(job.to_dict()))) == job
    assert job.choice.dtypes == (torch.float16,)
    assert (job.name, Job(backend="native").strategy()) == ("a.b:C", "native")


def test_a_plugin_is_found(plugins: str) -> None:
    found = plugin_class(f"{plugins}:Fine")
    assert (plugin_name(found), found.__module__) == ("fine", plugins)
    assert Job(plugin=f"{plugins}:Fine").strategy() is found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no_colon", "give module:Class"),
        (":Fine", "give module:Class"),
        ("os; os.abort():x", "give module:Class"),
        ("no_such_module:Fine", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("plugin_that_breaks_for_tests:X", "OSError: libkernel.so: cannot open"),
        ("strategies_to_verify:Absent", "AttributeError"),
        ("strategies_to_verify:no_strategy", "give a subclass of heedful.AttentionStrategy"),
        ("strategies_to_verify:Unfinished", "that has compute_attention"),
    ],
)
def test_what_is_no_strategy_is_explained(
    text: str, words: str, plugins: str, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "tests" / "plugin_package")
    with pytest.raises(InvalidArgument, match="plugin: got") as raised:
        plugin_class(text)
    assert words in str(raised.value)


def test_a_registered_plugin_takes_its_name_over(plugins: str) -> None:
    try:
        assert register(f"{plugins}:Fine") == "fine"
        assert register(f"{plugins}:Fine") == "fine"
        assert AttentionStrategyFactory.create_strategy("fine").describe() == "The reference, by another name."
    finally:
        AttentionStrategyFactory.unregister_strategy("fine")
