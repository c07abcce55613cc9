"""A reduction on the driver: its value, the ends of its calls, and the batches of its workers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from settling import settled
from summing import Brackets, Failing

import torchfedrpc as tfr
from torchfedrpc.executors.base import AbstractExecutor, Invocation
from torchfedrpc.host.call import Batch, Call, Outcome
from torchfedrpc.reduce import driver as module
from torchfedrpc.reduce.driver import Reduction
from torchfedrpc.reduce.tree import MergeError, Node
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.exceptions import Failure
from torchfedrpc.wire.packing import pack

ALLOW = AllowList(["summing", __name__])
TIMEOUT_S = 20.0


def reduction_of(reducer: Any, client_ids: Iterable[str], **options: Any) -> Reduction:
    return Reduction(reducer, list(client_ids), ALLOW, **options)


def nodes_of(reduction: Reduction, *places: int) -> list[Node]:
    """Partial results of a worker that has these places."""
    forest = reduction.forest()
    for place in places:
        forest.add(place, reduction.client_ids[place])
    return forest.take()


# Values.


async def test_reduction_gives_each_client_its_place() -> None:
    reduction = reduction_of(Brackets(), "cab")
    assert reduction.places == {"c": 0, "a": 1, "b": 2}
    assert reduction.client_ids == ("c", "a", "b")


async def test_reduction_merges_partial_results_in_the_order_of_places_whichever_comes_first() -> None:
    for is_reversed in (False, True):
        reduction = reduction_of(Brackets(), "abcde")
        parts = [*nodes_of(reduction, 0, 1, 4), *nodes_of(reduction, 2, 3)]
        reduction.add_nodes(reversed(parts) if is_reversed else parts)
        assert reduction.counted == {0, 1, 2, 3, 4}
        assert await reduction.finish() == "(((a+b)+(c+d))+e)"


async def test_reduction_leaves_clients_without_a_result_out() -> None:
    reduction = reduction_of(Brackets(), "abcd")
    reduction.add_nodes(nodes_of(reduction, 0, 2, 3))
    assert reduction.counted == {0, 2, 3}
    assert await reduction.finish() == "(a+(c+d))"


async def test_reduction_keeps_the_reducer_as_it_was_when_it_was_begun() -> None:
    reducer = Brackets()
    reduction = reduction_of(reducer, "ab")
    reducer.text = "changed"
    assert reduction.prototype.copy().open(ALLOW).text == ""
    assert reduction.prototype.copy().open(ALLOW).text == ""  # a batch that is sent again has it too
    forest = reduction.forest()
    prototype: Any = forest._prototype
    assert prototype.text == ""


async def test_reduction_with_a_reducer_that_cannot_be_sent_is_an_error() -> None:
    reducer: Any = Brackets()
    reducer.text = lambda: None
    with pytest.raises(tfr.SerializationError):
        reduction_of(reducer, "ab")


async def test_reduction_raises_what_merging_raises() -> None:
    reduction = reduction_of(Failing("merge", "value"), "ab")
    reduction.add_nodes([*nodes_of(reduction, 0), *nodes_of(reduction, 1)])
    with pytest.raises(MergeError) as caught:
        await reduction.finish()
    assert caught.value.places == (0, 1)


class Stopping(Brackets):
    def finish(self) -> str:
        raise StopIteration("no more")


async def test_reducer_that_raises_stop_iteration_does_not_hang_its_caller() -> None:
    reduction = reduction_of(Stopping(), "a")
    reduction.add_nodes(nodes_of(reduction, 0))
    with pytest.raises(RuntimeError, match="the reducer raised StopIteration: no more"):
        await asyncio.wait_for(reduction.finish(), TIMEOUT_S)


class Counting(Brackets):
    """Its value is the number of threads of torch and whether it was finished on the event loop's thread."""

    def finish(self) -> Any:
        is_on_loop = asyncio._get_running_loop() is not None
        return torch.get_num_threads(), is_on_loop


@pytest.mark.parametrize("is_small", [True, False])
async def test_reduction_is_finished_with_the_threads_of_the_driver(
    monkeypatch: pytest.MonkeyPatch, is_small: bool
) -> None:
    if is_small:
        monkeypatch.setattr(module, "is_builtin", lambda reducer: True)
        monkeypatch.setattr(module, "_SMALL_BYTES", math.inf)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        reduction = reduction_of(Counting(), "a")
        reduction.add_nodes(nodes_of(reduction, 0))
        assert await reduction.finish() == (before + 1, is_small)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


