"""Learners on workers, and their placement as workers come and go."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError, WorkerLostError
from torchfedrpc.events import WorkerJoined, WorkerLeft, WorkerLost
from torchfedrpc.executors.admission import Admission
from torchfedrpc.executors.base import ExecutorSpec
from torchfedrpc.executors.batches import Batches
from torchfedrpc.executors.call_executor import Learners
from torchfedrpc.executors.durations import Durations
from torchfedrpc.executors.learner_session import Run, SessionStream
from torchfedrpc.executors.placement import LOCAL, even_out, place_again, place_clients
from torchfedrpc.host.call import Call, Outcome
from torchfedrpc.host.faults import Fault
from torchfedrpc.reduce.driver import Reduction
from torchfedrpc.rpc.backend import torch_rpc
from torchfedrpc.rpc.member import Member
from torchfedrpc.rpc.sources import JoinedSource, Source
from torchfedrpc.rpc.worker_client import ProgressArrived
from torchfedrpc.rpc.worker_group import WorkerGroup, WorkerLeaving
from torchfedrpc.rpc.workers import Worker, WorkerState
from torchfedrpc.tasks import Tasks
from torchfedrpc.wire.file_pool import FilePool
from torchfedrpc.wire.packing import Packed, pack
from torchfedrpc.wire.shared import SharedValue

logger = logging.getLogger(__name__)

_FIRST_TIMEOUT_S = 120.0  # until the first worker joins a run without other workers
_MAX_PLAIN_ARGUMENTS = 64


class RemoteLearners(Learners):
    """Learners of a run on workers in a world of torch RPC; clients are placed again as workers come and go.

    Args:
        config: The run's configuration.
        spec: The run.
        sources: The sources of workers.
        admission: Counts the journals' arguments beyond their bound.
        durations: Records the durations of cancelled calls.
    """

    def __init__(
        self,
        config: RuntimeConfig,
        spec: ExecutorSpec,
        sources: list[Source],
        admission: Admission,
        durations: Durations,
    ) -> None:
        self._config = config
        self._spec = spec
        self._joined = next((source for source in sources if isinstance(source, JoinedSource)), None)
        self.join_address = self._joined.address if self._joined is not None else None
        self._group = WorkerGroup(sources, spec.learner)
        self._workers = self._group.workers
        self._run = Run(config, spec, self._workers, admission, durations)
        self._file_pool = FilePool()
        self._following = Tasks()
        self._plain_arguments: dict[bytes, Packed] = {}  # cache: pickle -> arguments without tensors
        self._num_lost = 0
        self._last_loss = ""
        self._stats_at_close: dict[str, Any] | None = None  # once closed

    async def open(self) -> None:
        """Gather the workers, form a world with them and place the clients.

        Raises:
            ConfigError: If no worker can serve, or an endpoint names a worker that does not exist.
            WorkerLostError: If a worker ended meanwhile, or cannot be reached.
        """
        torch_rpc()  # fails before any process is started
        await self._group.gather()
        is_placed = bool(self._workers.members)
        if is_placed:
            self._place_all()
        await self._group.open()
        self._following.start(self._follow())
        if not is_placed:
            await self._first_to_join()
            self._place_all()

    async def close(self, reason: str) -> None:
        """Fail the pending calls, end the world, and release the workers."""
        self._stats_at_close = {**self.stats(), "journal_bytes": 0, "workers": {}}
        self._run.end()
        self._following.cancel()
        await self._group.close(reason)
        await self._run.close()
        self._file_pool.close()

    # Calls.

    def call(self, call: Call) -> Coroutine[Any, Any, Outcome]:
        session = self._run.sessions.get(call.client_id) or self._run.session(call.client_id)
        return session.call(call)

    def stream(self, call: Call) -> SessionStream:
        return SessionStream(self._run.session(call.client_id), call)

    async def capture(self, call: Call) -> Outcome | None:
        session = self._run.session(call.client_id)
        return None if session.given_up is not None else await self.call(call)

    def reduce(self, reduction: Reduction, calls: Mapping[int, Call]) -> Coroutine[Any, Any, None]:
        """Run calls, by place, and reduce their results on the workers."""
        parts = {place: (call, self._run.session(call.client_id)) for place, call in calls.items()}
        return Batches(self._run, reduction, self._config.call_timeout_s).make(parts)

    def take_value(self, obj: Any) -> Packed:
        return pack(obj)

    def take_shared(self, obj: Any) -> Packed:
        """Pack the present value of an object, for several calls; in shared memory files if a worker can map them."""
        members = self._workers.members.values()
        return pack(obj, in_files=any(one.sees_files for one in members), pool=self._file_pool)

    def take_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Packed:
        """Pack the arguments of a call.

        Arguments without tensors are cached: journals keep them, and the calls of a round often have equal ones.
        """
        parcel = pack((args, kwargs), may_refer=True)
        if parcel.slots or parcel.apart:
            return parcel
        if len(self._plain_arguments) >= _MAX_PLAIN_ARGUMENTS:
            self._plain_arguments.clear()
        return self._plain_arguments.setdefault(parcel.head, parcel)

    def unshare(self, value: SharedValue) -> None:
        """Free a shared value on all workers."""
        for member in self._workers.members.values():
            if member.client is not None:
                member.client.unshare(value)

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

    def workers(self) -> list[str]:
        """Return the names of the workers: ``worker1`` and so on, and the addresses of listening workers."""
        return [worker.label for worker in self._workers if worker.machine is not None]

    async def arm(self, faults: Mapping[str, Sequence[Fault]]) -> None:
        """Inject faults into workers at later calls."""
        await asyncio.gather(*(self._group.arm(label, of_label) for label, of_label in faults.items()))

    def stats(self) -> dict[str, Any]:
        """Return bytes sent and received, workers lost, and the number of learners of each worker."""
        if self._stats_at_close is not None:
            return self._stats_at_close
        traffic = self._group.traffic
        return {
            "bytes_sent": traffic.num_sent_bytes,
            "bytes_received": traffic.num_received_bytes,
            "snapshot_bytes": traffic.num_snapshot_bytes,
            "journal_bytes": self._run.journals.num_bytes,
            "workers_lost": self._num_lost,
            "workers": {
                label: {"learners": len(member.registrations)} for label, member in self._workers.members.items()
            },
        }

    # Workers that come and go.

    async def _follow(self) -> None:
        """Follow what becomes of the workers, event after event."""
        while True:
            event = await self._group.events.get()
            if isinstance(event, WorkerLeaving):
                self._empty(event.worker)
                continue
            if isinstance(event, ProgressArrived):
                self._publish_progress(event)
                continue
            self._spec.events.publish(event)
            if isinstance(event, WorkerJoined):
                self._balance()
            elif isinstance(event, WorkerLeft):
                self._do_without(event.worker)
            elif isinstance(event, WorkerLost):
                self._num_lost += 1
                self._last_loss = self._workers[event.worker].reason
                if self._run.journals_are_kept:
                    self._do_without(event.worker)
                else:
                    self._give_up(event.worker)

    def _publish_progress(self, arrived: ProgressArrived) -> None:
        """Publish progress, unless the same call has reported it before it was repeated."""
        session = self._run.sessions.get(arrived.call.client_id)
        if session is not None and session.is_next_report(arrived.call, arrived.number):
            self._spec.publish_progress(arrived.call, arrived.number, arrived.value)

    async def _first_to_join(self) -> None:
        """Wait until a worker has joined and can be called, in a run without other workers.

        Raises:
            ConfigError: If no suitable worker joined within 120 s, or a setting of this process suits no worker.
            WorkerLostError: If no world could be formed with the workers that joined.
        """
        assert self._joined is not None
        print(f"waiting for a worker: {self._joined.command}", file=sys.stderr, flush=True)
        while not self._workers.present and self._workers.failure is None:
            try:
                async with asyncio.timeout(_FIRST_TIMEOUT_S):
                    await self._workers.next_change()
            except TimeoutError:
                if self._group.is_taking_in:  # bounded by the timeout of forming a world
                    continue
                why = f" ({self._last_loss})" if self._last_loss else ""
                raise ConfigError(
                    f"no worker that can serve has joined within {_FIRST_TIMEOUT_S:.0f} s{why}: start one by "
                    f"{self._joined.command}"
                ) from None
        if self._workers.failure is not None:
            raise self._workers.failure

    def _empty(self, label: str) -> None:
        """Move the learners of a worker that asks to leave."""
        worker = self._workers[label]
        if worker.state is WorkerState.LEAVING and worker.member is not None:
            logger.info("%s leaves: its learners are moved", label)
            self._place_again(self._clients_of(label))
            self._run.in_background(self._drain(worker, worker.member))

    async def _drain(self, worker: Worker, member: Member) -> None:
        """Move all learners off a worker, and release it."""
        await self._move_off(member)
        if worker.member is member and not self._run.is_closed:  # else it was lost meanwhile, or the run has ended
            self._group.release(worker.label)

    async def _move_off(self, member: Member) -> None:
        moving = [session for session in self._run.sessions.values() if session.worker is member]
        await asyncio.gather(*(session.move() for session in moving))

    def _give_up(self, label: str) -> None:
        """Fail the calls of a lost worker's learners, which are not rebuilt."""
        where = self._workers[label].reason
        self._workers.give_up(label, f"{where}, and its learner with it; runtime.on_worker_lost=recover rebuilds it")
        for client_id in self._clients_of(label):  # an interrupted move leaves the learner where it was
            self._run.places[client_id] = self.worker_of(client_id)

    def _do_without(self, label: str) -> None:
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
        machines = {worker.label: worker.machine for worker in self._workers if worker.machine is not None}
        self._run.places |= place_clients(list(self._spec.clients), self._config.client_endpoints, machines)

    def _place_again(self, clients: Sequence[str]) -> None:
        """Place clients on present workers, as far as their endpoints allow."""
        places, endpoints = self._run.places, self._config.client_endpoints
        places |= place_again(clients, endpoints, self._workers.machines, places)
        self._workers.changed()

    def _balance(self) -> None:
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
