"""Two network namespaces joined by a cable, as two machines; root alone can have them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess

ADDRESSES = ("10.98.0.1", "10.98.0.2")


def missing() -> str | None:
    """Why there can be no namespaces here; None where there can."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "needs root and iproute2"
    name = f"chaos{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
    return None if made.returncode == 0 else f"needs network namespaces ({made.stderr.strip()})"


class Nodes(contextlib.AbstractContextManager["Nodes"]):
    """Two namespaces, 0 and 1, and a cable between them, each end of it called as its namespace."""

    def __init__(self) -> None:
        self._names = [f"chaos{os.getpid()}{letter}" for letter in "ab"]

    def __enter__(self) -> Nodes:
        try:
            for name in self._names:
                _ip("netns", "add", name)
            first, second = self._names
            _ip(*f"link add {first} netns {first} type veth peer name {second} netns {second}".split())
            for name, address in zip(self._names, ADDRESSES, strict=True):
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
                _ip("-n", name, "link", "set", name, "up")
                _ip("-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        """Kill who is inside, and remove them."""
        for node, name in enumerate(self._names):  # the cable goes with them
            with contextlib.suppress(subprocess.CalledProcessError):
                for pid in self.inside(node):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def on(self, node: int, *command: str) -> list[str]:
        """A command that runs on a node."""
        return ["ip", "netns", "exec", self._names[node], *command]

    def unplug(self, node: int) -> None:
        """Take a node's end of the cable out."""
        _ip("-n", self._names[node], "link", "set", self._names[node], "down")

    def plug(self, node: int) -> None:
        """Put it back."""
        _ip("-n", self._names[node], "link", "set", self._names[node], "up")

    def inside(self, node: int) -> list[int]:
        """The processes on a node."""
        command = ["ip", "netns", "pids", self._names[node]]
        listed = subprocess.run(command, check=True, capture_output=True, text=True)
        return [int(pid) for pid in listed.stdout.split()]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
