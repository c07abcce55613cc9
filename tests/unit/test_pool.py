"""A pool: how many calls are in flight, in which order results come, and its state."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import pytest

import torchfedrpc as tfr
from torchfedrpc.errors import ConfigError
from torchfedrpc.pool import LearnerPool


class Calls:
    """Calls that end when a test says so."""

    def __init__(self, clients: str = "abcdef") -> None:
        self.waiting = list(clients)
        self.begun: list[str] = []
        self.futures: dict[str, asyncio.Future[Any]] = {}

    def next_client(self) -> tuple[str, Any] | None:
        if not self.waiting:
            return None
        client_id = self.waiting.pop(0)
        self.futures[client_id] = asyncio.get_running_loop().create_future()
        return client_id, self._call(client_id)

    async def _call(self, client_id: str) -> Any:
        self.begun.append(client_id)
        return await self.futures[client_id]


async def asked(pool: LearnerPool) -> asyncio.Future[tuple[str, Any]]:
    """The next result, which is awaited; its calls have begun."""
    waiting = asyncio.ensure_future(anext(pool))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return waiting


async def test_so_many_calls_are_in_flight_and_the_next_begins_after_the_loops_body() -> None:
    calls = Calls()
    pool = LearnerPool(calls.next_client, 2)
    first = await asked(pool)
    assert calls.begun == ["a", "b"]
    calls.futures["b"].set_result("late")
    assert await first == ("b", "late")
    assert pool.in_flight == ["a"]
    assert calls.begun == ["a", "b"]
    second = await asked(pool)
    assert calls.begun == ["a", "b", "c"]
    calls.futures["c"].set_result(3)
    assert await second == ("c", 3)
    await pool.close()
    assert pool.in_flight == []


async def test_results_come_in_the_order_of_the_virtual_clock_whatever_ends_first() -> None:
    calls = Calls("abc")
    seconds = {"a": 5.0, "b": 1.0, "c": 2.0}
    pool = LearnerPool(calls.next_client, 2, lambda client_id, number: seconds[client_id])
    first = asyncio.ensure_future(anext(pool))
    await asyncio.sleep(0)
    calls.futures["a"].set_result(1)  # which is in flight until 5 s
    calls.futures["b"].set_result(2)
    results = [await first]
    after = asyncio.ensure_future(anext(pool))
    await asyncio.sleep(0)
    calls.futures["c"].set_result(3)
    results += [await after, await anext(pool)]
    assert results == [("b", 2), ("c", 3), ("a", 1)]
    assert pool.now_s == 5.0
    with pytest.raises(StopAsyncIteration):
        await anext(pool)


async def test_an_exception_comes_in_its_turn_and_the_pool_goes_on() -> None:
    calls = Calls("ab")
    pool = LearnerPool(calls.next_client, 1)
    first = asyncio.ensure_future(anext(pool))
    await asyncio.sleep(0)
    calls.futures["a"].set_exception(LookupError("a"))
    with pytest.raises(LookupError):
        await first
    assert pool.last_client == "a"
    second = asyncio.ensure_future(anext(pool))
    await asyncio.sleep(0)
    calls.futures["b"].set_result(1)
    assert await second == ("b", 1)


async def test_a_state_has_the_results_in_flight() -> None:
    calls = Calls("abc")
    pool = LearnerPool(calls.next_client, 2, lambda client_id, number: float(number + 1))
    first = asyncio.ensure_future(anext(pool))
    await asyncio.sleep(0)
    calls.futures["a"].set_result(1)
    await first
    settled = asyncio.ensure_future(pool.settle())
    await asyncio.sleep(0)
    assert not settled.done()
    calls.futures["b"].set_result(2)
    await settled
    rest = Calls("c")
    restored = LearnerPool(rest.next_client, 2, lambda client_id, number: float(number + 1))
    restored.load_state_dict(pool.state_dict())
    assert (restored.in_flight, restored.now_s) == (["b"], 1.0)
    assert await anext(restored) == ("b", 2)
    last = asyncio.ensure_future(anext(restored))
    await asyncio.sleep(0)
    rest.futures["c"].set_result(3)
    assert await last == ("c", 3)
    assert restored.now_s == 4.0  # begun as number 2 at 1.0 s, so it takes 3 s
    await pool.close()


@pytest.mark.parametrize("num_in_flight", [0, -1, 1.5, True])
def test_a_pool_of_no_calls_is_refused(num_in_flight: Any) -> None:
    with pytest.raises(ConfigError, match="num_in_flight must be a whole number of at least 1"):
        LearnerPool(lambda: None, num_in_flight)


async def test_a_clock_that_runs_backwards_is_refused() -> None:
    def next_client() -> tuple[str, asyncio.Future[Any]]:
        return "a", asyncio.get_running_loop().create_future()

    pool = LearnerPool(next_client, 1, lambda client_id, number: -1.0)
    with pytest.raises(ConfigError, match=r"duration of a call of a is -1\.0 s"):
        await anext(pool)


class Slow:
    """Learner with calls that wait."""

    def __init__(self, client_id: str) -> None:
        pass

    async def wait(self) -> None:
        await asyncio.Event().wait()


async def test_a_state_has_exceptions_in_flight() -> None:
    calls = Calls("ab")
    pool = LearnerPool(calls.next_client, 2, lambda client_id, number: 1.0)
    waiting = await asked(pool)
    calls.futures["a"].set_result(1)
    assert await waiting == ("a", 1)
    calls.futures["b"].set_exception(LookupError("lost"))
    await pool.settle()
    restored = LearnerPool(lambda: None, 2, lambda client_id, number: 1.0)
    restored.load_state_dict(pool.state_dict())
    for one in (restored, pool):
        with pytest.raises(LookupError, match="lost"):
            await anext(one)
        assert one.last_client == "b"
        with pytest.raises(StopAsyncIteration):
            await anext(one)


async def test_exceptions_may_be_results() -> None:
    calls = Calls("a")
    pool = LearnerPool(calls.next_client, 1, on_error="collect")
    waiting = await asked(pool)
    error = LookupError("lost")
    calls.futures["a"].set_exception(error)
    assert await waiting == ("a", error)
    with pytest.raises(ConfigError, match="on_error is 'raise' or 'collect', not 'ignore'"):
        LearnerPool(calls.next_client, 1, on_error="ignore")  # type: ignore[arg-type]


async def test_a_pool_has_one_loop_at_a_time() -> None:
    calls = Calls("abc")
    pool = LearnerPool(calls.next_client, 2, lambda client_id, number: 1.0)
    first = asyncio.ensure_future(anext(pool))
    await asyncio.sleep(0)
    with pytest.raises(ConfigError, match="another one waits for its next result"):
        await anext(pool)
    await asyncio.sleep(0)
    calls.futures["a"].set_result(1)
    assert await first == ("a", 1)
    await pool.close()


async def test_a_clock_that_fails_begins_no_call() -> None:
    calls = Calls("ab")

    def clock(client_id: str, number: int) -> float:
        return {"b": 1.0}[client_id]

    pool = LearnerPool(calls.next_client, 1, clock)
    with pytest.raises(KeyError):
        await anext(pool)
    waiting = await asked(pool)
    assert calls.begun == ["b"]
    calls.futures["b"].set_result(2)
    assert await waiting == ("b", 2)


async def test_a_pool_with_a_clock_keeps_no_result_that_was_given() -> None:
    calls = Calls("ab")
    pool = LearnerPool(calls.next_client, 1, lambda client_id, number: 1.0)
    waiting = await asked(pool)
    result = Slow("a")
    kept = weakref.ref(result)
    calls.futures.pop("a").set_result(result)
    del result
    await waiting
    del waiting
    await asyncio.sleep(0)  # asyncio has let go of the task
    gc.collect()
    assert kept() is None


async def test_a_state_that_is_loaded_twice_gives_each_result_once() -> None:
    calls = Calls("ab")
    pool = LearnerPool(calls.next_client, 2)
    waiting = await asked(pool)
    calls.futures["a"].set_result(1)
    assert await waiting == ("a", 1)
    calls.futures["b"].set_result(2)
    await pool.settle()
    restored = LearnerPool(lambda: None, 2)
    for _ in range(2):
        restored.load_state_dict(pool.state_dict())
    assert [one async for one in restored] == [("b", 2)]


async def test_a_proxy_keeps_no_pool_that_its_user_has_left() -> None:
    async with tfr.LearnerProxy(Slow, ["a", "b"], runtime="local") as proxy:
        left = weakref.ref(proxy.pool(lambda: None, 1))
        gc.collect()
        assert left() is None


async def test_calls_in_flight_end_with_the_proxy() -> None:
    async with tfr.LearnerProxy(Slow, ["a", "b"], runtime="local") as proxy:
        pool = proxy.pool(lambda: ("a", proxy.client("a").wait()), 1)
        waiting = asyncio.ensure_future(anext(pool))
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await waiting
