"""Calls of a proxy: checks, deadlines, counts and events."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from torchfedrpc.errors import (
    CallTimeoutError,
    CapacityError,
    ConfigError,
    LearnerBusyError,
    MethodNotFoundError,
    UnknownClientError,
    suggest,
)
from torchfedrpc.events import CallEnded, CallStarted, EventBus
from torchfedrpc.executors.base import Arguments, Invocation
from torchfedrpc.executors.router import ExecutorRouter
from torchfedrpc.host.call_trace import CallTrace
from torchfedrpc.options import CallOptions
from torchfedrpc.tasks import within

T = TypeVar("T")

reading: ContextVar[frozenset[int]] = ContextVar("torchfedrpc_reading", default=frozenset())
"""Numbers of the streams that this task reads. Child tasks inherit them, since awaiting a child blocks the reader."""


@dataclass(eq=False)
class Opening:
    """Counters from one opening of the proxy to the next.

    Attributes:
        events: Publishes the events of this opening; it publishes nothing after the next opening has begun, when a
            call may still end, and an abandoned method may still report progress.
        loop: The event loop in which the proxy was opened; None before that, and after it was closed.
        call_ids: Generates the ids of calls.
        num_changes: Client -> number of calls and restores that have begun, plus those that have ended.
        open_streams: Number of each stream being read -> its client.
        num_calls: Number of calls that have begun.
        num_failed: Number of calls that have failed.
        num_pending: Number of calls that have not ended.
    """

    events: EventBus = field(default_factory=EventBus)
    loop: asyncio.AbstractEventLoop | None = None
    call_ids: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    num_changes: Counter[str] = field(default_factory=Counter)
    open_streams: dict[int, str] = field(default_factory=dict)
    num_calls: int = 0
    num_failed: int = 0
    num_pending: int = 0


class Calls:
    """Calls of a proxy, which the proxy shares with its views, handles, groups and streams.

    Args:
        router: Returns the executor of a client.
        client_ids: All clients, in order.
        are_stateless: Whether the learners are stateless.

    Attributes:
        opening: Counters and events since the proxy was last opened.
    """

    def __init__(self, router: ExecutorRouter, client_ids: tuple[str, ...], *, are_stateless: bool = False) -> None:
        self.client_ids = client_ids
        self._are_stateless = are_stateless
        self.router = router
        self.opening = Opening()
        self._order = {client_id: index for index, client_id in enumerate(client_ids)}

    @property
    def is_stranded(self) -> bool:
        """Whether the event loop in which the proxy was opened is closed."""
        return self.opening.loop is not None and self.opening.loop.is_closed()

    def begin(self) -> None:
        """Begin with new counters, and with a bus to which the subscribers move."""
        self.opening = Opening(self.opening.events.hand_over())

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Accept calls from this event loop."""
        self.opening.loop = loop

    def close(self) -> None:
        """Accept no further calls."""
        self.opening.loop = None

    def check_open(self) -> None:
        """Check that the proxy is open in the running event loop.

        Raises:
            ConfigError: If the proxy is closed, or was opened in another event loop.
        """
        if self.opening.loop is None:
            raise ConfigError("the proxy is not open: use it inside async with LearnerProxy(...) as proxy:")
        if asyncio._get_running_loop() is not self.opening.loop:
            self.check_loop()

    def check_loop(self) -> None:
        """Check that the running event loop, if any, is the loop in which the proxy was opened.

        Raises:
            ConfigError: If it is another loop.
        """
        present, own = asyncio._get_running_loop(), self.opening.loop
        if present is own or present is None or own is None:
            return
        if self.is_stranded:
            raise ConfigError(
                "the proxy was opened in an event loop that is closed, and cannot be used in another one: open and "
                "close it in one loop (one asyncio.run around async with LearnerProxy(...) as proxy:)"
            )
        raise ConfigError(
            "the proxy was opened in another event loop: call it, and close it, from there "
            "(asyncio.run_coroutine_threadsafe), or close it and open it again in this loop"
        )

    def check_client(self, client_id: str) -> None:
        """Check that a client of this id exists.

        Raises:
            UnknownClientError: If there is no such client.
        """
        if not isinstance(client_id, str) or client_id not in self._order:
            raise UnknownClientError(f"no client {client_id!r:.200}{suggest(str(client_id)[:200], self.client_ids)}")

    def check_not_reading(self, client_id: str, method: str) -> None:
        """Check that no stream read by this task, or by the task that started it, holds the learner.

        Raises:
            LearnerBusyError: If such a stream holds the learner.
            ConfigError: If any stream of a stateless learner is open.
        """
        open_streams = self.opening.open_streams
        if self._are_stateless and client_id in open_streams.values():
            raise ConfigError(
                f"{client_id}.{method} is called while a stream of this client is open, which is state, and the "
                f"learner is stateless: read the stream to its end or close it first (await stream.aclose()), or set "
                f"stateless = False"
            )
        if open_streams and any(open_streams.get(stream) == client_id for stream in reading.get()):
            raise LearnerBusyError(
                f"{client_id}.{method} would wait for ever: it is called in the loop over a stream of that client, "
                f"which holds the learner. Call it after the loop, or close the stream first: await stream.aclose()"
            )

    @property
    def may_refuse(self) -> bool:
        """Whether `check` may refuse a call now."""
        return bool(self.opening.open_streams) or self.router.config.max_pending_calls is not None

    def check(self, invocation: Invocation) -> None:
        """Check that a call may be submitted now.

        Raises:
            LearnerBusyError: If this task, or the task that started it, reads a stream of that learner.
            ConfigError: If a stream of the learner is open, which is stateless.
            CapacityError: If ``runtime.max_pending_calls`` calls are pending.
        """
        if self.opening.open_streams:
            self.check_not_reading(invocation.client_id, invocation.method)
        self.check_capacity(invocation.client_id, invocation.method)

    def check_capacity(self, client_id: str, method: str) -> None:
        """Check that one more call, or step of a stream, may be pending.

        Raises:
            CapacityError: If ``runtime.max_pending_calls`` calls are pending.
        """
        limit, num_pending = self.router.config.max_pending_calls, self.opening.num_pending
        if limit is not None and num_pending >= limit:
            raise CapacityError(
                f"{client_id}.{method} was not sent: {num_pending} calls are pending, and "
                f"runtime.max_pending_calls={limit} allows no more; raise it, or await some calls first"
            )

    def call(
        self,
        options: CallOptions,
        client_id: str,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Coroutine[Any, Any, Any]:
        """Return the coroutine that runs a method of a client's learner and returns its result.

        Raises:
            UnknownClientError: If there is no such client.
            LearnerBusyError: If this task, or the task that started it, reads a stream of that learner.
            CapacityError: If ``runtime.max_pending_calls`` calls are pending.
            CallTimeoutError: If ``options.timeout_s`` passed.
            Exception: If the method raised; the type is the same.
        """
        return self.run(options, self.invocation(options, client_id, method, args, kwargs))

    async def run(self, options: CallOptions, invocation: Invocation) -> Any:
        """Run a call and return its result; errors are those of `call`."""
        self.check(invocation)
        executor = self.router.get_executor(invocation.client_id)
        return await self.observed(options, invocation, executor.execute(invocation))

    def in_order(self, client_ids: Iterable[str]) -> list[str]:
        """Return these clients in the order of `client_ids`."""
        return sorted(client_ids, key=self._order.__getitem__)

    def of_group(
        self,
        options: CallOptions,
        clients: Mapping[str, Mapping[str, Any]],
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> list[Invocation]:
        """Return the calls of a group, in the order of submission. Their common arguments are packed once.

        Args:
            options: Options of the calls.
            clients: Client -> keyword arguments for that client, which override the common ones.
            method: The method's name.
            args: Positional arguments.
            kwargs: Keyword arguments.

        Raises:
            ConfigError: If the proxy is closed, was opened in another event loop, or ``method`` is
                ``set_model_weights`` of a stateless learner.
            MethodNotFoundError: If the method's name is no string.
        """
        self.check_open()
        in_order = self.router.plan(self.in_order(clients), method, may_end_early=options.may_end_early)
        common = None
        if (args or kwargs) and len(in_order) > 1:
            with contextlib.suppress(Exception):  # each call meets the error, and names its client
                common = self.router.pack_common(args, kwargs, len(in_order))
                args, kwargs = common.args, common.kwargs
        invocations = []
        for client_id in in_order:
            if own := clients[client_id]:
                invocations.append(self._invocation(options, client_id, method, args, {**kwargs, **own}))
            else:
                invocations.append(self._invocation(options, client_id, method, args, kwargs, common))
        return invocations

    async def apart(self, options: CallOptions, client_id: str, what: str, answer: Coroutine[Any, Any, T]) -> T:
        """Await a request other than a method call, such as a snapshot, under the options' deadline.

        Raises:
            ConfigError: If the proxy is closed, or was opened in another event loop.
            UnknownClientError: If there is no such client.
            LearnerBusyError: If this task, or the task that started it, reads a stream of that learner.
            CallTimeoutError: If ``options.timeout_s`` passed.
        """
        try:
            self.check_open()
            self.check_client(client_id)
            self.check_not_reading(client_id, what)
            return await within(options.timeout_s, answer, partial(self.late, options, client_id, what))
        finally:
            answer.close()

    def late(self, options: CallOptions, client_id: str, method: str) -> CallTimeoutError:
        """Return the error of a call that gave no result by its deadline."""
        worker = self.router.get_executor(client_id).worker_of(client_id)
        return CallTimeoutError(
            f"{client_id}.{method} on {worker} gave no result within timeout_s={options.timeout_s}: raise it, or see "
            f"what the learner does, and the calls before it"
        )

    def stats(self) -> dict[str, Any]:
        """Return the counters since the proxy was opened."""
        return {
            "mode": self.router.mode,
            "calls": self.opening.num_calls,
            "failed_calls": self.opening.num_failed,
            "pending_calls": self.opening.num_pending,
            **self.router.stats(),
        }

    def invocation(
        self,
        options: CallOptions,
        client_id: str,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Invocation:
        """Return a call with the next id.

        Raises:
            ConfigError: If the proxy is closed, or was opened in another event loop; if the method sets the weights
                of a stateless learner.
            UnknownClientError: If there is no such client.
            MethodNotFoundError: If the method's name is no string.
        """
        self.check_open()
        self.check_client(client_id)
        return self._invocation(options, client_id, method, args, kwargs)

    def _invocation(
        self,
        options: CallOptions,
        client_id: str,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        common: Arguments | None = None,
    ) -> Invocation:
        if not isinstance(method, str):
            raise MethodNotFoundError(f"{client_id}: a method is called by its name, not by {method!r}")
        if self._are_stateless and method == "set_model_weights":
            raise ConfigError(
                f"set_model_weights of {client_id}: its learner is stateless, so that no later call would have these "
                f"weights. Give them with each call, for example as an argument of train_epoch, or set stateless = "
                f"False (learner.keep_weights=true of the bundled learner)"
            )
        run_timeout_s = self.router.config.call_timeout_s if options.timeout_s is None else None
        # Plain strings: the guard of RPC refuses numpy's subclasses of str.
        return Invocation(
            next(self.opening.call_ids),
            str(client_id),
            str(method),
            args,
            kwargs,
            run_timeout_s,
            options.retries,
            common,
            CallTrace() if self.opening.events.subscribers else None,
        )

    async def observed(self, options: CallOptions, invocation: Invocation, answer: Any) -> Any:
        """Await the result of a call under the options' deadline, and publish its start and end."""
        observed, failure = self.begin_call(invocation), None
        try:
            if options.timeout_s is None:
                return await answer
            late = partial(self.late, options, invocation.client_id, invocation.method)
            return await within(options.timeout_s, answer, late)
        except StopAsyncIteration:
            raise
        except BaseException as error:
            failure = error
            raise
        finally:
            observed.end(failure)
            failure = None  # breaks a reference cycle: traceback -> this frame -> arguments

    def begin_call(self, invocation: Invocation) -> ObservedCall:
        """Count a call and publish its start."""
        opening = self.opening
        if opening.events.subscribers:
            opening.events.publish(CallStarted(invocation.call_id, invocation.client_id, invocation.method))
        opening.num_calls += 1
        opening.num_pending += 1
        opening.num_changes[invocation.client_id] += 1
        began = time.perf_counter()
        if (trace := invocation.trace) is not None:
            trace.begin(began)
        return ObservedCall(opening, invocation.call_id, invocation.client_id, invocation.method, began, trace=trace)


@dataclass(eq=False, slots=True)
class ObservedCall:
    """Call that was counted.

    Attributes:
        opening: Counts the call, and publishes its end.
        call_id: The id of the call.
        client_id: The client.
        method: The method's name.
        began: Start of the call, by `time.perf_counter`, in seconds.
        has_ended: Whether the end was counted.
        trace: Records its stages, if events are subscribed to.
    """

    opening: Opening
    call_id: int
    client_id: str
    method: str
    began: float
    has_ended: bool = False
    trace: CallTrace | None = None

    def end(self, failure: BaseException | None) -> None:
        """Count the end of the call and publish it; a second call does nothing."""
        if self.has_ended:
            return
        self.has_ended = True
        opening = self.opening
        opening.num_changes[self.client_id] += 1
        opening.num_pending -= 1
        opening.num_failed += failure is not None
        if opening.events.subscribers:
            now, trace = time.perf_counter(), self.trace
            worker, times = (trace.worker, trace.times(now)) if trace is not None else ("", None)
            opening.events.publish(
                CallEnded(self.call_id, self.client_id, self.method, now - self.began, failure, worker, times)
            )
