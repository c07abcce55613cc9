"""What a closed proxy leaves: nothing, and without a garbage collection."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch

import torchfedrpc as tfr


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
