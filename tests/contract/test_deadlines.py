"""Deadlines and cancellation: callers get their error in time, and methods see that they are cancelled."""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Fresh, Latch, Seen

import torchfedrpc as tfr
from torchfedrpc.events import CallEnded

PROMPT_S = 0.05  # the promise
TRIES = 5
FAIR_S = 2.0  # under load: much less than the load lasts


async def overrun_s(call: Coroutine[Any, Any, Any], timeout_s: float) -> float:
    """The seconds between a plain timer, which a busy machine delays as well, and the error of a call's deadline."""
    rang_at = math.inf

    def ring() -> None:
        nonlocal rang_at
        rang_at = time.perf_counter()

    began = time.perf_counter()
    timer = asyncio.get_running_loop().call_later(timeout_s, ring)
    with pytest.raises(tfr.CallTimeoutError):
        await call
    told_at = time.perf_counter()
    timer.cancel()
    assert told_at - began > timeout_s - 0.01
    return max(told_at - rang_at, 0.0)


async def check_is_prompt(call: Callable[[str], Coroutine[Any, Any, Any]], fresh: Fresh, timeout_s: float) -> None:
    """Check that the errors of calls of several clients come as promised, by the median: in one of three rounds.

    A worker that has no core for a while, as the machine is busy, is late in a whole round.
    """
    for _ in range(3):
        overruns = [await overrun_s(call(one), timeout_s) for one in fresh.apart(TRIES)]
        if statistics.median(overruns) < PROMPT_S:
            return
    raise AssertionError(overruns)


@pytest.mark.parametrize("method", ["hold", "hold_async"])
async def test_timeout_s_is_raised_within_50_ms(
    proxy: tfr.LearnerProxy, fresh: Fresh, latch: Latch, method: str
) -> None:
    await proxy.clients().call("same", 1)
    hasty = proxy.options(timeout_s=0.2)
    await check_is_prompt(lambda one: hasty.custom_method(one, method, latch.path), fresh, 0.2)


@pytest.fixture
def load(latch: Latch) -> Iterator[None]:
    """Threads of the driver that compute all the time, with the interpreter's lock, until the latch opens."""

    def compute() -> None:
        while not Path(latch.path).exists():
            sum(range(10_000))

    threads = [threading.Thread(target=compute) for _ in range(3)]
    for thread in threads:
        thread.start()
    yield
    latch.open()
    for thread in threads:
        thread.join()


@pytest.mark.usefixtures("load")
async def test_deadlines_are_told_in_time_while_driver_and_host_are_busy(
    proxy: tfr.LearnerProxy, fresh: Fresh, latch: Latch, seen: Seen
) -> None:
    """A method computes all the time: its own deadline, those of calls behind it, and of async ones beside it."""
    busy, queued, beside = fresh.together(3)
    await proxy.clients([busy, queued, beside]).call("same", 1)
    waiting = asyncio.create_task(proxy.custom_method(beside, "hold_async", latch.path))
    await seen.reported(beside)
    computing = asyncio.create_task(proxy.options(timeout_s=60).custom_method(busy, "compute", latch.path))
    await seen.reported(busy)
    for one in (busy, queued, beside):
        for method in ("same", "echo_async"):
            call = proxy.options(timeout_s=0.2).custom_method(one, method, 1)
            assert await overrun_s(call, 0.2) < FAIR_S
    assert not computing.done()
    assert not waiting.done()
    computing.cancel()
    latch.open()
    assert await waiting == "released"
    assert await proxy.custom_method(queued, "what_happened") == []
    with pytest.raises(asyncio.CancelledError):
        await computing


async def test_a_timeout_is_a_builtin_timeout_error_that_names_the_call(
    proxy: tfr.LearnerProxy, one: str, latch: Latch
) -> None:
    with pytest.raises(TimeoutError, match=rf"{one}\.hold on (local|worker\d).*timeout_s=0\.05") as caught:
        await proxy.options(timeout_s=0.05).custom_method(one, "hold", latch.path)
    assert isinstance(caught.value, tfr.TorchFedRpcError)


