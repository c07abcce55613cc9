"""The object in a process that owns learners and the calls that wait for them."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch

from torchfedrpc.errors import CallTimeoutError
from torchfedrpc.host.answer import answer
from torchfedrpc.host.call import Call, Outcome
from torchfedrpc.host.deadlines import Deadlines, debugger_attached
from torchfedrpc.host.mailbox import Job, Mailbox, Reply
from torchfedrpc.host.runner import Report, Runner
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.packing import Packed


class ConstructorArguments(Protocol):
    """Gives the keyword arguments of a client's learner."""

    def __call__(self, client_id: str, *, by_value: bool) -> Packed:
        """Those of this client, copied or not."""


class LearnerHost:
    """Owns the learners of one process: in the driver itself (local mode) as on every worker.

    Thread-safe, and no method here but `close` waits for anything: calls are put into mailboxes, run on the
    host's own threads, and answered through callbacks on those threads.

    Args:
        spec: what learners to make, with which limits.
        worker: this process's name in messages.
        device: what `current_call` names as device.
        report: takes what a method reports of its progress, on the method's thread.
        constructor_arguments: gives those of a client's learner, where the host is in the driver's own process
            and need not be told of each client by `register`. Then ``isolation=none`` passes references, and
            run-time limits are not applied while a debugger is attached.
    """

    def __init__(
        self,
        spec: LearnerSpec,
        *,
        worker: str = "local",
        device: torch.device | None = None,
        report: Report | None = None,
        constructor_arguments: ConstructorArguments | None = None,
    ) -> None:
        self.worker = worker
        self.call_timeout_s = spec.runtime.call_timeout_s
        self._constructor_arguments = constructor_arguments
        self._by_value = constructor_arguments is None or spec.runtime.isolation != "none"
        self._deadlines = Deadlines(self._expire)
        self._runner = Runner(
            spec,
            device or torch.device("cpu"),
            by_value=self._by_value,
            report=report or (lambda call, progress: None),
            deadlines=self._deadlines,
            done=self._done,
        )
        self._lock = threading.Lock()  # guards the mailboxes' queues, and the jobs and their states
        self._mailboxes: dict[str, Mailbox] = {}
        self._jobs: dict[int, Job] = {}
        self._own_call_ids = itertools.count(-1, -1)  # of calls that no executor numbered

    @property
    def allow(self) -> AllowList:
        """The types that may travel in this run."""
        return self._runner.allow

    def register(self, client_id: str, kwargs: Packed) -> Mailbox:
        """Make room for a learner; its first call makes the learner itself.

        Args:
            client_id: whose learner.
            kwargs: keyword arguments for its constructor.

        Returns:
            Its mailbox; the one it has, where it is registered already.
        """
        with self._lock:
            return self._mailboxes.setdefault(client_id, Mailbox(client_id, kwargs))

    def submit(self, call: Call, reply: Reply) -> None:
        """Queue a call of a registered learner; ``reply`` is called once with its outcome, on some thread."""
        if self._constructor_arguments is not None and call.client_id not in self._mailboxes:
            self.register(call.client_id, self._constructor_arguments(call.client_id, by_value=self._by_value))
        with self._lock:
            mailbox = self._mailboxes[call.client_id]
            job = Job(call, mailbox, reply)
            self._jobs[call.call_id] = job
            if mailbox.current is not None:
                mailbox.queue.append(job)
                return
            mailbox.current = job
        self._runner.begin(job)

    def advance(self, call_id: int, reply: Reply) -> None:
        """Ask an open stream for its next item."""
        with self._lock:
            job = self._jobs.get(call_id)
            if job is not None and not job.cancelled:
                job.reply, job.stepping = reply, True
        if job is None or job.cancelled:
            reply(Outcome("cancelled"))
            return
        self._runner.step(job)

    def cancel(self, call_id: int) -> None:
        """Nobody waits for this call any more.

        A queued one never starts; an async method is cancelled; a sync one sees ``current_call().cancelled``, and
        its learner is free again when it ends; a stream is closed.
        """
        self._abandon(call_id, Outcome("cancelled"))

    async def execute_method(self, client_id: str, method_name: str, /, *args: Any, **kwargs: Any) -> Any:
        """Run a method of a registered learner and await its result, on any event loop.

        Raises:
            Exception: whatever the method raised, as its own type where that may travel.
        """
        call_id = next(self._own_call_ids)
        arguments = self.take_value((args, kwargs))
        call = Call(call_id, client_id, method_name, arguments, self.call_timeout_s)
        outcome = await answer(partial(self.submit, call), partial(self.cancel, call_id))
        return outcome.result(call, self.allow, self.worker)

    def take_value(self, obj: Any) -> Packed:
        """An object as it is now, on its way to a learner or a caller.

        Raises:
            SerializationError: it cannot be sent.
        """
        return self._runner.take_value(obj)

    def stats(self) -> dict[str, int]:
        """How many learners are made here, and how many calls run or wait."""
        with self._lock:
            made = sum(mailbox.made for mailbox in self._mailboxes.values())
            return {"learners": made, "pending_calls": len(self._jobs)}

    def close(self, timeout_s: float = 2.0) -> bool:
        """Cancel what runs and end the host's threads.

        Returns:
            Whether all ended in time; a sync method that goes on regardless keeps its (daemon) thread.
        """
        for call_id in list(self._jobs):
            self.cancel(call_id)
        ended = self._runner.close(timeout_s)
        self._deadlines.close()
        return ended

    def _done(self, job: Job, outcome: Outcome) -> None:
        """Answer who waits, and go on: to the learner's next call, or closing a stream that nobody reads."""
        following, unread = None, False
        with self._lock:
            reply, job.reply = job.reply, None
            if outcome.kind == "item":
                job.stepping = unread = job.cancelled
            else:
                del self._jobs[job.call.call_id]
                mailbox = job.mailbox
                mailbox.current = following = mailbox.queue.popleft() if mailbox.queue else None
        if following is not None:
            self._runner.begin(following)
        if reply is not None:
            reply(outcome)
        if unread:
            self._runner.close_stream(job)

    def _expire(self, call_id: Any) -> None:
        job = self._jobs.get(call_id)
        if job is None or (self._constructor_arguments is not None and debugger_attached()):
            return
        call = job.call
        error = CallTimeoutError(
            f"{call.client_id}.{call.method} ran longer than {call.run_timeout_s} s on {self.worker}: raise "
            f"runtime.call_timeout_s, or give this call options(timeout_s=...)"
        )
        self._abandon(call_id, self._runner.failed(error))

    def _abandon(self, call_id: int, outcome: Outcome) -> None:
        with self._lock:
            job = self._jobs.get(call_id)
            if job is None or job.cancelled:
                return
            job.cancelled = True
            reply, job.reply = job.reply, None
            idle_stream, job.stepping = not job.stepping, True
            queued = job is not job.mailbox.current
            if queued:
                job.mailbox.queue.remove(job)
                del self._jobs[call_id]
        if reply is not None:
            reply(replace(outcome, never_ran=queued))
        if idle_stream:
            self._runner.close_stream(job)
        else:
            self._runner.cancel_task(job)
