"""Steps as the lines that a user could type, on either kind of system."""

import shlex
from dataclasses import replace

from doctor_machines import AMPERE, WINDOWS

from heedful.doctor.plans import Decision, Step, pip


def test_every_install_is_silent_alone_and_pinned():
    assert pip("x==1").argv("python", "/p/pins.txt") == [
        "python", "-m", "pip", "install", "--no-input", "--no-deps", "-c", "/p/pins.txt", "x==1",
    ]  # fmt: skip
    assert "--no-deps" not in pip("x", alone=False).arguments


def test_the_line_for_a_posix_shell_is_read_back_as_it_was():
    step = pip("a>=1,<2", variables=(("CUDA_HOME", "/opt/my cuda"), ("MAX_JOBS", "4")))
    words = shlex.split(step.command(replace(AMPERE, executable="/a b/python"), "pins.txt"))
    assert words[:3] == ["CUDA_HOME=/opt/my cuda", "MAX_JOBS=4", "/a b/python"]
    assert words[-1] == "a>=1,<2"


def test_the_line_for_windows_quotes_the_python_always():
    step = Step(("pip", "list"), (("MAX_JOBS", "4"),))
    assert step.command(WINDOWS, "") == f'set "MAX_JOBS=4" && "{WINDOWS.executable}" -m pip list'
    assert Step(("pip",)).command(replace(WINDOWS, executable=r"C:\py\python.exe"), "") == r'"C:\py\python.exe" -m pip'


def test_a_decision_as_json_data_has_its_commands():
    decision = Decision("flash", "row", "install", "flash", "Why.", (pip("x"),)).after(("a", "b"))
    data = decision.to_dict(AMPERE, "pins.txt")
    assert data["steps"] == decision.commands(AMPERE, "pins.txt")
    assert data["passed_over"] == ("a", "b")


def test_a_password_is_run_and_not_shown():
    step = pip("https://user:s3cret@corp.example/x-1-py3-none-any.whl")
    assert step.argv("python", "pins")[-1].startswith("https://user:s3cret@corp")
    assert step.command(AMPERE, "pins").endswith("'https://***@corp.example/x-1-py3-none-any.whl'")
    assert "s3cret" not in str(Decision("x", "", "install", "x", "", (step,)).to_dict(AMPERE, "pins"))
