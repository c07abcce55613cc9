"""Reports of long waits."""

from __future__ import annotations

import asyncio

import pytest

from torchfedrpc import waiting


async def test_a_wait_is_reported_again_and_again_and_a_short_one_never(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with waiting.reported(lambda: "waiting for a worker"):
        await asyncio.sleep(0)
    assert not caplog.messages
    monkeypatch.setattr(waiting, "REPORT_EVERY_S", 0.01)
    names = iter(["ranks [1, 2]", "ranks [2]"])
    async with asyncio.timeout(5), waiting.reported(lambda: f"waiting for {next(names)}"):
        while len(caplog.messages) < 2:
            await asyncio.sleep(0.01)
    assert caplog.messages == ["waiting for ranks [1, 2], for 0 s so far", "waiting for ranks [2], for 0 s so far"]
