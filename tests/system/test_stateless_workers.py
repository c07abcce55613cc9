"""Stateless learners on workers: the same bits with any number of them, with kills, joins, drains and taken calls."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Latch
from internals import asks_to_leave, members_of, take_calls_back
from losses import Losses
from workers import joining, listening, make_token

import torchfedrpc as tfr
from torchfedrpc.errors import CallTimeoutError, GroupCallError, WorkerLostError
from torchfedrpc.events import CallStarted, WorkerJoined, WorkerLeft
from torchfedrpc.testing import Faults

CLIENTS = [f"client_{number}" for number in range(13)]
WEIGHTS = torch.zeros(3)


class Drawer:
    """Draws; its calls take a while if they are told to, and one of its clients kills its worker."""

    stateless = True

    def __init__(self, client_id: str, *, seconds: float = 0.0, deadly: bool = False) -> None:
        self.bias = torch.randn(())
        self.seconds = seconds
        self.deadly = deadly

    def update(self, weights: torch.Tensor, seconds: float = 0.0) -> dict[str, Any]:
        time.sleep(seconds or self.seconds)
        if self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"model_weights": {"w": weights + torch.randn(3) + self.bias}, "num_samples": 2}

    async def update_async(self, weights: torch.Tensor) -> dict[str, Any]:
        await asyncio.sleep(self.seconds)
        return self.update(weights, 1e-6)

    def measure(self, weights: torch.Tensor) -> int:
        time.sleep(self.seconds)
        return len(weights)

    def draws(self) -> Iterator[float]:
        while True:
            yield float(torch.rand(()))

    def draws_some(self) -> Iterator[float]:
        for _ in range(3):
            yield float(torch.rand(()))

    def hold_regardless(self, latch: str) -> None:
        while not Path(latch).exists():
            time.sleep(0.01)

    def process_id(self) -> int:
        time.sleep(self.seconds)
        return os.getpid()


class Log:
    """A reducer of one's own: the order of merging shows in its value."""

    def __init__(self) -> None:
        self.parts: list[Any] = []

    def add(self, result: dict[str, Any]) -> None:
        self.parts = [result["model_weights"]["w"].tolist()]

    def merge(self, other: Log) -> None:
        self.parts = [self.parts, other.parts]

    def finish(self) -> list[Any]:
        return self.parts


async def rounds(proxy: tfr.LearnerProxy, seen: list[Any] | None = None) -> list[Any]:
    """The values of calls of every kind, which are added to ``seen`` as they come."""
    seen = [] if seen is None else seen
    for number in range(3):
        cohort = proxy.clients(CLIENTS[number:])
        mean = await cohort.reduce("update", tfr.WeightedMean(), weights=WEIGHTS)
        seen.append((mean.value["w"].tolist(), mean.count))
        seen.append((await cohort.reduce("update_async", Log, weights=WEIGHTS)).value)
        results = await cohort.call("update", weights=WEIGHTS)
        seen.append({client: result["model_weights"]["w"].tolist() for client, result in results.items()})
        completed = {client: result async for client, result in cohort.as_completed("update", weights=WEIGHTS)}
        seen.append({client: completed[client]["model_weights"]["w"].tolist() for client in cohort})
        alone: list[Any] = [proxy.custom_method(client, "update", WEIGHTS) for client in CLIENTS[::2]]
        streams = [first_items(proxy, client) for client in CLIENTS[1::2]]
        together = await asyncio.gather(*alone, *streams)
        seen.append([result["model_weights"]["w"].tolist() for result in together[: len(alone)]])
        seen.append(together[len(alone) :])
    return seen


async def first_items(proxy: tfr.LearnerProxy, client_id: str) -> list[float]:
    """The first items of a stream, which begins anew if it is lost with its worker."""
    while True:
        try:
            async with aclosing(proxy.stream(client_id, "draws_some")) as stream:
                return [item async for item in stream]
        except WorkerLostError as error:
            if "the stream with it" not in str(error):
                raise


def pseudo(num_processes: int = 2, **runtime: Any) -> dict[str, Any]:
    return {"execution_mode": "pseudo", "num_processes": num_processes, **runtime}


@pytest.fixture(scope="module")
def expected(runner: asyncio.Runner) -> list[Any]:
    async def undisturbed() -> list[Any]:
        async with tfr.LearnerProxy(Drawer, CLIENTS, runtime="local", seed=3) as proxy:
            return await rounds(proxy)

    return runner.run(undisturbed())


