"""Random streams: a call draws from its own, whatever runs beside it, and the process's stay as they were."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Fresh, Latch, Seen
from learners import Probe

import torchfedrpc as tfr
from torchfedrpc.config import RuntimeConfig
from torchfedrpc.events import EventBus
from torchfedrpc.executors.base import ExecutorSpec, Invocation
from torchfedrpc.host.spec import LearnerSpec

numpy_random: Any = np.random  # whose stubs lack the functions for bit generators


async def test_calls_clients_and_methods_draw_otherwise(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    first, second = fresh.apart(2)
    drawn = [
        await proxy.custom_method(first, "draw"),
        await proxy.custom_method(first, "draw"),
        await proxy.custom_method(first, "draw_other"),
        await proxy.custom_method(second, "draw"),
        (await proxy.custom_method(first, "drawn_at_birth"))[0],
    ]
    for parts in zip(*drawn, strict=True):
        assert len({repr(part) for part in parts}) == 5


async def test_interleaved_async_methods_draw_as_if_alone(
    proxy: tfr.LearnerProxy, fresh: Fresh, latch: Latch, seen: Seen
) -> None:
    waiting, between = fresh.together(2)
    interrupted = asyncio.create_task(proxy.custom_method(waiting, "draw_after", latch.path))
    await seen.reported(waiting)
    await proxy.custom_method(between, "draw")
    await proxy.custom_method(between, "draw_async", 3)
    await proxy.custom_method(between, "seed_globally")
    latch.open()
    first, second = await interrupted
    assert (first, second) == await _draw_alone(waiting, latch.path)
    assert first != second


async def _draw_alone(client_id: str, path: str) -> Any:
    """The same call of the same client, beside no other call."""
    spec, _ = LearnerSpec.of(Probe, 11, RuntimeConfig())
    host = ExecutorSpec(spec, {client_id: {}}, EventBus()).make_host()
    try:
        return await host.execute_method(client_id, "draw_after", path)
    finally:
        assert host.close()


async def _streams_alone(client_id: str) -> list[list[Any]]:
    """The items of both streams of the same client, beside no other call."""
    spec, _ = LearnerSpec.of(Probe, 11, RuntimeConfig())
    executor = tfr.LocalExecutor(RuntimeConfig())
    await executor.open(ExecutorSpec(spec, {client_id: {}}, EventBus()))
    try:
        streams = []
        for number, method in enumerate(("draw_stream", "draw_async_stream")):
            stream = executor.stream(Invocation(number, client_id, method, (3,), {}, None))
            streams.append([await stream.step() for _ in range(3)])
            with pytest.raises(StopAsyncIteration):
                await stream.step()
        return streams
    finally:
        await executor.close()


async def test_a_stream_draws_as_if_alone(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    streaming, between = fresh.together(2)
    items = []
    async for item in proxy.stream(streaming, "draw_stream", 3):
        items.append(item)
        await proxy.custom_method(between, "draw")
        await proxy.custom_method(between, "seed_globally")
    again = []
    async for item in proxy.stream(streaming, "draw_async_stream", 3):
        again.append(item)
        await proxy.custom_method(between, "draw_async", 2)
    assert len({repr(item) for item in [*items, *again]}) == 6
    # The number of a call counts for its method alone, and so these are the first of each.
    assert [items, again] == await _streams_alone(streaming)


def _process_draws() -> tuple[Any, ...]:
    return (
        torch.rand(3).tolist(),
        np.random.rand(3).tolist(),
        np.random.standard_normal(),
        random.random(),
        random.gauss(0, 1),
    )


def _seed_process() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    random.gauss(0, 1)  # keeps the second of a pair
    np.random.standard_normal()  # so does numpy


@pytest.mark.parametrize(
    "method",
    ["draw", "draw_async", "draw_from_generator", "seed_globally", "drawn_at_birth", "fail", "shared_object"],
)
async def test_the_processs_own_streams_are_as_they_were(proxy: tfr.LearnerProxy, one: str, method: str) -> None:
    arguments = {"draw_async": (2,), "fail": ("value",), "shared_object": (one,)}.get(method, ())
    _seed_process()
    expected = _process_draws()
    _seed_process()
    try:
        await proxy.custom_method(one, method, *arguments)
    except ValueError:
        assert method == "fail"
    assert _process_draws() == expected


async def test_the_processs_own_streams_are_as_they_were_after_a_stream(proxy: tfr.LearnerProxy, one: str) -> None:
    _seed_process()
    expected = _process_draws()
    _seed_process()
    [item async for item in proxy.stream(one, "draw_stream", 2)]
    async for _ in proxy.stream(one, "draw_async_stream", 2):
        break
    assert await proxy.custom_method(one, "same", 1) == 1
    assert _process_draws() == expected


async def test_the_processs_own_numpy_generator_is_the_same_object(proxy: tfr.LearnerProxy, one: str) -> None:
    before = numpy_random.get_bit_generator()
    await proxy.custom_method(one, "draw")
    assert numpy_random.get_bit_generator() is before


async def test_random_augmentation_does_not_repeat_from_call_to_call(proxy: tfr.LearnerProxy, one: str) -> None:
    drawn = [repr(await proxy.custom_method(one, "draw")) for _ in range(10)]
    assert len(set(drawn)) == 10


async def test_grad_mode_left_off_by_a_learner_does_not_reach_another(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    careless, other = fresh.together(2)
    await proxy.custom_method(careless, "leave_grad_off")
    assert await proxy.custom_method(other, "grad_enabled")
    assert await proxy.custom_method(careless, "grad_enabled")


async def test_grad_mode_off_in_a_waiting_async_method_does_not_reach_another(
    proxy: tfr.LearnerProxy, fresh: Fresh, latch: Latch, seen: Seen
) -> None:
    waiting, other = fresh.together(2)
    held = asyncio.create_task(proxy.custom_method(waiting, "no_grad_while_waiting", latch.path))
    await seen.reported(waiting)
    assert await proxy.custom_method(other, "grad_enabled_async")
    latch.open()
    assert await held is False


async def test_torch_threads_hold_where_learners_run(proxy: tfr.LearnerProxy, one: str) -> None:
    assert await proxy.custom_method(one, "num_threads") == 1
    assert torch.get_num_threads() == 1
