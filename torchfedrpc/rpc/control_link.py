"""The control link between the driver and one worker: a socket with a JSON message on each line."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import os
import socket
import weakref
from typing import Any

from torchfedrpc.errors import WorkerLostError

Message = dict[str, Any]
_CHUNK_BYTES = 65536
# Limit of a worker's answer, which has a few fields, or an error with a shortened traceback. Parsing this many bytes
# costs the driver's event loop some milliseconds.
_ANSWER_BYTES = 256 << 10
# Limit of a driver's message: with an endpoint for each of 100,000 clients it has some 5 MB.
_REQUEST_BYTES = 64 << 20
_PROBE_S = 1
_LEAST_CUT_OFF_S = 6.0
_TEXT_CHARACTERS = 20_000  # of an error or its traceback; some characters need 6 bytes in JSON


class MalformedError(ValueError):
    """The received bytes are no message of the control link."""


class Link:
    """One end of a control link. The worker's end blocks; the driver's end is awaited.

    Args:
        connection: the connected socket, owned from now on.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        close_in_children(connection)
        self._received = bytearray()
        self._num_searched = 0  # leading received bytes without an end of a line
        self._numbers = itertools.count()
        self._is_asking = False
        self._is_closed = False

    def send(self, message: Message) -> None:
        """Send a message, and wait until it is written."""
        self._socket.sendall(_line(message))

    def receive(self) -> Message | None:
        """Wait for a message; returns None once the other end is gone.

        Raises:
            MalformedError: If the received line is no message, or too long.
        """
        while (message := self._take()) is None:
            if len(self._received) > _REQUEST_BYTES:
                raise MalformedError(f"it sent a line of more than {_REQUEST_BYTES >> 20} MiB")
            try:
                chunk = self._socket.recv(_CHUNK_BYTES)
            except OSError:  # reset, or cut off for too long
                chunk = b""
            if not chunk:
                return None
            self._received += chunk
        return message

    async def request(self, message: Message, label: str) -> Message:
        """Send a message and await its answer; for the driver's end.

        Args:
            message: what to do.
            label: the worker's label, for errors.

        Raises:
            WorkerLostError: If the worker is gone, or its answer is malformed, after which the link is closed.
        """
        loop = asyncio.get_running_loop()
        number, num_bytes = next(self._numbers), len(self._received)
        self._is_asking = True
        try:
            self._socket.setblocking(False)
            await loop.sock_sendall(self._socket, _line({**message, "number": number}))
            # Skip the answers to requests that were cancelled.
            while (answer := self._take()) is None or answer.get("number") != number:
                if answer is not None:
                    continue
                chunk = await loop.sock_recv(self._socket, _CHUNK_BYTES)
                if not chunk:
                    raise ConnectionResetError("it ended")
                num_bytes += len(chunk)
                if num_bytes > _ANSWER_BYTES:
                    raise MalformedError(f"it sent more than {_ANSWER_BYTES >> 10} KiB")
                self._received += chunk
        except MalformedError as error:
            self.close()
            raise WorkerLostError(
                f"{label} did not answer properly when it was told to {message['do']}: {error}; it is given up"
            ) from error
        except OSError as error:
            raise WorkerLostError(
                f"{label} ended when it was told to {message['do']} ({error}): see its output for why"
            ) from error
        finally:
            self._is_asking = False
            if self._is_closed:
                self._socket.close()
        return answer

    def stop(self, reason: str = "") -> None:
        """Stop the worker, if it is still there, and close the link.

        Args:
            reason: why the worker is given up, or the run ended early; empty after a good run.
        """
        with contextlib.suppress(OSError):  # it is gone already
            self.send({"do": "stop", "reason": reason})
        self.close()

    def close(self) -> None:
        """Close the link, also while a request waits; a worker leaves when its link is closed."""
        self._is_closed = True
        with contextlib.suppress(OSError):  # the other end is gone already
            self._socket.shutdown(socket.SHUT_RDWR)
        if not self._is_asking:  # a request is woken by the shutdown, and closes the socket itself
            self._socket.close()

    def detach(self) -> socket.socket:
        """Give the connection up, for other use; no received bytes may be left."""
        assert not self._received
        return self._socket

    def end_when_cut_off(self, timeout_s: float) -> None:
        """Let the kernel end the connection after the other machine was out of reach for this time."""
        end_when_cut_off(self._socket, timeout_s)

    def local_address(self) -> str:
        """This end's IP address."""
        address: str = self._socket.getsockname()[0]
        return address

    def peer_address(self) -> str | None:
        """Return the other end's IP address; None if the link has no addresses, or has ended."""
        with contextlib.suppress(OSError):
            if self._socket.family in (socket.AF_INET, socket.AF_INET6):
                return str(self._socket.getpeername()[0])
        return None

    def _take(self) -> Message | None:
        end = self._received.find(b"\n", self._num_searched)
        if end < 0:
            self._num_searched = len(self._received)
            return None
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        self._num_searched = 0
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise MalformedError(f"it sent a line that is no JSON ({error})") from None
        if not isinstance(message, dict):
            raise MalformedError("it sent a line that is no message")
        return message


def in_short(text: str) -> str:
    """Shorten a text for an answer to its last characters, all of them printable."""
    return text[-_TEXT_CHARACTERS:].encode(errors="backslashreplace").decode()


def end_when_cut_off(connection: socket.socket, timeout_s: float) -> None:
    """Let the kernel end a TCP connection after the other machine was out of reach for this time, 6 s at least.

    The kernels probe each other once a second, whatever the processes do. So a connection ends after five probes in
    succession, or their acknowledgements, are lost: on a link that loses 2 % of its packets each way, once in 100
    days. `Watch` notices a cut in the heartbeat earlier. Call this while the connection is fresh: if it has been
    silent for longer than the timeout, the kernel ends it at the first lost probe.
    """
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with contextlib.suppress(OSError):  # it has ended already, as its reader finds out
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_KEEPIDLE", _PROBE_S),
            ("TCP_KEEPALIVE", _PROBE_S),  # what macOS calls it
            ("TCP_KEEPINTVL", _PROBE_S),
            # On Linux this, and not the number of probes, decides when the connection ends; see tcp(7).
            ("TCP_USER_TIMEOUT", int(max(timeout_s, _LEAST_CUT_OFF_S) * 1000)),
        ):
            if (option := getattr(socket, name, None)) is not None:
                connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _line(message: Message) -> bytes:
    return json.dumps(message).encode() + b"\n"


# Sockets that are closed in forked children, such as those of a DataLoader: a copy would hide this process's end.
_closed_in_children: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def close_in_children(connection: socket.socket) -> None:
    """Close a connected socket in processes that are forked from now on. It stays open in this one."""
    _closed_in_children.add(connection)
    _close_when_forked()


def pair_for_child() -> tuple[socket.socket, socket.socket]:
    """Return two connected sockets: this process's end, and the end for a process that it starts, which blocks."""
    ours, theirs = socket.socketpair()
    close_in_children(ours)
    theirs.setblocking(True)  # whatever socket.setdefaulttimeout says here
    return ours, theirs


@functools.cache
def _close_when_forked() -> None:
    def close_all() -> None:
        for connection in list(_closed_in_children):
            connection.close()

    os.register_at_fork(after_in_child=close_all)
