"""The fork server: a process that imports torch once, and forks the workers of its driver.

``processes.py`` starts it. Importing this module prepares it. It starts no thread and imports no module of the user,
so that a forked worker is like a fresh interpreter that has imported torch.

A template is a process that it has forked, and that serves likewise, but loads what a worker needs before the fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import importlib
import json
import multiprocessing
import os
import select
import signal
import socket
import struct
import sys
import threading
import traceback
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy.random

from torchfedrpc.rpc import worker
from torchfedrpc.wire.scan import compile_patterns

NUMBER = struct.Struct("q")  # the server's reports on a worker: process id or minus an errno, then exit status
NUM_DESCRIPTORS = 4
_CHUNK_BYTES = 65536
_PR_SET_PDEATHSIG = 1
_SIGNALS = {signal.SIGINT, signal.SIGTERM}  # blocked in the server, which ends with its driver alone


@dataclass(frozen=True)
class _Request:
    """A worker to start.

    Attributes:
        connection: The server reports on the worker here, and receives signals for it. When the driver closes it,
            the worker is killed.
        link: Descriptor of the worker's end of the control link.
        stdout: Descriptor of its standard output.
        stderr: Descriptor of its standard error.
        message: ``path``, ``arguments``, ``folder``, ``variables``, ``interactive`` and ``remote``, see
            `Surroundings`; ``preload`` for a worker of a template; ``forks`` for a template itself; empty if the
            driver has withdrawn the request.
    """

    connection: socket.socket
    link: int
    stdout: int
    stderr: int
    message: dict[str, Any]


def main(control_descriptor: int, *, forks: bool) -> NoReturn:
    """Serve a driver until it closes the control socket. In a forked worker this does not return.

    Args:
        control_descriptor: This process's end of the control socket.
        forks: Whether this process forks workers. Otherwise it becomes the first worker itself.
    """
    control = socket.socket(fileno=control_descriptor)
    if forks:
        compile_patterns()  # each worker needs them
    request = _Server(control).serve() if forks else _receive(control)
    while request is not None and request.message.get("forks"):
        control.close()
        _adopt_surroundings(request)
        control = socket.socket(fileno=request.link)
        request = _Server(control).serve()
    if request is None or not request.message:
        os._exit(0)
    try:
        control.close()
        _become_worker(request)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(1)


class _Server:
    """Forks workers, and reports their end to the driver.

    Args:
        control: this process's end of the control socket.
    """

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._workers: dict[int, socket.socket] = {}  # process id -> its connection
        self._poll = select.poll()

    def serve(self) -> _Request | None:
        """Fork workers until the driver has closed the control socket and all workers have ended.

        Returns:
            The worker to become, in a forked process; None in this one.
        """
        woken, wakes = os.pipe()
        os.set_blocking(woken, False)
        os.set_blocking(wakes, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakes)
        gc.collect()
        gc.freeze()  # a collection in a worker would copy the pages of all modules
        self._poll.register(woken, select.POLLIN)
        self._poll.register(self._control, select.POLLIN)
        is_open = True
        while is_open or self._workers:
            ready = {descriptor for descriptor, _ in self._poll.poll()}
            if woken in ready:
                os.read(woken, _CHUNK_BYTES)
                self._reap()
            for pid, connection in self._workers.items():
                if connection.fileno() in ready:
                    self._pass_on(pid, connection)
            if self._control.fileno() in ready:
                request = _receive(self._control)
                is_open = request is not None
                if request is None:
                    self._poll.unregister(self._control)
                elif self._fork(request):
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    os.close(woken)
                    os.close(wakes)
                    return request
        return None

    def _fork(self, request: _Request) -> bool:
        """Fork a worker. Returns whether this process is the worker."""
        server = os.getpid()
        if request.message.get("preload"):
            _preload(**request.message["preload"])
        try:
            pid = os.fork() if request.message else -errno.ECANCELED
        except OSError as error:  # no memory or no process left
            pid = -(error.errno or errno.EAGAIN)
        if pid == 0:
            for connection in (request.connection, *self._workers.values()):
                connection.close()
            os.setpgid(0, 0)  # Ctrl-C reaches only the driver, which stops its workers
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != server:  # it ended before that
                os._exit(1)
            return True
        for descriptor in (request.link, request.stdout, request.stderr):
            os.close(descriptor)
        _tell(request.connection, pid)
        if pid > 0:
            self._workers[pid] = request.connection
            self._poll.register(request.connection, select.POLLIN)
        else:
            request.connection.close()
        return False

    def _pass_on(self, pid: int, connection: socket.socket) -> None:
        """Send a worker the signals that the driver requests, and SIGKILL when the driver closes the connection."""
        try:
            signals = connection.recv(_CHUNK_BYTES)
        except ConnectionResetError:  # closed, with something unread
            signals = b""
        for number in signals or [signal.SIGKILL]:
            os.kill(pid, number)  # until it is reaped no other process has its number
        if not signals:
            self._poll.unregister(connection)

    def _reap(self) -> None:
        """Report the workers that have ended to the driver."""
        while self._workers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            if (connection := self._workers.pop(pid, None)) is None:  # an import has started it
                continue
            with contextlib.suppress(KeyError):  # the driver has closed it
                self._poll.unregister(connection)
            _tell(connection, os.waitstatus_to_exitcode(status))
            connection.close()


def _receive(control: socket.socket) -> _Request | None:
    """Return the driver's next request; None if it has closed the control socket."""
    try:
        data, descriptors, *_ = socket.recv_fds(control, 1, NUM_DESCRIPTORS)
    except ConnectionResetError:
        return None
    if not data:
        return None
    connection = socket.socket(fileno=descriptors.pop(0))
    line = b""
    while not line.endswith(b"\n"):
        try:
            chunk = connection.recv(_CHUNK_BYTES)
        except ConnectionResetError:
            chunk = b""
        line += chunk
        if not chunk:
            line = b"{}\n"
    link, stdout, stderr = descriptors
    return _Request(connection, link, stdout, stderr, json.loads(line))


