"""The driver's end of a stream: one step for each item asked for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from torchfedrpc.host.answer import answer
from torchfedrpc.host.call import Call, Outcome
from torchfedrpc.host.mailbox import Reply


class CallStream:
    """An open stream over what a learner's generator method yields.

    Args:
        call: what is asked; sent with the first step.
        submit: sends the call.
        advance: asks for the item of that number, from 1.
        cancel: closes the stream at its host.
        result: gives the item of an outcome, or raises what it holds.
        passed: awaited before the call is sent.
    """

    def __init__(
        self,
        call: Call,
        *,
        submit: Callable[[Call, Reply], None],
        advance: Callable[[Call, int, Reply], None],
        cancel: Callable[[Call], None],
        result: Callable[[Outcome, Call], Any],
        passed: Callable[[str], Awaitable[None]],
    ) -> None:
        self._call = call
        self._submit = submit
        self._advance = advance
        self._cancel = cancel
        self._result = result
        self._passed = passed
        self._num_items = 0
        self._sent = self._ended = self._closed = False

    async def step(self) -> Any:
        """The next item.

        Raises:
            StopAsyncIteration: there is none.
            Exception: what the method raised; the stream is over then.
        """
        if self._ended or self._closed:
            raise StopAsyncIteration
        try:
            if not self._num_items:
                await self._passed(self._call.client_id)
                if self._closed:
                    raise StopAsyncIteration
            if self._num_items:
                ask = partial(self._advance, self._call, self._num_items)
            else:
                ask, self._call = partial(self._submit, self._call), self._call.taken()
            self._sent = True
            outcome = await answer(ask, partial(self._cancel, self._call))
        except BaseException:
            self._ended = True
            raise
        self._num_items += 1
        self._ended = outcome.kind != "item"
        if outcome.kind == "end" or self._closed:
            raise StopAsyncIteration
        return self._result(outcome, self._call)

    def close(self) -> None:
        """Close the generator on its host, if it is open; the learner is free once it has ended."""
        if self._sent and not self._ended and not self._closed:
            self._cancel(self._call)
        self._closed = True
