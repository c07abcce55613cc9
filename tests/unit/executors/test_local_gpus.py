"""Several GPUs in local mode, on a machine without one: they are simulated."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import torch
from simulated_gpus import SimulatedGpus
from torch import Tensor

import torchfedrpc as tfr
from torchfedrpc.events import Event, ProgressReported
from torchfedrpc.host.call import Registration
from torchfedrpc.host.learner_host import LearnerHost
from torchfedrpc.host.process import visible_devices
from torchfedrpc.host.process_state import ProcessState
from torchfedrpc.host.spec import LearnerSpec

FIRST, SECOND, THIRD = GPUS = ["cuda:0", "cuda:1", "cuda:2"]
CLIENTS = ["a", "b", "c", "d", "e"]
IN_TURN = {"a": FIRST, "b": SECOND, "c": THIRD, "d": FIRST, "e": SECOND}
SMALL, LARGE = 300, 30_000  # elements; a large argument is shared by the calls of a tick


@pytest.fixture(autouse=True)
def gpus(monkeypatch: pytest.MonkeyPatch) -> SimulatedGpus:
    """Three GPUs, of which the driver's current one is the second."""
    gpus = SimulatedGpus(3, current=1)
    gpus.install(monkeypatch)
    return gpus


class OnGpu:
    """A learner that tells the devices of what it has and is given."""

    def __init__(self, client_id: str, given: Any = None) -> None:
        call = tfr.current_call()
        self.at_start = (str(call.device), torch.cuda.current_device())
        self.given = given
        self.kept = torch.zeros(SMALL, device=call.device)
        self.table: Any = call.shared("table", lambda: torch.rand(3, device=tfr.current_call().device))

    def places(self) -> list[tuple[str, int]]:
        return [self.at_start, place_here()]

    async def places_async(self) -> list[tuple[str, int]]:
        before = place_here()
        await asyncio.sleep(0.001)
        return [before, place_here()]

    def table_and_device(self) -> tuple[list[float], str]:
        return self.table.tolist(), str(self.table.device)

    def device_of_given(self) -> str:
        return str(self.given.device)

    def devices(self, *tensors: Tensor) -> list[str]:
        return [str(tensor.device) for tensor in tensors]

    def give(self, number: float, given: Any = None, size: int = SMALL) -> dict[str, Tensor]:
        return {"gpu": filled(size, number), "cpu": torch.ones(size)}

    def items(self, given: Any = None) -> Iterator[Any]:
        while True:
            given = yield [filled(SMALL, 1.0), None if given is None else str(given.device)]

    async def items_async(self) -> AsyncIterator[Any]:
        given = None
        while True:
            given = yield [filled(SMALL, 1.0), None if given is None else str(given.device)]

    def report(self) -> None:
        tfr.current_call().report(filled(SMALL, 2.0))

    def draw(self) -> list[float]:
        values: list[float] = torch.rand(2, device=tfr.current_call().device).tolist()
        return values

    def step(self) -> tuple[float, str]:
        assert self.table is tfr.current_call().shared("table", list)
        self.kept.add_(1)
        return float(self.kept[0]), str(self.kept.device)


class Added:
    """A user's reducer, whose sum begins on the driver's first GPU, and takes results of its own device alone."""

    def __init__(self) -> None:
        self.total: Any = torch.zeros(SMALL, device=FIRST)

    def add(self, result: dict[str, Tensor]) -> None:
        self.total.add_(result["gpu"])

    def merge(self, other: Added) -> None:
        self.total.add_(other.total)

    def finish(self) -> Tensor:
        total: Tensor = self.total
        return total


def place_here() -> tuple[str, int]:
    """The device of the call, and the current GPU of its thread."""
    return str(tfr.current_call().device), torch.cuda.current_device()


def filled(size: int, number: float) -> Tensor:
    return torch.full((size,), number, device=tfr.current_call().device)


def on(device: str, size: int = SMALL) -> Tensor:
    return torch.zeros(size, device=device)


def opened(clients: Any = CLIENTS, **runtime: Any) -> tfr.LearnerProxy:
    return tfr.LearnerProxy(OnGpu, clients, runtime={"execution_mode": "local", **runtime}, seed=11)


def devices_of(result: dict[str, Tensor]) -> dict[str, str]:
    return {name: str(tensor.device) for name, tensor in result.items()}


# The GPU of a learner.


