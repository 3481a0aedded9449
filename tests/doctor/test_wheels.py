"""Names of wheels: computed from the matrix, and held to an environment."""

from dataclasses import replace

import pytest
from doctor_machines import AMPERE, WINDOWS

from heedful.doctor.wheels import (
    RELEASES,
    Wheel,
    community_name,
    flash_wheel,
    mismatches,
    triton_windows,
    xformers_release,
)

NAME = "flash_attn-2.8.3+cu12torch2.8cxx11abiTRUE-cp312-cp312-linux_x86_64.whl"


def test_the_official_wheel_is_named_and_addressed():
    assert flash_wheel(AMPERE) == Wheel(NAME, f"{RELEASES}/v2.8.3/{NAME.replace('+', '%2B')}", True)


@pytest.mark.parametrize(
    ("fields", "name", "published"),
    [
        ({"torch": "2.6.0+cu124", "cuda": "12.4", "cxx11_abi": False, "python_tag": "cp310"},
         "cu12torch2.6cxx11abiFALSE-cp310-cp310-linux_x86_64", True),
        ({"torch": "2.9.1+cu130", "cuda": "13.0", "python_tag": "cp313"},
         "cu13torch2.9cxx11abiTRUE-cp313-cp313-linux_x86_64", False),
        ({"torch": "2.10.0+cu128"}, "cu12torch2.10cxx11abiTRUE-cp312-cp312-linux_x86_64", False),
        ({"torch": "2.7.1+cu128", "machine": "aarch64"}, "cu12torch2.7cxx11abiTRUE-cp312-cp312-linux_aarch64", False),
    ],
)  # fmt: skip
def test_names_over_the_matrix(fields, name, published):
    found = flash_wheel(replace(AMPERE, **fields))
    assert (found.name, found.published) == (f"flash_attn-2.8.3+{name}.whl", published)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"system": "Windows"}, "are for Linux, this is Windows"),
        ({"machine": "ppc64le"}, "this is ppc64le"),
        ({"python_tag": "cp313t"}, "free-threaded"),
        ({"python_tag": "cp314", "python": "3.14.0"}, "not 3.14.0"),
        ({"python_tag": "cp39", "python": "3.9.1"}, "not 3.9.1"),
        ({"torch": "2.11.0+cu128"}, "for torch 2.6 to 2.10, not 2.11.0+cu128"),
        ({"torch": "2.5.1"}, "not 2.5.1"),
        ({"cuda": "11.8"}, "for CUDA 12 and 13, not 11.8"),
        ({"cuda": ""}, "not none"),
        ({"cuda": "13.0"}, "for CUDA 13 begin with torch 2.9"),
        ({"cxx11_abi": False}, "C++11 ABI only, from torch 2.7 on"),
        ({"torch": "2.6.0", "machine": "aarch64"}, "for aarch64 begin with torch 2.7"),
        ({"libc": "musl"}, "need glibc"),
        ({"libc": "glibc 2.31"}, "need glibc 2.35, this system has glibc 2.31"),
    ],
)
def test_outside_of_the_matrix_the_reason_is_a_sentence(fields, words):
    found = flash_wheel(replace(AMPERE, **fields))
    assert isinstance(found, str)
    assert words in found


@pytest.mark.parametrize(
    "name",
    [NAME, NAME.replace("+", "%2B"), "flash_attn-2.8.3+cu128torch2.8-cp312-cp312-manylinux_2_28_x86_64.whl",
     "sageattention-2.2.0+cu128torch2.8.0-cp39-abi3-linux_x86_64.whl",
     "xformers-0.0.35-py39-none-manylinux_2_28_x86_64.whl",
     "einops-0.8.1-py3-none-any.whl", "x-1.0-1-py2.py3-none-any.whl"],
)  # fmt: skip
def test_wheels_that_fit(name):
    assert mismatches(name, AMPERE) == ()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (NAME.replace("cp312-cp312", "cp311-cp311"), "it is for Python cp311 (cp311), this one is cp312"),
        (NAME.replace("linux_x86_64", "win_amd64"), "it is for win_amd64, this is Linux x86_64"),
        (NAME.replace("x86_64", "aarch64"), "it is for linux_aarch64"),
        (NAME.replace("torch2.8", "torch2.7"), "it was built for torch 2.7, this torch has 2.8"),
        (NAME.replace("cu12", "cu13"), "it was built for CUDA 13, this torch has 12.8"),
        (NAME.replace("cu12", "cu130"), "it was built for CUDA 13.0, this torch has 12.8"),
        (NAME.replace("TRUE", "FALSE"), "it was built for C++11 ABI FALSE, this torch has TRUE"),
        ("x-1.0+pt27cu128-cp312-cp312-linux_x86_64.whl", "it was built for torch 2.7"),
        ("x-1.0-cp313-abi3-linux_x86_64.whl", "it is for Python cp313 (abi3)"),
        ("flash_attn-2.8.3.tar.gz", "is no wheel's name"),
        ("", "is no wheel's name"),
    ],
)
def test_wheels_that_do_not_fit_say_why(name, words):
    found = mismatches(name, AMPERE)
    assert len(found) == 1
    assert words in found[0]


def test_every_reason_is_told():
    found = mismatches("x-1.0+cu118torch2.4-cp310-cp310-win_amd64.whl", AMPERE)
    assert len(found) == 4


@pytest.mark.parametrize("name", ["x-1.0-cp39-abi3-linux_x86_64.whl", "x-1.0-cp313-cp313-linux_x86_64.whl"])
def test_free_threaded_python_takes_its_own_wheels_only(name):
    free = replace(AMPERE, python_tag="cp313t")
    assert mismatches(name, free) != ()
    assert mismatches("x-1.0-cp313-cp313t-linux_x86_64.whl", free) == ()
    assert mismatches("x-1.0-py3-none-any.whl", free) == ()


def test_windows_calls_its_machine_otherwise():
    assert mismatches("x-1.0+cu128torch2.8-cp312-cp312-win_amd64.whl", WINDOWS) == ()
    assert mismatches("x-1.0-cp312-cp312-macosx_11_0_arm64.whl", WINDOWS) != ()


def test_the_name_to_look_for_fits():
    for here in (WINDOWS, AMPERE):
        assert mismatches(community_name(here, "flash_attn", "2.8.3"), here) == ()


@pytest.mark.parametrize(
    ("torch", "version"),
    [("2.6.0", "0.0.29.post3"), ("2.7.0+cu128", "0.0.30"), ("2.7.1", "0.0.31.post1"), ("2.8.0", "0.0.32.post2"),
     ("2.9.1+cu130", "0.0.33.post2"), ("2.10.0", "0.0.35"), ("2.13.0", "0.0.35"), ("2.5.1", ""), ("2.9.2", "")],
)  # fmt: skip
def test_each_torch_has_its_xformers(torch, version):
    assert xformers_release(replace(AMPERE, torch=torch)) == version


@pytest.mark.parametrize(("torch", "wanted"), [("2.6.0", "3.2"), ("2.8.0", "3.4"), ("2.10.0", "3.6"), ("2.13.0", None)])
def test_each_torch_has_its_triton_on_windows(torch, wanted):
    expected = f"triton-windows=={wanted}.*" if wanted else ""
    assert triton_windows(replace(WINDOWS, torch=torch)) == expected
    assert triton_windows(replace(AMPERE, torch=torch)) == ""
