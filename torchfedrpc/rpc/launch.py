"""How ranks of a launch find their driver, in each attempt of the launch."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import logging
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed

from torchfedrpc import waiting
from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError, WorkerLostError
from torchfedrpc.launcher import Launch, is_loopback
from torchfedrpc.rpc.control_link import Link
from torchfedrpc.rpc.handshake import (
    TOKEN_VARIABLE,
    Dialler,
    Listener,
    ListenerThread,
    RefusedError,
    SilentError,
    UnreachableError,
    UntrustedError,
    dial,
    has_token_file,
    load_token,
)
from torchfedrpc.rpc.heartbeat_connection import advice
from torchfedrpc.rpc.interfaces import LOOPBACK, address_of, describe_address, describe_os_error, network_site
from torchfedrpc.rpc.member import Member
from torchfedrpc.rpc.preflight import warn_about
from torchfedrpc.rpc.sources import Source
from torchfedrpc.waiting import reported

logger = logging.getLogger(__name__)

_DRIVER_KEY = "torchfedrpc/driver"
_FAILED_KEY = "torchfedrpc/failed"  # followed by the rank
_NOT_LISTENING = "null"
_GATHER_TIMEOUT_S = 120.0  # ranks of one launch start together; importing torch from a cold disk takes a while
_LOOK_S = 0.5
_REPORT_TIMEOUT_S = 10.0
_DIAL_TIMEOUT_S = 5.0
_RETRY_S = 0.2
_STALE_S = 10.0  # a driver replaces the address that an earlier attempt left in the store within this time


class LaunchedWorkers(Source):
    """The ranks of a launch, which stay for the next run. A lost rank is not replaced.

    Rank 0 publishes the address where it listens, and holds the control links of the other ranks.

    It listens from the first run that needs workers. The configuration of that run names the interface and the token
    file. Without a token file, each attempt has a random token in the launcher's store, which may still contain keys
    of an earlier attempt.

    Args:
        launch: The launch of this process.
    """

    def __init__(self, launch: Launch) -> None:
        super().__init__()
        self._launch = launch
        self._members: dict[int, Member] = {}  # rank -> process, unless it was lost
        self._complete: concurrent.futures.Future[None] = concurrent.futures.Future()  # all ranks have come
        self._store = _open_store(launch, serve=not launch.agent_store)
        self._store.set(_DRIVER_KEY, _NOT_LISTENING)
        self._listener: ListenerThread | None = None
        self._address = ""  # where it listens
        self._failure: str | None = None  # why a rank cannot come

    async def gather(self, runtime: RuntimeConfig) -> list[Member]:
        """Wait for all ranks; returns the workers that were not lost, by rank.

        Args:
            runtime: The run's configuration. That of the first call names the interface and the token file.

        Raises:
            ConfigError: If ranks are missing after 120 s or cannot come, or the interface or token file is unusable.
            WorkerLostError: If all workers were lost.
        """
        if self._listener is None:
            self._listener = self._listen(runtime)
        await self._wait_for_ranks()
        self._listener.close()
        if not self._members:
            raise WorkerLostError(
                "all workers of this launch were lost: start it again, by torchrun's --max-restarts say"
            )
        return [self._members[rank] for rank in sorted(self._members)]

    def release(self, member: Member, reason: str) -> None:
        """Let a lost rank go. If it wakes up, it ends with status 0, so that the launcher ends no other rank."""
        self._members = {rank: present for rank, present in self._members.items() if present is not member}
        super().release(member, reason)

    def end(self, *, failed: bool) -> None:
        """End all workers: by a message after a good run, by the end of this process after a failure.

        After a failure a message could end a worker first, and the launcher would then end this process before it has
        shown its error.
        """
        if not failed:
            try:
                if self._listener is None:  # no run needed workers, and they wait for the end
                    self._listener = self._listen(RuntimeConfig())
            except ConfigError as error:  # this run has succeeded; the ranks fail
                self._store.set(_DRIVER_KEY, json.dumps({"failure": str(error)}))
                return
            with contextlib.suppress(ConfigError):  # a rank that is still importing needs the listener
                asyncio.run(self._wait_for_ranks())
        if self._listener is not None:
            self._listener.close()
        for member in self._members.values():
            if failed:  # leave the connections open until this process ends
                member.link.detach().detach()
                if member.heartbeat is not None:
                    member.heartbeat.detach()
            else:
                super().release(member, "")

    async def _wait_for_ranks(self) -> None:
        complete = asyncio.wrap_future(self._complete)
        give_up_at = time.monotonic() + _GATHER_TIMEOUT_S
        async with reported(lambda: f"waiting for ranks {self._missing()} of the launch"):
            while not complete.done():
                self._failure = self._failure or await asyncio.to_thread(self._look_for_failure)
                if self._failure is not None:
                    raise ConfigError(self._failure)
                if time.monotonic() > give_up_at:
                    raise ConfigError(
                        f"ranks {self._missing()} of the launch did not come within {_GATHER_TIMEOUT_S:.0f} s: every "
                        f"rank has to run the same script and reach tfr.run(main), with the token file of this one "
                        f"if it has one"
                    )
                await asyncio.wait([complete], timeout=_LOOK_S)

    def _listen(self, runtime: RuntimeConfig) -> ListenerThread:
        """Listen for ranks, and publish the address, with the token unless every rank has it in a file.

        Raises:
            ConfigError: If the token file is unusable, or this process cannot listen where ranks would reach it.
        """
        has_file = has_token_file(runtime.token_file)
        token = load_token(runtime.token_file) if has_file else secrets.token_hex(32).encode()
        try:
            host, bind = _listen_addresses(self._launch, runtime.interface)
            server = socket.create_server((bind, 0))
        except OSError as error:
            raise ConfigError(
                f"the driver cannot listen for the ranks of the launch at its master address "
                f"{self._launch.master_address} ({describe_os_error(error)}): set runtime.interface to the network "
                f"interface of this machine at which the other machines reach it"
            ) from error
        published = {
            "host": host,
            "port": server.getsockname()[1],
            "token": None if has_file else token.decode(),
            "interface": runtime.interface,
        }
        self._address = f"{host}:{published['port']}"
        listener = ListenerThread(Listener(server, token, self._serve))
        self._store.set(_DRIVER_KEY, json.dumps(published))
        return listener

    async def _serve(self, dialler: Dialler) -> None:
        """Accept a rank, also one that has missed the end of its first handshake; on the listener's thread."""
        about = dialler.about
        rank: Any = about.get("rank")
        if rank not in range(1, self._launch.world_size):
            await dialler.refuse(RefusedError(f"this launch has no rank {rank!r}"))
        warn_about(about)
        link = await dialler.accept({"role": "driver"})
        if (former := self._members.get(rank)) is not None:
            former.link.close()
        self._members[rank] = Member(
            f"worker{rank}",
            link,
            about["machine"],
            elsewhere=about["site"] != network_site(),
        )
        if not self._missing() and not self._complete.done():
            self._complete.set_result(None)

    def _missing(self) -> list[int]:
        return sorted(set(range(1, self._launch.world_size)) - set(self._members))

    def _look_for_failure(self) -> str | None:
        """Return the reason that a missing rank has left in the launcher's store; blocks on the store."""
        for rank in self._missing():
            key = f"{_FAILED_KEY}/{rank}"
            if self._store.check([key]):
                match json.loads(self._store.get(key)):
                    case {"reason": str(reason), "address": address} if address in (None, self._address):
                        self._store.delete_key(key)  # or the next attempt would read it
                        return reason
        return None


