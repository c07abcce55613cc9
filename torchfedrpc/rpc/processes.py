"""Worker processes that a driver starts on its own machine."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys

from torchfedrpc.rpc.link import Link

# The worker finds modules where the driver does, whatever put them there.
_BOOT = """
import json, sys
sys.path[:] = json.loads(sys.argv[2])
from torchfedrpc.rpc.worker import main
descriptor = int(sys.argv[1])
sys.argv[:] = json.loads(sys.argv[3])
main(descriptor)
"""
_STOP_TIMEOUT_S = 5.0


class WorkerProcess:
    """A worker process and the driver's end of its link (a socket pair: no port, and nobody else on it)."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        # A process group of its own: Ctrl-C is for the driver, which tells its workers.
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, str(theirs.fileno()), json.dumps(sys.path), json.dumps(sys.argv)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            process_group=0,
        )
        theirs.close()
        self.link = Link(ours)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def stop(self) -> None:
        """Tell the worker that the run is over and wait for its end; kill it after 5 seconds."""
        self.link.stop()
        try:
            await asyncio.to_thread(self._process.wait, _STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
