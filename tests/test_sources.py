"""Where kernels come from: what each source lacks, what it loads, and that nothing is downloaded unasked."""

import json
import sys
import warnings
from types import SimpleNamespace

import kernels
import pytest
import torch
import torch.nn.functional as F

from heedful import AttentionDispatcher, AttentionStrategy, Facts, HeedfulError, Limits, Policy, Refused
from heedful import facts as machine
from heedful.errors import CannotLoad
from heedful.facts import Installed
from heedful.sources import (
    Folder,
    Hub,
    Package,
    _older,
    downloads_allowed,
    load_first,
)
from heedful.strategy import Pin


def having(**packages):
    """A machine with these packages alone."""
    return Facts("2", "3", "Linux", {}, {name.replace("__", "."): version for name, version in packages.items()})


EVERYTHING = Facts("2", "3", "Linux")
WITH_KERNELS = having(kernels="0.17.2")


@pytest.fixture
def no_download(monkeypatch):
    """Fails the test where anything is asked of the Hub."""

    def asked(*arguments, **more):
        raise AssertionError(f"asked the Hub: {arguments} {more}")

    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    monkeypatch.setattr(kernels, "get_kernel", asked)
    monkeypatch.setattr("kernels.resolver.HubResolver.resolve", asked)
    monkeypatch.setattr("kernels.resolver.HubCacheResolver.resolve", asked)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module ``name`` (dots for packages) and put it on the path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def write(name, text, version=None):
        *folders, last = name.split(".")
        place = tmp_path.joinpath(*folders)
        place.mkdir(parents=True, exist_ok=True)
        for depth in range(1, len(folders) + 1):
            tmp_path.joinpath(*folders[:depth], "__init__.py").touch()
        place.joinpath(f"{last}.py").write_text(text)
        if version:
            about = tmp_path / f"{name.partition('.')[0]}-{version}.dist-info"
            about.mkdir()
            about.joinpath("METADATA").write_text(
                f"Metadata-Version: 2.1\nName: {name.partition('.')[0]}\nVersion: {version}\n"
            )
        return name

    yield write
    for name in set(sys.modules) - before:
        if name.startswith("wheel_for_tests"):
            del sys.modules[name]


# A package: what it lacks


FLASH = Package("flash_attn.interface", ("f",), distribution="flash-attn", minimum="2.6.3", install="pip install it")


@pytest.mark.parametrize(
    ("packages", "words"),
    [
        ({}, "package is flash-attn not installed, it takes flash-attn 2.6.3 or newer (pip install it)"),
        ({"flash_attn": ""}, "flash-attn not installed"),
        ({"flash-attn": "2.8.3"}, "flash-attn not installed"),
        ({"flash_attn__interface": "2.6.2"}, "package is flash-attn 2.6.2, it takes flash-attn 2.6.3 or newer"),
        ({"flash_attn__interface": "", "flash-attn": "2.5"}, "package is flash-attn 2.5"),
        ({"flash_attn__interface": "2.6.3"}, None),
        ({"flash_attn__interface": "", "flash-attn": "2.10.0.post1"}, None),
        ({"flash_attn__interface": ""}, None),
    ],
)
def test_what_a_package_lacks(packages, words):
    lack = FLASH.lack(having(**packages), downloads=True)
    assert lack is None if words is None else words in str(lack)


def test_a_package_without_distribution_is_called_by_its_module():
    lack = Package("mine.ops", ("f",)).lack(having(), downloads=False)
    assert str(lack) == "package is mine not installed, it takes mine"
    assert (str(FLASH), str(Package("mine.ops", ()))) == ("flash-attn", "mine.ops")


def test_where_everything_is_supposed_nothing_lacks():
    for source in (FLASH, Hub("a/b", 3, ("f",))):
        assert source.lack(EVERYTHING, downloads=False) is None


@pytest.mark.parametrize(
    ("have", "minimum", "older"),
    [
        ("2.6.2", "2.6.3", True),
        ("2.6.3", "2.6.3", False),
        ("2.6", "2.6.0", False),
        ("2.6.0", "2.6", False),
        ("2.10", "2.9", False),
        ("2.9", "2.10", True),
        ("2.13.0+cpu", "2.12", False),
        ("2.6.3.post1", "2.6.3", False),
        ("3.0.0b1", "3", False),
        ("v2.5", "2.6", True),
        ("1!0.1", "0.2", True),
        ("2.0.dev20260101", "2.0.5", True),
        ("unknown", "2.0", False),
        ("git+abc", "2.0", False),
        ("2.0", "", False),
    ],
)
def test_versions_compare_by_their_numbers(have, minimum, older):
    assert _older(have, minimum) is older


