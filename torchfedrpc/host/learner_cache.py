"""Cache of a host's learners: made and restored when they are called; beyond a limit they wait on disk.

Stateless learners beyond the limit are dropped, and made anew.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from torchfedrpc.host.call_scope import CallScope
from torchfedrpc.host.mailbox import Job, Mailbox
from torchfedrpc.host.methods import hidden_methods
from torchfedrpc.host.process_state import ProcessState
from torchfedrpc.host.randomness import call_seed
from torchfedrpc.host.snapshot import Snapshot, capture, check_belongs, load, reinstate, seal, taken
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.storage import BlobStore
from torchfedrpc.wire.file_pool import FilePool
from torchfedrpc.wire.packing import Packed, Parcel, pack

logger = logging.getLogger(__name__)

T = TypeVar("T")


class LearnerCache:
    """Makes, captures and restores learners, and keeps snapshots of evicted ones. Thread-safe.

    Code of learners runs on the threads of sync methods, on behalf of a job that has the learner.

    Args:
        spec: How to make learners, and how many may be in memory beside the running ones.
        process: State that the calls of this process share.
    """

    def __init__(self, spec: LearnerSpec, process: ProcessState) -> None:
        self._spec = spec
        self._process = process
        self._factory = spec.load()
        self._kinds: set[type] = set()  # of learners that were made here
        self._limit = spec.runtime.max_resident_learners
        self._mailboxes: OrderedDict[str, Mailbox] = OrderedDict()  # in memory, the least recently used first
        self._immovable: set[str] = set()  # clients whose learners could not be captured after their last call
        self._warned: set[tuple[str, str | None]] = set()  # classes and attributes that a warning was logged for
        self._lock = threading.Lock()
        self._snapshots = BlobStore()

    def make_present(self, job: Job) -> None:
        """Make the job's learner, or read it from disk, unless it is in memory.

        Raises:
            Exception: If the constructor raised it, or the snapshot cannot be restored.
        """
        mailbox = job.mailbox
        if mailbox.is_stored:
            self.restore(job, memoryview(self._snapshots.get(mailbox.client_id)), None)
        if not mailbox.made:  # also one that was stored before its first call
            assert mailbox.kwargs is not None
            mailbox.learner = self._make(job, mailbox.kwargs)
            mailbox.made = True
            if self._limit is None:
                mailbox.kwargs = None
        if self._limit is not None:
            self._used(mailbox)

    def snapshot(self, job: Job, *, pool: FilePool | None = None, limit_bytes: int | None = None) -> Parcel:
        """Return a snapshot of the job's learner. See `taken`.

        Raises:
            SnapshotError: If the learner cannot be captured.
            OSError: If the learner is on disk, which cannot be read.
        """
        mailbox, process = job.mailbox, self._process
        shared = process.shared[mailbox.device]
        if mailbox.is_stored:
            data = bytearray(self._snapshots.get(mailbox.client_id))
            if limit_bytes is not None and len(data) > limit_bytes:
                return pack(len(data))
            return pack(torch.frombuffer(data, dtype=torch.uint8), copy=False)

        def take() -> Parcel:
            state = capture(mailbox.learner, mailbox.client_id, shared) if mailbox.made else None
            snapshot = Snapshot(mailbox.client_id, self._spec.name, dict(mailbox.counts), state)
            return taken(
                snapshot,
                process.allow,
                mailbox.learner,
                shared,
                mailbox.device or process.device,
                pool=pool,
                limit_bytes=limit_bytes,
            )

        return self._apart(job, "state_dict", take)

    def restore(self, job: Job, data: memoryview, kwargs: dict[str, Any] | None) -> None:
        """Make the job's learner anew from a snapshot.

        Args:
            job: The job.
            data: The snapshot.
            kwargs: Keyword arguments of the constructor; None for those of the registration.

        Raises:
            Exception: If the constructor raised it, or the snapshot cannot be restored.
        """
        process, mailbox = self._process, job.mailbox
        shared = process.shared[mailbox.device]
        snapshot = load(data, process.allow, mailbox.device or process.device)
        check_belongs(snapshot, mailbox.client_id, self._spec.name)
        constructor = mailbox.kwargs if kwargs is None else process.take_value(kwargs)
        assert constructor is not None
        learner = None
        if snapshot.made:
            made = learner = self._make(job, constructor)
            self._apart(job, "load_state_dict", lambda: reinstate(made, snapshot.state, mailbox.client_id, shared))
        mailbox.learner, mailbox.made, mailbox.is_stored = learner, snapshot.made, False
        mailbox.kwargs = constructor if self._limit is not None or not snapshot.made else None
        mailbox.counts = Counter(snapshot.counts)
        if snapshot.made and self._limit is not None:
            self._used(mailbox)

    def evict(self, job: Job) -> None:
        """Store the job's learner on disk, or drop it if it is stateless.

        A learner that cannot be captured stays in memory until after its next call.
        """
        mailbox = job.mailbox
        if self._spec.stateless:
            with self._lock:
                if self._mailboxes.get(mailbox.client_id) is mailbox:
                    del self._mailboxes[mailbox.client_id]
            mailbox.learner, mailbox.made = None, False
            return
        try:
            snapshot = seal(self.snapshot(job).open(self._process.allow))
            with self._lock:
                if self._mailboxes.get(mailbox.client_id) is not mailbox:  # it has left this host meanwhile
                    return
                self._snapshots.put(mailbox.client_id, [snapshot])
                del self._mailboxes[mailbox.client_id]
        except BaseException as error:
            self._cannot_evict(mailbox, error)
            return
        mailbox.let_go()

    def forget(self, mailbox: Mailbox) -> None:
        """Note that a learner has left this host, and delete its snapshot."""
        if self._limit is not None:
            with self._lock:
                mailbox.has_left = True
                self._mailboxes.pop(mailbox.client_id, None)
                self._immovable.discard(mailbox.client_id)
                self._snapshots.discard(mailbox.client_id)

    def surplus(self) -> list[Mailbox]:
        """Return the learners that may be evicted, the least recently used first."""
        with self._lock:
            return [mailbox for one, mailbox in self._mailboxes.items() if one not in self._immovable]

    def is_surplus(self, num_coming: int) -> bool:
        """Whether one learner more has to be evicted before ``num_coming`` more are in memory."""
        return self._limit is not None and len(self._mailboxes) + num_coming > self._limit

    def close(self) -> None:
        """Delete the snapshots."""
        self._snapshots.close()

    def _used(self, mailbox: Mailbox) -> None:
        with self._lock:
            if mailbox.has_left:  # a call that was cut off still runs; another build may be here
                return
            self._mailboxes[mailbox.client_id] = mailbox
            self._mailboxes.move_to_end(mailbox.client_id)
            self._immovable.discard(mailbox.client_id)

    def _cannot_evict(self, mailbox: Mailbox, error: BaseException) -> None:
        what = type(mailbox.learner).__qualname__, getattr(error, "attribute", None)
        with self._lock:
            if mailbox.has_left:
                return
            is_first = what not in self._warned
            self._warned.add(what)
            self._immovable.add(mailbox.client_id)
        log = logger.warning if is_first else logger.info
        log("%s stays in memory beyond max_resident_learners: %s", mailbox.client_id, error)

    def _make(self, job: Job, packed: Packed) -> Any:
        kwargs = packed.copy().open(self._process.allow, device=job.mailbox.device)
        learner = self._apart(job, "__init__", lambda: self._factory(job.call.client_id, **kwargs))
        if (kind := type(learner)) not in self._kinds:
            self._kinds.add(kind)
            if hidden := hidden_methods(kind, self._spec.taken_names):
                logger.warning(hidden)
            if getattr(kind, "stateless", False) is True and not self._spec.stateless:
                logger.warning(
                    "%s says stateless = True, and %s, which makes it, does not: its learners keep to their workers. "
                    "Set stateless = True on the factory too",
                    kind.__qualname__,
                    self._spec.name,
                )
        return learner

    def _apart(self, job: Job, method: str, function: Callable[[], T]) -> T:
        """Run the constructor, or take or restore a state, in a scope that is not counted as a call."""
        seed = call_seed(self._process.seed, job.call.client_id, method, 0)
        scope = CallScope(self._process, job, method, seed, is_thorough=True)
        return scope.new_context().run(scope.run, function)
