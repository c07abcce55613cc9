"""Batches of a reduction on workers: one request per worker, and another one after a loss."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torchfedrpc.errors import SerializationError, WorkerLostError
from torchfedrpc.executors.call_executor import without_traces
from torchfedrpc.executors.dealer import Assignment, Dealer, Returned
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
        num_losses: Place -> how often workers with that call were lost while they ran none of the calls.
    """

    run: Run
    reduction: Reduction
    timeout_s: float | None
    num_losses: Counter[int] = field(default_factory=Counter)

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
        for place, of_call in outcome.of_calls:
            self.num_losses.pop(place, None)
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
            WorkerLostError: If workers with the same call that ran none were lost more than ``max_recoveries`` times.
        """
        for _, session in parts.values():
            session.lose(worker, gone)
        if self.run.recovers and not any(call.call_id in gone.running for call, _ in parts.values()):
            self.num_losses.update(parts.keys())
        if (num_losses := max(map(self.num_losses.__getitem__, parts), default=0)) > self.run.max_recoveries:
            raise WorkerLostError(
                f"{worker.label} was lost while its partial results were collected (times in succession: "
                f"{num_losses}), so the reduction was given up: see the worker's output for why it ends; "
                f"runtime.max_recoveries={self.run.max_recoveries} is how often they are made again"
            )


@dataclass(eq=False, kw_only=True)
class DealtBatches(Batches):
    """Calls of stateless learners in a reduction: a batch for each worker, from which idle workers take calls.

    Attributes:
        dealer: Deals the calls.
    """

    dealer: Dealer

    async def _make(self, parts: Parts) -> None:
        """Deal calls until all have ended, also those that are lost, given back or to be repeated."""
        returned: asyncio.Queue[Returned] = asyncio.Queue()
        returned.put_nowait((list(parts), None))
        asking: set[asyncio.Task[None]] = set()
        waiting: list[int] = []  # places of calls that no worker accepts now
        errors: list[BaseException | None] = []
        try:
            while parts:
                if not (waiting or asking or returned.qsize()):
                    raise RuntimeError(f"calls at {sorted(parts)} are dealt to no worker: an error of torchfedrpc")
                places, giver = await self._next(returned, waiting)
                calls = self._unended([*waiting, *places], parts)
                assignments = self._dealt(calls, parts, returned, giver)
                waiting = [place for place in calls if place in parts]
                for assignment in assignments:
                    waiting = [place for place in waiting if place not in assignment.calls]
                    asking.add(asyncio.ensure_future(self._run(assignment, parts, returned, errors)))
                if giver is not None:
                    self.dealer.rebalance()  # other workers may be idle yet
                asking = {task for task in asking if not task.done()}
        finally:
            await asyncio.gather(*asking)
            for _, session in parts.values():
                session.release()
        raise_first(errors)

    async def _next(self, returned: asyncio.Queue[Returned], waiting: list[int]) -> Returned:
        """Return the next calls to deal; none if calls wait for a worker and the workers have changed."""
        if not waiting:
            return await returned.get()
        getting = asyncio.ensure_future(returned.get())
        changing = asyncio.ensure_future(self.dealer.next_change())
        changes: set[asyncio.Future[Any]] = {getting, changing}
        if not self.reduction.stopped.done():
            changes.add(self.reduction.stopped)
        try:
            await asyncio.wait(changes, return_when=asyncio.FIRST_COMPLETED)
            return getting.result() if getting.done() else ([], None)
        finally:
            getting.cancel()
            changing.cancel()

    def _unended(self, places: list[int], parts: Parts) -> dict[int, Call]:
        """Return the calls to deal, by place. Calls that were given up fail; a stopped reduction drops its own."""
        if self.reduction.stopped.done():
            self._drop_unwanted(places, parts)
        for place in places:
            if place in parts and (reason := parts[place][1].given_up) is not None:
                self._fail(place, parts, reason)
        return {place: parts[place][0] for place in places if place in parts}

    def _dealt(
        self, calls: dict[int, Call], parts: Parts, returned: asyncio.Queue[Returned], giver: Member | None
    ) -> list[Assignment]:
        """Deal calls to the workers that accept them now. Calls that no worker will accept fail."""
        if not calls:
            return []
        are_ranges = not self.reduction.fastest_first
        assignments, errors = self.dealer.deal(calls, returned, are_ranges=are_ranges, without=giver)
        for place, error in errors.items():
            call, session = parts.pop(place)
            session.release()
            self.reduction.note(call.client_id, without_traces(error))
        for place in calls.keys() - {place for one in assignments for place in one.calls}:
            if place in parts and (reason := self.dealer.eligible.why_none(calls[place].client_id)) is not None:
                self._fail(place, parts, reason)
        return assignments

    async def _run(
        self,
        assignment: Assignment,
        parts: Parts,
        returned: asyncio.Queue[Returned],
        errors: list[BaseException | None],
    ) -> None:
        """Run the calls of a worker as a batch, and return those to deal again."""
        try:
            await self._ask(assignment.worker, assignment.calls, parts)
        except Exception as error:
            errors.append(error)
            for place in [place for place in assignment.calls if place in parts]:
                _, session = parts.pop(place)
                session.release()
        finally:
            self.dealer.end(assignment)
            returned.put_nowait(([place for place in assignment.calls if place in parts], None))

    def _fail(self, place: int, parts: Parts, reason: str) -> None:
        call, session = parts.pop(place)
        session.release()
        self.reduction.note(call.client_id, session.lost(call, reason))
