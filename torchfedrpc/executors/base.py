"""Contract of executors. An executor is one way for calls to reach learners."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError
from torchfedrpc.events import EventBus, ProgressReported
from torchfedrpc.executors.consistent_snapshot import Cut
from torchfedrpc.executors.shared_arguments import SharedRef
from torchfedrpc.executors.stream import ItemStream
from torchfedrpc.host.call import Call
from torchfedrpc.host.call_trace import CallTrace
from torchfedrpc.host.faults import Fault
from torchfedrpc.host.learner_host import LearnerHost
from torchfedrpc.host.process import visible_devices
from torchfedrpc.host.process_state import ProcessState
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.reduce.driver import Reduction
from torchfedrpc.tasks import call_on
from torchfedrpc.wire.packing import Packed
from torchfedrpc.wire.shared import SharedValue

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExecutorSpec:
    """Run for which an executor is opened.

    Attributes:
        learner: Makes the learners; has the run's configuration.
        clients: Client id -> keyword arguments of its learner's constructor, in the run's order.
        events: Publishes the run's events; used on the driver's event loop.
    """

    learner: LearnerSpec
    clients: Mapping[str, Mapping[str, Any]]
    events: EventBus

    def make_host(self) -> LearnerHost:
        """Return a host for these clients in this process. Call it in ``open``, and close the host in ``close``.

        Raises:
            ConfigError: If the learner's class cannot be found.
        """
        report = partial(call_on, asyncio.get_running_loop(), self.publish_progress)
        process = ProcessState(self.learner, devices=visible_devices(), in_driver=True, report=report)
        return LearnerHost(self.learner, process, clients=self.clients)

    def publish_progress(self, call: Call, number: int, progress: Packed) -> None:
        """Publish a `Report` of progress; called on the driver's event loop."""
        try:
            value = progress.open(self.learner.allow_list())
        except Exception:  # an unreadable report must not lose the outcomes behind it
            logger.exception("the progress of %s.%s cannot be read", call.client_id, call.method)
            return
        self.events.publish(ProgressReported(call.call_id, call.client_id, call.method, value))


