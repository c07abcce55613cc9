"""Few states are on their way to or from a worker at once, and everybody's turn comes."""

from __future__ import annotations

import pytest

from torchfedrpc.executors.journal import Asked, Record
from torchfedrpc.executors.room import Room
from torchfedrpc.executors.turns import Turns
from torchfedrpc.host.call import Call, CallKind
from torchfedrpc.wire.packing import pack

MIB = 1 << 20


@pytest.fixture
def turns() -> Turns:
    room = Room()
    room.saw(16 * MIB)
    return Turns("worker1", room)


def records(number: int) -> list[Record]:
    return [Record(f"c{index}", "worker1", pack({})) for index in range(number)]


def test_as_many_states_have_room_as_fit_at_the_size_of_the_largest() -> None:
    room = Room()
    assert [room.fits(taken) for taken in (0, 3, 4)] == [True, True, False]  # 8 MiB each is the first guess
    room.saw(1 * MIB)
    assert [room.fits(taken) for taken in (31, 32)] == [True, False]
    room.saw(40 * MIB)
    room.saw(1 * MIB)
    assert [room.fits(taken) for taken in (0, 1)] == [True, False]


def test_small_states_are_bounded_in_number() -> None:
    room = Room()
    room.saw(10)
    assert room.fits(63)
    assert not room.fits(64)


def test_who_finds_no_room_goes_on_in_order_once_others_have_arrived(turns: Turns) -> None:
    went: list[str] = []

    def follow(record: Record) -> None:
        if turns.take(record, follow):
            went.append(record.client_id)
            record.awaits_snapshot = True

    all_of_them = records(5)
    for record in all_of_them:
        follow(record)
    assert went == ["c0", "c1"]
    turns.go_on()
    assert went == ["c0", "c1"]
    all_of_them[1].awaits_snapshot = False
    turns.go_on()
    assert went == ["c0", "c1", "c2"]
    for record in all_of_them[:3]:
        record.awaits_snapshot = False
    turns.go_on()
    assert went == ["c0", "c1", "c2", "c3", "c4"]


def test_one_whose_turn_it_is_has_it_still_when_it_asks_again(turns: Turns) -> None:
    first, second, third = records(3)
    for record in (first, second):
        assert turns.take(record, lambda one: None)
        record.awaits_snapshot = True
    assert turns.take(first, lambda one: None)
    assert not turns.take(third, lambda one: None)


def test_one_that_has_gone_to_another_worker_takes_no_room(turns: Turns) -> None:
    first, second, third = records(3)
    for record in (first, second):
        assert turns.take(record, lambda one: None)
        record.awaits_snapshot = True
    second.label = "worker2"
    assert turns.take(third, lambda one: None)


def test_a_snapshot_behind_an_open_stream_takes_no_room(turns: Turns) -> None:
    streaming, *others = records(4)
    kinds: list[CallKind] = ["stream", "snapshot"]
    for call_id, kind in enumerate(kinds, start=1):
        call = Call(call_id, streaming.client_id, kind, pack(None), kind=kind)
        streaming.asked[call_id] = Asked(call, call_id, is_own=kind == "snapshot")
    streaming.awaits_snapshot = True

    def refuse(record: Record) -> None:
        raise AssertionError(f"{record.client_id} was kept waiting")

    assert turns.take(streaming, refuse)
    for record in others[:2]:
        record.awaits_snapshot = True
        assert turns.take(record, refuse)
    del streaming.asked[1]  # now its state is the next to come
    others[0].awaits_snapshot = False
    assert not turns.take(others[2], refuse)
    del streaming.asked[2]  # it is stored
    assert not turns.take(others[2], refuse)
    streaming.awaits_snapshot = False
    assert turns.take(others[2], refuse)