# Ends of calls.


class Worker:
    """Answers the requests of a batch as a test tells it to."""

    clock_ahead_s = 0.0

    def __init__(self, label: str = "worker1") -> None:
        self.label = label
        self.log: list[str] = []
        self.answers: asyncio.Queue[Outcome | Exception] = asyncio.Queue()

    async def run_batch(self, batch: Batch) -> Outcome:
        self.log.append("run")
        return await self._answer()

    async def advance(self, batch: Batch, num_known: int, /) -> Outcome:
        self.log.append(f"advance {num_known}")
        return await self._answer()

    def cancel_batch(self, batch: Batch) -> None:
        self.log.append("cancel")

    async def _answer(self) -> Outcome:
        answer = await self.answers.get()
        if isinstance(answer, Exception):
            raise answer
        return answer


class Counted:
    """A call that notes its ends."""

    def __init__(self) -> None:
        self.ends: list[BaseException | None] = []

    def end(self, failure: BaseException | None) -> None:
        self.ends.append(failure)


VALUE = Outcome("value")
FAILED = Outcome("failed", failure=Failure.capture(ValueError("no")))
NEVER_RAN = Outcome("failed", failure=Failure.capture(ValueError("not yet")), never_ran=True)


def begun(client_ids: str = "abc", **options: Any) -> Reduction:
    """A reduction whose calls have begun."""
    reduction = reduction_of(Brackets(), client_ids, **options)
    reduction.calls = {client_id: Counted() for client_id in client_ids}
    return reduction


def ends_of(reduction: Reduction) -> dict[str, list[str]]:
    """Client -> ends of its call, as they were counted."""
    return {
        client_id: ["value" if error is None else str(error) for error in call.ends]
        for client_id, call in reduction.calls.items()
        if isinstance(call, Counted) and call.ends
    }


def batch_of(reduction: Reduction, places: Iterable[int] = range(3), call_id: int = -1) -> Batch:
    return reduction.batch(call_id, {place: Call(place, "abc"[place], "text", pack(None)) for place in places}, 5.0)


def begin(reduction: Reduction, worker: Worker, batch: Batch | None = None) -> asyncio.Future[Any]:
    return asyncio.ensure_future(reduction.run(worker, batch or batch_of(reduction)))


async def test_end_of_a_call_is_counted_at_once() -> None:
    reduction = begun()
    reduction.note("a", None)
    reduction.note("b", ValueError("no"))
    assert ends_of(reduction) == {"a": ["value"], "b": ["no"]}
    assert reduction.succeeded == {"a"}
    assert list(reduction.failures) == ["b"]
    assert reduction.pending == ["c"]


async def test_end_of_a_repeated_call_counts_in_place_of_the_one_before() -> None:
    reduction = begun()
    reduction.note("a", None)
    reduction.note("b", ValueError("no"))
    reduction.note("a", ValueError("lost"))
    reduction.note("b", None)
    assert reduction.succeeded == {"b"}
    assert list(reduction.failures) == ["a"]


async def test_errors_behind_a_stop_do_not_count_and_results_do() -> None:
    reduction = begun("abcd")
    reduction.note("a", None)
    reduction.stop({"b": ValueError("late"), "c": ValueError("late")})
    for client_id in "abd":
        reduction.note(client_id, ValueError("cancelled"))
    reduction.note("c", None)
    assert reduction.succeeded == {"c"}
    assert {client_id: str(error) for client_id, error in reduction.failures.items()} == {"b": "late"}
    assert ends_of(reduction) == {"a": ["value"], "b": ["late"], "c": ["late", "value"]}


@pytest.mark.parametrize(
    ("ends", "is_stopped"), [("+", False), ("++", True), ("--", False), ("---", True), ("+-", False)]
)
async def test_quorum_stops_when_it_is_met_or_out_of_reach(ends: str, is_stopped: bool) -> None:
    reduction = begun("abcd", min_results=2)
    for client_id, end in zip("abcd", ends, strict=False):
        assert not reduction.stopped.done()
        reduction.note(client_id, None if end == "+" else ValueError("no"))
        await settled()
    assert reduction.stopped.done() == is_stopped


