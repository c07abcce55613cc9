"""A call and what becomes of it: what a host is handed and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torchfedrpc.errors import SerializationError, WorkerLostError
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.exceptions import Failure
from torchfedrpc.wire.packing import Packed, Reference

_TAKEN = Reference(None)

OutcomeKind = Literal["value", "item", "end", "failed", "cancelled"]
CallKind = Literal["call", "stream", "snapshot", "restore", "collect"]


@dataclass(frozen=True, slots=True)
class Part:
    """What a call's result is a part of, instead of going back.

    Attributes:
        reduction: number of the reduction, in a run.
        place: the client's place in it.
        is_awaited: whether the end of this call by itself is waited for, by a deadline or a quorum.
    """

    reduction: int
    place: int
    is_awaited: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a learner's method.

    Attributes:
        call_id: unique in a run.
        client_id: whose learner.
        method: the method's name.
        arguments: ``(args, kwargs)``.
        run_timeout_s: seconds the method may run, its wait in the queue not counted; None for no limit. Of a
            stream, each step has so long.
        kind: ``call`` a method; ``stream``: ask for a generator method's items one by one; ``snapshot``: take the
            learner's state, as uint8 [num_bytes]; ``restore`` it, the arguments being that tensor and the keyword
            arguments of the constructor (None: those that the learner was registered with); ``collect`` what a host
            has of a reduction, the arguments being its number and the places that count for nothing.
        part: of a reduction, where the result is one; of a ``collect``, that for whose calls here it waits.
    """

    call_id: int
    client_id: str
    method: str
    arguments: Packed
    run_timeout_s: float | None = None
    kind: CallKind = "call"
    part: Part | None = None

    def repeated(self) -> Call:
        """This call, to be made once more: it has run in time already, and its result has been taken."""
        return Call(self.call_id, self.client_id, self.method, self.arguments, None, self.kind)

    def taken(self) -> Call:
        """This call without its arguments, which are its method's own by now, to keep or to drop."""
        return Call(self.call_id, self.client_id, self.method, _TAKEN, self.run_timeout_s, self.kind, self.part)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a call, or of one step of a stream.

    Attributes:
        kind: ``value`` (it returned), ``item`` (the stream yielded), ``end`` (the stream is over), ``failed``, or
            ``cancelled``.
        parcel: the result or the item.
        failure: the exception.
        never_ran: whether the method itself was not begun, so that asking again is safe.
        cut_off: whether it was begun and ended early by a deadline or a cancel, so that what it has done to its
            learner cannot be done again.
        error: what the caller's own process has to say, raised as it is.
        seconds: how long the method ran, of a value, or of a call that was cut off.
    """

    kind: OutcomeKind
    parcel: Packed | None = None
    failure: Failure | None = None
    never_ran: bool = False
    cut_off: bool = False
    error: Exception | None = None
    seconds: float = 0.0

    @property
    def is_final(self) -> bool:
        """Whether nothing more will come of the call."""
        return self.kind != "item"

    def result(self, call: Call, allow: AllowList, worker: str) -> Any:
        """What the caller gets: the result or the item; None at the end of a stream.

        Args:
            call: what was asked.
            allow: the types that may travel.
            worker: who answered, for messages.

        Raises:
            Exception: `error`, or what the method raised, with a note that names client, method and worker.
            SerializationError: the result cannot be read here.
            WorkerLostError: the worker gave the call up because it is closing.
        """
        where = f"{call.client_id}.{call.method} on {worker}"
        if self.error is not None:
            raise self.error
        if self.failure is not None:
            raise self.failure.restore(allow, f"in {where}")
        if self.kind == "cancelled":
            raise WorkerLostError(f"{where} was given up, since the worker is closing")
        if self.parcel is None:
            return None
        try:
            return self.parcel.open(allow)
        except SerializationError as error:
            raise type(error)(f"the result of {where} cannot be read: {error}") from error
        except Exception as error:  # this process, or its GPU, is out of memory
            error.add_note(f"as the result of {where} was read")
            raise
