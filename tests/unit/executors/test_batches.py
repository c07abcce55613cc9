"""Batches of a reduction: one request to each worker, repeated calls, and turns that are always passed on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fake_workers import ALLOW, CUT_OFF, FakeRun, FakeWorker, call, until
from settling import settled, within
from summing import Brackets

from torchfedrpc.errors import SerializationError, WorkerLostError
from torchfedrpc.executors.batches import Batches
from torchfedrpc.host.call import Batch, Outcome
from torchfedrpc.reduce.driver import Reduction
from torchfedrpc.rpc.worker_client import UndeliverableError
from torchfedrpc.wire.exceptions import Failure
from torchfedrpc.wire.packing import pack

NEVER_RAN = Outcome("failed", failure=Failure.capture(ValueError("no connection")), never_ran=True)


class Reducing:
    """A reduction over clients ``a``, ``b`` and so on, whose calls have the ids 1, 2 and so on.

    Attributes:
        run: The run.
        workers: Its workers: ``worker1`` and so on.
        ends: Call and kind of outcome as they were told, in order.
    """

    def __init__(self, run: FakeRun, num_workers: int = 1) -> None:
        self.run = run
        self.workers = [FakeWorker(f"worker{number + 1}") for number in range(num_workers)]
        run.place(self.workers[0])
        self.ends: list[tuple[int, str]] = []
        self.errors: dict[int, BaseException | None] = {}

    def place(self, **workers: FakeWorker) -> None:
        """Place clients on workers."""
        present_worker = self.run.present_worker

        def placed(client_id: str) -> FakeWorker | None:
            worker = workers.get(client_id)
            return worker if worker is not None and not worker.is_gone else present_worker(client_id)

        self.run.present_worker = placed

    def begin(self, clients: str = "ab", *, num_retries: int = 0, is_watched: bool = False) -> asyncio.Task[None]:
        self.reduction = Noting(self, clients, num_retries, is_watched)
        calls = {
            place: (call(place + 1, client_id), self.run.session(client_id))
            for place, client_id in enumerate(clients)
        }
        return asyncio.ensure_future(Batches(self.run, self.reduction, 5.0).make(calls))

    async def value(self) -> Any:
        return await self.reduction.finish()

    def journal(self, client_id: str) -> list[int]:
        return [entry.call.call_id for entry in self.run.journal(client_id).entries]


class Noting(Reduction):
    """Tells the ends of calls in order, those behind a stop included."""

    def __init__(self, reducing: Reducing, clients: str, num_retries: int, is_watched: bool) -> None:
        super().__init__(Brackets(), clients, ALLOW, num_retries=num_retries, is_watched=is_watched)
        self.reducing = reducing

    def note(self, client_id: str, error: BaseException | None) -> None:
        kind = "value" if error is None else "cancelled" if "was given up, since" in str(error) else "failed"
        self.reducing.ends.append((self.places[client_id] + 1, kind))
        self.reducing.errors[self.places[client_id] + 1] = error
        super().note(client_id, error)


@asynccontextmanager
async def opened(num_workers: int = 1, **options: Any) -> AsyncIterator[Reducing]:
    """A reduction; at its end all turns must have been passed on."""
    reducing = Reducing(FakeRun(**options), num_workers)
    yield reducing
    await settled()
    await reducing.run.close()


async def called(reducing: Reducing, call_id: int, client_id: str) -> None:
    outcome = await within(reducing.run.session(client_id).call(call(call_id, client_id)))
    assert outcome.kind == "value", outcome


async def test_calls_of_a_worker_are_one_batch() -> None:
    async with opened() as reducing:
        await within(reducing.begin("abc"))
        assert reducing.workers[0].log == ["batch 1 2 3"]
        assert await reducing.value() == "((a+b)+c)"
        assert reducing.ends == [(1, "value"), (2, "value"), (3, "value")]
        assert [reducing.journal(client_id) for client_id in "abc"] == [[1], [2], [3]]


async def test_calls_of_several_workers_are_a_batch_of_each() -> None:
    async with opened(2) as reducing:
        first, second = reducing.workers
        reducing.place(b=second)
        await within(reducing.begin("abc"))
        assert (first.log, second.log) == (["batch 1 3"], ["batch 2"])
        assert await reducing.value() == "((a+b)+c)"


async def test_batch_has_the_reduction_s_size_and_time_to_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened() as reducing:
        worker = reducing.workers[0]
        run_batch, seen = worker.run_batch, []
        monkeypatch.setattr(worker, "run_batch", lambda batch: seen.append(batch) or run_batch(batch))
        reducing.place(c=worker)
        await within(reducing.begin("abc", is_watched=True))
        (batch,) = seen
        assert (batch.num_places, batch.is_watched, batch.timeout_s) == (3, True, 5.0)
        assert [(place, call.client_id) for place, call in batch.calls] == [(0, "a"), (1, "b"), (2, "c")]


async def test_call_of_a_busy_learner_is_a_batch_of_its_own_behind_the_call_before_it() -> None:
    async with opened() as reducing:
        (worker,) = reducing.workers
        worker.holds = {"call 9"}
        before = asyncio.ensure_future(reducing.run.session("b").call(call(9, "b")))
        await settled()
        task = reducing.begin("abc")
        await settled()
        assert worker.log == ["call 9", "batch 1 3"]
        after = asyncio.ensure_future(reducing.run.session("b").call(call(10, "b")))
        worker.holds = {"call 2"}
        worker.release("call 9")
        await until(lambda: worker.log[-1] == "batch 2" and worker.waiting)
        assert reducing.run.session("b").is_next_report(call(2), 0)
        worker.end_call(2)
        await within(asyncio.gather(task, before, after))
        assert worker.log == ["call 9", "batch 1 3", "batch 2", "call 10"]
        assert await reducing.value() == "((a+b)+c)"
        assert worker.learners["b"] == ["new 1", "9", "2", "10"]


async def test_call_of_a_learner_in_a_batch_waits_until_the_partial_results_have_come() -> None:
    async with opened() as reducing:
        (worker,) = reducing.workers
        worker.holds = {"call 2"}
        task = reducing.begin("ab")
        await settled()
        following = asyncio.ensure_future(reducing.run.session("a").call(call(3, "a")))
        await settled()
        assert worker.log == ["batch 1 2"]
        worker.end_call(2)
        await within(asyncio.gather(task, following))
        assert worker.log == ["batch 1 2", "call 3"]


async def test_watched_batch_tells_the_end_of_each_call_once_and_as_it_comes() -> None:
    async with opened() as reducing:
        (worker,) = reducing.workers
        worker.holds = {"call 1", "call 3"}
        task = reducing.begin("abc", is_watched=True)
        await until(lambda: reducing.ends == [(2, "value")])
        worker.end_call(3)
        await until(lambda: reducing.ends == [(2, "value"), (3, "value")])
        worker.end_call(1)
        await within(task)
        assert reducing.ends == [(2, "value"), (3, "value"), (1, "value")]
        assert await reducing.value() == "((a+b)+c)"


async def test_call_that_fails_is_told_and_the_others_are_reduced() -> None:
    async with opened() as reducing:
        reducing.workers[0].outcomes = {"call 2": Outcome("failed", failure=Failure.capture(ValueError("no")))}
        await within(reducing.begin("abc"))
        assert reducing.ends == [(1, "value"), (2, "failed"), (3, "value")]
        assert await reducing.value() == "(a+c)"
        assert reducing.journal("b") == [2]  # it may have changed the learner


async def test_call_that_is_cut_off_is_followed_by_a_snapshot_before_the_next_call() -> None:
    async with opened() as reducing:
        reducing.workers[0].outcomes = {"call 2": CUT_OFF}
        await within(reducing.begin("ab"))
        await called(reducing, 3, "b")
        assert reducing.workers[0].log == ["batch 1 2", "snapshot", "call 3"]


# Retries.


async def test_call_that_never_ran_is_made_again_and_told_once() -> None:
    async with opened() as reducing:
        (worker,) = reducing.workers
        worker.outcomes = {"call 2": NEVER_RAN}
        await within(reducing.begin("abc", num_retries=1))
        assert worker.log == ["batch 1 2 3", "batch 2"]
        assert sorted(reducing.ends) == [(1, "value"), (2, "value"), (3, "value")]
        assert await reducing.value() == "((a+b)+c)"


async def test_call_that_never_ran_is_made_again_as_often_as_it_may_be() -> None:
    async with opened() as reducing:
        (worker,) = reducing.workers
        worker.holds = {"call 2"}
        task = reducing.begin("ab", num_retries=2, is_watched=True)
        for number in (1, 2, 3):
            await until(lambda: len(worker.log) >= number and worker.waiting)  # noqa: B023 - called at once
            assert (2, "failed") not in reducing.ends
            worker.end_call(2, NEVER_RAN)
        await within(task)
        assert [entry for entry in worker.log if "batch" in entry] == ["batch 1 2", "batch 2", "batch 2"]
        assert reducing.ends == [(1, "value"), (2, "failed")]


async def test_call_without_retries_is_made_once() -> None:
    async with opened() as reducing:
        reducing.workers[0].outcomes = {"call 1": NEVER_RAN}
        await within(reducing.begin("ab"))
        assert reducing.workers[0].log == ["batch 1 2"]
        assert reducing.ends == [(1, "failed"), (2, "value")]


async def test_call_that_has_run_is_not_made_again() -> None:
    async with opened() as reducing:
        reducing.workers[0].outcomes = {"call 1": Outcome("failed", failure=Failure.capture(ValueError("no")))}
        await within(reducing.begin("ab", num_retries=3))
        assert reducing.workers[0].log == ["batch 1 2"]


# Losses.


async def test_worker_loss_makes_the_calls_again_where_the_learners_are_rebuilt() -> None:
    async with opened(2) as reducing:
        first, second = reducing.workers
        await called(reducing, 7, "a")
        first.holds = {"batch"}
        task = reducing.begin("ab")
        await until(lambda: first.waiting)
        reducing.run.place(second)
        first.end(1)
        await within(task)
        assert second.log in (["call 7", "batch 1 2"], ["call 7", "batch 2 1"])
        assert second.learners == {"a": ["new 2", "7", "1"], "b": ["new 2", "2"]}
        assert await reducing.value() == "(a+b)"
        assert sorted(reducing.ends) == [(1, "value"), (2, "value")]


async def test_worker_loss_leaves_the_partial_results_of_others_as_they_are() -> None:
    async with opened(3) as reducing:
        first, second, third = reducing.workers
        reducing.place(b=second)
        second.holds = {"batch"}
        task = reducing.begin("abc")
        await until(lambda: second.waiting)
        reducing.run.place(third)
        second.end(2)
        await within(task)
        assert (first.log, third.log) == (["batch 1 3"], ["batch 2"])
        assert await reducing.value() == "((a+b)+c)"


async def test_call_that_a_loss_repeats_may_end_twice_and_its_reports_are_not_new() -> None:
    async with opened(2) as reducing:
        first, second = reducing.workers
        first.holds, second.holds = {"call 2"}, {"call 1"}
        task = reducing.begin("ab", is_watched=True)
        session = reducing.run.session("a")
        await until(lambda: reducing.ends == [(1, "value")])
        assert [session.is_next_report(call(1), number) for number in (0, 1)] == [True, True]
        reducing.run.place(second)
        first.end(2)
        await until(lambda: (2, "value") in reducing.ends)
        assert [session.is_next_report(call(1), number) for number in (0, 1, 2)] == [False, False, True]
        second.end_call(1)
        await within(task)
        assert reducing.ends == [(1, "value"), (2, "value"), (1, "value")]
        assert reducing.reduction.succeeded == {"a", "b"}
        assert await reducing.value() == "(a+b)"


async def test_call_whose_learner_is_given_up_has_failed_and_the_others_are_reduced() -> None:
    async with opened(2, max_recoveries=0) as reducing:
        first, second = reducing.workers
        first.holds = {"batch"}
        task = reducing.begin("abc")
        await until(lambda: first.waiting)
        second.holds = {"batch"}
        reducing.run.place(second)
        first.end(2)
        await until(lambda: second.waiting)
        assert "given up" in str((await within(reducing.run.session("b").call(call(9, "b")))).error)
        second.release(second.waiting[0])
        await within(task)
        assert sorted(reducing.ends) == [(1, "value"), (2, "failed"), (3, "value")]
        assert "given up" in str(reducing.errors[2])
        assert isinstance(reducing.errors[2], WorkerLostError)
        assert await reducing.value() == "(a+c)"


async def test_worker_losses_by_a_call_of_a_batch_count_behind_a_rebuild() -> None:
    async with opened(4, max_recoveries=1) as reducing:
        await called(reducing, 7, "a")
        first, second, third, fourth = reducing.workers
        second.holds = third.holds = {"batch"}
        reducing.run.place(second)
        first.end()
        task = reducing.begin("a")
        for worker, following in ((second, third), (third, fourth)):
            await until(lambda: worker.waiting)  # noqa: B023 - called at once
            reducing.run.place(following)
            worker.end(1)
        await within(task)
        assert reducing.ends == [(1, "failed")]
        assert "a call of this learner was running (times in succession: 2)" in str(reducing.errors[1])
        assert fourth.log == []


async def test_worker_loss_fails_the_calls_with_on_worker_lost_fail() -> None:
    async with opened(2, on_worker_lost="fail", max_recoveries=0) as reducing:
        first, second = reducing.workers
        first.holds = {"batch"}
        task = reducing.begin("ab")
        await until(lambda: first.waiting)
        reducing.run.place(second)
        first.end()
        await within(task)
        assert reducing.ends == [(1, "failed"), (2, "failed")]
        assert second.log == []
        assert "with it; runtime.on_worker_lost=recover" in str(reducing.errors[1])


async def test_calls_fail_if_no_worker_is_expected() -> None:
    async with opened() as reducing:
        reducing.run.fail("no worker is left")
        await within(reducing.begin("ab"))
        assert reducing.ends == [(1, "failed"), (2, "failed")]
        assert "no worker is left" in str(reducing.errors[1])


@pytest.mark.parametrize("max_recoveries", [0, 2])
async def test_repeated_losses_that_no_call_causes_give_the_reduction_up(max_recoveries: int) -> None:
    async with opened(max_recoveries + 2, max_recoveries=max_recoveries) as reducing:
        for worker in reducing.workers:
            worker.holds = {"batch"}
        task = reducing.begin("ab")
        for worker, following in zip(reducing.workers, reducing.workers[1:], strict=False):
            await until(lambda: worker.waiting)  # noqa: B023 - called at once
            reducing.run.place(following)
            worker.end(-99)
        with pytest.raises(WorkerLostError, match=f"the reduction was given up: .*max_recoveries={max_recoveries} "):
            await within(task)
        assert reducing.workers[-1].log == []


async def test_losses_in_succession_are_counted_anew_behind_an_answer() -> None:
    async with opened(4, max_recoveries=1) as reducing:
        first, second, third, fourth = reducing.workers
        first.holds = third.holds = {"batch"}
        task = reducing.begin("ab", num_retries=1)
        await until(lambda: first.waiting)
        second.outcomes = {"call 1": NEVER_RAN}
        second.holds = {"batch 1"}
        reducing.run.place(second)
        first.end(-99)
        await until(lambda: "batch 1" in second.waiting)
        reducing.run.place(third)
        second.end(-99)
        await until(lambda: third.waiting)
        assert not task.done()
        reducing.run.place(fourth)
        third.end(-99)
        with pytest.raises(WorkerLostError, match="the reduction was given up"):
            await within(task)
        assert fourth.log == []


async def test_batch_that_rpc_cannot_carry_fails_the_reduction_and_a_snapshot_follows() -> None:
    async with opened() as reducing:
        (worker,) = reducing.workers
        worker.outcomes = {"batch 1 2": UndeliverableError("torch RPC cannot carry it")}
        with pytest.raises(WorkerLostError, match="the partial results of worker1 are lost: torch RPC cannot"):
            await within(reducing.begin("ab"))
        await called(reducing, 3, "a")
        assert worker.log.index("snapshot") < worker.log.index("call 3")


async def test_partial_results_that_cannot_be_merged_fail_the_reduction_and_the_calls_are_journaled() -> None:
    async with opened() as reducing:
        (worker,) = reducing.workers
        worker.outcomes = {
            "partial results": Outcome("failed", failure=Failure.capture(ValueError("do not go together")))
        }
        with pytest.raises(ValueError, match="do not go together") as caught:
            await within(reducing.begin("ab"))
        assert "as results were merged on worker1" in caught.value.__notes__
        assert (reducing.journal("a"), reducing.journal("b")) == ([1], [2])
        assert reducing.ends == [(1, "value"), (2, "value")]


async def test_partial_results_that_fail_take_the_turns_of_repeated_calls_along() -> None:
    async with opened() as reducing:
        (worker,) = reducing.workers
        worker.outcomes = {
            "call 1": NEVER_RAN,
            "partial results": Outcome("failed", failure=Failure.capture(ValueError("do not go together"))),
        }
        with pytest.raises(ValueError, match="do not go together"):
            await within(reducing.begin("ab", num_retries=1))
        await called(reducing, 3, "a")


@pytest.mark.parametrize("places", [[], [0], [0, 1, 1], [0, 2], [1, 0, 7]])
async def test_answer_with_other_calls_than_were_sent_is_an_error_and_the_turns_pass_on(
    monkeypatch: pytest.MonkeyPatch, places: list[int]
) -> None:
    async with opened() as reducing:
        (worker,) = reducing.workers

        async def run_batch(batch: Batch) -> Outcome:
            return Outcome("value", pack([]), of_calls=tuple((place, Outcome("value")) for place in places))

        with monkeypatch.context() as patch:
            patch.setattr(worker, "run_batch", run_batch)
            with pytest.raises(SerializationError, match="worker1 has answered a batch with other calls"):
                await within(reducing.begin("ab"))
        await called(reducing, 3, "a")
        await called(reducing, 4, "b")


async def test_failure_on_one_worker_waits_for_the_batches_of_others() -> None:
    async with opened(2) as reducing:
        first, second = reducing.workers
        reducing.place(b=second)
        first.outcomes = {"partial results": Outcome("failed", failure=Failure.capture(ValueError("no")))}
        second.holds = {"batch"}
        task = reducing.begin("ab")
        await until(lambda: second.waiting)
        await settled()
        assert not task.done()
        second.release("batch 2")
        with pytest.raises(ValueError, match="no"):
            await within(task)
        assert reducing.journal("b") == [2]


async def test_unexpected_error_passes_the_turns_on() -> None:
    async with opened() as reducing:
        reducing.workers[0].outcomes = {"batch 1 2": RuntimeError("out of memory")}
        with pytest.raises(RuntimeError, match="out of memory"):
            await within(reducing.begin("ab"))
        await called(reducing, 3, "a")
        await called(reducing, 4, "b")


# Stopped reductions.


async def test_stop_cancels_the_calls_that_have_not_ended() -> None:
    async with opened() as reducing:
        (worker,) = reducing.workers
        worker.holds = {"call 2", "call 3"}
        task = reducing.begin("abc", is_watched=True)
        await until(lambda: reducing.ends == [(1, "value")])
        reducing.reduction.stop()
        await within(task)
        assert [entry for entry in worker.log if "cancel" in entry] == ["cancel_batch 1 2 3"]
        assert reducing.ends == [(1, "value"), (2, "cancelled"), (3, "cancelled")]
        assert await reducing.value() == "a"


async def test_stop_leaves_calls_that_wait_for_their_turn_out() -> None:
    async with opened() as reducing:
        (worker,) = reducing.workers
        worker.holds = {"call 9"}
        others = [asyncio.ensure_future(reducing.run.session("b").call(call(number, "b"))) for number in (9, 8)]
        await settled()
        task = reducing.begin("ab")
        await until(lambda: reducing.ends)
        reducing.reduction.stop()
        await within(task)
        assert reducing.ends == [(1, "value")]
        others.append(asyncio.ensure_future(reducing.run.session("b").call(call(10, "b"))))
        await settled()
        assert worker.log == ["call 9", "batch 1"]
        worker.release("call 9")
        await within(asyncio.gather(*others))
        assert worker.log == ["call 9", "batch 1", "call 8", "call 10"]


async def test_stop_as_a_turn_comes_passes_it_on() -> None:
    async with opened() as reducing:
        (worker,) = reducing.workers
        session = reducing.run.session("a")
        assert session.turns.take_now()
        task = reducing.begin("a")
        await settled()
        session.turns.give()
        reducing.reduction.stop()
        await within(task)
        assert worker.log == []
        await called(reducing, 3, "a")


async def test_stop_during_a_rebuild_sends_no_call_behind_it() -> None:
    async with opened(2) as reducing:
        first, second = reducing.workers
        await called(reducing, 7, "a")
        reducing.run.place(second)
        first.end()
        second.holds = {"call 7", "call 1"}
        task = reducing.begin("a", is_watched=True)
        await until(lambda: second.waiting)
        reducing.reduction.stop()
        second.release("call 7")
        await settled()
        sent = [entry for entry in second.log if "batch" in entry]
        if "batch 1" in sent and "cancel_batch 1" not in sent:
            second.end_call(1)
        await within(task)
        assert "batch 1" not in sent or "cancel_batch 1" in sent
        await called(reducing, 3, "a")


async def test_stop_as_calls_are_placed_sends_those_that_count_alone() -> None:
    async with opened() as reducing:
        [worker] = reducing.workers
        present_worker = reducing.run.present_worker

        def placed(client_id: str) -> FakeWorker | None:
            reducing.reduction.succeeded.add("b")  # in a batch that was lost
            reducing.reduction.stop()
            return present_worker(client_id)

        reducing.run.present_worker = placed
        await within(reducing.begin("abc"))
        assert worker.log == ["batch 2"]
        assert await reducing.value() == "b"
        await called(reducing, 10, "a")


async def test_stop_lets_no_call_be_made_again() -> None:
    async with opened() as reducing:
        (worker,) = reducing.workers
        worker.holds = {"call 1"}
        task = reducing.begin("ab", num_retries=3, is_watched=True)
        await until(lambda: reducing.ends)
        reducing.reduction.stopped.set_result(None)
        worker.end_call(1, NEVER_RAN)
        await within(task)
        assert reducing.ends == [(2, "value"), (1, "failed")]
        assert sum("batch" in entry for entry in worker.log) == 1


async def test_worker_loss_behind_a_stop_repeats_the_calls_that_count_alone() -> None:
    async with opened(2) as reducing:
        first, second = reducing.workers
        first.holds = {"call 2"}
        task = reducing.begin("ab", is_watched=True)
        await until(lambda: reducing.ends == [(1, "value")])
        reducing.reduction.stopped.set_result(None)
        reducing.run.place(second)
        first.end(2)
        await within(task)
        assert second.log == ["batch 1"]
        assert await reducing.value() == "a"
        await called(reducing, 3, "b")


async def test_cancelled_reduction_stops_and_its_turns_pass_on_behind_the_calls() -> None:
    async with opened() as reducing:
        (worker,) = reducing.workers
        worker.holds = {"call 2", "call 9"}
        before = asyncio.ensure_future(reducing.run.session("c").call(call(9, "c")))
        await settled()
        task = reducing.begin("abc")
        await until(lambda: "batch 1 2" in worker.log and worker.waiting)
        await settled()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await within(task)
        assert worker.log[-1] == "cancel_batch 1 2"
        worker.release("call 9")
        await within(before)
        for call_id, client_id in enumerate("abc", 10):
            await called(reducing, call_id, client_id)
        assert reducing.journal("a") == [1, 10]
        assert worker.learners["c"] == ["new 1", "9", "12"]
