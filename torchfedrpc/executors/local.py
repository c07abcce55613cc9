"""Local mode: the driver's own process is the host."""

from __future__ import annotations

import asyncio
from typing import Any

from torchfedrpc.executors.base import CallExecutor, ExecutorSpec
from torchfedrpc.host.call import Call
from torchfedrpc.host.learner_host import LearnerHost
from torchfedrpc.host.mailbox import Reply
from torchfedrpc.registry import executor
from torchfedrpc.wire.packing import Packed


@executor("local")
class LocalExecutor(CallExecutor):
    """Runs every learner in this process, on threads of its host."""

    _host: LearnerHost | None = None

    async def open(self, spec: ExecutorSpec) -> None:
        """Make the host."""
        await super().open(spec)
        self._host = spec.make_host()

    async def close(self) -> None:
        """End the host; a sync method that goes on regardless is left to itself after two seconds."""
        if self._host is not None:
            await asyncio.to_thread(self._host.close)
            self._host = None

    def worker_of(self, client_id: str) -> str:
        """Always ``local``."""
        return "local"

    def stats(self) -> dict[str, Any]:
        """Nothing is sent in local mode."""
        hosted = self._host.stats() if self._host is not None else {}
        return {**super().stats(), "workers": {"local": hosted}}

    def _take_value(self, obj: Any) -> Packed:
        return self._opened().take_value(obj)

    def _submit(self, call: Call, reply: Reply) -> None:
        self._opened().submit(call, reply)

    def _advance(self, call: Call, reply: Reply) -> None:
        self._opened().advance(call.call_id, reply)

    def _cancel(self, call: Call) -> None:
        if self._host is not None:
            self._host.cancel(call.call_id)

    def _opened(self) -> LearnerHost:
        if self._host is None:
            raise RuntimeError("this executor is not open: await executor.open(spec) first")
        return self._host
