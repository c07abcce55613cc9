"""What a call has for itself in its process: context variables, torch's modes and settings, random streams."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar

import numpy as np

from torchfedrpc.host.context import CallContext, bind
from torchfedrpc.host.randomness import RandomStreams
from torchfedrpc.host.torch_modes import TorchModes
from torchfedrpc.host.torch_settings import SettingsGuard

T = TypeVar("T")

if np.__version__.startswith("1."):  # keeps by thread what later versions keep by context
    _numpy_errors: Callable[[], Any] = partial(
        np.errstate, divide="warn", over="warn", under="ignore", invalid="warn"
    )
else:
    _numpy_errors = nullcontext


class CallScope:
    """What is in place while code of one call runs, and set aside between its steps.

    The tasks and callbacks that an async method starts have the scope of its call, also where they outlive the call:
    they go on with its random streams, and draw from those of no other call.

    Args:
        call: what `current_call` gives.
        streams: the call's random streams; None where calls run side by side, which have the process's in common.
        settings: keeps the call's settings of torch apart; None likewise.
    """

    __slots__ = ("call", "modes", "settings", "streams")

    def __init__(self, call: CallContext, streams: RandomStreams | None, settings: SettingsGuard | None) -> None:
        self.call = call
        self.streams = streams
        self.settings = settings
        self.modes = TorchModes()

    def new_context(self) -> contextvars.Context:
        """A context in which no variable is set but those by which this scope and its call are found."""
        context = contextvars.Context()
        context.run(self._bind)
        return context

    def inside(self, function: Callable[[], T]) -> T:
        """Call a function with all of this in place; to be called in a context of this scope."""
        with self.modes, _numpy_errors():
            if self.streams is None or self.settings is None:
                return function()
            with self.settings, self.streams:
                return function()

    def _bind(self) -> None:
        bind(self.call)
        scope_here.set(self)


scope_here: contextvars.ContextVar[CallScope | None] = contextvars.ContextVar("torchfedrpc_scope")
"""The scope of the code that runs; None in code of the host's own, unset in contexts that users have made."""


def outside() -> contextvars.Context:
    """A context for code of the host's own."""
    context = contextvars.Context()
    context.run(scope_here.set, None)
    return context
