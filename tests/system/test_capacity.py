"""A limit on pending calls: calls beyond it are refused by an error, until others have ended."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Latch, Seen, opened, submitted
from learners import Probe

import torchfedrpc as tfr

LIMIT = 3
CLIENTS = [f"client_{number}" for number in range(8)]


@pytest.fixture(scope="module")
def proxy(runner: asyncio.Runner, lone_runtime: dict[str, Any]) -> Iterator[tfr.LearnerProxy]:
    """In place of the one without a limit."""
    runtime = lone_runtime | {"max_pending_calls": LIMIT}
    with opened(runner, tfr.LearnerProxy(Probe, CLIENTS, runtime=runtime)) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def _nothing_is_pending_in_the_end(proxy: tfr.LearnerProxy) -> Iterator[None]:
    yield
    assert proxy.stats()["pending_calls"] == 0


async def held(proxy: tfr.LearnerProxy, latch: Latch, count: int = LIMIT) -> list[asyncio.Task[Any]]:
    """Calls that are pending until the latch opens."""
    return await submitted(
        proxy, *(proxy.custom_method(client, "hold_async", latch.path) for client in CLIENTS[:count])
    )


async def test_error_of_a_call_beyond_capacity_names_it_and_the_remedy(proxy: tfr.LearnerProxy, latch: Latch) -> None:
    tasks = await held(proxy, latch)
    message = (
        r"^client_7\.same was not sent: 3 calls are pending, and runtime\.max_pending_calls=3 allows no more; raise "
        r"it, or await some calls first$"
    )
    with pytest.raises(tfr.CapacityError, match=message):
        await proxy.custom_method("client_7", "same", 1)
    latch.open()
    assert await asyncio.gather(*tasks) == ["released"] * LIMIT
    assert await proxy.custom_method("client_7", "same", 1) == 1


async def test_a_call_that_is_refused_leaves_no_trace(proxy: tfr.LearnerProxy, latch: Latch, seen: Seen) -> None:
    tasks = await held(proxy, latch)
    before = proxy.stats()["calls"], proxy.stats()["failed_calls"]
    told = len(seen.events)
    with pytest.raises(tfr.CapacityError):
        await proxy.client("client_7").append("refused")
    assert (proxy.stats()["calls"], proxy.stats()["failed_calls"]) == before
    assert not [event for event in seen.events[told:] if getattr(event, "client_id", None) == "client_7"]
    latch.open()
    await asyncio.gather(*tasks)
    assert "refused" not in await proxy.client("client_7").what_happened()


async def test_a_call_that_is_cancelled_makes_room(proxy: tfr.LearnerProxy, latch: Latch) -> None:
    tasks = await held(proxy, latch)
    tasks[0].cancel()
    await asyncio.wait(tasks[:1])
    assert await proxy.custom_method("client_7", "same", 2) == 2
    latch.open()
    await asyncio.gather(*tasks[1:])


async def test_calls_that_fail_make_room(proxy: tfr.LearnerProxy) -> None:
    for _ in range(2 * LIMIT):
        with pytest.raises(ValueError, match="plain"):
            await proxy.custom_method("client_7", "fail", "value")


async def test_a_group_beyond_the_limit_fails_for_the_members_that_are_too_many(proxy: tfr.LearnerProxy) -> None:
    with pytest.raises(tfr.GroupCallError) as caught:
        await proxy.clients().call("same", 1)
    assert caught.value.results == dict.fromkeys(CLIENTS[:LIMIT], 1)
    assert list(caught.value.failures) == CLIENTS[LIMIT:]
    assert all(isinstance(error, tfr.CapacityError) for error in caught.value.failures.values())


async def test_a_reduce_beyond_the_limit_fails_for_the_members_that_are_too_many(proxy: tfr.LearnerProxy) -> None:
    result = await proxy.clients().options(on_error="collect").reduce("same", tfr.Sum(), 1)
    assert (result.value, result.count) == (LIMIT, LIMIT)
    assert len(result.failures) == len(CLIENTS) - LIMIT
    assert all(isinstance(error, tfr.CapacityError) for error in result.failures.values())
    assert proxy.stats()["pending_calls"] == 0


async def test_a_group_within_the_limit_runs(proxy: tfr.LearnerProxy) -> None:
    assert dict(await proxy.clients(CLIENTS[:LIMIT]).call("same", 1)) == dict.fromkeys(CLIENTS[:LIMIT], 1)


async def test_a_stream_counts_while_a_step_of_it_is_pending(proxy: tfr.LearnerProxy, latch: Latch) -> None:
    stream = proxy.stream("client_6", "stream_with_hold_async", latch.path)
    assert await anext(stream) == "first"
    tasks = await held(proxy, latch, LIMIT - 1)  # which leaves room, since the stream is between two steps
    assert await proxy.custom_method("client_7", "same", 1) == 1
    (step,) = await submitted(proxy, anext(stream))
    with pytest.raises(tfr.CapacityError):
        await proxy.custom_method("client_7", "same", 1)
    latch.open()
    assert await step == "released"
    await asyncio.gather(*tasks)
    await stream.aclose()


async def test_a_step_that_is_refused_leaves_its_stream_open(proxy: tfr.LearnerProxy, latch: Latch) -> None:
    stream = proxy.stream("client_6", "count", 2)
    assert await anext(stream) == 0
    tasks = await held(proxy, latch)
    with pytest.raises(tfr.CapacityError, match=r"^client_6\.count was not sent"):
        await anext(stream)
    latch.open()
    await asyncio.gather(*tasks)
    assert [item async for item in stream] == [1]


async def test_a_first_step_that_is_refused_does_not_hold_the_learner(proxy: tfr.LearnerProxy, latch: Latch) -> None:
    tasks = await held(proxy, latch)
    stream = proxy.stream("client_6", "count", 2)
    with pytest.raises(tfr.CapacityError):
        await anext(stream)
    latch.open()
    await asyncio.gather(*tasks)
    assert await proxy.custom_method("client_6", "same", 1) == 1
