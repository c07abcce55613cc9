"""Same bits: results depend on the seed, the client and the call, not on mode, workers, placement or other calls."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from conftest import opened
from learners import Probe

import torchfedrpc as tfr

IDS = ["client_a", "client_b", "client_c", "client_d"]


async def _script(proxy: tfr.LearnerProxy) -> Any:
    """A little of everything that draws."""
    drawn = [await proxy.custom_method(one, "draw") for one in IDS for _ in range(2)]
    drawn += await asyncio.gather(*(proxy.custom_method(one, "draw_async", 3) for one in IDS))
    for one in IDS:
        drawn.append([item async for item in proxy.stream(one, "draw_stream", 3)])
        drawn.append([item async for item in proxy.stream(one, "draw_async_stream", 3)])
        drawn.append(await proxy.custom_method(one, "drawn_at_birth"))
        drawn.append((await proxy.custom_method(one, "draw_from_generator")).tolist())
    return drawn


async def _run_script(runtime: Any, *, ids: list[str] = IDS, seed: int = 5) -> Any:
    async with tfr.LearnerProxy(Probe, ids, runtime=runtime, seed=seed) as proxy:
        return await _script(proxy)


@pytest.fixture(scope="module")
def drawn_locally(runner: asyncio.Runner) -> Any:
    return runner.run(_run_script("local"))


async def test_all_streams_have_the_bits_of_local_mode(runtime: Any, drawn_locally: Any) -> None:
    assert await _run_script(runtime) == drawn_locally


async def test_the_bits_do_not_depend_on_placement_or_the_order_of_clients(runtime: Any, drawn_locally: Any) -> None:
    assert await _run_script(runtime, ids=[*reversed(IDS), "another"]) == drawn_locally


async def test_the_bits_do_not_depend_on_the_number_of_workers(mode: str, drawn_locally: Any) -> None:
    if mode != "pseudo":
        pytest.skip("the number of workers is set in pseudo mode alone")
    for count in (1, 3):
        assert await _run_script({"execution_mode": mode, "num_processes": count}) == drawn_locally


async def test_another_seed_draws_otherwise(lone_runtime: Any, drawn_locally: Any) -> None:
    other = await _run_script(lone_runtime, seed=6)
    assert all(first != second for first, second in zip(drawn_locally, other, strict=True))


async def test_one_more_evaluate_does_not_shift_training(trained_twice: Any) -> None:
    quiet, busy = trained_twice
    assert quiet == busy


@pytest.fixture(scope="module")
def trained_twice(runner: asyncio.Runner, lone_runtime: Any) -> Any:
    """What training draws in two runs, of which the second calls other methods in between."""

    async def draw(extra: bool) -> Any:
        drawn = []
        async with tfr.LearnerProxy(Probe, IDS, runtime=lone_runtime, seed=5) as proxy:
            for _ in range(3):
                for one in IDS:
                    if extra:
                        await proxy.evaluate(one)
                        await proxy.custom_method(one, "draw_other")
                        await proxy.custom_method(one, "seed_globally")
                        with pytest.raises(ValueError, match="plain"):
                            await proxy.custom_method(one, "fail", "value")
                    drawn.append(await proxy.custom_method(one, "draw"))
        return drawn

    return runner.run(draw(False)), runner.run(draw(True))


def test_torch_threads_are_as_they_were_after_a_run(runner: asyncio.Runner, lone_runtime: Any) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with opened(runner, tfr.LearnerProxy(Probe, ["a"], runtime={**lone_runtime, "torch_threads": 3})) as proxy:
            assert runner.run(proxy.custom_method("a", "num_threads")) == 3
            assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


class Drawing:
    """Learner with a shared object that is drawn at random."""

    def __init__(self, client_id: str) -> None:
        pass

    def draw(self) -> tuple[float, float]:
        shared = tfr.current_call().shared("key", lambda: torch.rand(1, generator=tfr.current_call().generator))
        return float(shared), float(torch.rand(1, generator=tfr.current_call().generator))

    def draw_from_the_call(self) -> Any:
        call = tfr.current_call()
        return call.shared("other key", lambda: torch.rand(1, generator=call.generator))


async def test_draws_from_a_generator_for_a_shared_object_do_not_depend_on_the_first_caller(
    runtime: dict[str, Any],
) -> None:
    drawn = []
    for first in "ab":
        async with tfr.LearnerProxy(Drawing, ["a", "b"], runtime=runtime, seed=1) as proxy:
            await proxy.custom_method(first, "draw")
            drawn.append(await proxy.clients().call("draw"))
            with pytest.raises(RuntimeError, match=r"factory of shared\(\)"):
                await proxy.custom_method(first, "draw_from_the_call")
    assert drawn[0]["a"][0] == drawn[1]["a"][0] == drawn[0]["b"][0] == drawn[1]["b"][0]
