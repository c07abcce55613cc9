"""Errors that this library raises.

    TorchFedRpcError
    +-- ConfigError (ValueError)               invalid setting or endpoint, or a wrong way to start a script
    +-- UnknownClientError (KeyError)          no such client
    +-- MethodNotFoundError (AttributeError)   no such public method on the learner
    +-- LearnerBusyError (RuntimeError)        deadlock: a call waits for a stream of its caller
    +-- CallTimeoutError (TimeoutError)        a deadline passed
    +-- WorkerLostError (ConnectionError)      the worker of a call is lost
    +-- SerializationError (TypeError)         a value cannot be serialized or deserialized
    |   +-- UntrustedTypeError                 a type outside the receiver's allow-list
    +-- SnapshotError (RuntimeError)           a learner's state cannot be captured or restored
    +-- CapacityError (RuntimeError)           too many pending calls
    +-- QuorumError (RuntimeError)             fewer results than ``min_results``
    +-- GroupCallError (ExceptionGroup)        calls of a group failed
    +-- RemoteError (RuntimeError)             a learner's exception of a type that cannot be sent

Each is also a subclass of the builtin in brackets. A learner's exception arrives as its original type instead, unless
that type cannot be sent.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class TorchFedRpcError(Exception):
    """Root of the errors that this library raises."""


class ConfigError(TorchFedRpcError, ValueError):
    """Invalid, unknown or unsatisfiable setting, or a wrong way to start a script."""


class UnknownClientError(TorchFedRpcError, KeyError):
    """Call of a client that the proxy does not have."""

    def __str__(self) -> str:  # KeyError shows the repr of the message
        return str(self.args[0]) if self.args else ""


class MethodNotFoundError(TorchFedRpcError, AttributeError):
    """Call of a method that the learner does not have, does not make public, or has as another kind."""


class LearnerBusyError(TorchFedRpcError, RuntimeError):
    """Call that would deadlock: its task reads a stream that holds the learner."""


class CallTimeoutError(TorchFedRpcError, TimeoutError):
    """Deadline of a call that passed before the result arrived."""


class WorkerLostError(TorchFedRpcError, ConnectionError):
    """Loss of the worker that owns the learner: killed, crashed, or unreachable."""


class SerializationError(TorchFedRpcError, TypeError):
    """Value that cannot be serialized, or received bytes that cannot be deserialized."""


class UntrustedTypeError(SerializationError):
    """Received type outside the receiver's allow-list."""


class SnapshotError(TorchFedRpcError, RuntimeError):
    """Learner state that cannot be captured or restored.

    Attributes:
        attribute: The part of the state that cannot be captured, as the message names it. None if it is not one
            attribute.
    """

    attribute: str | None = None


class CapacityError(TorchFedRpcError, RuntimeError):
    """Call beyond the limit ``runtime.max_pending_calls``."""


class QuorumError(TorchFedRpcError, RuntimeError):
    """Group call with fewer successful clients than ``min_results``.

    Attributes:
        results: Client id -> result, of the clients that succeeded.
        failures: Client id -> exception, of the clients that failed.
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
    """Group call with one or more failures; ``exceptions`` holds them in the group's order.

    Attributes:
        results: Client id -> result, of the clients that succeeded.
        failures: Client id -> exception, of the clients that failed.
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
        """Return the subgroup of these exceptions (for ``except*`` and ``split``)."""
        failures, unmatched = {}, dict(self.failures)
        for error in excs:  # a failure that is an exception group arrives here as a subgroup of it
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
    """Learner's exception of a type that cannot be sent or would break the caller's event loop.

    Attributes:
        type_name: Qualified name of the exception's type in the learner's process.
        message: Text of the exception.
        remote_traceback: Traceback of the exception, as text.
    """

    def __init__(self, type_name: str, message: str, remote_traceback: str = "") -> None:
        super().__init__(type_name, message, remote_traceback)
        self.type_name = type_name
        self.message = message
        self.remote_traceback = remote_traceback

    def __str__(self) -> str:
        return f"{self.type_name}: {self.message}"


def suggest(name: str, known: Iterable[str], *, limit: int = 8) -> str:
    """Return a hint that names the nearest known names, for the end of an error message.

    Returns:
        `` (did you mean 'a' or 'b'?)`` if there is a near match, else `` (known: 'a', 'b', ...)``.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return f" (did you mean {' or '.join(map(repr, near))}?)"
    listed = ", ".join(map(repr, names[:limit])) or "none"
    return f" (known: {listed}{', ...' if len(names) > limit else ''})"
