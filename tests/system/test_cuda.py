"""Tensors on a GPU go from device to device, in the order of the streams that make them."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch
from conftest import opened
from losses import pseudo
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import torchfedrpc as tfr

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SIZE = 1 << 22  # float32: 16 MB
_SLEEP_CYCLES = 300_000_000  # some tenths of a second


def make_late_ones(device: Any) -> Tensor:
    """A tensor whose ones are there once a long kernel of the current stream has ended."""
    tensor = torch.zeros(SIZE, device=device)
    torch.cuda._sleep(_SLEEP_CYCLES)
    return tensor.add_(1)


def sum_too_early(tensor: Tensor) -> float:
    """What a reader sees that does not wait for the stream that makes the tensor."""
    with torch.cuda.stream(torch.cuda.Stream()):
        return float(tensor.sum())


class OnGpu:
    """A learner whose tensors are on its device."""

    def __init__(self, client_id: str) -> None:
        self.kept: Any = None
        self.profile: Any = None

    def keep(self, tensor: Tensor) -> None:
        self.kept = tensor

    def total(self, tensor: Tensor) -> float:
        assert tensor.device == tfr.current_call().device
        return float(tensor.sum())

    def give(self) -> Tensor:
        return self.kept

    def late_ones(self) -> Tensor:
        self.kept = make_late_ones(tfr.current_call().device)
        return self.kept

    def sum_of_late_ones_too_early(self) -> float:
        return sum_too_early(make_late_ones(tfr.current_call().device))

    def begin_profile(self) -> None:
        self.profile = profile(activities=[ProfilerActivity.CUDA])
        self.profile.start()

    def copy_through_host_memory(self) -> None:
        self.kept = self.kept.cpu().to(tfr.current_call().device)

    def end_profile(self) -> list[str]:
        torch.cuda.synchronize()
        self.profile.stop()
        return names_of_copies(self.profile)


def names_of_copies(profiled: Any) -> list[str]:
    """What was copied between devices and host memory."""
    return [event.name for event in profiled.events() if "DtoH" in event.name or "HtoD" in event.name]


@pytest.fixture(scope="module")
def proxy(runner: asyncio.Runner) -> Iterator[tfr.LearnerProxy]:
    """One worker on the GPU, with contexts, channels and blocks of memory as the first tensors make them."""
    with opened(runner, tfr.LearnerProxy(OnGpu, ["a"], runtime=pseudo(num_processes=1))) as proxy:
        runner.run(proxy.client("a").keep(torch.zeros(SIZE, device="cuda")))
        runner.run(proxy.client("a").give())
        yield proxy


# Positive controls: what the tests below look for can be seen.


async def test_reader_that_waits_for_no_stream_sees_tensors_too_early(proxy: tfr.LearnerProxy) -> None:
    """So the tests of streams fail without a fence: their kernels take long enough."""
    tensor = make_late_ones("cuda")
    assert sum_too_early(tensor) < SIZE
    assert float(tensor.sum()) == SIZE
    assert await proxy.client("a").sum_of_late_ones_too_early() < SIZE


async def test_profiler_sees_copies_through_host_memory(proxy: tfr.LearnerProxy) -> None:
    """So the test that there are none can fail, on either side."""
    learner, tensor = proxy.client("a"), torch.ones(SIZE, device="cuda")
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        tensor.cpu().to("cuda")
        torch.cuda.synchronize()
    await learner.keep(tensor)
    await learner.begin_profile()
    await learner.copy_through_host_memory()
    for names in (names_of_copies(profiled), await learner.end_profile()):
        for direction in ("DtoH", "HtoD"):
            assert any(direction in name for name in names), names


# Order and way.


@pytest.mark.parametrize("is_own_stream", [False, True], ids=["default stream", "stream of its own"])
async def test_an_argument_is_what_its_stream_makes_of_it(proxy: tfr.LearnerProxy, is_own_stream: bool) -> None:
    stream = torch.cuda.Stream() if is_own_stream else torch.cuda.current_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        tensor = torch.zeros(SIZE, device="cuda")
        torch.cuda._sleep(_SLEEP_CYCLES)
        tensor.add_(1)
        call = asyncio.ensure_future(proxy.client("a").total(tensor))
        await asyncio.sleep(0)  # its value is taken
        tensor.zero_()
        assert await call == SIZE


async def test_a_result_is_what_its_method_s_stream_makes_of_it(proxy: tfr.LearnerProxy) -> None:
    assert float((await proxy.client("a").late_ones()).sum()) == SIZE


async def test_tensors_between_gpus_avoid_host_memory(proxy: tfr.LearnerProxy) -> None:
    learner, tensor = proxy.client("a"), torch.ones(SIZE, device="cuda")
    await learner.begin_profile()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        await learner.keep(tensor)
        given = await learner.give()
        torch.cuda.synchronize()
    assert given.is_cuda
    assert names_of_copies(profiled) == []
    assert await learner.end_profile() == []
    assert float(given.sum()) == SIZE


# Several GPUs.


class Placed:
    """A learner that tells the devices of what it has and is given."""

    def __init__(self, client_id: str, given: Tensor | None = None) -> None:
        self.given = given
        self.kept = torch.rand(300, device="cuda")  # the current GPU
        self.table = tfr.current_call().shared("table", lambda: torch.rand(3, device=tfr.current_call().device))

    def places(self) -> list[str]:
        call = tfr.current_call()
        places = [
            call.device,
            torch.cuda.current_device(),
            self.kept.device,
            self.table.device,
            call.generator.device,
        ]
        return [str(place) for place in places]

    async def places_async(self) -> list[str]:
        await asyncio.sleep(0)
        return self.places()

    def devices(self, *tensors: Tensor) -> list[str]:
        assert self.given is not None
        return [str(tensor.device) for tensor in (self.given, *tensors)]

    def give(self, given: Tensor | None = None) -> dict[str, Tensor]:
        call = tfr.current_call()
        return {
            "drawn": torch.rand(300, generator=call.generator, device=call.device) + self.kept,
            "cpu": torch.ones(3),
        }

    def items(self) -> Generator[Tensor, Tensor, None]:
        given = yield self.kept
        while True:
            given = yield self.kept + given

    def late_sum(self, tensor: Tensor) -> Tensor:
        return make_late_ones(tfr.current_call().device) + tensor


async def facts_of_gpus(runtime: dict[str, Any]) -> list[Any]:
    """What learners and trainer see of devices and values: the same in each mode."""
    facts: list[Any] = []

    def add(*results: Any) -> None:
        facts.append([(str(one.device), one.tolist()) if isinstance(one, Tensor) else one for one in results])

    first, second = torch.ones(300, device="cuda:0"), torch.ones(300, device="cuda:1")
    large = torch.ones(SIZE, device="cuda:0")
    clients = {one: {"given": first} for one in ("a", "b")}
    async with tfr.LearnerProxy(Placed, clients, runtime=runtime, seed=3) as proxy:
        group = proxy.clients()
        for method in ("places", "places_async"):
            add(dict(await group.call(method)))
        reference = await proxy.share(large)
        add(dict(await group.call("devices", first, second, large, reference, torch.ones(3))))
        for given in (None, first, second, torch.ones(3)):
            for result in (await group.call("give", given)).values():
                add(*result.values())
            for reducer in (tfr.Mean("drawn"), tfr.Sum("cpu")):
                add((await group.reduce("give", reducer, given=given)).value)
        for one in proxy.client_ids:
            stream = proxy.stream(one, "items")
            add(await anext(stream), await stream.asend(first), await stream.asend(second))
            await stream.aclose()
            add(float((await proxy.client(one).late_sum(make_late_ones("cuda:0"))).sum()))
        await proxy.restore({one: data async for one, data in proxy.snapshots()})
        add(dict(await group.call("places")))
    return facts


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("device_map", ["auto", "none"])
async def test_local_mode_has_tensors_where_workers_have_them(device_map: str) -> None:
    local = await facts_of_gpus({"execution_mode": "local", "device_map": device_map})
    assert local == await facts_of_gpus(pseudo(num_processes=2, device_map=device_map))
    assert [places[0] for places in local[0][0].values()] == ["cuda:0", "cuda:1"]


class Large:
    """A learner with 16 MB on its device."""

    def __init__(self, client_id: str) -> None:
        self.kept = torch.zeros(SIZE, device=tfr.current_call().device)

    def step(self) -> float:
        self.kept += 1
        return float(self.kept[0])


async def test_an_evicted_learner_frees_its_memory_and_comes_back_to_its_device() -> None:
    before = torch.cuda.memory_allocated()
    async with tfr.LearnerProxy(Large, runtime={"num_clients": 8, "max_resident_learners": 1}) as proxy:
        for number in (1.0, 2.0):
            for client_id in proxy.client_ids:
                assert await proxy.custom_method(client_id, "step") == number
                assert torch.cuda.memory_allocated() - before <= 3 * 4 * SIZE
