"""Sharing where calls wait for room: little may be in the driver's hands at once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Fresh, Latch, opened

import torchfedrpc as tfr

from .test_sharing import NUM_BYTES, SIZE, Sharer


@pytest.fixture(scope="module")
def proxy(runner: asyncio.Runner, runtime: dict[str, Any]) -> Iterator[tfr.LearnerProxy]:
    clients = [f"client_{number}" for number in range(60)]
    runtime = runtime | {"max_inflight_bytes": NUM_BYTES + 50_000}
    with opened(runner, tfr.LearnerProxy(Sharer, clients, runtime=runtime)) as proxy:
        yield proxy


async def test_calls_that_wait_have_the_value_they_find_then(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    ids = fresh.apart(12)
    weights = [torch.full((SIZE,), float(number)) for number in range(3)]
    calls = [proxy.custom_method(one, "sums", weights[number % 3]) for number, one in enumerate(ids)]
    assert await asyncio.gather(*calls) == [[SIZE * float(number % 3)] for number in range(12)]
    assert set(map(tuple, (await proxy.clients(ids).call("sums", weights[2])).values())) == {(2.0 * SIZE,)}
    executor: Any = proxy._router._main
    assert executor._admission.num_bytes == 0


async def test_calls_that_waited_do_not_share_what_was_changed_between_them(
    proxy: tfr.LearnerProxy, fresh: Fresh
) -> None:
    """Those who are woken in one tick may have code of the user's between them, which their turn has woken too."""
    array, version = np.zeros(25_000, dtype=np.float32), 0
    weights = torch.from_numpy(array)

    async def train(one: str) -> None:
        nonlocal version
        for _ in range(5):
            least = version
            (total,) = await proxy.custom_method(one, "sums", weights)
            assert least <= total / 25_000 <= version
            version += 1
            array.fill(version)

    await asyncio.gather(*map(train, fresh.apart(16)))


async def test_a_reference_may_be_released_while_its_call_waits(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    first, second = fresh.apart(2)
    ref, large = await proxy.share(torch.ones(SIZE)), torch.ones(SIZE)
    calls = [
        asyncio.ensure_future(proxy.custom_method(first, "sums", large)),
        asyncio.ensure_future(proxy.custom_method(second, "sums", ref, large[1:])),
    ]
    await asyncio.sleep(0)  # both are submitted
    await ref.release()
    assert await asyncio.gather(*calls) == [[SIZE], [SIZE, SIZE - 1]]


async def test_what_is_shared_is_in_flight_until_the_last_call_that_has_it_is_through(
    proxy: tfr.LearnerProxy, fresh: Fresh, latch: Latch
) -> None:
    quick, slow = fresh.apart(2)
    calls = [asyncio.create_task(proxy.custom_method(slow, "hold_async", latch.path))]
    for number in range(4):
        weights = torch.full((SIZE,), float(number))
        calls += [asyncio.create_task(proxy.custom_method(one, "sums", weights)) for one in (quick, slow)]
        await asyncio.wait(calls[-2:-1], timeout=0.5)
    executor: Any = proxy._router._main
    admitted = executor._admission.num_bytes
    has_waited = [not call.done() for call in calls[3::2]]
    latch.open()
    await asyncio.gather(*calls)
    assert admitted >= NUM_BYTES
    assert has_waited == [True] * 3
