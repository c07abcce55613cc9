"""Workers that join a running job: the driver listens for them."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence

from torchfedrpc.errors import ConfigError
from torchfedrpc.host.answer import call_on
from torchfedrpc.rpc.greeter import Greeter
from torchfedrpc.rpc.greeting import About, Greeted, RefusedError, parse_address
from torchfedrpc.rpc.guests import about_driver, member_of
from torchfedrpc.rpc.member import Member
from torchfedrpc.rpc.source import Admit

logger = logging.getLogger(__name__)


class JoinedSource:
    """Listens at an address from the beginning of a run to its end.

    Args:
        address: ``HOST:PORT``; port 0 lets the system choose.
        token: the shared token.

    Raises:
        ConfigError: it cannot listen there.
    """

    expects_workers = True
    replaces = False

    def __init__(self, address: str, token: bytes) -> None:
        host, port = parse_address(address, any_port=True)
        try:
            listener = socket.create_server((host, port))
        except OSError as error:
            raise ConfigError(f"runtime.join_at={address}: cannot listen there ({error})") from error
        self._host = host
        self._port = listener.getsockname()[1]
        self._members: list[Member] = []
        self._waiting: list[Member] = []  # not handed over yet
        self._admit: Admit | None = None
        self._loop = asyncio.get_running_loop()
        self._why_closed: str | None = None
        self._greeter = Greeter(listener, token, self._answer, self._on_guest)
        logger.info("workers can join at %s", self.address)

    @property
    def address(self) -> str:
        """Where they join: ``HOST:PORT``."""
        return f"{self._host}:{self._port}"

    @property
    def command(self) -> str:
        """What starts a worker that joins."""
        return f"torchfedrpc-worker --join {self.address} --token-file FILE"

    async def gather(self) -> Sequence[Member]:
        """None: those who are there already are handed over like later ones, so that a bad one is refused alone."""
        return []

    def start(self, admit: Admit) -> None:
        """From now on hand over whoever joins."""
        self._admit = admit
        members, self._waiting = self._waiting, []
        for member in members:
            admit(member)

    def lost(self, member: Member) -> bool:
        """Its place is not kept: whoever joins next is another."""
        if member in self._members:
            self._members.remove(member)
        return False

    def abandon(self) -> None:
        """Those who came are let go in `close`."""

    async def close(self, reason: str) -> None:
        """Listen no longer, and let all go."""
        self._why_closed = reason
        await asyncio.to_thread(self._greeter.close)
        for member in self._members:
            member.dismiss(reason)
        self._members.clear()

    def _answer(self, about: About) -> About:
        """On the greeter's thread."""
        if about.get("role") != "worker":
            raise RefusedError("this is a driver, where workers join; a driver dials workers that listen")
        return about_driver()

    def _on_guest(self, guest: Greeted) -> None:
        """On the greeter's thread."""
        call_on(self._loop, self._came, guest)

    def _came(self, guest: Greeted) -> None:
        member = member_of(guest)
        if self._why_closed is not None:
            member.dismiss(self._why_closed)
            return
        self._members.append(member)
        if self._admit is not None:
            self._admit(member)
        else:
            self._waiting.append(member)
