"""The control link: a JSON message a line, answers to their own requests, and the end of the peer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from torchfedrpc.errors import WorkerLostError
from torchfedrpc.rpc import control_link as link_module
from torchfedrpc.rpc.control_link import Link, MalformedError, Message

_TIMEOUT_S = 10.0


@pytest.fixture
def pair() -> Iterator[tuple[Link, Link]]:
    """The driver's end and the worker's."""
    driver, worker = (Link(end) for end in socket.socketpair())
    yield driver, worker
    driver.close()
    worker.close()


class Worker:
    """A worker's end on a thread, that answers each message with what a function makes of it."""

    def __init__(self, link: Link, answers: Callable[[Message], list[Any]]) -> None:
        self.told: list[Message] = []
        self._link = link
        self._answers = answers
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while (message := self._link.receive()) is not None:
            self.told.append(message)
            for reply in self._answers(message):
                self._link.send(reply)

    def join(self) -> None:
        self._thread.join(_TIMEOUT_S)
        assert not self._thread.is_alive()


class Script:
    """A socket that receives the given pieces."""

    def __init__(self, *pieces: bytes | Exception) -> None:
        self._pieces = list(pieces)

    def recv(self, limit: int) -> bytes:
        piece = self._pieces.pop(0)
        if isinstance(piece, Exception):
            raise piece
        assert len(piece) <= limit
        return piece

    def close(self) -> None: ...


def scripted(*pieces: bytes | Exception) -> Link:
    return Link(Script(*pieces))  # type: ignore[arg-type]


# Messages.


@pytest.mark.parametrize(
    "message",
    [
        {"do": "join"},
        {},
        {"text": "ü \n \\ \0 \ud800 \U0001f600", "list": [1, 2.5, None, True], "deep": {"a": {"b": []}}},
        {"long": "x" * 150_000},
    ],
    ids=["short", "empty", "odd", "long"],
)
def test_a_message_arrives_as_it_was_sent(pair: tuple[Link, Link], message: Message) -> None:
    driver, worker = pair
    sender = threading.Thread(target=driver.send, args=(message,))
    sender.start()
    assert worker.receive() == message
    sender.join(_TIMEOUT_S)


def test_messages_go_both_ways_and_stay_in_order(pair: tuple[Link, Link]) -> None:
    driver, worker = pair
    for number in range(5):
        driver.send({"to_worker": number})
        worker.send({"to_driver": number})
    assert [worker.receive() for _ in range(5)] == [{"to_worker": number} for number in range(5)]
    assert [driver.receive() for _ in range(5)] == [{"to_driver": number} for number in range(5)]


@pytest.mark.parametrize(
    "pieces",
    [
        [b'{"a":1}\n{"b":2}\n'],
        [b'{"a":1}\n{"b"', b":2}\n"],
        [b'{"a":1}', b"\n", b'{"b":2}\n'],
        [bytes([byte]) for byte in b'{"a":1}\n{"b":2}\n'],
    ],
    ids=["together", "cut", "newline_alone", "byte_by_byte"],
)
def test_messages_are_told_apart_however_they_are_cut(pieces: list[bytes]) -> None:
    link = scripted(*pieces)
    assert [link.receive(), link.receive()] == [{"a": 1}, {"b": 2}]


@pytest.mark.parametrize(
    "pieces",
    [[b""], [b'{"half":', b""], [ConnectionResetError()], [b'{"half":', BrokenPipeError()]],
    ids=["closed", "closed_in_a_message", "reset", "reset_in_a_message"],
)
def test_the_end_of_the_other_side_is_none(pieces: list[Any]) -> None:
    assert scripted(*pieces).receive() is None


def test_messages_sent_before_the_end_are_still_received(pair: tuple[Link, Link]) -> None:
    driver, worker = pair
    driver.send({"last": 1})
    driver.close()
    assert worker.receive() == {"last": 1}
    assert worker.receive() is None
    assert worker.receive() is None


# Requests.


async def test_a_request_is_answered(pair: tuple[Link, Link]) -> None:
    driver, link = pair
    worker = Worker(link, lambda message: [{"number": message["number"], "sum": sum(message["parts"])}])
    answers = [await driver.request({"do": "add", "parts": [number, 1]}, "worker1") for number in range(3)]
    assert [answer["sum"] for answer in answers] == [1, 2, 3]
    driver.close()
    worker.join()
    assert [message["do"] for message in worker.told] == ["add"] * 3


