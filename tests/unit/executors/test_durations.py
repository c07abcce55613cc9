"""How long calls take, and what that may decide: the order in which a group starts, and never a learner's place."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

import torchfedrpc as tfr
from torchfedrpc.events import CallStarted, Event
from torchfedrpc.executors import durations as durations_module
from torchfedrpc.executors.durations import Durations, fastest_first, longest_first
from torchfedrpc.host.call import Call, Outcome
from torchfedrpc.wire.packing import pack_nothing


def saw(durations: Durations, client_id: str, method: str, seconds: float) -> None:
    """Note a call that has succeeded."""
    durations.note(Call(1, client_id, method, pack_nothing()), Outcome("value", seconds=seconds))


def cut_off(durations: Durations, client_id: str, method: str, seconds: float) -> None:
    """Note a call that was interrupted."""
    durations.note(Call(1, client_id, method, pack_nothing()), Outcome("cancelled", cut_off=True, seconds=seconds))


def test_client_without_calls_is_expected_to_take_the_usual_time() -> None:
    durations = Durations()
    for client, seconds in {"a": 0.1, "b": 0.1, "c": 5.0}.items():
        saw(durations, client, "train", seconds)
    assert durations.expected("abcd", "train") == {"a": 0.1, "b": 0.1, "c": 5.0, "d": 0.1}
    assert durations.expected("abcd", "evaluate") == dict.fromkeys("abcd", 0.0)
    assert longest_first(durations.expected("abcd", "train")) == ["c", "a", "b", "d"]


def test_single_slow_call_does_not_make_its_client_slow() -> None:
    durations = Durations()
    for seconds in (0.1, 5.0):
        saw(durations, "a", "train", seconds)
    assert durations.expected("a", "train") == {"a": 0.1}
    saw(durations, "a", "train", 5.0)
    assert durations.expected("a", "train") == {"a": 5.0}
    for _ in range(2):
        saw(durations, "a", "train", 0.2)
    assert durations.expected("a", "train") == {"a": 0.2}


def test_clients_that_take_about_as_long_as_most_keep_their_order() -> None:
    expected = {"a": 0.11, "b": 0.1, "c": 0.3, "d": 0.02, "e": 0.09, "f": 0.2, "g": 0.1}
    assert longest_first(expected) == ["c", "f", "a", "b", "d", "e", "g"]
    assert fastest_first(expected) == ["d", "a", "b", "e", "g", "f", "c"]
    assert fastest_first(dict.fromkeys("cab", 0.0)) == ["c", "a", "b"]
    assert fastest_first({}) == []


def test_times_of_the_clients_called_least_recently_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durations_module, "_MAX_CLIENTS", 4)
    durations = Durations()
    saw(durations, "a", "train", 9.0)
    for number in range(50):
        saw(durations, f"client_{number}", "train", 0.1)
        saw(durations, f"client_{number}", f"method_{number}", 0.1)
        saw(durations, "a", "train", 9.0)
    assert len(durations._seconds) == 4
    assert durations.expected(["a", "client_49", "client_3"], "train") == {
        "a": 9.0,
        "client_49": 0.1,
        "client_3": 4.55,
    }


class Sleeper:
    """Takes as long as its client is said to, and counts its calls."""

    def __init__(self, client_id: str, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.count = 0

    def work(self) -> int:
        time.sleep(self.seconds)
        self.count += 1
        return self.count

    def draw(self) -> float:
        time.sleep(self.seconds)
        return torch.rand(()).item()


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


async def test_bits_do_not_depend_on_the_order_in_which_a_group_starts() -> None:
    clients = {f"client_{number}": {"seconds": 0.15 if number == 2 else 0.0} for number in range(5)}
    orders, results = [], []
    deadlines: list[dict[str, Any]] = [{}, {"timeout_s": 60}, {"min_results": 5}]
    for options in deadlines:
        async with tfr.LearnerProxy(Sleeper, clients, runtime="local", seed=5) as proxy:
            group = proxy.clients().options(**options)
            drawn = [dict(await group.call("draw"))]
            events: list[Event] = []
            proxy.subscribe(events.append)
            drawn += [dict(await group.call("draw")), (await group.reduce("draw", tfr.Sum())).value]
        orders.append([event.client_id for event in events if isinstance(event, CallStarted)][:5])
        results.append(drawn)
    assert results[0] == results[1] == results[2]
    assert orders[0][0] == orders[1][-1] == orders[2][-1] == "client_2"


@pytest.mark.parametrize("mode", ["local", "pseudo"])
async def test_client_that_every_deadline_cuts_off_is_known_as_slow(mode: str) -> None:
    """No call has ended before, and the slow client comes first."""
    runtime = {"execution_mode": mode} | ({"num_processes": 1} if mode == "pseudo" else {})
    clients = {"slow": {"seconds": 2.0}} | {f"client_{number}": {"seconds": 0.02} for number in range(5)}
    async with tfr.LearnerProxy(Sleeper, clients, runtime=runtime) as proxy:
        group = proxy.clients().options(timeout_s=1.0, on_error="collect")
        assert len(await group.call("work")) == 0
        await proxy.client("slow").draw()  # the method that was cut off has ended when this has
        again = await group.call("work")
    assert list(again) == [client for client in clients if client != "slow"]


def test_lower_bound_of_a_client_that_was_cut_off_holds_until_a_call_of_it_ends() -> None:
    durations = Durations()
    cut_off(durations, "a", "work", 1.0)
    assert durations.expected("ab", "work") == {"a": 1.0, "b": 0.0}
    saw(durations, "b", "work", 0.2)
    cut_off(durations, "a", "work", 0.5)
    assert durations.expected("abc", "work") == {"a": 1.0, "b": 0.2, "c": 0.2}
    saw(durations, "a", "work", 0.1)
    assert durations.expected("a", "work") == {"a": 0.1}
