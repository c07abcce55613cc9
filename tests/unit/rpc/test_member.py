"""A worker as its driver has it: its answers over the link, and requests to it through all worlds."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from settling import settled, within

from torchfedrpc.errors import ConfigError, WorkerLostError
from torchfedrpc.host.call import Batch, Call, Outcome, Registration
from torchfedrpc.rpc.control_link import Link, Message
from torchfedrpc.rpc.heartbeat import Loss
from torchfedrpc.rpc.member import Member, RefusalError, WorkerGone
from torchfedrpc.rpc.worker_client import UndeliverableError, WorldOver
from torchfedrpc.wire.file import TensorFiles
from torchfedrpc.wire.packing import pack

GOOD: Message = {
    "device": "cpu",
    "visible_gpus": None,
    "sees_files": True,
    "files": None,
    "problems": [],
    "process_id": 5,
}


@pytest.fixture
def ends() -> Iterator[tuple[Member, Link]]:
    """A worker as the driver has it, and the worker's end of its link."""
    ours, theirs = (Link(end) for end in socket.socketpair())
    yield Member("worker1", ours, "here"), theirs
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
    probe = TensorFiles.probe()
    assert probe is not None
    assert member.adopt(
        {**GOOD, "device": "cuda:1", "visible_gpus": "0,1", "files": [os.getpid(), probe.addresses()]}
    )
    assert (member.device, member.visible_gpus, member.sees_files) == ("cuda:1", "0,1", True)
    assert member.pid == os.getpid()
    probe.close()
    assert member.adopt({**GOOD, "files": ["../1", [[0, 0, 0, 0, []]]]})
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


# Requests through all worlds.


