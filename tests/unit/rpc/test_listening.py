"""A worker that listens: one driver at a time, by a process that ends with it, and an end in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest

from torchfedrpc.errors import ConfigError
from torchfedrpc.rpc import listening
from torchfedrpc.rpc.control_link import Link
from torchfedrpc.rpc.handshake import (
    Dialler,
    HandshakeError,
    RefusedError,
    UnreachableError,
    UntrustedError,
    dial,
)
from torchfedrpc.rpc.listening import listen
from torchfedrpc.rpc.processes import OwnProcess

TOKEN = b"the token that both ends have"
DRIVER = {"role": "driver", "program": "train.py"}
SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])

# Sends that it is up, and that it is asked to drain; ends with the exit status that it receives.
CHILD = """
import json, signal, socket, sys
link = socket.socket(fileno=int(sys.argv[1]))
signal.signal(signal.SIGTERM, lambda *_: link.sendall(b'{"do": "drain"}\\n'))
link.sendall(b'{"do": "up"}\\n')
sys.exit(json.loads(link.makefile().readline())["status"])
"""


async def start(link: int, *, remote: bool) -> OwnProcess:
    assert remote
    command = [sys.executable, "-I", "-S", "-c", CHILD, str(link)]
    return OwnProcess(subprocess.Popen(command, pass_fds=[link], process_group=0), socket.socket())


class Worker:
    """A worker that listens on the test's event loop."""

    def __init__(self, address: str, status: asyncio.Task[int]) -> None:
        self.address = address
        self.status = status

    async def driver(self) -> Link:
        """The control link of a driver that is served."""
        link, about = await dial(self.address, TOKEN, DRIVER, timeout_s=5)
        assert about["role"] == "worker"
        assert await asyncio.to_thread(link.receive) == {"do": "up"}
        return link


@contextlib.asynccontextmanager
async def opened(capsys: pytest.CaptureFixture[str]) -> AsyncIterator[Worker]:
    status = asyncio.create_task(listen("127.0.0.1", 0, TOKEN))
    await asyncio.sleep(0)  # as far as it gets without waiting
    head, _, address = capsys.readouterr().out.strip().rpartition(" ")
    assert head == "listening on"
    try:
        yield Worker(address, status)
    finally:
        status.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await status


@pytest.fixture(autouse=True)
def _started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "start_worker", start)


@pytest.fixture(autouse=True)
def _logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


async def logged(caplog: pytest.LogCaptureFixture, text: str) -> None:
    async with asyncio.timeout(10):
        while text not in caplog.text:
            await asyncio.sleep(0.01)


async def test_drivers_are_served_one_after_another(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(capsys) as worker:
        for status in (0, 5):
            driver = await worker.driver()
            driver.send({"status": status})
            assert await asyncio.to_thread(driver.receive) is None  # its process alone had the connection
            driver.close()
            await logged(caplog, f"ended with exit status {status}")
        await logged(caplog, f"serves train.py (pid {os.getpid()} on {socket.gethostname()})")


async def test_refusal_of_another_driver_names_the_driver_that_has_the_worker(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with opened(capsys) as worker:
        driver = await worker.driver()
        with pytest.raises(
            RefusedError,
            match=rf"{worker.address} refused: the worker has served train.py \(pid {os.getpid()} on "
            rf"{socket.gethostname()}\) for [0-9] s, .*name another worker",
        ):
            await dial(worker.address, TOKEN, {**DRIVER, "program": "other.py"}, timeout_s=5)
        driver.close()


async def test_a_driver_that_leaves_in_the_handshake_does_not_keep_the_worker(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    accept = Dialler.accept

    async def leave_first(dialler: Dialler, about: Any) -> Any:
        monkeypatch.setattr(Dialler, "accept", accept)
        raise UntrustedError("it left in the middle of the handshake")

    monkeypatch.setattr(Dialler, "accept", leave_first)
    async with opened(capsys) as worker:
        with pytest.raises(HandshakeError):
            await dial(worker.address, TOKEN, DRIVER, timeout_s=5)
        (await worker.driver()).close()


async def test_refusal_of_a_worker_that_dials_a_worker_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    async with opened(capsys) as worker:
        with pytest.raises(RefusedError, match=r"a worker listens there.*--join takes the address of a driver"):
            await dial(worker.address, TOKEN, {"role": "worker"}, timeout_s=5)


async def test_a_process_that_cannot_be_started_leaves_the_worker_free(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def start_later(*arguments: Any, **options: Any) -> Any:
        tried.append(1)
        if len(tried) == 1:
            raise OSError("no more processes")
        return start(*arguments, **options)

    monkeypatch.setattr(listening, "start_worker", start_later)
    async with opened(capsys) as worker:
        driver, _ = await dial(worker.address, TOKEN, DRIVER, timeout_s=5)
        assert await asyncio.to_thread(driver.receive) is None
        driver.close()
        (await worker.driver()).close()
    assert "no more processes" in caplog.text


# The end.


@SIGNALS
async def test_a_signal_ends_an_idle_worker_at_once(
    capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    async with opened(capsys) as worker:
        signal.raise_signal(number)
        async with asyncio.timeout(5):
            assert await worker.status == 0
        with pytest.raises(UnreachableError):
            await dial(worker.address, TOKEN, DRIVER, timeout_s=5)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@SIGNALS
async def test_a_signal_lets_the_process_drain_and_no_other_driver_in(
    capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    async with opened(capsys) as worker:
        driver = await worker.driver()
        signal.raise_signal(number)
        assert await asyncio.to_thread(driver.receive) == {"do": "drain"}
        with pytest.raises(RefusedError, match="stopping"):
            await dial(worker.address, TOKEN, DRIVER, timeout_s=5)
        assert not worker.status.done()
        driver.send({"status": 3})
        assert await asyncio.to_thread(driver.receive) is None  # and told nothing more
        async with asyncio.timeout(5):
            assert await worker.status == 0
        driver.close()


@SIGNALS
async def test_a_second_signal_kills_the_process(capsys: pytest.CaptureFixture[str], number: signal.Signals) -> None:
    async with opened(capsys) as worker:
        driver = await worker.driver()
        signal.raise_signal(signal.SIGTERM)
        assert await asyncio.to_thread(driver.receive) == {"do": "drain"}
        signal.raise_signal(number)
        async with asyncio.timeout(5):
            assert await worker.status == 128 + number
        assert await asyncio.to_thread(driver.receive) is None
        driver.close()


async def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port} \(Address already in use\).*a free port"):
            await listen("127.0.0.1", port, TOKEN)
    with pytest.raises(ConfigError, match=r"192\.0\.2\.77:0 .*an address of this machine"):
        await listen("192.0.2.77", 0, TOKEN)
