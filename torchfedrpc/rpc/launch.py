"""The workers of a launch: how they find the driver, whatever attempt of the launch this is."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import logging
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed

from torchfedrpc.errors import ConfigError, WorkerLostError
from torchfedrpc.launcher import Launch
from torchfedrpc.rpc.interfaces import LOOPBACK, address_of, network_site
from torchfedrpc.rpc.link import Link
from torchfedrpc.rpc.member import Member

logger = logging.getLogger(__name__)

_KEY = "torchfedrpc/driver"
_CHANNELS = ("link", "pulse")  # the connections of each worker
_GATHER_TIMEOUT_S = 120.0  # ranks of one launch start together; importing torch from a cold disk takes a while
_GREETING_TIMEOUT_S = 10.0
_RETRY_S = 0.2


class LaunchedWorkers:
    """Rank 0's side: publishes where it listens and collects the links of ranks 1 .. world_size - 1.

    The launcher's store can hold keys of an earlier attempt, so workers check by a token whom they have reached.

    Args:
        launch: this process's launch.
    """

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._token = secrets.token_hex(16)
        self._greetings: dict[int, dict[str, Link]] = {}  # rank -> its connections so far
        self._members: dict[int, Member] = {}
        self._lost: set[int] = set()
        self._complete: concurrent.futures.Future[None] = concurrent.futures.Future()
        host, bind = _listen_addresses(launch)
        self._listener = socket.create_server((bind, 0))
        self._store = _open_store(launch, serve=not launch.agent_store)
        where = {"host": host, "port": self._listener.getsockname()[1], "token": self._token}
        self._store.set(_KEY, json.dumps(where))
        threading.Thread(target=self._accept, name="torchfedrpc-gather", daemon=True).start()

    async def members(self) -> list[Member]:
        """The workers by rank, once all are there, but for those that were lost since.

        Raises:
            ConfigError: some ranks did not come.
            WorkerLostError: all were lost.
        """
        try:
            async with asyncio.timeout(_GATHER_TIMEOUT_S):
                await asyncio.shield(asyncio.wrap_future(self._complete))
        except TimeoutError:
            missing = sorted(set(range(1, self._launch.world_size)) - set(self._members))
            raise ConfigError(
                f"ranks {missing} of the launch did not come within {_GATHER_TIMEOUT_S:.0f} s: every rank has to run "
                f"the same script and reach tfr.run(main)"
            ) from None
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
            concurrent.futures.wait(
                [self._complete], _GATHER_TIMEOUT_S
            )  # one that is still importing would look for us in vain
        self._listener.close()
        for rank in set(self._members) - self._lost:
            member = self._members[rank]
            if failed:
                member.link.detach().detach()  # they end with this process, and with nothing earlier
                member.pulse.detach()
            else:
                member.link.stop()
                member.pulse.close()

    def _dismiss(self, rank: int) -> None:
        """A worker was lost: should it come back to life, it ends in order, and its launcher ends no other."""
        self._lost.add(rank)
        member = self._members[rank]
        member.link.stop()
        member.pulse.close()

    def _accept(self) -> None:
        while len(self._members) < self._launch.world_size - 1:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed: the run is over
                return
            connection.settimeout(_GREETING_TIMEOUT_S)
            link = Link(connection)
            try:
                hello = link.receive() or {}
                if hello.get("token") != self._token:
                    raise ValueError("not a rank of this launch")
                link.send({"welcome": self._token})
                self._greet(hello["rank"], hello, link)
            except (OSError, ValueError, KeyError):  # a stranger, or one that went away
                link.close()
        self._complete.set_result(None)

    def _greet(self, rank: int, hello: dict[str, Any], link: Link) -> None:
        """A rank has come by one of its two connections."""
        connections = self._greetings.setdefault(rank, {})
        connections[hello["channel"]] = link
        if len(connections) == len(_CHANNELS):
            self._members[rank] = Member(
                f"worker{rank}",
                connections["link"],
                connections["pulse"].detach(),
                hello["machine"],
                dismiss=partial(self._dismiss, rank),
                elsewhere=hello["site"] != network_site(),
            )


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

    Returns:
        This worker's ends of the link and of the pulse.
    """
    store = _open_store(launch, serve=False)
    while True:
        where = json.loads(store.get(_KEY))
        connections: list[Link] = []
        try:
            for channel in _CHANNELS:
                connections.append(_dial(where, {"rank": launch.rank, "channel": channel}))
            link, pulse = connections
            return link, pulse.detach()
        except (OSError, ValueError):  # an earlier attempt's address, where nobody is, or somebody else
            logger.debug("no driver at %s:%s", where["host"], where["port"])
        for connection in connections:
            connection.close()
        time.sleep(_RETRY_S)


def _dial(where: dict[str, Any], hello: dict[str, Any]) -> Link:
    connection = socket.create_connection((where["host"], where["port"]), timeout=_GREETING_TIMEOUT_S)
    link = Link(connection)
    try:
        link.send({**hello, "machine": socket.gethostname(), "site": network_site(), "token": where["token"]})
        if link.receive() != {"welcome": where["token"]}:
            raise ValueError("not the driver of this launch")
    except (OSError, ValueError):
        link.close()
        raise
    connection.settimeout(None)
    return link


def _listen_addresses(launch: Launch) -> tuple[str, str]:
    """The address at which workers find this process, and the one to bind."""
    if launch.num_nodes == 1:
        loopback = address_of(LOOPBACK)
        return loopback, loopback
    resolved = socket.gethostbyname(launch.master_address)
    # Some systems give a host's own name a loopback address, where no other machine could come.
    return launch.master_address, "" if resolved.startswith("127.") else resolved


def _open_store(launch: Launch, *, serve: bool) -> Any:
    distributed: Any = torch.distributed  # some builds have it without its stores
    return distributed.TCPStore(
        launch.master_address,
        launch.master_port,
        is_master=serve,
        wait_for_workers=False,
        timeout=timedelta(seconds=_GATHER_TIMEOUT_S),
    )
