"""A learner's mailbox: the calls that wait for it, one at a time, in the order in which they came."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torchfedrpc.host.call import Call, Outcome
from torchfedrpc.host.call_scope import CallScope
from torchfedrpc.reduce.worker import BatchJob
from torchfedrpc.wire.packing import Packed

Reply = Callable[[Outcome], None]

_NEVER: Counter[str] = Counter()  # of all learners that were not called yet, or are on disk; nobody adds to it


@dataclass(eq=False, slots=True)
class Mailbox:
    """One learner and the calls that wait for it.

    Attributes:
        client_id: whose learner.
        kwargs: arguments for the learner's constructor; None where it is made and will not be made again.
        build: which one of this client's learners it is.
        learner: the learner, once its first call has made it.
        made: whether it is made.
        is_stored: whether it is made and its snapshot is on disk, in place of `learner` and `counts`.
        current: the job that has the learner now; an open stream keeps it between its steps.
        queue: the jobs behind it; there is none before the first has to wait.
        counts: how often each method has been called; they seed the calls.
    """

    client_id: str
    kwargs: Packed | None
    build: int = 0
    learner: Any = None
    made: bool = False
    is_stored: bool = False
    current: Job | None = None
    queue: deque[Job] | None = None
    counts: Counter[str] = field(default_factory=lambda: _NEVER)

    def next_job(self) -> Job | None:
        """Let the learner go to the first job that waits for it, which is given, if any does."""
        if self.queue:
            self.current = self.queue.popleft()
        else:  # few of many learners have anything to do
            self.current = self.queue = None
        return self.current

    def put(self, job: Job) -> None:
        """Let a job wait."""
        if self.queue is None:
            self.queue = deque()
        self.queue.append(job)

    def count(self, method: str) -> int:
        """How often a method was called before, this time not counted."""
        if self.counts is _NEVER:
            self.counts = Counter()
        self.counts[method] += 1
        return self.counts[method] - 1

    def let_go(self) -> None:
        """Keep nothing of the learner, which is on disk now."""
        self.learner, self.is_stored, self.counts = None, True, _NEVER

    def __reduce__(self) -> str:
        """Refuse to travel: ``rref.to_here()`` asks for that.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            f"the learner of {self.client_id} stays on its worker: call its methods through the proxy, and take its "
            f"state with proxy.snapshots()"
        )


@dataclass(eq=False, slots=True)
class Job:
    """A call in its host.

    Attributes:
        call: what is asked.
        mailbox: whose.
        reply: who waits for the next outcome; None where nobody does (any more, or between a stream's steps).
        cancelled: whether nobody waits any more.
        scope: what the method has for itself, once it begins.
        context: its context variables, likewise.
        task: what runs an async method or step.
        iterator: what a stream's method returned.
        stepping: whether the call is running or due to; False where a stream is open and idle.
        num_items: items that the stream has given.
        last_item: the last of them, until the next is asked for.
        began: when its method began, by `time.perf_counter`.
        batch: the batch that the call belongs to, if any, to which its result is added.
        place: the client's place in the batch's reduction.
        num_reports: what it has reported of its progress.
        reporting: held while it reports: its threads may do so at once.
    """

    call: Call
    mailbox: Mailbox
    reply: Reply | None
    cancelled: bool = False
    scope: CallScope | None = None
    context: contextvars.Context | None = None
    task: asyncio.Task[Any] | None = None
    iterator: Iterator[Any] | AsyncIterator[Any] | None = None
    stepping: bool = True
    num_items: int = 0
    last_item: Outcome | None = None
    began: float = 0.0
    batch: BatchJob | None = None
    place: int = 0
    num_reports: int = 0
    reporting: threading.Lock = field(default_factory=threading.Lock)
