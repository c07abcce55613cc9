"""The authenticated handshake of a driver and a worker, from either end, and the token that both have to prove.

    listener  protocol, number, nonce
    dialler   nonce
    listener  proof
    dialler   description of itself, proof
    listener  description of itself, or the reason of a refusal; proof

Each line is a JSON object of at most 4 KiB. A proof is an HMAC over the role of its sender and all earlier lines, so
that a proof of another handshake, or of the other end, proves nothing. The listener proves the token first: a
stranger that listens at an address learns a nonce, and nothing by which it could guess the token. A stranger that
dials gets a proof and can test guesses on it offline, so `load_token` refuses short tokens. The handshake
authenticates the ends of a connection; later messages are neither signed nor encrypted.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import os
import re
import secrets
import socket
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from torchfedrpc.errors import ConfigError
from torchfedrpc.rpc.control_link import Link, close_in_children, end_when_cut_off
from torchfedrpc.rpc.interfaces import describe_address, describe_os_error, network_site, parse_address
from torchfedrpc.rpc.preflight import max_descriptors
from torchfedrpc.version import __version__

logger = logging.getLogger(__name__)

About = dict[str, Any]

HANDSHAKE_TIMEOUT_S = 5.0
CUT_OFF_TIMEOUT_S = 15.0  # of a control link, until the run's heartbeat_timeout_s is known
TOKEN_VARIABLE = "TORCHFEDRPC_TOKEN_FILE"

_PROTOCOL = {"protocol": "torchfedrpc", "number": 4}
_LINE_BYTES = 4096
_NONCE_BYTES = 32
_REASON_CHARACTERS = 600  # fits into a line, even where each character is escaped
_MAX_HANDSHAKES = 128  # at once
_MAX_WARNINGS = 1000  # remembered, so that they are not repeated
_ACCEPT_PAUSE_S = 0.1
_NUMBERS = re.compile(r"\d+")

# 32 random hexadecimal digits are 128 bits. They have 14 different digits on average, and hardly ever fewer than 8.
_MIN_TOKEN_BYTES = 32
_MIN_DIFFERENT_BYTES = 8
_MAX_TOKEN_BYTES = 1 << 16
_HOW_TO_MAKE_TOKEN = "python -c 'import secrets; print(secrets.token_hex(32))' > FILE; chmod 600 FILE"


class HandshakeError(Exception):
    """A handshake failed."""


class UnreachableError(HandshakeError):
    """No connection to the address can be made, or it is closed or left unanswered from the start."""


class SilentError(UnreachableError):
    """The address accepts connections, and does not answer in time."""


class RefusedError(HandshakeError):
    """The other end has the token and refuses, because of its versions, say."""


class BusyError(RefusedError):
    """The other end refuses for now and may accept later."""


class UntrustedError(HandshakeError):
    """The other end does not prove the token, or does not speak this protocol."""


class MalformedLineError(Exception):
    """The received bytes are no line of a handshake."""


# Dialling.


def own_versions() -> dict[str, str]:
    """The versions that both ends must share; torch's without the suffix of its build."""
    return {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "torch": torch.__version__.partition("+")[0],
        "torchfedrpc": __version__,
    }


