"""The store of measured times: nothing acknowledged is lost, nothing foreign is trusted, nothing is fatal."""

import dataclasses
import errno
import json
import logging
import os
import re
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful import timings
from heedful.errors import InvalidArgument
from heedful.fingerprint import Fingerprint
from heedful.records import Record, Window
from heedful.timings import TimingStore, shipped_for, table, this_run

MADE = Fingerprint("A CPU", "x86_64", "", "2.13.0", "", "3.4", 2, "Linux", (("xformers", "0.0.35"),))
posix = pytest.mark.skipif(os.name == "nt", reason="forks, signals and FIFOs")


def window(ended=100.0, run="run", **seconds):
    return Window(float(ended), run, seconds or {"native": 1e-3, "flex": 2e-3}, 5)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache" / "timings"


@pytest.fixture
def store(folder):
    return TimingStore(folder, MADE)


@pytest.fixture
def warnings_of(caplog):
    """The texts of the warnings so far."""
    caplog.set_level(logging.WARNING, "heedful")
    return lambda: [record.getMessage() for record in caplog.records]


def put(folder, content):
    """The store's file with this content."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{MADE.digest}.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def whole(records=None):
    return {"format": 1, "fingerprint": MADE.to_dict(), "records": {} if records is None else records}


# Keeping


def test_what_was_added_is_there_for_the_next_process(store, folder, warnings_of):
    assert store.get("key") is None
    assert store.add_window("key", window(1)) == Record((window(1),))
    assert store.add_fault("key", "flex", "off by\n 0.3") == Record((window(1),), {"flex": "off by 0.3"})
    assert store.unsaved == set()
    again = TimingStore(folder, MADE)
    assert again.get("key") == store.get("key") == again.records()["key"]
    assert {path.name for path in folder.iterdir()} <= {f"{MADE.digest}.json", f"{MADE.digest}.lock"}
    assert warnings_of() == []


@posix
def test_the_folder_and_the_file_are_the_users_alone(store, folder):
    store.add_window("key", window())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600


def test_reading_alone_leaves_no_trace(store, folder):
    assert store.get("key") is None
    assert store.records() == {}
    assert not folder.exists()


def test_fingerprints_have_files_of_their_own(store, folder):
    other = TimingStore(folder, dataclasses.replace(MADE, threads=3))
    store.add_window("key", window())
    assert other.get("key") is None
    assert store.path != other.path


def test_stores_see_what_others_wrote_once_they_write(store, folder):
    other = TimingStore(folder, MADE)
    assert other.get("key") is None
    store.add_window("key", window(1))
    assert other.get("key") is None  # from memory
    assert [one.ended for one in other.add_window("key", window(2)).windows] == [1, 2]
    store.add_window("other", window(3))
    assert [one.ended for one in store.get("key").windows] == [1, 2]


def test_without_a_folder_memory_keeps_it_and_says_so(warnings_of):
    store = TimingStore(None, MADE)
    store.add_window("key", window())
    assert store.get("key") == Record((window(),))
    assert store.unsaved == {"key"}
    assert not store.save()
    store.forget("key")
    assert store.get("key") is None
    assert store.unsaved == set()
    assert store.save()
    assert warnings_of() == []


def test_forgetting_one_class_or_all(store, folder):
    for key in "abc":
        store.add_window(key, window())
    other = TimingStore(folder, MADE)
    assert set(other.records()) == set("abc")
    store.forget("a")
    other.add_window("b", window(200))  # does not bring back what another process forgot
    assert set(TimingStore(folder, MADE).records()) == set(other.records()) == set("bc")
    store.forget()
    assert store.records() == TimingStore(folder, MADE).records() == {}
    assert not store.path.exists()
    store.add_window("a", window())
    assert set(TimingStore(folder, MADE).records()) == {"a"}


def test_what_is_malformed_is_refused_and_not_written(store, folder):
    for bad in (float("nan"), 0.0, -1.0, 1e300):
        with pytest.raises(InvalidArgument, match="window"):
            store.add_window("key", window(native=bad))
    for key in ("", "a\nb", "\ud800", None, "x" * 2001):
        with pytest.raises(InvalidArgument, match="key"):
            store.add_window(key, window())
    with pytest.raises(InvalidArgument, match="label"):
        store.add_fault("key", "", "reason")
    assert not folder.exists()


def test_a_store_that_grows_too_large_drops_the_oldest_classes_and_says_so(store, folder, monkeypatch, warnings_of):
    monkeypatch.setattr(timings, "MOST_WRITTEN", 2000)
    store.add_fault("broken", "flex", "wrong")
    for moment in range(30):
        store.add_window(f"class {moment}", window(moment))
    kept = TimingStore(folder, MADE).records()
    assert store.path.stat().st_size <= 2000
    assert {"broken", "class 29"} < set(kept) < {"broken", *(f"class {moment}" for moment in range(10, 30))}
    assert kept == store.records()
    assert len(warnings_of()) == 1


def test_leftovers_of_killed_writers_go_after_an_hour(store, folder):
    folder.mkdir(parents=True)
    names = [f"{MADE.digest}.{'a' * 32}.tmp", f"{MADE.digest}.{'b' * 32}.tmp", "mine.tmp"]
    for name in names:
        (folder / name).write_text("{")
    for name in (names[0], names[2]):
        os.utime(folder / name, (time.time() - 4000,) * 2)
    store.add_window("key", window())
    assert sorted(path.name for path in folder.glob("*.tmp")) == sorted(names[1:])


# Many at once


def test_threads_of_one_store_and_of_several_lose_nothing(folder):
    stores = [TimingStore(folder, MADE, patience=60), TimingStore(folder, MADE, patience=60)]

    def work(number):
        for turn in range(4):
            stores[number % 2].add_window(f"common {turn}", window(number, str(number)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = TimingStore(folder, MADE).records()
    assert {key: {one.run for one in record.windows} for key, record in found.items()} == {
        f"common {turn}": set("01234567") for turn in range(4)
    }


# One interpreter that imports heedful once and forks: a child of pytest's, as forking a process with threads is unsafe.
PREAMBLE = """
import json, os, random, signal, threading, time
from pathlib import Path
from heedful.fingerprint import Fingerprint
from heedful.timings import TimingStore, Window, this_run
folder, MADE = Path(os.environ["FOLDER"]), Fingerprint.from_dict(json.loads(os.environ["MADE"]))
"""

EIGHT = """
children = []
for number in range(8):
    child = os.fork()
    if child == 0:
        store = TimingStore(folder, MADE, patience=60)
        for turn in range(20):
            key = f"common {turn}" if turn % 2 else f"own {number} {turn}"
            store.add_window(key, Window(float(turn), this_run(), {"native": 1.0 + number}, 5))
        os._exit(len(store.unsaved))
    children.append(child)
