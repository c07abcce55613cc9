"""The workers of a launch: how they find the driver, whatever attempt of the launch this is."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import logging
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError, WorkerLostError
from torchfedrpc.launcher import Launch
from torchfedrpc.rpc import reach
from torchfedrpc.rpc.control_link import Link
from torchfedrpc.rpc.greeter import Greeter
from torchfedrpc.rpc.greeting import About, Greeted, GreetingError, MistrustError, RefusedError, dial, parse_address
from torchfedrpc.rpc.interfaces import LOOPBACK, address_of, network_site
from torchfedrpc.rpc.member import Member
from torchfedrpc.rpc.token import VARIABLE, has_token_file, load_token

logger = logging.getLogger(__name__)

_KEY = "torchfedrpc/driver"
_FAILED = "torchfedrpc/failed"  # and the rank: why it cannot come
_GATHER_TIMEOUT_S = 120.0  # ranks of one launch start together; importing torch from a cold disk takes a while
_TELL_EVERY_S = 10.0
_LOOK_S = 0.5
_REPORT_TIMEOUT_S = 10.0
_DIAL_TIMEOUT_S = 10.0
_RETRY_S = 0.2
_STALE_S = 10.0  # the driver may start later than its ranks, and what an earlier attempt has left misleads till then
_NOT_YET = "null"


class LaunchedWorkers:
    """Rank 0's side: publishes where it listens and collects the links of ranks 1 .. world_size - 1.

    It listens from the first run that asks for workers, whose configuration says where and with which token. The
    launcher's store can hold keys of an earlier attempt, so each attempt without a token file has a token of its own.

    Args:
        launch: this process's launch.
    """

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._members: dict[int, Member] = {}
        self._lost: set[int] = set()
        self._complete: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._store = _open_store(launch, serve=not launch.agent_store)
        self._store.set(_KEY, _NOT_YET)
        self._greeter: Greeter | None = None
        self._address = ""  # where ranks are greeted
        self._failure: str | None = None  # why a rank cannot come

    async def members(self, runtime: RuntimeConfig) -> list[Member]:
        """The workers by rank, once all are there, but for those that were lost since.

        Args:
            runtime: says, to the first that asks, on which interface ranks are greeted, and with which token.

        Raises:
            ConfigError: some ranks did not come or cannot, or the interface or the token file cannot be used.
            WorkerLostError: all were lost.
        """
        if self._greeter is None:
            self._listen(runtime)
        complete, began, num_told = asyncio.wrap_future(self._complete), time.monotonic(), 0
        while not complete.done():
            if self._failure is None:
                self._failure = await asyncio.to_thread(self._look_for_failure)
            if self._failure is not None:
                raise ConfigError(self._failure)
            waited_s = time.monotonic() - began
            if waited_s > _GATHER_TIMEOUT_S:
                raise ConfigError(
                    f"ranks {self._missing()} of the launch did not come within {_GATHER_TIMEOUT_S:.0f} s: every "
                    f"rank has to run the same script and reach tfr.run(main), with the token file of this one if it "
                    f"has one"
                )
            num_told = self._name_missing(waited_s, num_told)
            await asyncio.wait([complete], timeout=_LOOK_S)
        present = [self._members[rank] for rank in sorted(set(self._members) - self._lost)]
        if not present:
            raise WorkerLostError(
                "all workers of this launch were lost: start it again, by torchrun's --max-restarts say"
            )
        return present

    def close(self, *, failed: bool) -> None:
        """Tell all workers that the run is over; where it failed they learn it by the end of this process.

        Were they told, one of them might end first, and the launcher would end us before the error is shown.
        """
        if not failed:
            if self._greeter is None:  # no run has asked for workers, and they wait to be told that it is over
                self._listen(RuntimeConfig())
            # One that is still importing would look for us in vain.
            began, waited_s, num_told = time.monotonic(), 0.0, 0
            while self._failure is None and not self._complete.done() and waited_s < _GATHER_TIMEOUT_S:
                self._failure = self._look_for_failure()
                num_told = self._name_missing(waited_s, num_told)
                concurrent.futures.wait([self._complete], _LOOK_S)
                waited_s = time.monotonic() - began
        if self._greeter is not None:
            self._greeter.close()
        for rank in set(self._members) - self._lost:
            member = self._members[rank]
            if failed:
                member.link.detach().detach()  # they end with this process, and with nothing earlier
                member.pulse.detach()
            else:
                member.link.stop()
                member.pulse.close()

    def _listen(self, runtime: RuntimeConfig) -> None:
        """Publish where ranks are greeted; the token too, unless it is in a file, which each of them has."""
        has_file = has_token_file(runtime.token_file)
        token = load_token(runtime.token_file) if has_file else secrets.token_hex(32).encode()
        host, bind = _listen_addresses(self._launch, runtime.interface)
        listener = socket.create_server((bind, 0))
        where = {"host": host, "port": listener.getsockname()[1], "token": None if has_file else token.decode()}
        self._address = f"{host}:{where['port']}"
        self._greeter = Greeter(listener, token, self._answer, self._admit)
        self._store.set(_KEY, json.dumps(where))

    def _missing(self) -> list[int]:
        return sorted(set(range(1, self._launch.world_size)) - set(self._members))

    def _name_missing(self, waited_s: float, num_told: int) -> int:
        """Log every 10 s which ranks are waited for; returns how often that was done."""
        if waited_s <= (num_told + 1) * _TELL_EVERY_S:
            return num_told
        logger.warning("waiting for ranks %s of the launch, for %.0f s so far", self._missing(), waited_s)
        return num_told + 1

    def _look_for_failure(self) -> str | None:
        """Why a rank cannot come, if it has said so in the launcher's store; waits for the store."""
        for rank in self._missing():
            key = f"{_FAILED}/{rank}"
            if self._store.check([key]):
                match json.loads(self._store.get(key)):
                    case {"reason": str(reason), "address": address} if address in (None, self._address):
                        self._store.delete_key(key)  # which the next attempt would take for its own
                        return reason
        return None

    def _dismiss(self, rank: int, reason: str) -> None:
        """A worker was lost: should it come back to life, it ends in order, and its launcher ends no other."""
        self._lost.add(rank)
        member = self._members[rank]
        member.link.stop(reason)
        member.pulse.close()

    def _answer(self, about: About) -> About:
        if about.get("rank") not in range(1, self._launch.world_size):
            raise RefusedError(f"this launch has no rank {about.get('rank')!r}")
        return {"role": "driver"}

    def _admit(self, guest: Greeted) -> None:
        """A rank has come; one that comes again had not heard the end of its greeting."""
        rank = guest.about["rank"]
        former = self._members.get(rank)
        if former is not None:
            former.link.close()
            former.pulse.close()
        self._members[rank] = Member(
            f"worker{rank}",
            guest.link,
            guest.pulse,
            guest.about["machine"],
            dismiss=partial(self._dismiss, rank),
            elsewhere=guest.about["site"] != network_site(),
        )
        if len(self._members) == self._launch.world_size - 1:
            assert self._greeter is not None
            self._greeter.close()
            self._complete.set_result(None)


