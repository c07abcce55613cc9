"""A worker that listens for drivers and serves one at a time, each by a process of its own."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from torchfedrpc.errors import ConfigError
from torchfedrpc.rpc.greeter import Greeter
from torchfedrpc.rpc.greeting import About, BusyError, Greeted, RefusedError, in_words
from torchfedrpc.rpc.processes import ends_within, how_it_ended, start_worker

logger = logging.getLogger(__name__)

Start = Callable[..., subprocess.Popen[bytes]]

_PAIRING_TIMEOUT_S = 3.0  # of a driver that may have died between its two greetings


async def listen(host: str, port: int, token: bytes, *, start: Start = start_worker) -> int:
    """Serve drivers until SIGINT or SIGTERM; for the main thread.

    Once it listens it prints ``listening on HOST:PORT``. The signal is passed on, as SIGTERM, to the process that
    serves, and this returns when that has ended; a second signal kills it.

    Args:
        host: the address to listen on.
        port: the port; 0 lets the system choose.
        token: the shared token.
        start: starts the process that serves, as `start_worker` does.

    Returns:
        The exit status: 0, or 128 and the number of the signal that killed the process that served.

    Raises:
        ConfigError: it cannot listen there, or the system is another than Linux.
    """
    if sys.platform != "linux":
        raise ConfigError("torchfedrpc-worker --listen needs Linux, to end with its driver: join one by --join")
    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({in_words(error)}): name an address of this machine and a free port"
        ) from None
    desk = _Desk(start)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, desk.stop, number)
    greeter = Greeter(listener, token, desk.answer, desk.take)
    try:
        print(f"listening on {host}:{listener.getsockname()[1]}", flush=True)
        return await desk.serve()
    finally:
        greeter.close()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


@dataclass
class _Holder:
    """The driver that has this worker.

    Attributes:
        about: what it told about itself.
        since: when it came, by the monotonic clock.
        until: when its place is free again, unless its second connection has come by then.
    """

    about: About
    since: float
    until: float

    def __str__(self) -> str:
        about = self.about
        return f"{about.get('program', 'a driver')} (pid {about['pid']} on {about['machine']})"


class _Desk:
    """Takes one driver after another.

    Args:
        start: what `listen` was given.
    """

    def __init__(self, start: Start) -> None:
        self._start = start
        self._loop = asyncio.get_running_loop()
        self._guests: asyncio.Queue[Greeted | None] = asyncio.Queue()  # None: a signal came
        self._lock = threading.Lock()  # for the holder, which the greeter's thread asks about
        self._holder: _Holder | None = None
        self._is_stopping = False
        self._status = 0
        self._process: subprocess.Popen[bytes] | None = None

    def answer(self, about: About) -> About:
        """Let a driver have this worker, or tell it who has; on the greeter's thread."""
        if about.get("role") != "driver":
            raise RefusedError("a worker listens there, for drivers: --join takes the address of a driver")
        if self._is_stopping:
            raise BusyError("the worker is stopping: start it again")
        now = time.monotonic()
        with self._lock:
            holder = self._holder
            if holder is None or now >= holder.until:
                self._holder = _Holder(about, now, now + _PAIRING_TIMEOUT_S)
            elif holder.about["session"] != about["session"]:
                raise BusyError(
                    f"the worker has served {holder} for {now - holder.since:.0f} s, and serves one at a time: wait "
                    f"for its end, or name another worker"
                )
        return {"role": "worker"}

    def take(self, guest: Greeted) -> None:
        """A driver has come by both connections; on the greeter's thread."""
        with self._lock:
            holder = self._holder
            if holder is None or holder.about["session"] != guest.about["session"]:
                raise RefusedError("its place was given to another driver meanwhile")
            holder.until = math.inf
        self._loop.call_soon_threadsafe(self._guests.put_nowait, guest)

    def stop(self, number: int) -> None:
        """Handle a signal."""
        if self._process is None:
            self._guests.put_nowait(None)
        elif self._is_stopping:
            self._status = 128 + number
            self._process.kill()
        else:
            logger.info("stopping, once worker process %d has ended; a second signal kills it", self._process.pid)
            self._process.terminate()
        self._is_stopping = True

    async def serve(self) -> int:
        """Serve until a signal comes; the exit status."""
        while not self._is_stopping:
            guest = await self._guests.get()
            if guest is not None:
                await self._serve(guest)
                with self._lock:
                    self._holder = None
        while not self._guests.empty():
            guest = self._guests.get_nowait()
            if guest is not None:
                _let_go(guest)
        return self._status

    def _stops(self) -> bool:
        return self._is_stopping

    async def _serve(self, guest: Greeted) -> None:
        if self._stops():  # since it was asked for
            _let_go(guest)
            return
        driver = str(self._holder)
        try:
            process = self._start(guest.link.fileno(), guest.pulse.fileno(), remote=True)
        except OSError:
            logger.exception("no process could be started for %s", driver)
            return
        finally:
            _let_go(guest)
        logger.info("worker process %d serves %s", process.pid, driver)
        self._process = process
        try:
            await ends_within(process, None)
        finally:
            process.kill()  # where this is cancelled
            process.wait()
            self._process = None
        logger.info("free again: worker process %d ended%s", process.pid, how_it_ended(process))


def _let_go(guest: Greeted) -> None:
    """Close this process's copies of the connections, and leave the connections to another process that has them."""
    guest.link.detach().close()
    guest.pulse.close()
