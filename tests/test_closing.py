"""What a closed proxy leaves: nothing, and without a garbage collection."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from typing import Any

import torch

import torchfedrpc as tfr
from torchfedrpc.config import RuntimeConfig
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


async def test_a_host_that_is_closed_hands_over_what_it_has_held() -> None:
    """An outcome may be held while another call waits; that one is cancelled, and no time is left to wait for."""
    host = LearnerHost(LearnerSpec.of(Waiting, 0, RuntimeConfig(execution_mode="local"))[0])
    for client_id in "ab":
        host.register(client_id, pack({}))
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
