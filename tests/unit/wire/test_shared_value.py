"""A shared value: opened many times, each time as an object that nobody else holds, and gone with the last one."""

from __future__ import annotations

import gc
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import strangers
import torch
from torch import Tensor, nn

from torchfedrpc.errors import SerializationError, UntrustedTypeError
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.file import TensorFiles
from torchfedrpc.wire.packing import Reference, Unreadable, pack
from torchfedrpc.wire.shared import SharedValue, shared_values

ALLOW = AllowList([__name__])
LARGE = 1 << 20  # bytes: from here on it lies in files
DTYPES = [
    *("float32", "float64", "float16", "bfloat16", "bool", "complex64", "complex128"),
    *("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
    *(name for name in dir(torch) if name.startswith("float8_")),
]
NAME = "torchfedrpc-shared"


class Update:
    def __init__(self, weights: Any) -> None:
        self.weights = weights


def shared(obj: Any, num_openings: int | None = None) -> SharedValue:
    return SharedValue(pack(obj), 1, num_openings)


def of_ones(layer: nn.Linear) -> nn.Linear:
    nn.init.ones_(layer.weight)
    return layer


def raw(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def random_bytes(dtype: torch.dtype, num_bytes: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    high = 2 if dtype is torch.bool else 256
    return torch.randint(0, high, (num_bytes,), generator=generator).to(torch.uint8).view(dtype)


def num_mappings() -> int:
    return Path("/proc/self/maps").read_text().count(NAME)


def num_descriptors() -> int:
    count = 0
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            count += NAME in os.readlink(entry)
    return count


@pytest.fixture(scope="module")
def _few_objects() -> Iterator[None]:
    """Collections look at what is made here alone: at all that pytest and torch hold, each would take long."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _no_file_left(_few_objects: None) -> Iterator[None]:
    """No test leaves a mapping or a descriptor, and none waits for a collection to let go of them."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    assert (num_mappings(), num_descriptors()) == (0, 0)


# What is opened.


@pytest.mark.parametrize("num_bytes", [64, 2 * LARGE], ids=["small", "large"])
@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_keeps_its_bits(name: str, num_bytes: int) -> None:
    dtype = getattr(torch, name)
    tensor = random_bytes(dtype, num_bytes).reshape(2, -1)
    value = shared([tensor, tensor[0, 0].clone(), tensor[:0], tensor.t()])
    for _ in range(2):
        for back, sent in zip(value.open(ALLOW), [tensor, tensor[0, 0], tensor[:0], tensor.t()], strict=True):
            assert back.dtype is dtype
            assert back.shape == sent.shape
            assert back.stride() == sent.stride() or not sent.numel()
            assert torch.equal(raw(back), raw(sent))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(600_000.0).reshape(600, 1000).t(),
        torch.arange(600_000.0).reshape(2, 3, 100, 1000).to(memory_format=torch.channels_last),
        torch.arange(1_200_000.0)[::2],
        torch.ones(1, 1000).expand(600, 1000),
        torch.arange(600_010.0)[10:],
    ],
    ids=["transposed", "channels last", "gaps", "expanded", "offset"],
)
def test_strides_are_kept_where_they_leave_no_gaps(tensor: Tensor) -> None:
    value = shared(tensor)
    for _ in range(2):
        back = value.open(ALLOW)
        assert torch.equal(back, tensor)
        assert back.stride() == pack(tensor).open(ALLOW).stride()


@pytest.mark.parametrize("size", [10, 600_000])
def test_ties_are_kept_within_an_opening_and_not_between_two(size: int) -> None:
    base = torch.zeros(size)
    value = shared({"all": base, "part": base[5:], "again": base})
    first, second = value.open(ALLOW), value.open(ALLOW)
    first["all"][5] = 1
    assert first["part"][0] == 1
    assert first["again"] is first["all"]
    assert second["part"].sum() == 0


@pytest.mark.parametrize("size", [10, 600_000])
def test_arrays_arrive_equal_and_writable(size: int) -> None:
    array = np.arange(size, dtype=np.float32)
    value = shared([array, array.reshape(2, -1).T])
    for _ in range(2):
        back, transposed = value.open(ALLOW)
        assert np.array_equal(back, array)
        assert np.array_equal(transposed, array.reshape(2, -1).T)
        back += 1
    assert np.array_equal(array, np.arange(size))


def test_parameters_modules_and_objects_arrive_whole() -> None:
    model = nn.Sequential(nn.Linear(700, 700), nn.Linear(700, 2))
    model[0].bias.requires_grad_(False)
    value = shared([model, Update(model.state_dict())])
    for _ in range(2):
        back, update = value.open(ALLOW)
        assert [parameter.requires_grad for parameter in back.parameters()] == [True, False, True, True]
        assert all(type(parameter) is nn.Parameter for parameter in back.parameters())
        assert all(torch.equal(update.weights[name], tensor) for name, tensor in model.state_dict().items())
        back(torch.ones(1, 700)).sum().backward()


def test_three_hundred_small_tensors_have_no_memory_in_common() -> None:
    value = shared({number: torch.full((1000,), float(number)) for number in range(300)})
    back = value.open(ALLOW)
    back[0].fill_(-1)
    assert back[1].unique().tolist() == [1.0]
    assert len({tensor.untyped_storage().data_ptr() for tensor in back.values()}) == 300


def test_memory_is_aligned_as_an_allocation_is() -> None:
    value = shared([torch.ones(size) for size in (100_001, 200_003, 300_007)])
    assert all(tensor.data_ptr() % 64 == 0 for tensor in value.open(ALLOW))


def test_more_than_a_thousand_large_tensors_need_few_files() -> None:
    value = shared([torch.full((20_000,), float(number)) for number in range(1500)])
    back = value.open(ALLOW)
    assert num_descriptors() <= 20
    assert all(tensor[0] == number for number, tensor in enumerate(back))


# Nobody sees another's changes.


@pytest.mark.parametrize("size", [10, 600_000])
def test_no_opening_sees_what_another_writes(size: int) -> None:
    tensor = torch.zeros(size)
    value = shared(tensor)
    tensor.fill_(7)
    first = value.open(ALLOW)
    first.fill_(1)
    second = value.open(ALLOW)
    second[0] = 2
    assert value.open(ALLOW).sum() == 0
    assert first.unique().tolist() == [1.0]
    assert tensor.unique().tolist() == [7.0]


def test_what_is_sent_is_not_what_was_written_into_an_opening() -> None:
    value = shared(torch.zeros(600_000))
    value.open(ALLOW).fill_(1)
    assert pack(value, may_refer=True).open(ALLOW).sum() == 0
    assert value.parcel.copy().open(ALLOW).sum() == 0


def test_threads_may_open_at_once() -> None:
    value = shared({"weights": torch.arange(1_000_000.0)}, 64)
    start = threading.Barrier(8)

    def add(number: int) -> float:
        if number < 8:
            start.wait(10)
        weights = value.open(ALLOW)["weights"]
        weights += number
        return float(weights[-1])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(add, range(64))) == [999_999.0 + number for number in range(64)]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_has_it_and_its_writes_are_its_own() -> None:
    value = shared(torch.zeros(600_000))
    opened = value.open(ALLOW)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(10)
            opened[:3] = 1  # few: OpenMP has no threads in a child
            status = int(opened[:4].tolist() != [1, 1, 1, 0] or value.open(ALLOW)[:3].any().item())
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert opened.sum() == 0


