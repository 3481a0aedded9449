"""The registry: what it finds, what it refuses, and plug-ins from a package that stands beside this file."""

import json
import threading
from pathlib import Path

import pytest

from heedful import (
    AttentionDispatcher,
    AttentionStrategy,
    AttentionStrategyFactory,
    Limits,
    Policy,
    RegistrationError,
    UnknownBackend,
)
from heedful import (
    factory as registry,
)
from heedful.strategies.native import NativeAttentionStrategy

PLUGINS = Path(__file__).parent / "plugin_package"


class Mine(AttentionStrategy):
    name = "mine"
    aliases = ("mine_too",)

    def compute_attention(self, query, key, value, **kwargs):
        return query


class Yours(Mine):
    name = "yours"
    aliases = ("yours_too",)


# Found


def test_the_shipped_strategies_are_found_by_scanning(factory):
    shipped = {path.stem for path in Path(registry.__file__).parent.joinpath("strategies").glob("[!_]*.py")}
    assert set(factory.strategies()) == shipped


def test_strategies_are_in_the_order_of_their_names_and_read_only(factory):
    found = factory.strategies()
    assert list(found) == sorted(found)
    with pytest.raises(TypeError):
        found["x"] = Mine()


def test_nothing_is_scanned_before_it_is_asked_for():
    lazy = AttentionStrategyFactory(["no.such.package"])
    with pytest.raises(ModuleNotFoundError):
        lazy.strategies()
    with pytest.raises(ModuleNotFoundError):  # and not an empty registry the second time
        lazy.strategies()


def test_a_strategy_is_made_once(factory):
    made = []

    class Counted(Mine):
        def __init__(self):
            made.append(self)

    factory.register_strategy("counted", Counted)
    assert factory.create_strategy("counted") is factory.create_strategy("mine_too") is factory.strategies()["counted"]
    assert len(made) == 1


def test_a_strategy_knows_the_name_it_was_registered_by(factory):
    factory.register_strategy("another", Mine)
    assert factory.create_strategy("another").name == "another"
    assert Mine.name == "mine"


def test_an_alias_stands_for_its_strategy(factory):
    assert factory.resolve("_native_math") == "native_math"
    assert factory.create_strategy("_native_math") is factory.create_strategy("native_math")


def test_an_unknown_name_is_met_with_the_closest(factory):
    with pytest.raises(UnknownBackend, match=r"no backend is called 'flax'; did you mean 'flex'.*known: .*auto"):
        factory.create_strategy("flax")
    with pytest.raises(UnknownBackend, match=r"scope: no backend is called 'flax'"):
        factory.resolve("flax", "scope")


def test_first_calls_from_many_threads_all_find_everything():
    fresh, found, barrier = AttentionStrategyFactory(plugins=False), [], threading.Barrier(8)

    def look():
        barrier.wait()
        found.append(fresh.resolve("reference"))

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["reference"] * 8


# Registered


def test_a_strategy_is_registered_and_forgotten(factory):
    assert factory.register_strategy("mine", Mine) is Mine
    assert isinstance(factory.create_strategy("mine_too"), Mine)
    factory.unregister_strategy("mine_too")
    for name in ("mine", "mine_too"):
        with pytest.raises(UnknownBackend):
            factory.resolve(name)


@pytest.mark.parametrize("name", ["native", "_native_math"])
def test_a_taken_name_is_refused(factory, name):
    with pytest.raises(RegistrationError, match=f"'{name}' is taken; pass replace=True"):
        factory.register_strategy(name, Mine)
    assert not isinstance(factory.create_strategy(name), Mine)


def test_a_taken_alias_is_refused(factory):
    factory.register_strategy("mine", Mine)
    with pytest.raises(RegistrationError, match="'mine_too' is taken"):
        factory.register_strategy("other", Mine)


def test_a_name_can_be_taken_over(factory):
    before = factory.create_strategy("native")
    factory.register_strategy("native", Mine, replace=True)
    assert isinstance(factory.create_strategy("native"), Mine)
    assert factory.create_strategy("mine_too") is factory.create_strategy("native") is not before


def test_an_alias_can_take_over_a_name(factory):
    thief = type("Thief", (Mine,), {"aliases": ("native",)})
    factory.register_strategy("thief", thief, replace=True)
    assert factory.resolve("native") == "thief"


def test_a_thread_that_still_makes_a_replaced_strategy_does_not_keep_it(factory):
    factory.register_strategy("mine", Mine)
    late = factory.create_strategy("mine")
    factory.register_strategy("mine", Yours, replace=True)
    factory._made["mine"] = late
    assert type(factory.create_strategy("mine")) is Yours


def test_a_replaced_strategy_leaves_no_alias_behind(factory):
    factory.register_strategy("mine", Mine)
    factory.register_strategy("mine", Yours, replace=True)
    assert factory.resolve("yours_too") == "mine"
    with pytest.raises(UnknownBackend):
        factory.resolve("mine_too")


@pytest.mark.parametrize("name", ["", "auto", None, 3])
def test_a_name_that_cannot_be(factory, name):
    with pytest.raises(RegistrationError, match="give a non-empty name other than 'auto'"):
        factory.register_strategy(name, Mine)


