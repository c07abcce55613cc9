"""Exceptions on their way to the caller: as bytes, or as text if their type cannot travel."""

from __future__ import annotations

import asyncio
import traceback
from dataclasses import dataclass

from torchfedrpc.errors import RemoteError, SerializationError
from torchfedrpc.wire.allowlist import AllowList, canonical
from torchfedrpc.wire.serializer import ParameterSerializer

# Raised in a caller's task, these would end its event loop, its generators, or the task itself.
_LOOP_BREAKERS = (
    SystemExit,
    KeyboardInterrupt,
    GeneratorExit,
    asyncio.CancelledError,
    StopIteration,
    StopAsyncIteration,
)


class RemoteTraceback(Exception):
    """The ``__cause__`` of a learner's exception: the traceback in the learner's process, as text."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception on its way to the caller.

    Attributes:
        type_name: Qualified name of its type.
        message: Its text.
        traceback: Its traceback as text, from the learner's method on.
        body: The exception itself, serialized; None if it cannot be.
    """

    type_name: str
    message: str
    traceback: str
    body: bytes | None

    @classmethod
    def capture(cls, error: BaseException, *, skip_modules: str = "") -> Failure:
        """Take an exception apart.

        Args:
            error: The exception.
            skip_modules: Prefix of module names; the outermost frames in these modules are left out.
        """
        body, text = None, _traceback(error, skip_modules)
        if not _breaks_loop(error):
            try:
                body = ParameterSerializer.serialize(error)
            except BaseException as reason:  # also one that a user's __getstate__ has raised, such as SystemExit
                text += f"(the exception itself could not be sent: {_text(reason)})\n"
        kind = type(error)
        module = canonical(kind.__module__)
        name = kind.__qualname__ if module == "builtins" else f"{module}.{kind.__qualname__}"
        return cls(name, _text(error), text, body)

    def restore(self, allow: AllowList, note: str) -> BaseException:
        """Return the exception for the caller: of the original type if that is allowed, else a `RemoteError`.

        Args:
            allow: The types that may travel.
            note: Where it was raised; added to the exception's notes.
        """
        error: BaseException = RemoteError(self.type_name, self.message, self.traceback)
        if self.body is not None:
            try:
                rebuilt = ParameterSerializer.deserialize(self.body, trusted_modules=allow.trusted)
                if isinstance(rebuilt, BaseException) and not _breaks_loop(rebuilt):  # a worker may send anything
                    error = rebuilt
            except SerializationError as reason:
                error.add_note(f"(its own type did not arrive: {reason})")
        notes = [*error.__dict__.get("__notes__", ()), note]  # not by getattr, which the class may override
        set_attribute = BaseException.__setattr__  # __setattr__ of a frozen dataclass raises
        set_attribute(error, "__notes__", notes)
        if self.traceback:
            set_attribute(error, "__cause__", RemoteTraceback(self.traceback))
        return error


def _breaks_loop(error: BaseException) -> bool:
    """Return whether the exception, or a member of its group, would break the caller's event loop."""
    todo, seen = [error], set()
    while todo:
        one = todo.pop()
        if isinstance(one, _LOOP_BREAKERS):
            return True
        if isinstance(one, BaseExceptionGroup) and id(one) not in seen:
            seen.add(id(one))
            todo += one.exceptions
    return False


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException as reason:  # a user's __str__ may fail, and the error must still arrive
        return f"<its text failed: {type(reason).__name__}>"


def _traceback(error: BaseException, skip_modules: str) -> str:
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_globals.get("__name__", "").startswith(skip_modules or "\0"):
        frames = frames.tb_next
    try:
        return "".join(traceback.format_exception(type(error), error, frames))
    except BaseException as reason:
        return f"<the traceback could not be formatted: {type(reason).__name__}>"
