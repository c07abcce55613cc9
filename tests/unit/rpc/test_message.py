"""Parcels as what RPC carries."""

from __future__ import annotations

import os
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from torchfedrpc.errors import SerializationError
from torchfedrpc.host.call import Batch, Call, Outcome
from torchfedrpc.rpc.message import (
    batch_message,
    call_message,
    outcome_message,
    parcel_message,
    read_batch,
    read_outcome,
    read_parcel,
    read_report,
)
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.exceptions import Failure
from torchfedrpc.wire.packing import Packed, Parcel, pack
from torchfedrpc.wire.shared import SharedValue

ALLOW = AllowList()
CPU = torch.device("cpu")
NOTHING = frozenset[torch.device]()


def test_a_parcel_that_has_arrived_takes_its_memory_from_the_message() -> None:
    message = parcel_message(pack(torch.arange(3)), frozenset())
    parcel = read_parcel(message, None)
    assert isinstance(parcel, Parcel)
    opened = parcel.open(AllowList())
    assert opened.tolist() == [0, 1, 2]
    memory = weakref.ref(opened.untyped_storage())
    del opened
    assert memory() is None
    assert len(message[2]) == 1  # RPC's threads hold it for a while


_FLAGS = ("value", False, False, 0.1, False, (1.0, 2.0, 3.0))


@pytest.mark.parametrize(
    "message",
    [
        None,
        (),
        (_FLAGS, None, None),
        (("other", *_FLAGS[1:]), None, None, []),
        ((["value"], *_FLAGS[1:]), None, None, []),
        (("value", 0, False, 0.1, False, None), None, None, []),
        (("value", False, False, "0.1", False, None), None, None, []),
        (("value", False, False, float("nan"), False, None), None, None, []),
        (("value", False, False, float("inf"), False, None), None, None, []),
        ((*_FLAGS[:5], (1.0, 2.0)), None, None, []),
        ((*_FLAGS[:5], [1.0, 2.0, 3.0]), None, None, []),
        ((*_FLAGS[:5], (1.0, 2, 3.0)), None, None, []),
        ((*_FLAGS[:5], (1.0, float("nan"), 3.0)), None, None, []),
        ((*_FLAGS[:5], 1.0), None, None, []),
        (_FLAGS, ("ValueError",), None, []),
        (_FLAGS, (1, "text", "", None), None, []),
        (_FLAGS, ("ValueError", "text", "", "body"), None, []),
        (_FLAGS, [], None, []),
        ((*_FLAGS[:4], True, None), None, None, []),
        ((*_FLAGS[:4], True, None), None, (b"", [], 5), []),
        ((*_FLAGS[:4], True, None), None, (b"", [], [["../../mem", 1, 1, 1, []]]), []),
        ((*_FLAGS[:4], True, None), None, (b"", [], [[0, 1, 1]]), []),
        (_FLAGS, None, None, None),
        (_FLAGS, None, None, (0,)),
        (_FLAGS, None, None, [None]),
        (_FLAGS, None, None, [(0, None)]),
        (_FLAGS, None, None, [("0", (_FLAGS, None, None, []))]),
        (_FLAGS, None, None, [(0, (_FLAGS, None, (b"", [], [], None), []))]),
        (_FLAGS, None, None, [(0, (_FLAGS, None, None, [(1, (_FLAGS, None, None, []))]))]),
    ],
)
def test_an_answer_of_another_form_is_an_error_of_ours(message: Any) -> None:
    with pytest.raises(SerializationError):
        read_outcome(message, None, os.getpid())


@pytest.mark.parametrize(
    "message",
    [None, (), (1, "a", "b", 0, None), (1, 2, "b", 0, ()), ("1", "a", "b", 0, ()), (1, "a", "b", "0", ()), [1] * 5],
)
def test_a_report_of_another_form_is_an_error_of_ours(message: Any) -> None:
    with pytest.raises(SerializationError):
        read_report(message)


# Batches.


def batch_of(*calls: Call, **fields: Any) -> Batch:
    return Batch(-9, pack("reducer"), 4, tuple((place, call) for place, call in enumerate(calls, 1)), **fields)


def opened(parcel: Packed) -> Any:
    return parcel.open(ALLOW)


def test_batch_arrives_as_it_was_sent() -> None:
    sent = batch_of(
        Call(1, "a", "train", pack(((1,), {"x": 2})), 2.5),
        Call(2, "b", "train", pack(((torch.arange(3),), {}))),
        is_watched=True,
        timeout_s=3,
    )
    batch, numbers = read_batch(batch_message(sent, NOTHING), CPU)
    assert (batch.call_id, batch.num_places, batch.is_watched, batch.timeout_s) == (-9, 4, True, 3.0)
    assert opened(batch.prototype) == "reducer"
    assert numbers == [(), ()]
    (first_place, first), (second_place, second) = batch.calls
    assert (first_place, second_place) == (1, 2)
    assert (first.call_id, first.client_id, first.method, first.run_timeout_s) == (1, "a", "train", 2.5)
    assert opened(first.arguments) == ((1,), {"x": 2})
    assert (second.call_id, second.client_id, second.run_timeout_s) == (2, "b", None)
    assert opened(second.arguments)[0][0].tolist() == [0, 1, 2]


