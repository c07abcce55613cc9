"""Calls of many clients at once: results as a mapping, as they complete, or a quorum of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import aclosing
from typing import Any

from torchfedrpc.dispatch import Dispatcher
from torchfedrpc.errors import CallTimeoutError, ConfigError, GroupCallError, QuorumError
from torchfedrpc.options import CallOptions


class GroupResult(Mapping[str, Any]):
    """What the clients of a group call returned, in the group's order.

    Attributes:
        failures: client id -> exception, of the clients that failed (with ``on_error="collect"`` or
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


class LearnerGroup:
    """Some clients of a proxy, called together. Any public method of the learners is a method of the group.

    Args:
        dispatcher: sends the calls.
        clients: client id -> keyword arguments of that client's own, merged over the call's.
        options: what holds for the calls.
    """

    def __init__(
        self, dispatcher: Dispatcher, clients: Mapping[str, Mapping[str, Any]], options: CallOptions
    ) -> None:
        for client_id in clients:
            dispatcher.check_client(client_id)
        self._dispatcher = dispatcher
        self._clients = dict(clients)
        self._options = options

    @property
    def client_ids(self) -> tuple[str, ...]:
        """The group's clients, in order."""
        return tuple(self._clients)

    def options(self, **changes: Any) -> LearnerGroup:
        """The same group with other options: ``timeout_s``, ``retries``, ``on_error``, ``min_results``."""
        return LearnerGroup(self._dispatcher, self._clients, self._options.updated(changes))

    def __getattr__(self, method: str) -> Callable[..., Coroutine[Any, Any, GroupResult]]:
        if method.startswith("_"):
            raise AttributeError(method)

        async def call(*args: Any, **kwargs: Any) -> GroupResult:
            return await self.call(method, *args, **kwargs)

        return call

    async def call(self, method: str, /, *args: Any, **kwargs: Any) -> GroupResult:
        """Call a method of every client's learner and gather the results.

        All calls run to their end, also where some fail; with ``min_results=k`` the first k results are enough and
        the calls still under way are cancelled.

        Raises:
            GroupCallError: some clients failed, and neither ``on_error="collect"`` nor ``min_results`` is set.
            QuorumError: fewer than ``min_results`` succeeded, or did within ``timeout_s``.
        """
        results: dict[str, Any] = {}
        failures: dict[str, Exception] = {}
        needed = self._options.min_results
        if needed is not None and needed > len(self._clients):
            raise QuorumError(f"min_results={needed} of a group of {len(self._clients)} clients can never be met")
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
        if needed is not None and len(results) < needed:
            late = any(isinstance(error, CallTimeoutError) for error in failures.values())
            when = f" within {self._options.timeout_s} s" if late else ""
            raise QuorumError(
                f"{method}: {len(results)} of {len(self._clients)} clients succeeded{when}, and min_results={needed} "
                f"were asked for; the error's results and failures hold what arrived",
                results,
                failures,
            )
        if failures and needed is None and self._options.on_error == "raise":
            raise GroupCallError(
                f"{method} failed for {', '.join(failures)}; options(on_error='collect') returns the other "
                f"{len(results)} results all the same",
                failures,
                results,
            )
        return GroupResult(results, failures)

    async def as_completed(self, method: str, /, *args: Any, **kwargs: Any) -> AsyncIterator[tuple[str, Any]]:
        """Call a method of every client's learner and yield ``(client_id, result)`` as each completes.

        An error is raised at its turn and cancels the calls still under way, as leaving the loop does; with
        ``on_error="collect"`` the exception is yielded as the result.

        Raises:
            ConfigError: ``min_results`` is set, which is for `call`: leave the loop when you have enough.
        """
        if self._options.min_results is not None:
            raise ConfigError("min_results is for group.call(...); leave the loop when enough results have come")
        async with aclosing(self._completed(method, args, kwargs)) as completed:
            async for client_id, result, error in completed:
                if error is not None and self._options.on_error == "raise":
                    raise error
                yield client_id, result if error is None else error

    async def _completed(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> AsyncGenerator[tuple[str, Any, Exception | None], None]:
        """Yield (client, result, error) in the order of completion; leaving it cancels the other calls."""
        tasks: dict[asyncio.Future[Any], str] = {
            asyncio.ensure_future(
                self._dispatcher.call(self._options, client_id, method, args, {**kwargs, **own})
            ): client_id
            for client_id, own in self._clients.items()
        }
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
                del task  # it would keep the result
                yield client_id, result, error
                del result, error
        finally:
            unfinished = [task for task in tasks if task.cancel()]
            await asyncio.gather(*unfinished, return_exceptions=True)
