"""Calls of many clients at once: gathered, in order of completion, with a quorum, or reduced."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Never

from torchfedrpc import group_reduce
from torchfedrpc.calls import Calls
from torchfedrpc.errors import CallTimeoutError, ConfigError, GroupCallError, QuorumError
from torchfedrpc.host.methods import public_methods
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.options import UNCHANGED, CallOptions, OnError, Unchanged


class GroupResult(Mapping[str, Any]):
    """Mapping of client id to result of a group call, in the group's order.

    Attributes:
        failures: Client id -> exception of the clients that failed (with ``on_error="collect"`` or
            ``min_results``).
    """

    def __init__(self, results: Mapping[str, Any], failures: Mapping[str, Exception]) -> None:
        self._results = dict(results)
        self.failures = dict(failures)

    def __getitem__(self, client_id: str) -> Any:
        return self._results[client_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._results)

    def __len__(self) -> int:
        return len(self._results)

    def __repr__(self) -> str:
        return f"GroupResult({self._results!r}, failures={self.failures!r})"


@dataclass(frozen=True, eq=False)
class ReduceResult:
    """Result of `LearnerGroup.reduce`.

    Attributes:
        value: The result of the reducer's ``finish``.
        count: Number of clients with a result in ``value``.
        failures: Client id -> exception of the clients that failed (with ``on_error="collect"`` or
            ``min_results``).
    """

    value: Any
    count: int
    failures: dict[str, Exception] = field(default_factory=dict)


class LearnerGroup:
    """Clients of a proxy that are called together. Every public method of the learners is a method of the group.

    ``len(group)`` is the number of clients. Iteration yields their ids, in the group's order.

    Args:
        calls: The proxy's calls.
        clients: Client id -> keyword arguments for that client, which override those of the call.
        options: Options of the calls.
        learner: Provides the learner's class, for tab completion.
    """

    def __init__(
        self,
        calls: Calls,
        clients: Mapping[str, Mapping[str, Any]],
        options: CallOptions,
        learner: LearnerSpec,
    ) -> None:
        for client_id in clients:
            calls.check_client(client_id)
        self._calls = calls
        self._clients = dict(clients)
        self._options = options
        self._learner = learner

    def __len__(self) -> int:
        return len(self._clients)

    def __repr__(self) -> str:
        return f"LearnerGroup({len(self)} clients)"

    def __iter__(self) -> Iterator[str]:
        return iter(self._clients)

    def __dir__(self) -> Iterable[str]:
        return [*super().__dir__(), *public_methods(self._learner.load())]

    @property
    def client_ids(self) -> tuple[str, ...]:
        """The ids of the group's clients, in order."""
        return tuple(self._clients)

    def options(
        self,
        *,
        timeout_s: float | Unchanged | None = UNCHANGED,
        retries: int | Unchanged = UNCHANGED,
        on_error: OnError | Unchanged = UNCHANGED,
        min_results: int | Unchanged | None = UNCHANGED,
        **unknown: Never,
    ) -> LearnerGroup:
        """Return a group of the same clients with changed options. Omitted options keep their value.

        Args:
            timeout_s: seconds for queue, transfer and run of each call together, above 0. None: No such deadline;
                ``runtime.call_timeout_s`` limits the run.
            retries: Number of times a call is sent again if its method has not begun, for example because the
                learner's constructor failed. At least 0.
            on_error: ``raise`` raises a GroupCallError if clients fail; ``collect`` stores their exceptions in
                ``failures``.
            min_results: Return after this number of clients has succeeded, at least 1, and cancel the other calls.
                None: Wait for all clients.
            **unknown: Refused; the error names the nearest option.

        Raises:
            ConfigError: If an option is unknown, or a value has the wrong type or is out of range.
        """
        changes = {"timeout_s": timeout_s, "retries": retries, "on_error": on_error, "min_results": min_results}
        return LearnerGroup(self._calls, self._clients, self._options.updated({**changes, **unknown}), self._learner)

    def __getattr__(self, method: str) -> Callable[..., Coroutine[Any, Any, GroupResult]]:
        if method.startswith("_"):
            raise AttributeError(method)

        async def call(*args: Any, **kwargs: Any) -> GroupResult:
            return await self.call(method, *args, **kwargs)

        return call

    async def call(self, method: str, /, *args: Any, **kwargs: Any) -> GroupResult:
        """Call a method of every client's learner and gather the results.

        All calls run to their end, even if some fail. With ``min_results=k`` the group call returns after k results
        and cancels the pending calls.

        Raises:
            GroupCallError: If clients failed, and neither ``on_error="collect"`` nor ``min_results`` is set.
            QuorumError: If fewer than ``min_results`` clients succeeded, within ``timeout_s`` if that is set.
        """
        results: dict[str, Any] = {}
        failures: dict[str, Exception] = {}
        needed = self._options.min_results
        self._check_min_results()
        async with aclosing(self._completed(method, args, kwargs)) as completed:
            async for client_id, result, error in completed:
                if error is None:
                    results[client_id] = result
                else:
                    failures[client_id] = error
                out_of_reach = needed is not None and len(self._clients) - len(failures) < needed
                if len(results) == needed or out_of_reach:
                    break
        results = {client_id: results[client_id] for client_id in self._clients if client_id in results}
        failures = {client_id: failures[client_id] for client_id in self._clients if client_id in failures}
        self._check(method, results, failures)
        return GroupResult(results, failures)

    async def reduce(self, method: str, reducer: Any, /, *args: Any, **kwargs: Any) -> ReduceResult:
        """Call a method of every client's learner and reduce the results on the workers.

        The workers compute partial results, so the bytes that the driver receives grow with the number of workers,
        not of clients. Results are merged in a fixed binary tree over the clients in the order of
        ``proxy.client_ids``: the value has the same bits in every mode and with any number of workers.

        All calls run to their end, as in `call`, even if their results cannot be merged.

        Args:
            method: The method's name.
            reducer: `WeightedMean`, `Mean`, `Sum`, or a picklable object (or a class) with ``add(result)``,
                ``merge(other)`` and ``finish()``. ``add`` receives a learner's result by value.
            *args: Positional arguments for the method.
            **kwargs: Keyword arguments for the method.

        Raises:
            TypeError: If the reducer lacks a method.
            ValueError: If the results of two clients cannot be merged.
            ConfigError: If the group has no clients.
            UntrustedTypeError: If the allow-list does not cover the reducer's type.
            GroupCallError: As in `call`, and if all clients failed. Its ``results`` map clients to None.
            QuorumError: As in `call`.
            CallTimeoutError: If the results were not merged in time.
        """
        self._check_min_results()
        value, counted, failures = await group_reduce.reduce(
            self._calls, self._options, self._clients, method, reducer, args, kwargs
        )
        results = dict.fromkeys(counted)
        self._check(method, results, failures)
        if not counted:
            if failures:
                raise self._group_error(method, {}, failures)
            raise ConfigError(f"{method}: there is nothing to reduce, since the group has no clients: name some")
        return ReduceResult(value, len(counted), failures)

    def _check_min_results(self) -> None:
        """Check that the quorum is no larger than the group.

        Raises:
            QuorumError: If ``min_results`` exceeds the number of clients.
        """
        needed = self._options.min_results
        if needed is not None and needed > len(self._clients):
            raise QuorumError(f"min_results={needed} of a group of {len(self._clients)} clients can never be met")

    def _check(self, method: str, results: dict[str, Any], failures: dict[str, Exception]) -> None:
        """Check that enough clients have succeeded.

        Raises:
            QuorumError: If fewer than ``min_results`` have.
            GroupCallError: If some have failed, and neither ``on_error="collect"`` nor ``min_results`` is set.
        """
        needed = self._options.min_results
        if needed is None:
            if failures and self._options.on_error == "raise":
                raise self._group_error(method, results, failures)
        elif len(results) < needed:
            late = any(isinstance(error, CallTimeoutError) for error in failures.values())
            when = f" within {self._options.timeout_s} s" if late else ""
            raise QuorumError(
                f"{method}: {len(results)} of {len(self._clients)} clients succeeded{when}, and min_results={needed} "
                f"were asked for; the error's results and failures hold what arrived",
                results,
                failures,
            )

    def _group_error(self, method: str, results: dict[str, Any], failures: dict[str, Exception]) -> GroupCallError:
        first = next(iter(failures.values()))
        others = f"; options(on_error='collect') returns the other {len(results)} results" if results else ""
        return GroupCallError(
            f"{method} failed for {', '.join(failures)}, first with {type(first).__name__}: {first}{others}",
            failures,
            results,
        )

    async def as_completed(self, method: str, /, *args: Any, **kwargs: Any) -> AsyncIterator[tuple[str, Any]]:
        """Call a method of every client's learner and yield ``(client_id, result)`` in order of completion.

        The first failure is raised when its call completes, and cancels the pending calls. Leaving the loop cancels
        them as well. The execution mode decides which of them have run by then. With ``on_error="collect"`` the
        exception is yielded as the result; `call` runs all calls to their end.

        Raises:
            ConfigError: If ``min_results`` is set, an option of `call`. Leave the loop after enough results instead.
        """
        if self._options.min_results is not None:
            raise ConfigError("min_results is for group.call(...); leave the loop when enough results have come")
        async with aclosing(self._completed(method, args, kwargs)) as completed:
            async for client_id, result, error in completed:
                if error is not None and self._options.on_error == "raise":
                    raise error
                yield client_id, result if error is None else error

    async def _completed(
        self,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> AsyncGenerator[tuple[str, Any, Exception | None], None]:
        """Yield (client, result, error) in order of completion. Closing the generator cancels the pending calls."""
        tasks: dict[asyncio.Future[Any], str] = {}
        for invocation in self._calls.of_group(self._options, self._clients, method, args, kwargs):
            call = self._calls.run(self._options, invocation)
            tasks[asyncio.ensure_future(call)] = invocation.client_id
        ended: asyncio.Queue[asyncio.Future[Any]] = asyncio.Queue()
        for task in tasks:
            task.add_done_callback(ended.put_nowait)
        try:
            while tasks:
                task = await ended.get()
                client_id, error = tasks.pop(task), task.exception()
                if error is not None and not isinstance(error, Exception):
                    raise error
                result = None if error else task.result()
                del task  # a finished task refers to its result
                yield client_id, result, error
                del result, error
        finally:
            unfinished = [task for task in tasks if task.cancel()]
            await asyncio.gather(*unfinished, return_exceptions=True)
