"""Local mode: the driver's process is the host of all learners."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError
from torchfedrpc.executors.base import ExecutorSpec
from torchfedrpc.executors.call_executor import CallExecutor, Ended, may_succeed_later
from torchfedrpc.executors.durations import Durations
from torchfedrpc.host.answer import answer
from torchfedrpc.host.call import Batch, Call, Outcome
from torchfedrpc.host.faults import Fault
from torchfedrpc.host.learner_host import LearnerHost
from torchfedrpc.host.mailbox import Reply
from torchfedrpc.reduce.driver import ReduceProgress, Reduction
from torchfedrpc.reduce.tree import Node
from torchfedrpc.registry import executor
from torchfedrpc.wire.packing import Packed, Reference, SentApart, pack
from torchfedrpc.wire.shared import SharedValue, shared_values


@executor("local")
class LocalExecutor(CallExecutor):
    """Executor that runs every learner in this process, on threads of its host."""

    def _make_learners(self, spec: ExecutorSpec) -> LocalLearners:
        return LocalLearners(self.config, spec, self._durations)


class LocalLearners:
    """Learners of the driver's host, which queues their calls in order.

    Args:
        config: The run's configuration.
        spec: The run.
        durations: Records the durations of cancelled calls.
    """

    label = "local"
    join_address = None

    def __init__(self, config: RuntimeConfig, spec: ExecutorSpec, durations: Durations) -> None:
        self._config = config
        self._durations = durations
        self._allow = spec.learner.allow_list()
        self._host = spec.make_host()
        self._is_open = True
        self._next_batch_id = -(1 << 40)
        self._unsubmitted: list[tuple[Call, Reply]] = []  # calls of this tick, which may yet share values

    async def open(self) -> None:
        """Do nothing: the host is ready."""

    async def close(self, reason: str) -> None:
        """End the host. A sync method that ignores its cancellation is abandoned after 2 seconds."""
        self._is_open = False
        await asyncio.to_thread(self._host.close)

    async def call(self, call: Call) -> Outcome:
        """Run a call, a snapshot or a restore of a learner, behind the calls submitted before."""
        return await answer(partial(self._submit, call), partial(self._cancel, call))

    def stream(self, call: Call) -> LocalStream:
        """Return the steps of a stream, which opens with its first one."""
        return LocalStream(self, self._host, call)

    async def capture(self, call: Call) -> Outcome | None:
        """Take a learner's part of a consistent snapshot."""
        return await self.call(call)

    async def reduce(
        self, reduction: Reduction, calls: Mapping[int, tuple[Call, int]], progress: ReduceProgress, ended: Ended
    ) -> None:
        """Run calls and reduce their results in the host; retry calls whose methods have not begun."""
        retries = {place: num_retries for place, (_, num_retries) in calls.items()}
        noted: set[int] = set()

        def is_to_repeat(place: int, outcome: Outcome) -> bool:
            return retries[place] > 0 and not progress.stopped.is_set() and may_succeed_later(outcome)

        def note(place: int, outcome: Outcome) -> None:
            if place not in noted and not is_to_repeat(place, outcome):
                noted.add(place)
                ended(calls[place][0], outcome)

        waiting = list(calls)
        while waiting:
            self._next_batch_id -= 1
            batch = Batch(
                self._next_batch_id,
                reduction.prototype,
                len(reduction.client_ids),
                tuple((place, calls[place][0]) for place in waiting),
                progress.is_watched,
                self._config.call_timeout_s,
            )
            try:
                outcome = await progress.run(self, batch, note)
            except asyncio.CancelledError:
                self._host.cancel(batch.call_id)
                raise
            waiting = [place for place, of_call in outcome.of_calls if is_to_repeat(place, of_call)]
            for place, of_call in outcome.of_calls:
                note(place, of_call)
            for place in waiting:
                retries[place] -= 1
            if outcome.failure is not None:
                raise outcome.failure.restore(self._allow, "as results were merged on local")
            if outcome.parcel is not None:
                nodes: list[Node] = outcome.parcel.open(self._allow)
                progress.nodes += nodes

    async def run_batch(self, batch: Batch) -> Outcome:
        """Run a batch in the host. Returns its (first) outcome."""
        self.submit_tick()  # calls of this tick come before the batch
        return await answer(partial(self._host.run_batch, batch), lambda: None)

    async def advance(self, batch: Batch, num_known: int, /) -> Outcome:
        """Request the calls of a watched batch that have ended after the first ``num_known``, or the batch's end."""
        outcome = await answer(partial(self._host.advance, batch.call_id, num_known), lambda: None)
        if outcome.is_final:
            self._host.acknowledge([batch.call_id])
        return outcome

    def cancel_batch(self, batch: Batch) -> None:
        """Cancel the calls of a batch that have not ended."""
        self._host.cancel(batch.call_id)

    def take_value(self, obj: Any) -> Packed:
        """Pack the present value of an object, for one call."""
        return self._host.take_value(obj)

    def take_shared(self, obj: Any) -> Packed:
        """Pack the present value of an object, for several calls."""
        return self._host.take_value(obj)

    def take_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Packed:
        """Pack the arguments of a call; with ``isolation=none`` pass them by reference."""
        if self._config.isolation != "none":
            return pack((args, kwargs), may_refer=True)

        def opened(arg: Any) -> Any:
            return arg.open(self._allow) if isinstance(arg, SentApart) else arg

        return Reference((tuple(map(opened, args)), {name: opened(arg) for name, arg in kwargs.items()}))

    def unshare(self, value: SharedValue) -> None:
        """Do nothing: only the calls that use a value refer to it."""

    def worker_of(self, client_id: str) -> str:
        """Return ``local``."""
        return self.label

    def rref(self, client_id: str) -> None:
        """Return None: calls do not use RPC."""

    def workers(self) -> list[str]:
        """Return the only name, ``local``."""
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
            self._host.arm(of_label, sever=lambda: None)

    def stats(self) -> dict[str, Any]:
        """Return the number of learners; nothing is sent in local mode."""
        return {"workers": {self.label: {"learners": self._host.stats()["learners"]}} if self._is_open else {}}

    def _submit(self, call: Call, reply: Reply) -> None:
        """Submit a call; at the end of the tick if it has a value that other calls of this tick may share."""
        if not self._unsubmitted and not any(value.is_for_tick for value in shared_values(call.arguments)):
            self._host.submit(call, reply)
            return
        if not self._unsubmitted:
            asyncio.get_running_loop().call_soon(self.submit_tick)
        self._unsubmitted.append((call, reply))

    def submit_tick(self) -> None:
        """Submit the calls that were made in this tick, whose values no later call will share."""
        unsubmitted, self._unsubmitted = self._unsubmitted, []
        for call, reply in unsubmitted if self._is_open else ():
            try:
                self._host.submit(call, reply)
            except Exception as error:
                reply(Outcome("failed", error=_without_traces(error), never_ran=True))

    def _cancel(self, call: Call) -> None:
        self._unsubmitted = [(other, reply) for other, reply in self._unsubmitted if other is not call]
        self._host.cancel(call.call_id, partial(self._durations.note, call))


class LocalStream:
    """Steps of a stream in the driver's host."""

    def __init__(self, learners: LocalLearners, host: LearnerHost, call: Call) -> None:
        self._learners = learners
        self._host = host
        self._call = call
        self._num_items = 0

    async def next(self) -> Outcome:
        """Run the method up to its next item."""
        call, step = self._call, self._num_items
        self._num_items += 1
        if step:
            ask = partial(self._host.advance, call.call_id, step)
        else:
            self._learners.submit_tick()  # calls of this tick come before the stream
            ask, self._call = partial(self._host.submit, call), call.taken()
        return await answer(ask, self.close)

    def close(self) -> None:
        """Close the generator if it is open."""
        self._host.cancel(self._call.call_id)


def _without_traces(error: Exception) -> Exception:
    """Clear the tracebacks of an error and its context, which would form reference cycles, and return the error."""
    part: BaseException | None = error
    while part is not None:
        part = part.with_traceback(None).__context__
    return error