def test_auto_cannot_be_an_alias(factory):
    with pytest.raises(RegistrationError, match="'auto'"):
        factory.register_strategy("x", type("Greedy", (Mine,), {"aliases": ("auto",)}))


@pytest.mark.parametrize("strategy", [Mine(), object, None, lambda: Mine(), "Mine"])
def test_only_strategy_classes_are_registered(factory, strategy):
    with pytest.raises(RegistrationError, match="give a subclass of AttentionStrategy"):
        factory.register_strategy("x", strategy)


def test_an_unfinished_strategy_is_refused(factory):
    class Unfinished(AttentionStrategy):
        pass

    with pytest.raises(RegistrationError, match="Unfinished does not implement compute_attention"):
        factory.register_strategy("x", Unfinished)


def test_a_refused_registration_changes_nothing(factory):
    before, epoch = dict(factory.strategies()), factory.epoch
    for name, strategy in (("native", Mine), ("", Mine), ("x", object)):
        with pytest.raises(RegistrationError):
            factory.register_strategy(name, strategy)
    assert (dict(factory.strategies()), factory.epoch) == (before, epoch)


def test_every_change_bumps_the_epoch_and_is_told_to_those_who_watch(factory):
    factory.strategies()

    class Watcher:
        seen = 0

        def changed(self):
            self.seen += 1

    watcher, gone, epochs = Watcher(), Watcher(), [factory.epoch]
    for one in (watcher, gone):
        factory.watch(one.changed)
    del gone, one
    factory.register_strategy("mine", Mine)
    epochs.append(factory.epoch)
    factory.register_strategy("mine", Mine, replace=True)
    epochs.append(factory.epoch)
    factory.unregister_strategy("mine")
    epochs.append(factory.epoch)
    assert watcher.seen == 3
    assert len(set(epochs)) == 4


# The default registry, and others


def test_on_the_class_every_method_works_on_the_default_registry():
    default = AttentionStrategyFactory.default()
    assert AttentionStrategyFactory.default() is default
    assert AttentionStrategyFactory.create_strategy("native") is default.create_strategy("native")
    assert AttentionDispatcher(AttentionStrategyFactory).factory is AttentionDispatcher().factory is default


def test_a_registry_of_its_own_leaves_the_default_alone(factory):
    factory.register_strategy("mine", Mine)
    with pytest.raises(UnknownBackend):
        AttentionStrategyFactory.resolve("mine")


def test_an_imported_strategy_is_not_found_a_second_time():
    assert [kind.name for kind in registry._in_module(__import__("heedful.strategies.native", fromlist=["x"]))] == [
        NativeAttentionStrategy.name
    ]


# Plug-ins

SCRIPT = """
import json, warnings
import torch, heedful
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    table = heedful.list_backends()
    heedful.list_backends()
names = ["doubling", "twofold", "tripling", "named_by_its_entry_point", "native"]
one = torch.ones(1, 1, 1, 8)
print(json.dumps({
    "names": [row.name for row in table],
    "warnings": [str(warning.message) for warning in caught],
    "answers": {name: heedful.attention(one, one, one, backend=name)[0, 0, 0, 0].item() for name in names},
    "auto": heedful.explain(one, one, one).backend,
}))
"""


@pytest.fixture(scope="module")
def with_plugins(fresh_python):
    ended = fresh_python(SCRIPT, PLUGINS)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_the_strategies_of_an_installed_plugin_are_there(with_plugins, factory):
    added = set(with_plugins["names"]) - set(factory.strategies())
    assert added == {"doubling", "tripling", "named_by_its_entry_point"}
    assert with_plugins["answers"] == {
        "doubling": 2.0, "twofold": 2.0, "tripling": 3.0, "named_by_its_entry_point": 1.0, "native": 1.0,
    }  # fmt: skip
    assert with_plugins["auto"] == "native"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("'broken' (plugin_that_breaks_for_tests)", "libkernel.so: cannot open shared object file"),
        ("'function' (plugin_for_tests:no_strategy)", "give a subclass of AttentionStrategy"),
        ("'impostor' (plugin_for_tests:ImpostorStrategy)", "'native' is taken"),
    ],
)
def test_a_broken_plugin_is_named_in_one_warning_and_left_out(with_plugins, name, why):
    (text,) = (text for text in with_plugins["warnings"] if name in text)
    assert text.startswith("heedful plug-in")
    assert why in text
    assert len(with_plugins["warnings"]) == 3


def test_a_registry_without_plugins_ignores_them(fresh_python):
    script = "from heedful import *; print(len(AttentionStrategyFactory(plugins=False).strategies()))"
    ended = fresh_python(script, PLUGINS)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert int(ended.stdout) == len(AttentionStrategyFactory(plugins=False).strategies())


def test_a_new_strategy_is_part_of_auto_after_the_table():
    alone = AttentionStrategyFactory(["heedful.strategies"], plugins=False)
    alone.register_strategy("mine", type("Mine", (Mine,), {"limits": Limits(), "aliases": ()}))
    dispatcher = AttentionDispatcher(alone, policy=Policy())
    order = dispatcher.policy.order("cpu", alone.strategies())
    assert order.index("mine") > order.index("flex")
    assert order[-1] == "reference"
