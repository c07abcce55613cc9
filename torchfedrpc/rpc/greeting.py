"""The greeting of a driver and a worker: both prove a shared token before anything of the other is used.

    listener  protocol, number, nonce
    dialler   nonce
    listener  proof
    dialler   what it tells about itself, proof
    listener  what it tells about itself, or why it refuses, proof

A proof is an HMAC over who says it and all that was said before: one from another greeting, or from the other end,
proves nothing. The listener proves first: whoever only listens at an address learns a nonce, and nothing by which a
token could be guessed. Whoever dials can have a proof, and try tokens on it in its own time: so a token has to be too
long to be guessed, which `load_token` sees to. The token guards who is talked to; what is said later is neither
signed nor encrypted.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
import re
import secrets
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from torchfedrpc.errors import ConfigError
from torchfedrpc.rpc.control_link import Link, end_when_cut_off
from torchfedrpc.rpc.interfaces import network_site
from torchfedrpc.version import __version__

About = dict[str, Any]

CHANNELS = ("link", "pulse")  # the two connections between a driver and a worker
GREETING_TIMEOUT_S = 5.0
PATIENCE_S = 15.0  # with an end that is out of reach before the run has told its heartbeat_timeout_s

_PROTOCOL = {"protocol": "torchfedrpc", "number": 2}
_LINE_BYTES = 4096
_NONCE_BYTES = 32
_REASON_CHARACTERS = 600  # fits into a line, whatever characters they are
_ADDRESS = re.compile(r"([^\s/:@?#\[\]]+):([0-9]{1,5})")


class GreetingError(Exception):
    """The two ends did not come together."""


class UnreachableError(GreetingError):
    """Nobody answers at the address."""


class RefusedError(GreetingError):
    """The other end, which has the token, refuses: it has other versions, say."""


class BusyError(RefusedError):
    """The other end refuses for now, and may accept later."""


class MistrustError(GreetingError):
    """The other end has another token, or is nothing of ours."""


class _GarbageError(Exception):
    """What came is no line of a greeting."""


@dataclass(frozen=True)
class Greeted:
    """A driver or a worker that was greeted.

    Attributes:
        link: this end of the control link.
        pulse: this end of the connection for the beats of the worker's sidecar.
        about: what the other end told about itself: ``role``, ``machine``, ``site``, ``pid``, ``versions`` and what
            else its caller added.
    """

    link: Link
    pulse: socket.socket
    about: About


def own_versions() -> dict[str, str]:
    """The versions that have to agree; of torch's not what stands for the kind of build."""
    return {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "torch": torch.__version__.partition("+")[0],
        "torchfedrpc": __version__,
    }


def parse_address(address: str, *, any_port: bool = False) -> tuple[str, int]:
    """Take ``HOST:PORT`` apart.

    Args:
        address: a name or an IPv4 address, and a port.
        any_port: whether port 0, the system's choice, is allowed.

    Raises:
        ConfigError: it is nothing of that kind.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None or not (0 if any_port else 1) <= int(match[2]) <= 65535:
        raise ConfigError(f"{address!r} is no address of the form HOST:PORT, such as 10.0.0.7:29600")
    return match[1], int(match[2])


def in_words(error: OSError) -> str:
    """The system's words for an error; what Python says beside names the address as a tuple."""
    return os.strerror(error.errno) if error.errno is not None and error.errno > 0 else str(error)


