"""A worker's entry points: what counts as its driver's request, and what becomes of one of another form."""

from __future__ import annotations

import hmac
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from learners import Probe

import torchfedrpc as tfr
from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import SerializationError
from torchfedrpc.host.call import Batch, Call
from torchfedrpc.host.learner_host import LearnerHost
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.reduce.partial import open_nodes
from torchfedrpc.reduce.tree import covered
from torchfedrpc.rpc import endpoint
from torchfedrpc.rpc.endpoint import Endpoint, InOrder
from torchfedrpc.rpc.message import batch_message, call_message, parcel_message, read_outcome
from torchfedrpc.wire.packing import pack

TIMEOUT_S = 20.0
SECRET = bytes(range(32))
NOTHING = frozenset[torch.device]()


class Registered:
    """Stands for `OwnedRRefs`, which needs an agent of torch RPC."""

    def __init__(self) -> None:
        self.learners: dict[str, Any] = {}

    def own(self, client_id: str, learner: Any) -> None:
        self.learners[client_id] = learner

    def of(self, client_id: str) -> Any:
        return self.learners.get(client_id)

    def untold(self) -> list[tuple[str, str]]:
        return [(client_id, "an RRef") for client_id in self.learners]

    def give_up(self, client_id: str) -> None:
        self.learners.pop(client_id, None)

    def close(self) -> None:
        self.learners.clear()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[LearnerHost]:
    """The host of a worker that is in a world."""
    monkeypatch.setattr(endpoint, "OwnedRRefs", Registered)
    serving = Endpoint(torch.device("cpu"))
    serving.host = host = LearnerHost(LearnerSpec.of(Probe, 0, RuntimeConfig())[0])
    serving.connect(SECRET, NOTHING)
    endpoint.serving = serving
    yield host
    endpoint.serving = None
    serving.disconnect()
    assert host.close()


def served(number: int, *items: Any, secret: bytes = SECRET) -> Any:
    """The answer to a request."""
    future, answered = endpoint.serve((secret, number, 0, (), None), items), threading.Event()
    future.add_done_callback(lambda _: answered.set())
    assert answered.wait(TIMEOUT_S), "the request has no answer"
    return future.value()


def passed_over(number: Any, *items: Any, secret: Any) -> bool:
    """Whether a request is answered at once, with nothing."""
    future = endpoint.serve((secret, number, 0, (), None), items)
    return bool(future.done()) and future.value() is None


def call(question: int, call_id: int) -> Any:
    return "submit", question, call_message(Call(call_id, "a", "same", pack(((1,), {}))), NOTHING)


ARGUMENTS = parcel_message(pack(((), {})), NOTHING)
REGISTER = ("register", "a", parcel_message(pack({}), NOTHING), 0)


def test_a_request_with_the_secret_is_answered(host: LearnerHost) -> None:
    _, [(question, (flags, failure, *_))], rrefs = served(0, REGISTER, call(7, 1))
    assert rrefs == [("a", "an RRef")]
    assert (question, flags[0], failure) == (7, "value", None)


@pytest.mark.parametrize("secret", [bytes(32), b"", SECRET[:-1], SECRET + b"\0", SECRET.hex(), None, 1, [SECRET]])
def test_a_request_without_the_secret_is_nothing_and_uses_up_no_number(host: LearnerHost, secret: Any) -> None:
    assert passed_over(0, REGISTER, secret=secret)
    assert endpoint.acknowledge((secret, 0, 0, (1,), None)) is None
    assert not host._mailboxes
    assert served(0, REGISTER, call(7, 1)) is not None