async def test_errors_of_one_tick_all_count_though_a_quorum_is_out_of_reach() -> None:
    reduction = begun("abcd", min_results=4)
    for client_id in "ab":
        reduction.note(client_id, ValueError("no"))
    await settled()
    assert reduction.stopped.done()
    assert list(reduction.failures) == ["a", "b"]


async def test_ends_that_come_together_all_count_though_a_quorum_is_met() -> None:
    reduction, worker = begun(min_results=1), Worker()
    worker.answers.put_nowait(Outcome("value", pack([]), of_calls=((0, VALUE), (1, FAILED), (2, VALUE))))
    await asyncio.wait_for(begin(reduction, worker), TIMEOUT_S)
    await settled()
    assert reduction.stopped.done()
    assert reduction.succeeded == {"a", "c"}
    assert list(reduction.failures) == ["b"]


async def test_error_of_a_call_names_it_and_keeps_no_frame_alive() -> None:
    reduction, worker = begun(), Worker()
    worker.answers.put_nowait(Outcome("value", pack([]), of_calls=((0, VALUE), (1, FAILED), (2, VALUE))))
    await asyncio.wait_for(begin(reduction, worker), TIMEOUT_S)
    error = reduction.failures["b"]
    assert isinstance(error, ValueError)
    assert error.__notes__ == ["in b.text on worker1"]
    assert error.__traceback__ is None


# Batches.


async def test_batch_has_the_reduction_s_reducer_size_and_watch() -> None:
    batch = batch_of(reduction_of(Brackets(), "abcde", is_watched=True), (0, 2))
    assert (batch.call_id, batch.num_places, batch.is_watched, batch.timeout_s) == (-1, 5, True, 5.0)
    assert [(place, call.client_id) for place, call in batch.calls] == [(0, "a"), (2, "c")]


async def test_watched_batch_is_asked_for_what_is_not_known_until_its_end() -> None:
    reduction, worker = begun(is_watched=True), Worker()
    task = begin(reduction, worker)
    worker.answers.put_nowait(Outcome("item", of_calls=((2, VALUE), (0, FAILED))))
    await settled()
    assert ends_of(reduction) == {"c": ["value"], "a": ["no"]}
    worker.answers.put_nowait(Outcome("item", of_calls=((1, VALUE),)))
    last = Outcome("value", pack([]), of_calls=((2, VALUE), (0, FAILED), (1, VALUE)))
    worker.answers.put_nowait(last)
    assert await asyncio.wait_for(task, TIMEOUT_S) == (last, {})
    assert ends_of(reduction) == {"c": ["value"], "a": ["no"], "b": ["value"]}  # each once
    assert worker.log == ["run", "advance 2", "advance 3"]


async def test_batch_that_is_not_watched_has_one_answer() -> None:
    reduction, worker = begun(), Worker()
    worker.answers.put_nowait(Outcome("value", of_calls=((0, VALUE), (2, VALUE), (1, VALUE))))
    await asyncio.wait_for(begin(reduction, worker), TIMEOUT_S)
    assert worker.log == ["run"]
    assert reduction.succeeded == {"a", "b", "c"}


async def test_calls_that_have_not_begun_are_repeated_as_often_as_they_may() -> None:
    reduction = begun(num_retries=2)
    left = {0, 1, 2}
    for expected in ({0, 1}, {0}, set()):
        worker = Worker()
        of_calls = tuple(
            (place, NEVER_RAN if place in expected or len(left) == 1 else VALUE) for place in sorted(left)
        )
        worker.answers.put_nowait(Outcome("value", of_calls=of_calls))
        _, again = await asyncio.wait_for(begin(reduction, worker, batch_of(reduction, left)), TIMEOUT_S)
        assert set(again) == expected
        left = expected or left
    assert ends_of(reduction) == {"c": ["value"], "b": ["value"], "a": ["not yet"]}


async def test_stop_cancels_the_batches_that_are_open() -> None:
    reduction, workers = begun(), [Worker(), Worker("worker2")]
    tasks = [begin(reduction, worker, batch_of(reduction, [number])) for number, worker in enumerate(workers)]
    workers[1].answers.put_nowait(Outcome("value", of_calls=((1, VALUE),)))
    await asyncio.wait_for(tasks[1], TIMEOUT_S)
    assert not reduction.stopped.done()
    reduction.stop()
    assert reduction.stopped.done()
    assert (workers[0].log, workers[1].log) == (["run", "cancel"], ["run"])
    workers[0].answers.put_nowait(Outcome("value", of_calls=((0, VALUE),)))
    await asyncio.wait_for(tasks[0], TIMEOUT_S)


