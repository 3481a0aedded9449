"""What a build needs, and how many compilers the memory carries."""

from dataclasses import replace

import pytest
from doctor_machines import AMPERE, BUILDER, H100, MACHINES, RTX_4090, RTX_5090

from heedful import AttentionStrategyFactory
from heedful.doctor.decision import decide
from heedful.doctor.ways import WAYS, max_jobs
from heedful.sources import Package

STRATEGIES = AttentionStrategyFactory(plugins=False).strategies()


@pytest.mark.parametrize(
    ("cores", "memory", "threads", "jobs"),
    [
        (8, 64, 1, 4),
        (32, 64, 1, 10),
        (32, 64, 2, 5),
        (2, 64, 1, 1),
        (1, 64, 1, 1),
        (16, 8, 1, 1),
        (16, 6, 1, 0),
        (4, 0, 1, 0),
    ],
)
def test_max_jobs(cores, memory, threads, jobs):
    """min(cores / 2, 0.8 free GB / (5 NVCC_THREADS)), and one where the memory carries one."""
    assert max_jobs(cores, memory, threads) == jobs


def build(backend="flash", **fields):
    return decide(replace(BUILDER, **fields), STRATEGIES, backend, way="build")


def test_a_build_is_for_this_gpu_alone():
    variables = dict(build(gpus=(RTX_4090,)).steps[-1].variables)
    assert variables == {
        "MAX_JOBS": "4", "NVCC_THREADS": "1", "CUDA_HOME": "/usr/local/cuda-12.8", "FLASH_ATTN_CUDA_ARCHS": "80",
        "FLASH_ATTENTION_FORCE_BUILD": "TRUE",
    }  # fmt: skip
    assert dict(build("sage", gpus=(RTX_4090,)).steps[-1].variables)["TORCH_CUDA_ARCH_LIST"] == "8.9"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"nvcc": ""}, "there is no CUDA compiler (nvcc)"),
        ({"nvcc": "11.8"}, "nvcc is 11.8, torch has CUDA 12.8; their first numbers must agree"),
        ({"nvcc": "12.6", "gpus": (RTX_5090,)}, "sm_120 needs nvcc 12.8, this one is 12.6"),
        ({"nvcc": "12.1", "gpus": (H100,)}, "sm_90 needs nvcc 12.3, this one is 12.1"),
        ({"compiler": ""}, "there is no C++ compiler"),
        ({"headers": False}, "this Python has no headers (Python.h)"),
        ({"memory_gib": 6.0}, "6.0 GiB are free, one compiler needs 6.2"),
    ],
)
def test_what_a_build_lacks_is_a_sentence(fields, words):
    found = build(**fields)
    assert found.outcome == "impossible"
    assert found.passed_over == (f"it cannot be built: {words}",)


def test_sources_are_pinned():
    for backend in ("flash", "flash_3", "sage", "sage_blackwell"):
        gpus = {"flash_3": (H100,), "sage_blackwell": (RTX_5090,)}.get(backend, BUILDER.gpus)
        requirement = build(backend, gpus=gpus).steps[-1].arguments[-1]
        assert "==" in requirement or len(requirement.partition("@")[2].partition("#")[0]) == 40


def test_every_package_of_a_gpu_has_its_ways():
    packages = {
        source.distribution for one in STRATEGIES.values() for source in one.sources if isinstance(source, Package)
    }
    assert set(WAYS) == packages - {"torch", "torch-npu", "torch_xla"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"torch": "2.8.0+cu128"}, "triton==3.4.*"),
        ({"torch": "2.13.0+cu130", "cuda": "13.0"}, "triton==3.7.*"),
        ({"torch": "2.10.0+cu128", "system": "Windows"}, "triton-windows==3.6.*"),
    ],
)
def test_triton_is_the_one_that_belongs_to_torch(fields, words):
    found = decide(replace(AMPERE, **fields), STRATEGIES, "triton")
    assert found.outcome == "install"
    assert words in found.steps[-1].arguments


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"torch": "2.7.1+cu128"}, "triton==3.3.* belongs to torch 2.7.1+cu128, and our own kernels need 3.4"),
        ({"torch": "2.99.0+cu128"}, "no Triton is known to belong to torch 2.99.0+cu128 on Linux"),
        ({"libc": "musl 1.2"}, "Triton has wheels for glibc only, this system has musl"),
    ],
)
def test_no_triton_is_offered_that_would_not_work(fields, words):
    found = decide(replace(AMPERE, **fields), STRATEGIES, "triton")
    assert found.outcome == "impossible"
    assert found.passed_over == (words,)


def test_torch_for_rocm_brings_its_own_triton():
    found = decide(MACHINES["rocm_mi300"], STRATEGIES, "triton")
    assert found.outcome == "impossible"
    assert "torch for ROCm brings a Triton of its own" in found.passed_over[0]


def test_flash_3_needs_its_cuda_wherever_it_comes_from():
    here = replace(BUILDER, gpus=(H100,), torch="2.6.0+cu118", cuda="11.8", nvcc="")
    found = decide(here, STRATEGIES, "flash_3")
    assert found.outcome == "impossible"
    assert "FlashAttention 3 needs CUDA 12.3, torch has 11.8" in found.passed_over


@pytest.mark.parametrize("backend", ["xformers", "aiter", "flash_4"])
def test_nothing_for_glibc_is_offered_to_musl(backend):
    fields = {"aiter": MACHINES["rocm_mi300"], "flash_4": MACHINES["blackwell_datacentre"]}
    found = decide(replace(fields.get(backend, MACHINES["ampere"]), libc="musl"), STRATEGIES, backend)
    assert found.outcome == "impossible", found
