"""The page loads nothing and tells all that the record holds."""

from __future__ import annotations

import html
import re
from typing import Any

import pytest

from heedful.verify.job import Job
from heedful.verify.page import cell_of, page, settings_text
from heedful.verify.run import Run

SETTINGS = {"device": "cpu", "size": "usual", "dtypes": [], "only": [], "seed": 0}
MACHINE = {"date": "2026-01-02", "cpu": "A CPU", "cores": 2, "torch": "2.13.0", "system": "Linux-6", "load": 0.1}
END = {"outcome": "right", "detail": "", "limits": [], "reasons": [], "seconds": 1.0, "units": 0.3, "error": 2e-7}


def check(name: str, *features: str, aspect: str = "forward") -> dict[str, Any]:
    return {"check": name, "sample": name, "aspect": aspect, "features": list(features)}


@pytest.fixture
def record() -> dict[str, Any]:
    from heedful.verify.record import Column

    good, bad = Column(Job(backend="native"), "native"), Column(Job(plugin="my.own:Mine"), "mine")
    for column in (good, bad):
        column.know({"checks": 4, "samples": 3, "exactness": "exact", "version": "torch 2.13.0"})
    softcap = {**END, "outcome": "refused", "detail": "softcap (takes none)", "limits": ["softcap"], "units": None}
    good.add(check("plain", "float32"), "right", END)
    good.add(check("capped", "float32", "softcap"), "refused", softcap)
    good.add(check("half", "float16"), "right", {**END, "units": 0.9, "error": 1e-3})
    good.add(check("whole", "as a whole"), "right", {**END, "units": None, "error": None})
    bad.add(check("plain", "float32"), "wrong", {**END, "outcome": "wrong", "detail": "off <script>alert(1)</script>"})
    bad.add(check("half", "float16"), "crashed", {"detail": "the process ended: signal 11"})
    bad.unmade = "2 checks were not made"
    run = Run(
        (), 1.0, columns=[good, bad, Column(Job(backend="flash"), "flash", absent="device is cpu, it takes cuda")]
    )
    return run.record(MACHINE, SETTINGS)


def plain(text: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text.partition("</head>")[2])).split())


def test_the_page_loads_nothing(record: dict[str, Any]) -> None:
    text = page(record)
    assert not re.search(r"<(script|link|img|iframe|object|embed|base|form)\b", text)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<[^>]* (src|href|on\w+)=", text)
    assert "default-src 'none'" in text
    assert "&lt;script&gt;alert(1)" in text  # what a backend says is text


def test_it_tells_the_matrix_the_faults_and_what_is_not_here(record: dict[str, Any]) -> None:
    text = plain(page(record))
    for words in (
        "A CPU",
        "Linux-6",
        "float32 0.30 2e-07, 1 of 2 refused: softcap WRONG 1 of 1",
        "float16 0.90 1e-03 CRASHED 1 of 1",
        "softcap refused: softcap",
        "as a whole right",
        "mine : 2 checks were not made",
        "off <script>alert(1)</script>",
        "heedful verify --plugin my.own:Mine --device cpu --only plain",
        "import my.own; import heedful.testing as t",
        "flash device is cpu, it takes cuda",
        "softcap (takes none) 1: capped",
        "2 wrong, crashed or hung",
        "3 samples: every sample of the contract",
    ):
        assert words in text, words
    assert "Interrupted" not in text
    assert "Speed" not in text


def test_a_partial_run_says_so(record: dict[str, Any]) -> None:
    assert "Interrupted" in plain(page({**record, "interrupted": True}))


def test_with_times_it_has_the_charts_of_the_bench(record: dict[str, Any]) -> None:
    row = {"backend": "native", "status": "right", "reason": None, "ran": "native", "lowerings": [], "rounds": 9,
           "exactness": "exact", "median_ms": 1.0, "spread_ms": 0.1, "times_as_fast_as_torch": 1.0, "tflops": 0.1,
           "share_of_matmul": 0.5, "peak_bytes": 10, "max_abs_error": 1e-6, "allowed_error": 2e-6}  # fmt: skip
    shape = {"batch": 1, "heads": 2, "kv_heads": 2, "query_length": 9, "key_length": 9, "head_dim": 8, "value_dim": 8}
    group = {"case": "a-case", "model": "A Model", "mask": "none", "kept_keys": None, "dtype": "float32",
             "shape": shape, "useful_flops": 10**9, "matmul_tflops": None, "rows": [row]}  # fmt: skip
    bench = {
        "machine": MACHINE,
        "settings": {"rounds": 9, "checked_rows": 64},
        "wrong": 0,
        "failed": 0,
        "groups": [group],
    }
    text = page({**record, "bench": bench})
    assert "Speed" in plain(text)
    assert "a-case" in plain(text)
    assert 'class="bar"' in text


def test_cells(record: dict[str, Any]) -> None:
    good, bad, _ = record["backends"]
    assert cell_of(good, "float16") == {"kind": "right", "text": "0.90", "small": "1e-03", "shade": 3}
    assert cell_of(good, "float32")["shade"] == 1
    assert cell_of(bad, "softcap")["kind"] == "none"
    assert cell_of(bad, "float16") == {"kind": "wrong", "text": "CRASHED", "small": "1 of 1", "shade": 0}


def test_settings_in_words() -> None:
    more = {"size": "quick", "dtypes": ["float16"], "only": ["plain-*"], "seed": 2}
    assert settings_text({**SETTINGS, **more}) == "a few checks of every feature, in float16, only plain-*, seed 2"
