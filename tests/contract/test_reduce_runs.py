"""Reductions in runs of their own: the same bits in each mode, for any workers, and in modes of one's own."""

from __future__ import annotations

import asyncio
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Latch
from internals import check_nothing_goes_on
from own_mode import CountingExecutor
from summing import Adder, Brackets, Failing

import torchfedrpc as tfr
from torchfedrpc.events import CallEnded

from .test_reduce import bits, brackets, failing, shuffled

IDS = [f"client_{number}" for number in range(13)]


async def script(proxy: tfr.LearnerProxy, ids: list[str]) -> Any:
    """A little of everything, and what the driver makes of the same results."""
    group = proxy.clients(shuffled(ids))
    brackets = await group.reduce("draw_text", Brackets)
    first = await group.reduce("train", tfr.WeightedMean())
    loss = await group.reduce("train", tfr.Mean(value="loss"))
    correct = await group.reduce("train", tfr.Sum(value="correct"))
    return bits(first.value), first.value["mask"].tolist(), loss.value, correct.value, brackets.value


@pytest.fixture(scope="module")
def in_local_mode(runner: asyncio.Runner) -> Any:
    async def run() -> Any:
        async with tfr.LearnerProxy(Adder, IDS, runtime="local", seed=5) as proxy:
            return await script(proxy, IDS)

    return runner.run(run())


async def test_the_bits_do_not_depend_on_mode_number_of_workers_and_placement(
    mode: str, runtime: dict[str, Any], in_local_mode: Any
) -> None:
    runtimes: list[dict[str, Any]] = [runtime]
    if mode == "pseudo":
        runtimes = [{**runtime, "num_processes": 1}, {**runtime, "num_processes": 3}]
        runtimes[1]["client_endpoints"] = {IDS[1]: "worker3", IDS[4]: "local", IDS[5]: "worker1", IDS[12]: "local"}
    for one in runtimes:
        async with tfr.LearnerProxy(Adder, IDS, runtime=one, seed=5) as proxy:
            assert await script(proxy, IDS) == in_local_mode
            await check_nothing_goes_on(proxy)


class Numbered:
    """Numbers its calls."""

    def __init__(self, client_id: str) -> None:
        self.num_calls = 0

    def count(self) -> int:
        self.num_calls += 1
        return self.num_calls


@pytest.mark.parametrize("timeout_s", [None, 30.0])
@pytest.mark.parametrize("endpoints", [{}, {IDS[2]: "local"}])
async def test_a_reduce_is_before_calls_that_are_submitted_after_it(
    runtime: dict[str, Any], timeout_s: float | None, endpoints: dict[str, str]
) -> None:
    runtime = {**runtime, "client_endpoints": endpoints}
    async with tfr.LearnerProxy(Numbered, IDS[:3], runtime=runtime) as proxy:
        reducing = asyncio.ensure_future(proxy.clients().options(timeout_s=timeout_s).reduce("count", tfr.Sum()))
        following = [asyncio.ensure_future(proxy.custom_method(client, "count")) for client in IDS[:3]]
        assert await asyncio.gather(*following) == [2, 2, 2]
        assert (await reducing).value == 3


# Kinds of executors.


async def test_without_isolation_results_are_added_up_as_well(mode: str) -> None:
    if mode != "local":
        pytest.skip("workers are always isolated")
    async with tfr.LearnerProxy(Adder, IDS, runtime={"execution_mode": "local", "isolation": "none"}) as proxy:
        assert (await proxy.clients().reduce("text", Brackets())).value == brackets(IDS)
        assert (await proxy.clients().reduce("change_and_give", tfr.Sum())).value.tolist() == [13.0] * 3
        assert (await proxy.clients().reduce("change_and_give", tfr.Mean())).value.tolist() == [2.0] * 3


async def test_users_mode_without_reductions_has_them(mode: str, in_local_mode: Any) -> None:
    if mode != "local":
        pytest.skip("it is a mode of its own")
    async with tfr.LearnerProxy(Adder, IDS, runtime="counting", seed=5) as proxy:
        assert await script(proxy, IDS) == in_local_mode
        group = proxy.clients(failing(IDS, 2)).options(on_error="collect")
        assert (await group.reduce("text_or_fail", Brackets())).value == brackets(IDS, [IDS[2]])
        assert CountingExecutor.log.count("text_or_fail") == len(IDS)
        with pytest.raises(tfr.GroupCallError) as caught:
            await proxy.clients().reduce("train", tfr.WeightedMean(weight="num_sample"))
        assert set(caught.value.failures) == set(IDS)
        sizes = {one: {"size": 3 if one == IDS[3] else 2} for one in IDS}
        for group in (proxy.clients(sizes), proxy.clients(sizes).options(on_error="collect")):
            with pytest.raises(ValueError, match=rf"of_size of client_\d+ and {IDS[3]}: |of {IDS[3]} and client"):
                await group.reduce("of_size", tfr.Mean())
        with pytest.raises(tfr.GroupCallError):
            await proxy.clients().reduce("text", Failing("add", "stop"))


