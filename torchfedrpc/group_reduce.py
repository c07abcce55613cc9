"""Reduce of a group: its calls under a deadline and a quorum, and the partial results of their workers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

from torchfedrpc.calls import Calls, ObservedCall
from torchfedrpc.errors import CallTimeoutError, CapacityError, LearnerBusyError
from torchfedrpc.options import CallOptions
from torchfedrpc.reduce.driver import ReduceProgress, Reduction
from torchfedrpc.reduce.reducers import Reducer, is_builtin


def reduction_of(calls: Calls, prototype: Reducer, client_ids: Iterable[str]) -> Reduction:
    """Return a reduction that merges the results of clients in the order of the proxy's clients.

    Raises:
        SerializationError: If the reducer cannot be sent.
    """
    calls.check_open()
    reduction = Reduction(prototype, calls.in_order(client_ids))
    if not is_builtin(prototype):
        reduction.prototype.copy().open(calls.router.allow)  # else only the workers refuse it, after the calls
    return reduction


async def reduce(
    calls: Calls,
    options: CallOptions,
    reduction: Reduction,
    method: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, dict[str, Any]],
) -> tuple[ReduceProgress, dict[str, Exception]]:
    """Run a method of many learners and reduce the results on their workers.

    Args:
        calls: The proxy's calls.
        options: Options of the calls.
        reduction: The clients and the reducer.
        method: The method's name.
        args: Positional arguments.
        kwargs: Client -> keyword arguments.

    Returns:
        The partial results, and the errors of clients that failed or did not end by ``options.timeout_s``.

    Raises:
        MergeError: If two results cannot be merged. All calls have ended by then.
        CallTimeoutError: If the results were not merged in time.
    """
    is_awaited = options.timeout_s is not None or options.min_results is not None
    progress = ReduceProgress(is_watched=is_awaited or bool(calls.events.subscribers))
    failures: dict[str, Exception] = {}
    observed: dict[str, ObservedCall] = {}
    invocations = []
    for client_id in calls.plan(reduction.client_ids, method, is_awaited=is_awaited):
        invocation = calls.invocation(options, client_id, method, args, kwargs[client_id])
        try:
            calls.check_not_reading(client_id, method)
            calls.check_capacity(client_id, method)
        except (LearnerBusyError, CapacityError) as error:
            failures[client_id] = error
            continue
        invocations.append(invocation)

    async def run() -> None:
        """Count the calls in the step of the event loop that submits them."""
        observed.update((one.client_id, calls.begin_call(one)) for one in invocations)
        await calls.router.reduce(reduction, invocations, progress)

    running = asyncio.ensure_future(run())
    try:
        failures |= await _watched(calls, options, method, progress, running, observed)
        return progress, failures
    finally:
        for one in observed.values():  # still pending after a deadline, a quorum or a cancellation
            calls.end_call(one, asyncio.CancelledError())
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def _watched(
    calls: Calls,
    options: CallOptions,
    method: str,
    progress: ReduceProgress,
    running: asyncio.Future[None],
    observed: Mapping[str, ObservedCall],
) -> dict[str, Exception]:
    """Follow a reduction, stop it at its deadline or quorum, and wait for its partial results.

    Returns:
        The errors of clients that failed or did not end in time.
    """
    failures: dict[str, Exception] = {}
    fatal: BaseException | None = None  # raised by a method, and no Exception
    loop, timeout_s = asyncio.get_running_loop(), options.timeout_s
    deadline = loop.time() + timeout_s if timeout_s is not None else None
    while progress.ended or not running.done():
        while progress.ended:
            client_id, error = progress.ended.popleft()
            if progress.stopped.is_set() and error is not None:
                continue
            calls.end_call(observed[client_id], error)
            failures.pop(client_id, None)
            if isinstance(error, Exception):
                failures[client_id] = error
            elif error is not None:
                fatal = fatal or error
        needed = options.min_results
        is_settled = needed is not None and (
            len(progress.succeeded) >= needed or (observed and len(observed) - len(failures) < needed)
        )
        if is_settled and not progress.stopped.is_set():
            progress.stop()
            deadline = loop.time() + timeout_s if timeout_s is not None else None
        progress.has_ended.clear()
        has_ended = asyncio.ensure_future(progress.has_ended.wait())
        waiting: set[asyncio.Future[Any]] = {running, has_ended}
        remaining_s = None if deadline is None else max(deadline - loop.time(), 0.0)
        try:
            done, _ = await asyncio.wait(waiting, timeout=remaining_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            has_ended.cancel()
        if done:
            continue
        if progress.stopped.is_set():
            where = ", ".join(progress.waited_for) or "the driver"
            raise CallTimeoutError(
                f"{method}: the results of {len(observed)} clients were not added up on {where} within "
                f"timeout_s={timeout_s} of the last call's end: raise it, or see what the reducer does"
            )
        for client_id, one in observed.items():
            if client_id not in progress.succeeded and client_id not in failures:
                failures[client_id] = calls.late(options, client_id, method)
                calls.end_call(one, failures[client_id])
        progress.stop()
        deadline = loop.time() + timeout_s if timeout_s is not None else None
    try:
        running.result()
        if fatal is not None:
            raise fatal
    finally:
        del fatal  # its traceback refers to this frame
    return {one: error for one, error in failures.items() if one not in progress.succeeded}
