"""The heartbeat connection: opened by the worker that the driver has asked, and a test of the ways of a world."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from torchfedrpc.errors import WorkerLostError
from torchfedrpc.rpc import heartbeat_connection
from torchfedrpc.rpc.control_link import Link, Message
from torchfedrpc.rpc.heartbeat_connection import dial_heartbeat, open_heartbeat
from torchfedrpc.rpc.member import Member


class Worker:
    """The worker's end of a control link."""

    def __init__(self, link: Link, member: Member) -> None:
        self.link = link
        self.member = member
        self.servers: list[socket.socket] = []

    async def asked(self) -> Message:
        """The request for a connection."""
        message = await asyncio.to_thread(self.link.receive)
        assert message is not None
        assert message["do"] == "connect"
        return message

    def answer(self, message: Message, **changes: Any) -> None:
        """Answer the request as a worker on loopback does."""
        server = socket.create_server(("127.0.0.1", 0))
        self.servers.append(server)
        port = server.getsockname()[1]
        self.link.send({"number": message["number"], "host": "127.0.0.1", "port": port, **changes})


@pytest.fixture
def worker() -> Iterator[Worker]:
    one, other = socket.socketpair()
    ours, theirs = Link(one), Link(other)
    worker = Worker(theirs, Member("worker1", ours, "here"))
    yield worker
    for link in (ours, theirs):
        link.close()
    for server in worker.servers:
        server.close()


@contextlib.asynccontextmanager
async def opening(worker: Worker) -> AsyncIterator[tuple[Message, asyncio.Future[socket.socket]]]:
    """A driver that waits for the worker's connection, and what it has asked for."""
    worker.member.begin()
    waiting = asyncio.ensure_future(open_heartbeat(worker.member, worker.member.tell, "127.0.0.1", None, 5.0))
    try:
        yield await worker.asked(), waiting
    finally:
        waiting.cancel()
        await asyncio.wait([waiting])


def dialled(message: Message) -> socket.socket:
    return dial_heartbeat(message["host"], message["port"], bytes.fromhex(message["secret"]), 5.0)


async def test_the_connection_has_the_heartbeats_from_the_first_on(worker: Worker) -> None:
    async with opening(worker) as (message, waiting):
        with dialled(message) as theirs:
            theirs.sendall(b"\n")
            worker.answer(message)
            with await waiting as ours:
                assert await asyncio.get_running_loop().sock_recv(ours, 10) == b"\n"


async def test_strangers_that_come_first_are_closed(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat_connection, "_STRANGER_TIMEOUT_S", 0.1)
    async with opening(worker) as (message, waiting):
        address = message["host"], message["port"]
        strangers = [socket.create_connection(address) for _ in range(4)]
        strangers[0].close()
        strangers[1].sendall(b"GET / HTTP/1.1\r\nHost: here and some more\r\n\r\n")
        strangers[2].sendall(b"half of a secret")  # and then silence
        with dialled(message) as theirs:
            worker.answer(message)
            with await waiting as ours:
                theirs.sendall(b"\n")
                assert await asyncio.get_running_loop().sock_recv(ours, 10) == b"\n"
        for stranger in strangers[1:]:
            with stranger, contextlib.suppress(ConnectionResetError):
                assert stranger.recv(10) == b""


async def test_a_worker_that_opens_no_connection_is_lost_in_time(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat_connection, "_TIMEOUT_S", 0.2)
    async with opening(worker) as (message, waiting):
        worker.answer(message)
        with pytest.raises(WorkerLostError, match="worker1 did not open its heartbeat connection"):
            await waiting


async def test_an_address_of_the_worker_that_does_not_answer_is_named_with_the_timeout(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat_connection, "_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as stack:
        for _ in range(4):  # so that the next one waits
            waiting_one = stack.enter_context(socket.socket())
            waiting_one.setblocking(False)
            waiting_one.connect_ex(full.getsockname())
        host, port = full.getsockname()
        async with opening(worker) as (message, waiting):
            with dialled(message) as theirs:
                worker.answer(message, host=host, port=port)
                with pytest.raises(
                    WorkerLostError, match=rf"{host}:{port} cannot be reached from .* \(no answer within 0\.2 s"
                ):
                    await waiting
                assert theirs.recv(1) == b""


def test_an_address_of_the_driver_that_refuses_is_named_with_the_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
    with pytest.raises(WorkerLostError, match=rf"{host}:{port} cannot be reached .*refused.*ephemeral ports.*wg0"):
        dial_heartbeat(host, port, b"0" * 32, 5.0)


@pytest.mark.parametrize(
    "answer",
    [{"host": "a.name.to.look.up", "port": 1}, {"host": None}, {"port": 0}, {"port": 1 << 20}, {"host": 1},
     {"port": "1"}],
)  # fmt: skip
async def test_an_address_of_another_form_is_not_dialled(worker: Worker, answer: Any) -> None:
    async with opening(worker) as (message, waiting):
        worker.answer(message, **answer)
        with pytest.raises(WorkerLostError, match="worker1 was told to connect, and its answer is not of the form"):
            await waiting
