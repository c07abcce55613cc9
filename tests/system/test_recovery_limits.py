"""Where recovery ends, and what is told of it: learners that end their process each time, and the next proxy."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Latch
from internals import not_carried
from learners import Mortal, Probe, Stillborn
from losses import SEED, Losses, Steps, kill, pid_of, pseudo, undisturbed

import torchfedrpc as tfr

CLIENTS = ["a", "b", "c", "d"]  # two on each of two workers


@pytest.fixture(scope="module")
def expected(runner: asyncio.Runner) -> dict[str, dict[str, Any]]:
    return runner.run(undisturbed(CLIENTS))


@pytest.mark.parametrize("max_recoveries", [1, pytest.param(3, marks=pytest.mark.slow)])
async def test_a_learner_that_ends_its_process_each_time_is_given_up_and_the_others_finish(
    expected: dict[str, dict[str, Any]], max_recoveries: int
) -> None:
    runtime = pseudo(max_recoveries=max_recoveries)
    async with tfr.LearnerProxy(Mortal, CLIENTS, runtime=runtime, seed=SEED) as proxy:
        steps, seen = Steps(proxy, expected), Losses()
        proxy.subscribe(seen)
        await steps.check(*CLIENTS)
        poison = asyncio.ensure_future(proxy.custom_method("a", "die"))
        await steps.check("b", "c", "d")
        num_losses = max_recoveries + 1
        message = rf"a\.die on worker1: .*in succession: {num_losses}\).*max_recoveries={max_recoveries}"
        with pytest.raises(tfr.WorkerLostError, match=message):
            await poison
        assert seen.workers == ["worker1"] * num_losses
        began = time.monotonic()
        with pytest.raises(tfr.WorkerLostError, match=r"a\.step on worker1: "):
            await proxy.custom_method("a", "step")
        assert time.monotonic() - began < 0.5
        await steps.check("b", "c", "d")
        assert seen.workers == ["worker1"] * num_losses


async def test_calls_that_rpc_cannot_carry_fail_and_the_others_are_made_once(
    expected: dict[str, dict[str, Any]],
) -> None:
    async with tfr.LearnerProxy(Mortal, CLIENTS, runtime=pseudo(), seed=SEED) as proxy:
        steps, seen = Steps(proxy, expected), Losses()
        proxy.subscribe(seen)
        await steps.check(*CLIENTS)
        with not_carried("same"):
            bad = [asyncio.ensure_future(proxy.custom_method(client, "same", value=1)) for client in ("a", "b", "c")]
            await steps.check("d")
            for call, client in zip(bad, ("a", "b", "c"), strict=True):
                with pytest.raises(
                    tfr.WorkerLostError, match=rf"{client}\.same on .* torch RPC cannot carry the call"
                ):
                    await call
        await steps.check(*CLIENTS)
        assert seen.workers == []


async def test_requests_that_fail_together_as_a_connection_does_are_sent_again() -> None:
    clients = [f"client_{number}" for number in range(8)]
    async with tfr.LearnerProxy(Mortal, clients, runtime=pseudo(num_processes=1)) as proxy:
        await proxy.clients().call("append", 0)
        with not_carried("append", num_requests=len(clients)):
            counts = await proxy.clients({one: {"item": torch.zeros(80_000)} for one in clients}).call("append")
        assert dict(counts) == dict.fromkeys(clients, 2)


async def test_no_one_is_rebuilt_where_a_loss_is_to_fail_and_clients_of_other_workers_go_on(
    expected: dict[str, dict[str, Any]], latch: Latch
) -> None:
    async with tfr.LearnerProxy(Mortal, CLIENTS, runtime=pseudo(on_worker_lost="fail"), seed=SEED) as proxy:
        steps, seen = Steps(proxy, expected), Losses()
        proxy.subscribe(seen)
        await steps.check("a", "c")
        pid = pid_of(proxy, "worker2")
        running = asyncio.ensure_future(proxy.custom_method("a", "hold", latch.path))
        busy = asyncio.ensure_future(proxy.custom_method("d", "hold_async", latch.path))
        await seen.reported("a")
        await seen.reported("d")
        killed_at = kill(proxy, "worker1")
        with pytest.raises(tfr.WorkerLostError, match=r"a\.hold on worker1: .*on_worker_lost=recover"):
            await running
        assert time.monotonic() - killed_at < 1
        with pytest.raises(tfr.WorkerLostError, match=r"b\.step on worker1: "):  # which had not been called before
            await asyncio.wait_for(proxy.custom_method("b", "step"), 10)
        latch.open()
        assert await busy == "released"
        await steps.check("c", "d")
        assert await proxy.custom_method("d", "process_id") == pid
        some = await proxy.clients().options(min_results=2).call("same", value=1)
        assert dict(some) == {"c": 1, "d": 1}
        with pytest.raises(tfr.QuorumError):
            await proxy.clients().options(min_results=3).call("same", value=1)
        assert seen.workers == ["worker1"]


async def test_retries_cover_a_constructor_that_fails_and_recovery_one_that_ends_its_process(tmp_path: Path) -> None:
    path = tmp_path / "made"
    async with tfr.LearnerProxy(Stillborn, {"a": {"path": str(path)}}, runtime=pseudo(num_processes=1)) as proxy:
        assert await proxy.options(retries=1).custom_method("a", "made") == 3
        kill(proxy, "worker1")
        assert await proxy.custom_method("a", "made") == 4  # made once more, and no retry is needed for that
    assert len(path.read_text().splitlines()) == 4


async def test_proxy_closes_soon_after_a_loss_and_recovers_from_another_once_it_is_opened_again(
    expected: dict[str, dict[str, Any]],
) -> None:
    runtime = pseudo(num_processes=1, journal_max_calls=1, max_recoveries=0)
    proxy, seen = tfr.LearnerProxy(Mortal, CLIENTS, runtime=runtime, seed=SEED), Losses()
    proxy.subscribe(seen)
    async with proxy:
        await Steps(proxy, expected).check(*CLIENTS)
        with pytest.raises(tfr.WorkerLostError, match="max_recoveries=0"):
            await proxy.custom_method("a", "die")
        with pytest.raises(tfr.WorkerLostError, match="given up"):
            await proxy.custom_method("a", "step")
        await proxy.custom_method("b", "process_id")
        kill(proxy, "worker1")
        await seen.loss(2)
        began = time.monotonic()
    assert time.monotonic() - began < 5
    assert proxy.stats()["workers_lost"] == 2
    async with proxy:
        assert proxy.stats()["workers_lost"] == 0
        steps = Steps(proxy, expected)
        for _ in range(3):  # each is a call more than the journal takes, so that snapshots are stored
            await steps.check(*CLIENTS)
        kill(proxy, "worker1")
        await steps.check(*CLIENTS)
        assert proxy.stats()["workers_lost"] == 1
    assert seen.workers == ["worker1"] * 3


async def test_replay_is_told_with_its_calls_and_its_end(caplog: pytest.LogCaptureFixture) -> None:
    told: list[tfr.Event] = []
    runtime = {"execution_mode": "pseudo", "num_processes": 1}
    async with tfr.LearnerProxy(Probe, ["a"], runtime=runtime) as proxy:
        proxy.subscribe(told.append)
        for number in range(3):
            await proxy.custom_method("a", "append", number)
        os.kill(await proxy.custom_method("a", "process_id"), signal.SIGKILL)
        with caplog.at_level(logging.INFO):
            assert await proxy.custom_method("a", "append", 3) == 4
    started, ended = (event for event in told if isinstance(event, tfr.ReplayStarted | tfr.ReplayEnded))
    assert started == tfr.ReplayStarted("a", "worker1", 4)
    assert isinstance(ended, tfr.ReplayEnded)
    assert (ended.client_id, ended.worker, ended.num_calls) == ("a", "worker1", 4)
    assert ended.seconds > 0
    assert "replaying 4 calls of a on worker1" in caplog.messages
    assert tfr.WorkerJoined("worker1", has_returned=True) in told
    assert "worker1 is back" in caplog.messages
    last = [event for event in told if isinstance(event, tfr.CallEnded)][-1]
    assert last.times is not None
    assert last.times.queue_s > ended.seconds


async def test_a_stream_of_sent_values_that_has_ended_is_never_lost_in_silence() -> None:
    async with tfr.LearnerProxy(Probe, ["a"], runtime={"execution_mode": "pseudo", "num_processes": 1}) as proxy:
        pid = await proxy.custom_method("a", "process_id")
        stream = proxy.stream("a", "talk", 1)
        await anext(stream)
        await stream.asend(5)
        await stream.aclose()
        os.kill(pid, signal.SIGKILL)  # before the snapshot behind the stream
        with pytest.raises(tfr.WorkerLostError, match="no snapshot was taken behind its last stream"):
            await proxy.custom_method("a", "process_id")
