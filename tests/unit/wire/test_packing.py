"""Packing: any object by value, its tensors beside it, and nothing shared with what it was made of."""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import fractions
import functools
import gc
import pathlib
import pickle
import random
import types
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import strangers
import torch
from simulated_gpus import SimulatedGpus
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from torchfedrpc.errors import SerializationError, UntrustedTypeError
from torchfedrpc.wire import packing
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.packing import Parcel, Reference, Unreadable, pack

ALLOW = AllowList([__name__])
LARGE = 5000  # elements: well beyond what stays in the pickle


def sent(obj: Any) -> Any:
    return pack(obj).open(ALLOW)


@dataclass
class Update:
    weights: Tensor
    num_samples: int = 0


@dataclass(frozen=True, slots=True)
class Frozen:
    weights: Tensor
    name: str


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Access(enum.Flag):
    READ = 1
    WRITE = 2


class Pair(NamedTuple):
    first: Any
    second: Any


class Plain:
    class Nested:
        def __init__(self, value: Any) -> None:
            self.value = value

    def __init__(self, value: Any) -> None:
        self.value = value


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class WithState:
    def __init__(self, value: Any) -> None:
        self.value = value
        self.cache: Callable[[], Any] | None = lambda: value

    def __getstate__(self) -> dict[str, Any]:
        return {"value": self.value}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.value = state["value"]
        self.cache = None


class Labelled(Tensor):
    """A tensor subclass of a trusted module."""


class Masked(nn.Parameter):
    """A parameter subclass of a trusted module."""


# Plain objects.


@pytest.mark.parametrize(
    "obj",
    [
        None,
        True,
        -(10**40),
        1.5,
        2 + 3j,
        "ü\\ \ud800 \0",
        b"bytes" * 3000,
        bytearray(b"array" * 3000),
        ...,
        NotImplemented,
        (),
        [1, (2, [3])],
        {1: {"two": {3.0}}},
        {1, 2},
        frozenset({1}),
        range(1, 9, 2),
        slice(1, None, 2),
        collections.deque([1, 2], maxlen=2),
        collections.OrderedDict(b=1, a=2),
        collections.Counter("aab"),
        collections.ChainMap({"a": 1}, {"b": 2}),
        collections.defaultdict(list, a=[1]),
        datetime.datetime(2024, 2, 29, 1, 2, 3, 4, tzinfo=datetime.timezone(datetime.timedelta(hours=2))),
        datetime.timedelta(days=1, microseconds=1),
        datetime.date(2024, 2, 29),
        datetime.time(1, 2),
        decimal.Decimal("1.10"),
        fractions.Fraction(1, 3),
        pathlib.Path("/tmp/x"),
        pathlib.PurePosixPath("x"),
        uuid.UUID(int=7),
        types.SimpleNamespace(a=1),
        int,
        dict,
        Colour.RED,
        Access.READ | Access.WRITE,
        Pair(1, [2]),
        Update,
        Plain.Nested,
        torch.Size([2, 3]),
        torch.device("cpu"),
        torch.device("cuda", 1),
        torch.bfloat16,
        torch.strided,
        torch.sparse_coo,
        torch.channels_last,
        np.dtype("float32"),
        np.dtype([("a", ">i4"), ("b", "f8", (2,))]),
        np.float32(1.5),
        np.int64(-3),
        np.bool_(True),
        np.complex64(1j),
        np.datetime64("2024-02-29"),
        np.str_("a"),
    ],
    ids=lambda obj: f"{type(obj).__name__}_{str(obj)[:12]!a}",
)
def test_plain_data_comes_back_equal_and_of_its_type(obj: Any) -> None:
    received = sent(obj)
    assert type(received) is type(obj)
    assert received == obj


def test_a_queue_keeps_its_bound_and_a_default_its_factory() -> None:
    assert sent(collections.deque([1], maxlen=3)).maxlen == 3
    assert sent(collections.defaultdict(list))["new"] == []


@pytest.mark.parametrize("make", [Plain, Plain.Nested, Slotted, WithState, Update, lambda value: Frozen(value, "x")])
def test_an_object_of_a_trusted_module_carries_its_tensors(make: Callable[[Any], Any]) -> None:
    obj = make(torch.arange(3.0))
    received = sent(obj)
    assert type(received) is type(obj)
    value = received.value if hasattr(received, "value") else received.weights
    assert value.tolist() == [0, 1, 2]


