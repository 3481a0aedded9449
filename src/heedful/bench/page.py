"""The report: one HTML page that loads nothing, drawn from a run's JSON record alone.

A bar's axis ends at what is at most eight times as slow as the fastest; longer bars are cut, and told as numbers.
"""

from __future__ import annotations

import importlib.resources
import math
from dataclasses import dataclass
from typing import Any

import jinja2

from heedful.measuring import busy, sized, spoken

_CUT = 8.0  # how many times as long as the fastest one a bar may be before it is cut
_NEAR = 1.05  # auto counts as the fastest exact one within five percent, or within the spread
_FACTS = {"gpu": "GPU", "architecture": "architecture", "cuda": "CUDA", "hip": "HIP", "cpu": "CPU", "cores": "cores",
          "threads": "threads", "python": "Python", "torch": "torch", "heedful": "heedful"}  # fmt: skip
_BADGES = {"wrong": "WRONG", "failed": "FAILED", "refused": "refused", "skipped": "skipped"}
_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}


@dataclass(frozen=True)
class Bar:
    """One backend's bar, in percent of the axis: its end, and the whisker's ends; ``cut`` where it goes on."""

    row: dict[str, Any]
    end: float
    low: float
    high: float
    cut: bool
    best: bool


@dataclass(frozen=True)
class Chart:
    """A group's bars, fastest first; where torch's ends, in percent; and who has none, by status and reason."""

    group: dict[str, Any]
    bars: list[Bar]
    base_line: float | None
    others: list[tuple[str, str, list[str]]]

    @property
    def best(self) -> str:
        """The backend that is the fastest exact one; "" where there is none."""
        return next((str(bar.row["backend"]) for bar in self.bars if bar.best), "")


def page(record: dict[str, Any]) -> str:
    """The page of a run's record (`Run.record`, or the file of ``--out``)."""
    machine = record["machine"]
    return environment().get_template("report.html.j2").render(**shown(record), machine=machine)


def environment(*packages: str) -> jinja2.Environment:
    """Templates of these packages, then of this one: ``common.css`` is every page's, ``charts.html.j2`` draws a run."""
    loader = jinja2.FunctionLoader(lambda name: _text_of(name, (*packages, "heedful.bench")))
    made = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters.update(
        time=lambda milliseconds: spoken(milliseconds / 1e3), size=sized, short=lambda name: _DTYPES.get(name, name)
    )
    return made


def _text_of(name: str, packages: tuple[str, ...]) -> str | None:
    places = (importlib.resources.files(package).joinpath(name) for package in packages)
    return next((place.read_text("utf-8") for place in places if place.is_file()), None)


def shown(record: dict[str, Any]) -> dict[str, Any]:
    """What the templates draw of a run's record."""
    machine = record["machine"]
    return {
        "record": record,
        "hardware": machine.get("gpu") or machine["cpu"],
        "facts": facts_of(machine),
        "busy": busy(machine),
        "charts": [_chart(group) for group in record["groups"]],
        "summary": _summary(record),
        "badges": _BADGES,
    }


def facts_of(machine: dict[str, Any]) -> list[tuple[str, str]]:
    """The machine by words one reads; versions of packages keep their own names."""
    rest = {name: name for name in machine if name not in _FACTS and name not in {"date", "load"}}
    return [(word, str(machine[name])) for name, word in {**_FACTS, **rest}.items() if machine.get(name)]


def _chart(group: dict[str, Any]) -> Chart:
    timed = sorted((row for row in group["rows"] if row["status"] == "right"), key=lambda row: row["median_ms"])
    others: dict[tuple[str, str], list[str]] = {}
    for row in group["rows"]:
        if row["status"] != "right":
            others.setdefault((row["status"], row["reason"]), []).append(row["backend"])
    listed = [(status, reason, names) for (status, reason), names in others.items()]
    if not timed:
        return Chart(group, [], None, listed)
    shown = [row for row in timed if row["median_ms"] <= _CUT * timed[0]["median_ms"]]
    longest = max(min(row["median_ms"] + row["spread_ms"], 1.5 * row["median_ms"]) for row in shown)
    best = next((row for row in timed if row["exactness"] == "exact"), None)
    bars = [_bar(row, longest, best=row is best) for row in timed]
    base = next((bar.end for bar in bars if bar.row["backend"] == "torch" and not bar.cut), None)
    return Chart(group, bars, base, listed)


def _bar(row: dict[str, Any], longest: float, *, best: bool) -> Bar:
    middle, spread = row["median_ms"], row["spread_ms"]
    low, end, high = (100 * min(max(place, 0.0) / longest, 1.0) for place in (middle - spread, middle, middle + spread))
    return Bar(row, end, low, high, cut=middle > longest, best=best)


def _near(row: dict[str, Any], fastest: dict[str, Any]) -> bool:
    """Whether nothing tells a row from the fastest one."""
    noise = max(row["spread_ms"], fastest["spread_ms"])
    return bool(row["median_ms"] <= max(_NEAR * fastest["median_ms"], fastest["median_ms"] + noise))


def _summary(record: dict[str, Any]) -> dict[str, Any]:
    """How many works and calls were measured, how auto did, and how many answers were wrong."""
    near, of, logs = 0, 0, []
    for group in record["groups"]:
        exact = {
            row["backend"]: row for row in group["rows"] if row["status"] == "right" and row["exactness"] == "exact"
        }
        if "auto" in exact:
            of += 1
            near += _near(exact["auto"], min(exact.values(), key=lambda row: float(row["median_ms"])))
            if exact["auto"]["times_as_fast_as_torch"]:
                logs.append(math.log(exact["auto"]["times_as_fast_as_torch"]))
    rows = [row for group in record["groups"] for row in group["rows"]]
    return {
        "works": len(record["groups"]),
        "approximate": any(row["status"] == "right" and row["exactness"] != "exact" for row in rows),
        "timed": sum(row["status"] == "right" for row in rows),
        "wrong": record["wrong"],
        "failed": record["failed"],
        "auto_near": near,
        "auto_of": of,
        "auto_faster": math.exp(sum(logs) / len(logs)) if logs else None,
    }
