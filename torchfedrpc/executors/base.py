"""What every execution mode has in common."""

from __future__ import annotations

import asyncio
import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from torchfedrpc import errors
from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError, SerializationError, SnapshotError
from torchfedrpc.events import Event, ProgressReported
from torchfedrpc.executors.admission import Admission, estimate
from torchfedrpc.executors.consistent_snapshot import Cut
from torchfedrpc.executors.durations import Durations, fastest_first, longest_first
from torchfedrpc.executors.reduction import Collecting, Gathering, Reduction
from torchfedrpc.executors.shared_arguments import SharedRef, Sharing, held
from torchfedrpc.executors.stream import CallStream
from torchfedrpc.host.answer import answer, call_on
from torchfedrpc.host.call import Call, CallKind, Outcome, Part
from torchfedrpc.host.faults import Fault
from torchfedrpc.host.learner_host import LearnerHost
from torchfedrpc.host.mailbox import Reply
from torchfedrpc.host.process import choose_device
from torchfedrpc.host.runner import Report
from torchfedrpc.host.snapshot import seal
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.wire.packing import Packed, Reference, pack, pack_nothing
from torchfedrpc.wire.shared import SharedValue, shared_values

logger = logging.getLogger(__name__)

_MAX_PLAIN_ARGUMENTS = 64


@dataclass(frozen=True)
class ExecutorSpec:
    """What an executor is opened with.

    Attributes:
        learner: how to make learners, and the run's configuration.
        clients: client id -> keyword arguments of its learner's constructor, in the run's order.
        publish: tells the run's subscribers an event; to be called on the driver's event loop.
    """

    learner: LearnerSpec
    clients: Mapping[str, Mapping[str, Any]]
    publish: Callable[[Event], None]

    def make_host(self) -> LearnerHost:
        """A host for all of these clients in this process; call it in ``open``, and close the host in ``close``.

        Raises:
            ConfigError: the learner's class cannot be found.
        """
        return LearnerHost(
            self.learner,
            device=choose_device(0),
            report=self.reporter(),
            constructor_arguments=self.constructor_arguments,
        )

    def reporter(self) -> Report:
        """What takes methods' reports, on any thread, and publishes them on the event loop that runs now."""
        loop = asyncio.get_running_loop()

        def report(call: Call, number: int, progress: Packed) -> None:
            call_on(loop, self.publish_progress, call, progress)

        return report

    def publish_progress(self, call: Call, progress: Packed) -> None:
        """Tell the run's subscribers what a method has reported; to be called on the driver's event loop."""
        try:
            value = progress.open(self.learner.allow_list())
        except Exception:  # answers come after it, and must not suffer for it
            logger.exception("what %s.%s has reported cannot be read", call.client_id, call.method)
            return
        self.publish(ProgressReported(call.call_id, call.client_id, call.method, value))

    def constructor_arguments(self, client_id: str, *, by_value: bool = True) -> Packed:
        """The keyword arguments of a learner's constructor, as they are now.

        Raises:
            SerializationError: they cannot be sent.
        """
        kwargs = self.clients[client_id]
        try:
            return pack(kwargs) if by_value else Reference(kwargs)
        except SerializationError as error:
            raise type(error)(f"the constructor arguments of {client_id} cannot be sent: {error}") from error


@dataclass(frozen=True, slots=True)
class Invocation:
    """A call as the proxy hands it to an executor.

    Attributes:
        call_id: unique in a run.
        client_id: whose learner.
        method: the method's name.
        args: its positional arguments, still the caller's own objects.
        kwargs: its keyword arguments.
        run_timeout_s: seconds the method may run; None for no limit.
        retries: how often to ask again where the method was not begun.
        part: of a reduction, where the result is one.
    """

    call_id: int
    client_id: str
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    run_timeout_s: float | None = None
    retries: int = 0
    part: Part | None = None


