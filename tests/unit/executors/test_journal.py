"""Journals: which calls rebuild a learner, which snapshot, and what bounds both."""

from __future__ import annotations

import errno
import math
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from torchfedrpc.config import OnWorkerLost, RuntimeConfig
from torchfedrpc.executors.admission import Admission
from torchfedrpc.executors.journal import Journal, Journals
from torchfedrpc.host.call import Call, CallKind, Outcome
from torchfedrpc.host.snapshot import seal
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.packing import pack
from torchfedrpc.wire.shared import SharedValue

VALUE = Outcome("value")
CUT_OFF = Outcome("cancelled", cut_off=True)
MAX_BYTES = 10_000


@pytest.fixture
def admission() -> Admission:
    return Admission(1 << 20)


@pytest.fixture
def journals(admission: Admission) -> Iterator[Journals]:
    journals = Journals(RuntimeConfig(journal_max_calls=3, journal_max_bytes=MAX_BYTES), admission)
    yield journals
    journals.close()


@pytest.fixture
def journal(journals: Journals) -> Journal:
    return Journal("client_1", journals)


def call(call_id: int, num_floats: int = 0, kind: CallKind = "call", shared: SharedValue | None = None) -> Call:
    arguments = (torch.zeros(num_floats),) if shared is None else (torch.zeros(num_floats), shared)
    return Call(call_id, "client_1", "train", pack(arguments, may_refer=True), run_timeout_s=5.0, kind=kind)


def add(journal: Journal, *call_ids: int, num_floats: int = 0) -> None:
    for call_id in call_ids:
        journal.add(call(call_id, num_floats), VALUE)


def repeated(journal: Journal) -> list[int]:
    """Ids of the calls that rebuild the learner, in order."""
    return [entry.call.call_id for entry in journal.entries]


def state(fill: int = 1, num_bytes: int = 100) -> Tensor:
    return torch.full((num_bytes,), fill, dtype=torch.uint8)


def sealed(fill: int = 1, num_bytes: int = 100) -> bytes:
    return bytes(seal(state(fill, num_bytes)))


def take_snapshot(journal: Journal, fill: int = 1, num_bytes: int = 100) -> None:
    """Keep a snapshot of the learner as it is now, in memory if there is room."""
    journal.request_snapshot()
    number = journal.number
    if not journal.keep(number, state(fill, num_bytes)):
        journal.store(number, state(fill, num_bytes)).result()
    journal.kept(number, num_bytes)


def snapshot_of(journal: Journal) -> bytes | None:
    """Read the last snapshot."""
    reading = journal.snapshot()
    return None if reading is None else bytes(reading.result().numpy())


def on_disk(journals: Journals) -> list[Any]:
    """Return the keys of the snapshots on disk, once earlier requests have been carried out."""
    return journals._disk.submit(list, journals._store).result()


def refuse_snapshot(journal: Journal) -> None:
    journal.request_snapshot()
    journal.refused("a graph is kept in an attribute")


# Calls.


def test_journal_repeats_calls_in_the_order_of_their_ends(journal: Journal) -> None:
    add(journal, 2, 1, 3)
    assert repeated(journal) == [2, 1, 3]
    assert [entry.number for entry in journal.entries] == [1, 2, 3]
    assert journal.has_state
    assert journal.is_complete


def test_journal_of_a_learner_that_was_not_called_is_empty(journal: Journal) -> None:
    assert not journal.has_state
    assert journal.is_complete
    assert snapshot_of(journal) is None


@pytest.mark.parametrize(
    ("kind", "outcome"),
    [
        ("call", Outcome("failed", never_ran=True)),
        ("call", Outcome("cancelled", never_ran=True)),
        ("snapshot", VALUE),
        ("snapshot", CUT_OFF),
        ("restore", Outcome("failed")),
        ("restore", CUT_OFF),
    ],
)
def test_journal_leaves_out_calls_that_change_nothing(journal: Journal, kind: CallKind, outcome: Outcome) -> None:
    add(journal, 1)
    journal.add(call(2, kind=kind), outcome)
    assert repeated(journal) == [1]
    assert (journal.number, journal.needs_snapshot, journal.is_complete) == (1, False, True)