async def dial(address: str, token: bytes, about: About, *, timeout_s: float) -> Greeted:
    """Connect to a driver or a worker by its two channels, and greet it on each.

    Args:
        address: where it listens, ``HOST:PORT``.
        token: the shared token.
        about: what this end tells about itself, beside what is common to all.
        timeout_s: seconds that all of it may take.

    Raises:
        ConfigError: the address is none.
        GreetingError: it is not there, refuses, or cannot be trusted.
    """
    host, port = parse_address(address)
    connections: list[socket.socket] = []
    answers: list[About] = []
    session = secrets.token_hex(16)
    try:
        async with asyncio.timeout(timeout_s):
            for channel in CHANNELS:
                connection = socket.socket()
                connections.append(connection)
                connection.setblocking(False)
                await asyncio.get_running_loop().sock_connect(connection, (host, port))
                told = {**about, "session": session, "channel": channel}
                answers.append(await greet(connection, token, told, address=address))
    except BaseException as error:
        for connection in connections:
            connection.close()
        if isinstance(error, TimeoutError):
            raise _unreachable(address, f"no answer within {round(timeout_s, 1):g} s") from None
        if isinstance(error, OSError | UnicodeError):  # a name can be none, too
            raise _unreachable(address, error) from None
        raise
    for connection in connections:
        end_when_cut_off(connection, PATIENCE_S)
    link, pulse = connections
    return Greeted(Link(link), pulse, answers[0])


async def greet(connection: socket.socket, token: bytes, about: About, *, address: str) -> About:
    """Greet whom one has dialled; the connection is blocking afterwards.

    Args:
        connection: the connected socket; where this fails the caller closes it.
        token: the shared token.
        about: what this end tells about itself, beside what is common to all.
        address: the other end's, for errors.

    Returns:
        What the other end tells about itself.

    Raises:
        UnreachableError: it closed the connection unasked, or did not answer in time.
        MistrustError: it does not prove the token, or this end's proof did not convince it.
        RefusedError: it refuses, and tells why; `BusyError` where it may accept later.
    """
    mistrust = MistrustError(
        f"{address} refused the token, or is nothing of torchfedrpc: give both ends the same token file, and check "
        f"the address"
    )
    hello: About = {}
    connection.setblocking(False)
    try:
        async with asyncio.timeout(GREETING_TIMEOUT_S):
            hello = await _receive(connection)
            number = hello.get("number")
            if hello.get("protocol") != _PROTOCOL["protocol"] or not isinstance(number, int):
                raise mistrust
            if number != _PROTOCOL["number"]:
                raise MistrustError(
                    f"{address} speaks number {number} of this protocol, and this end number {_PROTOCOL['number']}: "
                    f"install the same torchfedrpc on both"
                )
            transcript: list[About] = [hello, {"nonce": secrets.token_hex(_NONCE_BYTES)}]
            await _send(connection, transcript[-1])
            if not _proves((await _receive(connection)).get("proof"), _proof(token, "listener", transcript)):
                raise mistrust
            transcript.append({"about": {**_own_about(), **about}})
            await _send(connection, {**transcript[-1], "proof": _proof(token, "dialler", transcript)})
            reply = await _receive(connection, alone=False)  # what comes next is for whoever has the connection next
    except TimeoutError:
        raise _unreachable(address, f"no answer within {GREETING_TIMEOUT_S:g} s") from None
    except _GarbageError:
        raise mistrust from None
    except OSError as error:
        raise (mistrust if hello else _unreachable(address, error)) from None
    if not _proves(reply.pop("proof", None), _proof(token, "listener", [*transcript, reply])):
        raise mistrust
    if "error" in reply:
        raise (BusyError if reply.get("busy") else RefusedError)(f"{address} refused: {reply['error']}")
    if not _is_about(reply.get("about")):
        raise mistrust
    connection.setblocking(True)
    answer: About = reply["about"]
    return answer


