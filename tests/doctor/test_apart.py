"""Packages that raise, abort, crash or hang when they are imported: they are told apart, and this process lives."""

import os
import sys

import pytest

from heedful.doctor.apart import Job, tried

PACKAGES = {
    "works": "import sys; print('a line that is not JSON'); print('{}'); x = 1",
    "warns": "import sys; print('lacks its kernels', file=sys.stderr)",
    "raises": "raise ImportError('undefined symbol: _ZN3c10') from ValueError('the cause')",
    "leaves": "raise SystemExit('no GPU, no package')",
    "aborts": "import os; os.abort()",
    "crashes": "import ctypes; ctypes.string_at(0)",
    "exits": "import os; os._exit(3)",
    "hangs": "import time\nwhile True: time.sleep(1)",
    "hangs_with_a_child": "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])",
    "leaves_a_child": "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])",
    "forges": 'import os\nfor fd in range(3, 9):\n  try: os.write(fd, b\'{"fault": "x"}\\n\')\n  except OSError: pass',
    "says_half": "raise ImportError('half \\ud800 \\u2028→')",
    "asks": "assert input('go on? ')",
}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    for name, text in PACKAGES.items():
        (tmp_path / f"package_that_{name}.py").write_text(text, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)


def outcome(name, seconds=30.0):
    (found,) = tried([Job("package", "1.0", f"package_that_{name}")], seconds=seconds)
    return found


@pytest.mark.parametrize(
    ("name", "fault", "words"),
    [
        ("works", "warns", "a line that is not JSON"),
        ("warns", "warns", "lacks its kernels"),
        ("raises", "raises", "ImportError: undefined symbol: _ZN3c10\nbecause of ValueError: the cause"),
        ("leaves", "raises", "SystemExit: no GPU, no package"),
        ("exits", "ends the process", "the process ended by exit status 3, at the import of package_that_exits"),
        ("says_half", "raises", "ImportError: half ? \u2028→"),
        ("asks", "raises", "EOFError"),
    ],
)
def test_how_an_import_ends(packages, name, fault, words):
    found = outcome(name)
    assert (found.fault, found.version, found.module) == (fault, "1.0", f"package_that_{name}")
    assert words in found.text
    assert found.usable is (fault == "warns")


def test_a_child_that_is_left_behind_holds_nothing_up(packages):
    """It would for a minute, and past the time that is given."""
    found = outcome("leaves_a_child", seconds=30.0)
    assert (found.fault, found.text) == ("", "")


def test_a_fault_that_the_child_does_not_know_is_not_taken(packages):
    assert outcome("forges").fault == ""


@pytest.mark.skipif(os.name != "posix", reason="signals have names on POSIX only")
@pytest.mark.parametrize(("name", "signal"), [("aborts", "SIGABRT"), ("crashes", "SIGSEGV")])
def test_a_signal_is_named_and_where_it_came(packages, name, signal):
    found = outcome(name)
    assert found.fault == "ends the process"
    assert f"ended by signal {signal}, at the import of package_that_{name}" in found.text
    assert f"package_that_{name}.py" in found.text  # faulthandler's own words
    assert not found.usable


@pytest.mark.parametrize("name", ["hangs", "hangs_with_a_child"])
def test_what_hangs_is_ended_with_all_that_it_started(packages, name):
    found = outcome(name, seconds=1.0)
    assert found.fault == "hangs"
    assert "nothing came back within 1 s, at the import of" in found.text


def test_answers_come_in_the_order_of_the_jobs(packages):
    jobs = [Job(name, "", f"package_that_{name}") for name in ("exits", "works", "raises")]
    assert [found.distribution for found in tried(jobs, at_once=3)] == ["exits", "works", "raises"]


def test_a_package_that_is_not_there():
    (found,) = tried([Job("x", "", "no_such_package_anywhere")])
    assert found.fault == "raises"
    assert "No module named 'no_such_package_anywhere'" in found.text


def test_nothing_is_imported_here(packages):
    outcome("works")
    assert "package_that_works" not in sys.modules


def test_the_folder_of_the_child_hides_no_package(tmp_path, monkeypatch):
    """``report``, ``install``, ``site``: modules of the doctor's own folder are none of the package's."""
    (tmp_path / "wants_site.py").write_text(
        "import site; assert hasattr(site, 'getsitepackages'), site.__file__", "utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = tried([Job("x", "", "wants_site")])
    assert found.fault == "", found.text


def test_what_ends_the_doctor_ends_its_processes(packages, monkeypatch):
    """As Ctrl-C does; were the other not ended, this would take ten minutes."""

    def interrupted(printed):
        raise KeyboardInterrupt

    monkeypatch.setattr("heedful.doctor.apart._lines", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tried([Job(name, "", f"package_that_{name}") for name in ("exits", "hangs")], seconds=600.0, at_once=2)
