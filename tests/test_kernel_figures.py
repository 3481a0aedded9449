"""The figures in docs/kernels.md are those of the records, and nothing is said of what was not measured."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def figures(monkeypatch):
    """docs/generate_kernel_figures.py as a module; what it imports from beside it is gone afterwards."""
    kept = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location(
        "generate_kernel_figures", ROOT / "docs" / "generate_kernel_figures.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in set(sys.modules) - kept:
        if name.startswith(("kernel_", "generate_")) or name == "measuring":
            del sys.modules[name]


def row(backend, median_us, ours=False):
    return {
        "backend": backend, "ours": ours, "exactness": "exact", "status": "right", "median_us": median_us,
        "spread_us": median_us / 100, "tflops": 400.0 / median_us, "share_of_roofline": 0.4, "share_of_matmul": None,
    }  # fmt: skip


def record(gpu, left=()):
    calls = [
        {"name": "d64-8192-forward", "dtype": "bfloat16", "rows": [row("triton", 1.0, ours=True), row("flash", 2.0)]},
        {"name": "d72-8192-forward", "dtype": "bfloat16", "rows": [row("triton", 4.0, ours=True), row("flex", 2.0)]},
    ]
    machine = {"gpu": gpu, "torch": "2.13.0", "triton": "3.7.1", "cuda": "13.0", "driver": None, "date": "2026-11-26"}
    return {"machine": machine, "calls": calls, "left": list(left)}


def test_the_guide_is_the_generators(figures):
    assert figures.main(["--check"]) == 0, "python docs/generate_kernel_figures.py writes it anew"


def test_without_a_record_nothing_was_measured(figures):
    text = figures.body([])
    assert figures.NOTHING in text
    assert text.count("not measured") == 26
    assert "reached" not in text
    assert "missed" not in text


def test_a_record_of_the_targets_device_is_judged(figures):
    text = figures.body([record("NVIDIA H200", left=["one", "two"])])
    assert figures.NOTHING not in text
    assert "≥ 340: reached (400)" in text
    assert "≥ 430: missed (400)" in text
    assert "missed (0.50 times, triton over flex)" in text
    assert (
        "**NVIDIA H200** by `make gpu-bench`: torch 2.13.0, triton 3.7.1, cuda 13.0, date 2026-11-26; 2 calls" in text
    )
    assert "| `d64-8192-forward` | `triton` | 400 ± 4 | 40% |  | `flash` | 200 ± 2 | 2.00 |" in text


def test_another_device_has_figures_and_no_verdicts(figures):
    text = figures.body([record("NVIDIA H100 80GB HBM3")])
    assert "reached" not in text
    assert "**NVIDIA H100 80GB HBM3**" in text


def test_records_of_a_cpu_are_left_out(figures, tmp_path):
    for name, machine in (("cpu-2core", {"cpu": "some"}), ("nvidia-h200", {"gpu": "NVIDIA H200"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kernels.json").write_text(json.dumps({"machine": machine}))
    assert figures.records(tmp_path) == [{"machine": {"gpu": "NVIDIA H200"}}]


def test_a_page_out_of_date_is_told_and_mended(figures, tmp_path, monkeypatch, capsys):
    page = tmp_path / "kernels.md"
    page.write_text("\n".join(["before", *figures.MARKS, "after"]))
    monkeypatch.setattr(figures, "PAGE", page)
    assert figures.main(["--check"]) == 1
    assert "out of date" in capsys.readouterr().out
    assert figures.main([]) == 0
    assert figures.main(["--check"]) == 0
    assert page.read_text().startswith("before")
    page.write_text("no marks")
    with pytest.raises(ValueError, match="marks are missing"):
        figures.main([])