async def dial(address: str, token: bytes, about: About, *, timeout_s: float) -> tuple[Link, About]:
    """Connect to a listening driver or worker, and run the handshake.

    Args:
        address: ``HOST:PORT`` of the listener.
        token: the shared token.
        about: added to the description of this end.
        timeout_s: seconds to connect, and again for each answer of the handshake.

    Returns:
        The control link, and the description of the listener.

    Raises:
        ConfigError: If the address is malformed.
        HandshakeError: If the listener is unreachable, refuses, or cannot be trusted.
    """
    host, port = parse_address(address)
    loop = asyncio.get_running_loop()
    connection = socket.socket()
    try:
        connection.setblocking(False)
        async with asyncio.timeout(timeout_s):
            found = await loop.getaddrinfo(host, port, family=socket.AF_INET, type=socket.SOCK_STREAM)
            address = describe_address(host, port, str(found[0][4][0]))
            await loop.sock_connect(connection, found[0][4])
        listener = await handshake_as_dialler(
            connection, token, about, address=address, timeout_s=min(timeout_s, HANDSHAKE_TIMEOUT_S)
        )
    except BaseException as error:
        connection.close()
        if isinstance(error, TimeoutError):
            raise _unreachable(address, f"no answer within {round(timeout_s, 1):g} s") from None
        if isinstance(error, OSError | UnicodeError):  # the latter for a malformed host name
            raise _unreachable(address, error) from None
        raise
    end_when_cut_off(connection, CUT_OFF_TIMEOUT_S)
    return Link(connection), listener


async def handshake_as_dialler(
    connection: socket.socket, token: bytes, about: About, *, address: str, timeout_s: float = HANDSHAKE_TIMEOUT_S
) -> About:
    """Run the dialler's end of a handshake; the connection is blocking afterwards.

    Args:
        connection: the connected socket, which the caller closes if the handshake fails.
        token: the shared token.
        about: added to the description of this end.
        address: the listener's address, for errors.
        timeout_s: seconds that the handshake may take.

    Returns:
        The description of the listener.

    Raises:
        UnreachableError: If the listener closes the connection at once, or does not answer in time.
        UntrustedError: If the listener does not prove the token, or leaves after the dialler's proof.
        RefusedError: If the listener refuses; `BusyError` if it may accept later.
    """
    untrusted = UntrustedError(
        f"{address} refused the token, or is nothing of torchfedrpc: give both ends the same token file, and check "
        f"the address"
    )
    hello: About = {}
    connection.setblocking(False)
    try:
        async with asyncio.timeout(timeout_s):
            hello = await receive_line(connection)
            number = hello.get("number")
            if hello.get("protocol") != _PROTOCOL["protocol"] or not isinstance(number, int):
                raise untrusted
            if number != _PROTOCOL["number"]:
                raise UntrustedError(
                    f"{address} speaks number {number} of this protocol, and this end number {_PROTOCOL['number']}: "
                    f"install the same torchfedrpc on both"
                )
            transcript: list[About] = [hello, {"nonce": secrets.token_hex(_NONCE_BYTES)}]
            await send_line(connection, transcript[-1])
            if not _proves((await receive_line(connection)).get("proof"), _proof(token, "listener", transcript)):
                raise untrusted
            transcript.append({"about": {**_own_about(), **about}})
            await send_line(connection, {**transcript[-1], "proof": _proof(token, "dialler", transcript)})
            reply = await receive_line(connection, is_last=True)
    except TimeoutError:
        raise _unreachable(address, f"no answer within {timeout_s:g} s", SilentError) from None
    except MalformedLineError:
        raise untrusted from None
    except OSError as error:
        raise (untrusted if hello else _unreachable(address, error)) from None
    if not _proves(reply.pop("proof", None), _proof(token, "listener", [*transcript, reply])):
        raise untrusted
    if "error" in reply:
        raise (BusyError if reply.get("busy") else RefusedError)(f"{address} refused: {reply['error']}")
    if not _is_about(reply.get("about")):
        raise untrusted
    connection.setblocking(True)
    listener: About = reply["about"]
    return listener


def _unreachable(
    address: str, reason: Exception | str, kind: type[UnreachableError] = UnreachableError
) -> UnreachableError:
    words = describe_os_error(reason) if isinstance(reason, OSError) else reason
    return kind(
        f"{address} cannot be reached from {socket.gethostname()} ({words}): check that torchfedrpc listens there, "
        f"and that no firewall is between"
    )


# Listening.


