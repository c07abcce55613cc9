"""The listener: diallers that have the token are served, and strangers neither delay them nor end it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import pickle
import queue
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from torchfedrpc.rpc import handshake
from torchfedrpc.rpc.control_link import Link
from torchfedrpc.rpc.handshake import (
    Dialler,
    Listener,
    ListenerThread,
    RefusedError,
    UnreachableError,
    UntrustedError,
    dial,
)

TOKEN = b"the token that both ends have"
Message = dict[str, Any]


class Door:
    """A listener on loopback; ``served`` holds the diallers with their links."""

    def __init__(
        self,
        serve: Callable[[Dialler], Awaitable[None]] | None = None,
        server: socket.socket | None = None,
        **limits: float,
    ) -> None:
        self.served: queue.SimpleQueue[tuple[Link, Message]] = queue.SimpleQueue()
        self.server = server or socket.create_server(("127.0.0.1", 0))
        self.where = self.server.getsockname()
        self.address = "{}:{}".format(*self.where)
        self.listener = Listener(self.server, TOKEN, serve or self._serve, **limits)
        self.thread = ListenerThread(self.listener)

    async def _serve(self, dialler: Dialler) -> None:
        self.served.put((await dialler.accept({"role": "worker"}), dialler.about))

    def connect(self) -> socket.socket:
        connection = socket.create_connection(self.where)
        connection.settimeout(20)
        return connection

    async def lets_in(self) -> None:
        """A dialler with the token is served, and its link works."""
        ours, listener = await dial(self.address, TOKEN, {"role": "driver"}, timeout_s=5)
        theirs, dialler = await asyncio.to_thread(self.served.get, timeout=5)
        theirs.send({"do": "something"})
        assert ours.receive() == {"do": "something"}
        assert (dialler["role"], listener["role"]) == ("driver", "worker")
        ours.close()
        theirs.close()


@pytest.fixture
def opened() -> Iterator[Callable[..., Door]]:
    doors: list[Door] = []

    def opened(*args: Any, **kwargs: Any) -> Door:
        doors.append(Door(*args, **kwargs))
        return doors[-1]

    yield opened
    for door in doors:
        door.thread.close()
        assert door.server.fileno() == -1
    assert "torchfedrpc-listener" not in [thread.name for thread in threading.enumerate()]


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


def closed(connection: socket.socket) -> bool:
    """Wait for the end of a connection, whatever is said before."""
    with connection, contextlib.suppress(ConnectionResetError):
        while connection.recv(4096):
            pass
    return True


async def test_diallers_are_served_one_after_another(opened: Callable[..., Door]) -> None:
    door = opened()
    for _ in range(3):
        await door.lets_in()


async def test_diallers_that_come_at_once_have_links_of_their_own(opened: Callable[..., Door]) -> None:
    door = opened()
    dialled = await asyncio.gather(*(dial(door.address, TOKEN, {"name": name}, timeout_s=5) for name in range(30)))
    served = {about["name"]: link for link, about in (door.served.get(timeout=5) for _ in dialled)}
    for name, (link, _) in enumerate(dialled):
        served[name].send({"name": name})
        assert link.receive() == {"name": name}
        link.close()
        served[name].close()


STRANGERS = {
    "an HTTP request": (b"GET / HTTP/1.1\r\nHost: here\r\n\r\n", "the received bytes are no handshake"),
    "a TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n", "the received bytes are no handshake"),
    "a long line": (b"x" * 100_000, "the received bytes are no handshake"),
    "a byte, and silence": (b"{", "it did not end the handshake within 0.3 s"),
    "half a handshake": (b'{"nonce": "0"}\n', "it left after it had seen the proof: it has another token"),
}


@pytest.mark.parametrize(("said", "reason"), STRANGERS.values(), ids=STRANGERS)
async def test_a_stranger_is_refused_with_one_warning_and_a_dialler_is_still_served(
    opened: Callable[..., Door], warnings: Callable[[], list[str]], said: bytes, reason: str
) -> None:
    door = opened(timeout_s=0.3)
    strangers = [door.connect() for _ in range(3)]
    for stranger in strangers:
        with contextlib.suppress(ConnectionError):  # refused before it has said all
            stranger.sendall(said)
    if "left" in reason:
        for stranger in strangers:
            await asyncio.to_thread(stranger.makefile("rb").readline)  # the proof
            stranger.close()
    else:
        for stranger in strangers:
            assert await asyncio.to_thread(closed, stranger)
    await door.lets_in()
    assert warnings() == [f"refused a connection from 127.0.0.1: {reason}"]


async def test_stranger_that_drips_bytes_is_refused_in_time(
    opened: Callable[..., Door], warnings: Callable[[], list[str]]
) -> None:
    """Each byte comes well within the time for a handshake, and all of them do not."""
    door, num_bytes = opened(timeout_s=2.0), 0
    stranger = door.connect()
    stranger.setblocking(False)
    loop = asyncio.get_running_loop()
    began = loop.time()
    with contextlib.suppress(ConnectionError):
        while loop.time() - began < 20:
            await loop.sock_sendall(stranger, b" ")
            num_bytes += 1
            await asyncio.sleep(0.02)
            if num_bytes == 5:
                await door.lets_in()  # it delays no other connection
    assert loop.time() - began < 10
    assert num_bytes >= 5
    stranger.close()
    assert warnings() == ["refused a connection from 127.0.0.1: it did not end the handshake within 2 s"]


async def test_pickle_in_place_of_a_handshake_is_not_opened(
    opened: Callable[..., Door], warnings: Callable[[], list[str]], tmp_path: Path
) -> None:
    canary = tmp_path / "canary"

    class Touch:
        def __reduce__(self) -> Any:
            return Path.touch, (canary,)

    door, data = opened(timeout_s=1.0), pickle.dumps(Touch())
    for lines in ([data + b"\n"], [b'{"nonce": "0"}\n', data + b"\n"]):
        stranger = door.connect()
        with contextlib.suppress(ConnectionError):
            for line in lines:
                stranger.makefile("rb").readline()  # what the door says before
                stranger.sendall(line)
        assert await asyncio.to_thread(closed, stranger)
    await door.lets_in()
    assert not canary.exists()
    assert warnings() == ["refused a connection from 127.0.0.1: the received bytes are no handshake"]
    pickle.loads(data)
    assert canary.exists()  # so the bytes would have done it


async def test_connection_that_closes_at_once_is_no_more_than_a_warning(
    opened: Callable[..., Door], warnings: Callable[[], list[str]]
) -> None:
    door = opened()
    for _ in range(3):
        door.connect().close()
    await door.lets_in()
    assert warnings() == ["refused a connection from 127.0.0.1: it left in the middle of the handshake"]


async def test_two_hundred_strangers_that_stall_delay_a_dialler_for_a_moment(
    opened: Callable[..., Door], warnings: Callable[[], list[str]]
) -> None:
    door = opened(timeout_s=1.0)
    strangers = [door.connect() for _ in range(200)]
    for stranger in strangers:
        assert await asyncio.to_thread(closed, stranger)
    await door.lets_in()
    assert warnings() == [
        "refused a connection from 127.0.0.1: 128 handshakes are under way, and the oldest is dropped",
        "refused a connection from 127.0.0.1: it did not end the handshake within 1 s",
    ]


async def test_warnings_that_are_remembered_are_bounded(
    opened: Callable[..., Door], warnings: Callable[[], list[str]]
) -> None:
    listener = opened().listener
    for number in range(3000):
        listener._warn(f"host{number}", "it has another token")
    assert len(listener._warned) == 1000
    assert len(warnings()) == 3000


async def test_accepting_goes_on_after_an_error_and_does_not_spin(
    opened: Callable[..., Door], warnings: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshake, "_ACCEPT_PAUSE_S", 0.05)
    tried = []

    class Full(socket.socket):
        def accept(self) -> Any:
            tried.append(1)
            if len(tried) <= 4:
                raise OSError(errno.EMFILE, "Too many open files")
            return super().accept()

    server = Full()
    server.bind(("127.0.0.1", 0))
    server.listen()
    door = opened(server=server)
    await door.lets_in()
    assert len(tried) < 20
    assert len(warnings()) == 1
    assert "Too many open files" in warnings()[0]


async def test_a_refusal_reaches_the_dialler_and_is_logged(
    opened: Callable[..., Door], warnings: Callable[[], list[str]]
) -> None:
    async def refuse(dialler: Dialler) -> None:
        await dialler.refuse(RefusedError("it is full"))

    door = opened(refuse)
    for _ in range(2):
        with pytest.raises(RefusedError, match=f"{door.address} refused: it is full"):
            await dial(door.address, TOKEN, {}, timeout_s=5)
    assert warnings() == ["refused a connection from 127.0.0.1: it is full"]


async def test_an_error_about_one_dialler_keeps_no_other_out(
    opened: Callable[..., Door], caplog: pytest.LogCaptureFixture
) -> None:
    async def serve(dialler: Dialler) -> None:
        role = {"driver": "worker"}[dialler.about["role"]]
        door.served.put((await dialler.accept({"role": role}), dialler.about))

    door = opened(serve)
    with pytest.raises(UntrustedError):
        await dial(door.address, TOKEN, {"role": "stranger"}, timeout_s=5)
    await door.lets_in()
    assert "KeyError: 'stranger'" in caplog.text


async def test_a_dialler_whose_serving_fails_finds_its_link_closed(
    opened: Callable[..., Door], caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(dialler: Dialler) -> None:
        await dialler.accept({})
        raise ValueError("no room")

    door = opened(fail)
    for _ in range(2):
        link, _ = await dial(door.address, TOKEN, {}, timeout_s=5)
        assert link.receive() is None
        link.close()
    assert "ValueError: no room" in caplog.text


# The end.


async def test_closing_ends_all_handshakes_that_are_under_way(opened: Callable[..., Door]) -> None:
    door = opened()
    stalling, waiting = door.connect(), door.connect()
    for connection in (stalling, waiting):
        assert connection.recv(4096).startswith(b'{"protocol": "torchfedrpc"')
    waiting.sendall(b'{"nonce": "0"}\n')
    assert b"proof" in waiting.recv(4096)
    door.thread.close()
    assert closed(stalling)
    assert closed(waiting)
    door.thread.close()
    with pytest.raises(UnreachableError):
        await dial(door.address, TOKEN, {}, timeout_s=5)


async def test_a_served_link_outlives_the_listener(opened: Callable[..., Door]) -> None:
    door = opened()
    ours, _ = await dial(door.address, TOKEN, {}, timeout_s=5)
    theirs, _ = door.served.get(timeout=5)
    door.thread.close()
    theirs.send({"do": "stop"})
    assert ours.receive() == {"do": "stop"}
    ours.close()
    theirs.close()
