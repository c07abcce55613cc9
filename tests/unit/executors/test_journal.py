"""The ledger: calls are repeated in the order in which they ran, whatever the order of their answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.executors.journal import Ledger, Record
from torchfedrpc.host.call import Call, Outcome
from torchfedrpc.wire.packing import pack

VALUE = Outcome("value")


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    ledger = Ledger(RuntimeConfig(journal_max_calls=3, journal_max_bytes=10_000), hold=lambda num_bytes: None)
    yield ledger
    ledger.close()


def recorded(ledger: Ledger, client_id: str = "client_1") -> Record:
    record = Record(client_id, "worker1", pack({}))
    ledger.add(record)
    return record


def call(call_id: int, num_floats: int = 0) -> Call:
    return Call(call_id, "client_1", "train", pack((torch.zeros(num_floats),)))


def rebuilt(ledger: Ledger, record: Record, restore: Call | None = None) -> list[int]:
    ledger.plan_rebuild(record, restore)
    return list(record.asked)


def test_calls_are_repeated_in_the_order_in_which_they_were_asked_and_not_in_that_of_their_answers(
    ledger: Ledger,
) -> None:
    record = recorded(ledger)
    first, second, third = (ledger.ask(record, call(call_id), None) for call_id in (1, 2, 3))
    ledger.settle(record, third, VALUE)
    ledger.settle(record, first, VALUE)
    assert rebuilt(ledger, record) == [1, 2, 3]
    assert [asked.is_own for asked in record.asked.values()] == [True, False, True]
    assert record.asked[2] is second


def test_a_snapshot_is_of_no_use_while_a_call_before_it_is_unanswered(ledger: Ledger) -> None:
    record = recorded(ledger)
    unanswered = ledger.ask(record, call(1), None)
    ledger.settle(record, ledger.ask(record, call(2), None), VALUE)
    snapshot = ledger.ask(record, call(3), None, is_own=True)
    ledger.settle(record, snapshot, VALUE)
    ledger.store(record, snapshot.number, memoryview(b"state"))
    ledger.took(record, snapshot.number)
    assert ledger.snapshot(record) is None
    ledger.settle(record, unanswered, VALUE)
    ledger.store(record, snapshot.number, memoryview(b"state"))
    ledger.took(record, snapshot.number)
    assert ledger.snapshot(record) == b"state"
    assert rebuilt(ledger, record) == []


def test_a_snapshot_leaves_the_calls_after_it_in_the_journal(ledger: Ledger) -> None:
    record = recorded(ledger)
    ledger.settle(record, ledger.ask(record, call(1), None), VALUE)
    snapshot = ledger.ask(record, call(2), None, is_own=True)
    ledger.settle(record, ledger.ask(record, call(3), None), VALUE)
    ledger.settle(record, snapshot, VALUE)
    ledger.store(record, snapshot.number, memoryview(b"state"))
    ledger.took(record, snapshot.number)
    assert rebuilt(ledger, record, restore=call(9)) == [9, 3]


def test_a_snapshot_outlives_that_a_learner_is_rebuilt_from_it(ledger: Ledger) -> None:
    record = recorded(ledger)
    for _ in range(2):  # as it is taken, and as a rebuilt learner has it
        ledger.store(record, 5, memoryview(b"state"))
        ledger.took(record, 5)
        assert ledger.snapshot(record) == b"state"


def test_what_never_ran_is_not_repeated_and_what_was_cut_off_asks_for_a_snapshot(ledger: Ledger) -> None:
    record = recorded(ledger)
    ledger.settle(record, ledger.ask(record, call(1), None), Outcome("failed", never_ran=True))
    assert not ledger.is_cut_off(record)
    ledger.settle(record, ledger.ask(record, call(2), None), Outcome("cancelled", cut_off=True))
    assert ledger.is_cut_off(record)
    assert rebuilt(ledger, record) == []


def test_an_answer_behind_a_cut_off_call_is_withheld_until_a_snapshot_has_its_effects(ledger: Ledger) -> None:
    record = recorded(ledger)
    before = ledger.ask(record, call(1), None)
    ledger.settle(record, ledger.ask(record, call(2), None), Outcome("cancelled", cut_off=True))
    assert ledger.is_cut_off(record)
    record.awaits_snapshot = True
    snapshot = ledger.ask(record, call(3), None, is_own=True)
    behind = ledger.ask(record, call(4), None)
    assert [ledger.holds(record, asked) for asked in (before, snapshot, behind)] == [False, False, True]
    ledger.settle(record, before, VALUE)
    ledger.settle(record, snapshot, VALUE)
    ledger.store(record, snapshot.number, memoryview(b"state"))
    ledger.took(record, snapshot.number)
    assert not ledger.holds(record, behind)


def test_too_many_calls_of_a_learner_ask_for_a_snapshot(ledger: Ledger) -> None:
    record = recorded(ledger)
    asks = []
    for call_id in range(1, 5):
        ledger.settle(record, ledger.ask(record, call(call_id), None), VALUE)
        asks.append(ledger.has_long_journal(record))
    assert asks == [False, False, False, True]


def test_a_snapshot_from_before_a_cut_off_does_not_do_for_it(ledger: Ledger) -> None:
    record = recorded(ledger)
    snapshot = ledger.ask(record, call(1), None, is_own=True)
    ledger.settle(record, snapshot, VALUE)
    ledger.settle(record, ledger.ask(record, call(2), None), Outcome("cancelled", cut_off=True))
    ledger.store(record, snapshot.number, memoryview(b"state"))
    ledger.took(record, snapshot.number)
    assert ledger.is_cut_off(record)


def test_a_restore_is_repeated_until_its_snapshot_is_stored(ledger: Ledger) -> None:
    record = recorded(ledger)
    ledger.settle(record, ledger.ask(record, call(1), None), VALUE)
    restore = ledger.ask(record, replace(call(2), kind="restore"), None)
    ledger.settle(record, restore, VALUE)
    ledger.settle(record, ledger.ask(record, replace(call(3), kind="restore"), None), Outcome("failed"))
    assert rebuilt(ledger, record) == [1, 2]


def test_the_largest_journals_are_named_until_the_arguments_fit(ledger: Ledger) -> None:
    small, large = recorded(ledger, "small"), recorded(ledger, "large")
    ledger.settle(small, ledger.ask(small, call(1, num_floats=500), None), VALUE)
    assert ledger.relief() == []
    ledger.settle(large, ledger.ask(large, call(2, num_floats=2400), None), VALUE)
    assert ledger.relief() == [large]
    large.awaits_snapshot = True
    assert ledger.relief() == []


def test_a_snapshot_has_a_limit_that_makes_it_worth_it_unless_it_is_needed_anyway(ledger: Ledger) -> None:
    record = recorded(ledger)
    ledger.settle(record, ledger.ask(record, call(1, num_floats=2500), None), VALUE)
    assert ledger.relief() == [record]
    assert ledger.limit_bytes(record) == record.num_journal_bytes // 4
    record.state_bytes = record.num_journal_bytes  # it was refused
    assert ledger.relief() == [record]
    assert ledger.limit_bytes(record) is None
    record.limit_bytes = 1
    ledger.settle(record, ledger.ask(record, call(2), None), Outcome("cancelled", cut_off=True))
    assert ledger.limit_bytes(record) is None


def test_nothing_is_kept_where_nothing_is_rebuilt() -> None:
    ledger = Ledger(RuntimeConfig(on_worker_lost="fail"), hold=lambda num_bytes: None)
    record = recorded(ledger)
    ledger.settle(record, ledger.ask(record, call(1, num_floats=100), None), VALUE)
    assert not ledger.is_cut_off(record)
    assert not ledger.has_long_journal(record)
    assert ledger.num_journal_bytes == 0
    assert record.journal == []
    ledger.close()


def test_snapshots_in_memory_share_a_bound_and_go_with_a_learner_that_is_given_up(ledger: Ledger) -> None:
    state = torch.zeros(1500, dtype=torch.uint8)
    first, second = recorded(ledger, "first"), recorded(ledger, "second")
    for number in (1, 2, 3):  # each in the place of the one before
        assert ledger.keep(first, number, state)
        ledger.took(first, number)
    assert not ledger.keep(second, 4, state)
    ledger.give_up(first)
    assert ledger.keep(second, 4, state)
