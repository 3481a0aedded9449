"""The ways to get a package of kernels: an official wheel, the Hub, torch's index, the package index, a build, by hand.

Each is a pure function of what is asked: a Decision where it is open, else the sentence why it is closed. ``WAYS``
lists them for each package in the order in which they are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from heedful.doctor.environment import Environment, numbers
from heedful.doctor.plans import Decision, Step, pip
from heedful.doctor.wheels import FLASH, community_name, flash_wheel, triton, triton_windows, xformers_release
from heedful.facts import DeviceFacts
from heedful.sources import Hub, Package
from heedful.strategy import AttentionStrategy

SAGE = "https://github.com/thu-ml/SageAttention"
SAGE_COMMIT = "d1a57a546c3d395b1ffcbeecc66d81db76f3b4b5"  # January 2026: after the ends of the keys were mended
FLASH_REPO = "https://github.com/Dao-AILab/flash-attention"
FLASH_3_COMMIT = "0251105a2fb19d2957484b7f023cd8c115286ced"  # the one whose functions heedful knows
FLASH_4, AITER = "4.0.0b36", "0.1.7.post2.dev18"  # likewise
_FLASH_4_NEEDS = ("nvidia-cutlass-dsl>=4.6.2", "einops", "typing_extensions", "apache-tvm-ffi>=0.1.12,<0.2",
                  "torch-c-dlpack-ext", "quack-kernels>=0.5.3")  # fmt: skip
_TOOLS = ("setuptools", "wheel", "packaging", "ninja", "psutil")
LOOKED_FOR = (*_TOOLS, "einops")  # plain Python, of which only the version is asked
_GIB_A_THREAD = 5.0  # of memory, for each thread of nvcc
_THREADS = 1  # of nvcc, for one architecture alone is built
_COMMUNITY = {
    "flash-attn": "https://github.com/mjun0812/flash-attention-prebuild-wheels/releases",
    "sageattention": "https://github.com/woct0rdho/SageAttention/releases",
}


@dataclass(frozen=True)
class Ask:
    """What is asked: a strategy's package for one GPU of an environment; ``absent``: addresses that lead nowhere."""

    environment: Environment
    strategy: AttentionStrategy
    gpu: DeviceFacts
    package: Package
    absent: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """The strategy's name."""
        return self.strategy.name

    @property
    def hub(self) -> Hub | None:
        """The Hub's kernel of the strategy."""
        return next((source for source in self.strategy.sources if isinstance(source, Hub)), None)


Way = Callable[[Ask], Decision | str]


def official_wheel(ask: Ask) -> Decision | str:
    """The wheel of flash-attn's own releases."""
    here, wheel = ask.environment, flash_wheel(ask.environment)
    if isinstance(wheel, str):
        return wheel
    if wheel.url in ask.absent:
        return f"{wheel.name} is in the build matrix of flash-attn and was not published"
    fits = f"torch {here.torch_minor}, CUDA {here.cuda} and {here.python_tag}"
    blackwell = f"built with CUDA 12.9 or newer, so it has code for {ask.gpu.architecture}"
    notes = (
        (not wheel.published, "the wheel is in the project's build matrix; that it is published is checked first"),
        ((ask.gpu.capability or (0, 0)) >= (10, 0), blackwell),
    )
    return Decision(
        ask.name,
        "official wheel",
        "install",
        ask.name,
        f"flash-attn {FLASH} has an official wheel for {fits}.",
        (*lacking(here, "einops"), pip(wheel.url)),
        "flash-attn",
        FLASH,
        urls=(wheel.url,),
        notes=tuple(text for told, text in notes if told),
    )


def on_the_hub(ask: Ask) -> Decision | str:
    """The Hub's kernel, at the version that the strategy pins; only the ``kernels`` library is installed."""
    here, hub = ask.environment, ask.hub
    pins = [name for name, pin in ask.strategy.pins().items() if pin.source == "hub" and not pin.layouts]
    if hub is None or not pins:
        return f"the Hub has no kernel that heedful knows for {ask.name}"
    if here.system != "Linux":
        return f"the Hub's kernel {hub} is built for Linux, this is {here.system}"
    if here.free_threaded:
        return f"the Hub's kernel {hub} does not fit free-threaded Python"
    if here.libc.startswith("musl"):
        return f"the Hub's kernel {hub} needs glibc, this system has musl"
    least = _SOURCES["flash_attn_3"].least_cuda
    if ask.package.distribution == "flash_attn_3" and numbers(here.cuda) < least:
        return f"FlashAttention 3 needs CUDA {'.'.join(map(str, least))}, torch has {here.cuda or 'none'}"
    have = here.package("kernels")
    ready = have is not None and have.usable and numbers(have.version) >= (0, 12)
    steps = () if ready else (pip("kernels>=0.12", alone=False),)
    reason = (
        f"The Hub has {hub}; it is fetched and its code run when you name {pins[0]} and HEEDFUL_DOWNLOADS=1 is set."
    )
    notes = (f"`kernels info {hub.repo}` lists its builds: whether one fits torch {here.torch_minor} stands there",)
    return Decision(ask.name, "Hub", "install" if steps else "nothing", pins[0], reason, steps, "kernels", notes=notes)


