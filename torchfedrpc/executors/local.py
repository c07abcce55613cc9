"""Local mode: the driver's process is the host of all learners."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError, SerializationError, WorkerLostError
from torchfedrpc.executors.base import ExecutorSpec
from torchfedrpc.executors.call_executor import CallExecutor, Learners, without_traces
from torchfedrpc.executors.durations import Durations
from torchfedrpc.executors.log_relay import LocalLog
from torchfedrpc.host.call import Batch, Call, Outcome
from torchfedrpc.host.call_trace import CallTrace
from torchfedrpc.host.faults import Fault
from torchfedrpc.host.learner_host import LearnerHost, answer
from torchfedrpc.host.mailbox import Reply
from torchfedrpc.host.process import resident_bytes
from torchfedrpc.reduce.driver import Reduction
from torchfedrpc.registry import executor
from torchfedrpc.wire.packing import Packed, Reference, SentApart, pack
from torchfedrpc.wire.shared import shared_values


@executor("local")
class LocalExecutor(CallExecutor):
    """Executor that runs every learner in this process, on threads of its host."""

    def _make_learners(self, spec: ExecutorSpec) -> LocalLearners:
        return LocalLearners(self.config, spec, self._durations)


class LocalLearners(Learners):
    """Learners of the driver's host, which queues their calls in order.

    Args:
        config: The run's configuration.
        spec: The run.
        durations: Records the durations of cancelled calls.
    """

    label = "local"
    clock_ahead_s = 0.0

    def __init__(self, config: RuntimeConfig, spec: ExecutorSpec, durations: Durations) -> None:
        self._config = config
        self._durations = durations
        self._allow = spec.learner.allow_list()
        self._host = spec.make_host()
        self._log = LocalLog(self.label, config.worker_log_level.number, spec.events)
        self.is_open = True
        self._next_batch_id = -(1 << 40)
        self._unsubmitted: list[tuple[Call, Reply]] = []  # calls of this tick, which may yet share values

    async def open(self) -> None:
        """Receive the log records of learners."""
        self._log.open()

    async def close(self, reason: str) -> None:
        """End the host. A sync method that ignores its cancellation is abandoned after 2 seconds."""
        self.is_open = False
        await asyncio.to_thread(self._host.close)
        self._log.close()

    async def call(self, call: Call) -> Outcome:
        trace = call.trace
        if trace is not None:
            trace.sent(self.label)
        outcome = await answer(partial(self._submit, call), partial(self._cancel, call))
        if trace is not None:
            trace.answered(outcome.stamps)
        return outcome

    def stream(self, call: Call) -> LocalStream:
        return LocalStream(self, self._host, call)

    async def reduce(self, reduction: Reduction, calls: Mapping[int, Call]) -> None:
        """Run calls, by place, and reduce their results in the host; retry calls whose methods have not begun."""
        calls = dict(calls)
        for place, call in list(calls.items()):
            try:
                self._host.register_own(call.client_id)
            except SerializationError as error:
                del calls[place]
                reduction.note(call.client_id, without_traces(error))
        while calls:
            self._next_batch_id -= 1
            batch = reduction.batch(self._next_batch_id, calls, self._config.call_timeout_s)
            try:
                outcome, again = await reduction.run(self, batch)
            except asyncio.CancelledError:
                self._drop_batch(batch)
                raise
            for place, of_call in outcome.of_calls:
                self._durations.note(calls[place], of_call)
            reduction.take(self, batch, outcome)
            calls = again

    async def run_batch(self, batch: Batch) -> Outcome:
        """Run a batch in the host. Returns its (first) outcome.

        Raises:
            WorkerLostError: If the proxy is closed.
        """
        if not self.is_open:
            raise WorkerLostError("the proxy is closed")
        self.submit_tick()  # calls of this tick come before the batch
        batch.sent(self.label)
        return await answer(partial(self._host.run_batch, batch), lambda: None)

    async def advance(self, batch: Batch, num_known: int, /) -> Outcome:
        """Request the calls of a watched batch that have ended after the first ``num_known``, or the batch's end.

        Raises:
            WorkerLostError: If the proxy is closed.
        """
        if not self.is_open:  # a closed host has forgotten the batch
            raise WorkerLostError("the proxy is closed")
        outcome = await answer(partial(self._host.advance, batch.call_id, num_known), lambda: None)
        if outcome.is_final:
            self._host.acknowledge([batch.call_id])
        return outcome

    def _drop_batch(self, batch: Batch) -> None:
        """Cancel a batch that nobody waits for. An outcome that nobody has asked for would be kept."""
        self._host.cancel(batch.call_id)
        self._host.advance(batch.call_id, len(batch.calls), lambda outcome: None)  # only its final outcome is left
        self._host.acknowledge([batch.call_id])

    def cancel_batch(self, batch: Batch) -> None:
        """Cancel the calls of a batch that have not ended."""
        self._host.cancel(batch.call_id)

    def take_value(self, obj: Any) -> Packed:
        return self._host.take_value(obj)

    def take_shared(self, obj: Any) -> Packed:
        return self._host.take_value(obj)

    def take_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Packed:
        """Pack the arguments of a call; with ``isolation=none`` pass them by reference."""
        if self._config.isolation != "none":
            return pack((args, kwargs), may_refer=True)

        def opened(arg: Any) -> Any:
            return arg.open(self._allow) if isinstance(arg, SentApart) else arg

        return Reference((tuple(map(opened, args)), {name: opened(arg) for name, arg in kwargs.items()}))

    def worker_of(self, client_id: str) -> str:
        return self.label

    def workers(self) -> list[str]:
        return [self.label]

    async def arm(self, faults: Mapping[str, Sequence[Fault]]) -> None:
        """Inject delays into later calls, for a test.

        Raises:
            ConfigError: If a fault would strike the driver's process.
        """
        for label, of_label in faults.items():
            for fault in of_label:
                if fault.kind != "slow":
                    raise ConfigError(
                        f"{fault.kind} of {label!r} would strike the driver itself, whose process has these "
                        f"learners: only slow makes sense in local mode. Use worker processes "
                        f"(execution_mode=pseudo), or strike the driver at a round"
                    )
            self._host.arm(of_label)

    async def interrupt(self, give_up: bool) -> list[str]:
        return [self.label] if self._host.interrupt() else []

    def stats(self) -> dict[str, Any]:
        """Return the numbers of this process; nothing is sent in local mode."""
        return {"workers": {self.label: self._stats_here()} if self.is_open else {}}

    def _stats_here(self) -> dict[str, Any]:
        of_host = self._host.stats()
        return {
            "learners": of_host["learners"],
            "state": "serving",
            "machine": socket.gethostname(),
            "address": None,
            "pid": os.getpid(),
            "heartbeat_age_s": 0.0,
            "round_trip_s": 0.0,
            "bytes_sent": 0,
            "bytes_received": 0,
            "busy_s": of_host["busy_s"],
            "queue": of_host["pending_calls"],
            "memory_bytes": resident_bytes(),
        }

    def _submit(self, call: Call, reply: Reply) -> None:
        """Submit a call; at the end of the tick if it has a value that other calls of this tick may share."""
        if not self._unsubmitted and not any(value.is_for_tick for value in shared_values(call.arguments)):
            self._submit_now(call, reply)
            return
        if not self._unsubmitted:
            asyncio.get_running_loop().call_soon(self.submit_tick)
        self._unsubmitted.append((call, reply))

    def submit_tick(self) -> None:
        """Submit the calls that were made in this tick, whose values no later call will share."""
        unsubmitted, self._unsubmitted = self._unsubmitted, []
        for call, reply in unsubmitted:
            try:
                self._submit_now(call, reply)
            except Exception as error:
                reply(Outcome("failed", error=without_traces(error), never_ran=True))

    def _submit_now(self, call: Call, reply: Reply) -> None:
        if self.is_open:
            self._host.submit(call, reply)
        else:  # it has waited for admission until the proxy was closed
            reply(Outcome("cancelled", never_ran=True))

    def _cancel(self, call: Call) -> None:
        self._unsubmitted = [(other, reply) for other, reply in self._unsubmitted if other is not call]
        self._host.cancel(call.call_id, partial(self._durations.note, call))


class LocalStream:
    """Steps of a stream in the driver's host."""

    def __init__(self, learners: LocalLearners, host: LearnerHost, call: Call) -> None:
        self._learners = learners
        self._host = host
        self._call = call
        self._trace: CallTrace | None = call.trace
        self._num_items = 0

    async def next(self, sent: Packed | None = None) -> Outcome:
        """Send a value, if any, and run the method up to its next item."""
        if not self._learners.is_open:
            return Outcome("cancelled", never_ran=True)
        call, trace, step = self._call, self._trace, self._num_items
        self._num_items += 1
        if trace is not None:
            trace.sent(self._learners.label)
        if step:
            ask = partial(self._host.advance, call.call_id, step, sent=sent)
        else:
            self._learners.submit_tick()  # calls of this tick come before the stream
            ask, self._call = partial(self._host.submit, call), call.taken()
        outcome = await answer(ask, self.close)
        if trace is not None:
            trace.answered(outcome.stamps)
        return outcome

    def close(self) -> None:
        """Close the generator if it is open."""
        self._host.cancel(self._call.call_id)
