"""Sources of workers: the order in which workers that listen begin a run, and the end of a worker process."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from typing import Any

import pytest
from settling import settled

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.rpc import sources
from torchfedrpc.rpc.control_link import Link
from torchfedrpc.rpc.member import Member
from torchfedrpc.rpc.sources import DialledSource, ProcessSource

ADDRESSES = ["first:1", "second:2"]


async def test_workers_that_listen_have_the_order_of_their_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    second_has_come = asyncio.Event()
    links: list[Link] = []

    async def dial(address: str, *arguments: Any, **options: Any) -> tuple[Link, dict[str, Any]]:
        if address == ADDRESSES[0]:
            await second_has_come.wait()
        second_has_come.set()
        links.append(Link(socket.socket()))
        return links[-1], {"machine": "there", "site": "another", "time_s": time.time(), "max_descriptors": 1024}

    monkeypatch.setattr(sources, "dial", dial)
    source = DialledSource(ADDRESSES, b"")
    members = await source.gather(RuntimeConfig())
    assert [member.label for member in members] == ADDRESSES
    assert [member.link for member in members] == links[::-1]
    await source.close("")


class FakeProcess:
    """A process that ends when a test says so."""

    def __init__(self) -> None:
        self.signals: list[int] = []
        self.has_ended = asyncio.Event()
        self.is_closed = False

    def send_signal(self, number: int) -> None:
        self.signals.append(number)

    async def ends_within(self, timeout_s: float | None) -> bool:
        await self.has_ended.wait()
        return True

    def close(self) -> None:
        self.is_closed = True


async def test_heartbeat_of_a_killed_process_is_closed_behind_its_end() -> None:
    surroundings: Any = None  # no process is started
    source, process = ProcessSource(1, surroundings), FakeProcess()
    heartbeat, other = socket.socketpair()
    member = Member("worker1", Link(socket.socket()), "here")
    member.heartbeat = heartbeat
    source.processes[member] = process  # type: ignore[assignment]
    with other:
        source.release(member, "it is silent")
        await settled()
        assert process.signals == [signal.SIGKILL]
        assert heartbeat.fileno() >= 0
        process.has_ended.set()
        await source.close("")
        assert heartbeat.fileno() == -1
        assert process.is_closed
