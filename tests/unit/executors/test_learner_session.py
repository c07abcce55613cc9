"""Sessions: calls in order, rebuilt and moved learners, snapshots, streams, and turns that are always passed on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from fake_workers import CUT_OFF, UNCAPTURABLE, FakeRun, FakeWorker, call, tensor_of, until
from settling import settled, within

from torchfedrpc.errors import WorkerLostError
from torchfedrpc.executors.session import SessionStream
from torchfedrpc.executors.snapshot_throttle import BUDGET_BYTES
from torchfedrpc.host.call import Call, Outcome
from torchfedrpc.host.snapshot import _HEADER
from torchfedrpc.rpc.worker_client import UndeliverableError
from torchfedrpc.tasks import Turns
from torchfedrpc.wire.exceptions import Failure
from torchfedrpc.wire.packing import pack


@asynccontextmanager
async def opened(**options: Any) -> AsyncIterator[tuple[FakeRun, FakeWorker]]:
    """A run with one worker; at its end all turns must have been passed on."""
    run, worker = FakeRun(**options), FakeWorker("worker1")
    run.place(worker)
    yield run, worker
    await run.close()


def submitted(run: FakeRun, call_id: int, client_id: str = "a") -> asyncio.Task[Outcome]:
    return asyncio.ensure_future(run.session(client_id).call(call(call_id, client_id)))


async def called(run: FakeRun, *call_ids: int) -> None:
    """Make calls that succeed, one after another."""
    for call_id in call_ids:
        outcome = await within(submitted(run, call_id))
        assert outcome.kind == "value", outcome
    await settled()


async def cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await within(task)


def lost(outcome: Outcome, pattern: str) -> None:
    """Check that a call has failed since its learner is lost."""
    assert isinstance(outcome.error, WorkerLostError), outcome
    with pytest.raises(WorkerLostError, match=pattern):
        raise outcome.error


# Turns.


async def test_turns_pass_in_the_order_of_requests_and_the_first_place_is_for_moves() -> None:
    turns, order = Turns(), []
    assert turns.take_now()
    assert not turns.take_now()

    async def take(name: str, *, first: bool = False) -> None:
        await turns.take(first=first)
        order.append(name)
        turns.give()

    tasks = [asyncio.ensure_future(take(name)) for name in "abc"]
    await settled()
    tasks.append(asyncio.ensure_future(take("move", first=True)))
    await settled()
    await cancelled(tasks[1])
    assert turns.is_held
    turns.give()
    await within(asyncio.gather(tasks[0], *tasks[2:]))
    assert order == ["move", "a", "c"]
    assert not turns.is_held


async def test_turn_of_a_caller_that_is_cancelled_as_it_gets_it_passes_on() -> None:
    turns = Turns()
    turns.take_now()
    first = asyncio.ensure_future(turns.take())
    second = asyncio.ensure_future(turns.take())
    await settled()
    turns.give()
    first.cancel()  # it has the turn, and has not run yet
    with pytest.raises(asyncio.CancelledError):
        await first
    await within(second)
    turns.give()
    assert not turns.is_held


async def test_turn_that_is_withdrawn_passes_on_if_it_was_granted() -> None:
    turns = Turns()
    granted, waiting, following = turns.request(), turns.request(), turns.request()
    assert granted.done()
    turns.withdraw(waiting)
    turns.withdraw(granted)
    await within(following)
    turns.give()
    assert not turns.is_held


# Calls.


async def test_calls_are_made_one_at_a_time_in_the_order_of_submission() -> None:
    async with opened() as (run, worker):
        worker.holds = {"call 1"}
        tasks = [submitted(run, call_id) for call_id in (1, 2, 3)]
        await settled()
        assert worker.log == ["call 1"]
        worker.release("call 1")
        outcomes = await within(asyncio.gather(*tasks))
        assert worker.log == ["call 1", "call 2", "call 3"]
        assert {outcome.kind for outcome in outcomes} == {"value"}
        assert worker.learners["a"] == ["new 1", "1", "2", "3"]


async def test_calls_of_different_learners_do_not_wait_for_each_other() -> None:
    async with opened() as (run, worker):
        worker.holds = {"call 1"}
        first = submitted(run, 1)
        assert (await within(submitted(run, 2, "b"))).kind == "value"
        worker.release("call 1")
        await within(first)


async def test_call_is_made_again_after_a_worker_loss_on_the_next_worker() -> None:
    async with opened() as (run, first):
        first.holds = {"call 1"}
        task = submitted(run, 1)
        await settled()
        first.end(1)
        await settled()
        assert not task.done()  # it waits for a worker
        second = FakeWorker("worker2")
        run.place(second)
        assert (await within(task)).kind == "value"
        assert second.learners["a"] == ["new 2", "1"]
        assert second.registrations["a"].kwargs.copy().open(run.allow) == {"client": "a"}


async def test_worker_loss_replays_the_journal_in_order_behind_the_snapshot() -> None:
    async with opened(journal_max_calls=2) as (run, first):
        await called(run, 1, 2, 3)
        assert first.log == ["call 1", "call 2", "call 3", "snapshot"]
        await called(run, 4, 5)
        first.holds = {"call 6"}
        tasks = [submitted(run, call_id) for call_id in (6, 7)]
        await settled()
        second = FakeWorker("worker2")
        run.place(second)
        first.end(6)
        await within(asyncio.gather(*tasks))
        assert second.log == ["restore", "call 4", "call 5", "call 6", "snapshot", "call 7"]
        assert second.learners["a"] == ["new 2", "1", "2", "3", "4", "5", "6", "7"]


async def test_replayed_calls_have_no_limit_and_the_interrupted_one_keeps_its_own() -> None:
    async with opened() as (run, first):
        session = run.session()
        await within(session.call(replace(call(1), run_timeout_s=3.0)))
        first.holds = {"call 2"}
        task = asyncio.ensure_future(session.call(replace(call(2), run_timeout_s=4.0)))
        await settled()
        second = FakeWorker("worker2")
        run.place(second)
        first.end(2)
        await within(task)
        assert first.limits == {1: 3.0, 2: 4.0}
        assert second.limits == {1: None, 2: 4.0}


async def test_worker_loss_between_two_calls_is_found_by_the_next_one() -> None:
    async with opened() as (run, first):
        await called(run, 1)
        first.end()
        assert run.session().worker is None
        second = FakeWorker("worker2")
        run.place(second)
        await called(run, 2)
        assert second.learners["a"] == ["new 2", "1", "2"]


async def test_worker_loss_during_a_rebuild_begins_the_rebuild_anew() -> None:
    async with opened() as (run, first):
        await called(run, 1, 2)
        first.end()
        second, third = FakeWorker("worker2"), FakeWorker("worker3")
        second.holds = {"call 2"}
        run.place(second)
        task = submitted(run, 3)
        await until(lambda: second.waiting)
        run.place(third)
        second.end(2)
        await within(task)
        assert second.log == ["call 1", "call 2"]
        assert third.learners["a"] == ["new 3", "1", "2", "3"]


async def test_call_that_has_failed_is_repeated_by_a_rebuild_and_may_fail_again() -> None:
    async with opened() as (run, first):
        failed = Outcome("failed", failure=Failure.capture(ValueError("no")))
        first.outcomes = {"call 1": failed}
        assert (await within(submitted(run, 1))).failure is not None
        first.end()
        second = FakeWorker("worker2")
        second.outcomes = {"call 1": failed}
        run.place(second)
        await called(run, 2)
        assert second.learners["a"] == ["new 2", "1", "2"]


async def test_call_that_never_ran_is_not_repeated() -> None:
    async with opened() as (run, first):
        first.outcomes = {"call 1": Outcome("failed", failure=Failure.capture(ValueError("no")), never_ran=True)}
        await within(submitted(run, 1))
        first.end()
        second = FakeWorker("worker2")
        run.place(second)
        await called(run, 2)
        assert second.log == ["call 2"]


async def test_learner_that_cannot_be_rebuilt_is_given_up() -> None:
    async with opened() as (run, first):
        await called(run, 1)
        first.end()
        second = FakeWorker("worker2")
        second.outcomes = {
            "call 1": Outcome("failed", failure=Failure.capture(MemoryError("no room")), never_ran=True)
        }
        run.place(second)
        outcome = await within(submitted(run, 2))
        assert outcome.never_ran
        lost(outcome, r"a\.train on worker2: it could not be rebuilt on worker2: .*no room")
        assert "no room" in str(run.session().given_up)
        lost(await within(submitted(run, 3)), "it could not be rebuilt on worker2")
        assert second.log == ["call 1"]


async def test_snapshot_that_cannot_be_restored_gives_the_learner_up() -> None:
    async with opened(journal_max_calls=1) as (run, first):
        await called(run, 1, 2)
        first.end()
        second = FakeWorker("worker2")
        second.outcomes = {"restore": Outcome("failed", failure=Failure.capture(ValueError("no such attribute")))}
        run.place(second)
        lost(await within(submitted(run, 3)), "it could not be rebuilt on worker2: .*no such attribute")
        assert second.log == ["restore"]


async def test_snapshot_that_the_disk_does_not_give_back_gives_the_learner_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with opened(journal_max_calls=1) as (run, first):
        monkeypatch.setattr(run.journals, "keep", lambda *_: False)
        await called(run, 1, 2)
        await until(lambda: not run.journal().awaits_snapshot)
        first.end()
        run.place(FakeWorker("worker2"))

        def fail(*_: Any) -> bytes:
            raise OSError("input/output error")

        monkeypatch.setattr(run.journals._store, "get", fail)
        lost(await within(submitted(run, 3)), "could not be rebuilt on worker2: input/output error")


async def test_rebuild_that_rpc_cannot_carry_gives_the_learner_up() -> None:
    async with opened() as (run, first):
        await called(run, 1)
        first.end()
        second = FakeWorker("worker2")
        second.outcomes = {"call 1": UndeliverableError("torch RPC cannot carry it")}
        run.place(second)
        lost(await within(submitted(run, 2)), "could not be rebuilt on worker2: torch RPC cannot carry it")


@pytest.mark.parametrize("max_recoveries", [0, 2])
async def test_learner_whose_calls_end_workers_is_given_up_after_max_recoveries(max_recoveries: int) -> None:
    async with opened(max_recoveries=max_recoveries) as (run, worker):
        await called(run, 1)
        worker.holds = {"call 2"}
        task = submitted(run, 2)
        for number in range(max_recoveries):
            await until(lambda: worker.waiting)  # noqa: B023 - called at once
            following = FakeWorker(f"worker{number + 2}")
            following.holds = {"call 2"}
            run.place(following)
            worker.end(2)
            worker = following
        await until(lambda: worker.waiting)
        run.place(FakeWorker("last"))
        worker.end(2)
        lost(await within(task), f"given up: .*runtime.max_recoveries={max_recoveries} ")
        lost(await within(submitted(run, 3)), "given up")
        assert run.journal().entries == []


async def test_worker_losses_by_other_learners_do_not_count() -> None:
    async with opened(max_recoveries=1) as (run, worker):
        for number in range(4):
            worker.holds = {f"call {number + 1}"}
            task = submitted(run, number + 1)
            await until(lambda: worker.waiting)  # noqa: B023 - called at once
            following = FakeWorker(f"worker{number + 2}")
            run.place(following)
            worker.end(99)
            worker = following
            assert (await within(task)).kind == "value"


async def test_worker_losses_count_in_succession_only() -> None:
    async with opened(max_recoveries=1) as (run, worker):
        for call_id in (1, 2, 3):
            worker.holds = {f"call {call_id}"}
            task = submitted(run, call_id)
            await until(lambda: worker.waiting)  # noqa: B023 - called at once
            following = FakeWorker(f"worker{call_id + 1}")
            run.place(following)
            worker.end(call_id)
            worker = following
            assert (await within(task)).kind == "value"


async def test_worker_losses_by_a_call_of_the_journal_count() -> None:
    async with opened(max_recoveries=1) as (run, worker):
        await called(run, 1)
        worker.end()
        task = None
        for number in range(2):
            worker = FakeWorker(f"worker{number + 2}")
            worker.holds = {"call 1"}
            run.place(worker)
            task = task or submitted(run, 2)
            await until(lambda: worker.waiting)  # noqa: B023 - called at once
            run.place(None)
            worker.end(1)
        assert task is not None
        lost(await within(task), "given up")


async def test_worker_loss_gives_the_learner_up_with_on_worker_lost_fail() -> None:
    async with opened(on_worker_lost="fail") as (run, first):
        first.holds = {"call 2"}
        await called(run, 1)
        tasks = [submitted(run, call_id) for call_id in (2, 3)]
        await settled()
        run.place(FakeWorker("worker2"))
        first.end(2)
        for outcome in await within(asyncio.gather(*tasks)):
            assert outcome.never_ran
            lost(outcome, r"worker1 was lost \(its process ended\), and its learner with it")


async def test_worker_loss_gives_an_unrecoverable_learner_up() -> None:
    async with opened(journal_max_calls=1) as (run, first):
        first.uncapturable = UNCAPTURABLE
        await called(run, 1, 2)
        assert run.refusals == [("a", True)]
        first.end()
        run.place(FakeWorker("worker2"))
        lost(await within(submitted(run, 3)), "could not be rebuilt: .*an autograd graph is kept")


async def test_call_fails_if_no_worker_is_expected_and_a_later_one_may_succeed() -> None:
    async with opened() as (run, first):
        await called(run, 1)
        first.end()
        task = submitted(run, 2)
        await settled()
        run.fail("worker1 was lost, and none has come in its place")
        outcome = await within(task)
        assert outcome.never_ran
        lost(outcome, r"a\.train on .*: worker1 was lost, and none has come in its place")
        second = FakeWorker("worker2")
        run.place(second)
        await called(run, 3)
        assert second.learners["a"] == ["new 2", "1", "3"]


async def test_call_that_rpc_cannot_carry_fails_and_a_snapshot_follows() -> None:
    async with opened() as (run, worker):
        worker.outcomes = {"call 1": UndeliverableError("torch RPC cannot carry it")}
        outcome = await within(submitted(run, 1))
        assert outcome.cut_off
        lost(outcome, "torch RPC cannot carry it")
        await called(run, 2)
        assert worker.log == ["call 1", "snapshot", "call 2"]


async def test_unexpected_error_passes_the_turn_on() -> None:
    async with opened() as (run, worker):
        worker.outcomes = {"call 1": RuntimeError("out of memory")}
        with pytest.raises(RuntimeError, match="out of memory"):
            await within(submitted(run, 1))
        await called(run, 2)


# Cancelled calls.


async def test_call_that_is_cancelled_in_the_queue_is_never_sent() -> None:
    async with opened() as (run, worker):
        worker.holds = {"call 1"}
        tasks = [submitted(run, call_id) for call_id in (1, 2, 3)]
        await settled()
        await cancelled(tasks[1])
        worker.release("call 1")
        await within(asyncio.gather(tasks[0], tasks[2]))
        assert worker.log == ["call 1", "call 3"]


async def test_call_that_is_cancelled_is_cancelled_at_the_worker_and_the_turn_passes_on_behind_the_answer() -> None:
    async with opened() as (run, worker):
        worker.holds = {"call 1", "cancel 1", "snapshot"}
        first, second = (submitted(run, call_id) for call_id in (1, 2))
        await settled()
        await cancelled(first)
        await settled()
        assert worker.log == ["call 1", "cancel 1"]
        worker.release("cancel 1", CUT_OFF)
        await settled()
        assert worker.log == ["call 1", "cancel 1", "snapshot"]
        worker.release("snapshot")
        assert (await within(second)).kind == "value"
        assert worker.log[-1] == "call 2"


async def test_call_that_is_cancelled_as_it_ends_is_in_the_journal() -> None:
    async with opened() as (run, worker):
        worker.holds = {"call 1", "cancel 1"}
        task = submitted(run, 1)
        await settled()
        await cancelled(task)
        await settled()
        worker.release("cancel 1", Outcome("failed"))  # it had ended before the request came
        await called(run, 2)
        assert [entry.call.call_id for entry in run.journal().entries] == [1, 2]
        assert worker.log == ["call 1", "cancel 1", "call 2"]


async def test_cancelled_call_tells_how_long_it_ran() -> None:
    async with opened() as (run, worker):
        worker.holds = {"call 1", "cancel 1"}
        task = submitted(run, 1)
        await settled()
        await cancelled(task)
        await settled()
        worker.release("cancel 1", Outcome("cancelled", cut_off=True, seconds=5.0))
        await called(run, 2)
        assert run.durations.expected(["a"], "train") == {"a": 5.0}


async def test_worker_loss_as_a_call_is_cancelled_leaves_the_call_out() -> None:
    async with opened() as (run, first):
        await called(run, 1)
        first.holds = {"call 2", "cancel 2"}
        task = submitted(run, 2)
        await settled()
        await cancelled(task)
        await settled()
        second = FakeWorker("worker2")
        run.place(second)
        first.end(2)
        await called(run, 3)
        assert second.learners["a"] == ["new 2", "1", "3"]


async def test_cancelled_call_that_rpc_cannot_carry_is_followed_by_a_snapshot() -> None:
    async with opened() as (run, worker):
        worker.holds = {"call 1"}
        worker.outcomes = {"cancel 1": UndeliverableError("torch RPC cannot carry it")}
        task = submitted(run, 1)
        await settled()
        await cancelled(task)
        await called(run, 2)
        assert worker.log == ["call 1", "cancel 1", "snapshot", "call 2"]


async def test_call_that_is_cut_off_is_followed_by_a_snapshot_before_the_next_call_is_sent() -> None:
    async with opened() as (run, first):
        first.holds = {"snapshot"}
        first.outcomes = {"call 1": Outcome("failed", failure=Failure.capture(TimeoutError("late")), cut_off=True)}
        tasks = [submitted(run, call_id) for call_id in (1, 2)]
        assert (await within(tasks[0])).cut_off
        await settled()
        assert first.log == ["call 1", "snapshot"]
        first.release("snapshot")
        await within(tasks[1])
        assert first.log == ["call 1", "snapshot", "call 2"]
        first.end()
        second = FakeWorker("worker2")
        run.place(second)
        await called(run, 3)
        assert second.learners["a"] == ["new 2", "1", "2", "3"]


async def test_call_behind_a_cut_off_waits_until_its_snapshot_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened() as (run, worker):
        stored: Future[None] = Future()
        monkeypatch.setattr(run.journals, "keep", lambda *_: False)
        monkeypatch.setattr(run.journals, "store", lambda *_: stored)
        worker.outcomes = {"call 1": CUT_OFF}
        tasks = [submitted(run, call_id) for call_id in (1, 2)]
        await settled()
        assert worker.log == ["call 1", "snapshot"]
        stored.set_result(None)
        await within(asyncio.gather(*tasks))
        assert worker.log == ["call 1", "snapshot", "call 2"]


async def test_snapshot_of_a_cut_off_whose_worker_is_lost_leaves_the_call_out() -> None:
    async with opened() as (run, first):
        await called(run, 1)
        first.holds = {"snapshot"}
        first.outcomes = {"call 2": CUT_OFF}
        await within(submitted(run, 2))
        await until(lambda: first.waiting)
        second = FakeWorker("worker2")
        run.place(second)
        first.end()
        await called(run, 3)
        assert second.learners["a"] == ["new 2", "1", "3"]


async def test_cut_off_of_an_uncapturable_learner_is_told_and_calls_go_on() -> None:
    async with opened() as (run, worker):
        worker.uncapturable = UNCAPTURABLE
        worker.outcomes = {"call 1": CUT_OFF}
        await within(submitted(run, 1))
        await called(run, 2)
        assert run.refusals == [("a", True), ("a", False)]  # it is tried again behind the next call
        worker.uncapturable = None
        await called(run, 3, 4)
        assert run.journal().unrecoverable is None
        worker.end()
        second = FakeWorker("worker2")
        run.place(second)
        await called(run, 5)
        assert second.learners["a"] == ["new 2", "1", "2", "3", "4", "5"]


# Rebuilds whose caller is cancelled.


async def test_cancellation_during_a_rebuild_leaves_no_half_built_learner_to_the_next_call() -> None:
    async with opened() as (run, first):
        await called(run, 1, 2)
        first.end()
        second = FakeWorker("worker2")
        second.holds = {"call 1"}
        run.place(second)
        tasks = [submitted(run, call_id) for call_id in (3, 4)]
        await until(lambda: second.waiting)
        await cancelled(tasks[0])
        await settled()
        assert second.log == ["call 1"]  # call 4 waits for the rebuild
        second.release("call 1")
        assert (await within(tasks[1])).kind == "value"
        assert second.log == ["call 1", "call 2", "call 4"]
        assert second.learners["a"] == ["new 2", "1", "2", "4"]


async def test_cancellation_while_a_worker_is_waited_for_leaves_the_turn_to_the_next_call() -> None:
    async with opened() as (run, first):
        await called(run, 1)
        first.end()
        tasks = [submitted(run, call_id) for call_id in (2, 3)]
        await settled()
        await cancelled(tasks[0])
        second = FakeWorker("worker2")
        run.place(second)
        await within(tasks[1])
        assert second.learners["a"] == ["new 2", "1", "3"]


async def test_rebuild_that_fails_behind_a_cancelled_call_is_told_to_the_next_one() -> None:
    async with opened() as (run, first):
        await called(run, 1)
        first.end()
        tasks = [submitted(run, call_id) for call_id in (2, 3)]
        await settled()
        await cancelled(tasks[0])
        run.fail("no worker is left")
        lost(await within(tasks[1]), "no worker is left")


# Snapshots that bound the journal.


async def test_long_journal_is_replaced_by_a_snapshot_that_the_next_call_follows() -> None:
    async with opened(journal_max_calls=2) as (run, worker):
        worker.holds = {"snapshot"}
        await called(run, 1, 2, 3)
        task = submitted(run, 4)
        await settled()
        assert worker.log == ["call 1", "call 2", "call 3", "snapshot"]
        worker.release("snapshot")
        await within(task)
        assert [entry.call.call_id for entry in run.journal().entries] == [4]


async def test_snapshot_that_is_being_stored_does_not_hold_the_next_call_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(journal_max_calls=1) as (run, worker):
        stored: Future[None] = Future()
        monkeypatch.setattr(run.journals, "keep", lambda *_: False)
        monkeypatch.setattr(run.journals, "store", lambda *_: stored)
        await called(run, 1, 2, 3)
        assert worker.log == ["call 1", "call 2", "snapshot", "call 3"]
        assert [entry.call.call_id for entry in run.journal().entries] == [1, 2, 3]
        stored.set_result(None)
        await settled()
        assert [entry.call.call_id for entry in run.journal().entries] == [3]


async def test_snapshot_that_is_stored_during_a_rebuild_takes_no_call_from_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rebuild begins with the snapshot before, and so needs all calls behind that one."""
    async with opened(journal_max_calls=1) as (run, first):
        await called(run, 1, 2)
        stored: Future[None] = Future()
        with monkeypatch.context() as patch:
            patch.setattr(run.journals, "keep", lambda *_: False)
            patch.setattr(run.journals, "store", lambda *_: stored)
            await called(run, 3, 4)
            assert first.log[-2:] == ["call 4", "snapshot"]
            first.end()
            second = FakeWorker("worker2")
            second.holds = {"restore"}
            run.place(second)
            task = submitted(run, 5)
            await until(lambda: second.waiting)
            patch.undo()
            assert run.journals.keep("a", 4, _state_of(["1", "2", "3", "4"]), None)
            stored.set_result(None)
            await settled()
            second.release("restore")
            await within(task)
        assert second.learners["a"] == ["new 2", "1", "2", "3", "4", "5"]


