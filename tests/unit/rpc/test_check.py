"""`torchfedrpc check`: each finding, and what is told of what is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from workers import make_token

from torchfedrpc import check_cli
from torchfedrpc.errors import WorkerLostError
from torchfedrpc.rpc import check, handshake, preflight
from torchfedrpc.rpc.handshake import Dialler, Listener, RefusedError

TOKEN = b"0123456789abcdef" * 4


@contextlib.asynccontextmanager
async def listening() -> AsyncIterator[str]:
    """A worker that answers checks: its address."""

    async def serve(dialler: Dialler) -> None:
        if dialler.about.get("role") != check.ROLE:
            await dialler.refuse(RefusedError("only for checks"))
        await check.answer(dialler, "worker")

    server = socket.create_server(("127.0.0.1", 0))
    running = asyncio.ensure_future(Listener(server, TOKEN, serve).run())
    try:
        yield f"127.0.0.1:{server.getsockname()[1]}"
    finally:
        running.cancel()
        await asyncio.wait([running])


async def findings(address: str, *modules: str, token: bytes = TOKEN) -> list[tuple[str, str, str]]:
    return [(one.name, one.mark, one.text) async for one in check.check(address, token, modules)]


async def failures(address: str, *modules: str, token: bytes = TOKEN) -> list[tuple[str, str]]:
    return [(name, text) for name, mark, text in await findings(address, *modules, token=token) if mark != "ok"]


async def test_each_part_of_a_good_worker_is_a_line() -> None:
    async with listening() as address:
        found = await findings(address, "torchfedrpc.rpc.check")
    parts = ["name", "port", "token", "versions", "clocks", "files", "ports", "ports", "module"]
    assert [name for name, _, _ in found] == parts
    assert {mark for _, mark, _ in found} == {"ok"}
    assert found[6][2].endswith(f"of the worker on {socket.gethostname()} is reached from here")
    assert found[7][2].endswith(f"here is reached from the worker on {socket.gethostname()}")


async def test_another_token_is_a_failure_of_the_token() -> None:
    async with listening() as address:
        ((name, text),) = await failures(address, token=TOKEN[::-1])
    assert name == "token"
    assert "give both ends the same token file" in text


async def test_an_address_where_nobody_listens_is_a_failure_of_the_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    ((name, text),) = await failures(f"127.0.0.1:{port}")
    assert name == "port"
    assert f"127.0.0.1:{port} cannot be reached from {socket.gethostname()} (Connection refused)" in text


async def test_a_name_that_is_unknown_or_leads_to_this_machine_itself_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ((name, text),) = await failures("nowhere.invalid:8080")
    assert name == "name"
    assert f"{socket.gethostname()} does not know nowhere.invalid" in text

    async def resolve(loop: Any, host: str, port: int, **options: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port))]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", resolve)
    async with listening() as address:
        port = address.partition(":")[2]
        ((name, text),) = await failures(f"hub:{port}")
    assert (name, text) == ("name", f"hub:{port} (here 127.0.0.1, this machine itself: see its /etc/hosts)")


async def test_versions_that_differ_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async with listening() as address:
        own = handshake._own_about()
        other = {**own, "versions": {**own["versions"], "torch": "1.0.0"}}
        told = iter([other, own])
        monkeypatch.setattr(handshake, "_own_about", lambda: next(told))
        ((name, text),) = await failures(address)
    assert name == "versions"
    assert "have different versions: torch 1.0.0 and" in text


async def test_clocks_apart_and_few_files_are_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    async with listening() as address:
        own = handshake._own_about()
        told = iter([own, {**own, "machine": "site", "time_s": own["time_s"] + 400, "max_descriptors": 32}])
        monkeypatch.setattr(handshake, "_own_about", lambda: next(told))
        found = await findings(address)
    marks = {name: (mark, text) for name, mark, text in found}
    assert marks["clocks"][0] == marks["files"][0] == "warn"
    assert "the clock of site is 400 s ahead of that of" in marks["clocks"][1]
    assert "32 files may be open in a process on site, and a worker needs 64: ulimit -n 64" in marks["files"][1]


@pytest.mark.parametrize("blocked", ["here", "there"])
async def test_a_port_that_one_end_cannot_reach_is_a_failure(monkeypatch: pytest.MonkeyPatch, blocked: str) -> None:
    calls: list[int] = []

    async def reach(host: str, port: int, interface: str | None) -> None:
        calls.append(port)
        if len(calls) == (1 if blocked == "there" else 2):
            raise WorkerLostError(f"{host}:{port} cannot be reached from site")

    monkeypatch.setattr(check, "check_reachable", reach)
    async with listening() as address:
        ((name, text),) = await failures(address)
    assert (name, text) == ("ports", f"127.0.0.1:{calls[0 if blocked == 'there' else 1]} cannot be reached from site")


async def test_a_module_that_one_end_lacks_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    async with listening() as address:
        ((_, text),) = await failures(address, "torchfedrpc.nothing.there")
        assert "torchfedrpc.nothing.there is not found here, in " in text
        answers = iter([False, True])  # of the worker, and of this end
        monkeypatch.setattr(check, "_is_found", lambda name: next(answers))
        ((name, text),) = await failures(address, "my_learners")
    assert name == "module"
    assert "does not find my_learners: start it in the folder that has it" in text


async def test_questions_that_are_none_end_the_answers() -> None:
    async with listening() as address:
        link, _ = await handshake.dial(address, TOKEN, {"role": check.ROLE}, timeout_s=5)
        with contextlib.closing(link.detach()) as connection:
            connection.setblocking(False)
            await handshake.send_line(connection, {"ask": "connect", "port": 10**6})
            with pytest.raises(OSError, match="it closed the connection"):
                await handshake.receive_line(connection)


def test_the_command_prints_a_line_each_and_its_status_tells_of_failures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert check_cli.main([f"127.0.0.1:{port}", "--token-file", make_token(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["ok", "name"], ["FAIL", "port"]]


def test_machines_of_workers_and_of_the_driver_are_warned_about(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = handshake._own_about()
    preflight.warn_about(own)
    preflight.check_own_descriptors(1)
    assert not caplog.text
    preflight.warn_about({**own, "machine": "site", "time_s": own["time_s"] - 100})
    assert "the clock of site is 100 s behind that of" in caplog.text
    monkeypatch.setattr(preflight, "max_descriptors", lambda: 256)
    preflight.check_own_descriptors(9)
    assert not [line for line in caplog.messages if "files" in line]
    preflight.check_own_descriptors(10)
    assert f"on {socket.gethostname()}, and a driver of 10 workers needs 264: ulimit -n 264" in caplog.text