def _tell(connection: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # the driver has closed it
        connection.send(NUMBER.pack(number), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def _preload(function: str, **kwargs: Any) -> None:
    """Load what the next worker needs. Does nothing if the function returns False: it is loaded.

    This process ends if that fails, or leaves a thread, which no forked process would have. The driver then has its
    workers forked without, and they load for themselves, or fail in the same way and tell of it.
    """
    module, name = function.split(":")
    try:
        if getattr(importlib.import_module(module), name)(**kwargs):
            gc.collect()
            gc.freeze()
        if threading.active_count() == 1:
            return
    except BaseException:
        pass
    os._exit(1)


def _become_worker(request: _Request) -> NoReturn:
    """Serve learners."""
    _adopt_surroundings(request)
    # A fresh interpreter seeds these at random. A fork seeds Python's own random numbers anew.
    multiprocessing.current_process().authkey = os.urandom(32)
    numpy.random.seed()
    if request.message["remote"]:
        worker.main_remote(request.link)  # which unblocks the signals once it handles them
    else:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        worker.main(request.link)
    os._exit(0)


def _adopt_surroundings(request: _Request) -> None:
    """Give this process the state of a process that the driver has just started."""
    request.connection.close()
    message = request.message
    for descriptor, standard in ((request.stdout, 1), (request.stderr, 2)):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    # The server's is no terminal. That of a notebook is a pipe, and shows what a learner prints at once.
    sys.stdout.reconfigure(line_buffering=os.isatty(1) or message["interactive"])  # type: ignore[union-attr]
    if message["folder"] is not None:
        os.chdir(message["folder"])
    for name, value in message["variables"].items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    sys.path[:] = message["path"]
    sys.argv[:] = message["arguments"]
    importlib.invalidate_caches()  # of folders whose content has changed since the server looked