def test_a_namespace_package_is_no_flash_attn_2(tmp_path, monkeypatch):
    tmp_path.joinpath("flash_attn", "cute").mkdir(parents=True)
    tmp_path.joinpath("flash_attn", "cute", "__init__.py").touch()
    tmp_path.joinpath("flash_attn", "cute", "interface.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    facts = Facts("2", "3", "Linux", {}, Installed())
    two = Package("flash_attn.flash_attn_interface", (), distribution="flash-attn")
    assert "flash-attn not installed" in str(two.lack(facts, False))
    assert Package("flash_attn", ()).lack(facts, False) is not None
    assert Package("flash_attn.cute.interface", ()).lack(facts, False) is None
    assert not [name for name in sys.modules if name.startswith("flash_attn")]


# A package: what it loads


def test_the_functions_are_there_by_name(module):
    name = module("wheel_for_tests_1.ops", "def f(): return 1\ndef g(): return 2\n")
    loaded = Package(name, ("f",), optional=("g", "_h")).load()
    assert (loaded.f(), loaded.g(), loaded._h) == (1, 2, None)


def test_a_missing_optional_name_never_disables_the_plain_path(module):
    lazy = "def f(): return 1\ndef __getattr__(name): raise ImportError(f'no {name} on this machine')\n"
    loaded = Package(module("wheel_for_tests_2", lazy), ("f",), optional=("_private", "_other")).load()
    assert (loaded.f(), loaded._private, loaded._other) == (1, None, None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def f(): pass", "{} has no g, h: a version that heedful does not know"),
        ("def f(): pass\ntry:\n    import no_such_module\nexcept ImportError:\n    g = h = None", "{} has no g, h"),
        ("raise ImportError('libcudart.so.11.0: cannot open')", "{} cannot be loaded: ImportError: libcudart.so.11.0"),
        ("raise OSError('GLIBC_2.32 not found')", "{} cannot be loaded: OSError: GLIBC_2.32 not found"),
        ("1 / 0", "{} cannot be loaded: ZeroDivisionError: division by zero"),
        ("def :", "{} cannot be loaded: SyntaxError"),
        ("import no_such_module", "{} cannot be loaded: ModuleNotFoundError: No module named 'no_such_module'"),
        (
            "def __getattr__(name): raise RuntimeError(f'lazy {name}')",
            "{} cannot be loaded: RuntimeError: lazy f",
        ),
    ],
)
def test_what_keeps_it_from_being_loaded_is_told(module, text, words):
    name = module(f"wheel_for_tests_{abs(hash(text))}", text)
    with pytest.raises(CannotLoad) as caught:
        Package(name, ("f", "g", "h")).load()
    assert str(caught.value).startswith(words.format(name))
    assert isinstance(caught.value, HeedfulError)


def test_an_interrupt_passes_and_an_exit_is_the_packages_own(module):
    interrupted, exits = (
        module(f"wheel_for_tests_{word}", f"raise {word}") for word in ("KeyboardInterrupt", "SystemExit")
    )
    with pytest.raises(KeyboardInterrupt):
        Package(interrupted, ("f",)).load()
    with pytest.raises(CannotLoad, match="SystemExit"):
        Package(exits, ("f",)).load()


def test_warnings_of_an_import_are_not_the_users(module):
    noisy = "import warnings\nwarnings.warn('deprecated', DeprecationWarning)\nwarnings.simplefilter('ignore')\nf = 1\n"
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("error")
        assert Package(module("wheel_for_tests_3", noisy), ("f",)).load().f == 1
    assert caught == []
    assert list(warnings.filters) == before


# Through the dispatcher: the words reach explain, list_backends and Refused


@pytest.fixture
def tensors():
    return [torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0)) for _ in range(3)]


def strategy_of(*sources, **body):
    def compute_attention(self, query, key, value):
        return self.kernels.f(query, key, value)

    body = {"limits": Limits(devices=("cpu",)), "sources": sources, **body}
    return type("FromAfar", (AttentionStrategy,), {"compute_attention": compute_attention, **body})