@dataclass(frozen=True, slots=True)
class Arguments:
    """Arguments of one call, or those that the calls of a group have in common.

    Attributes:
        args: Positional arguments: the caller's objects, or shared values in place of large ones.
        kwargs: Keyword arguments, likewise.
        num_bytes: Estimated bytes, without shared values.
        values: Shared values among them that only calls of the present tick use.
        packed: All of them, packed once for several calls; None if each call packs them.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    num_bytes: int = 0
    values: tuple[SharedValue, ...] = ()
    packed: Packed | None = None


@dataclass(frozen=True, slots=True)
class Invocation:
    """Call as the proxy submits it to an executor.

    Attributes:
        call_id: Id of the call, unique in a run.
        client_id: The client.
        method: The method's name.
        args: Positional arguments: the caller's objects, not copies.
        kwargs: Keyword arguments: the caller's objects, not copies.
        run_timeout_s: Seconds the method may run; None for no limit.
        retries: Number of times to send the call again if the method has not begun.
        common: The same arguments, if other calls of a group have them too; else None.
        trace: Records the stages of the call, if events are subscribed to.
    """

    call_id: int
    client_id: str
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    run_timeout_s: float | None = None
    retries: int = 0
    common: Arguments | None = None
    trace: CallTrace | None = None


class AbstractExecutor(ABC):
    """Base class of executors.

    A custom mode overrides `execute_method`, `open` and `close`, and is registered with ``@tfr.executor("name")``;
    ``execution_mode: name`` then selects it. An executor is opened once: each opening of a proxy creates a new one.

    Args:
        config: The run's configuration.

    Attributes:
        ends_early: Reason for an early end of the run, set before `close`; empty if the run ends well.
        join_address: Address ``HOST:PORT`` at which workers can join the run; None if they cannot.
    """

    ends_early = ""
    join_address: str | None = None

    def __init__(self, config: RuntimeConfig | None = None) -> None:
        self.config = config or RuntimeConfig()

    async def open(self, spec: ExecutorSpec) -> None:  # noqa: B027 (optional to override)
        """Prepare for calls. ``spec.make_host()`` returns a host for learners in this process."""

    async def close(self) -> None:  # noqa: B027
        """Release all resources. No call is pending."""

    @abstractmethod
    async def execute_method(self, client_id: str, method_name: str, /, *args: Any, **kwargs: Any) -> Any:
        """Run a learner's method and return its result, or raise its exception."""

    async def execute(self, invocation: Invocation) -> Any:
        """Run a call and return its result. By default this passes the method and its arguments only."""
        return await self.execute_method(
            invocation.client_id, invocation.method, *invocation.args, **invocation.kwargs
        )

    def stream(self, invocation: Invocation) -> ItemStream:
        """Open a stream over the items of a generator method.

        Raises:
            ConfigError: If the mode does not support streams.
        """
        raise ConfigError(f"{type(self).__name__} has no streams: override its stream(), or await a list instead")

    async def snapshot(self, client_id: str) -> bytes:
        """Return the state of a client's learner between two calls, as bytes for `restore`.

        Raises:
            ConfigError: If the mode does not support snapshots.
            SnapshotError: If the state cannot be captured.
        """
        raise ConfigError(f"{type(self).__name__} has no snapshots: override its snapshot() and restore()")

    async def capture(self, client_id: str) -> bytes:
        """Return a learner's part of a consistent snapshot, ahead of calls that wait for it; empty if it is lost."""
        return await self.snapshot(client_id)

    async def restore(self, client_id: str, data: bytes) -> None:
        """Replace a client's learner by a new one with the state of a snapshot.

        Raises:
            ConfigError: If the mode does not support snapshots.
            SnapshotError: If the bytes are not a snapshot of this client's learner.
        """
        raise ConfigError(f"{type(self).__name__} has no snapshots: override its snapshot() and restore()")

    def follow(self, cut: Cut) -> None:  # noqa: B027
        """Let calls submitted from now on wait for their learners' snapshots of this consistent snapshot."""

    def share(self, obj: Any) -> SharedRef:
        """Return a shared reference to the present value of an object, for arguments of later calls.

        Raises:
            ConfigError: If the mode does not support shared references.
        """
        raise ConfigError(f"{type(self).__name__} shares nothing: override its share(), or pass the object itself")

    def pack_common(self, args: tuple[Any, ...], kwargs: dict[str, Any], num_calls: int) -> Arguments:
        """Pack the arguments that several calls have in common.

        By default the arguments are returned unchanged, and each call captures their values separately.

        Args:
            args: Positional arguments.
            kwargs: Keyword arguments.
            num_calls: Number of calls with these arguments.

        Raises:
            SerializationError: If they cannot be sent, or a shared reference among them was released.
        """
        return Arguments(args, kwargs)

    def plan(self, client_ids: Sequence[str], method: str, *, may_end_early: bool) -> list[str]:
        """Return the clients of a group call in the order in which to submit their calls.

        Args:
            client_ids: The group's clients.
            method: The method's name.
            may_end_early: Whether the group has a deadline or a quorum.
        """
        return list(client_ids)

    async def reduce(self, reduction: Reduction, invocations: Sequence[Invocation]) -> None:
        """Run calls and reduce their results. By default the results come to the driver, as with `execute`.

        Args:
            reduction: Receives the end of each call, and partial results. Its ``stopped`` cancels the pending calls.
                It may have clients of other executors as well.
            invocations: Calls of this executor's clients.

        Raises:
            MergeError: If two results cannot be merged.
        """
        forest = reduction.forest()

        async def run(invocation: Invocation) -> None:
            try:
                result = await self.execute(invocation)
            except Exception as error:
                reduction.note(invocation.client_id, error)
                return
            try:
                forest.add(reduction.places[invocation.client_id], result)
            except Exception as error:
                error.add_note(f"in {invocation.client_id}.{invocation.method}, as its result was added up")
                reduction.note(invocation.client_id, error)
            else:
                reduction.note(invocation.client_id, None)

        running: set[asyncio.Future[None]] = {asyncio.ensure_future(run(invocation)) for invocation in invocations}
        try:
            while running and not reduction.stopped.done():
                done, _ = await asyncio.wait({*running, reduction.stopped}, return_when=asyncio.FIRST_COMPLETED)
                running -= done
        finally:
            unfinished = [task for task in running if task.cancel()]
            await asyncio.gather(*unfinished, return_exceptions=True)
        reduction.add_nodes(forest.take())

    def worker_of(self, client_id: str) -> str:
        """Return the name of the process that has a client's learner, for messages."""
        return type(self).__name__

    def rref(self, client_id: str) -> Any:
        """Return the learner's ``torch.distributed.rpc`` RRef in the current world; None if calls do not use RPC.

        Raises:
            WorkerLostError: If the learner has no RRef now.
        """
        return None

    def workers(self) -> list[str]:
        """Return the names of the processes that run learners; empty if the mode does not name them."""
        return []

    async def arm(self, faults: Mapping[str, Sequence[Fault]]) -> None:
        """Inject faults into workers at later calls, for a test. They replace earlier faults.

        Args:
            faults: Name of a worker -> its faults; an empty sequence removes them.

        Raises:
            ConfigError: If the mode, or a worker, does not support such faults.
        """
        raise ConfigError(f"{type(self).__name__} has no workers to sabotage: override its workers() and arm()")

    async def interrupt(self, give_up: bool) -> list[str]:
        """Raise KeyboardInterrupt, once, in each sync method that goes on although its call was cancelled.

        Args:
            give_up: Whether to replace a worker process on which such a method goes on, if it can be replaced.

        Returns:
            The names of the processes on which some go on; by default there are none.
        """
        return []

    def stats(self) -> dict[str, Any]:
        """Return counters of this mode, for ``proxy.stats()``: at least ``bytes_sent`` and ``bytes_received``."""
        return {"bytes_sent": 0, "bytes_received": 0}
