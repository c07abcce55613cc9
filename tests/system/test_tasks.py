"""Tasks and callbacks of async methods: they have the random streams, the turn and the scope of their call."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import opened
from tasking import PARTS, Tasking

import torchfedrpc as tfr
from torchfedrpc.config import RuntimeConfig
from torchfedrpc.events import EventBus
from torchfedrpc.executors.base import ExecutorSpec
from torchfedrpc.host.learner_host import LearnerHost
from torchfedrpc.host.spec import LearnerSpec

SEED = 5
NUM_CLIENTS = 200


@pytest.fixture(scope="module")
def proxy(runner: asyncio.Runner, runtime: dict[str, Any]) -> Iterator[tfr.LearnerProxy]:
    clients = [f"client_{number}" for number in range(NUM_CLIENTS)]
    with opened(runner, tfr.LearnerProxy(Tasking, clients, runtime=runtime, seed=SEED)) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def clients(proxy: tfr.LearnerProxy) -> Iterator[str]:
    """Those of one process, where there are two."""
    return iter(proxy.client_ids)


async def alone(client_id: str, work: Callable[[LearnerHost], Awaitable[Any]]) -> Any:
    """What a client draws where nothing else runs."""
    spec, _ = LearnerSpec.of(Tasking, SEED, RuntimeConfig())
    host = ExecutorSpec(spec, {client_id: {}}, EventBus()).make_host()
    try:
        return await work(host)
    finally:
        assert await asyncio.to_thread(host.close)


def driver_state() -> list[Any]:
    return [torch.get_rng_state().tolist(), repr(np.random.get_state(legacy=False)), random.getstate()]


@pytest.mark.parametrize("part", PARTS)
async def test_tasks_draw_from_the_streams_of_their_call_alone(
    proxy: tfr.LearnerProxy, clients: Iterator[str], part: str
) -> None:
    if part == "eager" and sys.version_info < (3, 12):
        pytest.skip("needs Python 3.12")
    ours, other, *training = [next(clients) for _ in range(5)]
    expected = await alone(ours, lambda host: host.execute_method(ours, "run", part))
    expected_other = await alone(other, lambda host: host.execute_method(other, "run", "gathered"))
    expected_trained = await alone(training[0], lambda host: host.execute_method(training[0], "train", 5))
    before = driver_state()
    drawn, drawn_by_other, trained, *_ = await asyncio.gather(
        proxy.custom_method(ours, "run", part),
        proxy.custom_method(other, "run", "gathered"),
        *(proxy.custom_method(client, "train", 5) for client in training),
    )
    assert driver_state() == before
    assert drawn == expected
    assert len({*drawn, *drawn_by_other}) == len(drawn) + len(drawn_by_other)
    assert (drawn_by_other, trained) == (expected_other, expected_trained)


async def test_task_that_outlives_its_call_goes_on_with_its_streams(
    proxy: tfr.LearnerProxy, clients: Iterator[str]
) -> None:
    ours, other = next(clients), next(clients)

    async def leave_and_finish(host: LearnerHost) -> Any:
        return [await host.execute_method(ours, method) for method in ("leave", "finish")]

    expected = await alone(ours, leave_and_finish)
    expected_other = await alone(other, lambda host: host.execute_method(other, "run", "gathered"))
    before = driver_state()
    left = await proxy.custom_method(ours, "leave")
    drawn_by_other = await proxy.custom_method(other, "run", "gathered")
    assert [left, await proxy.custom_method(ours, "finish")] == expected
    assert drawn_by_other == expected_other
    assert driver_state() == before
    assert len({left, *expected[1]}) == 6
