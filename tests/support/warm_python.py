"""Python processes of tests, forked from one that has imported torch: they start in 20 ms, and not in two seconds.

`execute_child` is for `subprocess.Popen`, with commands such as ``python script.py`` and ``python -m torchfedrpc``,
in a network namespace too. What it starts is a child of this process like any other. The ranks that a torchrun starts
are forked from it before its own threads. Commands with flags for the interpreter, with ``-c``, with inherited
descriptors, or with other settings in the environment that are read at a start, run in a fresh interpreter.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import inspect
import json
import os
import runpy
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from processes import environment

_MODULES = {"torch.distributed.run", "torchfedrpc", "torchfedrpc.worker_cli"}
_READ_AT_START = ("PYTHON", "LD_", "OMP_", "MKL_", "OPENBLAS_", "TORCH_", "CUDA_", "HIDDEN_", "MALLOC_")
_IMPORTED: tuple[str, ...] = (
    "torch",
    "numpy.random",
    "torchfedrpc",
    "torchfedrpc.rpc.fork_server",
    "torchfedrpc.proxy",
)
_IMPORTED += ("torchfedrpc.executors.distributed", "torchfedrpc.worker_cli", "torchfedrpc.rpc.launch", "learners")
_IMPORTED += ("torch.distributed.launcher.api", "torch._dynamo")  # the latter by the first optimizer of a process
_IMPORTED += ("torchfedrpc.experiments.cli",)
_IMPORTED_IF_THERE = ("matplotlib.figure", "sklearn.datasets")
_SET_CHILD_SUBREAPER = 36  # of prctl
_NEW_NETWORK = 0x40000000  # of setns
_NEW_HOSTNAME = 0x04000000  # of unshare
IN_NAMESPACE = ["ip", "netns", "exec"]  # and its name
UNDER_HOSTNAME = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"']  # and the name
_PID = struct.Struct("q")
_SERVE = "import sys, warm_python; warm_python.serve(int(sys.argv[1]))"


class _WarmServer:
    """This side of the process that forks.

    Attributes:
        popen: the process.
        control: this side's end of the socket by which it is asked.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.control, theirs = socket.socketpair()
        with theirs:
            self.popen = subprocess.Popen(
                [sys.executable, "-c", _SERVE, str(theirs.fileno())],
                env=environment(),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

    def fork(self, descriptors: Sequence[int], message: dict[str, Any]) -> int:
        """Fork a process; its number."""
        ours, theirs = socket.socketpair()
        prctl = ctypes.CDLL(None).prctl
        with self._lock, ours:
            with theirs:
                socket.send_fds(self.control, [b"+"], [theirs.fileno(), *descriptors])
            ours.sendall(json.dumps(message).encode() + b"\n")
            prctl(_SET_CHILD_SUBREAPER, 1)  # so that this process inherits the child of one that ends
            try:
                told = ours.recv(_PID.size)
            finally:
                prctl(_SET_CHILD_SUBREAPER, 0)
        (pid,) = _PID.unpack(told)
        return int(pid)


_execute_child: Any = subprocess.Popen._execute_child  # type: ignore[attr-defined]
_PARAMETERS = list(inspect.signature(_execute_child).parameters)[1:]
_server: _WarmServer | None = None
waiting: set[int] = set()  # the process that becomes this one's fork server, if it has opened no proxy yet


def current_server() -> _WarmServer | None:
    """The process that forks, if there is one."""
    return _server


def end_server() -> None:
    """End the process that forks; what it has forked goes on."""
    global _server
    if _server is not None:
        _server.control.close()
        _server.popen.wait()
        _server = None


def execute_child(popen: Any, *values: Any) -> None:
    """Stands for the method of `subprocess.Popen` that starts the process."""
    global _server
    given = dict(zip(_PARAMETERS, values, strict=True))
    command = [] if given["shell"] or isinstance(given["args"], str) else list(map(os.fspath, given["args"]))
    command, namespace = _without(IN_NAMESPACE, command)
    command, hostname = _without(UNDER_HOSTNAME, command)
    if not (_is_warm(given, command) and _suits(_variables(given))):
        _execute_child(popen, *values)
        return
    _server = _server or _WarmServer()
    _start(popen, given, command[1:], _server.fork, namespace, hostname)


def _without(prefix: list[str], command: list[str]) -> tuple[list[str], str | None]:
    """The command without a prefix and its argument, and this argument."""
    end = len(prefix) + 1
    return (command[end:], command[end - 1]) if command[: end - 1] == prefix else (command, None)


def _variables(given: dict[str, Any]) -> dict[str, str]:
    return dict(os.environ if given["env"] is None else given["env"])


def _start(
    popen: Any,
    given: dict[str, Any],
    arguments: list[str],
    fork: Callable[[Sequence[int], dict[str, Any]], int],
    namespace: str | None = None,
    hostname: str | None = None,
) -> None:
    """Let a process that is forked be the one of a `subprocess.Popen`, for which that has been given some values."""
    streams = [given["p2cread"], given["c2pwrite"], given["errwrite"]]
    message = {
        "arguments": arguments,
        "folder": os.fspath(given["cwd"] or os.getcwd()),
        "variables": _variables(given),
        "session": given["start_new_session"],
        "group": given["process_group"],
        "namespace": namespace,
        "hostname": hostname,
    }
    popen.pid = fork([one if one >= 0 else standard for standard, one in enumerate(streams)], message)
    popen._child_created = True
    pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
    popen._close_pipe_fds(*(given[name] for name in pipes))


def _is_warm(given: dict[str, Any], command: list[str]) -> bool:
    plain = given["preexec_fn"] is None and not given["pass_fds"] and given["executable"] in (None, sys.executable)
    if not plain or len(command) < 2 or command[0] != sys.executable:
        return False
    if sys._getframe(3).f_globals["__name__"].startswith("asyncio"):  # which wants no child of another's
        return False
    return command[1].endswith(".py") or (command[1] == "-m" and command[2] in _MODULES)


def _suits(variables: Mapping[str, str]) -> bool:
    """Whether a process with this environment may be forked from the one of `environment`."""
    there = environment()
    names = {name for name in (*variables, *there) if name.startswith(_READ_AT_START)}
    names -= {"PYTHONPATH"} - variables.keys()  # see `_become`
    return all(variables.get(name) == there.get(name) for name in names)


# The process that forks.


def serve(descriptor: int) -> None:
    """Fork processes until the other end is closed; those that are forked run what they are to run, and return."""
    for name in _IMPORTED:
        importlib.import_module(name)
    for name in _IMPORTED_IF_THERE:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=descriptor) as control:
        while True:
            _, descriptors, *_ = socket.recv_fds(control, 1, 4)
            if not descriptors:
                os._exit(0)
            with socket.socket(fileno=descriptors.pop(0)) as connection:
                message = json.loads(connection.makefile().readline())
                pid = _fork_an_orphan()
                if pid == 0:
                    break
                connection.sendall(_PID.pack(pid))
            for one in descriptors:
                os.close(one)
    _become(message, descriptors)


