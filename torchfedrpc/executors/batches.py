"""Batches of a reduction on workers: one request to each worker, and another one after a loss."""

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
    """One call of a reduction, which holds the turn of its learner until it ends.

    Attributes:
        place: The client's place.
        call: The call.
        session: The learner's session.
        num_retries: Number of times to make the call again if its method was not begun.
        has_turn: Whether it holds the turn.
    """

    place: int
    call: Call
    session: LearnerSession
    num_retries: int
    has_turn: bool = False

    def begin(self) -> None:
        """Note that the turn was taken."""
        self.has_turn = True
        self.session.begin(self.call)

    def settle(self, outcome: Outcome) -> None:
        """Record the call, and pass the turn on."""
        self.has_turn = False
        self.session.settle(self.call, outcome)

    def give_turn(self) -> None:
        """Pass the turn on, if it is still held."""
        if self.has_turn:
            self.has_turn = False
            self.session.turns.give()


class Batches:
    """Makes the calls of a reduction, each in its learner's turn, as one batch for each worker.

    A call of a learner that takes part waits until the partial results of the learner's worker have come. If a worker
    is lost, its calls are made again where their learners are rebuilt.

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
        self._num_losses = 0  # of workers in succession that ran none of the calls

    async def run(self, parts: Sequence[Part]) -> None:
        """Make calls. Those of learners that are busy are batches of their own.

        Raises:
            MergeError: If two results cannot be merged.
            CallTimeoutError: If a worker could not merge its results in time.
            WorkerLostError: If workers are lost again and again as they merge results.
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
        """Make calls whose turns are held, again after losses, and pass the turns on."""
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
        """Return the calls whose learners have a worker, moved or rebuilt first if need be; note the others' end."""
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
        """Run one batch. Returns the calls that are to be made again, whose turns are still held."""
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
        """Return the calls that a lost worker takes along and that are to be made again.

        Raises:
            WorkerLostError: If workers were lost more than ``max_recoveries`` times as they ran none of the calls.
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
        """Return whether a call is still to be made; of a stopped reduction only if its result has counted."""
        return not self._progress.stopped.is_set() or part.call.client_id in self._progress.succeeded
