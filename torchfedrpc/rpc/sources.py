"""Where workers come from: processes started here, ranks of a launch, workers that listen, workers that join."""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError, WorkerLostError
from torchfedrpc.rpc import check
from torchfedrpc.rpc.control_link import Link, pair_for_child
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
from torchfedrpc.rpc.member import Member
from torchfedrpc.rpc.preflight import warn_about
from torchfedrpc.rpc.processes import Process, start_worker
from torchfedrpc.rpc.surroundings import Surroundings
from torchfedrpc.tasks import Tasks, call_on

logger = logging.getLogger(__name__)

_STOP_TIMEOUT_S = 4.0
_PAUSES_S = (0.0, 0.25, 0.5, 1.0, 2.0)  # before the attempts to get a worker; the last before all further ones
_BUSY_TIMEOUT_S = 8.0  # a worker needs up to 5 s to end an earlier run
_BUSY_RETRY_S = 0.25


class Source:
    """One kind of worker. All methods are called on the driver's event loop.

    Attributes:
        expects_workers: whether workers may come later.
        replaces: whether this source itself starts another worker of the same name in the place of a lost one.
        arrivals: workers that have come since the run began, in order.
    """

    expects_workers = False
    replaces = False

    def __init__(self) -> None:
        self.arrivals: asyncio.Queue[Member] = asyncio.Queue()

    async def gather(self, runtime: RuntimeConfig) -> Sequence[Member]:
        """Return the workers to begin a run with. The run names those without a label.

        Raises:
            ConfigError: If a setting is wrong for some of them.
            WorkerLostError: If some of them are not reached.
        """
        return []

    def release(self, member: Member, reason: str) -> None:
        """Let a worker go.

        Args:
            member: the worker.
            reason: why it is given up; empty if it has left.
        """
        member.link.stop(reason)
        if member.heartbeat is not None:
            member.heartbeat.close()

    def lost(self, member: Member, num_failures: int) -> bool:
        """Note that a worker was lost or has left, after `release`.

        Args:
            member: The worker.
            num_failures: Number of workers in succession with its name that were lost before they served.

        Returns:
            Whether its name is kept for a replacement, which arrives later.
        """
        return False

    def abandon(self) -> None:
        """Note that opening the run failed: workers that are still starting are not needed."""

    async def close(self, reason: str) -> None:
        """Release all workers at the end of the run.

        Args:
            reason: why the run ended early, for workers that other machines started; empty if it ended well.
        """


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
        super().__init__()
        self._surroundings = surroundings
        self._labels = [f"worker{number}" for number in range(1, count + 1)]
        self.processes: dict[Member, Process] = {}
        self._starting = Tasks()
        self._ending = Tasks()

    async def gather(self, runtime: RuntimeConfig) -> Sequence[Member]:
        """Start all processes."""
        return [await self._start(label) for label in self._labels]

    def release(self, member: Member, reason: str) -> None:
        """Kill the process."""
        if (process := self.processes.pop(member, None)) is not None:
            member.link.close()
            process.send_signal(signal.SIGKILL)
            self._ending.start(_close_after_end(member, process))

    def lost(self, member: Member, num_failures: int) -> bool:
        """Start a replacement."""
        self._starting.start(self._replace(member.label, num_failures))
        return True

    def abandon(self) -> None:
        """Kill the processes: those that are still importing would answer too late."""
        for member in list(self.processes):
            self.release(member, "")

    async def close(self, reason: str) -> None:
        """End the processes."""
        self._starting.cancel()
        await self._starting.wait()
        for member in list(self.processes):
            self._end(member)
        await self._ending.wait()

    async def _replace(self, label: str, num_failures: int) -> None:
        has_warned = False
        for pause_s in _pauses_s(num_failures):
            await asyncio.sleep(pause_s)
            try:
                self.arrivals.put_nowait(await self._start(label))
                return
            except OSError as error:  # no memory, or no process left
                if not has_warned:
                    logger.warning("no process can be started for %s (%s): trying on", label, error)
                has_warned = True

    async def _start(self, label: str) -> Member:
        ours, theirs = pair_for_child()  # the link has no port
        link = Link(ours)
        with theirs:
            try:
                process = await start_worker(theirs.fileno(), surroundings=self._surroundings)
            except BaseException:
                link.close()
                raise
        member = Member(label, link, socket.gethostname(), process=process, imports_main="path")
        self.processes[member] = process
        return member

    def _end(self, member: Member) -> None:
        self._ending.start(_stop(member.link, self.processes.pop(member)))
        if member.heartbeat is not None:
            member.heartbeat.close()


