"""Local mode: the driver's own process is the host."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import CallTimeoutError, ConfigError
from torchfedrpc.executors.base import CallExecutor, ExecutorSpec
from torchfedrpc.executors.reduction import Collecting, Reduction
from torchfedrpc.host.answer import answer
from torchfedrpc.host.call import Call, Outcome
from torchfedrpc.host.faults import Fault
from torchfedrpc.host.learner_host import LearnerHost
from torchfedrpc.host.mailbox import Reply
from torchfedrpc.reduce.tree import Node
from torchfedrpc.registry import executor
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.packing import Packed, Reference, SentApart, pack
from torchfedrpc.wire.shared import shared_values


@executor("local")
class LocalExecutor(CallExecutor):
    """Runs every learner in this process, on threads of its host."""

    _host: LearnerHost | None = None

    def __init__(self, config: RuntimeConfig | None = None) -> None:
        super().__init__(config)
        self._unsubmitted: list[tuple[Call, Reply]] = []  # of this tick, whose calls may have more in common

    async def open(self, spec: ExecutorSpec) -> None:
        """Make the host."""
        await super().open(spec)
        self._host = spec.make_host()

    async def close(self) -> None:
        """End the host; a sync method that goes on regardless is left to itself after two seconds."""
        self._sharing.close()
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
        hosted = {"local": {"learners": self._host.stats()["learners"]}} if self._host is not None else {}
        return {**super().stats(), "workers": hosted}

    def _take_value(self, obj: Any) -> Packed:
        return self._opened().take_value(obj)

    def reduction(self, reduction: Reduction) -> Collecting:
        """Have results added up in the host."""
        return LocalCollecting(self._opened(), reduction, self._own_call_id(), self.allow, self.config.call_timeout_s)

    def _take_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Packed:
        if self.config.isolation != "none":
            return super()._take_arguments(args, kwargs)

        def opened(arg: Any) -> Any:
            return arg.open(self.allow) if isinstance(arg, SentApart) else arg

        return Reference((tuple(map(opened, args)), {name: opened(arg) for name, arg in kwargs.items()}))

    def _submit(self, call: Call, reply: Reply) -> None:
        if not self._unsubmitted and not _is_for_tick(call):
            self._opened().submit(call, reply)
            return
        if not self._unsubmitted:
            asyncio.get_running_loop().call_soon(self._submit_tick)
        self._unsubmitted.append((call, reply))

    def _submit_tick(self) -> None:
        unsubmitted, self._unsubmitted = self._unsubmitted, []
        if self._host is not None:
            for call, reply in unsubmitted:
                try:
                    self._host.submit(call, reply)
                except Exception as error:  # the loop has called this, and the call's caller is to hear of it
                    reply(Outcome("failed", error=_without_traces(error), never_ran=True))

    def _advance(self, call: Call, step: int, reply: Reply) -> None:
        self._opened().advance(call.call_id, step, reply)

    def _cancel(self, call: Call) -> None:
        self._unsubmitted = [(other, reply) for other, reply in self._unsubmitted if other is not call]
        if self._host is not None:
            self._host.cancel(call.call_id, partial(self._note_duration, call))

    def _opened(self) -> LearnerHost:
        if self._host is None:
            raise RuntimeError("this executor is not open: await executor.open(spec) first")
        return self._host


class LocalCollecting(Collecting):
    """A reduction, or what the driver's own host has of it.

    Args:
        host: the host.
        reduction: the reduction.
        call_id: of the request for partial results.
        allow: the types that may travel.
        timeout_s: seconds that merging may take; None for no limit.
    """

    def __init__(
        self, host: LearnerHost, reduction: Reduction, call_id: int, allow: AllowList, timeout_s: float | None
    ) -> None:
        self._timeout_s = timeout_s
        self._host = host
        self._number = reduction.number
        self._call_id = call_id
        self._allow = allow
        host.begin_reduction(self._number, reduction.prototype, len(reduction.places), None)

    async def collect(self, skipped: Sequence[int]) -> tuple[list[Node], dict[str, Exception]]:
        """The host's partial results."""
        call = Call(self._call_id, "local", "reduce", pack((self._number, [*skipped])), kind="collect")
        try:
            async with asyncio.timeout(self._timeout_s):
                outcome = await answer(partial(self._host.submit, call), lambda: None)
        except TimeoutError:
            raise CallTimeoutError(
                f"the partial results of a reduction took longer than {self._timeout_s} s: see what the reducer "
                f"does, or raise runtime.call_timeout_s"
            ) from None
        return outcome.result(call, self._allow, "local"), {}

    def close(self) -> None:
        """Let the host forget it."""
        self._host.end_reduction(self._number)


def _without_traces(error: Exception) -> Exception:
    """An error whose tracebacks would have the frame that replies with it: a circle that would keep the call."""
    part: BaseException | None = error
    while part is not None:
        part = part.with_traceback(None).__context__
    return error


def _is_for_tick(call: Call) -> bool:
    """Whether its arguments refer to what other calls of this tick may refer to: it is opened once that is known."""
    return any(value.is_for_tick for value in shared_values(call.arguments))
