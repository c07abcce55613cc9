"""Few snapshots are on their way to or from a worker at once, and each comes in its turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from settling import settled

from torchfedrpc.executors.snapshot_throttle import SnapshotBudget, SnapshotThrottle

MIB = 1 << 20


class Snapshot:
    """A snapshot that is on its way from when the throttle admits it until it has arrived."""

    def __init__(self, name: str, throttle: SnapshotThrottle, log: list[str], num_bytes: int = 0) -> None:
        self._name = name
        self._log = log
        self._arrived = asyncio.Event()
        self.then: Callable[[], object] = lambda: None
        self.task = asyncio.ensure_future(self._pass(throttle, num_bytes))

    async def _pass(self, throttle: SnapshotThrottle, num_bytes: int) -> None:
        async with throttle.passing(num_bytes):
            self._log.append(self._name)
            await self._arrived.wait()
        self.then()

    async def arrive(self) -> None:
        self._arrived.set()
        await self.task


async def cancelled(snapshot: Snapshot) -> None:
    snapshot.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await snapshot.task


@pytest.fixture
def throttle() -> SnapshotThrottle:
    """A throttle that lets two snapshots pass at once."""
    budget = SnapshotBudget()
    budget.saw(16 * MIB)
    return SnapshotThrottle(budget)


async def test_budget_fits_as_many_snapshots_as_the_largest_allows() -> None:
    budget = SnapshotBudget()
    assert [budget.fits(taken) for taken in (0, 3, 4)] == [True, True, False]  # 8 MiB each is the first guess
    budget.saw(1 * MIB)
    assert [budget.fits(taken) for taken in (31, 32)] == [True, False]
    budget.saw(40 * MIB)
    budget.saw(1 * MIB)
    assert [budget.fits(taken) for taken in (0, 1)] == [True, False]


async def test_budget_bounds_the_number_of_small_snapshots() -> None:
    budget = SnapshotBudget()
    budget.saw(10)
    assert budget.fits(63)
    assert not budget.fits(64)


async def test_snapshots_that_find_no_room_pass_in_order_once_others_have_arrived(throttle: SnapshotThrottle) -> None:
    log: list[str] = []
    snapshots = [Snapshot(name, throttle, log) for name in "abcde"]
    await settled()
    assert log == ["a", "b"]
    await snapshots[1].arrive()
    await settled()
    assert log == ["a", "b", "c"]
    for snapshot in (snapshots[0], snapshots[2]):
        await snapshot.arrive()
    await settled()
    assert log == list("abcde")
    for snapshot in snapshots[3:]:
        await snapshot.arrive()


async def test_snapshot_that_comes_last_does_not_overtake_one_that_waits(throttle: SnapshotThrottle) -> None:
    log: list[str] = []
    first, second, third = (Snapshot(name, throttle, log) for name in "abc")
    await settled()
    first._arrived.set()
    while not first.task.done():  # third was admitted, and has not run yet
        await asyncio.sleep(0)
    fourth = Snapshot("d", throttle, log)
    await settled()
    assert log == ["a", "b", "c"]
    for snapshot in (second, third, fourth):
        await snapshot.arrive()
    assert log == list("abcd")


async def test_snapshot_that_is_cancelled_as_it_waits_takes_no_room(throttle: SnapshotThrottle) -> None:
    log: list[str] = []
    first, second, third, fourth = (Snapshot(name, throttle, log) for name in "abcd")
    await settled()
    await cancelled(third)
    await first.arrive()
    await settled()
    assert log == ["a", "b", "d"]
    for snapshot in (second, fourth):
        await snapshot.arrive()


async def test_snapshot_that_is_cancelled_as_it_is_admitted_lets_the_next_pass(throttle: SnapshotThrottle) -> None:
    log: list[str] = []
    first, second, third, fourth = (Snapshot(name, throttle, log) for name in "abcd")
    await settled()
    first.then = third.task.cancel  # its turn has come, and it has not run yet
    await first.arrive()
    with pytest.raises(asyncio.CancelledError):
        await third.task
    await settled()
    assert log == ["a", "b", "d"]
    for snapshot in (second, fourth):
        await snapshot.arrive()


async def test_snapshot_that_fails_on_its_way_makes_room(throttle: SnapshotThrottle) -> None:
    async def fail() -> None:
        async with throttle.passing():
            raise ConnectionError("lost")

    for _ in range(3):
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(fail(), 10)


async def test_snapshot_of_known_size_makes_those_behind_it_wait(throttle: SnapshotThrottle) -> None:
    log: list[str] = []
    large, other = Snapshot("large", throttle, log, 40 * MIB), Snapshot("other", throttle, log)
    await settled()
    assert log == ["large"]
    await large.arrive()
    await other.arrive()
    assert log == ["large", "other"]


async def test_workers_share_what_is_known_of_sizes_and_no_room(throttle: SnapshotThrottle) -> None:
    log: list[str] = []
    other = SnapshotThrottle(throttle._budget)
    of_one = [Snapshot(f"one {number}", throttle, log) for number in range(2)]
    of_other = [Snapshot(f"other {number}", other, log) for number in range(3)]
    await settled()
    assert log == ["one 0", "one 1", "other 0", "other 1"]
    for snapshot in (*of_one, *of_other):
        await snapshot.arrive()
