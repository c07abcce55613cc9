"""Journals: per learner, its last snapshot and the calls since then, from which a lost learner is rebuilt."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.executors.admission import Admission
from torchfedrpc.host.call import Call, Outcome
from torchfedrpc.host.snapshot import seal
from torchfedrpc.storage import BlobStore
from torchfedrpc.wire.packing import Packed, Parcel, pack
from torchfedrpc.wire.shared import SharedValue, shared_values

_MAX_PAUSE = 64  # largest number of calls between two attempts to capture a learner
_WORTH = 4  # minimum ratio of the bytes that a snapshot frees to its size
_GROWTH = 64  # arguments beyond the bound grow by 1/64 of it between two looks at all journals
_STATES_SHARE = 4  # snapshots in memory may take 1/4 of the bound for arguments: 128 MiB, three of a 40 MB model


@dataclass(frozen=True, eq=False, slots=True)
class Entry:
    """Journal entry: a call that has changed its learner.

    Attributes:
        number: Sequence number of the change, per learner.
        call: The call.
        num_items: Number of items that a stream yielded.
        was_closed: Whether a stream was closed before its end.
    """

    number: int
    call: Call
    num_items: int = 0
    was_closed: bool = False


class Journal:
    """Journal of one learner: its last snapshot and the calls after it.

    Args:
        client_id: The client.
        journals: The journals of all learners, which share one bound.

    Attributes:
        client_id: The client.
        entries: The calls after the last snapshot.
        unrecoverable: Reason why the learner could not be rebuilt; None if it could.
        num_refusals: Number of consecutive failures to capture its state.
        state_bytes: Size in bytes of its last snapshot, or of one beyond the limit; 0 if unknown.
        num_bytes: Bytes of the entries' arguments, without shared values.
    """

    def __init__(self, client_id: str, journals: Journals) -> None:
        self.client_id = client_id
        self.entries: list[Entry] = []
        self.unrecoverable: str | None = None
        self.num_refusals = 0
        self.state_bytes = 0
        self.num_bytes = 0
        self._journals = journals
        self._number = 0  # of the last change
        self._cut_off_number = 0  # of the last interrupted call, which cannot be replayed
        self._sent_number = 0  # of the last stream that values were sent into and that ended in order
        self._snapshot_number = 0  # of the last change that the snapshot contains
        self._has_snapshot = False
        self._first_number = 0  # snapshots with a lower number are obsolete, even if they arrive later
        self._num_under_way = 0  # snapshots in flight
        self._num_since_refusal = 0

    @property
    def number(self) -> int:
        """Number of the learner's last change. A snapshot taken now contains it."""
        return self._number

    @property
    def has_state(self) -> bool:
        """Whether the learner has a snapshot or journal entries."""
        return self._has_snapshot or bool(self.entries)

    @property
    def awaits_snapshot(self) -> bool:
        """Whether a requested snapshot has not arrived."""
        return self._num_under_way > 0

    @property
    def is_complete(self) -> bool:
        """Whether snapshot and entries together contain all changes of the learner."""
        return self._journals.are_kept and self.unrecoverable is None and not self._misses_call

    @property
    def is_settled(self) -> bool:
        """Whether the snapshot contains all changes of the learner."""
        return self.is_complete and self._has_snapshot and not self.entries

    @property
    def needs_snapshot(self) -> bool:
        """Whether the next call must wait for a snapshot, since the last call was interrupted."""
        return self._journals.are_kept and self._misses_call and self.unrecoverable is None

    @property
    def is_due(self) -> bool:
        """Whether a snapshot is due.

        It is due if there are too many entries, if the last call was interrupted, or to retry the capture of a
        learner that could not be captured.
        """
        if len(self.entries) <= self._journals.max_calls and not self._cut_off_number and self.unrecoverable is None:
            return False  # fast path
        if not self._journals.are_kept:
            return False
        if self.needs_snapshot:
            return True
        if self._num_under_way:
            return False
        if self.unrecoverable is not None:
            return self._num_since_refusal >= min(1 << (self.num_refusals - 1), _MAX_PAUSE)
        return len(self.entries) > self._journals.max_calls

    @property
    def misses_stream(self) -> bool:
        """Whether a stream that values were sent into has ended in order, and no snapshot contains it so far."""
        return self._journals.are_kept and self._sent_number > self._snapshot_number

    @property
    def _misses_call(self) -> bool:
        return self._cut_off_number > self._snapshot_number

    def expect_stream(self) -> None:
        """Note that the next change is a stream that values were sent into, which cannot be replayed."""
        self._sent_number = self._number + 1

    def add(self, call: Call, outcome: Outcome, num_items: int = 0) -> None:
        """Note a call that has ended."""
        if call.kind == "snapshot" or outcome.never_ran:
            return
        if call.kind == "restore":
            if outcome.kind == "value":
                self._restart(call)
            return
        self._number += 1  # also if no journals are kept: it tells the snapshots of two moves apart
        if not self._journals.are_kept:
            return
        self._num_since_refusal += 1
        if outcome.cut_off:
            self._cut_off_number = self._number
        elif self.unrecoverable is None or self._num_under_way:  # the snapshot may make it recoverable again
            self._append(Entry(self._number, call, num_items, outcome.kind == "cancelled"))

    def request_snapshot(self) -> None:
        """Record the request of a snapshot, which ends with `kept`, `refused` or `not_taken`."""
        self._num_under_way += 1

    def snapshot_arguments(self, limit: int | None) -> Packed:
        """Return the arguments of a snapshot call.

        Args:
            limit: Largest acceptable size in bytes; ignored if a snapshot is required.
        """
        is_required = not self.is_complete or len(self.entries) > self._journals.max_calls
        return pack(None if is_required else limit)

    def keep(self, number: int, state: Tensor) -> bool:
        """Keep a snapshot in memory, and return whether it fits."""
        replaced = self._snapshot_number if self._has_snapshot else None
        return self._journals.keep(self.client_id, number, state, replaced)

    def store(self, number: int, state: Tensor) -> Future[None]:
        """Write a snapshot to disk, on the journals' thread.

        Returns:
            Done when the snapshot is written. An OSError if the disk is full or cannot be written.
        """
        return self._journals.store(self.client_id, number, state)

    def kept(self, number: int, num_bytes: int) -> None:
        """Drop the entries and the snapshot that are replaced by a snapshot in memory or on disk."""
        self._num_under_way -= 1
        self.state_bytes = num_bytes
        if number < self._first_number:
            self._journals.discard(self.client_id, number)
            return
        if self._has_snapshot:
            older = min(number, self._snapshot_number)
            if number != self._snapshot_number:
                self._journals.discard(self.client_id, older)
            number = max(number, self._snapshot_number)
        self._has_snapshot, self._snapshot_number = True, number
        self.unrecoverable, self.num_refusals = None, 0
        self._keep_only([entry for entry in self.entries if entry.number > number])

    def not_taken(self, num_bytes: int = 0) -> None:
        """Record that a snapshot was not taken: it exceeded its limit, or its worker was lost."""
        self._num_under_way -= 1
        self.state_bytes = num_bytes or self.state_bytes

    def refused(self, reason: str) -> None:
        """Drop the entries, since they are too many or incomplete and the learner's state cannot be captured."""
        self._num_under_way -= 1
        self.unrecoverable = reason
        self.num_refusals += 1
        self._num_since_refusal = 0
        self._keep_only([])

    def snapshot(self) -> Future[Tensor] | None:
        """Read the last snapshot, on the journals' thread; None if there is none.

        Returns:
            The snapshot. An OSError if the disk cannot be read.
        """
        return self._journals.read(self.client_id, self._snapshot_number) if self._has_snapshot else None

    def forget(self) -> None:
        """Drop everything, since the learner was given up or restored from another snapshot."""
        self._first_number = self._number + 1
        self._sent_number = 0
        self._keep_only([])
        if self._has_snapshot:
            self._journals.discard(self.client_id, self._snapshot_number)
            self._has_snapshot = False

    def _restart(self, restore: Call) -> None:
        self.forget()
        self._number += 1
        self._snapshot_number = self._number
        self.unrecoverable, self.num_refusals = None, 0
        if self._journals.are_kept:
            self._append(Entry(self._number, restore))

    def _append(self, entry: Entry) -> None:
        self.entries.append(entry)
        self._journals.count_entry(self, entry)

    def _keep_only(self, entries: list[Entry]) -> None:
        dropped = self.entries[: len(self.entries) - len(entries)]
        self.entries = entries
        for entry in dropped:
            self._journals.count_entry(self, entry, sign=-1)


