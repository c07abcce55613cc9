"""Runs jobs: the thread, learner, arguments and scope of each call, and its outcome."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Hashable, Iterator
from functools import partial
from typing import Any, Literal, TypeVar

import torch

from torchfedrpc.errors import MethodNotFoundError, SerializationError
from torchfedrpc.host.activity import Activity
from torchfedrpc.host.call import Outcome, Report
from torchfedrpc.host.call_scope import CallScope
from torchfedrpc.host.context import CallContext, current_call
from torchfedrpc.host.deadlines import Deadlines
from torchfedrpc.host.faults import Saboteur
from torchfedrpc.host.gate import Gate
from torchfedrpc.host.learner_cache import LearnerCache
from torchfedrpc.host.mailbox import Job, Mailbox
from torchfedrpc.host.methods import find_method, hidden_methods
from torchfedrpc.host.randomness import RandomStreams, call_seed
from torchfedrpc.host.shared_objects import SharedObjects
from torchfedrpc.host.snapshot import Snapshot, capture, check_belongs, load, reinstate, seal, taken
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.host.threads import AsyncLane, SyncLane
from torchfedrpc.host.torch_settings import OpenedSettings, adopt_settings
from torchfedrpc.reduce.worker import BatchJob
from torchfedrpc.wire.exceptions import Failure
from torchfedrpc.wire.file_pool import FilePool
from torchfedrpc.wire.packing import Packed, Parcel, Reference, pack

logger = logging.getLogger(__name__)

T = TypeVar("T")

Done = Callable[[Job, Outcome], None]


class Runner:
    """Runs jobs on threads of the host: `begin`, then for a stream `step` and `close_stream`.

    Args:
        spec: How to make learners, and the limits of the run.
        device: Device that `current_call` returns.
        by_value: Whether results and reports are copied.
        in_driver: Whether this is the driver's process, whose random streams are restored between calls.
        report: Receives the progress that methods report.
        activity: Shows the running calls to another process; None in the driver.
        deadlines: Clocks of methods and of steps of streams.
        residents: The learners in memory.
        claim: Reserves an idle mailbox until ``release``. Returns whether it was idle.
        release: See ``claim``.
        done: Receives each outcome, on the thread that ran the call. After an ``item`` the stream is open.

    Attributes:
        saboteur: Injects faults, in a test; else None.
        shows_files: Whether the driver can open memory files of this process, which large results then use.
    """

    def __init__(
        self,
        spec: LearnerSpec,
        device: torch.device,
        *,
        by_value: bool,
        in_driver: bool,
        report: Report,
        activity: Activity | None,
        deadlines: Deadlines,
        residents: LearnerCache,
        claim: Callable[[Mailbox], bool],
        release: Callable[[Mailbox], None],
        done: Done,
    ) -> None:
        self.allow = spec.allow_list()
        self._factory = spec.load()
        self._kinds: set[type] = set()  # of learners that were made here
        self._spec = spec
        self._device = device
        self._by_value = by_value
        self._report = report
        self._activity = activity
        self._deadlines = deadlines
        self._residents = residents
        self._claim = claim
        self._release = release
        self._done = done
        self.saboteur: Saboteur | None = None
        self.shows_files = False
        self._is_alone = spec.runtime.max_concurrent_calls == 1
        self._settings = OpenedSettings.of_this_process(spec.runtime.torch_threads)
        self._in_driver = in_driver
        self._shared = SharedObjects(self._make_shared)
        torch.empty(0, device=device)  # a device that cannot be used fails here, and not on the threads below
        self._streams = RandomStreams(device)
        self._gate = Gate()
        self._sync = SyncLane(spec.runtime.max_concurrent_calls, self._prepare_thread)
        self._async = AsyncLane(self._prepare_thread, self._step_alone)
        self._file_pool = FilePool()
        self._merging: SyncLane | None = None  # started by the first batch that needs it, on any thread
        self._making = threading.Lock()

    def begin(self, job: Job) -> None:
        """Run a job up to its result or its first item. Its learner is made before, if needed."""
        self._sync.put(partial(self._in_turn, self._begin, job))

    def collect(self, job: BatchJob, done: Callable[[BatchJob, Outcome], None]) -> None:
        """Hand the partial results of a batch to ``done``. A user's reducer runs on a separate thread."""
        if job.is_quick:
            self._collect(job, done)
            return
        with self._making:
            if self._merging is None:
                self._merging = SyncLane(1, self._prepare_thread)
        self._merging.put(partial(self._collect, job, done))

    def step(self, job: Job) -> None:
        """Run an open stream up to its next item."""
        if isinstance(job.iterator, AsyncIterator):
            self._start(job, self._async_step(job, job.iterator))
        else:
            self._sync.put(partial(self._in_turn, self._step, job))

    def close_stream(self, job: Job) -> None:
        """Close the iterator of an idle stream, which ends its job."""
        if isinstance(job.iterator, AsyncIterator):
            self._start(job, self._async_close(job))
        else:
            self._sync.put(partial(self._in_turn, self._close, job))

    def cancel_task(self, job: Job) -> None:
        """Cancel the async method of a job, if one runs."""
        if (task := job.task) is not None:
            self._async.call(task.cancel)

    def take_value(self, obj: Any) -> Packed:
        """Pack an object as it is now.

        Raises:
            SerializationError: If it cannot be sent.
        """
        return pack(obj) if self._by_value else Reference(obj)

    def failed(self, error: BaseException, *, never_ran: bool = False) -> Outcome:
        """Return the outcome of a call that raised an exception."""
        return Outcome("failed", failure=Failure.capture(error, skip_modules="torchfedrpc.host"), never_ran=never_ran)

    def close(self, timeout_s: float) -> bool:
        """End the threads. Returns whether all ended in time."""
        have_ended = self._sync.close(timeout_s) & self._async.close(timeout_s)
        self._file_pool.close()
        if self._merging is not None:
            have_ended &= self._merging.close(timeout_s)
        if have_ended:
            self._streams.give_back()
        return have_ended

    # On the threads of sync methods, with the gate held shared.

    def _in_turn(self, function: Callable[[Job], None], job: Job) -> None:
        self._gate.enter(exclusive=False)
        slot = self._activity.enter(job.call.call_id) if self._activity is not None else None
        try:
            function(job)
            self._make_room(job, 0)  # learners that were in use when the job began can be evicted now
            self._give_streams_back()
        finally:
            if self._activity is not None:
                self._activity.leave(slot)
            self._gate.leave(exclusive=False)

    def _begin(self, job: Job) -> None:
        if job.cancelled:
            self._end(job, Outcome("cancelled", never_ran=True))
            return
        if job.call.kind in ("snapshot", "restore"):
            self._end(job, self._carry(job))
            return
        self._start_deadline(job)
        call, mailbox = job.call, job.mailbox
        if self.saboteur is not None:
            self.saboteur.begin(call.call_id)
        try:
            self._make_present(job)
            method = find_method(mailbox.learner, call.method, call.client_id)
            args, kwargs = call.arguments.open(self.allow)
        except BaseException as error:
            self._end(job, self.failed(error, never_ran=True))
            return
        call = job.call = call.taken()
        seed = call_seed(self._spec.seed, call.client_id, call.method, mailbox.count(call.method))
        job.scope = self._scope(self._call_context(job, call.method, seed), seed)
        job.context = job.scope.bind(contextvars.Context())
        box = [args, kwargs]
        del args, kwargs
        try:
            outcome = self._run_step(job, partial(self._invoke, job, method, box))
        except BaseException as error:
            outcome = self.failed(error)
        if outcome is not None:
            self._end(job, outcome)
        elif call.kind == "stream":
            self._open_stream(job, box.pop())
        else:
            self._start(job, self._await(job, box.pop()))

    def _invoke(self, job: Job, method: Callable[..., Any], box: list[Any]) -> Outcome | None:
        """Call a method with the arguments in a box. Of async methods and streams, return None and box the value."""
        kwargs, args = box.pop(), box.pop()
        job.began = time.perf_counter()
        box.append(method(*args, **kwargs))
        del args, kwargs
        if job.call.kind == "stream" or inspect.isawaitable(box[0]):
            assert job.scope is not None
            job.scope.is_resumable = True
            return None
        return self._gave(job, "value", box)

    def _make_present(self, job: Job) -> None:
        """Make the job's learner, or read it from disk, unless it is in memory."""
        mailbox = job.mailbox
        if mailbox.learner is None or not mailbox.made:
            self._make_room(job, 1)
        if mailbox.is_stored:
            self._restore(job, memoryview(self._residents.stored(mailbox.client_id)), None)
        if not mailbox.made:  # also one that was stored before its first call
            assert mailbox.kwargs is not None
            mailbox.learner = self._make_learner(job, mailbox.kwargs)
            mailbox.made = True
            if not self._residents.is_limited:
                mailbox.kwargs = None
        self._residents.used(mailbox)

    def _make_room(self, job: Job, num_coming: int) -> None:
        """Evict idle learners, if too many are in memory once ``num_coming`` more are."""
        for mailbox in self._residents.surplus(num_coming):
            if not self._residents.is_surplus(num_coming):
                break
            if mailbox is not job.mailbox and self._claim(mailbox):
                self._store(job, mailbox)
                self._release(mailbox)

    def _store(self, job: Job, mailbox: Mailbox) -> None:
        try:
            self._residents.store(mailbox, seal(self._snapshot(job, mailbox).open(self.allow)))
        except Exception as error:
            self._residents.cannot_store(mailbox, error)
            return
        mailbox.let_go()

    def _make_learner(self, job: Job, packed: Packed) -> Any:
        kwargs = packed.copy().open(self.allow)
        learner = self._apart(job, "__init__", lambda: self._factory(job.call.client_id, **kwargs))
        self._warn_of_hidden_methods(type(learner))
        return learner

    def _warn_of_hidden_methods(self, kind: type) -> None:
        if kind not in self._kinds:
            self._kinds.add(kind)
            if hidden := hidden_methods(kind, self._spec.taken_names):
                logger.warning(hidden)

    def _carry(self, job: Job) -> Outcome:
        """Take a snapshot of the job's learner, or restore it from one."""
        try:
            if job.call.kind == "snapshot":
                limit_bytes = job.call.arguments.open(self.allow)
                snapshot = self._snapshot(job, job.mailbox, in_files=self.shows_files, limit_bytes=limit_bytes)
                return Outcome("value", snapshot)
            state, kwargs = job.call.arguments.open(self.allow)
            self._make_room(job, 1)
            self._restore(job, state.numpy().data, kwargs)
            if job.mailbox.made:
                self._residents.used(job.mailbox)
            return Outcome("value", pack(None))
        except BaseException as error:
            return self.failed(error)

    def _collect(self, job: BatchJob, done: Callable[[BatchJob, Outcome], None]) -> None:
        try:
            nodes, is_owned = job.partial_results()
            outcome = Outcome("value", pack(nodes, copy=not is_owned) if self._by_value else Reference(nodes))
        except BaseException as error:
            outcome = self.failed(error)
        done(job, outcome)

    def _snapshot(
        self, job: Job, mailbox: Mailbox, *, in_files: bool = False, limit_bytes: int | None = None
    ) -> Parcel:
        """Return a snapshot of a learner without a running call, on behalf of a job. See `taken`."""
        if mailbox.is_stored:
            data = bytearray(self._residents.stored(mailbox.client_id))
            if limit_bytes is not None and len(data) > limit_bytes:
                return pack(len(data))
            return pack(torch.frombuffer(data, dtype=torch.uint8), copy=False)

        def take() -> Parcel:
            state = capture(mailbox.learner, mailbox.client_id, self._shared) if mailbox.made else None
            snapshot = Snapshot(mailbox.client_id, self._spec.name, dict(mailbox.counts), state)
            return taken(
                snapshot,
                self.allow,
                mailbox.learner,
                self._shared,
                self._device,
                in_files=in_files,
                limit_bytes=limit_bytes,
            )

        return self._apart(job, "state_dict", take, mailbox.client_id)

    def _restore(self, job: Job, data: memoryview, kwargs: dict[str, Any] | None) -> None:
        snapshot, mailbox = load(data, self.allow, self._device), job.mailbox
        check_belongs(snapshot, mailbox.client_id, self._spec.name)
        constructor = mailbox.kwargs if kwargs is None else self.take_value(kwargs)
        assert constructor is not None
        learner = None
        if snapshot.made:
            learner = self._make_learner(job, constructor)
            made, shared = learner, self._shared
            self._apart(job, "load_state_dict", lambda: reinstate(made, snapshot.state, mailbox.client_id, shared))
        mailbox.learner, mailbox.made, mailbox.is_stored = learner, snapshot.made, False
        mailbox.kwargs = constructor if self._residents.is_limited or not snapshot.made else None
        mailbox.counts = Counter(snapshot.counts)

    def _open_stream(self, job: Job, value: Any) -> None:
        if isinstance(value, Iterator):
            job.iterator = value
            self._next(job, value)
        elif isinstance(value, AsyncIterator):
            job.iterator = value
            self.step(job)
        else:
            if inspect.iscoroutine(value):
                value.close()
            error = MethodNotFoundError(
                f"{job.call.client_id}: {job.call.method} is no generator method, it returned a "
                f"{type(value).__name__}: await the call instead of streaming it"
            )
            self._end(job, self.failed(error))

    def _step(self, job: Job) -> None:
        assert isinstance(job.iterator, Iterator)
        self._start_deadline(job)
        self._next(job, job.iterator)

    def _next(self, job: Job, iterator: Iterator[Any]) -> None:
        try:
            outcome = self._run_step(job, partial(self._take_item, job, iterator))
        except StopIteration:
            outcome = Outcome("end")
        except BaseException as error:
            outcome = self.failed(error)
        self._end(job, outcome)

    def _take_item(self, job: Job, iterator: Iterator[Any]) -> Outcome:
        outcome = self._gave(job, "item", [next(iterator)])
        if outcome.kind == "failed" and (close := getattr(iterator, "close", None)):
            close()
        return outcome

    def _close(self, job: Job) -> None:
        try:
            if close := getattr(job.iterator, "close", None):
                self._run_step(job, close)
        except BaseException:
            logger.exception("%s.%s failed while its stream was closed", job.call.client_id, job.call.method)
        self._end(job, Outcome("cancelled"))

    # On the thread of async methods, each step in the scope of the job, with the gate held exclusively.

    def _start(self, job: Job, coroutine: Coroutine[Any, Any, Outcome]) -> None:
        assert job.context is not None
        self._async.start(coroutine, job.context, partial(self._end, job))

    # A job gets its task when the task runs: one that was cancelled earlier would leave its coroutine unawaited.

    async def _await(self, job: Job, awaitable: Awaitable[Any]) -> Outcome:
        job.task = asyncio.current_task()
        try:
            if job.cancelled:
                if inspect.iscoroutine(awaitable):
                    awaitable.close()
                raise asyncio.CancelledError
            return self._gave(job, "value", [await awaitable])
        except BaseException as error:
            return self._cancelled_or_failed(job, error)

    async def _async_step(self, job: Job, iterator: AsyncIterator[Any]) -> Outcome:
        job.task = asyncio.current_task()
        if job.cancelled:
            return await self._async_close(job)
        self._start_deadline(job)
        try:
            outcome = self._gave(job, "item", [await iterator.__anext__()])
            if outcome.kind == "failed" and (close := getattr(iterator, "aclose", None)):
                await close()
            return outcome
        except StopAsyncIteration:
            return Outcome("end")
        except BaseException as error:
            return self._cancelled_or_failed(job, error)

    async def _async_close(self, job: Job) -> Outcome:
        job.task = None  # nothing cancels the closing
        try:
            if close := getattr(job.iterator, "aclose", None):
                await close()
        except BaseException:
            logger.exception("%s.%s failed while its stream was closed", job.call.client_id, job.call.method)
        return Outcome("cancelled")

    def _cancelled_or_failed(self, job: Job, error: BaseException) -> Outcome:
        if job.cancelled and isinstance(error, asyncio.CancelledError):
            return Outcome("cancelled")
        return self.failed(error)

    # Around the code of learners.

    def _start_deadline(self, job: Job) -> None:
        if job.call.run_timeout_s is not None:
            self._deadlines.start(job.call.call_id, job.call.run_timeout_s)

    def _end(self, job: Job, outcome: Outcome) -> None:
        job.task = None
        if outcome.is_final:
            # They refer to the job; break the cycle, so that memory is freed before the next garbage collection.
            job.scope = job.context = None
        self._deadlines.stop(job.call.call_id)
        self._done(job, outcome)

    def _prepare_thread(self) -> None:
        adopt_settings(self._settings.values, of_thread_only=True)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def _call_context(self, job: Job, method: str, seed: int, client_id: str | None = None) -> CallContext:
        def report(progress: Any) -> None:
            value = self.take_value(progress)
            value.copy().open(self.allow)  # a type that may not travel raises in the method, not in the driver
            with job.reporting:
                self._report(job.call, job.num_reports, value)
                job.num_reports += 1

        return CallContext(
            client_id=client_id or job.call.client_id,
            method=method,
            call_id=job.call.call_id,
            device=self._device,
            trusted_modules=self.allow.trusted,
            _seed=seed,
            _shared=self._shared,
            _is_cancelled=lambda: job.cancelled,
            _report=report,
        )

    def _apart(self, job: Job, method: str, function: Callable[[], T], client_id: str | None = None) -> T:
        """Run the constructor, or take or restore a state, in a scope that is not counted as a call."""
        client_id = client_id or job.call.client_id
        seed = call_seed(self._spec.seed, client_id, method, 0)
        scope = self._scope(self._call_context(job, method, seed, client_id), seed, is_thorough=True)
        return scope.bind(contextvars.Context()).run(self._inside, scope, function)

    def _make_shared(self, key: Hashable, factory: Callable[[], Any]) -> Any:
        """Make an object that learners of this process share, within a step of a call."""
        seed = call_seed(self._spec.seed, "shared", repr(key))
        scope = CallScope(current_call(), self._settings, self._streams, seed, is_thorough=True, is_nested=True)
        context = scope.bind(contextvars.Context())
        with scope:
            return context.run(factory)

    def _scope(self, call: CallContext, seed: int, *, is_thorough: bool = False) -> CallScope:
        if not self._is_alone:
            return CallScope(call)
        return CallScope(call, self._settings, self._streams, seed, is_thorough=is_thorough)

    def _run_step(self, job: Job, function: Callable[[], T]) -> T:
        """Run a step of a job in its scope."""
        assert job.scope is not None
        assert job.context is not None
        return job.context.run(self._inside, job.scope, function)

    def _inside(self, scope: CallScope, function: Callable[[], T]) -> T:
        try:
            with scope:
                return function()
        finally:
            self._give_streams_back()

    def _give_streams_back(self) -> None:
        """Restore the random streams of the driver's process. The gate must be held.

        Workers need not restore them. If sync methods wait, the next one would set the streams aside again.
        """
        if self._in_driver and not self._sync.num_waiting:
            self._streams.give_back()

    def _step_alone(self, scope: CallScope, function: Callable[[], object]) -> None:
        """Run a step of a task that an async method has started, while no sync method runs."""
        call_id = scope.call.call_id
        remaining_s = self._deadlines.stop(call_id)  # waiting for the gate does not count
        self._gate.enter(exclusive=True)
        slot = self._activity.enter(call_id) if self._activity is not None else None
        try:
            if remaining_s is not None:
                self._deadlines.start(call_id, remaining_s)
            self._inside(scope, function)
        finally:
            if self._activity is not None:
                self._activity.leave(slot)
            self._gate.leave(exclusive=True)

    def _gave(self, job: Job, kind: Literal["value", "item"], box: list[Any]) -> Outcome:
        """Return the outcome with the object in a box, and empty the box, so that no other reference remains."""
        seconds = time.perf_counter() - job.began
        try:
            if job.batch is not None and not job.cancelled:
                job.batch.add(job.place, box[0])
                box[0] = None
            taken = (
                pack(box[0], in_files=self.shows_files, pool=self._file_pool) if self._by_value else Reference(box[0])
            )
            return Outcome(kind, taken, seconds=seconds)
        except SerializationError as error:
            where = f"{job.call.client_id}.{job.call.method}"
            if inspect.isgenerator(box[0]) or inspect.isasyncgen(box[0]):
                remedy = (
                    f"async for item in proxy.stream({job.call.client_id!r}, {job.call.method!r}) iterates over it"
                )
            else:
                remedy = "return plain data: tensors, numbers, strings, lists, dicts"
            return self.failed(type(error)(f"the result of {where} cannot be sent: {error}; {remedy}"))
        finally:
            box.clear()
