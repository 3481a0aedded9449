"""The registry: what it finds, what it refuses, and plug-ins from a package that stands beside this file."""

import importlib
import json
import threading
from pathlib import Path

import pytest
import torch

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
from heedful.sources import Hub, Package
from heedful.strategies.native import NativeAttentionStrategy
from heedful.strategy import Pin

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
    """Each file holds at least one, and the first word of the file's name is the first of theirs."""
    folder = Path(registry.__file__).parent / "strategies"
    found: dict = {}
    for name, strategy in factory.strategies().items():
        found.setdefault(type(strategy).__module__, []).append(name)
    assert set(found) == {f"heedful.strategies.{path.stem}" for path in folder.glob("[!_]*.py")}
    for module, names in found.items():
        assert {name.split("_")[0] for name in names} == {module.rpartition(".")[2].split("_")[0]}


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("flash", "FlashAttentionStrategy"),
        ("native", "NativeAttentionStrategy"),
        ("xformers", "XFormersAttentionStrategy"),
        ("reference", "ReferenceAttentionStrategy"),
    ],
)
def test_strategies_can_be_imported_and_registered_by_hand(module, name):
    kind = getattr(importlib.import_module(f"heedful.strategies.{module}"), name)
    assert kind.name == module
    empty = AttentionStrategyFactory((), plugins=False)
    empty.register_strategy(kind.name, kind)
    assert type(empty.create_strategy(kind.name)) is kind


def test_a_strategy_in_three_lines_is_registered_made_and_dispatched_to(factory):
    class FakeAttentionStrategy(AttentionStrategy):
        def compute_attention(self, query, key, value, **kwargs):
            return value + 1

    factory.register_strategy("fake", FakeAttentionStrategy)
    made = factory.create_strategy("fake")
    assert (type(made), made.name) == (FakeAttentionStrategy, "fake")
    zeros = torch.zeros(1, 2, 3, 8)
    out = AttentionDispatcher(factory).dispatch("fake", query=zeros, key=zeros, value=zeros)
    assert torch.equal(out, torch.ones(1, 2, 3, 8))


def test_strategies_are_in_the_order_of_their_names_and_read_only(factory):
    found = factory.strategies()
    assert list(found) == sorted(found)
    with pytest.raises(TypeError):
        found["x"] = Mine()


def test_the_mapping_has_one_entry_for_each_strategy_and_knows_other_names(factory):
    factory.register_strategy("pinned", Pinned)
    found = factory.strategies()
    assert len(found) == len(list(found)) == len(set(found))
    assert "pinned_packed" not in list(found)
    assert "pinned_packed" in found
    assert found["pinned_packed"] is factory.create_strategy("pinned_packed")
    assert found["pinned_too"] is found["pinned"]
    assert found.get("nothing") is None
    assert None not in found
    with pytest.raises(KeyError, match="nothing"):
        found["nothing"]


def test_the_mapping_is_of_its_moment(factory):
    before = factory.strategies()
    factory.register_strategy("mine", Mine)
    assert "mine" not in list(before)
    assert "mine" in list(factory.strategies())


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


# Other names that pin something


class Pinned(Mine):
    name = "pinned"
    aliases = {"pinned_too": Pin(), "pinned_packed": Pin(layouts=("THD",)), "pinned_hub": Pin(source="hub")}
    sources = (Package("mine", ("f",)), Hub("someone/mine", 1, ("f",)))


def test_a_name_that_pins_something_stands_for_itself(factory):
    factory.register_strategy("pinned", Pinned)
    assert [factory.resolve(name) for name in ("pinned", *Pinned.aliases)] == [
        "pinned", "pinned", "pinned_packed", "pinned_hub",
    ]  # fmt: skip
    plain, packed, hub = (factory.create_strategy(name) for name in ("pinned_too", "pinned_packed", "pinned_hub"))
    assert plain is factory.create_strategy("pinned")
    assert (plain.pin, packed.pin, hub.pin) == (Pin(), Pin(layouts=("THD",)), Pin(source="hub"))
    assert (plain.name, packed.name, hub.name) == ("pinned", "pinned_packed", "pinned_hub")
    assert packed.limits_for("cpu").layouts == ("THD",)
    assert Pinned.pin == Pin()
    for name in Pinned.aliases:
        assert factory.create_strategy(name) is factory.create_strategy(name)


