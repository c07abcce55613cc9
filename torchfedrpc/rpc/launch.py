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
from typing import Any

import torch.distributed

from torchfedrpc.errors import ConfigError
from torchfedrpc.launcher import Launch
from torchfedrpc.rpc.interfaces import LOOPBACK, address_of, network_site
from torchfedrpc.rpc.link import Link
from torchfedrpc.rpc.worker_group import Member

logger = logging.getLogger(__name__)

_KEY = "torchfedrpc/driver"
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
        self._members: dict[int, Member] = {}
        self._complete: concurrent.futures.Future[None] = concurrent.futures.Future()
        host, bind = _listen_addresses(launch)
        self._listener = socket.create_server((bind, 0))
        self._store = _open_store(launch, serve=not launch.agent_store)
        where = {"host": host, "port": self._listener.getsockname()[1], "token": self._token}
        self._store.set(_KEY, json.dumps(where))
        threading.Thread(target=self._accept, name="torchfedrpc-gather", daemon=True).start()

    async def members(self) -> list[Member]:
        """The workers by rank, once all are there.

        Raises:
            ConfigError: some ranks did not come.
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
        return [self._members[rank] for rank in range(1, self._launch.world_size)]

    def close(self, *, failed: bool) -> None:
        """Tell all workers that the run is over; where it failed they learn it by the end of this process.

        Were they told, one of them might end first, and the launcher would end us before the error is shown.
        """
        if not failed:
            concurrent.futures.wait(
                [self._complete], _GATHER_TIMEOUT_S
            )  # one that is still importing would look for us in vain
        self._listener.close()
        for member in self._members.values():
            if failed:
                _kept_links.append(member.link)
            else:
                member.link.stop()

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
            except (OSError, ValueError):  # a stranger, or one that went away
                link.close()
                continue
            connection.settimeout(None)
            self._members[hello["rank"]] = Member(link, hello["machine"], elsewhere=hello["site"] != network_site())
        self._complete.set_result(None)


_current: LaunchedWorkers | None = None
_kept_links: list[Link] = []


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


def dial_driver(launch: Launch) -> Link:
    """A worker's side: reach the driver of this attempt, however long that takes (a failed launch ends us)."""
    store = _open_store(launch, serve=False)
    while True:
        where = json.loads(store.get(_KEY))
        hello = {"rank": launch.rank, "machine": socket.gethostname(), "site": network_site()}
        link = None
        try:
            connection = socket.create_connection((where["host"], where["port"]), timeout=_GREETING_TIMEOUT_S)
            link = Link(connection)
            link.send({**hello, "token": where["token"]})
            if link.receive() == {"welcome": where["token"]}:
                connection.settimeout(None)
                return link
        except (OSError, ValueError):  # an earlier attempt's address, where nobody is, or somebody else
            logger.debug("no driver at %s:%s", where["host"], where["port"])
        if link is not None:
            link.close()
        time.sleep(_RETRY_S)


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
