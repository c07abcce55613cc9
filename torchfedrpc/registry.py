"""Names for trainers, learners and execution modes."""

from __future__ import annotations

import importlib
import sys
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
            ConfigError: another class or function has that name. The same one may be registered again, as where its
                module is reloaded, or is the script and is imported as well; the later one is kept.
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


def _is_defined_as(known: Any, entry: Any) -> bool:
    """Whether two entries come from one definition: one name in one module, or in one file that two modules are.

    Such a file is the script, which workers import as ``__mp_main__``.
    """
    given = {known.__module__, entry.__module__}
    modules = {"__main__" if module == "__mp_main__" else module for module in given}
    files = {getattr(sys.modules.get(module), "__file__", None) for module in given}
    return known.__qualname__ == entry.__qualname__ and (len(modules) == 1 or (len(files) == 1 and None not in files))


trainers: Registry[Any] = Registry("trainer")
learners: Registry[Any] = Registry("learner")
executors: Registry[Any] = Registry("execution mode")

trainer = trainers.register
learner = learners.register
executor = executors.register
get_trainer = trainers.get
get_learner = learners.get