async def test_workers_are_waited_for_while_their_batches_are_open() -> None:
    reduction, workers = begun(), [Worker(), Worker("worker2")]
    tasks = [
        begin(reduction, worker, batch_of(reduction, [number], call_id=-number))
        for number, worker in enumerate([*workers, workers[0]])
    ]
    await settled()
    assert reduction.waited_for == ["worker1", "worker2"]
    for number in (0, 2):
        workers[0].answers.put_nowait(Outcome("value", of_calls=((number, VALUE),)))
    workers[1].answers.put_nowait(ConnectionError("lost"))
    with pytest.raises(ConnectionError):
        await asyncio.wait_for(tasks[1], TIMEOUT_S)
    await asyncio.gather(tasks[0], tasks[2])
    assert reduction.waited_for == []


@pytest.mark.parametrize("is_final", [True, False])
async def test_answer_with_calls_that_were_not_sent_is_an_error(is_final: bool) -> None:
    reduction, worker = begun("abcd"), Worker()
    answer = Outcome("value" if is_final else "item", of_calls=((0, VALUE), (1, VALUE), (3, VALUE)))
    worker.answers.put_nowait(answer)
    with pytest.raises(tfr.SerializationError, match="worker1 has answered a batch with other calls"):
        await asyncio.wait_for(begin(reduction, worker), TIMEOUT_S)
    assert "d" not in reduction.succeeded


@pytest.mark.parametrize("is_begun", [True, False])
async def test_refusal_of_a_batch_is_raised(is_begun: bool) -> None:
    reduction, worker = begun(is_watched=True), Worker()
    if is_begun:
        worker.answers.put_nowait(Outcome("item", of_calls=((0, VALUE),)))
    refusal = tfr.SerializationError("a request cannot be read")
    worker.answers.put_nowait(Outcome("failed", failure=Failure.capture(refusal), never_ran=True))
    with pytest.raises(tfr.SerializationError, match="a request cannot be read") as caught:
        await asyncio.wait_for(begin(reduction, worker), TIMEOUT_S)
    assert caught.value.__notes__ == ["as worker1 was asked to reduce"]
    assert reduction.waited_for == []


async def test_partial_results_are_those_of_the_batch_s_clients() -> None:
    reduction, worker = begun("abcd"), Worker()
    nodes = nodes_of(reduction, 0, 1)
    reduction.take(worker, batch_of(reduction), Outcome("value", pack(nodes)))
    assert reduction.counted == {0, 1}
    reduction.take(worker, batch_of(reduction), Outcome("value"))
    of_others = ((1, 0, Brackets()), (0, 0, Brackets()), (2, 0, Brackets()), (1, 1, Brackets()), (0, 9, Brackets()))
    for node in (*of_others, (-1, 0, Brackets()), (9, 0, Brackets())):
        with pytest.raises(
            tfr.SerializationError, match="worker1 has answered a batch with results of other clients"
        ):
            reduction.take(worker, batch_of(reduction), Outcome("value", pack([node])))
    assert reduction.counted == {0, 1}
    assert await reduction.finish() == "(a+b)"


async def test_partial_results_that_failed_are_an_error() -> None:
    reduction = begun()
    failed = Outcome("failed", failure=Failure.capture(ValueError("do not go together")))
    with pytest.raises(ValueError, match="do not go together") as caught:
        reduction.take(Worker(), batch_of(reduction), failed)
    assert caught.value.__notes__ == ["as results were merged on worker1"]


async def test_results_that_a_worker_reports_and_does_not_send_are_an_error() -> None:
    reduction, batch = begun(), batch_of(begun())
    for nodes in (None, pack([]), pack(nodes_of(reduction, 0, 1))):
        outcome = Outcome("value", nodes, of_calls=((0, VALUE), (1, FAILED), (2, VALUE)))
        with pytest.raises(tfr.SerializationError, match="worker1 has answered a batch without the results of its"):
            reduction.take(Worker(), batch, outcome)
    assert reduction.nodes == []
    nodes = pack(nodes_of(reduction, 0, 2))
    reduction.take(Worker(), batch, Outcome("value", nodes, of_calls=((0, VALUE), (1, FAILED), (2, VALUE))))
    assert reduction.counted == {0, 2}