def test_members_of_an_enum_stay_the_same_objects() -> None:
    assert sent([Colour.BLUE, Access.READ]) == [Colour.BLUE, Access.READ]
    assert sent(Colour.BLUE) is Colour.BLUE


@pytest.mark.parametrize(
    "wrap",
    [
        lambda value: [value],
        lambda value: (value,),
        lambda value: {"key": value},
        lambda value: Pair(0, value),
        lambda value: collections.deque([value]),
        lambda value: collections.OrderedDict(key=value),
        lambda value: types.SimpleNamespace(key=value),
        lambda value: np.array([value, None], dtype=object)[:1],
        lambda value: [[[[[value]]]]],
        lambda value: Update(value),
    ],
    ids=["list", "tuple", "dict", "namedtuple", "deque", "ordered", "namespace", "object_array", "deep", "dataclass"],
)
def test_a_tensor_is_found_anywhere_and_left_out_of_the_pickle(wrap: Callable[[Tensor], Any]) -> None:
    weights = torch.arange(float(LARGE))
    parcel = pack(wrap(weights))
    assert len(parcel.slots) == 1
    assert len(parcel.head) < 2000
    assert "tensor" in repr(parcel.open(ALLOW))


def test_the_same_object_twice_stays_one_object() -> None:
    weights, names, array = torch.ones(2), ["a"], np.ones(LARGE)
    received = sent([weights, names, array, weights, names, array])
    for index in range(3):
        assert received[index] is received[index + 3]


def test_an_object_may_hold_itself() -> None:
    loop: list[Any] = [torch.ones(1)]
    loop.append({"loop": loop})
    received = sent(loop)
    assert received[1]["loop"] is received


def test_a_value_nested_too_deeply_is_an_error_of_ours() -> None:
    deep: list[Any] = functools.reduce(lambda inner, _: [inner], range(100_000), [])
    with pytest.raises(SerializationError, match="RecursionError"):
        pack(deep)


@pytest.mark.parametrize(
    "make",
    [
        lambda: lambda: 1,
        lambda: (number for number in range(3)),
        lambda: open("/dev/null"),  # noqa: SIM115
        lambda: memoryview(b"x"),
        lambda: types.MappingProxyType({}),
        lambda: pack,
        lambda: type("Local", (), {})(),
    ],
    ids=["lambda", "generator", "file", "memoryview", "proxy", "function", "local_class"],
)
def test_what_cannot_travel_is_an_error_of_ours(make: Callable[[], Any]) -> None:
    obj = make()
    try:
        with pytest.raises(SerializationError):
            sent({"deep": [obj]})
    finally:
        getattr(obj, "close", lambda: None)()


class FailsToPickle:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getstate__(self) -> Any:
        raise self.error


@pytest.mark.parametrize("error", [ValueError("v"), OSError("o"), pickle.PicklingError("p"), KeyError("k")])
def test_an_error_of_the_objects_own_pickling_becomes_ours_and_is_its_cause(error: Exception) -> None:
    with pytest.raises(SerializationError, match=type(error).__name__) as caught:
        pack([FailsToPickle(error)])
    assert caught.value.__cause__ is error


def test_memory_that_runs_out_while_packing_is_told_as_that() -> None:
    with pytest.raises(MemoryError, match="full"):
        pack([FailsToPickle(MemoryError("full"))])


def test_what_could_not_be_received_raises_why_where_it_is_opened() -> None:
    reason = torch.OutOfMemoryError("the device is full")
    for parcel in (Unreadable(reason), Unreadable(reason).copy()):
        with pytest.raises(torch.OutOfMemoryError, match="the device is full"):
            parcel.open(ALLOW)


def test_an_untrusted_object_is_refused_where_it_is_opened() -> None:
    parcel = pack(strangers.Stranger())
    with pytest.raises(UntrustedTypeError, match=r"strangers\.Stranger .*trusted_modules=\[strangers\]"):
        parcel.open(ALLOW)
    assert isinstance(pack(strangers.Stranger()).open(AllowList(["strangers"])), strangers.Stranger)


