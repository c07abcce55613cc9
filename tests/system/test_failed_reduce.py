"""A reduction that fails leaves the learners in the same states in every mode: each call has run to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import opened
from uneven import Choosy, Picky, Uneven

import torchfedrpc as tfr
from torchfedrpc.config import RuntimeConfig
from torchfedrpc.events import EventBus
from torchfedrpc.executors.base import ExecutorSpec
from torchfedrpc.host.spec import LearnerSpec

SEED = 4
NUM_CLIENTS = 12
# Neighbours that do not go together are done first; the others take their time.
CLIENTS: dict[str, dict[str, Any]] = {
    f"client_{number}": {"size": 3 if number == 1 else 2, "seconds": 0.0 if number < 2 else 0.03}
    for number in range(NUM_CLIENTS)
}
CASES: list[tuple[Any, type[Exception], str]] = [
    (tfr.WeightedMean(), ValueError, "client_0 and client_1: their results do not go together"),
    (Choosy, ValueError, "their results do not go together, enough"),
    (Picky, tfr.GroupCallError, "client_1, first with ValueError: too large"),
]


@pytest.fixture(scope="module")
def proxy(runner: asyncio.Runner, runtime: dict[str, Any]) -> Iterator[tfr.LearnerProxy]:
    with opened(runner, tfr.LearnerProxy(Uneven, CLIENTS, runtime=runtime, seed=SEED)) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def expected(runner: asyncio.Runner, proxy: tfr.LearnerProxy) -> dict[str, list[float]]:
    """What each client has drawn once it was called as often as there are cases, by itself."""
    return runner.run(drawn_alone())


async def drawn_alone() -> dict[str, list[float]]:
    spec, _ = LearnerSpec.of(Uneven, SEED, RuntimeConfig())
    host = ExecutorSpec(spec, {client: {} for client in CLIENTS}, EventBus()).make_host()
    drawn = {}
    for client in CLIENTS:
        for _ in CASES:
            await host.execute_method(client, "train")
        drawn[client] = await host.execute_method(client, "history")
    assert await asyncio.to_thread(host.close)
    return drawn


@pytest.mark.parametrize("number", range(len(CASES)))
async def test_failed_reduce_runs_every_call_to_its_end(
    proxy: tfr.LearnerProxy, expected: dict[str, list[float]], number: int
) -> None:
    reducer, kind, message = CASES[number]
    with pytest.raises(kind, match=message):
        await proxy.clients().reduce("train", reducer)
    drawn = dict(await proxy.clients().call("history"))
    assert drawn == {client: draws[: number + 1] for client, draws in expected.items()}
