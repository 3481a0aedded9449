"""Which command this very machine needs: the table, its first matching row, and the command. Pure.

Whatever the answer, torch is never replaced: every command holds it, and all else that is installed, at its version.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from heedful.doctor.advice import advise
from heedful.doctor.environment import Environment, Found, canonical, numbers
from heedful.doctor.plans import Decision, pip
from heedful.doctor.ways import NAMES, WAYS, Ask
from heedful.doctor.wheels import mismatches
from heedful.errors import InvalidArgument, UnknownBackend
from heedful.facts import DeviceFacts
from heedful.problem import problem_for_shapes
from heedful.refusal import Refusal
from heedful.sources import Package
from heedful.strategy import AttentionStrategy

Strategies = Mapping[str, AttentionStrategy]
MACHINE = ("device", "architecture", "compute capability")  # the fields of refusals that no rewrite can mend
AUTO = "auto"
OLDEST_TORCH = (2, 6)  # as pyproject.toml has it
_ON_A_CPU = "A CPU needs nothing beside torch: nothing to install. Use native, or auto."


@dataclass(frozen=True)
class _Wish:
    """One question: the strategy, its package ("" for torch's own), and how it is to be got."""

    environment: Environment
    name: str
    strategy: AttentionStrategy
    way: str
    absent: frozenset[str]

    @property
    def package(self) -> Package | None:
        """The package that its kernels come from; None where torch brings them."""
        found = (source for source in self.strategy.sources if isinstance(source, Package))
        return next((source for source in found if canonical(source.distribution) != "torch"), None)

    def answer(self, rule: str, outcome: str, reason: str, use: str = "native") -> Decision:
        return Decision(self.name, rule, outcome, use, reason)  # type: ignore[arg-type]


# What is best for a machine, where none is named.


def _no_gpu(here: Environment) -> Decision | None:
    if here.gpus and here.device == "cuda":
        return None
    if here.device not in ("cpu", "cuda"):
        text = f"torch brings what there is for {here.device}: nothing to install. Use native, or auto."
        return Decision(AUTO, f"{here.device}", "nothing", "native", text)
    if here.driver and not here.cuda and not here.hip:
        text = (
            f"This machine has a GPU (driver {here.driver}), but torch {here.torch} is a build for CPUs. heedful never "
            "replaces torch: install the CUDA build as pytorch.org says, then come back."
        )
        return Decision(AUTO, "torch without CUDA", "impossible", "native", text)
    if here.cuda or here.hip:
        text = (
            f"torch {here.torch} finds no GPU{' though there is a driver, ' + here.driver if here.driver else ''}: "
            "nothing to install; see that the driver is new enough and the GPU not hidden. Until then: native."
        )
        return Decision(AUTO, "no GPU seen", "nothing", "native", text)
    return Decision(AUTO, "CPU", "nothing", "native", _ON_A_CPU)


def _rocm(here: Environment) -> Decision | str | None:
    if not here.hip:
        return None
    if any(gpu.architecture in ("gfx942", "gfx950") for gpu in here.gpus):
        return "aiter"
    names = ", ".join(gpu.architecture for gpu in here.gpus)
    text = f"ROCm on {names}: use native; AITER is for gfx942 and gfx950, and wheels for CUDA never work here."
    return Decision(AUTO, "ROCm", "nothing", "native", text)


def _before_turing(here: Environment) -> Decision | None:
    if _capability(here) >= (7, 5):
        return None
    text = f"{_gpu(here)}: use native, whose memory-efficient kernel serves it. xFormers is optional."
    return Decision(AUTO, "before Turing", "nothing", "native", text)


def _turing(here: Environment) -> Decision | None:
    if _capability(here) >= (8, 0):
        return None
    text = (
        f"{_gpu(here)}: use native, whose memory-efficient kernel serves it. flash-attn 2 needs 8.0, whatever is "
        "written of 7.5; SageAttention 1.0.6 runs on 7.5 by itself, heedful drives 2.1.1 and newer, which needs 8.0."
    )
    return Decision(AUTO, "Turing", "nothing", "native", text)


def _ampere(here: Environment) -> str | None:
    return "flash" if _capability(here) < (9, 0) else None


def _hopper(here: Environment) -> str | None:
    if _capability(here) >= (10, 0):
        return None
    return "flash_3" if numbers(here.cuda) >= (12, 3) else "flash"


def _blackwell(here: Environment) -> str | None:
    return "flash_4" if _capability(here) < (12, 0) else "flash"


BEST: tuple[Callable[[Environment], Decision | str | None], ...] = (
    _no_gpu, _rocm, _before_turing, _turing, _ampere, _hopper, _blackwell,
)  # fmt: skip


# What stands in the way of a backend that is named, or that is best.


def _torchs_own(wish: _Wish) -> Decision | None:
    if wish.package is not None:
        return None
    needs = next((source.minimum for source in wish.strategy.sources if isinstance(source, Package)), "")
    if needs and wish.environment.torch_release < numbers(needs):
        text = f"{wish.name} comes with torch {needs}, this is {wish.environment.torch}; heedful never replaces torch."
        return wish.answer("torch's own", "impossible", text)
    return wish.answer("torch's own", "nothing", f"{wish.name} comes with torch: nothing to install.", wish.name)


def _without_gpu(wish: _Wish) -> Decision | None:
    found = _no_gpu(wish.environment)
    return None if found is None else replace(found, backend=wish.name)


def _other_vendor(wish: _Wish) -> Decision | None:
    """A GPU that the kernels have no code for; and never a wheel for CUDA under ROCm."""
    refusals = [refusals_of(wish.strategy, gpu) for gpu in wish.environment.gpus]
    if not all(refusals):
        return None
    places = ", ".join(dict.fromkeys(gpu.name or gpu.architecture for gpu in wish.environment.gpus))
    beside = " Wheels for CUDA never work under ROCm." if wish.environment.hip else ""
    beside += _turings_sage(wish)
    text = f"{wish.name} cannot run on {places}: {refusals[0][0]}. Nothing was changed.{beside}"
    return wish.answer("ROCm" if wish.environment.hip else "GPU", "impossible", text)


def _turings_sage(wish: _Wish) -> str:
    package = wish.package
    turing = _capability(wish.environment) == (7, 5)
    if not turing or package is None or package.distribution != "sageattention":
        return ""
    return " SageAttention 1.0.6 runs on 7.5 by itself; heedful drives 2.1.1 and newer."


def _old_torch(wish: _Wish) -> Decision | None:
    here = wish.environment
    if here.torch_release[:2] >= OLDEST_TORCH:
        return None
    least = ".".join(map(str, OLDEST_TORCH))
    text = f"heedful needs torch {least} or newer, this is {here.torch}. It never replaces torch."
    return wish.answer("torch too old", "impossible", text)


def _old_cuda(wish: _Wish) -> Decision | None:
    here = wish.environment
    if here.hip or _capability(here) < (10, 0) or numbers(here.cuda) >= (12, 8):
        return None
    text = (
        f"{_gpu(here)} needs CUDA 12.8 or newer, and torch {here.torch} has {here.cuda}: torch itself has no kernels "
        "for it. heedful never replaces torch: install a newer one as pytorch.org says, then come back."
    )
    return wish.answer("torch too old for the GPU", "impossible", text)


def _there(wish: _Wish) -> Decision | None:
    package, forced = wish.package, wish.way
    found = None if package is None or forced else wish.environment.package(package.distribution)
    if found is None or package is None or troubled(found, wish.strategy.name):
        return None
    if package.minimum and numbers(found.version) < numbers(package.minimum):
        return None
    return wish.answer("works already", "nothing", f"{found} is there and works: nothing to install.", wish.name)


def _no_place(wish: _Wish) -> Decision | None:
    here = wish.environment
    venv = f"Make an environment that sees its torch: {here.executable} -m venv --system-site-packages <folder>"
    if not here.pip:
        text = f"{here.executable} has no pip. Get it with: {here.executable} -m ensurepip"
    elif here.managed:
        text = f"The system forbids pip in {here.executable} (PEP 668). {venv}"
    elif not here.writable:
        text = f"This user cannot write the packages of {here.executable}. Have their owner run this, or else: {venv}"
    else:
        return None
    return wish.answer("no place to install", "impossible", text)


OBSTACLES: tuple[Callable[[_Wish], Decision | None], ...] = (
    _old_torch, _torchs_own, _without_gpu, _other_vendor, _old_cuda, _there, _no_place,
)  # fmt: skip


def decide(
    environment: Environment,
    strategies: Strategies,
    backend: str = AUTO,
    *,
    way: str = "",
    absent: frozenset[str] = frozenset(),
) -> Decision:
    """The answer for one backend, or for the best one. ``way``: wheel, hub or build alone; ``absent``: dead addresses.

    Raises UnknownBackend and InvalidArgument.
    """
    check(strategies, backend, way)
    if backend == AUTO:
        return _best(environment, strategies, way, absent)
    strategy = strategies[backend]
    wish = _Wish(environment, backend, strategy, "hub" if strategy.pin.source == "hub" else way, absent)
    found = next(filter(None, (row(wish) for row in OBSTACLES)), None)
    return found or _connected(wish, _by_ways(wish))


def check(strategies: Strategies, backend: str, way: str = "") -> None:
    """Raises UnknownBackend and InvalidArgument for what ``decide`` would not take."""
    if way and way not in NAMES:
        raise InvalidArgument("way", repr(way), f"give one of {', '.join(NAMES)}")
    if backend != AUTO and backend not in strategies:
        raise UnknownBackend(backend, strategies)


def _best(here: Environment, strategies: Strategies, way: str, absent: frozenset[str]) -> Decision:
    found = next(answer for answer in (row(here) for row in BEST) if answer is not None)
    if isinstance(found, Decision):
        return found
    made = decide(here, strategies, found, way=way, absent=absent)
    if made.outcome == "impossible" and found in ("flash_3", "flash_4") and made.rule == "no way":
        return decide(here, strategies, "flash", way=way, absent=absent).after((made.reason,))
    return made


def _by_ways(wish: _Wish) -> Decision:
    package, here = wish.package, wish.environment
    assert package is not None
    gpus = [gpu for gpu in here.gpus if not refusals_of(wish.strategy, gpu)]
    ask = Ask(here, wish.strategy, max(gpus, key=lambda gpu: gpu.capability or (0, 0)), package, wish.absent)
    ways = WAYS.get(package.distribution, ())
    if wish.way:
        ways = tuple(one for one in ways if one in NAMES[wish.way])
    closed: list[str] = []
    for one in ways:
        answer = one(ask)
        if isinstance(answer, Decision):
            made = replace(answer, backend=wish.name, notes=(*answer.notes, *_others(wish)))
            return _anew(made, here).after(tuple(filter(None, closed)))
        closed.append(answer)
    hint = f"{package.install}, at your own risk" if package.install and not ways else "use native, which needs nothing"
    text = f"There is no way to install {wish.name} here that is known to work: {hint}."
    return replace(wish.answer("no way", "impossible", text), passed_over=tuple(filter(None, closed)))


def _anew(decision: Decision, here: Environment) -> Decision:
    """With its last step told to replace what is there: pip takes another build of the same version for the same."""
    if here.package(decision.distribution) is None or not decision.steps or decision.rule == "Hub":
        return decision
    *first, last = decision.steps
    words = list(last.arguments)
    words.insert(words.index("--no-deps"), "--force-reinstall")
    return replace(decision, steps=(*first, replace(last, arguments=tuple(words))))


def _others(wish: _Wish) -> tuple[str, ...]:
    """The GPUs of this machine that the backend does not take."""
    left = [gpu for gpu in wish.environment.gpus if refusals_of(wish.strategy, gpu)]
    return tuple(f"{gpu.name}: {refusals_of(wish.strategy, gpu)[0]}" for gpu in left)


def _connected(wish: _Wish, decision: Decision) -> Decision:
    """The decision, with what to do where the index is out of reach: whether it is, pip will tell."""
    here = wish.environment
    if here.online or (decision.outcome != "install" and decision.rule != "Hub"):
        return decision
    if decision.rule == "Hub":
        way = "have another machine download it, and name its folder: LOCAL_KERNELS=<org/name>=<folder>"
    else:
        fetch = ", ".join(decision.urls) or decision.distribution
        way = f"fetch {fetch} on another machine, then: heedful install {wish.name} --wheel FILE"
    note = f"{here.index} did not answer. To go on without a network, {way}"
    return replace(decision, notes=(*decision.notes, note))


def from_wheel(environment: Environment, strategies: Strategies, backend: str, wheel: str) -> Decision:
    """The answer where the user names a wheel: its name is held to the environment first.

    Raises UnknownBackend, and InvalidArgument where no backend is named.
    """
    check(strategies, backend)
    if backend == AUTO:
        raise InvalidArgument("backend", repr(AUTO), "name the backend that the wheel is for")
    wish = _Wish(environment, backend, strategies[backend], "", frozenset())
    package = wish.package
    if package is None:
        return wish.answer("torch's own", "nothing", f"{backend} comes with torch: nothing to install.", backend)
    name = wheel.replace("\\", "/").rpartition("/")[2].partition("#")[0]
    wrong = list(mismatches(name, environment))
    if not wrong and canonical(name.partition("-")[0]) != canonical(package.distribution):
        wrong = [f"it holds {name.partition('-')[0]}, {backend} needs {package.distribution}"]
    stuck = next(filter(None, (row(wish) for row in (_without_gpu, _other_vendor, _no_place))), None)
    if wrong:
        return wish.answer("wheel does not fit", "impossible", f"{name} does not fit: {'; '.join(wrong)}.")
    version = name.split("-")[1].replace("%2B", "+")
    made = Decision(
        backend, "named wheel", "install", backend, f"{name} fits this Python, system and torch.", (pip(wheel),),
        package.distribution, version,
    )  # fmt: skip
    return stuck or _anew(made, environment)


def troubled(found: Found, strategy: str = "") -> bool:
    """Whether a package does not work, for one strategy or any, or said on its import what is known to mean so."""
    works = found.usable_for(strategy) if strategy else found.usable
    return not works or (found.fault == "warns" and advise(f"{found}: {found.text}") is not None)


def refusals_of(strategy: AttentionStrategy, gpu: DeviceFacts) -> tuple[Refusal, ...]:
    """What a strategy's limits have against a device itself, whatever the call."""
    shape = (1, 8, 1024, 64)
    dtype = strategy.limits_for(gpu.type).dtypes[0]
    problem = problem_for_shapes(shape, shape, shape, dtype=dtype, device=gpu)
    return tuple(one for one in strategy.limits_for(gpu.type).refusals(problem) if one.field in MACHINE)


def _capability(here: Environment) -> tuple[int, int]:
    best = here.best
    return (best and best.capability) or (0, 0)


def _gpu(here: Environment) -> str:
    best = here.best
    assert best is not None
    return f"{best.name or best.architecture} (compute capability {'.'.join(map(str, _capability(here)))})"
