"""Routing of clients to executors, and choice of the execution mode."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError
from torchfedrpc.executors.base import AbstractExecutor, Arguments, ExecutorSpec, Invocation
from torchfedrpc.executors.consistent_snapshot import Cut
from torchfedrpc.executors.placement import HTTP, LOCAL, ClientEndpoint
from torchfedrpc.executors.shared_arguments import SharedRef
from torchfedrpc.host.faults import Fault
from torchfedrpc.launcher import Launch
from torchfedrpc.reduce.driver import Reduction
from torchfedrpc.registry import executors
from torchfedrpc.tasks import all_ended, begin


class ExecutorRouter:
    """Router that chooses the mode of a run, and the executor of each client.

    Args:
        config: A `RuntimeConfig`, or any value that `RuntimeConfig.of` accepts.

    Raises:
        ConfigError: If the mode is unknown, or if the endpoints need a launcher and there is none.
    """

    def __init__(self, config: RuntimeConfig | Mapping[str, Any] | str | None = None) -> None:
        self.config = RuntimeConfig.of(config)
        self.mode = resolve_mode(self.config, Launch.from_environment())
        self._begun = AsyncExitStack()
        self._were_opened = False
        self._make_executors()

    def get_executor(self, client_id: str) -> AbstractExecutor:
        """Return the executor of a client."""
        return self._local if self.config.client_endpoints.get(client_id) == LOCAL else self._main

    async def open(self, spec: ExecutorSpec) -> None:
        """Open new executors for all clients. If one fails to open, `close` still closes the others."""
        if self._were_opened:
            self._make_executors()
        self._were_opened = True
        self.allow = spec.learner.allow_list()
        for executor in self._executors():
            self._begun.push_async_callback(executor.close)
            await executor.open(spec)

    async def close(self, reason: str = "") -> None:
        """Close all executors whose opening has begun.

        Args:
            reason: Reason for an early end of the run; empty if the run ends well.
        """
        for executor in self._executors():
            executor.ends_early = reason
        await self._begun.aclose()

    def plan(self, client_ids: Iterable[str], method: str, *, may_end_early: bool) -> list[str]:
        """Return the clients of a group's call in the order of submission; see `AbstractExecutor.plan`."""
        if self._local is self._main:
            plan: list[str] = self._main.plan(list(client_ids), method, may_end_early=may_end_early)
            return plan
        by_executor: dict[AbstractExecutor, list[str]] = {}
        for client_id in client_ids:
            by_executor.setdefault(self.get_executor(client_id), []).append(client_id)
        plan = []
        for executor, of_one in by_executor.items():
            plan += executor.plan(of_one, method, may_end_early=may_end_early)
        return plan

    def pack_common(self, args: tuple[Any, ...], kwargs: dict[str, Any], num_calls: int) -> Arguments:
        """Pack the arguments that several calls have in common; see `AbstractExecutor.pack_common`."""
        return self._main.pack_common(args, kwargs, num_calls)

    def reduce(self, reduction: Reduction, invocations: Sequence[Invocation]) -> Coroutine[Any, Any, None]:
        """Run calls and reduce their results, on the executor of each client; see `AbstractExecutor.reduce`."""
        if self._local is self._main:
            making: Coroutine[Any, Any, None] = self._main.reduce(reduction, invocations)
            return making
        of_executors: dict[AbstractExecutor, list[Invocation]] = {}
        for invocation in invocations:
            of_executors.setdefault(self.get_executor(invocation.client_id), []).append(invocation)
        return all_ended([begin(executor.reduce(reduction, own)) for executor, own in of_executors.items()])

    def share(self, obj: Any) -> SharedRef:
        """Return a shared reference to the present value of an object, for later calls on any executor."""
        return self._main.share(obj)

    def cut(self, client_ids: Iterable[str]) -> Cut:
        """Return a consistent snapshot of learners, as of this call. Only one can be in progress."""
        cut = Cut(client_ids, lambda client_id: self.get_executor(client_id).capture(client_id))
        for executor in self._executors():
            executor.follow(cut)
        return cut

    def stats(self) -> dict[str, Any]:
        """Return the sums of all executors' counters."""
        names = ("bytes_sent", "bytes_received", "journal_bytes", "workers_lost", "snapshot_bytes")
        each = [executor.stats() for executor in self._executors()]
        workers = {label: own for numbers in each for label, own in numbers.get("workers", {}).items()}
        return {name: sum(numbers.get(name, 0) for numbers in each) for name in names} | {"workers": workers}

    async def interrupt(self, give_up: bool) -> list[str]:
        """Interrupt cancelled methods that go on. See `AbstractExecutor.interrupt`."""
        each = await asyncio.gather(*(executor.interrupt(give_up) for executor in self._executors()))
        return [label for labels in each for label in labels]

    @property
    def join_address(self) -> str | None:
        """Address ``HOST:PORT`` at which workers can join; None if the run does not accept workers."""
        return self._main.join_address

    def workers(self) -> list[str]:
        """Return the names of the processes that run learners."""
        return [label for executor in self._executors() for label in executor.workers()]

    async def arm(self, faults: Mapping[str, Sequence[Fault]]) -> None:
        """Inject faults into workers at later calls, for a test. They replace earlier faults.

        Args:
            faults: Name of a worker -> its faults; an empty sequence removes them.

        Raises:
            ConfigError: If there is no such worker, or it does not support such faults.
        """
        known = self.workers()
        for label in faults:
            if label not in known:
                raise ConfigError(f"this run has no worker {label!r}: it has {', '.join(known) or 'none by name'}")
        for executor in reversed(self._executors()):  # local first, since it refuses more faults
            if own := {label: faults[label] for label in executor.workers() if label in faults}:
                await executor.arm(own)

    def _make_executors(self) -> None:
        self._main: AbstractExecutor = executors.get(self.mode)(self.config)
        self._local = self._main
        if self.mode != "local" and LOCAL in self.config.client_endpoints.values():
            self._local = executors.get("local")(self.config)

    def _executors(self) -> list[AbstractExecutor]:
        return [self._main] if self._local is self._main else [self._main, self._local]


