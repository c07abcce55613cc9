"""Batches of a reduction on workers: one request per worker, and another one after a loss."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchfedrpc.errors import SerializationError, WorkerLostError
from torchfedrpc.executors.call_executor import Ended, may_succeed_later
from torchfedrpc.executors.learner_session import LearnerSession, Run
from torchfedrpc.host.call import Batch, Call, Outcome
from torchfedrpc.reduce.driver import ReduceProgress, Reduction, all_ended
from torchfedrpc.reduce.tree import Node
from torchfedrpc.rpc.member import Member, WorkerGone
from torchfedrpc.rpc.worker_client import UndeliverableError


@dataclass(eq=False, slots=True)
class Part:
    """Call of a reduction. It holds the lock of its learner until it ends.

    Attributes:
        place: The client's place.
        call: The call.
        session: The learner's session.
        num_retries: Number of retries if its method has not begun.
        has_turn: Whether it holds the lock.
    """

    place: int
    call: Call
    session: LearnerSession
    num_retries: int
    has_turn: bool = False

    def begin(self) -> None:
        """Record that the lock was acquired."""
        self.has_turn = True
        self.session.begin(self.call)

    def settle(self, outcome: Outcome) -> None:
        """Record the outcome of the call, and release the lock."""
        self.has_turn = False
        self.session.settle(self.call, outcome)

    def give_turn(self) -> None:
        """Release the lock, if it is still held."""
        if self.has_turn:
            self.has_turn = False
            self.session.turns.give()


class Batches:
    """Calls of a reduction, sent as one batch per worker under the locks of their learners.

    Later calls of these learners wait until the partial results of the learner's worker have arrived. If a worker is
    lost, its calls are repeated where their learners are rebuilt.

    Args:
        run: The run.
        reduction: The reduction.
        progress: Receives partial results.
        ended: Receives the outcome of each call.
        timeout_s: Seconds that merging may take on a worker; None for no limit.
    """

    def __init__(
        self, run: Run, reduction: Reduction, progress: ReduceProgress, ended: Ended, timeout_s: float | None
    ) -> None:
        self._run = run
        self._reduction = reduction
        self._progress = progress
        self._ended = ended
        self._timeout_s = timeout_s
        self._num_losses = 0  # consecutive losses of workers that ran none of the calls

    async def run(self, parts: Sequence[Part]) -> None:
        """Make the calls. Calls of busy learners are separate batches.

        Raises:
            MergeError: If two results cannot be merged.
            CallTimeoutError: If a worker could not merge its results in time.
            WorkerLostError: If workers are lost more than ``max_recoveries`` times while they merge results.
        """
        free = [part for part in parts if part.session.turns.take_now()]
        for part in free:
            part.begin()
        making = [asyncio.ensure_future(self._make(free))]
        for part in parts:
            if part not in free:
                turn = part.session.turns.request()
                making.append(asyncio.ensure_future(self._make_later(part, turn)))
        try:
            await asyncio.shield(all_ended(making))
        except asyncio.CancelledError:
            self._progress.stop()
            raise

    async def _make_later(self, part: Part, turn: asyncio.Future[None]) -> None:
        stopped = asyncio.ensure_future(self._progress.stopped.wait())
        try:
            waiting: set[asyncio.Future[Any]] = {turn, stopped}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
        if self._progress.stopped.is_set():
            part.session.turns.withdraw(turn)
        else:
            part.begin()
            await self._make([part])

    async def _make(self, parts: list[Part]) -> None:
        """Make calls under held locks, repeat them after losses, and release the locks."""
        try:
            await self._make_all(parts)
        finally:
            for part in parts:
                part.give_turn()

    async def _make_all(self, parts: list[Part]) -> None:
        while parts:
            of_workers: defaultdict[Member, list[Part]] = defaultdict(list)
            for part, worker in await self._placed(parts):
                if self._is_wanted(part):
                    of_workers[worker].append(part)
            answers = await asyncio.gather(
                *(self._ask(worker, own) for worker, own in of_workers.items()), return_exceptions=True
            )
            parts = [part for again in answers if not isinstance(again, BaseException) for part in again]
            for answer in answers:
                if isinstance(answer, BaseException):
                    raise answer

    async def _placed(self, parts: list[Part]) -> list[tuple[Part, Member]]:
        """Move or rebuild learners as needed; return calls with their workers, and fail calls of lost learners."""
        placed: list[tuple[Part, Member]] = []
        waiting: list[Part] = []
        for part in parts:
            worker = part.session.ready()
            if worker is not None:
                placed.append((part, worker))
            else:
                waiting.append(part)
        if not waiting:
            return placed
        workers = await asyncio.gather(*(part.session.prepared() for part in waiting), return_exceptions=True)
        for part, answer in zip(waiting, workers, strict=True):
            if isinstance(answer, Member):
                placed.append((part, answer))
                continue
            if not isinstance(answer, WorkerLostError):
                raise answer
            part.give_turn()
            error = part.session.lost(part.call, str(answer))
            self._ended(part.call, Outcome("failed", error=error, never_ran=True))
        return placed

    async def _ask(self, worker: Member, parts: list[Part]) -> list[Part]:
        """Run one batch, and return the calls to repeat, with their locks held."""
        batch = Batch(
            self._run.next_call_id(),
            self._reduction.prototype,
            len(self._reduction.client_ids),
            tuple((part.place, part.call) for part in parts),
            self._progress.is_watched,
            self._timeout_s,
        )
        of_place = {part.place: part for part in parts}
        noted: set[int] = set()

        def note(place: int, outcome: Outcome) -> None:
            if not self._is_to_repeat(of_place[place], outcome):
                noted.add(place)
                self._ended(of_place[place].call, outcome)

        for part in parts:
            part.session.send(part.call)
        try:
            outcome = await self._progress.run(worker, batch, note)
        except WorkerGone as gone:
            return self._lost(worker, parts, gone)
        except UndeliverableError as error:
            for part in parts:
                lost = part.session.lost(part.call, str(error))
                part.settle(Outcome("failed", error=lost, cut_off=True))
            raise WorkerLostError(f"the partial results of {worker.label} are lost: {error}") from error
        self._num_losses = 0
        if sorted(place for place, _ in outcome.of_calls) != sorted(of_place):
            raise SerializationError(f"{worker.label} has answered a batch with other calls than it was sent")
        again = []
        for place, of_call in outcome.of_calls:
            part = of_place[place]
            if self._is_to_repeat(part, of_call):
                part.num_retries -= 1
                again.append(part)
                continue
            part.settle(of_call)
            if place not in noted:
                self._ended(part.call, of_call)
        self._progress.nodes += self._nodes(worker, outcome)
        return again

    def _nodes(self, worker: Member, outcome: Outcome) -> list[Node]:
        """Return the partial results of a batch.

        Raises:
            Exception: If the worker could not merge or send them.
        """
        if outcome.failure is not None:
            raise outcome.failure.restore(self._run.allow, f"as results were merged on {worker.label}")
        if outcome.parcel is None:
            return []
        nodes: list[Node] = outcome.parcel.open(self._run.allow)
        return nodes

    def _is_to_repeat(self, part: Part, outcome: Outcome) -> bool:
        return part.num_retries > 0 and not self._progress.stopped.is_set() and may_succeed_later(outcome)

    def _lost(self, worker: Member, parts: list[Part], gone: WorkerGone) -> list[Part]:
        """Record the loss of a worker, and return the calls to repeat.

        Raises:
            WorkerLostError: If workers that ran none of the calls were lost more than ``max_recoveries`` times.
        """
        for part in parts:
            part.session.lose(worker, gone)
        if self._run.journals_are_kept and not any(part.call.call_id in gone.running for part in parts):
            self._num_losses += 1
        if self._num_losses > self._run.max_recoveries:
            raise WorkerLostError(
                f"{worker.label} was lost while its partial results were collected (times in succession: "
                f"{self._num_losses}), so the reduction was given up: see the worker's output for why it ends; "
                f"runtime.max_recoveries={self._run.max_recoveries} is how often they are made again"
            )
        return [part for part in parts if self._is_wanted(part)]

    def _is_wanted(self, part: Part) -> bool:
        """Return whether a call is still needed; in a stopped reduction only if its result was counted."""
        return not self._progress.stopped.is_set() or part.call.client_id in self._progress.succeeded
