"""Local mode: the driver's own process is the host."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from torchfedrpc.errors import ConfigError
from torchfedrpc.executors.base import CallExecutor, ExecutorSpec
from torchfedrpc.host.call import Call
from torchfedrpc.host.faults import Fault
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

    def workers(self) -> list[str]:
        """This process alone."""
        return ["local"]

    async def arm(self, faults: Mapping[str, Sequence[Fault]]) -> None:
        """Let calls here be slow, for a test.

        Raises:
            ConfigError: a fault would strike the driver itself.
        """
        for label, of_label in faults.items():
            for fault in of_label:
                if fault.kind != "slow":
                    raise ConfigError(
                        f"{fault.kind} of {label!r} would strike the driver itself, whose process has these "
                        f"learners: only slow makes sense in local mode. Use worker processes "
                        f"(execution_mode=pseudo), or strike the driver at a round"
                    )
            self._opened().arm(of_label, sever=lambda: None)

    def stats(self) -> dict[str, Any]:
        """Nothing is sent in local mode."""
        hosted = self._host.stats() if self._host is not None else {}
        return {**super().stats(), "workers": {"local": hosted}}

    def _take_value(self, obj: Any) -> Packed:
        return self._opened().take_value(obj)

    def _submit(self, call: Call, reply: Reply) -> None:
        self._opened().submit(call, reply)

    def _advance(self, call: Call, step: int, reply: Reply) -> None:
        self._opened().advance(call.call_id, step, reply)

    def _cancel(self, call: Call) -> None:
        if self._host is not None:
            self._host.cancel(call.call_id)

    def _opened(self) -> LearnerHost:
        if self._host is None:
            raise RuntimeError("this executor is not open: await executor.open(spec) first")
        return self._host
