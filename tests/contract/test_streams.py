"""Streams: one step for each item asked for, and nothing that outlives its reader."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from typing import Any

import pytest
import torch
from conftest import Fresh, Latch, Seen

import torchfedrpc as tfr

KINDS = ["count", "count_async"]


@pytest.mark.parametrize("method", KINDS)
async def test_a_stream_yields_what_the_generator_yields(proxy: tfr.LearnerProxy, one: str, method: str) -> None:
    assert [item async for item in proxy.stream(one, method, 5)] == [0, 1, 2, 3, 4]
    assert [item async for item in proxy.stream(one, method, stop=0)] == []
    assert (await proxy.custom_method(one, "what_happened")).count("closed") == 2


@pytest.mark.parametrize("method", KINDS)
async def test_a_stream_makes_one_step_for_each_item_and_none_ahead(
    proxy: tfr.LearnerProxy, fresh: Fresh, method: str, seen: Seen
) -> None:
    one, neighbour = fresh.together(2)
    stream = proxy.stream(one, method, 5)
    assert [await anext(stream) for _ in range(2)] == [0, 1]
    await proxy.custom_method(neighbour, "append_async", 1)  # whatever ran ahead would have come before this
    await proxy.custom_method(neighbour, "append", 1)
    await stream.aclose()
    assert await proxy.custom_method(one, "what_happened") == [0, 1, "closed"]


async def test_nothing_is_sent_before_the_first_item_is_asked_for(proxy: tfr.LearnerProxy, one: str) -> None:
    stream = proxy.stream(one, "draw_stream", 1)
    assert await proxy.custom_method(one, "append", 1) == 1  # so the learner is free
    assert len([item async for item in stream]) == 1


@pytest.mark.parametrize("method", KINDS)
async def test_leaving_the_loop_early_closes_the_generator(
    proxy: tfr.LearnerProxy, fresh: Fresh, method: str
) -> None:
    one, other = fresh.apart(2)
    async for item in proxy.stream(one, method, 5):
        if item == 2:
            break
    assert await proxy.custom_method(one, "what_happened") == [0, 1, 2, "closed"]
    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        async for _ in proxy.stream(other, method, 5):
            _ = 1 / 0
    assert await proxy.custom_method(other, "what_happened") == [0, "closed"]


@pytest.mark.parametrize("method", KINDS)
async def test_a_stream_held_in_a_variable_is_closed_by_aclose(
    proxy: tfr.LearnerProxy, one: str, method: str
) -> None:
    async with contextlib.aclosing(proxy.stream(one, method, 5)) as stream:
        async for _ in stream:
            break
    assert await proxy.custom_method(one, "what_happened") == [0, "closed"]
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    await stream.aclose()


async def test_a_stream_that_is_dropped_is_closed(proxy: tfr.LearnerProxy, one: str) -> None:
    stream: Any = proxy.stream(one, "count", 5)
    await anext(stream)
    del stream
    gc.collect()
    assert await proxy.options(timeout_s=20).custom_method(one, "what_happened") == [0, "closed"]


async def test_a_stream_never_begun_holds_nothing(proxy: tfr.LearnerProxy, one: str) -> None:
    stream = proxy.stream(one, "count", 5)
    await stream.aclose()
    assert await proxy.custom_method(one, "what_happened") == []
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_an_open_stream_holds_its_learner_and_not_its_host(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    one, neighbour = fresh.together(2)
    opened = asyncio.Event()

    async def call_later() -> None:
        await opened.wait()
        await proxy.custom_method(one, "append", "later")

    waiting = asyncio.create_task(call_later())
    stream = proxy.stream(one, "count", 5)
    await anext(stream)
    opened.set()
    assert await proxy.custom_method(neighbour, "append", 1) == 1
    assert await proxy.custom_method(neighbour, "append_async", 1) == 3
    assert not waiting.done()
    await stream.aclose()
    await waiting
    assert await proxy.custom_method(one, "what_happened") == [0, "closed", "later"]


async def _handle(proxy: tfr.LearnerProxy, one: str) -> None:
    await proxy.client(one).echo()


async def _gathered(proxy: tfr.LearnerProxy, one: str) -> None:
    await asyncio.gather(proxy.evaluate(one), proxy.train_epoch(one))


async def _group(proxy: tfr.LearnerProxy, one: str) -> None:
    try:
        await proxy.clients([one]).call("echo")
    except tfr.GroupCallError as error:
        raise error.exceptions[0] from None


async def _as_completed(proxy: tfr.LearnerProxy, one: str) -> None:
    async for _ in proxy.clients([one]).as_completed("echo"):
        pass


async def _second_stream(proxy: tfr.LearnerProxy, one: str) -> None:
    async for _ in proxy.stream(one, "count", 1):
        pass


async def _usual(proxy: tfr.LearnerProxy, one: str) -> None:
    await proxy.get_model_weights(one)


CALLS = [_usual, _handle, _gathered, _group, _as_completed, _second_stream]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__.strip("_"))
async def test_a_call_that_would_wait_for_its_own_reader_raises_at_once(
    proxy: tfr.LearnerProxy, one: str, call: Any
) -> None:
    async with asyncio.timeout(20):
        async for item in proxy.stream(one, "count", 3):
            if item == 1:
                with pytest.raises(tfr.LearnerBusyError, match=f"{one}.*stream"):
                    await call(proxy, one)
    await call(proxy, one)  # the loop is over


async def test_the_reader_may_call_other_learners_and_the_same_after_closing(
    proxy: tfr.LearnerProxy, fresh: Fresh
) -> None:
    one, other = fresh.together(2)
    async for item in proxy.stream(one, "count", 3):
        assert await proxy.custom_method(other, "append", item) == item + 1
    stream = proxy.stream(one, "count", 3)
    await anext(stream)
    await stream.aclose()
    assert await proxy.custom_method(one, "same", 1) == 1


@pytest.mark.parametrize("method", ["count_then_fail", "count_then_fail_async"])
async def test_an_error_in_mid_stream_is_raised_at_its_turn(proxy: tfr.LearnerProxy, one: str, method: str) -> None:
    items = []
    with pytest.raises(ValueError, match="after the last item") as caught:  # noqa: PT012
        async for item in proxy.stream(one, method, 2):
            items.append(item)
    assert items == [0, 1]
    assert any(one in note for note in caught.value.__notes__)
    assert await proxy.custom_method(one, "same", 1) == 1


async def test_an_item_that_cannot_be_sent_ends_the_stream(proxy: tfr.LearnerProxy, one: str) -> None:
    items = []
    with pytest.raises(tfr.SerializationError, match=rf"{one}\.stream_unsendable"):  # noqa: PT012
        async for item in proxy.stream(one, "stream_unsendable"):
            items.append(item)
    assert items == [1]
    assert await proxy.custom_method(one, "what_happened") == ["closed"]


async def test_items_are_taken_by_value(proxy: tfr.LearnerProxy, one: str) -> None:
    items = []
    async for item in proxy.stream(one, "stream_live"):
        items.append(item)
    assert [item.tolist() for item in items] == [[0, 0], [1, 1], [2, 2]]


async def test_arguments_of_a_stream_are_taken_when_it_is_opened(proxy: tfr.LearnerProxy, one: str) -> None:
    argument = [1, 2]
    stream = proxy.stream(one, "each_of", argument)
    argument.append(3)
    assert [item async for item in stream] == [1, 2]


@pytest.mark.parametrize("methods", [("count", "count"), ("count", "count_async"), ("count_async", "count_async")])
@pytest.mark.parametrize("place", ["together", "apart"])
async def test_streams_of_two_learners_interleave(
    proxy: tfr.LearnerProxy, fresh: Fresh, methods: tuple[str, str], place: str
) -> None:
    ids = getattr(fresh, place)(2)
    streams = [proxy.stream(one, method, 4) for one, method in zip(ids, methods, strict=True)]
    async with asyncio.timeout(30):
        for number in range(4):
            assert [await anext(stream) for stream in streams] == [number, number]
        for stream in streams:
            with pytest.raises(StopAsyncIteration):
                await anext(stream)


async def test_many_streams_at_once_all_end(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    async def read(one: str, method: str) -> list[int]:
        return [item async for item in proxy.stream(one, method, 10)]

    ids = fresh.apart(10)
    results = await asyncio.gather(*(read(one, KINDS[number % 2]) for number, one in enumerate(ids)))
    assert results == [list(range(10))] * 10


@pytest.mark.parametrize("method", ["echo", "echo_async", "number", "_private", "no_such"])
async def test_a_method_that_is_no_generator_cannot_be_streamed(
    proxy: tfr.LearnerProxy, one: str, method: str
) -> None:
    with pytest.raises(tfr.MethodNotFoundError, match=one):  # noqa: PT012
        async for _ in proxy.stream(one, method):
            pytest.fail("nothing is yielded")
    assert await proxy.custom_method(one, "same", 1) == 1


@pytest.mark.parametrize("method", ["stream_with_hold", "stream_with_hold_async"])
async def test_a_step_past_timeout_s_ends_the_stream_and_frees_the_learner(
    proxy: tfr.LearnerProxy, one: str, method: str, latch: Latch
) -> None:
    stream = proxy.options(timeout_s=0.2).stream(one, method, latch.path)
    assert await anext(stream) == "first"
    with pytest.raises(tfr.CallTimeoutError):
        await anext(stream)
    log = await proxy.options(timeout_s=20).custom_method(one, "what_happened")
    assert log[-1] == "closed"
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


@pytest.mark.parametrize("method", ["stream_with_hold", "stream_with_hold_async"])
async def test_cancelling_the_reader_in_mid_step_closes_the_generator(
    proxy: tfr.LearnerProxy, one: str, method: str, latch: Latch, seen: Seen
) -> None:
    async def read() -> None:
        async for _ in proxy.stream(one, method, latch.path):
            pass

    reader = asyncio.create_task(read())
    await seen.reported(one)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    log = await proxy.options(timeout_s=20).custom_method(one, "what_happened")
    assert log[-1] == "closed"


async def test_two_readers_of_one_stream_at_once_are_told(proxy: tfr.LearnerProxy, one: str, latch: Latch) -> None:
    stream = proxy.stream(one, "stream_with_hold", latch.path)
    assert await anext(stream) == "first"
    reading = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match=r"already|busy"):
        await anext(stream)
    latch.open()
    assert await reading == "released"


async def test_a_stream_behind_other_calls_waits_for_its_turn(
    proxy: tfr.LearnerProxy, one: str, latch: Latch, seen: Seen
) -> None:
    held = asyncio.create_task(proxy.custom_method(one, "hold", latch.path))
    await seen.reported(one)
    reading = asyncio.ensure_future(anext(proxy.stream(one, "count", 2)))
    behind = asyncio.create_task(proxy.custom_method(one, "append", "behind"))
    await asyncio.sleep(0)
    latch.open()
    assert await held == "released"
    assert await reading == 0
    await behind
    log = await proxy.custom_method(one, "what_happened")
    assert log == ["hold begins", "hold released", 0, "closed", "behind"]


async def test_a_stream_runs_behind_a_call_with_a_large_argument_of_the_same_tick(
    proxy: tfr.LearnerProxy, one: str
) -> None:
    call = asyncio.ensure_future(proxy.custom_method(one, "append", bytes(20_000)))
    async with contextlib.aclosing(proxy.stream(one, "count", 3)) as items:
        step = asyncio.ensure_future(anext(items))
        async with asyncio.timeout(20):
            assert await call == 1
            assert await step == 0
    assert await proxy.custom_method(one, "what_happened") == [bytes(20_000), 0, "closed"]


# Values that are sent into a stream.

TALKS = ["talk", "talk_async"]


@pytest.mark.parametrize("method", TALKS)
async def test_a_sent_value_is_the_result_of_the_yield_that_waits(
    proxy: tfr.LearnerProxy, one: str, method: str
) -> None:
    stream = proxy.stream(one, method, 10)
    assert await stream.asend(None) == 10
    assert await stream.asend(5) == 15
    assert await anext(stream) == 15
    assert await stream.asend(torch.tensor(2)) == 17
    with pytest.raises(StopAsyncIteration):
        await stream.asend("end")
    assert await proxy.custom_method(one, "what_happened") == [5, None, torch.tensor(2), "end", "closed"]


@pytest.mark.parametrize("method", TALKS)
async def test_sent_values_are_taken_by_value(proxy: tfr.LearnerProxy, one: str, method: str) -> None:
    stream = proxy.stream(one, method, torch.zeros(2))
    await anext(stream)
    sent = torch.ones(2)
    step = asyncio.ensure_future(stream.asend(sent))
    assert torch.equal(await step, torch.ones(2))
    sent += 5
    assert torch.equal(await anext(stream), torch.ones(2))
    await stream.aclose()


async def test_a_stream_that_begins_with_a_value_is_refused_and_can_go_on(proxy: tfr.LearnerProxy, one: str) -> None:
    stream = proxy.stream(one, "talk", 1)
    with pytest.raises(TypeError, match=rf"{one}\.talk begins with None"):
        await stream.asend(2)
    assert await proxy.custom_method(one, "append", 1) == 1  # the learner is free
    assert await anext(stream) == 1
    await stream.aclose()


@pytest.mark.parametrize("method", TALKS)
async def test_a_value_that_cannot_be_sent_closes_the_stream(proxy: tfr.LearnerProxy, one: str, method: str) -> None:
    stream = proxy.stream(one, method, 1)
    await anext(stream)
    with pytest.raises(tfr.SerializationError, match=rf"sent to {one}\.{method} cannot be sent"):
        await stream.asend(lambda: None)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert await proxy.custom_method(one, "what_happened") == ["closed"]


@pytest.mark.parametrize("method", TALKS)
async def test_an_error_that_a_sent_value_raises_arrives_with_its_step(
    proxy: tfr.LearnerProxy, one: str, method: str
) -> None:
    stream = proxy.stream(one, method, 1)
    await anext(stream)
    with pytest.raises(TypeError, match="unsupported operand"):
        await stream.asend([])
    assert (await proxy.custom_method(one, "what_happened"))[-1] == "closed"


async def test_an_iterator_that_takes_no_values_says_so(proxy: tfr.LearnerProxy, one: str) -> None:
    stream = proxy.stream(one, "plain_iterator", [1, 2])
    assert await anext(stream) == 1
    with pytest.raises(TypeError, match="plain_iterator returned a list_iterator, into which no value can be sent"):
        await stream.asend(3)
    assert await proxy.custom_method(one, "append", 1) == 1


@pytest.mark.parametrize("method", TALKS)
async def test_closing_and_a_deadline_end_a_stream_that_was_sent_values(
    proxy: tfr.LearnerProxy, fresh: Fresh, method: str
) -> None:
    one, other = fresh.apart(2)
    stream = proxy.stream(one, method, 1)
    await anext(stream)
    await stream.asend(2)
    await stream.aclose()
    assert await proxy.custom_method(one, "what_happened") == [2, "closed"]
    stream = proxy.options(timeout_s=60).stream(other, method, 1)
    await anext(stream)
    assert await stream.asend(3) == 4
    del stream
    gc.collect()
    assert await proxy.custom_method(other, "what_happened") == [3, "closed"]
