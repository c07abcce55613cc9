"""Snapshots of learners: what is captured, what is refused and in which words, and what hostile bytes can do."""

from __future__ import annotations

import contextlib
import functools
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import strangers
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from values import everything

import torchfedrpc as tfr
from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError, SnapshotError, UntrustedTypeError
from torchfedrpc.host.snapshot import Snapshot, capture, check_belongs, dump, load, reinstate, seal, taken
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.testing.rehearsal import Rehearsal, Step, rehearsal
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.file_pool import FilePool
from torchfedrpc.wire.packing import Parcel, pack
from torchfedrpc.wire.serializer import ParameterSerializer

POOL = FilePool()
ALLOW = AllowList([__name__])
HEADER = struct.Struct("<8sII")


class Plain:
    """A learner whose state is its attributes."""

    def __init__(self, client_id: str = "client_1") -> None:
        self.client_id = client_id
        self.model = nn.Linear(2, 1)
        self.optimiser = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.num_steps = 0

    def step(self) -> None:
        self.optimiser.zero_grad()
        self.model(torch.ones(1, 2)).sum().backward()
        self.optimiser.step()
        self.num_steps += 1


class ByDict(Plain):
    """A learner that says what its state is, and leaves a lock out."""

    def __init__(self, client_id: str = "client_1") -> None:
        super().__init__(client_id)
        self.lock = threading.Lock()

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.num_steps = state["num_steps"]


class Half(Plain):
    """Has one method of the two, which is then none of the protocol."""

    def state_dict(self) -> dict[str, Any]:
        return {}


class Module(nn.Module):
    """A learner that is a module, with an attribute that the module's own state dict knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.num_steps = 0


class Delegating:
    """Lends its model's methods, state_dict among them."""

    def __init__(self) -> None:
        self.model = nn.Linear(2, 1)
        self.num_steps = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)


class Slots:
    __slots__ = ("weights",)

    def __init__(self) -> None:
        self.weights = torch.zeros(1)


class Frozen:
    """Refuses to have its attributes set."""

    def __init__(self) -> None:
        self.__dict__["value"] = 0

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("frozen")


class LeavesOut:
    """Leaves its data out of its state."""

    def __init__(self, data: str = "data") -> None:
        self.data = data
        self.value = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"value": self.value}


class OwnState:
    """Has a state that is no dict, and reads it."""

    value = 0

    def __getstate__(self) -> int:
        return self.value

    def __setstate__(self, state: int) -> None:
        self.value = state


class OddState:
    def __getstate__(self) -> int:
        return 3


class Tensors:
    """Has a state that is a pair of tensors, and reads it."""

    def __init__(self) -> None:
        self.one, self.other = torch.zeros(2), torch.zeros(2)

    def __getstate__(self) -> tuple[Tensor, Tensor]:
        return self.one, self.other

    def __setstate__(self, state: tuple[Tensor, Tensor]) -> None:
        self.one, self.other = state


class Loading:
    """Has what its constructor makes anew: a lock, and a generator of batches."""

    not_state: Any = {"lock", "batches"}

    def __init__(self) -> None:
        self.num_steps = 0
        self.lock = threading.Lock()
        self.batches = iter(range(3))
        self.name = "loading"


class LoadingModule(nn.Module):
    """A module whose submodule, parameter, buffer and plain attribute the constructor makes anew."""

    not_state = frozenset({"frozen", "scale", "mean", "data"})

    def __init__(self, fill: float = 1.0) -> None:
        super().__init__()
        self.frozen = nn.Linear(1, 1)
        self.head = nn.Linear(1, 1)
        self.scale = nn.Parameter(torch.full((1,), fill))
        self.bias = nn.Parameter(torch.full((1,), fill))
        self.register_buffer("mean", torch.full((1,), fill))
        self.data: Any = [fill]


class LoadingSlots:
    __slots__ = ("data", "value")
    not_state = ["data"]

    def __init__(self, data: str = "data") -> None:
        self.data = data
        self.value = 0


class LoadingState(LeavesOut):
    not_state = ("data",)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self)


