"""Every error text that packages with kernels are known for has its advice, and no other text has any."""

from pathlib import Path

import pytest

from heedful.doctor.advice import ADVICE, advise

# As users paste them. The second column is the advice's name.
TEXTS = [
    ("  File \"<string>\", line 20, in <module>\n  ModuleNotFoundError: No module named 'torch'\n", "build isolation"),
    ("OSError: CUDA_HOME environment variable is not set. Please set it to your install root.", "no CUDA compiler"),
    ("UserWarning: flash_attn was requested, but nvcc was not found.  Are you sure your environment has nvcc?",
     "no CUDA compiler"),
    ("/bin/sh: 1: nvcc: not found", "no CUDA compiler"),
    ("FileNotFoundError: [Errno 2] No such file or directory: '/usr/local/cuda/bin/nvcc'", "no CUDA compiler"),
    ("RuntimeError: The detected CUDA version (11.8) mismatches the version that was used to compile PyTorch (12.8).",
     "no CUDA compiler"),
    ("flash-attn 2.8.3+cu12torch2.8cxx11abiTRUE: ImportError: /x/flash_attn_2_cuda.cpython-312-x86_64-linux-gnu.so: "
     "undefined symbol: _ZN3c105ErrorC2ENS_14SourceLocationENSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE",
     "other torch or ABI"),
    ("flash-attn 2.8.2+cu12torch2.6cxx11abiFALSE: ImportError: flash_attn_2_cuda.so: undefined symbol: _ZN3c10ESs",
     "ABI of torch 2.6"),
    ("Killed", "build ran out of memory"),
    ("nvcc error   : 'cicc' died due to signal 9 (Kill signal)", "build ran out of memory"),
    ("c++: fatal error: Killed signal terminated program cc1plus", "build ran out of memory"),
    ("ninja: build stopped: subcommand failed.", "build ran out of memory"),
    ("RuntimeError: CUDA error: no kernel image is available for execution on the device", "no kernel for this GPU"),
    ("NVIDIA GeForce RTX 5090 with CUDA capability sm_120 is not compatible with the current PyTorch installation.",
     "no kernel for this GPU"),
    ("RuntimeError: FlashAttention only supports Ampere GPUs or newer.", "GPU before Ampere"),
    ("ImportError: DLL load failed while importing _fused: The specified procedure could not be found.",
     "SageAttention for another torch"),
    ("ImportError: DLL load failed while importing libtriton: A dynamic link library (DLL) initialization failed.",
     "Triton cannot be loaded"),
    ("main.c:4:10: fatal error: Python.h: No such file or directory\n #include <Python.h>", "no Python headers"),
    ("c:\\x\\main.c(4): fatal error C1083: Cannot open include file: 'Python.h': No such file or directory",
     "no Python headers"),
    ("AssertionError: SM80 kernel is not available. make sure you GPUs with compute capability 8.0.",
     "SageAttention without this architecture"),
    ("AssertionError: SM89 kernel is not available. Make sure you GPUs with compute capability 8.9.",
     "SageAttention without this architecture"),
    ("WARNING[XFORMERS]: xFormers can't load C++/CUDA extensions. xFormers was built for:\n"
     "    PyTorch 2.10.0+cu128 with CUDA 1208 (you have 2.13.0+cpu)", "xFormers for another torch"),
    ("CUDA error (/__w/xformers/third_party/flash-attention/hopper/flash_fwd_launch_template.h:188): invalid argument",
     "xFormers picks FlashAttention 3"),
    ("FileNotFoundError: Cannot find a build variant for this system in kernels-community/flash-attn2 (revision: v3):",
     "no build on the Hub"),
    ("ValueError: no build variant for torch211-cxx11-cu128-x86_64-linux", "no build on the Hub"),
    ("  Attempting uninstall: torch\n    Found existing installation: torch 2.8.0+cu128", "torch was replaced"),
    ("AssertionError: Torch not compiled with CUDA enabled", "torch was replaced"),
    ("ERROR: flash_attn-2.8.3-cp311-cp311-win_amd64.whl is not a supported wheel on this platform.",
     "wheel for another Python or system"),
    ("error: externally-managed-environment", "system's Python"),
    ("ImportError: /lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.32' not found (required by flash_attn_2_cuda.so)",
     "older C library"),
    ("ImportError: libcudart.so.12: cannot open shared object file: No such file", "CUDA library not found"),
    ("ERROR: HTTP error 404 while getting https://github.com/x.whl\nERROR: 404 Client Error: Not Found for url",
     "not on the index"),
    ("ERROR: Could not find a version that satisfies the requirement flash-attn==9 (from versions: none)",
     "not on the index"),
    ("Failed to establish a new connection: [Errno -3] Temporary failure in name resolution", "no network"),
    ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk full"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "name"), TEXTS, ids=[f"{name} {place}" for place, (_, name) in enumerate(TEXTS)])
def test_each_text_has_its_advice(text, name):
    found = advise(text)
    assert found is not None
    assert found.name == name


def test_each_advice_has_a_text():
    assert {name for _, name in TEXTS} == {one.name for one in ADVICE}


def test_names_are_names_and_sentences_are_whole():
    assert len({one.name for one in ADVICE}) == len(ADVICE)
    assert all(one.means and one.remedy and not one.remedy.endswith(".") for one in ADVICE)


@pytest.mark.parametrize(
    "text",
    ["", "ImportError: cannot import name 'x' from 'y'", "ModuleNotFoundError: No module named 'torchvision'",
     "No module named 'torch.nn.attention.varlen'", "ZeroDivisionError: division by zero"],
)  # fmt: skip
def test_other_texts_have_none(text):
    assert advise(text) is None


def test_the_troubleshooting_page_has_each_advice_in_its_words():
    page = Path(__file__).parent.parent.parent.joinpath("docs", "troubleshooting.md").read_text("utf-8")
    for one in ADVICE:
        assert f"| {one.means} | {one.remedy.replace('|', '')} |" in page, one.name
