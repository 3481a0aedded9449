"""Throw-away Pythons, and wheels written by hand: installs are real, and go nowhere else."""

from __future__ import annotations

import sysconfig
import venv
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from heedful.doctor.site import Site

STAND_IN = Path(__file__).parent.parent / "stand_ins" / "flash_attn_2" / "flash_attn"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A virtual environment of its own that sees this one's packages, torch and pip among them."""
    folder = tmp_path / "python"
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    made = Site.of(str(folder / "bin" / "python"))
    (made.folder / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    return Site.of(made.executable)


@pytest.fixture
def wheel(tmp_path: Path) -> Callable[..., str]:
    """Write a wheel ``name-version-py3-none-any.whl`` of some files; its path."""

    def write(name: str, version: str, files: Mapping[str, str]) -> str:
        path = tmp_path / f"{name}-{version}-py3-none-any.whl"
        info = f"{name}-{version}.dist-info"
        meta = {
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: heedful\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        listed = "".join(f"{file},,\n" for file in (*files, *meta, f"{info}/RECORD"))
        with zipfile.ZipFile(path, "w") as archive:
            for file, text in {**files, **meta, f"{info}/RECORD": listed}.items():
                archive.writestr(file, text)
        return str(path)

    return write


@pytest.fixture(scope="session")
def flash_files() -> dict[str, str]:
    """The files of the stand-in for flash-attn 2."""
    return {f"flash_attn/{path.name}": path.read_text("utf-8") for path in STAND_IN.glob("*.py")}
