"""Fingerprints: what changes them, what does not, and that nothing is imported to make one."""

import dataclasses
import json
import sys

import pytest
import torch

from heedful import AttentionStrategy, Facts
from heedful import fingerprint as module
from heedful.facts import DeviceFacts, Installed, probe
from heedful.fingerprint import Fingerprint, fingerprint
from heedful.sources import Hub, Package

CPU = torch.device("cpu")
H100 = DeviceFacts("cuda", "NVIDIA H100", (9, 0), "sm_90")


class Twice(AttentionStrategy):
    name = "twice"
    sources = (
        Package("fast_attn.one", ("f",), "fast-attn"),
        Package("fast_attn.two", ("f",), "fast-attn"),
        Package("absent_attn", ("f",)),
        Hub("org/name", 1, ("f",)),
    )

    def compute_attention(self, query, key, value, **kwargs):
        raise AssertionError


def machine(device=H100, **packages):
    named = {name.replace("__", "."): version for name, version in packages.items()}
    return Facts("2.13.0+cu128", "3.11", "Linux", {"cuda:0": device, "cpu": DeviceFacts("cpu", "A CPU")}, named)


def test_it_names_all_that_times_depend_on():
    facts = machine(fast_attn__one="", fast_attn__two="", triton="3.4.0")
    facts.packages.update({"fast-attn": "1.2", "heedful": "0.1.0"})
    made = fingerprint(facts, torch.device("cuda:0"), {"twice": Twice()})
    assert (made.device, made.architecture, made.torch) == ("NVIDIA H100", "sm_90", "2.13.0+cu128")
    assert (made.triton, made.threads, made.system) == ("3.4.0", 0, "Linux")
    assert made.packages == (("fast-attn", "1.2"), ("heedful", "0.1.0"))
    assert "fast-attn 1.2" in str(made)


def test_threads_count_on_a_cpu_alone(monkeypatch):
    cuda = torch.device("cuda:0")
    before = [fingerprint(machine(), device, {}) for device in (CPU, cuda)]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    after = [fingerprint(machine(), device, {}) for device in (CPU, cuda)]
    assert after[0] == dataclasses.replace(before[0], threads=77) != before[0]
    assert after[1] == before[1]


def test_triton_is_found_under_any_of_its_names():
    facts = machine(triton="")
    facts.packages["pytorch-triton"] = "3.5.0"
    assert fingerprint(facts, CPU, {}).triton == "3.5.0"
    assert fingerprint(machine(), CPU, {}).triton == ""


def test_a_cpu_has_the_name_that_the_system_has_for_it(tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(module, "_CPU", file)
    vague = machine()
    vague.devices["cpu"] = DeviceFacts("cpu", "")
    assert fingerprint(machine(), CPU, {}).device == "A CPU"
    file.write_text("processor\t: 0\nmodel name\t: Fast 9000\n\nprocessor\t: 1\nmodel name\t: Slow\n")
    assert fingerprint(vague, CPU, {}).device == "Fast 9000"
    module._cpu_in.cache_clear()
    file.write_text("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n")
    assert fingerprint(vague, CPU, {}).device == "0x41 0xd0c"
    module._cpu_in.cache_clear()
    file.unlink()
    assert fingerprint(vague, CPU, {}).device == ""


def test_the_drivers_version_is_the_systems_then_torchs(tmp_path, monkeypatch):
    file = tmp_path / "version"
    monkeypatch.setattr(module, "_DRIVERS", (str(tmp_path / "none"), str(file)))
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12080, raising=False)
    assert fingerprint(machine(), torch.device("cuda:0"), {}).driver == "12080"
    file.write_text("570.86.15\n")
    assert fingerprint(machine(), torch.device("cuda:0"), {}).driver == "570.86.15"
    assert fingerprint(machine(), CPU, {}).driver == ""


def test_this_machine_has_one_and_the_same_again(factory):
    made = fingerprint(probe(), CPU, factory.strategies())
    assert made == fingerprint(probe(), CPU, factory.strategies())
    assert made.device
    assert made.torch == torch.__version__
    assert hash(made) == hash(Fingerprint.from_dict(json.loads(json.dumps(made.to_dict()))))


def test_nothing_is_imported_for_it(fresh_python):
    script = """
import sys, torch
from heedful.facts import probe
from heedful.factory import AttentionStrategyFactory
from heedful.fingerprint import fingerprint
from heedful import timings
made = AttentionStrategyFactory.strategies()
before = set(sys.modules)
fingerprint(probe(), torch.device("cpu"), made).digest
print({name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))
print([name for name in ("filelock", "platformdirs", "xformers", "triton", "sageattention") if name in sys.modules])
"""
    ran = fresh_python(script)
    assert ran.stdout.splitlines() == ["set()", "[]"], ran.stderr


def test_the_digest_is_short_stable_and_different_for_every_field():
    made = Fingerprint("d", "a", "1", "2.13.0", "12.8", "3.4", 0, "Linux", (("x", "1"),))
    assert made.digest == "f3614454338a29c9"
    changed = [dataclasses.replace(made, **{field.name: "other"}) for field in dataclasses.fields(made)[:6]]
    changed += [dataclasses.replace(made, threads=1), dataclasses.replace(made, packages=(("x", "2"),))]
    assert len({one.digest for one in [made, *changed]}) == 9


def test_likeness_forgets_what_a_first_guess_may_differ_in():
    made = Fingerprint("d", "a", "1", "2.13.0+cu128", "12.8", "3.4", 4, "Linux")
    like = dataclasses.replace(made, driver="2", torch="2.13.1", packages=(("x", "1"),))
    assert made.likeness == like.likeness == {"device": "d", "architecture": "a", "torch": "2.13", "threads": 4}
    assert made.likeness != dataclasses.replace(made, torch="2.14.0").likeness


@pytest.mark.parametrize(
    "change",
    [
        {"threads": True},
        {"threads": -1},
        {"threads": 1 << 40},
        {"threads": 1.0},
        {"device": None},
        {"packages": []},
        {"packages": {"x": 1}},
        {"more": ""},
    ],
    ids=str,
)
def test_foreign_data_is_no_fingerprint(change):
    data = Fingerprint("d", "a", "1", "2.13.0", "12.8", "3.4", 0, "Linux", (("x", "1"),)).to_dict()
    with pytest.raises(ValueError, match="fingerprint"):
        Fingerprint.from_dict({**data, **change})
    for other in (None, [], "text", {}):
        with pytest.raises(ValueError, match="fingerprint"):
            Fingerprint.from_dict(other)


def test_a_machine_with_everything_has_every_package_without_versions(factory):
    facts = Facts("2", "3", "Linux", {"cuda:0": H100})
    names = dict(fingerprint(facts, torch.device("cuda:0"), factory.strategies()).packages)
    assert "xformers" in names
    assert set(names.values()) == {""}
    assert isinstance(probe().packages, Installed)
    assert "flash_attn" not in sys.modules
