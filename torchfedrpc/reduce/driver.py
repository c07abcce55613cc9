"""Reduction on the driver: its clients, the ends of its calls, and its value."""

from __future__ import annotations

import asyncio
import copy
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch

from torchfedrpc.host.call import Batch, Outcome
from torchfedrpc.reduce.reducers import Reducer, are_small
from torchfedrpc.reduce.tree import Forest, Node
from torchfedrpc.wire.packing import Packed, pack


class Reduction:
    """Clients of a reduction, in the order in which their results are merged, and its reducer.

    Args:
        prototype: An empty reducer.
        client_ids: The clients, by place.

    Attributes:
        prototype: The packed reducer, copied for each use.
        client_ids: The clients, by place.

    Raises:
        SerializationError: If the reducer cannot be sent.
    """

    def __init__(self, prototype: Reducer, client_ids: Sequence[str]) -> None:
        self.prototype: Packed = pack(prototype)
        self._reducer = copy.deepcopy(prototype)
        self.client_ids = tuple(client_ids)
        self._place_of = {client_id: place for place, client_id in enumerate(self.client_ids)}

    def place_of(self, client_id: str) -> int:
        """Return the place of a client."""
        return self._place_of[client_id]

    def forest(self) -> Forest:
        """Return an empty forest for results of these clients."""
        return Forest(self._reducer, range(len(self.client_ids)))

    async def finish(self, nodes: Sequence[Node]) -> Any:
        """Merge partial results of at least one client, and return the value.

        Raises:
            MergeError: If two of them cannot be merged.
            Exception: If the reducer's ``finish`` raised it.
        """
        if are_small(reducer for _, _, reducer, _ in nodes):
            return self._finish(nodes, torch.get_num_threads())
        return await asyncio.to_thread(self._finish, nodes, torch.get_num_threads())

    def _finish(self, nodes: Iterable[Node], num_threads: int) -> Any:
        """Set this thread's number of threads first, since it affects the bits of a user-defined reducer's sums."""
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        try:
            forest = self.forest()
            for node in nodes:
                forest.put(*node)
            for place in forest.waiting():
                forest.skip(place)
            value, _ = forest.finish()
            return value
        except StopIteration as error:  # a future cannot raise it, so its awaiter would hang
            raise RuntimeError(f"the reducer raised StopIteration: {error}") from error
        finally:
            torch.set_num_threads(before)


class BatchWorker(Protocol):
    """Process that runs batches."""

    label: str

    async def run_batch(self, batch: Batch) -> Outcome:
        """Run a batch, or attach to a running one, and return its first outcome."""

    async def advance(self, batch: Batch, num_known: int, /) -> Outcome:
        """Request the calls of a watched batch that have ended after the first ``num_known``, or the batch's end."""

    def cancel_batch(self, batch: Batch) -> None:
        """Cancel the calls of a batch that have not ended."""


class ReduceProgress:
    """Progress of a reduction: ends of calls and partial results, reported by the executors that run it.

    Args:
        is_watched: Whether the end of each call is reported at once, for a deadline or a quorum.

    Attributes:
        is_watched: Whether the end of each call is reported at once.
        ended: Queue of clients with ended calls, each with its error or None; the reader removes them.
        has_ended: Set when a call ends.
        succeeded: Clients with a success as their last end.
        nodes: Partial results.
        stopped: Set when the pending calls are cancelled.
    """

    def __init__(self, *, is_watched: bool = False) -> None:
        self.is_watched = is_watched
        self.ended: deque[tuple[str, BaseException | None]] = deque()
        self.has_ended = asyncio.Event()
        self.succeeded: set[str] = set()
        self.nodes: list[Node] = []
        self.stopped = asyncio.Event()
        self._open: dict[tuple[str, int], tuple[BatchWorker, Batch]] = {}

    def note(self, client_id: str, error: BaseException | None) -> None:
        """Record the end of a client's call. A call repeated after a loss may end twice."""
        if error is None:
            self.succeeded.add(client_id)
        else:
            self.succeeded.discard(client_id)
        self.ended.append((client_id, error))
        self.has_ended.set()

    @property
    def waited_for(self) -> list[str]:
        """Workers with outstanding partial results, for messages."""
        return list(dict.fromkeys(worker.label for worker, _ in self._open.values()))

    def stop(self) -> None:
        """Cancel the pending calls."""
        self.stopped.set()
        for worker, batch in self._open.values():
            worker.cancel_batch(batch)

    async def run(self, worker: BatchWorker, batch: Batch, note: Callable[[int, Outcome], None]) -> Outcome:
        """Run a batch on a worker to its end.

        Args:
            worker: The worker.
            batch: The batch.
            note: Receives place and outcome of each call that ends before the batch, if the batch is watched.

        Returns:
            The final outcome, which contains the outcomes of all calls.
        """
        self._open[worker.label, batch.call_id] = worker, batch
        try:
            outcome, num_known = await worker.run_batch(batch), 0
            while not outcome.is_final:
                for place, of_call in outcome.of_calls:
                    note(place, of_call)
                num_known += len(outcome.of_calls)
                outcome = await worker.advance(batch, num_known)
            return outcome
        finally:
            del self._open[worker.label, batch.call_id]


class Gathering:
    """Partial results of an executor that does not reduce on its workers: results are merged on the driver.

    Args:
        reduction: The reduction.
        progress: Receives the results.
    """

    def __init__(self, reduction: Reduction, progress: ReduceProgress) -> None:
        self._reduction = reduction
        self._progress = progress
        self._forest = reduction.forest()

    def add(self, client_id: str, method: str, result: Any) -> None:
        """Add a client's result. An error of the reducer counts as the error of this client's call."""
        try:
            self._forest.add(self._reduction.place_of(client_id), result)
        except Exception as error:
            error.add_note(f"in {client_id}.{method}, as its result was added up")
            self._progress.note(client_id, error)
        else:
            self._progress.note(client_id, None)

    def finish(self) -> None:
        """Report the partial results.

        Raises:
            MergeError: If two results cannot be merged.
        """
        self._progress.nodes += self._forest.take()


async def all_ended(tasks: Sequence[asyncio.Future[None]]) -> None:
    """Wait for all tasks, then raise the error of the first failed one. Cancelling the caller cancels the tasks."""
    try:
        answers = await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        for task in tasks:
            task.cancel()
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
