"""What one worker is to verify: a strategy on a device, by which checks. It goes to the worker as JSON."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from heedful.errors import InvalidArgument
from heedful.factory import AttentionStrategyFactory
from heedful.strategy import AttentionStrategy
from heedful.verify.choice import Choice, Size


@dataclass(frozen=True)
class Job:
    """``backend``: a registered name or alias; or ``plugin``: ``module:Class`` of somebody's own strategy.

    ``device``: torch's name for it. ``seed``: of the tensors that are drawn. ``threads``: of torch on the CPU.
    ``done``: how many of the checks were made by the workers before.
    """

    backend: str = ""
    plugin: str = ""
    device: str = "cpu"
    size: Size = "usual"
    dtypes: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    seed: int = 0
    threads: int = 1
    done: int = 0

    @property
    def name(self) -> str:
        """What to call it before it is known."""
        return self.backend or self.plugin

    @property
    def choice(self) -> Choice:
        """Which checks."""
        return Choice(self.size, tuple(getattr(torch, name) for name in self.dtypes), self.only)

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Job:
        """The inverse of ``to_dict``."""
        return cls(**{**data, "dtypes": tuple(data["dtypes"]), "only": tuple(data["only"])})

    def strategy(self) -> type[AttentionStrategy] | str:
        """The class of the plug-in, imported; or the registered name. Raises InvalidArgument."""
        return plugin_class(self.plugin) if self.plugin else self.backend


def plugin_class(text: str) -> type[AttentionStrategy]:
    """The class that ``module:Class`` names. Raises InvalidArgument where it is none, or no strategy."""
    module, _, name = text.partition(":")
    if not (name and all(word.isidentifier() for word in (*module.split("."), *name.split(".")))):
        raise InvalidArgument("plugin", repr(text), "give module:Class, such as my_package.attention:MyStrategy")
    try:
        found: Any = importlib.import_module(module)
        for word in name.split("."):
            found = getattr(found, word)
    except Exception as error:  # its import may raise anything, and that is what the user has to see
        told = f"it cannot be imported ({type(error).__name__}: {error})"
        raise InvalidArgument("plugin", repr(text), f"{told}; run it where `import {module}` works") from error
    if not (inspect.isclass(found) and issubclass(found, AttentionStrategy)) or inspect.isabstract(found):
        remedy = "give a subclass of heedful.AttentionStrategy that has compute_attention"
        raise InvalidArgument("plugin", f"{text!r}, which is {found!r:.80}", remedy)
    return found


def plugin_name(strategy: type[AttentionStrategy]) -> str:
    """What the contract calls a class."""
    return strategy.name or strategy.__name__


def register(text: str) -> str:
    """Make the class that ``module:Class`` names known to this process; its name. Raises InvalidArgument."""
    found = plugin_class(text)
    AttentionStrategyFactory.register_strategy(plugin_name(found), found, replace=True)
    return plugin_name(found)
