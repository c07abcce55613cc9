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
# What a worker may send in answer to one request: an answer has a few fields, and an error with its traceback is cut
# to less. To take so much apart costs the driver's event loop some milliseconds.
_ANSWER_BYTES = 256 << 10
# What a driver may send in one message: with an endpoint for each of 100,000 clients it has some 5 MB.
_REQUEST_BYTES = 64 << 20
_PROBE_S = 1
_LEAST_CUT_OFF_S = 6.0
_TEXT_CHARACTERS = 20_000  # of an error or its traceback; JSON needs 6 bytes for some


class MalformedError(ValueError):
    """What came over a link is no message of ours."""


class Link:
    """One end of a control link. The worker's end waits; the driver's end is awaited.

    Args:
        connection: the connected socket, owned from now on.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        close_in_children(connection)
        self._received = bytearray()
        self._num_searched = 0  # bytes of these that have no end of a line
        self._numbers = itertools.count()
        self._is_asking = False
        self._is_closed = False

    def send(self, message: Message) -> None:
        """Send a message, waiting until it is out."""
        self._socket.sendall(_line(message))

    def receive(self) -> Message | None:
        """Wait for a message; None once the other end is gone.

        Raises:
            MalformedError: what came is no message, or longer than any is.
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
        """Send a message and await the answer; for the driver's end.

        Args:
            message: what to do.
            label: the worker's name, for the error.

        Raises:
            WorkerLostError: the worker is gone, or sent what is no answer; then the link is closed.
        """
        loop = asyncio.get_running_loop()
        number, num_bytes = next(self._numbers), len(self._received)
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
    """A text as an answer may hold it: its end, which says most, and nothing that cannot be printed."""
    return text[-_TEXT_CHARACTERS:].encode(errors="backslashreplace").decode()


def end_when_cut_off(connection: socket.socket, timeout_s: float) -> None:
    """Let the kernel end a TCP connection once the other machine has not been reached for so long, and 6 s at least.

    The kernels tell each other, whatever the processes are busy with. They do so once a second, so that it takes the
    loss of five probes in succession, or of their acknowledgements, to end a connection of a link that only loses
    some of its packets: with 2 % of them lost each way that happens once in 100 days. A cut in the heartbeat is
    noticed by `Watch`, which needs none of this. It has to be called while the connection is fresh: of one that has
    been silent for longer than that, the kernel takes the first lost probe for the last.
    """
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with contextlib.suppress(OSError):  # it is at its end already, which whoever reads it finds out
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_KEEPIDLE", _PROBE_S),
            ("TCP_KEEPALIVE", _PROBE_S),  # what macOS calls it
            ("TCP_KEEPINTVL", _PROBE_S),
            # On Linux this, and no number of probes, says when the connection ends; see tcp(7).
            ("TCP_USER_TIMEOUT", int(max(timeout_s, _LEAST_CUT_OFF_S) * 1000)),
        ):
            if (option := getattr(socket, name, None)) is not None:
                connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _line(message: Message) -> bytes:
    return json.dumps(message).encode() + b"\n"
