"""Parcels as what RPC carries."""

from __future__ import annotations

import os
import weakref
from typing import Any

import pytest
import torch

from torchfedrpc.errors import SerializationError
from torchfedrpc.rpc.message import parcel_message, read_outcome, read_parcel, read_report
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.packing import Parcel, pack


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


_FLAGS = ("value", False, False, 0.1, False)


@pytest.mark.parametrize(
    "message",
    [
        None,
        (),
        (_FLAGS, None),
        (("other", *_FLAGS[1:]), None, None),
        ((["value"], *_FLAGS[1:]), None, None),
        (("value", 0, False, 0.1, False), None, None),
        (("value", False, False, "0.1", False), None, None),
        (("value", False, False, float("nan"), False), None, None),
        (("value", False, False, float("inf"), False), None, None),
        (_FLAGS, ("ValueError",), None),
        (_FLAGS, (1, "text", "", None), None),
        (_FLAGS, ("ValueError", "text", "", "body"), None),
        (_FLAGS, [], None),
        ((*_FLAGS[:4], True), None, None),
        ((*_FLAGS[:4], True), None, (b"", [], 5, 0)),
        ((*_FLAGS[:4], True), None, (b"", [], [["../../mem", 1, 1, 1, []]], 0)),
        ((*_FLAGS[:4], True), None, (b"", [], [[0, 1, 1]], 0)),
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
