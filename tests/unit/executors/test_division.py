"""Division of calls among workers: contiguous ranges, the longest calls apart, shares of the work."""

from __future__ import annotations

from collections import defaultdict

import pytest

from torchfedrpc.executors.division import in_ranges, one_by_one, ranges


@pytest.mark.parametrize(
    ("seconds", "lefts", "expected"),
    [
        ([1.0] * 20, [0.0, 0.0], [10, 10]),
        ([1.0] * 32, [0.0] * 8, [4] * 8),
        ([1.0] * 5, [0.0, 0.0], [2, 3]),
        ([1.0] * 10, [4.0, 0.0], [3, 7]),
        ([1.0] * 4, [100.0, 0.0], [0, 4]),
        ([8.0, 1.0, 1.0, 1.0, 1.0], [0.0, 0.0], [1, 4]),
        ([1.0, 1.0, 1.0, 1.0, 8.0], [0.0, 0.0], [4, 1]),
        ([1.0], [0.0, 0.0, 0.0], [0, 1, 0]),
        ([], [0.0, 0.0], [0, 0]),
        ([1.0] * 7, [0.0], [7]),
    ],
)
def test_ranges_are_contiguous_and_let_workers_finish_together(
    seconds: list[float], lefts: list[float], expected: list[int]
) -> None:
    parts = ranges(seconds, lefts)
    assert [len(part) for part in parts] == expected
    assert [index for part in parts for index in part] == list(range(len(seconds)))


def test_ranges_are_never_longer_than_a_share_and_half_of_a_call() -> None:
    seconds = [float(1 + (number * 7) % 13) for number in range(50)]
    for count in (2, 3, 8):
        parts = ranges(seconds, [0.0] * count)
        longest = max(sum(seconds[index] for index in part) for part in parts)
        assert longest <= sum(seconds) / count + max(seconds)


def test_long_calls_go_to_the_worker_that_is_free_first_and_the_others_are_ranges() -> None:
    seconds = {0: 1.0, 1: 1.0, 2: 10.0, 3: 1.0, 4: 9.0, 5: 1.0}
    remaining = defaultdict(float, busy=1.0)
    divided = list(in_ranges(["busy", "idle"], seconds, remaining))
    assert divided == [("idle", (2,)), ("busy", (4,)), ("busy", [0, 1]), ("idle", [3, 5])]
    assert remaining == {"busy": 12.0, "idle": 12.0}


def test_fewer_calls_than_workers_go_to_those_with_the_least_work() -> None:
    remaining = defaultdict(float, one=2.0, three=1.0)
    assert list(in_ranges(["one", "two", "three"], {7: 1.0, 9: 1.0}, remaining)) == [("two", [7]), ("three", [9])]


def test_calls_in_a_given_order_each_go_to_the_worker_that_is_free_first() -> None:
    remaining = defaultdict(float, one=1.5)
    divided = one_by_one(["one", "two"], {3: 1.0, 1: 1.0, 2: 1.0}, remaining)
    assert list(divided) == [("two", (3,)), ("two", (1,)), ("one", (2,))]
    assert remaining == {"one": 2.5, "two": 2.0}
