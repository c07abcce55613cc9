"""How long calls take, and what that may decide: the order in which a group starts, and never a learner's place."""

from __future__ import annotations

import time
from typing import Any

import torchfedrpc as tfr
from torchfedrpc.executors.durations import Durations, longest_first


def test_client_without_calls_is_expected_to_take_the_usual_time() -> None:
    durations = Durations()
    for client, seconds in {"a": 0.1, "b": 0.1, "c": 5.0}.items():
        durations.saw(client, "train", seconds)
    assert durations.expected("abcd", "train") == {"a": 0.1, "b": 0.1, "c": 5.0, "d": 0.1}
    assert durations.expected("abcd", "evaluate") == dict.fromkeys("abcd", 0.0)
    assert longest_first(durations.expected("abcd", "train")) == ["c", "a", "b", "d"]


def test_single_slow_call_does_not_make_its_client_slow() -> None:
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
    """Takes as long as its client is said to, and counts its calls."""

    def __init__(self, client_id: str, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.count = 0

    def work(self) -> int:
        time.sleep(self.seconds)
        self.count += 1
        return self.count


async def test_learners_stay_on_their_workers_however_unequal_the_clients_are() -> None:
    clients = {f"client_{number}": {"seconds": 0.1 if number < 4 else 0.0} for number in range(12)}
    runtime = {"execution_mode": "pseudo", "num_processes": 2}
    async with tfr.LearnerProxy(Sleeper, clients, runtime=runtime) as proxy:
        executor: Any = proxy._router._main
        before = [executor.worker_of(client) for client in clients]
        for number in range(1, 4):
            assert list((await proxy.clients().call("work")).values()) == [number] * 12
        assert [executor.worker_of(client) for client in clients] == before
        assert proxy.stats()["snapshot_bytes"] == 0
