"""Each example runs, offline, and prints what its own text promises."""

import runpy
import warnings
from pathlib import Path

import pytest

import heedful
from heedful import AttentionStrategyFactory

EXAMPLES = Path(__file__).parent.parent / "examples"
PROMISED = {
    "sd_unet": ("covered 12 of 12", "bit for bit: True"),
    "flux": ("covered 5 of 8", "flash-attn not installed", "-> native"),
    "wan_video": ("covered 4 of 4", "plans are locked:", "B1 H2 Q192 K7 D12 float32", "bit for bit: True"),
    "text_model": ("the same tokens: True", "covered 2 of 2", "key padding (left"),
    "plugin_strategy": ("-> blockwise: forced by name", "takes it after gather_keys", "softcap is 30.0, it takes none"),
}


@pytest.fixture(autouse=True)
def the_process_as_it_was():
    """Examples use the process's own registry and dispatcher, as their readers will."""
    names = set(AttentionStrategyFactory.default().strategies())
    yield
    for name in set(AttentionStrategyFactory.default().strategies()) - names:
        AttentionStrategyFactory.default().unregister_strategy(name)
    heedful.use_lock(None)


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(PROMISED)


@pytest.mark.parametrize("name", PROMISED)
def test_an_example_keeps_its_promise(name, capsys):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(diffusers|transformers|xformers)\.")  # their own affairs
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    for words in PROMISED[name]:
        assert words in printed
    if "largest difference" in printed:
        assert float(printed.partition("largest difference")[2].partition(": ")[2].split()[0]) <= 1e-4
