"""What a host has of reductions: begun and ended, late results, and errors that reach the driver."""

from __future__ import annotations

import os
from typing import Any

import pytest
from summing import Brackets, Failing, Unopenable

import torchfedrpc as tfr
from torchfedrpc.host.call import Part
from torchfedrpc.reduce.reducers import Mean
from torchfedrpc.reduce.tree import MergeError
from torchfedrpc.reduce.worker import Reductions
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.packing import pack


@pytest.fixture
def reductions() -> Reductions:
    return Reductions(pack, AllowList(["summing"]))


def begin(reductions: Reductions, reducer: Any = None, number: int = 1, going_on: Any = None) -> None:
    reductions.begin(number, pack(reducer or Brackets()), 4, going_on)


def collected(reductions: Reductions, *skipped: int, number: int = 1) -> list[tuple[str, tuple[int, ...]]]:
    nodes, is_ours = reductions.collect(number, skipped)
    assert not is_ours  # a user's reducer may have kept what it was given
    return [(reducer.finish(), places) for _, _, reducer, places in nodes]


def test_of_a_reducer_of_the_users_collecting_may_take_any_time(reductions: Reductions) -> None:
    begin(reductions, Brackets())
    reductions.begin(2, pack(Mean()), 1, None)
    assert not reductions.are_quick(2)
    reductions.add(Part(1, 0), "0")
    reductions.add(Part(2, 0), 1.0)
    assert (reductions.are_quick(1), reductions.are_quick(2), reductions.are_quick(3)) == (False, True, False)


def test_results_are_collected_once(reductions: Reductions) -> None:
    begin(reductions)
    begin(reductions)
    for place in (2, 0, 1):
        reductions.add(Part(1, place), str(place))
    assert collected(reductions) == [("(0+1)", (0, 1)), ("2", (2,))]
    assert collected(reductions) == []
    reductions.add(Part(1, 3), "3")
    assert collected(reductions) == [("3", (3,))]


def test_a_result_that_comes_late_is_not_among_the_next(reductions: Reductions) -> None:
    """The driver has counted its client out, and other workers' results are merged across its place."""
    begin(reductions)
    for place in (0, 2):
        reductions.add(Part(1, place), str(place))
    assert collected(reductions, 1) == [("0", (0,)), ("2", (2,))]
    with pytest.raises(ValueError, match="skipped already"):
        reductions.add(Part(1, 1), "1")
    reductions.add(Part(1, 3), "3")
    assert collected(reductions) == [("3", (3,))]


def test_a_result_that_was_there_first_is_not_skipped(reductions: Reductions) -> None:
    begin(reductions)
    reductions.add(Part(1, 1), "1")
    assert collected(reductions, 0, 1) == [("1", (1,))]


def test_reductions_that_are_over_are_forgotten(reductions: Reductions) -> None:
    begin(reductions)
    begin(reductions, number=2)
    reductions.end(1)
    reductions.end(1)
    with pytest.raises(RuntimeError, match="over"):
        reductions.add(Part(1, 0), "0")
    begin(reductions, number=4, going_on=(3, 4))
    assert len(reductions) == 1
    with pytest.raises(RuntimeError, match="over"):
        reductions.collect(2, [])


def test_a_reducer_that_cannot_be_opened_is_an_error_of_who_needs_it(reductions: Reductions) -> None:
    reducer = Unopenable()
    reducer.pid = os.getpid() + 1
    begin(reductions, reducer)
    for _ in range(2):
        with pytest.raises(tfr.SerializationError, match="not at home"):
            reductions.add(Part(1, 0), "0")


@pytest.mark.parametrize(("kind", "expected"), [("value", ValueError), ("unsendable", tfr.RemoteError)])
def test_a_merge_error_can_travel_whatever_its_reason(
    reductions: Reductions, kind: str, expected: type[Exception]
) -> None:
    begin(reductions, Failing("merge", kind))
    reductions.add(Part(1, 0), "0")
    for step in (lambda: reductions.add(Part(1, 1), "1"), lambda: reductions.collect(1, [])):
        with pytest.raises(MergeError) as caught:
            step()
        assert caught.value.places == (0, 1)
        assert type(caught.value.reason) is expected
        assert pack(caught.value).open(AllowList()).places == (0, 1)