_current: LaunchedWorkers | None = None


def current_workers() -> LaunchedWorkers | None:
    """Return the workers of the launch that this process drives; None outside of `driving`."""
    return _current


@contextmanager
def driving(launch: Launch) -> Iterator[None]:
    """Hold the launch's workers, and end them at exit."""
    global _current
    _current = workers = LaunchedWorkers(launch)
    failed = True
    try:
        yield
        failed = False
    except SystemExit as exit_:
        failed = exit_.code not in (None, 0)
        raise
    finally:
        _current = None
        workers.end(failed=failed)


def dial_driver(launch: Launch) -> Link:
    """Dial until the driver of this attempt is reached, on a worker. A launch that fails ends this process.

    If this rank cannot join, it leaves the reason in the launcher's store for the driver.

    Raises:
        ConfigError: If the driver refuses this rank, only one of the two has a token file, their token files differ,
            or the driver has ended and was never reached.
    """
    token = load_token(None) if has_token_file(None) else None
    store = _open_store(launch, serve=False)
    address, first_seen_s, unreachable = "", 0.0, ""
    while True:
        try:
            published_address, published_token, interface = _wait_for_driver(store)
        except RuntimeError as error:  # the store has ended, with the launcher and the driver
            if unreachable:
                raise ConfigError(f"rank {launch.rank} could not join the launch: {unreachable}") from error
            raise
        if published_address != address:
            address, first_seen_s = published_address, time.monotonic()
        is_current = time.monotonic() - first_seen_s > _STALE_S
        reason = ""
        if (token is None) == (published_token is None):
            side = (
                "the driver has a token file and this rank has none"
                if token is None
                else "the driver has no token file and this rank has one"
            )
            reason = f"{side}; set {TOKEN_VARIABLE} for every rank of the launch, on each machine"
        else:
            try:
                about = {"role": "worker", "rank": launch.rank}
                link, _ = asyncio.run(
                    dial(address, token or published_token or b"", about, timeout_s=_DIAL_TIMEOUT_S)
                )
                return link
            except RefusedError as error:
                reason = str(error)
            except UntrustedError as error:  # a random token may be an earlier attempt's
                if token is not None and is_current:
                    reason = str(error)
            except SilentError as error:  # the driver is busy
                logger.debug("no driver of this launch: %s", error)
            except UnreachableError as error:
                if is_current and not unreachable:
                    unreachable = f"{error}; {advice(interface)}"
                    logger.warning("rank %d cannot reach the driver, and tries on: %s", launch.rank, unreachable)
                    _report_failure(store, launch, f"cannot join the launch: {unreachable}", address)
        if reason:
            raise ConfigError(_report_failure(store, launch, f"cannot join the launch: {reason}", address))
        time.sleep(_RETRY_S)


