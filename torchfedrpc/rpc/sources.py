"""Where workers come from: processes started here, ranks of a launch, workers that listen, workers that join."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError, WorkerLostError
from torchfedrpc.host.answer import call_on
from torchfedrpc.rpc.control_link import Link
from torchfedrpc.rpc.handshake import (
    About,
    BusyError,
    Dialler,
    HandshakeError,
    Listener,
    ListenerThread,
    RefusedError,
    UnreachableError,
    UntrustedError,
    dial,
)
from torchfedrpc.rpc.interfaces import network_site, parse_address
from torchfedrpc.rpc.launch import LaunchedWorkers
from torchfedrpc.rpc.member import Member
from torchfedrpc.rpc.processes import WorkerProcess
from torchfedrpc.rpc.surroundings import Surroundings

logger = logging.getLogger(__name__)

Admit = Callable[[Member], None]

_FIRST_PAUSE_S = 0.25
_MAX_PAUSE_S = 2.0
_BUSY_TIMEOUT_S = 8.0  # a worker needs up to 5 s to end an earlier run
_BUSY_RETRY_S = 0.25


class Source:
    """One kind of worker. All methods are called on the driver's event loop.

    Attributes:
        expects_workers: whether workers may come later.
        replaces: whether this source itself starts another worker of the same name in the place of a lost one.
    """

    expects_workers = False
    replaces = False

    async def gather(self) -> Sequence[Member]:
        """Return the workers to begin with. The run names those without a label.

        Raises:
            ConfigError: If a setting is wrong for some of them.
            WorkerLostError: If some of them are not reached.
        """
        return []

    def start(self, admit: Admit) -> None:
        """Call ``admit`` with each worker that comes from now on."""

    def lost(self, member: Member) -> bool:
        """Note that a worker of this source was lost or released.

        Returns:
            Whether its name is kept for a replacement, which is admitted later.
        """
        return False

    def abandon(self) -> None:
        """Note that opening the run failed: workers that are still starting are not needed."""

    async def close(self, reason: str) -> None:
        """Release all workers at the end of the run.

        Args:
            reason: why the run ended early, for workers that other machines started; empty if it ended well.
        """


class _Backoff:
    """Pauses before attempts to get a worker: none before the first, then 0.25 s, doubled up to 2 s."""

    def __init__(self) -> None:
        self._pause_s = 0.0

    def reset_if_served(self, member: Member) -> None:
        """Begin again without a pause, unless the lost worker was of no use."""
        if member.has_served:
            self._pause_s = 0.0

    async def pause(self) -> None:
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, _MAX_PAUSE_S) or _FIRST_PAUSE_S
        await asyncio.sleep(pause_s)


class _Tasks:
    """Tasks that are cancelled together."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, task: Coroutine[Any, Any, None]) -> None:
        started = asyncio.ensure_future(task)
        self._tasks.add(started)
        started.add_done_callback(self._tasks.discard)

    async def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
        await self.wait()

    async def wait(self) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)


