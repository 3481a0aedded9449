"""The installer of the node pack: never a question, never another torch, always a plain sentence and an exit code."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from comfyui_contract import PACK

HERE = {"torch": "2.13.0+cpu", "heedful": "0.1.0", "typer": "1", "rich": "1", "platformdirs": "1", "filelock": "1",
        "jinja2": "1"}  # fmt: skip
PIP = ("/python", "-m", "pip", "install")


@pytest.fixture(scope="module")
def installer() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("heedful_comfyui_install", PACK / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


class Machine:
    """A Python whose packages are a dict; its commands are listed, and install what they name unless they fail."""

    def __init__(self, module: ModuleType, versions: dict[str, str | None], pip: tuple[str, ...] = PIP) -> None:
        self.module, self.versions, self.pip = module, {**HERE, **versions}, pip
        self.commands: list[list[str]] = []
        self.answers: list[tuple[int, str]] = []
        self.effect: Callable[[Sequence[str]], None] = lambda words: None

    def look(self) -> Any:
        return self.module.Python("/python", dict(self.versions), self.pip)

    def run(self, words: Sequence[str]) -> Any:
        self.commands.append(list(words))
        if "-c" in words and words[1] == "-c":
            return self.module.Ran(*(self.answers.pop(0) if self.answers else (0, "0.1.0\n")))
        code, text = self.answers.pop(0) if self.answers else (0, "")
        if not code:
            self.effect(words)
        return self.module.Ran(code, text)

    def main(self, *arguments: str, checkout: Path = Path("/nowhere"), **environ: str) -> int:
        code: int = self.module.main(arguments, environ, self.look, self.run, checkout)
        return code


def installs(machine: Machine, name: str, version: str) -> None:
    machine.effect = lambda words: machine.versions.update({name: version})


@pytest.fixture
def without(installer: ModuleType) -> Machine:
    machine = Machine(installer, {"heedful": None})
    installs(machine, "heedful", "0.1.0")
    return machine


def test_there_already(installer: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    machine = Machine(installer, {})
    assert machine.main() == 0
    assert capsys.readouterr().out == (
        "[heedful] heedful 0.1.0 is there already, beside torch 2.13.0+cpu. Nothing was changed.\n"
    )
    assert [words[1] for words in machine.commands] == ["-c"]


def test_it_is_installed_without_its_dependencies(
    without: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "heedful"\n')
    assert without.main(checkout=tmp_path) == 0
    assert without.commands[0] == [*PIP, "--no-deps", str(tmp_path)]
    assert capsys.readouterr().out.endswith(
        "heedful 0.1.0 is installed, beside torch 2.13.0+cpu, unchanged. Restart ComfyUI.\n"
    )


def test_what_lacks_is_installed_beside_the_torch_that_is_there(installer: ModuleType) -> None:
    machine = Machine(installer, {"typer": None, "jinja2": None})
    pins: list[str] = []
    machine.effect = lambda words: pins.append(Path(words[words.index("-c") + 1]).read_text())
    assert machine.main() == 0
    assert machine.commands[0][-2:] == ["typer>=0.12", "jinja2>=3.1"]
    assert pins == ["torch==2.13.0+cpu\n"]


@pytest.mark.parametrize("place", ["argument", "variable"])
def test_a_source_that_is_named(without: Machine, tmp_path: Path, place: str) -> None:
    wheel = tmp_path / "heedful-0.1.0-py3-none-any.whl"
    wheel.write_bytes(b"")
    named = ([str(wheel)], {}) if place == "argument" else ([], {"HEEDFUL_SOURCE": str(wheel)})
    assert without.main(*named[0], **named[1]) == 0
    assert without.commands[0][-1] == str(wheel)
    assert Machine(without.module, {"heedful": None}).main("heedful==0.1.0") == 0


@pytest.mark.parametrize("name", ["heedful", "heedful>=0.1", "heedless==1", "git+https://example.com/x", "/no/folder"])
def test_what_is_neither_here_nor_pinned_is_not_installed(
    without: Machine, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert without.main(name) == 1
    assert (
        "is neither a folder nor a wheel here, nor a pinned version such as heedful==0.1.0" in capsys.readouterr().out
    )
    assert without.commands == []


def test_nothing_is_fetched_under_a_name_that_nobody_named(
    without: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert without.main() == 1
    assert without.commands == []
    out = capsys.readouterr().out
    assert "heedful is not installed. Name where it is: clone its repository and run:" in out
    assert "ComfyUI works as before" in out


@pytest.mark.parametrize(
    ("versions", "text"),
    [
        ({"torch": None}, "This Python has no torch: /python. Run me with the Python that runs ComfyUI."),
        ({"torch": "2.5.1+cu124"}, "It needs torch 2.6 or newer, and ComfyUI has 2.5.1+cu124. Update ComfyUI"),
    ],
)
def test_torch_is_never_installed(
    installer: ModuleType, versions: dict[str, str | None], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Machine(installer, {"heedful": None, **versions})
    assert machine.main("heedful==0.1.0") == 1
    assert text in capsys.readouterr().out
    assert machine.commands == []


def test_a_newer_torch_is_taken(installer: ModuleType) -> None:
    for version in ("2.10.0", "3.0", ""):
        assert Machine(installer, {"torch": version}).main() == 0


def test_pip_fails(without: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    without.answers = [(1, "lots\n" * 20 + "ERROR: No matching distribution found for heedful==0.1.0\n")]
    assert without.main("heedful==0.1.0") == 1
    out = capsys.readouterr().out
    assert "/python -m pip install --no-deps heedful==0.1.0\nended with code 1:" in out
    assert "No matching distribution found" in out
    assert "Without a network, copy heedful and its wheels here" in out
    assert out.count("lots") == 7


def test_no_pip_and_no_uv(installer: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert Machine(installer, {"heedful": None}, ()).main("heedful==0.1.0") == 1
    assert "has neither pip nor uv: /python" in capsys.readouterr().out


def test_torch_that_changed_all_the_same_is_told(without: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    installs(without, "torch", "2.14.0")
    assert without.main("heedful==0.1.0") == 1
    out = capsys.readouterr().out
    assert "torch was 2.13.0+cpu and is 2.14.0 now. Put it back with: pip install torch==2.13.0+cpu" in out


def test_heedful_that_cannot_be_imported_is_told(installer: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    machine = Machine(installer, {})
    machine.answers = [(1, "Traceback ...\nImportError: libtorch.so\n")]
    assert machine.main() == 1
    assert "It is there and cannot be imported: ImportError: libtorch.so." in capsys.readouterr().out


def test_one_source_only(without: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert without.main("a", "b") == 1
    assert "Give one folder, wheel or requirement, not 2: a b" in capsys.readouterr().out


# For real, in processes


def script(*options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, *options, str(PACK / "install.py")]
    env = {**os.environ, **environ}
    return subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False, env=env
    )


def test_run_with_stdin_closed_where_heedful_is() -> None:
    done = script(PYTHONPATH=str(PACK.parent.parent / "src"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("[heedful] heedful 0.1.0 is there already, beside torch 2.")


def test_run_with_stdin_closed_where_nothing_is() -> None:
    done = script("-I", "-S")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("[heedful] heedful is not installed. This Python has no torch: ")


def test_a_real_pip_without_a_network(
    installer: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = (*installer.installer_of(sys.executable), "--no-index", "--target", str(tmp_path / "site"))
    machine = Machine(installer, {"heedful": None}, pip)
    machine.run = installer.ran  # type: ignore[method-assign]
    assert machine.main("heedful==987.6.5") == 1
    assert "No matching distribution found for heedful==987.6.5" in capsys.readouterr().out


def test_a_real_pip_with_a_wheel(installer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheel asks for a torch that there is not: --no-deps keeps pip from looking for it."""
    wheel, site = tmp_path / "heedful-0.9.9-py3-none-any.whl", tmp_path / "site"
    info = "heedful-0.9.9.dist-info"
    with zipfile.ZipFile(wheel, "w") as made:
        made.writestr("heedful/__init__.py", "__version__ = '0.9.9'\n")
        made.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: heedful\nVersion: 0.9.9\nRequires-Dist: torch>99\n"
        )
        made.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        made.writestr(f"{info}/RECORD", "")
    pip = (*installer.installer_of(sys.executable), "--no-index", "--target", str(site))
    before = installer.Python(sys.executable, {**HERE, "heedful": None}, pip)
    monkeypatch.setenv("PYTHONPATH", str(site))
    text = installer.install(str(wheel), lambda: before, installer.ran)
    assert text == "heedful 0.9.9 is installed, beside torch 2.13.0+cpu, unchanged. Restart ComfyUI."


