"""Two network namespaces of this machine as two nodes, joined by a cable; needs root and iproute2."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable

ADDRESSES = ("10.99.0.1", "10.99.0.2")


def missing() -> str | None:
    """Why namespaces cannot be made here; None if they can."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "needs root and iproute2"
    name = f"tfr{os.getpid() % 100_000}"
    made = subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
    return None if made.returncode == 0 else f"needs network namespaces ({made.stderr.strip()})"


class Nodes(contextlib.AbstractContextManager["Nodes"]):
    """Two namespaces, and a cable between them; each has a device of its name.

    Args:
        connect: Gives two namespaces of these names such devices; a virtual cable unless given.

    Attributes:
        names: The names of the namespaces.
    """

    def __init__(self, connect: Callable[[list[str]], None] | None = None) -> None:
        self.names = [f"tfr{os.getpid() % 100_000}{letter}" for letter in "ab"]
        self._connect = connect or virtual_cable

    def __enter__(self) -> Nodes:
        try:
            for name in self.names:
                _ip("netns", "add", name)
            self._connect(self.names)
            for name, address in zip(self.names, ADDRESSES, strict=True):
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
                _ip("-n", name, "link", "set", name, "up")
                _ip("-n", name, "link", "set", "lo", "up")
            for name in self.names:  # the kernel tells of a cable up to a second later
                while "state DOWN" in _ip("-n", name, "link", "show", name):
                    time.sleep(0.02)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        """Kill the processes inside, and remove the namespaces; the cable goes with them."""
        for node, name in enumerate(self.names):
            with contextlib.suppress(subprocess.CalledProcessError):
                for pid in self.inside(node):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def on(self, node: int, *command: str) -> list[str]:
        """A command that runs on node 0 or 1."""
        return ["ip", "netns", "exec", self.names[node], *command]

    def unplug(self, node: int) -> None:
        """Unplug the cable of a node."""
        _ip("-n", self.names[node], "link", "set", self.names[node], "down")

    def plug(self, node: int) -> None:
        """Plug it in again."""
        _ip("-n", self.names[node], "link", "set", self.names[node], "up")

    def inside(self, node: int) -> list[int]:
        """The processes on a node."""
        command = ["ip", "netns", "pids", self.names[node]]
        listed = subprocess.run(command, check=True, capture_output=True, text=True)
        return [int(pid) for pid in listed.stdout.split()]


def virtual_cable(names: list[str]) -> None:
    """Join two namespaces by a pair of virtual devices."""
    _ip(*f"link add {names[0]} netns {names[0]} type veth peer name {names[1]} netns {names[1]}".split())


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
