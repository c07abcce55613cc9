"""Awaiting the steps of several members of a world."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from torchfedrpc.rpc.world import all_of


class Socket:
    """An object that a step holds as it fails."""


async def test_error_of_all_of_keeps_nothing_that_its_steps_held() -> None:
    held: list[weakref.ref[Socket]] = []

    async def fail() -> None:
        socket = Socket()
        held.append(weakref.ref(socket))
        await asyncio.sleep(0)
        raise ValueError("lost")

    gc.disable()  # it would free a reference cycle at some time
    try:
        with pytest.raises(ValueError, match="lost"):
            await all_of(fail(), asyncio.sleep(0))
        await asyncio.sleep(0)
        assert held[0]() is None
    finally:
        gc.enable()


async def test_all_of_returns_the_results_in_order() -> None:
    assert await all_of(asyncio.sleep(0.01, "first"), asyncio.sleep(0, "second")) == ["first", "second"]
    assert await all_of() == []


async def test_all_of_cancels_the_others_and_raises_the_first_error() -> None:
    ended = []

    async def fail() -> None:
        raise ValueError("lost")

    async def go_on() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("the other")

    with pytest.raises(ValueError, match="lost"):
        await all_of(go_on(), fail())
    assert ended == ["the other"]