def test_the_head_alone_is_no_pickle_for_anybody_else() -> None:
    with pytest.raises(SerializationError, match="head of a parcel"):
        pickle.loads(pack(torch.ones(2)).head)


@pytest.mark.parametrize("head", [b"", b"garbage", b"\x80\x05.", b"\x80\x05N", pickle.dumps([1])[:-2]])
def test_a_damaged_head_is_an_error_of_ours(head: bytes) -> None:
    with pytest.raises(SerializationError):
        Parcel(head, [], []).open(ALLOW)


# The value is taken when it is packed.


def test_changes_made_after_packing_are_not_seen() -> None:
    weights, buffer, array = torch.zeros(3), bytearray(b"aa"), np.zeros(LARGE)
    small, state = np.zeros(3), {"list": [1]}
    parcel = pack([weights, buffer, array, small, state])
    weights.fill_(1)
    buffer[:] = b"bb"
    array.fill(1)
    small.fill(1)
    state["list"].append(2)
    opened = parcel.open(ALLOW)
    assert opened[0].tolist() == [0, 0, 0]
    assert opened[1] == b"aa"
    assert not opened[2].any()
    assert not opened[3].any()
    assert opened[4] == {"list": [1]}


def test_changes_of_what_was_opened_do_not_reach_the_original() -> None:
    model, array = nn.Linear(2, 2), np.zeros(LARGE)
    before = [parameter.tolist() for parameter in model.parameters()]
    opened_model, opened_array, opened_tie = sent([model, array, model.weight])
    with torch.no_grad():
        opened_model.weight.fill_(9)
    opened_array.fill(9)
    assert opened_tie.tolist() == [[9, 9], [9, 9]]
    assert [parameter.tolist() for parameter in model.parameters()] == before
    assert not array.any()


@pytest.mark.parametrize("make", [lambda: torch.zeros(3), lambda: np.zeros(LARGE), lambda: [torch.zeros(4)[1:]] * 2])
def test_a_copy_of_a_parcel_is_opened_on_memory_of_its_own(make: Callable[[], Any]) -> None:
    parcel = pack([make()])
    first, second = parcel.copy().open(ALLOW)[0], parcel.open(ALLOW)[0]
    first = first[0] if isinstance(first, list) else first
    second = second[0] if isinstance(second, list) else second
    first[:] = 7
    assert second.tolist() == [0] * len(second)


@pytest.mark.parametrize("make", [lambda: torch.zeros(3), lambda: np.zeros(LARGE)])
def test_an_opened_parcel_holds_on_to_nothing(make: Callable[[], Any]) -> None:
    parcel = pack(make())
    memory = weakref.ref(parcel.slots[0].untyped_storage())
    opened = parcel.open(ALLOW)
    assert memory() is not None
    del opened
    assert memory() is None
    assert not parcel.slots


def test_a_copy_of_a_parcel_keeps_ties() -> None:
    base = torch.zeros(6)
    first, second = pack([base[:4], base[2:]]).copy().open(ALLOW)
    first[3] = 5
    assert second.tolist() == [0, 5, 0, 0]


def test_an_opened_parcel_is_not_kept_by_anything() -> None:
    gc.collect()
    gc.disable()
    try:
        opened = pack([torch.zeros(3), np.zeros(LARGE)]).open(ALLOW)
        gone = weakref.ref(opened[0])
        del opened
        assert gone() is None
    finally:
        gc.enable()


def test_the_bytes_of_a_parcel_are_those_of_its_head_and_slots() -> None:
    parcel = pack([torch.zeros(1000), np.zeros(LARGE, dtype=np.uint8)])
    assert parcel.num_bytes == len(parcel.head) + 4000 + LARGE


def test_a_reference_opens_as_the_object_itself() -> None:
    weights = torch.zeros(1)
    reference = Reference(weights)
    assert reference.open(ALLOW) is weights
    assert reference.copy().open(ALLOW) is weights
    assert reference.num_bytes == 0


