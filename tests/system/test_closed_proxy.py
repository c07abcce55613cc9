"""What a closed proxy leaves: nothing, and without a garbage collection."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Latch, Seen

import torchfedrpc as tfr
from torchfedrpc.config import RuntimeConfig
from torchfedrpc.host.call import Registration
from torchfedrpc.host.learner_host import LearnerHost
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.wire.packing import pack


class Keeping:
    """Keeps what it is given."""

    alive: weakref.WeakSet[Keeping] = weakref.WeakSet()

    def __init__(self, client_id: str) -> None:
        self.kept: Any = None
        self.alive.add(self)

    def keep(self, weights: torch.Tensor) -> None:
        self.kept = weights


async def test_the_drivers_own_learners_are_freed_as_their_proxy_is_closed() -> None:
    gc.collect()
    gc.disable()
    try:
        async with tfr.LearnerProxy(Keeping, ["a", "b"], runtime="local") as proxy:
            await proxy.clients().call("keep", torch.ones(1 << 20))
            assert len(Keeping.alive) == 2
        assert not Keeping.alive
    finally:
        gc.enable()


class Waiting:
    """Waits until it is cancelled, or does nothing."""

    def __init__(self, client_id: str) -> None:
        """Nothing."""

    def wait(self, until_cancelled: bool) -> int:
        while until_cancelled and not tfr.current_call().cancelled:
            time.sleep(0.001)
        return 1


async def test_a_host_that_is_closed_cancels_the_calls_that_run() -> None:
    host = LearnerHost(LearnerSpec.of(Waiting, 0, RuntimeConfig(execution_mode="local"))[0])
    for client_id in "ab":
        host.register(Registration(client_id, pack({})))
    first = asyncio.ensure_future(host.execute_method("a", "wait", False))
    second = asyncio.ensure_future(host.execute_method("b", "wait", True))
    await asyncio.sleep(0)
    while host.stats()["pending_calls"] > 1:
        await asyncio.sleep(0)
    assert await asyncio.to_thread(host.close)
    async with asyncio.timeout(10):
        assert await first == 1
        await asyncio.wait([second])
    assert isinstance(second.exception(), tfr.WorkerLostError)


async def test_freeze_of_the_users_own_outlasts_a_proxy() -> None:
    gc.freeze()
    try:
        num_frozen = gc.get_freeze_count()
        async with tfr.LearnerProxy(Keeping, ["a"], runtime="local") as proxy:
            await proxy.custom_method("a", "keep", torch.ones(1))
        assert gc.get_freeze_count() > num_frozen // 2
    finally:
        gc.unfreeze()


class Lingering:
    """A learner whose method goes on after its call was given up."""

    def __init__(self, client_id: str) -> None:
        pass

    def linger(self, until: str) -> None:
        tfr.current_call().report("holding")
        while not Path(until).exists():
            time.sleep(0.001)
        tfr.current_call().report("late")
        Path(until + ".reported").touch()


async def test_method_left_behind_by_an_earlier_session_publishes_no_event_in_the_next(latch: Latch) -> None:
    proxy, seen = tfr.LearnerProxy(Lingering, ["a"], runtime="local"), Seen()
    proxy.subscribe(seen)
    async with proxy:
        call = asyncio.ensure_future(proxy.custom_method("a", "linger", latch.path))
        await seen.reported("a")
    with pytest.raises(tfr.WorkerLostError):
        await call
    async with asyncio.timeout(20), proxy:
        seen.events.clear()
        latch.open()
        while not Path(latch.path + ".reported").exists():
            await asyncio.sleep(0.001)
        await asyncio.sleep(0)
        assert seen.progress("a") == []
