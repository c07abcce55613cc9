"""A result is the caller's own, also where the learner goes on with what it returned."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import torch
from conftest import opened

import torchfedrpc as tfr

NUM_LARGE = 1_000_000


class Giving:
    """Gives weights, and keeps them."""

    def __init__(self, client_id: str) -> None:
        self.kept: list[torch.Tensor] = []

    def _weights(self) -> dict[str, torch.Tensor]:
        self.kept = [torch.zeros(NUM_LARGE)]
        return {"weights": self.kept[0]}

    def give(self) -> Any:
        return self._weights()

    async def give_async(self) -> Any:
        await asyncio.sleep(0)
        return self._weights()

    def give_some(self) -> Iterator[Any]:
        yield self._weights()
        yield None

    async def give_some_async(self) -> AsyncIterator[Any]:
        yield self._weights()
        yield None

    def change(self) -> None:
        self.kept[0].fill_(1)


@pytest.fixture(scope="module")
def proxy(runner: asyncio.Runner) -> Iterator[tfr.LearnerProxy]:
    with opened(runner, tfr.LearnerProxy(Giving, ["a"], runtime="local")) as proxy:
        yield proxy


@pytest.mark.parametrize("method", ["give", "give_async", "give_some", "give_some_async"])
async def test_result_does_not_see_later_changes_of_its_learner(proxy: tfr.LearnerProxy, method: str) -> None:
    if method.startswith("give_some"):
        result, _ = [item async for item in proxy.stream("a", method)]
    else:
        result = await proxy.custom_method("a", method)
    await proxy.custom_method("a", "change")
    assert not result["weights"].any()
