"""The connection for a worker's heartbeats, which the worker opens to an ephemeral port of the driver.

A world of torch RPC connects driver and workers on ephemeral ports, in both directions. Opening this connection, and
connecting once in the other direction, tests these ways before a world is formed.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import secrets
import socket
from collections.abc import Awaitable, Callable

from torchfedrpc.errors import WorkerLostError
from torchfedrpc.rpc.control_link import Message, end_when_cut_off
from torchfedrpc.rpc.interfaces import describe_os_error
from torchfedrpc.rpc.member import Member

Tell = Callable[[Message], Awaitable[Message]]

_EPHEMERAL_PORTS = (
    "every member of a world has to reach every other on ephemeral ports, not on the port of the handshake alone; "
    "sites behind NAT or a firewall need a network of their own, such as WireGuard: set runtime.interface=wg0 and "
    "dial the addresses of that network"
)

_TIMEOUT_S = 5.0
_STRANGER_TIMEOUT_S = 1.0  # the worker's secret comes before the answer to `open_heartbeat`
_SECRET_BYTES = 32
_ADDRESS = re.compile(r"[0-9]{1,3}(\.[0-9]{1,3}){3}")  # a host name is not looked up


def advice(interface: str | None) -> str:
    """Return what to do about an ephemeral port that a member of a world cannot reach.

    Args:
        interface: the run's ``runtime.interface``, if it is set.
    """
    if interface is None:
        return _EPHEMERAL_PORTS
    return (
        f"runtime.interface={interface} has placed it there: name one whose addresses reach each other from driver "
        f"and workers on ephemeral ports, or a range of addresses, such as 10.0.0.0/24"
    )


async def open_heartbeat(
    member: Member, tell: Tell, address: str, interface: str | None, cut_off_timeout_s: float
) -> socket.socket:
    """Let a worker open its heartbeat connection, and check that the driver reaches the worker.

    Args:
        member: the worker.
        tell: sends the worker a message, and returns its answer.
        address: the driver's address in the world.
        interface: the worker's interface in the world; None for the one that its control link uses.
        cut_off_timeout_s: see `end_when_cut_off`.

    Returns:
        The driver's end of the connection.

    Raises:
        WorkerLostError: If the worker is lost, or one of the two does not reach the other.
    """
    secret = secrets.token_bytes(_SECRET_BYTES)
    with socket.create_server((address, 0)) as server:
        message = {
            "do": "connect",
            "host": address,
            "port": server.getsockname()[1],
            "secret": secret.hex(),
            "interface": interface,
            "cut_off_timeout_s": cut_off_timeout_s,
        }
        match await tell(message):
            case {"host": str(host), "port": int(port)} if _ADDRESS.fullmatch(host) and 0 < port < 65536:
                pass
            case _:
                raise member.misunderstood(message)
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                connection = await _accept(server, secret)
        except TimeoutError:
            raise WorkerLostError(f"{member.label} did not open its heartbeat connection") from None
    try:
        await check_reachable(host, port, interface)
    except BaseException:
        connection.close()
        raise
    end_when_cut_off(connection, cut_off_timeout_s)
    return connection


def dial_heartbeat(
    host: str, port: int, secret: bytes, cut_off_timeout_s: float, interface: str | None = None
) -> socket.socket:
    """Open the heartbeat connection from the worker's side.

    Raises:
        WorkerLostError: If the driver is not reached within 5 s.
    """
    try:
        connection = socket.create_connection((host, port), timeout=_TIMEOUT_S)
    except OSError as error:
        raise _unreachable(host, port, error, interface) from error
    connection.settimeout(None)
    connection.sendall(secret)
    end_when_cut_off(connection, cut_off_timeout_s)
    return connection


async def _accept(server: socket.socket, secret: bytes) -> socket.socket:
    """Accept the connection that begins with the secret, and close others."""
    loop = asyncio.get_running_loop()
    server.setblocking(False)
    while True:
        connection, _ = await loop.sock_accept(server)
        received, is_accepted = b"", False
        try:
            async with asyncio.timeout(_STRANGER_TIMEOUT_S):
                while len(received) < _SECRET_BYTES:
                    chunk = await loop.sock_recv(connection, _SECRET_BYTES - len(received))
                    received += chunk
                    if not chunk:
                        break
            is_accepted = hmac.compare_digest(received, secret)
        except OSError:  # reset, or too slow
            pass
        finally:
            if not is_accepted:
                connection.close()
        if is_accepted:
            return connection


async def check_reachable(host: str, port: int, interface: str | None) -> None:
    """Connect once to a port of another member.

    Raises:
        WorkerLostError: If it cannot be reached within 5 s.
    """
    try:
        with socket.socket() as connection:
            connection.setblocking(False)
            async with asyncio.timeout(_TIMEOUT_S):
                await asyncio.get_running_loop().sock_connect(connection, (host, port))
    except OSError as error:
        raise _unreachable(host, port, error, interface) from error


def _unreachable(host: str, port: int, error: OSError, interface: str | None) -> WorkerLostError:
    reason = f"no answer within {_TIMEOUT_S:g} s" if isinstance(error, TimeoutError) else describe_os_error(error)
    return WorkerLostError(
        f"{host}:{port} cannot be reached from {socket.gethostname()} ({reason}): {advice(interface)}"
    )
