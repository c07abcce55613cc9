"""Back-pressure on the event loop: who is admitted when, and how large arguments are taken to be."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from torchfedrpc.executors.admission import Admission, estimate
from torchfedrpc.wire.packing import pack

LIMIT_BYTES = 100


class Desk:
    """Submitters of one admission, and in which order they were admitted."""

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self.admission = Admission(limit_bytes)
        self.admitted: list[Any] = []

    def submit(self, name: Any, num_bytes: int) -> asyncio.Task[None]:
        async def ask() -> None:
            await self.admission.admit(num_bytes)
            self.admitted.append(name)

        return asyncio.create_task(ask(), name=str(name))


async def turn() -> None:
    """Let every task go on as far as it can."""
    for _ in range(10):
        await asyncio.sleep(0)


def runs_through(coroutine: Any) -> bool:
    """Whether a coroutine ends without handing control to the event loop."""
    try:
        coroutine.send(None)
    except StopIteration:
        return True
    coroutine.close()
    return False


async def test_what_fits_is_admitted_without_a_task_switch() -> None:
    admission = Admission(LIMIT_BYTES)
    assert runs_through(admission.admit(60))
    assert runs_through(admission.admit(40))
    assert admission.num_bytes == 100


async def test_what_does_not_fit_waits_until_enough_is_released() -> None:
    desk = Desk()
    await desk.admission.admit(60)
    await desk.admission.admit(40)
    waiting = desk.submit("late", 50)
    desk.admission.release(40)
    await turn()
    assert desk.admitted == []
    desk.admission.release(60)
    await waiting
    assert desk.admission.num_bytes == 50


async def test_a_call_larger_than_the_limit_goes_alone() -> None:
    desk = Desk()
    await desk.admission.admit(1)
    large = desk.submit("large", 10 * LIMIT_BYTES)
    small = desk.submit("small", 1)
    await turn()
    assert desk.admitted == []
    desk.admission.release(1)
    await large
    await turn()
    assert desk.admitted == ["large"]
    desk.admission.release(10 * LIMIT_BYTES)
    await small
    assert desk.admission.num_bytes == 1


async def test_a_call_without_arguments_waits_for_those_before_it_alone() -> None:
    desk = Desk()
    await desk.admission.admit(10 * LIMIT_BYTES)
    assert runs_through(desk.admission.admit(0))
    large, empty = desk.submit("large", 50), desk.submit("empty", 0)
    await turn()
    assert desk.admitted == []
    desk.admission.release(10 * LIMIT_BYTES)
    await asyncio.gather(large, empty)
    assert desk.admitted == ["large", "empty"]


async def test_what_is_held_beside_the_calls_counts_and_stops_none_that_goes_alone() -> None:
    admission = Admission(100)
    admission.hold(80)
    await asyncio.wait_for(admission.admit(50), 1)
    waiting = asyncio.ensure_future(admission.admit(30))
    await asyncio.sleep(0)
    assert not waiting.done()
    admission.hold(20)
    await asyncio.wait_for(waiting, 1)
    assert admission.num_bytes == 80


async def test_nobody_overtakes_one_who_is_admitted_and_does_not_run_yet() -> None:
    desk = Desk()
    await desk.admission.admit(100)
    first = desk.submit("first", 10)
    await turn()
    desk.admission.release(100)  # the first is admitted, and runs at the loop's next turn
    await desk.admission.admit(10)
    desk.admitted.append("second")
    await first
    assert desk.admitted == ["first", "second"]
    assert desk.admission.num_bytes == 20


async def test_one_who_gives_up_makes_place_for_the_next() -> None:
    desk = Desk()
    await desk.admission.admit(50)
    large, small = desk.submit("large", 60), desk.submit("small", 50)
    await turn()
    large.cancel()
    await small
    assert desk.admitted == ["small"]
    assert large.cancelled()
    assert desk.admission.num_bytes == 100


async def test_one_who_gives_up_once_admitted_has_taken_nothing() -> None:
    desk = Desk()
    await desk.admission.admit(100)
    first, second = desk.submit("first", 60), desk.submit("second", 60)
    await turn()
    desk.admission.release(100)
    first.cancel()
    await second
    assert first.cancelled()
    assert desk.admitted == ["second"]
    assert desk.admission.num_bytes == 60


async def test_all_who_wait_may_give_up_at_once() -> None:
    desk = Desk()
    await desk.admission.admit(100)
    waiting = [desk.submit(number, 60) for number in range(1000)]
    await turn()
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    desk.admission.release(100)
    assert desk.admission.num_bytes == 0
    assert runs_through(desk.admission.admit(100))


@pytest.mark.parametrize("seed", range(20))
async def test_whatever_comes_the_order_and_the_limit_hold_and_nobody_is_forgotten(seed: int) -> None:
    draw = random.Random(seed)
    desk = Desk()
    held: deque[int] = deque()
    given_up: set[int] = set()
    tasks: list[asyncio.Task[None]] = []

    async def call(number: int, num_bytes: int) -> None:
        await desk.admission.admit(num_bytes)
        desk.admitted.append(number)
        held.append(num_bytes)
        assert sum(held) <= desk.admission.num_bytes
        assert desk.admission.num_bytes <= LIMIT_BYTES or sum(1 for size in held if size) == 1

    for number in range(300):
        tasks.append(asyncio.create_task(call(number, draw.choice([0, 1, 30, 60, 100, 250]))))
        for _ in range(draw.randrange(3)):
            await asyncio.sleep(0)
        if held and draw.random() < 0.6:
            desk.admission.release(held.popleft())
        if draw.random() < 0.2 and (victim := draw.randrange(len(tasks))) not in given_up and tasks[victim].cancel():
            given_up.add(victim)
    while held or not all(task.done() for task in tasks):
        while held:
            desk.admission.release(held.popleft())
        await asyncio.sleep(0)
    assert desk.admitted == [number for number in range(300) if not tasks[number].cancelled()]
    assert desk.admission.num_bytes == 0
    assert all(task.cancelled() or task.exception() is None for task in tasks)
    assert {number for number in range(300) if tasks[number].cancelled()} == given_up


# Sizes.


@dataclass
class Batch:
    data: torch.Tensor
    label: str


class Lazy:
    """Something that refers to much and is sent as little."""

    def __init__(self) -> None:
        self.target = torch.ones(1000)

    def __reduce__(self) -> Any:
        return Lazy, ()


def shared_twice() -> Any:
    weights = torch.ones(1000)
    return [weights, {"again": weights, "part": weights[:500]}]


def circular() -> Any:
    items: list[Any] = [torch.ones(1000)]
    items.append(items)
    return items


@pytest.mark.parametrize(
    ("make", "num_bytes"),
    [
        (lambda: torch.ones(1000), 4000),
        (lambda: torch.ones(1000, dtype=torch.bfloat16, requires_grad=True), 2000),
        (lambda: torch.ones(1000)[:10], 40),
        (lambda: torch.ones(1).expand(1000), 4000),
        (shared_twice, 4000),
        (circular, 4000),
        (lambda: list(torch.ones(1000).chunk(10)), 4000),
        (lambda: torch.eye(100).to_sparse(), 2000),
        (lambda: [torch.eye(100).to_sparse() for _ in range(10)], 20000),
        (lambda: nn.Parameter(torch.ones(1000)), 4000),
        (lambda: nn.Sequential(nn.Linear(100, 10), nn.Sequential(nn.Linear(100, 10))), 8080),
        (lambda: nn.Linear(100, 10).state_dict(), 4040),
        (lambda: np.ones(1000), 8000),
        (lambda: {"text": "x" * 3000, "raw": b"y" * 3000, "more": bytearray(3000)}, 9000),
        (lambda: Batch(torch.ones(1000), "cat"), 4000),
        (lambda: ((torch.ones(500),), {"deep": [{"deeper": deque([torch.ones(500)])}]}), 4000),
        (lambda: [0.5] * 1000, 9000),
    ],
)
def test_an_estimate_is_near_what_packing_makes(make: Callable[[], Any], num_bytes: int) -> None:
    obj = make()
    told = estimate((), {"value": obj})
    assert told == pytest.approx(num_bytes, rel=0.25, abs=1000) or num_bytes <= told <= 2 * num_bytes
    assert told == pytest.approx(pack(((), {"value": obj})).num_bytes, rel=1.0, abs=4000)


def test_nothing_is_nothing() -> None:
    assert estimate((), {}) == 0


def test_what_says_itself_how_it_is_sent_is_not_looked_into() -> None:
    assert estimate((Lazy(),), {}) < 100


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(1000, device="meta"),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        lambda: torch.ones(3, 3).to_mkldnn(),
        lambda: nn.LazyLinear(3),
        lambda: nn.LazyLinear(3).weight,
        lambda: print,
        lambda: Batch,
        object,
        lambda: torch,
    ],
)
def test_what_cannot_be_measured_is_left_to_packing(make: Callable[[], Any]) -> None:
    assert 0 <= estimate((make(),), {}) <= 10_000


def test_a_million_numbers_are_counted_without_a_look_at_each() -> None:
    assert estimate(([0.5] * 10**6,), {}) >= 9 * 10**6
