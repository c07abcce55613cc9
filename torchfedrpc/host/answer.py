"""From a callback on any thread to an awaited outcome."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any

from torchfedrpc.host.call import Outcome
from torchfedrpc.host.mailbox import Reply


def call_on(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: Any) -> None:
    """Call a function on an event loop, from any thread. Ignored if the loop is closed."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *args)


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