# Memory.


def test_many_openings_leave_nothing() -> None:
    value = shared([torch.ones(400_000), torch.ones(400_000)])
    value.open(ALLOW)
    descriptors, mappings = num_descriptors(), num_mappings()
    for _ in range(300):
        value.open(ALLOW)[0].fill_(2)
    assert (num_descriptors(), num_mappings()) == (descriptors, mappings)
    kept = [value.open(ALLOW) for _ in range(50)]
    assert num_descriptors() == descriptors
    del kept
    assert num_mappings() == mappings


def test_an_opening_outlives_the_value() -> None:
    value = shared(torch.arange(600_000.0))
    opened = value.open(ALLOW)
    del value
    assert num_descriptors() == 0
    assert torch.equal(opened, torch.arange(600_000.0))


def test_whoever_keeps_one_tensor_keeps_little_more() -> None:
    value = shared([torch.ones(50_000) if number == 7 else torch.ones(500_000) for number in range(20)])
    kept = value.open(ALLOW)[7]
    del value
    held = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if NAME in line:
            start, stop = (int(part, 16) for part in line.split()[0].split("-"))
            held += stop - start
    assert held <= 4 * 2_000_000  # of 40
    assert kept.sum() == 50_000


def test_the_last_opening_takes_the_memory_itself() -> None:
    value = shared(torch.ones(600_000), 1)
    storage = weakref.ref(value.parcel.slots[0].untyped_storage())  # type: ignore[union-attr]
    address = value.parcel.slots[0].data_ptr()  # type: ignore[union-attr]
    opened = value.open(ALLOW)
    assert opened.data_ptr() == address
    assert num_descriptors() == 0
    del opened
    assert storage() is None


@pytest.mark.parametrize("size", [10, 600_000])
def test_the_first_of_two_openings_takes_a_copy(size: int) -> None:
    value = shared(torch.zeros(size), 2)
    first = value.open(ALLOW)
    first.fill_(1)
    second = value.open(ALLOW)
    assert second.sum() == 0


@pytest.mark.parametrize("size", [10, 600_000])
def test_a_call_that_joins_keeps_the_memory_for_its_own_opening(size: int) -> None:
    value = shared(torch.zeros(size), 1)
    assert value.join()
    value.open(ALLOW).fill_(1)
    assert value.open(ALLOW).sum() == 0
    assert value.join() == (size == 600_000)  # the files of a large one are there for further openings


