"""What a worker answers over its link, and what becomes of one whose answers have another form."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from torchfedrpc.errors import ConfigError, WorkerLostError
from torchfedrpc.rpc.control_link import Link, Message
from torchfedrpc.rpc.member import Member, RefusalError
from torchfedrpc.wire.file import TensorFile

GOOD: Message = {"device": "cpu", "visible_gpus": None, "sees_files": True, "files": None, "problems": []}


@pytest.fixture
def ends() -> Iterator[tuple[Member, Link]]:
    """A worker as the driver has it, and the worker's end of its link."""
    ours, theirs = (Link(end) for end in socket.socketpair())
    yield Member("worker1", ours, None, "here", dismiss=lambda reason: None), theirs
    ours.close()
    theirs.close()


async def told(ends: tuple[Member, Link], answer: Any, message: Message) -> Message:
    """Tell the worker something that it answers so."""
    member, link = ends
    member.begin()
    link.send({"number": 0, **answer})
    return await member.tell(message)


async def test_a_refusal_has_its_reason_and_its_traceback(ends: tuple[Member, Link]) -> None:
    with pytest.raises(RefusalError, match="worker1 could not join: no") as raised:
        await told(ends, {"error": "no", "traceback": "where"}, {"do": "join"})
    assert raised.value.__notes__ == ["where"]


async def test_unprintable_characters_of_a_refusal_are_shown_by_their_codes(ends: tuple[Member, Link]) -> None:
    with pytest.raises(ConfigError, match=r"could not prepare: \\ud800") as raised:
        await told(ends, {"error": "\ud800", "traceback": "\udfff" * 30}, {"do": "prepare"})
    str(raised.value).encode()
    raised.value.__notes__[0].encode()


@pytest.mark.parametrize("answer", [{"error": 3, "traceback": ""}, {"error": "x"}, {"error": [], "traceback": None}])
async def test_a_refusal_of_another_form_is_a_lost_worker(ends: tuple[Member, Link], answer: Any) -> None:
    with pytest.raises(WorkerLostError, match="worker1 was told to join, and its answer is not of the form"):
        await told(ends, answer, {"do": "join"})


def test_message_of_a_prepared_worker_is_taken(ends: tuple[Member, Link]) -> None:
    member, _ = ends
    probe = TensorFile.of([])
    assert member.adopt({**GOOD, "device": "cuda:1", "visible_gpus": "0,1", "files": [os.getpid(), probe.address()]})
    assert (member.device, member.visible_gpus, member.sees_files) == ("cuda:1", "0,1", True)
    assert member.pid == os.getpid()
    probe.close()
    assert member.adopt({**GOOD, "files": ["../1", [0, 0, 0, 0, []]]})
    assert member.pid is None


@pytest.mark.parametrize(
    "changed",
    [
        {"device": "meta"},
        {"device": "cuda:1\n"},
        {"device": 3},
        {"visible_gpus": 3},
        {"sees_files": "yes"},
        {"files": 3},
        {"files": [1]},
        {"files": {}},
    ],
)
def test_message_of_another_form_is_not_taken(ends: tuple[Member, Link], changed: Any) -> None:
    member, _ = ends
    assert not member.adopt({**GOOD, **changed})
    assert not member.adopt({name: value for name, value in GOOD.items() if name not in changed})
    assert (member.device, member.pid) == ("cpu", None)
