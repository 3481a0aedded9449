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
from types import ModuleType
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar
from weakref import WeakMethod

from heedful.errors import RegistrationError, UnknownBackend
from heedful.strategy import AttentionStrategy, Pin

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


class Strategies(Mapping[str, AttentionStrategy]):
    """Strategies by name, as of one moment; by aliases that pin something they are made when asked for."""

    def __init__(self, strategies: dict[str, AttentionStrategy], factory: AttentionStrategyFactory) -> None:
        self._strategies, self._factory = strategies, factory

    def __getitem__(self, name: str) -> AttentionStrategy:
        if name in self._strategies:
            return self._strategies[name]
        try:
            return self._factory.create_strategy(name)
        except UnknownBackend:
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._strategies)

    def __len__(self) -> int:
        return len(self._strategies)


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
        self._aliases: dict[str, tuple[str, Pin]] = {}
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
        name = self.resolve(name)
        self._forget(self._aliases.get(name, (name,))[0])
        self._changed()

    @_OnDefault
    def create_strategy(self, name: str) -> AttentionStrategy:
        """A strategy by its name or alias. Raises UnknownBackend with the closest names."""
        name = self.resolve(name)
        target, pin = self._aliases.get(name, (name, Pin()))
        made = self._made.get(name)
        if type(made) is not self._classes[target]:  # none yet, or one that another thread made of a replaced class
            made = self._made[name] = self._make(name, self._classes[target], pin)
        return made

    @_OnDefault
    def resolve(self, name: str, origin: str = "backend") -> str:
        """The strategy's name that a name or alias stands for; an alias that pins something stands for itself.

        Raises UnknownBackend; ``origin`` says who asked.
        """
        self._load()
        if name in self._classes:
            return name
        if name not in self._aliases:
            raise UnknownBackend(name, [*self._classes, *self._aliases, "auto"], origin)
        target, pin = self._aliases[name]
        return target if pin == Pin() else name

    @_OnDefault
    def strategies(self) -> Mapping[str, AttentionStrategy]:
        """All of them, by name; read-only. Aliases that pin something can be looked up as well."""
        self._load()
        return Strategies({name: self.create_strategy(name) for name in sorted(self._classes)}, self)

    def _make(self, name: str, strategy: type[AttentionStrategy], pin: Pin) -> AttentionStrategy:
        made = strategy()
        made.__dict__["name"] = name
        made.pin = pin
        return made

    def _add(self, name: str, strategy: Any, *, replace: bool = False) -> None:
        if not (inspect.isclass(strategy) and issubclass(strategy, AttentionStrategy)):
            raise RegistrationError(f"strategy {name!r}: got {strategy!r}; give a subclass of AttentionStrategy")
        if inspect.isabstract(strategy):
            raise RegistrationError(f"strategy {name!r}: {strategy.__name__} does not implement compute_attention")
        for fault in _faults(strategy):
            raise RegistrationError(f"strategy {name!r}: {fault}")
        words = (name, *strategy.pins())
        for word in words:
            if not isinstance(word, str) or not word or word == "auto":
                raise RegistrationError(f"name or alias: got {word!r}; give a non-empty name other than 'auto'")
        taken = [word for word in words if word in self._classes or word in self._aliases]
        if taken and not replace:
            raise RegistrationError(f"strategy {name!r}: {taken[0]!r} is taken; pass replace=True to take it over")
        for word in words:
            if word in self._classes:
                self._forget(word)
            self._aliases.pop(word, None)
            self._made.pop(word, None)
        self._classes[name] = strategy
        self._aliases |= {alias: (name, pin) for alias, pin in strategy.pins().items()}
        self._changed()

    def _forget(self, name: str) -> None:
        del self._classes[name]
        gone = {name} | {alias for alias, (target, _) in self._aliases.items() if target == name}
        self._made = {word: made for word, made in self._made.items() if word not in gone}
        self._aliases = {alias: known for alias, known in self._aliases.items() if alias not in gone}

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


def _faults(strategy: type[AttentionStrategy]) -> Iterator[str]:
    """What is wrong with the other names of a strategy: they would stand for nothing, or for something else."""
    aliases: Any = strategy.aliases
    if isinstance(aliases, str):
        yield f"aliases: got {aliases!r}; give a tuple of names, or a mapping of names to Pin"
        return
    kinds = {source.kind for source in strategy.sources}
    pins: Mapping[str, Any] = strategy.pins()
    for alias, pin in pins.items():
        if not isinstance(pin, Pin):
            yield f"alias {alias!r}: got {pin!r}; give a Pin"
        elif pin.source and pin.source not in kinds:
            yield f"alias {alias!r}: pins source {pin.source!r}; its sources are {', '.join(sorted(kinds)) or 'none'}"


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
