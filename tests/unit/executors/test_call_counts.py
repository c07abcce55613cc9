"""Numbers of the calls of stateless learners."""

from __future__ import annotations

import pytest

from torchfedrpc.errors import SnapshotError
from torchfedrpc.executors.call_counts import CallCounts
from torchfedrpc.host.snapshot import Snapshot, load
from torchfedrpc.wire.allowlist import AllowList

ALLOW = AllowList(["methods"])


def counts_of(data: bytes) -> dict[str, int]:
    return load(data, ALLOW).counts


def test_calls_are_numbered_by_client_and_method() -> None:
    counts = CallCounts("methods.Learner")
    calls = [("a", "train"), ("a", "train"), ("b", "train"), ("a", "evaluate"), ("a", "train")]
    assert [counts.next_number(*call) for call in calls] == [0, 1, 0, 0, 2]


def test_a_checkpoint_has_the_numbers_as_of_its_cut() -> None:
    counts = CallCounts("methods.Learner")
    counts.next_number("a", "train")
    counts.cut()
    counts.next_number("a", "train")
    counts.next_number("b", "train")
    assert counts_of(counts.capture("a")) == {"train": 1}
    assert counts_of(counts.capture("b")) == {}


def test_a_run_goes_on_from_the_numbers_of_a_checkpoint() -> None:
    counts, resumed = CallCounts("methods.Learner"), CallCounts("methods.Learner")
    for _ in range(3):
        counts.next_number("a", "train")
    counts.cut()
    resumed.restore(load(counts.capture("a"), ALLOW), "a")
    assert resumed.next_number("a", "train") == 3
    assert resumed.next_number("a", "evaluate") == 0


def test_a_snapshot_of_another_client_or_with_a_state_is_refused() -> None:
    counts = CallCounts("methods.Learner")
    with pytest.raises(SnapshotError, match="of 'b' and not of 'a'"):
        counts.restore(Snapshot("b", "methods.Learner", {}, None), "a")
    with pytest.raises(SnapshotError, match="stateless = False"):
        counts.restore(Snapshot("a", "methods.Learner", {}, ("attributes", {})), "a")


def test_the_number_of_a_lost_call_is_that_of_the_next_one() -> None:
    counts = CallCounts("methods.Learner")
    numbers = [counts.next_number("a", "draw") for _ in range(4)]
    for number in (2, 1):
        counts.give_back("a", "draw", number)
    assert [counts.next_number("b", "draw"), counts.next_number("a", "train")] == [0, 0]
    assert [counts.next_number("a", "draw") for _ in range(3)] == [1, 2, 4]
    assert numbers == [0, 1, 2, 3]


def resumed_from(counts: CallCounts) -> CallCounts:
    counts.cut()
    resumed = CallCounts("methods.Learner")
    resumed.restore(load(counts.capture("a"), ALLOW), "a")
    return resumed


@pytest.mark.parametrize(("given_back", "following"), [((3,), 3), ((3, 2), 2), ((2, 3), 2), ((1,), 4), ((1, 3), 3)])
def test_a_resumed_run_numbers_calls_as_the_one_that_goes_on(given_back: tuple[int, ...], following: int) -> None:
    counts = CallCounts("methods.Learner")
    for _ in range(4):
        counts.next_number("a", "draw")
    for number in given_back:
        counts.give_back("a", "draw", number)
    resumed = resumed_from(counts)
    for one in (counts, resumed):
        assert [one.next_number("a", "draw") for _ in range(2)] == [following, following + 1]


def test_a_number_from_before_a_restore_goes_to_no_call() -> None:
    counts, fresh = CallCounts("methods.Learner"), CallCounts("methods.Learner")
    fresh.cut()
    for _ in range(3):
        counts.next_number("a", "draw")
    counts.give_back("a", "draw", 1)
    counts.restore(load(fresh.capture("a"), ALLOW), "a")
    counts.give_back("a", "draw", 2)
    assert [counts.next_number("a", "draw") for _ in range(3)] == [0, 1, 2]


def test_a_number_from_before_a_cut_goes_to_no_call() -> None:
    counts = CallCounts("methods.Learner")
    for _ in range(3):
        counts.next_number("a", "draw")
    resumed = resumed_from(counts)
    assert counts.next_number("a", "draw") == 3
    for number in (1, 3):
        counts.give_back("a", "draw", number)
    assert [counts.next_number("a", "draw"), resumed.next_number("a", "draw")] == [3, 3]