async def test_rebuild_reads_its_snapshot_beside_the_event_loop_once_the_throttle_admits_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with opened(journal_max_calls=1) as (run, first):
        store, is_read, go_on = run.journals._store, threading.Event(), threading.Event()
        get = store.get

        def slow_get(key: str) -> bytes:
            is_read.set()
            assert go_on.wait(10), "the event loop waits for the disk"
            return get(key)

        monkeypatch.setattr(run.journals, "keep", lambda *_: False)
        monkeypatch.setattr(store, "get", slow_get)
        await called(run, 1, 2)
        await until(lambda: not run.journal().awaits_snapshot)
        first.end()
        second = FakeWorker("worker2")
        run.place(second)
        async with run.throttle(second).passing(BUDGET_BYTES):
            task = submitted(run, 3)
            await settled()
            assert not is_read.is_set()
        await until(is_read.is_set)
        go_on.set()
        await within(task)
        assert second.log == ["restore", "call 3"]
        assert second.learners["a"] == ["new 2", "1", "2", "3"]


async def test_snapshot_that_relieves_the_journals_comes_behind_the_calls_that_wait() -> None:
    async with opened(journal_max_bytes=10_000) as (run, worker):
        worker.holds = {"call 1"}
        tasks = [asyncio.ensure_future(run.session().call(call(number, num_floats=3000))) for number in (1, 2)]
        await settled()
        worker.release("call 1")
        await within(asyncio.gather(*tasks))
        await settled()
        assert worker.log == ["call 1", "call 2", "snapshot"]
        assert run.journals.num_bytes == 0


