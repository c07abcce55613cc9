"""The faults of chaos: what is done to the workers of a round, and when."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable

from chaos_run import STREAM_ITEMS, STREAM_METHOD
from chaos_scene import Scene

from torchfedrpc.events import ProgressReported

Fault = Callable[[Scene], Awaitable[None]]

_START_S = 2.0  # about what a replacement takes to start; one is struck at some moment of it
_JOIN_S = 0.15  # about what joining a world takes


async def kill(scene: Scene) -> None:
    """A worker is killed."""
    await scene.moment()
    await scene.strike(*scene.pick(), signal.SIGKILL)


async def kill_in_reformation(scene: Scene) -> None:
    """A worker is killed, and another while the world re-forms."""
    first, second = scene.pick(2)
    await scene.moment()
    await scene.strike(first, signal.SIGKILL)
    await scene.lost(first)
    await scene.moment(_START_S)
    await scene.strike(second, signal.SIGKILL)


async def kill_two(scene: Scene) -> None:
    """Two workers are killed at once."""
    await scene.moment()
    for label in scene.pick(2):
        await scene.strike(label, signal.SIGKILL)


async def freeze(scene: Scene) -> None:
    """A worker is stopped."""
    await scene.moment()
    await scene.strike(*scene.pick(), signal.SIGSTOP)


async def sever(scene: Scene) -> None:
    """A worker goes on, and nothing is heard of it any more."""
    await scene.moment()
    await scene.strike(*scene.pick(), signal.SIGUSR1, at_sidecar=True)


async def kill_stream(scene: Scene) -> None:
    """The worker that holds the open stream is killed in the middle of it."""
    client_id, num_reports = scene.trainer.streaming(scene.round_num), scene.draw.randint(1, STREAM_ITEMS)
    began = len(scene.log.entries)
    scene.ready.set()
    await scene.log.until(
        lambda: (
            sum(
                isinstance(event, ProgressReported) and event.client_id == client_id and event.method == STREAM_METHOD
                for _, event in scene.log.entries[began:]
            )
            >= num_reports
        )
    )
    await scene.strike(scene.worker_of(client_id), signal.SIGKILL)


async def kill_replacement(scene: Scene) -> None:
    """A worker is killed, and then the one that starts in its place."""
    (label,) = scene.pick()
    await scene.moment()
    await scene.strike(label, signal.SIGKILL)
    await scene.lost(label)
    await scene.moment(_START_S)
    await scene.strike(label, signal.SIGKILL)


async def kill_at_call(scene: Scene) -> None:
    """A call kills its worker."""
    await scene.struck_by_itself(*scene.pick(), "kill")


async def freeze_at_call(scene: Scene) -> None:
    """A call stops its worker."""
    await scene.struck_by_itself(*scene.pick(), "freeze")


async def terminate(scene: Scene) -> None:
    """A worker gets SIGTERM."""
    await scene.moment()
    await scene.strike(*scene.pick(), signal.SIGTERM)


async def freeze_sidecar(scene: Scene) -> None:
    """The process that beats for a worker is stopped."""
    await scene.moment()
    await scene.strike(*scene.pick(), signal.SIGSTOP, at_sidecar=True)


async def kill_sidecar(scene: Scene) -> None:
    """The process that beats for a worker is killed."""
    await scene.moment()
    await scene.strike(*scene.pick(), signal.SIGKILL, at_sidecar=True)


async def freeze_in_reformation(scene: Scene) -> None:
    """A worker is killed, and another stopped while the world re-forms."""
    first, second = scene.pick(2)
    await scene.moment()
    await scene.strike(first, signal.SIGKILL)
    await scene.lost(first)
    await scene.moment(_START_S)
    await scene.strike(second, signal.SIGSTOP)


async def kill_in_joining(scene: Scene) -> None:
    """A worker is killed, and then another or its replacement, as all join the next world."""
    await _strike_in_joining(scene, signal.SIGKILL)


async def freeze_in_joining(scene: Scene) -> None:
    """A worker is killed, and then another or its replacement stopped, as all join the next world."""
    await _strike_in_joining(scene, signal.SIGSTOP)


async def _strike_in_joining(scene: Scene, number: signal.Signals) -> None:
    first, second = scene.pick(2)
    await scene.moment()
    await scene.strike(first, signal.SIGKILL)
    await scene.lost(first)
    label = scene.draw.choice([first, second])
    await scene.joining(label)
    await scene.moment(_JOIN_S)
    await scene.strike(label, number)


async def kill_all(scene: Scene) -> None:
    """All workers are killed at once."""
    await scene.moment()
    for label in scene.labels:
        await scene.strike(label, signal.SIGKILL)


async def pause(scene: Scene) -> None:
    """A worker is stopped for less than the heartbeat's timeout: it need not be lost."""
    (label,) = scene.pick()
    await scene.moment()
    await scene.strike(label, signal.SIGSTOP, is_fatal=False)
    await asyncio.sleep(0.4 * scene.heartbeat_timeout_s)
    await scene.strike(label, signal.SIGCONT, is_fatal=False)


# The first are those of a quick run.
FAULTS: dict[str, Fault] = {
    "kill": kill,
    "kill, and another while re-forming": kill_in_reformation,
    "kill two at once": kill_two,
    "freeze": freeze,
    "sever": sever,
    "kill at an open stream": kill_stream,
    "kill, and its replacement": kill_replacement,
    "kill by a learner's call": kill_at_call,
    "freeze by a learner's call": freeze_at_call,
    "SIGTERM": terminate,
    "freeze the sidecar": freeze_sidecar,
    "kill the sidecar": kill_sidecar,
    "kill, and freeze another re-forming": freeze_in_reformation,
    "kill, and one as all of them join": kill_in_joining,
    "kill, and freeze one as all join": freeze_in_joining,
    "kill all": kill_all,
    "pause, shorter than the timeout": pause,
}