def test_journal_repeats_calls_that_have_failed(journal: Journal) -> None:
    journal.add(call(1), Outcome("failed"))
    assert repeated(journal) == [1]


def test_journal_repeats_as_many_steps_of_a_stream_as_it_had(journal: Journal) -> None:
    journal.add(call(1, kind="stream"), Outcome("end"), 3)
    journal.add(call(2, kind="stream"), Outcome("cancelled"), 2)
    steps = [(entry.call.kind, entry.num_items, entry.was_closed) for entry in journal.entries]
    assert steps == [("stream", 3, False), ("stream", 2, True)]


def test_journal_keeps_nothing_if_nothing_is_rebuilt(admission: Admission) -> None:
    journals = Journals(RuntimeConfig(on_worker_lost=OnWorkerLost.fail), admission)
    journal = Journal("client_1", journals)
    add(journal, 1, num_floats=100)
    journal.add(call(2), CUT_OFF)
    assert (journal.entries, journal.has_state, journals.num_bytes) == ([], False, 0)
    assert (journal.needs_snapshot, journal.is_due, journal.is_complete) == (False, False, False)
    journals.close()


def test_snapshots_of_two_moves_are_apart_if_nothing_is_rebuilt(admission: Admission) -> None:
    journals = Journals(RuntimeConfig(on_worker_lost=OnWorkerLost.fail, journal_max_bytes=4000), admission)
    journal = Journal("client_1", journals)
    for number in range(1, 8):  # more than memory has room for
        journal.add(call(number), Outcome("value"))
        snapshot = torch.full((400,), number, dtype=torch.uint8)
        journal.request_snapshot()
        if not journal.keep(journal.number, snapshot):
            journal.store(journal.number, snapshot).result()
        journal.kept(journal.number, snapshot.nbytes)
        kept = snapshot_of(journal)
        assert kept is not None
        assert bytes([number]) * 300 in kept  # behind its header
    journals.close()


# Calls that were cut off.


def test_call_that_was_cut_off_is_not_repeated_and_needs_a_snapshot(journal: Journal) -> None:
    add(journal, 1)
    journal.add(call(2), CUT_OFF)
    assert repeated(journal) == [1]
    assert (journal.needs_snapshot, journal.is_complete) == (True, False)
    add(journal, 3)
    assert (journal.needs_snapshot, journal.is_complete) == (True, False)
    take_snapshot(journal)
    assert repeated(journal) == []
    assert (journal.needs_snapshot, journal.is_complete) == (False, True)


def test_snapshot_from_before_a_cut_off_does_not_do_for_it(journal: Journal) -> None:
    add(journal, 1)
    journal.request_snapshot()
    number = journal.number
    journal.add(call(2), CUT_OFF)
    assert journal.keep(number, state())
    journal.kept(number, 100)
    assert journal.needs_snapshot
    assert not journal.is_complete


def test_cut_off_needs_a_snapshot_whatever_its_size(journal: Journal) -> None:
    assert journal.snapshot_arguments(10).open(AllowList()) == 10
    journal.add(call(1), CUT_OFF)
    assert journal.snapshot_arguments(10).open(AllowList()) is None


# Snapshots.


def test_snapshot_replaces_the_calls_before_it_and_keeps_those_after_it(journal: Journal, journals: Journals) -> None:
    add(journal, 1, 2)
    journal.request_snapshot()
    number = journal.number
    add(journal, 3, num_floats=100)
    assert journal.keep(number, state(7))
    journal.kept(number, 100)
    assert repeated(journal) == [3]
    assert snapshot_of(journal) == sealed(7)
    assert journals.num_bytes == journal.num_bytes == journal.entries[0].call.arguments.num_bytes