def test_shipped_names_that_pin_something_are_there(factory):
    strategies = factory.strategies()
    pinned = {alias: pin for one in strategies.values() for alias, pin in one.pins().items() if pin != Pin()}
    assert {"flash_hub", "flash_varlen", "flash_varlen_hub"} <= set(pinned)
    for alias, pin in pinned.items():
        made = factory.create_strategy(alias)
        assert (factory.resolve(alias), made.name, made.pin) == (alias, alias, pin)


@pytest.mark.parametrize("name", ["pinned", *Pinned.aliases])
def test_a_strategy_is_forgotten_by_any_of_its_names(factory, name):
    factory.register_strategy("pinned", Pinned)
    for one in ("pinned", *Pinned.aliases):
        factory.create_strategy(one)
    factory.unregister_strategy(name)
    for one in ("pinned", *Pinned.aliases):
        with pytest.raises(UnknownBackend):
            factory.create_strategy(one)
    assert not set(factory._made) & {"pinned", *Pinned.aliases}


@pytest.mark.parametrize("taken", ["pinned_hub", "pinned_too"])
def test_a_name_can_take_over_another_name_of_a_strategy(factory, taken):
    factory.register_strategy("pinned", Pinned)
    factory.create_strategy(taken)
    with pytest.raises(RegistrationError, match=f"'{taken}' is taken"):
        factory.register_strategy(taken, Yours)
    factory.register_strategy(taken, Yours, replace=True)
    assert factory.resolve(taken) == taken
    assert type(factory.create_strategy(taken)) is type(factory.strategies()[taken]) is Yours
    assert factory.create_strategy(taken).pin == Pin()
    assert type(factory.create_strategy("pinned_packed")) is Pinned


def test_another_name_can_take_over_another_name(factory):
    factory.register_strategy("pinned", Pinned)
    before = factory.create_strategy("pinned_packed")
    heir = type("Heir", (Pinned,), {"aliases": {"pinned_packed": Pin(source="hub")}})
    factory.register_strategy("heir", heir, replace=True)
    made = factory.create_strategy("pinned_packed")
    assert (type(made), made.pin) == (heir, Pin(source="hub"))
    assert made is not before
    factory.unregister_strategy("heir")
    with pytest.raises(UnknownBackend):
        factory.resolve("pinned_packed")
    assert factory.resolve("pinned_hub") == "pinned_hub"


def test_after_a_replacement_pinned_names_are_made_of_the_new_class(factory):
    factory.register_strategy("pinned", Pinned)
    factory.create_strategy("pinned_packed")
    factory.register_strategy("pinned", type("Newer", (Pinned,), {}), replace=True)
    assert type(factory.create_strategy("pinned_packed")).__name__ == "Newer"


@pytest.mark.parametrize(
    ("aliases", "words"),
    [
        ("mine_too", r"aliases: got 'mine_too'; give a tuple of names"),
        ({"x": None}, r"alias 'x': got None; give a Pin"),
        ({"x": "hub"}, r"alias 'x': got 'hub'; give a Pin"),
        ({"x": Pin(source="hub")}, r"alias 'x': pins source 'hub'; its sources are none"),
        ({"auto": Pin(layouts=("THD",))}, r"got 'auto'; give a non-empty name"),
    ],
)
def test_other_names_that_stand_for_nothing_are_refused(factory, aliases, words):
    before = dict(factory.strategies())
    with pytest.raises(RegistrationError, match=words):
        factory.register_strategy("x_by_itself", type("Odd", (Mine,), {"aliases": aliases}))
    assert dict(factory.strategies()) == before


def test_an_unknown_name_is_met_with_names_that_pin_something(factory):
    with pytest.raises(UnknownBackend, match=r"did you mean 'flash_hub'"):
        factory.resolve("flash_hubb")


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
    assert order.index("mine") < order.index("reference")
