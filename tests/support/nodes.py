"""Two machines for a test: network namespaces of this one, joined by a cable of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from namespaces import ADDRESSES, Nodes
from warm_python import IN_NAMESPACE

NEEDS_NAMESPACES = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2"),
]


def inside(name: str) -> list[str]:
    """What a command that runs in a namespace begins with."""
    return [*IN_NAMESPACE, name]


def listening_addresses(pid: int) -> list[str]:
    """The addresses on which a process of this network namespace listens, one for each port."""
    sockets = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            sockets.add(os.readlink(entry))
    found = []
    for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                words = bytes.fromhex(fields[1].partition(":")[0])  # of four bytes, the last one first
                packed = b"".join(words[start : start + 4][::-1] for start in range(0, len(words), 4))
                found.append(socket.inet_ntop(family, packed).removeprefix("::ffff:"))
    return found


@contextlib.contextmanager
def _joined(connect: Callable[[list[str]], None] | None = None) -> Iterator[dict[str, str]]:
    """Two namespaces: name -> address."""
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(Nodes(connect))
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        yield dict(zip(made.names, ADDRESSES, strict=True))


@pytest.fixture
def nodes() -> Iterator[dict[str, str]]:
    """Two network namespaces: name -> address."""
    with _joined() as nodes:
        yield nodes


@contextlib.contextmanager
def by_cable(
    *, delay_s: float = 0.0, loss: float = 0.0, bytes_per_s: float = 1e8, firewall: bool = False
) -> Iterator[dict[str, str]]:
    """Two network namespaces with a cable that delays and drops packets, see cable.py: name -> address."""
    started: list[subprocess.Popen[str]] = []

    def connect(names: list[str]) -> None:
        if not Path("/dev/net/tun").exists():
            pytest.skip("no tap devices here")
        options = map(str, (delay_s, loss, bytes_per_s, int(firewall)))
        command = [sys.executable, str(Path(__file__).with_name("cable.py")), *names, *options]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert started[0].stdout is not None
        assert started[0].stdout.readline() == "ready\n"
        for name in names:
            command = ["ip", "link", "set", name, "netns", name]
            subprocess.run(command, check=True, capture_output=True, text=True)

    try:
        with _joined(connect) as nodes:
            (cable,) = started
            assert cable.stdin is not None
            cable.stdin.write("\n")
            cable.stdin.flush()
            try:
                yield nodes
                assert cable.poll() is None, "the cable broke"
            finally:
                cable.kill()
    finally:
        for cable in started:
            cable.kill()
            cable.communicate()