async def test_a_learners_own_timeout_error_is_not_taken_for_a_deadline(proxy: tfr.LearnerProxy, one: str) -> None:
    with pytest.raises(TimeoutError, match="the learner's own") as caught:
        await proxy.options(timeout_s=30).custom_method(one, "fail", "timeout")
    assert type(caught.value) is TimeoutError


async def test_timeout_s_covers_the_queue_and_a_queued_call_never_starts(
    proxy: tfr.LearnerProxy, one: str, latch: Latch, seen: Seen
) -> None:
    held = asyncio.create_task(proxy.custom_method(one, "hold", latch.path))
    await seen.reported(one)
    with pytest.raises(tfr.CallTimeoutError):
        await proxy.options(timeout_s=0.05).custom_method(one, "append", "late")
    with pytest.raises(tfr.CallTimeoutError):  # by the end of this one, word of the first has come
        await proxy.options(timeout_s=0.3).custom_method(one, "same", "late")
    assert not held.done()
    latch.open()
    assert await held == "released"
    assert await proxy.custom_method(one, "append", "next") == 3
    assert await proxy.custom_method(one, "what_happened") == ["hold begins", "hold released", "next"]


async def test_timeout_s_covers_the_wait_for_another_learners_sync_method(
    proxy: tfr.LearnerProxy, fresh: Fresh, latch: Latch, seen: Seen
) -> None:
    busy, waiting = fresh.together(2)
    held = asyncio.create_task(proxy.custom_method(busy, "hold", latch.path))
    await seen.reported(busy)
    for method in ("append", "append_async"):
        with pytest.raises(tfr.CallTimeoutError):
            await proxy.options(timeout_s=0.05).custom_method(waiting, method, "late")
    with pytest.raises(tfr.CallTimeoutError):  # by the end of this one, word of the others has come
        await proxy.options(timeout_s=0.3).custom_method(waiting, "same", "late")
    latch.open()
    await held
    assert await proxy.custom_method(waiting, "what_happened") == []


async def test_a_running_async_method_is_cancelled_and_the_next_call_runs(
    proxy: tfr.LearnerProxy, one: str, latch: Latch
) -> None:
    with pytest.raises(tfr.CallTimeoutError):
        await proxy.options(timeout_s=0.1).custom_method(one, "hold_async", latch.path)
    assert await proxy.custom_method(one, "what_happened") == ["hold begins", ("hold cancelled", True)]


async def test_a_running_sync_method_sees_cancelled_and_the_next_call_waits_for_its_end(
    proxy: tfr.LearnerProxy, one: str, latch: Latch
) -> None:
    with pytest.raises(tfr.CallTimeoutError):
        await proxy.options(timeout_s=0.1).custom_method(one, "hold", latch.path)
    assert await proxy.custom_method(one, "what_happened") == ["hold begins", "hold saw cancelled"]


@pytest.mark.parametrize("method", ["hold_regardless", "hold_stubbornly"])
async def test_the_next_call_waits_for_the_end_of_a_method_that_goes_on_regardless(
    proxy: tfr.LearnerProxy, one: str, latch: Latch, method: str
) -> None:
    with pytest.raises(tfr.CallTimeoutError):
        await proxy.options(timeout_s=0.1).custom_method(one, method, latch.path)
    following = asyncio.create_task(proxy.custom_method(one, "what_happened"))
    with pytest.raises(tfr.CallTimeoutError):  # behind the first, so it waits too, and gives up
        await proxy.options(timeout_s=0.1).custom_method(one, "same", 1)
    assert not following.done()
    latch.open()
    expected = [("hold ends", True)] if method == "hold_regardless" else ["cancel ignored"]
    assert (await following)[-1:] == expected


