"""Wishes: the environment, the preference table, and the scope. Threads and tasks have their own tests."""

import sys
from pathlib import Path

import pytest

from heedful import (
    AttentionDispatcher,
    AttentionProblem,
    AttentionStrategyFactory,
    InvalidArgument,
    Policy,
    UnknownBackend,
)
from heedful.policy import PREFERENCES, USERS, as_wish, current_wish, folder_of, scope

PROBLEM = AttentionProblem(batch=1, heads=1, kv_heads=1, query_length=2, key_length=2, head_dim=8, value_dim=8)


@pytest.mark.parametrize(
    ("text", "wish"),
    [
        ("native", "native"),
        ("  native ", "native"),
        ("flash,native", ("flash", "native")),
        ("flash, ,native,", ("flash", "native")),
        ("auto", "auto"),
    ],
)
def test_the_environment_as_a_wish(text, wish):
    policy = Policy.from_environment({"HEEDFUL_BACKEND": text})
    assert (policy.default, policy.default_origin) == (wish, "HEEDFUL_BACKEND")


@pytest.mark.parametrize("environ", [{}, {"HEEDFUL_BACKEND": ""}, {"HEEDFUL_BACKEND": " "}, {"HEEDFUL_BACKEND": ",,"}])
def test_an_environment_without_a_wish_is_auto(environ):
    policy = Policy.from_environment(environ)
    assert policy == Policy(tune="live", cache=USERS)
    assert (Policy().default, Policy().default_origin) == ("auto", "auto")


def test_the_process_environment_is_read_where_none_is_given(monkeypatch):
    monkeypatch.setenv("HEEDFUL_BACKEND", "flex")
    assert Policy.from_environment().default == "flex"


@pytest.mark.parametrize(
    ("environ", "downloads", "analyse"),
    [
        ({}, False, True),
        ({"HEEDFUL_DOWNLOADS": "1"}, True, True),
        ({"HEEDFUL_DOWNLOADS": " Yes "}, True, True),
        ({"HEEDFUL_DOWNLOADS": "0"}, False, True),
        ({"HEEDFUL_ANALYSE": "0"}, False, False),
        ({"HEEDFUL_ANALYSE": " 0 "}, False, False),
        ({"HEEDFUL_ANALYSE": "1"}, False, True),
        ({"HEEDFUL_ANALYSE": ""}, False, True),
    ],
)
@pytest.mark.parametrize("backend", [None, "flex", "flex,native"])
def test_what_the_environment_allows(environ, downloads, analyse, backend):
    policy = Policy.from_environment(environ | ({} if backend is None else {"HEEDFUL_BACKEND": backend}))
    assert (policy.downloads, policy.analyse) == (downloads, analyse)
    assert (policy.default == "auto") is (backend is None)


def test_nothing_is_downloaded_by_default_and_masks_are_looked_at():
    assert (Policy().downloads, Policy().analyse) == (False, True)


@pytest.mark.parametrize(
    ("environ", "tune", "guard"),
    [
        ({}, "live", "replace"),
        ({"HEEDFUL_TUNE": " "}, "live", "replace"),
        ({"HEEDFUL_TUNE": " Ahead "}, "ahead", "replace"),
        ({"HEEDFUL_TUNE": "off"}, "off", "replace"),
        ({"HEEDFUL_TUNE": "0"}, "off", "replace"),
        ({"HEEDFUL_TUNE": "No", "HEEDFUL_GUARD": "FALSE"}, "off", "off"),
        ({"HEEDFUL_GUARD": "raise"}, "live", "raise"),
        ({"HEEDFUL_GUARD": "off"}, "live", "off"),
    ],
)
def test_what_auto_learns_and_what_the_guard_does(environ, tune, guard):
    policy = Policy.from_environment(environ)
    assert (policy.tune, policy.guard) == (tune, guard)


@pytest.mark.parametrize(
    ("variable", "word", "known"),
    [("HEEDFUL_TUNE", "sometimes", "off, live, ahead"), ("HEEDFUL_GUARD", "1", "replace, raise, off")],
)
def test_another_word_in_the_environment_is_refused_naming_the_variable(variable, word, known):
    with pytest.raises(InvalidArgument, match=f"{variable}: got '{word}'; give one of {known}"):
        Policy.from_environment({variable: word})


@pytest.mark.parametrize(("field", "word"), [("tune", "on"), ("tune", True), ("guard", "warn"), ("guard", None)])
def test_another_word_in_a_policy_is_refused_naming_the_field(field, word):
    with pytest.raises(InvalidArgument, match=f"{field}: got {word!r}; give one of"):
        Policy(**{field: word})