async def test_snapshot_that_is_larger_than_it_is_worth_leaves_the_journal_as_it_is() -> None:
    async with opened(journal_max_bytes=10_000) as (run, _):
        await called(run, 1)
        run.journal().request_snapshot()
        await within(_take_turn_and_snapshot(run, limit=3))
        assert [entry.call.call_id for entry in run.journal().entries] == [1]
        assert run.journal().state_bytes > 3
        assert not run.journal().awaits_snapshot


async def test_snapshot_is_not_asked_of_a_lost_worker() -> None:
    async with opened() as (run, worker):
        await called(run, 1)
        worker.end()
        run.session().request_snapshot(None)
        await settled()
        assert not run.journal().awaits_snapshot
        assert worker.log == ["call 1"]


# Moves.


async def test_move_takes_a_snapshot_forgets_the_learner_and_rebuilds_it_at_the_next_call() -> None:
    async with opened() as (run, first):
        await called(run, 1, 2)
        second = FakeWorker("worker2")
        run.place(second)
        await within(run.session().move())
        assert first.log == ["call 1", "call 2", "snapshot", "forget a"]
        assert (first.registrations, run.session().worker) == ({}, None)
        await called(run, 3)
        assert second.log == ["restore", "call 3"]
        assert second.learners["a"] == ["new 2", "1", "2", "3"]


