"""`check_snapshot`: it passes what is complete, and says of the rest what was lost and where it shows."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import torchfedrpc as tfr
from torchfedrpc.errors import ConfigError, MethodNotFoundError, SnapshotError

check_snapshot = functools.partial(tfr.testing.check_snapshot, repeat=1)  # the calls as they are given


TRAINING = ["train_epoch", "evaluate", "train_epoch", "evaluate"]

totals: dict[str, int] = {}
scales: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()


class Momentum:
    """Trains with an optimiser that remembers, on inputs that it draws."""

    def __init__(self, client_id: str, *, learning_rate: float = 0.1) -> None:
        self.client_id = client_id
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
        self.optimiser = torch.optim.SGD(self.model.parameters(), lr=learning_rate, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimiser, step_size=1, gamma=0.5)
        self.seen: set[str] = set()

    def train_epoch(self, num_steps: int = 2) -> dict[str, Any]:
        for _ in range(num_steps):
            self.optimiser.zero_grad()
            self.model(torch.randn(8, 3)).square().sum().backward()
            self.optimiser.step()
        self.scheduler.step()
        self.seen |= {f"batch_{len(self.seen)}", "first", "last"}
        return {"model_weights": self.model.state_dict(), "seen": self.seen}

    def evaluate(self, scale: float = 1.0) -> float:
        with torch.no_grad():
            return float(self.model(torch.full((4, 3), scale)).sum())


class Forgetful(Momentum):
    """Its state dict leaves the optimiser out."""

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "scheduler": self.scheduler.state_dict(), "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.seen = state["seen"]


class Complete(Forgetful):
    """Its state dict has all of it."""

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        self.lock = threading.Lock()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.optimiser.load_state_dict(state["optimiser"])


class Quiet:
    """Loses what none of its calls shows but the last."""

    def __init__(self, client_id: str) -> None:
        self.count = 0

    def step(self) -> None:
        self.count += 1

    def read(self) -> dict[str, Any]:
        return {"counts": [0, self.count]}

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Renamed(Quiet):
    """Looks for an attribute that a restored one has not got."""

    def step(self) -> None:
        self.late = self.count

    def read(self) -> dict[str, Any]:
        return {"late": self.late}


class Truncating(Quiet):
    """Restores something else than it gave, which no result shows."""

    def read(self) -> dict[str, Any]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = min(state["count"], 1)


class Gradients:
    """Keeps gradients from one call to the next."""

    def __init__(self, client_id: str) -> None:
        self.weight = nn.Parameter(torch.ones(2))

    def accumulate(self) -> None:
        (self.weight * torch.arange(2.0)).sum().backward()

    def step(self) -> Tensor:
        with torch.no_grad():
            self.weight.sub_(cast("Tensor", self.weight.grad))
        return self.weight.detach()


class GradientsByDict(Gradients):
    """Its state dict leaves the gradients out."""

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight.detach()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight = nn.Parameter(state["weight"])


class InModule(Quiet):
    """Counts in a variable of the module."""

    def step(self) -> None:
        totals[type(self).__name__] = totals.get(type(self).__name__, 0) + 1

    def read(self) -> dict[str, Any]:
        return {"total": totals.get(type(self).__name__)}


class InModuleSet(Quiet):
    """Keeps the last of its calls' arguments in a variable of the module."""

    def step(self, scale: int = 0) -> None:
        totals["scale"] = scale

    def read(self) -> dict[str, Any]:
        return {"total": totals["scale"]}


class InClass(Quiet):
    """Counts in an attribute of the class."""

    total = 0

    def step(self) -> None:
        type(self).total += 1

    def read(self) -> dict[str, Any]:
        return {"total": self.total}


class InCache(Quiet):
    """What it has counted stays in a cache by learner."""

    @functools.lru_cache  # noqa: B019 - what this is about
    def counts(self) -> list[int]:
        return [0]

    def step(self) -> None:
        self.counts()[0] += 1

    def read(self) -> dict[str, Any]:
        return {"total": self.counts()[0]}


class ByWeakReference(Quiet):
    """What it knows lies beside it, in a dictionary of weak references."""

    def step(self) -> None:
        scales[self] = scales.get(self, 1.0) * 2

    def read(self) -> dict[str, Any]:
        return {"scale": scales.get(self, 1.0)}


class HoldsWeakReference:
    """Knows another by a weak reference."""

    def __init__(self, client_id: str) -> None:
        self.other = weakref.ref(self)

    def step(self) -> None: ...


class InClosure:
    """Counts in a closure."""

    def __init__(self, client_id: str) -> None:
        self.step_of = counter()

    def step(self) -> int:
        return self.step_of()


