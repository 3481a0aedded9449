"""The doctor's page, for machines of every kind."""

import json
from dataclasses import replace

import pytest
from doctor_machines import AMPERE, BROKEN, MACHINES

from heedful import AttentionStrategyFactory
from heedful.doctor import examine
from heedful.doctor.environment import Environment, Found

STRATEGIES = AttentionStrategyFactory(plugins=False).strategies()


def report(here):
    return examine(here, STRATEGIES)


@pytest.mark.parametrize("name", MACHINES)
def test_every_machine_has_a_whole_page(name):
    found = report(MACHINES[name])
    page = str(found)
    for heading in ("This machine", "Backends", "What is broken", "What to do"):
        assert f"\n{heading}\n" in page
    assert {row.name for row in found.rows} == set(STRATEGIES)
    assert all(name in page for name in STRATEGIES)
    assert MACHINES[name].torch in page
    assert all(len(line) <= 110 or "http" in line for line in page.splitlines())
    assert json.loads(json.dumps(found.to_dict()))["decision"]["reason"] == found.decision.reason


def states(here):
    return {row.name: row.state for row in report(here).rows}


def test_a_backend_is_usable_broken_too_old_missing_or_not_for_this_device():
    xformers = Found("xformers", "0.0.20", "xformers.ops.fmha")
    found = states(replace(AMPERE, packages=(BROKEN, xformers)))
    assert found["native"] == "usable"
    assert found["flash"] == "broken"
    assert found["xformers"] == "too old"
    assert found["sage"] == "missing"
    assert found["flash_3"] == "not for this device"
    assert found["native_varlen"] == "too old"
    assert states(MACHINES["ampere_works_already"])["flash"] == "usable"
    assert states(MACHINES["cpu"])["flash"] == "not for this device"
    assert states(MACHINES["mps"])["native"] == "usable"


def test_what_is_broken_keeps_its_words_and_gets_its_advice():
    found = report(MACHINES["ampere_broken_wheel"])
    (trouble,) = found.troubles
    assert trouble.advice.name == "other torch or ABI"
    page = " ".join(str(found).split())
    assert "undefined symbol: _ZN3c104cuda9SetDeviceEab" in page
    assert "→ the package was compiled for another torch" in page
    assert "→ on this machine: heedful install flash" in page


def test_what_is_broken_and_of_no_use_here_need_not_be_mended():
    (trouble,) = report(replace(MACHINES["cpu"], packages=(BROKEN,))).troubles
    assert trouble.here.startswith("A CPU needs nothing beside torch")
    unknown = Found("kernels", "0.12", "kernels", "raises", "x")
    assert report(replace(AMPERE, packages=(unknown,))).troubles[0].here == ""


def test_words_that_nobody_knows_are_kept_whole():
    text = "\n".join(f"line {number}" for number in range(30))
    found = report(replace(AMPERE, packages=(Found("sageattention", "2.2.0", "sageattention", "raises", text),)))
    assert found.troubles[0].advice is None
    assert "no advice is known for this text" in str(found)
    assert found.to_dict()["troubles"][0]["package"]["text"] == text
    assert "line 29" in str(found)


def test_a_banner_is_no_trouble():
    banner = Found("triton", "3.4.0", "triton", "warns", "hello")
    assert report(replace(AMPERE, packages=(banner,))).troubles == ()


def test_what_is_missing_says_what_it_would_add():
    rows = {row.name: row.text for row in report(AMPERE).rows}
    assert (
        rows["flash"] == "it would add windows, packed sequences, softcap, the LSE (exact); also on the Hub: flash_hub"
    )
    assert rows["sage"].startswith("it would add the LSE (quantised, by name only)")


def test_it_looks_itself_where_no_environment_is_given():
    asked = []

    def looked(strategies):
        asked.append(strategies)
        return Environment(gpus=AMPERE.gpus)

    assert examine(strategies=STRATEGIES, looked=looked).environment.gpus == AMPERE.gpus
    assert asked == [STRATEGIES]


def test_a_page_names_no_user(monkeypatch):
    monkeypatch.setenv("HOME", "/home/user")
    monkeypatch.setenv("USERPROFILE", "/home/user")
    assert ", ~/.venv/bin/python\n" in str(report(AMPERE))
    assert "/home/user2/python" in str(report(replace(AMPERE, executable="/home/user2/python")))


def test_forms_of_one_package_are_judged_apart():
    """A build for one architecture lacks some forms of SageAttention's kernel, and has the others."""
    name = "sage_qk_int8_pv_fp16_cuda"
    text = f"{name}: probe is a tiny problem raised AssertionError: SM80 kernel is not available"
    package = Found("sageattention", "2.2.0", "sageattention", "fails a tiny problem", text, (name,))
    found = states(replace(AMPERE, packages=(package,)))
    assert (found[name], found["sage"]) == ("broken", "usable")
    assert report(replace(AMPERE, packages=(package,))).troubles[0].advice.name.startswith("SageAttention without")


def test_what_hangs_may_only_be_slow():
    slow = Found("amd-aiter", "0.1.7", "aiter", "hangs", "nothing came back within 60 s")
    page = " ".join(str(report(replace(MACHINES["rocm_mi300"], packages=(slow,)))).split())
    assert "heedful doctor --timeout 600" in page


def test_torchs_own_kernels_are_broken_where_their_trial_fails():
    torchs = Found("torch", "2.13.0", "torch.nn.attention.varlen", "fails a tiny problem", "x", ("native_varlen",))
    here = replace(AMPERE, torch="2.13.0+cu128", packages=(torchs,))
    assert states(here)["native_varlen"] == "broken"
    assert states(replace(here, packages=()))["native_varlen"] == "usable"
