"""Whether two machines reach each other on ephemeral ports, without which they can be in no world of torch RPC."""

from __future__ import annotations

import asyncio
import re
import socket

from torchfedrpc.errors import WorkerLostError
from torchfedrpc.rpc.greeting import in_words
from torchfedrpc.rpc.member import Member

_TIMEOUT_S = 5.0
_ADDRESS = re.compile(r"[0-9]{1,3}(\.[0-9]{1,3}){3}")  # a name would be looked up
_REMEDY = (
    "every member of a world has to reach every other on ephemeral ports, not on the port alone that greets; sites "
    "behind NAT or a firewall need a network of their own, such as WireGuard: set runtime.interface=wg0 and dial the "
    "addresses of that network"
)


def dial(host: str, port: int) -> None:
    """Connect, and leave it at that.

    Raises:
        WorkerLostError: nobody is reached there within 5 s.
    """
    try:
        socket.create_connection((host, port), timeout=_TIMEOUT_S).close()
    except OSError as error:
        raise _unreached(host, port, error) from error


async def check(member: Member, address: str, interface: str | None) -> None:
    """See that a worker reaches the driver, and the driver the worker.

    Args:
        member: the worker.
        address: the driver's for the world.
        interface: the worker's; None: the one with which it reaches the driver.

    Raises:
        WorkerLostError: one of them does not; the message says what they need.
    """
    with socket.create_server((address, 0)) as listener:
        where = {"host": address, "port": listener.getsockname()[1]}
        message = {"do": "reach", **where, "interface": interface}
        answer = await member.tell(message)
    match answer:
        case {"host": str(host), "port": int(port)} if _ADDRESS.fullmatch(host) and 0 < port < 65536:
            there = (host, port)
        case _:
            raise member.misunderstood(message)
    try:
        with socket.socket() as connection:
            connection.setblocking(False)
            async with asyncio.timeout(_TIMEOUT_S):
                await asyncio.get_running_loop().sock_connect(connection, there)
    except OSError as error:
        raise _unreached(*there, error) from error


def _unreached(host: str, port: int, error: OSError) -> WorkerLostError:
    words = f"no answer within {_TIMEOUT_S:g} s" if isinstance(error, TimeoutError) else in_words(error)
    return WorkerLostError(f"{host}:{port} cannot be reached from {socket.gethostname()} ({words}): {_REMEDY}")
