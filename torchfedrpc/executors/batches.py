"""Batches of a reduction on workers: one request per worker, and another one after a loss."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torchfedrpc.errors import SerializationError, WorkerLostError
from torchfedrpc.executors.session import Run, Session
from torchfedrpc.host.call import Call, Outcome
from torchfedrpc.reduce.driver import Reduction
from torchfedrpc.rpc.member import Member, WorkerGone
from torchfedrpc.rpc.worker_client import UndeliverableError
from torchfedrpc.tasks import all_ended, raise_first

Parts = dict[int, tuple[Call, Session]]
"""Calls by place, each with the session of its learner, whose lock it holds."""


@dataclass(eq=False)
class Batches:
    """Calls of a reduction, sent as one batch per worker under the locks of their learners.

    Later calls of these learners wait until the partial results of the learner's worker have arrived. If a worker is
    lost, its calls are repeated where their learners are rebuilt.

    Attributes:
        run: The run.
        reduction: The reduction.
        timeout_s: Seconds that merging may take on a worker; None for no limit.
        num_losses: Consecutive losses of workers that ran none of the calls.
    """

    run: Run
    reduction: Reduction
    timeout_s: float | None
    num_losses: int = 0

    async def make(self, parts: Parts) -> None:
        """Make calls. Calls of busy learners are separate batches.

        Raises:
            MergeError: If two results cannot be merged.
            CallTimeoutError: If a worker could not merge its results in time.
            WorkerLostError: If workers are lost more than ``max_recoveries`` times while they merge results.
        """
        free: Parts = {}
        later = []
        for place, (call, session) in parts.items():
            if session.turns.take_now():
                session.begin(call)
                free[place] = call, session
            else:
                later.append(self._make_later(place, call, session, session.turns.request()))
        making = self._make(free)
        if later:
            making = all_ended([asyncio.ensure_future(one) for one in (making, *later)])
        try:
            await asyncio.shield(making)
        except asyncio.CancelledError:
            self.reduction.stop()
            raise

    async def _make_later(self, place: int, call: Call, session: Session, turn: asyncio.Future[None]) -> None:
        waiting: set[asyncio.Future[Any]] = {turn, self.reduction.stopped}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if self.reduction.stopped.done():
            session.withdraw(turn)
        else:
            session.begin(call)
            await self._make({place: (call, session)})

    async def _make(self, parts: Parts) -> None:
        """Make calls, repeat them after losses, and release the locks."""
        try:
            while parts:
                asking = [self._ask(worker, own, parts) for worker, own in (await self._placed(parts)).items()]
                raise_first(await asyncio.gather(*asking, return_exceptions=True))
        finally:
            for _, session in parts.values():
                session.release()

    async def _placed(self, parts: Parts) -> dict[Member, dict[int, Call]]:
        """Move or rebuild learners as needed, and return the calls of each worker. Calls of lost learners fail."""
        if self.reduction.stopped.done():
            self._drop_unwanted(list(parts), parts)
        of_workers: defaultdict[Member, dict[int, Call]] = defaultdict(dict)
        unready = []
        for place, (call, session) in parts.items():
            if (worker := session.ready()) is not None:
                of_workers[worker][place] = call
            else:
                unready.append(place)
        if unready:
            preparing = (parts[place][1].prepared() for place in unready)
            for place, answer in zip(unready, await asyncio.gather(*preparing, return_exceptions=True), strict=True):
                call, session = parts[place]
                if isinstance(answer, WorkerLostError):
                    del parts[place]
                    session.release()
                    self.reduction.note(call.client_id, session.lost(call, str(answer)))
                elif isinstance(answer, BaseException):
                    try:
                        raise answer
                    finally:
                        del answer  # whose traceback has this frame
                else:
                    of_workers[answer][place] = call
        return of_workers

    def _drop_unwanted(self, places: Iterable[int], parts: Parts) -> None:
        """Drop those of these calls that a stopped reduction does not need: their results were not counted."""
        for place in places:
            call, session = parts[place]
            if call.client_id not in self.reduction.succeeded:
                del parts[place]
                session.release()

    async def _ask(self, worker: Member, calls: dict[int, Call], parts: Parts) -> None:
        """Run one batch. Calls to repeat stay in the parts, with their locks held."""
        if self.reduction.stopped.done():
            self._drop_unwanted(calls, parts)
        wanted = {place: call for place, call in calls.items() if place in parts}
        if not wanted:
            return
        batch = self.reduction.batch(self.run.next_call_id(), wanted, self.timeout_s)
        try:
            outcome, again = await self.reduction.run(worker, batch)
        except WorkerGone as gone:
            self._lose(worker, {place: parts[place] for place in calls.keys() & wanted}, gone)
            return
        except UndeliverableError as error:
            for place in calls.keys() & wanted:
                call, session = parts.pop(place)
                session.settle(call, Outcome("failed", error=session.lost(call, str(error)), cut_off=True))
            raise WorkerLostError(f"the partial results of {worker.label} are lost: {error}") from error
        self.num_losses = 0
        for place, of_call in outcome.of_calls:
            if place not in again:
                if place not in calls:
                    raise SerializationError(f"{worker.label} has answered calls that it had given back")
                call, session = parts.pop(place)
                self.run.durations.note(call, of_call)
                session.settle(call, of_call)
        self.reduction.take(worker, batch, outcome)

    def _lose(self, worker: Member, parts: Parts, gone: WorkerGone) -> None:
        """Record the loss of a worker with these calls.

        Raises:
            WorkerLostError: If workers that ran none of the calls were lost more than ``max_recoveries`` times.
        """
        for _, session in parts.values():
            session.lose(worker, gone)
        if self.run.recovers and not any(call.call_id in gone.running for call, _ in parts.values()):
            self.num_losses += 1
        if self.num_losses > self.run.max_recoveries:
            raise WorkerLostError(
                f"{worker.label} was lost while its partial results were collected (times in succession: "
                f"{self.num_losses}), so the reduction was given up: see the worker's output for why it ends; "
                f"runtime.max_recoveries={self.run.max_recoveries} is how often they are made again"
            )
