"""The faults of chaos: two tables, of workers that the driver starts and of workers that come and go."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Literal

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


# Workers that the driver starts: a moment, and a strike.

Moment = Callable[[Scene], Awaitable[None]]
Strike = Callable[[Scene, str], Awaitable[None]]
LaterMoment = Callable[[Scene, str], Awaitable[None]]


async def at_any_moment(scene: Scene) -> None:
    """Wait for a random moment of the round."""
    await scene.moment()


def during(activity: str) -> Moment:
    """A random moment of an activity of the round."""
    return lambda scene: scene.during(activity)


async def in_recovery(scene: Scene, worker: str) -> None:
    """Wait for a random moment of the time that a replacement takes to start."""
    await scene.moment(_START_S)


def as_all(step: str) -> LaterMoment:
    """The moment when all ``leave`` the world, or ``join`` the next."""
    return lambda scene, worker: scene.world_is_formed_with(worker, f"all {step}")


async def kill(scene: Scene, worker: str) -> None:
    """Kill a worker."""
    await scene.kill(worker)


async def freeze(scene: Scene, worker: str) -> None:
    """Stop a worker."""
    await scene.signal(worker, signal.SIGSTOP)


async def terminate(scene: Scene, worker: str) -> None:
    """Send SIGTERM to a worker."""
    await scene.signal(worker, signal.SIGTERM)


async def pause(scene: Scene, worker: str) -> None:
    """Stop a worker for less than the heartbeat's timeout."""
    await scene.signal(worker, signal.SIGSTOP, is_fatal=False)
    await asyncio.sleep(0.4 * scene.heartbeat_timeout_s)
    await scene.signal(worker, signal.SIGCONT, is_fatal=False)


def heartbeat_process(strike: Callable[[int], object]) -> Strike:
    """A strike at the process that sends a worker's heartbeats."""
    return lambda scene, worker: scene.strike_heartbeat(worker, strike)


def struck(strike: Strike, moment: Moment = at_any_moment, count: int = 1) -> Fault:
    """Strike as many workers."""

    async def fault(scene: Scene) -> None:
        await moment(scene)
        for worker in await scene.pick(count):
            await strike(scene, worker)

    return fault


def killed_and(strike: Strike, moment: LaterMoment, among: Sequence[int]) -> Fault:
    """Kill a worker, and once its loss is known, strike its replacement (0) or another worker (1)."""

    async def fault(scene: Scene) -> None:
        workers = await scene.pick(2)
        await scene.moment()
        await scene.kill(workers[0])
        await scene.lost(workers[0])
        worker = workers[scene.draw.choice(among)]
        await moment(scene, worker)
        await strike(scene, worker)

    return fault


def struck_by_call(kind: Literal["kill", "freeze"]) -> Fault:
    """Let a call strike its worker."""

    async def fault(scene: Scene) -> None:
        (worker,) = await scene.pick()
        await scene.struck_by_call(worker, kind)

    return fault


async def kill_at_capture(scene: Scene) -> None:
    """Kill a worker as it captures a learner's state, for an eviction or for a snapshot."""
    (worker,) = await scene.pick()
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


_SILENT = Expected(is_silent=True)
_TWO = Expected(num_lost=2)
_TWO_SILENT = Expected(num_lost=2, is_silent=True)

WORKERS: dict[str, tuple[Fault, Expected]] = {
    "kill": (struck(kill), Expected()),
    "kill during train": (struck(kill, during("train")), Expected()),
    "kill during share": (struck(kill, during("share")), Expected()),
    "kill during reduce": (struck(kill, during("reduce")), Expected()),
    "kill during snapshot": (struck(kill, during("snapshot")), Expected()),
    "kill at an eviction": (kill_at_capture, Expected()),
    "kill at an open stream": (kill_at_stream, Expected()),
    "kill two at once": (struck(kill, count=2), _TWO),
    "kill all": (struck(kill, count=3), Expected(num_lost=3)),
    "kill, and its replacement": (killed_and(kill, in_recovery, [0]), _TWO),
    "kill, and another in the recovery": (killed_and(kill, in_recovery, [1]), _TWO),
    "kill, and another as all leave": (killed_and(kill, as_all("leave"), [1]), _TWO),
    "kill, and one as all join": (killed_and(kill, as_all("join"), [0, 1]), _TWO),
    "kill, and freeze one as all join": (killed_and(freeze, as_all("join"), [0, 1]), _TWO_SILENT),
    "kill, and freeze one in the recovery": (killed_and(freeze, in_recovery, [1]), _TWO_SILENT),
    "kill by a learner's call": (struck_by_call("kill"), Expected()),
    "freeze": (struck(freeze), _SILENT),
    "freeze by a learner's call": (struck_by_call("freeze"), _SILENT),
    "sever": (struck(heartbeat_process(internals.silence)), _SILENT),
    "freeze the heartbeat process": (struck(heartbeat_process(lambda pid: os.kill(pid, signal.SIGSTOP))), _SILENT),
    "kill the heartbeat process": (struck(heartbeat_process(lambda pid: os.kill(pid, signal.SIGKILL))), _SILENT),
    "SIGTERM": (struck(terminate), Expected()),
    "pause, shorter than the timeout": (struck(pause), Expected(num_lost=0)),
}


# Workers that come and go.

ElasticFault = Callable[[ElasticWorkers, Scene], Awaitable[None]]


def join(count: int) -> ElasticFault:
    """Let workers join at once."""

    async def fault(elastic: ElasticWorkers, scene: Scene) -> None:
        began, _ = await _come(elastic, scene, count)
        under_way = scene.under_way("move")
        for _ in range(count):
            worker = await _new(elastic, scene, began)
            scene.note(worker, WorkerJoined, began, under_way)

    return fault


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
    """Ask a worker that has joined to leave, and kill it as it captures a learner that moves away.

    Learners that were not called since their last snapshots move without another one. If there are only such, the
    worker is killed once all have moved, before it is released.
    """
    worker = await _pick(elastic, scene)
    await scene.moment()
    with internals.after_moves(scene.proxy, partial(scene.spring, "capture", worker.pid)):
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


def restart_listener(number: signal.Signals) -> ElasticFault:
    """Kill a worker that listens, or ask it to leave by SIGTERM, and start it again."""

    async def fault(elastic: ElasticWorkers, scene: Scene) -> None:
        address, worker = scene.draw.choice(list(elastic.listening.items()))
        await scene.moment()
        if number == signal.SIGTERM:
            at = scene.note(address, WorkerLeft, under_way=scene.under_way("move"))
            await drained(worker)
        else:
            at = scene.note(address)
            worker.signal(number)
            await asyncio.to_thread(worker.ended, HANG_S)
        await elastic.listen(address)
        await scene.event_of(WorkerJoined, at, [address])

    return fault


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
    "a worker joins": (join(1), Expected(num_lost=0)),
    "two workers join at once": (join(2), Expected(num_lost=0)),
    "a worker joins and is killed at once": (kill_as_it_joins, Expected()),
    "kill a worker as learners move to it": (kill_as_it_takes_learners, Expected()),
    "kill a worker as learners move away": (kill_as_it_leaves, Expected()),
    "kill a joined worker": (kill_joined, Expected()),
    "drain a joined worker": (drain_joined, Expected(num_lost=0)),
    "kill a listening worker's process": (kill_serving, Expected()),
    "kill a listener, and start it again": (restart_listener(signal.SIGKILL), Expected()),
    "drain a listener, and start it again": (restart_listener(signal.SIGTERM), Expected(num_lost=0)),
}