# Kinds of tensors.


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("kind", [torch.Tensor.clone, Parameter, lambda plain: plain.as_subclass(Labelled)])
def test_kind_and_requires_grad_are_kept(kind: Callable[..., Tensor], requires_grad: bool) -> None:
    tensor = kind(torch.arange(3.0)).requires_grad_(requires_grad)
    received = sent(tensor)
    assert type(received) is type(tensor)
    assert received.requires_grad is requires_grad
    assert received.is_leaf
    assert received.tolist() == [0, 1, 2]


def test_an_integer_parameter_needs_no_gradient() -> None:
    received = sent(Parameter(torch.arange(3), requires_grad=False))
    assert type(received) is Parameter
    assert not received.requires_grad


@pytest.mark.parametrize("make", [lambda: Parameter(torch.ones(2)), lambda: torch.ones(2), lambda: Labelled()])
def test_attributes_of_a_tensor_travel_by_value_with_it(make: Callable[[], Any]) -> None:
    tensor = make()
    tensor.label, tensor.mask = ["layer 1"], torch.zeros(2)
    parcel = pack(tensor)
    tensor.label.append("changed")
    tensor.mask.fill_(1)
    received = parcel.open(ALLOW)
    assert received.label == ["layer 1"]
    assert received.mask.tolist() == [0, 0]


def test_an_attribute_that_cannot_travel_is_refused_and_not_dropped() -> None:
    weights = Parameter(torch.ones(2))
    weights.hook = lambda: None  # type: ignore[attr-defined]
    with pytest.raises(SerializationError):
        pack(weights)


def test_a_gradient_travels_with_its_tensor_and_history_stays_behind() -> None:
    weights = torch.ones(2, requires_grad=True)
    product = weights * 2
    product.sum().backward()
    received_weights, received_product = sent([weights, product])
    assert received_weights.grad.tolist() == [2, 2]
    received_weights.grad.fill_(7)
    assert weights.grad is not None
    assert weights.grad.tolist() == [2, 2]
    assert received_product.grad_fn is None
    assert received_product.requires_grad
    assert received_product.is_leaf


def test_packing_records_no_gradient_history() -> None:
    weights = torch.ones(4, requires_grad=True)
    assert not any(slot.requires_grad for slot in pack([weights, weights[:2], weights.to_sparse()]).slots)


@pytest.mark.parametrize("trusted", [True, False])
def test_a_subclass_travels_only_from_a_trusted_module(trusted: bool) -> None:
    parcel = pack(torch.ones(2).as_subclass(Labelled))
    if trusted:
        assert type(parcel.open(ALLOW)) is Labelled
    else:
        with pytest.raises(UntrustedTypeError, match=rf"{__name__}\.Labelled"):
            parcel.open(AllowList())


def test_a_subclass_of_parameter_is_kept() -> None:
    received = sent(Masked(torch.ones(2)))
    assert type(received) is Masked
    assert received.requires_grad


@dataclass
class Forged:
    """Pickles as a tensor of some kind, as a stranger could write it."""

    kind: Any

    def __reduce__(self) -> Any:
        return packing.restore, ("dense", False, self.kind, None, 0)


@pytest.mark.parametrize("kind", [int, Colour, "string", 3, len], ids=str)
def test_a_pickle_that_names_another_kind_of_tensor_is_refused(kind: Any) -> None:
    parcel = pack(torch.ones(2))
    head = pickle.dumps(Forged(kind), protocol=5)
    with pytest.raises(SerializationError):
        Parcel(head, parcel.views, parcel.slots).open(ALLOW)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_an_inference_tensor_arrives_as_a_normal_one(mode: Any) -> None:
    with torch.inference_mode():
        weights = torch.arange(4.0)
        views = [weights[:3], weights[1:], torch.ones(1)]
    with mode():
        parcel = pack([weights, *views])
        copies = parcel.copy().open(ALLOW)
    for received in (copies, parcel.open(ALLOW)):
        assert [part.tolist() for part in received] == [[0, 1, 2, 3], [0, 1, 2], [1, 2, 3], [1]]
        assert not any(part.is_inference() for part in received)