def test_snapshot_that_comes_behind_a_newer_one_is_dropped(journal: Journal, journals: Journals) -> None:
    add(journal, 1)
    for _ in range(2):
        journal.request_snapshot()
    older = journal.number
    assert journal.keep(older, state(1))
    add(journal, 2)
    newer = journal.number
    journal.store(newer, state(2)).result()
    journal.kept(newer, 100)
    add(journal, 3)
    journal.kept(older, 100)
    assert snapshot_of(journal) == sealed(2)
    assert repeated(journal) == [3]
    assert not journal.awaits_snapshot
    assert not journals._states


def test_snapshot_that_is_on_its_way_is_awaited_until_it_has_ended(journal: Journal) -> None:
    add(journal, 1)
    journal.request_snapshot()
    journal.request_snapshot()
    awaits = [journal.awaits_snapshot]
    journal.not_taken(5000)
    awaits.append(journal.awaits_snapshot)
    journal.not_taken()
    awaits.append(journal.awaits_snapshot)
    assert awaits == [True, True, False]
    assert journal.state_bytes == 5000  # as large as it was, at the last time that was known
    assert repeated(journal) == [1]


@pytest.mark.parametrize("num_bytes", [100, MAX_BYTES])
def test_snapshot_lies_in_memory_or_on_disk(journal: Journal, journals: Journals, num_bytes: int) -> None:
    add(journal, 1)
    take_snapshot(journal, 3, num_bytes)
    in_memory = num_bytes == 100
    assert (bool(journals._states), bool(on_disk(journals))) == (in_memory, not in_memory)
    assert snapshot_of(journal) == sealed(3, num_bytes)
    assert journal.state_bytes == num_bytes


@pytest.mark.parametrize("sizes", [(100, 100), (100, MAX_BYTES), (MAX_BYTES, 100), (MAX_BYTES, MAX_BYTES)])
def test_snapshot_replaces_the_one_before_it_in_memory_and_on_disk(
    journal: Journal, journals: Journals, sizes: tuple[int, int]
) -> None:
    for number, num_bytes in enumerate(sizes):
        add(journal, number)
        take_snapshot(journal, number, num_bytes)
    assert snapshot_of(journal) == sealed(1, sizes[1])
    assert len(journals._states) + len(on_disk(journals)) == 1
    assert journals._num_state_bytes == (100 if sizes[1] == 100 else 0)


@pytest.mark.parametrize("sizes", [(100, 100), (100, MAX_BYTES), (MAX_BYTES, 100)])
def test_snapshot_that_is_taken_twice_between_two_calls_is_kept_once(
    journal: Journal, journals: Journals, sizes: tuple[int, int]
) -> None:
    """One because a call was cut off, say, and one that the bound has asked for."""
    add(journal, 1)
    for num_bytes in sizes:
        take_snapshot(journal, 1, num_bytes)
    add(journal, 2)
    take_snapshot(journal, 2)
    assert journals._num_state_bytes == 100
    assert len(journals._states) + len(on_disk(journals)) == 1
    journal.forget()
    assert journals._num_state_bytes == 0
    assert len(journals._states) + len(on_disk(journals)) == 0


