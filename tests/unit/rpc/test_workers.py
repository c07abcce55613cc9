"""The table of workers: the state of each, and callers that wait until one can be called or is given up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from settling import settled, within

from torchfedrpc.errors import ConfigError, WorkerLostError
from torchfedrpc.rpc import workers as module
from torchfedrpc.rpc.member import Member
from torchfedrpc.rpc.sources import Source
from torchfedrpc.rpc.workers import Workers, WorkerState


class Replacing(Source):
    replaces = True


def admitted(workers: Workers, label: str = "", source: Source | None = None) -> Member:
    member = Member(label, link=None, machine="here")  # type: ignore[arg-type]
    workers.admit(source or Source(), member)
    return member


def enlisted(workers: Workers, label: str = "", source: Source | None = None) -> Member:
    member = admitted(workers, label, source)
    workers.enlist(workers[member.label])
    return member


def serving(workers: Workers, label: str = "") -> Member:
    member = enlisted(workers, label)
    assert workers.serve() == [member.label]
    return member


def state(workers: Workers) -> WorkerState:
    return workers["worker1"].state


def waiting(workers: Workers, place: Callable[[], str]) -> asyncio.Task[Any]:
    return asyncio.ensure_future(workers.wait_for(place))


async def unanswered(*tasks: asyncio.Task[Any]) -> None:
    await settled()
    assert not any(task.done() for task in tasks)


async def raised(task: asyncio.Task[Any]) -> str:
    with pytest.raises(WorkerLostError) as caught:
        await within(task)
    return str(caught.value)


async def test_workers_without_a_name_have_the_first_that_no_other_had() -> None:
    workers = Workers()
    assert [admitted(workers).label for _ in range(2)] == ["worker1", "worker2"]
    admitted(workers, "worker3")
    workers.lose("worker1", "worker1 was lost")
    workers.remove("worker1")
    assert admitted(workers).label == "worker4"
    assert [worker.label for worker in workers] == ["worker2", "worker3", "worker4"]


async def test_worker_is_a_member_of_worlds_from_when_it_is_enlisted_until_it_is_lost() -> None:
    workers = Workers()
    member = admitted(workers)
    assert (workers.newcomers, workers.members) == ({"worker1": member}, {})
    workers.enlist(workers["worker1"])
    assert (workers.newcomers, workers.members) == ({}, {"worker1": member})
    workers.lose("worker1", "worker1 was lost")
    assert (workers.newcomers, workers.members) == ({}, {})
    admitted(workers, "worker1")
    workers.lose("worker1", "worker1 was lost")
    assert (workers.newcomers, workers.members) == ({}, {})


async def test_worker_has_served_when_it_has_accepted_calls() -> None:
    workers = Workers()
    enlisted(workers)
    assert not workers["worker1"].has_served
    has_served = []
    for step in (
        workers.serve,
        partial(workers.leave, "worker1"),
        partial(workers.lose, "worker1", "worker1 has left"),
        partial(enlisted, workers, "worker1"),
    ):
        step()
        has_served.append(workers["worker1"].has_served)
    assert has_served == [True, True, False, False]


async def test_worker_takes_calls_from_when_it_serves_until_it_leaves() -> None:
    workers = Workers()
    admitted(workers)
    assert workers.serve() == []  # a world of others was formed
    assert state(workers) is WorkerState.STARTING
    assert workers.present == {}
    workers.lose("worker1", "worker1 was lost")
    member = enlisted(workers, "worker1")
    workers.serve()
    assert state(workers) is WorkerState.SERVING
    assert workers.present == {"worker1": member}
    assert workers.machines == {"worker1": "here"}
    workers.leave("worker1")
    assert state(workers) is WorkerState.LEAVING
    assert workers.present == {}
    workers.lose("worker1", "worker1 has left")
    assert (workers["worker1"].state, workers["worker1"].member) == (WorkerState.LOST, None)


async def test_worker_that_leaves_goes_on_leaving_when_the_world_is_formed_anew() -> None:
    workers = Workers()
    serving(workers)
    workers.leave("worker1")
    assert workers.serve() == []
    assert state(workers) is WorkerState.LEAVING
    assert workers.present == {}


async def test_worker_is_new_once_for_each_process() -> None:
    workers = Workers()
    enlisted(workers)
    assert [workers.serve() for _ in range(2)] == [["worker1"], []]
    workers.lose("worker1", "worker1 was lost")
    second = enlisted(workers, "worker1")
    assert [workers.serve() for _ in range(2)] == [["worker1"], []]
    assert workers.present == {"worker1": second}


async def test_replacement_brings_its_source_and_its_machine() -> None:
    workers = Workers()
    serving(workers)
    workers.lose("worker1", "worker1 was lost")
    worker, source = workers["worker1"], Replacing()
    setattr(worker, "machine", None)  # noqa: B010 - or type checkers hold on to it
    admitted(workers, "worker1", source)
    assert (workers["worker1"], worker.source, worker.machine) == (worker, source, "here")


# Callers that wait.


async def test_worker_that_serves_is_not_waited_for() -> None:
    workers = Workers()
    member = serving(workers)
    assert await within(waiting(workers, lambda: "worker1")) is member


@pytest.mark.parametrize("state", ["starting", "leaving", "lost"])
async def test_caller_waits_for_a_worker_until_it_takes_calls(state: str) -> None:
    workers = Workers()
    member = enlisted(workers)
    if state != "starting":
        workers.serve()
        workers.leave("worker1")
    if state == "lost":
        workers.lose("worker1", "worker1 was lost")
    tasks = [waiting(workers, lambda: "worker1") for _ in range(2)]
    await unanswered(*tasks)
    if state == "leaving":
        workers.lose("worker1", "worker1 has left")
    if state != "starting":
        member = enlisted(workers, "worker1")
    await unanswered(*tasks)
    workers.serve()
    assert await within(asyncio.gather(*tasks)) == [member, member]


async def test_caller_that_waits_follows_its_client_to_another_worker() -> None:
    workers = Workers()
    serving(workers)
    second = serving(workers)
    workers.lose("worker1", "worker1 was lost")
    place = "worker1"
    task = waiting(workers, lambda: place)
    await unanswered(task)
    place = "worker2"
    await unanswered(task)
    workers.changed()
    assert await within(task) is second


async def test_caller_waits_for_a_worker_that_has_not_been_admitted() -> None:
    workers = Workers()
    task = waiting(workers, lambda: "worker1")
    await unanswered(task)
    member = serving(workers)
    assert await within(task) is member


async def test_caller_that_is_cancelled_takes_no_other_along() -> None:
    workers = Workers()
    member = enlisted(workers)
    first, second = (waiting(workers, lambda: "worker1") for _ in range(2))
    await settled()
    first.cancel()
    await settled()
    workers.serve()
    assert await within(second) is member
    assert first.cancelled()


async def test_next_change_is_the_next_one() -> None:
    workers = Workers()
    workers.changed()
    task = asyncio.ensure_future(workers.next_change())
    await unanswered(task)
    workers.changed()
    await within(task)


async def test_a_change_behind_the_request_is_not_missed_if_it_comes_before_the_wait() -> None:
    workers = Workers()
    change = workers.next_change()
    workers.changed()
    await within(asyncio.ensure_future(change))


# Workers that do not come back.


async def test_worker_that_was_given_up_fails_the_calls_that_wait_and_those_to_come() -> None:
    workers = Workers()
    serving(workers)
    serving(workers)
    workers.lose("worker1", "worker1 was lost")
    task, other = waiting(workers, lambda: "worker1"), waiting(workers, lambda: "worker2")
    await settled()
    workers.give_up("worker1", "worker1 was lost, and no worker is left")
    assert await raised(task) == "worker1 was lost, and no worker is left"
    assert await raised(waiting(workers, lambda: "worker1")) == "worker1 was lost, and no worker is left"
    assert workers.why_given_up("worker1") == "worker1 was lost, and no worker is left"
    assert workers.why_given_up("worker2") is workers.why_given_up("worker3") is None
    assert (await within(other)).label == "worker2"
    assert state(workers) is WorkerState.GAVE_UP


async def test_worker_that_was_given_up_takes_calls_again_when_another_process_serves() -> None:
    workers = Workers()
    serving(workers)
    workers.lose("worker1", "worker1 was lost")
    workers.give_up("worker1", "none has come")
    member = serving(workers, "worker1")
    assert workers.why_given_up("worker1") is None
    assert await within(waiting(workers, lambda: "worker1")) is member
    assert workers["worker1"].reason == ""


async def test_worker_that_does_not_come_back_in_time_is_given_up() -> None:
    workers = Workers()
    serving(workers)
    workers.lose("worker1", "worker1 was lost (its process ended)")
    task = waiting(workers, lambda: "worker1")
    workers.expect("worker1", 0.01)
    reason = await raised(task)
    assert reason == (
        "worker1 was lost (its process ended), and none has come in its place within 0.01 s: start one again, or "
        "raise runtime.rejoin_timeout_s; later calls are answered once it is there"
    )
    assert workers["worker1"].deadline is None


async def test_process_that_the_run_starts_itself_has_a_time_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REPLACED_WITHIN_S", 0.02)
    workers = Workers()
    enlisted(workers, source=Replacing())
    workers.serve()
    workers.lose("worker1", "worker1 was lost")
    workers.expect("worker1", 3600.0)
    reason = await raised(waiting(workers, lambda: "worker1"))
    assert "within 0.02 s: see its output for why" in reason


async def test_time_to_come_back_begins_once() -> None:
    workers = Workers()
    serving(workers)
    workers.lose("worker1", "worker1 was lost")
    workers.expect("worker1", 3600.0)
    deadline = workers["worker1"].deadline
    workers.expect("worker1", 1.0)
    assert workers["worker1"].deadline is deadline
    workers.close()


@pytest.mark.parametrize("end", ["serve", "give_up", "remove", "close"])
async def test_time_to_come_back_ends(end: str) -> None:
    workers = Workers()
    serving(workers)
    workers.lose("worker1", "worker1 was lost")
    workers.expect("worker1", 3600.0)
    worker = workers["worker1"]
    deadline = worker.deadline
    assert deadline is not None
    if end == "serve":
        serving(workers, "worker1")
    elif end == "give_up":
        workers.give_up("worker1", "no worker is left")
    elif end == "remove":
        workers.remove("worker1")
    else:
        workers.close()
    assert deadline.cancelled()
    assert worker.deadline is None


# Runs that fail.


@pytest.mark.parametrize("error", [WorkerLostError("the proxy is closed"), ConfigError("no interface")])
async def test_failure_ends_all_calls(error: Any) -> None:
    workers = Workers()
    serving(workers)
    admitted(workers)
    task = waiting(workers, lambda: "worker2")
    await unanswered(task)
    workers.fail(error)
    assert workers.failure is error
    assert workers.present == {}
    assert await raised(task) == str(error)
    assert await raised(waiting(workers, lambda: "worker1")) == str(error)
    assert workers.why_given_up("worker1") == str(error)
    workers.serve()
    assert workers.present == {}
    assert await raised(waiting(workers, lambda: "worker1")) == str(error)
