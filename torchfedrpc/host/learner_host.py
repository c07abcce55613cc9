"""Host of a process: owns the learners and the queues of their calls."""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torchfedrpc.errors import CallTimeoutError
from torchfedrpc.host.call import Batch, Call, Outcome, Registration, TakeBack
from torchfedrpc.host.deadlines import debugger_attached
from torchfedrpc.host.faults import Fault, Saboteur
from torchfedrpc.host.interruption import interrupt
from torchfedrpc.host.learner_cache import LearnerCache
from torchfedrpc.host.mailbox import Job, Mailbox, Reply
from torchfedrpc.host.process_state import ProcessState
from torchfedrpc.host.runner import Runner, Steps, failed
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.host.threads import AsyncThread, SyncThreads
from torchfedrpc.reduce.worker import BatchJob
from torchfedrpc.tasks import call_on
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.packing import Packed, Parcel, Reference

_INTERRUPT_S = 1.0  # for methods that look at ``current_call().cancelled``
_GIVEN_BACK = Outcome("given_back", never_ran=True)


class LearnerHost:
    """Owns the learners of one process, on workers and in the driver (local mode).

    Thread-safe. No method except `close` blocks: calls are put into mailboxes, run on the host's threads, and are
    answered by callbacks on these threads.

    A driver may have to repeat a request after a connection broke. A call with a known id does not run a second time:
    the request joins the running call, or is answered with the first outcome, which is kept until `acknowledge`.

    Args:
        spec: How to make learners, and the limits of the run.
        process: State that the calls share. In the driver's process ``isolation=none`` passes references, run-time
            limits do not apply while a debugger is attached, and outcomes are not kept. Default: That of a worker
            without a GPU, which reports no progress.
        worker: Name of this process in messages.
        clients: Client -> keyword arguments of its learner's constructor. These learners need not be registered. They
            have the GPUs of ``process`` in turn, in this order.
    """

    def __init__(
        self,
        spec: LearnerSpec,
        process: ProcessState | None = None,
        *,
        worker: str = "local",
        clients: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.worker = worker
        self.call_timeout_s = spec.runtime.call_timeout_s
        self._clients = clients or {}
        self._process = process if process is not None else ProcessState(spec)
        self._learners = LearnerCache(spec, self._process)
        self._runner = Runner(self._process, self._learners)
        self._sync = SyncThreads(spec.runtime.max_concurrent_calls, self._process)
        self._async = AsyncThread(self._process)
        # Client -> its GPU, if there are several.
        self._gpus = dict(zip(self._clients, itertools.cycle(self._process.gpus), strict=False))
        self._merging: SyncThreads | None = None  # started by the first batch that needs it
        self._lock = threading.Lock()  # guards queues of mailboxes, jobs and their states, and outcomes
        self._mailboxes: dict[str, Mailbox] = {}
        self._jobs: dict[int, Job] = {}
        self._running: dict[int, Job] = {}  # by thread
        self._replies: dict[int, Reply] = {}  # by call id, of requests for the next outcome of a job
        self._outcomes: dict[int, Outcome] = {}  # final ones, for repeated requests
        self._batches: dict[int, BatchJob] = {}  # by call id, until their final outcomes
        self._own_call_ids = itertools.count(-1, -1)  # of calls that no executor numbered
        self._busy_s = 0.0  # that calls have run, guarded by the lock

    @property
    def allow(self) -> AllowList:
        """The types that may travel in this run."""
        return self._process.allow

    def register(self, registration: Registration) -> Mailbox:
        """Return the mailbox of a learner, a new one for a new build. The first call makes the learner."""
        client_id = registration.client_id
        with self._lock:
            mailbox = self._mailboxes.get(client_id)
            if mailbox is None or mailbox.build != registration.build:
                if mailbox is not None:
                    self._learners.forget(mailbox)
                gpu = self._gpus.get(client_id, self._process.device) if self._process.gpus else None
                mailbox = Mailbox(client_id, registration.kwargs, registration.build, gpu)
                self._mailboxes[client_id] = mailbox
            return mailbox

    def register_own(self, client_id: str) -> None:
        """Register a learner of ``clients``, if it is not registered.

        Raises:
            SerializationError: If its constructor's arguments cannot be copied.
        """
        if client_id not in self._mailboxes and client_id in self._clients:
            self.register(Registration.of(client_id, self._clients[client_id], by_value=self._process.by_value))

    def mailbox(self, client_id: str) -> Mailbox:
        """Return the mailbox of a registered learner.

        Raises:
            KeyError: If it is not registered.
        """
        return self._mailboxes[client_id]

    def forget(self, client_id: str) -> None:
        """Drop a learner that has moved, or that is stateless and idle. No call of it may be here."""
        with self._lock:
            mailbox = self._mailboxes.pop(client_id, None)
        if mailbox is not None:
            self._learners.forget(mailbox)

    def submit(self, call: Call, reply: Reply) -> None:
        """Queue a call of a registered learner. ``reply`` receives its (first) outcome, on any thread."""
        self.register_own(call.client_id)
        begins = known = None
        with self._lock:
            if call.call_id in self._jobs or call.call_id in self._outcomes:
                known = self._repeated(call.call_id, 0, reply)
            else:
                begins = self._enqueue(Job(call, self._mailboxes[call.client_id]))
                self._replies[call.call_id] = reply
        if begins is not None:
            self._start(begins)
        if known is not None:
            reply(known)

    def run_batch(self, batch: Batch, reply: Reply) -> None:
        """Queue the calls of a batch. ``reply`` receives its (first) outcome, on any thread."""
        for _, call in batch.calls:
            self.register_own(call.client_id)
        begins: list[Job] = []
        with self._lock:
            known = self._outcomes.get(batch.call_id)
            batch_job = self._batches.get(batch.call_id)
            if batch_job is None and known is None:
                mailboxes = [self._mailboxes[call.client_id] for _, call in batch.calls]  # fails before all else
                gpus = self._process.gpus
                home = self._process.home_of(*[call.arguments for _, call in batch.calls]) if gpus else None
                batch_job = BatchJob(batch, self.allow, by_value=self._process.by_value, home=home)
                self._batches[batch.call_id] = batch_job
                for (place, call), mailbox in zip(batch.calls, mailboxes, strict=True):
                    job = Job(call, mailbox, batch=batch_job, place=place)
                    if (beginning := self._enqueue(job)) is not None:
                        begins.append(beginning)
            if batch_job is not None:
                batch_job.watch(0, reply)
        for job in begins:
            self._start(job)
        if known is not None:
            reply(known)
        elif batch_job is not None:
            self._tell(batch_job)

    def advance(self, call_id: int, step: int, reply: Reply, sent: Packed | None = None) -> None:
        """Ask an open stream for item number ``step``, from 0, or a batch for the calls ended since then.

        Args:
            call_id: The call of the stream, or the batch.
            step: Number of the item; a repeated request has the item that was made.
            reply: Receives the outcome, on any thread.
            sent: Value that is sent into the stream's generator, if any.
        """
        with self._lock:
            if (batch_job := self._batches.get(call_id)) is not None:
                batch_job.watch(step, reply)
        if batch_job is not None:
            self._tell(batch_job)
            return
        advances = known = None
        with self._lock:
            job = self._jobs.get(call_id)
            if job is not None and not job.stepping and job.num_items != step + 1:
                advances = job
                self._replies[call_id] = reply
                job.stepping, job.last_item, job.received = True, None, time.perf_counter()
                job.sent = sent
            else:
                known = self._repeated(call_id, step, reply)
        if advances is not None:
            self._go_on(advances, self._item)
        if known is not None:
            reply(known)

    def cancel(self, call_id: int, reply: Reply | None = None) -> None:
        """Cancel a call, or the calls of a batch that have not ended.

        A queued call never starts. An async method is cancelled. A sync method sees ``current_call().cancelled``, and
        its learner is free when it ends. A stream is closed.

        Args:
            call_id: The call or the batch. A batch ends with the partial results of its other calls.
            reply: Receives the outcome of the call; not used for a batch.
        """
        if (batch_job := self._batches.get(call_id)) is not None:
            for _, call in batch_job.batch.calls:
                self._abandon(call.call_id, Outcome("cancelled"))
            return
        outcome = self._abandon(call_id, Outcome("cancelled"))
        if reply is not None:
            with self._lock:
                outcome = outcome or self._outcomes.get(call_id)
            reply(outcome or Outcome("cancelled", never_ran=True))

    def take_back(self, request: TakeBack, reply: Reply) -> None:
        """Give calls back that have not begun. Their own replies receive the outcome ``given_back``."""
        with self._lock:
            outcome = self._outcomes.get(request.call_id)
            given: list[tuple[Job, Reply | None]] = []
            begins: list[Job] = []
            if outcome is None:
                jobs = [self._jobs[call_id] for call_id in request.candidates if call_id in self._jobs]
                waiting = [job for job in jobs if not job.has_begun and job.call.kind != "barrier"]
                for job in waiting[len(waiting) // 2 if request.half else 0 :]:
                    if (following := self._withdraw(job, _GIVEN_BACK)) is not None:
                        begins.append(following)
                    given.append((job, self._replies.pop(job.call.call_id, None)))
                outcome = Outcome("value", of_calls=tuple((job.call.call_id, _GIVEN_BACK) for job, _ in given))
                self._outcomes[request.call_id] = outcome
        for job in begins:
            self._start(job)
        reply(outcome)  # before the end of a batch whose other calls have ended
        for job, reply_of_call in given:
            if job.batch is not None:
                self._call_ended(job.batch, job.place, _GIVEN_BACK)
            if reply_of_call is not None:
                reply_of_call(_GIVEN_BACK)

    def acknowledge(self, call_ids: Iterable[int]) -> None:
        """Drop the outcomes of calls, which have arrived at the driver."""
        with self._lock:
            acknowledged = [self._outcomes.pop(call_id, None) for call_id in call_ids]
        for outcome in acknowledged:
            if outcome is not None and isinstance(outcome.parcel, Parcel) and outcome.parcel.files is not None:
                outcome.parcel.files.acknowledged()

    def keep_only(self, call_ids: Iterable[int]) -> None:
        """Drop all outcomes except those of these calls, since acknowledgements may be lost with a world."""
        with self._lock:
            others = self._outcomes.keys() - set(call_ids)
        self.acknowledge(others)

    async def execute_method(self, client_id: str, method_name: str, /, *args: Any, **kwargs: Any) -> Any:
        """Run a method of a registered learner and await its result, on any event loop.

        Raises:
            Exception: The exception of the method, as its own type if that may travel.
        """
        call_id = next(self._own_call_ids)
        arguments = self.take_value((args, kwargs))
        call = Call(call_id, client_id, method_name, arguments, self.call_timeout_s)
        outcome = await answer(partial(self.submit, call), partial(self.cancel, call_id))
        self.acknowledge([call_id])
        return outcome.result(call, self.allow, self.worker)

    def take_value(self, obj: Any) -> Packed:
        """Pack an object as it is now, for a learner or a caller."""
        return self._process.take_value(obj)

    def show_files(self, are_seen: bool) -> None:
        """Set whether the driver can open memory files of this process, which large results then use."""
        self._process.shows_files = are_seen

    def arm(self, faults: Sequence[Fault]) -> None:
        """Inject faults into this process at later calls. They replace earlier ones."""
        self._process.saboteur = Saboteur(faults, self._process.activity) if faults else None

    def interrupt(self) -> bool:
        """Raise KeyboardInterrupt, once, in each method that goes on for a second after it was seen to be cancelled.

        Returns:
            Whether any cancelled method goes on.
        """
        with self._lock:  # which a job takes at its end
            jobs = list(self._running.items())
            loop_thread, task = self._async.present_task()
            if task is not None:
                jobs += [(loop_thread, job) for job in self._jobs.values() if job.task is task]
            running = [(thread, job) for thread, job in jobs if job.cancelled and job.call.call_id in self._jobs]
            now = time.monotonic()
            for thread, job in running:
                job.interrupt_due = job.interrupt_due or now + _INTERRUPT_S
                if now > job.interrupt_due and interrupt(thread):
                    job.interrupt_due = math.inf
            return bool(running)

    def stats(self) -> dict[str, Any]:
        """Return the number of learners that are made, of calls that run or wait, and how long calls have run."""
        with self._lock:
            made = sum(mailbox.made and not mailbox.is_stored for mailbox in self._mailboxes.values())
            return {"learners": made, "pending_calls": len(self._jobs), "busy_s": self._busy_s}

    def close(self, timeout_s: float = 2.0) -> bool:
        """Cancel what runs and end the host's threads.

        Returns:
            Whether all ended in time. A sync method that does not end keeps its (daemon) thread.
        """
        for call_id in reversed(list(self._jobs)):  # those that wait first, so that none begins behind another
            self.cancel(call_id)
        ended = self._sync.close(timeout_s) & self._async.close(timeout_s)
        if self._merging is not None:
            ended &= self._merging.close(timeout_s)
        self._process.close()
        self._learners.close()
        if ended:
            self._process.streams.give_back()
            self._mailboxes.clear()  # frees memory now: this host is in reference cycles
            self._outcomes.clear()
        return ended

    def _withdraw(self, job: Job, outcome: Outcome) -> Job | None:
        """Remove a job that has not begun, with the lock held. Returns the learner's job that begins instead."""
        job.is_withdrawn = True
        del self._jobs[job.call.call_id]
        self._keep(job, outcome)
        if job is job.mailbox.current:
            return job.mailbox.next_job()
        assert job.mailbox.queue is not None
        job.mailbox.queue.remove(job)
        return None

    def _enqueue(self, job: Job) -> Job | None:
        """Queue a job, with the lock held; returns it if it is to begin now."""
        self._jobs[job.call.call_id] = job
        if job.mailbox.current is not None:
            job.mailbox.put(job)
            return None
        job.mailbox.current = job
        return job

    def _start(self, job: Job) -> None:
        """Begin a job that has its learner, on a thread of sync methods. A barrier ends at once."""
        if job.call.kind == "barrier":
            self._done(job, Outcome("value"))
        else:
            self._sync.put(partial(self._turn, job, self._begin))

    # On the threads of sync methods.

    def _turn(self, job: Job, steps_of: Callable[[Job], Outcome | Steps]) -> None:
        """Run the next step of a job. Steps that need an event loop go on there."""
        process, call_id = self._process, job.call.call_id
        slot, thread = None, threading.get_ident()
        self._running[thread] = job
        process.method_lock.enter(exclusive=False)
        try:
            with self._lock:
                if job.is_withdrawn:
                    return
                job.has_begun, job.begun = True, time.perf_counter()
            if process.activity is not None:
                slot = process.activity.enter(call_id)
            result = steps_of(job)
            if not isinstance(result, Outcome):
                result = self._runner.step(job, result)
            self._give_streams_back()
            if isinstance(result, Outcome):
                self._done(job, result)
            if self._learners.is_surplus(0):  # learners that were in use when the job began can be evicted now
                self._make_room(job, 0)
                self._give_streams_back()
        finally:
            del self._running[thread]
            if process.activity is not None:
                process.activity.leave(slot)
            process.method_lock.leave(exclusive=False)
        if not isinstance(result, Outcome):  # started last, since its steps wait for the lock
            assert job.context is not None
            self._async.start(result, job.context, partial(self._done, job))

    def _begin(self, job: Job) -> Outcome | Steps:
        call, mailbox = job.call, job.mailbox
        if job.cancelled:
            return Outcome("cancelled", never_ran=True)
        if call.kind == "snapshot":
            return self._runner.carry(job)
        if call.kind == "restore" or mailbox.learner is None or not mailbox.made:
            self._make_room(job, 1)
        if call.kind == "restore":
            return self._runner.carry(job)
        self._start_clock(job)
        return self._runner.begin(job)

    def _make_room(self, job: Job, num_coming: int) -> None:
        """Evict idle learners, if too many are in memory once ``num_coming`` more are.

        An eviction is a job of its learner, whose calls wait for it. It runs here, on behalf of another job.
        """
        if not self._learners.is_surplus(num_coming):
            return
        for mailbox in self._learners.surplus():
            call = Call(job.call.call_id, mailbox.client_id, "", Reference(None), kind="snapshot")
            eviction = Job(call, mailbox)
            with self._lock:
                if mailbox.current is not None:
                    continue
                mailbox.current = eviction
            self._learners.evict(eviction)
            with self._lock:
                following = mailbox.next_job()
            if following is not None:
                self._start(following)
            if not self._learners.is_surplus(num_coming):
                break

    def _give_streams_back(self) -> None:
        """Restore the random streams of the driver's process. Workers need not restore them.

        If sync methods wait, the next one would set the streams aside again.
        """
        if self._process.in_driver and not self._sync.num_waiting:
            self._process.streams.give_back()

    # Steps of streams, on the threads of sync methods or on that of async ones.

    def _go_on(self, job: Job, steps_of: Callable[[Job], Steps]) -> None:
        """Run the next step of an open stream."""
        if job.on_loop:
            assert job.context is not None
            self._async.start(steps_of(job), job.context, partial(self._done, job))
        else:
            self._sync.put(partial(self._turn, job, steps_of))

    async def _item(self, job: Job) -> Outcome:
        job.begun = time.perf_counter()
        self._start_clock(job)
        return await self._runner.item(job)

    def _start_clock(self, job: Job) -> None:
        if job.call.run_timeout_s is not None:
            self._process.deadlines.start(job.call.call_id, job.call.run_timeout_s, self._overran)

    # On any thread.

    def _call_ended(self, batch_job: BatchJob, place: int, outcome: Outcome) -> None:
        """Note the end of a batch's call. After the last one, collect the partial results, here if that is quick."""
        with self._lock:
            is_last = batch_job.ended(place, outcome)
        self._tell(batch_job)
        if not is_last:
            return
        if batch_job.batch.timeout_s is not None:
            self._process.deadlines.start(batch_job, batch_job.batch.timeout_s, self._merging_late)
        if batch_job.is_quick:
            self._collect(batch_job)
            return
        with self._lock:
            if self._merging is None:
                self._merging = SyncThreads(1, self._process)
        self._merging.put(partial(self._collect, batch_job))

    def _collect(self, batch_job: BatchJob) -> None:
        try:
            outcome = Outcome("value", batch_job.partial_results())
        except BaseException as error:
            outcome = failed(error)
        self._batch_done(batch_job, outcome)

    def _tell(self, batch_job: BatchJob) -> None:
        """Answer an open request for the ended calls of a batch, if there are new ones."""
        with self._lock:
            due = batch_job.next_reply()
        if due is not None:
            reply, outcome = due
            reply(outcome)

    def _batch_done(self, batch_job: BatchJob, outcome: Outcome) -> None:
        """Answer a batch, unless its deadline has passed."""
        self._process.deadlines.stop(batch_job)
        call_id = batch_job.batch.call_id
        with self._lock:
            if self._batches.pop(call_id, None) is None:
                return
            outcome = replace(outcome, of_calls=tuple(batch_job.outcomes))
            reply, batch_job.reply = batch_job.reply, None
            if reply is None or not self._process.in_driver:
                self._outcomes[call_id] = outcome
        if reply is not None:
            reply(outcome)

    def _repeated(self, call_id: int, step: int, reply: Reply) -> Outcome | None:
        """Return the outcome of a step that was requested before; None if it still runs, and the request joins it."""
        if (outcome := self._outcomes.get(call_id)) is not None:
            return outcome
        job = self._jobs.get(call_id)
        if job is None:
            return Outcome("cancelled", never_ran=True)
        if job.cancelled:
            return Outcome("cancelled")
        if job.num_items == step + 1:
            return job.last_item
        self._replies[call_id] = reply
        return None

    def _done(self, job: Job, outcome: Outcome) -> None:
        """Answer a job, and begin the learner's next one. Close a stream that was cancelled meanwhile."""
        job.task = None
        self._process.deadlines.stop(job.call.call_id)
        if outcome.stamps is None:
            outcome = _stamped(outcome, job)
        following, batch_job, unread = None, None, False
        with self._lock:
            if outcome.stamps is not None:
                self._busy_s += outcome.stamps[2] - outcome.stamps[1]
            reply = self._replies.pop(job.call.call_id, None)
            if outcome.kind != "item":
                job.context = None  # breaks a reference cycle: frees memory before the next garbage collection
                del self._jobs[job.call.call_id]
                if not job.cancelled:
                    batch_job = job.batch
                    self._keep(job, outcome)
                following = job.mailbox.next_job()
            else:
                job.stepping = unread = job.cancelled
                job.num_items += 1
                job.last_item = None if self._process.in_driver else outcome
        if following is not None:
            self._start(following)
        if batch_job is not None:
            self._call_ended(batch_job, job.place, outcome)
        if reply is not None:
            reply(outcome)
        if unread:
            self._go_on(job, self._runner.close_stream)

    def _merging_late(self, batch_job: BatchJob) -> None:
        error = CallTimeoutError(
            f"{self.worker} did not give its partial results within {batch_job.batch.timeout_s} s: see what the "
            f"reducer does, or raise runtime.call_timeout_s"
        )
        self._batch_done(batch_job, failed(error))

    def _overran(self, call_id: int) -> None:
        job = self._jobs.get(call_id)
        if job is None or not job.stepping or (self._process.in_driver and debugger_attached()):
            return
        call = job.call
        error = CallTimeoutError(
            f"{call.client_id}.{call.method} ran longer than {call.run_timeout_s} s on {self.worker}: raise "
            f"runtime.call_timeout_s, or give this call options(timeout_s=...)"
        )
        self._abandon(call_id, failed(error))

    def _abandon(self, call_id: int, outcome: Outcome) -> Outcome | None:
        """Answer a call before its end. Returns the outcome; None if the call was answered before."""
        with self._lock:
            job = self._jobs.get(call_id)
            if job is None or job.cancelled:
                return None
            job.cancelled = True
            job.last_item = following = None
            reply = self._replies.pop(call_id, None)
            idle_stream, job.stepping = not job.stepping, True
            if job.has_begun:
                seconds = time.perf_counter() - job.began if job.began else 0.0  # its method may not have begun
                outcome = _stamped(replace(outcome, cut_off=not idle_stream, seconds=seconds), job)
                self._keep(job, outcome)
            else:
                outcome = replace(outcome, never_ran=True)
                following = self._withdraw(job, outcome)
        if following is not None:
            self._start(following)
        if job.batch is not None:
            self._call_ended(job.batch, job.place, outcome)
        if reply is not None:
            reply(outcome)
        if idle_stream:
            self._go_on(job, self._runner.close_stream)
        elif (task := job.task) is not None:
            self._async.call(task.cancel)
        return outcome

    def _keep(self, job: Job, outcome: Outcome) -> None:
        """Keep a final outcome for a repeated request. A batch keeps the outcomes of its calls itself."""
        if job.batch is None and not self._process.in_driver:
            self._outcomes[job.call.call_id] = outcome


def _stamped(outcome: Outcome, job: Job) -> Outcome:
    """Return the outcome of a job with its stamps, if a thread has begun with the job."""
    return replace(outcome, stamps=(job.received, job.begun, time.perf_counter())) if job.begun else outcome


async def answer(send: Callable[[Reply], None], cancel: Callable[[], None]) -> Outcome:
    """Send a request with a reply callback, and await the reply.

    Args:
        send: Called at once, with the callback, which may be called on any thread.
        cancel: Called if the awaiting task is cancelled meanwhile.
    """
    loop, thread = asyncio.get_running_loop(), threading.get_ident()
    future: asyncio.Future[Outcome] = loop.create_future()

    def settle(outcome: Outcome) -> None:
        if not future.done():
            future.set_result(outcome)

    def reply(outcome: Outcome) -> None:
        if threading.get_ident() == thread:
            settle(outcome)
        else:
            call_on(loop, settle, outcome)

    send(reply)
    try:
        return await future
    except asyncio.CancelledError:
        cancel()
        raise
