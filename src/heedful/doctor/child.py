"""What runs in the process of its own: import one package, then have its strategies compute a tiny problem.

Run as a script with one argument, JSON. It tells a line of JSON after each step on what was its standard output; what
the package itself prints goes to standard error. Only the standard library is imported before the package is: what a
package breaks is its own doing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

_MOST_CAUSES = 4


def main(argument: str) -> None:
    """Import and try what a job says; see ``apart.Job`` for its fields."""
    job = json.loads(argument)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace")  # half characters that no file can hold
    os.dup2(2, 1)
    _no_dialogs()
    here = str(Path(__file__).parent)
    sys.path[:] = [path for path in sys.path if path != here]
    sys.path += [path for path in job["path"] if path not in sys.path]
    _tell(out, stage="import", of=job["module"])
    try:
        importlib.import_module(job["module"])
    except (Exception, SystemExit) as error:  # whatever an import raises is what the user has to be told
        _tell(out, fault="raises", text=_words(error))
        return
    failed = _tried(job, out) if job["strategies"] else {}
    text = "; ".join(f"{name}: {refusal}" for name, refusal in failed.items())
    _tell(out, fault="fails a tiny problem" if failed else "", text=text, failed=list(failed))


def _tell(out: TextIO, **line: Any) -> None:
    print(json.dumps(line, ensure_ascii=False), file=out, flush=True)


def _no_dialogs() -> None:
    """Windows shows a box when a DLL cannot be loaded or a process dies, and waits for a click."""
    if sys.platform == "win32":
        import ctypes

        ctypes.windll.kernel32.SetErrorMode(0x8003)


def _words(error: BaseException | None) -> str:
    """An error and what caused it, the last one first."""
    told: list[str] = []
    while error is not None and len(told) < _MOST_CAUSES:
        told.append(f"{type(error).__name__}: {error}".strip())
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\nbecause of ".join(told)


def _tried(job: dict[str, Any], out: TextIO) -> dict[str, str]:
    """What a tiny problem says against the job's strategies, by their names."""
    import torch

    from heedful import facts as machine
    from heedful.factory import AttentionStrategyFactory
    from heedful.facts import DeviceFacts, Facts
    from heedful.probing import ready

    facts = machine.probe()
    if job["supposed"]:
        parsed = DeviceFacts.parse(job["supposed"])
        facts = Facts(facts.torch_version, facts.python_version, facts.system, {job["device"]: parsed}, facts.packages)
    strategies = AttentionStrategyFactory().strategies()
    found = {}
    for name in filter(strategies.__contains__, job["strategies"]):  # others were registered in the other process only
        _tell(out, stage="tiny problem", of=name)
        refusals = ready(strategies[name], facts, torch.device(job["device"]))
        if refusals:
            found[name] = "; ".join(map(str, refusals))
    return found


if __name__ == "__main__":
    main(sys.argv[1])