def counter() -> Callable[[], int]:
    count = 0

    def step() -> int:
        nonlocal count
        count += 1
        return count

    return step


class InSharedObject(Quiet):
    """Counts in what all learners of a process share."""

    def step(self) -> None:
        tfr.current_call().shared("counts", lambda: [0])[0] += 1

    def read(self) -> dict[str, Any]:
        return {"count": tfr.current_call().shared("counts", lambda: [0])[0]}


class Disturbed:
    """Counts how often its state was taken."""

    def __init__(self, client_id: str) -> None:
        self.num_taken = 0

    def state_dict(self) -> dict[str, Any]:
        self.num_taken += 1
        return {"num_taken": self.num_taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_taken = state["num_taken"]

    def read(self) -> int:
        return self.num_taken


class Clock:
    """Tells how long it took."""

    def __init__(self, client_id: str) -> None:
        self.elapsed_s = 0.0

    def step(self) -> dict[str, Any]:
        self.elapsed_s = time.perf_counter()
        return {"loss": 0.5, "elapsed_s": self.elapsed_s}


class Streams:
    """Yields, waits, and draws in between."""

    def __init__(self, client_id: str) -> None:
        self.total = torch.zeros(1)

    def draws(self, count: int) -> Iterator[Tensor]:
        for _ in range(count):
            self.total += torch.rand(1)
            yield self.total

    async def async_draws(self, count: int) -> AsyncIterator[Tensor]:
        for item in self.draws(count):
            await asyncio.sleep(0)
            yield item

    async def wait_and_draw(self) -> Tensor:
        await asyncio.sleep(0)
        self.total += torch.rand(1)
        return self.total

    def fails_late(self) -> Iterator[int]:
        yield 1
        raise ValueError("late")


class ForgetfulStreams(Streams):
    def __getstate__(self) -> dict[str, Any]:
        return {}


class Tied:
    """Two attributes are one tensor, and again after a restore."""

    def __init__(self, client_id: str) -> None:
        self.one = self.other = torch.zeros(1)

    def step(self) -> Tensor:
        self.one += 1
        return self.other


class Untied(Tied):
    def state_dict(self) -> dict[str, Any]:
        return {"one": self.one, "other": self.other.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.one, self.other = state["one"], state["other"]


class Constructed:
    def __init__(self, client_id: str, *, fail: bool = False) -> None:
        if fail:
            raise ValueError(f"no {client_id}")

    def step(self) -> None: ...


def make_quiet(client_id: str) -> Any:
    return Quiet(client_id)


# What is complete.


@pytest.mark.parametrize("learner", [Momentum, Complete])
def test_a_learner_with_an_optimiser_passes(learner: Any) -> None:
    check_snapshot(learner, [*TRAINING, ("train_epoch", {"num_steps": 1}), ("evaluate", (2.0,))])


def test_arguments_of_the_constructor_and_of_a_partial_arrive() -> None:
    with pytest.raises(ValueError, match="no client_7"):
        check_snapshot(Constructed, ["step"], client_id="client_7", kwargs={"fail": True})
    check_snapshot(functools.partial(Momentum, learning_rate=0.5), ["train_epoch"] * 2, seed=3)


def test_async_methods_and_streams_pass() -> None:
    calls = [("draws", (2,)), "wait_and_draw", ("async_draws", (), {"count": 3}), ("draws", {"count": 1})]
    check_snapshot(Streams, calls)


def test_attributes_that_share_an_object_go_on_sharing_it() -> None:
    check_snapshot(Tied, ["step"] * 3)


async def test_check_snapshot_works_where_an_event_loop_runs() -> None:
    check_snapshot(Streams, ["wait_and_draw"] * 2)
    with pytest.raises(SnapshotError):
        check_snapshot(ForgetfulStreams, ["wait_and_draw"] * 2)


# What was lost.


def test_a_state_dict_without_the_optimiser_is_found_by_its_first_wrong_result() -> None:
    with pytest.raises(SnapshotError) as caught:
        check_snapshot(Forgetful, ["train_epoch", "evaluate", "train_epoch", "evaluate"])
    text = str(caught.value)
    assert "Forgetful after call 2 of 4 (evaluate) is not complete" in text
    assert "call 3 of 4 (train_epoch) gives another result['model_weights']['0.weight']." in text
    assert "'optimiser', 'scheduler'." in text  # which has the optimiser


def test_short_values_that_differ_are_told_with_their_place() -> None:
    with pytest.raises(SnapshotError, match=r"result\['counts'\]\[1\] \(0 instead of 2\)\. Not restored: 'count'"):
        check_snapshot(Quiet, ["step", "step", "read"])


def test_a_factorys_learner_is_checked_too() -> None:
    with pytest.raises(SnapshotError, match="Not restored: 'count'"):
        check_snapshot(make_quiet, ["step", "step", "read"])


def test_a_replay_that_raises_is_a_difference() -> None:
    with pytest.raises(
        SnapshotError, match=r"call 2 of 2 \(read\) raises AttributeError.*Not restored: 'late'"
    ) as error:
        check_snapshot(Renamed, ["step", "read"])
    assert isinstance(error.value.__cause__, AttributeError)


def test_a_state_that_no_result_shows_is_compared_in_the_end() -> None:
    with pytest.raises(SnapshotError, match=r"every result is the same.* state\['count'\] \(1 instead of 2\)"):
        check_snapshot(Truncating, ["step", "step"])


def test_gradients_between_calls_are_part_of_the_attributes() -> None:
    check_snapshot(Gradients, ["accumulate", "step"])


def test_gradients_that_a_state_dict_leaves_out_are_named_as_such() -> None:
    with pytest.raises(SnapshotError, match="Not restored: the gradients in 'weight'"):
        check_snapshot(GradientsByDict, ["accumulate", "step"])


def test_items_of_a_stream_are_compared() -> None:
    with pytest.raises(
        SnapshotError, match=r"call 2 of 2 \(draws\) gives another result\[0\]\. Not restored: 'total'"
    ):
        check_snapshot(ForgetfulStreams, [("draws", (2,))] * 2)


@pytest.mark.parametrize("learner", [InModule, InClass])
def test_state_that_other_code_keeps_is_found_by_repeating_the_calls(learner: Any) -> None:
    with pytest.raises(SnapshotError, match=r"cannot be replayed.*result\['total'\].*variable of a module"):
        check_snapshot(learner, ["step", "read"])


def test_a_modules_variable_that_later_calls_change_is_found() -> None:
    with pytest.raises(SnapshotError, match="All its attributes are restored, so what was lost is outside of them"):
        check_snapshot(InModuleSet, [("step", (1,)), "read", ("step", (2,)), "read"])


@pytest.mark.parametrize("learner", [InCache, ByWeakReference, InSharedObject])
def test_state_that_ends_with_the_object_or_its_host_is_found(learner: Any) -> None:
    with pytest.raises(SnapshotError, match=r"after call 1 of 2 .*outside of them"):
        check_snapshot(learner, ["step", "read"])


@pytest.mark.parametrize(("learner", "name"), [(InClosure, "step_of"), (HoldsWeakReference, "other")])
def test_attribute_that_cannot_be_captured_is_named(learner: Any, name: str) -> None:
    with pytest.raises(SnapshotError, match=f"cannot be captured because of '{name}'"):
        check_snapshot(learner, ["step"])


def test_objects_that_are_no_longer_shared_are_found() -> None:
    with pytest.raises(SnapshotError, match="or that two of them share an object"):
        check_snapshot(Untied, ["step"] * 2)


def test_a_state_dict_that_changes_the_learner_is_told_from_other_faults() -> None:
    with pytest.raises(SnapshotError, match=r"taking a snapshot changes .*Disturbed: .*\(read\)"):
        check_snapshot(Disturbed, ["read", "read"])


def test_a_clock_can_be_ignored_in_results_and_state() -> None:
    with pytest.raises(SnapshotError, match=r"result\['elapsed_s'\].*ignore="):
        check_snapshot(Clock, ["step"] * 2)
    check_snapshot(Clock, ["step"] * 2, ignore=["elapsed_s"])


# Wrong use.


def test_a_call_that_fails_undisturbed_raises_its_own_error() -> None:
    with pytest.raises(MethodNotFoundError, match="did you mean 'train_epoch'"):
        check_snapshot(Momentum, ["train_epochs"])
    with pytest.raises(ValueError, match="late"):
        check_snapshot(Streams, ["fails_late"])


@pytest.mark.parametrize("calls", [[], [3], [("step", 3)], [("step", {}, ())], [("step", (), {}, 1)], [()]])
def test_object_that_is_no_list_of_calls_is_refused(calls: Any) -> None:
    with pytest.raises(ConfigError, match="call"):
        check_snapshot(Quiet, calls)


def test_calls_are_made_twice_since_what_one_has_left_behind_shows_at_the_next() -> None:
    check_snapshot(Forgetful, ["train_epoch"])
    with pytest.raises(SnapshotError, match="is not complete"):
        tfr.testing.check_snapshot(Forgetful, ["train_epoch"])


def test_a_string_is_no_list_of_calls() -> None:
    with pytest.raises(ConfigError, match=r"takes a list of calls: \['train_epoch'\]"):
        tfr.testing.check_snapshot(Forgetful, "train_epoch")
