"""Worker processes that a driver starts on its own machine."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass

from torchfedrpc.rpc.control_link import Link

logger = logging.getLogger(__name__)

# The worker finds modules where the driver does, whatever put them there.
_BOOT = """
import json, os, select, sys, threading

def end_with_driver():
    poll = select.poll()
    poll.register(link, getattr(select, "POLLRDHUP", 0))  # for its end alone
    poll.register(imported, select.POLLIN)
    while not (ready := poll.poll(1000)):
        if os.getppid() != parent:  # macOS need not tell of an end for which no event was asked
            os._exit(1)
    if any(descriptor == link for descriptor, _ in ready):
        os._exit(1)
    os.close(imported)

link, pulse, parent, remote = map(int, sys.argv[1:5])
if remote:
    import ctypes
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
    if os.getppid() != parent:
        os._exit(1)
imported, importing = os.pipe()
threading.Thread(target=end_with_driver, daemon=True).start()  # importing torch takes seconds
sys.path[:] = json.loads(sys.argv[5])
from torchfedrpc.rpc import worker
os.close(importing)
sys.argv[:] = json.loads(sys.argv[6])
(worker.main_remote if remote else worker.main)(link, pulse)
"""
_STOP_TIMEOUT_S = 4.0
_LOOK_S = 0.02
_HASH_SEED = "PYTHONHASHSEED"


@dataclass(frozen=True)
class Surroundings:
    """What a worker process has from the process that starts it.

    Attributes:
        flags: the interpreter's.
        path: where modules are found.
        arguments: its ``sys.argv``.
        folder: its working directory; None where that of the starting process was deleted.
        variables: its environment.
    """

    flags: list[str]
    path: list[str]
    arguments: list[str]
    folder: str | None
    variables: dict[str, str]

    @classmethod
    def of_this_process(cls, hash_seed: int | None = None) -> Surroundings:
        """Those of this process as it is now.

        Args:
            hash_seed: what Python's hashes of strings are to be seeded by, 0 to 2**32 - 1, where the environment does
                not say; None leaves them to chance.
        """
        variables = dict(os.environ)
        if hash_seed is not None and variables.get(_HASH_SEED, "random") in ("", "random"):
            variables[_HASH_SEED] = str(hash_seed)
            if sys.flags.ignore_environment:
                logger.warning(
                    "python -E and -I hide %s from workers: the order of a set of strings will differ between them",
                    _HASH_SEED,
                )
        try:
            folder = os.getcwd()
        except FileNotFoundError:
            folder = None
        return cls(interpreter_flags(), list(sys.path), list(sys.argv), folder, variables)


def interpreter_flags() -> list[str]:
    """The command line flags that give another interpreter what this one has: ``-O``, ``-W``, ``-X`` and so on."""
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # as multiprocessing
    for name, value in sys._xoptions.items():  # it leaves some out
        option = name if value is True else f"{name}={value}"
        if option not in flags:
            flags += ["-X", option]
    return flags


def start_worker(
    link: int, pulse: int, *, remote: bool = False, surroundings: Surroundings | None = None
) -> subprocess.Popen[bytes]:
    """Start a worker process.

    Args:
        link: the descriptor of its end of the link, which stays open here.
        pulse: the descriptor of its end of the pulse, likewise.
        surroundings: what else it has; unless given, what this process has now.
        remote: whether it serves a driver that is not this process: it has signals of its own to handle, and it is
            killed when the thread that calls this ends, whatever ends that.
    """
    here = surroundings or Surroundings.of_this_process()
    # What it inherits: a signal that comes before it can handle it waits until then.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT} if remote else set())
    try:
        # A process group of its own: Ctrl-C is for this process, which tells its workers.
        return subprocess.Popen(
            [
                sys.executable,
                *here.flags,
                "-c",
                _BOOT,
                *map(str, (link, pulse, os.getpid(), int(remote))),
                json.dumps(here.path),
                json.dumps(here.arguments),
            ],
            cwd=here.folder,
            env=here.variables,
            pass_fds=[link, pulse],
            stdin=subprocess.DEVNULL,
            process_group=0,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def how_it_ended(process: subprocess.Popen[bytes]) -> str:
    """The signal or the exit status by which a process ended, as a clause; empty while it runs."""
    status = process.poll()
    if status is None:
        return ""
    if status == -signal.SIGKILL:
        return " by SIGKILL, which the system sends where memory runs out"
    return f" by {signal.Signals(-status).name}" if status < 0 else f" with exit status {status}"


async def ends_within(process: subprocess.Popen[bytes], timeout_s: float | None) -> bool:
    """Whether a process ends in that time; no thread waits, of which the user's code may have left none."""
    if process.poll() is not None:
        return True
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    try:
        descriptor = os.pidfd_open(process.pid)
    except (AttributeError, OSError):  # another system than Linux, or a sandbox that forbids it
        return await _is_seen_to_end(process, timeout_s)
    loop.add_reader(descriptor, ended.set)
    try:
        async with asyncio.timeout(timeout_s):
            await ended.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
    return True


async def _is_seen_to_end(process: subprocess.Popen[bytes], timeout_s: float | None) -> bool:
    """The same, by looking again and again."""
    try:
        async with asyncio.timeout(timeout_s):
            while process.poll() is None:
                await asyncio.sleep(_LOOK_S)
    except TimeoutError:
        return False
    return True


class WorkerProcess:
    """A worker process and the driver's ends of its link and its pulse (socket pairs: they have no port).

    Args:
        surroundings: as `start_worker` takes them.
    """

    def __init__(self, surroundings: Surroundings | None = None) -> None:
        ours, theirs = socket.socketpair()
        our_pulse, their_pulse = socket.socketpair()
        with theirs, their_pulse:
            try:
                self._process = start_worker(theirs.fileno(), their_pulse.fileno(), surroundings=surroundings)
            except OSError:  # no memory, or no process left
                ours.close()
                our_pulse.close()
                raise
        self.link = Link(ours)
        self.pulse = our_pulse

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def how_it_ended(self) -> str:
        """The signal or the exit status by which it ended, as a clause; empty while it runs."""
        return how_it_ended(self._process)

    def kill(self) -> None:
        """End the worker at once; `stop` then only waits for that."""
        self.link.close()
        self._process.kill()

    async def stop(self) -> None:
        """Tell the worker that the run is over and wait for its end; kill it after 4 seconds."""
        self.link.stop()
        self.pulse.close()
        if not await ends_within(self._process, _STOP_TIMEOUT_S):
            self._process.kill()
            await ends_within(self._process, None)
        self._process.wait()
