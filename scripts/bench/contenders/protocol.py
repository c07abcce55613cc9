"""How a contender talks with the benchmark: numbers come on stdin, JSON lines go to stdout; standard library only.

    PYTHON contenders/NAME.py WORKLOAD[,WORKLOAD ...] [--quick] [--cold]

A contender prepares itself, warms up (unless ``--cold``: it will not be timed), and writes ``{"ready": true,
"versions": {...}}``, or ``{"cannot": "why"}`` and ends. Then, for each line on stdin, ``N`` or ``WORKLOAD N``, it
does that work N times and writes ``{"seconds": [N floats], "check": ..., "extra": {...}}``, or ``{"cannot":
"why"}``. At the end of stdin it closes down and ends, and leaves no process behind. A program with several
workloads prepares all of them in one process where it can; it may also be started once for each.

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
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any, TextIO, TypeVar

T = TypeVar("T")


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
"""``prepare(workloads, quick)``: opens and warms up, yields a function for each workload that it has, and closes.

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
    os.dup2(2, 1)  # what libraries print is no answer
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    if len(arguments) != 1:
        sys.exit(f"usage: {sys.argv[0]} WORKLOAD[,WORKLOAD ...] [--quick] [--cold]")
    workloads = tuple(arguments[0].split(","))
    try:
        asyncio.run(_serve(prepare, workloads, "--quick" in sys.argv, versions, answers))
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
            name = names[0] if names else workloads[0]
            repeat = repeats.get(name, Cannot(f"no {name} here"))
            try:
                if isinstance(repeat, Cannot):
                    raise repeat
                measured = await repeated(repeat, int(count))
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


async def repeated(repeat: Repeat, count: int) -> Measured:
    """Do a workload so many times."""
    measured = repeat(count)
    return await measured if inspect.isawaitable(measured) else measured


async def warm_up(repeat: Repeat, count: int) -> None:
    """Do a workload so many times before it is timed."""
    if "--cold" not in sys.argv:
        await repeated(repeat, count)


async def timed(call: Callable[[], Awaitable[T]], repetitions: int) -> tuple[list[float], T]:
    """Await a call so many times, at least once; returns the seconds of each, and the last result."""
    seconds: list[float] = []
    while True:
        began = time.perf_counter()
        result = await call()
        seconds.append(time.perf_counter() - began)
        if len(seconds) >= repetitions:
            return seconds, result


def timed_plain(call: Callable[[], T], repetitions: int) -> tuple[list[float], T]:
    """The same for a plain function."""
    seconds: list[float] = []
    while True:
        began = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - began)
        if len(seconds) >= repetitions:
            return seconds, result