def resolve_mode(config: RuntimeConfig, launch: Launch | None) -> str:
    """Return the execution mode that a configuration selects in this process.

    Args:
        config: The configuration.
        launch: The launch of this process; None without a launch.

    Raises:
        ConfigError: If an endpoint is malformed, or if pseudo or distributed mode is requested but not possible.
    """
    endpoints = {client: ClientEndpoint.parse(client, text) for client, text in config.client_endpoints.items()}
    mode = str(config.execution_mode)
    if mode == "auto":
        if launch is not None or config.client_endpoints:
            mode = "distributed"
        elif config.use_multiprocessing or config.num_processes:
            mode = "pseudo"
        elif config.join_at is not None:
            mode = "distributed"
        else:
            mode = "local"
    if mode == "pseudo" and config.num_processes == 0:
        raise ConfigError(
            "runtime.num_processes is 0, and pseudo mode needs at least one worker process: set "
            "runtime.num_processes=1 or more, or runtime.execution_mode=local"
        )
    if mode != "local" and any(text.startswith(HTTP) for text in config.client_endpoints.values()):
        warnings.warn(
            "client_endpoints has addresses with http://: they are dialled, and no HTTP is spoken; write HOST:PORT",
            stacklevel=4,  # the line that creates the proxy
        )
    if mode != "distributed":
        return mode
    if launch is not None:
        return mode
    ranks = [client for client, endpoint in endpoints.items() if endpoint.kind == "rank"]
    others = [client for client, endpoint in endpoints.items() if endpoint.kind == "host"]
    comes_by_itself = config.join_at is not None or any(one.kind == "address" for one in endpoints.values())
    if ranks or (others and not comes_by_itself):
        client = (ranks or others)[0]
        raise ConfigError(
            f"client_endpoints puts {client} on {config.client_endpoints[client]!r}, a worker of a launch, and this "
            f"process is in none: start it with torchrun --nproc-per-node={len(ranks + others) + 1} script.py (one "
            f"of the processes is the driver), or name a worker that listens by its address, HOST:PORT"
        )
    if comes_by_itself:
        return mode
    if config.execution_mode == "auto":  # all endpoints are local, so no worker is needed
        return "local"
    warnings.warn(
        "execution_mode=distributed without a launcher, and no endpoint that needs one: running in local mode. For "
        "workers, start with torchrun --nproc-per-node=3 script.py",
        stacklevel=4,  # the line that creates the proxy
    )
    return "local"
