"""How a contender talks with the benchmark: numbers come on stdin, JSON lines go to stdout; standard library only.

    PYTHON contenders/NAME.py WORKLOAD[,WORKLOAD ...] [--quick]

A contender prepares itself, warms up, and writes ``{"ready": true, "versions": {...}}``, or ``{"cannot": "why"}`` and
ends. Then, for each line on stdin, ``N`` or ``WORKLOAD N``, it does that work N times and writes ``{"seconds": [N
floats], "check": ..., "extra": {...}}``, or ``{"cannot": "why"}``. At the end of stdin it closes down and ends, and
leaves no process behind. A program with several workloads prepares all of them in one process where it can; it may
also be started once for each.

Each line of stdin starts from the same state: round 0 of FedAvg with the initial weights, whatever ran before. So
contenders that do the same work give the same check for the same N: a string that must be equal, or numbers that must
agree within the tolerance of the row. The check and what it needs are not timed.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO


@dataclass(frozen=True)
class Measured:
    """What N repetitions gave.

    Attributes:
        seconds: of each repetition.
        check: digest of the result, or numbers that tell it.
        extra: other numbers by name; the unit is the name's end (``_mb``, ``_s``).
    """

    seconds: list[float]
    check: str | list[float]
    extra: Mapping[str, float] = field(default_factory=dict)


class Cannot(Exception):
    """This contender cannot do that work; the message says why."""


Repeat = Callable[[int], Measured | Awaitable[Measured]]
"""Does a workload N times; a plain function or a coroutine function."""

Prepare = Callable[[tuple[str, ...], bool], AbstractAsyncContextManager[Mapping[str, Repeat | Cannot]]]
"""``prepare(workloads, quick)``: opens what they need, warms up, gives a function for each, and closes all at last.

A `Cannot` in place of a function is told when that workload is asked for; raised, it holds for all of them.
"""


def serve(prepare: Prepare, versions: Mapping[str, str]) -> None:
    """Be a contender until stdin ends: call this from ``if __name__ == "__main__"``.

    Args:
        prepare: opens the workloads that the command line names.
        versions: library -> version, for the report.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    arguments = [argument for argument in sys.argv[1:] if argument != "--quick"]
    if len(arguments) != 1:
        sys.exit(f"usage: {sys.argv[0]} WORKLOAD[,WORKLOAD ...] [--quick]")
    workloads = tuple(arguments[0].split(","))
    try:
        asyncio.run(_serve(prepare, workloads, "--quick" in sys.argv, dict(versions), answers))
    except Cannot as error:
        _answer(answers, {"cannot": str(error)})
    except Exception as error:
        traceback.print_exc()
        _answer(answers, {"cannot": f"{type(error).__name__}: {error}"})


async def _serve(
    prepare: Prepare, workloads: tuple[str, ...], quick: bool, versions: dict[str, str], answers: TextIO
) -> None:
    async with prepare(workloads, quick) as repeats:
        _answer(answers, {"ready": True, "versions": versions})
        # On a thread, since the loop may have heartbeats to keep while it waits.
        while line := await asyncio.to_thread(sys.stdin.readline):
            *names, count = line.split()
            repeat = repeats[names[0] if names else workloads[0]]
            try:
                if isinstance(repeat, Cannot):
                    raise repeat
                measured = repeat(int(count))
                if inspect.isawaitable(measured):
                    measured = await measured
            except Exception as error:
                if not isinstance(error, Cannot):
                    traceback.print_exc()
                why = str(error) if isinstance(error, Cannot) else f"{type(error).__name__}: {error}"
                _answer(answers, {"cannot": why})
            else:
                _answer(answers, asdict(measured))


def _answer(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


async def seconds_of(call: Callable[[], Awaitable[object]], repetitions: int) -> list[float]:
    """Seconds of each of so many awaited calls, one after another."""
    seconds = []
    for _ in range(repetitions):
        began = time.perf_counter()
        await call()
        seconds.append(time.perf_counter() - began)
    return seconds


def seconds_of_plain(call: Callable[[], object], repetitions: int) -> list[float]:
    """The same for a plain function."""
    seconds = []
    for _ in range(repetitions):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return seconds
