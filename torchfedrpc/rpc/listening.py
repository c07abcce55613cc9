"""A worker that listens for drivers and serves one at a time, each in a new process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time

from torchfedrpc.errors import ConfigError
from torchfedrpc.rpc import check
from torchfedrpc.rpc.control_link import Link
from torchfedrpc.rpc.handshake import BusyError, Dialler, Listener, RefusedError
from torchfedrpc.rpc.interfaces import describe_os_error
from torchfedrpc.rpc.processes import Process, start_worker

logger = logging.getLogger(__name__)


async def listen(host: str, port: int, token: bytes) -> int:
    """Serve drivers until SIGINT or SIGTERM; for the main thread.

    Once it listens it prints ``listening on HOST:PORT``. The signal is passed on, as SIGTERM, to the worker process,
    and this returns when that has ended. A second signal kills the process.

    Args:
        host: the address to listen on.
        port: the port; 0 lets the system choose.
        token: the shared token.

    Returns:
        The exit status: 0, or 128 plus the number of the signal that killed the worker process.

    Raises:
        ConfigError: If this worker cannot listen there, or the system is not Linux.
    """
    if sys.platform != "linux":
        raise ConfigError("torchfedrpc-worker --listen needs Linux, to end with its driver: join one by --join")
    try:
        server = socket.create_server((host, port))
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({describe_os_error(error)}): name an address of this machine and a "
            f"free port"
        ) from None
    worker = _ListeningWorker()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, worker.stop, number)
    listening = loop.create_task(Listener(server, token, worker.serve).run())
    try:
        print(f"listening on {host}:{server.getsockname()[1]}", flush=True)
        await worker.asked.wait()
        async with worker.serving:
            return worker.status
    finally:
        listening.cancel()
        await asyncio.wait([listening])
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


class _ListeningWorker:
    """Serves one driver after another.

    Attributes:
        asked: set once a signal has asked it to stop.
        serving: held while a driver is served.
        status: the exit status.
    """

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.serving = asyncio.Lock()
        self.status = 0
        self._driver = ""  # the last one, and since when it is served, by the monotonic clock
        self._since = 0.0
        self._process: Process | None = None

    async def serve(self, dialler: Dialler) -> None:
        """Serve a driver to its end, or refuse it."""
        about = dialler.about
        if about.get("role") == check.ROLE:
            await check.answer(dialler, "worker")
            return
        if about.get("role") != "driver":
            await dialler.refuse(
                RefusedError("a worker listens there, for drivers: --join takes the address of a driver")
            )
        if self.asked.is_set():
            await dialler.refuse(BusyError("the worker is stopping: start it again"))
        if self.serving.locked():
            await dialler.refuse(
                BusyError(
                    f"the worker has served {self._driver} for {time.monotonic() - self._since:.0f} s, and "
                    f"serves one at a time: wait for its end, or name another worker"
                )
            )
        async with self.serving:
            self._driver = f"{about.get('program', 'a driver')} (pid {about['pid']} on {about['machine']})"
            self._since = time.monotonic()
            await self._run_process(await dialler.accept({"role": "worker"}))

    def stop(self, number: int) -> None:
        """Handle a signal."""
        if self._process is not None and self.asked.is_set():
            self.status = 128 + number
            self._process.send_signal(signal.SIGKILL)
        elif self._process is not None:
            logger.info("stopping, once worker process %d has ended; a second signal kills it", self._process.pid)
            self._process.send_signal(signal.SIGTERM)
        self.asked.set()

    async def _run_process(self, link: Link) -> None:
        with contextlib.closing(link.detach()) as connection:  # the process gets a copy
            if self.asked.is_set():
                return
            # The process opens the heartbeat connection itself.
            self._process = process = await start_worker(connection.fileno(), remote=True)
        logger.info("worker process %d serves %s", process.pid, self._driver)
        if self.asked.is_set():  # while it was started
            process.send_signal(signal.SIGTERM)
        try:
            await process.ends_within(None)
        finally:
            process.close()  # if this is cancelled, that kills it
            self._process = None
        logger.info("free again: worker process %d ended%s", process.pid, process.how_it_ended())
