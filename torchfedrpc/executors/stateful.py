"""Learners with state on workers: their sessions, and their placement as workers come and go."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import SerializationError, WorkerLostError
from torchfedrpc.executors.admission import Admission
from torchfedrpc.executors.base import ExecutorSpec
from torchfedrpc.executors.batches import Batches, Parts
from torchfedrpc.executors.call_executor import without_traces
from torchfedrpc.executors.durations import Durations
from torchfedrpc.executors.learner_session import LearnerRun, LearnerSession
from torchfedrpc.executors.placement import LOCAL, even_out, place_again, place_clients
from torchfedrpc.executors.remote import RemoteLearners
from torchfedrpc.host.call import Call, Outcome
from torchfedrpc.reduce.driver import Reduction
from torchfedrpc.rpc.member import Member
from torchfedrpc.rpc.sources import Source

logger = logging.getLogger(__name__)


class StatefulLearners(RemoteLearners):
    """Learners that stay on their workers; their clients are placed again as workers come and go.

    Args:
        config: The run's configuration.
        spec: The run.
        sources: The sources of workers.
        admission: Counts the journals' arguments beyond their bound.
        durations: Records the durations of cancelled calls.
    """

    _run: LearnerRun

    def __init__(
        self,
        config: RuntimeConfig,
        spec: ExecutorSpec,
        sources: list[Source],
        admission: Admission,
        durations: Durations,
    ) -> None:
        super().__init__(config, spec, sources)
        self._run = LearnerRun(config, spec, self._workers, admission, durations)

    # Calls.

    def call(self, call: Call) -> Coroutine[Any, Any, Outcome]:
        session = self._run.sessions.get(call.client_id) or self._run.session(call.client_id)
        return session.call(call)

    def session(self, client_id: str) -> LearnerSession:
        return self._run.session(client_id)

    def _present_session(self, client_id: str) -> LearnerSession | None:
        return self._run.sessions.get(client_id)

    async def capture(self, call: Call) -> Outcome | None:
        session = self._run.session(call.client_id)
        return None if session.given_up is not None else await self.call(call)

    def reduce(self, reduction: Reduction, calls: Mapping[int, Call]) -> Coroutine[Any, Any, None]:
        """Run calls, by place, and reduce their results on the workers."""
        parts: Parts = {}
        for place, call in calls.items():
            try:
                parts[place] = call, self._run.session(call.client_id)
            except SerializationError as error:
                reduction.note(call.client_id, without_traces(error))
        return Batches(self._run, reduction, self._config.call_timeout_s).make(parts)

    def rref(self, client_id: str) -> Any:
        """Return a learner's RRef. A learner without calls is registered for that.

        Raises:
            WorkerLostError: If the learner has no RRef now.
        """
        session = self._run.session(client_id)
        worker = session.worker
        if worker is None and session.turns.take_now():
            worker = session.ready()
            session.turns.give()
        if worker is not None and worker.client is not None:
            worker.client.register(worker.registrations[client_id])
            return worker.client.rref(client_id)
        label = self.worker_of(client_id)
        reason = (
            session.given_up
            or self._workers.why_given_up(label)
            or (
                "its learner has no RRef while the world is formed anew, its worker is lost or leaves, or it is "
                "rebuilt; await a call of this client, and ask again"
            )
        )
        raise WorkerLostError(f"{client_id} on {label}: {reason}")

    def worker_of(self, client_id: str) -> str:
        return self._run.worker_of(client_id)

    def stats(self) -> dict[str, Any]:
        """Return bytes sent and received, workers lost, the learners of each worker, and what the journals hold."""
        journal_bytes = 0 if self._stats_at_close is not None else self._run.journals.num_bytes
        return {**super().stats(), "journal_bytes": journal_bytes}

    # Workers that come and go.

    async def _clear(self, member: Member) -> None:
        """Move all learners off a worker."""
        self._place_again(self._clients_of(member.label))
        moving = [session for session in self._run.sessions.values() if session.worker is member]
        await asyncio.gather(*(session.move() for session in moving))

    def _give_up(self, label: str) -> None:
        """Fail the calls of a lost worker's learners, which are not rebuilt."""
        where = self._workers[label].reason
        self._workers.give_up(label, f"{where}, and its learner with it; runtime.on_worker_lost=recover rebuilds it")
        for client_id in self._clients_of(label):  # an interrupted move leaves the learner where it was
            self._run.places[client_id] = self.worker_of(client_id)

    def _worker_left(self, label: str) -> None:
        """Let the clients of a worker that was lost or has left wait for another, or place them on other workers."""
        worker = self._workers[label]
        if worker.machine is None:
            self._place_again(self._clients_of(label))
        clients = self._clients_of(label)
        if clients and self._group.expects_workers:
            self._workers.expect(label, self._config.rejoin_timeout_s)
        elif clients and self._workers.present:
            endpoint = self._config.client_endpoints.get(clients[0])
            self._workers.give_up(label, f"{worker.reason}, and no worker is left where {endpoint!r} wants it")
        elif worker.machine is None and not clients:
            self._workers.remove(label)

    def _place_all(self) -> None:
        clients, endpoints = list(self._spec.clients), self._config.client_endpoints
        self._run.places |= place_clients(clients, endpoints, self._workers.known_machines)

    def _place_again(self, clients: Sequence[str]) -> None:
        """Place clients on present workers, as far as their endpoints allow."""
        places, endpoints = self._run.places, self._config.client_endpoints
        places |= place_again(clients, endpoints, self._workers.machines, places)
        self._workers.changed()

    def _worker_joined(self, label: str) -> None:
        """Give new workers an equal share of the clients. Their learners move between two calls."""
        endpoints, there = self._config.client_endpoints, {LOCAL, *self._workers.members}
        places, sessions = self._run.places, self._run.sessions
        self._place_again([client_id for client_id in endpoints if places.get(client_id, LOCAL) not in there])
        # Workers with a replacement on its way keep their share.
        labels = [
            worker.label
            for worker in self._workers
            if worker.machine is not None and (worker.label in self._workers.present or worker.source.replaces)
        ]
        clients = [client_id for client_id in self._spec.clients if client_id in places]
        moved = even_out(clients, endpoints, labels, places, lambda client_id: client_id not in sessions)
        places |= moved
        for client_id in moved:
            if (session := sessions.get(client_id)) is not None and session.worker is not None:
                self._run.in_background(session.move())
        for worker in self._workers:
            if worker.deadline is not None and not self._clients_of(worker.label):
                worker.stop_waiting()

    def _clients_of(self, label: str) -> list[str]:
        return [client_id for client_id, place in self._run.places.items() if place == label]
