"""Calls and batches as a host receives them, and the outcomes that it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torchfedrpc import errors
from torchfedrpc.errors import SerializationError, WorkerLostError
from torchfedrpc.host.call_trace import CallTrace, Stamps
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.exceptions import Failure
from torchfedrpc.wire.packing import Packed, Reference, pack

_TAKEN = Reference(None)

OutcomeKind = Literal["value", "item", "end", "failed", "cancelled", "given_back"]
CallKind = Literal["call", "stream", "snapshot", "restore", "barrier"]


@dataclass(frozen=True, slots=True)
class Registration:
    """The data from which a host makes a client's learner.

    Attributes:
        client_id: The client.
        kwargs: Keyword arguments of the learner's constructor.
        build: Number of times that a learner of this client was made on some worker. A host that has an older build
            replaces it.
    """

    client_id: str
    kwargs: Packed
    build: int = 0

    @classmethod
    def of(cls, client_id: str, kwargs: Mapping[str, Any], *, by_value: bool = True) -> Registration:
        """Return the first registration of a client, with the present keyword arguments, copied if ``by_value``.

        Raises:
            SerializationError: If they cannot be sent.
        """
        try:
            return cls(client_id, pack(kwargs) if by_value else Reference(kwargs))
        except SerializationError as error:
            raise type(error)(f"the constructor arguments of {client_id} cannot be sent: {error}") from error


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a learner's method.

    Attributes:
        call_id: Unique in a run.
        client_id: The client whose learner is called.
        method: The method's name.
        arguments: ``(args, kwargs)``. Of a ``restore`` the snapshot, uint8 [num_bytes], and the keyword arguments of
            the constructor, None for those of the registration. Of a ``snapshot`` its largest size in bytes, None for
            no limit.
        run_timeout_s: Seconds the method may run, time in the queue not counted; None for no limit. Each step of a
            stream has this time.
        kind: ``call`` runs a method, ``stream`` iterates over what a generator method yields, ``snapshot`` takes the
            learner's state, ``restore`` replaces it, ``barrier`` does nothing in its turn.
        number: Number of this call among those of its client and method, which seeds it; None if the host counts.
        trace: Records its stages on the driver, if events are subscribed to.
    """

    call_id: int
    client_id: str
    method: str
    arguments: Packed
    run_timeout_s: float | None = None
    kind: CallKind = "call"
    number: int | None = None
    trace: CallTrace | None = field(default=None, compare=False, repr=False)

    def taken(self) -> Call:
        """Return this call without its arguments, which belong to the method by now."""
        return Call(self.call_id, self.client_id, self.method, _TAKEN, self.run_timeout_s, self.kind, self.number)


Report = Callable[[Call, int, Packed], None]
"""Receives progress: the call, the number of this report among those of the call, and the value."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Calls of several learners of one host, whose results the host reduces.

    Attributes:
        call_id: Unique in a run, also among calls.
        prototype: The reducer without any result.
        num_places: Number of clients that take part in the reduction, on all hosts.
        calls: Place of a client in the reduction and its call.
        is_watched: Whether the host reports the end of each call before the partial results.
        timeout_s: Seconds that merging the partial results may take; None for no limit.
    """

    call_id: int
    prototype: Packed
    num_places: int
    calls: tuple[tuple[int, Call], ...]
    is_watched: bool = False
    timeout_s: float | None = None

    @property
    def common(self) -> Packed:
        """Arguments of the first call. Calls with the same object are sent without theirs."""
        return self.calls[0][1].arguments

    def sent(self, worker: str) -> None:
        """Record in the traces of the calls, if they are kept, that they are sent to a worker."""
        if self.calls[0][1].trace is not None:
            for _, call in self.calls:
                if call.trace is not None:
                    call.trace.sent(worker)


@dataclass(frozen=True, slots=True)
class TakeBack:
    """Request to give calls back that have not begun.

    Attributes:
        call_id: Unique in a run, also among calls.
        candidates: Ids of calls; the later ones are given back first.
        half: Whether to give back half of those that have not begun, or all of them.
    """

    call_id: int
    candidates: tuple[int, ...]
    half: bool = True


@dataclass(frozen=True, slots=True)
class Outcome:
    """Outcome of a call, of one step of a stream, or of a batch.

    Attributes:
        kind: ``value`` (it returned), ``item`` (the stream yielded, or calls of a watched batch have ended), ``end``
            (the stream is over), ``failed``, ``cancelled``, or ``given_back`` (it was not begun, and another worker
            is to run it).
        parcel: The result or the item; of a batch the partial results.
        failure: The exception of the method.
        never_ran: Whether the method was not begun, or its stream is lost, so that the call may be made again.
        cut_off: Whether a deadline or a cancellation ended the method early, so that its effects on the learner
            cannot be repeated.
        error: An exception of the caller's own process, raised as it is.
        seconds: Seconds the method ran; of a value and of a call that was cut off.
        stamps: When this process received the call, began it, and had this outcome; None if that is unknown.
        of_calls: Of a batch: places of the calls that have ended and their outcomes, without values. Of a `TakeBack`:
            ids of the calls that were given back.
    """

    kind: OutcomeKind
    parcel: Packed | None = None
    failure: Failure | None = None
    never_ran: bool = False
    cut_off: bool = False
    error: Exception | None = None
    seconds: float = 0.0
    stamps: Stamps | None = None
    of_calls: tuple[tuple[int, Outcome], ...] = ()

    @property
    def is_final(self) -> bool:
        """Whether no other outcome follows."""
        return self.kind != "item"

    @property
    def may_succeed_later(self) -> bool:
        """Whether to retry a call: its method has not begun, and the cause is not an error of this library."""
        failure = self.failure
        return failure is not None and self.never_ran and not failure.type_name.startswith(errors.__name__)

    def result(self, call: Call, allow: AllowList, worker: str) -> Any:
        """Return the result or the item for the caller; None at the end of a stream.

        Args:
            call: The call.
            allow: The types that may travel.
            worker: Name of the worker, for messages.

        Raises:
            Exception: `error`, or the exception of the method, with a note that names client, method and worker.
            SerializationError: If the result cannot be read here, or the call was given back, as none was asked for.
            WorkerLostError: If the worker gave the call up because it is closing.
        """
        if self.error is not None:
            raise self.error
        where = f"{call.client_id}.{call.method} on {worker}"
        if self.failure is not None:
            raise self.failure.restore(allow, f"in {where}")
        if self.kind == "cancelled":
            raise WorkerLostError(f"{where} was given up, since the worker is closing")
        if self.kind == "given_back":
            raise SerializationError(f"{where} was given back, which nothing has requested")
        if self.parcel is None:
            return None
        try:
            return self.parcel.open(allow)
        except SerializationError as error:
            raise type(error)(f"the result of {where} cannot be read: {error}") from error
        except Exception as error:  # this process, or its GPU, is out of memory
            error.add_note(f"as the result of {where} was read")
            raise
