"""Reduction on the driver: its clients, the ends of their calls, and its value."""

from __future__ import annotations

import asyncio
import copy
import math
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Protocol

import torch

from torchfedrpc.errors import SerializationError
from torchfedrpc.host.call import Batch, Call, Outcome
from torchfedrpc.reduce.partial import open_nodes, open_reducer, pack_reducer
from torchfedrpc.reduce.reducers import Reducer, is_builtin
from torchfedrpc.reduce.tree import Forest, MergeError, Node, covered, merged
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.exceptions import Failure
from torchfedrpc.wire.packing import Packed, Parcel

_SMALL_BYTES = 1 << 20


class CountedCall(Protocol):
    """A call that was counted when it began."""

    def end(self, failure: BaseException | None) -> None:
        """Count its end; a second call does nothing."""


class BatchWorker(Protocol):
    """Process that runs batches."""

    @property
    def label(self) -> str:
        """Its name."""

    @property
    def clock_ahead_s(self) -> float:
        """Seconds that its clock is ahead of the driver's."""

    async def run_batch(self, batch: Batch) -> Outcome:
        """Run a batch, or attach to a running one, and return its first outcome."""

    async def advance(self, batch: Batch, num_known: int, /) -> Outcome:
        """Request the calls of a watched batch that have ended after the first ``num_known``, or the batch's end."""

    def cancel_batch(self, batch: Batch) -> None:
        """Cancel the calls of a batch that have not ended."""


