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
from abc import ABC, abstractmethod
from typing import Any

from torchfedrpc.rpc.control_link import pair_for_child
from torchfedrpc.rpc.surroundings import FORKS, Surroundings

# The server has the driver's ``sys.path``. While it imports torch, which takes seconds, a thread watches the driver;
# the thread has ended before the first fork.
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
_NUMBER = struct.Struct("q")  # see fork_server.py
_LOOK_S = 0.02
_END_S = 0.5
_MAX_TEMPLATES = 4  # each keeps what it has loaded in memory


class Process(ABC):
    """A process that serves a driver's learners.

    Attributes:
        pid: Process id.
    """

    pid: int

    @abstractmethod
    def status(self) -> int | None:
        """Return the exit status, or minus the signal that ended the process; None while it runs."""

    @abstractmethod
    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""

    @abstractmethod
    async def ends_within(self, timeout_s: float | None) -> bool:
        """Wait for the end of the process, for a limited time. Returns whether it has ended. Uses no thread."""

    @abstractmethod
    def close(self) -> None:
        """Release a process that has ended. A running one is killed."""

    def how_it_ended(self) -> str:
        """Return the signal or exit status by which it ended, as a clause; empty while it runs."""
        status = self.status()
        if status is None:
            return ""
        if status == -signal.SIGKILL:
            return " by SIGKILL, which the system sends where memory runs out"
        return f" by {signal.Signals(-status).name}" if status < 0 else f" with exit status {status}"


class ForkedProcess(Process):
    """A process that the fork server has forked.

    Args:
        pid: Process id.
        connection: Connection on which the server reports its end, and takes signals for it.
        status: Exit status if it has ended already.
    """

    def __init__(self, pid: int, connection: socket.socket, status: int | None = None) -> None:
        self.pid = pid
        self._connection = connection
        self._status = status
        self._reading: asyncio.Task[None] | None = None
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def status(self) -> int | None:
        if self._status is None and self._poll.poll(0):
            try:
                self._end(self._connection.recv(_NUMBER.size))
            except ConnectionResetError:
                self._end(b"")
        return self._status

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(OSError):
            self._connection.send(bytes([number]))

    async def ends_within(self, timeout_s: float | None) -> bool:
        if self._status is None:
            if self._reading is None:  # one task for all callers: a socket has one reader
                self._reading = asyncio.ensure_future(self._read())
            await asyncio.wait([self._reading], timeout=timeout_s)
        return self._status is not None

    async def _read(self) -> None:
        try:
            self._end(await asyncio.get_running_loop().sock_recv(self._connection, _NUMBER.size))
        except ConnectionResetError:
            self._end(b"")

    def _end(self, told: bytes) -> None:
        if self._status is None:
            # If the server was killed, its workers were killed with it, and no report comes.
            self._status = _NUMBER.unpack(told)[0] if told else -signal.SIGKILL

    def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        self._connection.close()


class OwnProcess(Process):
    """A process that this one has started itself, on systems without fork server.

    Args:
        popen: The process.
        control: This side's end of its control socket, which shows it that this process lives while it imports.
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
        surroundings: State that its workers take over.

    Attributes:
        surroundings: The same.
        popen: The process.
        control: This side's end of the control socket. After it is closed, the server ends with its last worker.
    """

    def __init__(self, surroundings: Surroundings) -> None:
        self.surroundings = surroundings
        self.popen, self.control = _start_interpreter(surroundings, forks=True)
        self._templates: dict[
            tuple[Any, ...], Template | None
        ] = {}  # by `template_key`, the latest last; None if it has failed

    def is_alive(self) -> bool:
        """Return whether the server can fork workers."""
        return self.popen.poll() is None and self.control.fileno() >= 0

    async def fork(
        self, link: int, message: dict[str, Any], surroundings: Surroundings | None = None
    ) -> ForkedProcess:
        """Fork a worker, from a template if its surroundings have something to preload. See `start_worker`."""
        if surroundings is not None and surroundings.preload is not None:
            preload = {"preload": surroundings.preload.to_message()}
            if (forked := await self._fork_from_template(link, message | preload, surroundings)) is not None:
                return forked
        connection, pid = await _fork(self.control, link, message)
        if pid is not None:
            return ForkedProcess(pid, connection)
        # The server could not import torch, or was killed, and the worker has ended.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(_END_S)
        return ForkedProcess(self.popen.pid, connection, self.popen.returncode)

    async def _fork_from_template(
        self, link: int, message: dict[str, Any], surroundings: Surroundings
    ) -> ForkedProcess | None:
        """Fork a worker from the template for its surroundings, made if needed; None if the template has failed."""
        key = surroundings.template_key()
        template = self._templates.pop(key) if key in self._templates else Template(self.control, surroundings)
        self._templates[key] = template
        if len(self._templates) > _MAX_TEMPLATES:
            eldest = self._templates.pop(next(iter(self._templates)))
            if eldest is not None:
                eldest.close()
        if template is None:
            return None
        connection, pid = await _fork(template.control, link, message)
        if pid is not None:
            return ForkedProcess(pid, connection)
        connection.close()
        template.close()
        self._templates[key] = None
        return None

    def end(self) -> bool:
        """Fork no more workers. Returns whether the server has ended; it lives as long as its workers."""
        for template in self._templates.values():
            if template is not None:
                template.control.close()
        self.control.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(_END_S)
        return self.has_ended()

    def has_ended(self) -> bool:
        """Return whether the server has ended, and then release what its templates have here."""
        if self.popen.poll() is None:
            return False
        for template in filter(None, self._templates.values()):
            template.close()
        self._templates.clear()
        return True


