"""Installs for real, into a Python of their own: what works stays, what does not leaves no trace."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from doctor_machines import AMPERE, MACHINES

from heedful import AttentionStrategyFactory
from heedful.doctor.decision import from_wheel
from heedful.doctor.install import _alone, absent, carry_out, run_pip, settled, undo_unfinished, write_pins
from heedful.doctor.plans import Decision, Step, pip
from heedful.doctor.site import FOLDER

STRATEGIES = AttentionStrategyFactory(plugins=False).strategies()
HERE = replace(AMPERE, python_tag="cp311")  # the wheels here fit any


def state(site):
    """Every file among the packages but byte code, which Python writes when it likes."""
    paths = (path for path in site.folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(site.folder)): path.read_bytes() for path in paths if path.suffix != ".lock"}


def put(site, wheel):
    """Install without pip, which takes a second to start: another version of the same package goes first."""
    name = Path(wheel).name.partition("-")[0]
    for folder in site.folder.glob(f"{name}-*.dist-info"):
        shutil.rmtree(folder)
    with zipfile.ZipFile(wheel) as archive:
        for file in archive.namelist():
            (site.folder / file).unlink(missing_ok=True)  # as pip does it
        archive.extractall(site.folder)


def install(site, wheel, strategies=None, **options):
    """``heedful install flash --wheel``; without strategies the trial is the import alone."""
    here = replace(HERE, executable=site.executable)
    decision = from_wheel(here, STRATEGIES, "flash", wheel)
    assert decision.outcome == "install", decision
    said = []
    return carry_out(decision, strategies or {}, here, site=site, say=said.append, **options), said


# A stand-in of flash-attn, computing on a CPU that passes for an sm_80.


def test_a_package_that_computes_attention_stays_and_one_that_answers_noise_is_undone(site, wheel, flash_files):
    result, said = install(site, wheel("flash_attn", "2.8.3", flash_files), STRATEGIES, supposed="sm_80")
    assert result.done, result.text
    assert 'flash-attn 2.8.3 is installed and works. Use it: heedful.attention_backend("flash")' in result.text
    assert site.versions()["flash-attn"] == "2.8.3"
    assert any("Successfully installed flash" in line for line in said)
    before = state(site)
    assert not any(FOLDER in path for path in before)

    name = "flash_attn/flash_attn_interface.py"
    noise = {**flash_files, name: re.sub(r"^    return ", "    return -2 * ", flash_files[name], count=0, flags=re.M)}
    assert noise[name] != flash_files[name]
    result, _ = install(site, wheel("flash_attn", "2.8.4", noise), STRATEGIES, supposed="sm_80")
    assert not result.done
    assert "flash-attn 2.8.4 was installed and fails a tiny problem: flash: " in result.text
    assert result.text.endswith("Everything is as it was before.")
    assert result.undone
    assert state(site) == before


# What goes wrong on the way


def test_what_raises_is_taken_away_again_with_its_words_and_the_advice(site, wheel):
    before = state(site)
    result, _ = install(
        site, wheel("flash_attn", "2.8.3", {"flash_attn.py": "raise ImportError('undefined symbol: _Z')"})
    )
    assert not result.done
    assert "raises: ImportError: undefined symbol: _Z → the package was compiled for another torch" in result.text
    assert (result.undone, state(site)) == (True, before)


def test_what_hangs_is_taken_away_again_and_the_version_before_is_back(site, wheel):
    put(site, wheel("flash_attn", "1.0", {"flash_attn.py": "x = 1", "flash_attn_old.py": "y = 2"}))
    before = state(site)

    def impatient(jobs, executable):
        from heedful.doctor.apart import tried

        return tried(jobs, executable=executable, seconds=1.0)

    slow = wheel("flash_attn", "1.1", {"flash_attn.py": "import time; time.sleep(99)", "flash_attn_new.py": ""})
    result, said = install(site, slow, trial=impatient)
    assert "hangs: nothing came back within 1 s" in result.text
    assert any(line == "undoing it: flash-attn" for line in said)
    assert (result.undone, state(site)) == (True, before)
    assert site.versions()["flash-attn"] == "1.0"


def test_pip_that_fails_changes_nothing_and_is_explained(site, wheel):
    before = state(site)
    result, _ = install(site, wheel("flash_attn", "2.8.3", {}) + "x.whl".removeprefix("x"), run=failing)
    assert "pip ended with status 1. the disk is full: free some room" in result.text
    assert (result.done, result.undone, state(site)) == (False, True, before)


def failing(argv, variables, say):
    """pip on a full disk."""
    if "install" in argv:
        return 1, "Installing collected packages: flash-attn\nOSError: [Errno 28] No space left on device"
    return run_pip(argv, variables, say)


def test_all_that_is_installed_is_held_at_its_version(site, wheel):
    """A step that would bring another torch: the constraints stop pip."""
    put(site, wheel("holds_still", "1.0", {"holds_still.py": ""}))
    before = state(site)
    other = wheel("holds_still", "2.0", {"holds_still.py": "new = True"})
    decision = Decision(
        "flash",
        "test",
        "install",
        "flash",
        "",
        (pip("--no-index", "holds-still==2.0", "-f", str(Path(other).parent)),),
        "flash-attn",
    )
    result = carry_out(decision, {}, replace(HERE, executable=site.executable), site=site, say=lambda line: None)
    assert not result.done
    assert "pip ended with status" in result.text
    assert state(site) == before


def test_what_was_replaced_all_the_same_is_told(site, wheel):
    put(site, wheel("holds_still", "1.0", {"holds_still.py": ""}))
    step = Step(("pip", "install", "--no-index", "--no-deps", wheel("holds_still", "2.0", {"holds_still.py": ""})))
    decision = Decision("flash", "test", "install", "flash", "", (step,), "flash-attn")
    result = carry_out(decision, {}, replace(HERE, executable=site.executable), site=site, say=lambda line: None)
    assert "pip changed what it was told to hold: holds-still 1.0 became 2.0" in result.text
    assert "could not be undone wholly: holds-still is 2.0, it was 1.0" in result.text
    assert not result.undone


def test_what_else_was_installed_goes_too(site, wheel):
    """Steps before the failing one are undone with it."""
    before = state(site)
    steps = (pip("--no-index", wheel("einops", "0.8", {"einops.py": ""})), pip("--no-index", "/no/such/file.whl"))
    decision = Decision("flash", "test", "install", "flash", "", steps, "flash-attn")
    result = carry_out(decision, {}, replace(HERE, executable=site.executable), site=site, say=lambda line: None)
    assert (result.done, result.undone, state(site)) == (False, True, before)


def test_ctrl_c_is_undone_and_passed_on(site, wheel):
    put(site, wheel("flash_attn", "1.0", {"flash_attn.py": "x = 1"}))
    before = state(site)

    def interrupted(jobs, executable):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        install(site, wheel("flash_attn", "1.1", {"flash_attn.py": "x = 2"}), trial=interrupted)
    assert state(site) == before


def test_an_install_that_was_killed_is_undone_by_the_next(site, wheel):
    put(site, wheel("flash_attn", "1.0", {"flash_attn.py": "x = 1"}))
    before = state(site)
    site.keep("flash-attn")
    site.own({"flash-attn": ""})
    put(site, wheel("flash_attn", "1.1", {"flash_attn.py": "x = 2"}))  # and here it was killed
    said = []
    undo_unfinished(site, said.append, run_pip)
    assert said[0] == "an install of flash-attn was cut off: undoing it first"
    assert state(site) == before
    undo_unfinished(site, said.append, run_pip)  # nothing is left to undo


def test_what_the_user_did_after_an_install_was_killed_is_the_users(site, wheel):
    put(site, wheel("holds_still", "1.0", {"holds_still.py": ""}))
    site.keep("flash-attn")
    site.own({"flash-attn": "1.1", "einops": "0.7"})
    for name, version in (("flash_attn", "1.1"), ("holds_still", "2.0"), ("mine", "1.0"), ("einops", "0.8")):
        put(site, wheel(name, version, {f"{name}.py": version}))  # the first by the install, the others since
    said = []
    assert undo_unfinished(site, said.append, run_pip).undone
    now = site.versions()
    assert (now["holds-still"], now["mine"], now["einops"], "flash-attn" in now) == ("2.0", "1.0", "0.8", False)
    assert "einops 0.8 was installed by somebody else since: it is left as it is" in said
    assert not (site.folder / FOLDER).exists()


def test_what_cannot_be_undone_is_told_and_nothing_else_is_begun(site, wheel):
    site.keep("flash-attn")
    site.own({"flash-attn": ""})
    put(site, wheel("flash_attn", "1.1", {"flash_attn.py": "x = 2"}))
    other = wheel("flash_attn", "1.2", {"flash_attn.py": ""})
    result, _ = install(site, other, run=lambda argv, variables, say: (1, "no"))
    assert not result.done
    assert "could not be undone wholly: flash-attn is 1.1, it was not there" in result.text
    assert f"or delete {site.folder / FOLDER} to go on as it is" in result.text
    assert site.is_unfinished()


def test_what_pip_had_half_written_when_it_was_killed_is_set_aside(site, wheel):
    put(site, wheel("flash_attn", "1.0", {"flash_attn/__init__.py": "x = 1"}))
    before = state(site)
    site.keep("flash-attn")
    site.own({"flash-attn": "", "einops": ""})
    for name in ("flash_attn/new.py", "einops/half.py", "einops-0.8.dist-info/METADATA", "~lash_attn/__init__.py"):
        (site.folder / name).parent.mkdir(exist_ok=True)
        (site.folder / name).write_text("Metadata-Version: 2.1\nName: einops\nVersion: 0.8\n")
    (site.folder / "flash_attn" / "__init__.py").unlink()
    said = []
    assert undo_unfinished(site, said.append, run_pip).undone
    now = state(site)
    aside = {path for path in now if path.startswith(".heedful-cut-off-")}
    assert {path: text for path, text in now.items() if path not in aside} == before
    assert len(aside) == 4
    assert "belongs to no package: einops, einops-0.8.dist-info, flash_attn/new.py, ~lash_attn" in said[1]


@pytest.mark.parametrize("links", [True, False])
def test_files_of_others_that_a_wheel_overwrites_come_back_or_are_told(site, wheel, monkeypatch, links):
    put(site, wheel("torch", "1.0", {"torch_version.py": "v = 1"}))
    before = state(site)
    if not links:
        monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError("no links here")))
    result, _ = install(site, wheel("flash_attn", "1.0", {"torch_version.py": "v = 666", "flash_attn.py": ""}))
    path = site.folder / "torch_version.py"
    assert f"pip changed what it was told to hold: {path} of torch." in result.text
    assert (result.done, result.undone) == (False, links)
    if links:
        assert state(site) == before
    else:
        assert f"could not be undone wholly: {path} of torch is not as it was: install torch again" in result.text


def test_files_that_are_shared_by_packages_are_told(site, wheel):
    put(site, wheel("other", "1.0", {"tests.py": "v = 1", "same.py": ""}))
    wanted = wheel("flash_attn", "1.0", {"tests.py": "v = 2", "same.py": "", "flash_attn.py": ""})
    result, _ = install(site, wanted)
    assert result.done
    assert f"It overwrote files of other packages: {site.folder / 'tests.py'} of other." in result.text


@pytest.mark.skipif(os.name != "posix", reason="locks are inherited on POSIX only")
def test_a_pip_whose_heedful_was_killed_still_holds_the_lock(site):
    from filelock import FileLock, Timeout

    script = f"""
