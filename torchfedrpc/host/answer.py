"""From a callback on some thread to an awaited outcome."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from torchfedrpc.host.call import Outcome
from torchfedrpc.host.mailbox import Reply


async def answer(send: Callable[[Reply], None], cancel: Callable[[], None]) -> Outcome:
    """Send something that takes a reply callback, and await the reply.

    Args:
        send: called at once, with the callback; the callback may come on any thread.
        cancel: called if the awaiting task is cancelled meanwhile.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Outcome] = loop.create_future()

    def settle(outcome: Outcome) -> None:
        if not future.done():
            future.set_result(outcome)

    def reply(outcome: Outcome) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody waits any more
            loop.call_soon_threadsafe(settle, outcome)

    send(reply)
    try:
        return await future
    except asyncio.CancelledError:
        cancel()
        raise
