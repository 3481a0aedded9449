"""Facts of the machine: read from torch, or pretended."""

import dataclasses
import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch

from heedful import facts
from heedful.facts import DeviceFacts, Facts, Installed


@pytest.fixture
def probed_afresh():
    facts.probe.cache_clear()
    yield
    facts.probe.cache_clear()


@pytest.mark.parametrize(
    ("text", "type_", "capability", "architecture"),
    [
        ("cpu", "cpu", None, ""),
        ("mps", "mps", None, ""),
        (" XPU ", "xpu", None, ""),
        ("sm_50", "cuda", (5, 0), "sm_50"),
        ("sm75", "cuda", (7, 5), "sm_75"),
        ("SM_90", "cuda", (9, 0), "sm_90"),
        ("sm_100", "cuda", (10, 0), "sm_100"),
        ("sm_121", "cuda", (12, 1), "sm_121"),
        ("gfx942", "cuda", None, "gfx942"),
        ("gfx90a", "cuda", None, "gfx90a"),
    ],
)
def test_a_device_from_its_short_name(text, type_, capability, architecture):
    made = DeviceFacts.parse(text)
    assert (made.type, made.capability, made.architecture) == (type_, capability, architecture)


@pytest.mark.parametrize("text", ["", "90", "RTX 4090", "cuda:0", "sm_90a"])
def test_a_name_that_is_none(text):
    with pytest.raises(ValueError, match=r"give a name such as cpu, mps, sm_75"):
        DeviceFacts.parse(text)


def test_a_pretended_device_is_the_first_of_its_type_whatever_its_index():
    machine = Facts.pretend("sm_75")
    for name in ("cuda", "cuda:0", "cuda:3"):
        assert machine.device(torch.device(name)).capability == (7, 5)


def test_a_device_that_was_not_pretended_is_known_by_its_type_alone():
    assert Facts.pretend("sm_75").device(torch.device("cpu")) == DeviceFacts("cpu", "cpu")
    assert Facts.pretend("cpu").device(torch.device("cuda")).capability is None


def test_pretending_keeps_the_versions_of_this_machine():
    assert Facts.pretend("gfx942").torch_version == torch.__version__


def test_each_gpu_has_its_own_facts():
    devices = {f"cuda:{index}": DeviceFacts.parse(name) for index, name in enumerate(("sm_75", "sm_90"))}
    machine = Facts("2", "3", "Linux", devices)
    assert machine.device(torch.device("cuda:0")).capability == (7, 5)
    assert machine.device(torch.device("cuda:1")).capability == (9, 0)


def test_facts_are_values():
    assert hash(Facts.pretend("sm_75")) == hash(Facts.pretend("sm_75"))
    assert Facts.pretend("sm_75") != Facts.pretend("sm_80")
    with pytest.raises(dataclasses.FrozenInstanceError):
        Facts.pretend("cpu").system = "other"


def test_this_machine_is_probed_once_and_has_a_cpu():
    assert facts.probe() is facts.probe()
    assert facts.probe().devices["cpu"].type == "cpu"
    assert facts.probe().torch_version == torch.__version__


@pytest.mark.usefixtures("probed_afresh")
@pytest.mark.parametrize(
    ("hip", "properties", "expected"),
    [
        (None, {"major": 9, "minor": 0, "name": "H200"}, DeviceFacts("cuda", "H200", (9, 0), "sm_90")),
        (
            "7.0",
            {"major": 9, "minor": 4, "name": "MI300X", "gcnArchName": "gfx942:sramecc+:xnack-"},
            DeviceFacts("cuda", "MI300X", None, "gfx942"),
        ),
    ],
    ids=["nvidia", "amd"],
)
def test_gpus_are_read_from_torch(monkeypatch, hip, properties, expected):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: SimpleNamespace(**properties))
    assert facts.probe().devices["cuda:1"] == expected


# What is installed


@pytest.mark.parametrize(
    ("packages", "distribution", "expected"),
    [
        ({}, "", None),
        ({}, "dist", None),
        ({"dist": "2.0"}, "dist", None),  # without its module it is of no use
        ({"module": "1.0"}, "", "1.0"),
        ({"module": "1.0"}, "dist", "1.0"),
        ({"module": "", "dist": "2.0"}, "dist", "2.0"),
        ({"module": ""}, "dist", ""),
    ],
)
def test_the_version_of_a_package(packages, distribution, expected):
    assert Facts("2", "3", "Linux", {}, packages).package(distribution, "module") == expected