def torch_index(ask: Ask) -> Decision | str:
    """xFormers from torch's own index, in the release that belongs to this torch."""
    here, version = ask.environment, xformers_release(ask.environment)
    if not version:
        return f"no xFormers is known to belong to torch {here.torch}"
    if here.libc.startswith("musl"):
        return "xFormers has wheels for glibc only, this system has musl"
    if here.machine not in ("x86_64", "AMD64"):
        return f"xFormers has wheels for x86_64 only, this is {here.machine}"
    if here.free_threaded and version != "0.0.35":
        return f"xFormers {version} has no wheel for free-threaded Python"
    index = f"https://download.pytorch.org/whl/cu{here.cuda.replace('.', '')}"
    reason = f"xFormers {version} belongs to torch {here.torch_minor}; torch's index has it for CUDA {here.cuda}."
    steps = (pip(f"xformers=={version}", "--index-url", index),)
    return Decision(ask.name, "torch's index", "install", ask.name, reason, steps, "xformers", version)


def package_index(ask: Ask) -> Decision | str:
    """Packages in plain Python, whose kernels are compiled at first use, with what they need under the pins."""
    versions = {"flash-attn-4": FLASH_4, "amd-aiter": AITER}
    distribution = ask.package.distribution
    version = versions[distribution]
    if ask.environment.system != "Linux":
        return f"{distribution} is for Linux, this is {ask.environment.system}"
    if ask.environment.libc.startswith("musl"):
        return f"{distribution} needs packages for glibc, this system has musl"
    steps: tuple[Step, ...] = (pip(f"{distribution}=={version}"),)
    if distribution == "flash-attn-4":
        steps = (pip(*_FLASH_4_NEEDS, alone=False), *steps)
    reason = f"{distribution} {version} is on the package index; its kernels are compiled at their first use."
    return Decision(ask.name, "package index", "install", ask.name, reason, steps, distribution, version)


def beside_torch(ask: Ask) -> Decision | str:
    """Triton, in the release that belongs to this torch, whose own wheels for GPUs bring it along."""
    here, requirement = ask.environment, triton(ask.environment)
    if here.hip:
        return f"torch for ROCm brings a Triton of its own, and it is not there: install torch {here.torch} anew"
    if not requirement:
        return f"no Triton is known to belong to torch {here.torch} on {here.system}"
    if numbers(requirement.partition("==")[2]) < numbers(ask.package.minimum):
        return f"{requirement} belongs to torch {here.torch}, and our own kernels need {ask.package.minimum}"
    if here.libc.startswith("musl"):
        return "Triton has wheels for glibc only, this system has musl"
    reason = (
        f"{requirement} belongs to torch {here.torch_minor}; our own kernels are compiled by it at their first use."
    )
    name = requirement.partition("==")[0]
    return Decision(ask.name, "package index", "install", ask.name, reason, (pip(requirement),), name)


