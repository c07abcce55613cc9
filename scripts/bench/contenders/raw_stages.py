"""The stages of an awaited no-op call by torch.distributed.rpc alone."""

from __future__ import annotations

import platform
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import raw_rpc
import stamps
import torch
from protocol import Cannot, Measured, Repeat, serve


def no_op() -> None:
    """Nothing, but noted."""
    stamps.note("entered")
    stamps.note("method_ends")


def noted() -> list[stamps.Stamp]:
    """What the worker has noted since it was last asked."""
    of_worker, stamps.stamps[:] = list(stamps.stamps), []
    return of_worker


@asynccontextmanager
async def prepare(workloads: tuple[str, ...], quick: bool) -> AsyncIterator[Mapping[str, Repeat | Cannot]]:
    """``stages``."""
    with raw_rpc.world(1):
        stamps.note_rpc()

        async def repeat(count: int) -> Measured:
            await raw_rpc.bridged("raw1", noted)
            stamps.stamps.clear()
            calls = []
            for _ in range(count):
                began = time.perf_counter()
                await raw_rpc.bridged("raw1", no_op)
                calls.append((began, time.perf_counter()))
            stages = stamps.split(calls, [*stamps.stamps, *await raw_rpc.bridged("raw1", noted)])
            return Measured([ended - began for began, ended in calls], "None", stages)

        await repeat(20)
        yield {"stages": repeat}


if __name__ == "__main__":
    serve(prepare, {"torch": torch.__version__, "python": platform.python_version()})