def test_where_nothing_is_known_everything_is_supposed():
    assert Facts.pretend("sm_90").packages is None
    assert Facts.pretend("sm_90").package("anything", "any.thing") == ""


def test_this_machine_has_what_it_has():
    here = facts.probe()
    assert here.package("torch", "torch") == here.package("torch", "torch.nn.attention") == torch.__version__
    assert here.package("no-such-package", "no_such_module") is None
    assert here.package("", "torch.no_such_module") is None
    assert here.package("", "json") == ""


def test_machines_are_compared_without_listing_all_that_is_installed(monkeypatch):
    monkeypatch.setattr(facts.importlib.metadata, "distributions", None)
    assert facts.Installed() == facts.Installed()
    assert dataclasses.replace(facts.probe()) == facts.probe()
    assert facts.Installed() != {}


def test_what_is_installed_can_be_listed():
    installed = facts.Installed()
    assert "torch" in set(installed)
    assert len(installed) == len(list(installed)) == len(set(installed))


@pytest.mark.parametrize("name", ["", ".", "..", "a..b", "torch.", ".torch", "*", "torch/nn", "torch nn"])
def test_a_name_that_is_no_module(name):
    assert facts.Installed().get(name) is None


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on the path; the names of the files to write in it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(*names):
        for name in names:
            place = tmp_path / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text("raise AssertionError('was imported')")
        return facts.Installed()

    return write


def test_a_module_is_there_if_its_file_is(site):
    installed = site("one_for_tests/__init__.py", "one_for_tests/deep/__init__.py", "one_for_tests/deep/mod.py")
    for name in ("one_for_tests", "one_for_tests.deep", "one_for_tests.deep.mod"):
        assert installed[name] == ""
    for name in ("one_for_tests.mod", "one_for_tests.deep.mod.more", "one_for_tests.deep.other", "two_for_tests"):
        assert name not in installed
    assert "one_for_tests" not in sys.modules


def test_folders_without_a_file_are_no_module_and_hold_some(site):
    """As flash-attn 4 installs ``flash_attn/cute`` alone; at any depth."""
    installed = site("space_for_tests/cute/__init__.py", "space_for_tests/a/b/mod.py")
    for name in ("space_for_tests.cute", "space_for_tests.a.b.mod"):
        assert installed[name] == ""
    for name in ("space_for_tests", "space_for_tests.a", "space_for_tests.a.b", "space_for_tests.interface"):
        assert name not in installed


def test_a_module_behind_a_finder_of_its_own_is_there(monkeypatch, tmp_path):
    """As setuptools installs packages that are being edited."""
    tmp_path.joinpath("edited.py").touch()

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "edited_for_tests":
                return importlib.util.spec_from_file_location(name, tmp_path / "edited.py")
            return None

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder])
    assert facts.Installed()["edited_for_tests"] == ""


def test_what_is_imported_already_is_there_and_what_is_barred_is_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "made_for_tests", SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "made_for_tests.part", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "barred_for_tests", None)
    installed = facts.Installed()
    assert installed["made_for_tests"] == installed["made_for_tests.part"] == ""
    for name in ("barred_for_tests", "barred_for_tests.part", "made_for_tests.other"):
        assert name not in installed


@pytest.mark.parametrize("text", [None, "", "Name: broken-for-tests", "Version:"])
def test_broken_metadata_is_no_version(site, tmp_path, text):
    installed = site("broken_for_tests.py")
    tmp_path.joinpath("broken_for_tests-1.0.dist-info").mkdir()
    if text is not None:
        tmp_path.joinpath("broken_for_tests-1.0.dist-info", "METADATA").write_text(text)
    assert installed["broken_for_tests"] == ""
    assert len(list(installed)) == len(installed)


def test_each_name_is_looked_up_once(site, monkeypatch):
    installed = site("once_for_tests.py")
    for _ in range(2):
        assert (installed["once_for_tests"], installed.get("never_for_tests")) == ("", None)
        monkeypatch.setattr(facts, "_has_module", None)


def test_somebodys_own_finder_may_raise_or_find_nothing(monkeypatch):
    class Forbids:
        def find_spec(self, name, path=None, target=None):
            raise ImportError(f"blocked {name}")

    monkeypatch.setattr(sys, "meta_path", [Forbids(), object(), *sys.meta_path])
    assert Installed().get("heedful.facts") is not None
    assert Installed().get("no_such_module_for_tests") is None
