"""Sessions: the driver's side of one learner each, which makes the learner's calls one at a time."""

from __future__ import annotations

import asyncio
import itertools
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any, Protocol

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import WorkerLostError
from torchfedrpc.executors.base import ExecutorSpec
from torchfedrpc.executors.durations import Durations
from torchfedrpc.host.call import Call, Outcome, Registration
from torchfedrpc.rpc.member import Member, WorkerGone
from torchfedrpc.rpc.worker_client import UndeliverableError
from torchfedrpc.tasks import Tasks, Turns
from torchfedrpc.wire.packing import Packed, Reference, pack

_NO_CALL = Call(0, "", "", Reference(None))
_NO_KWARGS = pack({})


class Run:
    """What the sessions of a run share.

    Args:
        config: The run's configuration.
        spec: The run's learners.
        durations: Records the durations of cancelled calls.

    Attributes:
        allow: Types that results and states may have.
        durations: Durations of earlier calls.
        max_recoveries: Number of consecutive losses of a worker that a learner's calls are repeated after.
        recovers: Whether calls of a lost worker are repeated.
        is_closed: Whether the proxy is closed.
        events: Publishes the run's events.
    """

    def __init__(self, config: RuntimeConfig, spec: ExecutorSpec, durations: Durations) -> None:
        self.allow = spec.learner.allow_list()
        self.events = spec.events
        self.durations = durations
        self.max_recoveries = config.max_recoveries
        self.recovers = config.on_worker_lost == "recover"
        self.is_closed = False
        self._clients = spec.clients
        self._constructors: dict[str, Packed] = {}
        self._tasks = Tasks()
        self._call_ids = itertools.count(-(1 << 40), -1)  # disjoint from the ids of a proxy and an executor

    def end(self) -> None:
        """Begin no more sessions, and let calls that find no worker end."""
        self.is_closed = True

    async def close(self) -> None:
        """Wait for the tasks."""
        await self._tasks.wait()

    def constructor(self, client_id: str) -> Packed:
        """Return the packed keyword arguments of a learner's constructor, with their values at the first request.

        Raises:
            WorkerLostError: If the proxy is closed.
            SerializationError: If they cannot be sent.
        """
        if self.is_closed:
            raise WorkerLostError("the proxy is closed")
        packed = self._constructors.get(client_id)
        if packed is None:
            kwargs = self._clients[client_id]
            packed = Registration.of(client_id, kwargs).kwargs if kwargs else _NO_KWARGS
            self._constructors[client_id] = packed
        return packed

    def next_call_id(self) -> int:
        """Return an id for a call that the run makes itself."""
        return next(self._call_ids)

    def in_background(self, coroutine: Coroutine[Any, Any, object]) -> None:
        """Run a coroutine as a task until the run ends."""
        self._tasks.start(coroutine)


