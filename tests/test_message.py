"""Parcels as what RPC carries."""

from __future__ import annotations

import weakref

import torch

from torchfedrpc.rpc.message import parcel_message, read_parcel
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
