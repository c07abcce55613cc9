"""Workers that the driver does not start: they listen, or join its run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import secrets
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chaos_process import Command, children_of, command_of
from chaos_report import HANG_S

import torchfedrpc as tfr

LISTENING = "listening on "
FREE = "free again"
_SERVES = re.compile(r"worker process \d+ serves ")  # a refusal of another driver has the word too
_POLL_S = 0.005
_PORTS = 5000  # so many below those that the system gives


class Token(contextlib.AbstractContextManager["Token"]):
    """A token's file, for so long.

    Attributes:
        path: the file.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.path = str(Path(self._folder.name) / "token")
        with open(os.open(self.path, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
            file.write(secrets.token_hex(32))

    def __exit__(self, *exception: object) -> None:
        self._folder.cleanup()

    def command(self, way: str, address: str) -> list[str]:
        """A worker's command.

        Args:
            way: ``listen`` or ``join``.
            address: where.
        """
        return [sys.executable, "-m", "torchfedrpc.worker_cli", f"--{way}", address, "--token-file", self.path]


class Crew(contextlib.AbstractAsyncContextManager["Crew"]):
    """The workers of one run that its driver does not start.

    Args:
        num_listening: how many listen; they share the first clients.
        clients: those clients.

    Attributes:
        listening: address -> its worker.
        joined: label -> its worker, of those that have joined and are there.
        start_s: seconds from the start of one's process until it has come.
    """

    def __init__(self, num_listening: int, clients: list[str]) -> None:
        self._token = Token()
        self._commands: list[Command] = []
        self._clients = clients
        self._addresses = [f"127.0.0.1:{port}" for port in _free_ports(num_listening)]
        self.listening: dict[str, Command] = {}
        self.joined: dict[str, Command] = {}
        self.start_s = 0.0

    async def __aenter__(self) -> Crew:
        began = time.monotonic()
        try:
            await asyncio.gather(*map(self.listen, self._addresses))
            self.start_s = time.monotonic() - began
        except BaseException:
            self._close()
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._close()

    @property
    def runtime(self) -> Mapping[str, Any]:
        """What a run needs to have them."""
        share = -(-len(self._clients) // max(len(self._addresses), 1))
        return {
            "client_endpoints": {
                client: self._addresses[position // share] for position, client in enumerate(self._clients)
            },
            "join_at": "127.0.0.1:0",
            "token_file": self._token.path,
            "rejoin_timeout_s": HANG_S,
        }

    async def listen(self, address: str) -> None:
        """Start a worker that listens, and wait until it does."""
        self.listening[address] = worker = self._start("listen", address)
        await worker.line(LISTENING, 1, HANG_S)

    def join(self, proxy: tfr.LearnerProxy) -> Command:
        """Start a worker that joins a run; whoever does has to add it to ``joined``."""
        assert proxy.join_address is not None
        return self._start("join", proxy.join_address)

    async def dismissed(self) -> None:
        """The run has ended: so do those that joined, and those that listen are free, and end when they are told to.

        Raises:
            HangError: one does not.
            RuntimeError: one has another exit status than 0.
        """
        for worker in self.joined.values():
            await _good_end(worker)
        for worker in self.listening.values():
            num_served = sum(_SERVES.search(line) is not None for line in worker.lines)
            freed = await worker.line(FREE, num_served, HANG_S)
            if not freed.endswith("with exit status 0"):
                raise RuntimeError(f"the last that a worker has to say of its run is {freed!r}")
            worker.signal(signal.SIGTERM)
            await _good_end(worker)

    def dump(self) -> None:
        """Show where everybody is; the run hangs."""
        for worker in self._commands:
            for pid in [worker.pid, *children_of(worker.pid)]:
                if "--listen" not in command_of(pid) and "sidecar.py" not in command_of(pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGUSR2)
        time.sleep(1.0)
        for worker in self._commands:
            print(f"process {worker.pid}:\n{worker.output}", file=sys.stderr)

    def _start(self, way: str, address: str) -> Command:
        self._commands.append(Command(*self._token.command(way, address)))
        return self._commands[-1]

    def _close(self) -> None:
        for worker in self._commands:
            worker.close()
        self._token.__exit__()


async def drained(worker: Command) -> None:
    """Have a worker leave in order.

    Raises:
        HangError: it does not end.
        RuntimeError: it has another exit status than 0.
    """
    worker.signal(signal.SIGTERM)
    await _good_end(worker)


async def label_of(worker: Command, proxy: tfr.LearnerProxy) -> str:
    """The name that a run gives to a worker that joins it, as soon as it has one."""
    group: Any = proxy._router._main._group
    while True:
        ports = _ports_of(worker.pid)
        for member in [*group.members.values(), *group._newcomers.values()]:
            with contextlib.suppress(OSError):  # it is gone, which is not noticed yet
                peer = member.link._socket.getpeername()
                if peer and peer[1] in ports:
                    return member.label
        await asyncio.sleep(_POLL_S)


async def _good_end(worker: Command) -> None:
    if status := await worker.ended(HANG_S):
        raise RuntimeError(f"a worker has ended with status {status}: {worker.output}")


def _ports_of(pid: int) -> set[int]:
    """The local ports of a process's TCP connections."""
    names = set()
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                names.add(os.readlink(entry))
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {int(row[1].rpartition(":")[2], 16) for row in rows if f"socket:[{row[9]}]" in names}


def _free_ports(count: int) -> list[int]:
    """Ports that the system gives to nobody by itself: they are still free when their worker was killed."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = range(max(first - _PORTS, 1024), first)
    found: list[int] = []
    for port in random.Random().sample(candidates, len(candidates)):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
        if len(found) == count:
            break
    return found
