"""Mailbox of a learner: its calls, one at a time, in the order of arrival."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from torchfedrpc.host.call import Call, Outcome
from torchfedrpc.reduce.worker import BatchJob
from torchfedrpc.wire.packing import Packed

Reply = Callable[[Outcome], None]

_NEVER: Counter[str] = Counter()  # shared by all learners that were not called yet or are on disk; never changed


@dataclass(eq=False, slots=True)
class Mailbox:
    """One learner and the queue of its calls.

    Attributes:
        client_id: The client.
        kwargs: Arguments of the learner's constructor; None if the learner is made and will not be made again.
        build: Number of this learner among those of its client.
        device: Its GPU, if the learners of this process have several; None for the device of the process.
        learner: The learner; None before its first call, and while it is on disk.
        made: Whether the learner was made.
        is_stored: Whether its snapshot is on disk, in place of `learner` and `counts`.
        has_left: Whether the host has dropped it.
        current: The job that has the learner. An open stream keeps it between its steps.
        queue: The jobs that wait for it; None if none waits.
        counts: Number of calls of each method; they seed the calls.
    """

    client_id: str
    kwargs: Packed | None
    build: int = 0
    device: torch.device | None = None
    learner: Any = None
    made: bool = False
    is_stored: bool = False
    has_left: bool = False
    current: Job | None = None
    queue: deque[Job] | None = None
    counts: Counter[str] = field(default_factory=lambda: _NEVER)

    def next_job(self) -> Job | None:
        """Hand the learner to the first job that waits. Returns that job; None if none waits."""
        if self.queue:
            self.current = self.queue.popleft()
        else:  # save the memory of an empty queue: most learners are idle
            self.current = self.queue = None
        return self.current

    def put(self, job: Job) -> None:
        """Append a job to the queue."""
        if self.queue is None:
            self.queue = deque()
        self.queue.append(job)

    def count(self, method: str) -> int:
        """Count a call of a method. Returns the number of earlier ones."""
        if self.counts is _NEVER:
            self.counts = Counter()
        self.counts[method] += 1
        return self.counts[method] - 1

    def let_go(self) -> None:
        """Drop the learner, which is on disk now."""
        self.learner, self.is_stored, self.counts = None, True, _NEVER

    def __reduce__(self) -> str:
        """Refuse to travel, for example by ``rref.to_here()``.

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
        call: The call.
        mailbox: The mailbox of its learner.
        has_begun: Whether a thread has it.
        is_withdrawn: Whether it was cancelled or given back before it began.
        cancelled: Whether the call was cancelled or has overrun its time.
        context: Its context variables, the scope of the call among them; None before it begins.
        home: Device to which its result's tensors on GPUs go; None leaves them where they are.
        on_loop: Whether its steps run in the event loop.
        task: The task of an async method or step.
        iterator: The iterator of a stream.
        stepping: Whether the call runs or waits to run; False if a stream is open and idle.
        num_items: Number of items of the stream so far.
        last_item: The last item, until the next is requested.
        sent: Value to send into the generator of the stream with its next step, if any.
        received: When this process received the call, or the request for the next item, by `time.perf_counter`.
        begun: When a thread began with it, likewise; 0 before that.
        began: When its method began, likewise.
        batch: The batch to which its result is added, if any.
        place: The client's place in the batch's reduction.
        num_reports: Number of its reports of progress.
        interrupt_due: When KeyboardInterrupt is to be raised in its method, by `time.monotonic`; 0 for never.
    """

    call: Call
    mailbox: Mailbox
    has_begun: bool = False
    is_withdrawn: bool = False
    cancelled: bool = False
    context: contextvars.Context | None = None
    home: torch.device | None = None
    on_loop: bool = False
    task: asyncio.Task[Any] | None = None
    iterator: Iterator[Any] | AsyncIterator[Any] | None = None
    stepping: bool = True
    num_items: int = 0
    last_item: Outcome | None = None
    sent: Packed | None = None
    received: float = field(default_factory=time.perf_counter)
    begun: float = 0.0
    began: float = 0.0
    batch: BatchJob | None = None
    place: int = 0
    num_reports: int = 0
    interrupt_due: float = 0.0
