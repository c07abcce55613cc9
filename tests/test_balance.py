"""Who should have which learners for a group's calls."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

import torchfedrpc as tfr
from torchfedrpc.executors.balance import Durations, longest_first, moves

FREE = {"worker1": 0.0, "worker2": 0.0}


def places(*counts: int) -> dict[str, str]:
    """Clients of each worker, neighbours together."""
    labels = [f"worker{number}" for number, count in enumerate(counts, start=1) for _ in range(count)]
    return {f"client_{number}": label for number, label in enumerate(labels, start=1)}


def latest(expected: dict[str, float], where: dict[str, str]) -> float:
    """When the last worker is done, where each runs one call at a time."""
    return max(sum(seconds for client, seconds in expected.items() if where[client] == label) for label in FREE)


@pytest.mark.parametrize("counts", [(20, 0), (14, 6), (12, 8), (3, 17)])
def test_alike_clients_are_split_evenly(counts: tuple[int, int]) -> None:
    where = places(*counts)
    expected = dict.fromkeys(where, 0.1)
    moved = moves(expected, where, FREE, lambda client: 0.001)
    assert latest(expected, {**where, **moved}) <= 1.1 * 1.0


def test_a_client_that_takes_ten_times_as_long_has_the_worker_almost_to_itself() -> None:
    where = places(10, 10)
    expected = dict.fromkeys(where, 0.1) | {"client_1": 1.0}
    moved = moves(expected, where, FREE, lambda client: 0.001)
    assert latest(expected, {**where, **moved}) <= 1.15 * 1.45


def test_neighbours_of_the_border_are_moved() -> None:
    where = places(12, 8)
    moved = moves(dict.fromkeys(where, 0.1), where, FREE, lambda client: 0.001)
    assert moved == {"client_12": "worker2", "client_11": "worker2"}


@pytest.mark.parametrize("cost_s", [None, 0.2])
def test_nobody_is_moved_who_cannot_be_or_whom_to_move_takes_too_long(cost_s: float | None) -> None:
    where = places(14, 6)
    assert moves(dict.fromkeys(where, 0.1), where, FREE, lambda client: cost_s) == {}


def test_a_small_difference_is_let_be() -> None:
    where = places(32, 32)
    expected = {client: 0.1 + 0.0001 * number for number, client in enumerate(where)}
    assert moves(expected, where, FREE, lambda client: 0.0) == {}


def test_what_is_over_in_no_time_is_let_be() -> None:
    where = places(40, 0)
    assert moves(dict.fromkeys(where, 0.00001), where, FREE, lambda client: 0.0) == {}


def test_what_a_worker_has_to_do_first_counts() -> None:
    where = places(10, 10)
    moved = moves(dict.fromkeys(where, 0.1), where, {"worker1": 1.0, "worker2": 0.0}, lambda client: 0.001)
    assert set(moved.values()) == {"worker2"}
    assert len(moved) == 5


def test_before_it_is_known_what_moves_cost_one_is_tried() -> None:
    where = places(20, 0)
    assert len(moves(dict.fromkeys(where, 0.1), where, FREE, lambda client: 0.001, most=1)) == 1


def test_clients_without_a_learner_are_spread_though_nothing_is_known_of_their_calls() -> None:
    where = places(20, 0)
    assert len(moves(dict.fromkeys(where, 0.0), where, FREE, lambda client: 0.0)) == 10
    assert moves(dict.fromkeys(where, 0.0), where, FREE, lambda client: 0.001) == {}


def test_a_client_that_was_not_seen_takes_as_long_as_most() -> None:
    durations = Durations()
    for client, seconds in {"a": 0.1, "b": 0.1, "c": 5.0}.items():
        durations.saw(client, "train", seconds)
    assert durations.expected("abcd", "train") == {"a": 0.1, "b": 0.1, "c": 5.0, "d": 0.1}
    assert durations.expected("abcd", "evaluate") == dict.fromkeys("abcd", 0.0)
    assert longest_first(durations.expected("abcd", "train")) == ["c", "a", "b", "d"]


def test_one_call_that_took_long_does_not_make_its_client_a_slow_one() -> None:
    durations = Durations()
    for seconds in (0.1, 5.0):
        durations.saw("a", "train", seconds)
    assert durations.expected("a", "train") == {"a": 0.1}
    durations.saw("a", "train", 5.0)
    assert durations.expected("a", "train") == {"a": 5.0}
    for _ in range(2):
        durations.saw("a", "train", 0.2)
    assert durations.expected("a", "train") == {"a": 0.2}


class Sleeper:
    """Takes as long as its client is said to, and knows how often it was called."""

    def __init__(self, client_id: str, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.count = 0

    def work(self) -> int:
        time.sleep(self.seconds)
        self.count += 1
        return self.count


async def test_learners_move_to_where_they_are_done_earlier_and_keep_their_state() -> None:
    clients = {client: {"seconds": 0.25 if number < 4 else 0.0} for number, client in enumerate(places(6, 6))}
    runtime = {"execution_mode": "pseudo", "num_processes": 2}
    async with tfr.LearnerProxy(Sleeper, clients, runtime=runtime) as proxy:
        executor: Any = proxy._router._main
        counts = [list((await proxy.clients().call("work")).values()) for _ in range(3)]
        assert counts == [[number] * 12 for number in range(1, 4)]
        slow = [executor.worker_of(client) for client in list(clients)[:4]]
        assert set(slow) == {"worker1", "worker2"}
        await asyncio.gather(*(proxy.custom_method(client, "work") for client in clients))
