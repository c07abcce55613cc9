"""A reduction on the driver: its places and its value, and calls' ends and partial results as executors note them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from summing import Brackets, Failing

import torchfedrpc as tfr
from torchfedrpc.host.call import Batch, Call, Outcome
from torchfedrpc.reduce import driver as module
from torchfedrpc.reduce.driver import Gathering, ReduceProgress, Reduction, all_ended
from torchfedrpc.reduce.tree import MergeError, Node
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.packing import pack

ALLOW = AllowList(["summing"])
TIMEOUT_S = 20.0


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def nodes_of(reduction: Reduction, *places: int) -> list[Node]:
    """Partial results of a worker that has these places."""
    forest = reduction.forest()
    for place in places:
        forest.add(place, reduction.client_ids[place])
    return forest.take()


# Reductions.


def test_reduction_gives_each_client_its_place() -> None:
    reduction = Reduction(Brackets(), ["c", "a", "b"])
    assert [reduction.place_of(client_id) for client_id in "abc"] == [1, 2, 0]
    assert reduction.client_ids == ("c", "a", "b")


async def test_reduction_merges_partial_results_in_the_order_of_places_whichever_comes_first() -> None:
    reduction = Reduction(Brackets(), "abcde")
    first, second = nodes_of(reduction, 0, 1, 4), nodes_of(reduction, 2, 3)
    assert await reduction.finish([*first, *second]) == "(((a+b)+(c+d))+e)"
    first, second = nodes_of(reduction, 0, 1, 4), nodes_of(reduction, 2, 3)
    assert await reduction.finish([*second, *reversed(first)]) == "(((a+b)+(c+d))+e)"


async def test_reduction_leaves_clients_without_a_result_out() -> None:
    reduction = Reduction(Brackets(), "abcd")
    assert await reduction.finish(nodes_of(reduction, 0, 2, 3)) == "(a+(c+d))"


async def test_reduction_keeps_the_reducer_as_it_was_when_it_was_begun() -> None:
    reducer = Brackets()
    reduction = Reduction(reducer, "ab")
    reducer.text = "changed"
    assert reduction.prototype.copy().open(ALLOW).text == ""
    assert reduction.prototype.copy().open(ALLOW).text == ""  # a batch that is sent again has it too
    forest = reduction.forest()
    assert forest._prototype.text == ""


def test_reduction_with_a_reducer_that_cannot_be_sent_is_an_error() -> None:
    reducer = Brackets()
    reducer.text = lambda: None
    with pytest.raises(tfr.SerializationError):
        Reduction(reducer, "ab")


async def test_reduction_raises_what_merging_raises() -> None:
    reduction = Reduction(Failing("merge", "value"), "ab")
    with pytest.raises(MergeError) as caught:
        await reduction.finish([*nodes_of(reduction, 0), *nodes_of(reduction, 1)])
    assert caught.value.places == (0, 1)


class Stopping(Brackets):
    def finish(self) -> str:
        raise StopIteration("no more")


async def test_reducer_that_raises_stop_iteration_does_not_hang_its_caller() -> None:
    reduction = Reduction(Stopping(), "a")
    with pytest.raises(RuntimeError, match="the reducer raised StopIteration: no more"):
        await asyncio.wait_for(reduction.finish(nodes_of(reduction, 0)), TIMEOUT_S)


class Counting(Brackets):
    """Its value is the number of threads of torch and whether it was finished on the event loop's thread."""

    def finish(self) -> Any:
        is_on_loop = asyncio._get_running_loop() is not None
        return torch.get_num_threads(), is_on_loop


@pytest.mark.parametrize("is_small", [True, False])
async def test_reduction_is_finished_with_the_threads_of_the_driver(
    monkeypatch: pytest.MonkeyPatch, is_small: bool
) -> None:
    monkeypatch.setattr(module, "are_small", lambda reducers: is_small)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        reduction = Reduction(Counting(), "a")
        assert await reduction.finish(nodes_of(reduction, 0)) == (before + 1, is_small)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


# Progress.


class Worker:
    """Answers the requests of a batch as a test tells it to."""

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


VALUE, FAILED = Outcome("value"), Outcome("failed")


def batch_of(call_id: int = -1) -> Batch:
    calls = tuple((place, Call(place, "abc"[place], "text", pack(None))) for place in range(3))
    return Batch(call_id, pack(Brackets()), 3, calls)


def test_ends_of_calls_are_noted_for_their_reader() -> None:
    progress, error = ReduceProgress(), ValueError("no")
    assert not progress.has_ended.is_set()
    progress.note("a", None)
    progress.note("b", error)
    assert progress.has_ended.is_set()
    assert list(progress.ended) == [("a", None), ("b", error)]
    assert progress.succeeded == {"a"}


def test_end_of_a_repeated_call_counts_in_place_of_the_one_before() -> None:
    progress = ReduceProgress()
    progress.note("a", None)
    progress.note("b", ValueError("no"))
    progress.note("a", ValueError("lost"))
    progress.note("b", None)
    assert progress.succeeded == {"b"}
    assert [client_id for client_id, _ in progress.ended] == ["a", "b", "a", "b"]