def test_batch_names_the_shared_values_of_each_of_its_calls() -> None:
    shared = [SharedValue(pack(number), number) for number in (5, 6)]
    calls = [
        Call(1, "a", "train", pack(((shared[0], shared[1]), {}), may_refer=True)),
        Call(2, "b", "train", pack(((), {}))),
        Call(3, "c", "train", pack(((shared[1],), {}), may_refer=True)),
    ]
    _, numbers = read_batch(batch_message(batch_of(*calls), NOTHING), CPU)
    assert numbers == [(5, 6), (), (6,)]


def test_timeouts_of_numpy_travel_as_plain_numbers() -> None:
    batch = batch_of(Call(1, "a", "train", pack(None), np.float64(2.5)), timeout_s=np.float64(3.5))
    fields, _, _, _, [(_, (of_call, _, _))] = batch_message(batch, NOTHING)
    assert (type(fields[3]), type(of_call[3])) == (float, float)


ARGUMENTS = parcel_message(pack(((), {})), NOTHING)
PROTOTYPE = parcel_message(pack("reducer"), NOTHING)
GOOD = call_message(Call(1, "a", "train", pack(((), {}))), NOTHING)


@pytest.mark.parametrize(
    "message",
    [
        None,
        (),
        ((1, 4, False, None), PROTOTYPE),
        ((1, 4, False), PROTOTYPE, ARGUMENTS, (), []),
        (("1", 4, False, None), PROTOTYPE, ARGUMENTS, (), []),
        ((1, "4", False, None), PROTOTYPE, ARGUMENTS, (), []),
        ((1, 4, 0, None), PROTOTYPE, ARGUMENTS, (), []),
        ((1, 4, False, "3"), PROTOTYPE, ARGUMENTS, (), []),
        ((1, 4, False, None), None, ARGUMENTS, (), []),
        ((1, 4, False, None), PROTOTYPE, None, (), []),
        ((1, 4, False, None), PROTOTYPE, ARGUMENTS, (), None),
        ((1, 4, False, None), PROTOTYPE, ARGUMENTS, (), [GOOD]),
        ((1, 4, False, None), PROTOTYPE, ARGUMENTS, (), [("0", GOOD)]),
        ((1, 4, False, None), PROTOTYPE, ARGUMENTS, (), [(-1, GOOD)]),
        ((1, 4, False, None), PROTOTYPE, ARGUMENTS, (), [(4, GOOD)]),
        ((1, 4, False, None), PROTOTYPE, ARGUMENTS, (), [(0, None)]),
        ((1, 4, False, None), PROTOTYPE, ARGUMENTS, (), [(0, GOOD), (1, GOOD[:2])]),
        ((1, 4, False, None), PROTOTYPE, ARGUMENTS, None, [(0, GOOD)]),
        ((1, 4, False, None), PROTOTYPE, ARGUMENTS, ("5",), [(0, GOOD)]),
        ((1, 4, False, None), PROTOTYPE, ARGUMENTS, (), [(0, (GOOD[0], None, ()))]),
        ((1, 4, False, None), PROTOTYPE, ARGUMENTS, (), [(0, (GOOD[0], ARGUMENTS, None))]),
        ((1, 4, False, None), PROTOTYPE, ARGUMENTS, (), [(0, (GOOD[0], ARGUMENTS, ("5",)))]),
    ],
)
def test_batch_of_another_form_is_an_error_of_ours(message: Any) -> None:
    read_batch(((1, 4, False, None), PROTOTYPE, ARGUMENTS, (), [(0, GOOD)]), CPU)
    with pytest.raises(SerializationError):
        read_batch(message, CPU)


def test_outcome_of_a_batch_has_the_outcomes_of_its_calls() -> None:
    ended = (
        (2, Outcome("value", seconds=0.5)),
        (0, Outcome("failed", failure=Failure.capture(ValueError("no")), never_ran=True)),
        (1, Outcome("cancelled", cut_off=True)),
    )
    sent = Outcome("value", pack("sum"), of_calls=ended)
    outcome = read_outcome(outcome_message(sent, NOTHING), None)
    assert outcome.of_calls == ended
    assert outcome.parcel is not None
    assert opened(outcome.parcel) == "sum"
