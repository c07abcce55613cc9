"""Sources of workers: the order in which workers that listen begin a run."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.rpc import sources
from torchfedrpc.rpc.control_link import Link
from torchfedrpc.rpc.sources import DialledSource

ADDRESSES = ["first:1", "second:2"]


async def test_workers_that_listen_have_the_order_of_their_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    second_has_come = asyncio.Event()
    links: list[Link] = []

    async def dial(address: str, *arguments: Any, **options: Any) -> tuple[Link, dict[str, str]]:
        if address == ADDRESSES[0]:
            await second_has_come.wait()
        second_has_come.set()
        links.append(Link(socket.socket()))
        return links[-1], {"machine": "there", "site": "another"}

    monkeypatch.setattr(sources, "dial", dial)
    source = DialledSource(ADDRESSES, b"")
    members = await source.gather(RuntimeConfig())
    assert [member.label for member in members] == ADDRESSES
    assert [member.link for member in members] == links[::-1]
    await source.close("")
