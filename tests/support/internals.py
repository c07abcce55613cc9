"""What tests and chaos know of the inside of an open proxy: the one place to change when that changes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from processes import children_of

import torchfedrpc as tfr
from torchfedrpc.host.learner_host import LearnerHost
from torchfedrpc.rpc import world
from torchfedrpc.rpc.worker_client import WorkerClient


def remote_learners(proxy: tfr.LearnerProxy) -> Any:
    """The learners of an open proxy's workers."""
    executor: Any = proxy._router._main
    return executor._learners


def group_of(proxy: tfr.LearnerProxy) -> Any:
    """The workers of an open proxy, as their world has them."""
    return remote_learners(proxy)._group


def members_of(proxy: tfr.LearnerProxy) -> dict[str, Any]:
    """The processes of the present world, or of the one that is formed, by name."""
    members: dict[str, Any] = group_of(proxy).workers.members
    return members


def newcomers_of(proxy: tfr.LearnerProxy) -> dict[str, Any]:
    """The processes that are prepared for a world, by name."""
    newcomers: dict[str, Any] = group_of(proxy).workers.newcomers
    return newcomers


def asks_to_leave(proxy: tfr.LearnerProxy, worker: str) -> bool:
    """Whether a worker has asked to leave, by its heartbeat process."""
    asks: bool = group_of(proxy)._watch.asks_to_leave(worker)
    return asks


def sessions_of(proxy: tfr.LearnerProxy) -> dict[str, Any]:
    """The sessions of the learners that were called."""
    sessions: dict[str, Any] = remote_learners(proxy)._run.sessions
    return sessions


def journal_of(proxy: tfr.LearnerProxy, client_id: str) -> Any:
    """The journal of a learner that was called."""
    return sessions_of(proxy)[client_id]._journal


async def snapshots_are_stored(proxy: tfr.LearnerProxy) -> None:
    """Wait until no snapshot is on its way."""
    async with asyncio.timeout(30):
        while any(session._journal.awaits_snapshot for session in sessions_of(proxy).values()):
            await asyncio.sleep(0.001)


def processes_of(proxy: tfr.LearnerProxy) -> dict[Any, Any]:
    """The worker processes that an open proxy has started."""
    processes: dict[Any, Any] = group_of(proxy)._sources[0].processes
    return processes


def is_formed(proxy: tfr.LearnerProxy) -> bool:
    """Whether the workers can be called, in a world that was formed."""
    return any(member.client is not None for member in members_of(proxy).values())


async def check_nothing_goes_on(proxy: tfr.LearnerProxy) -> None:
    """Check that no host has an open batch, that the driver's keeps no outcome, and that no call is under way."""
    executor: Any = proxy._router._main
    async with asyncio.timeout(20):  # calls that were cancelled end in their time
        if proxy.mode == "local":
            host = executor._learners._host
            while host._batches:
                await asyncio.sleep(0.01)
            assert not host._outcomes
            return
        while any(session.turns.is_held for session in sessions_of(proxy).values()):
            await asyncio.sleep(0.01)
    one_of_each = [proxy.client_ids[0], proxy.client_ids[-1]]
    assert set((await proxy.clients(one_of_each).call("number_of_batches")).values()) == {0}


def worker_processes(proxy: tfr.LearnerProxy) -> list[int]:
    """The ids of the processes that the driver has started as workers."""
    return [process.pid for process in processes_of(proxy).values()]


def executor_stats(proxy: tfr.LearnerProxy) -> dict[str, Any]:
    """The statistics of the executor, the bytes of its journal among them."""
    executor: Any = proxy._router._main
    stats: dict[str, Any] = executor.stats()
    return stats


def break_world(proxy: tfr.LearnerProxy) -> None:
    """End the present world as after a loss; the workers live on, and form the next one."""
    group_of(proxy)._break()


def cut_off(proxy: tfr.LearnerProxy, worker: str) -> None:
    """Give a worker up as after a missed heartbeat, though it lives."""
    group_of(proxy)._give_up(members_of(proxy)[worker], "it is cut off")


async def world_is_there(proxy: tfr.LearnerProxy) -> None:
    """Wait until workers can be called."""
    async with asyncio.timeout(60):
        while not is_formed(proxy):
            await asyncio.sleep(0.05)


