"""The ``torchfedrpc-worker`` command, as a user runs it."""

from __future__ import annotations

import asyncio
import os
import queue
import re
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from workers import WorkerCommand

from torchfedrpc import worker_cli
from torchfedrpc.rpc import worker
from torchfedrpc.rpc.control_link import Link
from torchfedrpc.rpc.handshake import TOKEN_VARIABLE, Dialler, Listener, ListenerThread, RefusedError

TOKEN = "the token that both of the ends have"
Message = dict[str, Any]


@pytest.fixture(autouse=True)
def token_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "token"
    path.write_text(TOKEN)
    path.chmod(0o600)
    return str(path)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A socket that is bound to a port, and does not listen yet."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        yield listener


def address_of(listener: socket.socket) -> str:
    return "{}:{}".format(*listener.getsockname())


Serve = Callable[[Dialler], Awaitable[Link]]


class Driver:
    """Accepts workers; ``joined`` holds them."""

    def __init__(self, listener: socket.socket, serve: Serve, token: str = TOKEN) -> None:
        self.joined: queue.SimpleQueue[tuple[Link, Message]] = queue.SimpleQueue()
        self._accept = serve
        listener.listen()
        self._thread = ListenerThread(Listener(listener, token.encode(), self._serve))

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.close()

    async def _serve(self, dialler: Dialler) -> None:
        self.joined.put((await self._accept(dialler), dialler.about))


async def welcome(dialler: Dialler) -> Link:
    assert dialler.about["role"] == "worker"
    return await dialler.accept({"role": "driver", "program": "train.py", "machine": "hub", "label": "worker4"})


async def busy(dialler: Dialler) -> Link:
    await dialler.refuse(RefusedError("this run takes no more workers: raise its number"))


# Joining.


@pytest.mark.parametrize(
    ("reason", "status", "out", "err"),
    [
        ("", 0, ["the run of train.py on hub has ended well"], ""),
        (
            "it has no learner",
            1,
            [],
            "torchfedrpc-worker: the run of train.py on hub does without this worker: it has no learner\n",
        ),
    ],
)
async def test_joining_serves_until_the_driver_says_stop_or_why_it_gives_the_worker_up(
    listener: socket.socket,
    token_file: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    reason: str,
    status: int,
    out: list[str],
    err: str,
) -> None:
    def serve(link: Any, welcome: str) -> worker.Ending:
        assert welcome == "joined the run of train.py on hub"
        message = link.receive()
        assert message["do"] == "stop"
        assert sys.path[0] == os.getcwd()
        link.close()
        return worker.Ending(True, message["reason"])

    monkeypatch.setattr(worker, "serve_remote", serve)
    with Driver(listener, welcome) as driver:
        command = ["--join", address_of(listener), "--token-file", token_file]
        running = asyncio.create_task(asyncio.to_thread(worker_cli.main, command))
        link, about = await asyncio.to_thread(driver.joined.get, timeout=5)
        assert about["pid"] == os.getpid()
        link.stop(reason)
        assert await running == status
    said = capsys.readouterr()
    assert said.out.splitlines() == ["reached the run of train.py on hub", *out]
    assert said.err == err


async def test_a_driver_that_is_starting_is_waited_for(
    listener: socket.socket, token_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = asyncio.Event()
    loop = asyncio.get_running_loop()
    dial = vars(worker_cli)["dial"]

    async def dial_and_tell(*arguments: Any, **options: Any) -> Any:
        try:
            return await dial(*arguments, **options)
        finally:
            loop.call_soon_threadsafe(tried.set)

    monkeypatch.setattr(worker_cli, "dial", dial_and_tell)

    def serve(link: Link, welcome: str) -> worker.Ending:
        link.close()
        return worker.Ending(True, "")

    monkeypatch.setattr(worker, "serve_remote", serve)
    command = ["--join", address_of(listener), "--token-file", token_file]
    running = asyncio.create_task(asyncio.to_thread(worker_cli.main, command))
    await tried.wait()
    with Driver(listener, welcome) as driver:
        assert await running == 0
        driver.joined.get(timeout=5)[0].close()


def test_a_driver_that_is_not_there_is_an_error_that_names_it(
    listener: socket.socket, token_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(worker_cli, "_RETRY_FOR_S", 0.1)
    assert worker_cli.main(["--join", address_of(listener), "--token-file", token_file]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"torchfedrpc-worker: {address_of(listener)} cannot be reached from ")
    assert "(Connection refused)" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("serve", "token", "told"),
    [(busy, TOKEN, "refused: this run takes no more workers"), (welcome, "another token", "refused the token")],
)
def test_a_driver_that_refuses_is_not_asked_again(
    listener: socket.socket,
    token_file: str,
    capsys: pytest.CaptureFixture[str],
    serve: Serve,
    token: str,
    told: str,
) -> None:
    with Driver(listener, serve, token):
        assert worker_cli.main(["--join", address_of(listener), "--token-file", token_file]) == 1
        assert f"torchfedrpc-worker: {address_of(listener)} {told}" in capsys.readouterr().err


# Settings.


def test_a_wrong_setting_is_a_line_and_exit_status_2(token_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command, told in [
        (["--join", "nowhere", "--token-file", token_file], "'nowhere' is no address of the form HOST:PORT"),
        (["--join", "host:0", "--token-file", token_file], "'host:0' is no address"),
        (["--listen", "http://host:1", "--token-file", token_file], "'http://host:1' is no address"),
        (["--listen", "127.0.0.1:0"], "need a shared token"),
        (["--listen", "127.0.0.1:0", "--token-file", "none"], "token file none: No such file"),
    ]:
        assert worker_cli.main(command) == 2
        error = capsys.readouterr().err
        assert error.startswith("torchfedrpc-worker: ")
        assert told in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("command", [[], ["--listen", "a:1", "--join", "b:1"], ["--token-file", "f"]])
def test_exactly_one_way_is_taken(command: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        worker_cli.main(command)


def test_the_help_says_what_the_network_must_allow(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        worker_cli.main(["--help"])
    told = capsys.readouterr().out
    for word in ("handshake", "NAT", "WireGuard", "in both directions"):
        assert word in told


# End to end.


def test_a_worker_listens_until_sigterm(tmp_path: Path, token_file: str) -> None:
    command = WorkerCommand("--listen", "127.0.0.1:0", folder=tmp_path, variables={TOKEN_VARIABLE: token_file})
    with command as worker:
        line = worker.next_line("^listening on ")
        assert re.fullmatch(r"listening on 127\.0\.0\.1:[1-9]\d*", line), worker.output
        worker.signal(signal.SIGTERM)
        assert worker.ended(timeout_s=10) == 0
        assert worker.lines[-1] == line
