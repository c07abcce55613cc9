"""Worker processes that a driver starts on its own machine, forked from a process that has imported torch."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from typing import Any, Protocol

from torchfedrpc.rpc.control_link import Link
from torchfedrpc.rpc.forks import close_in_children
from torchfedrpc.rpc.surroundings import FORKS, Surroundings

# The server finds modules where the driver does, whatever put them there. While it imports torch, which takes
# seconds, a thread looks after the driver; it has ended before the first fork.
_BOOT = """
import json, os, select, sys, threading

def end_with_driver():
    poll = select.poll()
    poll.register(control, getattr(select, "POLLRDHUP", 0))  # for its end alone
    poll.register(imported, select.POLLIN)
    while not (ready := poll.poll(1000)):
        if os.getppid() != parent:  # macOS need not tell of an end for which no event was asked
            os._exit(1)
    if any(descriptor == control for descriptor, _ in ready):
        os._exit(1)
    os.close(imported)

control, parent, forks = map(int, sys.argv[1:4])
imported, importing = os.pipe()
watch = threading.Thread(target=end_with_driver, daemon=True)
watch.start()
sys.path[:] = json.loads(sys.argv[4])
from torchfedrpc.rpc import fork_server
os.close(importing)
watch.join()
fork_server.main(control, forks=bool(forks))
"""
_NUMBER = struct.Struct("q")  # as fork_server.py sends
_STOP_TIMEOUT_S = 4.0
_LOOK_S = 0.02
_REAP_S = 0.1  # from a worker's end, of which its link tells, to the server's word on it
_END_S = 0.5


class Process(Protocol):
    """A process that serves a driver's learners."""

    pid: int

    def status(self) -> int | None:
        """Its exit status, or minus the signal that ended it; None while it runs."""

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""

    async def ends_within(self, timeout_s: float | None) -> bool:
        """Wait for its end, but not longer than that; whether it has ended. No thread waits."""

    def close(self) -> None:
        """Let go of a process that has ended; one that runs is killed."""


class ForkedProcess:
    """A process that the fork server has forked.

    Args:
        pid: its number.
        connection: where the server tells how it ended, and takes signals for it.
        status: its exit status, where it has ended already.
    """

    def __init__(self, pid: int, connection: socket.socket, status: int | None = None) -> None:
        self.pid = pid
        self._connection = connection
        self._status = status
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def status(self) -> int | None:
        if self._status is None and self._poll.poll(_REAP_S * 1000):
            try:
                self._end(self._connection.recv(_NUMBER.size))
            except ConnectionResetError:
                self._end(b"")
        return self._status

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(OSError):
            self._connection.send(bytes([number]))

    async def ends_within(self, timeout_s: float | None) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                while self._status is None:
                    self._end(await asyncio.get_running_loop().sock_recv(self._connection, _NUMBER.size))
        except TimeoutError:
            return False
        except ConnectionResetError:
            self._end(b"")
        return True

    def _end(self, told: bytes) -> None:
        # No word comes where the server was killed, and its workers with it.
        self._status = _NUMBER.unpack(told)[0] if told else -signal.SIGKILL

    def close(self) -> None:
        self._connection.close()


class OwnProcess:
    """A process that this one has started itself, where there is no fork server.

    Args:
        popen: the process.
        control: this side's end of its control socket, by which it knows that this process is there as it imports.
    """

    def __init__(self, popen: subprocess.Popen[bytes], control: socket.socket) -> None:
        self._popen = popen
        self._control = control
        self.pid = popen.pid

    def status(self) -> int | None:
        return self._popen.poll()

    def send_signal(self, number: int) -> None:
        self._popen.send_signal(number)

    async def ends_within(self, timeout_s: float | None) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                while self._popen.poll() is None:
                    await asyncio.sleep(_LOOK_S)
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        self._control.close()
        self._popen.kill()
        self._popen.wait()


class ForkServer:
    """The driver's side of a process that forks workers.

    Args:
        surroundings: what its workers have.

    Attributes:
        surroundings: the same.
        popen: its process.
        control: this side's end of its control socket; closed, it ends with the last of its workers.
    """

    def __init__(self, surroundings: Surroundings) -> None:
        self.surroundings = surroundings
        self.popen, self.control = _start_interpreter(surroundings, forks=True)

    def is_alive(self) -> bool:
        """Whether it can be asked for workers."""
        return self.popen.poll() is None and self.control.fileno() >= 0

    async def fork(self, link: int, message: dict[str, Any]) -> ForkedProcess:
        """Fork a worker, as `start_worker` does."""
        connection = _request(self.control, link)
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_sendall(connection, json.dumps(message).encode() + b"\n")
            told = await loop.sock_recv(connection, _NUMBER.size)
        except ConnectionError:
            told = b""
        except BaseException:
            connection.close()
            raise
        if not told:  # the server could not import torch, or was killed: so the worker has ended, as its link tells
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(_END_S)
            return ForkedProcess(self.popen.pid, connection, self.popen.returncode)
        (pid,) = _NUMBER.unpack(told)
        if pid < 0:
            connection.close()
            raise OSError(-pid, os.strerror(-pid))
        return ForkedProcess(pid, connection)

    def end(self) -> bool:
        """Take no more requests; whether it has ended, which one whose workers live does not."""
        self.control.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(_END_S)
        return self.popen.returncode is not None