import sys
from pathlib import Path
from heedful.doctor.install import _alone, run_pip
from heedful.doctor.site import Site
with _alone(Site("", Path({str(site.folder)!r}), ()), print) as held:
    child = "import time; print('pip', flush=True); time.sleep(60)"
    run_pip([sys.executable, "-c", child], {{}}, lambda line: print(line, flush=True), held=held)
"""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    heedful = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env=environ, start_new_session=True
    )
    try:
        assert heedful.stdout.readline() == b"pip\n"
        heedful.kill()
        heedful.wait()
        with pytest.raises(Timeout):
            FileLock(str(site.folder / ".heedful-install.lock"), timeout=0.2).acquire()
    finally:
        os.killpg(heedful.pid, signal.SIGKILL)
        heedful.stdout.close()
    with FileLock(str(site.folder / ".heedful-install.lock"), timeout=20.0):  # its end frees it
        pass


def test_standard_input_is_closed(site):
    script = "import sys; print(repr(sys.stdin.read()))"
    status, printed = run_pip([site.executable, "-c", script], {"X": "y"}, lambda line: None)
    assert (status, printed) == (0, "''")


# Addresses and pins


def test_a_wheel_that_was_not_published_closes_its_way():
    here = MACHINES["ampere_torch_2.10_cuda_13"]
    asked = []

    def gone(urls):
        asked.extend(urls)
        return frozenset(urls)

    decision = settled(here, STRATEGIES, "flash", ask=gone)
    assert len(asked) == 1
    assert asked[0].endswith("flash_attn-2.8.3%2Bcu13torch2.10cxx11abiTRUE-cp312-cp312-linux_x86_64.whl")
    assert (decision.rule, decision.use) == ("Hub", "flash_hub")
    assert "was not published" in decision.passed_over[0]
    assert settled(here, STRATEGIES, "flash", ask=lambda urls: frozenset()).rule == "official wheel"


def test_an_address_that_does_not_answer_is_left_to_pip(tmp_path):
    assert absent([f"file://{tmp_path}/no", "http://127.0.0.1:9/x"], seconds=1.0) == frozenset()
    assert absent([]) == frozenset()


def test_pins_hold_everything_but_the_one(tmp_path):
    versions = {"torch": "2.8.0+cu128", "flash-attn": "2.8.3", "odd": "not a version\n", "numpy": "2.1"}
    path = write_pins(tmp_path, versions, without="flash_attn")
    assert Path(path).read_text("utf-8") == "numpy==2.1\ntorch==2.8.0+cu128\n"


def test_two_installs_wait_for_each_other(site, wheel):
    from filelock import FileLock, Timeout

    seen = []

    def looking(jobs, executable):
        with contextlib.suppress(Timeout), FileLock(str(site.folder / ".heedful-install.lock"), timeout=0.1):
            seen.append("free")
        return ()

    result, _ = install(site, wheel("flash_attn", "1.0", {"flash_attn.py": ""}), trial=looking)
    assert result.done
    assert seen == []


def test_a_second_install_says_that_it_waits(site):
    from filelock import FileLock

    lock, said = FileLock(str(site.folder / ".heedful-install.lock"), thread_local=False), []

    def hear(line):
        said.append(line)
        lock.release()

    lock.acquire()
    with _alone(site, hear):
        pass
    assert said == ["another install is running: waiting for its end"]