class Dialler:
    """A dialler that has proven the token and awaits an answer, which `accept` or `refuse` gives.

    Args:
        connection: the accepted socket.
        token: the shared token.
        transcript: the lines of the handshake so far; the last has the dialler's description.

    Attributes:
        about: the dialler's description of itself.
    """

    def __init__(self, connection: socket.socket, token: bytes, transcript: list[About]) -> None:
        self._connection = connection
        self._token = token
        self._transcript = transcript
        self.about: About = transcript[-1]["about"]

    async def accept(self, about: About) -> Link:
        """End the handshake; returns the control link, whose connection is blocking.

        Args:
            about: added to the description of this end.

        Raises:
            UntrustedError: If the dialler has left.
        """
        await self._answer({"about": {**_own_about(), **about}})
        self._connection.setblocking(True)
        end_when_cut_off(self._connection, CUT_OFF_TIMEOUT_S)
        return Link(self._connection)

    async def refuse(self, error: RefusedError) -> NoReturn:
        """Tell the dialler the reason of a refusal, and raise it."""
        reason = str(error)[:_REASON_CHARACTERS]
        await self._answer({"error": reason, "busy": isinstance(error, BusyError)})
        raise error

    async def _answer(self, reply: About) -> None:
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                proof = _proof(self._token, "listener", [*self._transcript, reply])
                await send_line(self._connection, {**reply, "proof": proof})
        except OSError:  # TimeoutError among them
            raise UntrustedError("it left in the middle of the handshake") from None


async def handshake_as_listener(
    connection: socket.socket, token: bytes, *, timeout_s: float = HANDSHAKE_TIMEOUT_S
) -> Dialler:
    """Run the listener's end of a handshake up to its last line.

    Args:
        connection: the accepted socket, which the caller closes if the handshake fails.
        token: the shared token.
        timeout_s: seconds that this may take.

    Raises:
        UntrustedError: If the dialler does not prove the token. The message has none of the received bytes.
        RefusedError: If the versions differ, which the dialler is told.
    """
    has_proven = False
    hello = {**_PROTOCOL, "nonce": secrets.token_hex(_NONCE_BYTES)}
    connection.setblocking(False)
    try:
        async with asyncio.timeout(timeout_s):
            await send_line(connection, hello)
            transcript: list[About] = [hello, await receive_line(connection)]
            await send_line(connection, {"proof": _proof(token, "listener", transcript)})
            has_proven = True
            line = await receive_line(connection)
            proof = line.pop("proof", None)
            transcript.append(line)
            if not _proves(proof, _proof(token, "dialler", transcript)):
                raise UntrustedError("it has another token")
            if not _is_about(line.get("about")):
                raise MalformedLineError
    except TimeoutError:
        raise UntrustedError(f"it did not end the handshake within {timeout_s:g} s") from None
    except MalformedLineError:
        raise UntrustedError("the received bytes are no handshake") from None
    except OSError:
        left = "it left after it had seen the proof: it has another token"
        raise UntrustedError(left if has_proven else "it left in the middle of the handshake") from None
    dialler = Dialler(connection, token, transcript)
    if (difference := _version_difference(dialler.about)) is not None:
        await dialler.refuse(RefusedError(difference))
    return dialler


