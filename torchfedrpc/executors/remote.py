"""Learners on workers: the workers of a run, their events, and caches of arguments."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import sys
import time
import weakref
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError
from torchfedrpc.events import WorkerJoined, WorkerLeft, WorkerLogged, WorkerLost
from torchfedrpc.executors.base import ExecutorSpec
from torchfedrpc.executors.call_executor import Learners
from torchfedrpc.executors.log_relay import relay
from torchfedrpc.executors.session import Run, Session, SessionStream
from torchfedrpc.host.call import Call
from torchfedrpc.host.faults import Fault
from torchfedrpc.rpc.backend import torch_rpc
from torchfedrpc.rpc.member import Member
from torchfedrpc.rpc.sources import JoinedSource, Source
from torchfedrpc.rpc.worker_client import ProgressArrived
from torchfedrpc.rpc.worker_group import WorkerGroup, WorkerLeaving
from torchfedrpc.rpc.workers import Worker, WorkerState
from torchfedrpc.tasks import Tasks
from torchfedrpc.waiting import reported
from torchfedrpc.wire.file_pool import FilePool
from torchfedrpc.wire.packing import Packed, pack
from torchfedrpc.wire.shared import SharedValue

logger = logging.getLogger(__name__)

_FIRST_TIMEOUT_S = 120.0  # until the first worker joins a run without other workers
_MAX_PLAIN_ARGUMENTS = 64


class RemoteLearners(Learners):
    """Base class of the learners of a run on workers, in a world of torch RPC.

    A subclass decides which worker runs the calls of a client, also as workers come and go.

    Args:
        config: The run's configuration.
        spec: The run.
        sources: The sources of workers.
    """

    _run: Run  # of the subclass

    def __init__(self, config: RuntimeConfig, spec: ExecutorSpec, sources: list[Source]) -> None:
        self._config = config
        self._spec = spec
        self._joined = next((source for source in sources if isinstance(source, JoinedSource)), None)
        self.join_address = self._joined.address if self._joined is not None else None
        self._group = WorkerGroup(sources, spec.learner)
        self._workers = self._group.workers
        self._file_pool = FilePool()
        self._following = Tasks()
        self._plain_arguments: dict[bytes, Packed] = {}  # cache: pickle -> arguments without tensors
        self._num_lost = 0
        self._last_loss = ""
        self._streams: weakref.WeakSet[SessionStream] = weakref.WeakSet()
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
        # A notebook shows in the present cell what is printed in a context that is not of another cell.
        contextvars.Context().run(self._following.start, self._follow())
        if not is_placed:
            await self._first_to_join()
            self._place_all()

    async def close(self, reason: str) -> None:
        """Fail the pending calls, end the world, and release the workers."""
        self._stats_at_close = {**self.stats(), "workers": {}}
        self._run.end()
        self._following.cancel()
        await self._group.close(reason)
        self._pass_on_the_rest()
        for stream in list(self._streams):  # calls that wait behind it end now
            stream.give_up()
        await self._run.close()
        self._file_pool.close()

    # Calls.

    @abstractmethod
    def session(self, client_id: str) -> Session:
        """Return the session of a client.

        Raises:
            WorkerLostError: If the proxy is closed.
        """

    @abstractmethod
    def _present_session(self, client_id: str) -> Session | None:
        """Return the session of a client, if there is one."""

    def stream(self, call: Call) -> SessionStream:
        stream = SessionStream(self, call)
        self._streams.add(stream)
        return stream

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

    def workers(self) -> list[str]:
        """Return the names of the workers: ``worker1`` and so on, and the addresses of listening workers."""
        return list(self._workers.known_machines)

    async def arm(self, faults: Mapping[str, Sequence[Fault]]) -> None:
        """Inject faults into workers at later calls."""
        await asyncio.gather(*(self._group.arm(label, of_label) for label, of_label in faults.items()))

    async def interrupt(self, give_up: bool) -> list[str]:
        return await self._group.interrupt(give_up)

    def stats(self) -> dict[str, Any]:
        """Return bytes sent and received, workers lost, and the numbers of each worker."""
        if self._stats_at_close is not None:
            return self._stats_at_close
        traffic = self._group.traffic.values()
        return {
            "bytes_sent": sum(one.num_sent_bytes for one in traffic),
            "bytes_received": sum(one.num_received_bytes for one in traffic),
            "snapshot_bytes": sum(one.num_snapshot_bytes for one in traffic),
            "journal_bytes": 0,
            "workers_lost": self._num_lost,
            "workers": {label: self._stats_of(label, member) for label, member in self._workers.members.items()},
        }

    def _stats_of(self, label: str, member: Member) -> dict[str, Any]:
        heartbeat, traffic = self._group.heartbeat(label), self._group.traffic[label]
        return {
            "learners": len(member.registrations),
            "state": self._workers[label].state.value,
            "machine": member.machine,
            "address": member.address,
            "pid": member.process_id,
            "heartbeat_age_s": time.monotonic() - heartbeat.seen_at if heartbeat is not None else None,
            "round_trip_s": member.clock.round_trip_s,
            "bytes_sent": traffic.num_sent_bytes,
            "bytes_received": traffic.num_received_bytes,
            "busy_s": member.busy_s,
            "queue": sum(member.sent.values()),
            "memory_bytes": heartbeat.memory_bytes if heartbeat is not None else None,
        }

    # Workers that come and go.

    @abstractmethod
    def _place_all(self) -> None:
        """Place the clients on the first workers.

        Raises:
            ConfigError: If an endpoint is malformed, or names no worker of this run.
        """

    @abstractmethod
    def _worker_joined(self, label: str) -> None:
        """Let calls run on a worker that accepts them now."""

    @abstractmethod
    async def _clear(self, member: Member) -> None:
        """Make a worker that asks to leave free of calls and learners."""

    @abstractmethod
    def _worker_left(self, label: str) -> None:
        """Do without a worker that has left."""

    @abstractmethod
    def _give_up(self, label: str) -> None:
        """Fail the calls that need a worker that was lost."""

    def _worker_leaving(self, label: str) -> None:
        worker = self._workers[label]
        if worker.state is WorkerState.LEAVING and worker.member is not None:
            logger.info("%s leaves", label)
            self._run.in_background(self._drain(worker, worker.member))

    async def _drain(self, worker: Worker, member: Member) -> None:
        """Release a worker once it is free of calls and learners."""
        await self._clear(member)
        if worker.member is member and not self._run.is_closed:  # else it was lost meanwhile, or the run has ended
            self._group.release(worker.label)

    async def _follow(self) -> None:
        """Follow what becomes of the workers, event after event."""
        while True:
            event = await self._group.events.get()
            if isinstance(event, WorkerLeaving):
                self._worker_leaving(event.worker)
                continue
            if isinstance(event, ProgressArrived):
                self._publish_progress(event)
                continue
            self._spec.events.publish(event)
            if isinstance(event, WorkerLogged):
                relay(event)
            elif isinstance(event, WorkerJoined):
                self._worker_joined(event.worker)
            elif isinstance(event, WorkerLeft):
                self._worker_left(event.worker)
            elif isinstance(event, WorkerLost):
                self._num_lost += 1
                self._last_loss = self._workers[event.worker].reason
                if self._run.recovers:
                    self._worker_left(event.worker)
                else:
                    self._give_up(event.worker)

    def _pass_on_the_rest(self) -> None:
        """Pass the last log records on, and those of a run that was not opened."""
        while not self._group.events.empty():
            event = self._group.events.get_nowait()
            if isinstance(event, WorkerLogged):
                self._spec.events.publish(event)
                relay(event)

    def _publish_progress(self, arrived: ProgressArrived) -> None:
        """Publish progress, unless the same call has reported it before it was repeated."""
        session = self._present_session(arrived.call.client_id)
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
        async with reported(lambda: "waiting for a worker that joins"):
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
