"""Calls that a host gives back before they begin: none runs here, and none that has begun is given."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace

import pytest

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.host.call import Batch, Call, CallKind, Outcome, Registration, TakeBack
from torchfedrpc.host.learner_host import LearnerHost
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.reduce.partial import pack_reducer
from torchfedrpc.reduce.reducers import Sum
from torchfedrpc.wire.packing import pack

TIMEOUT_S = 20.0
CLIENTS = [f"client_{number}" for number in range(6)]
opened = threading.Event()
ran: list[str] = []


class Waiting:
    """Waits in its calls until `opened` is set."""

    stateless = True

    def __init__(self, client_id: str) -> None:
        self.client_id = client_id

    def wait(self) -> int:
        ran.append(self.client_id)
        assert opened.wait(TIMEOUT_S)
        return 1


@pytest.fixture
def host() -> Iterator[LearnerHost]:
    host = LearnerHost(LearnerSpec.of(Waiting, 0, RuntimeConfig())[0])
    for client_id in CLIENTS:
        host.register(Registration(client_id, pack({}), 1))
    ran.clear()
    yield host
    opened.set()
    assert host.close()
    opened.clear()


def call(number: int, client_id: str | None = None) -> Call:
    return Call(number, client_id or CLIENTS[number], "wait", pack(((), {})), number=0)


def submitted(host: LearnerHost, *numbers: int) -> dict[int, Future[Outcome]]:
    outcomes: dict[int, Future[Outcome]] = {number: Future() for number in numbers}
    for number, outcome in outcomes.items():
        host.submit(call(number), outcome.set_result)
    wait_until_running()
    return outcomes


def wait_until_running() -> None:
    for _ in range(2000):
        if ran:
            return
        threading.Event().wait(0.005)
    pytest.fail("no call has begun")


def taken(host: LearnerHost, *candidates: int, call_id: int = 100, half: bool = True) -> list[int]:
    answer: Future[Outcome] = Future()
    host.take_back(TakeBack(call_id, candidates, half), answer.set_result)
    outcome = answer.result(TIMEOUT_S)
    assert outcome.kind == "value"
    return [number for number, _ in outcome.of_calls]


def test_the_second_half_of_what_has_not_begun_is_given_back(host: LearnerHost) -> None:
    outcomes = submitted(host, 0, 1, 2, 3, 4)
    assert taken(host, 0, 1, 2, 3, 4) == [3, 4]
    for number in (3, 4):
        assert outcomes[number].result(TIMEOUT_S) == Outcome("given_back", never_ran=True)
    opened.set()
    assert [outcomes[number].result(TIMEOUT_S).kind for number in (0, 1, 2)] == ["value"] * 3
    assert ran == CLIENTS[:3]


def test_all_that_has_not_begun_is_given_back_on_request(host: LearnerHost) -> None:
    outcomes = submitted(host, 0, 1, 2)
    assert taken(host, 0, 1, 2, half=False) == [1, 2]
    opened.set()
    assert outcomes[0].result(TIMEOUT_S).kind == "value"
    assert ran == CLIENTS[:1]


def test_a_repeated_request_has_the_same_answer(host: LearnerHost) -> None:
    submitted(host, 0, 1, 2, 3, 4)
    assert taken(host, 0, 1, 2, 3, 4, call_id=7) == [3, 4]
    assert taken(host, 0, 1, 2, 3, 4, call_id=7) == [3, 4]
    host.acknowledge([7])
    assert taken(host, 0, 1, 2, 3, 4, call_id=7) == [2]


def test_calls_that_are_not_here_are_ignored(host: LearnerHost) -> None:
    submitted(host, 0, 1)
    assert taken(host, 55, 1, 77, half=False) == [1]


def test_a_call_that_was_given_back_may_come_again(host: LearnerHost) -> None:
    submitted(host, 0, 1)
    assert taken(host, 1, half=False) == [1]
    again: Future[Outcome] = Future()
    host.submit(call(1), again.set_result)
    assert again.result(TIMEOUT_S).kind == "given_back"  # its first outcome, which was not acknowledged
    host.acknowledge([1])
    again = Future()
    host.submit(call(1), again.set_result)
    opened.set()
    assert again.result(TIMEOUT_S).kind == "value"
    assert ran == CLIENTS[:2]


def test_the_next_call_of_a_learner_begins_in_place_of_one_that_was_given_back(host: LearnerHost) -> None:
    submitted(host, 0, 1)
    following: Future[Outcome] = Future()
    host.submit(call(9, CLIENTS[1]), following.set_result)
    assert taken(host, 1, half=False) == [1]
    opened.set()
    assert following.result(TIMEOUT_S).kind == "value"
    assert ran == CLIENTS[:2]


def test_a_call_behind_another_of_its_learner_is_given_back(host: LearnerHost) -> None:
    first = submitted(host, 0)
    behind: Future[Outcome] = Future()
    host.submit(call(9, CLIENTS[0]), behind.set_result)
    assert taken(host, 9, half=False) == [9]
    assert behind.result(TIMEOUT_S).kind == "given_back"
    opened.set()
    assert first[0].result(TIMEOUT_S).kind == "value"
    assert ran == CLIENTS[:1]


@pytest.mark.parametrize("is_watched", [True, False])
def test_a_batch_ends_with_the_outcomes_of_those_that_were_given_back(host: LearnerHost, is_watched: bool) -> None:
    calls = tuple((place, call(place)) for place in range(4))
    batch = Batch(50, pack_reducer(Sum()), 4, calls, is_watched)
    answer: Future[Outcome] = Future()
    host.run_batch(batch, answer.set_result)
    wait_until_running()
    assert taken(host, 0, 1, 2, 3) == [2, 3]
    if is_watched:
        outcome = answer.result(TIMEOUT_S)
        assert (outcome.kind, [(place, one.kind) for place, one in outcome.of_calls]) == (
            "item",
            [(2, "given_back")],
        )
        answer = Future()
        opened.set()
        kinds: dict[int, str] = {2: "given_back"}
        while True:
            host.advance(50, len(kinds), answer.set_result)
            outcome = answer.result(TIMEOUT_S)
            kinds |= {place: one.kind for place, one in outcome.of_calls}
            if outcome.is_final:
                break
            answer = Future()
    else:
        opened.set()
        outcome = answer.result(TIMEOUT_S)
        kinds = {place: one.kind for place, one in outcome.of_calls}
    assert kinds == {0: "value", 1: "value", 2: "given_back", 3: "given_back"}
    assert ran == CLIENTS[:2]


def test_a_batch_of_which_all_is_given_back_ends_without_results(host: LearnerHost) -> None:
    submitted(host, 0)
    answer: Future[Outcome] = Future()
    calls = tuple((place, call(place + 1)) for place in range(3))
    host.run_batch(Batch(50, pack_reducer(Sum()), 3, calls), answer.set_result)
    assert taken(host, 1, 2, 3, half=False) == [1, 2, 3]
    outcome = answer.result(TIMEOUT_S)
    assert [one.kind for _, one in outcome.of_calls] == ["given_back"] * 3
    assert outcome.parcel is not None
    assert ran == CLIENTS[:1]


@pytest.mark.parametrize("kind", ["call", "stream"])
def test_a_call_that_is_cancelled_as_it_waits_for_a_thread_never_ran_and_holds_up_no_other(
    host: LearnerHost, kind: CallKind
) -> None:
    submitted(host, 0)
    waiting: Future[Outcome] = Future()
    behind: Future[Outcome] = Future()
    host.submit(replace(call(1), kind=kind), waiting.set_result)
    host.submit(replace(call(9, CLIENTS[1]), kind="barrier"), behind.set_result)
    cancelled: Future[Outcome] = Future()
    host.cancel(1, cancelled.set_result)
    for outcome in (waiting.result(TIMEOUT_S), cancelled.result(TIMEOUT_S)):
        assert (outcome.kind, outcome.never_ran, outcome.cut_off) == ("cancelled", True, False)
    opened.set()
    assert behind.result(TIMEOUT_S).kind == "value"
    assert ran == CLIENTS[:1]


def test_calls_of_a_batch_that_are_cancelled_as_they_wait_never_ran(host: LearnerHost) -> None:
    answer: Future[Outcome] = Future()
    calls = tuple((place, call(place)) for place in range(3))
    host.run_batch(Batch(50, pack_reducer(Sum()), 3, calls), answer.set_result)
    wait_until_running()
    host.cancel(50)
    ends = dict(answer.result(TIMEOUT_S).of_calls)
    assert [ends[place].cut_off for place in range(3)] == [True, False, False]
    assert [ends[place].never_ran for place in range(3)] == [False, True, True]


def test_a_barrier_is_never_given_back(host: LearnerHost) -> None:
    submitted(host, 0)
    barrier: Future[Outcome] = Future()
    host.submit(replace(call(1, CLIENTS[0]), kind="barrier"), barrier.set_result)
    assert taken(host, 1, half=False) == []
    assert not barrier.done()
    opened.set()
    assert barrier.result(TIMEOUT_S).kind == "value"


def test_a_batch_that_is_asked_for_again_needs_no_learners_that_were_forgotten(host: LearnerHost) -> None:
    submitted(host, 0)
    batch = Batch(50, pack_reducer(Sum()), 2, ((0, call(1)), (1, call(2))))
    first: Future[Outcome] = Future()
    again: Future[Outcome] = Future()
    host.run_batch(batch, first.set_result)
    assert taken(host, 2, half=False) == [2]
    host.forget(CLIENTS[2])
    host.run_batch(batch, again.set_result)
    opened.set()
    assert [one.kind for _, one in again.result(TIMEOUT_S).of_calls] == ["given_back", "value"]