async def test_move_is_made_by_the_next_call_if_nothing_else_makes_it() -> None:
    async with opened() as (run, first):
        await called(run, 1)
        second = FakeWorker("worker2")
        run.place(second)
        await called(run, 2)
        assert first.log == ["call 1", "snapshot", "forget a"]
        assert second.log == ["restore", "call 2"]


async def test_move_comes_before_the_calls_that_wait() -> None:
    """Else a worker could not leave while the next call waits for another one."""
    async with opened() as (run, first):
        first.holds = {"call 1"}
        tasks = [submitted(run, call_id) for call_id in (1, 2)]
        await settled()
        run.place(None)
        moving = asyncio.ensure_future(run.session().move())
        await settled()
        first.release("call 1")
        await within(asyncio.gather(moving, tasks[0]))
        assert first.log == ["call 1", "snapshot", "forget a"]
        second = FakeWorker("worker2")
        run.place(second)
        await within(tasks[1])
        assert second.log == ["restore", "call 2"]


async def test_move_of_a_learner_without_calls_since_its_snapshot_takes_no_other_snapshot() -> None:
    async with opened(journal_max_calls=1) as (run, first):
        await called(run, 1, 2)
        run.place(FakeWorker("worker2"))
        await within(run.session().move())
        assert first.log == ["call 1", "call 2", "snapshot", "forget a"]


