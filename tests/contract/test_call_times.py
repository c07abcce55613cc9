"""`CallEnded.worker` and `CallEnded.times`: where a call ran, and the stages of its duration."""

from __future__ import annotations

import asyncio
from dataclasses import astuple

import pytest
import torch
from conftest import Fresh, Latch, Seen, submitted

import torchfedrpc as tfr
from torchfedrpc.events import CallEnded, CallTimes


def ends_of(seen: Seen, client_id: str) -> list[CallEnded]:
    return [event for event in seen.events if isinstance(event, CallEnded) and event.client_id == client_id]


def checked(proxy: tfr.LearnerProxy, ended: CallEnded) -> CallTimes:
    """The times of a call, once they are seen to be stages of its duration on one of the workers."""
    assert ended.worker in proxy.stats()["workers"]
    assert ended.times is not None
    assert min(astuple(ended.times)) >= 0
    assert sum(astuple(ended.times)) == pytest.approx(ended.seconds)
    return ended.times


@pytest.mark.parametrize("method", ["nap", "nap_async"])
async def test_run_is_the_time_of_the_method(proxy: tfr.LearnerProxy, one: str, seen: Seen, method: str) -> None:
    await proxy.custom_method(one, method, 0.2)
    times = checked(proxy, ends_of(seen, one)[0])
    assert times.run_s >= 0.2
    assert ends_of(seen, one)[0].seconds - times.run_s < 5


async def test_queue_is_the_wait_for_earlier_calls_of_the_learner(
    proxy: tfr.LearnerProxy, one: str, seen: Seen
) -> None:
    await asyncio.gather(proxy.custom_method(one, "nap", 0.3), proxy.custom_method(one, "same", 1))
    first, second = (checked(proxy, ended) for ended in ends_of(seen, one))
    assert second.queue_s >= 0.25 > second.run_s
    assert first.run_s >= 0.3


async def test_queue_is_the_wait_for_other_learners_of_the_worker(
    proxy: tfr.LearnerProxy, fresh: Fresh, seen: Seen
) -> None:
    first, second = fresh.together(2)
    await asyncio.gather(proxy.custom_method(first, "nap", 0.3), proxy.custom_method(second, "nap", 0.0))
    assert checked(proxy, ends_of(seen, second)[0]).queue_s >= 0.2


async def test_failed_call_has_times(proxy: tfr.LearnerProxy, one: str, seen: Seen) -> None:
    with pytest.raises(ValueError, match="plain"):
        await proxy.custom_method(one, "fail", "value")
    checked(proxy, ends_of(seen, one)[0])


async def test_each_item_of_a_stream_has_times(proxy: tfr.LearnerProxy, one: str, seen: Seen) -> None:
    async for _ in proxy.stream(one, "count", 2):
        await asyncio.sleep(0.2)  # which is the reader's time
    ends = ends_of(seen, one)
    assert len(ends) == 3
    for ended in ends:
        checked(proxy, ended)


@pytest.mark.parametrize("how", ["call", "as_completed", "reduce"])
async def test_calls_of_a_group_have_times(proxy: tfr.LearnerProxy, fresh: Fresh, seen: Seen, how: str) -> None:
    clients = fresh.apart(4)
    group = proxy.clients(clients)
    if how == "call":
        await group.call("same", 1.0)
    elif how == "reduce":
        await group.reduce("same", tfr.Sum, torch.ones(3))
    else:
        async for _ in group.as_completed("same", 1.0):
            pass
    for client_id in clients:
        (ended,) = ends_of(seen, client_id)
        checked(proxy, ended)


async def test_call_beyond_its_deadline_was_running_since_it_was_sent(
    proxy: tfr.LearnerProxy, one: str, latch: Latch, seen: Seen
) -> None:
    await proxy.custom_method(one, "same", 1)
    with pytest.raises(tfr.CallTimeoutError):
        await proxy.options(timeout_s=0.3).custom_method(one, "hold", latch.path)
    latch.open()
    times = checked(proxy, ends_of(seen, one)[1])
    assert times.run_s > 0.2
    assert times.return_s == 0


async def test_call_that_was_never_sent_has_queue_alone(
    proxy: tfr.LearnerProxy, mode: str, one: str, latch: Latch, seen: Seen
) -> None:
    if mode == "local":
        pytest.skip("the queue of a learner's calls is in its host")
    (first,) = await submitted(proxy, proxy.custom_method(one, "hold", latch.path))
    (second,) = await submitted(proxy, proxy.custom_method(one, "same", 1))
    second.cancel()
    await asyncio.wait([second])
    latch.open()
    await first
    ended = ends_of(seen, one)[0]
    assert ended.worker == ""
    assert ended.times == CallTimes(ended.seconds, 0.0, 0.0, 0.0)


async def test_calls_that_were_submitted_before_the_subscription_have_no_times(
    proxy: tfr.LearnerProxy, one: str, latch: Latch
) -> None:
    (held,) = await submitted(proxy, proxy.custom_method(one, "hold", latch.path))
    seen = Seen()
    unsubscribe = proxy.subscribe(seen)
    latch.open()
    await held
    unsubscribe()
    (ended,) = ends_of(seen, one)
    assert (ended.worker, ended.times) == ("", None)
