"""Elastic workers, which the driver does not start: they listen, or join its run."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from processes import Process, is_alive
from workers import WorkerCommand, make_token

import torchfedrpc as tfr
from chaos.report import HANG_S, HangError

LISTENING = "listening on "
FREE = "free again"
JOINED = "joined the run of "
_SERVES = re.compile(r"worker process \d+ serves ")  # a refusal of another driver has the word too
_NUM_PORTS = 5000  # below those that the system gives


async def line(process: Process, part: str, count: int = 1, timeout_s: float = HANG_S) -> str:
    """Wait for that many lines that contain a text; returns the last of these.

    Raises:
        HangError: If they are not printed in time.
        RuntimeError: If the process ends before.
    """
    try:
        found = await asyncio.to_thread(process.line_or_end, part, count, timeout_s)
    except TimeoutError:
        raise HangError(f"it does not print {part!r}, but:\n{process.output}\n", timeout_s) from None
    if found is None:
        raise RuntimeError(f"it ended and has not printed {part!r}, but:\n{process.output}")
    return found


async def joined(worker: Process) -> None:
    """Wait until a worker has ended its handshake with the driver."""
    await line(worker, JOINED)


async def drained(worker: Process) -> None:
    """Ask a worker to leave, and wait until it has ended.

    Raises:
        HangError: If it does not end.
        RuntimeError: If it has another exit status than 0.
    """
    worker.signal(signal.SIGTERM)
    await ends_well(worker)


async def ends_well(worker: Process) -> None:
    """Wait for the end of a process.

    Raises:
        HangError: If it does not end.
        RuntimeError: If it has another exit status than 0.
    """
    try:
        status = await asyncio.to_thread(worker.ended, HANG_S)
    except subprocess.TimeoutExpired:
        raise HangError(f"process {worker.pid} does not end") from None
    if status:
        raise RuntimeError(f"process {worker.pid} has ended with status {status}: {worker.output}")


class ElasticWorkers(contextlib.AbstractAsyncContextManager["ElasticWorkers"]):
    """The elastic workers of a run.

    Args:
        num_listening: How many listen; they share the first clients.
        clients: These clients.

    Attributes:
        listening: Address -> worker that listens there.
        joined: The names of the workers that have joined and are there.
        start_s: Seconds from the start of a worker's process until the end of its handshake.
    """

    def __init__(self, num_listening: int, clients: list[str]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._token = make_token(Path(self._folder.name))
        self._commands: list[WorkerCommand] = []
        self._joining: list[Process] = []
        self._clients = clients
        self._addresses = [f"127.0.0.1:{port}" for port in _free_ports(num_listening)]
        self.listening: dict[str, Process] = {}
        self.joined: set[str] = set()
        self.start_s = 0.0

    async def __aenter__(self) -> ElasticWorkers:
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
        """The part of a run's configuration that concerns them."""
        share = -(-len(self._clients) // max(len(self._addresses), 1))
        return {
            "client_endpoints": {
                client: self._addresses[position // share] for position, client in enumerate(self._clients)
            },
            "join_at": "127.0.0.1:0",
            "token_file": self._token,
            "rejoin_timeout_s": HANG_S,
        }

    def joining(self) -> list[Process]:
        """The workers that join or have joined, and have not ended."""
        return [worker for worker in self._joining if is_alive(worker.pid)]

    async def listen(self, address: str) -> None:
        """Start a worker that listens, and wait until it does."""
        self.listening[address] = worker = self._start("--listen", address)
        await line(worker, LISTENING)

    def join(self, proxy: tfr.LearnerProxy) -> Process:
        """Start a worker that joins a run."""
        assert proxy.join_address is not None
        worker = self._start("--join", proxy.join_address)
        self._joining.append(worker)
        return worker

    async def dismissed(self) -> None:
        """Wait for the workers after the end of the run: those that joined end, those that listen are free again.

        Raises:
            HangError: If one does not.
            RuntimeError: If one has another exit status than 0.
        """
        for worker in self.joining():
            await ends_well(worker)
        for worker in self.listening.values():
            num_served = sum(_SERVES.search(text) is not None for text in worker.lines)
            freed = await line(worker, FREE, num_served)
            if not freed.endswith("with exit status 0"):
                raise RuntimeError(f"the last line of a worker about the run is {freed!r}")
            await drained(worker)

    def _start(self, option: str, address: str) -> WorkerCommand:
        self._commands.append(WorkerCommand(option, address, "--token-file", self._token))
        return self._commands[-1]

    def _close(self) -> None:
        for worker in self._commands:
            worker.close()
        self._folder.cleanup()


def _free_ports(count: int) -> list[int]:
    """Ports that the system does not give by itself: they are still free when their worker was killed."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = range(max(first - _NUM_PORTS, 1024), first)
    found: list[int] = []
    for port in random.Random().sample(candidates, len(candidates)):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
        if len(found) == count:
            break
    return found
