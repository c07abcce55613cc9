"""Learners made of Hugging Face, torchvision and Lightning, and compiled modules: the same results in every mode."""

from __future__ import annotations

from typing import Any

import pytest
from corpus.learner import make
from corpus.registry import NUM_ROUNDS, present
from corpus.ways import SEED, TRUSTED, Run

import torchfedrpc as tfr

CLIENTS = [
    client_id
    for entry in present()
    if entry.topic == "libraries" or entry.name.startswith("compiled")
    for client_id in entry.clients
]


@pytest.mark.timeout(240)
@pytest.mark.filterwarnings("default")  # these libraries warn of their own future
async def test_learners_of_libraries_give_the_results_of_local_mode(mode: str, runtime: dict[str, Any]) -> None:
    """A library that found the variables of a launch would wait for ranks that serve learners."""
    expected = await _results({"execution_mode": "local"})
    found = expected if mode == "local" else await _results(runtime)
    assert not expected.errors
    assert not found.errors
    assert found.texts == expected.texts


async def _results(runtime: dict[str, Any]) -> Run:
    run = Run()
    async with tfr.LearnerProxy(make, CLIENTS, runtime={"trusted_modules": TRUSTED, **runtime}, seed=SEED) as proxy:
        for number in range(NUM_ROUNDS):
            await run.round(proxy, number)
    return run