# The same bits.


@pytest.mark.parametrize("num_processes", [1, 2, 3, 8])
async def test_values_are_the_same_with_any_number_of_workers(num_processes: int, expected: list[Any]) -> None:
    async with tfr.LearnerProxy(Drawer, CLIENTS, runtime=pseudo(num_processes), seed=3) as proxy:
        assert await rounds(proxy) == expected


@pytest.mark.parametrize("at_call", [1, 3, 8, 20, 40])
async def test_values_are_the_same_with_killed_workers(at_call: int, expected: list[Any]) -> None:
    faults = Faults().kill("worker1", at_call=at_call).kill("worker2", at_call=at_call + 2)
    async with tfr.LearnerProxy(Drawer, CLIENTS, runtime=pseudo(3), seed=3) as proxy, faults.injected(proxy):
        assert await rounds(proxy) == expected
        assert proxy.stats()["workers_lost"] == 2


async def test_values_are_the_same_if_calls_are_taken_back_all_the_time(expected: list[Any]) -> None:
    clients = {client: {"seconds": 0.02 if number < 5 else 0.001} for number, client in enumerate(CLIENTS)}
    async with tfr.LearnerProxy(Drawer, clients, runtime=pseudo(3), seed=3) as proxy:
        taking = asyncio.ensure_future(take_all_the_time(proxy))
        assert await rounds(proxy) == expected
        taking.cancel()
        assert await taking > 20


async def take_all_the_time(proxy: tfr.LearnerProxy) -> int:
    """Take calls back from all workers, worth it or not, until this is cancelled. Returns how many came back."""
    num_taken = 0
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            num_taken += await take_calls_back(proxy)
            await asyncio.sleep(0.002)
    return num_taken


async def test_values_are_the_same_with_workers_that_join_and_leave(expected: list[Any], tmp_path: Path) -> None:
    token = make_token(tmp_path)
    clients = {client: {"seconds": 0.02} for client in CLIENTS}
    runtime = pseudo(1, join_at="127.0.0.1:0", token_file=token)
    async with tfr.LearnerProxy(Drawer, clients, runtime=runtime, seed=3) as proxy:
        seen = Losses()
        proxy.subscribe(seen)
        assert proxy.join_address is not None
        with joining(proxy.join_address, token) as worker:
            running = asyncio.ensure_future(rounds(proxy))
            await seen.until(lambda: any(isinstance(event, WorkerJoined) for event in seen.events), timeout_s=60.0)
            others = asyncio.gather(*(proxy.custom_method(client, "process_id") for client in CLIENTS))
            assert len(set(await others)) == 2
            worker.signal(signal.SIGTERM)
            assert await running == expected
            await seen.until(lambda: any(isinstance(event, WorkerLeft) for event in seen.events), timeout_s=60.0)
            assert worker.ended() == 0
        assert not seen.lost
        assert (await proxy.clients().call("update", weights=WEIGHTS)).failures == {}


@pytest.mark.parametrize("leaves_at", [0, 2, 5, 9, 14])
async def test_values_are_the_same_if_a_worker_leaves_at_any_step(
    leaves_at: int, expected: list[Any], tmp_path: Path
) -> None:
    clients = {client: {"seconds": 0.005} for client in CLIENTS}
    runtime = pseudo(1, join_at="127.0.0.1:0", token_file=(token := make_token(tmp_path)))
    async with tfr.LearnerProxy(Drawer, clients, runtime=runtime, seed=3) as proxy:
        seen, values = Losses(), list[Any]()
        proxy.subscribe(seen)
        assert proxy.join_address is not None
        with joining(proxy.join_address, token) as worker:
            await seen.until(lambda: any(isinstance(event, WorkerJoined) for event in seen.events), timeout_s=60.0)
            running = asyncio.ensure_future(rounds(proxy, seen=values))
            while len(values) < leaves_at:
                await asyncio.sleep(0.001)
            worker.signal(signal.SIGTERM)
            assert await running == expected
            await seen.until(lambda: any(isinstance(event, WorkerLeft) for event in seen.events), timeout_s=60.0)
        assert not seen.lost


# Which worker runs a call.


