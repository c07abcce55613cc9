"""A batch in its host: results that are added once, ends of calls, and errors that reach the driver."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from summing import Brackets, Failing, Kept, Unopenable

import torchfedrpc as tfr
from torchfedrpc.host.call import Batch, Call, Outcome
from torchfedrpc.reduce.partial import open_nodes
from torchfedrpc.reduce.reducers import Mean
from torchfedrpc.reduce.tree import MergeError, Node, covered
from torchfedrpc.reduce.worker import BatchJob
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.packing import pack

ALLOW = AllowList(["summing"])
VALUE = Outcome("value", pack("a value"))


def batch_job(
    reducer: Any = None, places: tuple[int, ...] = (0, 1, 2, 3), *, is_watched: bool = False, by_value: bool = True
) -> BatchJob:
    calls = tuple((place, Call(place, f"client_{place}", "text", pack(((), {})))) for place in places)
    batch = Batch(-1, pack(reducer or Brackets()), 4, calls, is_watched)
    job = BatchJob(batch, ALLOW, by_value=by_value)
    job.watch(0, lambda outcome: None)
    return job


def sent_nodes(job: BatchJob, reducer: Any) -> list[Node]:
    return open_nodes(job.partial_results(), reducer, ALLOW)


def collected(job: BatchJob) -> list[tuple[str, tuple[int, ...]]]:
    nodes = sent_nodes(job, Brackets())
    return [(reducer.finish(), (*covered(level, index, 4),)) for level, index, reducer in nodes]


def test_batch_of_a_users_reducer_is_not_collected_on_a_thread_that_must_not_wait() -> None:
    of_user, of_ours = batch_job(Brackets()), batch_job(Mean())
    assert (of_user.is_quick, of_ours.is_quick) == (True, True)  # no result has come: no reducer was opened
    of_user.add(0, "0")
    of_ours.add(0, 1.0)
    assert (of_user.is_quick, of_ours.is_quick) == (False, True)


@pytest.mark.parametrize("end", [Outcome("cancelled", never_ran=True), Outcome("failed", cut_off=True)])
def test_batch_with_a_call_that_was_cut_off_is_not_collected_on_a_thread_that_must_not_wait(end: Outcome) -> None:
    job = batch_job(Mean(), places=(0, 1))
    job.add(0, 1.0)
    assert not job.ended(0, VALUE)
    assert job.is_quick
    assert job.ended(1, end)
    assert not job.is_quick


@pytest.mark.parametrize("by_value", [True, False])
def test_partial_results_of_a_builtin_reducer_are_sent_without_a_copy(by_value: bool) -> None:
    result = torch.ones(3)
    job = batch_job(Mean(), by_value=by_value)
    job.add(0, result)
    reducer: Any
    sent: Any
    [forest] = job._forests.values()
    [reducer] = forest._nodes.values()
    address = reducer._entries.total.data_ptr()
    [(_, _, sent)] = sent_nodes(job, Mean())
    assert sent._entries.total.data_ptr() == address != result.data_ptr()


def test_partial_results_of_a_users_reducer_are_copied() -> None:
    """It may have kept what it was given, and the learner may have what it keeps."""
    job = batch_job(Kept())
    job.add(0, torch.ones(3))
    [forest] = job._forests.values()
    [reducer] = forest._nodes.values()
    packed = job.partial_results()
    reducer.results[0].zero_()  # type: ignore[attr-defined]
    [(_, _, sent)] = packed.open(ALLOW)
    assert sent.results[0].tolist() == [1, 1, 1]


def test_partial_results_of_a_batch_without_any_are_empty() -> None:
    assert sent_nodes(batch_job(), Brackets()) == []


def test_partial_results_are_collected_once() -> None:
    job = batch_job()
    for place in (2, 0, 1):
        job.add(place, str(place))
    assert collected(job) == [("(0+1)", (0, 1)), ("2", (2,))]
    assert collected(job) == []
    job.add(3, "3")
    assert collected(job) == [("3", (3,))]


def test_partial_results_leave_the_places_of_other_hosts_open() -> None:
    job = batch_job(places=(1, 2, 3))
    for place in (3, 1, 2):
        job.add(place, str(place))
    assert collected(job) == [("1", (1,)), ("(2+3)", (2, 3))]


def test_partial_results_have_no_place_twice() -> None:
    job = batch_job()
    job.add(1, "1")
    with pytest.raises(ValueError, match="was added before"):
        job.add(1, "1")
    assert collected(job) == [("1", (1,))]


def test_users_reducer_has_results_by_value_unless_isolation_is_off() -> None:
    for by_value in (True, False):
        result = torch.ones(3)
        job = batch_job(Kept(), by_value=by_value)
        job.add(0, result)
        result.zero_()  # the learner goes on
        [(_, _, reducer)] = sent_nodes(job, Kept())
        (kept,) = reducer.finish()
        assert kept.tolist() == ([1, 1, 1] if by_value else [0, 0, 0])


def test_reducer_is_opened_as_a_copy_so_that_a_batch_that_is_sent_again_has_its_own() -> None:
    reducer = Brackets()
    vars(reducer)["weights"] = torch.zeros(3)  # a parcel with tensors can be opened only once
    job = batch_job(reducer)
    job.add(0, "0")
    again = BatchJob(job.batch, ALLOW, by_value=True)
    again.add(1, "1")
    assert collected(again) == [("1", (1,))]


def test_reducer_that_cannot_be_opened_is_an_error_of_each_call_that_needs_it() -> None:
    reducer = Unopenable()
    reducer.pid = os.getpid() + 1
    job = batch_job(reducer)
    for place in (0, 1):
        with pytest.raises(tfr.SerializationError, match="not at home"):
            job.add(place, "0")
    assert sent_nodes(job, Brackets()) == []


@pytest.mark.parametrize(("kind", "expected"), [("value", ValueError), ("unsendable", tfr.RemoteError)])
def test_merge_error_can_travel_whatever_its_reason(kind: str, expected: type[Exception]) -> None:
    job = batch_job(Failing("merge", kind))
    job.add(0, "0")
    for step in (lambda: job.add(1, "1"), job.partial_results):
        with pytest.raises(MergeError) as caught:
            step()
        assert caught.value.places == (0, 1)
        assert type(caught.value.reason) is expected
        assert pack(caught.value).open(AllowList()).places == (0, 1)


# Ends of calls.


def test_end_of_the_last_call_is_the_end_of_the_batch() -> None:
    job = batch_job(places=(0, 1, 2))
    assert [job.ended(place, VALUE) for place in (2, 0, 1)] == [False, False, True]
    assert [place for place, _ in job.outcomes] == [2, 0, 1]


def test_ends_of_calls_are_noted_without_values() -> None:
    job = batch_job(places=(0, 1))
    failed = Outcome("failed", never_ran=True, seconds=0.5)
    job.ended(0, Outcome("value", pack("large"), seconds=0.25))
    job.ended(1, failed)
    assert job.outcomes == [(0, Outcome("value", seconds=0.25)), (1, failed)]


def told(job: BatchJob) -> list[int] | None:
    due = job.next_reply()
    return [place for place, _ in due[1].of_calls] if due is not None else None


def test_watched_batch_tells_the_ends_that_the_driver_does_not_know() -> None:
    job = batch_job(is_watched=True)
    assert told(job) is None
    job.ended(2, VALUE)
    job.ended(0, VALUE)
    due = job.next_reply()
    assert due is not None
    assert not due[1].is_final
    assert [place for place, _ in due[1].of_calls] == [2, 0]
    job.ended(3, VALUE)
    assert told(job) is None  # no request waits
    job.watch(2, lambda outcome: None)
    assert told(job) == [3]
    job.watch(3, lambda outcome: None)
    assert told(job) is None


def test_watched_batch_repeats_ends_to_a_driver_that_has_missed_them() -> None:
    job = batch_job(is_watched=True)
    job.ended(2, VALUE)
    assert told(job) == [2]
    job.watch(0, lambda outcome: None)  # the world ended before the answer came
    assert told(job) == [2]


def test_batch_that_is_not_watched_tells_no_ends() -> None:
    job = batch_job()
    job.ended(2, VALUE)
    assert told(job) is None
    assert job.reply is not None  # it waits for the partial results
