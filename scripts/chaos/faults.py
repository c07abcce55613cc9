"""The faults of chaos: two tables, of workers that the driver starts and of workers that come and go."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable

import internals
from processes import Process, serving_for

from chaos.elastic import ElasticWorkers, drained, joined
from chaos.report import HANG_S
from chaos.stage import Expected, Fault, Scene
from chaos.workload import STREAM_ITEMS, STREAM_METHOD
from torchfedrpc.events import ProgressReported, WorkerJoined, WorkerLeft, WorkerLost

_POLL_S = 0.005
_START_S = 2.0  # about the time that a replacement takes to start; one is struck at some moment of it
_JOIN_S = 1.0  # about the time from a worker's handshake until it has its share of the learners


# Workers that the driver starts.


async def kill(scene: Scene) -> None:
    """Kill a worker."""
    await scene.moment()
    await scene.kill(scene.one())


def kill_during(activity: str) -> Fault:
    """Kill a worker during an activity of the round."""

    async def fault(scene: Scene) -> None:
        await scene.during(activity)
        await scene.kill(scene.one())

    return fault


async def kill_at_capture(scene: Scene) -> None:
    """Kill a worker as it captures a learner's state, for an eviction or for a snapshot."""
    worker = scene.one()
    pid = internals.pid_of(scene.proxy, worker)
    assert pid is not None
    at, under_way = await scene.trapped("capture", pid, "eviction or snapshot")
    scene.note(worker, at=at, under_way=under_way)


async def kill_at_stream(scene: Scene) -> None:
    """Kill the worker that has an open stream, in the middle of it."""
    client_id, num_reports = scene.trainer.streaming(scene.round_num), scene.draw.randint(1, STREAM_ITEMS)
    began = len(scene.log.entries)
    scene.ready.set()

    def reports() -> list[ProgressReported]:
        events = [event for _, event in scene.log.entries[began:] if isinstance(event, ProgressReported)]
        return [event for event in events if event.client_id == client_id and event.method == STREAM_METHOD]

    await scene.log.until(lambda: len(reports()) >= num_reports)
    await scene.kill(internals.worker_of(scene.proxy, client_id))


async def kill_two(scene: Scene) -> None:
    """Kill two workers at once."""
    await scene.moment()
    for worker in scene.pick(2):
        await scene.kill(worker)


async def kill_all(scene: Scene) -> None:
    """Kill all workers at once."""
    await scene.moment()
    for worker in scene.workers:
        await scene.kill(worker)


async def kill_replacement(scene: Scene) -> None:
    """Kill a worker, and then the process that starts in its place."""
    (worker,) = await _one_lost(scene, 1)
    await scene.moment(_START_S)
    await scene.kill(worker)


async def kill_in_recovery(scene: Scene) -> None:
    """Kill a worker, and another before all are there again."""
    _, second = await _one_lost(scene, 2)
    await scene.moment(_START_S)
    await scene.kill(second)


async def freeze_in_recovery(scene: Scene) -> None:
    """Kill a worker, and stop another before all are there again."""
    _, second = await _one_lost(scene, 2)
    await scene.moment(_START_S)
    await scene.signal(second, signal.SIGSTOP)


async def kill_in_leaving(scene: Scene) -> None:
    """Kill a worker, and another while all leave the world."""
    _, second = await _one_lost(scene, 2)
    await scene.world_is_formed_with(second, "all leave")
    await scene.kill(second)


async def kill_in_joining(scene: Scene) -> None:
    """Kill a worker, and then another or its replacement while all join the next world."""
    worker = scene.draw.choice(await _one_lost(scene, 2))
    await scene.world_is_formed_with(worker, "all join")
    await scene.kill(worker)


async def freeze_in_joining(scene: Scene) -> None:
    """Kill a worker, and then stop another or its replacement while all join the next world."""
    worker = scene.draw.choice(await _one_lost(scene, 2))
    await scene.world_is_formed_with(worker, "all join")
    await scene.signal(worker, signal.SIGSTOP)


async def kill_at_call(scene: Scene) -> None:
    """Let a call kill its worker."""
    await scene.struck_by_call(scene.one(), "kill")


async def freeze(scene: Scene) -> None:
    """Stop a worker."""
    await scene.moment()
    await scene.signal(scene.one(), signal.SIGSTOP)


async def freeze_at_call(scene: Scene) -> None:
    """Let a call stop its worker."""
    await scene.struck_by_call(scene.one(), "freeze")


async def sever(scene: Scene) -> None:
    """Let a worker work on while its heartbeats stop."""
    await scene.moment()
    await scene.strike_heartbeat(scene.one(), internals.silence)


