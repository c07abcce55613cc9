"""A lost worker: how it is noticed, how the world is formed again, and how its learners go on with the same bits."""

from __future__ import annotations

import asyncio
import contextvars
import errno
import os
import signal
import time
from collections.abc import Iterator
from contextlib import aclosing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from conftest import Latch, opened
from internals import group_of, is_formed, members_of, remote_learners
from learners import Mortal
from losses import (
    NUM_ITEMS,
    SEED,
    Losses,
    Steps,
    kill,
    kill_once_started,
    kill_started,
    on_1,
    on_2,
    pid_of,
    pseudo,
    seen,
    undisturbed,
)
from processes import ends_within

import torchfedrpc as tfr
from torchfedrpc.events import Event, WorkerLost
from torchfedrpc.rpc import sources
from torchfedrpc.rpc.member import Member
from torchfedrpc.testing import Faults

__all__ = ["on_1", "on_2", "seen"]  # fixtures
HEARTBEAT_TIMEOUT_S = 1.5
CLIENTS = [f"{place}_{number}" for place in ("first", "second") for number in range(40)]


@pytest.fixture(scope="module")
def expected(runner: asyncio.Runner) -> dict[str, dict[str, Any]]:
    return runner.run(undisturbed(CLIENTS))


@pytest.fixture(scope="module")
def proxy(runner: asyncio.Runner, expected: dict[str, dict[str, Any]]) -> Iterator[tfr.LearnerProxy]:
    """Learners on two workers; every test takes clients of its own by `on_1` and `on_2`."""
    runtime = pseudo(heartbeat_timeout_s=HEARTBEAT_TIMEOUT_S)
    with opened(runner, tfr.LearnerProxy(Mortal, CLIENTS, runtime=runtime, seed=SEED)) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def steps(proxy: tfr.LearnerProxy, expected: dict[str, dict[str, Any]]) -> Steps:
    return Steps(proxy, expected)


# Noticing.


async def test_a_killed_worker_is_noticed_within_a_second_and_the_others_go_on(
    proxy: tfr.LearnerProxy,
    steps: Steps,
    seen: Losses,
    on_1: Iterator[str],
    on_2: Iterator[str],
    latch: Latch,
    tmp_path: Path,
) -> None:
    lost, survivor, busy = next(on_1), next(on_2), next(on_2)
    notes = tmp_path / "notes"
    pids = pid_of(proxy, "worker1"), pid_of(proxy, "worker2")
    await steps.check(lost, survivor)
    holding = asyncio.ensure_future(proxy.custom_method(busy, "note_and_hold", str(notes), latch.path))
    await seen.reported(busy)
    killed_at = kill(proxy, "worker1")
    step = asyncio.ensure_future(steps.check(lost))
    assert await seen.loss() - killed_at < 1
    await step  # on a replacement, while the other worker is still busy
    assert not holding.done()
    latch.open()
    assert await holding == 1
    assert len(notes.read_text().splitlines()) == 1
    await steps.check(lost, survivor)
    assert pid_of(proxy, "worker1") != pids[0]
    assert [await proxy.custom_method(client, "process_id") for client in (survivor, busy)] == [pids[1]] * 2
    assert seen.workers == ["worker1"]
    assert len(seen.progress(busy)) == 1


async def test_a_frozen_worker_is_lost_within_its_time_and_ended(
    proxy: tfr.LearnerProxy, steps: Steps, seen: Losses, on_1: Iterator[str]
) -> None:
    client, pid = next(on_1), pid_of(proxy, "worker1")
    await steps.check(client)
    async with Faults().freeze("worker1", at_call=1).injected(proxy):
        began = time.monotonic()
        await steps.check(client)
    assert await seen.loss() - began < HEARTBEAT_TIMEOUT_S + 1
    assert seen.workers == ["worker1"]
    assert ends_within(pid, 1)