class Listener:
    """Runs the handshake with each connection to a listening socket. A stranger delays no other connection.

    Refused connections are logged, once for each host and reason.

    Args:
        server: the listening socket, owned from now on.
        token: the shared token.
        serve: takes over a dialler that has proven the token. It ends by `Dialler.accept`, after which it owns the
            control link, or by a `HandshakeError`, after which the connection is closed.
        timeout_s: seconds that a dialler has to prove the token.
    """

    def __init__(
        self,
        server: socket.socket,
        token: bytes,
        serve: Callable[[Dialler], Awaitable[None]],
        *,
        timeout_s: float = HANDSHAKE_TIMEOUT_S,
    ) -> None:
        self._server = server
        self._token = token
        self._serve = serve
        self._timeout_s = timeout_s
        self._handshakes: dict[asyncio.Task[None], None] = {}  # without a proof so far, the oldest first
        self._warned: deque[tuple[str, str]] = deque(maxlen=_MAX_WARNINGS)
        close_in_children(server)

    async def run(self) -> None:
        """Accept connections until this is cancelled, which cancels `serve` too."""
        loop = asyncio.get_running_loop()
        self._server.setblocking(False)
        with self._server:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    try:
                        connection, (host, _) = await loop.sock_accept(self._server)
                    except OSError as error:  # out of descriptors, say; connections wait in the kernel's queue
                        self._warn("an unknown host", f"it could not be accepted ({error})")
                        await asyncio.sleep(_ACCEPT_PAUSE_S)
                        continue
                    close_in_children(connection)
                    if len(self._handshakes) >= _MAX_HANDSHAKES:
                        self._warn(host, f"{_MAX_HANDSHAKES} handshakes are under way, and the oldest is dropped")
                        oldest = next(iter(self._handshakes))
                        del self._handshakes[oldest]
                        oldest.cancel()
                    task = tasks.create_task(self._shake_hands(connection, host))
                    task.add_done_callback(partial(_close_if_cancelled, connection))
                    self._handshakes[task] = None

    async def _shake_hands(self, connection: socket.socket, host: str) -> None:
        task: Any = asyncio.current_task()
        try:
            try:
                dialler = await handshake_as_listener(connection, self._token, timeout_s=self._timeout_s)
            finally:
                self._handshakes.pop(task, None)
            await self._serve(dialler)
        except HandshakeError as error:
            self._warn(host, str(error))
            connection.close()
        except Exception:
            logger.exception("a connection from %s could not be served", host)
            connection.close()

    def _warn(self, host: str, reason: str) -> None:
        key = (host, _NUMBERS.sub("", reason))  # reasons that differ in a duration alone are one
        if key not in self._warned:
            self._warned.append(key)
            logger.warning("refused a connection from %s: %s", host, reason)


def _close_if_cancelled(connection: socket.socket, task: asyncio.Task[None]) -> None:
    if task.cancelled():  # perhaps before its first step
        connection.close()


class ListenerThread:
    """Runs a `Listener` on a thread, so that a driver whose event loop is busy still answers in time.

    Args:
        listener: the listener. Its `serve` runs on the thread.
    """

    def __init__(self, listener: Listener) -> None:
        self._loop = asyncio.new_event_loop()
        self._running = self._loop.create_task(listener.run())
        self._thread = threading.Thread(target=self._run, name="torchfedrpc-listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening, and close the connections whose handshake has not ended."""
        with contextlib.suppress(RuntimeError):  # the loop is closed already
            self._loop.call_soon_threadsafe(self._running.cancel)
        self._thread.join()

    def _run(self) -> None:
        with contextlib.closing(self._loop), contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._running)


# Lines and proofs.


def _own_about() -> About:
    return {
        "versions": own_versions(),
        "machine": socket.gethostname(),
        "site": network_site(),
        "pid": os.getpid(),
        "time_s": time.time(),
        "max_descriptors": max_descriptors(),
    }


def _is_about(about: Any) -> bool:
    """Whether a description has the fields, and the types of fields, that its readers rely on."""
    match about:
        case {
            "versions": dict(),
            "machine": str(),
            "site": str(),
            "pid": int(),
            "time_s": float(),
            "max_descriptors": int(),
        }:
            return all(isinstance(about.get(name, ""), str) for name in ("role", "program"))
    return False


def _version_difference(about: About) -> str | None:
    theirs, ours = about["versions"], own_versions()
    differing = [f"{name} {theirs.get(name)} and {ours[name]}" for name in ours if theirs.get(name) != ours[name]]
    if not differing:
        return None
    return (
        f"{about['machine']}, which dialled, and {socket.gethostname()}, which listens, have different versions: "
        f"{', '.join(differing)}; install the same on both"
    )


