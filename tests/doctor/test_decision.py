"""The table's rows, and the rules that hold on every machine."""

from dataclasses import replace

import pytest
from doctor_machines import AMPERE, BASE, MACHINES, RTX_4090, T4, amd, gpu

import heedful
from heedful import AttentionStrategyFactory
from heedful.doctor.decision import decide, from_wheel
from heedful.doctor.environment import Found
from heedful.doctor.plans import PINS

STRATEGIES = AttentionStrategyFactory(plugins=False).strategies()


def best(**fields):
    return decide(replace(BASE, **fields), STRATEGIES)


@pytest.mark.parametrize(
    ("capability", "backend"),
    [((5, 2), "auto"), ((7, 0), "auto"), ((7, 5), "auto"), ((8, 0), "flash"), ((8, 6), "flash"), ((8, 9), "flash"),
     ((9, 0), "flash_3"), ((10, 0), "flash_4"), ((10, 3), "flash_4"), ((12, 0), "flash"), ((12, 1), "flash")],
)  # fmt: skip
def test_what_is_best_for_each_generation(capability, backend):
    found = best(gpus=(gpu("x", capability),))
    assert found.backend == backend
    assert found.outcome == ("nothing" if backend == "auto" else "install")
    if backend == "auto":
        assert found.use == "native"


def test_hopper_before_cuda_12_3_takes_flash_2():
    found = best(gpus=(gpu("x", (9, 0)),), torch="2.6.0", cuda="12.1")
    assert found.backend == "flash"


def test_hopper_without_a_way_to_flash_3_takes_flash_2():
    """On Windows the Hub's kernel is not built, and there is no compiler here."""
    found = decide(MACHINES["hopper_windows"], STRATEGIES)
    assert found.backend == "flash"
    assert "no way to install flash_3" in found.passed_over[0]


@pytest.mark.parametrize("name", MACHINES)
def test_on_every_machine_every_backend_has_an_answer_that_obeys_the_rules(name):
    for backend in STRATEGIES:
        obeys_the_rules(decide(MACHINES[name], STRATEGIES, backend), MACHINES[name])


def obeys_the_rules(found, here):
    assert found.reason
    assert (found.outcome == "install") == bool(found.steps)
    words = [word for step in found.steps for word in step.arguments]
    for step in found.steps:
        assert step.arguments[:3] == ("pip", "install", "--no-input")
        assert PINS in step.arguments  # so that torch stays what it is
    assert not any(word == "torch" or word.startswith(("torch=", "torch>", "torch<")) for word in words)
    assert not {"--upgrade", "-U", "--break-system-packages", "--user"} & set(words)
    if found.steps:
        assert "--no-deps" in found.steps[-1].arguments or found.rule == "Hub"
        assert (here.writable, here.managed) == (True, False)
        assert here.online or any("did not answer" in note for note in found.notes)
    if not here.gpus or here.hip:
        assert not any("flash" in word or "sage" in word for word in words)
    if found.use and found.outcome in ("install", "nothing"):
        assert found.use in STRATEGIES


@pytest.mark.parametrize("backend", ["flash", "flash_hub", "flash_4", "native_flash"])
def test_flash_2_is_never_installed_below_8_0(backend):
    for capability in ((5, 0), (6, 1), (7, 0), (7, 5)):
        assert not decide(replace(BASE, gpus=(gpu("x", capability),)), STRATEGIES, backend).steps


def test_one_gpu_that_takes_it_is_enough_and_the_others_are_named():
    found = decide(replace(BASE, gpus=(T4, RTX_4090)), STRATEGIES, "flash")
    assert found.outcome == "install"
    assert found.notes[-1].startswith("Tesla T4: compute capability is 7.5")