class DialledSource(Source):
    """Workers that listen at addresses. The driver dials them, and dials lost ones again.

    Args:
        addresses: ``HOST:PORT`` of each, which is its label too.
        token: the shared token.
    """

    expects_workers = True

    def __init__(self, addresses: Sequence[str], token: bytes) -> None:
        super().__init__()
        self._addresses = addresses
        self._token = token
        self._members: dict[str, Member] = {}
        self._dialling = Tasks()

    async def gather(self, runtime: RuntimeConfig) -> Sequence[Member]:
        """Dial all addresses at once.

        Raises:
            ConfigError: If a worker has another token.
            WorkerLostError: If a worker is not reached, has other versions, or serves another driver for 8 s. Notes
                name all others.
        """
        dialling = [self._dial_first(address) for address in self._addresses]
        outcomes = await asyncio.gather(*dialling, return_exceptions=True)
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if errors:
            for error in errors[1:]:
                errors[0].add_note(str(error))
            raise errors[0]
        return [self._members[address] for address in self._addresses]

    def lost(self, member: Member, num_failures: int) -> bool:
        """Dial its address until it is there again."""
        self._members.pop(member.label, None)
        self._dialling.start(self._dial_again(member.label, num_failures))
        return True

    async def close(self, reason: str) -> None:
        """Release the workers, which wait for the next driver."""
        self._dialling.cancel()
        await self._dialling.wait()
        for member in self._members.values():
            self.release(member, reason)
        self._members.clear()

    async def _dial_first(self, address: str) -> None:
        """Dial a worker; one that is busy is dialled again for 8 s."""
        deadline, was_busy = time.monotonic() + _BUSY_TIMEOUT_S, False
        while True:
            try:
                await self._dial(address, max(deadline - time.monotonic(), _BUSY_RETRY_S))
                return
            except HandshakeError as error:
                if not isinstance(error, BusyError) or time.monotonic() + _BUSY_RETRY_S > deadline:
                    raise _unusable(address, error) from error
                if not was_busy:
                    logger.warning("%s is waited for, up to %.0f s: %s", address, _BUSY_TIMEOUT_S, error)
                was_busy = True
            await asyncio.sleep(_BUSY_RETRY_S)

    async def _dial_again(self, address: str, num_failures: int) -> None:
        logged = ""
        for pause_s in _pauses_s(num_failures):
            await asyncio.sleep(pause_s)
            try:
                await self._dial(address, _BUSY_TIMEOUT_S)
                self.arrivals.put_nowait(self._members[address])
                return
            except HandshakeError as error:
                if str(error) != logged:
                    logger.info("%s is dialled until it is there: %s", address, error)
                logged = str(error)

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
        super().__init__()
        host, port = parse_address(address, any_port=True)
        try:
            server = socket.create_server((host, port))
        except OSError as error:
            raise ConfigError(f"runtime.join_at={address}: cannot listen there ({error})") from error
        self._host = host
        self._port = server.getsockname()[1]
        self._members: list[Member] = []
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

    def lost(self, member: Member, num_failures: int) -> bool:
        """Keep no place: the next worker that joins is a new one."""
        if member in self._members:
            self._members.remove(member)
        return False

    async def close(self, reason: str) -> None:
        """Stop listening, and release the workers."""
        self._end_reason = reason
        self._listener.close()
        for member in self._members:
            self.release(member, reason)
        self._members.clear()

    async def _serve(self, dialler: Dialler) -> None:
        """Accept a worker; on the listener's thread."""
        if dialler.about.get("role") == check.ROLE:
            await check.answer(dialler, "driver")
            return
        if dialler.about.get("role") != "worker":
            await dialler.refuse(
                RefusedError("this is a driver, where workers join; a driver dials workers that listen")
            )
        link = await dialler.accept(_about_driver())
        call_on(self._loop, self._joined, link, dialler.about)

    def _joined(self, link: Link, about: About) -> None:
        member = _remote_member(link, about)
        if self._end_reason is not None:
            self.release(member, self._end_reason)
            return
        self._members.append(member)
        self.arrivals.put_nowait(member)


async def _close_after_end(member: Member, process: Process) -> None:
    """Wait for the end of a killed process, then close its heartbeat connection.

    Closed earlier, it would let the heartbeat process continue a stopped worker, with calls that were cancelled.
    """
    await process.ends_within(None)
    if member.heartbeat is not None:
        member.heartbeat.close()
    process.close()


async def _stop(link: Link, process: Process) -> None:
    """Stop a worker process, wait for its end, and kill it after 4 seconds."""
    link.stop()
    if not await process.ends_within(_STOP_TIMEOUT_S):
        process.send_signal(signal.SIGKILL)
        await process.ends_within(None)
    process.close()


def _about_driver() -> About:
    script = Path(sys.argv[0])
    return {"role": "driver", "program": script.parent.name if script.name == "__main__.py" else script.name}


def _remote_member(link: Link, about: About, label: str = "") -> Member:
    """A worker after its handshake."""
    warn_about(about)
    return Member(label, link, about["machine"], elsewhere=about["site"] != network_site(), imports_main="name")


def _unusable(address: str, error: HandshakeError) -> ConfigError | WorkerLostError:
    if isinstance(error, UntrustedError):
        return ConfigError(f"client_endpoints: the worker at {address} cannot be used: {error}")
    if isinstance(error, UnreachableError):
        return WorkerLostError(
            f"client_endpoints: no worker at {address}: {error}; start it there, by torchfedrpc-worker --listen "
            f"{address} --token-file FILE"
        )
    return WorkerLostError(f"client_endpoints: the worker at {address} cannot be used: {error}")


def _pauses_s(num_failures: int) -> Iterator[float]:
    """Yield the pauses before attempts to get a worker, after some failures."""
    return itertools.chain(_PAUSES_S[num_failures:], itertools.repeat(_PAUSES_S[-1]))
