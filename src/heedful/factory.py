"""The registry of strategies: what was found by scanning packages and entry points, and what was registered by name.

Called on the class, every method works on the process's default registry; an instance is a registry of its own.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
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
        self._loaded = self._under_way = False
        self._loading = threading.RLock()
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
        made = self._made.get(name)
        if type(made) is not self._classes[name]:  # none yet, or one that another thread made of a replaced class
            made = self._made[name] = self._make(name)
        return made

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
        if not (inspect.isclass(strategy) and issubclass(strategy, AttentionStrategy)):
            raise RegistrationError(f"strategy {name!r}: got {strategy!r}; give a subclass of AttentionStrategy")
        if inspect.isabstract(strategy):
            raise RegistrationError(f"strategy {name!r}: {strategy.__name__} does not implement compute_attention")
        words = (name, *strategy.aliases)
        for word in words:
            if not isinstance(word, str) or not word or word == "auto":
                raise RegistrationError(f"name or alias: got {word!r}; give a non-empty name other than 'auto'")
        taken = [word for word in words if word in self._classes or word in self._aliases]
        if taken and not replace:
            raise RegistrationError(f"strategy {name!r}: {taken[0]!r} is taken; pass replace=True to take it over")
        for word in words:
            if word in self._classes:
                self._forget(word)
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
        with self._loading:  # another thread's first call waits; a plug-in that registers as it is imported passes
            if self._loaded or self._under_way:
                return
            self._under_way = True
            try:
                self._scan()
                self._loaded = True
            except BaseException:
                self._classes, self._aliases, self._made = {}, {}, {}  # the next call finds it as this one did
                raise
            finally:
                self._under_way = False

    def _scan(self) -> None:
        for package in self.packages:
            for strategy in _in_package(package):
                self._add(strategy.name, strategy)
        for point in entry_points(group=GROUP) if self.plugins else ():
            try:
                for strategy in _in_entry_point(point):
                    self._add(getattr(strategy, "name", "") or point.name, strategy)
            except Exception as error:
                text = f"heedful plug-in {point.name!r} ({point.value}) cannot be loaded: {error!r}"
                warnings.warn(text, stacklevel=2)


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


def _in_entry_point(point: EntryPoint) -> Iterable[type[AttentionStrategy]]:
    """The strategy that an installed plug-in names, or all those in the module that it names."""
    loaded = point.load()
    return _in_module(loaded) if isinstance(loaded, ModuleType) else (loaded,)
