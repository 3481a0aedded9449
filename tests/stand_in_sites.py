"""Stand-ins of packages that cannot run here: put in place for a test, and taken away again without a trace.

Each folder of ``stand_ins`` is a site: what would lie in site-packages were the package installed.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

from heedful.facts import DeviceFacts, Facts, probe

SITES = Path(__file__).parent / "stand_ins"


def machine(name: str) -> Facts:
    """A machine whose CPU passes for the named device (``sm_80``, ``gfx942``, ``npu``), with everything installed."""
    here = probe()
    return Facts(here.torch_version, here.python_version, here.system, {"cpu": DeviceFacts.parse(name)})


@contextlib.contextmanager
def installed(site: str) -> Iterator[None]:
    """The site's packages can be imported; afterwards they, and what was imported of them, are gone."""
    folder = str(SITES / site)
    before = set(sys.modules)
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    names = {path.stem for path in Path(folder).iterdir() if not path.name.endswith(".dist-info")}
    hidden = {name: sys.modules.pop(name) for name in before if name.partition(".")[0] in names}
    try:
        patch = importlib.import_module(site) if (Path(folder) / f"{site}.py").exists() else None
        with patch.installed() if patch is not None and hasattr(patch, "installed") else contextlib.nullcontext():
            yield
    finally:
        sys.path.remove(folder)
        for name in [name for name in sys.modules if name.partition(".")[0] in names]:
            del sys.modules[name]
        sys.modules.update(hidden)
        importlib.invalidate_caches()
