"""State of the objects that a trainer was given, such as its aggregator, in checkpoints."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from torchfedrpc.errors import ConfigError
from torchfedrpc.federation.trainer_state import has_state_dict, why_not_data

logger = logging.getLogger(__name__)

_NESTED = "in "  # prefix of an attribute that is an object with state of its own
_PLAIN = (bool, int, float, str, type(None))


class PartState:
    """The state of an attribute of a trainer: that of its ``state_dict()`` if it has one, else its own attributes.

    A resume sets them in the object that the user gave, and requires the same class and the same settings: the
    attributes with the names of the constructor's parameters whose values are numbers, texts, or collections of them.

    Args:
        trainer: The trainer.
        name: Name of its attribute: an object, a method of one, a function, or None.
    """

    def __init__(self, trainer: Any, name: str) -> None:
        self.saved: dict[str, Any] = {}
        """The attributes in the last state."""
        self._trainer = trainer
        self._name = name
        self._part: Any = None
        self._settings: dict[str, Any] = {}
        self._warned: set[str] = set()

    def note_settings(self) -> None:
        """Note the settings, once, before a round changes them."""
        part = getattr(self._trainer, self._name)
        if part is not self._part:
            self._part, self._settings = part, _settings_of(part)

    def state_dict(self) -> dict[str, Any]:
        """Return the state. An attribute that cannot be saved is left out, with a warning."""
        self.note_settings()
        state = {"class": _class_of(self._part), "settings": self._settings}
        owner = self._owner()
        if has_state_dict(owner):
            return state | {"own": owner.state_dict()}
        self.saved = self._attributes_to_save(owner)
        return state | {"attributes": self.saved}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state_dict` returned.

        Raises:
            ConfigError: If the object is of another class, or has other settings, than that of the checkpoint.
        """
        self.note_settings()
        remedy = "give it as it was, or begin anew with resume=never"
        if (kind := _class_of(self._part)) != state["class"]:
            was = state["class"]
            raise ConfigError(f"the trainer's {self._name} is {kind}, and was {was} in the checkpoint: {remedy}")
        for name, was in state["settings"].items():
            if (now := self._settings.get(name)) != was:
                difference = f"{name}={now!r:.200}, and had {was!r:.200} in the checkpoint"
                raise ConfigError(f"the trainer's {self._name} has {difference}: {remedy}")
        owner = self._owner()
        if "own" in state:
            owner.load_state_dict(state["own"])
        _restore(owner, state.get("attributes", {}))

    def _owner(self) -> Any:
        """Return the object with the state; None for a function, and a method of the trainer itself."""
        owner = self._part.__self__ if inspect.ismethod(self._part) else self._part
        has_state = owner is not self._trainer and not inspect.isfunction(owner)
        return owner if has_state and not isinstance(owner, functools.partial) else None

    def _attributes_to_save(self, owner: Any) -> dict[str, Any]:
        """Return attribute -> value; of a callable object, such as an aggregator in another one, its attributes."""
        found: dict[str, Any] = {}
        for name, value in _attributes_of(owner).items():
            if callable(value) and not inspect.isroutine(value) and not isinstance(value, type | nn.Module):
                found[_NESTED + name] = self._attributes_to_save(value)
            elif self._can_save(name, value):
                found[name] = value
        return found

    def _can_save(self, name: str, value: Any) -> bool:
        reason = why_not_data(value, self._trainer.trusted_modules)
        if reason is not None and name not in self._warned:
            self._warned.add(name)
            logger.warning(
                "%s of the trainer's %s is no part of checkpoints: %s. If a run needs it to go on, define "
                "state_dict() and load_state_dict() of the %s",
                name,
                self._name,
                reason,
                self._name,
            )
        return reason is None


def _restore(owner: Any, attributes: Mapping[str, Any]) -> None:
    for name, value in attributes.items():
        if name.startswith(_NESTED):
            _restore(getattr(owner, name.removeprefix(_NESTED)), value)
        else:
            object.__setattr__(owner, name, value)  # of a frozen dataclass, too


def _class_of(part: Any) -> str:
    """Return the name of a class, or of a function."""
    while isinstance(part, functools.partial):
        part = part.func
    return str(getattr(part, "__qualname__", type(part).__qualname__))


def _attributes_of(part: Any) -> dict[str, Any]:
    """Return the attributes of an object, of its slots too."""
    if part is None:
        return {}
    slots = [name for kind in type(part).__mro__ for name in _as_names(vars(kind).get("__slots__", ()))]
    return {name: getattr(part, name) for name in slots if hasattr(part, name)} | getattr(part, "__dict__", {})


def _as_names(slots: Any) -> list[str]:
    names = [slots] if isinstance(slots, str) else list(slots)
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def _settings_of(part: Any) -> dict[str, Any]:
    """Return the settings of an object, or the arguments of a partial function, that are plain."""
    if isinstance(part, functools.partial):
        return {name: value for name, value in part.keywords.items() if _is_plain(value)}
    parameters = {} if inspect.isroutine(part) else _parameters(type(part))
    found = {name: value for name, value in _attributes_of(part).items() if name in parameters and _is_plain(value)}
    return dict(found)


def _parameters(kind: type) -> Mapping[str, Any]:
    try:
        return inspect.signature(kind).parameters
    except (TypeError, ValueError):  # of some classes that are written in C
        return {}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, [*value, *value.values()]))
    return type(value) in _PLAIN or (type(value) in (list, tuple) and all(map(_is_plain, value)))