async def test_a_severed_worker_is_lost_within_its_time_and_ended(
    proxy: tfr.LearnerProxy, steps: Steps, seen: Losses, on_1: Iterator[str]
) -> None:
    client, pid = next(on_1), pid_of(proxy, "worker1")
    async with Faults().sever("worker1", at_call=1).injected(proxy):
        began = time.monotonic()
        await steps.check(client)
        assert await seen.loss() - began < HEARTBEAT_TIMEOUT_S + 1
    assert ends_within(pid, 1)
    await steps.check(client)
    assert seen.workers == ["worker1"]


@pytest.mark.parametrize("seconds", [3, pytest.param(30, marks=pytest.mark.slow)])
async def test_a_busy_worker_is_not_lost(
    proxy: tfr.LearnerProxy, seen: Losses, on_1: Iterator[str], on_2: Iterator[str], seconds: int
) -> None:
    pids = pid_of(proxy, "worker1"), pid_of(proxy, "worker2")
    result = await proxy.clients({next(on_1): {"how": "gil"}, next(on_2): {"how": "operators"}}).call(
        "block", seconds=seconds
    )
    assert sorted(result.values()) == ["gil", "operators"]
    assert seen.workers == []
    assert (pid_of(proxy, "worker1"), pid_of(proxy, "worker2")) == pids


# Forming the world again.


async def test_a_world_of_survivors_is_formed_in_no_time_and_runs_nothing_twice(
    proxy: tfr.LearnerProxy,
    steps: Steps,
    seen: Losses,
    on_1: Iterator[str],
    on_2: Iterator[str],
    latch: Latch,
    tmp_path: Path,
) -> None:
    client, busy, queued = next(on_1), next(on_2), next(on_2)
    notes = tmp_path / "notes"
    await steps.check(client)
    held = asyncio.ensure_future(proxy.custom_method(busy, "note_and_hold", str(notes), latch.path))
    await seen.reported(busy)
    waiting = asyncio.ensure_future(proxy.custom_method(queued, "note", str(notes)))
    group = group_of(proxy)
    for number in range(1, 4):
        group._break()
        await steps.check(client)
        await seen.world(number)
    latch.open()
    assert (await held, await waiting) == (1, 1)
    assert sorted(notes.read_text().splitlines()) == sorted([f"{busy} ", f"{queued} "])
    assert len(seen.progress(busy)) == 1
    assert seen.workers == []
    assert min(world.seconds for world in seen.formed) < 0.3


@pytest.mark.slow
async def test_two_workers_lost_at_once_are_both_replaced(
    proxy: tfr.LearnerProxy, steps: Steps, seen: Losses, on_1: Iterator[str], on_2: Iterator[str]
) -> None:
    clients = [*islice(on_1, 2), *islice(on_2, 2)]
    await steps.check(*clients)
    kill(proxy, "worker1")
    kill(proxy, "worker2")
    await steps.check(*clients)
    await steps.check(*clients)
    assert sorted(seen.workers) == ["worker1", "worker2"]


