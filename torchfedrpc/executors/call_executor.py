"""Executor of the modes that run learners in hosts: packs arguments, sends calls, unpacks outcomes."""

from __future__ import annotations

import asyncio
import itertools
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError, SerializationError, SnapshotError
from torchfedrpc.executors.admission import Admission, estimate
from torchfedrpc.executors.base import AbstractExecutor, Arguments, ExecutorSpec, Invocation
from torchfedrpc.executors.call_counts import CallCounts
from torchfedrpc.executors.consistent_snapshot import Cut
from torchfedrpc.executors.durations import Durations, fastest_first, longest_first
from torchfedrpc.executors.shared_arguments import MIN_SHARED_BYTES, SharedRef, Sharing, held
from torchfedrpc.executors.stream import ItemStream, Steps
from torchfedrpc.host.call import Call, CallKind, Outcome
from torchfedrpc.host.faults import Fault
from torchfedrpc.host.snapshot import load, seal
from torchfedrpc.reduce.driver import Reduction
from torchfedrpc.tasks import all_ended
from torchfedrpc.wire.packing import Packed, Parcel, pack, pack_nothing
from torchfedrpc.wire.shared import SharedValue


class Learners(ABC):
    """Base class of the learners of an executor's clients, in this process or on workers.

    Attributes:
        join_address: Address ``HOST:PORT`` at which workers can join the run; None if it does not accept workers.
    """

    join_address: str | None = None

    async def open(self) -> None:  # noqa: B027 (optional to override)
        """Prepare for calls. By default nothing is prepared."""

    @abstractmethod
    async def close(self, reason: str) -> None:
        """Fail the pending calls, and release all resources. The reason is empty if the run ends well."""

    @abstractmethod
    def call(self, call: Call) -> Coroutine[Any, Any, Outcome]:
        """Run a call, a snapshot or a restore of a learner, behind the calls submitted before."""

    @abstractmethod
    def stream(self, call: Call) -> Steps:
        """Return the steps of a stream. The first step opens it."""

    async def capture(self, call: Call) -> Outcome | None:
        """Take a learner's part of a consistent snapshot; None if the learner was given up."""
        return await self.call(call)

    @abstractmethod
    async def reduce(self, reduction: Reduction, calls: Mapping[int, Call]) -> None:
        """Run calls, by place, and reduce their results in their hosts."""

    @abstractmethod
    def take_value(self, obj: Any) -> Packed:
        """Pack the present value of an object, for one call."""

    @abstractmethod
    def take_shared(self, obj: Any) -> Packed:
        """Pack the present value of an object, for several calls."""

    @abstractmethod
    def take_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Packed:
        """Pack the arguments of a call, which may contain shared values."""

    def unshare(self, value: SharedValue) -> None:  # noqa: B027
        """Free a shared value in all caches. By default there are none."""

    @abstractmethod
    def worker_of(self, client_id: str) -> str:
        """Return the name of the process that has a client's learner."""

    def rref(self, client_id: str) -> Any:
        """Return a learner's RRef; None if calls do not use RPC."""
        return None

    @abstractmethod
    def workers(self) -> list[str]:
        """Return the names of the processes that run learners."""

    @abstractmethod
    async def arm(self, faults: Mapping[str, Sequence[Fault]]) -> None:
        """Inject faults into workers at later calls."""

    @abstractmethod
    async def interrupt(self, give_up: bool) -> list[str]:
        """Interrupt cancelled methods that go on; return where some do."""

    @abstractmethod
    def stats(self) -> dict[str, Any]:
        """Return counters for ``proxy.stats()``."""


class NotOpened:
    """Placeholder for the learners of an executor that was not opened.

    Raises:
        ConfigError: At each use.
    """

    def __getattr__(self, name: str) -> Any:
        raise ConfigError("this executor is not open: await executor.open(spec) first")


