"""The faults of a run whose workers come and go."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from chaos_faults import Fault
from chaos_leftovers import nothing_left
from chaos_process import Command, children_of
from chaos_report import HANG_S, Report
from chaos_rounds import Disturbance, pseudo
from chaos_run import Digests
from chaos_scene import Scene
from chaos_workers import Crew, drained, label_of

from torchfedrpc.events import WorkerJoined, WorkerLeft

_POLL_S = 0.005
_HEARTBEAT_TIMEOUT_S = 5.0  # nobody is frozen here, and a machine's stall need not count
_JOIN_S = 1.0  # about what it takes a worker that has come to be in the world and have its share of the learners
_LISTENED_TO = [f"client_{number}" for number in range(1, 7)]


async def join(crew: Crew, scene: Scene) -> None:
    """A worker joins."""
    await _join(crew, scene, 1)


async def join_two(crew: Crew, scene: Scene) -> None:
    """Two workers join at once."""
    await _join(crew, scene, 2)


async def kill_as_it_joins(crew: Crew, scene: Scene) -> None:
    """A worker joins, and is killed as soon as the driver knows it, or a little later."""
    _, came = await _come(crew, scene, 1)
    ((label, worker),) = came.items()
    await scene.moment(_JOIN_S)
    scene.note(label)
    worker.signal(signal.SIGKILL)


async def drain_joined(crew: Crew, scene: Scene) -> None:
    """A worker that has joined is asked to leave."""
    label, worker = await _somebody(crew, scene)
    await scene.moment()
    scene.note(label, WorkerLeft)
    await drained(worker)
    del crew.joined[label]


async def kill_joined(crew: Crew, scene: Scene) -> None:
    """A worker that has joined is killed."""
    label, worker = await _somebody(crew, scene)
    await scene.moment()
    scene.note(label)
    worker.signal(signal.SIGKILL)
    del crew.joined[label]


async def kill_serving(crew: Crew, scene: Scene) -> None:
    """The process that serves for a worker that listens is killed."""
    address, worker = scene.draw.choice(list(crew.listening.items()))
    await scene.moment()
    while not (serving := children_of(worker.pid)):
        await asyncio.sleep(_POLL_S)
    at = scene.note(address)
    os.kill(serving[0], signal.SIGKILL)
    await _there_again(scene, address, at)


async def kill_listener(crew: Crew, scene: Scene) -> None:
    """A worker that listens is killed, and started again."""
    address, worker = scene.draw.choice(list(crew.listening.items()))
    await scene.moment()
    at = scene.note(address)
    worker.signal(signal.SIGKILL)
    await worker.ended(HANG_S)
    await crew.listen(address)
    await _there_again(scene, address, at)


async def drain_listener(crew: Crew, scene: Scene) -> None:
    """A worker that listens is asked to leave, and started again."""
    address, worker = scene.draw.choice(list(crew.listening.items()))
    await scene.moment()
    at = scene.note(address, WorkerLeft)
    await drained(worker)
    await crew.listen(address)
    await _there_again(scene, address, at)


# The first are those of a quick run.
ELASTIC: dict[str, Callable[[Crew, Scene], Awaitable[None]]] = {
    "a worker joins": join,
    "kill a listening worker's process": kill_serving,
    "drain a joined worker": drain_joined,
    "drain a listener, and start it again": drain_listener,
    "kill a joined worker": kill_joined,
    "kill a listener, and start it again": kill_listener,
    "a worker joins and is killed at once": kill_as_it_joins,
    "two workers join at once": join_two,
}


async def _come(crew: Crew, scene: Scene, count: int) -> tuple[float, dict[str, Command]]:
    """Start workers that join at a random moment of the round, about: when they were started, and each by name."""
    began, proxy = time.monotonic(), scene.trainer.learner_proxy
    workers = [crew.join(proxy) for _ in range(count)]
    await asyncio.sleep(max(crew.start_s - scene.draw.uniform(0.0, scene.round_s), 0.0))
    scene.ready.set()
    came = {await label_of(worker, proxy): worker for worker in workers}
    crew.start_s = time.monotonic() - began
    return began, came


async def _join(crew: Crew, scene: Scene, count: int) -> None:
    began, came = await _come(crew, scene, count)
    for label in came:
        scene.note(label, WorkerJoined, began)
        await _there_again(scene, label, began)
    crew.joined |= came


async def _somebody(crew: Crew, scene: Scene) -> tuple[str, Command]:
    """A worker that has joined; where there is none, one joins before the round."""
    if not crew.joined:
        began, proxy = time.monotonic(), scene.trainer.learner_proxy
        worker = crew.join(proxy)
        label = await label_of(worker, proxy)
        await _there_again(scene, label, began)
        crew.joined[label] = worker
    return scene.draw.choice(list(crew.joined.items()))


async def _there_again(scene: Scene, label: str, since: float) -> None:
    await scene.log.until(lambda: scene.log.times(WorkerJoined, since, label))


async def elastic(
    faults: Sequence[str],
    num_listening: int,
    report: Report,
    expected: Sequence[Digests],
    draw: random.Random,
    round_s: float,
) -> int:
    """A run with a fault in each round.

    Returns:
        How many of them have struck.
    """
    async with nothing_left(report):
        try:
            async with Crew(num_listening, _LISTENED_TO) as crew:
                runtime = {**pseudo(1, _HEARTBEAT_TIMEOUT_S), **crew.runtime}
                named: list[tuple[str, Fault]] = [(name, partial(ELASTIC[name], crew)) for name in faults]
                disturbance = Disturbance(named, report, expected, draw, round_s, runtime, crew.dump)
                await disturbance.run(crew.dismissed)
                return disturbance.num_done
        except Exception as error:  # none that a run would report
            report.failed("the workers that listen", error)
            return len(faults)
