"""Few states are on their way to or from a worker at once, and everybody's turn comes."""

from __future__ import annotations

import pytest

from torchfedrpc.executors.ledger import Record
from torchfedrpc.executors.room import Room
from torchfedrpc.executors.turns import Turns
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
