"""``call_timeout_s``: the default deadline, which covers the run alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Fresh, Latch, opened
from learners import Probe

import torchfedrpc as tfr

from .test_deadlines import check_is_prompt

LIMIT_S = 0.3


@pytest.fixture(scope="module")
def proxy(runner: asyncio.Runner, runtime: dict[str, Any]) -> Iterator[tfr.LearnerProxy]:
    clients = [f"client_{number}" for number in range(60)]
    hasty = {**runtime, "call_timeout_s": LIMIT_S}
    with opened(runner, tfr.LearnerProxy(Probe, clients, runtime=hasty)) as proxy:
        yield proxy


@pytest.mark.parametrize("method", ["hold", "hold_async"])
async def test_a_method_that_runs_too_long_is_an_error_within_50_ms(
    proxy: tfr.LearnerProxy, fresh: Fresh, latch: Latch, method: str
) -> None:
    await proxy.clients().call("same", 1)
    await check_is_prompt(lambda one: proxy.custom_method(one, method, latch.path), fresh, LIMIT_S)
    one = fresh.one()
    with pytest.raises(tfr.CallTimeoutError, match=rf"{one}\.{method} .*call_timeout_s"):
        await proxy.custom_method(one, method, latch.path)


async def test_the_learner_answers_after_its_method_was_stopped(
    proxy: tfr.LearnerProxy, fresh: Fresh, latch: Latch
) -> None:
    for method, ending in (("hold", "hold saw cancelled"), ("hold_async", ("hold cancelled", True))):
        one = fresh.one()
        with pytest.raises(tfr.CallTimeoutError):
            await proxy.custom_method(one, method, latch.path)
        assert await proxy.custom_method(one, "what_happened") == ["hold begins", ending]


async def test_time_in_the_queue_does_not_count(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    one, other = fresh.together(2)
    calls = [proxy.custom_method(name, "nap", 0.1) for name in (one, other) for _ in range(3)]
    assert await asyncio.gather(*calls) == ["slept"] * 6  # twice the limit together


async def test_timeout_s_takes_the_place_of_the_default(proxy: tfr.LearnerProxy, one: str) -> None:
    assert await proxy.options(timeout_s=30).custom_method(one, "nap", LIMIT_S + 0.1) == "slept"
    assert await proxy.options(timeout_s=30).custom_method(one, "nap_async", LIMIT_S + 0.1) == "slept"


async def test_each_step_of_a_stream_has_so_long(proxy: tfr.LearnerProxy, fresh: Fresh, latch: Latch) -> None:
    for suffix in ("", "_async"):
        one, items = fresh.one(), []
        async for item in proxy.stream(one, "count" + suffix, 4):
            items.append(item)
            await asyncio.sleep(0.1)  # the reader's time does not count: more than the limit together
        assert items == [0, 1, 2, 3]
        stream = proxy.stream(one, "stream_with_hold" + suffix, latch.path)
        assert await anext(stream) == "first"
        with pytest.raises(tfr.CallTimeoutError):
            await anext(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert (await proxy.custom_method(one, "what_happened"))[-1] == "closed"


async def test_a_method_that_goes_on_regardless_holds_its_learner_alone(
    proxy: tfr.LearnerProxy, one: str, latch: Latch
) -> None:
    with pytest.raises(tfr.CallTimeoutError):
        await proxy.custom_method(one, "hold_regardless", latch.path)
    latch.open()
    assert (await proxy.custom_method(one, "what_happened"))[-1] == ("hold ends", True)
