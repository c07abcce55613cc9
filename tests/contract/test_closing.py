"""The end of a proxy: every await ends, and the next proxy is as good as the first."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import pytest
import torch
from conftest import Latch, Seen
from learners import Probe

import torchfedrpc as tfr
from torchfedrpc.events import CallEnded


@pytest.mark.parametrize("method", ["hold", "hold_async", "hold_stubbornly"])
async def test_calls_under_way_and_queued_end_with_the_proxy(
    runtime: dict[str, Any], latch: Latch, method: str
) -> None:
    seen = Seen()
    async with tfr.LearnerProxy(Probe, ["a", "b", "c"], runtime=runtime) as proxy:
        proxy.subscribe(seen)
        calls = [asyncio.create_task(proxy.custom_method(one, method, latch.path)) for one in "ab" for _ in range(3)]
        await seen.reported("a")
    done, pending = await asyncio.wait(calls, timeout=20)
    latch.open()
    assert not pending
    for task in done:
        assert isinstance(task.exception(), tfr.WorkerLostError), task.exception()
        assert "closing" in str(task.exception()) or "lost" in str(task.exception())


async def test_an_open_stream_ends_with_the_proxy(lone_runtime: dict[str, Any]) -> None:
    async with tfr.LearnerProxy(Probe, ["a", "b"], runtime=lone_runtime) as proxy:
        streams = [proxy.stream("a", "count", 5), proxy.stream("b", "count_async", 5)]
        for stream in streams:
            assert await anext(stream) == 0
    for stream in streams:
        for _ in range(2):
            with pytest.raises(tfr.ConfigError, match="the proxy is not open"):
                await anext(stream)


async def test_calls_behind_an_open_stream_end_with_the_proxy(lone_runtime: dict[str, Any]) -> None:
    seen = Seen()
    async with tfr.LearnerProxy(Probe, ["a", "b"], runtime=lone_runtime) as proxy:
        proxy.subscribe(seen)
        stream = proxy.stream("a", "count", 5)
        assert await asyncio.create_task(anext(stream)) == 0  # whose reader is another task
        waiting = [
            asyncio.ensure_future(proxy.custom_method("a", "work")),
            asyncio.ensure_future(proxy.clients().call("work")),
            asyncio.ensure_future(proxy.clients().reduce("work", tfr.Sum())),
            asyncio.ensure_future(proxy.clients().options(timeout_s=60).reduce("work", tfr.Sum())),
            asyncio.ensure_future(anext(proxy.stream("a", "count", 5))),
        ]
        await seen.until(lambda: any(isinstance(event, CallEnded) for event in seen.events))  # that of b
    done, pending = await asyncio.wait(waiting, timeout=20)
    assert not pending
    for task in done:
        error = task.exception()
        assert isinstance(error, tfr.WorkerLostError | tfr.GroupCallError), error
        assert "clos" in str(error)
    await stream.aclose()


@pytest.mark.parametrize("method", ["stream_with_hold", "stream_with_hold_async"])
async def test_a_step_of_a_stream_that_is_under_way_ends_with_the_proxy(
    lone_runtime: dict[str, Any], latch: Latch, method: str
) -> None:
    seen = Seen()
    async with tfr.LearnerProxy(Probe, ["a"], runtime=lone_runtime) as proxy:
        proxy.subscribe(seen)
        stream = proxy.stream("a", method, latch.path)
        assert await anext(stream) == "first"
        step = asyncio.ensure_future(anext(stream))
        await seen.reported("a")
    async with asyncio.timeout(20):
        with pytest.raises(tfr.WorkerLostError, match=r"closing|lost"):
            await step
    latch.open()


async def test_a_method_that_goes_on_regardless_does_not_hold_the_proxy_up_for_ever(
    lone_runtime: dict[str, Any], latch: Latch
) -> None:
    seen = Seen()
    async with asyncio.timeout(30), contextlib.AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(tfr.LearnerProxy(Probe, ["a"], runtime=lone_runtime))
        proxy.subscribe(seen)
        call = asyncio.create_task(proxy.custom_method("a", "hold_regardless", latch.path))
        await seen.reported("a")
        await stack.aclose()
        with pytest.raises(tfr.WorkerLostError):
            await call
    latch.open()


async def test_a_proxy_that_is_cancelled_while_it_opens_can_be_opened_again(
    lone_runtime: dict[str, Any],
) -> None:
    began = time.monotonic()
    async with tfr.LearnerProxy(Probe, ["a"], runtime=lone_runtime):
        takes_s = time.monotonic() - began
    proxy = tfr.LearnerProxy(Probe, ["a"], runtime=lone_runtime)
    for part in (0.0, 0.3, 0.6, 0.9):  # of the way: a time in each of the stages
        opening = asyncio.create_task(proxy.__aenter__())
        await asyncio.sleep(part * takes_s)
        opening.cancel()
        try:
            await opening
        except asyncio.CancelledError:
            pass
        else:
            await proxy.__aexit__(None, None, None)
    async with asyncio.timeout(60), proxy:
        assert await proxy.custom_method("a", "same", 1) == 1


async def test_proxies_one_after_another_open_as_fast_as_the_first(lone_runtime: dict[str, Any]) -> None:
    took_s = []
    for number in range(3):
        began = time.monotonic()
        async with tfr.LearnerProxy(Probe, ["a", "b"], runtime=lone_runtime) as proxy:
            took_s.append(time.monotonic() - began)
            assert await proxy.clients().call("same", number) == {"a": number, "b": number}
    assert min(took_s[1:]) < 2 * took_s[0] + 0.5  # a join or an end that waits for a time-out takes seconds


async def test_a_closed_proxy_has_no_rref(lone_runtime: dict[str, Any], mode: str) -> None:
    async with tfr.LearnerProxy(Probe, ["a"], runtime=lone_runtime) as proxy:
        handle = proxy.client("a")
        held = handle.rref
    with pytest.raises(tfr.ConfigError, match="the proxy is not open: use it inside async with"):
        _ = handle.rref
    async with tfr.LearnerProxy(Probe, ["a"], runtime=lone_runtime) as proxy:
        assert await proxy.client("a").append("a") == 1
        assert (held is None) == (proxy.client("a").rref is None) == (mode == "local")


async def test_statistics_of_a_closed_proxy_keep_the_counts_of_its_session(
    lone_runtime: dict[str, Any], mode: str
) -> None:
    async with tfr.LearnerProxy(Probe, ["a"], runtime=lone_runtime) as proxy:
        await proxy.client("a").same(torch.zeros(10_000))
        before = proxy.stats()
    assert (before["bytes_sent"] > 0) == (mode != "local")
    assert proxy.stats() == {**before, "journal_bytes": 0, "workers": {}}


class Slow:
    """Learner whose method takes a while."""

    def __init__(self, client_id: str) -> None:
        pass

    def wait(self, argument: Any) -> None:
        time.sleep(0.3)


@pytest.mark.parametrize("size", [60, 100_000], ids=["small", "shared"])
async def test_calls_that_wait_for_admission_end_with_the_proxy(lone_runtime: dict[str, Any], size: int) -> None:
    config = {**lone_runtime, "max_inflight_bytes": size + 20}
    async with tfr.LearnerProxy(Slow, ["a", "b", "c"], runtime=config) as proxy:
        calls = [asyncio.create_task(proxy.custom_method(one, "wait", one * size)) for one in "abc"]
        await asyncio.sleep(0)
    results = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 10)
    assert [type(result) for result in results] == [tfr.WorkerLostError] * 3