@pytest.mark.parametrize("method", ["hold", "hold_async"])
async def test_cancelling_the_task_does_the_same(
    proxy: tfr.LearnerProxy, one: str, latch: Latch, seen: Seen, method: str
) -> None:
    running = asyncio.create_task(proxy.custom_method(one, method, latch.path))
    queued = asyncio.create_task(proxy.custom_method(one, "append", "queued"))
    kept = asyncio.create_task(proxy.custom_method(one, "append", "kept"))
    await seen.reported(one)
    for task in (queued, running):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await kept
    ending = "hold saw cancelled" if method == "hold" else ("hold cancelled", True)
    assert await proxy.custom_method(one, "what_happened") == ["hold begins", ending, "kept"]


async def test_wait_for_and_asyncio_timeout_cancel_too(
    proxy: tfr.LearnerProxy, one: str, latch: Latch, seen: Seen
) -> None:
    call = asyncio.create_task(proxy.custom_method(one, "hold", latch.path))
    await seen.reported(one)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(call, 0.05)
    call = asyncio.create_task(proxy.custom_method(one, "hold_async", latch.path))
    await seen.reported(one, 2)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await call
    assert len(await proxy.custom_method(one, "what_happened")) == 4


async def test_a_cancelled_calls_event_says_so(proxy: tfr.LearnerProxy, one: str, latch: Latch, seen: Seen) -> None:
    task = asyncio.create_task(proxy.custom_method(one, "hold", latch.path))
    await seen.reported(one)
    task.cancel()
    await asyncio.wait([task])
    ended = [event for event in seen.events if isinstance(event, CallEnded)]
    assert [type(event.error) for event in ended] == [asyncio.CancelledError]
    assert await proxy.custom_method(one, "same", 1) == 1


async def test_an_async_call_cancelled_before_its_first_step_frees_its_learner(
    proxy: tfr.LearnerProxy, fresh: Fresh, latch: Latch
) -> None:
    packing, cancelled = fresh.together(2)
    slow = asyncio.create_task(proxy.custom_method(packing, "slow_to_pack_async", latch.path))
    async with asyncio.timeout(20):
        while not Path(latch.path + ".packing").exists():
            await asyncio.sleep(0.001)
    # Where that keeps the thread of async methods busy, the next one cannot take its first step.
    with pytest.raises(tfr.CallTimeoutError):
        await proxy.options(timeout_s=0.1).custom_method(cancelled, "append_async", 1)
    latch.open()
    await slow
    assert await proxy.options(timeout_s=20).custom_method(cancelled, "same", 1) == 1


async def test_calls_cancelled_at_any_moment_leave_no_learner_stuck(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    ids, chance = fresh.apart(6), random.Random(1)
    methods = ["append", "append_async", "echo_async", "nap_async"]
    for _ in range(40):
        tasks = []
        for one in ids:
            method = chance.choice(methods)
            argument = 0.001 if method == "nap_async" else 1
            tasks.append(asyncio.create_task(proxy.custom_method(one, method, argument)))
        await asyncio.sleep(chance.choice([0, 0, 0.0005, 0.002]))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    async with asyncio.timeout(30):
        assert await asyncio.gather(*(proxy.custom_method(one, "same", 1) for one in ids)) == [1] * 6
    assert proxy.stats()["pending_calls"] == 0


async def test_streams_cancelled_at_any_moment_leave_no_learner_stuck(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    ids, chance = fresh.apart(6), random.Random(2)

    async def read(one: str, method: str) -> None:
        async for _ in proxy.stream(one, method, 50):
            pass

    for _ in range(20):
        tasks = [asyncio.create_task(read(one, chance.choice(["count", "count_async"]))) for one in ids]
        await asyncio.sleep(chance.choice([0, 0, 0.0005, 0.002, 0.01]))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    async with asyncio.timeout(30):
        logs = await asyncio.gather(*(proxy.custom_method(one, "what_happened") for one in ids))
    for log in logs:
        assert log.count("closed") >= log.count(0)  # whatever began was closed
        assert log[-1:] in ([], ["closed"])
