"""What every learner has been asked: enough to make it again elsewhere, with the same bits."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.host.call import Call, Outcome
from torchfedrpc.host.mailbox import Reply
from torchfedrpc.host.snapshot import seal
from torchfedrpc.rpc.worker_client import RemoteHost
from torchfedrpc.storage import BlobStore
from torchfedrpc.wire.packing import Packed
from torchfedrpc.wire.shared import SharedValue, shared_values

_MAX_PAUSE = 64  # calls, from one try to capture a learner to the next
_WORTH = 4  # times its own size that a snapshot has to free
_STATES_SHARE = 4  # of the arguments' bound, so much less for snapshots in memory: 128 MiB, three of a 40 MB model


@dataclass(eq=False, slots=True)
class Asked:
    """A call that its worker has not finished, as far as the driver knows.

    Attributes:
        call: what is asked.
        number: its place among all calls of the run.
        reply: who waits for the next outcome; None where nobody does.
        is_own: whether it is no call of the user's, but rebuilds the learner or takes a snapshot for that.
        is_waiting: whether an outcome is due; False where a stream is open and idle.
        is_cancelled: whether it is to end as soon as it is at ``num_items`` again.
        was_waiting: whether an outcome was due when it was cancelled: what of it has run, nobody knows.
        num_items: items of a stream that were delivered.
        num_items_here: items that the learner has given which now has the call, after a loss again from the first.
        num_reports: what it reported of its progress and was published.
        asked_through: the worker in the world through which it was asked last.
    """

    call: Call
    number: int
    reply: Reply | None = None
    is_own: bool = False
    is_waiting: bool = True
    is_cancelled: bool = False
    was_waiting: bool = False
    num_items: int = 0
    num_items_here: int = 0
    num_reports: int = 0
    asked_through: RemoteHost | None = None

    def forget_worker(self) -> None:
        """The learner that had the call is lost."""
        self.asked_through = None
        self.num_items_here = 0


@dataclass(frozen=True, eq=False, slots=True)
class Entry:
    """A call that has changed its learner, as the journal keeps it.

    Attributes:
        call: what was asked.
        number: its place among all calls of the run.
        num_items: items that a stream gave.
        was_closed: whether a stream was closed before its end.
    """

    call: Call
    number: int
    num_items: int
    was_closed: bool


@dataclass(eq=False, slots=True)
class Record:
    """One client's learner.

    Attributes:
        client_id: whose.
        label: the worker that has it.
        constructor: keyword arguments for its constructor.
        snapshot_number: place of its last snapshot among all calls of the run; 0 where there is none.
        journal: the calls since then, as their answers came.
        asked: the calls that are not finished, by id, in order.
        num_losses: how often in succession its worker was lost as a call of it ran.
        num_journal_bytes: bytes of the arguments that its journal keeps, without what they share with others.
        given_up: why it takes no calls any more.
        unrecoverable: why it could not be rebuilt, should its worker be lost.
        num_refusals: how often in succession its state could not be captured.
        num_since_refusal: calls since the last time.
        cut_off_number: place of the last call that was cut off, so that the journal cannot repeat it.
        awaits_snapshot: whether one is on its way.
        held: answers that wait for the snapshot of a cut-off before them, each with the worker that gave it.
        is_registered: whether its worker has answered a call of it, and so has room for it.
        changed_number: place of the last call that may have changed it, among those that are answered.
        moving_to: the worker that is to have it once the calls that its present one has are answered.
        moves_by_journal: whether its calls are made again there, since it cannot be captured.
        num_builds: how often it was made on some worker.
        state_bytes: size of its last snapshot, or of the one that was too large; 0 where none is known.
        limit_bytes: the size from which on the next one is not worth it; None for no limit.
    """

    client_id: str
    label: str
    constructor: Packed
    snapshot_number: int = 0
    journal: list[Entry] = field(default_factory=list)
    asked: dict[int, Asked] = field(default_factory=dict)
    num_losses: int = 0
    num_journal_bytes: int = 0
    given_up: str | None = None
    unrecoverable: str | None = None
    num_refusals: int = 0
    num_since_refusal: int = 0
    cut_off_number: int = 0
    awaits_snapshot: bool = False
    held: list[tuple[RemoteHost, Asked, Outcome]] = field(default_factory=list)
    is_registered: bool = False
    changed_number: int = 0
    moving_to: str | None = None
    moves_by_journal: bool = False
    num_builds: int = 0
    state_bytes: int = 0
    limit_bytes: int | None = None

    @property
    def awaits_state(self) -> bool:
        """Whether a snapshot of it, or one to rebuild it from, is on its way, or is about to be."""
        return self.awaits_snapshot or any(_is_state(asked) for asked in self.asked.values())

    @property
    def carries_state(self) -> bool:
        """Whether that is so now: it is stored, or no call comes before it, such as a stream that stays open."""
        first = next(iter(self.asked.values()), None)
        is_asked_for = any(_is_state(asked) for asked in self.asked.values())
        return (first is not None and _is_state(first)) or (self.awaits_snapshot and not is_asked_for)

    def holds_back(self, asked: Asked) -> bool:
        """Whether a call waits for the worker that is to have the learner."""
        return self.moving_to is not None and asked.asked_through is None and not asked.is_own


def _is_state(asked: Asked) -> bool:
    return asked.is_own and asked.call.kind in ("restore", "snapshot")


class Ledger:
    """Records of all learners that have been called, with snapshots on disk.

    Args:
        runtime: with the journal's bounds.
        hold: is told how many bytes of arguments are kept beyond their bound, while snapshots are on their way.
    """

    def __init__(self, runtime: RuntimeConfig, hold: Callable[[int], None]) -> None:
        self._keeps_journal = runtime.on_worker_lost == "recover"
        self._max_calls = runtime.journal_max_calls
        self._max_bytes = runtime.journal_max_bytes
        self._hold = hold
        self._records: dict[str, Record] = {}
        self._numbers = itertools.count(1)
        self._store = BlobStore()
        self._states: dict[tuple[str, int], Tensor] = {}  # snapshots in memory, under the numbers of their calls
        self._num_state_bytes = 0  # of these
        self._num_uses: Counter[SharedValue] = Counter()  # of each shared value, by the entries of all journals
        self.num_journal_bytes = 0

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())

    def get(self, client_id: str) -> Record | None:
        """A client's record, once it has one."""
        return self._records.get(client_id)

    def add(self, record: Record) -> None:
        """Begin a record."""
        self._records[record.client_id] = record

    def ask(self, record: Record, call: Call, reply: Reply | None, *, is_own: bool = False) -> Asked:
        """Note a call of a learner."""
        record.asked[call.call_id] = asked = Asked(call, next(self._numbers), reply, is_own)
        return asked

    def put_behind(self, record: Record, waiting: Iterable[Asked]) -> None:
        """Note calls that no worker has yet behind what was asked since they came: it does not contain them."""
        for asked in waiting:
            asked.number = next(self._numbers)
            record.asked[asked.call.call_id] = record.asked.pop(asked.call.call_id)

    def settle(self, record: Record, asked: Asked, outcome: Outcome) -> None:
        """Note the end of a call."""
        del record.asked[asked.call.call_id]
        if asked.is_own:
            return
        record.num_losses = 0
        kind = asked.call.kind
        if kind == "restore" and outcome.kind == "value":
            record.unrecoverable = None
        is_contained = asked.number < record.snapshot_number
        changes_nothing = kind == "snapshot" or (kind == "restore" and outcome.kind != "value") or outcome.never_ran
        if not changes_nothing:
            record.changed_number = max(record.changed_number, asked.number)
        if changes_nothing or is_contained or not self._keeps_journal:
            return
        record.num_since_refusal += 1
        if record.unrecoverable and not record.awaits_snapshot:  # else it may be the snapshot that the call follows
            return
        is_cut_off = outcome.cut_off or asked.was_waiting
        if is_cut_off:
            record.cut_off_number = asked.number
            if not asked.num_items:
                return
        call = asked.call.repeated()
        was_closed = is_cut_off or outcome.kind == "cancelled"
        record.journal.append(Entry(call, asked.number, asked.num_items, was_closed))
        self._count(record, [call])

    def is_cut_off(self, record: Record) -> bool:
        """Whether a snapshot has to hold what the journal cannot repeat: a call that was cut off."""
        return self._may_need_snapshot(record) and record.cut_off_number > record.snapshot_number

    def has_long_journal(self, record: Record) -> bool:
        """Whether a snapshot is to take the place of a learner's journal."""
        return self._may_need_snapshot(record) and len(record.journal) > self._max_calls

    def may_try_again(self, record: Record) -> bool:
        """Whether the state of a learner that could not be captured may be another now, so that it is worth a try."""
        pause = min(2 ** (record.num_refusals - 1), _MAX_PAUSE)
        is_lost = record.unrecoverable is not None and record.given_up is None
        return self._keeps_journal and is_lost and not record.awaits_snapshot and record.num_since_refusal >= pause

    def refused(self, record: Record, reason: str) -> None:
        """The learner's state cannot be captured, and its journal has not all that it has done, or is too long."""
        record.unrecoverable = reason
        record.num_refusals += 1
        record.num_since_refusal = 0
        self.drop_journal(record)

    def _may_need_snapshot(self, record: Record) -> bool:
        is_lost = record.unrecoverable is not None or record.given_up is not None
        return self._keeps_journal and not record.awaits_snapshot and not is_lost

    def has_all(self, record: Record) -> bool:
        """Whether snapshot and journal together have all that the learner has done."""
        is_kept = self._keeps_journal and record.unrecoverable is None
        return is_kept and record.cut_off_number <= record.snapshot_number

    def holds(self, record: Record, asked: Asked) -> bool:
        """Whether a call's answer is not told yet: its effects build on a cut-off's, which would be lost today."""
        is_behind = asked.number > record.cut_off_number > record.snapshot_number
        return is_behind and record.awaits_snapshot and not asked.is_own

    def relief(self) -> list[Record]:
        """Return the learners whose snapshots bring the journals' arguments under their bound.

        A snapshot that frees several times its own size comes first; the learner's process tells whether it does.
        Where these are too few, others are taken whatever their size.
        """
        excess = float(self.num_journal_bytes - self._max_bytes)
        if excess <= 0:
            return []
        shares = {record: self._share(record) for record in self if record.journal}
        excess -= sum(share for record, share in shares.items() if record.awaits_snapshot)
        largest = sorted((one for one in shares if not one.awaits_snapshot), key=shares.__getitem__, reverse=True)
        worth = self._chosen([one for one in largest if shares[one] >= _WORTH * one.state_bytes], shares, excess)
        for record in worth:
            record.limit_bytes = int(shares[record] / _WORTH)
        excess -= sum(shares.pop(record) for record in worth)
        largest = [record for record in largest if record in shares]
        needed = self._chosen(largest, shares, excess) if excess > 0 else []
        for record in needed:
            record.limit_bytes = None
        return worth + needed

    def limit_bytes(self, record: Record) -> int | None:
        """Largest size of a learner's next snapshot that is worth taking, in bytes; None if one is required."""
        is_lost = record.unrecoverable is not None or record.cut_off_number > record.snapshot_number
        is_needed = is_lost or record.moving_to is not None or len(record.journal) > self._max_calls
        return None if is_needed else record.limit_bytes

    @staticmethod
    def _chosen(records: list[Record], shares: dict[Record, float], excess: float) -> list[Record]:
        """The first of them, until their shares make up for the excess."""
        chosen = []
        for record in records:
            if excess <= 0 or not shares[record]:
                break
            chosen.append(record)
            excess -= shares[record]
        return chosen

    def _share(self, record: Record) -> float:
        """Bytes that a learner's journal keeps; of what several entries share, each has its part."""
        shared = (value for entry in record.journal for value in shared_values(entry.call.arguments))
        return record.num_journal_bytes + sum(value.num_bytes / self._num_uses[value] for value in shared)

    def keep(self, record: Record, number: int, state: Tensor) -> bool:
        """Keep a snapshot in memory, if a part of the journals' bound has room for it; `took` makes it the record's.

        Args:
            record: whose.
            number: of the call as which it was taken.
            state: what the learner's process gave, uint8 [num_bytes].
        """
        replaced = self._states.get((record.client_id, record.snapshot_number))
        others = self._num_state_bytes - (replaced.nbytes if replaced is not None else 0)
        if others + state.nbytes > self._max_bytes // _STATES_SHARE:
            return False
        self._states[record.client_id, number] = state
        self._num_state_bytes += state.nbytes
        return True

    def store(self, record: Record, number: int, data: memoryview) -> None:
        """Write a snapshot to disk, on any thread; `took` makes it the record's own.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        self._store.put(_key(record, number), [data])

    def took(self, record: Record, number: int) -> None:
        """A snapshot that was taken as call ``number`` is stored: the journal begins behind it.

        It is of no use if it contains a call whose answer has not come, since that may be asked again.
        """
        if number == record.snapshot_number:  # the learner was rebuilt from this very snapshot
            return
        held = [asked for _, asked, _ in record.held]
        is_unanswered = any(
            asked.number < number and not asked.is_own and asked not in held for asked in record.asked.values()
        )
        if number < record.snapshot_number or is_unanswered:
            self._discard(record, number)
            return
        self._discard(record, record.snapshot_number)
        record.snapshot_number = number
        record.unrecoverable, record.num_refusals = None, 0
        self._cut(record, [entry for entry in record.journal if entry.number > number])

    def give_up(self, record: Record) -> None:
        """The learner is not rebuilt any more: forget its journal and its snapshot."""
        self.drop_journal(record)
        self._discard(record, record.snapshot_number)

    def drop_journal(self, record: Record) -> None:
        """The learner cannot be rebuilt, or need not be."""
        self._cut(record, [])

    def plan_rebuild(self, record: Record, restore: Call | None) -> None:
        """Put what rebuilds a learner before the calls that wait for it.

        Args:
            record: whose learner was lost.
            restore: has it take the snapshot; None where there is none.
        """
        repeated = [Asked(restore, record.snapshot_number, is_own=True)] if restore is not None else []
        for entry in record.journal:
            repeated.append(
                Asked(
                    entry.call,
                    entry.number,
                    is_own=True,
                    is_cancelled=entry.was_closed,
                    num_items=entry.num_items,
                )
            )
        # By number: the answers to calls may overtake each other, so one that has none may come before one that has.
        in_order = sorted((*repeated, *record.asked.values()), key=lambda asked: asked.number)
        record.asked = {asked.call.call_id: asked for asked in in_order}

    def snapshot(self, record: Record) -> bytes | None:
        """The learner's last snapshot.

        Raises:
            OSError: the disk cannot be read.
        """
        if not record.snapshot_number:
            return None
        key = record.client_id, record.snapshot_number
        state = self._states.get(key)
        return bytes(seal(state)) if state is not None else self._store.get(_key(record, record.snapshot_number))

    def close(self) -> None:
        """Give memory and disk back."""
        for record in self:  # a reply of its own may refer to it, and so to all that it has
            record.journal.clear()
            record.asked.clear()
        self._records.clear()
        self._num_uses.clear()
        self._states.clear()
        self._store.close()

    def _discard(self, record: Record, number: int) -> None:
        if (state := self._states.pop((record.client_id, number), None)) is not None:
            self._num_state_bytes -= state.nbytes
        self._store.discard(_key(record, number))

    def _cut(self, record: Record, journal: list[Entry]) -> None:
        kept = set(journal)
        self._count(record, [entry.call for entry in record.journal if entry not in kept], sign=-1)
        record.journal = journal

    def _count(self, record: Record, calls: Iterable[Call], *, sign: int = 1) -> None:
        """Note that a learner's journal has these calls now, or has them no more."""
        for call in calls:
            num_bytes = call.arguments.num_bytes
            record.num_journal_bytes += sign * num_bytes
            for value in shared_values(call.arguments):
                if not self._num_uses[value]:
                    num_bytes += value.num_bytes
                self._num_uses[value] += sign
                if not self._num_uses[value]:
                    del self._num_uses[value]
                    num_bytes += value.num_bytes
            self.num_journal_bytes += sign * num_bytes
        self._hold(max(self.num_journal_bytes - self._max_bytes, 0))


def _key(record: Record, number: int) -> str:
    """The key of a snapshot in the store."""
    return f"{number} {record.client_id}"
