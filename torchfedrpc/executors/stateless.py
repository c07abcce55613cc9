"""Stateless learners on workers: any worker that their endpoints allow runs their calls."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import WorkerLostError
from torchfedrpc.executors.base import ExecutorSpec
from torchfedrpc.executors.batches import DealtBatches, Parts
from torchfedrpc.executors.dealer import Assignment, Dealer
from torchfedrpc.executors.durations import Durations
from torchfedrpc.executors.eligible_workers import EligibleWorkers
from torchfedrpc.executors.placement import place_clients
from torchfedrpc.executors.remote import RemoteLearners
from torchfedrpc.executors.session import Run, Session
from torchfedrpc.host.call import Call, Outcome
from torchfedrpc.reduce.driver import Reduction
from torchfedrpc.rpc.member import Member, WorkerGone
from torchfedrpc.rpc.sources import Source


class StatelessSession(Session):
    """Session of a stateless learner; it ends when no call of the learner is left.

    Args:
        client_id: The client.
        run: The run.
        dealer: Chooses the worker of each call.
        sessions: Client -> session, of the clients with calls.
    """

    def __init__(self, client_id: str, run: Run, dealer: Dealer, sessions: dict[str, StatelessSession]) -> None:
        super().__init__(client_id, run)
        self._dealer = dealer
        self._sessions = sessions
        self._assignment: Assignment | None = None  # of the current call, if it is none of a batch
        self._label = ""  # of the worker that had the current call
        self._num_losses = 0  # of workers that were running the current call
        self.given_up: str | None = None  # reason why the current call was given up

    def begin(self, call: Call) -> None:
        """Record the current call, for its progress reports and for losses."""
        super().begin(call)
        self._label, self._num_losses, self.given_up = "", 0, None

    def ready(self) -> Member | None:
        """Return None: the dealer chooses a worker for each call."""
        return None

    async def prepared(self) -> Member:
        """Return the worker with the least expected work, another one than has given the current call back."""
        giver = self._assignment.worker if self._assignment is not None else None
        self._end_assignment()
        if self.given_up is not None:
            raise WorkerLostError(self.given_up)
        self._assignment = await self._dealer.assign(self._call, without=giver)
        self._label = self._assignment.worker.label
        return self._assignment.worker

    def settle(self, call: Call, outcome: Outcome, num_items: int = 0) -> None:
        """Release the lock, once the method has ended if it was cut off, or its generator if a stream was closed."""
        goes_on = outcome.cut_off or (outcome.kind == "cancelled" and not outcome.never_ran)
        ending = self._dealer.hold(call) if goes_on else None
        self._end_assignment()
        if ending is not None:
            self.in_background(self._release_after(ending))
        else:
            self.release()

    async def _release_after(self, ending: Coroutine[Any, Any, None]) -> None:
        try:
            await ending
        finally:
            self.release()

    def withdraw(self, turn: asyncio.Future[None]) -> None:
        """Withdraw a request for the lock, and end the session if no call is left."""
        super().withdraw(turn)
        if not self.turns.is_held:
            self._forget()

    def release(self) -> None:
        """Release the lock, and end the session if no call waits."""
        self._end_assignment()
        if not self.turns.give():
            self._forget()

    def _forget(self) -> None:
        if self._sessions.get(self.client_id) is self:
            del self._sessions[self.client_id]

    def lose(self, worker: Member, gone: WorkerGone) -> None:
        """Record the loss of a worker. The call is repeated, unless it is given up here."""
        self._label = worker.label
        where = f"{worker.label} was lost ({gone.reason})"
        if self._call.call_id in gone.running:
            self._num_losses += 1
        if not self._run.recovers:
            self.given_up = f"{where}; runtime.on_worker_lost=recover lets another worker run its calls"
        elif self._num_losses > self._run.max_recoveries:
            self.given_up = (
                f"{where} while this call was running (times in succession: {self._num_losses}), so it was given up: "
                f"see the worker's output for why it ends; runtime.max_recoveries={self._run.max_recoveries} is how "
                f"often it is run again"
            )

    def lost(self, call: Call, reason: str) -> WorkerLostError:
        """Return the error of a call that fails because its worker is lost."""
        where = f" on {self._label}" if self._label else ""
        return WorkerLostError(f"{call.client_id}.{call.method}{where}: {reason}")

    def _end_assignment(self) -> None:
        if self._assignment is not None:
            self._dealer.end(self._assignment)
            self._assignment = None


class StatelessLearners(RemoteLearners):
    """Stateless learners, whose calls are dealt to the workers.

    Args:
        config: The run's configuration.
        spec: The run.
        sources: The sources of workers.
        durations: Records the durations of cancelled calls, and gives those that calls are dealt by.
    """

    def __init__(
        self, config: RuntimeConfig, spec: ExecutorSpec, sources: list[Source], durations: Durations
    ) -> None:
        super().__init__(config, spec, sources)
        self._run = Run(config, spec, durations)
        self._sessions: dict[str, StatelessSession] = {}
        eligible = EligibleWorkers(self._workers, config.client_endpoints)
        self._dealer = Dealer(self._run, self._workers, eligible, config.max_resident_learners, self._sessions)

    async def call(self, call: Call) -> Outcome:
        if self._run.is_closed:
            return Outcome("cancelled", never_ran=True)
        return await self.session(call.client_id).call(call)

    def session(self, client_id: str) -> StatelessSession:
        session = self._sessions.get(client_id)
        if session is None:
            if self._run.is_closed:
                raise WorkerLostError("the proxy is closed")
            session = self._sessions[client_id] = StatelessSession(client_id, self._run, self._dealer, self._sessions)
        return session

    def _present_session(self, client_id: str) -> StatelessSession | None:
        return self._sessions.get(client_id)

    def reduce(self, reduction: Reduction, calls: Mapping[int, Call]) -> Coroutine[Any, Any, None]:
        """Deal calls, by place, and reduce their results on the workers."""
        parts: Parts = {place: (call, self.session(call.client_id)) for place, call in calls.items()}
        return DealtBatches(self._run, reduction, self._config.call_timeout_s, dealer=self._dealer).make(parts)

    def rref(self, client_id: str) -> Any:
        """Return the RRef of a learner on the worker that it was last called on, else on one that would be.

        Raises:
            WorkerLostError: If the learner has no RRef now.
            SerializationError: If the constructor's arguments cannot be sent.
        """
        worker = self._dealer.last_worker(client_id) or self._dealer.least_busy(client_id)
        if worker is not None and worker.client is not None:
            self._dealer.register(worker, client_id)
            worker.client.register(worker.registrations[client_id])
            return worker.client.rref(client_id)
        reason = self._dealer.eligible.why_none(client_id) or (
            "its learner has no RRef while the world is formed anew; await a call of this client, and ask again"
        )
        raise WorkerLostError(f"{client_id}: {reason}")

    def worker_of(self, client_id: str) -> str:
        return self._dealer.label_of(client_id)

    def _place_all(self) -> None:
        clients, endpoints = list(self._spec.clients), self._config.client_endpoints
        place_clients(clients, endpoints, self._workers.known_machines)  # which checks the endpoints
        self._dealer.eligible.note_machines()

    def _worker_joined(self, label: str) -> None:
        self._dealer.eligible.note_machines()
        self._dealer.rebalance()

    async def _clear(self, member: Member) -> None:
        """Let other workers run what a worker has not begun, and wait until the rest has ended."""
        await self._dealer.clear(member)

    def _worker_left(self, label: str) -> None:
        worker = self._workers[label]
        if worker.machine is None and self._workers.present and not self._dealer.eligible.is_wanted(label):
            self._workers.remove(label)  # the others run its calls
        elif self._group.expects_workers:
            self._workers.expect(label, self._config.rejoin_timeout_s)
        else:
            self._workers.give_up(label, worker.reason)
        self._dealer.rebalance()  # which forgets it

    def _give_up(self, label: str) -> None:
        self._workers.give_up(label, self._workers[label].reason)