class CallExecutor(AbstractExecutor):
    """Executor with learners in hosts. A subclass provides the `Learners` of its mode."""

    def __init__(self, config: RuntimeConfig | None = None) -> None:
        super().__init__(config)
        self._was_opened = False
        self._own_call_ids = itertools.count(-1, -1)  # of calls without an id from a proxy
        self._admission = Admission(self.config.max_inflight_bytes)
        self._cut: Cut | None = None
        self._durations = Durations()
        self._counts: CallCounts | None = None  # of stateless learners; hosts count the calls of others
        self._holders: dict[SharedValue, list[int]] = {}  # of a tick -> calls that have it, bytes admitted for it
        self._learners: Learners | NotOpened = NotOpened()
        self._sharing: Sharing | NotOpened = NotOpened()

    @abstractmethod
    def _make_learners(self, spec: ExecutorSpec) -> Learners:
        """Return the learners of this mode, not opened yet."""

    async def open(self, spec: ExecutorSpec) -> None:
        """Open the learners.

        Raises:
            ConfigError: If the executor was opened before.
        """
        if self._was_opened:
            raise ConfigError(
                f"this {type(self).__name__} was opened before, and belongs to that run: make another one for the "
                f"next run"
            )
        self._was_opened = True
        self._spec = spec
        self.allow = spec.learner.allow_list()
        self._counts = CallCounts(spec.learner.name) if spec.learner.stateless else None
        self._learners = self._make_learners(spec)
        self.join_address = self._learners.join_address
        self._sharing = Sharing(self._learners)
        await self._learners.open()

    async def close(self) -> None:
        """Close the learners."""
        if not isinstance(self._learners, NotOpened):
            self._sharing.close()
            await self._learners.close(self.ends_early)

    async def execute_method(self, client_id: str, method_name: str, /, *args: Any, **kwargs: Any) -> Any:
        """Run a learner's method with the configuration's ``call_timeout_s``, and return its result."""
        call_id, timeout_s = next(self._own_call_ids), self.config.call_timeout_s
        return await self.execute(Invocation(call_id, client_id, method_name, args, kwargs, timeout_s))

    async def execute(self, invocation: Invocation) -> Any:
        """Run a call and return its result. A call that fails before its method begins is retried, if it has retries.

        The values of its arguments are captured at admission by ``max_inflight_bytes``.
        """
        if (arguments := invocation.common) is None:
            given = _held(invocation)
            arguments = self._recognised(*given)
        num_bytes = self._num_bytes(arguments)
        has_waited = await self._admission.admit(num_bytes)
        values: tuple[SharedValue, ...] = ()
        try:
            if has_waited and invocation.common is None:  # the values that calls share may be others after the wait
                arguments = self._recognised(*given)
                num_bytes += self._admission.take(self._num_bytes(arguments) - num_bytes)
            call, values = self._call(invocation, arguments, num_bytes)
            if values:
                num_bytes -= self._hold(values, num_bytes)
            if self._cut is not None:
                await self._wait_for_cut(call.client_id)
            for remaining in range(invocation.retries, -1, -1):
                outcome = await self._learners.call(call)
                if not (remaining and outcome.may_succeed_later):
                    break
            self._durations.note(call, outcome)
            if (error := outcome.error) is not None:
                try:
                    del outcome  # breaks a reference cycle: error -> this frame -> outcome -> error
                    raise error
                finally:
                    del error
            return self.result(outcome, call)
        finally:
            if values:
                num_bytes += self._release(values)
            self._admission.release(num_bytes)

    async def reduce(self, reduction: Reduction, invocations: Sequence[Invocation]) -> None:
        """Run calls and reduce their results in their hosts. The calls that are admitted at once are one batch.

        Each call that has to wait for admission by ``max_inflight_bytes`` is a separate batch.
        """
        tasks: list[asyncio.Task[None]] = []
        requests: dict[asyncio.Future[None], int] = {}  # places in the queue that no task has taken over
        calls: dict[int, Call] = {}
        admitted: list[tuple[int, tuple[SharedValue, ...], int]] = []
        for common, alike in itertools.groupby(invocations, lambda invocation: invocation.common):
            several = list(alike)
            if common is not None:
                num_bytes = self._num_bytes(common)  # packed once
                if self._admission.admit_now(num_bytes):
                    admitted.append(self._add_alike(calls, reduction, several, common, num_bytes))
                    continue
            for invocation in several:
                num_bytes = self._num_bytes(common or _own(invocation.args, invocation.kwargs))
                if not self._admission.admit_now(num_bytes):
                    turn = self._admission.request(num_bytes)
                    requests[turn] = num_bytes
                    tasks.append(asyncio.ensure_future(self._reduce_late(reduction, invocation, turn, requests)))
                else:
                    admitted.append((*self._add_call(calls, reduction, invocation, num_bytes), 1))
        try:
            try:
                if calls:
                    if self._cut is not None:
                        await self._wait_for_cut(*[call.client_id for call in calls.values()])
                    await self._learners.reduce(reduction, calls)
            finally:  # before the wait for calls that need this room
                for num_bytes, values, num_calls in admitted:
                    self._admission.release(num_bytes + self._release(values, num_calls) if values else num_bytes)
        except Exception:
            await all_ended(tasks)  # all calls run to their end
            raise
        else:
            if tasks:
                await all_ended(tasks)
        finally:
            for task in tasks:
                task.cancel()
            for turn, num_bytes in requests.items():  # of tasks that were cancelled while they waited
                self._admission.withdraw(turn, num_bytes)
            requests.clear()

    async def _reduce_late(
        self,
        reduction: Reduction,
        invocation: Invocation,
        turn: asyncio.Future[None],
        requests: dict[asyncio.Future[None], int],
    ) -> None:
        """Run one call of a reduction once its request for admission is granted, unless the reduction is stopped."""
        num_bytes = requests.pop(turn)
        reduction.stopped.add_done_callback(lambda _: turn.cancel())
        try:
            await self._admission.wait(turn, num_bytes)
        except asyncio.CancelledError:
            if turn.cancelled() and reduction.stopped.done():
                return
            raise
        calls: dict[int, Call] = {}
        values: tuple[SharedValue, ...] = ()
        try:
            num_bytes, values = self._add_call(calls, reduction, invocation, num_bytes)
            if calls:
                await self._wait_for_cut(invocation.client_id)
                await self._learners.reduce(reduction, calls)
        finally:
            self._admission.release(num_bytes + self._release(values))

    def _add_alike(
        self,
        calls: dict[int, Call],
        reduction: Reduction,
        invocations: Sequence[Invocation],
        common: Arguments,
        num_bytes: int,
    ) -> tuple[int, tuple[SharedValue, ...], int]:
        """Add calls with common arguments to those to make, by place.

        Returns:
            Bytes admitted for these calls alone, the shared values that only calls of their tick use, and the number
            of calls.
        """
        for invocation in invocations:
            call, _ = self._call(invocation, common)
            calls[reduction.places[invocation.client_id]] = call
        values, num_calls = common.values, len(invocations)
        own_bytes = num_bytes - self._hold(values, num_bytes, num_calls) if values else num_bytes
        return own_bytes, values, num_calls

    def _add_call(
        self, calls: dict[int, Call], reduction: Reduction, invocation: Invocation, num_bytes: int
    ) -> tuple[int, tuple[SharedValue, ...]]:
        """Pack a call of a reduction, and add it to those to make, by place. An error is that of the call.

        Returns:
            Bytes admitted for this call alone, and the shared values that only calls of its tick use.
        """
        try:
            arguments = invocation.common or _own(*_held(invocation))
            call, values = self._call(invocation, arguments, num_bytes)
        except Exception as error:
            reduction.note(invocation.client_id, without_traces(error))  # they refer to the reduction and arguments
            self._admission.release(num_bytes)
            return 0, ()
        calls[reduction.places[invocation.client_id]] = call
        return num_bytes - self._hold(values, num_bytes) if values else num_bytes, values

    def pack_common(self, args: tuple[Any, ...], kwargs: dict[str, Any], num_calls: int) -> Arguments:
        """Pack the arguments that several calls have in common, large values apart.

        Raises:
            SerializationError: If they cannot be sent, or a shared reference among them was released.
        """
        args, kwargs = held(args, kwargs)
        num_bytes = estimate(args, kwargs)
        if num_bytes >= MIN_SHARED_BYTES:
            if self._counts is not None:  # another worker may run some of the calls later: workers keep the values
                num_calls += 1
            args, kwargs = self._sharing.shared(args, kwargs, num_calls)
            num_bytes = estimate(args, kwargs)
        packed = self._learners.take_arguments(args, kwargs)
        if isinstance(packed, Parcel) and packed.slots:
            packed = replace(packed, is_common=True)
        return Arguments(args, kwargs, num_bytes, _tick_values(args, kwargs), packed)

    def _recognised(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Return the arguments of a single call, with values that it shares with calls of this tick."""
        if self._sharing.has_seen:
            args, kwargs = self._sharing.recognised(args, kwargs)
        return _own(args, kwargs)

    def _num_bytes(self, arguments: Arguments) -> int:
        """Return the estimated bytes of a call's arguments, without shared values that other calls have."""
        num_bytes = arguments.num_bytes
        for value in arguments.values:
            if value not in self._holders:
                num_bytes += value.num_bytes
        return num_bytes

    def plan(self, client_ids: Sequence[str], method: str, *, may_end_early: bool) -> list[str]:
        """Order clients by the durations of earlier calls: longest first, or fastest first if awaited."""
        expected = self._durations.expected(client_ids, method)
        return fastest_first(expected) if may_end_early else longest_first(expected)

    async def snapshot(self, client_id: str) -> bytes:
        """Return a learner's state between two calls."""
        await self.wait_behind_calls(client_id)
        call = self._snapshot_call(client_id)
        return await self._sealed(await self._learners.call(call), call)

    async def wait_behind_calls(self, client_id: str) -> None:
        """Wait behind calls that wait for admission, and for a checkpoint's snapshot of the learner."""
        await self._admission.admit(0)
        await self._wait_for_cut(client_id)

    async def capture(self, client_id: str) -> bytes:
        """Return a learner's part of a consistent snapshot; empty if the learner was given up."""
        if self._counts is not None:
            return self._counts.capture(client_id)
        call = self._snapshot_call(client_id)
        outcome = await self._learners.capture(call)
        return await self._sealed(outcome, call) if outcome is not None else b""

    async def restore(self, client_id: str, data: bytes) -> None:
        """Replace a learner by a new one with the state of a snapshot."""
        if not isinstance(data, bytes | bytearray | memoryview) or not data:
            raise SnapshotError(f"the snapshot of {client_id} must be bytes as snapshots() gives them, not {data!r}")
        if self._counts is not None:
            self._counts.restore(load(data, self.allow), client_id)
            return
        constructor = dict(self._spec.clients[client_id])
        await self._admission.admit(len(data))
        try:
            state = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            arguments = self._learners.take_value((state, constructor))
            call = Call(next(self._own_call_ids), client_id, "restore", arguments, kind="restore")
            await self._wait_for_cut(client_id)
            self.result(await self._learners.call(call), call)
        finally:
            self._admission.release(len(data))

    def stream(self, invocation: Invocation) -> ItemStream:
        """Open a stream. The first step sends the call."""
        call, _ = self._call(invocation, Arguments(invocation.args, invocation.kwargs), kind="stream")
        return CallStream(self, call)

    def begin_stream(self, call: Call) -> tuple[Call, Steps]:
        """Return the call of a stream, with its number if the driver numbers calls, and the steps of its method."""
        call = replace(call, number=self._next_number(call.client_id, call.method))
        return call, self._learners.stream(call)

    def take_sent(self, call: Call, value: Any) -> Packed:
        """Pack a value that is sent into a stream.

        Raises:
            SerializationError: If it cannot be sent.
        """
        try:
            return self._learners.take_value(value)
        except SerializationError as error:
            raise type(error)(f"the value sent to {call.client_id}.{call.method} cannot be sent: {error}") from error

    def follow(self, cut: Cut) -> None:
        """Let calls submitted from now on wait for their learners' snapshots of this consistent snapshot."""
        if self._counts is not None:
            self._counts.cut()
        else:
            self._cut = cut

    async def _wait_for_cut(self, *client_ids: str) -> None:
        """Wait until the consistent snapshot in progress, if any, has requested the snapshots of these learners."""
        if (cut := self._cut) is not None:
            await cut.passed(*client_ids)
            if cut.is_over and self._cut is cut:
                self._cut = None

    def share(self, obj: Any) -> SharedRef:
        """Return a shared reference to the present value of an object, for arguments of later calls."""
        reference: SharedRef = self._sharing.place(obj)
        return reference

    def worker_of(self, client_id: str) -> str:
        """Return the name of the process that has a client's learner."""
        return self._learners.worker_of(client_id)

    def rref(self, client_id: str) -> Any:
        """Return the learner's RRef in the current world; None if calls do not use RPC."""
        return self._learners.rref(client_id)

    def workers(self) -> list[str]:
        """Return the names of the processes that run learners."""
        return self._learners.workers()

    async def arm(self, faults: Mapping[str, Sequence[Fault]]) -> None:
        """Inject faults into workers at later calls."""
        await self._learners.arm(faults)

    async def interrupt(self, give_up: bool) -> list[str]:
        """Interrupt cancelled methods that go on. See `AbstractExecutor.interrupt`."""
        return [] if isinstance(self._learners, NotOpened) else await self._learners.interrupt(give_up)

    def stats(self) -> dict[str, Any]:
        """Return the bytes sent and received, and the number of learners of each worker."""
        own = {} if isinstance(self._learners, NotOpened) else self._learners.stats()
        return {**super().stats(), **own}

    def _hold(self, values: Iterable[SharedValue], num_bytes: int, num_calls: int = 1) -> int:
        """Add calls to the holders of these values; return the bytes admitted for values without other holders."""
        num_own = 0
        for value in values:
            holders = self._holders.get(value)
            if holders is None:
                admitted = min(value.num_bytes, num_bytes - num_own)
                holders = self._holders[value] = [0, admitted]
                num_own += admitted
            holders[0] += num_calls
        return num_own

    def _release(self, values: Iterable[SharedValue], num_calls: int = 1) -> int:
        """Remove calls from the holders of these values; return the bytes admitted for values without holders."""
        num_bytes = 0
        for value in values:
            self._holders[value][0] -= num_calls
            if not self._holders[value][0]:
                num_bytes += self._holders.pop(value)[1]
                value.num_unsent = 0  # else workers would keep it for calls that were cancelled before they were sent
                self._learners.unshare(value)
        return num_bytes

    def _call(
        self, invocation: Invocation, arguments: Arguments, num_bytes: int = 0, kind: CallKind = "call"
    ) -> tuple[Call, tuple[SharedValue, ...]]:
        """Return a call, and the shared values of its arguments that only calls of its tick use.

        Raises:
            SerializationError: If its arguments cannot be sent.
        """
        packed, values = arguments.packed, arguments.values
        try:
            if packed is None:
                args, kwargs = arguments.args, arguments.kwargs
                if num_bytes >= MIN_SHARED_BYTES:
                    args, kwargs = self._sharing.shared(args, kwargs)
                    values = _tick_values(args, kwargs)
                packed = self._learners.take_arguments(args, kwargs) if args or kwargs else pack_nothing()
        except SerializationError as error:
            raise _unsendable(invocation, error) from error
        client_id, method = invocation.client_id, invocation.method
        number = self._next_number(client_id, method) if kind == "call" else None  # a stream begins later
        if (trace := invocation.trace) is not None:
            trace.is_kept = True
        timeout_s = invocation.run_timeout_s
        return Call(invocation.call_id, client_id, method, packed, timeout_s, kind, number, trace), values

    def _next_number(self, client_id: str, method: str) -> int | None:
        """Return the number of a stateless learner's next call; None for learners with state, whose hosts count."""
        return self._counts.next_number(client_id, method) if self._counts is not None else None

    def _snapshot_call(self, client_id: str) -> Call:
        return Call(next(self._own_call_ids), client_id, "snapshot", pack(None), kind="snapshot")

    async def _sealed(self, outcome: Outcome, call: Call) -> bytes:
        data: torch.Tensor = self.result(outcome, call)
        return await asyncio.to_thread(lambda: bytes(seal(data)))

    def uncount(self, call: Call) -> None:
        """Give the number of a stateless learner's call, which left nothing, to the next one."""
        if self._counts is not None and call.number is not None:
            self._counts.give_back(call.client_id, call.method, call.number)

    def result(self, outcome: Outcome, call: Call) -> Any:
        """Return the result of a call or the item of a stream; see `Outcome.result`."""
        return outcome.result(call, self.allow, self._learners.worker_of(call.client_id))


class CallStream:
    """Open stream of an executor with learners in hosts.

    Args:
        executor: The executor.
        call: The call.
    """

    def __init__(self, executor: CallExecutor, call: Call) -> None:
        self._executor = executor
        self._call = call
        self._steps: Steps | None = None  # from the first step on
        self._ended = self._closed = False

    async def step(self, value: Any = None) -> Any:
        """Send a value into the generator, and return the next item."""
        if self._ended or self._closed:
            raise StopAsyncIteration
        sent = None if value is None else self._executor.take_sent(self._call, value)  # an error lets `close` close
        try:
            if self._steps is None:
                await self._executor.wait_behind_calls(self._call.client_id)
                if self._closed:
                    raise StopAsyncIteration
                self._call, self._steps = self._executor.begin_stream(self._call)
            outcome = await self._steps.next(sent)
        except BaseException:
            self._ended = True
            raise
        self._ended = outcome.kind != "item"
        if outcome.never_ran:  # or is lost: it has left nothing, so that its number is free
            self._executor.uncount(self._call)
        if outcome.kind == "end" or self._closed:
            raise StopAsyncIteration
        return self._executor.result(outcome, self._call)

    def close(self) -> None:
        """Close the generator on its host, if it is open. The learner is free after the generator has ended."""
        if self._steps is not None and not self._ended and not self._closed:
            self._steps.close()
        self._closed = True


def without_traces(error: Exception) -> Exception:
    """Clear the tracebacks of an error and its context, which would form reference cycles, and return the error."""
    part: BaseException | None = error
    while part is not None:
        part = part.with_traceback(None).__context__
    return error


def _own(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Return the arguments of a single call."""
    return Arguments(args, kwargs, estimate(args, kwargs), _tick_values(args, kwargs))


def _tick_values(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[SharedValue, ...]:
    """Return the shared values among arguments that only calls of their tick use."""
    values: tuple[SharedValue, ...] = ()
    for value in (*args, *kwargs.values()):
        if isinstance(value, SharedValue) and value.is_for_tick:
            values = (*values, value)
    return values


def _held(invocation: Invocation) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call, with references replaced by their shared values.

    Raises:
        SerializationError: If a reference was released.
    """
    try:
        return held(invocation.args, invocation.kwargs)
    except SerializationError as reason:
        raise _unsendable(invocation, reason) from reason


def _unsendable(invocation: Invocation, error: SerializationError) -> SerializationError:
    return type(error)(f"the arguments of {invocation.client_id}.{invocation.method} cannot be sent: {error}")
