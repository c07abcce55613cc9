"""Awaiting several things that all have to come to their end."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from torchfedrpc.rpc.all_of import all_of


class Socket:
    """What a step holds as it fails."""


async def test_error_of_all_of_keeps_nothing_that_its_steps_held() -> None:
    held: list[weakref.ref[Socket]] = []

    async def fail() -> None:
        socket = Socket()
        held.append(weakref.ref(socket))
        await asyncio.sleep(0)
        raise ValueError("lost")

    gc.disable()  # a circle would be freed by it, some time
    try:
        failing = asyncio.ensure_future(fail())
        with pytest.raises(ValueError, match="lost"):
            await all_of([asyncio.shield(failing), asyncio.sleep(0)])
        del failing
        await asyncio.sleep(0)
        assert held[0]() is None
    finally:
        gc.enable()


async def test_all_of_waits_for_all_and_raises_the_first_error() -> None:
    ended, failures = asyncio.Event(), []

    async def fail() -> None:
        raise ValueError("lost")

    async def go_on() -> None:
        await ended.wait()

    def let_go() -> None:
        failures.append("let go")
        ended.set()

    with pytest.raises(ValueError, match="lost"):
        await all_of([go_on(), fail()], on_failure=let_go)
    assert failures == ["let go"]
