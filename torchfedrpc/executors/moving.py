"""Moving learners from one worker to another, between two of their calls."""

from __future__ import annotations

import logging
from abc import abstractmethod

from torchfedrpc.executors.journal import Record
from torchfedrpc.executors.reducing import ReducingExecutor

logger = logging.getLogger(__name__)


class MovingExecutor(ReducingExecutor):
    """Takes a learner's snapshot behind the calls that its worker has, and makes it anew from that elsewhere.

    Calls that come meanwhile wait for the next worker. It makes the learner at its next call, as after a loss.
    """

    def _begin_move(self, record: Record, label: str) -> None:
        """Give a learner another worker as soon as its calls allow; it may be the same, which is about to leave.

        Args:
            record: whose learner.
            label: the worker.
        """
        record.moving_to, record.moves_by_journal = label, False
        self._go_on_moving(record)

    @abstractmethod
    def _moved(self, record: Record, left: str) -> None:
        """A learner is not on that worker any more."""

    @abstractmethod
    def _stays(self, record: Record, reason: str) -> None:
        """A learner cannot be moved."""

    def _went_on(self, record: Record) -> None:
        if record.moving_to is not None:
            self._go_on_moving(record)

    def _go_on_moving(self, record: Record) -> None:
        if record.awaits_snapshot or any(asked.asked_through is not None for asked in record.asked.values()):
            self._hurry(record)
            return  # answers may overtake each other, and that of the snapshot those before it
        if self._is_there(record) and record.changed_number > record.snapshot_number and not record.moves_by_journal:
            if self._has_turn(record, self._went_on):
                self._request_snapshot(record)
            return
        self._move(record)

    def _cannot_move(self, record: Record, error: Exception) -> None:
        if self._ledger.has_all(record):
            logger.warning("%s moves without a snapshot, its calls are made again: %s", record.client_id, error)
            record.moves_by_journal = True
        else:
            self._cannot_capture(record, error)
            self._stop_moving(record, str(error))

    def _stop_moving(self, record: Record, reason: str) -> None:
        record.moving_to = None
        self._stays(record, reason)
        if record.asked:
            self._push(record)

    def _move(self, record: Record) -> None:
        """No call is under way: the next goes to the new worker."""
        left = record.label
        if self._is_there(record):
            self._opened().members[left].learners.discard(record.client_id)
            if (host := self._opened().hosts.get(left)) is not None:
                host.forget(record.client_id)
        record.label, record.moving_to = record.moving_to or left, None
        record.is_registered = False
        self._moved(record, left)
        if record.asked:
            self._push(record)
