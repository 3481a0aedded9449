"""The registry of strategies: what was found by scanning packages and entry points, and what was registered by name.

Called on the class, every method works on the process's default registry; an instance is a registry of its own.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import entry_points
from types import MappingProxyType, ModuleType
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar
from weakref import WeakMethod

from heedful.errors import RegistrationError, UnknownBackend
from heedful.strategy import AttentionStrategy

GROUP = "heedful.strategies"
P = ParamSpec("P")
R = TypeVar("R")


class _OnDefault(Generic[P, R]):
    """A method that, called on the class, works on the default instance."""

    def __init__(self, function: Callable[Concatenate[AttentionStrategyFactory, P], R]) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    def __get__(
        self, instance: AttentionStrategyFactory | None, owner: type[AttentionStrategyFactory]
    ) -> Callable[P, R]:
        return self.function.__get__(owner.default() if instance is None else instance, owner)  # type: ignore[no-any-return]


class AttentionStrategyFactory:
    """Names to strategy classes. ``packages`` are scanned at first use, then the entry points ``heedful.strategies``.

    ``epoch`` changes with every change, so that plans made before it are not used after it. It is a string, because
    dynamo would turn a changing integer into a symbol.
    """

    _default: AttentionStrategyFactory | None = None

    def __init__(self, packages: Iterable[str] = (GROUP,), *, plugins: bool = True) -> None:
        self.packages = tuple(packages)
        self.plugins = plugins
        self.epoch = "0"
        self._classes: dict[str, type[AttentionStrategy]] = {}
        self._aliases: dict[str, str] = {}
        self._made: dict[str, AttentionStrategy] = {}
        self._loaded = False
        self._watchers: list[WeakMethod[Callable[[], None]]] = []

    def watch(self, changed: Callable[[], None]) -> None:
        """Have a bound method called at every change of the registry, for as long as its object lives."""
        self._watchers.append(WeakMethod(changed))

    def _changed(self) -> None:
        self.epoch = str(int(self.epoch) + 1)
        self._watchers = [watcher for watcher in self._watchers if watcher() is not None]
        for watcher in self._watchers:
            if (changed := watcher()) is not None:
                changed()

    @classmethod
    def default(cls) -> AttentionStrategyFactory:
        """The process's registry."""
        if AttentionStrategyFactory._default is None:
            AttentionStrategyFactory._default = AttentionStrategyFactory()
        return AttentionStrategyFactory._default

    @_OnDefault
    def register_strategy(
        self, name: str, strategy: type[AttentionStrategy], *, replace: bool = False
    ) -> type[AttentionStrategy]:
        """Make a strategy class known by a name. Raises RegistrationError for a taken name, unless ``replace``."""
        self._load()
        self._add(name, strategy, replace=replace)
        return strategy

    @_OnDefault
    def unregister_strategy(self, name: str) -> None:
        """Forget a strategy, with its aliases. Raises UnknownBackend."""
        self._forget(self.resolve(name))
        self._changed()

    @_OnDefault
    def create_strategy(self, name: str) -> AttentionStrategy:
        """A strategy by its name or alias. Raises UnknownBackend with the closest names."""
        name = self.resolve(name)
        return self._made.setdefault(name, self._make(name))

    @_OnDefault
    def resolve(self, name: str, origin: str = "backend") -> str:
        """The strategy name that a name or alias stands for. Raises UnknownBackend; ``origin`` says who asked."""
        self._load()
        if name in self._classes:
            return name
        if name not in self._aliases:
            raise UnknownBackend(name, [*self._classes, *self._aliases, "auto"], origin)
        return self._aliases[name]

    @_OnDefault
    def strategies(self) -> Mapping[str, AttentionStrategy]:
        """All of them, by name; read-only."""
        self._load()
        return MappingProxyType({name: self.create_strategy(name) for name in sorted(self._classes)})

    def _make(self, name: str) -> AttentionStrategy:
        made = self._classes[name]()
        made.__dict__["name"] = name
        return made

    def _add(self, name: str, strategy: Any, *, replace: bool = False) -> None:
        if not isinstance(name, str) or not name or name == "auto":
            raise RegistrationError(f"name: got {name!r}; give a non-empty name other than 'auto'")
        if not (inspect.isclass(strategy) and issubclass(strategy, AttentionStrategy)):
            raise RegistrationError(f"strategy {name!r}: got {strategy!r}; give a subclass of AttentionStrategy")
        if inspect.isabstract(strategy):
            raise RegistrationError(f"strategy {name!r}: {strategy.__name__} does not implement compute_attention")
        words = (name, *strategy.aliases)
        taken = [word for word in words if word in self._classes or word in self._aliases]
        if taken and not replace:
            raise RegistrationError(f"strategy {name!r}: {taken[0]!r} is taken; pass replace=True to take it over")
        if replace and name in self._classes:
            self._forget(name)
        self._classes[name] = strategy
        self._aliases |= dict.fromkeys(strategy.aliases, name)
        self._changed()

    def _forget(self, name: str) -> None:
        del self._classes[name]
        self._made.pop(name, None)
        self._aliases = {alias: target for alias, target in self._aliases.items() if target != name}

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        for package in self.packages:
            for strategy in _in_package(package):
                self._add(strategy.name, strategy)
        for strategy in _in_entry_points() if self.plugins else ():
            self._add(strategy.name, strategy)


def _in_package(package: str) -> Iterator[type[AttentionStrategy]]:
    root = importlib.import_module(package)
    for module in pkgutil.iter_modules(root.__path__):
        yield from _in_module(importlib.import_module(f"{package}.{module.name}"))


def _in_module(module: ModuleType) -> Iterator[type[AttentionStrategy]]:
    """The named, finished strategies that a module defines itself."""
    for value in vars(module).values():
        own = inspect.isclass(value) and issubclass(value, AttentionStrategy) and value.__module__ == module.__name__
        if own and value.name and not inspect.isabstract(value):
            yield value


def _in_entry_points() -> Iterator[type[AttentionStrategy]]:
    """Strategies of installed plug-ins. One that cannot be imported is named in a warning and left out."""
    for point in entry_points(group=GROUP):
        try:
            loaded = point.load()
        except Exception as error:
            warnings.warn(f"heedful plug-in {point.name!r} ({point.value}) cannot be loaded: {error!r}", stacklevel=2)
            continue
        if isinstance(loaded, ModuleType):
            yield from _in_module(loaded)
        else:
            yield loaded