def dispatcher_of(factory, kind, packages=None, **policy):
    factory.register_strategy("afar", kind)
    here = machine.probe()
    packages = Installed() if packages is None else packages
    facts = Facts(here.torch_version, here.python_version, here.system, {"cpu": here.devices["cpu"]}, packages)
    return AttentionDispatcher(factory, facts, Policy({"*": ("afar", "native")}, **policy))


def everywhere(dispatcher, tensors, backend="afar"):
    """The text of every place that tells why a backend is not used; and the answers of those that go on."""
    expected = F.scaled_dot_product_attention(*tensors)
    assert torch.equal(dispatcher.attention(*tensors), expected)
    assert torch.equal(dispatcher.attention(*tensors, backend=[backend, "native"]), expected)
    plan = dispatcher.explain(*tensors, backend=[backend, "native"])
    assert plan.backend == "native"
    with pytest.raises(Refused) as caught:
        dispatcher.attention(*tensors, backend=backend)
    return [str(plan), str(caught.value), str(dispatcher.list_backends("cpu"))]


def test_a_missing_package_is_told_everywhere_with_its_remedy(factory, tensors):
    dispatcher = dispatcher_of(factory, strategy_of(FLASH), {})
    for text in everywhere(dispatcher, tensors):
        assert "package is flash-attn not installed, it takes flash-attn 2.6.3 or newer (pip install it)" in text


def test_the_text_of_an_import_error_is_told_everywhere(factory, tensors, module):
    name = module("wheel_for_tests_4", "raise ImportError('undefined symbol: _ZN3c105Error')")
    for text in everywhere(dispatcher_of(factory, strategy_of(Package(name, ("f",)))), tensors):
        assert f"import is {name} cannot be loaded: ImportError: undefined symbol: _ZN3c105Error" in text


def test_a_missing_name_is_told_everywhere(factory, tensors, module):
    name = module("wheel_for_tests_5", "g = 1")
    for text in everywhere(dispatcher_of(factory, strategy_of(Package(name, ("f",)))), tensors):
        assert f"import is {name} has no f: a version that heedful does not know" in text


def test_a_good_package_computes(factory, tensors, module):
    text = "from torch.nn.functional import scaled_dot_product_attention as f"
    name = module("wheel_for_tests_6", text, version="2.0")
    source = Package(name, ("f",), distribution="wheel_for_tests_6", minimum="1.5")
    dispatcher = dispatcher_of(factory, strategy_of(source))
    assert dispatcher.explain(*tensors).backend == "afar"
    assert torch.equal(dispatcher.attention(*tensors), F.scaled_dot_product_attention(*tensors))
    assert dispatcher.list_backends("cpu")["afar"].available
    wanting = strategy_of(Package(name, ("f",), distribution="wheel_for_tests_6", minimum="2.0.1"))
    factory.register_strategy("wanting", wanting)
    with pytest.raises(Refused, match=r"wheel_for_tests_6 2\.0, it takes wheel_for_tests_6 2\.0\.1 or newer"):
        dispatcher.attention(*tensors, backend="wanting")


# The Hub

HUB = Hub("someone/attention", 3, ("f",), optional=("g",))


@pytest.mark.parametrize(
    ("packages", "words"),
    [
        (
            {},
            "kernels not installed, it takes the kernels library 0.12 or newer (pip install 'kernels>=0.12')",
        ),
        ({"kernels": "0.11.7"}, "package is kernels 0.11.7"),
    ],
)
@pytest.mark.parametrize("source", [HUB, Folder("somewhere", ("f",))], ids=["hub", "folder"])
def test_what_is_asked_of_the_kernels_library(source, packages, words):
    assert words in str(source.lack(having(**packages), downloads=True))


@pytest.mark.usefixtures("no_download")
def test_without_permission_nothing_is_downloaded(factory, tensors):
    lack = HUB.lack(WITH_KERNELS, downloads=False)
    assert (lack.field, lack.observed) == ("download", "not allowed")
    assert "set HEEDFUL_DOWNLOADS=1: someone/attention version 3 is then downloaded and its code is run" in str(lack)
    assert HUB.lack(WITH_KERNELS, downloads=True) is None
    for text in everywhere(dispatcher_of(factory, strategy_of(HUB)), tensors):
        assert "set HEEDFUL_DOWNLOADS=1: someone/attention version 3" in text


