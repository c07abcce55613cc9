"""Cache of the learners in a host's memory: beyond a limit, the least recently used wait on disk."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict

from torchfedrpc.host.mailbox import Mailbox
from torchfedrpc.storage import BlobStore

logger = logging.getLogger(__name__)


class LearnerCache:
    """Learners in memory, the least recently used first, and snapshots of evicted ones. Thread-safe.

    Args:
        limit: Number of learners that may be in memory beside the running ones; None for all.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._mailboxes: OrderedDict[str, Mailbox] = OrderedDict()
        self._immovable: set[str] = set()  # clients whose learners could not be captured after their last call
        self._warned: set[tuple[str, str | None]] = set()  # classes and attributes that a warning was logged for
        self._lock = threading.Lock()
        self._snapshots = BlobStore()

    @property
    def is_limited(self) -> bool:
        """Whether learners may be evicted."""
        return self._limit is not None

    def used(self, mailbox: Mailbox) -> None:
        """Note that a learner is in memory and has just been used."""
        if self._limit is not None:
            with self._lock:
                self._mailboxes[mailbox.client_id] = mailbox
                self._mailboxes.move_to_end(mailbox.client_id)
                self._immovable.discard(mailbox.client_id)

    def forget(self, client_id: str) -> None:
        """Note that a learner has left this host, and delete its snapshot."""
        if self._limit is not None:
            with self._lock:
                self._mailboxes.pop(client_id, None)
                self._immovable.discard(client_id)
            self._snapshots.discard(client_id)

    def surplus(self, num_coming: int) -> list[Mailbox]:
        """Return the learners to evict from, the least recently used first; none if ``num_coming`` more fit in."""
        if not self.is_surplus(num_coming):
            return []
        with self._lock:
            return [mailbox for one, mailbox in self._mailboxes.items() if one not in self._immovable]

    def is_surplus(self, num_coming: int) -> bool:
        """Whether one learner more has to be evicted before ``num_coming`` more are in memory."""
        return self._limit is not None and len(self._mailboxes) + num_coming > self._limit

    def store(self, mailbox: Mailbox, snapshot: bytes | memoryview) -> None:
        """Store the snapshot of a learner that is evicted.

        Raises:
            OSError: If the disk is full or cannot be written.
        """
        self._snapshots.put(mailbox.client_id, [snapshot])
        with self._lock:
            self._mailboxes.pop(mailbox.client_id, None)

    def stored(self, client_id: str) -> bytes:
        """Return the snapshot of an evicted learner.

        Raises:
            OSError: If the disk cannot be read.
        """
        return self._snapshots.get(client_id)

    def cannot_store(self, mailbox: Mailbox, error: Exception) -> None:
        """Keep a learner in memory that cannot be captured, until after its next call."""
        what = type(mailbox.learner).__qualname__, getattr(error, "attribute", None)
        with self._lock:
            is_first = what not in self._warned
            self._warned.add(what)
            self._immovable.add(mailbox.client_id)
        log = logger.warning if is_first else logger.info
        log("%s stays in memory beyond max_resident_learners: %s", mailbox.client_id, error)

    def close(self) -> None:
        """Delete the snapshots."""
        self._snapshots.close()