class Reduction:
    """A reduce, from its calls to its value. The executors that make the calls report to it.

    Args:
        prototype: An empty reducer.
        client_ids: The clients by place, that is in the order in which their results are merged.
        allow: The types that may travel.
        num_retries: Number of retries of a call if its method has not begun.
        min_results: Number of results after which the other calls are cancelled; None for no such number.
        is_watched: Whether the end of each call is reported at once, rather than with the partial results.
        fastest_first: Whether the calls that are expected to be fastest begin first.

    Attributes:
        prototype: The packed reducer, copied for each use.
        client_ids: The clients, by place.
        places: Client -> its place.
        is_watched: Whether the end of each call is reported at once.
        fastest_first: Whether the calls that are expected to be fastest begin first.
        calls: Client -> its call; calls that have begun.
        succeeded: Clients with a success as their last end.
        failures: Client -> error of its last end.
        nodes: Partial results.
        counted: Places of the clients with a result in ``nodes``.
        stopped: Done when the pending calls are cancelled.
    """

    def __init__(
        self,
        prototype: Reducer,
        client_ids: Sequence[str],
        allow: AllowList,
        *,
        num_retries: int = 0,
        min_results: int | None = None,
        is_watched: bool = False,
        fastest_first: bool = False,
    ) -> None:
        self.prototype: Packed = pack_reducer(prototype)
        self.client_ids = tuple(client_ids)
        self.places = dict(zip(client_ids, range(len(client_ids)), strict=True))
        self.is_watched = is_watched
        self.fastest_first = fastest_first
        self.calls: dict[str, CountedCall] = {}
        self.succeeded: set[str] = set()
        self.failures: dict[str, BaseException] = {}
        self.nodes: list[Node] = []
        self.counted: set[int] = set()
        self.stopped: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._is_builtin = is_builtin(prototype)
        self._reducer = copy.copy(prototype) if self._is_builtin else open_reducer(self.prototype.copy(), allow)
        self._allow = allow
        self._num_retries = num_retries
        self._min_results = min_results
        self._is_closed = False
        self._num_bytes = 0.0  # of partial results
        self._num_repeats: Counter[int] = Counter()  # of a call, by place
        self._open: dict[tuple[str, int], tuple[BatchWorker, Batch]] = {}

    def forest(self) -> Forest:
        """Return an empty forest for results of these clients."""
        return Forest(self._reducer, len(self.client_ids))

    # Calls.

    @property
    def pending(self) -> list[str]:
        """Clients whose calls have begun and not ended."""
        ended = self.succeeded | self.failures.keys()
        return [client_id for client_id in self.calls if client_id not in ended]

    @property
    def waited_for(self) -> list[str]:
        """Workers with outstanding partial results, for messages."""
        return list(dict.fromkeys(worker.label for worker, _ in self._open.values()))

    @property
    def is_complete(self) -> bool:
        """Whether the results of all calls that succeeded have come."""
        return self.counted.issuperset(map(self.places.__getitem__, self.succeeded))

    def close(self) -> None:
        """Ignore whatever comes from now on, from batches that go on in the background."""
        self._is_closed = True

    def stop(self, errors: Mapping[str, Exception] | None = None) -> None:
        """Cancel the pending calls. Later errors do not count, but results that come nevertheless do.

        Args:
            errors: Client -> error of its pending call.
        """
        for client_id, error in (errors or {}).items():
            self.note(client_id, error)
        if not self.stopped.done():
            self.stopped.set_result(None)
        for worker, batch in self._open.values():
            worker.cancel_batch(batch)

    def note(self, client_id: str, error: BaseException | None) -> None:
        """Record the end of a client's call. A call repeated after a loss may end twice."""
        if self._is_closed:
            return
        if error is None:
            self.succeeded.add(client_id)
            self.failures.pop(client_id, None)
        else:
            self.succeeded.discard(client_id)
            if self.stopped.done():
                return
            self.failures[client_id] = error
        if (call := self.calls.get(client_id)) is not None:
            call.end(error)
        if self._min_results is not None:
            asyncio.get_running_loop().call_soon(self._stop_if_settled)  # behind all ends of this tick

    def _stop_if_settled(self) -> None:
        """Stop if there are enough results, or if there cannot be enough any more."""
        needed = self._min_results
        if needed is None or self.stopped.done():
            return
        if len(self.succeeded) >= needed or len(self.calls) - len(self.failures) < needed:
            self.stop()

    # Batches.

    def batch(self, call_id: int, calls: Mapping[int, Call], timeout_s: float | None) -> Batch:
        """Return calls of one process as a batch.

        Args:
            call_id: Id of the batch.
            calls: Place -> call.
            timeout_s: Seconds that merging may take there; None for no limit.
        """
        num_places = len(self.client_ids)
        return Batch(call_id, self.prototype, num_places, tuple(calls.items()), self.is_watched, timeout_s)

    async def run(self, worker: BatchWorker, batch: Batch) -> tuple[Outcome, dict[int, Call]]:
        """Run a batch to its end, and record the ends of its calls. `take` then takes its partial results.

        Returns:
            The final outcome, which contains the outcomes of all calls; and place -> call of those to repeat, on
            another worker if they were given back.

        Raises:
            SerializationError: If the worker answers with other calls than it was sent.
            Exception: If the worker could not read or carry out the request.
        """
        calls = dict(batch.calls)
        self._open[worker.label, batch.call_id] = worker, batch
        try:
            outcome, num_known = await worker.run_batch(batch), 0
            while outcome.kind == "item":
                self._note_calls(worker, calls, outcome.of_calls)
                num_known += len(outcome.of_calls)
                outcome = await worker.advance(batch, num_known)
        finally:
            del self._open[worker.label, batch.call_id]
        if outcome.failure is not None and not outcome.of_calls:
            raise outcome.failure.restore(self._allow, f"as {worker.label} was asked to reduce")
        if len(outcome.of_calls) != len(calls) or dict(outcome.of_calls).keys() != calls.keys():
            raise SerializationError(f"{worker.label} has answered a batch with other calls than it was sent")
        self._note_calls(worker, calls, outcome.of_calls[num_known:])
        again = {}
        for place, of_call in outcome.of_calls:
            if of_call.kind == "given_back":
                again[place] = calls[place]
            elif self._num_retries and self._is_to_repeat(place, of_call):
                again[place] = calls[place]
                self._num_repeats[place] += 1
        return outcome, again

    def take(self, worker: BatchWorker, batch: Batch, outcome: Outcome) -> None:
        """Take the partial results of a batch.

        Raises:
            MergeError: If two results could not be merged.
            SerializationError: If the partial results cannot be read, or are not those of the batch's clients.
            Exception: If the worker could not merge or send them.
        """
        places_of_batch = dict(batch.calls).keys()
        if outcome.failure is not None:
            raise _merge_failure(outcome.failure, places_of_batch, self._allow, worker.label)
        missing = expected = places_of_batch - self.counted
        nodes, num_bytes = [], 0.0
        if outcome.parcel is not None:
            num_bytes = outcome.parcel.num_bytes if isinstance(outcome.parcel, Parcel) else math.inf
            nodes = open_nodes(outcome.parcel, self._reducer, self._allow)
        for level, index, _ in nodes:
            places = covered(level, index, len(self.client_ids))
            if not places or not missing.issuperset(places):
                raise SerializationError(f"{worker.label} has answered a batch with results of other clients")
            missing = missing.difference(places)
        for place, of_call in outcome.of_calls:
            if place in missing and of_call.kind == "value":
                raise SerializationError(f"{worker.label} has answered a batch without the results of its calls")
        if not self._is_closed:
            self.nodes += nodes
            self.counted |= expected - missing
            self._num_bytes += num_bytes

    def add_nodes(self, nodes: Iterable[Node]) -> None:
        """Add partial results that this process has formed."""
        if self._is_closed:
            return
        self._num_bytes = math.inf  # unknown
        for level, index, reducer in nodes:
            self.nodes.append((level, index, reducer))
            self.counted.update(covered(level, index, len(self.client_ids)))

    def _note_calls(
        self, worker: BatchWorker, calls: Mapping[int, Call], of_calls: Iterable[tuple[int, Outcome]]
    ) -> None:
        """Record the ends of calls, except of those to repeat."""
        for place, outcome in of_calls:
            if (call := calls.get(place)) is None:
                raise SerializationError(f"{worker.label} has answered a batch with other calls than it was sent")
            if call.trace is not None:
                call.trace.answered(outcome.stamps, worker.clock_ahead_s)
            if outcome.kind == "value":
                self.note(call.client_id, None)
            elif outcome.kind != "given_back" and not self._is_to_repeat(place, outcome):
                self.note(call.client_id, _error_of(outcome, call, self._allow, worker.label))

    def _is_to_repeat(self, place: int, outcome: Outcome) -> bool:
        return (
            outcome.kind == "failed"
            and self._num_repeats[place] < self._num_retries
            and not self.stopped.done()
            and outcome.may_succeed_later
        )

    # The value.

    async def finish(self) -> object:
        """Merge the partial results of at least one client, and return the value.

        Raises:
            MergeError: If two of them cannot be merged.
            Exception: If the reducer's ``finish`` raised it.
        """
        if self._is_builtin and self._num_bytes <= _SMALL_BYTES:  # cheaper than a switch of threads
            return self._finish(torch.get_num_threads())
        return await asyncio.to_thread(self._finish, torch.get_num_threads())

    def _finish(self, num_threads: int) -> object:
        """Set this thread's number of threads first, since it affects the bits of a user-defined reducer's sums."""
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        try:
            nodes, self.nodes = self.nodes, []
            return merged(nodes, len(self.client_ids)).finish()
        except StopIteration as error:  # a future cannot raise it, so its awaiter would hang
            raise RuntimeError(f"the reducer raised StopIteration: {error}") from error
        finally:
            torch.set_num_threads(before)


def _merge_failure(failure: Failure, places: Container[int], allow: AllowList, worker: str) -> BaseException:
    """Return the error of a batch with calls at these places."""
    error = failure.restore(allow, f"as results were merged on {worker}")
    if isinstance(error, MergeError) and not error.is_between(places):
        return SerializationError(f"{worker} has answered a batch with an error of other clients")
    return error


def _error_of(outcome: Outcome, call: Call, allow: AllowList, worker: str) -> BaseException | None:
    """Return the error of a call that failed. Its traceback would refer to this frame, and so to itself."""
    try:
        outcome.result(call, allow, worker)
    except BaseException as error:
        return error.with_traceback(None)
    return None