class FirstWorker:
    """The first worker of an open proxy, with the secrets of the present world.

    Attributes:
        addresses: ``driver`` and ``worker`` -> address of its agent of torch RPC.
        secrets: ``worker`` -> the secret of its requests, and the number of the next.
    """

    def __init__(self, proxy: tfr.LearnerProxy) -> None:
        self._proxy = proxy
        self._clients = self._present()
        self._client = next(iter(self._clients.values()))
        foreign: Any = world
        names = {"driver": foreign.torch_rpc().get_worker_info().name, "worker": self._client._worker.name}
        store = foreign._agents_store
        self.addresses = {victim: store.get(f"addrs/{name}").decode() for victim, name in names.items()}
        self.secrets = {"worker": (self._client._secret.hex(), self._client._next_request)}

    def skip(self, num_requests: int) -> None:
        """Go on after requests of a stranger that the worker has answered."""
        self._client._next_request += num_requests
        self._client._in_order._next += num_requests

    def is_there(self) -> bool:
        """Whether the world is the same one still."""
        return self._present() == self._clients

    def _present(self) -> dict[str, Any]:
        return {label: member.client for label, member in members_of(self._proxy).items()}


def pid_of(proxy: tfr.LearnerProxy, worker: str) -> int | None:
    """The process that serves as a worker now; None if there is none, or another process started it."""
    process = processes_of(proxy).get(members_of(proxy).get(worker))
    return process.pid if process is not None else None


@contextlib.contextmanager
def after_moves(proxy: tfr.LearnerProxy, then: Callable[[], Awaitable[None]]) -> Iterator[None]:
    """Await something whenever all learners of a worker that leaves have moved, before the worker is released."""
    learners = remote_learners(proxy)
    clear = learners._clear

    async def clear_and_then(member: Any) -> None:
        await clear(member)
        await then()

    learners._clear = clear_and_then
    try:
        yield
    finally:
        del learners._clear


def started_pid_of(proxy: tfr.LearnerProxy, worker: str) -> int | None:
    """The same, also of one that was started and is not ready yet."""
    return next((process.pid for member, process in processes_of(proxy).items() if member.label == worker), None)


def worker_of(proxy: tfr.LearnerProxy, client_id: str) -> str:
    """The worker that has a client's learner."""
    executor: Any = proxy._router.get_executor(client_id)
    worker: str = executor.worker_of(client_id)
    return worker


def stored_learners(host: LearnerHost) -> list[Any]:
    """The clients whose learners a host has on disk."""
    return list(host._learners._snapshots)


def forming(proxy: tfr.LearnerProxy) -> str:
    """The step of forming a world that is under way: ``all leave``, ``all join``; empty if there is none."""
    group = group_of(proxy)
    if is_formed(proxy) or not group._world_is_due.is_set():
        return ""
    place = group._place
    return "all join" if place._store is not None and not place._joining.done() else "all leave"


def is_in_next_world(proxy: tfr.LearnerProxy, worker: str) -> bool:
    """Whether a worker, or the process that replaces it, takes part in the world that is formed."""
    return worker in members_of(proxy)


def heartbeat_pid(worker_pid: int) -> int | None:
    """The process that sends the heartbeats of a worker process, once it is there."""
    return next(iter(children_of(worker_pid)), None)


def silence(heartbeat_process: int) -> None:
    """Let a worker work on while its heartbeats stop, as where the network fails: `Activity.sever`, from outside."""
    descriptor = Path(f"/proc/{heartbeat_process}/cmdline").read_bytes().split(b"\0")[5].decode()
    page = os.open(f"/proc/{heartbeat_process}/fd/{descriptor}", os.O_RDWR)
    try:
        os.pwrite(page, (1).to_bytes(8, sys.byteorder), os.fstat(page).st_size - 16)
    finally:
        os.close(page)


def values_kept_by_workers(proxy: tfr.LearnerProxy) -> set[int]:
    """Return the numbers of the shared values that workers keep for later calls."""
    return {number for member in members_of(proxy).values() for number in member.client._placed}


@contextlib.contextmanager
def not_carried(method: str, num_requests: float = math.inf) -> Iterator[None]:
    """Let RPC fail the next requests of the driver that have a call of a method."""
    client_class: Any = WorkerClient
    send, num_failed = client_class._send, itertools.count(1)

    def send_unless(client: Any, entry: Any, alone: int | None, *args: Any, **options: Any) -> Any:
        for item in args[0] if args else ():
            if item[0] == "submit" and item[2][0][2] == method and next(num_failed) <= num_requests:
                raise RuntimeError(f"{method} is not carried")
        return send(client, entry, alone, *args, **options)

    client_class._send = send_unless
    try:
        yield
    finally:
        client_class._send = send


async def take_calls_back(proxy: tfr.LearnerProxy) -> int:
    """Take half of the calls that have not begun back from each worker; how many calls came back."""
    dealer, num_taken = remote_learners(proxy)._dealer, 0
    for worker, load in list(dealer._loads.items()):
        candidates = [(one, place) for one in load.assignments for place in one.calls]
        if candidates and not worker.is_gone:
            num_taken += await dealer._take_back(worker, load, candidates, half=True)
    return num_taken


def subscribers_of(proxy: tfr.LearnerProxy) -> list[Any]:
    """The subscribers to the events of a proxy; without any, calls make no events."""
    return list(proxy._calls.opening.events.subscribers)
