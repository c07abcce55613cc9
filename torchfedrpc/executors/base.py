"""The contract of executors, each of which is one way for calls to reach learners."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError, SerializationError
from torchfedrpc.events import Event, ProgressReported
from torchfedrpc.executors.consistent_snapshot import Cut
from torchfedrpc.executors.shared_arguments import SharedRef
from torchfedrpc.executors.stream import CallStream
from torchfedrpc.host.answer import call_on
from torchfedrpc.host.call import Call
from torchfedrpc.host.faults import Fault
from torchfedrpc.host.learner_host import LearnerHost
from torchfedrpc.host.process import choose_device
from torchfedrpc.host.runner import Report
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.reduce.driver import Gathering, ReduceProgress, Reduction
from torchfedrpc.wire.packing import Packed, Reference, pack

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExecutorSpec:
    """The run that an executor is opened for.

    Attributes:
        learner: How to make learners, and the run's configuration.
        clients: Client id -> keyword arguments of its learner's constructor, in the run's order.
        publish: Publishes an event to the run's subscribers; called on the driver's event loop.
    """

    learner: LearnerSpec
    clients: Mapping[str, Mapping[str, Any]]
    publish: Callable[[Event], None]

    def make_host(self) -> LearnerHost:
        """Return a host for these clients in this process. Call it in ``open``, and close the host in ``close``.

        Raises:
            ConfigError: If the learner's class cannot be found.
        """
        return LearnerHost(
            self.learner,
            device=choose_device(0),
            report=self.reporter(),
            constructor_arguments=self.constructor_arguments,
        )

    def reporter(self) -> Report:
        """Return a function that publishes progress on the present event loop, to be called on any thread."""
        loop = asyncio.get_running_loop()

        def report(call: Call, number: int, progress: Packed) -> None:
            call_on(loop, self.publish_progress, call, progress)

        return report

    def publish_progress(self, call: Call, progress: Packed) -> None:
        """Publish the progress that a method reports; called on the driver's event loop."""
        try:
            value = progress.open(self.learner.allow_list())
        except Exception:  # outcomes follow it, and must not be lost with it
            logger.exception("the progress of %s.%s cannot be read", call.client_id, call.method)
            return
        self.publish(ProgressReported(call.call_id, call.client_id, call.method, value))

    def constructor_arguments(self, client_id: str, *, by_value: bool = True) -> Packed:
        """Return the keyword arguments of a learner's constructor, as they are now.

        Raises:
            SerializationError: If they cannot be sent.
        """
        kwargs = self.clients[client_id]
        try:
            return pack(kwargs) if by_value else Reference(kwargs)
        except SerializationError as error:
            raise type(error)(f"the constructor arguments of {client_id} cannot be sent: {error}") from error


@dataclass(frozen=True, slots=True)
class Invocation:
    """A call as the proxy hands it to an executor.

    Attributes:
        call_id: Unique in a run.
        client_id: The client.
        method: The method's name.
        args: Its positional arguments, the caller's own objects.
        kwargs: Its keyword arguments, likewise.
        run_timeout_s: Seconds the method may run; None for no limit.
        retries: Number of times to send the call again if the method was not begun.
    """

    call_id: int
    client_id: str
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    run_timeout_s: float | None = None
    retries: int = 0