async def receive(
    connection: socket.socket,
    token: bytes,
    answer: Callable[[About], About],
    *,
    timeout_s: float = GREETING_TIMEOUT_S,
) -> About:
    """Greet one who has dialled; the connection is blocking afterwards.

    Args:
        connection: the accepted socket; where this fails the caller closes it.
        token: the shared token.
        answer: takes what a trusted end tells about itself, and gives what this end does, beside what is common to
            all; raises `RefusedError` with what the other end is told instead.
        timeout_s: seconds that all of it may take.

    Returns:
        What the other end tells about itself.

    Raises:
        MistrustError: it does not prove the token, and was told nothing; nothing of what it sent is in the message.
        RefusedError: what `answer` raised, or the versions differ.
    """
    has_proven = False
    hello = {**_PROTOCOL, "nonce": secrets.token_hex(_NONCE_BYTES)}
    connection.setblocking(False)
    try:
        async with asyncio.timeout(timeout_s):
            await _send(connection, hello)
            transcript: list[About] = [hello, await _receive(connection)]
            await _send(connection, {"proof": _proof(token, "listener", transcript)})
            has_proven = True
            said = await _receive(connection)
            proof = said.pop("proof", None)
            transcript.append(said)
            if not _proves(proof, _proof(token, "dialler", transcript)):
                raise MistrustError("it has another token")
            if not _is_about(said.get("about")):
                raise _GarbageError
            about: About = said["about"]
            refusal = None
            try:
                _check_versions(about)
                reply: About = {"about": {**_own_about(), **answer(about)}}
            except RefusedError as error:
                reason = str(error)[:_REASON_CHARACTERS]
                refusal, reply = error, {"error": reason, "busy": isinstance(error, BusyError)}
            await _send(connection, {**reply, "proof": _proof(token, "listener", [*transcript, reply])})
    except TimeoutError:
        raise MistrustError(f"it did not greet within {timeout_s:g} s") from None
    except _GarbageError:
        raise MistrustError("what it sent is no greeting") from None
    except OSError:
        left = "it left when it had seen the proof: it has another token"
        raise MistrustError(left if has_proven else "it left in the middle of the greeting") from None
    if refusal is not None:
        raise refusal
    connection.setblocking(True)
    return about


def _own_about() -> About:
    return {
        "versions": own_versions(),
        "machine": socket.gethostname(),
        "site": network_site(),
        "pid": os.getpid(),
    }


def _is_about(about: Any) -> bool:
    """Whether that is what an end tells about itself, as those who use it take for granted."""
    match about:
        case {"versions": dict(), "machine": str(), "site": str(), "pid": int()}:
            return all(isinstance(about.get(name, ""), str) for name in ("role", "session", "channel", "program"))
    return False


def _check_versions(about: About) -> None:
    theirs, ours = about["versions"], own_versions()
    differing = [f"{name} {theirs.get(name)} and {ours[name]}" for name in ours if theirs.get(name) != ours[name]]
    if differing:
        raise RefusedError(
            f"{about['machine']}, which dialled, and {socket.gethostname()}, which listens, have different versions: "
            f"{', '.join(differing)}; install the same on both"
        )


def _proof(token: bytes, role: str, transcript: list[About]) -> str:
    said = json.dumps([role, *transcript], sort_keys=True)
    return hmac.digest(token, said.encode(), "sha256").hex()


def _proves(given: object, expected: str) -> bool:
    return isinstance(given, str) and hmac.compare_digest(given.encode(errors="replace"), expected.encode())


async def _send(connection: socket.socket, message: About) -> None:
    line = json.dumps(message).encode() + b"\n"
    if len(line) > _LINE_BYTES:
        raise GreetingError(
            f"what this end tells about itself has {len(line)} bytes, and {_LINE_BYTES} are the limit"
        )
    await asyncio.get_running_loop().sock_sendall(connection, line)


async def _receive(connection: socket.socket, *, alone: bool = True) -> About:
    """Take one line, and nothing behind it.

    Args:
        connection: the socket.
        alone: whether the other end has to wait for an answer before it says more.

    Raises:
        OSError: the other end is gone.
        _GarbageError: that is no line of a greeting.
    """
    loop = asyncio.get_running_loop()
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = await loop.sock_recv(connection, 1)  # more could be what is not ours to take
        if not byte:
            raise ConnectionResetError("it closed the connection")
        line += byte
        if len(line) > _LINE_BYTES:
            raise _GarbageError
    if alone:
        with contextlib.suppress(BlockingIOError):
            if connection.recv(1, socket.MSG_PEEK):
                raise _GarbageError
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        raise _GarbageError from None
    if not isinstance(message, dict):
        raise _GarbageError
    return message


def _unreachable(address: str, reason: Exception | str) -> UnreachableError:
    words = in_words(reason) if isinstance(reason, OSError) else reason
    return UnreachableError(
        f"{address} cannot be reached ({words}): see that torchfedrpc listens there, and that no firewall is between"
    )