async def test_a_long_request_and_a_long_answer_arrive(pair: tuple[Link, Link]) -> None:
    driver, link = pair
    worker = Worker(link, lambda message: [{"number": message["number"], "echo": message["text"] * 2}])
    text = "x" * 100_000
    assert (await driver.request({"do": "echo", "text": text}, "worker1"))["echo"] == text * 2
    driver.close()
    worker.join()


async def test_an_answer_without_or_with_another_number_is_passed_over(pair: tuple[Link, Link]) -> None:
    driver, link = pair
    worker = Worker(
        link,
        lambda message: [
            {"number": message["number"] - 1, "of": "an earlier request"},
            {"of": "nobody"},
            {"number": message["number"], "of": "this one"},
        ],
    )
    for _ in range(3):
        assert (await driver.request({"do": "x"}, "worker1"))["of"] == "this one"
    driver.close()
    worker.join()


async def test_the_answer_to_a_cancelled_request_is_not_taken_for_the_next(pair: tuple[Link, Link]) -> None:
    driver, link = pair
    told, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def answers(message: Message) -> list[Any]:
        if message["do"] == "slow":
            loop.call_soon_threadsafe(told.set)
            assert go_on.wait(_TIMEOUT_S)
        return [{"number": message["number"], "done": message["do"]}]

    worker = Worker(link, answers)
    slow = asyncio.create_task(driver.request({"do": "slow"}, "worker1"))
    await asyncio.wait_for(told.wait(), _TIMEOUT_S)
    slow.cancel()
    with pytest.raises(asyncio.CancelledError):
        await slow
    go_on.set()
    assert (await driver.request({"do": "next"}, "worker1"))["done"] == "next"
    driver.close()
    worker.join()
    assert [message["do"] for message in worker.told] == ["slow", "next"]


async def test_an_answer_cut_by_a_cancelled_request_does_not_spoil_the_next(pair: tuple[Link, Link]) -> None:
    driver, worker = pair
    waiting = asyncio.create_task(driver.request({"do": "first"}, "worker1"))
    await asyncio.sleep(0)
    first = await asyncio.to_thread(worker.receive)
    line = json.dumps({"number": first["number"], "of": "first"}).encode() + b"\n"  # type: ignore[index]
    worker._socket.sendall(line[:7])
    while not driver._received:
        await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    worker._socket.sendall(line[7:])
    answering = asyncio.create_task(driver.request({"do": "second"}, "worker1"))
    second = await asyncio.to_thread(worker.receive)
    worker.send({"number": second["number"], "of": "second"})  # type: ignore[index]
    assert (await answering)["of"] == "second"


@pytest.mark.parametrize("half_an_answer", [b"", b'{"number": 0'], ids=["silent", "in_an_answer"])
async def test_a_worker_that_ends_is_lost_by_its_name_and_what_it_was_told(
    pair: tuple[Link, Link], half_an_answer: bytes
) -> None:
    driver, worker = pair
    asking = asyncio.create_task(driver.request({"do": "prepare"}, "worker3 (rank 3)"))
    await asyncio.to_thread(worker.receive)
    worker._socket.sendall(half_an_answer)
    worker.close()
    with pytest.raises(WorkerLostError, match=r"^worker3 \(rank 3\) ended when it was told to prepare .*its output"):
        await asking


async def test_a_worker_that_has_ended_before_is_lost(pair: tuple[Link, Link]) -> None:
    driver, worker = pair
    worker.close()
    for _ in range(2):
        with pytest.raises(WorkerLostError, match="worker1 ended when it was told to join"):
            await driver.request({"do": "join"}, "worker1")


@pytest.mark.parametrize(("timeout_s", "ended_after_ms"), [(1.0, 6000), (5.0, 6000), (10.0, 10_000)])
def test_a_link_is_probed_every_second_and_ended_after_6_s_at_least(timeout_s: float, ended_after_ms: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        link = Link(socket.create_connection(server.getsockname()))
        link.end_when_cut_off(timeout_s)
        names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_USER_TIMEOUT)
        assert [link._socket.getsockopt(socket.IPPROTO_TCP, name) for name in names] == [1, 1, ended_after_ms]
        assert link._socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        link.close()