class Template:
    """The driver's side of a process that the fork server has forked, and that forks workers with what it has loaded.

    Args:
        server: Control socket of the fork server.
        surroundings: State that it takes over.

    Attributes:
        control: This side's end of the control socket. After it is closed, the process ends with its last worker.
    """

    def __init__(self, server: socket.socket, surroundings: Surroundings) -> None:
        self.control, theirs = pair_for_child()
        with theirs:
            self._connection = _request(server, theirs.fileno())
        self._connection.setblocking(True)
        with contextlib.suppress(ConnectionError):  # the server has ended
            self._connection.sendall(json.dumps(surroundings.to_message() | {"forks": True}).encode() + b"\n")

    def close(self) -> None:
        """Kill the process and its workers."""
        self.control.close()
        self._connection.close()


async def _fork(control: socket.socket, link: int, message: dict[str, Any]) -> tuple[socket.socket, int | None]:
    """Request a worker. Returns its connection and process id; no id if the process that forks has ended.

    Raises:
        OSError: If the system has no memory or no process left.
    """
    connection = _request(control, link)
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_sendall(connection, json.dumps(message).encode() + b"\n")
        told = await loop.sock_recv(connection, _NUMBER.size)
    except ConnectionError:
        told = b""
    except BaseException:
        connection.close()
        raise
    if not told:
        return connection, None
    (pid,) = _NUMBER.unpack(told)
    if pid < 0:
        connection.close()
        raise OSError(-pid, os.strerror(-pid))
    return connection, pid


_lock = threading.Lock()
_server: ForkServer | None = None  # the latest one, which is kept for later proxies
_former: list[ForkServer] = []  # servers that end with their last workers


def current_fork_server() -> ForkServer | None:
    """Return the fork server of this process; None if there is none."""
    return _server


def end_fork_server() -> None:
    """End the fork server of this process before this process ends. The next proxy starts another one."""
    global _server
    with _lock:
        server, _server = _server, None
        if server is not None and not server.end():
            _former.append(server)


def _fork_server(surroundings: Surroundings) -> ForkServer:
    """Return the server for workers with these surroundings, and start it if needed."""
    global _server
    _at_the_end()
    if _server is not None and not (_server.is_alive() and _server.surroundings.needs_same_server(surroundings)):
        end_fork_server()
    with _lock:
        _former[:] = [server for server in _former if not server.has_ended()]
        if _server is None:
            _server = ForkServer(surroundings)
        return _server


@functools.cache
def _at_the_end() -> None:
    """End the server at the end of this process, and let forked children of this process ignore it."""

    def forget() -> None:
        global _lock, _server
        for server in (*_former, *([_server] if _server is not None else [])):
            server.popen.returncode = 0  # it is no child of this process, or its end is not waited for
        _lock, _server = threading.Lock(), None
        _former.clear()

    def leave() -> None:
        end_fork_server()
        forget()  # a server with running workers, since their proxy was never closed

    atexit.register(leave)
    os.register_at_fork(after_in_child=forget)


def _start_interpreter(surroundings: Surroundings, *, forks: bool) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a process that runs ``fork_server.py``. Returns it, and this side's end of its control socket."""
    ours, theirs = pair_for_child()
    # It inherits the mask. A signal for a worker that cannot handle it yet stays pending until it can.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        with theirs:
            # In a separate process group: Ctrl-C reaches only this process, which stops its workers.
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
    """Request a worker. Returns the connection for the message to it and for the server's reports on it."""
    ours, theirs = pair_for_child()
    ours.setblocking(False)
    with theirs, open(os.devnull, "w") as nowhere:
        streams = [number if _is_open(number) else nowhere.fileno() for number in (1, 2)]
        with contextlib.suppress(ConnectionError):  # the server and its workers have ended, see the connection
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
        link: Descriptor of the worker's end of the control link, which stays open here.
        surroundings: State that it takes over; None for the present state of this process.
        remote: Whether it serves a driver other than this process, and handles signals itself.

    Raises:
        OSError: If the system has no memory or no process left.
    """
    here = surroundings or Surroundings.of_this_process()
    message = {**here.to_message(), "remote": remote}
    if FORKS:
        return await _fork_server(here).fork(link, message, here)
    popen, control = _start_interpreter(here, forks=False)
    process = OwnProcess(popen, control)
    try:
        with _request(control, link) as connection, contextlib.suppress(ConnectionError):
            await asyncio.get_running_loop().sock_sendall(connection, json.dumps(message).encode() + b"\n")
    except BaseException:
        process.close()
        raise
    return process
