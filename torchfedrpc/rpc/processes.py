"""Worker processes that a driver starts on its own machine."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys

from torchfedrpc.rpc.link import Link

# The worker finds modules where the driver does, whatever put them there.
_BOOT = """
import json, os, select, sys, threading

def end_with_driver():
    poll = select.poll()
    poll.register(link, 0)  # for hang-ups alone
    poll.register(imported, 0)
    if any(descriptor == link for descriptor, _ in poll.poll()):
        os._exit(1)
    os.close(imported)

link, (imported, importing) = int(sys.argv[1]), os.pipe()
threading.Thread(target=end_with_driver, daemon=True).start()  # importing torch takes seconds
sys.path[:] = json.loads(sys.argv[3])
from torchfedrpc.rpc.worker import main
os.close(importing)
descriptors = int(sys.argv[1]), int(sys.argv[2])
sys.argv[:] = json.loads(sys.argv[4])
main(*descriptors)
"""
_STOP_TIMEOUT_S = 4.0


class WorkerProcess:
    """A worker process and the driver's ends of its link and its pulse (socket pairs: they have no port)."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        our_pulse, their_pulse = socket.socketpair()
        descriptors = [theirs.fileno(), their_pulse.fileno()]
        # A process group of its own: Ctrl-C is for the driver, which tells its workers.
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, *map(str, descriptors), json.dumps(sys.path), json.dumps(sys.argv)],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            process_group=0,
        )
        theirs.close()
        their_pulse.close()
        self.link = Link(ours)
        self.pulse = our_pulse

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def how_it_ended(self) -> str:
        """The signal or the exit status by which it ended, as a clause; empty while it runs."""
        status = self._process.poll()
        if status is None:
            return ""
        return f" by {signal.Signals(-status).name}" if status < 0 else f" with exit status {status}"

    def kill(self) -> None:
        """End the worker at once; `stop` then only waits for that."""
        self.link.close()
        self._process.kill()

    async def stop(self) -> None:
        """Tell the worker that the run is over and wait for its end; kill it after 4 seconds."""
        self.link.stop()
        self.pulse.close()
        if not await self._ends_within(_STOP_TIMEOUT_S):
            self._process.kill()
            await self._ends_within(None)
        self._process.wait()

    async def _ends_within(self, timeout_s: float | None) -> bool:
        """Whether the process ends in that time; no thread waits, of which the user's code may have left none."""
        if self._process.poll() is not None:
            return True
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        descriptor = os.pidfd_open(self._process.pid)
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