class ProcessSource(Source):
    """Worker processes that the driver starts on its own machine: ``worker1`` and so on.

    Args:
        count: number of workers.
        surroundings: environment of the processes, also of replacements.

    Attributes:
        processes: the running ones.
    """

    expects_workers = True
    replaces = True

    def __init__(self, count: int, surroundings: Surroundings) -> None:
        self._surroundings = surroundings
        self._labels = [f"worker{number}" for number in range(1, count + 1)]
        self.processes: dict[Member, WorkerProcess] = {}
        self._backoffs: defaultdict[str, _Backoff] = defaultdict(_Backoff)
        self._starting = _Tasks()
        self._ending = _Tasks()
        self._admit: Admit | None = None

    async def gather(self) -> Sequence[Member]:
        """Start all processes."""
        return [await self._start(label) for label in self._labels]

    def start(self, admit: Admit) -> None:
        """Replace lost workers from now on."""
        self._admit = admit

    def lost(self, member: Member) -> bool:
        """Start a replacement."""
        if self._admit is None:
            return False
        self._backoffs[member.label].reset_if_served(member)
        self._starting.start(self._replace(member.label, self._admit))
        return True

    def abandon(self) -> None:
        """Kill the processes: those that are still importing would answer too late."""
        for member in list(self.processes):
            self._kill(member)

    async def close(self, reason: str) -> None:
        """End the processes."""
        self._admit = None
        await self._starting.cancel()
        for member in list(self.processes):
            self._end(member)
        await self._ending.wait()

    async def _replace(self, label: str, admit: Admit) -> None:
        has_warned = False
        while True:
            await self._backoffs[label].pause()
            try:
                member = await self._start(label)
                break
            except OSError as error:  # no memory, or no process left
                if not has_warned:
                    logger.warning("no process can be started for %s (%s): trying on", label, error)
                has_warned = True
        admit(member)

    async def _start(self, label: str) -> Member:
        process = await WorkerProcess.start(self._surroundings)
        member = Member(
            label,
            process.link,
            None,
            socket.gethostname(),
            dismiss=lambda reason: self._kill(member),
            how_it_ended=process.how_it_ended,
            imports_main="path",
        )
        self.processes[member] = process
        return member

    def _kill(self, member: Member) -> None:
        if member in self.processes:
            self.processes[member].kill()
            self._end(member)

    def _end(self, member: Member) -> None:
        self._ending.start(self.processes.pop(member).stop())
        if member.heartbeat is not None:
            member.heartbeat.close()


class LaunchSource(Source):
    """The ranks of a launch, which stay for the next run. A lost rank is not replaced.

    Args:
        workers: the ranks of this process's launch.
        runtime: the run's configuration.
    """

    def __init__(self, workers: LaunchedWorkers, runtime: RuntimeConfig) -> None:
        self._workers = workers
        self._runtime = runtime

    async def gather(self) -> Sequence[Member]:
        """Wait for all ranks; returns those that were not lost, by rank."""
        return await self._workers.members(self._runtime)


