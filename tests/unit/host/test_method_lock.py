"""The lock of methods: shared holders side by side, exclusive ones alone, all in the order of their arrival."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from torchfedrpc.host.process_state import MethodLock

_TIMEOUT_S = 10.0


@contextmanager
def held(lock: MethodLock, kind: str) -> Iterator[None]:
    lock.enter(exclusive=kind == "exclusive")
    try:
        yield
    finally:
        lock.leave(exclusive=kind == "exclusive")


class Holder:
    """A thread that takes the lock and keeps it until an event."""

    def __init__(self, lock: MethodLock, kind: str, log: list[str], name: str) -> None:
        self.entered = threading.Event()
        self.leave = threading.Event()
        self._log = log
        self._name = name
        self._side = held(lock, kind)
        self._thread = threading.Thread(target=self._hold)
        self._thread.start()

    def _hold(self) -> None:
        with self._side:
            self._log.append(self._name)
            self.entered.set()
            assert self.leave.wait(_TIMEOUT_S)

    def end(self) -> None:
        self.leave.set()
        self._thread.join(_TIMEOUT_S)
        assert not self._thread.is_alive()


class Crowd:
    """Starts holders one after the other, each once the one before stands in the lock's queue."""

    def __init__(self) -> None:
        self.lock = MethodLock()
        self.log: list[str] = []
        self._holders: list[Holder] = []

    def start(self, kind: str, name: str = "") -> Holder:
        arrivals = len(self._holders) + 1
        holder = Holder(self.lock, kind, self.log, name or kind)
        self._holders.append(holder)
        self._until(lambda: self.lock._next_ticket == arrivals)
        return holder

    def _until(self, met: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _TIMEOUT_S
        while not met():
            assert time.monotonic() < deadline, "the holder never came to the lock"
            time.sleep(0)

    def end(self) -> None:
        for holder in self._holders:
            holder.leave.set()
        for holder in self._holders:
            holder.end()


@pytest.fixture
def crowd() -> Iterator[Crowd]:
    crowd = Crowd()
    yield crowd
    crowd.end()


def test_shared_holders_are_inside_together(crowd: Crowd) -> None:
    holders = [crowd.start("shared") for _ in range(3)]
    assert all(holder.entered.wait(_TIMEOUT_S) for holder in holders)


@pytest.mark.parametrize(
    ("first", "second"), [("exclusive", "exclusive"), ("exclusive", "shared"), ("shared", "exclusive")]
)
def test_an_exclusive_holder_is_alone(crowd: Crowd, first: str, second: str) -> None:
    inside = crowd.start(first)
    assert inside.entered.wait(_TIMEOUT_S)
    waiting = crowd.start(second)
    assert not waiting.entered.is_set()
    inside.end()
    assert waiting.entered.wait(_TIMEOUT_S)


def test_an_exclusive_holder_waits_for_every_shared_one(crowd: Crowd) -> None:
    first, second = crowd.start("shared"), crowd.start("shared")
    assert first.entered.wait(_TIMEOUT_S)
    assert second.entered.wait(_TIMEOUT_S)
    waiting = crowd.start("exclusive")
    first.end()
    assert not waiting.entered.is_set()
    second.end()
    assert waiting.entered.wait(_TIMEOUT_S)


def test_a_shared_holder_does_not_overtake_a_waiting_exclusive_one(crowd: Crowd) -> None:
    inside = crowd.start("shared")
    assert inside.entered.wait(_TIMEOUT_S)
    exclusive = crowd.start("exclusive")
    late = crowd.start("shared")
    assert not late.entered.is_set()
    inside.end()
    assert exclusive.entered.wait(_TIMEOUT_S)
    assert not late.entered.is_set()
    exclusive.end()
    assert late.entered.wait(_TIMEOUT_S)


def test_waiting_calls_are_served_in_the_order_of_their_arrival(crowd: Crowd) -> None:
    kinds = ["exclusive", "shared", "exclusive", "exclusive", "shared", "exclusive"]
    holders = [crowd.start(kind, f"{number}") for number, kind in enumerate(kinds)]
    for holder in holders:
        assert holder.entered.wait(_TIMEOUT_S)
        holder.end()
    assert crowd.log == ["0", "1", "2", "3", "4", "5"]


def test_shared_holders_behind_an_exclusive_one_enter_together(crowd: Crowd) -> None:
    for _ in range(10):
        exclusive = crowd.start("exclusive")
        behind = [crowd.start("shared") for _ in range(8)]
        exclusive.end()
        assert all(holder.entered.wait(_TIMEOUT_S) for holder in behind)
        for holder in behind:
            holder.end()


def test_no_exclusive_holder_meets_another_in_a_crowd_of_threads() -> None:
    method_lock, start = MethodLock(), threading.Barrier(8)
    sharing = alone = 0
    lock = threading.Lock()
    wrong: list[tuple[int, int]] = []

    def work(number: int) -> None:
        nonlocal sharing, alone
        start.wait(_TIMEOUT_S)
        for turn in range(60):
            exclusive = (number + turn) % 3 == 0
            with held(method_lock, "exclusive" if exclusive else "shared"):
                with lock:
                    alone, sharing = alone + exclusive, sharing + (not exclusive)
                    if alone > 1 or (alone and sharing):
                        wrong.append((alone, sharing))
                with lock:
                    alone, sharing = alone - exclusive, sharing - (not exclusive)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_TIMEOUT_S)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