_current: LaunchedWorkers | None = None


def current_workers() -> LaunchedWorkers | None:
    """The workers of the launch that this process drives, inside `driving`."""
    return _current


@contextmanager
def driving(launch: Launch) -> Iterator[None]:
    """Have the launch's workers at hand; at the end they are told whether the run failed."""
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
        workers.close(failed=failed)


def dial_driver(launch: Launch) -> tuple[Link, socket.socket]:
    """A worker's side: reach the driver of this attempt, however long that takes (a failed launch ends us).

    Where it cannot, the driver is told by the launcher's store, since it would wait for this rank in vain.

    Returns:
        This worker's ends of the link and of the pulse.

    Raises:
        ConfigError: the driver refuses this process, has another token file, or one of them has none; or it has
            ended and could never be reached.
    """
    token = load_token(None) if has_token_file(None) else None
    store = _open_store(launch, serve=False)
    about = {"role": "worker", "rank": launch.rank}
    since = "", 0.0  # the address that is published, and when it was read first
    unreached = "", ""  # an address, and why that one cannot be reached

    def failed(reason: object, address: str) -> ConfigError:
        return ConfigError(_tell_failure(store, launch, f"cannot join the launch: {reason}", address))

    while True:
        try:
            address, published = _driver_in(store)
        except RuntimeError as error:  # the launcher has ended, with the driver
            if unreached[0]:
                raise ConfigError(f"rank {launch.rank} could not join the launch: {unreached[1]}") from error
            raise
        if address != since[0]:
            since = address, time.monotonic()
        if (token is None) == (published is None):
            side = (
                "the driver has a token file and this rank has none"
                if token is None
                else "the driver has no token file and this rank has one"
            )
            raise failed(f"{side}; set {VARIABLE} for every rank of the launch, on each machine", address)
        try:
            driver = asyncio.run(dial(address, token or published or b"", about, timeout_s=_DIAL_TIMEOUT_S))
            return driver.link, driver.pulse
        except RefusedError as error:
            raise failed(error, address) from None
        except MistrustError as error:  # an earlier attempt's address where something else is, or another token
            if token is not None and time.monotonic() - since[1] > _STALE_S:
                raise failed(error, address) from None
        except GreetingError as error:
            logger.debug("no driver of this launch: %s", error)
            if unreached[0] != address and time.monotonic() - since[1] > _STALE_S:
                try:
                    reach.dial(*parse_address(address))  # a driver that is only busy has a port that answers
                except WorkerLostError as reason:
                    unreached = address, str(reason)
                    logger.warning("rank %d cannot reach the driver, and tries on: %s", launch.rank, reason)
                    _tell_failure(store, launch, f"cannot join the launch: {reason}", address)
        time.sleep(_RETRY_S)