class DialledSource(Source):
    """Workers that listen at addresses. The driver dials them, and dials lost ones again.

    Args:
        addresses: ``HOST:PORT`` of each, which is its label too.
        token: the shared token.
    """

    expects_workers = True

    def __init__(self, addresses: Sequence[str], token: bytes) -> None:
        self._addresses = addresses
        self._token = token
        self._members: dict[str, Member] = {}
        self._backoffs: defaultdict[str, _Backoff] = defaultdict(_Backoff)
        self._dialling = _Tasks()
        self._admit: Admit | None = None

    async def gather(self) -> Sequence[Member]:
        """Dial all addresses at once.

        Raises:
            ConfigError: If a worker has another token.
            WorkerLostError: If a worker is not reached, has other versions, or serves another driver for 8 s.
        """
        dialling = [self._dial_first(address) for address in self._addresses]
        for outcome in await asyncio.gather(*dialling, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome
        return list(self._members.values())

    def start(self, admit: Admit) -> None:
        """Dial lost workers again from now on."""
        self._admit = admit

    def lost(self, member: Member) -> bool:
        """Dial its address until it is there again."""
        self._members.pop(member.label, None)
        if self._admit is None:
            return False
        self._backoffs[member.label].reset_if_served(member)
        self._dialling.start(self._dial_again(member.label, self._admit))
        return True

    async def close(self, reason: str) -> None:
        """Release the workers, which wait for the next driver."""
        self._admit = None
        await self._dialling.cancel()
        for member in self._members.values():
            member.dismiss(reason)
        self._members.clear()

    async def _dial_first(self, address: str) -> None:
        """Dial a worker; one that is busy is dialled again for 8 s."""
        deadline, was_busy = time.monotonic() + _BUSY_TIMEOUT_S, False
        while True:
            try:
                await self._dial(address, max(deadline - time.monotonic(), _BUSY_RETRY_S))
                return
            except BusyError as error:
                if time.monotonic() + _BUSY_RETRY_S > deadline:
                    raise _unusable(address, error) from error
                if not was_busy:
                    logger.warning("%s is waited for, up to %.0f s: %s", address, _BUSY_TIMEOUT_S, error)
                was_busy = True
            except HandshakeError as error:
                raise _unusable(address, error) from error
            await asyncio.sleep(_BUSY_RETRY_S)

    async def _dial_again(self, address: str, admit: Admit) -> None:
        logged = ""
        while True:
            await self._backoffs[address].pause()
            try:
                await self._dial(address, _BUSY_TIMEOUT_S)
                break
            except HandshakeError as error:
                if str(error) != logged:
                    logger.info("%s is dialled until it is there: %s", address, error)
                logged = str(error)
        admit(self._members[address])

    async def _dial(self, address: str, timeout_s: float) -> None:
        link, about = await dial(address, self._token, _about_driver(), timeout_s=timeout_s)
        self._members[address] = _remote_member(link, about, address)


class JoinedSource(Source):
    """Workers that join a running job: the driver listens for them from the beginning of a run to its end.

    Args:
        address: ``HOST:PORT``; port 0 lets the system choose.
        token: the shared token.

    Raises:
        ConfigError: If the driver cannot listen there.
    """

    expects_workers = True

    def __init__(self, address: str, token: bytes) -> None:
        host, port = parse_address(address, any_port=True)
        try:
            server = socket.create_server((host, port))
        except OSError as error:
            raise ConfigError(f"runtime.join_at={address}: cannot listen there ({error})") from error
        self._host = host
        self._port = server.getsockname()[1]
        self._members: list[Member] = []
        self._early: list[Member] = []  # joined before `start`
        self._admit: Admit | None = None
        self._loop = asyncio.get_running_loop()
        self._end_reason: str | None = None  # once closed
        self._listener = ListenerThread(Listener(server, token, self._serve))
        logger.info("workers can join at %s", self.address)

    @property
    def address(self) -> str:
        """Where workers join: ``HOST:PORT``."""
        return f"{self._host}:{self._port}"

    @property
    def command(self) -> str:
        """The command that starts a worker and lets it join."""
        return f"torchfedrpc-worker --join {self.address} --token-file FILE"

    def start(self, admit: Admit) -> None:
        """Admit the workers that have joined, like those that join later: a bad one is refused alone."""
        self._admit = admit
        early, self._early = self._early, []
        for member in early:
            admit(member)

    def lost(self, member: Member) -> bool:
        """Keep no place: the next worker that joins is a new one."""
        if member in self._members:
            self._members.remove(member)
        return False

    async def close(self, reason: str) -> None:
        """Stop listening, and release the workers."""
        self._end_reason = reason
        self._listener.close()
        for member in self._members:
            member.dismiss(reason)
        self._members.clear()

    async def _serve(self, dialler: Dialler) -> None:
        """Accept a worker; on the listener's thread."""
        if dialler.about.get("role") != "worker":
            await dialler.refuse(
                RefusedError("this is a driver, where workers join; a driver dials workers that listen")
            )
        link = await dialler.accept(_about_driver())
        call_on(self._loop, self._joined, link, dialler.about)

    def _joined(self, link: Link, about: About) -> None:
        member = _remote_member(link, about)
        if self._end_reason is not None:
            member.dismiss(self._end_reason)
            return
        self._members.append(member)
        if self._admit is not None:
            self._admit(member)
        else:
            self._early.append(member)


def _about_driver() -> About:
    script = Path(sys.argv[0])
    return {"role": "driver", "program": script.parent.name if script.name == "__main__.py" else script.name}


def _remote_member(link: Link, about: About, label: str = "") -> Member:
    """A worker after its handshake."""

    def dismiss(reason: str) -> None:
        link.stop(reason)
        if member.heartbeat is not None:
            member.heartbeat.close()

    member = Member(
        label,
        link,
        None,
        about["machine"],
        dismiss=dismiss,
        elsewhere=about["site"] != network_site(),
        imports_main="name",
    )
    return member


def _unusable(address: str, error: HandshakeError) -> ConfigError | WorkerLostError:
    if isinstance(error, UntrustedError):
        return ConfigError(f"client_endpoints: the worker at {address} cannot be used: {error}")
    if isinstance(error, UnreachableError):
        return WorkerLostError(
            f"client_endpoints: no worker at {address}: {error}; start it there, by torchfedrpc-worker --listen "
            f"{address} --token-file FILE"
        )
    return WorkerLostError(f"client_endpoints: the worker at {address} cannot be used: {error}")