def build(ask: Ask) -> Decision | str:
    """From source, with no more compilers at a time than the memory carries."""
    here, source = ask.environment, _SOURCES.get(ask.package.distribution)
    if source is None:
        return f"heedful knows no pinned source of {ask.package}"
    lack = _cannot_build(here, ask.gpu, source.least_cuda)
    if lack:
        return lack
    major, minor = ask.gpu.capability or (0, 0)
    jobs = max_jobs(here.cores, here.memory_gib)
    variables = {"MAX_JOBS": str(jobs), "NVCC_THREADS": str(_THREADS), "CUDA_HOME": here.cuda_home}
    archs = {"FLASH_ATTN_CUDA_ARCHS": f"{major}0", "FLASH_ATTENTION_FORCE_BUILD": "TRUE"} if source.flash else {}
    archs = archs or {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    given = tuple((name, value) for name, value in {**variables, **archs}.items() if value)
    flags = ("--no-build-isolation", source.requirement)
    steps = (*lacking(here, *_TOOLS, *source.beside), pip(*flags, variables=given))
    reason = (
        f"It is built here by nvcc {here.nvcc} for {ask.gpu.architecture}, {jobs} file{'s' * (jobs > 1)} at a time."
    )
    notes = ("a build takes from ten minutes to an hour",)
    return Decision(ask.name, "source build", "install", ask.name, reason, steps, ask.package.distribution, notes=notes)


def by_hand_on_windows(ask: Ask) -> Decision | str:
    """On Windows, a community wheel before a build."""
    return by_hand(ask) if ask.environment.system == "Windows" else ""


def by_hand(ask: Ask) -> Decision | str:
    """A wheel of the community. heedful names the file to look for; the user chooses whose build to trust."""
    here, distribution = ask.environment, ask.package.distribution
    place = _COMMUNITY.get(distribution)
    if place is None or here.machine not in ("x86_64", "AMD64", "aarch64") or here.free_threaded:
        return f"no community builds of {distribution} for {here.system} {here.machine} {here.python_tag} are known"
    version = FLASH if distribution == "flash-attn" else "2.2.0"
    name = community_name(here, distribution.replace("-", "_"), version)
    command = f"heedful install {ask.name} --wheel <its address or file>"
    reason = f"Others build it for this system: look for a wheel like {name} at {place}, then: {command}"
    beside = triton_windows(here)
    notes = (f"its Triton kernels need {beside} here",) if beside and distribution == "sageattention" else ()
    return Decision(ask.name, "community wheel", "by hand", ask.name, reason, distribution=distribution, notes=notes)


@dataclass(frozen=True)
class _Source:
    """What to build: a requirement that is pinned, the CUDA that it wants at least, and what to put beside it."""

    requirement: str
    least_cuda: tuple[int, int]
    flash: bool = False
    beside: tuple[str, ...] = ()


_SOURCES: Mapping[str, _Source] = MappingProxyType({
    "flash-attn": _Source(f"flash-attn=={FLASH}", (11, 7), flash=True, beside=("einops",)),
    "flash_attn_3": _Source(f"git+{FLASH_REPO}@{FLASH_3_COMMIT}#subdirectory=hopper", (12, 3), beside=("einops",)),
    "sageattention": _Source(f"git+{SAGE}@{SAGE_COMMIT}", (12, 0)),
    "sageattn3": _Source(f"git+{SAGE}@{SAGE_COMMIT}#subdirectory=sageattention3_blackwell", (12, 8)),
})  # fmt: skip
_NVCC_FOR = (((12, 0), (12, 8)), ((10, 0), (12, 8)), ((9, 0), (12, 3)), ((8, 9), (12, 4)))

WAYS: Mapping[str, tuple[Way, ...]] = MappingProxyType({
    "flash-attn": (official_wheel, on_the_hub, by_hand_on_windows, build, by_hand),
    "flash_attn_3": (on_the_hub, build),
    "flash-attn-4": (package_index, on_the_hub),
    "sageattention": (on_the_hub, by_hand_on_windows, build, by_hand),
    "sageattn3": (on_the_hub, build),
    "xformers": (torch_index,),
    "amd-aiter": (package_index, on_the_hub),
    "triton": (beside_torch,),
})  # fmt: skip
NAMES: Mapping[str, tuple[Way, ...]] = MappingProxyType(
    {"wheel": (official_wheel, torch_index, package_index, beside_torch), "hub": (on_the_hub,), "build": (build,)}
)


def lacking(here: Environment, *names: str) -> tuple[Step, ...]:
    """The step that installs those that are not there; none where all are."""
    missing = tuple(name for name in names if here.package(name) is None)
    return (pip(*missing),) if missing else ()


def max_jobs(cores: int, memory_gib: float, threads: int = _THREADS) -> int:
    """How many compilers at a time: half the cores, and no more than 0.8 of the free memory carries. 0: too little."""
    return int(min(max(cores / 2, 1), 0.8 * memory_gib / (_GIB_A_THREAD * threads)))


def _cannot_build(here: Environment, gpu: DeviceFacts, least: tuple[int, int]) -> str:
    """Why it cannot be built here; "" where it can."""
    nvcc, cuda = numbers(here.nvcc), numbers(here.cuda)
    capability = gpu.capability or (0, 0)
    wanted = max(least, next((need for since, need in _NVCC_FOR if capability >= since), least))
    text = ".".join(map(str, wanted))
    memory = f"{here.memory_gib:.1f} GiB are free, one compiler needs {_GIB_A_THREAD / 0.8:.1f}"
    sentences = (
        (not nvcc, "there is no CUDA compiler (nvcc)"),
        (nvcc[:1] != cuda[:1], f"nvcc is {here.nvcc}, torch has CUDA {here.cuda}; their first numbers must agree"),
        (nvcc < wanted, f"{gpu.architecture} needs nvcc {text}, this one is {here.nvcc}"),
        (not here.compiler, "there is no C++ compiler"),
        (not here.headers, "this Python has no headers (Python.h)"),
        (max_jobs(here.cores, here.memory_gib) < 1, memory),
    )
    return next((f"it cannot be built: {sentence}" for wrong, sentence in sentences if wrong), "")
