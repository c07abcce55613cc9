"""Tensors are freed with their last reference: they are large, and a garbage collection may be late."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import opened

import torchfedrpc as tfr

NUM_LARGE = 10_000_000  # float32: 40 MB


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Only objects without references are freed meanwhile."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def memory_of(weights: torch.Tensor) -> weakref.ref[torch.UntypedStorage]:
    """Refers to a tensor's memory, which other tensors may have too, for as long as it is there."""
    return weakref.ref(weights.untyped_storage())


class Weighing:
    """Knows of tensors that it was given, or gave, whether they are still there."""

    def __init__(self, client_id: str) -> None:
        self._seen: list[weakref.ref[torch.UntypedStorage]] = []

    def stop_collecting(self) -> None:
        gc.collect()
        gc.disable()

    def go_on_collecting(self) -> None:
        gc.enable()

    def take(self, weights: torch.Tensor, fails: bool = False) -> None:
        self._see(weights)
        if fails:
            raise ValueError("asked to fail")

    def measure(self, weights: torch.Tensor, size: int) -> torch.Tensor:
        return torch.ones(size)

    def take_slowly(self, weights: torch.Tensor) -> None:
        time.sleep(0.1)

    async def take_async(self, weights: torch.Tensor) -> None:
        self._see(weights)
        await asyncio.sleep(0)

    def yield_some(self, weights: torch.Tensor) -> Iterator[torch.Tensor]:
        self._see(weights)
        for _ in range(2):
            yield weights + 1

    def let_go(self, weights: torch.Tensor) -> Iterator[int]:
        self._see(weights)
        del weights
        for _ in range(2):
            yield self.alive()

    def give(self, beside: bool) -> Any:
        weights = torch.ones(NUM_LARGE)
        self._see(weights)
        return [weights, lambda: 1] if beside else [weights]

    def alive(self) -> int:
        return sum(seen() is not None for seen in self._seen)

    def _see(self, weights: torch.Tensor) -> None:
        self._seen.append(memory_of(weights))


@pytest.fixture(scope="module")
def proxy(runner: asyncio.Runner, lone_runtime: dict[str, Any]) -> Iterator[tfr.LearnerProxy]:
    runtime = lone_runtime | {"journal_max_calls": 1}
    with opened(runner, tfr.LearnerProxy(Weighing, ["a", "b"], runtime=runtime)) as proxy:
        runner.run(proxy.clients().call("stop_collecting"))
        yield proxy
        runner.run(proxy.clients().call("go_on_collecting"))


async def test_a_learners_arguments_are_freed_with_its_call_and_not_with_the_next_collection(
    proxy: tfr.LearnerProxy,
) -> None:
    weights = torch.ones(NUM_LARGE)
    await proxy.custom_method("a", "take", weights)
    await proxy.custom_method("a", "take_async", weights)
    async for _ in proxy.stream("a", "yield_some", weights):
        pass
    async for _ in proxy.stream("a", "yield_some", weights):
        break
    assert await proxy.custom_method("a", "alive") == 0


async def test_a_streams_arguments_are_freed_as_its_generator_drops_them(proxy: tfr.LearnerProxy) -> None:
    counts = [count async for count in proxy.stream("b", "let_go", torch.ones(NUM_LARGE))]
    assert counts[-1] == 0


async def test_a_learners_arguments_are_freed_where_its_method_fails(proxy: tfr.LearnerProxy) -> None:
    with pytest.raises(ValueError, match="asked to fail"):
        await proxy.custom_method("b", "take", torch.ones(NUM_LARGE), fails=True)
    assert await proxy.custom_method("b", "alive") == 0


@pytest.mark.parametrize("beside", [False, True], ids=["sent", "beside what cannot be sent"])
async def test_a_learners_result_is_freed_once_it_has_arrived(proxy: tfr.LearnerProxy, beside: bool) -> None:
    if beside:
        with pytest.raises(tfr.SerializationError):
            await proxy.custom_method("b", "give", beside)
    else:
        await proxy.custom_method("b", "give", beside)
    assert await proxy.custom_method("b", "alive") == 0


async def test_a_callers_tensors_are_freed_whether_they_could_be_sent_or_not(proxy: tfr.LearnerProxy) -> None:
    with no_collections():
        sent, beside = torch.ones(NUM_LARGE), torch.ones(NUM_LARGE)
        there = [memory_of(sent), memory_of(beside)]
        await proxy.custom_method("a", "take", sent)
        with pytest.raises(tfr.SerializationError) as caught:
            await proxy.custom_method("a", "take", [beside, lambda: 1])
        del sent, beside, caught  # the error's traceback shows the arguments
        (result,) = await proxy.custom_method("a", "give", False)
        there.append(memory_of(result))
        del result
        await proxy.custom_method("a", "alive")  # the thread that brought the result has gone on
        assert [ref() is not None for ref in there] == [False] * 3


@pytest.mark.parametrize("timeout_s", [None, 60.0])
async def test_a_callers_tensors_are_freed_where_the_results_do_not_go_together(
    proxy: tfr.LearnerProxy, timeout_s: float | None
) -> None:
    with no_collections():
        weights = {client_id: torch.ones(NUM_LARGE) for client_id in "ab"}
        there = [memory_of(one) for one in weights.values()]
        own = {client_id: {"weights": weights[client_id], "size": 2 + (client_id == "a")} for client_id in "ab"}
        with pytest.raises(ValueError, match="do not go together"):
            await proxy.clients(own).options(timeout_s=timeout_s).reduce("measure", tfr.Mean())
        del weights, own
        await proxy.clients().call("alive")  # the calls after the reduce have gone on
        assert [ref() is not None for ref in there] == [False] * 2


async def test_a_callers_tensors_are_freed_after_a_group_call_that_reached_its_deadline(
    proxy: tfr.LearnerProxy,
) -> None:
    with no_collections():
        small = torch.ones(10)
        there = memory_of(small)
        with pytest.raises(tfr.GroupCallError):
            await proxy.clients().options(timeout_s=0.01).call("take_slowly", small)
        del small
        await proxy.clients().call("alive")  # the calls have ended
        assert there() is None
