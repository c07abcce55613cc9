"""How calls leave the driver: options, deadlines, events, and the streams that are open."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torchfedrpc.errors import CallTimeoutError, ConfigError, LearnerBusyError, UnknownClientError, suggest
from torchfedrpc.executors.base import Invocation
from torchfedrpc.executors.router import ExecutorRouter
from torchfedrpc.executors.stream import CallStream
from torchfedrpc.observe.events import CallEnded, CallStarted, EventBus


@dataclass(frozen=True)
class CallOptions:
    """What holds for calls beside their arguments.

    Attributes:
        timeout_s: seconds for queue, wire and run together; None leaves ``runtime.call_timeout_s``, for the run.
        retries: how often a call is sent again where its method was not begun (its constructor failed, say).
        on_error: of groups: ``raise`` a GroupCallError, or ``collect`` the failures beside the results.
        min_results: of groups: be content with so many results, and cancel the other calls.

    Raises:
        ConfigError: a value is out of range.
    """

    timeout_s: float | None = None
    retries: int = 0
    on_error: str = "raise"
    min_results: int | None = None

    def __post_init__(self) -> None:
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise ConfigError(f"timeout_s must be above 0 seconds, it is {self.timeout_s}")
        if self.retries < 0:
            raise ConfigError(f"retries must not be negative, it is {self.retries}")
        if self.on_error not in ("raise", "collect"):
            raise ConfigError(f"on_error must be 'raise' or 'collect', not {self.on_error!r}")
        if self.min_results is not None and self.min_results < 1:
            raise ConfigError(f"min_results must be at least 1, it is {self.min_results}")

    def updated(self, changes: Mapping[str, Any]) -> CallOptions:
        """These options with some changed.

        Raises:
            ConfigError: no such option.
        """
        for name in changes:
            if name not in CallOptions.__dataclass_fields__:
                raise ConfigError(f"no option {name!r}{suggest(name, CallOptions.__dataclass_fields__)}")
        return replace(self, **changes)


class Dispatcher:
    """Sends the calls of a run, for the proxy and its handles and groups.

    Args:
        router: the executors.
        client_ids: all clients, in order.
        events: whom to tell.
    """

    def __init__(self, router: ExecutorRouter, client_ids: tuple[str, ...], events: EventBus) -> None:
        self.client_ids = client_ids
        self.events = events
        self.is_open = False
        self._known = frozenset(client_ids)
        self._router = router
        self._call_ids = itertools.count(1)
        self.readers: dict[int, tuple[str, asyncio.Task[Any] | None]] = {}  # open stream -> client, reading task
        self._num_calls = self._num_failed = self._num_pending = 0

    def check_client(self, client_id: str) -> None:
        """Refuse an id that is no client's.

        Raises:
            UnknownClientError: so it is.
        """
        if client_id not in self._known:
            raise UnknownClientError(f"no client {client_id!r}{suggest(str(client_id), self.client_ids)}")

    async def call(
        self, options: CallOptions, client_id: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a method of a client's learner.

        Raises:
            UnknownClientError: no such client.
            LearnerBusyError: this very task reads a stream of that learner.
            CallTimeoutError: ``options.timeout_s`` passed.
            Exception: what the method raised.
        """
        invocation = self._invocation(options, client_id, method, args, kwargs)
        if self.readers and (client_id, asyncio.current_task()) in self.readers.values():
            raise LearnerBusyError(
                f"{client_id}.{method} would wait for ever: this task reads a stream of {client_id}, which holds the "
                f"learner. End the loop over the stream first, or close it: await stream.aclose()"
            )
        executor = self._router.get_executor(client_id)
        return await self.observed(options, invocation, executor.execute(invocation))

    def stream(
        self, options: CallOptions, client_id: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> LearnerStream:
        """Open a stream over what a generator method yields; its arguments are taken now."""
        invocation = self._invocation(options, client_id, method, args, kwargs)
        return LearnerStream(self, options, invocation, self._router.get_executor(client_id).stream(invocation))

    def stats(self) -> dict[str, Any]:
        """Numbers of the run so far."""
        return {
            "mode": self._router.mode,
            "calls": self._num_calls,
            "failed_calls": self._num_failed,
            "pending_calls": self._num_pending,
            **self._router.stats(),
        }

    def _invocation(
        self, options: CallOptions, client_id: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Invocation:
        if not self.is_open:
            raise ConfigError("the proxy is not open: use it inside async with LearnerProxy(...) as proxy:")
        self.check_client(client_id)
        run_timeout_s = self._router.config.call_timeout_s if options.timeout_s is None else None
        return Invocation(next(self._call_ids), client_id, method, args, kwargs, run_timeout_s, options.retries)

    async def observed(self, options: CallOptions, invocation: Invocation, answer: Any) -> Any:
        """Await an answer under the options' deadline, and tell subscribers of its start and end."""
        client_id, method = invocation.client_id, invocation.method
        self.events.publish(CallStarted(invocation.call_id, client_id, method))
        began, failure = time.perf_counter(), None
        self._num_calls += 1
        self._num_pending += 1
        try:
            async with asyncio.timeout(options.timeout_s) as deadline:
                return await answer
        except StopAsyncIteration:
            raise
        except BaseException as error:
            failure = error
            if isinstance(error, TimeoutError) and deadline.expired():
                worker = self._router.get_executor(client_id).worker_of(client_id)
                failure = CallTimeoutError(
                    f"{client_id}.{method} on {worker} gave no result within timeout_s={options.timeout_s}: raise "
                    f"it, or see what the learner does"
                )
                raise failure from None
            raise
        finally:
            self._num_pending -= 1
            self._num_failed += failure is not None
            seconds = time.perf_counter() - began
            self.events.publish(CallEnded(invocation.call_id, client_id, method, seconds, failure))


class LearnerStream(AsyncIterator[Any]):
    """Iterates over what a learner's generator method yields; `Dispatcher.stream` makes it.

    Leaving the loop closes the generator on its host, as soon as nothing refers to this object; hold it in a
    variable and you close it yourself (`aclose`, or ``contextlib.aclosing``).
    """

    def __init__(
        self, dispatcher: Dispatcher, options: CallOptions, invocation: Invocation, stream: CallStream
    ) -> None:
        self._dispatcher = dispatcher
        self._options = options
        self._invocation = invocation
        self._stream = stream

    async def __anext__(self) -> Any:
        invocation = self._invocation
        self._dispatcher.readers[invocation.call_id] = (invocation.client_id, asyncio.current_task())
        try:
            return await self._dispatcher.observed(self._options, invocation, self._stream.step())
        except BaseException:
            self._close()
            raise

    async def aclose(self) -> None:
        """Close the generator on its host; the learner's next call runs after that."""
        self._close()

    def _close(self) -> None:
        self._dispatcher.readers.pop(self._invocation.call_id, None)
        self._stream.close()

    def __del__(self) -> None:
        self._close()