_lock = threading.Lock()
_server: ForkServer | None = None  # the latest one: it stays, for the proxies that are opened later
_former: list[ForkServer] = []  # which end with their workers, and are waited for then


def current_fork_server() -> ForkServer | None:
    """The fork server of this process, if it has one now."""
    return _server


def end_fork_server() -> None:
    """End the fork server of this process, which otherwise ends with it; the next proxy starts another."""
    global _server
    with _lock:
        server, _server = _server, None
        if server is not None and not server.end():
            _former.append(server)


def _fork_server(surroundings: Surroundings) -> ForkServer:
    """The server for workers with these surroundings, started unless it is there."""
    global _server
    _at_the_end()
    if _server is not None and not (_server.is_alive() and _server.surroundings.needs_same_server(surroundings)):
        end_fork_server()
    with _lock:
        _former[:] = [server for server in _former if server.popen.poll() is None]
        if _server is None:
            _server = ForkServer(surroundings)
        return _server


@functools.cache
def _at_the_end() -> None:
    """End the server at this process's end, and leave it to this process where that forks another."""

    def forget() -> None:
        global _lock, _server
        for server in (*_former, *([_server] if _server is not None else [])):
            server.popen.returncode = 0  # it is no child of this process, or its end is not waited for
        _lock, _server = threading.Lock(), None
        _former.clear()

    def leave() -> None:
        end_fork_server()
        forget()  # one whose workers live, since their proxy was never closed

    atexit.register(leave)
    os.register_at_fork(after_in_child=forget)


def _start_interpreter(surroundings: Surroundings, *, forks: bool) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a process that runs ``fork_server.py``, and this side's end of its control socket."""
    ours, theirs = socket.socketpair()
    close_in_children(ours)
    # It inherits the mask. A signal for a worker that cannot handle it yet waits until then.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        with theirs:
            # A process group of its own: Ctrl-C is for this process, which tells its workers.
            command = [sys.executable, *surroundings.flags, "-c", _BOOT, str(theirs.fileno()), str(os.getpid())]
            popen = subprocess.Popen(
                [*command, str(int(forks)), json.dumps(surroundings.path)],
                cwd=surroundings.folder,
                env=surroundings.variables,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL if forks else None,
                process_group=0,
            )
    except BaseException:
        ours.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return popen, ours


def _request(control: socket.socket, link: int) -> socket.socket:
    """Ask for a worker; where the message for it goes, and where one hears of it."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    close_in_children(ours)
    with theirs, open(os.devnull, "w") as nowhere:
        streams = [number if _is_open(number) else nowhere.fileno() for number in (1, 2)]
        with contextlib.suppress(ConnectionError):  # it has ended: so has the worker, as the connection tells
            socket.send_fds(control, [b"+"], [theirs.fileno(), link, *streams])
    return ours


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


async def start_worker(link: int, *, remote: bool = False, surroundings: Surroundings | None = None) -> Process:
    """Start a worker process.

    Args:
        link: the descriptor of its end of the link, which stays open here.
        surroundings: what else it has; unless given, what this process has now.
        remote: whether it serves a driver that is not this process: it has signals of its own to handle.

    Raises:
        OSError: If the system has no memory or no process left.
    """
    here = surroundings or Surroundings.of_this_process()
    message = {**here.to_message(), "remote": remote}
    if FORKS:
        return await _fork_server(here).fork(link, message)
    popen, control = _start_interpreter(here, forks=False)
    process = OwnProcess(popen, control)
    try:
        with _request(control, link) as connection, contextlib.suppress(ConnectionError):
            await asyncio.get_running_loop().sock_sendall(connection, json.dumps(message).encode() + b"\n")
    except BaseException:
        process.close()
        raise
    return process


def how_it_ended(status: int | None) -> str:
    """The signal or the exit status by which a process ended, as a clause; empty while it runs (None)."""
    if status is None:
        return ""
    if status == -signal.SIGKILL:
        return " by SIGKILL, which the system sends where memory runs out"
    return f" by {signal.Signals(-status).name}" if status < 0 else f" with exit status {status}"


class WorkerProcess:
    """A worker process and the driver's end of its control link (a socket pair: it has no port)."""

    def __init__(self, process: Process, link: Link) -> None:
        self._process = process
        self.link = link

    @classmethod
    async def start(cls, surroundings: Surroundings) -> WorkerProcess:
        """Start a worker.

        Args:
            surroundings: as `start_worker` takes them.

        Raises:
            OSError: If the system has no memory or no process left.
        """
        ours, theirs = socket.socketpair()
        link = Link(ours)
        with theirs:
            try:
                process = await start_worker(theirs.fileno(), surroundings=surroundings)
            except BaseException:
                link.close()
                raise
        return cls(process, link)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def how_it_ended(self) -> str:
        """The signal or the exit status by which it ended, as a clause; empty while it runs."""
        return how_it_ended(self._process.status())

    def kill(self) -> None:
        """End the worker at once; `stop` then only waits for that."""
        self.link.close()
        self._process.send_signal(signal.SIGKILL)

    async def stop(self) -> None:
        """Tell the worker that the run is over and wait for its end; kill it after 4 seconds."""
        self.link.stop()
        if not await self._process.ends_within(_STOP_TIMEOUT_S):
            self._process.send_signal(signal.SIGKILL)
            await self._process.ends_within(None)
        self._process.close()