# What is no answer.

_FLOODS = {
    "an endless line": (b"x" * 4096, "it sent more than 256 KiB"),
    "answers to nothing": (b'{"number": -1}\n' * 300, "it sent more than 256 KiB"),
    "lines of nothing": (b"\n" * 4096, "it sent a line that is no JSON"),
    "no JSON": (b"{]\n", "it sent a line that is no JSON"),
    "no text": (b"\xff\xfe\n", "it sent a line that is no JSON"),
    "too deep": (b"[" * 100_000 + b"\n", "it sent a line that is no JSON"),
    "a huge number": (b'{"number": ' + b"9" * 10_000 + b"}\n", "it sent a line that is no JSON"),
    "a list": (b"[0]\n", "it sent a line that is no message"),
    "a number": (b"0\n", "it sent a line that is no message"),
}


@pytest.mark.parametrize(("flood", "reason"), _FLOODS.values(), ids=_FLOODS)
async def test_a_worker_that_sends_no_answer_is_lost_and_the_loop_goes_on(
    pair: tuple[Link, Link], flood: bytes, reason: str
) -> None:
    driver, worker = pair

    def send() -> None:
        with contextlib.suppress(OSError):  # it is closed under the flood
            while True:
                worker._socket.sendall(flood)

    sender = threading.Thread(target=send)
    asking = asyncio.ensure_future(driver.request({"do": "join"}, "worker1"))
    await asyncio.sleep(0)
    loop, longest, last = asyncio.get_running_loop(), 0.0, time.monotonic()
    sender.start()
    while not asking.done():
        await asyncio.sleep(0)
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
    with pytest.raises(WorkerLostError, match=f"worker1 did not answer properly when it was told to join: {reason}"):
        await asking
    assert longest < 1
    assert loop.is_running()
    sender.join(_TIMEOUT_S)
    assert not sender.is_alive()
    with pytest.raises(WorkerLostError):
        await driver.request({"do": "join"}, "worker1")


def test_a_worker_takes_no_endless_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "_REQUEST_BYTES", 1 << 20)
    with pytest.raises(MalformedError, match="a line of more than 1 MiB"):
        scripted(*[b"x" * 65536] * 20).receive()


# The end.


async def test_closing_ends_a_request_that_waits_for_its_answer(pair: tuple[Link, Link]) -> None:
    driver, worker = pair
    asking = asyncio.ensure_future(driver.request({"do": "prepare"}, "worker1"))
    await asyncio.to_thread(worker.receive)
    driver.close()
    with pytest.raises(WorkerLostError, match="worker1 ended when it was told to prepare"):
        await asyncio.wait_for(asking, _TIMEOUT_S)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(driver.detach().fileno())


def test_stopping_tells_the_worker_and_closes(pair: tuple[Link, Link]) -> None:
    driver, worker = pair
    driver.stop()
    assert worker.receive() == {"do": "stop", "reason": ""}
    assert worker.receive() is None
    assert driver.detach().fileno() == -1


def test_stopping_a_worker_that_is_gone_is_no_error(pair: tuple[Link, Link]) -> None:
    driver, worker = pair
    worker.close()
    driver.stop()
    driver.stop()
    assert driver.detach().fileno() == -1


async def test_stopping_after_a_request_is_still_told(pair: tuple[Link, Link]) -> None:
    driver, link = pair
    worker = Worker(link, lambda message: [{"number": message["number"]}] if "number" in message else [])
    await driver.request({"do": "join"}, "worker1")
    driver.stop()
    worker.join()
    assert worker.told[-1] == {"do": "stop", "reason": ""}


def test_a_link_knows_its_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        link = Link(socket.create_connection(server.getsockname()))
        accepted, _ = server.accept()
        assert link.local_address() == "127.0.0.1"
        link.close()
        accepted.close()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_does_not_keep_the_link_open(pair: tuple[Link, Link]) -> None:
    driver, worker = pair
    child_alive, child_leave = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(child_alive[1], b"x")
        os.read(child_leave[0], 1)
        os._exit(0)
    try:
        os.read(child_alive[0], 1)
        driver.close()
        assert worker.receive() is None  # or it would wait for the child
    finally:
        os.write(child_leave[1], b"x")
        os.waitpid(pid, 0)
        for end in (*child_alive, *child_leave):
            os.close(end)
