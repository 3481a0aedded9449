"""What to do about the error texts that packages with kernels are known for, as one table.

The texts are the packages' own; they were collected from their sources and issue trackers. An unknown text gets no
advice: nothing is guessed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Advice:
    """One known trouble: ``patterns``, one of which occurs in its texts (all of ``also`` must, too), what it means and
    what to do.
    """

    name: str
    patterns: tuple[str, ...]
    means: str
    remedy: str
    also: tuple[str, ...] = ()

    def fits(self, text: str) -> bool:
        """Whether it is about this text."""
        found = any(re.search(pattern, text, re.IGNORECASE) for pattern in self.patterns)
        return found and all(re.search(pattern, text, re.IGNORECASE) for pattern in self.also)

    def __str__(self) -> str:
        return f"{self.means}: {self.remedy}"


# The first that fits counts, so the narrow ones stand before the wide ones.
ADVICE: tuple[Advice, ...] = (
    Advice(
        "build isolation",
        (r"No module named '?torch'?(?!\w|\.)",),
        "pip builds in a fresh environment that has no torch",
        "take a wheel (`heedful install` names the right one); to build all the same, have torch installed first and "
        "add --no-build-isolation",
    ),
    Advice(
        "no CUDA compiler",
        (r"CUDA_HOME environment variable is not set", r"nvcc (was )?not found", r"nvcc: (command )?not found",
         r"No such file or directory: '[^']*nvcc'", r"detected CUDA version .* mismatches"),
        "building needs the CUDA toolkit (nvcc), in the major version of torch's CUDA",
        "take a wheel instead; build only where `nvcc --version` and torch.version.cuda begin with the same number",
    ),
    Advice(
        "ABI of torch 2.6",
        (r"undefined symbol", r"DLL load failed", r"ImportError"),
        "a wheel can fit torch 2.6 by its name and still fail: torch 2.6 exists with the old and with the new C++ ABI",
        "take the wheel whose cxx11abi is what `heedful doctor` shows for torch (TRUE or FALSE)",
        also=(r"torch2\.6cxx11abi(FALSE|TRUE)",),
    ),
    Advice(
        "other torch or ABI",
        (r"undefined symbol",),
        "the package was compiled for another torch, or another C++ ABI",
        "install the build whose name has exactly this torch, CUDA and cxx11abi: `heedful install` computes it",
    ),
    Advice(
        "build ran out of memory",
        (r"\bKilled\b", r"died due to signal 9", r"signal 9 \(SIGKILL\)", r"out of memory allocating",
         r"cc1plus.*Killed", r"returned non-zero exit status 137", r"MemoryError", r"ninja: build stopped"),
        "the compiler was killed: each nvcc thread takes 3 to 5 GB of memory",
        "build with a lower MAX_JOBS and NVCC_THREADS=1 (`heedful install` computes it from the free memory), or take "
        "a wheel",
    ),
    Advice(
        "no kernel for this GPU",
        (r"no kernel image is available", r"kernel image is invalid", r"is not compatible with the current PyTorch"),
        "the build holds no code for this GPU's architecture",
        "take a build for it; sm_100 and sm_120 (Blackwell) need one made with CUDA 12.8 or newer, of torch as well",
    ),
    Advice(
        "GPU before Ampere",
        (r"only supports Ampere GPUs or newer", r"FlashAttention only supports .*8\.0"),
        "flash-attn 2 has no kernels below compute capability 8.0, whatever documents say of 7.5",
        "use native: torch's memory-efficient kernel serves Turing and older GPUs",
    ),
    Advice(
        "SageAttention for another torch",
        (r"DLL load failed while importing _fused", r"DLL load failed while importing _qattn",
         r"cannot import name '_(fused|qattn)"),
        "this SageAttention was built for another torch or CUDA",
        "install the wheel whose name has exactly this torch and CUDA",
    ),
    Advice(
        "Triton cannot be loaded",
        (r"DLL load failed while importing libtriton", r"DLL load failed.*libtriton"),
        "Triton lacks the Visual C++ runtime, or is not the one for this torch",
        "install vc_redist.x64 of Microsoft, and the triton-windows that fits this torch (`heedful doctor` names it)",
    ),
    Advice(
        "no Python headers",
        (r"Python\.h: No such file", r"Cannot open include file: 'Python\.h'", r"python3\d+\.lib"),
        "Triton compiles a little C at first use, and this Python has no headers",
        "embedded Python: copy the folders include and libs of a full Python of the same version into python_embeded; "
        "Linux: install python3-dev",
    ),
    Advice(
        "SageAttention without this architecture",
        (r"SM\d+ kernel (is )?not available",),
        "SageAttention was built on, or for, another GPU",
        "build it again for this one: TORCH_CUDA_ARCH_LIST=<compute capability>, which `heedful install sage` sets",
    ),
    Advice(
        "xFormers for another torch",
        (r"xFormers was built for", r"xFormers can't load C\+\+/CUDA extensions"),
        "this xFormers was built for another torch, CUDA or Python; its kernels are off",
        "install the xFormers that belongs to this torch, from torch's own index and with --no-deps: "
        "`heedful install xformers`",
    ),
    Advice(
        "xFormers picks FlashAttention 3",
        (r"CUDA error: invalid argument", r"(fmha|hopper|flash).*invalid argument"),
        "xFormers picks FlashAttention 3 where it cannot run",
        "pin its operator to CUTLASS or FlashAttention 2, or name another backend: native",
    ),
    Advice(
        "no build on the Hub",
        (r"(no|find a) build variant",),
        "the Hub's kernel has no build for this torch, CUDA and system",
        "ask before with `kernels info <repository>`; take a version that has one, pinned, or another backend",
    ),
    Advice(
        "torch was replaced",
        (r"Attempting uninstall: torch\b", r"Uninstalling torch-\d", r"Successfully uninstalled torch-",
         r"Torch not compiled with CUDA enabled"),
        "an install has replaced torch by another build, often one without CUDA",
        "install torch again as pytorch.org says, and packages with --no-deps and -c <pins>, as `heedful install` does",
    ),
    # Beside adoption's list: what pip and the loader say.
    Advice(
        "wheel for another Python or system",
        (r"is not a supported wheel on this platform",),
        "the wheel's name does not fit this Python or system",
        "compare its cpXY and platform with the first lines of `heedful doctor`",
    ),
    Advice(
        "system's Python",
        (r"externally-managed-environment",),
        "this Python belongs to the system, which forbids pip",
        "work in a virtual environment: python3 -m venv --system-site-packages .venv",
    ),
    Advice(
        "older C library",
        (r"version `?'?GLIBC(XX)?_[\d.]+'? not found",),
        "the wheel was built on a newer Linux than this one",
        "use the Hub's kernel, build from source here, or run in a container with a newer system",
    ),
    Advice(
        "CUDA library not found",
        (r"lib(cudart|cublas|cudnn|nvrtc)[\w.-]*: cannot open shared object",),
        "the package was built for another CUDA than torch brings",
        "install the build for torch's CUDA major version",
    ),
    Advice(
        "not on the index",
        (r"404 (Client Error|Not Found)", r"No matching distribution found", r"Could not find a version that sat"),
        "there is no such file for this Python, system and version",
        "run `heedful doctor`: it names what exists for this machine",
    ),
    Advice(
        "no network",
        (r"Temporary failure in name resolution", r"Failed to establish a new connection", r"getaddrinfo failed",
         r"Network is unreachable", r"ProxyError", r"Read timed out"),
        "the package index cannot be reached",
        "set the proxy or PIP_INDEX_URL, or fetch the wheel elsewhere: `heedful install <backend> --wheel FILE`",
    ),
    Advice(
        "disk full",
        (r"No space left on device", r"not enough space on the disk"),
        "the disk is full",
        "free some room; `pip cache purge` often frees gigabytes",
    ),
)  # fmt: skip


def advise(text: str) -> Advice | None:
    """The advice for an error text, with the package's name and version before it where they are known."""
    return next((one for one in ADVICE if one.fits(text)), None)
