"""Data of a run for its hosts: how to make a learner, the seed, and the limits."""

from __future__ import annotations

import functools
import importlib
import os
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError
from torchfedrpc.host.attributes import not_state_of
from torchfedrpc.interactive import show_names
from torchfedrpc.registry import get_learner
from torchfedrpc.wire.allowlist import AllowList

_REMEDY = "define it at the top level of a module or of the script, or register a class with @tfr.learner(name)"


@dataclass(frozen=True)
class LearnerSpec:
    """How to make learners, as plain data that can be sent to another process.

    Attributes:
        module: Module that defines the learner's class or factory.
        qualname: Its name there.
        seed: The run's seed.
        runtime: The run's configuration.
        stateless: Whether no call leaves anything in a learner that a later call needs.
        taken_names: See `hidden_methods`. Used if a factory makes the learners, whose class is unknown before.
    """

    module: str
    qualname: str
    seed: int
    runtime: RuntimeConfig
    stateless: bool = False
    taken_names: Mapping[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, learner: Callable[..., Any] | str, seed: int, runtime: RuntimeConfig
    ) -> tuple[LearnerSpec, dict[str, Any]]:
        """Return how another process can make this learner.

        Args:
            learner: A class, a factory function, a `functools.partial` of one with keyword arguments, or a
                registered name.
            seed: The run's seed.
            runtime: The run's configuration.

        Returns:
            The spec, and the partial's keyword arguments.

        Raises:
            ConfigError: If it cannot be found by its name (a lambda, a closure), is not callable, has a
                ``not_state`` that is no collection of names, or a ``stateless`` that is no bool.
        """
        show_names()
        entry: Any = get_learner(learner) if isinstance(learner, str) else learner
        stateless = getattr(entry, "stateless", None)
        kwargs: dict[str, Any] = {}
        if isinstance(entry, functools.partial):
            if entry.args:
                raise ConfigError(
                    "a functools.partial as learner may have keyword arguments only: "
                    "the first positional one is the client id"
                )
            entry, kwargs = entry.func, dict(entry.keywords)
            stateless = getattr(entry, "stateless", None) if stateless is None else stateless
        module, qualname = getattr(entry, "__module__", None), getattr(entry, "__qualname__", None)
        if not callable(entry) or module is None or qualname is None:
            raise ConfigError(f"a learner must be a class, a factory function or a registered name, not {entry!r}")
        if "<" in qualname:
            raise ConfigError(
                f"the learner {module}.{qualname} is a lambda or is defined inside a function, so that no worker "
                f"could find it: {_REMEDY}"
            )
        not_state_of(entry)
        if not isinstance(stateless, bool | None):
            raise ConfigError(
                f"{qualname}.stateless is True or False, not {stateless!r:.200}: True promises that no call leaves "
                f"anything in the learner that a later call needs"
            )
        spec = cls(module, qualname, seed, runtime, stateless=bool(stateless))
        if spec.load() is not entry:
            raise ConfigError(f"the learner's name {module}.{qualname} leads to another object: {_REMEDY}")
        return spec, kwargs

    @property
    def name(self) -> str:
        """Full name of the class or factory."""
        return f"{self.module}.{self.qualname}"

    def load(self) -> Callable[..., Any]:
        """Return the class or factory.

        Raises:
            ConfigError: If this process has no such module or name.
        """
        try:
            found: Any = sys.modules.get(self.module) or importlib.import_module(self.module)
            for part in self.qualname.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"cannot find the learner {self.module}.{self.qualname} ({error}) on {socket.gethostname()} in "
                f"{os.getcwd()}: start a worker in the folder that has the module, or {_REMEDY}"
            ) from error
        factory: Callable[..., Any] = found
        return factory

    def allow_list(self) -> AllowList:
        """Return the types that may travel in this run."""
        return AllowList([self.module, *self.runtime.trusted_modules])

    def to_message(self) -> dict[str, Any]:
        """Convert to plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> LearnerSpec:
        """Return the spec that `to_message` has converted."""
        return cls(**{**message, "runtime": RuntimeConfig(**message["runtime"])})
