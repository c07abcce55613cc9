"""Sharing without isolation, in local mode: everything is the object itself."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import torch
from conftest import opened
from learners import Probe

import torchfedrpc as tfr

SIZE = 600_000


class Taker(Probe):
    """A learner that writes into what it is given."""

    def write_and_sum(self, weights: torch.Tensor) -> float:
        weights += 1
        return float(weights.sum())


@pytest.fixture(scope="module")
def proxy(runner: asyncio.Runner) -> Iterator[tfr.LearnerProxy]:
    runtime = {"execution_mode": "local", "isolation": "none"}
    with opened(runner, tfr.LearnerProxy(Taker, ["a", "b"], runtime=runtime)) as proxy:
        yield proxy


async def test_calls_have_the_callers_own_object(proxy: tfr.LearnerProxy) -> None:
    weights = torch.zeros(SIZE)
    assert all(result is weights for result in (await proxy.clients().call("same", weights)).values())
    calls = [proxy.custom_method(one, "write_and_sum", weights) for one in "ab"]
    assert await asyncio.gather(*calls) == [SIZE, 2 * SIZE]


async def test_a_reference_stands_for_the_object_itself(proxy: tfr.LearnerProxy) -> None:
    weights = torch.zeros(SIZE)
    ref = await proxy.share(weights)
    (first,), kwargs = await proxy.custom_method("a", "echo", ref, named=ref)
    assert first is kwargs["named"] is weights