@pytest.mark.parametrize("method", ["places", "places_async"])
async def test_learners_have_the_gpus_in_the_order_of_the_runs_clients(method: str) -> None:
    async with opened() as proxy:
        order = list(reversed(CLIENTS))  # of the calls, which does not matter
        for _ in range(2):
            places = await proxy.clients(order).call(method)
            assert dict(places) == {one: [(gpu, GPUS.index(gpu))] * 2 for one, gpu in IN_TURN.items()}


async def test_concurrent_methods_have_the_gpus_of_their_learners() -> None:
    async with opened(max_concurrent_calls=3) as proxy:
        places = await proxy.clients().call("places")
        assert {one: {place for place, _ in own} for one, own in places.items()} == {
            one: {gpu} for one, gpu in IN_TURN.items()
        }


async def test_learners_beside_those_of_the_run_have_the_first_gpu() -> None:
    spec = LearnerSpec.of(OnGpu, 0, tfr.RuntimeConfig())[0]
    process = ProcessState(spec, devices=visible_devices(), in_driver=True)
    host = LearnerHost(spec, process, clients={"a": {}, "b": {}})
    try:
        host.register(Registration.of("of a mode of its own", {}))
        assert await host.execute_method("b", "places") == [(SECOND, 1)] * 2
        assert await host.execute_method("of a mode of its own", "places") == [(FIRST, 0)] * 2
    finally:
        assert host.close()


async def test_learners_of_each_gpu_share_objects_with_the_same_bits() -> None:
    async with opened() as proxy:
        tables = await proxy.clients().call("table_and_device")
    assert {one: device for one, (_, device) in tables.items()} == IN_TURN
    assert len({str(values) for values, _ in tables.values()}) == 1


