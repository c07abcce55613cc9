"""Names for trainers, learners and execution modes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torchfedrpc.errors import ConfigError, suggest

T = TypeVar("T", bound=Callable[..., Any])


class Registry(Generic[T]):
    """One kind of thing by name.

    Args:
        kind: what error messages call it.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}
        self._modules: dict[str, str] = {}  # name -> the module that registers it, not imported yet

    def provide(self, name: str, module: str) -> None:
        """Have a module imported once somebody asks for the name, which it registers."""
        self._modules[name] = module

    def register(self, name: str) -> Callable[[T], T]:
        """Decorate a class or function to give it a name.

        Raises:
            ConfigError: another object has that name (the same one, imported anew, takes its own place).
        """

        def decorate(entry: T) -> T:
            if self._modules.get(name) != entry.__module__:
                self._import(name)
            known = self._entries.get(name)
            if known is not None and known.__qualname__ != entry.__qualname__:
                raise ConfigError(
                    f"the {self.kind} {name!r} is registered already, by {known.__module__}.{known.__qualname__}: "
                    f"choose another name for {entry.__module__}.{entry.__qualname__}"
                )
            self._entries[name] = entry
            return entry

        return decorate

    def get(self, name: str) -> T:
        """Look a name up.

        Raises:
            ConfigError: no such name; the known ones are listed.
        """
        self._import(name)
        try:
            return self._entries[name]
        except KeyError:
            raise ConfigError(f"no {self.kind} named {name!r}{suggest(name, self.names())}") from None

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted({*self._entries, *self._modules})

    def _import(self, name: str) -> None:
        if (module := self._modules.get(name)) is not None:
            importlib.import_module(module)  # where another thread does so, too, Python has one wait for the other


trainers: Registry[Any] = Registry("trainer")
learners: Registry[Any] = Registry("learner")
executors: Registry[Any] = Registry("execution mode")

trainer = trainers.register
learner = learners.register
executor = executors.register
get_trainer = trainers.get
get_learner = learners.get
