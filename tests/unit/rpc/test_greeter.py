"""The greeter: who has the token comes in by two channels, and no stranger keeps it out or ends it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import pickle
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from torchfedrpc.rpc import greeter as module
from torchfedrpc.rpc.greeter import Greeter
from torchfedrpc.rpc.greeting import Greeted, MistrustError, RefusedError, UnreachableError, dial, greet

TOKEN = b"the token that both ends have"
Message = dict[str, Any]


class Door:
    """A greeter on loopback; ``guests`` holds those who came in."""

    def __init__(
        self,
        answer: Callable[[Message], Message] | None = None,
        listener: socket.socket | None = None,
        on_guest: Callable[[Greeted], None] | None = None,
        **limits: float,
    ) -> None:
        self.guests: queue.SimpleQueue[Greeted] = queue.SimpleQueue()
        self.listener = listener or socket.create_server(("127.0.0.1", 0))
        self.where = self.listener.getsockname()
        self.address = "{}:{}".format(*self.where)
        self.greeter = Greeter(
            self.listener, TOKEN, answer or (lambda about: {"role": "worker"}), on_guest or self.guests.put, **limits
        )

    def connect(self) -> socket.socket:
        connection = socket.create_connection(self.where)
        connection.settimeout(20)
        return connection

    async def lets_in(self) -> None:
        """A proper guest comes in, and both its connections work."""
        guest = await dial(self.address, TOKEN, {"role": "driver"}, timeout_s=5)
        host = await asyncio.to_thread(self.guests.get, timeout=5)
        host.link.send({"do": "something"})
        assert guest.link.receive() == {"do": "something"}
        guest.pulse.sendall(b"\n")
        assert host.pulse.recv(10) == b"\n"
        assert host.about["role"] == "driver"
        assert guest.about["role"] == "worker"
        for end in (guest, host):
            end.link.close()
            end.pulse.close()


@pytest.fixture
def opened() -> Iterator[Callable[..., Door]]:
    doors: list[Door] = []

    def opened(*args: Any, **kwargs: Any) -> Door:
        doors.append(Door(*args, **kwargs))
        return doors[-1]

    yield opened
    for door in doors:
        door.greeter.close()
        assert door.listener.fileno() == -1
    assert "torchfedrpc-greeter" not in [thread.name for thread in threading.enumerate()]


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


async def test_guests_come_in_one_after_another(opened: Callable[..., Door]) -> None:
    door = opened()
    for _ in range(3):
        await door.lets_in()


async def test_guests_that_come_at_once_are_not_mixed_up(opened: Callable[..., Door]) -> None:
    door = opened()
    guests = await asyncio.gather(*(dial(door.address, TOKEN, {"name": name}, timeout_s=5) for name in range(30)))
    hosts = {host.about["name"]: host for host in (door.guests.get(timeout=5) for _ in guests)}
    for name, guest in enumerate(guests):
        hosts[name].link.send({"name": name})
        assert guest.link.receive() == {"name": name}
        hosts[name].pulse.sendall(f"{name}".encode())
        assert guest.pulse.recv(10) == f"{name}".encode()
        for end in (guest, hosts[name]):
            end.link.close()
            end.pulse.close()


STRANGERS = {
    "an HTTP request": (b"GET / HTTP/1.1\r\nHost: here\r\n\r\n", "what it sent is no greeting"),
    "a TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n", "what it sent is no greeting"),
    "a long line": (b"x" * 100_000, "what it sent is no greeting"),
    "a byte, and silence": (b"{", "it did not greet within 0.3 s"),
    "half a greeting": (b'{"nonce": "0"}\n', "it left when it had seen the proof: it has another token"),
}


@pytest.mark.parametrize(("said", "reason"), STRANGERS.values(), ids=STRANGERS)
async def test_a_stranger_is_refused_with_one_warning_and_a_guest_still_comes_in(
    opened: Callable[..., Door], warnings: Callable[[], list[str]], said: bytes, reason: str
) -> None:
    door = opened(greeting_timeout_s=0.3)
    strangers = [door.connect() for _ in range(3)]
    for stranger in strangers:
        with contextlib.suppress(ConnectionError):  # refused before it has said all
            stranger.sendall(said)
    if "left" in reason:
        for stranger in strangers:
            await asyncio.to_thread(stranger.makefile("rb").readline)  # the proof
            stranger.close()
    for stranger in strangers:
        assert "left" in reason or await asyncio.to_thread(closed, stranger)
    await door.lets_in()
    assert warnings() == [f"refused a connection from 127.0.0.1: {reason}"]


async def test_stranger_that_drips_bytes_is_refused_in_time(
    opened: Callable[..., Door], warnings: Callable[[], list[str]]
) -> None:
    """Each byte comes well within the time for a greeting, and all of them do not."""
    door, num_bytes = opened(greeting_timeout_s=2.0), 0
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
                await door.lets_in()  # it holds nobody up
    assert loop.time() - began < 10
    assert num_bytes >= 5
    stranger.close()
    assert warnings() == ["refused a connection from 127.0.0.1: it did not greet within 2 s"]


async def test_pickle_in_place_of_a_greeting_is_not_opened(
    opened: Callable[..., Door], warnings: Callable[[], list[str]], tmp_path: Path
) -> None:
    canary = tmp_path / "canary"

    class Touch:
        def __reduce__(self) -> Any:
            return Path.touch, (canary,)

    door, data = opened(greeting_timeout_s=1.0), pickle.dumps(Touch())
    for lines in ([data + b"\n"], [b'{"nonce": "0"}\n', data + b"\n"]):
        stranger = door.connect()
        with contextlib.suppress(ConnectionError):
            for line in lines:
                stranger.makefile("rb").readline()  # what the door says before
                stranger.sendall(line)
        assert await asyncio.to_thread(closed, stranger)
    await door.lets_in()
    assert not canary.exists()
    assert warnings() == ["refused a connection from 127.0.0.1: what it sent is no greeting"]
    pickle.loads(data)
    assert canary.exists()  # so the bytes would have done it


async def test_one_that_closes_at_once_is_no_more_than_a_warning(
    opened: Callable[..., Door], warnings: Callable[[], list[str]]
) -> None:
    door = opened()
    for _ in range(3):
        door.connect().close()
    await door.lets_in()
    assert warnings() == ["refused a connection from 127.0.0.1: it left in the middle of the greeting"]


async def test_two_hundred_that_stall_at_once_keep_a_guest_out_for_a_moment_alone(
    opened: Callable[..., Door], warnings: Callable[[], list[str]]
) -> None:
    door = opened(greeting_timeout_s=1.0)
    strangers = [door.connect() for _ in range(200)]
    for stranger in strangers:
        assert await asyncio.to_thread(closed, stranger)
    await door.lets_in()
    assert warnings() == [
        "refused a connection from 127.0.0.1: 128 others are being greeted, of which the first was let go",
        "refused a connection from 127.0.0.1: it did not greet within 1 s",
    ]


async def test_what_is_remembered_of_strangers_is_bounded(
    opened: Callable[..., Door], warnings: Callable[[], list[str]]
) -> None:
    greeter = opened().greeter
    for number in range(3000):
        greeter._warn(f"host{number}", "it has another token")
    assert len(greeter._warned) == 1000
    assert len(warnings()) == 3000


async def test_accepting_goes_on_after_an_error_and_does_not_spin(
    opened: Callable[..., Door], warnings: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PAUSE_S", 0.05)
    tried = []

    class Full(socket.socket):
        def accept(self) -> Any:
            tried.append(1)
            if len(tried) <= 4:
                raise OSError(errno.EMFILE, "Too many open files")
            return super().accept()

    listener = Full()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    door = opened(listener=listener)
    await door.lets_in()
    assert len(tried) < 20
    assert len(warnings()) == 1
    assert "Too many open files" in warnings()[0]


async def test_a_refusal_is_told_to_the_guest_and_warned_of(
    opened: Callable[..., Door], warnings: Callable[[], list[str]]
) -> None:
    def refuse(about: Message) -> Message:
        raise RefusedError("it is full")

    door = opened(refuse)
    for _ in range(2):
        with pytest.raises(RefusedError, match=f"{door.address} refused: it is full"):
            await dial(door.address, TOKEN, {}, timeout_s=5)
    assert warnings() == ["refused a connection from 127.0.0.1: it is full"]


async def test_an_error_of_ours_about_one_guest_keeps_no_other_out(
    opened: Callable[..., Door], caplog: pytest.LogCaptureFixture
) -> None:
    def answer(about: Message) -> Message:
        return {"role": {"driver": "worker"}[about["role"]]}

    door = opened(answer)
    with pytest.raises(MistrustError):
        await dial(door.address, TOKEN, {"role": "stranger"}, timeout_s=5)
    await door.lets_in()
    assert "KeyError: 'stranger'" in caplog.text


async def test_a_guest_that_cannot_be_taken_finds_its_connections_closed(
    opened: Callable[..., Door], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(guest: Greeted) -> None:
        raise ValueError("no room")

    door = opened(on_guest=fail)
    for _ in range(2):
        guest = await dial(door.address, TOKEN, {}, timeout_s=5)
        assert guest.link.receive() is None
        guest.link.close()
        assert await asyncio.to_thread(closed, guest.pulse)
    assert "ValueError: no room" in caplog.text


# Pairs of channels.


async def channel(door: Door, session: str, name: str) -> socket.socket:
    connection = door.connect()
    await greet(connection, TOKEN, {"session": session, "channel": name}, address=door.address)
    return connection


async def test_the_channels_may_come_in_any_order(opened: Callable[..., Door]) -> None:
    door = opened()
    pulse = await channel(door, "one", "pulse")
    link = await channel(door, "one", "link")
    host = door.guests.get(timeout=5)
    link.sendall(b'{"do": "stop"}\n')
    assert host.link.receive() == {"do": "stop"}
    for end in (pulse, link, host.link, host.pulse):
        end.close()


@pytest.mark.parametrize("second", ["link", "other"])
async def test_two_channels_that_are_no_pair_are_refused(opened: Callable[..., Door], second: str) -> None:
    door = opened()
    for end in [await channel(door, "one", "link"), await channel(door, "one", second)]:
        assert await asyncio.to_thread(closed, end)
    await door.lets_in()


async def test_a_channel_whose_other_does_not_come_is_closed(opened: Callable[..., Door]) -> None:
    door = opened(pairing_timeout_s=0.1)
    first = await channel(door, "one", "link")
    assert await asyncio.to_thread(closed, first)
    second = await channel(door, "one", "pulse")
    assert door.guests.empty()
    assert await asyncio.to_thread(closed, second)


async def test_a_greeting_without_a_session_is_refused(
    opened: Callable[..., Door], caplog: pytest.LogCaptureFixture
) -> None:
    door = opened()
    with door.connect() as connection:
        await greet(connection, TOKEN, {}, address=door.address)
        assert await asyncio.to_thread(closed, connection)
    await door.lets_in()
    assert "it names no session" in caplog.text


# The end.


async def test_closing_ends_all_that_is_under_way(opened: Callable[..., Door]) -> None:
    door = opened()
    stalling = door.connect()
    assert stalling.recv(4096).startswith(b'{"protocol": "torchfedrpc"')
    half = await channel(door, "one", "link")
    door.greeter.close()
    assert closed(stalling)
    assert closed(half)
    door.greeter.close()


async def test_a_guest_may_be_the_last(opened: Callable[..., Door]) -> None:
    doors: list[Door] = []
    guests: queue.SimpleQueue[Greeted] = queue.SimpleQueue()

    def take(guest: Greeted) -> None:
        doors[0].greeter.close()
        guests.put(guest)

    doors.append(opened(on_guest=take))
    guest = await dial(doors[0].address, TOKEN, {}, timeout_s=5)
    host = guests.get(timeout=5)
    doors[0].greeter.close()
    host.link.send({"do": "stop"})
    assert guest.link.receive() == {"do": "stop"}
    for end in (guest, host):
        end.link.close()
        end.pulse.close()
    with pytest.raises(UnreachableError):
        await dial(doors[0].address, TOKEN, {}, timeout_s=5)