def test_a_policy_of_ones_own_learns_nothing_keeps_nothing_and_is_guarded():
    policy = Policy()
    assert (policy.tune, policy.guard, policy.cache, policy.bundles) == ("off", "replace", None, None)


def test_folders_in_the_environment(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_CACHE_HOME", "/else/where")
    given = Policy.from_environment({"HEEDFUL_CACHE": " /some/where ", "HEEDFUL_BUNDLES": "reports"})
    assert (folder_of(given.cache), given.bundles) == (Path("/some/where"), Path("reports"))
    home = Policy.from_environment({"HEEDFUL_CACHE": "~/times", "HEEDFUL_BUNDLES": "~/reports"})
    assert (folder_of(home.cache), home.bundles) == (Path("/home/somebody/times"), Path("/home/somebody/reports"))
    users = Policy.from_environment({"HEEDFUL_CACHE": "", "HEEDFUL_BUNDLES": " "})
    assert (users.cache, users.bundles) == (USERS, None)
    assert "heedful" in folder_of(users.cache).parts
    assert folder_of(users.cache) == Path("/else/where/heedful") or sys.platform != "linux"
    assert folder_of(Policy().cache) is None


@pytest.mark.parametrize(
    ("changes", "watched"), [({}, True), ({"dropout_p": 0.1}, False), ({"compiling": True}, False)], ids=str
)
def test_what_the_guard_watches(changes, watched):
    problem = PROBLEM.replace(**changes)
    assert [Policy(guard=guard).watches(problem) for guard in ("replace", "raise", "off")] == [watched, watched, False]


@pytest.mark.parametrize(("backend", "wish"), [("a", "a"), (["a", "b"], ("a", "b")), (("a",), ("a",))])
def test_a_backend_as_a_wish(backend, wish):
    assert as_wish(backend) == wish


@pytest.mark.parametrize("backend", ["", [], (), None, 3, ["a", 3], ["a", ""], {"a"}, b"native"])
def test_a_backend_that_is_no_wish(backend):
    with pytest.raises(InvalidArgument, match=r"backend: got .*; give a name, a non-empty list"):
        as_wish(backend)


def test_the_order_is_the_table_then_the_others_then_the_reference():
    policy = Policy({"cpu": ("b", "absent", "a", "reference"), "*": ("c", "reference")})
    known = {"reference", "z", "c", "a", "b"}
    assert policy.order("cpu", known) == ("b", "a", "c", "z", "reference")
    assert policy.order("mps", known) == ("c", "a", "b", "z", "reference")
    assert policy.order("cpu", {"z"}) == ("z",)


def test_the_table_names_backends_that_exist_and_ends_in_the_reference():
    known = set(AttentionStrategyFactory(plugins=False).strategies())
    for names in PREFERENCES.values():
        assert set(names) <= known
        behind = names[names.index("reference") + 1 :]  # never reached: the reference takes everything
        assert set(behind) <= {"triton"}
        assert len(set(names)) == len(names)
    assert "*" in PREFERENCES


# Scopes


def test_scopes_nest_and_end():
    assert current_wish() is None
    with scope("a"):
        with scope(("b", "c")):
            assert current_wish() == ("b", "c")
        assert current_wish() == "a"
    assert current_wish() is None


def test_a_scope_ends_with_an_exception():
    with scope("a"):
        with pytest.raises(KeyError), scope("b"):
            raise KeyError
        assert current_wish() == "a"
    assert current_wish() is None


def test_a_scope_of_an_unknown_backend_is_refused_before_it_begins(dispatcher):
    with pytest.raises(UnknownBackend, match=r"no backend is called 'nativ'; did you mean 'native'"):
        dispatcher.attention_backend("nativ")
    with pytest.raises(InvalidArgument, match="backend"):
        dispatcher.attention_backend([])


def test_a_scope_knows_a_strategy_by_its_alias(dispatcher):
    with dispatcher.attention_backend(["_native_math", "auto"]):
        assert current_wish() == ("native_math", "auto")


def test_a_scope_keeps_an_alias_that_pins_something(dispatcher):
    with dispatcher.attention_backend(["flash_hub", "auto"]):
        assert current_wish() == ("flash_hub", "auto")


def test_a_wish_in_the_environment_for_an_unknown_backend_names_the_variable(factory):
    policy = Policy.from_environment({"HEEDFUL_BACKEND": "nativ"})
    with pytest.raises(UnknownBackend, match=r"HEEDFUL_BACKEND: no backend is called 'nativ'; did you mean 'native'"):
        AttentionDispatcher(factory, policy=policy).plan(PROBLEM)