@pytest.mark.usefixtures("no_download")
def test_used_alone_a_strategy_downloads_nothing_unasked(monkeypatch, tensors):
    monkeypatch.delenv("HEEDFUL_DOWNLOADS", raising=False)
    with pytest.raises(CannotLoad, match="HEEDFUL_DOWNLOADS=1"):
        strategy_of(HUB)().validate_and_compute(*tensors)


def test_with_permission_exactly_the_pinned_version_is_got(factory, tensors, monkeypatch):
    asked = []

    def get_kernel(repo_id, *, revision=None, version=None, backend=None, trust_remote_code=False):
        asked.append((repo_id, revision, version, backend, trust_remote_code))
        return SimpleNamespace(f=F.scaled_dot_product_attention)

    monkeypatch.setattr(kernels, "get_kernel", get_kernel)
    dispatcher = dispatcher_of(factory, strategy_of(HUB), downloads=True)
    assert dispatcher.explain(*tensors).backend == "native"  # auto asks for no name
    assert asked == []
    for _ in range(2):
        out = dispatcher.attention(*tensors, backend="afar")
        assert torch.equal(out, F.scaled_dot_product_attention(*tensors))
    assert dispatcher.explain(*tensors, backend="afar").backend == "afar"
    assert asked == [("someone/attention", None, 3, None, ["someone/attention"])]


def test_older_kernels_libraries_do_not_ask_about_trust(monkeypatch):
    def get_kernel(repo_id, revision=None, version=None, user_agent=None):
        return SimpleNamespace(f=(repo_id, version))

    monkeypatch.setattr(kernels, "get_kernel", get_kernel)
    assert HUB.load().f == ("someone/attention", 3)


def test_what_the_hub_answers_is_told(factory, tensors, monkeypatch):
    def get_kernel(*_arguments, trust_remote_code=False, **_more):
        raise FileNotFoundError("Cannot find a build variant for this system")

    monkeypatch.setattr(kernels, "get_kernel", get_kernel)
    for text in everywhere(dispatcher_of(factory, strategy_of(HUB), downloads=True), tensors)[:2]:
        assert "someone/attention version 3 cannot be loaded: FileNotFoundError: Cannot find a build variant" in text


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("1", True),
        (" TRUE ", True),
        ("yes", True),
        ("on", True),
        ("0", False),
        ("", False),
        ("no", False),
    ],
)
def test_downloads_are_allowed_by_the_environment(text, allowed):
    assert downloads_allowed({"HEEDFUL_DOWNLOADS": text}) is allowed
    assert not downloads_allowed({})


# Kernels in folders: end to end, offline

GOOD = "from torch.nn.functional import scaled_dot_product_attention as f\n"


def built(folder, text=GOOD, name="lk", **more):
    """A kernel's folder as the kernels library wants it."""
    place = folder / "build" / "torch-cpu"
    place.mkdir(parents=True)
    place.joinpath("__init__.py").write_text(text)
    about = {"id": f"{name}_{folder.name}", "name": name, "version": 3, "license": "Apache-2.0", "python-depends": []}
    place.joinpath("metadata.json").write_text(json.dumps({**about, "backend": {"type": "cpu"}, **more}))
    return folder


OFFLINE = """
import socket, sys
def refuse(*_): raise AssertionError("network")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
import torch, heedful
from heedful.sources import Folder, Hub
from heedful.strategy import AttentionStrategy, Limits
class FromHub(AttentionStrategy):
    name = "afar"
    sources = (SOURCE,)
    limits = Limits(devices=("cpu",))
    def compute_attention(self, query, key, value):
        return self.kernels.f(query, key, value)
heedful.AttentionStrategyFactory.register_strategy("afar", FromHub)
t = [torch.randn(1, 2, 5, 8) for _ in range(3)]
assert "kernels" not in sys.modules
print(heedful.explain(*t, backend=["afar", "native"]))
out = heedful.attention(*t, backend="afar")
print(torch.equal(out, torch.nn.functional.scaled_dot_product_attention(*t)))
"""


def test_a_hub_kernel_in_a_folder_of_ones_own(tmp_path, fresh_python):
    folder = built(tmp_path / "lk")
    script = OFFLINE.replace("SOURCE", "Hub('someone/attention', 3, ('f',))")
    ended = fresh_python(script, LOCAL_KERNELS=f"someone/other=/nowhere:someone/attention={folder}")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert "-> afar" in ended.stdout
    assert ended.stdout.endswith("True\n")