async def test_draws_on_a_gpu_depend_on_the_call_alone_and_leave_the_drivers_streams(
    gpus: SimulatedGpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [generator.get_state().tolist() for generator in gpus.generators]
    async with opened() as proxy:
        in_turn = [dict(await proxy.clients().call("draw")) for _ in range(2)]
    assert [generator.get_state().tolist() for generator in gpus.generators] == before
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        async with opened() as proxy:
            assert [dict(await proxy.clients().call("draw")) for _ in range(2)] == in_turn
    assert len({str(own) for round_ in in_turn for own in round_.values()}) == 2 * len(CLIENTS)


# Arguments.


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
async def test_arguments_on_a_gpu_arrive_on_that_of_the_learner(size: int) -> None:
    async with opened() as proxy:
        tensors = [on("cpu", size), on(FIRST, size), on(SECOND, size)]
        expected = {one: ["cpu", gpu, gpu] for one, gpu in IN_TURN.items()}
        calls = [proxy.client(one).devices(*tensors) for one in CLIENTS]
        assert dict(zip(CLIENTS, await asyncio.gather(*calls), strict=True)) == expected
        assert dict(await proxy.clients().call("devices", *tensors)) == expected


async def test_shared_references_arrive_on_the_gpu_of_the_learner() -> None:
    async with opened() as proxy:
        reference = await proxy.share(on(FIRST, LARGE))
        for _ in range(2):
            assert dict(await proxy.clients().call("devices", reference)) == {k: [v] for k, v in IN_TURN.items()}


async def test_arguments_of_constructors_arrive_on_the_gpu_of_the_learner() -> None:
    async with opened({one: {"given": on(FIRST)} for one in CLIENTS}) as proxy:
        assert dict(await proxy.clients().call("device_of_given")) == IN_TURN


# Results.


@pytest.mark.parametrize(
    ("given", "home"),
    [(None, SECOND), ("cpu", SECOND), (FIRST, FIRST), (THIRD, THIRD)],
    ids=["no argument", "argument on the CPU", "argument on the first", "argument on the third"],
)
async def test_results_go_to_the_gpu_of_the_arguments_else_to_the_drivers_current_one(
    given: str | None, home: str
) -> None:
    async with opened() as proxy:
        argument = None if given is None else on(given)
        results = await proxy.clients().call("give", 3.0, argument)
        assert {one: devices_of(result) for one, result in results.items()} == {
            one: {"gpu": home, "cpu": "cpu"} for one in CLIENTS
        }
        assert all(result["gpu"].tolist() == [3.0] * SMALL for result in results.values())


async def test_results_without_a_device_map_stay_in_host_memory() -> None:
    async with opened(device_map="none") as proxy:
        assert devices_of(await proxy.client("a").give(3.0)) == {"gpu": "cpu", "cpu": "cpu"}
        assert devices_of(await proxy.client("a").give(3.0, on(THIRD))) == {"gpu": THIRD, "cpu": "cpu"}
        assert await proxy.client("b").devices(on(FIRST)) == [SECOND]


@pytest.mark.parametrize("method", ["items", "items_async"])
async def test_values_that_are_sent_into_a_stream_and_its_items_change_the_gpu(method: str) -> None:
    async with opened() as proxy:
        for one in ("a", "c"):
            stream = proxy.stream(one, method)
            items = [await anext(stream), await stream.asend(on(FIRST)), await stream.asend(on(THIRD))]
            items.append(await anext(stream))
            assert [str(tensor.device) for tensor, _ in items] == [SECOND, FIRST, THIRD, SECOND]
            assert [given for _, given in items] == [None, IN_TURN[one], IN_TURN[one], None]
            await stream.aclose()


async def test_first_item_of_a_stream_goes_to_the_gpu_of_the_arguments() -> None:
    async with opened() as proxy:
        stream = proxy.stream("b", "items", on(THIRD))
        assert [str((await anext(stream))[0].device) for _ in range(2)] == [THIRD, SECOND]
        await stream.aclose()


async def test_progress_arrives_in_host_memory() -> None:
    seen: list[str] = []

    def note(event: Event) -> None:
        if isinstance(event, ProgressReported):
            seen.append(str(event.progress.device))

    async with opened() as proxy:
        proxy.subscribe(note)
        await proxy.clients(["a", "b"]).call("report")
    assert seen == ["cpu", "cpu"]


# Sums of results.


@pytest.mark.parametrize(("given", "home"), [(None, SECOND), (THIRD, THIRD)], ids=["no argument", "argument"])
@pytest.mark.parametrize(("make", "value"), [(lambda: tfr.Mean("gpu"), 2.0), (Added, 10.0)], ids=["ours", "a user's"])
async def test_results_are_added_up_on_the_gpus_and_the_sum_comes_home(
    make: Any, value: float, given: str | None, home: str
) -> None:
    async with opened() as proxy:
        group = proxy.clients({one: {"number": float(place)} for place, one in enumerate(CLIENTS)})
        reduced = await group.reduce("give", make(), given=None if given is None else on(given))
    assert reduced.count == len(CLIENTS)
    assert str(reduced.value.device) == home
    assert reduced.value.tolist() == [value] * SMALL


# Snapshots.


async def test_evicted_learners_come_back_to_their_gpus() -> None:
    async with opened(max_resident_learners=1) as proxy:
        for number in (1.0, 2.0):
            for one in CLIENTS:
                assert await proxy.client(one).step() == (number, IN_TURN[one])
                assert proxy.stats()["workers"]["local"]["learners"] == 1


async def test_restored_learners_have_their_tensors_on_their_gpus() -> None:
    async with opened() as proxy:
        await proxy.clients().call("step")
        snapshots = {one: data async for one, data in proxy.snapshots()}
    async with opened(list(reversed(CLIENTS))) as proxy:  # each on another GPU than before, except the middle one
        await proxy.restore(snapshots)
        steps = await proxy.clients().call("step")
    assert dict(steps) == dict(zip(reversed(CLIENTS), [(2.0, GPUS[place % 3]) for place in range(5)], strict=True))


# One device.


async def test_learners_that_get_objects_as_they_are_have_the_first_gpu() -> None:
    async with opened(isolation="none") as proxy:
        tables = await proxy.clients().call("table_and_device")
        assert {device for _, device in tables.values()} == {FIRST}
        assert await proxy.client("b").devices(on("cpu"), on(THIRD)) == ["cpu", THIRD]
        assert devices_of(await proxy.client("b").give(1.0)) == {"gpu": FIRST, "cpu": "cpu"}


async def test_one_gpu_leaves_tensors_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    spec = LearnerSpec.of(OnGpu, 0, tfr.RuntimeConfig())[0]
    assert ProcessState(spec, devices=visible_devices(), in_driver=True).gpus == ()
    async with opened() as proxy:
        assert await proxy.client("b").devices(on(SECOND)) == [SECOND]
        assert devices_of(await proxy.client("b").give(1.0)) == {"gpu": FIRST, "cpu": "cpu"}