async def test_move_back_makes_a_new_learner() -> None:
    async with opened() as (run, first):
        await called(run, 1)
        second = FakeWorker("worker2")
        run.place(second)
        await called(run, 2)
        run.place(first)
        await called(run, 3)
        assert first.learners["a"] == ["new 3", "1", "2", "3"]
        assert (list(first.registrations), list(second.registrations)) == (["a"], [])


async def test_move_of_an_uncapturable_learner_makes_its_calls_again() -> None:
    async with opened() as (run, first):
        first.uncapturable = UNCAPTURABLE
        await called(run, 1, 2)
        second = FakeWorker("worker2")
        run.place(second)
        await within(run.session().move())
        await called(run, 3)
        assert first.log == ["call 1", "call 2", "snapshot", "forget a"]
        assert second.log == ["call 1", "call 2", "call 3"]
        assert run.refusals == []  # its journal goes on


@pytest.mark.parametrize("by_call", [True, False])
async def test_uncapturable_learner_whose_calls_cannot_be_repeated_stays(by_call: bool) -> None:
    async with opened(journal_max_calls=1) as (run, first):
        first.uncapturable = UNCAPTURABLE
        await called(run, 1, 2)
        assert run.journal().unrecoverable is not None
        second = FakeWorker("worker2")
        run.place(second)
        if not by_call:
            await within(run.session().move())
        await called(run, 3)
        assert second.log == []
        assert first.learners["a"] == ["new 1", "1", "2", "3"]