def test_a_folder(tmp_path, fresh_python):
    ended = fresh_python(OFFLINE.replace("SOURCE", f"Folder({str(built(tmp_path / 'lk'))!r}, ('f',))"))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.endswith("True\n")


@pytest.mark.usefixtures("no_download")
def test_a_folder_that_is_not_there(tmp_path):
    lack = Folder(str(tmp_path / "none"), ("f",)).lack(WITH_KERNELS, downloads=False)
    assert (lack.field, lack.observed) == ("folder", f"{tmp_path / 'none'} missing")
    assert str(Folder("place", ())) == "place"


@pytest.mark.usefixtures("no_download")
@pytest.mark.parametrize(
    ("text", "words"),
    [("f = 1 / 0", "cannot be loaded: ZeroDivisionError"), ("g = 1", "has no f: a version that heedful does not know")],
)
def test_a_folder_whose_kernel_does_not_load(tmp_path, text, words):
    with pytest.raises(CannotLoad, match=words):
        Folder(str(built(tmp_path / str(abs(hash(text))), text)), ("f",)).load()


@pytest.mark.usefixtures("no_download")
def test_a_folder_without_a_build_for_this_machine(tmp_path):
    tmp_path.joinpath("build", "torch99-cxx11-cu999-x86_64-linux").mkdir(parents=True)
    with pytest.raises(CannotLoad, match="Cannot find a build variant"):
        Folder(str(tmp_path), ("f",)).load()


def test_a_mapped_folder_that_is_not_there_is_not_replaced_by_a_download(tmp_path, monkeypatch):
    monkeypatch.setattr("kernels.resolver.HubResolver.resolve", lambda *_a, **_b: pytest.fail("asked the Hub"))
    monkeypatch.setenv("LOCAL_KERNELS", f"someone/attention={tmp_path / 'none'}")
    assert HUB.lack(WITH_KERNELS, downloads=False) is None
    with pytest.raises(CannotLoad, match="Cannot find a build variant"):
        HUB.load()


NEEDS = {"kernel-depends": [{"repo-id": "other/rotary", "version": 1}]}


@pytest.mark.usefixtures("no_download")
def test_what_a_kernel_in_a_folder_needs_is_not_downloaded_unasked(tmp_path, monkeypatch):
    folder = built(tmp_path / "needing", **NEEDS)
    monkeypatch.setenv("LOCAL_KERNELS", f"someone/attention={folder}")
    for source in (HUB, Folder(str(folder), ("f",))):
        lack = source.lack(WITH_KERNELS, downloads=False)
        assert lack.field == "download"
        assert f"other/rotary, which the kernel in {folder} needs, is then downloaded" in str(lack)
        assert source.lack(WITH_KERNELS, downloads=True) is None
    beside = built(tmp_path / "beside", "", **{"kernel-depends": [{"repo-id": "a/third", "version": 1}]})
    monkeypatch.setenv("LOCAL_KERNELS", f"someone/attention={folder}:other/rotary={beside}")
    assert f"a/third, which the kernel in {folder} needs" in str(HUB.lack(WITH_KERNELS, downloads=False))
    again = built(tmp_path / "again", "", **NEEDS)
    monkeypatch.setenv("LOCAL_KERNELS", f"someone/attention={folder}:other/rotary={beside}:a/third={again}")
    assert HUB.lack(WITH_KERNELS, downloads=False) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"kernel-depends": [3]}', '{"kernel-depends": 3}'])
def test_metadata_that_cannot_be_read_may_name_anything(tmp_path, text):
    built(tmp_path / "odd").joinpath("build", "torch-cpu", "metadata.json").write_text(text)
    lack = Folder(str(tmp_path / "odd"), ("f",)).lack(WITH_KERNELS, downloads=False)
    assert lack.field == "download"
    assert "cannot be read" in str(lack)
    assert Folder(str(tmp_path / "odd"), ("f",)).lack(WITH_KERNELS, downloads=True) is None


@pytest.mark.parametrize("inner", ["", "build", "build/torch-cpu"])
def test_what_a_kernel_needs_is_found_however_its_folder_is_named(tmp_path, inner):
    variant = built(tmp_path / "mine").joinpath("build", "torch-cpu", "metadata.json")
    needs = {**json.loads(variant.read_text("utf-8")), "kernel-depends": [{"repo-id": "ébène/dep", "version": 1}]}
    variant.write_text(json.dumps(needs, ensure_ascii=False), encoding="utf-8")
    lack = Folder(str(tmp_path / "mine" / inner), ("f",)).lack(WITH_KERNELS, downloads=False)
    assert "ébène/dep" in str(lack)


