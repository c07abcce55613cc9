"""A result that its learner does not keep reaches the caller without a copy."""

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
    """Gives fresh weights, and knows where in memory they were."""

    def __init__(self, client_id: str) -> None:
        self.kept: list[torch.Tensor] = []

    def _weights(self, keep: bool) -> dict[str, torch.Tensor]:
        weights = {"weights": torch.zeros(NUM_LARGE)}
        weights["where"] = torch.tensor(weights["weights"].data_ptr())
        if keep:
            self.kept = [weights["weights"]]
        return weights

    def give(self, keep: bool) -> Any:
        return self._weights(keep)

    async def give_async(self, keep: bool) -> Any:
        await asyncio.sleep(0)
        return self._weights(keep)

    def give_some(self, keep: bool) -> Iterator[Any]:
        yield self._weights(keep)
        yield None

    async def give_some_async(self, keep: bool) -> AsyncIterator[Any]:
        yield self._weights(keep)
        yield None

    def change(self) -> None:
        self.kept[0].fill_(1)


@pytest.fixture(scope="module")
def proxy(runner: asyncio.Runner) -> Iterator[tfr.LearnerProxy]:
    with opened(runner, tfr.LearnerProxy(Giving, ["a"], runtime="local")) as proxy:
        yield proxy


@pytest.mark.parametrize("keep", [False, True], ids=["dropped", "kept"])
@pytest.mark.parametrize("method", ["give", "give_async", "give_some", "give_some_async"])
async def test_a_result_is_copied_only_where_its_learner_keeps_it(
    proxy: tfr.LearnerProxy, method: str, keep: bool
) -> None:
    if method.startswith("give_some"):
        result, _ = [item async for item in proxy.stream("a", method, keep)]
    else:
        result = await proxy.custom_method("a", method, keep)
    if keep:
        await proxy.custom_method("a", "change")
    assert (result["weights"].data_ptr() == result["where"]) is not keep
    assert not result["weights"].any()