class AbstractExecutor(ABC):
    """One way for calls to reach learners.

    A mode of your own overrides `execute_method`, `open` and `close`, and is registered with
    ``@tfr.executor("name")``; ``execution_mode: name`` then selects it. An executor is opened once: each opening of a
    proxy makes another one.

    Args:
        config: The run's configuration.

    Attributes:
        ends_early: Reason why the run is interrupted, set before `close`; empty if it ends well.
    """

    ends_early = ""

    def __init__(self, config: RuntimeConfig | None = None) -> None:
        self.config = config or RuntimeConfig()

    async def open(self, spec: ExecutorSpec) -> None:  # noqa: B027 (not every mode needs it)
        """Prepare for calls. ``spec.make_host()`` gives a host for learners in this process."""

    async def close(self) -> None:  # noqa: B027
        """Release everything. No call is pending."""

    @abstractmethod
    async def execute_method(self, client_id: str, method_name: str, /, *args: Any, **kwargs: Any) -> Any:
        """Run a learner's method. Returns its result, or raises its exception."""

    async def execute(self, invocation: Invocation) -> Any:
        """Run a call with all that the proxy knows of it. By default only method and arguments are used."""
        return await self.execute_method(
            invocation.client_id, invocation.method, *invocation.args, **invocation.kwargs
        )

    def stream(self, invocation: Invocation) -> CallStream:
        """Open a stream over the items of a generator method.

        Raises:
            ConfigError: If the mode has no streams.
        """
        raise ConfigError(f"{type(self).__name__} has no streams: override its stream(), or await a list instead")

    async def snapshot(self, client_id: str) -> bytes:
        """Return the state of a client's learner between two calls, as bytes for `restore`.

        Raises:
            ConfigError: If the mode has no snapshots.
            SnapshotError: If the state cannot be captured.
        """
        raise ConfigError(f"{type(self).__name__} has no snapshots: override its snapshot() and restore()")

    async def capture(self, client_id: str) -> bytes:
        """Return a snapshot for a consistent cut, ahead of calls that wait for it; empty if the learner is lost."""
        return await self.snapshot(client_id)

    async def restore(self, client_id: str, data: bytes) -> None:
        """Replace a client's learner by a new one with the state of a snapshot.

        Raises:
            ConfigError: If the mode has no snapshots.
            SnapshotError: If the bytes are not a snapshot of this client's learner.
        """
        raise ConfigError(f"{type(self).__name__} has no snapshots: override its snapshot() and restore()")

    def follow(self, cut: Cut) -> None:  # noqa: B027
        """Let calls that are submitted from now on wait for their learners' snapshots of this cut."""

    def share(self, obj: Any) -> SharedRef:
        """Return a reference to an object as it is now, for arguments of later calls.

        Raises:
            ConfigError: If the mode has no such references.
        """
        raise ConfigError(f"{type(self).__name__} shares nothing: override its share(), or pass the object itself")

    def lift(self, args: tuple[Any, ...], kwargs: dict[str, Any], num_calls: int) -> tuple[Any, Any]:
        """Return the common arguments of several calls, with a shared value in place of each large one.

        By default they stay as they are, and each call takes the value of its own.

        Args:
            args: Positional arguments.
            kwargs: Keyword arguments.
            num_calls: Number of calls that have them.

        Raises:
            SerializationError: If a reference among them was released.
        """
        return args, kwargs

    def plan(self, client_ids: Sequence[str], method: str, *, is_awaited: bool) -> list[str]:
        """Return the clients of a group call in the order in which to submit their calls.

        Args:
            client_ids: The group's clients.
            method: The method's name.
            is_awaited: Whether the group has a deadline or a quorum.
        """
        return list(client_ids)

    async def reduce(self, reduction: Reduction, invocations: Sequence[Invocation], progress: ReduceProgress) -> None:
        """Run calls and reduce their results. By default the results come here, as of `execute`.

        Args:
            reduction: The reduction, which may have clients of other executors too.
            invocations: Calls of this executor's clients.
            progress: Receives the end of each call, and partial results. Its ``stopped`` cancels the other calls.

        Raises:
            MergeError: If two results cannot be merged.
        """
        gathering = Gathering(reduction, progress)

        async def run(invocation: Invocation) -> None:
            try:
                result = await self.execute(invocation)
            except Exception as error:
                progress.note(invocation.client_id, error)
            else:
                gathering.add(invocation.client_id, invocation.method, result)

        running = {asyncio.ensure_future(run(invocation)) for invocation in invocations}
        stopped = asyncio.ensure_future(progress.stopped.wait())
        try:
            while running and not stopped.done():
                done, _ = await asyncio.wait({*running, stopped}, return_when=asyncio.FIRST_COMPLETED)
                running -= done
        finally:
            unfinished = [task for task in (*running, stopped) if task.cancel()]
            await asyncio.gather(*unfinished, return_exceptions=True)
        gathering.finish()

    def worker_of(self, client_id: str) -> str:
        """Return the name of the process that has this client's learner, for messages."""
        return type(self).__name__

    def rref(self, client_id: str) -> Any:
        """Return the learner's ``torch.distributed.rpc`` RRef in the present world; None if calls need no RPC.

        Raises:
            WorkerLostError: If it has none now.
        """
        return None

    @property
    def join_address(self) -> str | None:
        """Address at which workers can join the run, ``HOST:PORT``; None if they cannot."""
        return None

    def workers(self) -> list[str]:
        """Return the names of the processes that run learners; none if the mode has no names for them."""
        return []

    async def arm(self, faults: Mapping[str, Sequence[Fault]]) -> None:
        """Inject faults into workers at later calls, for a test. They replace earlier ones.

        Args:
            faults: Name of a worker -> its faults; an empty sequence removes them.

        Raises:
            ConfigError: If the mode, or a worker, cannot have such faults.
        """
        raise ConfigError(f"{type(self).__name__} has no workers to sabotage: override its workers() and arm()")

    def stats(self) -> dict[str, Any]:
        """Return numbers of this mode, for ``proxy.stats()``: at least ``bytes_sent`` and ``bytes_received``."""
        return {"bytes_sent": 0, "bytes_received": 0}
