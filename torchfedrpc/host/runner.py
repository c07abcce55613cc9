"""How the code of one call is run: on which thread, with which random streams, and what comes of it."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch

from torchfedrpc.errors import MethodNotFoundError, SerializationError
from torchfedrpc.host.activity import Activity
from torchfedrpc.host.call import Call, Outcome
from torchfedrpc.host.context import CallContext, SharedObjects, bind, unbind
from torchfedrpc.host.deadlines import Deadlines
from torchfedrpc.host.faults import Saboteur
from torchfedrpc.host.gate import Gate
from torchfedrpc.host.lanes import AsyncLane, SyncLane, stepped
from torchfedrpc.host.mailbox import Job
from torchfedrpc.host.methods import find_method
from torchfedrpc.host.randomness import RandomStreams, call_seed
from torchfedrpc.host.snapshot import Snapshot, capture, check_belongs, dump, load, reinstate
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.host.torch_modes import TorchModes
from torchfedrpc.wire.failure import Failure
from torchfedrpc.wire.packing import Packed, Reference, pack

logger = logging.getLogger(__name__)

Report = Callable[[Call, int, Packed], None]  # a call, which of its reports this is, from 0, and its value
Done = Callable[[Job, Outcome], None]


class Runner:
    """Runs jobs on its own threads: `begin`, then for a stream `step` and `close_stream`.

    Args:
        spec: what learners to make, with which limits.
        device: what `current_call` names as device.
        by_value: whether results and reports are copied.
        report: takes what a method reports of its progress.
        activity: is told which calls are running; None where nobody asks.
        deadlines: told when a method, or a step of a stream, begins and ends.
        done: takes each outcome, on the thread where it came about. After ``item`` the stream is open.
    """

    def __init__(
        self,
        spec: LearnerSpec,
        device: torch.device,
        *,
        by_value: bool,
        report: Report,
        activity: Activity | None,
        deadlines: Deadlines,
        done: Done,
    ) -> None:
        self.allow = spec.allow_list()
        self._factory = spec.load()
        self._spec = spec
        self._device = device
        self._by_value = by_value
        self._report = report
        self._activity = activity
        self._deadlines = deadlines
        self._done = done
        self.saboteur: Saboteur | None = None
        self._seeds_streams = spec.runtime.max_concurrent_calls == 1
        self._shared = SharedObjects(spec.seed, device)
        torch.empty(0, device=device)  # a device that cannot be used fails here, not on the threads below
        self._gate = Gate()
        self._sync = SyncLane(spec.runtime.max_concurrent_calls, self._prepare_thread)
        self._async = AsyncLane(self._prepare_thread)

    def begin(self, job: Job) -> None:
        """Run a job up to its result or its first item; its learner is made before, where there is none."""
        self._sync.put(partial(self._in_turn, self._begin, job))

    def step(self, job: Job) -> None:
        """Run an open stream up to its next item."""
        if isinstance(job.iterator, AsyncIterator):
            self._async.start(self._async_step(job, job.iterator))
        else:
            self._sync.put(partial(self._in_turn, self._step, job))

    def close_stream(self, job: Job) -> None:
        """Close an idle stream's iterator, which ends its job."""
        if isinstance(job.iterator, AsyncIterator):
            self._async.start(self._async_close(job))
        else:
            self._sync.put(partial(self._in_turn, self._close, job))

    def cancel_task(self, job: Job) -> None:
        """Cancel the job's async method, if it is at one."""
        if (task := job.task) is not None:
            self._async.call(task.cancel)

    def take_value(self, obj: Any) -> Packed:
        """An object as it is now.

        Raises:
            SerializationError: it cannot be sent.
        """
        return pack(obj) if self._by_value else Reference(obj)

    def failed(self, error: BaseException, *, never_ran: bool = False) -> Outcome:
        """The outcome of a call that raised."""
        return Outcome("failed", failure=Failure.capture(error, skip_modules="torchfedrpc.host"), never_ran=never_ran)

    def close(self, timeout_s: float) -> bool:
        """End the threads; whether all ended in time."""
        return self._sync.close(timeout_s) & self._async.close(timeout_s)

    # On the sync lane, the gate held shared.

    def _in_turn(self, function: Callable[[Job], None], job: Job) -> None:
        with self._gate.shared(), self._shown(job):
            function(job)

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
            if mailbox.kwargs is not None:
                mailbox.learner, mailbox.kwargs = self._make_learner(job, mailbox.kwargs), None
            method = find_method(mailbox.learner, call.method, call.client_id)
            args, kwargs = call.arguments.open(self.allow)
        except BaseException as error:
            self._end(job, self.failed(error, never_ran=True))
            return
        call = job.call = call.taken()
        seed = call_seed(self._spec.seed, call.client_id, call.method, mailbox.counts[call.method])
        mailbox.counts[call.method] += 1
        job.context = self._context(job, call.method, seed)
        job.streams = RandomStreams(seed, self._device, resumable=True)
        try:
            with self._inside(job.context, RandomStreams(seed, self._device)):
                value = method(*args, **kwargs)
                del args, kwargs
                goes_on = call.kind == "stream" or inspect.isawaitable(value)
                outcome = None if goes_on else self._gave(job, "value", value)
        except BaseException as error:
            outcome = self.failed(error)
        if outcome is not None:
            self._end(job, outcome)
        elif call.kind == "stream":
            self._open_stream(job, value)
        else:
            self._async.start(self._await(job, value))

    def _make_learner(self, job: Job, packed: Packed) -> Any:
        kwargs = packed.copy().open(self.allow)
        with self._apart(job, "__init__"):
            return self._factory(job.call.client_id, **kwargs)

    def _carry(self, job: Job) -> Outcome:
        """Take a snapshot of the job's learner, or restore it from one."""
        try:
            if job.call.kind == "snapshot":
                return Outcome("value", pack(torch.frombuffer(bytearray(self._snapshot(job)), dtype=torch.uint8)))
            data, kwargs = job.call.arguments.open(self.allow)
            self._restore(job, data.numpy().data, kwargs)
            return Outcome("value", pack(None))
        except BaseException as error:
            return self.failed(error)

    def _snapshot(self, job: Job) -> bytes:
        mailbox = job.mailbox
        with self._apart(job, "state_dict"):
            state = capture(mailbox.learner, mailbox.client_id) if mailbox.made else None
            snapshot = Snapshot(mailbox.client_id, self._spec.name, dict(mailbox.counts), state)
            return dump(snapshot, self.allow)

    def _restore(self, job: Job, data: memoryview, kwargs: dict[str, Any] | None) -> None:
        snapshot, mailbox = load(data, self.allow), job.mailbox
        check_belongs(snapshot, mailbox.client_id, self._spec.name)
        constructor = mailbox.kwargs if kwargs is None else self.take_value(kwargs)
        assert constructor is not None
        if snapshot.made:
            learner = self._make_learner(job, constructor)
            with self._apart(job, "load_state_dict"):
                reinstate(learner, snapshot.state, mailbox.client_id)
            mailbox.learner, mailbox.kwargs = learner, None
        else:
            mailbox.learner, mailbox.kwargs = None, constructor
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
            with self._inside(job.context, job.streams):
                outcome = self._gave(job, "item", next(iterator))
                if outcome.kind == "failed" and (close := getattr(iterator, "close", None)):
                    close()
        except StopIteration:
            outcome = Outcome("end")
        except BaseException as error:
            outcome = self.failed(error)
        self._end(job, outcome)

    def _close(self, job: Job) -> None:
        try:
            with self._inside(job.context, job.streams):
                if close := getattr(job.iterator, "close", None):
                    close()
        except BaseException:
            logger.exception("%s.%s failed while its stream was closed", job.call.client_id, job.call.method)
        self._end(job, Outcome("cancelled"))

    # On the async lane, the gate held alone at each step.

    # A task becomes its job's own once it runs: one that is cancelled before would never get to end the job.

    async def _await(self, job: Job, awaitable: Awaitable[Any]) -> None:
        job.task = asyncio.current_task()
        try:
            if job.cancelled:
                if inspect.iscoroutine(awaitable):
                    awaitable.close()
                raise asyncio.CancelledError
            value = await stepped(awaitable, partial(self._alone, job))
            with self._alone(job):
                outcome = self._gave(job, "value", value)
        except BaseException as error:
            outcome = self._cancelled_or_failed(job, error)
        self._end(job, outcome)

    async def _async_step(self, job: Job, iterator: AsyncIterator[Any]) -> None:
        job.task = asyncio.current_task()
        if job.cancelled:
            await self._async_close(job)
            return
        self._start_deadline(job)
        try:
            item = await stepped(iterator.__anext__(), partial(self._alone, job))
            with self._alone(job):
                outcome = self._gave(job, "item", item)
            if outcome.kind == "failed" and (close := getattr(iterator, "aclose", None)):
                await stepped(close(), partial(self._alone, job))
        except StopAsyncIteration:
            outcome = Outcome("end")
        except BaseException as error:
            outcome = self._cancelled_or_failed(job, error)
        self._end(job, outcome)

    async def _async_close(self, job: Job) -> None:
        job.task = None  # nothing cancels the closing
        try:
            if close := getattr(job.iterator, "aclose", None):
                await stepped(close(), partial(self._alone, job))
        except BaseException:
            logger.exception("%s.%s failed while its stream was closed", job.call.client_id, job.call.method)
        self._end(job, Outcome("cancelled"))

    def _cancelled_or_failed(self, job: Job, error: BaseException) -> Outcome:
        if job.cancelled and isinstance(error, asyncio.CancelledError):
            return Outcome("cancelled")
        return self.failed(error)

    # What surrounds a learner's code.

    def _start_deadline(self, job: Job) -> None:
        if job.call.run_timeout_s is not None:
            self._deadlines.start(job.call.call_id, job.call.run_timeout_s)

    def _end(self, job: Job, outcome: Outcome) -> None:
        job.task = None
        if outcome.is_final:
            job.context = None  # it refers to the job: what both hold would stay until the next garbage collection
        self._deadlines.stop(job.call.call_id)
        self._done(job, outcome)

    def _prepare_thread(self) -> None:
        torch.set_num_threads(self._spec.runtime.torch_threads)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def _context(self, job: Job, method: str, seed: int) -> CallContext:
        def report(progress: Any) -> None:
            value = self.take_value(progress)
            value.copy().open(self.allow)  # a type that may not travel is the method's error, not the driver's
            with job.reporting:
                self._report(job.call, job.num_reports, value)
                job.num_reports += 1

        return CallContext(
            client_id=job.call.client_id,
            method=method,
            call_id=job.call.call_id,
            device=self._device,
            _seed=seed,
            _shared=self._shared,
            _is_cancelled=lambda: job.cancelled,
            _report=report,
        )

    @contextmanager
    def _apart(self, job: Job, method: str) -> Iterator[None]:
        """Around what no call counts: the constructor, and the taking and giving back of state."""
        seed = call_seed(self._spec.seed, job.call.client_id, method, 0)
        with self._inside(self._context(job, method, seed), RandomStreams(seed, self._device)):
            yield

    @contextmanager
    def _shown(self, job: Job) -> Iterator[None]:
        """Let the activity of this process show the job's call."""
        if self._activity is None:
            yield
            return
        slot = self._activity.enter(job.call.call_id)
        try:
            yield
        finally:
            self._activity.leave(slot)

    @contextmanager
    def _inside(self, context: CallContext | None, streams: RandomStreams | None) -> Iterator[None]:
        """Make the call the current one, with its random streams where no other method runs beside it."""
        assert context is not None
        assert streams is not None
        token = bind(context)
        try:
            with TorchModes(), streams if self._seeds_streams else nullcontext():
                yield
        finally:
            unbind(token)

    @contextmanager
    def _alone(self, job: Job) -> Iterator[None]:
        """Around a step of an async method: no sync method runs beside it."""
        assert job.context is not None
        assert job.streams is not None
        token = bind(job.context)
        remaining_s = self._deadlines.stop(job.call.call_id)  # waiting for the gate is no running
        try:
            with self._gate.exclusive(), self._shown(job), job.modes, job.streams:
                if remaining_s is not None:
                    self._deadlines.start(job.call.call_id, remaining_s)
                yield
        finally:
            unbind(token)

    def _gave(self, job: Job, kind: Literal["value", "item"], value: Any) -> Outcome:
        try:
            return Outcome(kind, self.take_value(value))
        except SerializationError as error:
            where = f"{job.call.client_id}.{job.call.method}"
            if inspect.isgenerator(value) or inspect.isasyncgen(value):
                remedy = (
                    f"async for item in proxy.stream({job.call.client_id!r}, {job.call.method!r}) iterates over it"
                )
            else:
                remedy = "return plain data: tensors, numbers, strings, lists, dicts"
            return self.failed(type(error)(f"the result of {where} cannot be sent: {error}; {remedy}"))
