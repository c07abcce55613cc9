"""Snapshots of learners: what is captured, what is refused and in which words, and what hostile bytes can do."""

from __future__ import annotations

import contextlib
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

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import SnapshotError, UntrustedTypeError
from torchfedrpc.host.snapshot import Snapshot, capture, check_belongs, dump, load, reinstate
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.testing.rehearsal import Rehearsal, Step, rehearsal
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.packing import pack
from torchfedrpc.wire.serializer import ParameterSerializer

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
    return dump(Snapshot("client_1", "there.Learner", {"step": 2}, capture(learner, "client_1")), allow, learner)


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


def test_what_getstate_leaves_out_stays_as_the_constructor_made_it() -> None:
    learner = LeavesOut()
    learner.value = 5
    assert vars(moved(learner, LeavesOut("own data"))) == {"data": "own data", "value": 5}


def test_setstate_takes_whatever_getstate_gives() -> None:
    learner = OwnState()
    learner.value = 5
    assert moved(learner, OwnState()).value == 5


# What is refused.


def test_what_cannot_be_pickled_is_named_with_its_attribute() -> None:
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
    words = r"because of 'callbacks': \.callbacks\[0\]\.owner refers to the learner itself"
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


def test_what_is_no_bytes_is_no_snapshot() -> None:
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
