"""JSON files: written whole or not at all, and whatever else lies there refused, with the file's name."""

import errno
import json
import math
import os

import pytest

from heedful import InvalidArgument
from heedful.files import read_json, write_json

GOOD = {"format": 1, "kind": "thing", "value": [1, "ü", None]}


def read(path, made=lambda data: data["value"]):
    return read_json(path, "thing", 1, made)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a thing.json"


def test_what_is_written_is_read_back(path):
    write_json(path, GOOD)
    assert read(path) == [1, "ü", None]
    write_json(path, {**GOOD, "value": 2})
    assert read(path) == 2
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(path, monkeypatch, step):
    write_json(path, GOOD)
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {**GOOD, "value": 3})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("value", [math.nan, math.inf, object()])
def test_what_json_does_not_have_is_not_written(path, value):
    with pytest.raises((ValueError, TypeError)):
        write_json(path, {**GOOD, "value": value})
    assert list(path.parent.iterdir()) == []


def test_a_folder_that_is_not_there_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_json(tmp_path / "absent" / "file.json", GOOD)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"3", b"null", b'"thing"', b"{}", b"\xff\xfe{}", b"\0", b"[" * 200_000,
        b'{"a":' * 200_000, json.dumps({**GOOD, "format": 2}).encode(), json.dumps({**GOOD, "kind": "lock"}).encode(),
        b'{"format": 1, "kind": "thing"}', b'{"format": 1, "kind": "thing", "value": NaN}',
        b'{"format": 1, "kind": "thing", "value": -Infinity}',
        b'{"format": 1, "kind": "thing", "value": ' + b"9" * 10_000 + b"}",
    ],
    ids=range(17),
)  # fmt: skip
def test_hostile_content_is_refused_naming_the_file(path, content):
    path.write_bytes(content)
    with pytest.raises(InvalidArgument, match=r"thing: got .*a thing\.json; it cannot be read \(.+\)"):
        read(path)


@pytest.mark.parametrize(
    "error", [ValueError("odd"), KeyError("odd"), TypeError("odd"), AttributeError("odd"), OverflowError("odd")]
)
def test_what_wrong_data_raises_is_told_with_the_file(path, error):
    write_json(path, GOOD)

    def made(_):
        raise error

    with pytest.raises(InvalidArgument, match=r"a thing\.json; it cannot be read \('?odd'?\)"):
        read(path, made)


def test_a_fault_of_ours_passes_through(path):
    write_json(path, GOOD)

    def made(_):
        raise NotImplementedError

    with pytest.raises(NotImplementedError):
        read(path, made)


def test_no_file_a_folder_and_a_pipe_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("absent", ".", "pipe"):
        with pytest.raises(InvalidArgument, match="there is no such file"):
            read(tmp_path / name)


def test_a_giant_is_not_read(path):
    with path.open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(InvalidArgument, match="more than 64 MiB"):
        read(path)
