"""The greeting: both ends prove the token before anything is believed, and a proof proves one greeting alone."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from torchfedrpc.errors import ConfigError
from torchfedrpc.rpc import greeting
from torchfedrpc.rpc.greeting import (
    GreetingError,
    MistrustError,
    RefusedError,
    UnreachableError,
    dial,
    greet,
    own_versions,
    parse_address,
    receive,
)

TOKEN = b"the token that both ends have"
ADDRESS = "there.example:29600"
Message = dict[str, Any]


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        dialler = socket.create_connection(server.getsockname())
        return dialler, server.accept()[0]


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The end that dialled, and the one that was dialled."""
    ends = tcp_pair()
    yield ends
    for end in ends:
        end.close()


def accept(about: Message) -> Message:
    return {"role": "worker"}


async def both(*greetings: Any) -> tuple[Any, Any]:
    """What became of the dialler's greeting and of the listener's."""
    first, second = await asyncio.gather(*greetings, return_exceptions=True)
    return first, second


class Raw:
    """An end that says what it likes."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        connection.setblocking(False)
        self._received = b""

    async def send(self, message: Message | bytes) -> None:
        line = message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n"
        await asyncio.get_running_loop().sock_sendall(self.connection, line)

    async def receive(self) -> Message:
        while b"\n" not in self._received:
            chunk = await asyncio.get_running_loop().sock_recv(self.connection, 4096)
            if not chunk:
                raise EOFError(self._received)
            self._received += chunk
        line, _, self._received = self._received.partition(b"\n")
        message: Message = json.loads(line)
        return message


# Two ends with the same token.


async def test_both_ends_learn_what_the_other_tells(pair: tuple[socket.socket, socket.socket]) -> None:
    dialler, listener = pair
    ours = {"role": "driver", "session": "x", "program": "trainer-é.py"}
    theirs, heard = await both(greet(dialler, TOKEN, ours, address=ADDRESS), receive(listener, TOKEN, accept))
    assert heard.items() >= ours.items()
    assert theirs["role"] == "worker"
    for about in (theirs, heard):
        assert about["versions"] == own_versions()
        assert about["pid"] == os.getpid()
        assert about["machine"] == socket.gethostname()
        assert about["site"]
    assert own_versions()["torch"] in torch.__version__
    assert "+" not in own_versions()["torch"]


async def test_the_connections_are_blocking_and_what_follows_is_whole(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    dialler, listener = pair

    async def listening() -> None:
        await receive(listener, TOKEN, accept)
        listener.sendall(b"first\n")  # at once, so that it comes with the end of the greeting

    await both(greet(dialler, TOKEN, {}, address=ADDRESS), listening())
    dialler.sendall(b"second\n")
    assert dialler.gettimeout() is listener.gettimeout() is None
    assert dialler.recv(100) == b"first\n"
    assert listener.recv(100) == b"second\n"


async def test_the_token_never_crosses_the_wire(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Message] = []
    send = greeting._send

    async def record(connection: socket.socket, message: Message) -> None:
        said.append(message)
        await send(connection, message)

    monkeypatch.setattr(greeting, "_send", record)
    dialler, listener = pair
    await both(greet(dialler, TOKEN, {}, address=ADDRESS), receive(listener, TOKEN, accept))
    assert [sorted(message) for message in said] == [
        ["nonce", "number", "protocol"],
        ["nonce"],
        ["proof"],
        ["about", "proof"],
        ["about", "proof"],
    ]
    assert TOKEN.decode() not in json.dumps(said)
    assert TOKEN.hex() not in json.dumps(said)


async def test_a_refusal_travels_with_its_reason(pair: tuple[socket.socket, socket.socket]) -> None:
    dialler, listener = pair

    def refuse(about: Message) -> Message:
        raise RefusedError("busy with another driver")

    theirs, heard = await both(greet(dialler, TOKEN, {}, address=ADDRESS), receive(listener, TOKEN, refuse))
    assert isinstance(theirs, RefusedError)
    assert str(theirs) == f"{ADDRESS} refused: busy with another driver"
    assert isinstance(heard, RefusedError)


@pytest.mark.parametrize("name", ["python", "torch", "torchfedrpc"])
async def test_a_version_that_differs_is_an_error_that_names_both(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    dialler, listener = pair
    ours = {**own_versions(), name: "0.0.1"}
    told = greet(dialler, TOKEN, {"versions": ours, "machine": "old-box"}, address=ADDRESS)
    theirs, heard = await both(told, receive(listener, TOKEN, accept))
    for error in (theirs, heard):
        assert isinstance(error, RefusedError)
        assert f"{name} 0.0.1 and {own_versions()[name]}; install the same" in str(error)
        assert "old-box, which dialled" in str(error)
    assert ADDRESS in str(theirs)


async def test_what_is_too_long_to_tell_is_an_error_here(pair: tuple[socket.socket, socket.socket]) -> None:
    dialler, listener = pair
    telling = greet(dialler, TOKEN, {"program": "x" * 4096}, address=ADDRESS)
    receiving = asyncio.ensure_future(receive(listener, TOKEN, accept))
    with pytest.raises(GreetingError, match="4096"):
        await telling
    dialler.close()
    with pytest.raises(MistrustError, match="it left"):
        await receiving


# Another token, and proofs of another greeting.


async def test_another_token_is_told_nothing_and_asks_nothing(pair: tuple[socket.socket, socket.socket]) -> None:
    dialler, listener = pair
    asked: list[Message] = []

    async def listening() -> None:
        with listener:
            await receive(listener, b"another token", lambda about: asked.append(about) or {})

    theirs, heard = await both(greet(dialler, TOKEN, {}, address=ADDRESS), listening())
    assert isinstance(heard, MistrustError)
    assert isinstance(theirs, MistrustError)
    assert f"{ADDRESS} refused the token, or is nothing of torchfedrpc: give both ends the same" in str(theirs)
    assert not asked
    assert TOKEN.decode() not in str(theirs) + str(heard)


@contextlib.asynccontextmanager
async def proven(token: bytes = TOKEN) -> Any:
    """A greeting of which everything was overheard."""
    dialler, listener = tcp_pair()
    said: list[Message] = []
    send = greeting._send

    async def record(connection: socket.socket, message: Message) -> None:
        said.append(message)
        await send(connection, message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greeting, "_send", record)
        await both(greet(dialler, token, {}, address=ADDRESS), receive(listener, token, accept))
    yield said
    dialler.close()
    listener.close()


async def test_a_dialler_that_replays_a_greeting_is_not_believed(pair: tuple[socket.socket, socket.socket]) -> None:
    dialler, listener = pair
    async with proven() as (_, nonce, _, said, _):
        stranger = Raw(dialler)
        victim = asyncio.ensure_future(receive(listener, TOKEN, accept))
        await stranger.send(nonce)
        await stranger.receive()
        await stranger.receive()
        await stranger.send(said)
        with pytest.raises(MistrustError, match="another token"):
            await victim


@pytest.mark.parametrize("what", ["all", "the proof", "the dialler's proof"])
async def test_a_listener_that_replays_or_reflects_is_not_believed(
    pair: tuple[socket.socket, socket.socket], what: str
) -> None:
    dialler, listener = pair
    async with proven() as (hello, _, proof, said, reply):
        stranger = Raw(listener)
        telling = asyncio.ensure_future(greet(dialler, TOKEN, {}, address=ADDRESS))
        await stranger.send(hello)
        await stranger.receive()
        await stranger.send({"all": reply, "the proof": proof, "the dialler's proof": said}[what])
        with pytest.raises(MistrustError):
            await telling


async def test_a_listener_learns_a_nonce_alone_before_it_proves_the_token(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    dialler, listener = pair
    async with proven(b"another token") as (hello, _, proof, *_):
        stranger = Raw(listener)
        telling = asyncio.ensure_future(greet(dialler, TOKEN, {"role": "driver"}, address=ADDRESS))
        await stranger.send(hello)
        heard = await stranger.receive()
        assert list(heard) == ["nonce"]
        assert bytes.fromhex(heard["nonce"])
        await stranger.send(proof)
        with pytest.raises(MistrustError):
            await telling
        dialler.close()
        with pytest.raises(EOFError, match="b''"):
            await stranger.receive()


@pytest.mark.parametrize(
    "about",
    [
        None,
        [],
        {},
        {"versions": 3},
        {"session": ["x"]},
        {"channel": {}},
        {"machine": None},
        {"pid": "1"},
        {"role": 1},
    ],
)
async def test_an_end_that_tells_what_has_another_form_is_refused(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch, about: Any
) -> None:
    dialler, listener = pair
    own = greeting._own_about()
    told = about if about is None or isinstance(about, list) or not about else {**own, **about}

    def accept_nobody(about: Message) -> Message:
        raise AssertionError(about)

    stranger = Raw(dialler)
    victim = asyncio.ensure_future(receive(listener, TOKEN, accept_nobody))
    hello, nonce = await stranger.receive(), {"nonce": "0"}
    await stranger.send(nonce)
    await stranger.receive()
    said = {"about": told}
    await stranger.send({**said, "proof": greeting._proof(TOKEN, "dialler", [hello, nonce, said])})
    with pytest.raises(MistrustError, match=r"^what it sent is no greeting$"):
        await victim


async def test_a_dialler_that_reflects_the_proof_of_a_dialler_fails() -> None:
    """It dials one end, and has the other end dial it, to pass on what that proves, and to change what it tells."""
    ours, listener = tcp_pair()
    dialler, theirs = tcp_pair()
    victim = asyncio.ensure_future(receive(listener, TOKEN, accept))
    other = asyncio.ensure_future(greet(dialler, TOKEN, {"role": "driver"}, address=ADDRESS))
    one, two = Raw(ours), Raw(theirs)
    await two.send(await one.receive())
    await one.send(await two.receive())  # the other's nonce, and the proof is passed on, so that the other tells
    await two.send(await one.receive())
    told = await two.receive()
    await one.send({**told, "about": {**told["about"], "role": "worker"}})
    with pytest.raises(MistrustError, match="another token"):
        await victim
    theirs.close()
    with pytest.raises(MistrustError):
        await other
    for end in (ours, listener, dialler):
        end.close()


async def test_what_was_changed_on_the_way_is_not_believed(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, listener = pair
    dialler, theirs = tcp_pair()
    victim = asyncio.ensure_future(receive(listener, TOKEN, accept))
    other = asyncio.ensure_future(greet(dialler, TOKEN, {"role": "worker"}, address=ADDRESS))
    between, beyond = Raw(theirs), Raw(ours)
    hello = await beyond.receive()
    await between.send({**hello, "nonce": "0" * 64})
    await beyond.send(await between.receive())
    await between.send(await beyond.receive())
    with pytest.raises(MistrustError):
        await other
    dialler.close()
    ours.close()
    with pytest.raises(MistrustError, match="it left"):
        await victim
    theirs.close()


# What is no greeting.

GARBAGE = {
    "an HTTP request": b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
    "a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n",
    "no object": b"[1, 2]\n",
    "too deep": b"[" * 4000 + b"\n",
    "no text": b"\xff\xfe\xfd\n",
    "a long line": b"x" * 5000,
    "nothing": b"\n",
    "two lines": b'{"nonce": "0"}\n{"nonce": "1"}\n',
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
async def test_garbage_is_refused_and_not_repeated(pair: tuple[socket.socket, socket.socket], garbage: bytes) -> None:
    dialler, listener = pair
    await Raw(dialler).send(garbage)
    with pytest.raises(MistrustError, match=r"^what it sent is no greeting$"):
        await receive(listener, TOKEN, accept)


@pytest.mark.parametrize("proof", [None, 1, "", "\ud800", "é", ["0"], {"a": 1}])
async def test_a_proof_of_any_kind_but_the_right_one_is_none(
    pair: tuple[socket.socket, socket.socket], proof: Any
) -> None:
    dialler, listener = pair
    stranger = Raw(dialler)
    victim = asyncio.ensure_future(receive(listener, TOKEN, accept))
    await stranger.send({"nonce": 5})
    await stranger.receive()
    await stranger.receive()
    await stranger.send({"about": None, "proof": proof})
    with pytest.raises(MistrustError, match="another token"):
        await victim


async def test_one_who_stalls_is_refused_in_time(pair: tuple[socket.socket, socket.socket]) -> None:
    dialler, listener = pair
    await Raw(dialler).send(b"{")
    began = time.monotonic()
    with pytest.raises(MistrustError, match=r"did not greet within 0.1 s"):
        await receive(listener, TOKEN, accept, timeout_s=0.1)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("garbage", [*GARBAGE.values(), b'{"protocol": "other"}\n'], ids=[*GARBAGE, "another"])
async def test_a_dialler_does_not_talk_to_what_is_not_ours(
    pair: tuple[socket.socket, socket.socket], garbage: bytes
) -> None:
    dialler, listener = pair
    await Raw(listener).send(garbage)
    with pytest.raises(MistrustError, match=ADDRESS):
        await greet(dialler, TOKEN, {}, address=ADDRESS)


async def test_another_number_of_the_protocol_names_both(pair: tuple[socket.socket, socket.socket]) -> None:
    dialler, listener = pair
    await Raw(listener).send({"protocol": "torchfedrpc", "number": 7, "nonce": "0"})
    with pytest.raises(MistrustError, match=f"{ADDRESS} speaks number 7 .* number 2"):
        await greet(dialler, TOKEN, {}, address=ADDRESS)


# Dialling.


@contextlib.asynccontextmanager
async def listening(*answers: Callable[[Message], Message], token: bytes = TOKEN) -> Any:
    """A listener that answers one connection after another: its address, and what the diallers told."""
    loop, heard = asyncio.get_running_loop(), []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)

        async def serve() -> None:
            for answer in answers:
                connection, _ = await loop.sock_accept(server)
                with connection:
                    heard.append(await receive(connection, token, answer))

        serving = asyncio.ensure_future(serve())
        yield f"127.0.0.1:{server.getsockname()[1]}", heard
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError, GreetingError):
            await serving


async def test_dialling_opens_both_channels_of_one_session() -> None:
    async with listening(accept, accept) as (address, heard):
        driver = await dial(address, TOKEN, {"role": "driver"}, timeout_s=5)
        driver.link.close()
        driver.pulse.close()
        assert driver.about["role"] == "worker"
    assert [about["channel"] for about in heard] == ["link", "pulse"]
    assert heard[0]["session"] == heard[1]["session"]


async def test_a_refusal_of_the_second_channel_closes_the_first() -> None:
    def refuse(about: Message) -> Message:
        raise RefusedError("no more")

    async with listening(accept, refuse) as (address, _):
        with pytest.raises(RefusedError, match="no more"):
            await dial(address, TOKEN, {}, timeout_s=5)


async def test_nobody_at_the_address_is_an_error_that_names_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(UnreachableError, match=f"{address} cannot be reached .*refused.*listens there"):
        await dial(address, TOKEN, {}, timeout_s=5)


async def test_one_who_says_nothing_is_unreachable_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts nobody, though the kernel connects
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UnreachableError, match=f"{address} .*no answer within 0.1 s"):
            await dial(address, TOKEN, {}, timeout_s=0.1)


async def test_one_who_closes_at_once_is_unreachable(pair: tuple[socket.socket, socket.socket]) -> None:
    dialler, listener = pair
    listener.close()
    with pytest.raises(UnreachableError, match=f"{ADDRESS} .*closed the connection"):
        await greet(dialler, TOKEN, {}, address=ADDRESS)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a..b"])
async def test_a_name_that_is_none_is_unreachable(host: str) -> None:
    with pytest.raises(UnreachableError, match=host.replace(".", r"\.")):
        await dial(f"{host}:29600", TOKEN, {}, timeout_s=20)


# Addresses.


def test_addresses_are_taken_apart() -> None:
    assert parse_address("10.0.0.7:29600") == ("10.0.0.7", 29600)
    assert parse_address("site-b.example:1") == ("site-b.example", 1)
    assert parse_address("0.0.0.0:0", any_port=True) == ("0.0.0.0", 0)


@pytest.mark.parametrize(
    "address",
    [
        *("", "host", "host:", ":29600", "host:0", "host:65536", "host:-1", "host:x", "host:٣", "host: 1", "host:1 "),
        *("tcp://host:1", "host:1/path", "[::1]:1", "::1:1", "user@host:1", "a b:1", "host:1\n"),
    ],
)
def test_what_is_no_address_is_refused_by_name(address: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT") as raised:
        parse_address(address)
    assert repr(address) in str(raised.value)


# What is used before a proof.


@pytest.mark.parametrize("module", ["greeting", "greeter", "link", "token"])
def test_modules_that_read_before_a_proof_import_nothing_that_unpickles(module: str) -> None:
    tree = ast.parse(Path(greeting.__file__).with_name(f"{module}.py").read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module))
    assert "json" in imported or module in ("greeter", "token")
    assert [name for name in imported if name.split(".")[0] in ("pickle", "marshal", "shelve", "torch", "numpy")] in (
        [],
        ["torch"],  # of whose version both ends tell
    )
    assert not any(name.startswith(("torchfedrpc.wire", "torchfedrpc.host")) for name in imported)


@pytest.mark.parametrize("is_equal", [False, True])
async def test_proofs_are_compared_in_constant_time_alone(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch, is_equal: bool
) -> None:
    """What `hmac.compare_digest` says is what counts, whether the tokens are the same or not."""
    compared = []

    def compare(given: bytes, expected: bytes) -> bool:
        compared.append((given, expected))
        return is_equal

    monkeypatch.setattr(greeting.hmac, "compare_digest", compare)
    dialler, listener = pair
    token = b"another token than that of the listener" if is_equal else TOKEN
    outcomes = await both(
        greet(dialler, token, {"role": "driver"}, address=ADDRESS),
        receive(listener, TOKEN, accept, timeout_s=1),
    )
    assert len(compared) == (3 if is_equal else 1)
    assert [isinstance(outcome, MistrustError) for outcome in outcomes] == [not is_equal] * 2