async def freeze_heartbeat(scene: Scene) -> None:
    """Stop the process that sends a worker's heartbeats."""
    await scene.moment()
    await scene.strike_heartbeat(scene.one(), lambda pid: os.kill(pid, signal.SIGSTOP))


async def kill_heartbeat(scene: Scene) -> None:
    """Kill the process that sends a worker's heartbeats."""
    await scene.moment()
    await scene.strike_heartbeat(scene.one(), lambda pid: os.kill(pid, signal.SIGKILL))


async def terminate(scene: Scene) -> None:
    """Send SIGTERM to a worker."""
    await scene.moment()
    await scene.signal(scene.one(), signal.SIGTERM)


async def pause(scene: Scene) -> None:
    """Stop a worker for less than the heartbeat's timeout."""
    worker = scene.one()
    await scene.moment()
    await scene.signal(worker, signal.SIGSTOP, is_fatal=False)
    await asyncio.sleep(0.4 * scene.heartbeat_timeout_s)
    await scene.signal(worker, signal.SIGCONT, is_fatal=False)


async def _one_lost(scene: Scene, count: int) -> list[str]:
    """Kill a worker, and wait until its loss is known; returns as many workers, it first."""
    workers = scene.pick(count)
    await scene.moment()
    await scene.kill(workers[0])
    await scene.lost(workers[0])
    return workers


_SILENT = Expected(is_silent=True)
_TWO = Expected(num_lost=2)

WORKERS: dict[str, tuple[Fault, Expected]] = {
    "kill": (kill, Expected()),
    "kill during train": (kill_during("train"), Expected()),
    "kill during share": (kill_during("share"), Expected()),
    "kill during reduce": (kill_during("reduce"), Expected()),
    "kill during snapshot": (kill_during("snapshot"), Expected()),
    "kill at an eviction": (kill_at_capture, Expected()),
    "kill at an open stream": (kill_at_stream, Expected()),
    "kill two at once": (kill_two, _TWO),
    "kill all": (kill_all, Expected(num_lost=3)),
    "kill, and its replacement": (kill_replacement, _TWO),
    "kill, and another in the recovery": (kill_in_recovery, _TWO),
    "kill, and another as all leave": (kill_in_leaving, _TWO),
    "kill, and one as all join": (kill_in_joining, _TWO),
    "kill, and freeze one as all join": (freeze_in_joining, Expected(num_lost=2, is_silent=True)),
    "kill, and freeze one in the recovery": (freeze_in_recovery, Expected(num_lost=2, is_silent=True)),
    "kill by a learner's call": (kill_at_call, Expected()),
    "freeze": (freeze, _SILENT),
    "freeze by a learner's call": (freeze_at_call, _SILENT),
    "sever": (sever, _SILENT),
    "freeze the heartbeat process": (freeze_heartbeat, _SILENT),
    "kill the heartbeat process": (kill_heartbeat, _SILENT),
    "SIGTERM": (terminate, Expected()),
    "pause, shorter than the timeout": (pause, Expected(num_lost=0)),
}


# Workers that come and go.

ElasticFault = Callable[[ElasticWorkers, Scene], Awaitable[None]]


async def join(elastic: ElasticWorkers, scene: Scene) -> None:
    """Let a worker join."""
    await _join(elastic, scene, 1)


async def join_two(elastic: ElasticWorkers, scene: Scene) -> None:
    """Let two workers join at once."""
    await _join(elastic, scene, 2)


async def kill_as_it_joins(elastic: ElasticWorkers, scene: Scene) -> None:
    """Let a worker join, and kill it after its handshake, or a little later."""
    _, (worker,) = await _come(elastic, scene, 1)
    await scene.moment(_JOIN_S)
    await _kill(elastic, scene, worker)


async def kill_as_it_takes_learners(elastic: ElasticWorkers, scene: Scene) -> None:
    """Let a worker join, and kill it as it restores a learner that moves there."""
    worker = elastic.join(scene.proxy)
    await joined(worker)  # before the round, in which the learners move
    await _killed(elastic, scene, *await scene.trapped("restore", worker.pid, "move"))


async def kill_joined(elastic: ElasticWorkers, scene: Scene) -> None:
    """Kill a worker that has joined."""
    worker = await _pick(elastic, scene)
    await scene.moment()
    await _kill(elastic, scene, worker)


async def kill_as_it_leaves(elastic: ElasticWorkers, scene: Scene) -> None:
    """Ask a worker that has joined to leave, and kill it as it captures a learner that moves away."""
    worker = await _pick(elastic, scene)
    await scene.moment()
    worker.signal(signal.SIGTERM)
    await _killed(elastic, scene, *await scene.trapped("capture", worker.pid, "move"))


