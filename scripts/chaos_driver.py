"""A driver as a process of its own, which runs and tells what happens."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from typing import Any

from chaos_process import tell
from chaos_run import ChaosTrainer, federate, open_proxy
from chaos_scene import Log

import torchfedrpc as tfr
from torchfedrpc.events import (
    CheckpointSaved,
    Event,
    RoundEnded,
    RoundStarted,
    WorkerJoined,
    WorkerLost,
    WorldFormed,
)

ROUND_DIGESTS = "digests of a round"
ALL_DIGESTS = "digests of the run"
_TOLD = (RoundStarted, RoundEnded, CheckpointSaved, WorkerLost, WorkerJoined, WorldFormed)


@dataclass(frozen=True)
class Job:
    """What a driver is to run.

    Attributes:
        runtime: where the learners are.
        seed: draws what they draw.
        num_rounds: how many rounds.
        checkpoints: the folder where the run is saved, and from which it goes on.
        struck_round: the round in which a worker will be lost; it ends no sooner.
        rejoins: whether, and until a worker has come in its place.
    """

    runtime: dict[str, Any]
    seed: int
    num_rounds: int
    checkpoints: str | None = None
    struck_round: int | None = None
    rejoins: bool = False

    def script(self) -> list[str]:
        """This script and its arguments."""
        return [__file__, json.dumps(asdict(self))]


async def main() -> None:
    """Run; what is told is named by ``what``, and has its time as ``at`` (monotonic, in seconds)."""
    job = Job(**json.loads(sys.argv[1]))
    log = Log()

    @contextlib.asynccontextmanager
    async def around(trainer: ChaosTrainer, round_num: int) -> AsyncIterator[None]:
        began = time.monotonic()
        yield
        _tell(ROUND_DIGESTS, round_num=round_num, digests=trainer.digests[-1])
        if round_num == job.struck_round:
            await log.until(lambda: log.times(WorkerLost, began))
            then = WorkerJoined if job.rejoins else WorldFormed
            await log.until(lambda: log.times(then, max(log.times(WorkerLost, began))))

    checkpoints = tfr.Checkpoints(job.checkpoints, resume="auto") if job.checkpoints is not None else None
    async with open_proxy(job.runtime, job.seed) as proxy:
        proxy.subscribe(log)
        proxy.subscribe(_tell_event)
        digests = await federate(proxy, job.num_rounds, around, checkpoints)
    _tell(ALL_DIGESTS, digests=digests)


def _tell_event(event: Event) -> None:
    if isinstance(event, _TOLD):
        _tell(type(event).__name__, **asdict(event))


def _tell(what: str, **values: Any) -> None:
    tell(what=what, at=time.monotonic(), **values)


if __name__ == "__main__":
    tfr.run(main)