async def test_a_group_is_dealt_to_all_workers_and_the_idle_ones_take_calls() -> None:
    clients = {client: {"seconds": 0.4 if number < 6 else 0.001} for number, client in enumerate(CLIENTS[:12])}
    async with tfr.LearnerProxy(Drawer, clients, runtime=pseudo(2)) as proxy:
        await proxy.clients().call("update", weights=WEIGHTS, seconds=0.001)
        by_process = Counter((await proxy.clients(CLIENTS[:6]).call("process_id")).values())
        assert sorted(by_process.values()) == [3, 3]
        began = time.monotonic()
        await proxy.clients().reduce("update", tfr.WeightedMean(), weights=WEIGHTS)
        assert time.monotonic() - began < 6 * 0.4 - 0.3  # the last worker has taken slow calls from the first


async def test_a_model_goes_to_each_worker_once_though_calls_are_taken_back() -> None:
    clients = {client: {"seconds": 0.01} for client in CLIENTS}
    weights = torch.zeros(1 << 20)
    async with tfr.LearnerProxy(Drawer, clients, runtime=pseudo(3, transport="uv")) as proxy:
        before = proxy.stats()["bytes_sent"]
        taking = asyncio.ensure_future(take_all_the_time(proxy))
        await proxy.clients().reduce("measure", tfr.Sum, weights=weights)
        taking.cancel()
        assert await taking > 3
        assert proxy.stats()["bytes_sent"] - before < 3 * weights.nbytes + 100_000


async def test_workers_forget_learners_beyond_the_limit() -> None:
    clients = [f"client_{number}" for number in range(60)]
    async with tfr.LearnerProxy(Drawer, clients, runtime=pseudo(1, max_resident_learners=5)) as proxy:
        values = []
        for number in range(6):
            cohort = proxy.clients(clients[10 * number : 10 * number + 10])
            values.append((await cohort.reduce("update", tfr.WeightedMean(), weights=WEIGHTS)).value["w"].tolist())
            assert all(len(member.registrations) <= 10 for member in members_of(proxy).values())
    async with tfr.LearnerProxy(Drawer, clients, runtime="local") as proxy:
        for number in range(6):
            cohort = proxy.clients(clients[10 * number : 10 * number + 10])
            mean = await cohort.reduce("update", tfr.WeightedMean(), weights=WEIGHTS)
            assert mean.value["w"].tolist() == values[number]


async def test_a_worker_that_joins_runs_calls_of_the_same_round(tmp_path: Path) -> None:
    token = make_token(tmp_path)
    clients = [f"client_{number}" for number in range(400)]
    runtime = pseudo(1, join_at="127.0.0.1:0", token_file=token)
    kwargs = {client: {"seconds": 0.05} for client in clients}
    async with tfr.LearnerProxy(Drawer, kwargs, runtime=runtime) as proxy:
        seen = Losses()
        proxy.subscribe(seen)
        assert proxy.join_address is not None
        calling = asyncio.ensure_future(proxy.clients().call("process_id"))
        with joining(proxy.join_address, token):
            assert len(set((await calling).values())) == 2


async def test_a_slow_call_holds_up_none_of_the_others() -> None:
    clients = {client: {"seconds": 1.0 if client == CLIENTS[0] else 0.001} for client in CLIENTS}
    async with tfr.LearnerProxy(Drawer, clients, runtime=pseudo(2)) as proxy:
        await proxy.clients(CLIENTS[1:]).call("process_id")
        began = time.monotonic()
        async for client, _ in proxy.clients().as_completed("process_id"):
            assert (client == CLIENTS[0]) == (time.monotonic() - began > 0.8)
        assert client == CLIENTS[0]


async def test_endpoints_keep_clients_where_they_are_wanted() -> None:
    endpoints = dict.fromkeys(CLIENTS[:3], "worker2") | {CLIENTS[3]: "local"}
    async with tfr.LearnerProxy(Drawer, CLIENTS, runtime=pseudo(2, client_endpoints=endpoints)) as proxy:
        ran = {client: await proxy.custom_method(client, "process_id") for client in CLIENTS}
        grouped = await proxy.clients().call("process_id")
        processes = {label: _pid_of(proxy, label) for label in ("worker1", "worker2")}
    for where in (ran, grouped):
        assert {where[client] for client in CLIENTS[:3]} == {processes["worker2"]}
        assert where[CLIENTS[3]] == os.getpid()


def _owner_pid(proxy: tfr.LearnerProxy, client_id: str) -> int:
    rank: str = proxy.client(client_id).rref.owner().name
    return _pid_of(proxy, rank.replace("rank", "worker"))


def _pid_of(proxy: tfr.LearnerProxy, label: str) -> int:
    process = members_of(proxy)[label].process
    assert process is not None
    pid: int = process.pid
    return pid