class Wrong:
    def __init__(self, not_state: Any) -> None:
        type(self).not_state = not_state  # type: ignore[attr-defined]
        self.loader = 1


class Content(dict[str, int]):
    """A learner that is a dict."""


class Recurrent(nn.LSTM):
    """A module of torch's with weak references, which torch leaves out and makes again."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.num_steps = 0


class Failing:
    def state_dict(self) -> dict[str, Any]:
        raise RuntimeError("not now")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError


class AsyncState:
    async def state_dict(self) -> dict[str, Any]:
        return {}

    async def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Callback:
    """Refers to the learner that has it."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner


class Hostile:
    """What a pickle of a stranger may hold."""

    def __reduce__(self) -> Any:
        return os.system, ("echo this must not run",)


def dumped(learner: Any, allow: AllowList = ALLOW) -> bytes:
    return bytes(
        dump(Snapshot("client_1", "there.Learner", {"step": 2}, capture(learner, "client_1")), allow, learner)
    )


def moved(learner: Any, fresh: Any) -> Any:
    """A fresh learner in the state of another, by way of bytes."""
    snapshot = load(dumped(learner), ALLOW)
    reinstate(fresh, snapshot.state, "client_1")
    return fresh


def sealed(fields: Any) -> bytes:
    """Whatever fields as bytes that look like a snapshot's."""
    payload = ParameterSerializer.serialize(fields)
    return HEADER.pack(b"TFRSNAP\0", 1, zlib.crc32(payload)) + payload


def weights_of(learner: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in learner.model.parameters()]


# What is captured.


def test_a_snapshot_survives_its_way_through_bytes() -> None:
    snapshot = Snapshot("client_1", "there.Learner", {"step": 2}, ("state_dict", {"weights": torch.ones(3)}))
    loaded = load(dump(snapshot, ALLOW), ALLOW)
    assert (loaded.client_id, loaded.learner, loaded.counts) == ("client_1", "there.Learner", {"step": 2})
    assert loaded.made
    assert torch.equal(loaded.state[1]["weights"], torch.ones(3))


class Large:
    """A learner with more than is worth a file."""

    def __init__(self, factor: int = 1) -> None:
        self.factor = factor
        self.weights = torch.rand(1 << 20)

    def __getstate__(self) -> dict[str, Any]:
        return {"factor": self.factor, "weights": self.weights / self.factor}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.factor, self.weights = state["factor"], state["weights"].mul_(state["factor"])


