"""Batches of stateless calls: dealt, taken back, lost and given up; each call counts once, and none is forgotten."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from fake_workers import ALLOW, GIVEN_BACK, FakeWorker, call, table_of, until
from settling import settled, within
from summing import Brackets

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import SerializationError, WorkerLostError
from torchfedrpc.events import EventBus
from torchfedrpc.executors.batches import DealtBatches, Parts
from torchfedrpc.executors.dealer import Dealer
from torchfedrpc.executors.durations import Durations
from torchfedrpc.executors.eligible_workers import EligibleWorkers
from torchfedrpc.executors.session import Run
from torchfedrpc.executors.stateless import StatelessSession
from torchfedrpc.host.call import Outcome
from torchfedrpc.reduce.driver import Reduction
from torchfedrpc.wire.exceptions import Failure
from torchfedrpc.wire.packing import pack

NEVER_RAN = Outcome("failed", failure=Failure.capture(ValueError("no connection")), never_ran=True)
CLIENTS = "abcdef"


class Reducing:
    """A reduction over clients ``a``, ``b`` and so on, whose calls have the ids 1, 2 and so on."""

    def __init__(self, *labels: str, seconds: float = 1e-4, **runtime: Any) -> None:
        self.workers = [FakeWorker(label) for label in labels]
        self.table = table_of(*self.workers)
        self.durations = Durations()
        for client_id in CLIENTS:
            self.durations.note(call(0, client_id), Outcome("value", seconds=seconds))
        spec: Any = SimpleNamespace(
            learner=SimpleNamespace(allow_list=lambda: ALLOW),
            events=EventBus(),
            clients={client_id: {} for client_id in CLIENTS},
        )
        self.run = Run(RuntimeConfig(**runtime), spec, self.durations)
        self.dealer = Dealer(self.run, self.table, EligibleWorkers(self.table, {}))
        self.sessions: dict[str, StatelessSession] = {}

    def session(self, client_id: str) -> StatelessSession:
        if client_id not in self.sessions:
            self.sessions[client_id] = StatelessSession(client_id, self.run, self.dealer, self.sessions)
        return self.sessions[client_id]

    def begin(self, clients: str = "abcd", *, num_retries: int = 0, is_watched: bool = False) -> asyncio.Task[None]:
        self.reduction = Reduction(Brackets(), clients, ALLOW, num_retries=num_retries, is_watched=is_watched)
        parts: Parts = {
            place: (call(place + 1, client_id), self.session(client_id)) for place, client_id in enumerate(clients)
        }
        return asyncio.ensure_future(DealtBatches(self.run, self.reduction, 5.0, dealer=self.dealer).make(parts))

    async def join(self, label: str) -> FakeWorker:
        worker = FakeWorker(label)
        source: Any = SimpleNamespace(replaces=False)
        self.table.enlist(self.table.admit(source, worker))
        self.table.serve()
        self.workers.append(worker)
        return worker

    def lose(self, worker: FakeWorker, *running: int) -> None:
        """Lose a worker; others stay."""
        worker.end(*running)
        self.table.lose(worker.label, f"{worker.label} was lost")
        self.table.give_up(worker.label, f"{worker.label} was lost")

    def check_over(self) -> None:
        """No call is noted as open, no lock is held, and no worker has work."""
        assert not self.reduction.pending
        assert not self.sessions
        assert self.dealer._num_calls == 0
        assert all(not load.assignments and not load.num_calls for load in self.dealer._loads.values())


async def test_calls_are_one_batch_of_neighbours_for_each_worker() -> None:
    reducing = Reducing("worker1", "worker2")
    await within(reducing.begin("abcd"))
    assert [worker.log for worker in reducing.workers] == [["batch 1 2"], ["batch 3 4"]]
    assert await reducing.reduction.finish() == "((a+b)+(c+d))"
    reducing.check_over()


async def test_an_idle_worker_takes_calls_of_a_batch_and_each_counts_once() -> None:
    reducing = Reducing("worker1", "worker2", seconds=5.0)
    first, second = reducing.workers
    first.holds = {"call 1", "call 2", "call 3"}
    task = reducing.begin("abcdef")
    await until(lambda: len(second.log) == 2)
    assert first.log == ["batch 1 2 3", "take back 1 2 3"]
    assert second.log == ["batch 4 5 6", "batch 2 3"]
    first.end_call(1)
    await within(task)
    assert reducing.reduction.counted == {0, 1, 2, 3, 4, 5}
    assert await reducing.reduction.finish() == "(((a+b)+(c+d))+(e+f))"
    reducing.check_over()


async def test_an_answer_that_comes_behind_the_end_of_its_batch_changes_nothing() -> None:
    reducing = Reducing("worker1", "worker2", seconds=5.0)
    first, second = reducing.workers
    first.holds = {"call 1", "call 2", "call 3", "take back"}
    first.outcomes["take back 1 2 3"] = Outcome("value", of_calls=((3, GIVEN_BACK),))
    task = reducing.begin("abcdef")
    await until(lambda: "take back 1 2 3" in first.waiting)
    for call_id in (1, 2, 3):
        first.end_call(call_id)
    await within(task)
    first.release("take back 1 2 3")
    await settled()
    assert await reducing.reduction.finish() == "(((a+b)+(c+d))+(e+f))"
    assert second.log == ["batch 4 5 6"]
    reducing.check_over()


async def test_a_worker_that_runs_what_it_has_given_back_ends_the_reduction() -> None:
    reducing = Reducing("worker1", "worker2", seconds=5.0)
    first, _ = reducing.workers
    first.holds = {"call 1", "call 2", "call 3"}
    first.outcomes["take back 1 2 3"] = Outcome("value", of_calls=((3, GIVEN_BACK),))
    first.outcomes["take back 1 2"] = Outcome("value")
    task = reducing.begin("abcdef")
    await until(lambda: "take back 1 2 3" in first.log)
    await settled()
    for call_id in (1, 2, 3):
        first.end_call(call_id)
    with pytest.raises(SerializationError, match="worker1 has answered calls that it had given back"):
        await within(task)
    reducing.check_over()


async def test_calls_of_a_lost_worker_are_dealt_to_the_others_at_once() -> None:
    reducing = Reducing("worker1", "worker2")
    first, second = reducing.workers
    first.holds, second.holds = {"call 1", "call 2"}, {"call 3", "call 4"}
    task = reducing.begin("abcd")
    await until(lambda: first.waiting and second.waiting)
    reducing.lose(first, 1)
    await until(lambda: len(second.log) == 2)
    assert second.log == ["batch 3 4", "batch 1 2"]
    second.holds.clear()
    for call_id in (3, 4):
        second.end_call(call_id)
    await within(task)
    assert await reducing.reduction.finish() == "((a+b)+(c+d))"
    reducing.check_over()


async def test_results_of_a_lost_worker_that_were_reported_are_made_again() -> None:
    reducing = Reducing("worker1", "worker2")
    first, second = reducing.workers
    first.holds = {"call 2"}
    task = reducing.begin("abcd")
    await until(lambda: first.waiting)
    reducing.lose(first, 2)
    await within(task)
    assert second.log[1:] == ["batch 1 2"]
    assert await reducing.reduction.finish() == "((a+b)+(c+d))"
    reducing.check_over()


async def test_a_call_that_ends_its_workers_is_given_up_and_the_others_count() -> None:
    reducing = Reducing("worker1", "worker2", "worker3", max_recoveries=1)
    first, second, third = reducing.workers
    first.holds = second.holds = third.holds = {"call 1"}
    task = reducing.begin("abc")
    await until(lambda: first.waiting)
    reducing.lose(first, 1)
    await until(lambda: second.waiting or third.waiting)
    reducing.lose(second if second.waiting else third, 1)
    await within(task)
    (error,) = reducing.reduction.failures.values()
    assert isinstance(error, WorkerLostError)
    assert "a.train on worker" in str(error)
    assert "max_recoveries=1" in str(error)
    assert reducing.reduction.counted == {1, 2}
    reducing.check_over()


async def test_without_recovery_the_lost_calls_fail() -> None:
    reducing = Reducing("worker1", "worker2", on_worker_lost="fail")
    first, _ = reducing.workers
    first.holds = {"call 1"}
    task = reducing.begin("abcd")
    await until(lambda: first.waiting)
    reducing.lose(first, 1)
    await within(task)
    assert list(reducing.reduction.failures) == ["a", "b"]
    assert reducing.reduction.counted == {2, 3}
    reducing.check_over()


async def test_calls_fail_if_no_worker_is_left() -> None:
    reducing = Reducing("worker1")
    (first,) = reducing.workers
    first.holds = {"call 1"}
    task = reducing.begin("abc")
    await until(lambda: first.waiting)
    reducing.lose(first, 1)
    await within(task)
    assert list(reducing.reduction.failures) == ["a", "b", "c"]
    assert "no worker is left: worker1 was lost" in str(reducing.reduction.failures["b"])
    reducing.check_over()


async def test_calls_wait_for_a_worker_that_is_expected() -> None:
    reducing = Reducing("worker1")
    (first,) = reducing.workers
    first.holds = {"call 1"}
    task = reducing.begin("abc")
    await until(lambda: first.waiting)
    first.end(1)
    reducing.table.lose("worker1", "worker1 was lost")
    await settled()
    assert not task.done()
    newcomer = FakeWorker("worker1")
    reducing.table["worker1"].newcomer = newcomer
    reducing.table.enlist(reducing.table["worker1"])
    reducing.table.serve()
    await within(task)
    assert newcomer.log == ["batch 1 2 3"]
    assert await reducing.reduction.finish() == "((a+b)+c)"
    reducing.check_over()


async def test_a_worker_that_joins_takes_calls_of_the_round() -> None:
    reducing = Reducing("worker1", seconds=5.0)
    (first,) = reducing.workers
    first.holds = {"call 1", "call 2", "call 3", "call 4"}
    task = reducing.begin("abcd")
    await until(lambda: first.waiting)
    second = await reducing.join("worker2")
    reducing.dealer.rebalance()
    await until(lambda: second.log)
    assert second.log == ["batch 3 4"]
    for call_id in (1, 2):
        first.end_call(call_id)
    await within(task)
    assert await reducing.reduction.finish() == "((a+b)+(c+d))"
    reducing.check_over()


async def test_a_call_whose_method_did_not_begin_is_repeated_as_often_as_allowed() -> None:
    reducing = Reducing("worker1", "worker2")
    first, _ = reducing.workers
    first.outcomes["call 1"] = NEVER_RAN
    await within(reducing.begin("ab", num_retries=1))
    assert sum("1" in words for worker in reducing.workers for words in worker.log if "batch" in words) == 2
    assert await reducing.reduction.finish() == "(a+b)"
    reducing.check_over()


async def test_a_stopped_reduction_drops_what_waits_and_ends() -> None:
    reducing = Reducing("worker1", "worker2")
    first, second = reducing.workers
    first.holds, second.holds = {"call 1", "call 2"}, {"call 3", "call 4"}
    task = reducing.begin("abcd")
    await until(lambda: first.waiting and second.waiting)
    reducing.reduction.stop()
    await within(task)
    await settled()
    assert not reducing.sessions
    assert reducing.dealer._num_calls == 0


async def test_results_that_are_lost_twice_behind_a_stop_are_made_again() -> None:
    reducing = Reducing("worker1", "worker2", seconds=5.0)
    first, second = reducing.workers
    first.holds, second.holds = {"call 3"}, {"call 1", "call 2", "call 4", "call 5", "call 6", "take back"}
    task = reducing.begin("abcdef", is_watched=True)
    await until(lambda: reducing.reduction.succeeded == {"a", "b"})
    reducing.lose(first)  # with results that were counted
    reducing.reduction.stop()
    second.holds -= {"take back"}
    await until(lambda: "batch 1 2" in second.log)
    third = await reducing.join("worker3")
    reducing.dealer.rebalance()
    await until(lambda: "batch 2" in third.log)
    await settled()
    reducing.lose(second, 1)
    await within(task)
    assert third.log == ["batch 2", "batch 1"]
    assert reducing.reduction.counted == {0, 1}
    reducing.check_over()


async def test_an_error_of_one_worker_is_raised_once_the_others_have_ended() -> None:
    reducing = Reducing("worker1", "worker2")
    first, second = reducing.workers
    first.outcomes["partial results"] = Outcome("failed", failure=Failure.capture(SerializationError("too odd")))
    second.holds = {"call 3", "call 4"}
    task = reducing.begin("abcd")
    await until(lambda: second.waiting)
    await settled()
    assert not task.done()
    for call_id in (3, 4):
        second.end_call(call_id)
    with pytest.raises(SerializationError, match="too odd"):
        await within(task)
    assert not reducing.sessions
    assert reducing.dealer._num_calls == 0


async def test_a_call_of_a_busy_client_runs_behind_the_one_before_it() -> None:
    reducing = Reducing("worker1", "worker2")
    first, second = reducing.workers
    first.holds = {"call 9"}
    before = asyncio.ensure_future(reducing.session("b").call(call(9, "b")))
    await until(lambda: first.waiting)
    task = reducing.begin("abc")
    await until(lambda: second.log)
    assert "batch 2" not in [*first.log, *second.log]
    first.release("call 9", Outcome("value", pack(1)))
    await within(asyncio.gather(before, task))
    assert await reducing.reduction.finish() == "((a+b)+c)"
    reducing.check_over()


async def test_workers_that_are_lost_together_are_one_loss_for_each_of_their_calls() -> None:
    reducing = Reducing(*[f"worker{number}" for number in range(1, 7)], max_recoveries=1)
    lost = reducing.workers[:4]
    for worker in lost:
        worker.holds = {f"call {call_id}" for call_id in range(1, 7)}
    task = reducing.begin("abcdef")
    await until(lambda: all(worker.log for worker in reducing.workers))
    for worker in lost:
        reducing.lose(worker)  # by silence: what they ran is not known
    await within(task)
    assert await reducing.reduction.finish() == "(((a+b)+(c+d))+(e+f))"
    reducing.check_over()