async def test_an_rref_is_of_the_worker_that_ran_the_last_call() -> None:
    async with tfr.LearnerProxy(Drawer, CLIENTS, runtime=pseudo(2)) as proxy:
        handle = proxy.client(CLIENTS[0])
        assert handle.rref.owner().name in ("rank1", "rank2")
        other = proxy.client(CLIENTS[1])
        for _ in range(3):
            slow = asyncio.ensure_future(other.update(WEIGHTS, seconds=0.1))
            await asyncio.sleep(0.01)
            pid = await handle.process_id()
            assert _owner_pid(proxy, CLIENTS[0]) == pid
            await slow


async def to_the_end(stream: Any) -> None:
    async for _ in stream:
        pass


# Losses.


async def test_a_call_that_kills_its_worker_is_given_up_and_the_others_finish() -> None:
    clients: dict[str, Any] = {client: {} for client in CLIENTS}
    clients[CLIENTS[4]] = {"deadly": True}
    async with tfr.LearnerProxy(Drawer, clients, runtime=pseudo(2, max_recoveries=1)) as proxy:
        with pytest.raises(WorkerLostError, match=rf"{CLIENTS[4]}\.update on worker.*max_recoveries=1"):
            await proxy.custom_method(CLIENTS[4], "update", WEIGHTS)
        result = await proxy.clients().options(on_error="collect").call("update", weights=WEIGHTS)
        assert list(result.failures) == [CLIENTS[4]]
        assert isinstance(result.failures[CLIENTS[4]], WorkerLostError)
        assert len(result) == len(CLIENTS) - 1
        mean = await proxy.clients().options(on_error="collect").reduce("update", tfr.WeightedMean(), weights=WEIGHTS)
        assert (list(mean.failures), mean.count) == ([CLIENTS[4]], len(CLIENTS) - 1)
        with pytest.raises(GroupCallError, match=CLIENTS[4]):
            await proxy.clients().reduce("update", tfr.WeightedMean(), weights=WEIGHTS)


async def test_without_recovery_a_lost_call_fails_and_others_run_elsewhere() -> None:
    clients: dict[str, Any] = {client: {} for client in CLIENTS}
    clients[CLIENTS[4]] = {"deadly": True}
    async with tfr.LearnerProxy(Drawer, clients, runtime=pseudo(2, on_worker_lost="fail")) as proxy:
        with pytest.raises(WorkerLostError, match="on_worker_lost=recover"):
            await proxy.custom_method(CLIENTS[4], "update", WEIGHTS)
        others = proxy.clients([client for client in CLIENTS if client != CLIENTS[4]])
        assert len(set((await others.call("process_id")).values())) == 1
        with pytest.raises(WorkerLostError):
            await proxy.custom_method(CLIENTS[4], "update", WEIGHTS)
        with pytest.raises(WorkerLostError, match="no worker is left"):
            await proxy.custom_method(CLIENTS[0], "update", WEIGHTS)


async def test_a_stream_is_lost_with_its_worker_and_can_be_opened_again() -> None:
    async with tfr.LearnerProxy(Drawer, CLIENTS, runtime=pseudo(2)) as proxy:
        async with aclosing(proxy.stream(CLIENTS[0], "draws")) as stream:
            await anext(stream)
            os.kill(_owner_pid(proxy, CLIENTS[0]), signal.SIGKILL)
            with pytest.raises(WorkerLostError, match="open another"):
                await to_the_end(stream)
        async with aclosing(proxy.stream(CLIENTS[0], "draws")) as stream:
            await anext(stream)
        await proxy.custom_method(CLIENTS[0], "update", WEIGHTS)


async def test_a_cancelled_call_lets_the_clients_next_one_run() -> None:
    async with tfr.LearnerProxy(Drawer, CLIENTS, runtime=pseudo(2)) as proxy:
        slow = asyncio.ensure_future(proxy.custom_method(CLIENTS[0], "update", WEIGHTS, seconds=0.3))
        await asyncio.sleep(0.05)
        slow.cancel()
        async with asyncio.timeout(10):
            await proxy.custom_method(CLIENTS[0], "update", WEIGHTS)
            await proxy.clients().reduce("update", tfr.WeightedMean(), weights=WEIGHTS)


