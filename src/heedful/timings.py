"""The store of measured times: one JSON file for each fingerprint, shared by processes, in memory for ``get``.

What ``add_window`` was given is on the disk once it returns, unless ``unsaved`` names its class. What is read is
checked field by field; what cannot be read is set aside with one warning. Where the disk cannot be used, memory is,
with one warning, and the next write brings what was kept.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import stat
import threading
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from heedful.errors import InvalidArgument
from heedful.fingerprint import Fingerprint
from heedful.records import Record, Window, as_line, name_of, settled

__all__ = ["Record", "TimingStore", "Window", "settled", "shipped_for", "table", "this_run"]

FORMAT = 1  # a new one needs new file names, too: two versions of heedful would set each other's files aside
MOST_READ = 16 << 20  # bytes
MOST_WRITTEN = MOST_READ // 2  # the oldest classes go before a file grows so large that it is not read any more
_LEFTOVER = re.compile(r"[0-9a-f]{16}\.[0-9a-f]{32}\.tmp")
_OLD = 3600.0  # seconds, after which a temporary file's writer is dead
_READ = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
_log = logging.getLogger("heedful")
_runs: dict[int, str] = {}

Records = dict[str, Record]


class TimingStore:
    """The records of one fingerprint, by the key of a class of problems. Safe among threads and processes.

    ``folder`` None keeps them in memory. ``shipped``: first guesses, from ``shipped_for``. ``patience``: seconds to
    wait for another process's lock; after one wait in vain the next ones are short, until the lock was had again.
    """

    def __init__(
        self,
        folder: Path | None,
        fingerprint: Fingerprint,
        shipped: Mapping[str, Record] | None = None,
        *,
        patience: float = 5.0,
    ) -> None:
        self.fingerprint = fingerprint
        self.path = None if folder is None else Path(os.path.abspath(folder), f"{fingerprint.digest}.json")
        self._shipped = dict(shipped or {})
        self._patience, self._waited_in_vain = patience, False
        self._records: Records = {}  # replaced, never changed: readers take no lock
        self._pending: Records = {}  # what the file lacks; replaced, never changed
        self._seen: tuple[bytes | None, Records] = None, {}  # what the file last was: it need not be parsed again
        self._gone: set[str | None] = set()  # what the file still has; None stands for everything
        self._loaded = self._tidied = False
        self._warned: set[str] = set()
        self._mutex, self._process = threading.RLock(), os.getpid()
        if str(folder).startswith("~"):  # what is left of it where there is no home
            self.path = None
            self._warn("write", f"{folder}: this user has no home folder: times are kept in memory")

    def get(self, key: str) -> Record | None:
        """What is known of a class. From memory; the file is read at first use."""
        if not self._loaded:
            self._load()
        return self._records.get(key)

    def records(self) -> Mapping[str, Record]:
        """Everything known, as of now."""
        if not self._loaded:
            self._load()
        return MappingProxyType(self._records)

    def shipped(self, key: str) -> Record | None:
        """What heedful's own tables say of a class, measured on a machine like this one."""
        return self._shipped.get(key)

    @property
    def unsaved(self) -> frozenset[str]:
        """The classes of which memory alone has the last windows or faults. Empty: all that was added is durable."""
        return frozenset(self._pending)

    def add_window(self, key: str, window: Window) -> Record:
        """Add a window, and all that other processes wrote meanwhile. Raises InvalidArgument for a malformed one.

        It is durable once this returns, unless ``unsaved`` has the key. Costs two fsyncs.
        """
        try:
            news = Record((Window.read(window.to_dict()),))
        except ValueError as error:
            raise InvalidArgument("window", repr(window), str(error)) from None
        return self._add(key, news)

    def add_fault(self, key: str, label: str, reason: str) -> Record:
        """Quarantine a candidate for a class; see ``add_window``."""
        try:
            news = Record((), {name_of(label): as_line(reason)})
        except ValueError as error:
            raise InvalidArgument("label", repr(label), str(error)) from None
        return self._add(key, news)

    def forget(self, key: str | None = None) -> None:
        """Delete one class, or all of this fingerprint, here and in the file."""
        with self._exclusively():
            self._load()
            if key is None:
                self._pending, self._records = {}, {}
            else:
                self._pending, self._records = _without(self._pending, {key}), _without(self._records, {key})
            self._gone.add(key)
            self._save()

    def save(self) -> bool:
        """Try again to write what is in memory alone; whether nothing is any more."""
        with self._exclusively():
            if self._pending or self._gone:
                self._save()
            return not (self._pending or self._gone)

    def _add(self, key: str, news: Record) -> Record:
        try:
            name_of(key)
        except ValueError as error:
            raise InvalidArgument("key", repr(key), str(error)) from None
        with self._exclusively():
            self._load()
            self._pending = _joined(self._pending, {key: news})
            self._records = _joined(self._records, {key: news})
            self._save()
            return self._records.get(key, news)

    @contextlib.contextmanager
    def _exclusively(self) -> Iterator[None]:
        if self._process != os.getpid():  # forked: a thread that is not here may have held it
            self._mutex, self._process = threading.RLock(), os.getpid()
        with self._mutex:
            yield

    def _load(self) -> None:
        with self._exclusively():
            if self._loaded:
                return
            try:
                self._records = self._read() if self.path else {}
            except _Unfit:
                self._save()  # looks again, under the lock: another process may have mended it
            except OSError as error:
                self._warn("read", f"{self.path} cannot be read ({error}): times are kept in memory")
            self._loaded = True

    def _save(self) -> None:
        """Merge what memory alone has into the file. What cannot be written stays pending."""
        if self.path is None:
            self._gone = set()
            return
        try:
            with self._locked(self.path):
                known, fit = self._read_or_set_aside(self.path)
                kept = {} if None in self._gone else _without(known, self._gone)
                merged, text = self._as_text(_joined(kept, self._pending))
                if not merged:
                    self.path.unlink(missing_ok=True)
                elif self._pending or self._gone or not fit:
                    _replace(self.path, text)
                    self._seen = text, merged
                self._tidy(self.path.parent)
        except OSError as error:
            self._warn("write", f"{self.path} cannot be written ({error}): times are kept in memory until it can")
            return
        self._records, self._pending, self._gone = merged, {}, set()

    @contextlib.contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        from filelock import FileLock

        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))
        try:
            lock.acquire(
                timeout=min(self._patience, 0.05) if self._waited_in_vain else self._patience, poll_interval=0.01
            )
        except TimeoutError:
            self._waited_in_vain = True
            raise
        except RuntimeError as error:  # no locks on this file system, or a signal handler while this thread waits
            raise OSError(errno.ENOLCK, str(error)) from error
        self._waited_in_vain = False
        try:
            yield
        finally:
            lock.release()

    def _read(self) -> Records:
        """What the file has. Raises _Unfit, and OSError for what may pass."""
        content = _content(self.path) if self.path else None
        if content is None:
            return {}
        if content == self._seen[0]:
            return self._seen[1]
        data = _parsed(content)
        if data.get("fingerprint") != self.fingerprint.to_dict():
            raise _Unfit("it is of another fingerprint")
        records, bad = _checked(data)
        if bad:
            self._warn("records", f"{self.path}: {len(bad)} records are malformed and left out, the first: {bad[0]}")
        self._seen = content, records
        return records

    def _read_or_set_aside(self, path: Path) -> tuple[Records, bool]:
        """What the file has, and whether it was fit; memory knows what an unfit one had. Under the lock only."""
        try:
            return self._read(), True
        except _Unfit as reason:
            aside = path.with_name(f"{path.name}.bad-{time.time_ns()}")
            try:
                path.rename(aside)
            except OSError as error:
                self._warn("unfit", f"{path} is ignored, {reason}; it cannot be moved away ({error})")
            else:
                self._warn("unfit", f"{path} is ignored, {reason}; it is now {aside.name}")
            return self._records, False

    def _as_text(self, records: Records) -> tuple[Records, bytes]:
        """Records in the file's form, without the oldest classes where all of them would be too much."""
        while len(text := _text(self.fingerprint, records)) > MOST_WRITTEN and records:
            oldest = sorted(records, key=lambda key: (bool(records[key].faults), records[key].newest))
            self._warn("full", f"{self.path} is full: the classes that were measured longest ago are dropped")
            records = _without(records, set(oldest[: 1 + len(oldest) // 8]))
        return records, text

    def _tidy(self, folder: Path) -> None:
        """Remove what killed writers left, once."""
        if self._tidied:
            return
        self._tidied = True
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if _LEFTOVER.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    with contextlib.suppress(OSError):
                        if time.time() - entry.stat(follow_symlinks=False).st_mtime > _OLD:
                            os.unlink(entry.path)

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            _log.warning("%s", text)


class _Place(Protocol):
    """Of ``importlib.resources``' Traversable what is used here; a Path is one."""

    name: str

    def is_dir(self) -> bool: ...
    def iterdir(self) -> Iterator[Any]: ...


def this_run() -> str:
    """This process's name among those that measure; a forked one has its own."""
    return _runs.setdefault(os.getpid(), uuid.uuid4().hex)


def table(fingerprint: Fingerprint, records: Mapping[str, Record]) -> bytes:
    """A file for ``shipped_for``: a store's, with what a machine must have in common with this one."""
    return _text(fingerprint, records, matches=fingerprint.likeness)


def shipped_for(fingerprint: Fingerprint, folder: _Place | None = None) -> Mapping[str, Record]:
    """What heedful's own tables say for machines like this one: first guesses, never measurements of this machine.

    ``folder``: other tables than those in the package.
    """
    found: Records = {}
    place: Any = resources.files("heedful") / "tables" if folder is None else folder
    if not place.is_dir():
        return MappingProxyType(found)
    for file in sorted((one for one in place.iterdir() if one.name.endswith(".json")), key=lambda one: one.name):
        try:
            data = _parsed(file.read_bytes())
            Fingerprint.from_dict(data.get("fingerprint"))
        except (OSError, ValueError) as error:
            _log.warning("%s is no table of times: %s", file.name, error)
            continue
        if data.get("matches") == fingerprint.likeness:
            found = _joined(found, _checked(data)[0])
    return MappingProxyType(found)


class _Unfit(ValueError):
    """What a file holds is none of ours, or no more."""


def _content(path: Path) -> bytes | None:
    """The bytes of an ordinary file, None where there is none. Raises _Unfit, and OSError for what may pass."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise _Unfit("it is no ordinary file")
        handle = os.open(path, _READ)
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise _Unfit(f"it may not be read ({error})") from error
    with os.fdopen(handle, "rb") as file:
        content = file.read(MOST_READ + 1)
    if len(content) > MOST_READ:
        raise _Unfit(f"it is larger than {MOST_READ >> 20} MiB")
    return content


def _parsed(content: bytes) -> dict[str, Any]:
    """The table that a file is. Raises _Unfit."""
    try:
        data = json.loads(content.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _Unfit(f"it is no JSON ({as_line(str(error))[:100]})") from None
    if not isinstance(data, dict) or not isinstance(data.get("records"), dict):
        raise _Unfit("it is no table of records")
    if type(data.get("format")) is not int or data["format"] != FORMAT:
        raise _Unfit(f"its format is not {FORMAT}")
    return data


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _checked(data: dict[str, Any]) -> tuple[Records, list[str]]:
    """The sound records of a table, and what is wrong with the others."""
    records, bad = {}, []
    for key, one in data["records"].items():
        try:
            records[name_of(key)] = Record.read(one)
        except ValueError as error:
            bad.append(as_line(str(error)))
    return records, bad


def _joined(known: Mapping[str, Record], newer: Mapping[str, Record]) -> Records:
    return {**known, **{key: known.get(key, Record()).joined(record) for key, record in newer.items()}}


def _without(records: Records, keys: Collection[str | None]) -> Records:
    return {key: record for key, record in records.items() if key not in keys}


def _text(fingerprint: Fingerprint, records: Mapping[str, Record], **more: Any) -> bytes:
    head = json.dumps({"format": FORMAT, "fingerprint": fingerprint.to_dict(), **more})
    body = ",\n".join(f"{json.dumps(key)}:{record.text}" for key, record in records.items())
    return f'{head[:-1]},"records":{{\n{body}\n}}}}\n'.encode()


def _replace(path: Path, content: bytes) -> None:
    """Put a file in place, whole or not at all, and on the disk when this returns."""
    temporary = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.tmp")
    try:
        with os.fdopen(os.open(temporary, _CREATE, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there; the system keeps renames in its journal
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that know no such thing
            raise
    finally:
        os.close(handle)
