"""The page that tells which calls a process runs: read from outside, at any moment, and after its end."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import pytest
from processes import LightProcess

from torchfedrpc.host.activity import Activity
from torchfedrpc.rpc import heartbeat_process


@pytest.fixture
def activity() -> Iterator[Activity]:
    activity = Activity()
    yield activity
    activity.close()


def running(activity: Activity) -> list[int]:
    return heartbeat_process.running(activity.descriptor)


def test_a_call_is_shown_from_its_begin_to_its_end(activity: Activity) -> None:
    assert running(activity) == []
    first, second = activity.enter(7), activity.enter(-1)
    assert running(activity) == [-1, 7]
    activity.leave(first)
    assert running(activity) == [-1]
    activity.leave(second)
    assert running(activity) == []


def test_ids_of_64_bits_are_shown_whole(activity: Activity) -> None:
    activity.enter(2**63 - 1)
    assert running(activity) == [2**63 - 1]


def test_an_id_beyond_64_bits_takes_no_place_on_the_page(activity: Activity) -> None:
    for _ in range(600):
        with pytest.raises(ValueError, match="format"):
            activity.enter(2**63)
    assert activity.enter(9) is not None
    assert running(activity) == [9]


def test_calls_beyond_the_page_are_left_out_and_end_without_harm(activity: Activity) -> None:
    slots = [activity.enter(number) for number in range(1, 514)]
    assert slots[-3:] == [None, None, None]
    assert running(activity) == list(range(1, 511))
    for slot in slots:
        activity.leave(slot)
    assert running(activity) == []
    assert activity.enter(9) is not None


def test_asking_to_leave_is_seen_and_is_no_call(activity: Activity) -> None:
    assert not heartbeat_process.wants_to_leave(activity.descriptor)
    slot = activity.enter(7)
    activity.ask_to_leave()
    assert heartbeat_process.wants_to_leave(activity.descriptor)
    assert running(activity) == [7]
    activity.leave(slot)
    assert heartbeat_process.wants_to_leave(activity.descriptor)
    assert not heartbeat_process.is_severed(activity.descriptor)


def test_severing_is_seen_and_is_no_call(activity: Activity) -> None:
    assert not heartbeat_process.is_severed(activity.descriptor)
    activity.sever()
    assert heartbeat_process.is_severed(activity.descriptor)
    assert not heartbeat_process.wants_to_leave(activity.descriptor)
    assert running(activity) == []


def test_threads_that_enter_and_leave_do_not_disturb_each_other(activity: Activity) -> None:
    def work(call_id: int) -> None:
        for _ in range(2000):
            slot = activity.enter(call_id)
            if call_id not in heartbeat_process.running(activity.descriptor):
                missing.append(call_id)
            activity.leave(slot)

    missing: list[int] = []
    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert missing == []
    assert running(activity) == []


def test_a_call_that_goes_on_after_the_close_does_no_harm() -> None:
    activity = Activity()
    slot = activity.enter(1)
    activity.close()
    activity.leave(slot)
    activity.leave(activity.enter(2))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(activity.descriptor)


def test_the_page_outlives_its_process() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = LightProcess(
            """
            import socket
            from torchfedrpc.host.activity import Activity
            activity = Activity()
            activity.enter(5)
            socket.send_fds(socket.socket(fileno=int(sys.argv[1])), [b"x"], [activity.descriptor])
            sys.stdin.read()
            """,
            theirs.fileno(),
            pass_fds=[theirs.fileno()],
        )
        _, (descriptor,), _, _ = socket.recv_fds(ours, 1, 1)
        process.close()
        try:
            assert heartbeat_process.running(descriptor) == [5]
        finally:
            os.close(descriptor)