def test_the_secret_is_compared_in_constant_time_before_the_rest_is_looked_at(
    host: LearnerHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []

    def compare(given: bytes, expected: bytes) -> bool:
        compared.append((given, expected))
        return False

    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert passed_over(None, 3, secret=b"x")
    assert compared == [(b"x", SECRET)]


def test_another_world_has_another_secret(host: LearnerHost) -> None:
    assert endpoint.serving is not None
    endpoint.serving.disconnect()
    assert passed_over(0, REGISTER, secret=SECRET)
    endpoint.serving.connect(b"2" * 32, NOTHING)
    assert passed_over(0, REGISTER, secret=SECRET)


@pytest.mark.parametrize(
    "header",
    [
        (SECRET,),
        (SECRET, "0", 0, (), None),
        (SECRET, 0, 0, [], None),
        (SECRET, 0, 0, ([],), None),
        (SECRET, 0, 0, (), "x"),
        (SECRET, -1, 0, (), None),
        (SECRET, 1 << 40, 0, (), None),
    ],
)
def test_a_header_of_another_form_is_an_error_and_the_next_request_is_served(host: LearnerHost, header: Any) -> None:
    entries = endpoint.serve, endpoint.acknowledge, endpoint.rref
    for entry in (lambda: entries[0](header, []), lambda: entries[1](header), lambda: entries[2](header, "a")):
        with pytest.raises(SerializationError):
            entry()
    assert served(0, REGISTER, call(7, 1)) is not None


def test_an_rref_is_given_in_its_turn_behind_the_request_that_registers_the_learner(host: LearnerHost) -> None:
    early = endpoint.rref((SECRET, 1, 0, (), None), "a")
    assert not early.done()
    endpoint.serve((SECRET, 0, 0, (), None), [REGISTER])
    assert early.wait() is host.mailbox("a")
    assert endpoint.rref((SECRET, 2, 0, (), None), "b").wait() is None
    with pytest.raises(SerializationError, match="a client's id is a string"):
        endpoint.rref((SECRET, 3, 0, (), None), ["a"])
    assert endpoint.rref((b"2" * 32, 3, 0, (), None), "a").value() is None
    endpoint.serve((SECRET, 3, 0, (), None), [("forget", "a")])
    assert endpoint.rref((SECRET, 4, 0, (), None), "a").wait() is None


@pytest.mark.parametrize(
    "item",
    [
        None,
        (),
        "text",
        ("unknown",),
        ([],),
        ("submit",),
        ("submit", "7", None),
        ("register", "a"),
        ("register", [], parcel_message(pack({}), NOTHING), 0),
        ("share", [], None, 1),
        ("unshare", []),
        ("batch",),
        ("batch", "7", None),
        ("cancel_batch",),
        ("cancel_batch", []),
        ("forget", []),
        ("share_files", 1, ("x", [], [(0, 0, 0, 0, 0)], 0), None),
    ],
)
def test_an_item_that_cannot_be_read_is_left_out_and_the_others_are_done(host: LearnerHost, item: Any) -> None:
    _, answers, _ = served(0, item, REGISTER, call(7, 1))
    assert [(question, outcome[0][0]) for question, outcome in answers] == [(7, "value")]
    assert served(1, call(8, 2)) is not None


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        (None,),
        (((1, "a", "same", None, "call"), None, ()),),
        (((1, 2, "same", None, "call"), ARGUMENTS, ()),),
        (((1, "a", "same", "0", "call"), ARGUMENTS, ()),),
        (((1, "a", "same", None, "kind"), ARGUMENTS, ()),),
        (((1, "a", "same", None, "call", None), ARGUMENTS, ()),),
        (((1, "a", "same", None, "call"), ARGUMENTS, ([],)),),
        (((1, "nobody", "same", None, "call"), ARGUMENTS, ()),),
    ],
)
def test_a_question_that_cannot_be_read_is_answered_with_that(host: LearnerHost, arguments: Any) -> None:
    _, [(question, (flags, failure, *_))], _ = served(0, REGISTER, ("submit", 7, *arguments))
    assert (question, flags[0]) == (7, "failed")
    assert failure
    assert served(1, call(8, 2)) is not None


def batch(question: int, batch_id: int, *calls: Call, **fields: Any) -> Any:
    of_places = tuple((int(call.client_id == "b"), call) for call in calls)
    return "batch", question, batch_message(Batch(batch_id, pack(tfr.Sum()), 2, of_places, **fields), NOTHING)


def echo(call_id: int, client_id: str, value: float) -> Call:
    return Call(call_id, client_id, "same", pack(((value,), {})))


def opened_nodes(host: LearnerHost, message: Any) -> list[tuple[Any, tuple[int, ...]]]:
    parcel = read_outcome(message, None).parcel
    assert parcel is not None
    nodes = open_nodes(parcel, tfr.Sum(), host.allow)
    return [(reducer.finish(), (*covered(level, index, 2),)) for level, index, reducer in nodes]