def test_snapshots_in_memory_share_a_quarter_of_the_bound(journals: Journals) -> None:
    first, second = Journal("first", journals), Journal("second", journals)
    for number in range(3):  # each in the place of the one before
        add(first, number)
        take_snapshot(first, number, 3 * MAX_BYTES // 16)
        assert not on_disk(journals)
    add(second, 1)
    assert not second.keep(second.number, state(num_bytes=MAX_BYTES // 16 + 1))
    assert second.keep(second.number, state(num_bytes=MAX_BYTES // 16))


def test_snapshots_of_a_learner_that_was_given_up_make_room(journals: Journals) -> None:
    first, second = Journal("first", journals), Journal("second", journals)
    add(first, 1, num_floats=100)
    take_snapshot(first, 1, MAX_BYTES // 4)
    add(first, 2, num_floats=100)
    first.forget()
    assert (snapshot_of(first), first.entries, first.has_state, journals.num_bytes) == (None, [], False, 0)
    add(second, 1)
    assert second.keep(second.number, state(num_bytes=MAX_BYTES // 4))


def test_snapshot_that_the_disk_has_no_room_for_is_an_error(
    journal: Journal, journals: Journals, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(journals._store, "put", full)
    with pytest.raises(OSError, match="no space"):
        journal.store(1, state()).result()


def test_disk_that_is_slow_holds_up_neither_a_read_nor_a_deletion(
    journal: Journal, journals: Journals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event loop calls these, and no other learner may wait for it."""
    store, go_on = journals._store, threading.Event()
    put = store.put

    def slow_put(*args: Any) -> None:
        with store._lock:
            assert go_on.wait(10)
            put(*args)

    add(journal, 1)
    take_snapshot(journal, 1, MAX_BYTES)
    add(journal, 2)
    monkeypatch.setattr(store, "put", slow_put)
    written = Journal("other", journals).store(1, state())
    read = journal.snapshot()
    journal.forget()
    assert not written.done()
    go_on.set()
    assert read is not None
    assert bytes(read.result().numpy()) == sealed(1, MAX_BYTES)
    assert written.result() is None
    assert on_disk(journals) == ["1 other"]


# Bounds.


def test_journal_with_too_many_calls_is_due_for_a_snapshot_until_one_is_on_its_way(journal: Journal) -> None:
    dues = []
    for call_id in range(4):
        add(journal, call_id)
        dues.append(journal.is_due)
    assert dues == [False, False, False, True]
    assert not journal.needs_snapshot  # calls need not wait for it
    journal.request_snapshot()
    assert not journal.is_due
    journal.not_taken()
    assert journal.is_due


def test_journal_with_too_many_calls_needs_a_snapshot_whatever_its_size(journal: Journal) -> None:
    add(journal, 1, 2, 3)
    assert journal.snapshot_arguments(10).open(AllowList()) == 10
    add(journal, 4)
    assert journal.snapshot_arguments(10).open(AllowList()) is None


def relief(journals: Journals) -> list[tuple[str, int | None]]:
    return [(journal.client_id, limit) for journal, limit in journals.relief()]


def test_relief_takes_the_largest_journals_until_the_arguments_fit(journals: Journals) -> None:
    small, middle, large = (Journal(name, journals) for name in ("small", "middle", "large"))
    add(small, 1, num_floats=300)
    add(middle, 2, num_floats=900)
    assert relief(journals) == []
    add(large, 3, num_floats=1600)
    assert relief(journals) == [("large", large.num_bytes // 4)]
    large.request_snapshot()
    assert relief(journals) == []  # the one on its way will do
    add(middle, 4, num_floats=2400)
    assert relief(journals) == [("middle", middle.num_bytes // 4)]


def test_relief_begins_above_the_bound_and_ends_at_seven_eighths_of_it(journals: Journals) -> None:
    learners = [Journal(f"client_{number}", journals) for number in range(10)]
    for journal in learners[:9]:
        add(journal, 1, num_floats=250)
    assert MAX_BYTES * 7 // 8 < journals.num_bytes <= MAX_BYTES
    needs_relief = [journals.needs_relief]
    add(learners[9], 1, num_floats=250)
    assert [*needs_relief, journals.needs_relief] == [False, True]
    chosen = journals.relief()
    assert len(chosen) == math.ceil((journals.num_bytes - MAX_BYTES * 7 / 8) / learners[0].num_bytes)
    for journal, _ in chosen:
        take_snapshot(journal)
    assert journals.num_bytes <= MAX_BYTES * 7 // 8


@pytest.mark.parametrize(("snapshots_end", "max_reliefs"), [(True, 3 * 8), (False, 3 * 64)])
def test_relief_looks_at_all_journals_only_when_their_arguments_have_grown(
    admission: Admission, snapshots_end: bool, max_reliefs: int
) -> None:
    """4,000 clients make a call each, and the bound has room for the arguments of 1,000."""
    num_bytes = call(1, num_floats=250).arguments.num_bytes
    journals = Journals(RuntimeConfig(journal_max_bytes=1000 * num_bytes), admission)
    num_reliefs = largest = 0
    for number in range(4000):
        add(Journal(f"client_{number}", journals), 1, num_floats=250)
        largest = max(largest, journals.num_bytes)
        if journals.needs_relief:
            num_reliefs += 1
            for journal, _ in journals.relief():
                journal.request_snapshot()
                if snapshots_end:
                    journal.kept(journal.number, 0)
    assert 1 <= num_reliefs <= max_reliefs
    assert largest == (1001 if snapshots_end else 4000) * num_bytes
    journals.close()


def test_relief_takes_first_the_snapshots_that_free_four_times_their_size(journals: Journals) -> None:
    small, large = Journal("small", journals), Journal("large", journals)
    add(small, 1, num_floats=1200)
    add(large, 2, num_floats=1600)
    large.state_bytes = large.num_bytes // 4
    assert relief(journals) == [("large", large.num_bytes // 4)]
    large.state_bytes = large.num_bytes // 4 + 1
    assert relief(journals) == [("small", small.num_bytes // 4)]


def test_relief_takes_snapshots_of_any_size_if_those_that_are_worth_it_do_not_suffice(journals: Journals) -> None:
    costly, cheap = Journal("costly", journals), Journal("cheap", journals)
    add(costly, 1, num_floats=2000)
    add(cheap, 2, num_floats=1000)
    costly.state_bytes = 1 << 20
    assert relief(journals) == [("cheap", cheap.num_bytes // 4)]
    add(costly, 3, num_floats=1000)
    assert relief(journals) == [("cheap", cheap.num_bytes // 4), ("costly", None)]


def test_relief_takes_no_snapshot_of_any_size_while_one_that_suffices_is_on_its_way(journals: Journals) -> None:
    costly, cheap = Journal("costly", journals), Journal("cheap", journals)
    add(costly, 1, num_floats=2000)
    add(cheap, 2, num_floats=1000)
    costly.state_bytes = 1 << 20
    cheap.request_snapshot()
    assert relief(journals) == []


def test_relief_leaves_uncapturable_learners_alone(journals: Journals) -> None:
    journal = Journal("client_1", journals)
    refuse_snapshot(journal)
    journal.request_snapshot()
    add(journal, 1, num_floats=6000)  # kept for the snapshot that is on its way
    journal.not_taken()
    assert repeated(journal) == [1]
    assert relief(journals) == []


def test_arguments_beyond_the_bound_hold_calls_up(journals: Journals, admission: Admission) -> None:
    journal = Journal("client_1", journals)
    add(journal, 1, num_floats=2000)
    assert admission._num_held_bytes == 0
    add(journal, 2, num_floats=2000)
    assert admission._num_held_bytes == journals.num_bytes - MAX_BYTES
    take_snapshot(journal)
    assert (admission._num_held_bytes, journals.num_bytes) == (0, 0)


def test_shared_values_count_once_and_until_their_last_entry_is_gone(journals: Journals) -> None:
    first, second = Journal("first", journals), Journal("second", journals)
    shared = SharedValue(pack(torch.zeros(1000)), 1)
    first.add(call(1, shared=shared), VALUE)
    own = first.num_bytes
    assert journals.num_bytes == own + shared.num_bytes
    first.add(call(2, shared=shared), VALUE)
    second.add(call(3, shared=shared), VALUE)
    assert own < 1000
    assert (first.num_bytes, second.num_bytes) == (2 * own, own)
    assert journals.num_bytes == 3 * own + shared.num_bytes
    take_snapshot(first)
    assert journals.num_bytes == own + shared.num_bytes
    take_snapshot(second)
    assert journals.num_bytes == 0


def test_relief_divides_shared_values_among_the_entries_that_have_them(journals: Journals) -> None:
    several, single = Journal("several", journals), Journal("single", journals)
    shared = SharedValue(pack(torch.zeros(3000)), 1)
    for call_id in range(3):
        several.add(call(call_id, shared=shared), VALUE)
    single.add(call(3, num_floats=100, shared=shared), VALUE)
    share = int((several.num_bytes + shared.num_bytes * 3 / 4) / 4)
    assert relief(journals) == [("several", share)]


# Learners that cannot be captured.


def test_refusal_drops_the_calls_and_tells_why(journal: Journal, journals: Journals) -> None:
    add(journal, 1, num_floats=100)
    refuse_snapshot(journal)
    assert journal.unrecoverable == "a graph is kept in an attribute"
    assert (journal.entries, journals.num_bytes, journal.awaits_snapshot) == ([], 0, False)
    assert (journal.is_complete, journal.needs_snapshot) == (False, False)
    add(journal, 2)
    journal.add(call(3), CUT_OFF)
    assert repeated(journal) == []
    assert not journal.needs_snapshot


def test_refusals_are_followed_by_pauses_that_double_up_to_64_calls(journal: Journal) -> None:
    pauses = []
    for _ in range(9):
        refuse_snapshot(journal)
        pauses.append(0)
        while not journal.is_due:
            add(journal, 1)
            pauses[-1] += 1
    assert pauses == [1, 2, 4, 8, 16, 32, 64, 64, 64]
    assert journal.num_refusals == 9


def test_snapshot_after_refusals_makes_the_learner_recoverable_with_the_calls_behind_it(journal: Journal) -> None:
    add(journal, 1)
    refuse_snapshot(journal)
    add(journal, 2)
    journal.request_snapshot()
    number = journal.number
    add(journal, 3)
    assert not journal.is_due
    assert journal.keep(number, state())
    journal.kept(number, 100)
    assert (journal.unrecoverable, journal.num_refusals, journal.is_complete) == (None, 0, True)
    assert repeated(journal) == [3]


# Restored learners.


def test_restore_begins_the_journal_anew(journal: Journal, journals: Journals) -> None:
    add(journal, 1, num_floats=100)
    take_snapshot(journal, 1)
    add(journal, 2, num_floats=100)
    restore = call(3, num_floats=50, kind="restore")
    journal.add(restore, VALUE)
    add(journal, 4)
    assert snapshot_of(journal) is None
    assert not journals._states
    assert repeated(journal) == [3, 4]
    assert [entry.call.kind for entry in journal.entries] == ["restore", "call"]
    assert journals.num_bytes == sum(entry.call.arguments.num_bytes for entry in journal.entries)


def test_restore_makes_up_for_refusals_and_for_calls_that_were_cut_off(journal: Journal) -> None:
    refuse_snapshot(journal)
    journal.add(call(1), CUT_OFF)
    journal.add(call(2, kind="restore"), VALUE)
    assert (journal.unrecoverable, journal.num_refusals) == (None, 0)
    assert (journal.needs_snapshot, journal.is_complete) == (False, True)
    assert repeated(journal) == [2]


def test_restore_is_replaced_by_the_next_snapshot(journal: Journal) -> None:
    journal.add(call(1, kind="restore"), VALUE)
    take_snapshot(journal, 5)
    assert snapshot_of(journal) == sealed(5)
    assert repeated(journal) == []
    assert journal.is_complete


def test_snapshot_from_before_a_restore_or_a_give_up_is_dropped_when_it_comes(
    journal: Journal, journals: Journals
) -> None:
    add(journal, 1)
    journal.request_snapshot()
    number = journal.number
    journal.add(call(2), CUT_OFF)
    journal.add(call(3, kind="restore"), VALUE)
    assert journal.keep(number, state())
    journal.kept(number, 100)
    assert (snapshot_of(journal), repeated(journal)) == (None, [3])
    assert (journal.is_complete, journal.needs_snapshot, journal.awaits_snapshot) == (True, False, False)
    journal.request_snapshot()
    number = journal.number
    journal.forget()
    assert journal.keep(number, state())
    journal.kept(number, 100)
    assert not journals._states


def test_closed_journals_keep_nothing(journals: Journals, journal: Journal) -> None:
    shared = SharedValue(pack(torch.zeros(10)), 1)
    journal.add(call(1, shared=shared), VALUE)
    take_snapshot(journal)
    journal.add(call(2, shared=shared), VALUE)
    journals.close()
    assert journals.num_bytes == 0
    assert not any((journals._states, journals._num_uses, journals._journals))
    journals.discard("client_1", 1)  # of a snapshot that was on its way