def tell_script_ended(launch: Launch, error: BaseException | None) -> None:
    """Tell the driver that the script of this rank ended before it reached ``tfr.run``, by an error or not."""
    store = _open_store(launch, serve=False, timeout_s=_REPORT_TIMEOUT_S)
    where = f"on {socket.gethostname()} before it reached tfr.run"
    how = (
        f"failed {where}: {type(error).__name__}: {error}"
        if error is not None
        else f"ended {where}: every rank has to run the script to its tfr.run(main), and to call that"
    )
    _report_failure(store, launch, how, None)


def _report_failure(store: Any, launch: Launch, failure: str, address: str | None) -> str:
    """Leave the reason why this rank cannot join, for the driver at an address or for any driver."""
    reason = f"rank {launch.rank} {failure}"
    store.set(f"{_FAILED_KEY}/{launch.rank}", json.dumps({"reason": reason, "address": address}))
    return reason


def _wait_for_driver(store: Any) -> tuple[str, bytes | None, str | None]:
    """Wait until the driver listens. Returns its address, the token unless that is in a file, and its interface.

    Raises:
        ConfigError: If the driver has ended and could not listen, or is of another version.
    """
    while not store.check([_DRIVER_KEY]) or (published := store.get(_DRIVER_KEY)) == _NOT_LISTENING.encode():
        time.sleep(_RETRY_S)
    match json.loads(published):
        case {
            "host": str(host),
            "port": int(port),
            "token": str() | None as token,
            "interface": str() | None as interface,
        }:
            return f"{host}:{port}", None if token is None else token.encode(), interface
        case {"failure": str(reason)}:
            raise ConfigError(f"the driver has ended, and could not tell this rank: {reason}")
    raise ConfigError(f"the launcher's store has no driver of this version of torchfedrpc under {_DRIVER_KEY}")


def _listen_addresses(launch: Launch, interface: str | None) -> tuple[str, str]:
    """Return the address that ranks dial, and the address to bind.

    Raises:
        ConfigError: If there is no such interface.
    """
    if interface is not None:
        return (address := address_of(interface)), address
    # A launcher that does not tell the number of machines gives the first one's address, which all ranks reach. A
    # loopback address, or this name of one, leads to no other machine.
    if launch.num_nodes == 1 or (launch.num_nodes is None and is_loopback(launch.master_address)):
        loopback = address_of(LOOPBACK)
        return loopback, loopback
    resolved = socket.gethostbyname(launch.master_address)
    # Some systems resolve a host's own name to a loopback address, which other machines cannot dial.
    return launch.master_address, "" if is_loopback(resolved) else resolved


def _open_store(launch: Launch, *, serve: bool, timeout_s: float = _GATHER_TIMEOUT_S) -> Any:
    """Open the launch's store.

    Args:
        launch: The launch of this process.
        serve: Whether this process serves it.
        timeout_s: Seconds to wait for the process that serves it.

    Raises:
        ConfigError: If this process cannot serve it, or does not reach the one that does.
    """
    if not serve:
        _wait_for_store(launch, timeout_s)
    distributed: Any = torch.distributed  # some builds have it without its stores
    try:
        return distributed.TCPStore(
            launch.master_address,
            launch.master_port,
            is_master=serve,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
        )
    except RuntimeError as error:
        raise ConfigError(
            f"rank {launch.rank} cannot {'serve' if serve else 'use'} the store of the launch at "
            f"{launch.master_address}:{launch.master_port}: {str(error).splitlines()[0]}; MASTER_ADDR has to be an "
            f"address of rank 0's machine, and MASTER_PORT a port that is free there"
        ) from error


def _wait_for_store(launch: Launch, timeout_s: float) -> None:
    """Wait until the launch's store accepts connections, and report every 10 s that it does not.

    Raises:
        ConfigError: If it does not in time.
    """
    began, next_report_s = time.monotonic(), waiting.REPORT_EVERY_S
    host, port = launch.master_address, launch.master_port
    while True:
        where = f"{host}:{port}"
        try:
            where = describe_address(host, port, resolved := socket.gethostbyname(host))
            socket.create_connection((resolved, port), timeout=_DIAL_TIMEOUT_S).close()
            return
        except OSError as error:
            unreached = f"{where} cannot be reached from {socket.gethostname()} ({describe_os_error(error)})"
        waited_s = time.monotonic() - began
        if waited_s > timeout_s:
            raise ConfigError(
                f"rank {launch.rank} found no rank 0 within {timeout_s:.0f} s: {unreached}. MASTER_ADDR has to be an "
                f"address of rank 0's machine at which the others reach it, and rank 0 has to be started"
            )
        if waited_s > next_report_s:
            logger.warning("rank %d waits for rank 0, for %.0f s so far: %s", launch.rank, waited_s, unreached)
            next_report_s += waiting.REPORT_EVERY_S
        time.sleep(_RETRY_S)