@pytest.mark.parametrize("places", [(7, 9), (0, 3), (0,), (0, "b"), None, 5, (0, 1)])
async def test_error_of_a_merge_is_one_of_the_batch_s_clients(places: Any) -> None:
    reduction = begun()
    failed = Outcome("failed", failure=Failure.capture(MergeError(places, ValueError("no"))))
    expected = MergeError if places == (0, 1) else tfr.SerializationError
    with pytest.raises(expected):
        reduction.take(Worker(), batch_of(reduction), failed)


async def test_error_of_a_merge_has_a_reason() -> None:
    reason: Any = "no exception"
    failed = Outcome("failed", failure=Failure.capture(MergeError((0, 1), reason)))
    with pytest.raises(tfr.SerializationError, match="with an error of other clients"):
        begun().take(Worker(), batch_of(begun()), failed)


async def test_reduction_is_complete_once_all_that_succeeded_have_come() -> None:
    reduction = begun()
    seen = [reduction.is_complete]
    for client_id, error in (("a", None), ("b", ValueError("no"))):
        reduction.note(client_id, error)
        seen.append(reduction.is_complete)
    reduction.add_nodes(nodes_of(reduction, 0))
    seen.append(reduction.is_complete)
    reduction.note("c", None)
    seen.append(reduction.is_complete)
    assert seen == [True, False, False, True, False]


async def test_closed_reduction_ignores_what_comes_late() -> None:
    reduction, worker = begun(), Worker()
    reduction.add_nodes(nodes_of(reduction, 0))
    reduction.note("a", None)
    reduction.stop({"b": ValueError("late")})
    reduction.close()
    reduction.note("b", None)
    outcome = Outcome("value", pack(nodes_of(reduction, 1)), of_calls=((1, VALUE),))
    reduction.take(worker, batch_of(reduction), outcome)
    assert (reduction.succeeded, [*reduction.failures]) == ({"a"}, ["b"])
    assert reduction.counted == {0}
    assert await reduction.finish() == "a"


# Executors that reduce nothing on their workers.


class Gathering(AbstractExecutor):
    """Its results are client ids, in capitals; clients in lower case fail."""

    async def execute(self, invocation: Invocation) -> Any:
        if invocation.method == "hold":
            await asyncio.Event().wait()
        if invocation.client_id == "x":
            raise ValueError("x fails")
        return invocation.client_id.upper()

    async def execute_method(self, client_id: str, method_name: str, /, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    async def open(self, spec: Any) -> None: ...

    async def close(self) -> None: ...


def gathered(reduction: Reduction, **methods: str) -> asyncio.Future[None]:
    invocations = [
        Invocation(number, client_id, methods.get(client_id, "text"), (), {}, None)
        for number, client_id in enumerate(reversed(reduction.client_ids))
    ]
    return asyncio.ensure_future(Gathering().reduce(reduction, invocations))


async def test_results_are_reduced_on_the_driver_by_default() -> None:
    reduction = begun("abcx")
    await asyncio.wait_for(gathered(reduction), TIMEOUT_S)
    assert reduction.succeeded == {"a", "b", "c"}
    assert ends_of(reduction)["x"] == ["x fails"]
    assert await reduction.finish() == "((A+B)+C)"


async def test_stop_cancels_the_calls_of_an_executor_that_does_not_reduce() -> None:
    reduction = begun("abc")
    task = gathered(reduction, b="hold")
    await settled()
    assert not task.done()
    reduction.stop()
    await asyncio.wait_for(task, TIMEOUT_S)
    assert await reduction.finish() == "(A+C)"


async def test_result_that_the_reducer_refuses_is_an_error_of_that_call() -> None:
    reduction = reduction_of(Failing("add", "value"), "b")
    await asyncio.wait_for(gathered(reduction), TIMEOUT_S)
    error = reduction.failures["b"]
    assert isinstance(error, ValueError)
    assert error.__notes__ == ["in b.text, as its result was added up"]
    assert reduction.succeeded == set()


async def test_results_that_cannot_be_merged_fail_the_reduction() -> None:
    reduction = reduction_of(Failing("merge", "value"), "ab")
    with pytest.raises(MergeError):
        await asyncio.wait_for(gathered(reduction), TIMEOUT_S)
