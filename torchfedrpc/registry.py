"""Registries by name: trainers, learners, data sets, models, partitions, aggregators and execution modes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torchfedrpc.errors import ConfigError, suggest

T = TypeVar("T", bound=Callable[..., Any])


class Registry(Generic[T]):
    """Registry of one kind of class or function by name.

    Args:
        kind: Name of the kind in error messages.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}
        self._modules: dict[str, str] = {}  # name -> module that registers it on import

    def provide(self, name: str, module: str) -> None:
        """Name the module that registers a name; it is imported at the first lookup of the name."""
        self._modules[name] = module

    def register(self, name: str) -> Callable[[T], T]:
        """Decorate a class or function to register it under a name.

        Raises:
            ConfigError: If another class or function has that name. The same definition may be registered again, for
                example when its module is reloaded, or when the script is imported as well; the later one is kept.
        """

        def decorate(entry: T) -> T:
            if self._modules.get(name) != entry.__module__:
                self._import(name)
            known = self._entries.get(name)
            if known is not None and not _is_defined_as(known, entry):
                raise ConfigError(
                    f"the {self.kind} {name!r} is registered already, by {known.__module__}.{known.__qualname__}: "
                    f"choose another name for {entry.__module__}.{entry.__qualname__}"
                )
            self._entries[name] = entry
            return entry

        return decorate

    def get(self, name: str) -> T:
        """Return the class or function of a name.

        Raises:
            ConfigError: If there is no such name; the message lists the known ones.
        """
        self._import(name)
        try:
            return self._entries[name]
        except KeyError:
            raise ConfigError(f"no {self.kind} named {name!r}{suggest(name, self.names())}") from None

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted({*self._entries, *self._modules})

    def name_of(self, entry: object) -> str | None:
        """Return the name of a class or function; None if it has none, or its module has not been imported."""
        return next((name for name, known in self._entries.items() if known is entry), None)

    def _import(self, name: str) -> None:
        if (module := self._modules.get(name)) is not None:
            importlib.import_module(module)  # thread-safe: Python's import lock blocks a second thread


def _is_defined_as(known: Any, entry: Any) -> bool:
    """Return whether two entries come from one definition: one name in one module, or in two modules of one file.

    Workers import the script as ``__mp_main__``, which is a second module of the script's file.
    """
    given = {known.__module__, entry.__module__}
    modules = {"__main__" if module == "__mp_main__" else module for module in given}
    files = {getattr(sys.modules.get(module), "__file__", None) for module in given}
    return known.__qualname__ == entry.__qualname__ and (len(modules) == 1 or (len(files) == 1 and None not in files))


trainers: Registry[Any] = Registry("trainer")
learners: Registry[Any] = Registry("learner")
datasets: Registry[Any] = Registry("dataset")
models: Registry[Any] = Registry("model")
partitions: Registry[Any] = Registry("partition")
aggregators: Registry[Any] = Registry("aggregator")
cohorts: Registry[Any] = Registry("cohort")
executors: Registry[Any] = Registry("execution mode")

trainer = trainers.register
learner = learners.register
dataset = datasets.register
model = models.register
partition = partitions.register
aggregator = aggregators.register
cohort = cohorts.register
executor = executors.register
get_trainer = trainers.get
get_learner = learners.get
