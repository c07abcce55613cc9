"""The protocol between the benchmark and a contender: counts on stdin, JSON lines on stdout; standard library only.

    PYTHON contenders/NAME.py WORKLOAD[,WORKLOAD ...]

A contender prepares itself and writes ``{"versions": {...}}``. For each line ``WORKLOAD N`` on stdin it does that
work N times and writes ``{"seconds": [N floats], "check": ..., "extra": {...}}``. In place of either it may write
``{"cannot": "why"}`` or ``{"failed": "error"}``. At the end of stdin it closes down and leaves no process behind.

Each line of stdin starts from the same state: round 0 of FedAvg with the initial weights, whatever ran before. So
contenders that do the same work give the same check for the same N: a string that must be equal, or numbers that must
agree within the tolerance of the row. The check is not timed.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any, TextIO

UNEVENNESS = "mean_by_median"
"""The quantity that says how much the mean of the seconds is more than their median."""


@dataclass(frozen=True)
class Measured:
    """The results of N repetitions.

    Attributes:
        seconds: Of each repetition.
        check: A digest of the result, or numbers that describe it.
        extra: Other numbers by name; the unit is the name's end (``_mb``, ``_s``).
    """

    seconds: list[float]
    check: str | list[float]
    extra: Mapping[str, float] = field(default_factory=dict)

    def median(self, quantity: str) -> float:
        """The median of the seconds, or another number by its name."""
        if quantity == UNEVENNESS:
            return statistics.fmean(self.seconds) / statistics.median(self.seconds)
        return statistics.median(self.seconds) if quantity == "seconds" else self.extra[quantity]

    def mean(self, quantity: str) -> float:
        """The mean of the seconds, or another number by its name."""
        return statistics.fmean(self.seconds) if quantity == "seconds" else self.median(quantity)


class Cannot(Exception):
    """This contender cannot do that work; the message says why."""


Repeat = Callable[[int], Measured | Awaitable[Measured]]
"""Does a workload N times; a plain function or a coroutine function."""

Prepare = Callable[[tuple[str, ...]], AbstractAsyncContextManager[Mapping[str, Repeat | Cannot]]]
"""``prepare(workloads)``: opens, yields a function for each workload that it has, and closes.

A `Cannot` in place of a function is the answer to that workload; raised, it is the answer to all of them.
"""


def serve(prepare: Prepare, *libraries: str) -> None:
    """Be a contender until stdin ends: call this from ``if __name__ == "__main__"``.

    Args:
        prepare: Opens the workloads that the command line names.
        libraries: The packages whose versions the report names.
    """
    versions = {library: version(library) for library in libraries} | {"python": platform.python_version()}
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print no answers
    try:
        asyncio.run(_serve(prepare, tuple(sys.argv[1].split(",")), versions, answers))
    except Exception as error:
        _answer(answers, _refusal(error))


async def _serve(prepare: Prepare, workloads: tuple[str, ...], versions: dict[str, str], answers: TextIO) -> None:
    async with prepare(workloads) as repeats:
        _answer(answers, {"versions": versions})
        # On a thread, since the loop may have heartbeats to keep while it waits.
        while line := await asyncio.to_thread(sys.stdin.readline):
            name, count = line.split()
            repeat = repeats.get(name, Cannot(f"no {name} here"))
            try:
                if isinstance(repeat, Cannot):
                    raise repeat
                answer = asdict(await repeated(repeat, int(count)))
            except Exception as error:
                answer = _refusal(error)
            _answer(answers, answer)


def _refusal(error: Exception) -> dict[str, Any]:
    if isinstance(error, Cannot):
        return {"cannot": str(error)}
    traceback.print_exc()
    return {"failed": f"{type(error).__name__}: {error}"}


def _answer(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


async def repeated(repeat: Repeat, count: int) -> Measured:
    """Do a workload so many times."""
    measured = repeat(count)
    return await measured if inspect.isawaitable(measured) else measured


async def timed(call: Callable[[], Any], repetitions: int) -> tuple[list[float], Any]:
    """Make a call so many times, and await its result if it can be; returns the seconds of each, and the last."""
    seconds: list[float] = []
    for _ in range(repetitions):
        began = time.perf_counter()
        made = call()
        result = await made if inspect.isawaitable(made) else made
        seconds.append(time.perf_counter() - began)
    return seconds, result


def calling(call: Callable[[], object], check: Callable[[Any], object]) -> Repeat:
    """The workload that makes a call, and checks its last result; both may be coroutine functions."""

    async def repeat(count: int) -> Measured:
        seconds, result = await timed(call, count)
        checked = check(result)
        return Measured(seconds, await checked if inspect.isawaitable(checked) else checked)  # type: ignore[arg-type]

    return repeat
