"""Gradients, and graphs, that a learner keeps from one call to the next: carried, or refused aloud, in every way."""

from __future__ import annotations

import logging
from typing import Any, cast

import pytest
import torch
from losses import kill, pseudo
from torch import nn

import torchfedrpc as tfr

CLIENTS = [f"client_{number}" for number in range(8)]
NUM_ROUNDS = 2
WAYS: dict[str, dict[str, Any]] = {
    "evicted": {"execution_mode": "local", "max_resident_learners": 1},
    "evicted on two workers": pseudo(max_resident_learners=1),
    "killed": pseudo(journal_max_calls=1),
}


class Split:
    """Has backward() in one call and the step in the next; or forward() in one of its own, too."""

    def __init__(self, client_id: str) -> None:
        self.weight = nn.Parameter(torch.zeros(1))
        self.loss: Any = None

    def backward(self) -> None:
        (-2 * self.weight).sum().backward()

    def step(self) -> float:
        with torch.no_grad():  # an optimiser of torch's takes seconds to import in each worker
            self.weight.sub_(cast("torch.Tensor", self.weight.grad))
        self.weight.grad = None
        return self.weight.item()

    def forward(self) -> None:
        self.loss = (-2 * self.weight).sum()

    def go_back(self) -> None:
        self.loss.backward()
        self.loss = None


async def weights(runtime: dict[str, Any], methods: list[str], *, kills: bool = False) -> list[float]:
    async with tfr.LearnerProxy(Split, CLIENTS, runtime=runtime, seed=1) as proxy:
        for number in range(NUM_ROUNDS):
            for method in methods:
                results = await proxy.clients().call(method)
            if kills and number < NUM_ROUNDS - 1:
                await proxy.clients().call(methods[0])
                kill(proxy, "worker1")
                for method in methods[1:]:
                    results = await proxy.clients().call(method)
        return list(results.values())


@pytest.mark.parametrize("way", WAYS)
async def test_gradients_of_one_call_are_there_in_the_next(way: str, recwarn: pytest.WarningsRecorder) -> None:
    kills = way == "killed"
    steps = NUM_ROUNDS + (NUM_ROUNDS - 1 if kills else 0)
    assert await weights(WAYS[way], ["backward", "step"], kills=kills) == [2.0 * steps] * len(CLIENTS)
    assert not [warning for warning in recwarn if "could not be rebuilt" in str(warning.message)]


async def test_graph_between_two_calls_keeps_its_learner_in_memory_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "torchfedrpc"):
        given = await weights(WAYS["evicted"], ["forward", "go_back", "step"])
    assert given == [2.0 * NUM_ROUNDS] * len(CLIENTS)
    told = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 1
    assert "because of 'loss': .loss holds an autograd graph" in told[0].getMessage()
    assert "name 'loss' in not_state" in told[0].getMessage()


async def test_graph_between_two_calls_is_replayed_from_the_journal_after_a_loss() -> None:
    runtime = pseudo(journal_max_calls=100)
    async with tfr.LearnerProxy(Split, CLIENTS, runtime=runtime, seed=1) as proxy:
        await proxy.clients().call("forward")
        with pytest.raises(tfr.SnapshotError, match=r"because of 'loss': .*autograd graph.*not_state") as caught:
            _ = [data async for data in proxy.snapshots(CLIENTS[:1])]
        assert caught.value.attribute == "'loss'"
        kill(proxy, "worker1")
        await proxy.clients().call("go_back")
        assert set((await proxy.clients().call("step")).values()) == {2.0}
        assert len([data async for data in proxy.snapshots()]) == len(CLIENTS)