class Client:
    """The client of a world, whose requests a test answers; `Member` sees no more of `WorkerClient`."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.open: dict[str, asyncio.Future[Outcome]] = {}
        self.told: set[str] = set()

    def register_all(self, batch: Batch, registrations: Mapping[str, Registration]) -> None:
        for _, call in batch.calls:
            self.register(registrations[call.client_id])

    def register(self, registration: Registration) -> None:
        self.log.append(f"register {registration.client_id} {registration.build}")

    def forget(self, client_id: str) -> None:
        self.log.append(f"forget {client_id}")

    def confirmed(self) -> set[str]:
        return self.told

    def submit(self, call: Call) -> asyncio.Future[Outcome]:
        return self._ask(f"submit {call.call_id}")

    def run_batch(self, batch: Batch) -> asyncio.Future[Outcome]:
        return self._ask(f"batch {batch.call_id}")

    def advance(self, request: Call | Batch, step: int, sent: object = None) -> asyncio.Future[Outcome]:
        return self._ask(f"advance {request.call_id} {step}")

    def cancel(self, call: Call) -> asyncio.Future[Outcome]:
        return self._ask(f"cancel {call.call_id}")

    def cancel_batch(self, batch: Batch) -> None:
        self.log.append(f"cancel_batch {batch.call_id}")

    def close(self) -> None:
        self.log.append("close")
        for future in self.open.values():
            if not future.done():
                future.set_exception(WorldOver())

    def _ask(self, request: str) -> asyncio.Future[Outcome]:
        self.log.append(request)
        self.open[request] = asyncio.get_running_loop().create_future()
        return self.open[request]


VALUE, ITEM = Outcome("value"), Outcome("item")


def serving(*clients: str) -> tuple[Member, Client]:
    """A worker that has learners of these clients and can be called."""
    unused: Any = None
    member, client = Member("worker1", unused, "here"), Client()
    member.begin()
    enter(member, client)
    for client_id in clients:
        member.register(Registration(client_id, pack({}), 1))
    return member, client


def enter(member: Member, client: Any) -> None:
    member.enter_world(client)


def call(call_id: int, client_id: str = "a") -> Call:
    return Call(call_id, client_id, "train", pack(((), {})))


def batch(call_id: int = -1) -> Batch:
    return Batch(call_id, pack("reducer"), 2, ((0, call(1)), (1, call(2, "b"))))


KINDS = ["submit 1", "batch -1", "advance 1 3", "advance -1 2", "cancel 1"]


def asked(member: Member, kind: str) -> asyncio.Task[Outcome]:
    """Send a request of some kind to a worker that has learners of ``a`` and ``b``."""
    requests = {
        "submit 1": lambda: member.submit(call(1)),
        "batch -1": lambda: member.run_batch(batch()),
        "advance 1 3": lambda: member.advance(call(1), 3),
        "advance -1 2": lambda: member.advance(batch(), 2),
        "cancel 1": lambda: member.cancel(call(1)),
    }
    return asyncio.ensure_future(requests[kind]())


@pytest.mark.parametrize("kind", KINDS)
async def test_request_is_sent_again_in_each_world_until_it_is_answered(kind: str) -> None:
    member, first = serving("a", "b")
    task = asked(member, kind)
    await settled()
    member.leave_world()
    await settled()
    second, third = Client(), Client()
    enter(member, second)
    await settled()
    member.leave_world()
    enter(member, third)
    await settled()
    for client in (first, second, third):
        assert [entry for entry in client.log if entry == kind] == [kind]
    third.open[kind].set_result(VALUE)
    assert await within(task) is VALUE
    assert (first.log[-1], third.log[-1]) == ("close", kind)


@pytest.mark.parametrize("kind", KINDS)
async def test_request_fails_if_the_worker_is_lost(kind: str) -> None:
    member, _ = serving("a", "b")
    before = asked(member, kind)
    await settled()
    member.lose(Loss("its process ended", (1, 2)))
    member.lose(Loss("the proxy is closed", ()))
    for task in (before, asked(member, kind)):
        with pytest.raises(WorkerGone, match="its process ended") as caught:
            await within(task)
        assert (caught.value.reason, set(caught.value.running)) == ("its process ended", {1, 2})
    assert member.is_gone


@pytest.mark.parametrize("kind", KINDS)
async def test_request_between_two_worlds_fails_if_the_worker_is_lost(kind: str) -> None:
    member, client = serving("a", "b")
    member.leave_world()
    task = asked(member, kind)
    await settled()
    assert client.log == ["close"]
    member.lose(Loss("its process ended", ()))
    with pytest.raises(WorkerGone):
        await within(task)


@pytest.mark.parametrize("kind", KINDS)
async def test_request_that_rpc_cannot_carry_is_not_sent_again_and_does_not_count_as_running(kind: str) -> None:
    member, client = serving("a", "b")
    member.sent[int(kind.split()[1])] = 1
    task = asked(member, kind)
    await settled()
    client.open[kind].set_exception(UndeliverableError("torch RPC cannot carry it"))
    with pytest.raises(UndeliverableError):
        await within(task)
    assert member.sent == {}


async def test_learners_are_registered_before_their_calls_in_each_world() -> None:
    member, first = serving("a", "b")
    task = asyncio.ensure_future(member.run_batch(batch()))
    await settled()
    member.leave_world()
    enter(member, second := Client())
    await settled()
    assert first.log == ["register a 1", "register b 1", "batch -1", "close"]
    assert second.log == ["register a 1", "register b 1", "batch -1"]
    second.open["batch -1"].set_result(VALUE)
    await within(task)


async def test_learner_that_is_forgotten_is_not_confirmed_and_may_come_back_with_another_build() -> None:
    member, client = serving("a", "b")
    client.told = {"a", "b"}
    member.leave_world()
    assert member.confirmed == {"a", "b"}
    enter(member, client := Client())
    member.forget("a")
    member.forget("a")
    assert (client.log, member.confirmed, list(member.registrations)) == (["forget a"], {"b"}, ["b"])
    member.register(Registration("a", pack({}), 3))
    task = asyncio.ensure_future(member.submit(call(1)))
    await settled()
    assert client.log == ["forget a", "register a 3", "submit 1"]
    client.open["submit 1"].set_result(VALUE)
    await within(task)


async def test_batch_that_was_cancelled_is_cancelled_again_in_each_world() -> None:
    member, first = serving("a", "b")
    task = asyncio.ensure_future(member.run_batch(batch()))
    await settled()
    member.cancel_batch(batch())
    assert first.log[-2:] == ["batch -1", "cancel_batch -1"]
    member.leave_world()
    enter(member, second := Client())
    await settled()
    assert second.log[-2:] == ["batch -1", "cancel_batch -1"]
    second.open["batch -1"].set_result(ITEM)
    await within(task)
    member.leave_world()
    enter(member, third := Client())
    task = asyncio.ensure_future(member.advance(batch(), 1))
    await settled()
    assert third.log == ["advance -1 1", "cancel_batch -1"]
    third.open["advance -1 1"].set_result(VALUE)
    await within(task)
    assert not member._cancelled


async def test_batch_that_is_cancelled_between_two_worlds_is_cancelled_in_the_next() -> None:
    member, _ = serving("a", "b")
    member.leave_world()
    task = asyncio.ensure_future(member.run_batch(batch()))
    await settled()
    member.cancel_batch(batch())
    enter(member, client := Client())
    await settled()
    assert client.log[-2:] == ["batch -1", "cancel_batch -1"]
    client.open["batch -1"].set_result(VALUE)
    await within(task)


async def test_worker_that_is_lost_in_silence_was_running_the_call_that_was_sent_first() -> None:
    member, client = serving("a", "b")
    tasks = [
        asyncio.ensure_future(coroutine)
        for coroutine in (member.submit(call(1)), member.run_batch(batch()), member.submit(call(3)))
    ]
    await settled()
    client.open["submit 1"].set_result(VALUE)
    await within(tasks[0])
    member.lose(Loss("its heartbeats stopped", None))
    for task in tasks[1:]:
        with pytest.raises(WorkerGone) as caught:
            await within(task)
        assert caught.value.running == {-1}


async def test_stream_counts_as_running_until_its_end() -> None:
    member, client = serving("a")
    task = asyncio.ensure_future(member.submit(call(1)))
    await settled()
    client.open["submit 1"].set_result(ITEM)
    await within(task)
    assert list(member.sent) == [1]
    task = asyncio.ensure_future(member.advance(call(1), 1))
    await settled()
    client.open["advance 1 1"].set_result(Outcome("end"))
    await within(task)
    assert list(member.sent) == []


async def test_call_whose_caller_is_cancelled_counts_as_running_until_it_was_cancelled() -> None:
    member, client = serving("a")
    task = asyncio.ensure_future(member.submit(call(1)))
    await settled()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list(member.sent) == [1]
    task = asyncio.ensure_future(member.cancel(call(1)))
    await settled()
    client.open["cancel 1"].set_result(Outcome("cancelled", cut_off=True))
    assert (await within(task)).cut_off
    assert list(member.sent) == []


async def test_run_begins_with_nothing_of_the_one_before() -> None:
    member, _ = serving("a", "b")
    task = asyncio.ensure_future(member.run_batch(batch()))
    await settled()
    member.cancel_batch(batch())
    member.lose(Loss("the proxy is closed", ()))
    with pytest.raises(WorkerGone):
        await within(task)
    member.begin()
    assert not member.is_gone
    assert (member.registrations, member.sent, member.confirmed, member.client) == ({}, {}, set(), None)
    assert not member._cancelled


@pytest.mark.parametrize(("running", "expected"), [(None, {5}), ((), set()), ((6,), {6})])
async def test_lost_worker_was_running_the_first_call_unless_more_is_known(
    ends: tuple[Member, Link], running: tuple[int, ...] | None, expected: set[int]
) -> None:
    worker, _ = ends
    worker.begin()
    worker.sent = {5: 1, 6: 1}
    worker.lose(Loss("it was killed", running))
    assert worker.gone().running == expected


async def test_outcome_that_comes_as_its_caller_is_cancelled_is_returned_by_cancel() -> None:
    """The worker may have forgotten it, since it is acknowledged when it comes."""
    member, client = serving("a")
    task = asyncio.ensure_future(member.submit(call(1)))
    await settled()
    client.open["submit 1"].set_result(VALUE)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await within(member.cancel(call(1))) is VALUE
    assert "cancel 1" not in client.log
    assert member.sent == {}
