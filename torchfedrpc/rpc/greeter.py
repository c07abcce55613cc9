"""Greets whoever comes to a listening socket, on a thread of its own that no stranger can hold up."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from torchfedrpc.rpc.control_link import Link, end_when_cut_off
from torchfedrpc.rpc.forks import close_in_children
from torchfedrpc.rpc.greeting import (
    CHANNELS,
    GREETING_TIMEOUT_S,
    PATIENCE_S,
    About,
    Greeted,
    GreetingError,
    MistrustError,
    receive,
)

logger = logging.getLogger(__name__)

PAIRING_TIMEOUT_S = 10.0

_MAX_GREETINGS = 128  # at once
_NUMBERS = re.compile(r"\d+")
_MAX_REMEMBERED = 1000  # warnings that are not given again
_PAUSE_S = 0.1


@dataclass
class _Half:
    """A guest that has come by one of its channels, and is waited for on the other."""

    channel: str
    connection: socket.socket
    about: About
    timer: asyncio.TimerHandle


class Greeter:
    """Greets guests until it is closed; strangers are refused, with one warning for each host and reason.

    Args:
        listener: where guests come, owned from now on.
        token: the shared token.
        answer: what a trusted guest is told, as `receive` has it; called for each channel, on the greeter's thread.
        on_guest: takes a guest that has come by both its channels, on the greeter's thread.
        greeting_timeout_s: seconds that one greeting may take.
        pairing_timeout_s: seconds after a guest's first channel in which its second has to come.
    """

    def __init__(
        self,
        listener: socket.socket,
        token: bytes,
        answer: Callable[[About], About],
        on_guest: Callable[[Greeted], None],
        *,
        greeting_timeout_s: float = GREETING_TIMEOUT_S,
        pairing_timeout_s: float = PAIRING_TIMEOUT_S,
    ) -> None:
        self._listener = listener
        self._token = token
        self._answer = answer
        self._on_guest = on_guest
        self._greeting_timeout_s = greeting_timeout_s
        self._pairing_timeout_s = pairing_timeout_s
        self._greetings: dict[asyncio.Task[None], socket.socket] = {}
        self._halves: dict[str, _Half] = {}  # by session
        self._warned: deque[tuple[str, str]] = deque(maxlen=_MAX_REMEMBERED)
        self._closing = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        close_in_children(listener)
        self._thread = threading.Thread(target=self._run, name="torchfedrpc-greeter", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening, and close what is in the middle of a greeting; returns when the thread has ended.

        Called by `on_guest`, on that thread, it returns at once.
        """
        if threading.current_thread() is self._thread:
            self._closing.set()
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed already
            self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    def _run(self) -> None:
        with self._listener, asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._listener.setblocking(False)
        accepting = asyncio.create_task(self._accept())
        await self._closing.wait()
        greetings = dict(self._greetings)
        for task in [accepting, *greetings]:
            task.cancel()
        await asyncio.gather(accepting, *greetings, return_exceptions=True)
        for connection in [
            *(connection for task, connection in greetings.items() if task.cancelled()),
            *(half.connection for half in self._halves.values()),
        ]:
            connection.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(self._listener)
            except OSError as error:  # out of descriptors, say; whoever comes waits on
                self._warn("an unknown host", f"it could not be accepted ({error})")
                await asyncio.sleep(_PAUSE_S)
                continue
            close_in_children(connection)
            if len(self._greetings) >= _MAX_GREETINGS:
                oldest = next(iter(self._greetings))
                self._warn(address[0], f"{_MAX_GREETINGS} others are being greeted, of which the first was let go")
                oldest.cancel()
                self._greetings.pop(oldest).close()
            task = loop.create_task(self._greet(connection, address[0]))
            self._greetings[task] = connection
            task.add_done_callback(lambda task: self._greetings.pop(task, None))

    async def _greet(self, connection: socket.socket, host: str) -> None:
        try:
            about = await receive(connection, self._token, self._answer, timeout_s=self._greeting_timeout_s)
            self._pair(connection, about)
        except GreetingError as error:
            self._warn(host, str(error))
            connection.close()
        except Exception:
            logger.exception("a guest from %s could not be taken", host)
            connection.close()

    def _pair(self, connection: socket.socket, about: About) -> None:
        if self._closing.is_set():
            connection.close()
            return
        session, channel = about.get("session", ""), about.get("channel", "")
        if not session:
            raise MistrustError("it names no session")
        first = self._halves.pop(session, None)
        if first is None:
            timer = self._loop.call_later(self._pairing_timeout_s, self._give_up, session)
            self._halves[session] = _Half(channel, connection, about, timer)
            return
        first.timer.cancel()
        channels = {first.channel: first.connection, channel: connection}
        if set(channels) != set(CHANNELS):
            first.connection.close()
            raise MistrustError("its two connections are not a link and a pulse")
        for end in channels.values():
            end_when_cut_off(end, PATIENCE_S)
        guest = Greeted(Link(channels["link"]), channels["pulse"], first.about)
        try:
            self._on_guest(guest)
        except Exception:
            guest.link.close()
            guest.pulse.close()
            raise

    def _give_up(self, session: str) -> None:
        self._halves.pop(session).connection.close()

    def _warn(self, host: str, reason: str) -> None:
        key = (host, _NUMBERS.sub("", reason))  # one that waits hears of other seconds each time
        if key not in self._warned:
            self._warned.append(key)
            logger.warning("refused a connection from %s: %s", host, reason)