print([os.waitpid(child, 0)[1] for child in children])
"""

FORKED = """
store, run, held = TimingStore(folder, MADE), this_run(), threading.Event()
def hold():
    with store._mutex:
        held.set()
        threading.Event().wait()
threading.Thread(target=hold, daemon=True).start()
held.wait()
child = os.fork()
if child == 0:
    store.add_window("key", Window(1.0, this_run(), {"native": 1.0}, 5))
    os._exit(this_run() == run)
print(os.waitpid(child, 0)[1], flush=True)
os._exit(0)
"""

KILLED = """
import filelock  # or each child spends its short life on importing it
random.seed(0)
print("started")
for trial in range(25):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        store = TimingStore(folder, MADE, patience=60)
        for number in range(100_000):
            key = f"{trial} {number}"
            store.add_window(key, Window(float(number), this_run(), {"native": 1.0}, 5))
            if key not in store.unsaved:
                os.write(write, f"{key}\\n".encode())
    os.close(write)
    with os.fdopen(read) as acknowledged:
        if trial % 2:  # the others may be killed in their very first write
            print(acknowledged.readline(), end="")
        time.sleep(random.random() * 0.09)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print(acknowledged.read(), end="")
    TimingStore(folder, MADE).get("")  # a file that cannot be read would be set aside
