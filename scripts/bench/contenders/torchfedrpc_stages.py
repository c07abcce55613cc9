"""The stages of an awaited no-op call of torchfedrpc; the names of a few inner functions are known here."""

from __future__ import annotations

import platform
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import stamps
import torch
from protocol import Cannot, Measured, Repeat, serve

import torchfedrpc as tfr
from torchfedrpc.host.learner_host import LearnerHost
from torchfedrpc.host.runner import Runner


class StageLearner:
    """Does nothing, in a worker that notes what happens."""

    def __init__(self, client_id: str) -> None:
        stamps.note_at(LearnerHost, "submit", "entered")
        stamps.note_at(Runner, "_begin", "on_thread")
        stamps.note_at(torch.futures.Future, "set_result", "answers")

    def no_op(self) -> None:
        """Nothing, but noted."""
        stamps.note("method_begins")
        stamps.note("method_ends")

    def noted(self) -> list[tuple[str, float]]:
        """What this worker has noted since it was last asked."""
        noted, stamps.stamps[:] = list(stamps.stamps), []
        return noted


@asynccontextmanager
async def prepare(workloads: tuple[str, ...], quick: bool) -> AsyncIterator[Mapping[str, Repeat | Cannot]]:
    """``stages``."""
    torch.set_num_threads(1)
    runtime = {"execution_mode": "pseudo", "num_clients": 1, "num_processes": 1}
    async with tfr.LearnerProxy(StageLearner, runtime=runtime) as proxy:
        stamps.note_rpc()
        learner: Any = proxy.client("client_1")

        async def repeat(count: int) -> Measured:
            await learner.noted()
            stamps.stamps.clear()
            calls = []
            for _ in range(count):
                began = time.perf_counter()
                await learner.no_op()
                calls.append((began, time.perf_counter()))
            stages = stamps.split(calls, [*stamps.stamps, *await learner.noted()])
            return Measured([ended - began for began, ended in calls], "None", stages)

        await repeat(20)
        yield {"stages": repeat}


if __name__ == "__main__":
    serve(
        prepare,
        {"torchfedrpc": tfr.__version__, "torch": torch.__version__, "python": platform.python_version()},
    )