class AbstractExecutor(ABC):
    """One way for calls to reach learners.

    A mode of your own overrides `execute_method`, `open` and `close`, and is registered with
    ``@tfr.executor("name")``; ``execution_mode: name`` then selects it. An executor is opened once: each opening of a
    proxy makes another one.

    Args:
        config: the run's configuration.

    Attributes:
        ends_early: why the run ends before its end, as `close` is called; empty where it ends well.
    """

    ends_early = ""

    def __init__(self, config: RuntimeConfig | None = None) -> None:
        self.config = config or RuntimeConfig()

    async def open(self, spec: ExecutorSpec) -> None:  # noqa: B027 (not every mode needs it)
        """Get ready for calls; ``spec.make_host()`` gives a host for the learners in this process."""

    async def close(self) -> None:  # noqa: B027
        """Give everything back; no call is pending."""

    @abstractmethod
    async def execute_method(self, client_id: str, method_name: str, /, *args: Any, **kwargs: Any) -> Any:
        """Run a learner's method and return its result, or raise what it raised."""

    async def execute(self, invocation: Invocation) -> Any:
        """Run a call with all that a proxy knows of it; by default only the name and the arguments count."""
        return await self.execute_method(
            invocation.client_id, invocation.method, *invocation.args, **invocation.kwargs
        )

    def stream(self, invocation: Invocation) -> CallStream:
        """Open a stream over what a generator method yields.

        Raises:
            ConfigError: the mode has no streams.
        """
        raise ConfigError(f"{type(self).__name__} has no streams: override its stream(), or await a list instead")

    async def snapshot(self, client_id: str) -> bytes:
        """The state of a client's learner, between two calls, as bytes for `restore`.

        Raises:
            ConfigError: the mode has no snapshots.
            SnapshotError: the state cannot be captured.
        """
        raise ConfigError(f"{type(self).__name__} has no snapshots: override its snapshot() and restore()")

    async def capture(self, client_id: str) -> bytes:
        """A snapshot for a cut, ahead of the calls that wait for it; empty where the learner is lost for good."""
        return await self.snapshot(client_id)

    async def restore(self, client_id: str, data: bytes) -> None:
        """Make a client's learner anew, with the state that `snapshot` gave.

        Raises:
            ConfigError: the mode has no snapshots.
            SnapshotError: the bytes are no snapshot of this client's learner.
        """
        raise ConfigError(f"{type(self).__name__} has no snapshots: override its snapshot() and restore()")

    def follow(self, cut: Cut) -> None:  # noqa: B027
        """Let calls that are submitted from now on come behind this cut; it takes the place of any before."""

    def share(self, obj: Any) -> SharedRef:
        """An object as it is now, for the arguments of calls to come.

        Raises:
            ConfigError: the mode has no such references.
        """
        raise ConfigError(f"{type(self).__name__} shares nothing: override its share(), or pass the object itself")

    def plan(self, client_ids: Sequence[str], method: str, *, is_awaited: bool) -> list[str]:
        """The clients of a group's call in the order in which to submit it, before it is.

        Args:
            client_ids: the group's.
            method: the method's name.
            is_awaited: whether the group has a deadline, or waits for some of its clients alone.
        """
        return list(client_ids)

    def reduction(self, reduction: Reduction) -> Collecting:
        """Take part in a reduction; by default with the results that calls return."""
        return Gathering(reduction)

    def worker_of(self, client_id: str) -> str:
        """The name of the process that has this client's learner, for messages."""
        return type(self).__name__

    def rref(self, client_id: str) -> Any:
        """The learner's ``torch.distributed.rpc`` RRef in the present world; None where calls need no RPC.

        Raises:
            WorkerLostError: It has none now.
        """
        return None

    @property
    def join_address(self) -> str | None:
        """Where workers can join a run, ``HOST:PORT``; None where they cannot."""
        return None

    def workers(self) -> list[str]:
        """The names of the processes that run learners, as messages have them; none where the mode has no names."""
        return []

    async def arm(self, faults: Mapping[str, Sequence[Fault]]) -> None:
        """Let faults strike workers at calls to come, in place of those armed before, for a test.

        Args:
            faults: the name of a worker -> what strikes when; none at all disarms it.

        Raises:
            ConfigError: the mode, or a worker, cannot have such faults.
        """
        raise ConfigError(f"{type(self).__name__} has no workers to sabotage: override its workers() and arm()")

    def stats(self) -> dict[str, Any]:
        """Numbers of this mode, for ``proxy.stats()``: ``bytes_sent`` and ``bytes_received`` at least."""
        return {"bytes_sent": 0, "bytes_received": 0}


