"""Check of a listening worker or driver from another machine: address, token, versions, ports both ways, and more."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from typing import Any

from torchfedrpc.errors import WorkerLostError
from torchfedrpc.launcher import is_loopback
from torchfedrpc.rpc import preflight
from torchfedrpc.rpc.handshake import (
    HANDSHAKE_TIMEOUT_S,
    About,
    Dialler,
    HandshakeError,
    MalformedLineError,
    RefusedError,
    UnreachableError,
    UntrustedError,
    dial,
    own_versions,
    receive_line,
    send_line,
)
from torchfedrpc.rpc.heartbeat_connection import check_reachable
from torchfedrpc.rpc.interfaces import describe_address, describe_os_error, parse_address

ROLE = "check"

_ANSWER_TIMEOUT_S = 10.0
_TIMEOUT_S = 60.0  # of a whole check, at the end that listens


@dataclass(frozen=True)
class Finding:
    """Result of one part of a check.

    Attributes:
        name: The part.
        mark: ``ok``, ``warn`` or ``FAIL``.
        text: What was found, and the next step if it is wrong.
    """

    name: str
    mark: str
    text: str


async def check(address: str, token: bytes, modules: Sequence[str] = ()) -> AsyncIterator[Finding]:
    """Check a worker or driver that listens, and yield one finding after another; the last one if it is fatal.

    Args:
        address: Its ``HOST:PORT``.
        token: The shared token.
        modules: Names of modules that have to be found at both ends.

    Raises:
        ConfigError: If the address is malformed.
    """
    host, port = parse_address(address)
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
            found = await loop.getaddrinfo(host, port, family=socket.AF_INET, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        words = describe_os_error(error) if isinstance(error, OSError) else str(error)
        yield Finding("name", "FAIL", f"{socket.gethostname()} does not know {host} ({words})")
        return
    resolved = str(found[0][4][0])
    is_odd = is_loopback(resolved) and not is_loopback(host)
    yield Finding("name", "warn" if is_odd else "ok", describe_address(host, port, resolved))
    try:
        link, about = await dial(address, token, {"role": ROLE}, timeout_s=HANDSHAKE_TIMEOUT_S)
    except HandshakeError as error:
        yield Finding(_part_of(error), "FAIL", str(error))
        return
    role = about.get("role", "process")
    peer = f"the {role} on {about['machine']}"
    yield Finding("port", "ok", f"{address} is {peer}, pid {about['pid']}")
    yield Finding("token", "ok", "both ends have proven it")
    yield Finding("versions", "ok", ", ".join(f"{name} {version}" for name, version in own_versions().items()))
    yield _finding("clocks", preflight.clocks_apart(about), f"less than {preflight.MAX_APART_S:g} s apart")
    few = [one for one in (preflight.too_few_descriptors(_own_limit()), preflight.too_few_descriptors(about)) if one]
    yield _finding("files", "; ".join(few), f"{preflight.max_descriptors()} here, {about['max_descriptors']} there")
    with contextlib.closing(link.detach()) as connection:
        connection.setblocking(False)
        try:
            yield await _check_port_there(connection, peer)
            yield await _check_port_here(connection, peer)
            for name in modules:
                yield await _check_module(connection, name, peer)
        except (OSError, MalformedLineError) as error:  # TimeoutError among them
            yield Finding("ports", "FAIL", f"{peer} did not answer ({str(error) or 'too late'}): see its output")


def _part_of(error: HandshakeError) -> str:
    kinds = {UnreachableError: "port", RefusedError: "versions", UntrustedError: "token"}
    return next((part for kind, part in kinds.items() if isinstance(error, kind)), "port")


def _own_limit() -> About:
    return {"machine": socket.gethostname(), "max_descriptors": preflight.max_descriptors()}


def _finding(name: str, problem: str | None, good: str) -> Finding:
    return Finding(name, "warn", problem) if problem else Finding(name, "ok", good)


async def _check_port_there(connection: socket.socket, peer: str) -> Finding:
    port = (await _ask(connection, {"ask": "port"}))["port"]
    try:
        await check_reachable(connection.getpeername()[0], port, None)
    except WorkerLostError as error:
        return Finding("ports", "FAIL", str(error))
    return Finding("ports", "ok", f"{connection.getpeername()[0]}:{port} of {peer} is reached from here")


async def _check_port_here(connection: socket.socket, peer: str) -> Finding:
    address = connection.getsockname()[0]
    with socket.create_server((address, 0)) as server:
        port = server.getsockname()[1]
        error = (await _ask(connection, {"ask": "connect", "port": port}))["error"]
    if error is not None:
        return Finding("ports", "FAIL", str(error))
    return Finding("ports", "ok", f"{address}:{port} here is reached from {peer}")


async def _check_module(connection: socket.socket, name: str, peer: str) -> Finding:
    answer = await _ask(connection, {"ask": "module", "name": name})
    if not _is_found(name):
        return Finding("module", "FAIL", f"{name} is not found here, in {os.getcwd()}: change to its folder")
    if not answer["found"]:
        there = f"{peer} does not find {name}: start it in the folder that has it (its folder is {answer['folder']})"
        return Finding("module", "FAIL", there)
    return Finding("module", "ok", f"{name} is found at both ends")


async def _ask(connection: socket.socket, question: dict[str, Any]) -> dict[str, Any]:
    async with asyncio.timeout(_ANSWER_TIMEOUT_S):
        await send_line(connection, question)
        return await receive_line(connection)


async def answer(dialler: Dialler, role: str) -> None:
    """Answer the questions of a check until it ends, at the end that listens.

    Args:
        dialler: The process that checks, which has proven the token.
        role: What listens here: ``driver`` or ``worker``.
    """
    link = await dialler.accept({"role": role})
    with contextlib.closing(link.detach()) as connection, contextlib.suppress(OSError, MalformedLineError):
        connection.setblocking(False)
        own, there = connection.getsockname()[0], connection.getpeername()[0]
        async with asyncio.timeout(_TIMEOUT_S):
            with socket.create_server((own, 0)) as server:
                while True:
                    question = await receive_line(connection)
                    await send_line(connection, await _answer_to(question, server, there))


async def _answer_to(question: dict[str, Any], server: socket.socket, there: str) -> dict[str, Any]:
    match question:
        case {"ask": "port"}:
            return {"port": server.getsockname()[1]}
        case {"ask": "connect", "port": int(port)} if 0 < port < 65536:
            try:
                await check_reachable(there, port, None)
            except WorkerLostError as error:
                return {"error": str(error)}
            return {"error": None}
        case {"ask": "module", "name": str(name)}:
            return {"found": _is_found(name), "folder": os.getcwd()}
    raise MalformedLineError


def _is_found(name: str) -> bool:
    """Return whether a module is found, without running any of its packages."""
    parts, path = name.split("."), None
    PathFinder.invalidate_caches()
    for depth in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:depth]), path)
        if spec is None:
            return False
        path = spec.submodule_search_locations
        if path is None and depth < len(parts):
            return False
    return True