async def test_uncapturable_learner_whose_worker_leaves_is_given_up() -> None:
    async with opened(journal_max_calls=1) as (run, first):
        first.uncapturable = UNCAPTURABLE
        await called(run, 1, 2)
        run.stay = False
        run.place(FakeWorker("worker2"))
        await within(run.session().move())
        lost(await within(submitted(run, 3)), "worker1 left, and its learner could not be moved: .*autograd graph")


async def test_worker_loss_during_a_move_rebuilds_the_learner_from_its_journal() -> None:
    async with opened() as (run, first):
        await called(run, 1)
        first.holds = {"snapshot"}
        second = FakeWorker("worker2")
        run.place(second)
        moving = asyncio.ensure_future(run.session().move())
        await until(lambda: first.waiting)
        first.end()
        await within(moving)
        await called(run, 2)
        assert second.learners["a"] == ["new 2", "1", "2"]
        assert not run.journal().awaits_snapshot


async def test_move_leaves_a_learner_that_is_where_it_should_be() -> None:
    async with opened() as (run, worker):
        await called(run, 1)
        await within(run.session().move())
        assert worker.log == ["call 1"]
        assert run.session().worker is worker


# Streams.


def stream(run: FakeRun, call_id: int) -> SessionStream:
    return SessionStream(run, call(call_id, kind="stream"))


async def kinds(steps: SessionStream, count: int) -> list[str]:
    return [(await within(steps.next())).kind for _ in range(count)]


async def test_stream_holds_the_turn_from_its_first_step_to_its_end() -> None:
    async with opened() as (run, worker):
        steps = stream(run, 1)
        await called(run, 2)  # it is not open yet
        assert await kinds(steps, 2) == ["item", "item"]
        task = submitted(run, 3)
        await settled()
        assert not task.done()
        assert await kinds(steps, 2) == ["item", "end"]
        await within(task)
        assert worker.log == ["call 2", "stream 1", "advance 1 1", "advance 1 2", "advance 1 3", "call 3"]


async def test_stream_is_replayed_to_its_end() -> None:
    async with opened() as (run, first):
        await kinds(stream(run, 1), 4)
        first.end()
        second = FakeWorker("worker2")
        run.place(second)
        await called(run, 2)
        assert second.log == ["stream 1", "advance 1 1", "advance 1 2", "advance 1 3", "call 2"]
        assert second.learners["a"][1:] == ["1 item 0", "1 item 1", "1 item 2", "2"]


