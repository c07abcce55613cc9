"""Every error this library raises itself.

    TorchFedRpcError
    +-- ConfigError (ValueError)               a setting, an endpoint, or the way a script is started
    +-- UnknownClientError (KeyError)          no such client
    +-- MethodNotFoundError (AttributeError)   no such public method on the learner
    +-- LearnerBusyError (RuntimeError)        a call that would wait for its own caller
    +-- CallTimeoutError (TimeoutError)        a deadline passed
    +-- WorkerLostError (ConnectionError)      the worker of a call is gone
    +-- SerializationError (TypeError)         a value that cannot travel
    |   +-- UntrustedTypeError                 a type that the receiver does not allow
    +-- SnapshotError (RuntimeError)           a learner's state cannot be captured or restored
    +-- CapacityError (RuntimeError)           too many calls are pending
    +-- QuorumError (RuntimeError)             fewer results than asked for
    +-- GroupCallError (ExceptionGroup)        calls of a group failed
    +-- RemoteError (RuntimeError)             a learner's exception whose own type cannot travel

Each is also the builtin that people catch. An exception of a learner is none of these: it arrives as its own type.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class TorchFedRpcError(Exception):
    """Root of the errors that this library raises itself."""


class ConfigError(TorchFedRpcError, ValueError):
    """A setting is unknown, mistyped or cannot be met, or a script was started in a way that cannot work."""


class UnknownClientError(TorchFedRpcError, KeyError):
    """The proxy has no client of that id."""

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0]) if self.args else ""


class MethodNotFoundError(TorchFedRpcError, AttributeError):
    """The learner has no public method of that name, or not of that kind."""


class LearnerBusyError(TorchFedRpcError, RuntimeError):
    """The call would wait for ever: the task that makes it holds the learner by a stream it is reading."""


class CallTimeoutError(TorchFedRpcError, TimeoutError):
    """A call's deadline passed before its result arrived."""


class WorkerLostError(TorchFedRpcError, ConnectionError):
    """The worker that owns the learner was killed, crashed or cut off."""


class SerializationError(TorchFedRpcError, TypeError):
    """A value cannot be sent, or what arrived cannot be read."""


class UntrustedTypeError(SerializationError):
    """What arrived names a type outside the receiver's allow-list."""


class SnapshotError(TorchFedRpcError, RuntimeError):
    """A learner's state cannot be captured or restored.

    Attributes:
        attribute: what of the state cannot be captured, as the message names it; None where it is no one attribute.
    """

    attribute: str | None = None


class CapacityError(TorchFedRpcError, RuntimeError):
    """More calls are pending than the configuration allows."""


class QuorumError(TorchFedRpcError, RuntimeError):
    """Fewer clients succeeded than ``min_results`` asks for.

    Attributes:
        results: client id -> result, of those that arrived.
        failures: client id -> exception, of those that failed.
    """

    def __init__(
        self,
        message: str,
        results: Mapping[str, Any] | None = None,
        failures: Mapping[str, BaseException] | None = None,
    ) -> None:
        super().__init__(message)
        self.results = dict(results or {})
        self.failures = dict(failures or {})


class GroupCallError(TorchFedRpcError, ExceptionGroup[Exception]):
    """One or more calls of a group failed; ``exceptions`` holds them in the group's order.

    Attributes:
        results: client id -> result, of the clients that succeeded.
        failures: client id -> exception.
    """

    results: dict[str, Any]
    failures: dict[str, Exception]

    def __new__(
        cls, message: str, failures: Mapping[str, Exception], results: Mapping[str, Any] | None = None
    ) -> GroupCallError:
        error = super().__new__(cls, message, list(failures.values()))
        error.failures = dict(failures)
        error.results = dict(results or {})
        return error

    def derive(self, excs: Any, /) -> GroupCallError:  # type: ignore[override]
        """The subgroup of these exceptions (for ``except*`` and ``split``)."""
        failures, unmatched = {}, dict(self.failures)
        for error in excs:  # a failure that is a group itself comes here as a subgroup of it
            leaves = _leaves(error)
            client_id = next(client for client, failure in unmatched.items() if leaves & _leaves(failure))
            failures[client_id] = error
            del unmatched[client_id]
        return GroupCallError(self.message, failures, self.results)


def _leaves(error: BaseException) -> set[int]:
    if isinstance(error, BaseExceptionGroup):
        return set().union(*map(_leaves, error.exceptions))
    return {id(error)}


class RemoteError(TorchFedRpcError, RuntimeError):
    """A learner raised an exception whose own type cannot travel, or would break the caller's event loop.

    Attributes:
        type_name: the qualified name of the exception's type, as the learner's process has it.
        message: its text.
        remote_traceback: its traceback, as text.
    """

    def __init__(self, type_name: str, message: str, remote_traceback: str = "") -> None:
        super().__init__(type_name, message, remote_traceback)
        self.type_name = type_name
        self.message = message
        self.remote_traceback = remote_traceback

    def __str__(self) -> str:
        return f"{self.type_name}: {self.message}"


def suggest(name: str, known: Iterable[str], *, limit: int = 8) -> str:
    """Say which of the known names come near, for the end of an error message.

    Returns:
        `` (did you mean 'a' or 'b'?)`` where something comes near, else `` (known: 'a', 'b', ...)``.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return f" (did you mean {' or '.join(map(repr, near))}?)"
    listed = ", ".join(map(repr, names[:limit])) or "none"
    return f" (known: {listed}{', ...' if len(names) > limit else ''})"