def test_batch_is_answered_with_partial_results_and_the_ends_of_its_calls(host: LearnerHost) -> None:
    other = ("register", "b", parcel_message(pack({}), NOTHING), 0)
    _, [(question, message)], _ = served(0, REGISTER, other, batch(7, -1, echo(1, "a", 2.0), echo(2, "b", 3.0)))
    assert question == 7
    assert opened_nodes(host, message) == [(5.0, (0, 1))]
    ended = {place: outcome.kind for place, outcome in read_outcome(message, None).of_calls}
    assert ended == {0: "value", 1: "value"}


def test_batch_that_is_repeated_has_the_first_outcome_until_it_is_acknowledged(host: LearnerHost) -> None:
    _, [(_, message)], _ = served(0, REGISTER, batch(7, -1, echo(1, "a", 2.0)))
    _, [(question, again)], _ = served(1, batch(8, -1, echo(1, "a", 3.0)))
    assert question == 8
    assert opened_nodes(host, again) == opened_nodes(host, message) == [(2.0, (0,))]
    endpoint.acknowledge((SECRET, 2, 0, (-1,), None))
    _, [(_, anew)], _ = served(3, batch(9, -1, echo(1, "a", 3.0)))
    assert opened_nodes(host, anew) == [(3.0, (0,))]


def test_batch_that_is_watched_answers_for_each_call_and_then_with_partial_results(host: LearnerHost) -> None:
    _, [(_, first)], _ = served(0, REGISTER, batch(7, -1, echo(1, "a", 2.0), is_watched=True))
    outcome = read_outcome(first, None)
    assert (outcome.kind, [place for place, _ in outcome.of_calls], outcome.parcel) == ("item", [0], None)
    _, [(question, last)], _ = served(1, ("advance", 8, -1, 1))
    assert (question, read_outcome(last, None).is_final) == (8, True)
    assert opened_nodes(host, last) == [(2.0, (0,))]


def test_batch_that_is_cancelled_answers_with_the_results_that_were_there(host: LearnerHost, latch: Any) -> None:
    other = ("register", "b", parcel_message(pack({}), NOTHING), 0)
    holding = "submit", 6, call_message(Call(1, "a", "hold_async", pack(((latch.path,), {}))), NOTHING)
    of_both = batch(7, -1, echo(2, "a", 2.0), echo(3, "b", 3.0), is_watched=True)
    _, [(question, first)], _ = served(0, REGISTER, other, holding, of_both)
    assert (question, [place for place, _ in read_outcome(first, None).of_calls]) == (7, [1])
    _, [(question, last)], _ = served(1, ("cancel_batch", -1), ("advance", 8, -1, 2))
    outcome = read_outcome(last, None)
    assert (question, outcome.is_final) == (8, True)
    assert opened_nodes(host, last) == [(3.0, (1,))]
    ended = {place: (of_call.kind, of_call.never_ran) for place, of_call in outcome.of_calls}
    assert ended == {0: ("cancelled", True), 1: ("value", False)}


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        (None,),
        (batch_message(Batch(-1, pack(tfr.Sum()), 1, ((1, echo(1, "a", 2.0)),)), NOTHING),),
        (batch_message(Batch(-1, pack(tfr.Sum()), 1, ((0, echo(1, "nobody", 2.0)),)), NOTHING),),
    ],
)
def test_batch_that_cannot_be_read_is_answered_with_that(host: LearnerHost, arguments: Any) -> None:
    _, [(question, (flags, failure, *_))], _ = served(0, REGISTER, ("batch", 7, *arguments))
    assert (question, flags[0]) == (7, "failed")
    assert failure
    assert served(1, call(8, 2)) is not None


def test_a_number_has_one_turn() -> None:
    requests, done = InOrder(), []
    requests.put(0, lambda: done.append(0))
    requests.put(2, lambda: done.append(2))
    for number in (0, 2, -1, 1 << 20):
        with pytest.raises(SerializationError, match=f"request {number} cannot follow, number 1 is the next"):
            requests.check(number)
    requests.check(1)
    assert done == [0]
