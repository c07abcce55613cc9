"""Session of one learner: queues its calls, and rebuilds or moves the learner after a loss or a new placement."""

from __future__ import annotations

import asyncio
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import WorkerLostError
from torchfedrpc.events import ReplayEnded, ReplayStarted
from torchfedrpc.executors.admission import Admission
from torchfedrpc.executors.base import ExecutorSpec
from torchfedrpc.executors.durations import Durations
from torchfedrpc.executors.journal import Entry, Journal, Journals
from torchfedrpc.executors.session import Run, Session
from torchfedrpc.executors.snapshot_throttle import SnapshotBudget, SnapshotThrottle
from torchfedrpc.host.call import Call, CallKind, Outcome, Registration
from torchfedrpc.rpc.member import Member, WorkerGone
from torchfedrpc.rpc.worker_client import UndeliverableError
from torchfedrpc.rpc.workers import Workers, WorkerState
from torchfedrpc.wire.packing import Packed, pack

logger = logging.getLogger(__name__)


class LearnerRun(Run):
    """What the sessions of learners with state share: places and workers, journals, the throttles of snapshots.

    Args:
        config: The run's configuration.
        spec: The run's learners.
        workers: The table of workers.
        admission: Counts the journals' arguments beyond their bound.
        durations: Records the durations of cancelled calls.

    Attributes:
        journals: The journals of all learners.
        places: Client -> name of the worker that it is placed on.
        sessions: Sessions of the clients with at least one call.
    """

    def __init__(
        self,
        config: RuntimeConfig,
        spec: ExecutorSpec,
        workers: Workers,
        admission: Admission,
        durations: Durations,
    ) -> None:
        super().__init__(config, spec, durations)
        self.journals = Journals(config, admission)
        self.places: dict[str, str] = {}
        self.sessions: dict[str, LearnerSession] = {}
        self._workers = workers
        self._budget = SnapshotBudget()
        self._throttles: dict[str, SnapshotThrottle] = {}
        self._warned_of: set[str | None] = set()  # attributes that cannot be captured and have had a warning

    async def close(self) -> None:
        """Wait for the tasks, and free sessions and journals."""
        await super().close()
        self.sessions.clear()
        self.journals.close()

    def session(self, client_id: str) -> LearnerSession:
        """Return the session of a client; its first call makes it.

        Raises:
            WorkerLostError: If the proxy is closed.
        """
        session = self.sessions.get(client_id)
        if session is None:
            constructor = self.constructor(client_id)
            session = LearnerSession(client_id, constructor, Journal(client_id, self.journals), self)
            self.sessions[client_id] = session
        return session

    def present_worker(self, client_id: str) -> Member | None:
        """Return the worker that a client is placed on if it can be called now, else None."""
        return self._workers.present.get(self.places[client_id])

    async def worker(self, client_id: str) -> Member:
        """Wait for the worker that a client is placed on, and return it.

        Raises:
            WorkerLostError: If the worker is lost and no other process is expected.
        """
        return await self._workers.wait_for(lambda: self.places[client_id])

    def stays(self, client_id: str, worker: Member) -> bool:
        """Leave a learner that cannot be captured where it is. Returns False if its worker is about to leave."""
        entry = self._workers.get(worker.label)
        if entry is None or entry.state is not WorkerState.SERVING:
            return False
        self.places[client_id] = worker.label
        return True

    def worker_of(self, client_id: str) -> str:
        """Return the name of the worker that has a client's learner, or that the client is placed on."""
        session = self.sessions.get(client_id)
        worker = session.worker if session is not None else None
        return worker.label if worker is not None else self.places[client_id]

    def throttle(self, worker: Member) -> SnapshotThrottle:
        """Return the throttle for snapshots to and from a worker."""
        return self._throttles.setdefault(worker.label, SnapshotThrottle(self._budget))

    def relieve_journals(self) -> None:
        """Start snapshots that bring the journals of all learners under their bound."""
        for journal, limit in self.journals.relief():
            self.sessions[journal.client_id].request_snapshot(limit)

    def warn_of_refusal(self, client_id: str, error: Exception, *, is_first: bool) -> None:
        """Warn that a learner cannot be rebuilt, once per attribute that cannot be captured."""
        message = f"{client_id} could not be rebuilt if its worker were lost: {error}"
        attribute = getattr(error, "attribute", None)
        if attribute in self._warned_of:
            logger.log(logging.INFO if is_first else logging.DEBUG, message)
            return
        self._warned_of.add(attribute)
        try:
            warnings.warn(f"{message} (this is said once, of the first such client)", stacklevel=2)
        except Exception:  # warnings are errors here, and no caller can handle them
            logger.warning(message)


