"""Carrying a decision out: pip without questions, then a trial in a process of its own; what fails is undone.

torch, and all else that is installed, is held at its version by a file of constraints, and is looked at afterwards.
Only what pip was heard to install is undone; what else has changed is told. An install that was killed is undone by
the next one.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from heedful.doctor.advice import advise
from heedful.doctor.apart import Job, tried
from heedful.doctor.decision import Strategies, decide, refusals_of, troubled
from heedful.doctor.environment import Environment, Found, canonical
from heedful.doctor.look import variables_here
from heedful.doctor.plans import Decision, Step
from heedful.doctor.site import FOLDER, Site
from heedful.sources import Package

PATIENT = functools.partial(tried, seconds=900.0)  # some kernels are compiled at their first use
_KEPT_LINES = 15
_INSTALLING = "Installing collected packages: "  # pip's line before it writes anything
_SHOWN = 5  # files that are named
_VARIABLES = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_QUIET": "0", "PYTHONUNBUFFERED": "1"}
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.!+_-]*")
Say = Callable[[str], None]
Pip = Callable[[list[str], Mapping[str, str], Say], "tuple[int, str]"]


@dataclass(frozen=True)
class Result:
    """How an install ended: ``text`` says it in sentences; ``undone`` whether all is as it was before."""

    done: bool
    text: str
    undone: bool = False
    found: tuple[Found, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        packages = [{"package": str(one), "fault": one.fault, "text": one.text} for one in self.found]
        return {"done": self.done, "text": self.text, "undone": self.undone, "trial": packages}


class _Failed(Exception):
    """One step of an install failed, with the sentences for the user."""

    def __init__(self, text: str, found: tuple[Found, ...] = ()) -> None:
        super().__init__(text)
        self.text, self.found = text, found


def carry_out(
    decision: Decision,
    strategies: Strategies,
    environment: Environment,
    *,
    site: Site | None = None,
    say: Say = print,
    run: Pip | None = None,
    trial: Callable[..., tuple[Found, ...]] = PATIENT,
    supposed: str = "",
) -> Result:
    """Do what a decision says. ``supposed``: the machine that the CPU passes for in the trial, in tests.

    Only one install at a time changes a site. Whatever happens on the way, Ctrl-C included, is undone.
    """
    place = Site.of(environment.executable) if site is None else site
    with _alone(place, say) as held:
        run = run or functools.partial(run_pip, held=held)
        cut_off = undo_unfinished(place, say, run)
        if cut_off is not None and not cut_off.undone:
            return cut_off
        before = place.versions()
        place.keep(decision.distribution)
        try:
            found = _installed(decision, strategies, environment, place, before, (say, run, trial, supposed))
        except _Failed as failed:
            return replace(_undone(failed.text, place, say, run), found=failed.found)
        except BaseException:
            _undone("", place, say, run)
            raise
        also = _overwritten(place)
        place.drop()
    version = place.versions().get(canonical(decision.distribution), "")
    text = f"{decision.distribution} {version} is installed and works. {_use(decision)}"
    return Result(True, f"{text}{also and chr(10)}{also}", found=found)


@contextlib.contextmanager
def _alone(place: Site, say: Say) -> Iterator[int | None]:
    """While no other install changes this site. Gives the lock's descriptor: who inherits it holds the lock, too."""
    from filelock import FileLock, Timeout

    lock = FileLock(str(place.folder / ".heedful-install.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say("another install is running: waiting for its end")
        lock.acquire()
    try:
        yield getattr(lock._context, "lock_file_fd", None) if os.name == "posix" else None
    finally:
        lock.release()


def _use(decision: Decision) -> str:
    name = decision.use
    if decision.rule == "Hub":
        return f'Set HEEDFUL_DOWNLOADS=1 and use it: heedful.attention_backend("{name}")'
    return f'Use it: heedful.attention_backend("{name}"), or HEEDFUL_BACKEND={name}'


def _installed(
    decision: Decision, strategies: Strategies, here: Environment, place: Site, before: dict[str, str], tools: Any
) -> tuple[Found, ...]:
    say, run, trial, supposed = tools
    with tempfile.TemporaryDirectory() as folder:
        pins = write_pins(Path(folder), before, without=decision.distribution)
        for step in decision.steps:
            _run_step(step, place, pins, before.keys() - {canonical(decision.distribution)}, say, run)
    after = place.versions()
    held = {
        name: (version, after.get(name, "none"))
        for name, version in before.items()
        if name != canonical(decision.distribution)
    }
    changed = [f"{name} {old} became {new}" for name, (old, new) in held.items() if old != new]
    changed += [f"{path} of {owner}" for owner, path in _foreign(place) if owner == "torch"][:_SHOWN]
    if changed:
        raise _Failed(f"pip changed what it was told to hold: {', '.join(changed)}.")
    say("trying it in a process of its own: import, a tiny problem, the answer held to the formula")
    found: tuple[Found, ...] = trial(_trials(decision, strategies, here, after, supposed), executable=place.executable)
    wanted = strategies[decision.use].name if decision.use in strategies else ""
    broken = [one for one in found if troubled(one, wanted)]
    if broken:
        raise _Failed(" ".join(_about(one) for one in broken), found)
    return found


def _foreign(place: Site) -> list[tuple[str, str]]:
    """Files of other distributions that are not as they were."""
    kept = place.unfinished()
    return [(owner, path) for owner, path in place.differing() if owner != canonical(kept.distribution)]


def _overwritten(place: Site) -> str:
    """A sentence about files that the installed package shares with others, "" where there are none."""
    files = [f"{path} of {owner}" for owner, path in _foreign(place)]
    return f"It overwrote files of other packages: {_some(files)}." if files else ""


def _some(files: list[str]) -> str:
    more = len(files) - _SHOWN
    return ", ".join(files[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _run_step(step: Step, place: Site, pins: str, held: Set[str], say: Say, run: Pip) -> None:
    own: set[str] = set()

    def heard(line: str) -> None:
        say(line)
        if line.startswith(_INSTALLING):
            names = map(canonical, line.removeprefix(_INSTALLING).split(", "))
            own.update(name for name in names if name not in held)
            place.own(dict.fromkeys(own, ""))

    status, printed = run(step.argv(place.executable, pins), dict(step.variables), heard)
    if status:
        tail = "\n".join(printed.strip().splitlines()[-_KEPT_LINES:])
        advice = advise(printed)
        told = f"{advice}." if advice is not None else "No advice is known for its words."
        raise _Failed(f"pip ended with status {status}. {told}\n{tail}")
    versions = place.versions()
    place.own({name: versions.get(name, "") for name in own})


def _about(found: Found) -> str:
    advice = advise(f"{found}: {found.text}")
    return f"{found} was installed and {found.fault}: {found.text}{f' → {advice}.' if advice is not None else ''}"


def _trials(
    decision: Decision, strategies: Strategies, here: Environment, versions: Mapping[str, str], supposed: str
) -> list[Job]:
    """Its import, and a tiny problem for every strategy that takes its kernels from it and this GPU."""
    wanted = canonical(decision.distribution)
    modules: dict[str, list[str]] = {}
    for name, strategy in strategies.items():
        for source in strategy.sources:
            if isinstance(source, Package) and canonical(source.distribution) == wanted:
                takes = any(not refusals_of(strategy, gpu) for gpu in here.gpus)
                modules.setdefault(source.module, []).extend([name] * takes)
    if not modules:
        modules = {wanted.replace("-", "_"): []}
    device = "cpu" if supposed or not here.gpus else f"{here.device}:0"
    version = versions.get(wanted, "")
    return [
        Job(decision.distribution, version, module, tuple(names), device, supposed) for module, names in modules.items()
    ]


def _undone(text: str, place: Site, say: Say, run: Pip) -> Result:
    """The site as it was; or the sentence what is not."""
    kept, (ours, _) = place.unfinished(), _taken_away(place, say, run)
    left = _left(place, {*kept.versions, *ours})
    if left:
        return Result(False, f"{text}\nIt could not be undone wholly: {'; '.join(left)}.".strip())
    place.drop()
    return Result(False, f"{text}\nEverything is as it was before.".strip(), undone=True)


def _taken_away(place: Site, say: Say, run: Pip) -> tuple[frozenset[str], frozenset[str]]:
    """Undo what the install has installed itself, and nothing else. Which packages, and which files, that was about."""
    kept, aside = place.unfinished(), place.set_aside()
    if aside is not None:
        say(f"pip left what belongs to no package: {_some(aside[1])}; it was moved to {aside[0]}, which can be deleted")
    now = place.versions()
    others = {name for name, version in kept.owned.items() if version and now.get(name, version) != version}
    for name in sorted(others):
        say(f"{name} {now[name]} was installed by somebody else since: it is left as it is")
    ours = frozenset(kept.owned.keys() - others)
    touched, replaced = place.files_of(ours), {owner for owner, _ in place.differing()}
    new = sorted(name for name in ours if name in now and (now[name] != kept.versions.get(name) or name in replaced))
    if new:
        say(f"undoing it: {', '.join(new)}")
        run([place.executable, "-m", "pip", "uninstall", "--yes", "--no-input", *new], {}, say)
    place.put_back(ours, touched)
    return ours, touched


def _left(place: Site, names: Iterable[str], touched: Collection[str] | None = None) -> list[str]:
    """What is not as it was: versions of some packages, and files; ``touched``: only of these."""
    now, before = place.versions(), place.unfinished().versions
    wrong = sorted(name for name in names if now.get(name) != before.get(name))
    files = [(owner, path) for owner, path in place.differing() if touched is None or path in touched]
    by_owner = {owner: [path for one, path in files if one == owner] for owner, _ in files if owner not in wrong}
    told = [f"{name} is {now.get(name, 'gone')}, it was {before.get(name, 'not there')}" for name in wrong]
    return [
        *told,
        *(f"{_some(paths)} of {owner} is not as it was: install {owner} again" for owner, paths in by_owner.items()),
    ]


def undo_unfinished(place: Site, say: Say, run: Pip) -> Result | None:
    """Undo an install that was killed on its way, if there is one.

    What else has changed since is the user's own, and is left as it is.
    """
    if not place.is_unfinished():
        return None
    name = place.unfinished().distribution
    say(f"an install of {name} was cut off: undoing it first")
    left = _left(place, *_taken_away(place, say, run))
    if not left:
        place.drop()
        return Result(False, "", undone=True)
    remedy = f"Mend that, or delete {place.folder / FOLDER} to go on as it is. Nothing was installed."
    text = f"An install of {name} was cut off, and could not be undone wholly: {'; '.join(left)}. {remedy}"
    return Result(False, text)


def write_pins(folder: Path, versions: Mapping[str, str], without: str, name: str = "pins.txt") -> str:
    """A file of constraints that holds everything but one distribution; its path."""
    held = {one: version for one, version in versions.items() if one != canonical(without)}
    lines = [f"{one}=={version}" for one, version in sorted(held.items()) if _VERSION.fullmatch(version)]
    path = folder / name
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return str(path)


def run_pip(argv: list[str], variables: Mapping[str, str], say: Say, *, held: int | None = None) -> tuple[int, str]:
    """Run it with its standard input closed; its lines are passed on as they come, and returned with its status.

    ``held``: the descriptor of a lock, which pip holds until its own end, whatever becomes of this process.
    """
    environ = {**variables_here(), **_VARIABLES, **variables}
    lines = []
    with subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environ,
        pass_fds=() if held is None else (held,),
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            text = line.decode("utf-8", errors="replace").rstrip()
            lines.append(text)
            say(text)
    return process.returncode, "\n".join(lines)


def absent(urls: Iterable[str], *, seconds: float = 10.0) -> frozenset[str]:
    """Those of some addresses that lead nowhere. An address that does not answer counts as there: pip will tell."""
    return frozenset(url for url in urls if not _answers(url, seconds))


def _answers(url: str, seconds: float) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds):
            return True
    except urllib.error.HTTPError as error:
        return error.code not in (404, 410)
    except OSError:
        return True


def settled(
    environment: Environment,
    strategies: Strategies,
    backend: str,
    way: str = "",
    *,
    ask: Callable[[Iterable[str]], frozenset[str]] = absent,
) -> Decision:
    """The decision, once its addresses are known to be there: one that is not closes its way, and the next is asked."""
    gone: frozenset[str] = frozenset()
    while True:
        decision = decide(environment, strategies, backend, way=way, absent=gone)
        found = ask(decision.urls) - gone if decision.urls else frozenset()
        if not found:
            return decision
        gone |= found
