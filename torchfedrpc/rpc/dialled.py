"""Workers that listen at addresses: the driver dials them, and dials again those that are lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from functools import partial

from torchfedrpc.errors import ConfigError, WorkerLostError
from torchfedrpc.rpc.greeting import BusyError, GreetingError, MistrustError, UnreachableError, dial
from torchfedrpc.rpc.guests import about_driver, member_of
from torchfedrpc.rpc.member import Member
from torchfedrpc.rpc.retries import Retries
from torchfedrpc.rpc.source import Admit

logger = logging.getLogger(__name__)

_PATIENCE_S = 8.0  # for one that still ends an earlier job, which takes it up to 5 s
_RETRY_S = 0.25


class DialledSource:
    """The workers at some addresses, each of which is the name of its worker.

    Args:
        addresses: each ``HOST:PORT``.
        token: the shared token.
    """

    expects_workers = True
    replaces = False

    def __init__(self, addresses: Sequence[str], token: bytes) -> None:
        self._addresses = addresses
        self._token = token
        self._members: dict[str, Member] = {}  # those that are there, by address
        self._dialling: dict[str, asyncio.Task[None]] = {}
        self._retries = Retries()
        self._admit: Admit | None = None

    async def gather(self) -> Sequence[Member]:
        """Dial all of them at once.

        Raises:
            ConfigError: one has another token or other versions.
            WorkerLostError: one is not reached, or is another job's, for 8 s.
        """
        deadline = time.monotonic() + _PATIENCE_S
        outcomes = await asyncio.gather(
            *(self._reach(address, deadline) for address in self._addresses), return_exceptions=True
        )
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return list(self._members.values())

    def start(self, admit: Admit) -> None:
        """From now on dial again those that are lost."""
        self._admit = admit

    def lost(self, member: Member) -> bool:
        """Dial it again, until it is there."""
        self._members.pop(member.label, None)
        if self._admit is None:
            return False
        self._retries.lost(member)
        self._dialling[member.label] = asyncio.ensure_future(self._dial_again(member.label, self._admit))
        return True

    def abandon(self) -> None:
        """Nobody is dialled any more."""

    async def close(self, reason: str) -> None:
        """Let them go, to wait for the next job."""
        self._admit = None
        for task in self._dialling.values():
            task.cancel()
        await asyncio.gather(*self._dialling.values(), return_exceptions=True)
        for member in self._members.values():
            member.dismiss(reason)
        self._members.clear()

    async def _reach(self, address: str, deadline: float) -> None:
        """Dial one until the deadline, while it is busy."""
        was_busy = False
        while True:
            try:
                await self._dial(address, deadline - time.monotonic())
                return
            except BusyError as error:
                if time.monotonic() + _RETRY_S > deadline:
                    raise _unusable(address, error) from error
                if not was_busy:
                    logger.warning("%s is waited for, up to %.0f s: %s", address, _PATIENCE_S, error)
                was_busy = True
            except GreetingError as error:
                raise _unusable(address, error) from error
            await asyncio.sleep(_RETRY_S)

    async def _dial_again(self, address: str, admit: Admit) -> None:
        def tell(error: Exception) -> None:
            logger.info("%s is dialled until it is there: %s", address, error)

        await self._retries.until_done(address, partial(self._dial, address, _PATIENCE_S), GreetingError, tell)
        del self._dialling[address]
        admit(self._members[address])

    async def _dial(self, address: str, timeout_s: float) -> None:
        guest = await dial(address, self._token, about_driver(), timeout_s=max(timeout_s, _RETRY_S))
        self._members[address] = member_of(guest, address)


def _unusable(address: str, error: GreetingError) -> ConfigError | WorkerLostError:
    if isinstance(error, MistrustError):
        return ConfigError(f"client_endpoints: the worker at {address} cannot be used: {error}")
    if isinstance(error, UnreachableError):
        return WorkerLostError(
            f"client_endpoints: no worker at {address}: {error}; start it there, by torchfedrpc-worker --listen "
            f"{address} --token-file FILE"
        )
    return WorkerLostError(f"client_endpoints: the worker at {address} cannot be used: {error}")