class LearnerSession(Session):
    """Session of one learner, which makes its calls one at a time, in the order of submission.

    The first call creates the learner. After the loss of its worker, the next call rebuilds the learner on another
    one: constructor, last snapshot, replay of the journal. If the client is placed on another worker, the next call
    moves the learner there, by a snapshot.

    Args:
        client_id: The client.
        constructor: Keyword arguments of the learner's constructor.
        journal: The learner's journal, from which it is rebuilt.
        run: The run.
    """

    _run: LearnerRun

    def __init__(self, client_id: str, constructor: Packed, journal: Journal, run: LearnerRun) -> None:
        super().__init__(client_id, run)
        self._constructor = constructor
        self._journal = journal
        self._worker: Member | None = None  # the worker that has the learner
        self._num_builds = 0
        self._num_losses = 0  # consecutive losses of a worker with a running call of this learner
        self.given_up: str | None = None
        self._preparing: asyncio.Task[Member] | None = None
        self._sent_id = 0  # of the call sent last, which may be a replayed one

    @property
    def worker(self) -> Member | None:
        """The worker that has the learner; None if there is none."""
        return self._worker if self._worker is not None and not self._worker.is_gone else None

    # Calls.

    def begin(self, call: Call) -> None:
        """Record the current call, for its progress reports and for losses."""
        super().begin(call)
        self._sent_id = call.call_id

    def settle(self, call: Call, outcome: Outcome, num_items: int = 0) -> None:
        """Record a call that has ended and release the lock; first take a snapshot if the call cannot be replayed."""
        self._num_losses = 0
        journal = self._journal
        journal.add(call, outcome, num_items)
        if journal.is_due and self.worker is not None:
            journal.request_snapshot()
            self._run.in_background(self._snapshot_in_turn(None))
        else:
            self.turns.give()
        if self._run.journals.needs_relief:
            self._run.relieve_journals()

    def lost(self, call: Call, reason: str) -> WorkerLostError:
        """Return the error of a call that fails because its learner is lost."""
        worker = self._run.worker_of(self.client_id)
        return WorkerLostError(f"{call.client_id}.{call.method} on {worker}: {reason}")

    def expect_stream(self) -> None:
        """Note that a stream that values were sent into ends in order now."""
        self._journal.expect_stream()

    async def settled(self) -> None:
        """Wait for the end of a move or rebuild in progress."""
        if self._preparing is not None:
            await asyncio.wait([self._preparing])

    # Placement of the learner.

    def ready(self) -> Member | None:
        """Return the learner's worker if no move or rebuild is needed; else None. A new learner is registered there.

        The caller holds the lock.
        """
        target = self._run.present_worker(self.client_id)
        if target is None or self.given_up is not None:
            return None
        if self._worker is target:
            return target
        if self._worker is None and not self._journal.has_state:
            self._register(target)
            return target
        return None

    async def prepared(self) -> Member:
        """Move or rebuild the learner as needed, and return its worker. The caller holds the lock.

        Raises:
            WorkerLostError: If the learner was given up, or its worker is lost and no other process is expected.
        """
        if self._preparing is None:
            self._preparing = asyncio.ensure_future(self._prepare())
            self._preparing.add_done_callback(self._end_preparing)
        return await asyncio.shield(self._preparing)

    def _end_preparing(self, task: asyncio.Task[Member]) -> None:
        self._preparing = None
        if not task.cancelled():
            task.exception()  # retrieved here, since the caller may have been cancelled

    async def _prepare(self) -> Member:
        while True:
            if self.given_up is not None:
                raise WorkerLostError(self.given_up)
            target = await self._run.worker(self.client_id)
            try:
                if self._worker is not None and self._worker.is_gone:
                    self.lose(self._worker, self._worker.gone())
                elif self._worker is not None and self._worker is not target:
                    await self._leave(self._worker)
                elif self._worker is None:
                    await self._build(target)
                else:
                    self._sent_id = self._call.call_id  # the replay is over
                    return target
            except WorkerGone as gone:
                self.lose(target if self._worker is None else self._worker, gone)

    def _register(self, worker: Member) -> None:
        self._num_builds += 1
        worker.register(Registration(self.client_id, self._constructor, self._num_builds))
        self._worker = worker

    async def _build(self, worker: Member) -> None:
        """Rebuild the learner: constructor, last snapshot, and replay of the journal.

        Raises:
            WorkerGone: If the worker is lost.
            WorkerLostError: If the learner cannot be rebuilt.
        """
        self._register(worker)
        try:
            async with self._run.throttle(worker).passing(self._journal.state_bytes):
                # Both as of one moment: a snapshot that is stored meanwhile drops entries from the journal.
                entries, reading = list(self._journal.entries), self._journal.snapshot()
                if reading is not None:
                    snapshot = await asyncio.wrap_future(reading)
                    restore = self._own_call("restore", pack((snapshot, None), copy=False))  # nothing writes to it
                    outcome = await worker.submit(restore)
                    self._check_rebuilt(worker, outcome, is_failed=outcome.kind == "failed")
            if entries:
                await self._replay(worker, entries)
        except (OSError, UndeliverableError) as error:
            raise self.give_up(f"it could not be rebuilt on {worker.label}: {error}") from error

    async def _replay(self, worker: Member, entries: list[Entry]) -> None:
        """Make the calls of the journal again."""
        num_calls, label, began = len(entries), worker.label, time.monotonic()
        logger.info("replaying %d calls of %s on %s", num_calls, self.client_id, label)
        self._run.events.publish(ReplayStarted(self.client_id, label, num_calls))
        for entry in entries:
            self._sent_id = entry.call.call_id
            outcome = await self._repeat(worker, entry)
            self._check_rebuilt(worker, outcome, is_failed=outcome.never_ran and outcome.kind == "failed")
        seconds = time.monotonic() - began
        logger.info("replayed %d calls of %s on %s in %.1f s", num_calls, self.client_id, label, seconds)
        self._run.events.publish(ReplayEnded(self.client_id, label, num_calls, seconds))

    async def _repeat(self, worker: Member, entry: Entry) -> Outcome:
        """Replay a call of the journal; of a stream, as many steps as it had."""
        call = replace(entry.call, run_timeout_s=None, trace=None)  # it has ended, in time, before
        outcome = await worker.submit(call)
        if call.kind != "stream":
            return outcome
        for step in range(1, entry.num_items + (not entry.was_closed)):
            if outcome.kind != "item":
                return outcome
            outcome = await worker.advance(call, step)
        return await worker.cancel(call) if outcome.kind == "item" else outcome

    def _check_rebuilt(self, worker: Member, outcome: Outcome, *, is_failed: bool) -> None:
        """Give the learner up if a step of its rebuild has failed.

        Raises:
            WorkerLostError: If the step has failed.
        """
        if is_failed:
            message = outcome.failure.message if outcome.failure is not None else str(outcome.error)
            raise self.give_up(f"it could not be rebuilt on {worker.label}: {message}")

    async def _leave(self, worker: Member) -> None:
        """Remove the learner from a worker, after a snapshot if it was called since the last one.

        Raises:
            WorkerGone: If the worker is lost.
            WorkerLostError: If the learner cannot be captured, its journal is incomplete, and its worker leaves.
        """
        journal = self._journal
        if journal.entries or not journal.is_complete:
            was_complete = journal.is_complete
            journal.request_snapshot()
            error = await self._snapshot(worker, None, is_required=not was_complete)
            if error is not None and not was_complete:
                if self._run.stays(self.client_id, worker):
                    return
                raise self.give_up(f"{worker.label} left, and its learner could not be moved: {error}")
            if error is not None:
                logger.warning("%s moves without a snapshot, its calls are made again: %s", self.client_id, error)
        worker.forget(self.client_id)
        self._worker = None

    async def move(self) -> None:
        """Remove the learner from its worker if its client is placed on another one, ahead of waiting calls."""
        await self.turns.take(first=True)
        try:
            worker = self.worker
            if (
                worker is not None
                and self.given_up is None
                and self._run.present_worker(self.client_id) is not worker
            ):
                await self._leave(worker)
        except (WorkerGone, WorkerLostError) as error:  # the next call meets the same error
            logger.info("%s was not moved: %s", self.client_id, error)
        finally:
            self.turns.give()

    # Losses.

    def lose(self, worker: Member, gone: WorkerGone) -> None:
        """Record the loss of the learner's worker. The next call rebuilds the learner, unless it is given up here."""
        had_learner, self._worker = self._worker is worker, None
        where = f"{worker.label} was lost ({gone.reason})"
        if self._sent_id in gone.running:
            self._num_losses += 1
        if not self._run.recovers:
            self.give_up(f"{where}, and its learner with it; runtime.on_worker_lost=recover rebuilds it")
        elif had_learner and self._journal.unrecoverable is not None:
            self.give_up(f"{where}, and its learner could not be rebuilt: {self._journal.unrecoverable}")
        elif had_learner and self._journal.misses_stream:
            self.give_up(
                f"{where}, and its learner could not be rebuilt: no snapshot was taken behind its last stream, into "
                f"which values were sent, so that it cannot be replayed"
            )
        elif self._num_losses > self._run.max_recoveries:
            self.give_up(
                f"{where} while a call of this learner was running (times in succession: {self._num_losses}), so it "
                f"was given up: see the worker's output for why it ends; runtime.max_recoveries="
                f"{self._run.max_recoveries} is how often it is rebuilt"
            )

    def give_up(self, reason: str) -> WorkerLostError:
        """Fail all later calls for this reason, and return their error."""
        self.given_up = reason
        self._journal.forget()
        return WorkerLostError(reason)

    # Snapshots.

    def request_snapshot(self, limit: int | None) -> None:
        """Replace the journal by a snapshot, taken behind the calls submitted before.

        Args:
            limit: Largest acceptable size in bytes; None for any.
        """
        self._journal.request_snapshot()
        self._run.in_background(self._snapshot_later(self.turns.request(), limit))

    async def _snapshot_later(self, turn: asyncio.Future[None], limit: int | None) -> None:
        await self.turns.wait(turn)
        await self._snapshot_in_turn(limit)

    async def _snapshot_in_turn(self, limit: int | None) -> None:
        """Take a requested snapshot, and release the lock.

        The lock is released before the snapshot is stored, unless the last call was interrupted: a rebuild without
        the snapshot would miss that call's changes.
        """
        worker, is_cut_off, has_turn = self.worker, self._journal.needs_snapshot, True

        def captured() -> None:
            nonlocal has_turn
            if not is_cut_off:
                has_turn = False
                self.turns.give()

        try:
            if worker is None or self.given_up is not None or self._journal.is_settled:
                self._journal.not_taken()
            else:
                await self._snapshot(worker, limit, captured)
        except WorkerGone as gone:
            logger.info("no snapshot of %s was taken: %s", self.client_id, gone)
        finally:
            if has_turn:
                self.turns.give()

    async def _snapshot(
        self,
        worker: Member,
        limit: int | None,
        captured: Callable[[], None] = lambda: None,
        *,
        is_required: bool = True,
    ) -> Exception | None:
        """Take a requested snapshot, and store it. The caller holds the lock.

        Args:
            worker: The learner's worker.
            limit: Largest acceptable size in bytes; None for any.
            captured: Called when the worker has answered, before the snapshot is stored.
            is_required: Whether the journal is useless without the snapshot.

        Returns:
            The reason why the learner cannot be captured; None if it can.

        Raises:
            WorkerGone: If the worker is lost.
        """
        journal, number = self._journal, self._journal.number
        call = self._own_call("snapshot", journal.snapshot_arguments(limit))
        try:
            async with self._run.throttle(worker).passing(journal.state_bytes) as budget:
                outcome = await worker.submit(call)
                captured()
                state: torch.Tensor | int = outcome.result(call, self._run.allow, worker.label)
                if isinstance(state, int):
                    journal.not_taken(state)
                    return None
                budget.saw(state.nbytes)
                if not journal.keep(number, state):
                    await asyncio.wrap_future(journal.store(number, state))
                journal.kept(number, state.nbytes)
                return None
        except WorkerGone:
            journal.not_taken()
            raise
        except Exception as error:
            if is_required and not worker.is_gone:
                journal.refused(str(error))
                self._run.warn_of_refusal(self.client_id, error, is_first=journal.num_refusals == 1)
            else:
                journal.not_taken()
            return error

    def _own_call(self, kind: CallKind, arguments: Packed) -> Call:
        return Call(self._run.next_call_id(), self.client_id, kind, arguments, kind=kind)
