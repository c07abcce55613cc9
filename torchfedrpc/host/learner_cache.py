"""Which learners of a host are in memory, where not all may be: the least recently used wait on disk."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict

from torchfedrpc.host.mailbox import Mailbox
from torchfedrpc.host.spool import Spool

logger = logging.getLogger(__name__)


class Residents:
    """The learners in memory, by when they were used last, and the snapshots of the others. Thread-safe.

    Args:
        limit: how many learners may be in memory beside those that are running; None for all.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._mailboxes: OrderedDict[str, Mailbox] = OrderedDict()
        self._immovable: set[str] = set()  # clients whose learners could not be captured after their last call
        self._told: set[tuple[str, str | None]] = set()  # classes and attributes that were warned of
        self._lock = threading.Lock()
        self._spool = Spool()

    @property
    def is_limited(self) -> bool:
        """Whether learners may have to go."""
        return self._limit is not None

    def used(self, mailbox: Mailbox) -> None:
        """A learner is in memory, and was used just now."""
        if self._limit is not None:
            with self._lock:
                self._mailboxes[mailbox.client_id] = mailbox
                self._mailboxes.move_to_end(mailbox.client_id)
                self._immovable.discard(mailbox.client_id)

    def forget(self, client_id: str) -> None:
        """A learner is not on this host any more."""
        if self._limit is not None:
            with self._lock:
                self._mailboxes.pop(client_id, None)
                self._immovable.discard(client_id)
            self._spool.discard(client_id)

    def surplus(self, num_coming: int) -> list[Mailbox]:
        """Those of whom some are to go where so many more come, from the least recently used; none where all fit."""
        if not self.is_surplus(num_coming):
            return []
        with self._lock:
            return [mailbox for one, mailbox in self._mailboxes.items() if one not in self._immovable]

    def is_surplus(self, num_coming: int) -> bool:
        """Whether one more has to go where so many come."""
        return self._limit is not None and len(self._mailboxes) + num_coming > self._limit

    def store(self, mailbox: Mailbox, snapshot: bytes | memoryview) -> None:
        """Keep a learner's snapshot in place of the learner.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        self._spool.put(mailbox.client_id, snapshot)
        with self._lock:
            self._mailboxes.pop(mailbox.client_id, None)

    def stored(self, client_id: str) -> bytes:
        """The snapshot of a learner that is not in memory.

        Raises:
            OSError: the disk cannot be read.
        """
        return self._spool.get(client_id)

    def cannot_store(self, mailbox: Mailbox, error: Exception) -> None:
        """Let a learner stay whose state cannot be captured, until it has had another call."""
        what = type(mailbox.learner).__qualname__, getattr(error, "attribute", None)
        with self._lock:
            is_first = what not in self._told
            self._told.add(what)
            self._immovable.add(mailbox.client_id)
        log = logger.warning if is_first else logger.info
        log("%s stays in memory beyond max_resident_learners: %s", mailbox.client_id, error)

    def close(self) -> None:
        """Give the disk's space back."""
        self._spool.close()
