"""The page 'Which backend for my GPU and my model' is its generator's, and says what is known of some devices."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parent.parent / "docs"
VAE, UNET, PADDED = "VAE mid-block", "UNet self, SDXL", "cross, padded text, PixArt"


def _generator() -> ModuleType:
    """docs/generate_which_backend.py as a module; its dataclasses look themselves up by name."""
    spec = importlib.util.spec_from_file_location("generate_which_backend", DOCS / "generate_which_backend.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


PAGE = _generator()
DEVICES = {device.short: device for device in PAGE.DEVICES}


@pytest.fixture(scope="module")
def answers():
    """``answers("sm_80")``: what auto does there, by kind of call; each device is asked once."""
    known = {}

    def of(short):
        if short not in known:
            device = DEVICES.get(short) or dataclasses.replace(DEVICES["sm_80"], short=short)
            machine = PAGE.Machine(device)
            problems = {kind: PAGE.problem_of(PAGE.by_name(name), device) for kind, name in PAGE.KINDS.items()}
            known[short] = {kind: machine.answer(one, machine.verdicts(one)) for kind, one in problems.items()}
        return known[short]

    return of


def test_the_page_is_the_generators():
    text = PAGE.PAGE.read_text("utf-8")
    assert PAGE.renewed(text) == text, "python docs/generate_which_backend.py writes it anew"


def test_marks_that_are_missing_are_an_error():
    with pytest.raises(ValueError, match="marks are missing"):
        PAGE.renewed("no marks")


def test_it_says_that_nothing_of_it_was_measured():
    assert "This page is derived, not measured." in PAGE.PAGE.read_text("utf-8")


@pytest.mark.parametrize(
    ("short", "package", "adds"),
    [
        ("sm_75", "flash", False),  # Turing is below flash-attn 2's floor of 8.0
        ("sm_80", "flash", True),
        ("sm_80", "flash_3", False),
        ("sm_90", "flash_3", True),
        ("sm_100", "flash_3", False),
        ("sm_75", "xformers", True),
        ("gfx942", "aiter", True),
        ("gfx942", "flash", False),
        ("gfx1100", "aiter", False),
        ("mps", "flash", False),
        ("cpu", "xformers", False),
    ],
)
def test_what_a_package_adds(answers, short, package, adds):
    assert (package in answers(short)[UNET].more) == adds


def test_a_head_dim_of_512_has_no_flash_anywhere(answers):
    for short in ("sm_80", "sm_90", "gfx942"):
        answer = answers(short)[VAE]
        assert not {"flash", "flash_3", "flash_4", "aiter", "native_flash"} & {*answer.more, *answer.rivals}


def test_quantised_backends_are_never_among_those_that_auto_measures_by_itself(answers):
    for short in ("sm_89", "sm_90", "sm_120"):
        for answer in answers(short).values():
            assert not any("sage" in name for name in (*answer.more, *answer.rivals, answer.first))
    assert "sage" in answers("sm_89")[UNET].coarse
    assert answers("sm_75")[UNET].coarse == ()


def test_padding_is_gathered_on_a_cpu(answers):
    assert answers("cpu")[PADDED].first == "`native` after gather_keys"


def test_rtx_30_is_as_the_page_says_like_the_a100(answers):
    assert answers("sm_86") == answers("sm_80")


def test_every_device_and_every_kind_of_call_is_there():
    text = PAGE.PAGE.read_text("utf-8")
    for device in PAGE.DEVICES:
        assert f"### {device.name}\n" in text
    assert text.count("Why not the others:") == len(PAGE.DEVICES) == 10
    assert text.count("| every other call |") == len(PAGE.DEVICES)
