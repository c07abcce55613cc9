"""Runs the steps of jobs: a call, an item of a stream, a snapshot."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
import types
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator
from typing import Any, Literal

from torchfedrpc.errors import MethodNotFoundError, SerializationError
from torchfedrpc.host.call import Outcome
from torchfedrpc.host.call_scope import CallScope, scope_here
from torchfedrpc.host.learner_cache import LearnerCache
from torchfedrpc.host.mailbox import Job
from torchfedrpc.host.methods import find_method
from torchfedrpc.host.process_state import ProcessState
from torchfedrpc.host.randomness import call_seed
from torchfedrpc.host.torch_settings import glance
from torchfedrpc.wire.exceptions import Failure
from torchfedrpc.wire.packing import Parcel, pack

logger = logging.getLogger(__name__)

Steps = Coroutine[Any, Any, Outcome]
"""The steps of a job up to its next outcome: a single one of sync code; async code goes on in an event loop."""


class Runner:
    """Runs steps of jobs in their scopes, on the threads of its host, which puts them in order.

    Args:
        process: State that the calls of this process share.
        learners: The learners.
    """

    def __init__(self, process: ProcessState, learners: LearnerCache) -> None:
        self._process = process
        self._learners = learners

    def begin(self, job: Job) -> Outcome | Steps:
        """Return the steps of a call up to its result or first item; an outcome if its method cannot be called."""
        call, mailbox, process = job.call, job.mailbox, self._process
        if process.saboteur is not None:
            process.saboteur.begin(call.call_id)
        try:
            self._learners.make_present(job)
            method = find_method(mailbox.learner, call.method, call.client_id)
            if mailbox.device is not None:
                job.home = process.home_of(call.arguments)
            args, kwargs = call.arguments.open(process.allow, None, mailbox.device)
        except BaseException as error:
            return failed(error, never_ran=True)
        if job.cancelled:  # while learners were made or evicted
            return Outcome("cancelled", never_ran=True)
        job.call = call.taken()
        number = mailbox.count(call.method) if call.number is None else call.number
        seed = call_seed(process.seed, call.client_id, call.method, number)
        scope = CallScope(process, job, call.method, seed)
        job.context = scope.new_context()
        # If a setting cannot be restored, the first step on this thread fails the call.
        job.on_loop = _is_async(method) and glance() == process.settings.glance
        return self._call(job, scope, method, args, kwargs)

    def step(self, job: Job, steps: Steps) -> Outcome | Steps:
        """Run the first step in the scope of the job, unless it needs a loop.

        Returns:
            The outcome; the steps if those that are left need a loop.
        """
        if job.on_loop:
            return steps
        assert job.context is not None
        scope = job.context[scope_here]
        assert scope is not None
        try:
            job.context.run(scope.run, steps.send, None)
        except StopIteration as end:
            outcome: Outcome = end.value
            return outcome
        except BaseException as error:  # a setting cannot be restored
            steps.close()
            return failed(error)
        return steps

    def carry(self, job: Job) -> Outcome:
        """Take a snapshot of the job's learner, or restore it from one."""
        try:
            arguments = job.call.arguments.open(self._process.allow)
            if job.call.kind == "snapshot":
                pool = self._process.snapshot_pool if self._process.shows_files else None
                snapshot = self._learners.snapshot(job, pool=pool, limit_bytes=arguments)
                return Outcome("value", snapshot)
            state, kwargs = arguments
            self._learners.restore(job, state.numpy().data, kwargs)
            return Outcome("value", pack(None))
        except BaseException as error:
            return failed(error)

    async def _call(
        self, job: Job, scope: CallScope, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Outcome:
        try:
            job.began = time.perf_counter()
            box = [method(*args, **kwargs)]
            del args, kwargs
            if job.call.kind == "stream":
                scope.is_resumable = True
                job.iterator = _iterator(job, box.pop())
                if isinstance(job.iterator, AsyncIterator):
                    await _on_loop(job)
                return await self.item(job)
            if inspect.isawaitable(box[0]):
                scope.is_resumable = True
                await _on_loop(job)
                job.task = asyncio.current_task()
                if job.cancelled:
                    if inspect.iscoroutine(box[0]):
                        box[0].close()
                    return Outcome("cancelled")
                box.append(await box.pop())
            return self._gave(job, "value", box)
        except BaseException as error:
            return _cancelled_or_failed(job, error)

    async def item(self, job: Job) -> Outcome:
        """Run a stream up to its next item."""
        iterator = job.iterator
        assert iterator is not None
        try:
            if isinstance(iterator, AsyncIterator):
                job.task = asyncio.current_task()
            if job.cancelled:  # after `task` is set, so that no later cancellation is missed
                return await self.close_stream(job)
            sent, job.sent = job.sent, None
            if job.home is not None and job.num_items:
                job.home = self._process.home_of(sent)
            if sent is None:
                box = [await anext(iterator) if isinstance(iterator, AsyncIterator) else next(iterator)]
            else:
                try:
                    send, value = _sender(job, iterator), sent.open(self._process.allow, device=job.mailbox.device)
                except BaseException:
                    await _close(iterator)
                    raise
                made = send(value)
                box = [await made if isinstance(iterator, AsyncIterator) else made]
            outcome = self._gave(job, "item", box)
            if outcome.kind == "failed":
                await _close(iterator)
            return outcome
        except BaseException as error:
            if isinstance(error, StopAsyncIteration if isinstance(iterator, AsyncIterator) else StopIteration):
                return Outcome("end")
            return _cancelled_or_failed(job, error)

    async def close_stream(self, job: Job) -> Outcome:
        """Close the iterator of an idle stream."""
        job.task = None  # nothing cancels the closing
        try:
            await _close(job.iterator)
        except BaseException:
            logger.exception("%s.%s failed while its stream was closed", job.call.client_id, job.call.method)
        return Outcome("cancelled")

    def _gave(self, job: Job, kind: Literal["value", "item"], box: list[Any]) -> Outcome:
        """Return the outcome with the object in a box, and empty the box, so that no other reference remains."""
        seconds = time.perf_counter() - job.began
        try:
            if job.batch is not None and not job.cancelled:
                job.batch.add(job.place, box[0], job.mailbox.device)
                box[0] = None
            result = self._process.take_result(box[0])
            if job.home is not None and isinstance(result, Parcel):
                result = result.on(job.home)
            stamps = (job.received, job.begun, time.perf_counter())
            return Outcome(kind, result, seconds=seconds, stamps=stamps)
        except SerializationError as error:
            where = f"{job.call.client_id}.{job.call.method}"
            if inspect.isgenerator(box[0]) or inspect.isasyncgen(box[0]):
                remedy = (
                    f"async for item in proxy.stream({job.call.client_id!r}, {job.call.method!r}) iterates over it"
                )
            else:
                remedy = "return plain data: tensors, numbers, strings, lists, dicts"
            return failed(type(error)(f"the result of {where} cannot be sent: {error}; {remedy}"))
        finally:
            box.clear()


def failed(error: BaseException, *, never_ran: bool = False) -> Outcome:
    """Return the outcome of a call that raised an exception."""
    return Outcome("failed", failure=Failure.capture(error, skip_modules="torchfedrpc.host"), never_ran=never_ran)


def _cancelled_or_failed(job: Job, error: BaseException) -> Outcome:
    if job.cancelled and isinstance(error, asyncio.CancelledError):
        return Outcome("cancelled")
    return failed(error)


def _is_async(method: Callable[..., Any]) -> bool:
    """Whether a method is defined by ``async def``, so that calling it runs none of its code yet."""
    code = getattr(method, "__code__", None)
    return isinstance(code, types.CodeType) and bool(
        code.co_flags & (inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR)
    )


@types.coroutine
def _on_loop(job: Job) -> Generator[None, None, None]:
    """Go on as a task of the event loop, with the next step, unless the job runs there."""
    if not job.on_loop:
        job.on_loop = True
        yield


def _iterator(job: Job, value: Any) -> Iterator[Any] | AsyncIterator[Any]:
    """Return the iterator that a generator method gave.

    Raises:
        MethodNotFoundError: If the method is no generator method.
    """
    if isinstance(value, Iterator | AsyncIterator):
        return value
    if inspect.iscoroutine(value):
        value.close()
    raise MethodNotFoundError(
        f"{job.call.client_id}: {job.call.method} is no generator method, it returned a {type(value).__name__}: "
        f"await the call instead of streaming it"
    )


def _sender(job: Job, iterator: Any) -> Callable[[Any], Any]:
    """Return the method of an iterator that sends a value into it.

    Raises:
        TypeError: If it has none.
    """
    send = getattr(iterator, "asend" if isinstance(iterator, AsyncIterator) else "send", None)
    if send is None:
        raise TypeError(
            f"{job.call.method} returned a {type(iterator).__name__}, into which no value can be sent: make it a "
            f"generator method (yield), or read the stream without asend"
        )
    found: Callable[[Any], Any] = send
    return found


async def _close(iterator: Any) -> None:
    """Close an iterator, if it can be closed."""
    if isinstance(iterator, AsyncIterator):
        if close := getattr(iterator, "aclose", None):
            await close()
    elif close := getattr(iterator, "close", None):
        close()