def tell_script_ended(launch: Launch, error: BaseException | None) -> None:
    """Tell the driver that the script of this rank has ended before it reached ``tfr.run``, by an error or not."""
    store = _open_store(launch, serve=False, timeout_s=_REPORT_TIMEOUT_S)
    where = f"on {socket.gethostname()} before it reached tfr.run"
    how = (
        f"failed {where}: {type(error).__name__}: {error}"
        if error is not None
        else f"ended {where}: every rank has to run the script to its tfr.run(main), and to call that"
    )
    _tell_failure(store, launch, how, None)


def _tell_failure(store: Any, launch: Launch, failure: str, address: str | None) -> str:
    """Tell the driver that listens at an address, or whichever there is, why this rank does not come."""
    reason = f"rank {launch.rank} {failure}"
    store.set(f"{_FAILED}/{launch.rank}", json.dumps({"reason": reason, "address": address}))
    return reason


def _driver_in(store: Any) -> tuple[str, bytes | None]:
    """Where the launcher's store says that the driver listens, and the token unless that is in a file.

    Waits for as long as the driver asks for no workers; a launch that fails ends this process.
    """
    while not store.check([_KEY]) or (published := store.get(_KEY)) == _NOT_YET.encode():
        time.sleep(_RETRY_S)
    match json.loads(published):
        case {"host": str(host), "port": int(port), "token": str() | None as token}:
            return f"{host}:{port}", None if token is None else token.encode()
    raise ConfigError(f"the launcher's store has no driver of this version of torchfedrpc under {_KEY}")


def _listen_addresses(launch: Launch, interface: str | None) -> tuple[str, str]:
    """The address at which workers find this process, and the one to bind.

    Raises:
        ConfigError: there is no such interface.
    """
    if interface is not None:
        return (address := address_of(interface)), address
    # A launcher that does not tell the number of machines gives their first one's address, which all of them reach;
    # loopback, as a number or by this name, is one that leads to no other machine.
    is_loopback = launch.master_address == "localhost" or launch.master_address.startswith("127.")
    if launch.num_nodes == 1 or (launch.num_nodes is None and is_loopback):
        loopback = address_of(LOOPBACK)
        return loopback, loopback
    resolved = socket.gethostbyname(launch.master_address)
    # Some systems give a host's own name a loopback address, where no other machine could come.
    return launch.master_address, "" if resolved.startswith("127.") else resolved


def _open_store(launch: Launch, *, serve: bool, timeout_s: float = _GATHER_TIMEOUT_S) -> Any:
    distributed: Any = torch.distributed  # some builds have it without its stores
    return distributed.TCPStore(
        launch.master_address,
        launch.master_port,
        is_master=serve,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
    )