class Resizing(Large):
    """One whose tensor gets more room as it is read again."""

    def __getstate__(self) -> dict[str, Any]:
        return {"held": Resized(self.weights)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.factor, self.weights = 1, state["held"].weights


class Resized:
    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.weights = state["weights"]
        num_floats = len(self.weights)
        self.weights.resize_(2 * num_floats).resize_(num_floats)


class Rounding(Large):
    """One whose attribute does not come back equal."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.weights = self.weights.round()


@pytest.fixture(scope="module", autouse=True)
def _closed_pool(_nothing_left_behind: None) -> Iterator[None]:
    yield
    POOL.close()


def in_files(state: Any, **limits: Any) -> Parcel:
    """A snapshot in memory that other processes may map, of a state with such a learner in it."""
    snapshot = Snapshot("client_1", "there.Learner", {"step": 2}, ("state_dict", state))
    return taken(snapshot, ALLOW, pool=POOL, **limits)


@pytest.mark.parametrize(
    "make", [lambda: torch.rand(1 << 20), lambda: Large(2), Resizing], ids=["tensor", "in place", "resized"]
)
def test_large_snapshot_in_a_file_has_the_bits_of_one_in_memory(make: Any) -> None:
    state = {"part": make(), "odd": torch.rand((1 << 19) + 3).to(torch.float16)}
    for _ in range(2):  # in memory that is new, and in that which is written again
        parcel = in_files(state)
        assert parcel.files is not None
        snapshot = Snapshot("client_1", "there.Learner", {"step": 2}, ("state_dict", state))
        assert bytes(seal(parcel.open(ALLOW))) == bytes(dump(snapshot, ALLOW))


def test_large_snapshot_in_a_file_is_refused_where_it_would_not_come_back_equal() -> None:
    with pytest.raises(SnapshotError, match=r"weights.*would have other values"):
        in_files({"part": Rounding()})


def test_snapshot_above_its_limit_is_a_size() -> None:
    state = {"part": torch.rand(1 << 20)}
    size = in_files(state, limit_bytes=4 << 20).open(ALLOW)
    assert 4 << 20 < size < 5 << 20
    assert isinstance(in_files(state, limit_bytes=size).open(ALLOW), Tensor)


def test_a_learner_that_was_not_made_yet_has_a_snapshot_too() -> None:
    loaded = load(dump(Snapshot("client_1", "there.Learner", {}, None), ALLOW), ALLOW)
    assert not loaded.made


def test_a_snapshot_shares_no_memory_with_its_learner() -> None:
    learner = Plain()
    data, before = dumped(learner), weights_of(learner)
    learner.step()
    restored = Plain()
    reinstate(restored, load(data, ALLOW).state)
    assert all(map(torch.equal, weights_of(restored), before))


def test_attributes_are_captured_whole_with_an_optimiser_that_goes_on() -> None:
    learner = Plain()
    learner.step()
    restored = moved(learner, Plain())
    assert restored.num_steps == 1
    assert restored.optimiser.param_groups[0]["params"][0] is restored.model.weight
    learner.step()
    restored.step()
    assert all(map(torch.equal, weights_of(restored), weights_of(learner)))


def test_taking_a_snapshot_leaves_the_learner_as_it_was() -> None:
    learner = Plain()
    learner.step()
    gradient = learner.model.weight.grad
    dumped(learner)
    assert learner.model.weight.requires_grad
    assert learner.model.weight.grad is gradient


def test_attributes_that_the_learner_no_longer_has_are_gone() -> None:
    learner = Plain()
    del learner.optimiser
    assert not hasattr(moved(learner, Plain()), "optimiser")


def test_state_dict_decides_alone_where_both_methods_are_defined() -> None:
    learner = ByDict()
    learner.step()
    fresh = ByDict()
    lock = fresh.lock
    restored = moved(learner, fresh)
    assert restored.lock is lock
    assert restored.num_steps == 1
    assert all(map(torch.equal, weights_of(restored), weights_of(learner)))


def test_state_dict_without_load_state_dict_does_not_count() -> None:
    learner = Half()
    learner.step()
    assert moved(learner, Half()).num_steps == 1


def test_a_learner_that_is_a_module_keeps_its_plain_attributes() -> None:
    learner = Module()
    learner.num_steps = 3
    restored = moved(learner, Module())
    assert restored.num_steps == 3
    assert torch.equal(restored.layer.weight, learner.layer.weight)


def test_a_state_dict_that_is_only_lent_does_not_count() -> None:
    learner = Delegating()
    learner.num_steps = 3
    assert moved(learner, Delegating()).num_steps == 3


def test_slots_are_captured() -> None:
    learner = Slots()
    learner.weights += 1
    assert torch.equal(moved(learner, Slots()).weights, torch.ones(1))


def test_attributes_come_back_past_a_setattr_that_refuses() -> None:
    learner = Frozen()
    learner.__dict__["value"] = 5
    assert moved(learner, Frozen()).__dict__ == {"value": 5}


def test_attributes_that_getstate_leaves_out_stay_as_the_constructor_made_them() -> None:
    learner = LeavesOut()
    learner.value = 5
    assert vars(moved(learner, LeavesOut("own data"))) == {"data": "own data", "value": 5}


def test_setstate_takes_whatever_getstate_gives() -> None:
    learner = OwnState()
    learner.value = 5
    assert moved(learner, OwnState()).value == 5


def test_getstate_may_give_tensors() -> None:
    learner = Tensors()
    learner.one += 1
    assert moved(learner, Tensors()).one.tolist() == [1, 1]


def test_module_learner_does_not_get_deleted_attributes_back() -> None:
    learner = Module()
    del learner.num_steps, learner.layer
    restored = moved(learner, Module())
    assert not hasattr(restored, "num_steps")
    assert not hasattr(restored, "layer")


def test_slots_that_the_learner_no_longer_has_are_gone() -> None:
    learner = Slots()
    del learner.weights
    assert not hasattr(moved(learner, Slots()), "weights")


def test_learner_that_is_a_recurrent_module_goes_on() -> None:
    learner, fresh = Recurrent(), Recurrent()
    learner.num_steps = 3
    restored = moved(learner, fresh)
    assert restored.num_steps == 3
    inputs = torch.ones(1, 2)
    assert torch.equal(restored(inputs)[0], learner(inputs)[0])
    assert restored._flat_weights[0] is restored.weight_ih_l0


def test_gradients_are_captured() -> None:
    learner = Plain()
    learner.step()
    restored = moved(learner, Plain())
    gradient = learner.model.weight.grad
    assert gradient is not None
    assert torch.equal(restored.model.weight.grad, gradient)


# What is left out.


def test_attributes_in_not_state_stay_as_the_constructor_made_them() -> None:
    learner, fresh = Loading(), Loading()
    learner.num_steps = 3
    next(learner.batches)
    lock, batches = fresh.lock, fresh.batches
    restored = moved(learner, fresh)
    assert (restored.num_steps, restored.name) == (3, "loading")
    assert (restored.lock, restored.batches) == (lock, batches)
    assert next(restored.batches) == 0
    assert list(vars(restored)) == list(vars(learner))


def test_parts_of_a_module_in_not_state_keep_their_place() -> None:
    learner, fresh = LoadingModule(2.0), LoadingModule(3.0)
    frozen, scale = fresh.frozen, fresh.scale
    restored = moved(learner, fresh)
    assert (restored.frozen, restored.scale, restored.data) == (frozen, scale, [3.0])
    assert (restored.bias.item(), restored.mean.item()) == (2.0, 3.0)
    assert torch.equal(restored.head.weight, learner.head.weight)
    names = [[name for name, _ in one.named_parameters()] for one in (learner, restored)]
    assert names[0] == names[1]
    assert learner.frozen is not None


def test_slot_in_not_state_stays() -> None:
    learner = LoadingSlots()
    learner.value = 3
    restored = moved(learner, LoadingSlots("own data"))
    assert (restored.data, restored.value) == ("own data", 3)


def test_not_state_counts_beside_a_getstate_that_gives_a_dict() -> None:
    learner = LoadingState()
    learner.value = 3
    assert vars(moved(learner, LoadingState("own data"))) == {"data": "own data", "value": 3}


@pytest.mark.parametrize(("given", "words"), [("loader", r"as \{'loader'\}"), (3, "is 3"), ([3], r"is \[3\]")])
def test_not_state_that_is_no_collection_of_names_is_refused(given: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=f"Wrong.not_state must be a set of attribute names, .*{words}"):
        capture(Wrong(given), "client_1")


def test_not_state_of_a_class_is_looked_at_as_the_proxy_is_made() -> None:
    Wrong.not_state = "loader"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="not_state must be a set"):
        LearnerSpec.of(Wrong, 0, RuntimeConfig())


def test_name_in_not_state_that_is_no_attribute_is_refused() -> None:
    with pytest.raises(
        SnapshotError, match="not_state names 'loder', which is no attribute: did you mean 'loader'"
    ) as caught:
        capture(Wrong({"loder"}), "client_1")
    assert caught.value.attribute == "'loder'"


def test_object_that_is_state_and_not_is_refused() -> None:
    learner = Loading()
    learner.cache = learner.lock = {"a": [1]}  # type: ignore[assignment, attr-defined]
    words = r"because of 'cache': \.cache is part of the attribute in not_state 'lock' too.*name both in not_state"
    with pytest.raises(SnapshotError, match=words):
        dumped(learner)


# What is refused.


def test_learner_that_is_a_container_is_refused() -> None:
    with pytest.raises(SnapshotError, match="a Content is a dict, whose content is no attribute"):
        capture(Content(), "client_1")


def test_inference_tensor_is_refused() -> None:
    learner = Slots()
    with torch.inference_mode():
        learner.weights = torch.ones(1)
    with pytest.raises(SnapshotError, match=r"because of 'weights': \.weights is an inference tensor.*clone\(\) it"):
        dumped(learner)


def test_optimisers_are_captured_with_all_attributes() -> None:
    learner = Plain()
    learner.optimiser = torch.optim.LBFGS(learner.model.parameters())  # type: ignore[assignment]
    restored = moved(learner, Plain())
    for one in (learner, restored):
        inputs = torch.ones(1, 2)

        def closure(one: Any = one, inputs: Tensor = inputs) -> Tensor:
            one.optimiser.zero_grad()
            loss = one.model(inputs).square().sum()
            loss.backward()
            return loss

        one.optimiser.step(closure)
    assert all(map(torch.equal, weights_of(restored), weights_of(learner)))


@pytest.mark.parametrize("name", everything())
def test_value_of_the_corpus_is_in_a_snapshot_as_it_is(name: str) -> None:
    learner: Any = Plain()
    learner.value = everything()[name]
    assert load(dumped(learner), ALLOW).client_id == "client_1"  # the bytes are compared with the learner as well


@pytest.mark.parametrize("value", [0, 1])
def test_arrays_that_share_memory_are_refused(value: int) -> None:
    learner = Plain()
    learner.rows = torch.arange(4.0)  # type: ignore[attr-defined]
    learner.view = learner.rows.numpy() if value else learner.rows.numpy()[1:]  # type: ignore[attr-defined]
    with pytest.raises(SnapshotError, match=r"because of 'view': \.view shares memory with \.rows, and would not"):
        dumped(learner)


def test_graph_between_two_calls_is_refused_with_its_attribute_and_a_remedy() -> None:
    learner = Plain()
    learner.activations = learner.model(torch.ones(1, 2))  # type: ignore[attr-defined]
    words = r"because of 'activations': \.activations holds an autograd graph.*name 'activations' in not_state"
    with pytest.raises(SnapshotError, match=words) as caught:
        dumped(learner)
    assert caught.value.attribute == "'activations'"
    del learner.activations  # type: ignore[attr-defined]
    assert dumped(learner)


def test_object_that_cannot_be_pickled_is_named_with_its_attribute() -> None:
    learner = Plain()
    learner.lock = threading.Lock()  # type: ignore[attr-defined]
    with pytest.raises(SnapshotError, match=r"client_1 \(there.Learner\) .* because of 'lock': .*define state_dict"):
        dumped(learner)


def test_a_type_that_could_not_be_read_again_is_refused_when_it_is_captured() -> None:
    learner = Plain()
    learner.odd = strangers.StrangeError("odd")  # type: ignore[attr-defined]
    with pytest.raises(SnapshotError, match=r"'odd'.*runtime.trusted_modules=\[strangers\]"):
        dumped(learner)
    assert load(dumped(learner, AllowList([__name__, "strangers"])), AllowList([__name__, "strangers"])).made


def test_a_method_of_the_learners_own_that_fails_is_the_cause() -> None:
    with pytest.raises(SnapshotError, match=r"state_dict\(\) of client_1's Failing .*not now") as caught:
        capture(Failing(), "client_1")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_an_async_state_dict_is_refused_and_not_left_unawaited() -> None:
    with pytest.raises(SnapshotError, match="must not be async"):
        capture(AsyncState(), "client_1")


def test_a_state_without_attributes_needs_a_setstate() -> None:
    with pytest.raises(SnapshotError, match="int instead of a dict: define __setstate__"):
        capture(OddState(), "client_1")


def test_a_learner_that_refers_to_itself_is_refused() -> None:
    learner = Plain()
    learner.callbacks = [Callback(learner)]  # type: ignore[attr-defined]
    words = r"because of 'callbacks': \.callbacks\[0\]\.owner refers to the Plain itself"
    with pytest.raises(SnapshotError, match=words) as caught:
        dumped(learner)
    assert caught.value.attribute == "'callbacks'"
    learner.callbacks = [learner.step]  # type: ignore[attr-defined]
    with pytest.raises(SnapshotError, match="because of 'callbacks': it refers to the learner itself"):
        dumped(learner)


def test_a_learner_that_does_not_take_the_state_says_so() -> None:
    state = capture(ByDict(), "client_1")
    state[1].pop("num_steps")
    with pytest.raises(SnapshotError, match=r"client_1's ByDict cannot take the state.*KeyError") as caught:
        reinstate(ByDict(), state, "client_1")
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_snapshot_belongs_to_its_client_and_its_learner() -> None:
    snapshot = Snapshot("client_1", "there.Learner", {}, None)
    check_belongs(snapshot, "client_1", "there.Learner")
    with pytest.raises(SnapshotError, match="of 'client_1' and not of 'client_2'"):
        check_belongs(snapshot, "client_2", "there.Learner")
    with pytest.raises(SnapshotError, match=r"of a there.Learner, and the run's learner is there.Other"):
        check_belongs(snapshot, "client_1", "there.Other")


# Bytes of whatever origin.


@pytest.mark.parametrize("data", [b"", b"TFRSNAP\0", b"\x80\x05N.", ParameterSerializer.serialize({"weights": 1})])
def test_bytes_of_something_else_are_no_snapshot(data: bytes) -> None:
    with pytest.raises(SnapshotError, match="no snapshot"):
        load(data, ALLOW)


def test_object_that_is_no_bytes_is_no_snapshot() -> None:
    with pytest.raises(SnapshotError, match="not dict"):
        load({"client_1": b""}, ALLOW)  # type: ignore[arg-type]


def test_a_snapshot_of_another_format_names_both() -> None:
    with pytest.raises(SnapshotError, match=r"format 7 .* reads format 1"):
        load(HEADER.pack(b"TFRSNAP\0", 7, 0), ALLOW)


def test_a_type_outside_the_list_is_named_and_not_made() -> None:
    data = dumped(Plain())
    with pytest.raises(UntrustedTypeError, match=r"runtime.trusted_modules does not cover: (os|posix)\.system"):
        load(sealed({"state": Hostile()}), ALLOW)
    assert load(data, ALLOW).made


@pytest.mark.parametrize(
    "fields",
    [
        None,
        [],
        {},
        {"client_id": "a", "learner": "b", "counts": {}},
        {"client_id": "a", "learner": "b", "counts": {}, "state": None, "more": 1},
        {"client_id": 1, "learner": "b", "counts": {}, "state": None},
        {"client_id": "a", "learner": "b", "counts": {"step": -1}, "state": None},
        {"client_id": "a", "learner": "b", "counts": {"step": "1"}, "state": None},
        {"client_id": "a", "learner": "b", "counts": {}, "state": {}},
        {"client_id": "a", "learner": "b", "counts": {}, "state": ("state_dict", {}, 3)},
    ],
)
def test_fields_that_are_none_of_a_snapshot_are_refused(fields: Any) -> None:
    with pytest.raises(SnapshotError, match="something else than a snapshot"):
        load(sealed(fields), ALLOW)


@pytest.mark.parametrize("state", [("unknown", 3), ("getstate", 3), ("state_dict", None)])
def test_a_state_that_no_learner_gave_is_refused_by_the_learner(state: Any) -> None:
    with pytest.raises(SnapshotError, match="cannot take the state"):
        reinstate(ByDict(), state, "client_1")


EXAMPLE = dump(Snapshot("client_1", "there.Learner", {"step": 2}, ("getstate", {"weights": torch.ones(40)})), ALLOW)


@given(st.integers(0, len(EXAMPLE) - 1))
def test_a_snapshot_that_was_cut_is_noticed_anywhere(length: int) -> None:
    with pytest.raises(SnapshotError):
        load(EXAMPLE[:length], ALLOW)


# In a host.


class Drawing:
    """Draws from the streams of its calls."""

    def __init__(self, client_id: str, *, scale: float = 1.0) -> None:
        self.scale = scale
        self.total = torch.zeros(2)

    def draw(self) -> Tensor:
        self.total += self.scale * torch.rand(2)
        return self.total


DRAW = Step("draw")


class Sharing:
    """Has objects that all learners of its process share."""

    def __init__(self, client_id: str, *, is_lazy: bool = False) -> None:
        if not is_lazy:
            self.data = self._shared()

    def load(self) -> None:
        self.data = self._shared()

    def keep_part(self) -> None:
        self.part = self.data["rows"]

    def identity(self) -> bool:
        return self.data is self._shared()

    def _shared(self) -> dict[str, Any]:
        return tfr.current_call().shared(("data", 1), lambda: {"rows": [torch.arange(100_000)]})


@contextlib.contextmanager
def drawing(client_id: str = "client_1", learner: Any = Drawing, **kwargs: Any) -> Iterator[Rehearsal]:
    spec, _ = LearnerSpec.of(learner, 5, RuntimeConfig())
    with rehearsal(spec, client_id, pack(kwargs)) as run:
        yield run


def test_a_restored_learner_goes_on_with_the_draws_that_come_next() -> None:
    with drawing() as undisturbed, drawing() as lost, drawing() as restored:
        for _ in range(3):
            expected = undisturbed.call(DRAW)
        lost.call(DRAW)
        restored.restore(lost.snapshot())
        restored.call(DRAW)
        assert torch.equal(restored.call(DRAW), expected)


def test_a_restored_learner_has_its_constructors_arguments() -> None:
    with drawing(scale=0.0) as lost, drawing(scale=0.0) as restored:
        restored.restore(lost.snapshot())
        assert restored.learner is None
        assert torch.equal(restored.call(DRAW), torch.zeros(2))


def test_a_host_refuses_the_snapshot_of_another_client() -> None:
    with drawing("client_2") as other, drawing() as run:
        other.call(DRAW)
        with pytest.raises(SnapshotError, match="of 'client_2' and not of 'client_1'"):
            run.restore(other.snapshot())
        assert run.call(DRAW).shape == (2,)


def test_a_host_refuses_hostile_bytes_and_serves_the_next_call() -> None:
    with drawing() as run:
        with pytest.raises(UntrustedTypeError, match="system"):
            run.restore(sealed({"state": Hostile()}))
        with pytest.raises(SnapshotError, match="no snapshot"):
            run.restore(b"something")
        assert run.call(DRAW).shape == (2,)


def test_shared_object_is_carried_as_a_reference() -> None:
    with drawing(learner=Sharing) as lost, drawing(learner=Sharing) as restored:
        lost.call(Step("load"))
        snapshot = lost.snapshot()
        assert len(snapshot) < 5000
        restored.restore(snapshot)
        assert restored.call(Step("identity"))


def test_shared_object_that_no_constructor_asks_for_is_refused() -> None:
    with drawing(learner=Sharing, is_lazy=True) as run:
        run.call(Step("load"))
        with pytest.raises(SnapshotError, match=r"'data' of a Sharing is the shared object \('data', 1\), for which"):
            run.snapshot()


def test_part_of_a_shared_object_is_refused() -> None:
    with drawing(learner=Sharing) as run:
        run.call(Step("keep_part"))
        with pytest.raises(SnapshotError, match=r"because of .part.: .*part of the object shared as .*not_state"):
            run.snapshot()


def test_shared_object_that_is_not_there_is_named() -> None:
    with drawing(learner=Sharing) as lost, drawing(learner=Sharing, is_lazy=True) as restored:
        lost.call(Step("load"))
        with pytest.raises(SnapshotError, match=r"shared object \('data', 1\), which its constructor has not made"):
            restored.restore(lost.snapshot())


def test_a_partial_is_captured_as_often_as_one_asks() -> None:
    learner = Plain()
    learner.make_norm = functools.partial(nn.LayerNorm, eps=1e-6)  # type: ignore[attr-defined]
    for _ in range(2):  # comparing it, the first capture has looked at its __dict__
        dump(Snapshot("client_1", "learner", {}, capture(learner)), ALLOW, learner)
