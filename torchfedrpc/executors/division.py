"""Division of calls among workers by expected durations, so that all workers finish together."""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Hashable, Iterator, Mapping, MutableMapping, Sequence
from typing import TypeVar

from torchfedrpc.executors.durations import UNUSUAL

W = TypeVar("W", bound=Hashable)
"""A worker."""


def in_ranges(
    workers: Sequence[W], seconds: Mapping[int, float], remaining: MutableMapping[W, float]
) -> Iterator[tuple[W, Sequence[int]]]:
    """Divide calls so that each worker has neighbours, whose results it merges to few partial results.

    Calls that take much longer than usual would make ranges uneven. They go one by one to the worker that is free
    first.

    Args:
        workers: The workers; their order is that of the ranges.
        seconds: Place of each call -> its expected duration.
        remaining: Expected seconds until each worker is idle; the calls are added.

    Yields:
        A worker and places of its calls. A worker may come several times.
    """
    if len(seconds) < len(workers):
        workers = sorted(workers, key=remaining.__getitem__)[: len(seconds)]
    large = _large(seconds, len(workers))
    yield from one_by_one(workers, {place: seconds[place] for place in large}, remaining)
    places = sorted(seconds.keys() - large)
    parts = ranges([seconds[place] for place in places], [remaining[worker] for worker in workers])
    for worker, part in zip(workers, parts, strict=True):
        if own := places[part.start : part.stop]:
            remaining[worker] += sum(map(seconds.__getitem__, own))
            yield worker, own


def one_by_one(
    workers: Sequence[W], seconds: Mapping[int, float], remaining: MutableMapping[W, float]
) -> Iterator[tuple[W, Sequence[int]]]:
    """Give each call to the worker that is free first. See `in_ranges`."""
    queue = [(remaining[worker], number, worker) for number, worker in enumerate(workers)]
    heapq.heapify(queue)
    for place, own_s in seconds.items():
        busy_s, number, worker = queue[0]
        remaining[worker] = busy_s + own_s
        heapq.heapreplace(queue, (busy_s + own_s, number, worker))
        yield worker, (place,)


def ranges(seconds: Sequence[float], remaining: Sequence[float]) -> list[range]:
    """Divide calls into contiguous ranges, one per worker, so that all workers finish together.

    Args:
        seconds: Expected duration of each call, in order.
        remaining: Expected seconds until each worker is idle.

    Returns:
        Indices of the calls of each worker. A call goes to the worker in whose share of the work its middle lies.
    """
    shares = _shares(sum(seconds), remaining)
    parts: list[range] = []
    first = index = 0
    begins = share_ends = 0.0
    for number, share in enumerate(shares):
        share_ends += share
        is_last = number == len(shares) - 1
        while index < len(seconds) and (is_last or begins + seconds[index] / 2 < share_ends):
            begins += seconds[index]
            index += 1
        parts.append(range(first, index))
        first = index
    return parts


def _shares(total: float, remaining: Sequence[float]) -> list[float]:
    """Return the seconds of work for each worker with which all finish together, as far as that is possible."""
    end, least_first = 0.0, sorted(remaining)
    for count, own_s in enumerate(least_first, start=1):
        if count > 1 and own_s >= end:
            break
        end = (total + sum(least_first[:count])) / count
    return [max(end - own_s, 0.0) for own_s in remaining]


def _large(seconds: Mapping[int, float], num_workers: int) -> list[int]:
    """Return the places of calls that take much longer than usual, and than a quarter of a worker's share.

    A range may end too early or too late by half of its last call. The longest come first.
    """
    bound = max(UNUSUAL * statistics.median(seconds.values()), sum(seconds.values()) / num_workers / 4)
    return sorted((place for place, own_s in seconds.items() if own_s > bound), key=lambda place: -seconds[place])
