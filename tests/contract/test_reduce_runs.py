"""Reductions in runs of their own: the same bits in each mode, for any workers, and in modes of one's own."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from internals import check_nothing_goes_on
from own_mode import CountingExecutor
from summing import Adder, Brackets, Failing

import torchfedrpc as tfr

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