def _fork_an_orphan() -> int:
    """Fork a process whose parent has ended; 0 in that one."""
    reads, writes = os.pipe()
    parent = os.fork()
    if parent == 0:
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            os.close(reads)
            os.close(writes)
            while os.getppid() == parent:
                os.sched_yield()
            return 0
        os.write(writes, _PID.pack(pid))
        os._exit(0)
    os.close(writes)
    (pid,) = _PID.unpack(os.read(reads, _PID.size))
    os.close(reads)
    os.waitpid(parent, 0)
    return int(pid)


def _become(message: dict[str, Any], descriptors: list[int]) -> None:
    for standard, one in enumerate(descriptors):
        os.dup2(one, standard)
        os.close(one)
    if message["namespace"]:
        with open(f"/run/netns/{message['namespace']}") as namespace:
            assert ctypes.CDLL(None).setns(namespace.fileno(), _NEW_NETWORK) == 0
    if message["hostname"]:
        assert ctypes.CDLL(None).unshare(_NEW_HOSTNAME) == 0
        socket.sethostname(message["hostname"])
    if message["session"]:
        os.setsid()
    if message["group"] >= 0:
        os.setpgid(0, message["group"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(message["folder"])
    os.environ.clear()
    os.environ.update(message["variables"])
    if "PYTHONPATH" not in os.environ:
        of_tests = environment()["PYTHONPATH"].split(os.pathsep)
        sys.path[1:] = [folder for folder in sys.path[1:] if folder not in of_tests]
    tempfile.tempdir = None
    sys.modules["numpy"].random.seed()
    arguments = message["arguments"]
    is_unbuffered = arguments[0] == "-u"  # as torchrun starts ranks
    first, *rest = arguments[is_unbuffered:]
    sys.stdout.reconfigure(line_buffering=os.isatty(1), write_through=is_unbuffered)  # type: ignore[union-attr]
    if first == "-m" and rest[0] == "torch.distributed.run":
        _keep_ranks(rest)
    elif "RANK" in os.environ:
        sys.modules["torchfedrpc.run"].report_end_of_script()  # as the import of our package does
    else:
        _keep_a_fork_server()
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    if first == "-m":
        sys.argv[:] = rest
        sys.path[0] = os.getcwd()
        runpy._run_module_as_main(rest[0])  # type: ignore[attr-defined]
    else:
        sys.argv[:] = [first, *rest]
        sys.path[0] = os.path.dirname(os.path.realpath(first))
        main.__file__ = first
        with open(first, encoding="utf-8") as script:
            code = compile(script.read(), first, "exec")
        exec(code, main.__dict__)


class _Spare:
    """A child of this process that is forked ahead, and waits for what it is to become; without that it ends with us.

    Args:
        become: What it runs then, with a message and descriptors.
        earlier: The spares that were forked before it.

    Attributes:
        pid: Its process id.
    """

    def __init__(self, become: Callable[[dict[str, Any], list[int]], None], earlier: Sequence[_Spare] = ()) -> None:
        self._ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            for one in (self, *earlier):
                one.close()
            with theirs:
                _, descriptors, *_ = socket.recv_fds(theirs, 1, 3)
                if not descriptors:
                    os._exit(0)
                message = json.loads(theirs.makefile().readline())
            become(message, descriptors)
            sys.exit()
        theirs.close()

    def use(self, descriptors: Sequence[int], message: dict[str, Any]) -> int:
        """Let it become what it is for; its process id."""
        with self._ours:
            socket.send_fds(self._ours, [b"+"], descriptors)
            self._ours.sendall(json.dumps(message).encode() + b"\n")
        return self.pid

    def close(self) -> None:
        """Close this side of its connection."""
        self._ours.close()


def _keep_ranks(arguments: Sequence[str]) -> None:
    """Fork the ranks that torchrun is to start with these arguments."""
    options = dict(one.split("=", 1) for one in arguments if one.startswith("--") and "=" in one)
    count = int(options.get("--nproc-per-node", 0)) * (1 + int(options.get("--max-restarts", 0)))
    spares: list[_Spare] = []
    for _ in range(count):
        spares.append(_Spare(_become, spares))

    def execute(popen: Any, *values: Any) -> None:
        given = dict(zip(_PARAMETERS, values, strict=True))
        if spares and given["args"][:2] == (sys.executable, "-u"):
            _start(popen, given, list(given["args"][1:]), spares.pop().use)
        else:
            _execute_child(popen, *values)

    subprocess.Popen._execute_child = execute  # type: ignore[attr-defined]


def _become_a_fork_server(message: dict[str, Any], descriptors: list[int]) -> None:
    from torchfedrpc.rpc import fork_server

    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    os.environ.clear()
    os.environ.update(message["variables"])
    sys.path[:] = message["path"]
    try:
        fork_server.main(descriptors[0], forks=True)
    finally:
        os._exit(1)


def _keep_a_fork_server() -> None:
    """Fork the process that becomes the fork server of the script's proxies."""
    from torchfedrpc.rpc import processes
    from torchfedrpc.rpc.control_link import close_in_children
    from torchfedrpc.rpc.surroundings import Surroundings

    start_anew = processes._start_interpreter
    spares = [_Spare(_become_a_fork_server)]
    waiting.add(spares[0].pid)

    def start(surroundings: Surroundings, *, forks: bool) -> tuple[subprocess.Popen[bytes], socket.socket]:
        if not spares:
            return start_anew(surroundings, forks=forks)
        driver, server = socket.socketpair()
        close_in_children(driver)
        with server:
            message = {"variables": surroundings.variables, "path": surroundings.path}
            pid = spares.pop().use([server.fileno()], message)
        waiting.clear()
        popen = subprocess.Popen.__new__(subprocess.Popen)
        popen.__dict__.update(
            args=["python"], pid=pid, returncode=None, stdin=None, stdout=None, stderr=None, _child_created=True,
            _waitpid_lock=threading.Lock(), _input=None, _communication_started=False, _sigint_wait_secs=0.25,
        )  # fmt: skip
        return popen, driver

    def forget() -> None:
        for one in spares:
            one.close()
        spares.clear()

    processes._start_interpreter = start
    os.register_at_fork(after_in_child=forget)
