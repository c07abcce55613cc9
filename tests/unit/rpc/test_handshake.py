"""The handshake: both ends prove the token before a description is read, and a proof is valid in one handshake."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from torchfedrpc.errors import ConfigError
from torchfedrpc.rpc import handshake
from torchfedrpc.rpc.handshake import (
    HandshakeError,
    RefusedError,
    SilentError,
    UnreachableError,
    UntrustedError,
    dial,
    handshake_as_dialler,
    handshake_as_listener,
    own_versions,
)
from torchfedrpc.rpc.interfaces import parse_address

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


async def listen(connection: socket.socket, token: bytes = TOKEN, **limits: float) -> Message:
    """Run the listener's end of a handshake; returns the dialler's description."""
    dialler = await handshake_as_listener(connection, token, **limits)
    await dialler.accept({"role": "worker"})
    return dialler.about


async def both(*handshakes: Any) -> tuple[Any, Any]:
    """The outcomes of the dialler's end and of the listener's."""
    first, second = await asyncio.gather(*handshakes, return_exceptions=True)
    return first, second


class Raw:
    """An end that sends any lines."""

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


async def test_both_ends_receive_the_description_of_the_other(pair: tuple[socket.socket, socket.socket]) -> None:
    dialler, listener = pair
    ours = {"role": "driver", "program": "trainer-é.py"}
    theirs, heard = await both(handshake_as_dialler(dialler, TOKEN, ours, address=ADDRESS), listen(listener))
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
        await listen(listener)
        listener.sendall(b"first\n")  # at once, so that it comes with the end of the handshake

    await both(handshake_as_dialler(dialler, TOKEN, {}, address=ADDRESS), listening())
    dialler.sendall(b"second\n")
    assert dialler.gettimeout() is listener.gettimeout() is None
    assert dialler.recv(100) == b"first\n"
    assert listener.recv(100) == b"second\n"


async def test_the_token_never_crosses_the_wire(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Message] = []
    send = handshake.send_line

    async def record(connection: socket.socket, message: Message) -> None:
        said.append(message)
        await send(connection, message)

    monkeypatch.setattr(handshake, "send_line", record)
    dialler, listener = pair
    await both(handshake_as_dialler(dialler, TOKEN, {}, address=ADDRESS), listen(listener))
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

    async def refuse() -> None:
        await (await handshake_as_listener(listener, TOKEN)).refuse(RefusedError("busy with another driver"))

    theirs, heard = await both(handshake_as_dialler(dialler, TOKEN, {}, address=ADDRESS), refuse())
    assert isinstance(theirs, RefusedError)
    assert str(theirs) == f"{ADDRESS} refused: busy with another driver"
    assert isinstance(heard, RefusedError)


@pytest.mark.parametrize("name", ["python", "torch", "torchfedrpc"])
async def test_a_version_that_differs_is_an_error_that_names_both(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    dialler, listener = pair
    ours = {**own_versions(), name: "0.0.1"}
    told = handshake_as_dialler(dialler, TOKEN, {"versions": ours, "machine": "old-box"}, address=ADDRESS)
    theirs, heard = await both(told, listen(listener))
    for error in (theirs, heard):
        assert isinstance(error, RefusedError)
        assert f"{name} 0.0.1 and {own_versions()[name]}; install the same" in str(error)
        assert "old-box, which dialled" in str(error)
    assert ADDRESS in str(theirs)


async def test_description_that_is_too_long_is_an_error_of_its_sender(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    dialler, listener = pair
    telling = handshake_as_dialler(dialler, TOKEN, {"program": "x" * 4096}, address=ADDRESS)
    receiving = asyncio.ensure_future(listen(listener))
    with pytest.raises(HandshakeError, match="4096"):
        await telling
    dialler.close()
    with pytest.raises(UntrustedError, match="it left"):
        await receiving


# Another token, and proofs of another greeting.


async def test_end_with_another_token_receives_and_sends_no_description(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    dialler, listener = pair

    async def listening() -> None:
        with listener:
            await handshake_as_listener(listener, b"another token")

    theirs, heard = await both(handshake_as_dialler(dialler, TOKEN, {}, address=ADDRESS), listening())
    assert isinstance(heard, UntrustedError)
    assert isinstance(theirs, UntrustedError)
    assert f"{ADDRESS} refused the token, or is nothing of torchfedrpc: give both ends the same" in str(theirs)
    assert TOKEN.decode() not in str(theirs) + str(heard)


@contextlib.asynccontextmanager
async def proven(token: bytes = TOKEN) -> Any:
    """All lines of a handshake."""
    dialler, listener = tcp_pair()
    said: list[Message] = []
    send = handshake.send_line

    async def record(connection: socket.socket, message: Message) -> None:
        said.append(message)
        await send(connection, message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handshake, "send_line", record)
        await both(handshake_as_dialler(dialler, token, {}, address=ADDRESS), listen(listener, token))
    yield said
    dialler.close()
    listener.close()


async def test_a_dialler_that_replays_a_greeting_is_not_believed(pair: tuple[socket.socket, socket.socket]) -> None:
    dialler, listener = pair
    async with proven() as (_, nonce, _, said, _):
        stranger = Raw(dialler)
        victim = asyncio.ensure_future(listen(listener))
        await stranger.send(nonce)
        await stranger.receive()
        await stranger.receive()
        await stranger.send(said)
        with pytest.raises(UntrustedError, match="another token"):
            await victim


@pytest.mark.parametrize("what", ["all", "the proof", "the dialler's proof"])
async def test_a_listener_that_replays_or_reflects_is_not_believed(
    pair: tuple[socket.socket, socket.socket], what: str
) -> None:
    dialler, listener = pair
    async with proven() as (hello, _, proof, said, reply):
        stranger = Raw(listener)
        telling = asyncio.ensure_future(handshake_as_dialler(dialler, TOKEN, {}, address=ADDRESS))
        await stranger.send(hello)
        await stranger.receive()
        await stranger.send({"all": reply, "the proof": proof, "the dialler's proof": said}[what])
        with pytest.raises(UntrustedError):
            await telling


async def test_a_listener_learns_a_nonce_alone_before_it_proves_the_token(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    dialler, listener = pair
    async with proven(b"another token") as (hello, _, proof, *_):
        stranger = Raw(listener)
        telling = asyncio.ensure_future(handshake_as_dialler(dialler, TOKEN, {"role": "driver"}, address=ADDRESS))
        await stranger.send(hello)
        heard = await stranger.receive()
        assert list(heard) == ["nonce"]
        assert bytes.fromhex(heard["nonce"])
        await stranger.send(proof)
        with pytest.raises(UntrustedError):
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
        {"program": ["x"]},
        {"machine": None},
        {"pid": "1"},
        {"role": 1},
    ],
)
async def test_an_end_that_tells_what_has_another_form_is_refused(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch, about: Any
) -> None:
    dialler, listener = pair
    own = handshake._own_about()
    told = about if about is None or isinstance(about, list) or not about else {**own, **about}

    stranger = Raw(dialler)
    victim = asyncio.ensure_future(handshake_as_listener(listener, TOKEN))
    hello, nonce = await stranger.receive(), {"nonce": "0"}
    await stranger.send(nonce)
    await stranger.receive()
    said = {"about": told}
    await stranger.send({**said, "proof": handshake._proof(TOKEN, "dialler", [hello, nonce, said])})
    with pytest.raises(UntrustedError, match=r"^the received bytes are no handshake$"):
        await victim


async def test_a_dialler_that_reflects_the_proof_of_a_dialler_fails() -> None:
    """It dials one end, and has the other end dial it, to pass on what that proves, and to change what it tells."""
    ours, listener = tcp_pair()
    dialler, theirs = tcp_pair()
    victim = asyncio.ensure_future(listen(listener))
    other = asyncio.ensure_future(handshake_as_dialler(dialler, TOKEN, {"role": "driver"}, address=ADDRESS))
    one, two = Raw(ours), Raw(theirs)
    await two.send(await one.receive())
    await one.send(await two.receive())  # the other's nonce, and the proof is passed on, so that the other tells
    await two.send(await one.receive())
    told = await two.receive()
    await one.send({**told, "about": {**told["about"], "role": "worker"}})
    with pytest.raises(UntrustedError, match="another token"):
        await victim
    theirs.close()
    with pytest.raises(UntrustedError):
        await other
    for end in (ours, listener, dialler):
        end.close()


async def test_message_that_was_changed_on_the_way_is_refused(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, listener = pair
    dialler, theirs = tcp_pair()
    victim = asyncio.ensure_future(listen(listener))
    other = asyncio.ensure_future(handshake_as_dialler(dialler, TOKEN, {"role": "worker"}, address=ADDRESS))
    between, beyond = Raw(theirs), Raw(ours)
    hello = await beyond.receive()
    await between.send({**hello, "nonce": "0" * 64})
    await beyond.send(await between.receive())
    await between.send(await beyond.receive())
    with pytest.raises(UntrustedError):
        await other
    dialler.close()
    ours.close()
    with pytest.raises(UntrustedError, match="it left"):
        await victim
    theirs.close()


# Malformed handshakes.

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
    with pytest.raises(UntrustedError, match=r"^the received bytes are no handshake$"):
        await listen(listener)


@pytest.mark.parametrize("proof", [None, 1, "", "\ud800", "é", ["0"], {"a": 1}])
async def test_a_proof_of_any_kind_but_the_right_one_is_none(
    pair: tuple[socket.socket, socket.socket], proof: Any
) -> None:
    dialler, listener = pair
    stranger = Raw(dialler)
    victim = asyncio.ensure_future(listen(listener))
    await stranger.send({"nonce": 5})
    await stranger.receive()
    await stranger.receive()
    await stranger.send({"about": None, "proof": proof})
    with pytest.raises(UntrustedError, match="another token"):
        await victim


async def test_end_that_stalls_is_refused_in_time(pair: tuple[socket.socket, socket.socket]) -> None:
    dialler, listener = pair
    await Raw(dialler).send(b"{")
    began = time.monotonic()
    with pytest.raises(UntrustedError, match=r"did not end the handshake within 0.1 s"):
        await handshake_as_listener(listener, TOKEN, timeout_s=0.1)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("garbage", [*GARBAGE.values(), b'{"protocol": "other"}\n'], ids=[*GARBAGE, "another"])
async def test_a_dialler_does_not_talk_to_what_is_not_ours(
    pair: tuple[socket.socket, socket.socket], garbage: bytes
) -> None:
    dialler, listener = pair
    await Raw(listener).send(garbage)
    with pytest.raises(UntrustedError, match=ADDRESS):
        await handshake_as_dialler(dialler, TOKEN, {}, address=ADDRESS)


async def test_error_of_another_protocol_number_names_both(pair: tuple[socket.socket, socket.socket]) -> None:
    dialler, listener = pair
    await Raw(listener).send({"protocol": "torchfedrpc", "number": 7, "nonce": "0"})
    with pytest.raises(UntrustedError, match=f"{ADDRESS} speaks number 7 .* number 4"):
        await handshake_as_dialler(dialler, TOKEN, {}, address=ADDRESS)


# Dialling.


@contextlib.asynccontextmanager
async def listening() -> Any:
    """A listener that accepts one connection: its address, and the descriptions of diallers."""
    loop, heard = asyncio.get_running_loop(), []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)

        async def serve() -> None:
            connection, _ = await loop.sock_accept(server)
            with connection:
                heard.append(await listen(connection))

        serving = asyncio.ensure_future(serve())
        yield f"127.0.0.1:{server.getsockname()[1]}", heard
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError, HandshakeError):
            await serving


async def test_dialling_gives_the_control_link_and_the_description_of_the_listener() -> None:
    async with listening() as (address, heard):
        link, about = await dial(address, TOKEN, {"role": "driver"}, timeout_s=5)
        link.close()
        assert about["role"] == "worker"
    assert [about["role"] for about in heard] == ["driver"]


async def test_address_without_a_listener_is_an_error_that_names_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(UnreachableError, match=f"{address} cannot be reached .*refused.*listens there"):
        await dial(address, TOKEN, {}, timeout_s=5)


async def test_silent_listener_is_unreachable_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts no connection, though the kernel connects
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(SilentError, match=f"{address} .*no answer within 0.1 s"):
            await dial(address, TOKEN, {}, timeout_s=0.1)


async def test_listener_that_closes_at_once_is_unreachable(pair: tuple[socket.socket, socket.socket]) -> None:
    dialler, listener = pair
    listener.close()
    with pytest.raises(UnreachableError, match=f"{ADDRESS} .*closed the connection"):
        await handshake_as_dialler(dialler, TOKEN, {}, address=ADDRESS)


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
def test_invalid_address_is_refused_by_name(address: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT") as raised:
        parse_address(address)
    assert repr(address) in str(raised.value)


# What is used before a proof.


@pytest.mark.parametrize("module", ["handshake", "control_link"])
def test_modules_that_read_before_a_proof_import_nothing_that_unpickles(module: str) -> None:
    tree = ast.parse(Path(handshake.__file__).with_name(f"{module}.py").read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module))
    assert "json" in imported
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

    monkeypatch.setattr("torchfedrpc.rpc.handshake.hmac.compare_digest", compare)
    dialler, listener = pair
    token = b"another token than that of the listener" if is_equal else TOKEN
    outcomes = await both(
        handshake_as_dialler(dialler, token, {"role": "driver"}, address=ADDRESS),
        listen(listener, timeout_s=1),
    )
    assert len(compared) == (3 if is_equal else 1)
    assert [isinstance(outcome, UntrustedError) for outcome in outcomes] == [not is_equal] * 2