@pytest.mark.parametrize(
    "make",
    [
        lambda z: z.conj(),
        lambda z: z.imag,
        lambda z: z.conj().imag,
        lambda z: z.real,
        lambda z: torch.view_as_real(z),
        lambda z: z.conj().T,
        lambda z: torch._efficientzerotensor((3,)),
    ],
    ids=["conj", "imag", "neg", "real", "view_as_real", "conj_transposed", "zero"],
)
def test_lazy_views_arrive_as_such(make: Callable[[Tensor], Tensor]) -> None:
    tensor = make(torch.tensor([[1 + 2j, 3 - 4j]]))
    received = sent(tensor)
    assert torch.equal(received, tensor)
    assert (received.is_conj(), received.is_neg(), received._is_zerotensor()) == (
        (tensor.is_conj(), tensor.is_neg(), False)
    )


def test_real_and_imaginary_parts_stay_tied_to_their_whole() -> None:
    whole = torch.tensor([1 + 2j, 3 - 4j])
    received, real = sent([whole, whole.real])
    real[0] = 7
    assert received.tolist() == [7 + 2j, 3 - 4j]


def test_a_conjugate_stays_tied_to_its_base() -> None:
    whole = torch.tensor([1 + 2j])
    received, conjugate = sent([whole, whole.conj()])
    assert received.tolist() == [1 + 2j]
    assert conjugate.tolist() == [1 - 2j]
    received[0] = 3 + 4j
    assert conjugate.tolist() == [3 - 4j]


def test_a_negative_stays_tied_to_its_base() -> None:
    whole = torch.tensor([1.0, 2.0])
    received, negative = sent([whole, torch._neg_view(whole)])
    assert received.tolist() == [1, 2]
    assert negative.tolist() == [-1, -2]
    received[0] = 5
    assert negative.tolist() == [-5, -2]


def test_a_tensor_with_storage_freed_is_refused() -> None:
    weights = torch.ones(3)
    weights.untyped_storage().resize_(0)
    with pytest.raises(SerializationError, match="freed or resized"):
        pack({"weights": weights})


def test_a_tensor_that_cannot_travel_is_refused_deep_inside() -> None:
    with pytest.raises(SerializationError, match="run the module once"):
        pack({"model": [nn.LazyLinear(3)]})


# Many small tensors.


def many() -> dict[str, Tensor]:
    return {f"layer{number}": torch.full((10, 7), float(number)) for number in range(30)}


def test_many_small_tensors_are_one_slot_for_each_dtype() -> None:
    state = {**many(), "steps": torch.tensor(3), "seen": torch.tensor([4, 5]), "large": torch.zeros(100_000)}
    parcel = pack(state)
    sizes = {(slot.dtype, slot.numel()) for slot in parcel.slots}
    assert sizes == {(torch.float32, 2100), (torch.float32, 100_000), (torch.int64, 3)}
    assert len(parcel.slots) == 3
    received = parcel.open(ALLOW)
    assert list(received) == list(state)
    assert all(torch.equal(received[name], tensor) for name, tensor in state.items())


def test_small_tensors_arrive_as_if_each_had_come_alone() -> None:
    received = list(sent(many()).values())
    for number, tensor in enumerate(received):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert tensor.storage_offset() == 0
        assert tensor.stride() == (7, 1)
        assert tensor.data_ptr() % 64 == 0
        assert tensor.is_leaf
        assert not tensor._is_view()
        tensor.fill_(-1)
        assert all(bool((other == place).all()) for place, other in enumerate(received) if place > number)
    received[0].resize_(1000)
    received[0].requires_grad_()
    received[1].untyped_storage().resize_(0)
    assert received[2].eq(-1).all()


def test_one_of_many_small_tensors_keeps_no_memory_of_the_others() -> None:
    received = list(sent(many()).values())
    there = [weakref.ref(tensor.untyped_storage()) for tensor in received]
    kept = received[3]
    del received
    assert [place for place, memory in enumerate(there) if memory() is not None] == [3]
    assert kept[0, 0] == 3


def test_changes_of_small_tensors_made_after_packing_are_not_seen() -> None:
    state = many()
    parcel = pack(state)
    for tensor in state.values():
        tensor.fill_(-1)
    assert all(bool((tensor >= 0).all()) for tensor in parcel.open(ALLOW).values())


