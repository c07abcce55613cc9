"""What rebuilds a lost learner: its last snapshot and the calls since then, within the journal's bounds."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Latch, opened
from internals import journal_of, remote_learners, sessions_of, snapshots_are_stored
from learners import Mortal
from losses import SEED, Losses, kill, pseudo, seen

import torchfedrpc as tfr
from torchfedrpc.executors import snapshot_throttle
from torchfedrpc.executors.journal import Journal
from torchfedrpc.storage import BlobStore

__all__ = ["seen"]  # a fixture

MAX_CALLS, MAX_BYTES = 3, 20_000
CLIENTS = [f"client_{number}" for number in range(60)]


@pytest.fixture(scope="module")
def proxy(runner: asyncio.Runner) -> Iterator[tfr.LearnerProxy]:
    runtime = pseudo(num_processes=1, journal_max_calls=MAX_CALLS, journal_max_bytes=MAX_BYTES)
    with opened(runner, tfr.LearnerProxy(Mortal, CLIENTS, runtime=runtime, seed=SEED)) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def clients(proxy: tfr.LearnerProxy) -> Iterator[str]:
    return iter(proxy.client_ids)


@pytest.fixture
def one(clients: Iterator[str]) -> str:
    return next(clients)


async def test_a_rebuilt_learner_runs_only_the_calls_since_its_snapshot_again(
    proxy: tfr.LearnerProxy, one: str, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    for number in range(8):
        await proxy.custom_method(one, "note", str(notes), number)
    await snapshots_are_stored(proxy)
    assert len(notes.read_text().splitlines()) == 8
    kill(proxy, "worker1")
    assert await proxy.custom_method(one, "what_happened") == list(range(8))
    assert len(notes.read_text().splitlines()) <= 8 + MAX_CALLS


async def test_journals_keep_a_bounded_number_of_bytes_and_the_bits_agree(
    proxy: tfr.LearnerProxy, clients: Iterator[str]
) -> None:
    group = proxy.clients([next(clients) for _ in range(20)])
    for _ in range(2):
        await group.call("same", value=torch.zeros(1000))
        before = await group.call("step")
        await snapshots_are_stored(proxy)
        assert proxy.stats()["journal_bytes"] <= MAX_BYTES
    kill(proxy, "worker1")
    kept = await group.call("get_model_weights")
    assert {client: weights.tolist() for client, weights in kept.items()} == dict(before)


async def test_what_cannot_be_captured_is_rebuilt_by_its_journal_within_the_bound(
    proxy: tfr.LearnerProxy, one: str
) -> None:
    await proxy.custom_method(one, "hide", "lock")
    before = await proxy.custom_method(one, "step")
    kill(proxy, "worker1")
    assert (await proxy.custom_method(one, "get_model_weights")).tolist() == before


async def test_what_cannot_be_captured_is_warned_about_once_past_the_bound_and_lost_with_its_worker(
    proxy: tfr.LearnerProxy, clients: Iterator[str], caplog: pytest.LogCaptureFixture
) -> None:
    hiding, other, well = next(clients), next(clients), next(clients)
    await proxy.clients([hiding, other]).call("hide", what="lock")

    async def step_past_the_bound() -> dict[str, Any]:
        for _ in range(MAX_CALLS + 1):
            result = await proxy.clients([hiding, other, well]).call("step")
        await snapshots_are_stored(proxy)
        return dict(result)

    caplog.set_level("INFO", "torchfedrpc")
    with pytest.warns(UserWarning, match="could not be rebuilt if its worker were lost.*'hidden'") as warned:
        before = await step_past_the_bound()
    logged = [record.message for record in caplog.records if "could not be rebuilt" in record.message]
    assert (len(warned), len(logged)) == (1, 1)
    kill(proxy, "worker1")
    for client in (hiding, other):
        with pytest.raises(
            tfr.WorkerLostError, match=rf"{client}\.step on worker1: .* could not be rebuilt.*'hidden'"
        ):
            await proxy.custom_method(client, "step")
    assert (await proxy.custom_method(well, "get_model_weights")).tolist() == before[well]


async def test_learner_that_can_be_captured_again_is_rebuilt_again(
    proxy: tfr.LearnerProxy, one: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_learners(proxy)._run, "_warned_of", {"'hidden'"})
    await proxy.custom_method(one, "hide", "lock")
    for _ in range(MAX_CALLS + 1):
        await proxy.custom_method(one, "step")
    await snapshots_are_stored(proxy)
    assert journal_of(proxy, one).unrecoverable is not None
    await proxy.custom_method(one, "hide", "nothing")
    await proxy.custom_method(one, "step")
    await snapshots_are_stored(proxy)
    assert journal_of(proxy, one).unrecoverable is None
    before = await proxy.custom_method(one, "step")
    kill(proxy, "worker1")
    assert (await proxy.custom_method(one, "get_model_weights")).tolist() == before


@pytest.mark.filterwarnings("error")
async def test_warning_that_is_an_error_holds_up_no_outcome(
    proxy: tfr.LearnerProxy, one: str, latch: Latch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(remote_learners(proxy)._run, "_warned_of", set())
    await proxy.custom_method(one, "hide", "lock")
    with pytest.raises(tfr.CallTimeoutError):
        await proxy.options(timeout_s=0.3).custom_method(one, "hold", latch.path)
    async with asyncio.timeout(30):
        counts = await asyncio.gather(*(proxy.custom_method(one, "append", number) for number in range(3)))
        assert counts == [3, 4, 5]
        assert await proxy.custom_method(one, "append", "later") == 6
    assert any("could not be rebuilt" in record.message for record in caplog.records)


@pytest.mark.parametrize("method", ["hold", "hold_async"])
async def test_a_call_that_was_cancelled_as_it_ran_is_not_repeated_and_what_it_did_is_kept(
    proxy: tfr.LearnerProxy, one: str, seen: Losses, latch: Latch, method: str
) -> None:
    await proxy.custom_method(one, "append", "before")
    call = asyncio.ensure_future(proxy.custom_method(one, method, latch.path))
    await seen.reported(one)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert await proxy.custom_method(one, "append", "after") == 4
    await snapshots_are_stored(proxy)
    kill(proxy, "worker1")
    cancelled = "hold saw cancelled" if method == "hold" else ("hold cancelled", True)
    expected = ["before", "hold begins", cancelled, "after"]
    assert await proxy.custom_method(one, "what_happened") == expected
    assert len(seen.progress(one)) == 1


async def test_a_call_behind_one_that_was_cut_off_waits_until_its_snapshot_is_stored(
    proxy: tfr.LearnerProxy, clients: Iterator[str], seen: Losses, latch: Latch, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = next(clients), next(clients)
    is_storing, may_end, put = threading.Event(), threading.Event(), BlobStore.put

    def slow_put(*arguments: Any) -> None:
        """On the thread of the journals."""
        is_storing.set()
        assert may_end.wait(60)
        put(*arguments)

    monkeypatch.setattr(Journal, "keep", lambda *arguments: False)
    monkeypatch.setattr(BlobStore, "put", slow_put)
    call = asyncio.ensure_future(proxy.custom_method(one, "hold_async", latch.path))
    await seen.reported(one)
    call.cancel()
    behind = asyncio.ensure_future(proxy.custom_method(one, "append", "after"))
    try:
        assert await asyncio.to_thread(is_storing.wait, 30)
        for _ in range(3):  # the worker is free all the while
            await proxy.custom_method(other, "step")
        assert not behind.done()
    finally:
        may_end.set()
    assert await behind == 3


async def test_a_call_past_its_deadline_is_not_repeated_and_what_it_did_is_kept(
    proxy: tfr.LearnerProxy, one: str, latch: Latch
) -> None:
    with pytest.raises(tfr.CallTimeoutError):
        await proxy.options(timeout_s=0.3).custom_method(one, "hold", latch.path)
    assert await proxy.custom_method(one, "append", "after") == 3
    await snapshots_are_stored(proxy)
    kill(proxy, "worker1")
    assert await proxy.custom_method(one, "what_happened") == ["hold begins", "hold saw cancelled", "after"]


async def test_a_restored_learner_is_rebuilt_from_what_was_restored(proxy: tfr.LearnerProxy, one: str) -> None:
    await proxy.custom_method(one, "step")
    taken = {client: data async for client, data in proxy.snapshots([one])}
    expected = [await proxy.custom_method(one, "step") for _ in range(2)]
    await proxy.restore(taken)
    kill(proxy, "worker1")
    assert [await proxy.custom_method(one, "step") for _ in range(2)] == expected
    await snapshots_are_stored(proxy)


async def test_a_snapshot_that_was_on_its_way_as_the_worker_was_lost_is_taken_again(
    proxy: tfr.LearnerProxy, one: str, seen: Losses, latch: Latch
) -> None:
    await proxy.custom_method(one, "step")
    held = asyncio.ensure_future(proxy.custom_method(one, "hold_async", latch.path))
    await seen.reported(one)
    taking = asyncio.ensure_future(anext(proxy.snapshots([one])))
    kill(proxy, "worker1")
    await seen.loss()
    latch.open()
    assert await held == "released"
    client, data = await taking
    await proxy.restore({client: data})
    assert await proxy.custom_method(one, "what_happened") == ["hold begins", "hold released"]


async def test_a_call_in_the_loop_over_a_stream_waits_for_no_snapshot_of_its_learner(
    proxy: tfr.LearnerProxy, clients: Iterator[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot_throttle, "BUDGET_BYTES", 1)  # one snapshot at a time
    read, called = next(clients), next(clients)
    for client in [called] * (MAX_CALLS + 1) + [read] * (MAX_CALLS - 1):
        await proxy.custom_method(client, "step")
    await snapshots_are_stored(proxy)
    async with aclosing(proxy.stream(read, "count", 3)) as items:
        assert await anext(items) == 0
        sessions_of(proxy)[read].request_snapshot(None)  # it waits for the end of the stream
        async with asyncio.timeout(30):
            for _ in range(MAX_CALLS + 1):
                await proxy.custom_method(called, "step")
        assert journal_of(proxy, read).awaits_snapshot
        assert [item async for item in items] == [1, 2]
    await snapshots_are_stored(proxy)


async def test_a_snapshot_that_cannot_be_stored_as_its_worker_is_lost_costs_no_call(
    proxy: tfr.LearnerProxy, one: str, seen: Losses, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()

    def put(*arguments: Any) -> None:
        """On the thread of the journals."""
        monkeypatch.undo()
        kill(proxy, "worker1")
        asyncio.run_coroutine_threadsafe(seen.loss(), loop).result(30)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Journal, "keep", lambda *arguments: False)
    monkeypatch.setattr(BlobStore, "put", put)
    counts = [await proxy.custom_method(one, "append", number) for number in range(MAX_CALLS + 3)]
    assert counts == list(range(1, MAX_CALLS + 4))
    await snapshots_are_stored(proxy)
