"""State of the objects that a trainer was given, such as its aggregator, in checkpoints."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

from torchfedrpc.errors import ConfigError, SerializationError
from torchfedrpc.federation.trainer_state import has_state_dict
from torchfedrpc.host.state_comparison import first_difference
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.packing import pack

logger = logging.getLogger(__name__)


class PartState:
    """The state of an attribute of a trainer: that of its ``state_dict()`` if it has one, else its own attributes.

    A resume sets them in the object that the user gave, and requires the same class and the same settings. These are
    the attributes as they were before the first round.

    Args:
        trainer: The trainer.
        name: Name of its attribute; a function, or None, has no state.
    """

    def __init__(self, trainer: Any, name: str) -> None:
        self._trainer = trainer
        self._name = name
        self._part: Any = None
        self._settings: Any = {}
        self._has_warned = False

    def note_settings(self) -> None:
        """Note the settings, once."""
        part = getattr(self._trainer, self._name)
        if part is not self._part:
            self._part = part
            self._settings = None if has_state_dict(part) else self._attributes(warns=False)

    def state_dict(self) -> dict[str, Any]:
        """Return the state; without the attributes, and with a warning, if they cannot be saved."""
        self.note_settings()
        state = {"class": _class_of(self._part)}
        if has_state_dict(self._part):
            return state | {"own": self._part.state_dict()}
        attributes = self._attributes(warns=True)
        return state if attributes is None else state | {"settings": self._settings, "attributes": attributes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state_dict` returned.

        Raises:
            ConfigError: If the object is of another class, or has other settings, than that of the checkpoint.
        """
        self.note_settings()
        if (kind := _class_of(self._part)) != state["class"]:
            was = state["class"]
            raise ConfigError(f"the trainer's {self._name} is {kind}, and was {was} in the checkpoint: {_REMEDY}")
        if "own" in state:
            self._part.load_state_dict(state["own"])
        elif "attributes" in state:
            if (found := first_difference(state["settings"], self._settings)) is not None:
                raise ConfigError(
                    f"the trainer's {self._name} has other settings than that of the checkpoint: {found}; {_REMEDY}"
                )
            if state["attributes"]:
                vars(self._part).update(state["attributes"])

    def _attributes(self, *, warns: bool) -> Any:
        """Return a copy of the attributes; None if they cannot be saved."""
        try:
            attributes = pack(dict(getattr(self._part, "__dict__", {})))
            return attributes.open(AllowList(self._trainer.trusted_modules))
        except SerializationError as error:
            if warns and not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "the state of the trainer's %s, %r, is no part of checkpoints: %s; define its state_dict() and "
                    "load_state_dict()",
                    self._name,
                    self._part,
                    error,
                )
            return None


_REMEDY = "give the same one, or begin anew with resume=never"


def _class_of(part: Any) -> str:
    """Return the name of a class, or of a function."""
    while isinstance(part, functools.partial):
        part = part.func
    return str(getattr(part, "__qualname__", type(part).__qualname__))
