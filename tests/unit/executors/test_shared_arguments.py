"""Arguments that calls of one tick share."""

from __future__ import annotations

import asyncio

import pytest
import torch

from torchfedrpc.executors.shared_arguments import MIN_SHARED_BYTES, Sharing
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.packing import Packed, pack
from torchfedrpc.wire.shared import SharedValue

ALLOW = AllowList([])


class Packing:
    """Learners of the driver's host."""

    def take_shared(self, obj: object) -> Packed:
        return pack(obj)

    def unshare(self, value: SharedValue) -> None:
        """Do nothing."""


def sharing() -> Sharing:
    return Sharing(Packing())


def weights() -> torch.Tensor:
    return torch.ones(MIN_SHARED_BYTES)


async def test_a_call_that_is_compared_while_the_first_opens_the_value_gets_it_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table, arg = sharing(), weights()
    [first], _ = table.shared((arg,), {})

    def equals(value: SharedValue, obj: object) -> bool:
        assert torch.equal(value.open(ALLOW), arg)  # by the thread of the first call
        return True

    monkeypatch.setattr(SharedValue, "equals", equals)
    [second], _ = table.recognised((arg,), {})
    assert second is first
    assert torch.equal(second.open(ALLOW), arg)


async def test_a_value_whose_memory_the_first_call_has_taken_is_not_shared() -> None:
    table, arg = sharing(), weights()
    [first], _ = table.shared((arg,), {})
    first.open(ALLOW)
    [second], _ = table.recognised((arg,), {})
    assert second is arg


async def test_a_changed_argument_is_not_shared_and_the_first_call_takes_the_memory() -> None:
    table, arg = sharing(), weights()
    [first], _ = table.shared((arg,), {})
    address = first.parcel.slots[0].data_ptr()
    arg[0] = 2
    [second], _ = table.recognised((arg,), {})
    assert second is arg
    assert first.open(ALLOW).data_ptr() == address


async def test_calls_of_another_tick_share_nothing() -> None:
    table, arg = sharing(), weights()
    table.shared((arg,), {})
    assert table.has_seen
    await asyncio.sleep(0)
    assert not table.has_seen