def test_small_tensors_of_every_kind_go_together() -> None:
    base = torch.arange(30.0)
    state = [
        nn.Parameter(torch.ones(3)), torch.ones(2, requires_grad=True), torch.ones(2).as_subclass(Labelled),
        base[:4], base[2:6], torch.tensor(7.0), torch.ones(2, 3).t(), torch.ones(1, 3).t(), torch.empty(0, 3),
        torch.arange(6.0)[::2], torch.ones(1).expand(4), torch.tensor([1 + 2j]).conj(), torch.eye(2).to_sparse(),
    ]  # fmt: skip
    received = sent(state)
    for one, other in zip(received, state, strict=True):
        assert type(one) is type(other)
        assert one.requires_grad is other.requires_grad
        assert torch.equal(one.to_dense(), other.to_dense())
    assert [part.stride() for part in received[6:9]] == [(1, 3), (1, 3), (3, 1)]
    received[3].fill_(9)
    assert received[4].tolist() == [9, 9, 4, 5]


# Modules and optimisers.


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.25)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.second(self.first(x)))
        return out


def test_a_module_arrives_whole_with_its_shared_weights() -> None:
    net = Net().eval()
    received = sent(net)
    inputs = torch.randn(4, 3)
    assert torch.equal(received(inputs), net(inputs))
    assert received.second.weight is received.first.weight
    assert not received.training
    assert received.drop.p == 0.25
    received.train()(inputs).sum().backward()
    assert received.first.weight.grad is not None
    assert net.first.weight.grad is None


def test_a_state_dict_keeps_order_metadata_and_ties() -> None:
    state: Any = Net().state_dict()
    received = sent(state)
    assert list(received) == list(state)
    assert received._metadata == state._metadata
    assert (
        received["first.weight"].untyped_storage().data_ptr()
        == received["second.weight"].untyped_storage().data_ptr()
    )
    assert sum(slot.nbytes for slot in pack(state).slots) == sum(part.nbytes for part in state.values()) - 9 * 4