def _proof(token: bytes, role: str, transcript: list[About]) -> str:
    signed = json.dumps([role, *transcript], sort_keys=True)
    return hmac.digest(token, signed.encode(), "sha256").hex()


def _proves(given: object, expected: str) -> bool:
    return isinstance(given, str) and hmac.compare_digest(given.encode(errors="replace"), expected.encode())


async def send_line(connection: socket.socket, message: About) -> None:
    """Write one line."""
    line = json.dumps(message).encode() + b"\n"
    if len(line) > _LINE_BYTES:
        raise HandshakeError(f"the description of this end has {len(line)} bytes, and {_LINE_BYTES} are the limit")
    await asyncio.get_running_loop().sock_sendall(connection, line)


async def receive_line(connection: socket.socket, *, is_last: bool = False) -> About:
    """Read one line, and none of the bytes behind it.

    Args:
        connection: the socket.
        is_last: whether bytes may follow, which belong to the control link.

    Raises:
        OSError: If the other end is gone.
        MalformedLineError: If the line is malformed, or the other end does not wait for an answer.
    """
    loop = asyncio.get_running_loop()
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = await loop.sock_recv(connection, 1)
        if not byte:
            raise ConnectionResetError("it closed the connection")
        line += byte
        if len(line) > _LINE_BYTES:
            raise MalformedLineError
    if not is_last:
        with contextlib.suppress(BlockingIOError):
            if connection.recv(1, socket.MSG_PEEK):
                raise MalformedLineError
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        raise MalformedLineError from None
    if not isinstance(message, dict):
        raise MalformedLineError
    return message


# The token.


def has_token_file(path: str | None) -> bool:
    """Whether a setting or the environment names a token file."""
    return bool(path or os.environ.get(TOKEN_VARIABLE))


def load_token(path: str | None) -> bytes:
    """Read the shared token, without the whitespace around it.

    Args:
        path: the token file; None takes the file that the environment variable TORCHFEDRPC_TOKEN_FILE names.

    Raises:
        ConfigError: If the file is missing, other users can read or write it, or the token is too short.
    """
    name = path or os.environ.get(TOKEN_VARIABLE)
    if not name:
        raise ConfigError(
            f"driver and workers need a shared token: make one ({_HOW_TO_MAKE_TOKEN}), copy it to each machine, and "
            f"name the file by runtime.token_file, --token-file or {TOKEN_VARIABLE}"
        )
    try:
        # Non-blocking, so that opening a named pipe returns.
        descriptor = os.open(Path(name).expanduser(), os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(f"token file {name}: {error.strerror}; make one by {_HOW_TO_MAKE_TOKEN}") from None
    try:
        _check_token_file(name, os.fstat(descriptor))
        token = os.read(descriptor, _MAX_TOKEN_BYTES).strip()
    finally:
        os.close(descriptor)
    if len(token) < _MIN_TOKEN_BYTES or len(set(token)) < _MIN_DIFFERENT_BYTES:
        raise ConfigError(
            f"token file {name}: {len(token)} bytes, {len(set(token))} different ones among them, can be guessed; at "
            f"least {_MIN_TOKEN_BYTES} random ones are needed, make them by {_HOW_TO_MAKE_TOKEN}"
        )
    return token


def _check_token_file(name: str, status: os.stat_result) -> None:
    """Refuse a file that other users may have read or written."""
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"token file {name} is no regular file; make one by {_HOW_TO_MAKE_TOKEN}")
    if status.st_size > _MAX_TOKEN_BYTES:
        raise ConfigError(
            f"token file {name} has {status.st_size} bytes, as no token has; make one by {_HOW_TO_MAKE_TOKEN}"
        )
    if status.st_uid not in (os.geteuid(), 0):
        raise ConfigError(f"token file {name} belongs to another user (uid {status.st_uid}): make a copy of your own")
    if status.st_mode & 0o077:
        raise ConfigError(
            f"token file {name} is open to others (mode {stat.S_IMODE(status.st_mode):04o}): chmod 600 {name}"
        )
