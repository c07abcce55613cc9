"""Devices of workers and the way of GPU tensors, on a machine without a GPU: `torch.cuda` is patched."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from learners import Probe
from torch import Tensor

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.events import EventBus
from torchfedrpc.executors.base import ExecutorSpec
from torchfedrpc.executors.distributed import num_workers
from torchfedrpc.host.call import Call, Outcome
from torchfedrpc.host.process import choose_device, default_num_workers
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.rpc import world
from torchfedrpc.rpc.message import (
    call_message,
    outcome_message,
    parcel_message,
    read_call,
    read_outcome,
    read_parcel,
)
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.packing import Parcel, Unreadable, home_device, pack
from torchfedrpc.wire.tensors import fence

CPU = torch.device("cpu")
GPUS = [torch.device("cuda", number) for number in range(4)]


class GpuTensor(Tensor):
    """A CPU tensor that says it is on a GPU."""

    gpu: torch.device

    @staticmethod
    def on(device: torch.device, tensor: Tensor) -> GpuTensor:
        moved: GpuTensor = Tensor._make_subclass(GpuTensor, tensor.as_subclass(Tensor))
        moved.gpu = device
        return moved

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.gpu

    def cpu(self, *_: Any) -> Tensor:
        copies.append(("cpu", self.gpu))
        return self.as_subclass(Tensor).clone()

    def detach(self) -> Tensor:
        return GpuTensor.on(self.gpu, self)

    def set_(self, *_: Any) -> Tensor:
        return self

    def record_stream(self, stream: Any) -> None:
        pass


copies: list[tuple[Any, torch.device]] = []
"""(where to, from where) of each copy between devices."""


class Stream:
    """A CUDA stream with nothing on it."""

    def record_event(self) -> None:
        return None

    def wait_event(self, event: None) -> None:
        return None


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, of which the second is the current one, and copies to them that are noted."""
    copies.clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())

    def to(tensor: Tensor, device: torch.device) -> Tensor:
        copies.append((device, tensor.device))
        return GpuTensor.on(device, tensor)

    monkeypatch.setattr(Tensor, "to", to)


# The device of a process.


def test_workers_have_the_gpus_of_their_machine_in_turn(two_gpus: None) -> None:
    assert [choose_device(index) for index in range(5)] == [GPUS[0], GPUS[1], GPUS[0], GPUS[1], GPUS[0]]


def test_workers_have_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [choose_device(index) for index in range(2)] == [CPU, CPU]


def test_pseudo_mode_has_so_many_workers_for_each_gpu(two_gpus: None) -> None:
    assert default_num_workers(1) == 2
    assert default_num_workers(3) == 6


def test_pseudo_mode_has_a_worker_for_each_core_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    assert default_num_workers(4) == 3


@pytest.mark.parametrize(("num_clients", "num_processes", "expected"), [(9, None, 4), (3, None, 3), (9, 5, 5)])
def test_workers_of_gpus_are_no_more_than_clients_unless_their_number_is_set(
    two_gpus: None, num_clients: int, num_processes: int | None, expected: int
) -> None:
    config = RuntimeConfig(num_processes=num_processes, workers_per_device=2)
    assert num_workers(config, num_clients) == expected


# Device maps.


def learner(**runtime: Any) -> LearnerSpec:
    return LearnerSpec.of(Probe, 0, RuntimeConfig(**runtime))[0]


def test_device_map_pairs_the_drivers_current_gpu_with_the_workers(two_gpus: None) -> None:
    assert world._device_pair(learner(), GPUS[0]) == ("cuda:1", "cuda:0")


def test_device_map_none_maps_no_device(two_gpus: None) -> None:
    assert world._device_pair(learner(device_map="none"), GPUS[0]) is None


def test_device_map_leaves_workers_on_the_cpu_out(two_gpus: None) -> None:
    assert world._device_pair(learner(), CPU) is None


def test_device_map_leaves_all_workers_out_where_the_driver_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert world._device_pair(learner(), GPUS[0]) is None


PLAN = world.WorldPlan(
    generation=7,
    store_host="127.0.0.1",
    store_port=1,
    transport="uv",
    channels=["cma", "basic"],
    gpus_in_sight=True,
    device_maps=[("cuda:1", "cuda:0"), ("cuda:1", "cuda:1"), ("cuda:1", "cuda:0"), None],  # two share the first
)


def test_driver_maps_its_gpu_to_that_of_each_worker_in_a_world() -> None:
    maps, reverse_maps, devices = world._devices(PLAN, 0)
    gpu = {"rank1": "cuda:0", "rank2": "cuda:1", "rank3": "cuda:0"}
    assert maps == {name: {"cuda:1": theirs} for name, theirs in gpu.items()}
    assert reverse_maps == {}
    assert devices == [GPUS[1]]


