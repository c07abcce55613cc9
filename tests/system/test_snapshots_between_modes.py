"""A snapshot goes from mode to mode: what was taken in the one goes on in the other, to the same bits."""

from __future__ import annotations

from typing import Any

import pytest
from learners import Mortal
from losses import SEED, pseudo

import torchfedrpc as tfr

RUNTIMES: dict[str, Any] = {"local": "local", "pseudo": pseudo(num_processes=1)}
CLIENTS = ["often", "once", "never"]


async def results_of(proxy: tfr.LearnerProxy) -> list[Any]:
    steps = [await proxy.custom_method("often", "step") for _ in range(3)]
    return [*steps, *[await proxy.custom_method(client, "draw") for client in CLIENTS]]


@pytest.mark.parametrize(("taken_in", "restored_in"), [("local", "pseudo"), ("pseudo", "local")])
async def test_a_snapshot_goes_on_in_another_mode_with_the_same_bits(taken_in: str, restored_in: str) -> None:
    async with tfr.LearnerProxy(Mortal, CLIENTS, runtime=RUNTIMES[taken_in], seed=SEED) as proxy:
        for client in ("often", "often", "once"):
            await proxy.custom_method(client, "step")
        await proxy.custom_method("often", "draw")
        taken = {client: data async for client, data in proxy.snapshots()}
        expected = await results_of(proxy)
    async with tfr.LearnerProxy(Mortal, CLIENTS, runtime=RUNTIMES[restored_in], seed=SEED) as proxy:
        await proxy.custom_method("often", "step")  # what is restored replaces it
        await proxy.restore(taken)
        assert await results_of(proxy) == expected
