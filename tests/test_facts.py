"""Facts of the machine: read from torch, or pretended."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from heedful import facts
from heedful.facts import DeviceFacts, Facts


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