async def test_stream_that_was_closed_is_replayed_up_to_there() -> None:
    async with opened() as (run, first):
        steps = stream(run, 1)
        await kinds(steps, 2)
        steps.close()
        await called(run, 2)
        assert first.log == ["stream 1", "advance 1 1", "cancel 1", "call 2"]
        first.end()
        second = FakeWorker("worker2")
        run.place(second)
        await called(run, 3)
        assert second.log == ["stream 1", "advance 1 1", "cancel 1", "call 2", "call 3"]
        assert second.learners["a"][1:] == [*first.learners["a"][1:], "3"]


async def test_worker_loss_between_two_steps_ends_the_stream_and_frees_the_learner() -> None:
    async with opened() as (run, first):
        await called(run, 1)
        steps = stream(run, 2)
        await kinds(steps, 1)
        task = submitted(run, 3)
        second = FakeWorker("worker2")
        run.place(second)
        first.end()
        await settled()
        assert not task.done()  # the stream is open until its reader asks or closes it
        for _ in range(2):
            outcome = await within(steps.next())
            lost(outcome, r"its worker was lost \(its process ended\), and the stream with it: open another")
        await within(task)
        assert second.learners["a"] == ["new 2", "1", "3"]
        steps.close()
        await settled()
        assert not any("cancel" in request for request in second.log)


async def test_worker_loss_between_two_steps_of_a_stream_that_is_closed_frees_the_learner() -> None:
    async with opened() as (run, first):
        await called(run, 1)
        steps = stream(run, 2)
        await kinds(steps, 1)
        second = FakeWorker("worker2")
        run.place(second)
        first.end()
        steps.close()
        await called(run, 3)
        assert second.learners["a"] == ["new 2", "1", "3"]


@pytest.mark.parametrize("request_", ["stream 2", "advance 2 1"])
async def test_worker_loss_during_a_step_ends_the_stream_and_frees_the_learner(request_: str) -> None:
    async with opened() as (run, first):
        await called(run, 1)
        first.holds = {request_}
        steps = stream(run, 2)
        if request_ != "stream 2":
            await kinds(steps, 1)
        step = asyncio.ensure_future(steps.next())
        await until(lambda: first.waiting)
        second = FakeWorker("worker2")
        run.place(second)
        first.end(2)
        lost(await within(step), "and the stream with it")
        await called(run, 3)
        assert second.learners["a"] == ["new 2", "1", "3"]


async def test_worker_losses_by_streams_count_for_max_recoveries() -> None:
    async with opened(max_recoveries=1) as (run, worker):
        for number in range(2):
            worker.holds = {"stream"}
            step = asyncio.ensure_future(stream(run, number + 1).next())
            await until(lambda: worker.waiting)  # noqa: B023 - called at once
            following = FakeWorker(f"worker{number + 2}")
            run.place(following)
            worker.end(number + 1)
            worker = following
            lost(await within(step), "and the stream with it")
        lost(await within(submitted(run, 9)), "given up")


async def test_stream_that_is_closed_as_it_waits_for_its_turn_is_never_sent() -> None:
    async with opened() as (run, worker):
        worker.holds = {"call 1"}
        task = submitted(run, 1)
        steps = stream(run, 2)
        step = asyncio.ensure_future(steps.next())
        await settled()
        steps.close()
        worker.release("call 1")
        await within(task)
        assert (await within(step)).kind == "cancelled"
        await called(run, 3)
        assert worker.log == ["call 1", "call 3"]


async def test_stream_step_that_is_cancelled_as_it_waits_for_its_turn_is_never_sent() -> None:
    async with opened() as (run, worker):
        worker.holds = {"call 1"}
        task = submitted(run, 1)
        step = asyncio.ensure_future(stream(run, 2).next())
        await settled()
        await cancelled(step)
        worker.release("call 1")
        await within(task)
        await called(run, 3)
        assert worker.log == ["call 1", "call 3"]


async def test_stream_that_is_closed_during_a_rebuild_is_never_sent() -> None:
    async with opened() as (run, first):
        await called(run, 1)
        first.end()
        second = FakeWorker("worker2")
        second.holds = {"call 1"}
        run.place(second)
        steps = stream(run, 2)
        step = asyncio.ensure_future(steps.next())
        await until(lambda: second.waiting)
        steps.close()
        second.release("call 1")
        assert (await within(step)).kind == "cancelled"
        await called(run, 3)
        assert second.learners["a"] == ["new 2", "1", "3"]


async def test_stream_step_that_is_cancelled_during_a_rebuild_leaves_the_turn_to_the_next_call() -> None:
    async with opened() as (run, first):
        await called(run, 1)
        first.end()
        second = FakeWorker("worker2")
        second.holds = {"call 1"}
        run.place(second)
        step = asyncio.ensure_future(stream(run, 2).next())
        await until(lambda: second.waiting)
        task = submitted(run, 3)
        await cancelled(step)
        await settled()
        assert second.log == ["call 1"]
        second.release("call 1")
        await within(task)
        assert second.learners["a"] == ["new 2", "1", "3"]


async def test_close_during_a_step_cancels_it_and_a_snapshot_follows() -> None:
    async with opened() as (run, worker):
        worker.holds = {"advance 1 1", "cancel 1"}
        steps = stream(run, 1)
        await kinds(steps, 1)
        step = asyncio.ensure_future(steps.next())
        await until(lambda: worker.waiting)
        task = submitted(run, 2)
        steps.close()
        await until(lambda: "cancel 1" in worker.waiting)
        worker.release("advance 1 1", CUT_OFF)  # the host answers the step, and then the request to cancel it
        assert (await within(step)).kind == "cancelled"
        worker.release("cancel 1", CUT_OFF)
        await within(task)
        assert worker.log == ["stream 1", "advance 1 1", "cancel 1", "snapshot", "call 2"]