def test_after_a_call_has_left_the_last_opening_takes_the_memory_itself() -> None:
    value = shared(torch.ones(600_000), 1)
    address = value.parcel.slots[0].data_ptr()  # type: ignore[union-attr]
    assert value.join()
    value.leave()
    assert value.open(ALLOW).data_ptr() == address
    assert not value.join()


@pytest.mark.parametrize("size", [10, 600_000])
def test_more_openings_than_were_announced_find_it_too(size: int) -> None:
    """A call whose arguments could not be opened for want of memory is asked again, and opens them again."""
    value = shared(torch.zeros(size), 2)
    opened = [value.open(ALLOW) for _ in range(2)]
    opened[0].fill_(1)
    opened[1].fill_(1)
    if size == 600_000:  # a small one is gone with its last opening
        assert value.open(ALLOW).sum() == 0


# Comparing.

EQUAL = {
    "tensors": lambda: {"w": torch.arange(600_000.0), "b": torch.ones(3), "c": torch.ones(4)},
    "tied": lambda: (lambda base: [base, base[1:]])(torch.ones(100)),
    "arrays": lambda: [np.arange(5000), np.arange(3)],
    "parameter": lambda: nn.Parameter(torch.ones(100)),
    "nan": lambda: torch.tensor([float("nan"), -0.0]),
    "empty": lambda: [torch.empty(0), torch.empty(3, 0)],
    "module": lambda: of_ones(nn.Linear(3, 2).requires_grad_(False)).weight,
    "special": lambda: [torch.eye(3).to_sparse(), torch.tensor([1 + 2j]).conj()],
}


@pytest.mark.parametrize("name", EQUAL)
def test_an_object_is_equal_to_itself_and_to_a_copy(name: str) -> None:
    obj = EQUAL[name]()
    value = shared(obj)
    assert value.equals(obj)
    assert value.equals(EQUAL[name]())


CHANGES = {
    "a last byte": lambda obj: obj["w"].view(torch.uint8)[-1:].add_(1),
    "a small tensor": lambda obj: obj["b"].add_(1),
    "minus zero": lambda obj: obj["z"].neg_(),
    "requires_grad": lambda obj: obj["w"].requires_grad_(),
    "dtype": lambda obj: obj.update(w=obj["w"].view(torch.int32)),
    "shape": lambda obj: obj.update(w=obj["w"].view(2, -1)),
    "strides": lambda obj: obj.update(s=obj["s"].t()),
    "a tie": lambda obj: obj.update(z=obj["w"][:1]),
    "a number": lambda obj: obj.update(n=2),
    "a key more": lambda obj: obj.update(more=None),
    "a key less": lambda obj: obj.pop("n"),
    "an array": lambda obj: obj["a"].__setitem__(-1, 9),
    "order": lambda obj: obj.update(w=obj.pop("w")),
    "its data": lambda obj: setattr(obj["w"], "data", torch.ones(5)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_makes_it_unequal(name: str) -> None:
    obj = {
        "w": torch.arange(5000.0),
        "b": torch.ones(3),
        "z": torch.zeros(1),
        "s": torch.ones(2, 2),
        "n": 1,
        "a": np.zeros(5000),
    }
    value = shared(obj)
    CHANGES[name](obj)
    assert not value.equals(obj)


def test_what_cannot_be_compared_is_not_equal() -> None:
    obj = [1]
    assert not SharedValue(Reference(obj)).equals(obj)
    assert not SharedValue(Unreadable(ValueError("lost"))).equals(obj)


# Errors.


def test_a_type_that_is_not_trusted_is_refused_at_each_opening() -> None:
    value = shared([torch.ones(600_000), strangers.Stranger()], 2)
    for _ in range(2):
        with pytest.raises(UntrustedTypeError, match="trusted_modules"):
            value.open(ALLOW)


def test_what_could_not_be_received_raises_at_each_opening() -> None:
    value = SharedValue(Unreadable(MemoryError("none left")))
    for _ in range(2):
        with pytest.raises(MemoryError, match="none left"):
            value.open(ALLOW)


def test_a_want_of_memory_is_told_and_the_next_opening_may_go_well(monkeypatch: pytest.MonkeyPatch) -> None:
    value = shared(torch.ones(600_000), 2)

    def refuse(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(OSError, match="No space left"):
        value.open(ALLOW)
    monkeypatch.undo()
    assert value.open(ALLOW).sum() == 600_000


def test_a_value_stands_for_itself_in_arguments_alone() -> None:
    value = shared(torch.ones(3))
    parcel = pack(([value, value], {"x": value}), may_refer=True)
    assert shared_values(parcel) == (value,)
    (first, second), kwargs = parcel.open(ALLOW)
    assert first is second is kwargs["x"]  # one object in one call
    with pytest.raises(SerializationError, match="arguments of a call"):
        pack([value])


def test_no_tensors_are_no_files() -> None:
    assert TensorFiles.of([]).tensors() == []
    (empty,) = TensorFiles.of([torch.empty(3, 0)]).tensors()
    assert empty.shape == (3, 0)