class Session(ABC):
    """Session of one learner, which makes its calls one at a time, in the order of submission.

    Args:
        client_id: The client.
        run: The run.

    Attributes:
        client_id: The client.
        turns: FIFO lock, which each call holds until its learner is free.
        given_up: Reason why the learner's calls fail; None if they do not.
    """

    given_up: str | None

    def __init__(self, client_id: str, run: Run) -> None:
        self.client_id = client_id
        self.turns = Turns()
        self._run = run
        self._call = _NO_CALL  # the user's current one
        self._num_reports = 0  # published progress reports of the current call

    async def call(self, call: Call) -> Outcome:
        """Make a call behind the calls submitted before; if its worker is lost, repeat the call on another worker."""
        if not self.turns.take_now():
            await self.take_turn()
        self.begin(call)
        try:
            while True:
                worker: Member | None = None
                worker = self.ready() or await self.prepared()
                try:
                    outcome = await worker.submit(call)
                except WorkerGone as gone:
                    self.lose(worker, gone)
                else:
                    if outcome.kind != "given_back":
                        break
        except asyncio.CancelledError:
            self.in_background(self._cancel(call, worker))
            raise
        except UndeliverableError as error:
            outcome = Outcome("failed", error=self.lost(call, str(error)), cut_off=True)
        except WorkerLostError as error:
            self.release()
            if self._run.is_closed:
                return Outcome("cancelled", never_ran=True)
            return Outcome("failed", error=self.lost(call, str(error)), never_ran=True)
        except BaseException:
            self.release()
            raise
        self.settle(call, outcome)
        return outcome

    async def _cancel(self, call: Call, worker: Member | None) -> None:
        """Cancel a call on its worker, and release the lock when the learner is free."""
        if worker is None:  # the call was not sent
            await self.settled()
            self.release()
            return
        try:
            outcome = await worker.cancel(call)
        except WorkerGone as gone:
            self.lose(worker, gone)
            self.release()
            return
        except UndeliverableError:
            outcome = Outcome("cancelled", cut_off=True)
        self._run.durations.note(call, outcome)
        self.settle(call, outcome)

    def begin(self, call: Call) -> None:
        """Record the current call, for its progress reports. The caller holds the lock."""
        self._call = call
        self._num_reports = 0

    @abstractmethod
    def ready(self) -> Member | None:
        """Return the worker of the current call, which has the learner; None if that takes time. See `prepared`."""

    @abstractmethod
    async def prepared(self) -> Member:
        """Return the worker of the current call, once it has the learner. The caller holds the lock.

        Raises:
            WorkerLostError: If no worker can have the learner.
            SerializationError: If the constructor's arguments cannot be sent.
        """

    @abstractmethod
    def settle(self, call: Call, outcome: Outcome, num_items: int = 0) -> None:
        """Record a call that has ended, and release the lock when the learner is free."""

    @abstractmethod
    def lose(self, worker: Member, gone: WorkerGone) -> None:
        """Record the loss of a worker that had the current call."""

    @abstractmethod
    def lost(self, call: Call, reason: str) -> WorkerLostError:
        """Return the error of a call that fails because its worker is lost."""

    async def take_turn(self) -> None:
        """Acquire the lock, behind earlier callers. A cancelled caller does not hold it."""
        turn = self.turns.request()
        try:
            await turn
        except asyncio.CancelledError:
            self.withdraw(turn)
            raise

    def withdraw(self, turn: asyncio.Future[None]) -> None:
        """Withdraw a request for the lock, or release the lock if the request was granted."""
        self.turns.withdraw(turn)

    def release(self) -> None:
        """Release the lock: the current call has ended, and left nothing to record."""
        self.turns.give()

    def is_next_report(self, call: Call, number: int) -> bool:
        """Return whether a progress report is new; a call repeated after a loss repeats its reports."""
        if call.call_id != self._call.call_id or number < self._num_reports:
            return False
        self._num_reports = number + 1
        return True

    def in_background(self, coroutine: Coroutine[Any, Any, object]) -> None:
        """Run a coroutine as a task until the run ends."""
        self._run.in_background(coroutine)

    def expect_stream(self) -> None:  # noqa: B027 (optional to override)
        """Note that a stream that values were sent into ends in order now. By default nothing depends on that."""

    async def settled(self) -> None:  # noqa: B027 (optional to override)
        """Wait for the end of a move or rebuild in progress. By default there is none."""


class Sessions(Protocol):
    """Sessions by client."""

    def session(self, client_id: str) -> Session:
        """Return the session of a client.

        Raises:
            WorkerLostError: If the proxy is closed.
        """