def test_a_model_and_its_optimiser_sent_together_stay_together() -> None:
    net = nn.Linear(2, 1)
    optimiser = torch.optim.Adam(net.parameters(), lr=0.5)
    net(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    received_net, received_optimiser = sent([net, optimiser])
    for model, steps in ((net, optimiser), (received_net, received_optimiser)):
        model.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        steps.step()
    assert torch.equal(received_net.weight, net.weight)


# numpy.


ARRAYS: dict[str, Callable[[int], Any]] = {
    "floats": lambda n: np.arange(float(n)),
    "fortran": lambda n: np.asfortranarray(np.arange(2.0 * n).reshape(n, 2)),
    "stepped": lambda n: np.arange(4.0 * n).reshape(n, 4)[:, ::2],
    "reversed": lambda n: np.arange(float(n))[::-1],
    "big_endian": lambda n: np.arange(n, dtype=">f8"),
    "structured": lambda n: np.array([(1, 2.5)] * n, dtype=[("a", "i4"), ("b", "f8")]),
    "bool": lambda n: np.arange(n) % 3 == 0,
    "half": lambda n: np.arange(n).astype(np.float16),
    "complex": lambda n: np.arange(n).astype(np.complex64) * 1j,
    "long_double": lambda n: np.arange(n).astype(np.longdouble) / 3,
    "dates": lambda n: np.array(["2024-02-29", "NaT"] * n, dtype="datetime64[D]")[: n + n % 2],
    "texts": lambda n: np.array(["a", "ü"] * n),
    "objects": lambda n: np.array([1, "a", None, (2,)] * n, dtype=object),
    "broadcast": lambda n: np.broadcast_to(np.float32(2), (n, 3)),
    "no_rows": lambda n: np.zeros((0, n)),
}


GAPPY = ("stepped", "reversed", "broadcast")


@pytest.mark.parametrize("size", [3, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("name", ARRAYS)
class TestEveryArray:
    def test_keeps_dtype_shape_and_values(self, name: str, size: int) -> None:
        array = ARRAYS[name](size)
        received = sent(array)
        assert type(received) is np.ndarray
        assert received.dtype == array.dtype
        assert received.shape == array.shape
        assert received.tolist() == array.tolist() or name == "dates"
        assert received.tobytes() == array.tobytes() or name == "objects"

    def test_is_on_memory_of_its_own_that_can_be_written(self, name: str, size: int) -> None:
        array = ARRAYS[name](size)
        before = array.tolist()
        received = sent(array)
        assert received.flags.writeable is array.flags.writeable
        received.flags.writeable = True
        received[...] = received[::-1].copy()
        assert not np.shares_memory(received, array)
        assert array.tolist() == before


@pytest.mark.parametrize("size", [3, LARGE], ids=["small", "large"])
def test_fortran_order_is_kept(size: int) -> None:
    received = sent(np.asfortranarray(np.ones((size, 2))))
    assert received.flags.f_contiguous
    assert not received.flags.c_contiguous


@pytest.mark.parametrize("size", [3, LARGE], ids=["small", "large"])
def test_a_read_only_array_stays_read_only(size: int) -> None:
    array = np.arange(float(size))
    array.setflags(write=False)
    received = sent(array)
    assert not received.flags.writeable
    assert np.array_equal(received, array)


def test_an_array_without_dimensions_stays_one() -> None:
    received = sent(np.array(2.5))
    assert type(received) is np.ndarray
    assert received.shape == ()
    assert received == 2.5


def test_large_arrays_leave_the_pickle_and_small_ones_stay() -> None:
    parcel = pack([np.zeros(LARGE), np.zeros(3)])
    assert [slot.nbytes for slot in parcel.slots] == [8 * LARGE]
    assert len(parcel.head) < 1000


@pytest.mark.parametrize("name", sorted(set(ARRAYS) - {"texts", "objects", "dates", "no_rows", *GAPPY}))
def test_a_large_array_leaves_the_pickle_in_any_order_and_arrives_aligned(name: str) -> None:
    parcel = pack(ARRAYS[name](LARGE))
    assert parcel.num_bytes - len(parcel.head) == ARRAYS[name](LARGE).nbytes
    received = parcel.open(ALLOW)
    assert received.ctypes.data % 64 == 0
    assert received.flags.writeable


@pytest.mark.parametrize("name", GAPPY)
def test_strides_of_an_array_with_gaps_are_kept(name: str) -> None:
    array = ARRAYS[name](LARGE)
    parcel = pack(array)
    assert parcel.num_bytes - len(parcel.head) <= array.nbytes
    received = parcel.open(ALLOW)
    assert received.strides == array.strides
    assert received.base.nbytes <= 2 * array.nbytes


def test_an_array_of_objects_keeps_its_strides_and_may_hold_itself() -> None:
    array = np.empty((4, 3), dtype=object)
    array[...] = [[row, [row], None] for row in range(4)]
    received = sent(array[::2, ::-1])
    assert received.strides == array[::2, ::-1].strides
    assert received.tolist() == array[::2, ::-1].tolist()
    loop = np.empty(2, dtype=object)
    loop[0] = loop
    received = sent(loop)
    assert received[0] is received


def test_elements_too_far_apart_are_refused_with_their_remedy() -> None:
    with pytest.raises(SerializationError, match="send a copy"):
        pack(np.zeros(1 << 20, dtype=np.uint8)[:: 1 << 19])
    with pytest.raises(SerializationError, match=r"send tensor\.clone"):
        pack(torch.zeros(1 << 20, dtype=torch.uint8)[:: 1 << 19])


def test_two_arrays_on_common_memory_arrive_on_memory_of_their_own() -> None:
    array = np.zeros(LARGE)
    first, second = sent([array[: LARGE - 1], array[1:]])
    first.fill(1)
    assert not second.any()


def test_tensors_in_an_array_of_objects_are_left_out_of_the_pickle() -> None:
    array = np.empty(2, dtype=object)
    array[0], array[1] = torch.arange(3.0), "x"
    received = sent(array)
    assert received[0].tolist() == [0, 1, 2]
    assert received[1] == "x"


def test_buffers_and_tensors_are_not_mixed_up() -> None:
    parts = [torch.full((LARGE,), 1.0), np.full(LARGE, 2.0), torch.full((3,), 3.0), np.full(LARGE, 4.0)]
    assert [float(part[0]) for part in sent(parts)] == [1, 2, 3, 4]


@pytest.mark.parametrize("make", [np.random.default_rng, np.random.RandomState, random.Random])
def test_a_generator_goes_on_where_it_was(make: Callable[[int], Any]) -> None:
    generator = make(7)
    draw = "normal" if hasattr(generator, "normal") else "random"
    getattr(generator, draw)()
    received = sent(generator)
    assert getattr(received, draw)() == getattr(generator, draw)()


@pytest.mark.parametrize(
    "bits", [np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64]
)
def test_every_bit_generator_of_numpy_may_travel(bits: Callable[[int], Any]) -> None:
    generator = np.random.Generator(bits(3))
    assert sent(generator).integers(1 << 40) == generator.integers(1 << 40)


def test_a_generator_of_torch_goes_on_where_it_was() -> None:
    generator = torch.Generator().manual_seed(5)
    torch.rand(3, generator=generator)
    received = sent(generator)
    assert torch.rand(1, generator=received) == torch.rand(1, generator=generator)


@pytest.mark.parametrize(
    "obj",
    [np.ma.masked_array([1.0]), np.zeros(2, dtype=[("a", "i4")]).view(np.recarray), np.finfo(np.float32)],
    ids=["masked", "record", "finfo"],
)
def test_other_types_of_numpy_are_refused(obj: Any) -> None:
    with pytest.raises(SerializationError, match="numpy"):
        sent(obj)


@pytest.mark.parametrize("start", [1, 4, 7, 13, 16, 50])
@pytest.mark.parametrize("copy", [True, False], ids=["copied", "aliased"])
def test_overlapping_slices_keep_their_values_and_their_tie(start: int, copy: bool) -> None:
    table = torch.arange(500.0).reshape(100, 5)
    alone, (first, second) = pack(table[start:], copy=copy), (table[start:90], table[start + 3 :])
    assert torch.equal(alone.open(ALLOW), table[start:])
    one, other = pack([first, second], copy=copy).open(ALLOW)
    assert torch.equal(one, first)
    assert torch.equal(other, second)
    before = float(one[3, 0])
    other[0, 0] += 1
    assert float(one[3, 0]) == before + 1


def test_a_hook_that_came_keeps_its_number_beside_new_ones() -> None:
    layer = nn.Linear(1, 1)
    hook: Any = torch.nn.functional.relu
    layer.register_forward_hook(hook)
    received = sent(layer)
    received._forward_hooks = OrderedDict((10**6 + key, hook) for key, hook in received._forward_hooks.items())
    again = sent(received)
    handle = again.register_forward_hook(torch.nn.functional.relu)
    handle.remove()
    assert len(again._forward_hooks) == 1


def test_tensors_of_gpus_are_moved_to_one_as_a_parcel_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    SimulatedGpus(2).install(monkeypatch)
    given = [torch.ones(3), torch.full((3,), 2.0, device="cuda:0"), torch.full((3,), 3.0, device="cuda:1")]
    tied = given[1][:2]
    for parcel in (pack([*given, tied]), replace(pack([*given, tied]), is_common=True)):
        opened = parcel.open(AllowList(), device=torch.device("cuda", 1))
        assert [str(tensor.device) for tensor in opened] == ["cpu", "cuda:1", "cuda:1", "cuda:1"]
        assert [tensor.tolist() for tensor in opened] == [tensor.tolist() for tensor in (*given, tied)]
        assert opened[1].untyped_storage().data_ptr() == opened[3].untyped_storage().data_ptr()
    assert [str(tensor.device) for tensor in pack(given).open(AllowList())] == ["cpu", "cuda:0", "cuda:1"]


def test_packed_tensors_of_gpus_are_moved_to_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    SimulatedGpus(2).install(monkeypatch)
    parcel = pack([torch.ones(3), torch.ones(3, 3).to("cuda:0"), torch.ones(3).to("cuda:1")])
    for device, expected in (("cuda:1", ["cpu", "cuda:1", "cuda:1"]), ("cpu", ["cpu"] * 3)):
        moved = parcel.on(torch.device(device))
        assert [str(tensor.device) for tensor in moved.open(AllowList())] == expected
        assert sorted(str(slot.device) for slot in parcel.slots) == ["cpu", "cuda:0", "cuda:1"]  # it is as before
