"""The control link between the driver and one worker: a socket with a JSON message a line."""

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


class Link:
    """One end of a control link. The worker's end waits; the driver's end is awaited.

    Args:
        connection: the connected socket, owned from now on.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        _open_links.add(self)
        _close_in_children()
        self._received = bytearray()
        self._numbers = itertools.count()

    def send(self, message: Message) -> None:
        """Send a message, waiting until it is out."""
        self._socket.sendall(_line(message))

    def receive(self) -> Message | None:
        """Wait for a message; None once the other end is gone."""
        while (message := self._take()) is None:
            try:
                chunk = self._socket.recv(_CHUNK_BYTES)
            except ConnectionError:
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
        self._socket.setblocking(False)
        number = next(self._numbers)
        try:
            await loop.sock_sendall(self._socket, _line({**message, "number": number}))
            # An answer to an earlier request, whose caller was cancelled, is passed over.
            while (answer := self._take()) is None or answer.get("number") != number:
                if answer is not None:
                    continue
                chunk = await loop.sock_recv(self._socket, _CHUNK_BYTES)
                if not chunk:
                    raise ConnectionResetError("it ended")
                self._received += chunk
        except ConnectionError as error:
            raise WorkerLostError(
                f"{label} ended when it was told to {message['do']} ({error}): see its output for why"
            ) from error
        return answer

    def stop(self) -> None:
        """Tell a worker, if it is still there, that the run is over, and close the link."""
        with contextlib.suppress(OSError):  # it is gone already
            self.send({"do": "stop"})
        self.close()

    def close(self) -> None:
        """Close the link; a worker leaves when its link is closed."""
        self._socket.close()

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


_open_links: weakref.WeakSet[Link] = weakref.WeakSet()


@functools.cache
def _close_in_children() -> None:
    """Close links in forked children (of a DataLoader, say): a copy there would outlive the process it stands for."""

    def close_all() -> None:
        for link in list(_open_links):
            link.close()

    os.register_at_fork(after_in_child=close_all)


def _line(message: Message) -> bytes:
    return json.dumps(message).encode() + b"\n"