"""


@pytest.fixture
def forking(fresh_python, folder):
    """Run one of these scripts. Python warns of forks beside threads, such as torch may have."""
    environ = {"FOLDER": str(folder), "MADE": json.dumps(MADE.to_dict()), "PYTHONWARNINGS": "ignore"}
    return lambda script: fresh_python(PREAMBLE + script, **environ)


@posix
def test_eight_processes_at_once_lose_nothing(forking, folder):
    ran = forking(EIGHT)
    assert ran.stdout.split("\n")[0] == str([0] * 8), ran.stderr
    found = TimingStore(folder, MADE).records()
    assert sum(len(record.windows) for record in found.values()) == 160
    assert {len(record.windows) for key, record in found.items() if key.startswith("common")} == {8}
    assert len({one.run for record in found.values() for one in record.windows}) == 8
    assert ran.stderr == ""


@posix
def test_what_was_acknowledged_survives_kill_9_at_any_moment(forking, folder):
    ran = forking(KILLED)
    first, *acknowledged = ran.stdout.splitlines()
    assert first == "started", ran.stderr
    assert ran.stderr == ""
    assert len(acknowledged) >= 12
    found = TimingStore(folder, MADE).records()
    assert set(acknowledged) <= set(found)
    assert len(found) <= len(acknowledged) + 25  # at most the one that was under way
    assert list(folder.glob("*.bad-*")) == []


@posix
def test_a_forked_process_is_another_run_and_has_a_lock_of_its_own(forking, folder):
    ran = forking(FORKED)
    assert ran.stdout == "0\n", ran.stderr
    assert TimingStore(folder, MADE).get("key") is not None
    assert this_run() == this_run()


# A disk that cannot be used


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@posix
def test_a_lock_held_elsewhere_for_too_long_costs_one_wait_and_nothing_is_lost(folder, warnings_of):
    store = TimingStore(folder, MADE, patience=0.3)
    store.add_window("before", window())
    lock = store.path.with_suffix(".lock")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        began = time.monotonic()
        for number in range(4):
            assert store.add_window(f"key {number}", window()).windows == (window(),)
        assert 0.3 <= time.monotonic() - began < 2  # one wait of 0.3 s, then short ones
        assert store.unsaved == {f"key {number}" for number in range(4)}
        assert not store.save()
        assert set(TimingStore(folder, MADE).records()) == {"before"}
        holder.stdin.close()
    store.add_window("after", window())
    assert store.unsaved == set()
    assert len(TimingStore(folder, MADE).records()) == 6
    assert len(warnings_of()) == 1


@pytest.mark.parametrize("call", ["open", "fsync", "replace", "mkdir"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO], ids=errno.errorcode.get)
def test_a_disk_that_fails_leaves_memory_one_warning_and_the_old_file(
    store, folder, warnings_of, monkeypatch, call, number
):
    store.add_window("before", window())
    real = getattr(os, call)

    def fails(path, *args, **kwargs):
        if call != "open" or str(path).endswith(".tmp"):
            raise OSError(number, os.strerror(number))
        return real(path, *args, **kwargs)

    if call == "mkdir":
        folder = folder / "deeper"
        store = TimingStore(folder, MADE)
    with monkeypatch.context() as broken:
        broken.setattr(os, call, fails)
        for moment in range(3):
            store.add_window("key", window(moment))
        store.add_fault("key", "flex", "wrong")
        assert len(store.get("key").windows) == 3
        assert store.unsaved == {"key"}
        assert len(warnings_of()) == 1
    assert list(folder.glob("*.tmp")) == []
    assert TimingStore(folder, MADE).get("key") is None
    assert store.save()
    assert TimingStore(folder, MADE).get("key") == store.get("key")
    assert len(store.get("key").windows) == 3


def test_forgetting_while_the_disk_fails_is_made_good_later(store, folder, monkeypatch):
    store.add_window("a", window())
    store.add_window("b", window())
    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        store.forget("a")
        assert set(store.records()) == {"b"}
        assert not store.save()
    assert set(TimingStore(folder, MADE).records()) == {"a", "b"}
    assert store.save()
    assert set(TimingStore(folder, MADE).records()) == {"b"}


def test_a_file_in_place_of_the_folder_leaves_memory(tmp_path, warnings_of):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "timings"):
        store = TimingStore(folder, MADE)
        assert store.get("key") is None
        store.add_window("key", window())
        store.add_window("key", window(200))
        assert len(store.get("key").windows) == 2
        assert store.unsaved == {"key"}
    assert (tmp_path / "file").read_text() == ""
    assert len([text for text in warnings_of() if "written" in text]) == 2


def test_without_a_home_memory_is_used(tmp_path, monkeypatch, warnings_of):
    monkeypatch.chdir(tmp_path)
    store = TimingStore(Path("~/.cache/heedful/timings"), MADE)
    store.add_window("key", window())
    assert store.unsaved == {"key"}
    assert list(tmp_path.iterdir()) == []
    assert len(warnings_of()) == 1


def test_a_failing_read_that_may_pass_moves_nothing_away(store, folder, monkeypatch, warnings_of):
    store.add_window("key", window())
    again = TimingStore(folder, MADE)
    with monkeypatch.context() as broken:
        broken.setattr(timings, "_content", lambda _: (_ for _ in ()).throw(OSError(errno.EMFILE, "too many")))
        assert again.get("key") is None
    again.add_window("other", window())
    assert set(again.records()) == {"key", "other"}
    assert len(warnings_of()) == 1


# Foreign content


def assert_set_aside(folder, warnings_of):
    """One warning, the file moved away once, and the store as good as new."""
    store = TimingStore(folder, MADE)
    assert store.records() == {}
    assert store.get("key") is None
    assert len(list(folder.glob("*.bad-*"))) == 1
    assert len(warnings_of()) == 1
    assert "\n" not in warnings_of()[0]
    store.add_window("key", window())
    assert store.unsaved == set()
    again = TimingStore(folder, MADE)
    assert again.get("key") == Record((window(),))
    assert len(list(folder.glob("*.bad-*"))) == 1
    assert len(warnings_of()) == 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 100,
        b"\xff\xfe{}",
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"9" * 10_000,
        b"not json",
        b'{"format": NaN}',
        [],
        None,
        "text",
        {},
        {**whole(), "format": 2},
        {**whole(), "format": True},
        {**whole(), "format": "1"},
        {**whole(), "format": 1.0},
        {**whole(), "records": []},
        {**whole(), "records": None},
        {**whole(), "fingerprint": None},
        {**whole(), "fingerprint": dataclasses.replace(MADE, threads=9).to_dict()},
        {key: value for key, value in whole().items() if key != "fingerprint"},
    ],
    ids=lambda content: repr(content)[:30],
)
def test_foreign_content_is_set_aside(folder, warnings_of, content):
    put(folder, content)
    assert_set_aside(folder, warnings_of)


def test_an_enormous_file_is_set_aside_unread(folder, warnings_of):
    with put(folder, whole()).open("ab") as file:
        file.truncate(17 << 20)
    assert_set_aside(folder, warnings_of)


@posix
@pytest.mark.parametrize("kind", ["folder", "link", "dangling link", "fifo"])
def test_what_is_no_ordinary_file_is_set_aside(folder, tmp_path, warnings_of, kind):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text(json.dumps(whole({"key": Record((window(),)).to_dict()})))
    path = put(folder, b"")
    path.unlink()
    match kind:
        case "folder":
            path.mkdir()
            (path / "inside").write_text("")
        case "link":
            path.symlink_to(elsewhere)
        case "dangling link":
            path.symlink_to(tmp_path / "nowhere")
        case "fifo":
            os.mkfifo(path)
    assert_set_aside(folder, warnings_of)
    assert elsewhere.exists()


def test_what_cannot_be_moved_away_is_ignored(folder, warnings_of, monkeypatch):
    put(folder, b"not json")
    monkeypatch.setattr(os, "rename", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EBUSY, "busy")))
    store = TimingStore(folder, MADE)
    assert store.get("key") is None
    store.add_window("key", window())
    assert TimingStore(folder, MADE).get("key") == Record((window(),))
    assert len(warnings_of()) == 1


def test_a_file_spoilt_under_way_costs_nothing_that_memory_has(store, folder):
    store.add_window("key", window())
    store.path.write_bytes(store.path.read_bytes()[:-20])
    store.add_window("other", window())
    assert set(TimingStore(folder, MADE).records()) == {"key", "other"}


def test_a_bad_record_costs_that_record(folder, warnings_of):
    good = Record((window(),), {"flex": "wrong"}).to_dict()
    first = good["windows"][0]
    bad = {
        "nan": {**good, "windows": [{**first, "seconds": {"native": "NaN"}}]},
        "negative": {**good, "windows": [first, {**first, "ended": -5}]},
        "huge": {**good, "windows": [{**first, "turns": 10**4000}]},
        "fields": {"windows": []},
        "type": [good],
        "escape \x1b[2J": good,
        "\ud800": good,
        "": good,
    }
    put(folder, whole({**bad, "good": good}))
    store = TimingStore(folder, MADE)
    assert store.records() == {"good": Record((window(),), {"flex": "wrong"})}
    assert len(warnings_of()) == 1
    assert "8 records" in warnings_of()[0]
    assert list(folder.glob("*.bad-*")) == []
    store.add_window("more", window())
    assert set(json.loads(store.path.read_bytes())["records"]) == {"good", "more"}


def test_a_file_cut_off_anywhere_is_never_read_as_another(tmp_path):
    store = TimingStore(tmp_path, MADE)
    record = store.add_window("key", Window(123.0, "run", {"native": 1.25, "flex": 12.5}, 11))
    content = store.path.read_bytes()
    for length in range(len(content)):
        store.path.write_bytes(content[:length])
        found = TimingStore(tmp_path, MADE).records()
        assert found == {} or (found == {"key": record} and content[length:] == b"\n")
        for path in tmp_path.glob("*.bad-*"):
            path.unlink()


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEY, WINDOW = ("records", "key"), ("records", "key", "windows", 0)
PLACES = (
    *((), ("format",), ("fingerprint",), ("fingerprint", "threads"), ("fingerprint", "packages"), ("records",)),
    *(KEY, (*KEY, "windows"), (*KEY, "faults"), (*KEY, "faults", "flex")),
    *(WINDOW, *((*WINDOW, name) for name in ("ended", "run", "turns", "seconds")), (*WINDOW, "seconds", "native")),
)


def with_other(data, place, value):
    if not place:
        return value
    data = list(data) if isinstance(data, list) else dict(data)
    data[place[0]] = with_other(data[place[0]], place[1:], value)
    return data


@settings(max_examples=100, deadline=None)
@given(place=st.sampled_from(PLACES), value=anything)
def test_any_json_in_any_place_is_refused_or_sound(place, value):
    sound = Record((window(1), window(2)), {"flex": "wrong"})
    data = whole({"key": sound.to_dict(), "other": sound.to_dict()})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        put(folder, with_other(data, place, value))
        store = TimingStore(folder, MADE)
        for key, record in store.records().items():
            assert isinstance(key, str)
            assert Record.read(json.loads(record.text)) == record
            assert record.winner() in {None, "native", "flex", *record.seconds()}
        whole_is_json = not {"Infinity", "NaN"} & set(re.findall(r"\w+", json.dumps(value)))
        if place[:2] == ("records", "key") and whole_is_json:
            assert store.get("other") == sound
        store.add_window("new", window(3))
        assert TimingStore(folder, MADE).records() == store.records()


# Folders and tables


def test_a_table_is_for_machines_like_the_one_it_was_made_on(tmp_path, warnings_of):
    record = Record((window(1), window(20)))
    (tmp_path / "a.json").write_bytes(table(MADE, {"key": record, "two": record}))
    (tmp_path / "b.json").write_bytes(table(MADE, {"two": Record((window(40),))}))
    (tmp_path / "README.md").write_text("not a table")
    like = dataclasses.replace(MADE, torch="2.13.9+cpu", driver="9", packages=())
    found = shipped_for(like, tmp_path)
    assert found["key"] == record
    assert [one.ended for one in found["two"].windows] == [1, 20, 40]
    for change in ({"device": "B"}, {"architecture": "arm64"}, {"torch": "2.14.0"}, {"threads": 4}):
        assert shipped_for(dataclasses.replace(like, **change), tmp_path) == {}
    assert warnings_of() == []
    store = TimingStore(None, like, found)
    assert store.shipped("key").winner() == "native"
    assert store.shipped("other") is None
    assert store.get("key") is None


def test_a_spoilt_table_is_left_out_with_a_warning(tmp_path, warnings_of):
    for number, content in enumerate((b"", b"[]", b"[" * 200_000, json.dumps(whole()).encode())):
        (tmp_path / f"{number}.json").write_bytes(content)
    good = json.loads(table(MADE, {"key": Record((window(),)), "bad": Record((window(),))}))
    good["records"]["bad"]["windows"] = None
    (tmp_path / "good.json").write_text(json.dumps(good))
    (tmp_path / "other.json").write_text(json.dumps({**good, "fingerprint": {}}))
    assert set(shipped_for(MADE, tmp_path)) == {"key"}
    assert len(warnings_of()) == 4
    assert shipped_for(MADE, tmp_path / "none") == {}


def test_the_tables_of_the_package_are_sound(warnings_of):
    folder = Path(timings.__file__).parent / "tables"
    assert folder.is_dir()
    assert isinstance(shipped_for(MADE), type(shipped_for(MADE, folder)))
    assert warnings_of() == []
