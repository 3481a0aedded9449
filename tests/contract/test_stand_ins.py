"""The contract over the adapters of packages that cannot run here, each against a faithful stand-in on the CPU.

The machine's facts pass the CPU for the GPU that the package needs; limits, lowerings and adapter are the real ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from stand_in_sites import installed, machine

from heedful.testing import Check, Tolerance, checks, report

QUANTISED = {
    "sage_blackwell": Tolerance(cosine=0.94, relative=0.3),  # four bits; its stand-in gives 0.957 at twice the scale
    "": Tolerance(cosine=0.98, relative=0.2, lse=0.2),
}
CASES = [  # backend, site, machine
    ("flash", "flash_attn_2", "sm_80"),
    ("flash_varlen", "flash_attn_2", "sm_80"),
    ("flash_3", "flash_attn_3", "sm_90"),
    ("_flash_varlen_3", "flash_attn_3", "sm_90"),
    ("flash_4", "flash_attn_4", "sm_100"),
    ("xformers", "xformers_op", "sm_80"),
    ("aiter", "aiter", "gfx942"),
    ("native_varlen", "torch_varlen", "sm_80"),
    ("native_npu", "torch_npu", "npu"),
    ("native_xla", "torch_xla", "xla"),
    ("sage", "sageattention_2", "sm_89"),
    ("sage_varlen", "sageattention_2", "sm_89"),
    ("sage_qk_int8_pv_fp8_cuda", "sageattention_2", "sm_89"),
    ("sage_qk_int8_pv_fp8_cuda_sm90", "sageattention_2", "sm_90"),
    ("sage_qk_int8_pv_fp16_cuda", "sageattention_2", "sm_80"),
    ("sage_qk_int8_pv_fp16_triton", "sageattention_2", "sm_80"),
    ("sage_blackwell", "sage_blackwell", "sm_120"),
]


# Other ways into a stand-in that the cases above go through whole: `make check-all` runs these.
SECOND = {
    "flash_varlen",
    "_flash_varlen_3",
    "sage_qk_int8_pv_fp8_cuda",
    "sage_qk_int8_pv_fp8_cuda_sm90",
    "sage_qk_int8_pv_fp16_cuda",
    "sage_qk_int8_pv_fp16_triton",
}


def _parameters() -> Iterator[object]:
    for name, site, device in CASES:
        tolerance = QUANTISED.get(name, QUANTISED[""])
        for check in checks(name, devices=("cpu",), machine=machine(device), tolerance=tolerance):
            if not check.slow or name == "flash":  # every sample in every dtype: of one is enough, it is long
                late = (
                    check.slow or name in SECOND or check.aspect == "both"
                )  # of LSE and gradient, each is there alone
                slow = [pytest.mark.slow] if late else []
                yield pytest.param(site, check, id=check.id, marks=slow)


@pytest.mark.parametrize(("site", "check"), list(_parameters()))
def test_contract(site: str, check: Check) -> None:
    with installed(site):
        report(check)
