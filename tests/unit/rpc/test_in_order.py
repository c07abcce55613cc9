"""Requests in the order in which they were sent, however they arrive."""

from __future__ import annotations

import random
import sys
import threading

import pytest

from torchfedrpc.rpc.endpoint import InOrder

_TIMEOUT_S = 10.0


@pytest.mark.parametrize(
    "arrival",
    [[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2], [2, 0, 1, 3], random.Random(0).sample(range(200), 200)],
    ids=["in_order", "backwards", "in_pairs", "one_early", "shuffled"],
)
def test_actions_run_in_the_order_of_their_numbers(arrival: list[int]) -> None:
    requests, done = InOrder(), list[int]()
    for number in arrival:
        requests.put(number, lambda number=number: done.append(number))  # type: ignore[misc]
    assert done == sorted(arrival)


def test_an_action_runs_as_soon_as_all_before_it_have_come() -> None:
    requests, done = InOrder(), list[int]()
    seen = []
    for number in (0, 2, 3, 1, 4):
        requests.put(number, lambda number=number: done.append(number))  # type: ignore[misc]
        seen.append(list(done))
    assert seen == [[0], [0], [0], [0, 1, 2, 3], [0, 1, 2, 3, 4]]


def test_actions_from_many_threads_run_once_each_and_in_order() -> None:
    num_threads, num_each = 8, 200
    requests, done, start = InOrder(), list[int](), threading.Barrier(num_threads)
    running = threading.Lock()

    def act(number: int) -> None:
        assert running.acquire(blocking=False), "two actions at once"
        done.append(number)
        running.release()

    def send(thread: int) -> None:
        start.wait(_TIMEOUT_S)
        numbers = list(range(thread, num_threads * num_each, num_threads))
        random.Random(thread).shuffle(numbers)
        for number in numbers:
            requests.put(number, lambda number=number: act(number))  # type: ignore[misc]

    threads = [threading.Thread(target=send, args=(thread,)) for thread in range(num_threads)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_TIMEOUT_S)
    finally:
        sys.setswitchinterval(before)
    assert done == list(range(num_threads * num_each))


def test_an_action_does_not_begin_before_the_one_before_it_has_ended() -> None:
    requests, begun, second_ran = InOrder(), threading.Event(), threading.Event()
    overlapped: list[bool] = []

    def first() -> None:
        begun.set()
        overlapped.append(second_ran.wait(0.05))

    def send_second() -> None:
        assert begun.wait(_TIMEOUT_S)
        requests.put(1, second_ran.set)

    thread = threading.Thread(target=send_second)
    thread.start()
    requests.put(0, first)
    thread.join(_TIMEOUT_S)
    assert overlapped == [False]
    assert second_ran.is_set()


def test_an_action_that_is_early_runs_on_the_thread_that_brings_the_missing_one() -> None:
    requests, ran_on = InOrder(), list[str]()
    requests.put(1, lambda: ran_on.append(threading.current_thread().name))
    thread = threading.Thread(target=lambda: requests.put(0, lambda: None), name="the missing one")
    thread.start()
    thread.join(_TIMEOUT_S)
    assert ran_on == ["the missing one"]


def test_an_action_is_not_kept_once_it_has_run() -> None:
    import weakref

    class Action:
        def __call__(self) -> None: ...

    requests, action = InOrder(), Action()
    gone = weakref.ref(action)
    requests.put(0, action)
    del action
    assert gone() is None


def test_an_action_that_raises_does_not_stop_those_behind_it() -> None:
    requests, done = InOrder(), list[int]()

    def fail() -> None:
        raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        requests.put(0, fail)
    requests.put(1, lambda: done.append(1))
    assert done == [1]