class SessionStream:
    """Steps of a stream on its learner's worker. The stream holds the learner's lock from first to last step.

    If the worker is lost, the next step ends the stream with a WorkerLostError. A learner with state is rebuilt as it
    was before the stream.

    Args:
        sessions: The sessions of the run.
        call: The call.
    """

    _session: Session  # from the first step on

    def __init__(self, sessions: Sessions, call: Call) -> None:
        self._sessions = sessions
        self._call = call
        self._worker: Member | None = None
        self._num_items = 0
        self._has_sent = False  # values, which no journal keeps
        self._has_turn = self._is_stepping = self._is_closed = False

    async def next(self, sent: Packed | None = None) -> Outcome:
        """Send a value, if any, and run the method up to its next item.

        Raises:
            SerializationError: If the constructor's arguments cannot be sent.
        """
        self._is_stepping = True
        try:
            self._has_sent |= sent is not None
            outcome = await self._step(sent)
        except asyncio.CancelledError:
            self._cancel()
            raise
        except WorkerGone as gone:
            self._lose(gone)
            return self._lost(gone)
        except UndeliverableError as error:
            outcome = Outcome("failed", error=self._session.lost(self._call, str(error)), cut_off=True)
        except WorkerLostError as error:
            self._give_turn()
            return Outcome("failed", error=self._session.lost(self._call, str(error)), never_ran=True)
        except BaseException:
            self._give_turn()
            raise
        finally:
            self._is_stepping = False
        if outcome.is_final:
            self._settle(outcome)
        else:
            self._num_items += 1
        return outcome

    def close(self) -> None:
        """Close the generator. This ends a step in progress."""
        self._is_closed = True
        if self._has_turn and self._worker is not None:
            self._cancel()

    def give_up(self) -> None:
        """Release the lock, since the run has ended."""
        self._is_closed = True
        self._give_turn()

    async def _step(self, sent: Packed | None) -> Outcome:
        call = self._call
        if self._worker is not None:
            return await self._worker.advance(call, self._num_items, sent)
        try:
            session = self._session = self._sessions.session(call.client_id)
        except WorkerLostError:  # the proxy is closed
            return Outcome("cancelled", never_ran=True)
        await session.take_turn()
        self._has_turn = True
        session.begin(call)
        while True:
            worker = session.ready() or await session.prepared()
            if self._is_closed:
                return Outcome("cancelled", never_ran=True)
            self._worker = worker
            outcome = await worker.submit(call)
            if outcome.kind != "given_back":
                return outcome
            self._worker = None  # another one has the call next

    def _cancel(self) -> None:
        if self._has_turn:
            self._session.in_background(self._cancelled(self._is_stepping))

    async def _cancelled(self, was_stepping: bool) -> None:
        """Close the generator on its worker, and release the lock when it has ended."""
        worker = self._worker
        if worker is None:
            await self._session.settled()
            self._give_turn()
            return
        try:
            outcome = await worker.cancel(self._call)
        except WorkerGone as gone:
            if self._has_sent:
                self._session.expect_stream()
            self._lose(gone)
            return
        except UndeliverableError:
            outcome = Outcome("cancelled", cut_off=True)
        if outcome.kind == "given_back" and self._is_stepping:  # the step ends the stream once it has a worker
            return
        if was_stepping and not outcome.never_ran:  # the worker may have made an item that has not arrived
            outcome = replace(outcome, cut_off=True)
        self._settle(outcome)

    def _settle(self, outcome: Outcome) -> None:
        if not self._ends():
            return
        if self._has_sent:
            if not (outcome.cut_off or outcome.never_ran):
                self._session.expect_stream()
            outcome = replace(outcome, cut_off=True)
        self._session.settle(self._call, outcome, self._num_items)

    def _lose(self, gone: WorkerGone) -> None:
        if self._has_turn and self._worker is not None:
            self._session.lose(self._worker, gone)
        self._give_turn()

    def _give_turn(self) -> None:
        if self._ends():
            self._session.release()

    def _ends(self) -> bool:
        """End the hold on the lock, and return whether it was held."""
        had_turn, self._has_turn = self._has_turn, False
        return had_turn

    def _lost(self, gone: WorkerGone) -> Outcome:
        reason = f"its worker was lost ({gone.reason}), and the stream with it: open another"
        return Outcome("failed", error=self._session.lost(self._call, reason), never_ran=True)