async def drain_joined(elastic: ElasticWorkers, scene: Scene) -> None:
    """Ask a worker that has joined to leave."""
    worker = await _pick(elastic, scene)
    await scene.moment()
    at, under_way = time.monotonic(), scene.under_way("move")
    await drained(worker)
    label = await scene.event_of(WorkerLeft, at, elastic.joined)
    scene.note(label, WorkerLeft, at, under_way)
    elastic.joined.discard(label)


async def kill_serving(elastic: ElasticWorkers, scene: Scene) -> None:
    """Kill the process that serves for a worker that listens."""
    address, worker = scene.draw.choice(list(elastic.listening.items()))
    await scene.moment()
    while not (serving := serving_for(worker.pid)):
        await asyncio.sleep(_POLL_S)
    at = scene.note(address)
    os.kill(serving[0], signal.SIGKILL)
    await scene.event_of(WorkerJoined, at, [address])


async def kill_listener(elastic: ElasticWorkers, scene: Scene) -> None:
    """Kill a worker that listens, and start it again."""
    address, worker = scene.draw.choice(list(elastic.listening.items()))
    await scene.moment()
    at = scene.note(address)
    worker.signal(signal.SIGKILL)
    await asyncio.to_thread(worker.ended, HANG_S)
    await elastic.listen(address)
    await scene.event_of(WorkerJoined, at, [address])


async def drain_listener(elastic: ElasticWorkers, scene: Scene) -> None:
    """Ask a worker that listens to leave, and start it again."""
    address, worker = scene.draw.choice(list(elastic.listening.items()))
    await scene.moment()
    at = scene.note(address, WorkerLeft, under_way=scene.under_way("move"))
    await drained(worker)
    await elastic.listen(address)
    await scene.event_of(WorkerJoined, at, [address])


async def _come(elastic: ElasticWorkers, scene: Scene, count: int) -> tuple[float, list[Process]]:
    """Start workers that join at about a random moment of the round: when they were started, and they."""
    began = time.monotonic()
    workers = [elastic.join(scene.proxy) for _ in range(count)]
    await asyncio.sleep(max(elastic.start_s - scene.draw.uniform(0.0, scene.round_s), 0.0))
    scene.ready.set()
    for worker in workers:
        await joined(worker)
    elastic.start_s = time.monotonic() - began
    return began, workers


async def _join(elastic: ElasticWorkers, scene: Scene, count: int) -> None:
    began, _ = await _come(elastic, scene, count)
    under_way = scene.under_way("move")
    for _ in range(count):
        worker = await _new(elastic, scene, began)
        scene.note(worker, WorkerJoined, began, under_way)


async def _new(elastic: ElasticWorkers, scene: Scene, since: float) -> str:
    """Wait until a worker that was not there before has joined."""
    known = {*elastic.joined, *elastic.listening}

    def found() -> list[str]:
        events = [event for at, event in scene.log.entries if isinstance(event, WorkerJoined) and at >= since]
        return [event.worker for event in events if event.worker not in known]

    await scene.log.until(found)
    elastic.joined.add(found()[0])
    return found()[0]


async def _pick(elastic: ElasticWorkers, scene: Scene) -> Process:
    """A worker that has joined; if there is none, one joins before the round."""
    if not elastic.joining():
        began = time.monotonic()
        elastic.join(scene.proxy)
        await _new(elastic, scene, began)
    return scene.draw.choice(elastic.joining())


async def _kill(elastic: ElasticWorkers, scene: Scene, worker: Process) -> None:
    at, under_way = time.monotonic(), scene.under_way()
    worker.signal(signal.SIGKILL)
    await _killed(elastic, scene, at, under_way)


async def _killed(elastic: ElasticWorkers, scene: Scene, at: float, under_way: str) -> None:
    """Note that a worker that has joined, or was about to, was killed."""
    label = await scene.event_of(WorkerLost, at)
    scene.note(label, at=at, under_way=under_way)
    elastic.joined.discard(label)


ELASTIC: dict[str, tuple[ElasticFault, Expected]] = {
    "a worker joins": (join, Expected(num_lost=0)),
    "two workers join at once": (join_two, Expected(num_lost=0)),
    "a worker joins and is killed at once": (kill_as_it_joins, Expected()),
    "kill a worker as learners move to it": (kill_as_it_takes_learners, Expected()),
    "kill a worker as learners move away": (kill_as_it_leaves, Expected()),
    "kill a joined worker": (kill_joined, Expected()),
    "drain a joined worker": (drain_joined, Expected(num_lost=0)),
    "kill a listening worker's process": (kill_serving, Expected()),
    "kill a listener, and start it again": (kill_listener, Expected()),
    "drain a listener, and start it again": (drain_listener, Expected(num_lost=0)),
}