async def test_cancelled_step_closes_the_stream_and_a_snapshot_follows() -> None:
    async with opened() as (run, worker):
        worker.holds = {"advance 1 1", "cancel 1"}
        steps = stream(run, 1)
        await kinds(steps, 1)
        step = asyncio.ensure_future(steps.next())
        await until(lambda: worker.waiting)
        task = submitted(run, 2)
        await cancelled(step)
        await until(lambda: "cancel 1" in worker.waiting)
        worker.release("cancel 1", CUT_OFF)
        await within(task)
        assert worker.log == ["stream 1", "advance 1 1", "cancel 1", "snapshot", "call 2"]


async def test_worker_loss_as_a_stream_is_closed_frees_the_learner_once() -> None:
    async with opened() as (run, first):
        first.holds = {"cancel 1"}
        steps = stream(run, 1)
        await kinds(steps, 1)
        steps.close()
        await until(lambda: first.waiting)
        tasks = [submitted(run, call_id) for call_id in (2, 3)]
        second = FakeWorker("worker2")
        second.holds = {"call 2"}
        run.place(second)
        first.end()
        await until(lambda: second.waiting)
        await settled()
        assert second.log == ["call 2"]
        second.release("call 2")
        await within(asyncio.gather(*tasks))
        assert second.learners["a"] == ["new 2", "2", "3"]


async def test_stream_step_that_rpc_cannot_carry_ends_the_stream_and_a_snapshot_follows() -> None:
    async with opened() as (run, worker):
        worker.outcomes = {"advance 1 1": UndeliverableError("torch RPC cannot carry it")}
        steps = stream(run, 1)
        await kinds(steps, 1)
        lost(await within(steps.next()), "torch RPC cannot carry it")
        await called(run, 2)
        assert worker.log == ["stream 1", "advance 1 1", "snapshot", "call 2"]


async def test_stream_fails_if_no_worker_is_expected() -> None:
    async with opened() as (run, first):
        await called(run, 1)
        first.end()
        step = asyncio.ensure_future(stream(run, 2).next())
        await settled()
        run.fail("no worker is left")
        lost(await within(step), "no worker is left")
        lost(await within(submitted(run, 3)), "no worker is left")


async def test_stream_that_has_ended_is_not_kept_by_its_worker() -> None:
    async with opened() as (run, worker):
        before = len(worker.lost._callbacks or ())
        for call_id in (1, 2, 3):
            await kinds(stream(run, call_id), 4)
        assert len(worker.lost._callbacks or ()) == before


# Progress.


async def test_reports_that_a_call_repeats_after_a_worker_loss_are_not_new() -> None:
    async with opened() as (run, first):
        first.holds = {"call 1"}
        task = submitted(run, 1)
        await settled()
        session = run.session()
        assert [session.is_next_report(call(1), number) for number in (0, 1)] == [True, True]
        second = FakeWorker("worker2")
        second.holds = {"call 1"}
        run.place(second)
        first.end(1)
        await until(lambda: second.waiting)
        assert [session.is_next_report(call(1), number) for number in (0, 1, 2)] == [False, False, True]
        second.release("call 1")
        await within(task)


async def test_reports_of_calls_of_the_journal_are_not_new() -> None:
    async with opened() as (run, first):
        await called(run, 1)
        first.end()
        second = FakeWorker("worker2")
        second.holds = {"call 1", "call 2"}
        run.place(second)
        task = submitted(run, 2)
        await until(lambda: second.waiting)
        assert not run.session().is_next_report(call(1), 0)
        second.release("call 1")
        await until(lambda: second.waiting)
        assert run.session().is_next_report(call(2), 0)
        second.release("call 2")
        await within(task)


async def test_reports_are_counted_for_each_call() -> None:
    async with opened() as (run, worker):
        worker.holds = {"call"}
        for call_id in (1, 2):
            task = submitted(run, call_id)
            await until(lambda: worker.waiting)
            assert [run.session().is_next_report(call(call_id), number) for number in (0, 0, 1)] == [
                True,
                False,
                True,
            ]
            worker.release(f"call {call_id}")
            await within(task)


# What no call is.


async def test_snapshot_of_the_users_own_is_not_in_the_journal_and_a_restore_begins_it_anew() -> None:
    async with opened() as (run, first):
        await called(run, 1)
        taking = Call(2, "a", "snapshot", run.journal().snapshot_arguments(None), kind="snapshot")
        state = (await within(run.session().call(taking))).result(taking, run.allow, "worker1")
        await called(run, 3)
        restoring = Call(4, "a", "restore", pack((state, None)), kind="restore")
        assert (await within(run.session().call(restoring))).kind == "value"
        assert first.learners["a"] == ["new 1", "1"]
        first.end()
        second = FakeWorker("worker2")
        run.place(second)
        await called(run, 5)
        assert second.log == ["restore", "call 5"]
        assert second.learners["a"] == ["new 2", "1", "5"]


def _state_of(done: list[str]) -> Any:
    return tensor_of(bytes(_HEADER.size) + "\n".join(done).encode())


async def _take_turn_and_snapshot(run: FakeRun, limit: int) -> None:
    await run.session().turns.take()
    await run.session()._snapshot_in_turn(limit)
