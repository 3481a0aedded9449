"""The records beside this file, read back; calls bound against them."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def all_records() -> dict[str, dict[str, Any]]:
    """Every record, by the name of its file without the ending."""
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(FOLDER.glob("*.json"))}


def signature_of(record: Mapping[str, Any]) -> inspect.Signature:
    """A record of one function, ``{"parameters": [...]}``, as a signature. Defaults are texts."""
    return inspect.Signature(
        [
            inspect.Parameter(
                entry["name"],
                getattr(inspect.Parameter, entry["kind"]),
                default=inspect.Parameter.empty if entry["default"] is None else entry["default"],
            )
            for entry in record["parameters"]
        ]
    )


def bound_to_record(
    function: Callable[..., Any], record: Mapping[str, Any], told: Callable[[str], object] = lambda _name: None
) -> Callable[..., Any]:
    """The function, whose every call is first bound to the recorded signature: a TypeError where it does not fit.

    ``told`` is handed the function's name at each call that did.
    """
    signature = signature_of(record)

    @functools.wraps(function)
    def bound(*args: Any, **kwargs: Any) -> Any:
        signature.bind(*args, **kwargs)
        told(function.__name__)
        return function(*args, **kwargs)

    return bound
