"""Reduce of a group: its calls, their deadline, and the value of their results."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torchfedrpc.calls import Calls
from torchfedrpc.errors import CallTimeoutError, CapacityError, ConfigError, LearnerBusyError
from torchfedrpc.executors.base import Invocation
from torchfedrpc.options import CallOptions
from torchfedrpc.reduce.driver import Reduction
from torchfedrpc.reduce.tree import MergeError, prototype_of
from torchfedrpc.tasks import begin, within


async def reduce(
    calls: Calls,
    options: CallOptions,
    clients: Mapping[str, Mapping[str, Any]],
    method: str,
    reducer: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, list[str], dict[str, Any]]:
    """Run a method of many learners and reduce the results on their workers.

    Args:
        calls: The calls of the proxy.
        options: Options of the calls.
        clients: Client -> keyword arguments for that client.
        method: The method's name.
        reducer: A reducer, or its class.
        args: Positional arguments.
        kwargs: Keyword arguments.

    Returns:
        The value (None without a result), the clients with a result, and the errors of the other clients: of those
        that failed, or did not end by ``options.timeout_s``.

    Raises:
        TypeError: If the reducer lacks a method.
        SerializationError: If the reducer cannot be sent.
        ValueError: If two results cannot be merged. All calls have ended by then.
        CallTimeoutError: If the results were not merged in time.
    """
    prototype, in_order = prototype_of(reducer), calls.in_order(clients)
    invocations = calls.of_group(options, clients, method, args, kwargs)
    reduction = Reduction(
        prototype,
        in_order,
        calls.router.allow,
        num_retries=options.retries,
        min_results=options.min_results,
        is_watched=options.may_end_early or bool(calls.opening.events.subscribers),
        fastest_first=options.may_end_early,
    )
    try:
        try:
            refused = await _make_calls(calls, options, reduction, invocations, method)
        finally:
            for client_id in reduction.pending:  # after a deadline, a quorum or a cancellation
                reduction.calls[client_id].end(asyncio.CancelledError())
            reduction.close()
        value = await _merge(options, reduction, method) if reduction.nodes else None
    except MergeError as error:
        left, right = (in_order[place] for place in error.places)
        text = f"{method} of {left} and {right}: their results do not go together, {error.reason}"
        raise ValueError(text) from error.reason
    except Exception as error:
        error.add_note(f"as the results of {method} were added up")
        raise
    with_result = set(map(in_order.__getitem__, reduction.counted))
    counted = [client_id for client_id in clients if client_id in with_result]
    failures = refused | reduction.failures
    without = failures.keys() - counted
    return value, counted, {client_id: failures[client_id] for client_id in clients if client_id in without}


async def _make_calls(
    calls: Calls,
    options: CallOptions,
    reduction: Reduction,
    invocations: Sequence[Invocation],
    method: str,
) -> dict[str, BaseException]:
    """Make the calls of a reduction, stop it at its deadline, and wait for its partial results.

    Batches that owe no result and do not end within another ``timeout_s`` are left to end in the background.

    Returns:
        Client -> error of each call that could not be submitted.

    Raises:
        CallTimeoutError: If the partial results did not come within another ``timeout_s`` after the stop.
        BaseException: If a method raised it, and it is no Exception.
    """
    refused: dict[str, BaseException] = {}

    async def run() -> None:
        """Count the calls in the step of the event loop that submits them."""
        submitted, may_refuse = [], calls.may_refuse
        for invocation in invocations:
            try:
                if may_refuse:
                    calls.check(invocation)
            except (LearnerBusyError, CapacityError, ConfigError) as error:
                refused[invocation.client_id] = error
            else:
                reduction.calls[invocation.client_id] = calls.begin_call(invocation)
                submitted.append(invocation)
        await calls.router.reduce(reduction, submitted)

    timeout_s = options.timeout_s
    if timeout_s is None:
        await run()  # a quorum stops it
    else:
        running, done = begin(run()), set[asyncio.Future[None]]()
        try:
            done, _ = await asyncio.wait(
                {running, reduction.stopped}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                reduction.stop({one: calls.late(options, one, method) for one in reduction.pending})
            done, _ = await asyncio.wait({running}, timeout=timeout_s if reduction.stopped.done() else None)
            if done:
                await running
            elif not reduction.is_complete:  # else the others are of no use, such as those of a frozen worker
                where = ", ".join(reduction.waited_for) or "the driver"
                raise _not_merged(options, reduction, method, where)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            del running, done  # which have the error, whose traceback has this frame
    for error in reduction.failures.values():
        if not isinstance(error, Exception):
            raise error
    if reduction.pending and not reduction.stopped.done():
        raise RuntimeError(f"calls of {', '.join(reduction.pending)} have no end, which is an error of torchfedrpc")
    return refused


async def _merge(options: CallOptions, reduction: Reduction, method: str) -> Any:
    """Merge the partial results and return the value, within another ``timeout_s``."""
    late = partial(_not_merged, options, reduction, method, "the driver")
    return await within(options.timeout_s, reduction.finish(), late)


def _not_merged(options: CallOptions, reduction: Reduction, method: str, where: str) -> CallTimeoutError:
    return CallTimeoutError(
        f"{method}: the results of {len(reduction.calls)} clients were not added up on {where} within "
        f"timeout_s={options.timeout_s} of the last call's end: raise it, or see what the reducer does"
    )
