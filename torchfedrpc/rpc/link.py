"""The control link between the driver and one worker: a socket with a JSON message a line."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
from typing import Any

from torchfedrpc.errors import WorkerLostError
from torchfedrpc.rpc.forks import close_in_children

Message = dict[str, Any]
_CHUNK_BYTES = 65536


class Link:
    """One end of a control link. The worker's end waits; the driver's end is awaited.

    Args:
        connection: the connected socket, owned from now on.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        close_in_children(connection)
        self._received = bytearray()
        self._numbers = itertools.count()
        self._is_asking = False
        self._is_closed = False

    def send(self, message: Message) -> None:
        """Send a message, waiting until it is out."""
        self._socket.sendall(_line(message))

    def receive(self) -> Message | None:
        """Wait for a message; None once the other end is gone."""
        while (message := self._take()) is None:
            try:
                chunk = self._socket.recv(_CHUNK_BYTES)
            except OSError:  # reset, or cut off for too long
                chunk = b""
            if not chunk:
                return None
            self._received += chunk
        return message

    async def request(self, message: Message, label: str) -> Message:
        """Send a message and await the answer; for the driver's end.

        Args:
            message: what to do.
            label: the worker's name, for the error.

        Raises:
            WorkerLostError: the worker is gone.
        """
        loop = asyncio.get_running_loop()
        number = next(self._numbers)
        self._is_asking = True
        try:
            self._socket.setblocking(False)
            await loop.sock_sendall(self._socket, _line({**message, "number": number}))
            # An answer to an earlier request, whose caller was cancelled, is passed over.
            while (answer := self._take()) is None or answer.get("number") != number:
                if answer is not None:
                    continue
                chunk = await loop.sock_recv(self._socket, _CHUNK_BYTES)
                if not chunk:
                    raise ConnectionResetError("it ended")
                self._received += chunk
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
        """Tell a worker, if it is still there, that the run is over, or why it is without it; and close the link."""
        with contextlib.suppress(OSError):  # it is gone already
            self.send({"do": "stop", "reason": reason})
        self.close()

    def close(self) -> None:
        """Close the link, also under whoever waits on it; a worker leaves when its link is closed."""
        self._is_closed = True
        with contextlib.suppress(OSError):  # the other end is gone already
            self._socket.shutdown(socket.SHUT_RDWR)
        if not self._is_asking:  # whoever asks is woken by the shutdown, and would wait for ever for a closed one
            self._socket.close()

    def detach(self) -> socket.socket:
        """Give the connection up, for other use; nothing must have been received that was not taken."""
        assert not self._received
        return self._socket

    def end_when_cut_off(self, timeout_s: float) -> None:
        """Let the kernel end the connection once the other machine has not been reached for so long."""
        end_when_cut_off(self._socket, timeout_s)

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._socket.fileno()

    def local_address(self) -> str:
        """This end's IP address."""
        address: str = self._socket.getsockname()[0]
        return address

    def _take(self) -> Message | None:
        end = self._received.find(b"\n")
        if end < 0:
            return None
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        message: Message = json.loads(line)
        return message


def end_when_cut_off(connection: socket.socket, timeout_s: float) -> None:
    """Let the kernel end a TCP connection once the other machine has not been reached for so long.

    The kernels tell each other, whatever the processes are busy with.
    """
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    interval_s = max(int(timeout_s / 3), 1)
    with contextlib.suppress(OSError):  # it is at its end already, which whoever reads it finds out
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, interval_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeout_s * 1000))


def _line(message: Message) -> bytes:
    return json.dumps(message).encode() + b"\n"