@pytest.mark.parametrize(("rank", "gpu"), [(1, GPUS[0]), (2, GPUS[1]), (3, GPUS[0])])
def test_workers_answer_from_their_gpu_to_that_of_the_driver(rank: int, gpu: torch.device) -> None:
    assert world._devices(PLAN, rank) == ({}, {"rank0": {gpu: GPUS[1]}}, [gpu])


def test_worker_on_the_cpu_has_no_device_map() -> None:
    assert world._devices(PLAN, 4) == ({}, {}, [])


def test_world_plan_keeps_its_device_maps_as_json() -> None:
    assert world.WorldPlan.from_message(PLAN.to_message()) == PLAN


@pytest.mark.parametrize(
    ("plan", "channels"),
    [
        (PLAN, ["cuda_ipc", "cuda_xth", "cuda_basic", "cma", "basic"]),
        (dataclasses.replace(PLAN, gpus_in_sight=False), ["cuda_xth", "cuda_basic", "cma", "basic"]),
        (dataclasses.replace(PLAN, device_maps=[None] * 4), ["cma", "basic"]),
    ],
    ids=["all see the same gpus", "others see other gpus", "no gpus"],
)
def test_channels_for_gpus_are_those_that_the_members_can_use(plan: world.WorldPlan, channels: list[str]) -> None:
    assert world._channels(plan) == channels


# The way of tensors. A parcel's slots are what travels.


def parcel_on(*devices: torch.device) -> Parcel:
    """A parcel with a tensor on each device, whose numbers are the places."""
    parcel = pack([torch.full((300,), float(place)) for place in range(len(devices))])
    assert isinstance(parcel, Parcel)
    slots = [torch.full((1200,), place, dtype=torch.uint8) for place in range(len(devices))]
    on_devices = [
        slot if device == CPU else GpuTensor.on(device, slot) for slot, device in zip(slots, devices, strict=True)
    ]
    return dataclasses.replace(parcel, slots=on_devices)


def sent(parcel: Parcel, covered: frozenset[torch.device], taken_to: dict[torch.device, torch.device]) -> Any:
    """The message of a parcel as it arrives over a device map."""
    head, views, slots, staged = parcel_message(parcel, covered)
    arrived = [
        GpuTensor.on(taken_to[slot.device], slot) if isinstance(slot, GpuTensor) else slot.clone() for slot in slots
    ]
    return head, views, arrived, staged


def devices_of(parcel: Any) -> list[torch.device]:
    return [slot.device for slot in parcel.slots]


def test_tensors_on_mapped_gpus_go_from_device_to_device(two_gpus: None) -> None:
    message = sent(parcel_on(GPUS[1], CPU), frozenset([GPUS[1]]), {GPUS[1]: GPUS[0]})
    assert devices_of(_read(message, GPUS[0])) == [GPUS[0], CPU]
    assert copies == []


def test_tensors_on_gpus_that_no_map_covers_are_staged_and_go_to_the_workers_gpu(two_gpus: None) -> None:
    message = sent(parcel_on(GPUS[0], GPUS[1], CPU), frozenset([GPUS[1]]), {GPUS[1]: GPUS[0]})
    assert copies == [("cpu", GPUS[0])]  # that alone goes through host memory
    parcel = _read(message, GPUS[0])
    assert devices_of(parcel) == [GPUS[0], GPUS[0], CPU]
    assert copies[1:] == [(GPUS[0], CPU)]
    assert [int(slot.as_subclass(Tensor)[0]) for slot in parcel.slots] == [0, 1, 2]


def test_staged_tensors_stay_on_the_cpu_of_a_worker_that_has_no_gpu(two_gpus: None) -> None:
    message = sent(parcel_on(GPUS[1], CPU), frozenset(), {})
    assert devices_of(_read(message, CPU)) == [CPU, CPU]


def test_staging_waits_for_what_the_gpu_still_computes(two_gpus: None) -> None:
    waited: list[str] = []
    written: Any = SimpleNamespace(wait=lambda: waited.append("waited"))
    for covered, expected in ((frozenset(), ["waited"]), (frozenset([GPUS[1]]), [])):
        waited.clear()
        parcel = dataclasses.replace(parcel_on(GPUS[1]), ready=written)
        parcel_message(parcel, covered)
        assert waited == expected


def test_home_device_is_the_gpu_of_the_callers_tensors(two_gpus: None) -> None:
    assert home_device(parcel_on(CPU, GPUS[1], GPUS[0])) == GPUS[1]
    assert home_device(parcel_on(CPU)) is None
    assert home_device(pack(1)) is None


