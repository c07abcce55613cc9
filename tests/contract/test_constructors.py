"""Constructors: a learner is made at its first call, and again at the next one where that failed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import opened
from learners import Nursery

import torchfedrpc as tfr


@pytest.fixture(scope="module")
def nursery(runner: asyncio.Runner, lone_runtime: dict[str, Any]) -> Iterator[tfr.LearnerProxy]:
    """A proxy of learners that fail to be made."""
    clients = {
        "once": {"failures": 1},
        "twice": {"failures": 2},
        "thrice": {"failures": 3},
        "always": {"failures": 10**9},
        "given": {"failures": 2, "weights": torch.zeros(2)},
        "large": {"failures": 2, "weights": torch.zeros(10_000)},
        "unpicklable": {"weights": lambda: 1},
        "mistaken": {"no_such_argument": 1},
        "fine": {},
    }

    with opened(runner, tfr.LearnerProxy(Nursery, clients, runtime=lone_runtime)) as proxy:
        yield proxy


async def test_a_constructor_that_raises_is_tried_again_by_the_next_call(nursery: tfr.LearnerProxy) -> None:
    with pytest.raises(ValueError, match="once: try 1") as caught:
        await nursery.custom_method("once", "tries")
    assert "__init__" in str(caught.value.__cause__)
    assert await nursery.custom_method("once", "tries") == [None, None]
    assert await nursery.custom_method("fine", "tries") == [None]


async def test_retries_cover_a_constructor_that_raises(nursery: tfr.LearnerProxy) -> None:
    assert len(await nursery.options(retries=2).custom_method("twice", "tries")) == 3
    with pytest.raises(ValueError, match="thrice: try 2"):
        await nursery.options(retries=1).custom_method("thrice", "tries")


async def test_queued_calls_of_a_learner_that_cannot_be_made_all_end(nursery: tfr.LearnerProxy) -> None:
    calls = [nursery.custom_method("always", "tries") for _ in range(20)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [str(result) for result in results] == [f"always: try {number}" for number in range(1, 21)]


@pytest.mark.parametrize("name", ["given", "large"])
async def test_a_constructor_that_raises_gets_unchanged_arguments_at_the_next_try(
    nursery: tfr.LearnerProxy, name: str
) -> None:
    tries = await nursery.options(retries=5).custom_method(name, "tries")
    assert [sum(given) for given in tries] == [0, 0, 0]


async def test_constructor_arguments_that_cannot_be_sent_are_refused(nursery: tfr.LearnerProxy) -> None:
    for _ in range(2):
        with pytest.raises(tfr.SerializationError):
            await nursery.options(timeout_s=20).custom_method("unpicklable", "tries")
    with pytest.raises(TypeError, match="no_such_argument"):
        await nursery.custom_method("mistaken", "tries")