async def test_watched_batch_is_asked_for_what_is_not_known_until_its_end() -> None:
    progress, worker, noted = ReduceProgress(is_watched=True), Worker(), []
    task = asyncio.ensure_future(progress.run(worker, batch_of(), lambda *end: noted.append(end)))
    worker.answers.put_nowait(Outcome("item", of_calls=((2, VALUE), (0, FAILED))))
    await settled()
    assert noted == [(2, VALUE), (0, FAILED)]
    worker.answers.put_nowait(Outcome("item", of_calls=((1, VALUE),)))
    last = Outcome("value", pack([]), of_calls=((2, VALUE), (0, FAILED), (1, VALUE)))
    worker.answers.put_nowait(last)
    assert await asyncio.wait_for(task, TIMEOUT_S) is last
    assert noted == [(2, VALUE), (0, FAILED), (1, VALUE)]
    assert worker.log == ["run", "advance 2", "advance 3"]


async def test_batch_that_is_not_watched_has_one_answer() -> None:
    progress, worker = ReduceProgress(), Worker()
    worker.answers.put_nowait(VALUE)
    assert await progress.run(worker, batch_of(), lambda *end: pytest.fail("an end was noted")) is VALUE
    assert worker.log == ["run"]


async def test_stop_cancels_the_batches_that_are_open() -> None:
    progress, workers = ReduceProgress(), [Worker(), Worker("worker2")]
    tasks = [
        asyncio.ensure_future(progress.run(worker, batch_of(-number), lambda *end: None))
        for number, worker in enumerate(workers)
    ]
    workers[1].answers.put_nowait(VALUE)
    await asyncio.wait_for(tasks[1], TIMEOUT_S)
    assert not progress.stopped.is_set()
    progress.stop()
    assert progress.stopped.is_set()
    assert (workers[0].log, workers[1].log) == (["run", "cancel"], ["run"])
    workers[0].answers.put_nowait(VALUE)
    await asyncio.wait_for(tasks[0], TIMEOUT_S)


async def test_workers_are_waited_for_while_their_batches_are_open() -> None:
    progress, workers = ReduceProgress(), [Worker(), Worker("worker2")]
    tasks = [
        asyncio.ensure_future(progress.run(worker, batch_of(-number), lambda *end: None))
        for number, worker in enumerate([*workers, workers[0]])
    ]
    await settled()
    assert progress.waited_for == ["worker1", "worker2"]
    for _ in range(2):
        workers[0].answers.put_nowait(VALUE)
    workers[1].answers.put_nowait(ConnectionError("lost"))
    with pytest.raises(ConnectionError):
        await asyncio.wait_for(tasks[1], TIMEOUT_S)
    await asyncio.gather(tasks[0], tasks[2])
    assert progress.waited_for == []


# Executors that reduce nothing on their workers.


async def test_gathering_reduces_results_and_hands_them_over() -> None:
    reduction, progress = Reduction(Brackets(), "abc"), ReduceProgress()
    gathering = Gathering(reduction, progress)
    for client_id in "cba":
        gathering.add(client_id, "text", client_id.upper())
    assert progress.nodes == []
    gathering.finish()
    assert await reduction.finish(progress.nodes) == "((A+B)+C)"
    assert progress.succeeded == {"a", "b", "c"}


def test_gathering_of_a_result_that_the_reducer_refuses_is_an_error_of_that_call() -> None:
    progress = ReduceProgress()
    gathering = Gathering(Reduction(Failing("add", "value"), "ab"), progress)
    gathering.add("b", "text", "result")
    ((client_id, error),) = progress.ended
    assert client_id == "b"
    assert isinstance(error, ValueError)
    assert error.__notes__ == ["in b.text, as its result was added up"]
    assert progress.succeeded == set()


def test_gathering_raises_what_merging_raises() -> None:
    progress = ReduceProgress()
    gathering = Gathering(Reduction(Failing("merge", "value"), "ab"), progress)
    gathering.add("a", "text", "A")
    gathering.add("b", "text", "B")
    with pytest.raises(MergeError):
        gathering.finish()


# Waiting.


async def failing(error: Exception, release: asyncio.Event) -> None:
    await release.wait()
    raise error


async def test_failure_is_raised_when_all_have_ended() -> None:
    first, second, third = asyncio.Event(), asyncio.Event(), asyncio.Event()
    tasks = [
        asyncio.ensure_future(failing(ValueError("first"), first)),
        asyncio.ensure_future(failing(ValueError("second"), second)),
        asyncio.ensure_future(third.wait()),
    ]
    ended = asyncio.ensure_future(all_ended(tasks))  # type: ignore[arg-type]
    second.set()
    await settled()
    first.set()
    await settled()
    assert not ended.done()
    third.set()
    with pytest.raises(ValueError, match="first"):
        await asyncio.wait_for(ended, TIMEOUT_S)


async def test_tasks_are_cancelled_with_their_caller() -> None:
    release = asyncio.Event()
    tasks = [asyncio.ensure_future(failing(ValueError(""), release)) for _ in range(2)]
    ended = asyncio.ensure_future(all_ended(tasks))
    await settled()
    ended.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ended
    await settled()
    assert all(task.cancelled() for task in tasks)


async def test_nothing_to_wait_for_has_ended() -> None:
    await asyncio.wait_for(all_ended([]), TIMEOUT_S)