@pytest.mark.parametrize("is_mapped", [True, False])
def test_an_answers_tensors_return_to_the_gpu_of_the_callers(two_gpus: None, is_mapped: bool) -> None:
    """A worker on GPU 0 is called with a tensor on GPU 1 of its driver, which is the current one there."""
    covered = frozenset([GPUS[1]]) if is_mapped else frozenset()
    arguments = parcel_on(GPUS[1])
    fields, _, numbers = call_message(Call(1, "a", "same", arguments), covered)
    call, _ = read_call((fields, sent(arguments, covered, {GPUS[1]: GPUS[0]}), numbers), GPUS[0])
    assert devices_of(call.arguments) == [GPUS[0]]
    theirs = frozenset([GPUS[0]]) if is_mapped else frozenset()
    flags, failure, _, of_calls = outcome_message(Outcome("value", parcel_on(GPUS[0])), theirs)
    answer = sent(parcel_on(GPUS[0]), theirs, {GPUS[0]: GPUS[1]})
    outcome = read_outcome((flags, failure, answer, of_calls), home_device(arguments))
    assert devices_of(outcome.parcel) == [GPUS[1]]


def test_an_answer_to_a_call_without_gpu_tensors_stays_where_it_arrives(two_gpus: None) -> None:
    flags, failure, _, of_calls = outcome_message(Outcome("value", parcel_on(GPUS[0])), frozenset())
    answer = sent(parcel_on(GPUS[0]), frozenset(), {})
    assert devices_of(read_outcome((flags, failure, answer, of_calls), None).parcel) == [CPU]


def test_a_gpu_that_is_full_is_an_error_of_the_call_whose_tensors_it_has_no_room_for(
    two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensor: Tensor, device: torch.device) -> Tensor:
        raise torch.OutOfMemoryError(f"no room on {device}")

    message = sent(parcel_on(GPUS[1]), frozenset(), {})
    monkeypatch.setattr(Tensor, "to", full)
    parcel = read_parcel(message, GPUS[0])
    assert isinstance(parcel, Unreadable)
    with pytest.raises(torch.OutOfMemoryError, match="no room on cuda:0"):
        parcel.open(AllowList())


async def test_a_full_gpu_of_a_worker_is_an_error_that_names_client_and_worker() -> None:
    host = ExecutorSpec(learner(), {"a": {}}, EventBus()).make_host()
    call = Call(1, "a", "same", Unreadable(torch.OutOfMemoryError("no room on cuda:0")))
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[Outcome] = loop.create_future()

    def answer(outcome: Outcome) -> None:
        loop.call_soon_threadsafe(answered.set_result, outcome)

    try:
        host.submit(call, answer)
        outcome = await asyncio.wait_for(answered, 20)
    finally:
        assert host.close()
    with pytest.raises(torch.OutOfMemoryError, match="no room on cuda:0") as caught:
        outcome.result(call, AllowList(), "worker2")
    assert caught.value.__notes__ == ["in a.same on worker2"]


def test_a_full_gpu_of_the_driver_is_an_error_that_names_client_and_worker() -> None:
    outcome = Outcome("value", Unreadable(torch.OutOfMemoryError("no room on cuda:1")))
    with pytest.raises(torch.OutOfMemoryError, match="no room on cuda:1") as caught:
        outcome.result(Call(1, "a", "same", pack(1)), AllowList(), "worker2")
    assert caught.value.__notes__ == ["as the result of a.same on worker2 was read"]


def _read(message: Any, device: torch.device) -> Parcel:
    parcel = read_parcel(message, device)
    assert isinstance(parcel, Parcel), parcel
    return parcel


class NotingStream:
    """A CUDA stream that records its calls."""

    def __init__(self, name: str, log: list[tuple[str, object]]) -> None:
        self.name = name
        self.log = log

    def record_event(self) -> str:
        self.log.append((self.name, "records"))
        return f"event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.log.append((self.name, event))


def test_a_fence_has_the_readers_stream_wait_for_the_writers(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[tuple[str, object]] = []
    present = NotingStream("writer", log)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: present)
    tensor: Any = SimpleNamespace(
        is_cuda=True, device=GPUS[1], record_stream=lambda stream: log.append((stream.name, "uses the memory"))
    )
    written = fence([tensor, torch.ones(1)])
    assert log == [("writer", "records")]
    present = NotingStream("reader", log)
    assert written is not None
    written.wait()
    assert log[1:] == [("reader", "event of writer"), ("reader", "uses the memory")]
    assert fence([torch.ones(1)]) is None
