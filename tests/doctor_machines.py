"""Machines that nobody here has, as the values that the doctor decides on."""

from __future__ import annotations

from dataclasses import replace

from heedful.doctor import Environment
from heedful.doctor.environment import Found
from heedful.facts import DeviceFacts


def gpu(name: str, capability: tuple[int, int]) -> DeviceFacts:
    """An NVIDIA GPU."""
    return DeviceFacts("cuda", name, capability, f"sm_{capability[0]}{capability[1]}")


def amd(name: str, architecture: str) -> DeviceFacts:
    """An AMD GPU."""
    return DeviceFacts("cuda", name, None, architecture)


A100, RTX_3090 = gpu("NVIDIA A100-SXM4-80GB", (8, 0)), gpu("NVIDIA GeForce RTX 3090", (8, 6))
RTX_4090, H100 = gpu("NVIDIA GeForce RTX 4090", (8, 9)), gpu("NVIDIA H100 80GB HBM3", (9, 0))
B200, RTX_5090 = gpu("NVIDIA B200", (10, 0)), gpu("NVIDIA GeForce RTX 5090", (12, 0))
T4, GTX_1080 = gpu("Tesla T4", (7, 5)), gpu("NVIDIA GeForce GTX 1080", (6, 1))
BASE = Environment(executable="/home/user/.venv/bin/python", gpus=(RTX_3090,), driver="570.86", compiler="c++ 11")
AMPERE = replace(BASE, gpus=(A100,))
BUILDER = replace(BASE, torch="2.11.0+cu128", nvcc="12.8", cuda_home="/usr/local/cuda-12.8")
WINDOWS = replace(
    BASE,
    executable=r"C:\ComfyUI portable\python_embeded\python.exe",
    layout="embedded",
    system="Windows",
    machine="AMD64",
    libc="",
    compiler="",
    headers=False,
    gpus=(RTX_4090,),
)
ROCM = replace(
    BASE, torch="2.8.0+rocm6.4", cuda="", hip="6.4", driver="6.12.12", gpus=(amd("AMD Instinct MI300X", "gfx942"),)
)
BROKEN = Found(
    "flash-attn",
    "2.8.3+cu12torch2.7cxx11abiTRUE",
    "flash_attn.flash_attn_interface",
    "raises",
    "ImportError: flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEab",
)
WORKING = Found("flash_attn", "2.8.3", "flash_attn.flash_attn_interface")
HUB_READY = (Found("kernels", "0.12.1", "kernels"),)

MACHINES: dict[str, Environment] = {
    "cpu": replace(BASE, torch="2.13.0+cpu", cuda="", device="cpu", gpus=(), driver=""),
    "cpu_torch_beside_a_gpu": replace(BASE, torch="2.8.0+cpu", cuda="", device="cpu", gpus=()),
    "cuda_torch_without_a_gpu": replace(BASE, gpus=(), driver=""),
    "mps": replace(
        BASE, system="Darwin", machine="arm64", libc="", torch="2.8.0", cuda="", device="mps",
        gpus=(DeviceFacts("mps", "Apple GPU"),), driver="",
    ),
    "pascal": replace(BASE, gpus=(GTX_1080,), torch="2.6.0+cu126", cuda="12.6"),
    "turing": replace(BASE, gpus=(T4,)),
    "ampere": AMPERE,
    "ampere_torch_2.6_old_abi": replace(AMPERE, torch="2.6.0+cu124", cuda="12.4", cxx11_abi=False),
    "ampere_torch_2.10_cuda_13": replace(AMPERE, torch="2.10.0+cu130", cuda="13.0"),
    "ampere_wrong_abi": replace(AMPERE, torch="2.8.0a0+nv", cxx11_abi=False),
    "ampere_broken_wheel": replace(AMPERE, packages=(BROKEN,)),
    "ampere_works_already": replace(AMPERE, packages=(WORKING,)),
    "ampere_offline": replace(AMPERE, online=False),
    "ampere_old_glibc": replace(AMPERE, libc="glibc 2.28"),
    "ampere_musl": replace(AMPERE, libc="musl"),
    "ampere_free_threaded": replace(AMPERE, python="3.13.1", python_tag="cp313t"),
    "ampere_managed": replace(AMPERE, executable="/usr/bin/python3", layout="system", managed=True),
    "ampere_not_writable": replace(AMPERE, executable="/opt/python/bin/python", layout="system", writable=False),
    "ampere_without_pip": replace(AMPERE, pip=""),
    "ampere_aarch64": replace(AMPERE, machine="aarch64", torch="2.9.1+cu129", cuda="12.9"),
    "ampere_torch_2.5": replace(AMPERE, torch="2.5.1+cu121", cuda="12.1"),
    "ampere_torch_2.11": replace(AMPERE, torch="2.11.0+cu128"),
    "ampere_python_3.14": replace(AMPERE, python="3.14.0", python_tag="cp314", packages=HUB_READY),
    "ampere_can_build": BUILDER,
    "ampere_free_threaded_can_build": replace(BUILDER, python="3.13.1", python_tag="cp313t"),
    "ampere_free_threaded_little_memory": replace(BUILDER, python="3.13.1", python_tag="cp313t", memory_gib=4.0),
    "ampere_free_threaded_no_compiler": replace(BUILDER, python="3.13.1", python_tag="cp313t", compiler=""),
    "ampere_free_threaded_other_nvcc": replace(BUILDER, python="3.13.1", python_tag="cp313t", nvcc="11.8"),
    "ada_windows_embedded": WINDOWS,
    "ada_windows_can_build": replace(
        WINDOWS, nvcc="12.8", cuda_home=r"C:\Program Files\NVIDIA GPU Computing Toolkit\CUDA\v12.8", compiler="cl",
        headers=True,
    ),
    "ada_and_turing": replace(BASE, gpus=(RTX_4090, T4)),
    "hopper": replace(BASE, gpus=(H100,)),
    "hopper_cuda_12.1": replace(BASE, gpus=(H100,), torch="2.6.0+cu121", cuda="12.1", cxx11_abi=False),
    "hopper_windows": replace(WINDOWS, gpus=(H100,)),
    "blackwell_datacentre": replace(BASE, gpus=(B200,)),
    "blackwell_consumer": replace(BASE, gpus=(RTX_5090,)),
    "blackwell_old_cuda": replace(BASE, gpus=(RTX_5090,), torch="2.6.0+cu126", cuda="12.6", cxx11_abi=False),
    "blackwell_windows": replace(WINDOWS, gpus=(RTX_5090,), torch="2.9.1+cu130", cuda="13.0"),
    "rocm_mi300": ROCM,
    "rocm_radeon": replace(ROCM, gpus=(amd("AMD Radeon RX 7900 XTX", "gfx1100"),)),
}  # fmt: skip
