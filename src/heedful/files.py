"""Files of JSON: written whole or not at all, and read with every surprise told as one error.

For what a user names a path for: locks, traces, reports. The store of times has rules of its own, see ``timings``.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from heedful.errors import HeedfulError, InvalidArgument

T = TypeVar("T")
_MOST_BYTES = 64 * 2**20
_SURPRISES = (
    OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, HeedfulError,
)  # fmt: skip


def write_json(path: Path, data: Any) -> None:
    """Write it whole, or leave what was there.

    Raises OSError where it cannot be written, and InvalidArgument for what JSON cannot hold.
    """
    try:
        text = json.dumps(data, indent=1, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:  # an option of a call that JSON has no form for
        remedy = f"leave out calls with such options; nothing was written to {path}"
        raise InvalidArgument("options", str(error), remedy) from error
    name = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with os.fdopen(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        name.unlink(missing_ok=True)
        raise


def read_json(path: Path, what: str, form: int, made: Callable[[dict[str, Any]], T]) -> T:
    """``made`` of what a file holds. Raises InvalidArgument, naming the file, for one that is no ``what`` of ``form``.

    ``made`` may raise whatever wrong data makes it raise.
    """
    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES >> 20} MiB")
        data = json.loads(path.read_text("utf-8"), parse_constant=_no_constant)
        if not isinstance(data, dict) or data.get("format") != form or data.get("kind") != what:
            raise ValueError(f"it is no {what} of format {form}")
        return made(data)
    except _SURPRISES as error:
        told = str(error) or type(error).__name__
        raise InvalidArgument(what, str(path), f"it cannot be read ({told}); give a file that heedful wrote") from error


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")
