"""What a worker has to tell in one world: as much as is there for each request, and nothing twice or out of order."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import torch

from torchfedrpc.host.call import Call, Outcome
from torchfedrpc.rpc.message import read_outcome, read_report
from torchfedrpc.rpc.response_queue import Answers, Reported
from torchfedrpc.rpc.rrefs import OwnedRRefs
from torchfedrpc.wire.packing import pack

CPU = torch.device("cpu")


def answers(unheard: list[Reported] | None = None) -> Answers:
    return Answers(CPU, frozenset(), OwnedRRefs(), unheard or [])


def outcome(value: Any) -> Outcome:
    return Outcome("value", pack(value))


def reported(number: int) -> Reported:
    return Call(7, "client_1", "train", pack(None)), number, pack(number)


def told(future: Any) -> tuple[int, list[int | str | None]]:
    """Number of an answer, and what is in it: the questions' numbers, and of reports ``report N``."""
    assert future.done()
    number, parts, _ = future.value()
    return number, [f"report {read_report(part)[1]}" if question is None else question for question, part in parts]


def test_a_request_is_answered_once_there_is_something_to_tell() -> None:
    ours = answers()
    request = ours.request()
    assert not request.done()
    ours.outcome(5, outcome("five"))
    assert told(request) == (0, [5])


def test_what_came_meanwhile_goes_with_the_next_request_all_together() -> None:
    ours = answers()
    first = ours.request()
    for question in range(4):
        ours.outcome(question, outcome(question))
    assert told(first) == (0, [0])
    assert told(ours.request()) == (1, [1, 2, 3])


def test_requests_that_wait_are_answered_one_after_another() -> None:
    ours = answers()
    first, second = ours.request(), ours.request()
    ours.outcome(0, outcome(0))
    assert told(first) == (0, [0])
    assert not second.done()
    ours.outcome(1, outcome(1))
    assert told(second) == (1, [1])


def test_large_outcomes_do_not_share_a_message() -> None:
    ours = answers()
    for question in range(3):
        ours.outcome(question, outcome(torch.zeros(1 << 19)))
    assert [told(ours.request())[1] for _ in range(3)] == [[0], [1], [2]]


def test_reports_keep_their_place_before_the_outcome() -> None:
    ours = answers()
    ours.report(reported(0))
    ours.report(reported(1))
    ours.outcome(3, outcome(None))
    assert told(ours.request()) == (0, ["report 0", "report 1", 3])


def test_a_question_that_goes_alone_is_answered_alone_behind_what_was_reported_before() -> None:
    ours = answers()
    alone = ours.request(alone=3)
    ours.report(reported(0))
    ours.outcome(3, outcome(None))
    ours.outcome(4, outcome(None))
    assert not alone.done()  # its report comes first, and needs a request
    first = ours.request()
    assert told(first) == (0, ["report 0"])
    assert told(alone) == (1, [3])
    assert told(ours.request()) == (2, [4])


def test_a_closed_one_gives_reports_that_were_not_heard_and_leaves_no_future_behind() -> None:
    ours = answers([reported(0)])
    ours.report(reported(1))
    assert told(ours.request()) == (0, ["report 0", "report 1"])
    ours.report(reported(2))
    assert told(ours.request()) == (1, ["report 2"])
    ours.heard(1)  # the first message arrived
    waiting, alone = ours.request(), ours.request(alone=9)
    assert [number for _, number, _ in ours.close()] == [2]
    assert waiting.value() is None
    assert alone.value() is None
    assert ours.request().value() is None
    ours.outcome(9, outcome(None))  # in vain


def test_each_outcome_is_told_once_whichever_threads_come_together() -> None:
    ours, requests, num_each = answers(), [], 300

    def answer(first: int) -> None:
        for question in range(first, first + num_each):
            ours.outcome(question, outcome(None))

    def ask() -> None:
        for _ in range(num_each):
            requests.append(ours.request())

    threads = [threading.Thread(target=answer, args=(index * num_each,)) for index in range(3)]
    threads += [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    while (
        len(questions := [one for request in requests if request.done() for one in told(request)[1]]) < 3 * num_each
    ):
        requests.append(ours.request())
        assert requests[-1].done()
    assert Counter(questions) == Counter(range(3 * num_each))
    numbers = [told(request)[0] for request in requests if request.done()]
    assert sorted(numbers) == list(range(len(numbers)))


def test_an_outcome_is_read_as_it_was() -> None:
    ours = answers()
    ours.outcome(0, Outcome("cancelled", never_ran=True))
    _, [(_, message)], _ = ours.request().value()
    assert read_outcome(message, None) == Outcome("cancelled", never_ran=True)