class CallExecutor(AbstractExecutor):
    """Base of the modes that talk to hosts: takes the arguments' value, sends the call, opens the outcome."""

    def __init__(self, config: RuntimeConfig | None = None) -> None:
        super().__init__(config)
        self._was_opened = False
        self._own_call_ids = itertools.count(-1, -1)  # of calls that no proxy numbered
        self._admission = Admission(self.config.max_inflight_bytes)
        self._cut: Cut | None = None
        self._durations = Durations()
        self._holders: dict[SharedValue, list[int]] = {}  # of a tick -> calls that have it, bytes admitted for it
        self._plain_arguments: dict[bytes, Packed] = {}  # such as have no tensors, by what they are
        self._sharing = Sharing(self._take_shared, self._unshare)

    async def open(self, spec: ExecutorSpec) -> None:
        """Remember what the run is; subclasses reach their hosts here.

        Raises:
            ConfigError: it was opened before.
        """
        if self._was_opened:
            raise ConfigError(
                f"this {type(self).__name__} was opened before, and is of that run: make another one for the next run"
            )
        self._was_opened = True
        self._spec = spec
        self.allow = spec.learner.allow_list()

    async def execute_method(self, client_id: str, method_name: str, /, *args: Any, **kwargs: Any) -> Any:
        """Run a learner's method with the configuration's ``call_timeout_s``."""
        call_id, timeout_s = self._own_call_id(), self.config.call_timeout_s
        return await self.execute(Invocation(call_id, client_id, method_name, args, kwargs, timeout_s))

    async def execute(self, invocation: Invocation) -> Any:
        """Run a call; asks again where it failed before the method began and the invocation has retries left.

        Its arguments' value is taken once ``max_inflight_bytes`` has room for it.
        """
        try:
            given = held(invocation.args, invocation.kwargs)
        except SerializationError as reason:
            raise _unsendable(invocation, reason) from reason
        args, kwargs = self._sharing.recognised(*given)
        num_bytes = estimate(args, kwargs)
        if await self._admission.admit(num_bytes):  # it had to wait, and may have to take what others had then
            args, kwargs = self._sharing.recognised(*given)
            num_bytes += self._admission.take(estimate(args, kwargs) - num_bytes)
        values: tuple[SharedValue, ...] = ()
        try:
            call = self._call(invocation, args, kwargs, num_bytes)
            values = tuple(value for value in shared_values(call.arguments) if value.is_for_tick)
            num_bytes -= self._holds(values, num_bytes)
            await self._passed(call.client_id)
            for remaining in range(invocation.retries, -1, -1):
                outcome = await self._answered(call)
                if not (remaining and _may_go_better(outcome)):
                    break
            self._note_duration(call, outcome)
            if (error := outcome.error) is not None:
                try:
                    del outcome  # its error would have this frame, and so itself: a circle that would keep the call
                    raise error
                finally:
                    del error
            return self._result(outcome, call)
        finally:
            self._admission.release(num_bytes + self._holds_no_more(values))

    def _note_duration(self, call: Call, outcome: Outcome) -> None:
        """Note how long a call ran, also one that was cut off."""
        if outcome.kind == "value":
            self._durations.saw(call.client_id, call.method, outcome.seconds)
        elif outcome.cut_off and outcome.seconds and call.kind == "call":
            self._durations.cut_off(call.client_id, call.method, outcome.seconds)

    def _holds(self, values: Iterable[SharedValue], num_bytes: int) -> int:
        """One more call has these values; how many of its bytes were admitted for those that no other has."""
        num_own = 0
        for value in values:
            holders = self._holders.get(value)
            if holders is None:
                admitted = min(value.num_bytes, num_bytes - num_own)
                holders = self._holders[value] = [0, admitted]
                num_own += admitted
            holders[0] += 1
        return num_own

    def _holds_no_more(self, values: Iterable[SharedValue]) -> int:
        """A call that had these values has ended; how many bytes were admitted for those that no other has now."""
        num_bytes = 0
        for value in values:
            self._holders[value][0] -= 1
            if not self._holders[value][0]:
                num_bytes += self._holders.pop(value)[1]
        return num_bytes

    def plan(self, client_ids: Sequence[str], method: str, *, is_awaited: bool) -> list[str]:
        """The clients by the times of earlier calls: the longest first, with a deadline or a quorum the fastest."""
        expected = self._durations.expected(client_ids, method)
        return fastest_first(expected) if is_awaited else longest_first(expected)

    async def snapshot(self, client_id: str) -> bytes:
        """A learner's state between two calls."""
        await self._passed(client_id)
        return await self.capture(client_id)

    async def capture(self, client_id: str) -> bytes:
        """A snapshot for a cut, ahead of the calls that wait for it."""
        call = Call(self._own_call_id(), client_id, "snapshot", self._take_value(None), kind="snapshot")
        outcome = await self._answered(call)
        data: torch.Tensor = self._result(outcome, call)
        return await asyncio.to_thread(lambda: bytes(seal(data)))

    async def restore(self, client_id: str, data: bytes) -> None:
        """Make a learner anew, with the state of a snapshot of it."""
        if not isinstance(data, bytes | bytearray | memoryview) or not data:
            raise SnapshotError(f"the snapshot of {client_id} must be bytes as snapshots() gives them, not {data!r}")
        constructor = dict(self._spec.clients[client_id])
        await self._admission.admit(len(data))
        try:
            value = self._take_value((torch.frombuffer(bytearray(data), dtype=torch.uint8), constructor))
            call = Call(self._own_call_id(), client_id, "restore", value, kind="restore")
            await self._passed(client_id)
            outcome = await self._answered(call)
            self._result(outcome, call)
        finally:
            self._admission.release(len(data))

    def stream(self, invocation: Invocation) -> CallStream:
        """Open a stream; nothing is sent before its first item is asked for."""
        return CallStream(
            self._call(invocation, invocation.args, invocation.kwargs, kind="stream"),
            submit=self._submit,
            advance=self._advance,
            cancel=self._cancel,
            result=self._result,
            passed=self._passed,
        )

    def follow(self, cut: Cut) -> None:
        """Let calls that are submitted from now on come behind this cut."""
        self._cut = cut

    def share(self, obj: Any) -> SharedRef:
        """An object as it is now, for the arguments of calls to come."""
        return self._sharing.place(obj)

    @abstractmethod
    def _submit(self, call: Call, reply: Reply) -> None:
        """Send a call on its way."""

    @abstractmethod
    def _advance(self, call: Call, step: int, reply: Reply) -> None:
        """Ask an open stream for its item of that number, from 0."""

    @abstractmethod
    def _cancel(self, call: Call) -> None:
        """Tell the host that nobody waits for this call any more."""

    def _unshare(self, value: SharedValue) -> None:
        """No call that is to come refers to this value."""

    async def _passed(self, client_id: str) -> None:
        if self._cut is not None:
            await self._cut.passed(client_id)

    def _take_value(self, obj: Any) -> Packed:
        return pack(obj)

    def _take_shared(self, obj: Any) -> Packed:
        """An object as it is now, that calls will have in common."""
        return self._take_value(obj)

    def _take_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Packed:
        if not args and not kwargs:
            return pack_nothing()
        parcel = pack((args, kwargs), may_refer=True)
        if parcel.slots or parcel.apart:
            return parcel
        # Journals keep arguments, and those of a round's calls are often the same few numbers.
        if len(self._plain_arguments) >= _MAX_PLAIN_ARGUMENTS:
            self._plain_arguments.clear()
        return self._plain_arguments.setdefault(parcel.head, parcel)

    async def _answered(self, call: Call) -> Outcome:
        return await answer(partial(self._submit, call), partial(self._cancel, call))

    def _own_call_id(self) -> int:
        return next(self._own_call_ids)

    def _call(
        self,
        invocation: Invocation,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        num_bytes: int = 0,
        kind: CallKind = "call",
    ) -> Call:
        try:
            if kind == "call":
                args, kwargs = self._sharing.shared(args, kwargs, num_bytes)
            arguments = self._take_arguments(args, kwargs)
        except SerializationError as error:
            raise _unsendable(invocation, error) from error
        return Call(
            invocation.call_id,
            invocation.client_id,
            invocation.method,
            arguments,
            invocation.run_timeout_s,
            kind,
            invocation.part,
        )

    def _result(self, outcome: Outcome, call: Call) -> Any:
        return outcome.result(call, self.allow, self.worker_of(call.client_id))


def _unsendable(invocation: Invocation, error: SerializationError) -> SerializationError:
    return type(error)(f"the arguments of {invocation.client_id}.{invocation.method} cannot be sent: {error}")


def _may_go_better(outcome: Outcome) -> bool:
    """Whether to ask again: the method was not begun, and what failed was not the call itself."""
    failure = outcome.failure
    return failure is not None and outcome.never_ran and not failure.type_name.startswith(errors.__name__)
