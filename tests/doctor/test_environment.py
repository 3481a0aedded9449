"""Environments as values."""

from dataclasses import FrozenInstanceError

import pytest
from doctor_machines import A100, AMPERE, BASE, H100, T4, WORKING

from heedful.doctor.environment import Environment, canonical, numbers


def test_it_is_a_frozen_value():
    assert hash(BASE) == hash(Environment(**{name: getattr(BASE, name) for name in vars(BASE)}))
    with pytest.raises(FrozenInstanceError):
        BASE.torch = "2.9"


def test_versions_are_read_as_numbers():
    here = Environment(torch="2.10.0a0+git1234")
    assert (here.torch_release, here.torch_minor) == ((2, 10, 0), "2.10")
    assert numbers("release 12.8, V12.8.93") == (12, 8)
    assert numbers("") == ()
    assert numbers("2.10") > numbers("2.9")


def test_the_best_gpu_is_the_most_capable():
    assert Environment(gpus=(T4, H100, A100)).best == H100
    assert Environment().best is None


def test_packages_are_found_under_any_spelling():
    here = Environment(packages=(WORKING,))
    assert here.package("flash-attn") == here.package("Flash.Attn") == WORKING
    assert here.package("xformers") is None
    assert canonical("Flash__Attn.x") == "flash-attn-x"


def test_the_tag_tells_free_threading():
    assert Environment(python_tag="cp313t").free_threaded
    assert not AMPERE.free_threaded