def test_uv_serves_where_there_is_no_pip(installer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installer.PathFinder, "find_spec", lambda name: None)
    monkeypatch.setattr(installer.shutil, "which", lambda name: f"/bin/{name}")
    assert installer.installer_of("/python") == ("/bin/uv", "pip", "install", "--python", "/python")


def test_a_command_that_cannot_be_started_or_does_not_end(
    installer: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert installer.ran(["/no/such/program"]).code == 1
    monkeypatch.setattr(installer, "SECONDS", 0.2)
    done = installer.ran([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    assert (done.code, done.text) == (1, "it did not end within 0.2 seconds")


def test_stdin_of_its_commands_is_closed(installer: ModuleType) -> None:
    done = installer.ran([sys.executable, "-S", "-c", "import sys; print(repr(sys.stdin.read()))"])
    assert (done.code, done.text.strip()) == (0, "''")


def test_the_packages_it_knows_are_those_that_heedful_needs(installer: ModuleType) -> None:
    project = (PACK.parent.parent / "pyproject.toml").read_text("utf-8")  # Python 3.10 has no tomllib
    listed = project.partition("\ndependencies = [\n")[2].partition("\n]")[0]
    wanted = re.findall(r'^    "([^"]+)"', listed, re.MULTILINE)
    assert sorted([*installer.NEEDS.values(), "torch>=" + ".".join(map(str, installer.OLDEST_TORCH))]) == sorted(wanted)
