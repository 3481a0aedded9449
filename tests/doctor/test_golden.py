"""What `heedful install` would do on forty machines that nobody here has, word for word.

``HEEDFUL_UPDATE_GOLDEN=1 pytest tests/doctor/test_golden.py`` writes the files anew; read the difference before it is
committed.
"""

import difflib
import os
from pathlib import Path

import pytest
from doctor_machines import MACHINES

from heedful import AttentionStrategyFactory
from heedful.doctor.decision import decide
from heedful.doctor.report import advised

GOLDEN = Path(__file__).parent.parent / "golden" / "doctor"
BACKENDS = ("auto", "flash", "flash_3", "flash_4", "sage", "sage_blackwell", "xformers", "aiter", "native")
STRATEGIES = AttentionStrategyFactory(plugins=False).strategies()


def answers(name):
    """Every backend's answer there: the row of the table, what is to be done, and the sentences."""
    here = MACHINES[name]
    parts = {}
    for backend in BACKENDS:
        decision = decide(here, STRATEGIES, backend)
        (_, reason), *others = advised(decision, here)
        lines = [f"[{decision.rule}: {decision.outcome}] {reason}", *(f"{label:<9} {text}" for label, text in others)]
        parts.setdefault("\n".join(lines), []).append(f"$ heedful install {backend}\n")
    return "\n\n".join("".join(commands) + text for text, commands in parts.items()) + "\n"


@pytest.mark.parametrize("name", MACHINES)
def test_the_answers_are_as_they_were(name):
    file, made = GOLDEN / f"{name}.txt", answers(name)
    if os.environ.get("HEEDFUL_UPDATE_GOLDEN") == "1":
        file.write_text(made, "utf-8")
    known = file.read_text("utf-8") if file.exists() else ""
    changes = difflib.unified_diff(known.splitlines(), made.splitlines(), str(file.name), "now", n=1, lineterm="")
    remedy = "if that is meant: HEEDFUL_UPDATE_GOLDEN=1 pytest tests/doctor/test_golden.py"
    assert made == known, "\n".join([*changes, remedy])


def test_there_is_a_file_for_each_machine_and_no_other():
    assert {file.name for file in GOLDEN.iterdir()} == {f"{name}.txt" for name in MACHINES}
    assert len(MACHINES) >= 24
