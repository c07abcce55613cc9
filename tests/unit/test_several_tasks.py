"""Several tasks at once: in the background, all or none, all to their end."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest
from settling import settled

from torchfedrpc.tasks import all_ended, all_of, begin

TIMEOUT_S = 20.0


class Socket:
    """An object that a step holds as it fails."""


async def test_error_of_all_of_keeps_nothing_that_its_steps_held() -> None:
    held: list[weakref.ref[Socket]] = []

    async def fail() -> None:
        socket = Socket()
        held.append(weakref.ref(socket))
        await asyncio.sleep(0)
        raise ValueError("lost")

    gc.disable()  # it would free a reference cycle at some time
    try:
        with pytest.raises(ValueError, match="lost"):
            await all_of(fail(), asyncio.sleep(0))
        await asyncio.sleep(0)
        assert held[0]() is None
    finally:
        gc.enable()


async def test_all_of_returns_the_results_in_order() -> None:
    assert await all_of(asyncio.sleep(0.01, "first"), asyncio.sleep(0, "second")) == ["first", "second"]
    assert await all_of() == []


async def test_all_of_cancels_the_others_and_raises_the_first_error() -> None:
    ended = []

    async def fail() -> None:
        raise ValueError("lost")

    async def go_on() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("the other")

    with pytest.raises(ValueError, match="lost"):
        await all_of(go_on(), fail())
    assert ended == ["the other"]


async def failing(error: Exception, release: asyncio.Event) -> None:
    await release.wait()
    raise error


async def test_failure_is_raised_when_all_have_ended() -> None:
    first, second, third = asyncio.Event(), asyncio.Event(), asyncio.Event()
    tasks = [
        asyncio.ensure_future(failing(ValueError("first"), first)),
        asyncio.ensure_future(failing(ValueError("second"), second)),
        asyncio.ensure_future(third.wait()),
    ]
    ended = asyncio.ensure_future(all_ended(tasks))
    second.set()
    await settled()
    first.set()
    await settled()
    assert not ended.done()
    third.set()
    with pytest.raises(ValueError, match="first"):
        await asyncio.wait_for(ended, TIMEOUT_S)


async def test_tasks_are_cancelled_with_their_caller() -> None:
    release = asyncio.Event()
    tasks = [asyncio.ensure_future(failing(ValueError(""), release)) for _ in range(2)]
    ended = asyncio.ensure_future(all_ended(tasks))
    await settled()
    ended.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ended
    await settled()
    assert all(task.cancelled() for task in tasks)


async def test_nothing_to_wait_for_has_ended() -> None:
    await asyncio.wait_for(all_ended([]), TIMEOUT_S)


async def test_a_coroutine_that_is_begun_runs_to_its_first_wait_at_once() -> None:
    log: list[str] = []
    release = asyncio.get_running_loop().create_future()

    async def work() -> int:
        log.append("begun")
        log.append(await release)
        await asyncio.sleep(0)
        return 3

    future = begin(work())
    assert log == ["begun"]
    release.set_result("released")  # before the task runs
    assert await future == 3
    assert log == ["begun", "released"]


async def test_a_coroutine_that_waits_for_nothing_has_ended_as_it_is_begun() -> None:
    async def work() -> int:
        return 3

    async def fail() -> None:
        raise ValueError("on purpose")

    assert begin(work()).result() == 3
    with pytest.raises(ValueError, match="on purpose"):
        await begin(fail())


@pytest.mark.parametrize("num_steps", [0, 1])
async def test_a_coroutine_that_was_begun_is_cancelled_where_it_waits(num_steps: int) -> None:
    log: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            log.append("ended")

    future = begin(work())
    for _ in range(num_steps):
        await asyncio.sleep(0)
    future.cancel()
    with pytest.raises(asyncio.CancelledError):
        await future
    assert log == ["ended"]
