"""Our own kernels beside every other backend that takes the call here, each by its name, forward and backward.

Targets come first, then odd head dims, masks, other lengths and real models' calls, until the time is up: what is
measured by then is saved after each call, and ``--resume`` goes on. A record of the same machine, versions and revision
keeps the calls that are not measured anew. Every answer and gradient is held to the formula
before any of its times is taken; a wrong one is shown with its fault and never timed, and so is a refusal with its
reason. Rounds are interleaved with those of a plain matmul; TFLOP/s are told as shares of its rate, and of the roofline
where the architecture's peak is known. Query, key and value rotate through copies that are larger than the L2 cache.

A backend's plan is bound once, and its calls follow each other without a wait. So the time of a short call may be that
of its launch. A first call may compile; it is in no figure. One that is too slow is skipped from there on, and so is a
backend of others whose first calls have taken two minutes in all.

The exit status is 1 where one of our own kernels is wrong or fails, or a target of this device is missed.

    python benchmarks/kernels.py [--minutes 9] [--resume] [--only 'd128-*'] [--backend NAME ...] [--rounds 5] [--quick]
        [--max-seconds 0.2] [--device cuda:0] [--dtype bf16] [--json] [--out FOLDER | --no-save]

Shapes: B batch, H heads, S length, D head dim.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from kernel_bench import Bench, DeviceBroken, is_ours
from kernel_cases import TINY, Grid, Work, works
from kernel_tables import tables
from kernel_targets import verdicts
from measuring import Bar, options, parsed, path_of, show
from roofline import Roof, cached_bytes, roof_of

from heedful import AttentionDispatcher, Policy
from heedful.cli.machines import packages_of
from heedful.errors import InvalidArgument, UnknownBackend
from heedful.facts import probe
from heedful.files import read_json, write_json
from heedful.measuring import machine_record
from heedful.testing.subject import MACHINE

KIND, FORMAT = "kernel figures", 1
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROOM = 0.1  # of the device's memory, for copies
MOVING = ("date", "load")  # what may differ in a record that is gone on with


def main(arguments: list[str] | None = None, clock: Callable[[], float] = time.monotonic) -> int:
    """Measure, print, save."""
    started, parser = clock(), _options()
    wanted = parsed(parser, arguments)
    device = _device(parser, wanted)
    dispatcher = AttentionDispatcher(policy=Policy(tune="off", guard="off"))
    named = _named(parser, wanted, dispatcher)
    absent = _absent(dispatcher, device, named)
    bench = _bench(wanted, device, dispatcher, tuple(name for name in named if name not in absent))
    grid, dtype = (TINY if wanted.quick else Grid()), _dtype(wanted, device)
    every = works(grid, dtype, wanted.only, models=not wanted.quick or wanted.only != "*")
    if not every:
        parser.error(f"--only {wanted.only!r}: no call is called so; such as d128-causal-8192-forward, sdxl-*")
    machine = about(device, bench.backends, dispatcher)
    wanted.no_save |= bool(wanted.backend) and wanted.out is None  # it would replace calls that have all backends
    path = path_of("kernels", machine, wanted)
    bench.roof = _roof(device, dtype)
    record: dict[str, Any] = {
        "kind": KIND, "format": FORMAT, "ended": "unfinished", "machine": machine, "targets": [], "calls": [],
        "settings": {"rounds": wanted.rounds, "backends": list(bench.backends), "only": wanted.only},
        "absent": absent,
        "roof": bench.roof.to_dict(),
        "left": [work.name for work in every],
    }  # fmt: skip
    record["calls"], fault = _known(path, machine)
    if wanted.resume and fault:
        parser.error(f"--resume: {fault}; leave --resume out to measure anew")
    known = {(call["name"], call["dtype"]) for call in record["calls"]} if wanted.resume else set()
    todo = [work for work in every if (work.name, work.to_dict()["dtype"]) not in known]
    _run(bench, todo, record, path, lambda: clock() - started > 60 * wanted.minutes)
    show(record, tables(record), wanted)
    if path is not None:
        print(f"written to {path}", file=sys.stderr)
    return _status(record)


def _run(bench: Bench, todo: list[Work], record: dict[str, Any], path: Path | None, over: Callable[[], bool]) -> None:
    """Measure in order, and save after each call; what was measured before stays until it is measured anew."""
    record["left"] = [work.name for work in todo]
    ended = "completed"
    with Bar() as bar:
        bench.at = bar.at
        bar.expect(len(todo))
        try:
            for work in todo:
                if over():
                    ended = "the time was up"
                    break
                _put(record["calls"], bench.measured(work))
                record["left"].remove(work.name)
                bar.step()
                _save(record, path, "unfinished")
        except KeyboardInterrupt:
            ended = "interrupted"
        except DeviceBroken as error:
            ended = str(error)
    _save(record, path, ended)


def _put(calls: list[dict[str, Any]], new: dict[str, Any]) -> None:
    """In the place of the same call, or at the end."""
    for place, call in enumerate(calls):
        if (call["name"], call["dtype"]) == (new["name"], new["dtype"]):
            calls[place] = new
            return
    calls.append(new)


def _save(record: dict[str, Any], path: Path | None, ended: str) -> None:
    record["ended"] = ended
    record["targets"] = [verdict.to_dict() for verdict in verdicts(record)]
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)


def _status(record: dict[str, Any]) -> int:
    """The exit status."""
    if record["ended"] == "interrupted":
        return 130
    ours = [row for call in record["calls"] for row in call["rows"] if row["ours"]]
    bad = any(row["status"] in ("wrong", "failed") for row in ours)
    missed = any(one["outcome"] == "missed" for one in record["targets"])
    return int(bad or missed or record["ended"] not in ("completed", "the time was up"))


def _options() -> argparse.ArgumentParser:
    parser = options(__doc__, rounds=5)
    parser.add_argument("--device", help="torch device; the GPU. Without one, cpu must be asked for")
    parser.add_argument("--dtype", choices=DTYPES, help="bf16; fp16 below compute capability 8.0, fp32 on a CPU")
    parser.add_argument("--minutes", type=float, default=9.0, help="no call is begun after so many (default 9)")
    parser.add_argument("--max-seconds", type=float, default=0.2, help="a backend with a longer call is skipped")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="calls by a shell pattern, such as 'd72-*'")
    parser.add_argument("--backend", action="append", metavar="NAME", help="only these; nothing is saved without --out")
    parser.add_argument("--resume", action="store_true", help="measure only what the record does not hold yet")
    return parser


def _device(parser: argparse.ArgumentParser, wanted: argparse.Namespace) -> torch.device:
    """The device asked for, else the GPU; a CPU only where it is meant."""
    if wanted.device is None and not torch.cuda.is_available() and not wanted.quick:
        parser.error(
            f"no GPU: torch {torch.__version__} sees none here, and these are figures of GPUs; --quick tries the "
            "benchmark with tiny sizes, --device cpu measures on the CPU"
        )
    device = torch.device(wanted.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cuda", "cpu") or (device.type == "cuda" and not torch.cuda.is_available()):
        parser.error(f"--device {wanted.device}: got no device of this machine; give cuda, cuda:1, … or cpu")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)  # set_device wants an index (torch 2.11)
        torch.cuda.set_device(device)  # kernels are launched on the current one
    return device


def _dtype(wanted: argparse.Namespace, device: torch.device) -> torch.dtype:
    if wanted.dtype:
        return DTYPES[wanted.dtype]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if (probe().device(device).capability or (8, 0)) >= (8, 0) else torch.float16


def _named(
    parser: argparse.ArgumentParser, wanted: argparse.Namespace, dispatcher: AttentionDispatcher
) -> tuple[str, ...]:
    """The backends that are asked for, or all of the registry: ours first, and those that hold all scores last."""
    try:
        named = [dispatcher.factory.resolve(name) for name in wanted.backend or ()]
    except UnknownBackend as error:
        parser.error(str(error))
    strategies = dispatcher.factory.strategies()

    def place(name: str) -> tuple[bool, bool]:
        strategy = strategies[name]
        return not is_ours(strategy), strategy.limits_for("cuda").scores_in_memory

    return tuple(sorted(dict.fromkeys(named or strategies), key=place))


def _absent(dispatcher: AttentionDispatcher, device: torch.device, names: Iterable[str]) -> dict[str, str]:
    """Backends that compute nothing on this machine, and why: told once, not at each call."""
    table = {row.name: row.refusals for row in dispatcher.list_backends(device.type)}
    found = {name: [one for one in table.get(name, ()) if one.field in MACHINE] for name in names}
    return {name: "; ".join(map(str, refusals)) for name, refusals in found.items() if refusals}


def _bench(
    wanted: argparse.Namespace, device: torch.device, dispatcher: AttentionDispatcher, names: tuple[str, ...]
) -> Bench:
    bench = Bench(device, names, wanted.rounds, dispatcher, least_seconds=0.0005 if wanted.quick else 0.005)
    bench.most_seconds = wanted.max_seconds
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        bench.cached = cached_bytes(properties, "hip" if torch.version.hip else "cuda")
        bench.room = int(ROOM * properties.total_memory)
    return bench


def _roof(device: torch.device, dtype: torch.dtype) -> Roof:
    if device.type != "cuda":
        return Roof()
    return roof_of(probe().device(device).architecture, torch.cuda.get_device_properties(device), dtype)


def about(device: torch.device, backends: Iterable[str], dispatcher: AttentionDispatcher) -> dict[str, Any]:
    """What the figures depend on."""
    found = machine_record(device, packages_of(backends, dispatcher))
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = _said(asked) if device.type == "cuda" and not torch.version.hip else None
    here = Path(__file__).parent
    revision = _said(["git", "-C", str(here), "rev-parse", "--short=12", "HEAD"])
    changed = revision and _said(["git", "-C", str(here), "status", "--porcelain", "--untracked-files=no"])
    return {
        **found,
        "driver": driver.splitlines()[0] if driver else None,
        "revision": f"{revision}, changed" if changed else revision,
    }


def _said(command: list[str]) -> str | None:
    """What a program prints; None where it is not there, or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _known(path: Path | None, machine: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """The calls of the record that is there, or why they are not kept; neither where there is no record."""
    if path is None or not path.exists():
        return [], ""
    try:
        old, calls = read_json(path, KIND, FORMAT, lambda data: (dict(data["machine"]), list(data["calls"])))
    except InvalidArgument as error:
        return [], str(error)
    names = [name for name in {**old, **machine} if name not in MOVING and old.get(name) != machine.get(name)]
    told = "; ".join(f"{name} was {old.get(name)}, is {machine.get(name)}" for name in sorted(names))
    return ([], f"{path} was measured otherwise: {told}") if told else (calls, "")


if __name__ == "__main__":
    sys.exit(main())
