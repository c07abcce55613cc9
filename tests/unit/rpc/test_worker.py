"""A worker process and its driver's orders."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import WorkerLostError
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.rpc.control_link import Link
from torchfedrpc.rpc.heartbeat_connection import open_heartbeat
from torchfedrpc.rpc.heartbeat_process import BEAT
from torchfedrpc.rpc.member import Member
from torchfedrpc.rpc.processes import start_worker

MODULE = """
import time
from pathlib import Path
Path({path!r}).touch()
while True:
    time.sleep(0.05)
"""


@pytest.mark.parametrize(("reason", "status"), [("it takes too long", 1), ("", 0)])
async def test_worker_ends_in_the_middle_of_an_import_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], reason: str, status: int
) -> None:
    begun = tmp_path / "begun"
    (tmp_path / "endless.py").write_text(MODULE.format(path=str(begun)))
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = LearnerSpec("endless", "Learner", 0, RuntimeConfig()).to_message()
    prepare = {"do": "prepare", "spec": spec, "label": "worker1", "local_index": 0, "main": None, "settings": {}}
    ours, theirs = socket.socketpair()
    with theirs:
        process = await start_worker(theirs.fileno(), remote=True)
    link = Link(ours)
    try:
        member = Member("worker1", link, "here")
        member.begin()
        with await open_heartbeat(member, member.tell, "127.0.0.1", "lo", 5.0) as heartbeat:
            assert await asyncio.get_running_loop().sock_recv(heartbeat, 1) == BEAT
            preparing = asyncio.ensure_future(link.request(prepare, "worker1"))
            async with asyncio.timeout(60):
                while not begun.exists():
                    await asyncio.sleep(0.05)
            link.stop(reason)
            assert await process.ends_within(30)
            assert process.status() == status
            with pytest.raises(WorkerLostError):
                await preparing
    finally:
        process.close()
    assert (f"the driver does without this worker: {reason}" in capfd.readouterr().err) == bool(reason)
