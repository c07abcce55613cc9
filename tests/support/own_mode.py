"""A user's own execution mode, ``counting``, which runs learners in this process without reductions or streams."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

import torchfedrpc as tfr


@tfr.executor("counting")
class CountingExecutor(tfr.AbstractExecutor):
    """Runs learners here and counts the calls.

    Attributes:
        log: ``open``, ``close``, and the methods that were called.
    """

    log: ClassVar[list[str]] = []

    async def open(self, spec: tfr.ExecutorSpec) -> None:
        """Open."""
        self.log[:] = ["open"]
        self.host = spec.make_host()

    async def close(self) -> None:
        """Close."""
        self.log.append("close")
        await asyncio.to_thread(self.host.close)

    async def execute_method(self, client_id: str, method_name: str, /, *args: Any, **kwargs: Any) -> Any:
        """Call a method."""
        self.log.append(method_name)
        return await self.host.execute_method(client_id, method_name, *args, **kwargs)