async def test_a_clients_next_call_waits_for_its_method_that_ignores_its_deadline(latch: Latch) -> None:
    async with tfr.LearnerProxy(Drawer, CLIENTS, runtime=pseudo(2)) as proxy:
        with pytest.raises(CallTimeoutError):
            await proxy.options(timeout_s=0.2).custom_method(CLIENTS[0], "hold_regardless", latch.path)
        async with asyncio.timeout(20):
            for client in CLIENTS[1:9]:  # they are not held up, though one worker is busy with the method
                await proxy.custom_method(client, "update", WEIGHTS)
            following = asyncio.ensure_future(proxy.custom_method(CLIENTS[0], "process_id"))
            await proxy.clients(CLIENTS[1:9]).call("update", weights=WEIGHTS)
            assert not following.done()
            latch.open()
            await following


async def test_a_worker_leaves_behind_a_method_that_ignores_its_deadline(tmp_path: Path, latch: Latch) -> None:
    runtime = pseudo(1, join_at="127.0.0.1:0", token_file=(token := make_token(tmp_path)))
    async with tfr.LearnerProxy(Drawer, CLIENTS, runtime=runtime) as proxy:
        seen = Losses()
        proxy.subscribe(seen)
        assert proxy.join_address is not None
        with joining(proxy.join_address, token) as worker:
            await seen.until(lambda: any(isinstance(event, WorkerJoined) for event in seen.events), timeout_s=60.0)
            busy = asyncio.ensure_future(proxy.custom_method(CLIENTS[1], "update", WEIGHTS, seconds=0.5))
            await seen.until(lambda: any(isinstance(event, CallStarted) for event in seen.events))
            with pytest.raises(CallTimeoutError, match="worker2"):
                await proxy.options(timeout_s=0.2).custom_method(CLIENTS[0], "hold_regardless", latch.path)
            worker.signal(signal.SIGTERM)
            await busy
            following = asyncio.ensure_future(proxy.custom_method(CLIENTS[0], "process_id"))
            while not asks_to_leave(proxy, "worker2"):
                await asyncio.sleep(0.01)
            for _ in range(3):
                others = await proxy.clients(CLIENTS[1:]).call("process_id")
                assert set(others.values()) == {_pid_of(proxy, "worker1")}
            assert not following.done()  # one call of a client at a time
            latch.open()
            assert await following == _pid_of(proxy, "worker1")
            await seen.until(lambda: any(isinstance(event, WorkerLeft) for event in seen.events), timeout_s=60.0)
            assert worker.ended() == 0
        assert not seen.lost


async def test_clients_whose_endpoint_is_gone_fail_and_name_it(tmp_path: Path) -> None:
    with listening(token := make_token(tmp_path)) as (worker, address):
        runtime = pseudo(1, token_file=token, client_endpoints=dict.fromkeys(CLIENTS[:2], address))
        async with tfr.LearnerProxy(Drawer, CLIENTS, runtime=runtime | {"on_worker_lost": "fail"}) as proxy:
            seen = Losses()
            proxy.subscribe(seen)
            assert len(set((await proxy.clients().call("process_id")).values())) == 2
            worker.signal(signal.SIGKILL)
            await seen.until(lambda: bool(seen.lost), timeout_s=60.0)
            result = await proxy.clients().options(on_error="collect").call("process_id")
            assert list(result.failures) == CLIENTS[:2]
            with pytest.raises(WorkerLostError, match=rf"no worker is left where '{address}' wants it"):
                await proxy.custom_method(CLIENTS[0], "process_id")
            with pytest.raises(GroupCallError, match=rf"{CLIENTS[0]}, {CLIENTS[1]}.*{address}"):
                await proxy.clients().reduce("update", tfr.WeightedMean(), weights=WEIGHTS)


async def test_a_quorum_is_met_by_the_clients_that_are_expected_to_be_fastest() -> None:
    clients = {client: {"seconds": 0.5 if number < 6 else 0.001} for number, client in enumerate(CLIENTS)}
    async with tfr.LearnerProxy(Drawer, clients, runtime=pseudo(2)) as proxy:
        await proxy.clients().call("update", weights=WEIGHTS)
        for number in range(4):
            began = time.monotonic()
            group = proxy.clients().options(min_results=6)
            if number % 2:
                assert len(await group.call("update", weights=WEIGHTS)) >= 6
            else:
                assert (await group.reduce("update", tfr.WeightedMean(), weights=WEIGHTS)).count >= 6
            assert time.monotonic() - began < 0.5
            await proxy.clients().call("process_id")  # behind what was cancelled
