"""Where the time of a call goes: moments that are noted in driver and worker, and what lies between them.

The clock is the machine's, so moments of several processes can be compared.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed.rpc as rpc

Stamp = tuple[str, float]  # a moment's name, and when

STAGES = {
    "sends": "arguments packed, bookkeeping",
    "sent": "rpc_async on the calling thread",
    "entered": "wire, to the worker's entry",
    "on_thread": "hop to the method's thread",
    "method_begins": "random streams, arguments opened",
    "method_ends": "the method",
    "answers": "result packed, bookkeeping",
    "arrived": "wire, to the driver's RPC thread",
    "returned": "outcome opened, hop to the loop",
}
"""The moments of a call in order, after its beginning, each with the stage that it ends."""

MEAN = ", mean"

stamps: list[Stamp] = []  # of this process


def note(name: str) -> None:
    """Note that this moment has come."""
    stamps.append((name, time.perf_counter()))


def noting_first(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that notes a moment as it begins."""

    def noting(*args: Any, **kwargs: Any) -> Any:
        note(name)
        return function(*args, **kwargs)

    return noting


def note_at(owner: object, attribute: str, name: str) -> None:
    """Let a class's method note a moment as it begins; where it has no such method, the next stage has that time."""
    if (function := getattr(owner, attribute, None)) is not None:
        setattr(owner, attribute, noting_first(name, function))


def note_rpc() -> None:
    """Let this process's ``rpc_async`` note when it begins and ends, and when the answer is there."""
    rpc_async = rpc.rpc_async

    def noting(*args: Any, **kwargs: Any) -> Any:
        note("sends")
        future = rpc_async(*args, **kwargs)
        note("sent")
        future.add_done_callback(lambda _: note("arrived"))
        return future

    rpc.rpc_async = noting


def split(calls: Iterable[tuple[float, float]], moments: Iterable[Stamp]) -> dict[str, float]:
    """Medians and means of the stages of calls that were awaited one after another, in microseconds.

    Args:
        calls: when each began, and when its result was there.
        moments: of all processes.

    Returns:
        Stage -> its median, and stage + `MEAN` -> its mean; ``all`` stages together come last.
    """
    in_order = sorted(moments, key=lambda stamp: stamp[1])
    of_stage: dict[str, list[float]] = {name: [] for name in STAGES}
    whole, place = [], 0
    for began, ended in calls:
        last: dict[str, float] = {}
        while place < len(in_order) and in_order[place][1] <= ended:
            name, when = in_order[place]
            if when >= began:
                last[name] = when
            place += 1
        last["returned"] = ended
        whole.append(ended - began)
        before = began
        for name in STAGES:
            if name in last:
                of_stage[name].append(last[name] - before)
                before = last[name]
    stages = {**{STAGES[name]: each for name, each in of_stage.items() if each}, "all": whole}
    medians = {stage: 1e6 * statistics.median(each) for stage, each in stages.items()}
    return {**medians, **{stage + MEAN: 1e6 * statistics.fmean(each) for stage, each in stages.items()}}