async def test_methods_that_run_at_once_are_added_up_in_order(mode: str, runtime: dict[str, Any]) -> None:
    runtime = {**runtime, "max_concurrent_calls": 3} | ({"num_processes": 1} if mode == "pseudo" else {})
    async with tfr.LearnerProxy(Adder, IDS, runtime=runtime) as proxy:
        for method in ("text", "text_async") * 3:
            assert (await proxy.clients(shuffled(IDS)).reduce(method, Brackets())).value == brackets(IDS)
        await check_nothing_goes_on(proxy)


class Sized:
    """Learner whose calls have arguments of a size, and hold them for as long as is wanted."""

    def __init__(self, client_id: str) -> None:
        pass

    def mean(self, weights: Any = None, rest: Any = None) -> dict[str, Any]:
        return {"model_weights": torch.ones(3), "num_samples": 1}

    def two_kinds(self, weights: Any, is_list: bool) -> Any:
        return [1.0] if is_list else 1.0

    async def hold(self, weights: Any, until: str) -> None:
        while not Path(until).exists():
            await asyncio.sleep(0.005)


ARGUMENT = torch.ones(50_000)
ROOM_FOR_TWO = 2 * ARGUMENT.nbytes + 10_000


@pytest.mark.parametrize("num_bad", [0, 2])
async def test_calls_that_wait_for_admission_take_part_in_a_reduce(runtime: dict[str, Any], num_bad: int) -> None:
    own = {f"client_{number}": {"weights": ARGUMENT + number} for number in range(6)}
    for number in range(num_bad):
        own[f"client_{number}"]["rest"] = lambda: None  # type: ignore[assignment]
    config = {**runtime, "max_inflight_bytes": ROOM_FOR_TWO}
    async with asyncio.timeout(20), tfr.LearnerProxy(Sized, list(own), runtime=config) as proxy:
        result = await proxy.clients(own).options(on_error="collect").reduce("mean", tfr.WeightedMean())
        assert result.count == 6 - num_bad
        assert {type(error) for error in result.failures.values()} <= {tfr.SerializationError}
        assert proxy.stats()["pending_calls"] == 0


async def test_calls_that_wait_for_admission_run_though_others_do_not_go_together(runtime: dict[str, Any]) -> None:
    own = {f"client_{number}": {"weights": ARGUMENT + number, "is_list": number == 1} for number in range(6)}
    config = {**runtime, "max_inflight_bytes": ROOM_FOR_TWO}
    async with asyncio.timeout(20), tfr.LearnerProxy(Sized, list(own), runtime=config) as proxy:
        ended: list[CallEnded] = []
        proxy.subscribe(lambda event: ended.append(event) if isinstance(event, CallEnded) else None)
        with pytest.raises(ValueError, match="do not go together"):
            await proxy.clients(own).reduce("two_kinds", tfr.Sum())
        assert len(ended) == 6
        assert not any(isinstance(event.error, asyncio.CancelledError) for event in ended)
        assert proxy.stats()["pending_calls"] == 0


@pytest.mark.parametrize("options", [{"timeout_s": 1.5, "on_error": "collect"}, {"min_results": 1}])
async def test_stop_of_a_reduce_reaches_a_call_that_waits_for_admission(
    runtime: dict[str, Any], latch: Latch, options: dict[str, Any]
) -> None:
    config = {**runtime, "max_inflight_bytes": ARGUMENT.nbytes + 10_000}
    async with asyncio.timeout(20), tfr.LearnerProxy(Sized, ["a", "b", "c"], runtime=config) as proxy:
        holding = asyncio.create_task(proxy.custom_method("c", "hold", ARGUMENT, latch.path))
        await asyncio.sleep(0)
        group = proxy.clients({"a": {}, "b": {"weights": ARGUMENT + 1}})
        result = await group.options(**options).reduce("mean", tfr.WeightedMean())
        assert result.count == 1
        assert not holding.done()
        latch.open()
        await holding
        assert proxy.stats()["pending_calls"] == 0


async def test_arguments_of_a_call_that_cannot_be_sent_are_freed_without_the_garbage_collector(
    runtime: dict[str, Any],
) -> None:
    async with tfr.LearnerProxy(Sized, ["a", "b"], runtime=runtime) as proxy:
        argument = ARGUMENT + 1
        freed = weakref.ref(argument)
        own = {"a": {"weights": argument, "rest": lambda: None}, "b": {}}
        gc.collect()
        gc.disable()
        try:
            result = await proxy.clients(own).options(on_error="collect").reduce("mean", tfr.WeightedMean())
            assert list(result.failures) == ["a"]
            del argument, own
            assert freed() is None
        finally:
            gc.enable()