def test_a_package_that_works_is_left_alone_and_one_that_only_seems_to_is_not():
    works = Found("flash-attn", "2.8.3")
    for text, outcome in (("a banner", "nothing"), ("undefined symbol: _Z", "install")):
        here = replace(AMPERE, packages=(replace(works, fault="warns", text=text),))
        assert decide(here, STRATEGIES, "flash").outcome == outcome
    assert decide(replace(AMPERE, packages=(works,)), STRATEGIES, "flash").rule == "works already"
    assert decide(replace(AMPERE, packages=(replace(works, version="2.5.0"),)), STRATEGIES, "flash").steps
    assert decide(replace(AMPERE, packages=(works,)), STRATEGIES, "flash", way="wheel").steps


def test_another_build_of_what_is_there_is_forced_on_pip():
    broken = Found("flash-attn", "2.8.3", fault="raises", text="x")
    *_, last = decide(replace(AMPERE, packages=(broken,)), STRATEGIES, "flash").steps
    assert "--force-reinstall" in last.arguments
    assert "--no-deps" in last.arguments
    assert "--force-reinstall" not in decide(AMPERE, STRATEGIES, "flash").steps[-1].arguments


def test_a_way_can_be_named():
    ways = {way: decide(MACHINES["ampere_can_build"], STRATEGIES, "flash", way=way).rule for way in ("hub", "build")}
    assert ways == {"hub": "Hub", "build": "source build"}
    assert decide(MACHINES["ampere_can_build"], STRATEGIES, "flash", way="wheel").outcome == "impossible"
    assert decide(AMPERE, STRATEGIES, "flash_hub").rule == "Hub"
    with pytest.raises(heedful.InvalidArgument, match="way: got 'conda'; give one of wheel, hub, build"):
        decide(AMPERE, STRATEGIES, "flash", way="conda")
    with pytest.raises(heedful.UnknownBackend, match="did you mean 'flash'"):
        decide(AMPERE, STRATEGIES, "flahs")


def test_torch_s_own_backends_need_nothing_but_a_torch_that_has_them():
    assert decide(AMPERE, STRATEGIES, "flex").outcome == "nothing"
    old = decide(AMPERE, STRATEGIES, "native_varlen")
    assert (old.outcome, old.use) == ("impossible", "native")
    assert "comes with torch 2.12, this is 2.8.0+cu128" in old.reason


def test_rocm_never_gets_a_wheel_for_cuda():
    here = replace(MACHINES["rocm_mi300"], gpus=(amd("x", "gfx90a"),))
    for backend in STRATEGIES:
        assert not decide(here, STRATEGIES, backend).steps


# A wheel that the user names


def named(wheel, here=AMPERE, backend="flash"):
    return from_wheel(here, STRATEGIES, backend, wheel)


def test_a_named_wheel_that_fits_is_installed_from_where_it_is():
    url = "https://example.org/x/flash_attn-2.8.3%2Bcu128torch2.8-cp312-cp312-linux_x86_64.whl#sha256=00"
    found = named(url)
    assert (found.outcome, found.version) == ("install", "2.8.3+cu128torch2.8")
    assert found.steps[0].arguments[-1] == url


@pytest.mark.parametrize(
    ("wheel", "words"),
    [
        ("flash_attn-2.8.3+cu128torch2.9-cp312-cp312-linux_x86_64.whl", "built for torch 2.9, this torch has 2.8"),
        ("xformers-0.0.35-py39-none-any.whl", "it holds xformers, flash needs flash-attn"),
        ("C:\\x\\flash_attn.whl", "flash_attn.whl is no wheel's name"),
    ],
)
def test_a_named_wheel_that_does_not_fit_is_refused_before_anything_is_changed(wheel, words):
    found = named(wheel)
    assert (found.outcome, found.steps) == ("impossible", ())
    assert words in found.reason


def test_a_fitting_wheel_for_a_machine_that_cannot_use_it_is_refused_too():
    wheel = "flash_attn-2.8.3-py3-none-any.whl"
    assert named(wheel, MACHINES["turing"]).rule == "GPU"
    assert named(wheel, MACHINES["cpu"]).outcome == "nothing"
    assert named(wheel, MACHINES["ampere_managed"]).rule == "no place to install"
    assert named("x-1-py3-none-any.whl", backend="native").rule == "torch's own"
    with pytest.raises(heedful.UnknownBackend):
        named(wheel, backend="x")