async def test_a_process_that_cannot_be_started_is_tried_again(
    proxy: tfr.LearnerProxy, steps: Steps, on_1: Iterator[str], on_2: Iterator[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = next(on_1), next(on_2)
    await steps.check(*clients)

    async def start(link: int, **options: object) -> None:
        monkeypatch.undo()
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(sources, "start_worker", start)
    kill(proxy, "worker1")
    await steps.check(*clients)
    numbers = {label: member.local_index for label, member in members_of(proxy).items()}
    assert numbers == {"worker1": 0, "worker2": 1}  # of its name, for its share of the GPUs


@pytest.mark.slow
async def test_a_worker_may_be_lost_while_another_is_replaced(
    proxy: tfr.LearnerProxy, steps: Steps, seen: Losses, on_1: Iterator[str], on_2: Iterator[str]
) -> None:
    def on_event(event: Event) -> None:
        if isinstance(event, WorkerLost) and event.worker == "worker1":
            kill(proxy, "worker2")

    clients = [*islice(on_1, 2), *islice(on_2, 2)]
    await steps.check(*clients)
    places = dict(remote_learners(proxy)._run.places)
    unsubscribe = proxy.subscribe(on_event)
    kill(proxy, "worker1")
    await steps.check(*clients)
    unsubscribe()
    await steps.check(*clients)
    assert seen.workers == ["worker1", "worker2"]
    assert remote_learners(proxy)._run.places == places  # no learner moves to and fro


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_worker_may_be_lost_while_all_leave_their_world(
    proxy: tfr.LearnerProxy,
    steps: Steps,
    seen: Losses,
    on_1: Iterator[str],
    on_2: Iterator[str],
    how: signal.Signals,
) -> None:
    clients = [next(on_1), next(on_2)]
    await steps.check(*clients)
    group = group_of(proxy)
    os.kill(pid_of(proxy, "worker2"), signal.SIGSTOP)  # it does not leave
    group._break()
    while is_formed(proxy):
        await asyncio.sleep(0)
    os.kill(pid_of(proxy, "worker2"), how)
    await steps.check(*clients)
    await steps.check(*clients)
    assert seen.workers == ["worker2"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_worker_may_be_lost_while_all_join_their_next_world(
    proxy: tfr.LearnerProxy,
    steps: Steps,
    seen: Losses,
    on_1: Iterator[str],
    on_2: Iterator[str],
    how: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clients, tell = [next(on_1), next(on_2)], Member.tell
    await steps.check(*clients)
    struck: list[int] = []

    async def strike(member: Member, message: Any) -> Any:
        """Before it hears that it is to join, so that the others wait for it in the middle of joining."""
        if message["do"] == "join" and member.label == "worker2" and not struck:
            struck.append(pid_of(proxy, "worker2"))
            os.kill(struck[0], how)
        return await tell(member, message)

    monkeypatch.setattr(Member, "tell", strike)
    group = group_of(proxy)
    group._break()
    await steps.check(*clients)
    await steps.check(*clients)
    assert struck
    assert seen.workers == ["worker2"]
    assert pid_of(proxy, "worker2") not in struck


async def test_worker_that_joins_late_is_held_up_by_no_worker_that_is_lost(
    proxy: tfr.LearnerProxy,
    steps: Steps,
    seen: Losses,
    on_1: Iterator[str],
    on_2: Iterator[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clients, tell = [next(on_1), next(on_2)], Member.tell
    strikes, late = {"worker1": signal.SIGSTOP, "worker2": signal.SIGKILL}, pid_of(proxy, "worker1")
    await steps.check(*clients)

    async def strike(member: Member, message: Any) -> Any:
        """Stop worker1 until the loss of worker2 is known, so that it connects to the world's store after that."""
        if message["do"] == "join" and member.label in strikes:
            os.kill(pid_of(proxy, member.label), strikes.pop(member.label))
        return await tell(member, message)

    def on_event(event: Event) -> None:
        if isinstance(event, WorkerLost):
            os.kill(late, signal.SIGCONT)

    monkeypatch.setattr(Member, "tell", strike)
    unsubscribe = proxy.subscribe(on_event)
    group_of(proxy)._break()
    async with asyncio.timeout(20):  # a worker tries to connect to a closed store for 30 s
        await steps.check(*clients)
    unsubscribe()
    assert strikes == {}
    assert seen.workers == ["worker2"]
    assert pid_of(proxy, "worker1") == late


async def test_replacement_that_ends_before_its_first_heartbeat_is_noticed_at_once(
    proxy: tfr.LearnerProxy, steps: Steps, seen: Losses, on_1: Iterator[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, tell = next(on_1), Member.tell
    await steps.check(client)
    killed_at: list[float] = []

    async def strike(member: Member, message: Any) -> Any:
        if message["do"] == "connect" and not killed_at:
            killed_at.append(kill_started(proxy, member.label))
        return await tell(member, message)

    monkeypatch.setattr(Member, "tell", strike)
    kill(proxy, "worker1")
    assert await seen.loss(2) - killed_at[0] < 0.8
    await steps.check(client)
    assert seen.workers == ["worker1", "worker1"]


@pytest.mark.slow
async def test_a_replacement_may_be_lost_as_it_starts(
    proxy: tfr.LearnerProxy, steps: Steps, seen: Losses, on_1: Iterator[str], on_2: Iterator[str]
) -> None:
    clients = [next(on_1), next(on_2)]
    await steps.check(*clients)
    kill(proxy, "worker1")
    step = asyncio.ensure_future(steps.check(*clients))
    await seen.loss()
    await kill_once_started(proxy, "worker1")
    await step
    assert seen.workers == ["worker1", "worker1"]


# What was under way.


async def test_calls_that_run_and_wait_on_a_lost_worker_give_the_same_bits(
    proxy: tfr.LearnerProxy,
    expected: dict[str, dict[str, Any]],
    seen: Losses,
    on_1: Iterator[str],
    on_2: Iterator[str],
) -> None:
    clients = [*islice(on_1, 3), *islice(on_2, 1)]
    async with Faults().kill("worker1", at_call=5).injected(proxy):
        calls = [(client, proxy.custom_method(client, "step")) for _ in range(3) for client in clients]
        results = await asyncio.gather(*(call for _, call in calls))
    for client in clients:
        given = [result for (owner, _), result in zip(calls, results, strict=True) if owner == client]
        assert given == expected[client]["step"][:3]
    assert seen.workers == ["worker1"]


@pytest.mark.parametrize("kind", ["", "_async"])
async def test_a_stream_is_lost_with_its_worker_and_the_learner_is_as_before_it(
    proxy: tfr.LearnerProxy,
    expected: dict[str, dict[str, Any]],
    seen: Losses,
    on_1: Iterator[str],
    latch: Latch,
    kind: str,
) -> None:
    idle, stepping = next(on_1), next(on_1)
    method = f"draw{kind}_stream"
    await proxy.clients([idle, stepping]).call("append", "before")
    items = proxy.stream(idle, method, NUM_ITEMS)
    holding = proxy.stream(stepping, f"stream_with_hold{kind}", latch.path)
    assert [await anext(items), await anext(items)] == expected[idle][method][:2]
    assert await anext(holding) == "first"
    second = asyncio.ensure_future(anext(holding))
    await seen.reported(stepping)
    elsewhere = contextvars.Context()  # this task reads the stream
    behind = asyncio.create_task(proxy.custom_method(idle, "append", "behind"), context=elsewhere)
    kill(proxy, "worker1")
    with pytest.raises(tfr.WorkerLostError, match=rf"{stepping}\.stream_with_hold{kind} on worker1: .*stream"):
        await second
    with pytest.raises(tfr.WorkerLostError, match=rf"{idle}\.{method} on worker1: .*stream"):
        await anext(items)
    assert await behind == 2
    for stream in (items, holding):
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
    happened = await proxy.clients([idle, stepping]).call("what_happened")
    assert dict(happened) == {idle: ["before", "behind"], stepping: ["before"]}
    assert [item async for item in proxy.stream(idle, method, NUM_ITEMS)] == expected[idle][method]


@pytest.mark.parametrize("method", ["talk", "talk_async"])
async def test_values_sent_into_a_stream_are_part_of_the_state_after_a_loss(
    proxy: tfr.LearnerProxy, seen: Losses, on_1: Iterator[str], method: str
) -> None:
    done, under_way = next(on_1), next(on_1)
    stream, lost = proxy.stream(done, method, 1), proxy.stream(under_way, method, 1)
    assert [await anext(stream), await stream.asend(2), await anext(lost), await lost.asend(3)] == [1, 3, 1, 4]
    with pytest.raises(StopAsyncIteration):
        await stream.asend("end")
    assert await proxy.custom_method(done, "append", "after") == 4
    kill(proxy, "worker1")
    with pytest.raises(tfr.WorkerLostError, match=rf"{under_way}\.{method} on worker1: .*stream"):
        await lost.asend(5)
    happened = await proxy.clients([done, under_way]).call("what_happened")
    assert dict(happened) == {done: [2, "end", "closed", "after"], under_way: []}


async def test_a_stream_that_is_left_early_is_left_there_again(
    proxy: tfr.LearnerProxy, seen: Losses, on_1: Iterator[str]
) -> None:
    before, before_async, after = islice(on_1, 3)
    for client, method in ((before, "count"), (before_async, "count_async")):
        async with aclosing(proxy.stream(client, method, 9)) as items:
            assert [await anext(items), await anext(items)] == [0, 1]
        assert await proxy.custom_method(client, "append", "x") == 4
    async with aclosing(proxy.stream(after, "count", 9)) as items:
        assert await anext(items) == 0
        kill(proxy, "worker1")
        await seen.loss()
    happened = await proxy.clients([before, before_async, after]).call("what_happened")
    assert dict(happened) == {before: [0, 1, "closed", "x"], before_async: [0, 1, "closed", "x"], after: []}


async def test_a_step_that_is_cancelled_behind_its_item_is_part_of_the_state(
    proxy: tfr.LearnerProxy, seen: Losses, on_1: Iterator[str]
) -> None:
    client = next(on_1)
    items = proxy.stream(client, "count", 1000)
    had = [await anext(items)]
    while True:
        step = asyncio.ensure_future(anext(items))
        for _ in range(5):
            await asyncio.sleep(0)
        time.sleep(0.2)  # the worker has made the item, and the loop has not delivered it
        if step.cancel():
            break
        had.append(await step)  # which came in these five steps already
    with pytest.raises(asyncio.CancelledError):
        await step
    happened = await proxy.custom_method(client, "what_happened")
    assert happened == [*range(len(had)), len(had), "closed"]
    kill(proxy, "worker1")
    assert await proxy.custom_method(client, "what_happened") == happened


async def test_a_call_that_is_late_as_its_result_comes_is_part_of_the_state(
    proxy: tfr.LearnerProxy, seen: Losses, on_1: Iterator[str], tmp_path: Path
) -> None:
    client, notes = next(on_1), tmp_path / "notes"
    await proxy.custom_method(client, "append", "before")
    late = asyncio.ensure_future(proxy.options(timeout_s=0.2).custom_method(client, "note", str(notes), "late"))
    for _ in range(6):
        await asyncio.sleep(0)
    while not notes.exists():
        time.sleep(0.01)
    time.sleep(0.4)  # the result comes while the event loop is busy, past the deadline
    with pytest.raises(tfr.CallTimeoutError):
        await late
    happened = await proxy.custom_method(client, "what_happened")
    assert happened == ["before", "late"]
    kill(proxy, "worker1")
    assert await proxy.custom_method(client, "what_happened") == happened


async def test_progress_that_was_reported_is_not_reported_again(
    proxy: tfr.LearnerProxy, seen: Losses, on_1: Iterator[str], latch: Latch
) -> None:
    client = next(on_1)
    call = asyncio.ensure_future(proxy.custom_method(client, "report_and_hold", latch.path))
    await seen.reported(client, 2)
    kill(proxy, "worker1")
    await seen.loss()
    latch.open()
    assert await call == "reported"
    assert seen.progress(client) == [0, 1, 2]


async def test_deadlines_and_quorums_hold_while_a_worker_is_frozen_and_what_was_cancelled_never_runs(
    proxy: tfr.LearnerProxy,
    steps: Steps,
    seen: Losses,
    on_1: Iterator[str],
    on_2: Iterator[str],
    tmp_path: Path,
) -> None:
    frozen, late, cancelled, other = islice(on_1, 4)
    quick = list(islice(on_2, 2))
    notes = tmp_path / "notes"
    async with Faults().freeze("worker1", at_call=1).injected(proxy):
        step = asyncio.ensure_future(steps.check(frozen))
        began = time.monotonic()
        with pytest.raises(tfr.CallTimeoutError, match=rf"{late}\.note on worker1"):
            await proxy.options(timeout_s=0.3).custom_method(late, "note", str(notes))
        assert time.monotonic() - began < 0.5
        group = proxy.clients([cancelled, *quick]).options(min_results=2)
        assert list(await group.call("note", str(notes))) == quick
        assert time.monotonic() - began < HEARTBEAT_TIMEOUT_S  # neither waited for the loss
        assert seen.workers == []
        await step
    assert seen.workers == ["worker1"]
    await steps.check(other)
    assert await proxy.clients([late, cancelled]).call("what_happened") == {late: [], cancelled: []}
    assert sorted(notes.read_text().splitlines()) == [f"{client} " for client in sorted(quick)]