# Several sources, and pins


def test_the_first_source_that_can_be_loaded_is(module):
    good, broken = (Package(name, ("f",)) for name in ("wheel_for_tests_8", "wheel_for_tests_9"))
    module("wheel_for_tests_8", GOOD)
    module("wheel_for_tests_9", "raise OSError('libcudart')")
    here = having(wheel_for_tests_8="1", wheel_for_tests_9="1")
    assert load_first((FLASH, broken, good), here, False).f
    with pytest.raises(CannotLoad, match=r"flash-attn not installed.*libcudart"):
        load_first((FLASH, broken), here, False)


@pytest.mark.usefixtures("no_download")
def test_a_pinned_source_is_the_only_one(factory, tensors, module):
    name = module("wheel_for_tests_7", GOOD)
    kind = strategy_of(Package(name, ("f",)), HUB, aliases={"afar_hub": Pin(source="hub")})
    dispatcher = dispatcher_of(factory, kind)
    assert dispatcher.explain(*tensors, backend="afar").backend == "afar"
    with pytest.raises(Refused, match="afar_hub refuses: download is not allowed"):
        dispatcher.attention(*tensors, backend="afar_hub")
    assert dispatcher.explain(*tensors, backend=["afar_hub", "afar"]).backend == "afar"


# Nothing is imported to look


LOOKING = """
import sys
import torch, heedful
from heedful import AttentionDispatcher, Facts, Policy
from heedful.facts import probe
looked = ["flash_attn", "flash_attn_interface", "xformers", "sageattention", "kernels", "aiter", "torch_npu"]
q = torch.zeros(1, 2, 5, 64, dtype=torch.float16)
here = AttentionDispatcher(facts=probe(), policy=Policy())
for strategy in here.factory.strategies().values():
    strategy.lacks(probe())
    strategy.lacks(probe(), True)
print(here.explain(q, q, q))
away = AttentionDispatcher(facts=Facts.pretend("sm_90"), policy=Policy())
names = [name for name, one in away.factory.strategies().items() if one.sources]
for name in names:
    away.explain(q, q, q, backend=name)
print(away.list_backends("cuda"))
bad = [name for name in sys.modules if name.partition(".")[0] in looked]
assert not bad, bad
"""


def test_looking_imports_nothing(fresh_python):
    ended = fresh_python(LOOKING)
    assert ended.returncode == 0, ended.stderr


def test_a_missing_kernels_library_is_no_error(fresh_python):
    script = (
        "import sys; sys.modules['kernels'] = None\n"
        "import heedful\nfrom heedful.sources import *\n"
        "try: Hub('a/b', 1, ('f',)).load()\nexcept CannotLoad as error: print(error)\n"
    )
    ended = fresh_python(script)
    assert "a/b version 1 cannot be loaded: ModuleNotFoundError" in ended.stdout, ended.stderr


# Versions, as locks, bug reports and fingerprints say them


def test_each_source_says_its_name_and_version(tmp_path):
    facts = having(present="2.8.3")
    assert Package("present", ("f",)).named_version(facts) == "present 2.8.3"
    assert Package("absent", ("f",), distribution="absent-one").named_version(facts) == "absent-one"
    assert Hub("org/kernel", 3, ("f",)).named_version(facts) == "org/kernel version 3"
    assert str(tmp_path) in Folder(str(tmp_path), ("f",)).named_version(facts)


def test_a_strategys_version_is_that_of_its_first_source_that_is_there():
    kind = strategy_of(Package("absent", ("f",)), Package("present", ("f",)), Package("other", ("f",)))
    assert kind().version(having(present="1.2", other="3")) == "present 1.2"
    assert kind().version(having(other="3")) == "other 3"
    assert kind().version(having()) == ""
    assert strategy_of()().version(having()) == "torch 2"


def test_a_pinned_name_never_says_the_version_of_another_source():
    kind = strategy_of(Package("present", ("f",)), Hub("org/kernel", 3, ("f",)))
    pinned = type("Pinned", (kind,), {"pin": Pin("hub")})
    assert pinned().version(having(present="1.2")) == ""