class Journals:
    """Journals of all learners, with one bound for arguments and snapshots in memory.

    Snapshots are written, read and deleted by one thread, in the order of the requests, so that the event loop never
    waits for the disk.

    Args:
        runtime: Provides the bounds.
        admission: Counts the arguments beyond the bound, so that calls wait while snapshots are in flight.
    """

    def __init__(self, runtime: RuntimeConfig, admission: Admission) -> None:
        self.are_kept = runtime.on_worker_lost == "recover"
        self.max_calls = runtime.journal_max_calls
        self.num_bytes = 0
        self._max_bytes = runtime.journal_max_bytes
        self._low_bytes = 0  # smallest number of bytes since the last relief
        self._admission = admission
        self._store = BlobStore()
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="torchfedrpc-journals")
        self._states: dict[tuple[str, int], Tensor] = {}  # snapshots in memory
        self._num_state_bytes = 0
        self._stored: set[tuple[str, int]] = set()  # snapshots on disk
        self._journals: dict[str, Journal] = {}  # journals with entries
        self._num_uses: Counter[SharedValue] = Counter()  # number of entries with each shared value, in all journals

    @property
    def needs_relief(self) -> bool:
        """Whether the arguments of all journals exceed their bound, and have grown since the last `relief`."""
        return self.num_bytes > self._max_bytes and self.num_bytes >= self._low_bytes + self._max_bytes // _GROWTH

    def relief(self) -> list[tuple[Journal, int | None]]:
        """Return the journals to replace by snapshots, each with a size limit in bytes, to get 1/8 below the bound.

        Snapshots that free at least four times their size come first; their limit is a quarter of the bytes that they
        free. If they free too little, others follow without a limit (None).
        """
        self._low_bytes = self.num_bytes
        excess = float(self.num_bytes - self._max_bytes * 7 // 8)
        if excess <= 0:
            return []
        shares: dict[Journal, float] = {}
        worth: list[Journal] = []
        others: list[Journal] = []
        for journal in self._journals.values():
            share = self._share(journal)
            if journal.awaits_snapshot:
                excess -= share
            elif share and journal.unrecoverable is None:
                shares[journal] = share
                (worth if share >= _WORTH * journal.state_bytes else others).append(journal)
        chosen: list[tuple[Journal, int | None]] = []
        for journals in (worth, others):
            for journal in sorted(journals, key=shares.__getitem__, reverse=True):
                if excess <= 0:
                    return chosen
                chosen.append((journal, int(shares[journal] / _WORTH) if journals is worth else None))
                excess -= shares[journal]
        return chosen

    def count_entry(self, journal: Journal, entry: Entry, *, sign: int = 1) -> None:
        """Count the arguments of an entry that was added to a journal (``sign=1``) or dropped (``sign=-1``)."""
        arguments = entry.call.arguments
        num_bytes = arguments.num_bytes
        journal.num_bytes += sign * num_bytes
        for value in shared_values(arguments) if isinstance(arguments, Parcel) and arguments.apart else ():
            if not self._num_uses[value]:
                num_bytes += value.num_bytes
            self._num_uses[value] += sign
            if not self._num_uses[value]:
                del self._num_uses[value]
                num_bytes += value.num_bytes
        was_beyond = self.num_bytes > self._max_bytes
        self.num_bytes += sign * num_bytes
        self._low_bytes = min(self._low_bytes, self.num_bytes)
        if journal.entries:
            self._journals[journal.client_id] = journal
        else:
            self._journals.pop(journal.client_id, None)
        if was_beyond or self.num_bytes > self._max_bytes:
            self._admission.hold(max(self.num_bytes - self._max_bytes, 0))

    def keep(self, client_id: str, number: int, state: Tensor, replaced: int | None) -> bool:
        """Keep a snapshot in memory, in place of another one, and return whether it fits."""
        other = self._states.get((client_id, replaced)) if replaced is not None else None
        others = self._num_state_bytes - (other.nbytes if other is not None else 0)
        if others + state.nbytes > self._max_bytes // _STATES_SHARE:
            return False
        if (present := self._states.get((client_id, number))) is not None:
            self._num_state_bytes -= present.nbytes
        self._states[client_id, number] = state
        self._num_state_bytes += state.nbytes
        return True

    def store(self, client_id: str, number: int, state: Tensor) -> Future[None]:
        """Write a snapshot to disk, on the thread."""
        self._stored.add((client_id, number))
        return self._disk.submit(lambda: self._store.put(_key(client_id, number), [seal(state)]))

    def read(self, client_id: str, number: int) -> Future[Tensor]:
        """Read a snapshot, on the thread."""
        if (state := self._states.get((client_id, number))) is not None:
            return self._disk.submit(lambda: torch.frombuffer(seal(state), dtype=torch.uint8))
        return self._disk.submit(
            lambda: torch.frombuffer(bytearray(self._store.get(_key(client_id, number))), dtype=torch.uint8)
        )

    def discard(self, client_id: str, number: int) -> None:
        """Delete a snapshot."""
        if (state := self._states.pop((client_id, number), None)) is not None:
            self._num_state_bytes -= state.nbytes
        if (client_id, number) in self._stored:
            self._stored.discard((client_id, number))
            self._disk.submit(self._store.discard, _key(client_id, number))

    def close(self) -> None:
        """Release memory and disk space."""
        for kept in (self._journals, self._num_uses, self._states, self._stored):
            kept.clear()
        self.num_bytes = 0
        self._disk.shutdown(cancel_futures=True)
        self._store.close()

    def _share(self, journal: Journal) -> float:
        """Return the bytes that a journal holds; a shared value is divided among the entries that use it."""
        share: float = journal.num_bytes
        for entry in journal.entries:
            for value in shared_values(entry.call.arguments):
                share += value.num_bytes / self._num_uses[value]
        return share


def _key(client_id: str, number: int) -> str:
    """Return the key of a snapshot in the store."""
    return f"{number} {client_id}"
