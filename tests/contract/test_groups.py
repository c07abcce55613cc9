"""Groups: many clients at once, as a mapping, as they complete, or a quorum of them."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Fresh, Latch, Seen
from learners import CountsPacking

import torchfedrpc as tfr
from torchfedrpc.events import CallStarted

# What a method that waits has logged when its call was cancelled: nothing, where that came before its first step.
NOT_TO_THE_END: tuple[Any, ...] = ([], [("hold cancelled", True)])


class NoMemory:
    """Takes more memory than there is as it is packed."""

    def __getstate__(self) -> Any:
        raise MemoryError


async def test_a_group_call_gives_results_in_the_groups_order(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    ids = fresh.apart(6)[::-1]
    group = proxy.clients(ids)
    assert list(group.client_ids) == ids
    for results in (await group.call("train_epoch", epochs=2), await group.train_epoch(epochs=2)):
        assert isinstance(results, tfr.GroupResult)
        assert list(results) == ids
        assert len(results) == 6
        assert results.failures == {}
        assert all(results[one] == {"client": one, "method": "train_epoch", "kwargs": {"epochs": 2}} for one in ids)
        assert dict(results) == {one: results[one] for one in ids}


async def test_all_clients_are_the_default_group(proxy: tfr.LearnerProxy) -> None:
    assert list(proxy.clients().client_ids) == proxy.client_ids


async def test_a_group_has_a_length_and_iterates_over_its_clients_in_order(
    proxy: tfr.LearnerProxy, fresh: Fresh
) -> None:
    ids = fresh.apart(3)[::-1]
    for group in (proxy.clients(ids), proxy.clients(ids).options(retries=1)):
        assert list(group) == ids
        assert len(group) == 3
        assert ids[0] in group
    assert len(proxy.clients([])) == 0


async def test_a_group_and_a_handle_complete_the_learners_methods(proxy: tfr.LearnerProxy, one: str) -> None:
    for owner in (proxy.clients([one]), proxy.clients([one]).options(retries=1), proxy.client(one)):
        assert {"train_epoch", "echo", "hold", "options"} <= set(dir(owner))
    assert {"reduce", "as_completed", "client_ids"} <= set(dir(proxy.clients([one])))


async def test_an_empty_group_gives_an_empty_result(proxy: tfr.LearnerProxy) -> None:
    assert dict(await proxy.clients([]).call("echo")) == {}
    assert [pair async for pair in proxy.clients([]).as_completed("echo")] == []


async def test_a_clients_own_arguments_are_merged_over_the_calls(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    first, second, third = fresh.apart(3)
    group = proxy.clients({first: {"lr": 0.1}, second: {}, third: {"lr": 0.2, "more": 1}})
    results = await group.train_epoch(lr=0.5, epochs=1)
    assert [result["kwargs"] for result in results.values()] == [
        {"lr": 0.1, "epochs": 1},
        {"lr": 0.5, "epochs": 1},
        {"lr": 0.2, "epochs": 1, "more": 1},
    ]
    pairs = {one: result async for one, result in group.as_completed("echo", 5, lr=0.5)}
    assert pairs[third] == ((5,), {"lr": 0.2, "more": 1})


def _failing(ids: list[str], *numbers: int) -> dict[str, dict[str, Any]]:
    return {one: {"fails": number in numbers} for number, one in enumerate(ids)}


async def test_failures_are_raised_together_after_all_calls_have_ended(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    ids = fresh.apart(4)
    with pytest.raises(tfr.GroupCallError) as caught:
        await proxy.clients(_failing(ids, 1, 3)).call("fail_if")
    error = caught.value
    assert isinstance(error, ExceptionGroup)
    assert list(error.failures) == [ids[1], ids[3]]
    assert error.exceptions == tuple(error.failures.values())
    assert error.results == {ids[0]: "fine", ids[2]: "fine"}
    first = error.exceptions[0]
    assert f"{ids[1]}, {ids[3]}, first with {type(first).__name__}: {first}" in str(error)
    assert "returns the other 2 results" in str(error)
    assert proxy.stats()["pending_calls"] == 0


async def test_except_star_and_split_work_on_a_group_error(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    ids = fresh.apart(2)
    caught = []
    try:
        await proxy.clients({ids[0]: {"kind": "value"}, ids[1]: {"kind": "key"}}).call("fail")
    except* ValueError as group:
        caught.append(list(group.failures))  # type: ignore[attr-defined]
    except* KeyError as group:
        caught.append(list(group.failures))  # type: ignore[attr-defined]
    assert caught == [[ids[0]], [ids[1]]]


async def test_collect_gives_failures_beside_results(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    ids = fresh.apart(3)
    results = await proxy.clients(_failing(ids, 0)).options(on_error="collect").call("fail_if", value=7)
    assert dict(results) == {ids[1]: 7, ids[2]: 7}
    assert list(results.failures) == [ids[0]]
    assert isinstance(results.failures[ids[0]], ValueError)
    assert f"{ids[0]} fails" in str(results.failures[ids[0]])


async def test_options_of_the_proxy_hold_for_its_groups(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    results = await proxy.options(on_error="collect").clients(_failing(fresh.apart(2), 0, 1)).call("fail_if")
    assert len(results) == 0
    assert len(results.failures) == 2


async def test_min_results_returns_once_so_many_succeeded_and_cancels_the_rest(
    proxy: tfr.LearnerProxy, fresh: Fresh, latch: Latch
) -> None:
    slow, *quick = fresh.apart(1) + fresh.together(3)
    slow_method = {slow: {"path": latch.path}, **{one: {"path": None} for one in quick}}
    results = await proxy.clients(slow_method).options(min_results=3, timeout_s=30).call("hold_if")
    assert list(results) == quick
    assert proxy.stats()["pending_calls"] == 0
    assert await proxy.custom_method(slow, "what_happened") in NOT_TO_THE_END
    assert results.failures == {}


async def test_min_results_counts_successes_alone(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    ids = fresh.apart(4)
    results = await proxy.clients(_failing(ids, 0, 2)).options(min_results=2).call("fail_if")
    assert set(results) == {ids[1], ids[3]}
    assert set(results.failures) <= {ids[0], ids[2]}


async def test_too_few_results_by_the_deadline_are_a_quorum_error_with_what_arrived(
    proxy: tfr.LearnerProxy, fresh: Fresh, latch: Latch
) -> None:
    ids = fresh.apart(4)
    calls = {one: {"path": latch.path if number else None} for number, one in enumerate(ids)}
    began = time.perf_counter()
    with pytest.raises(tfr.QuorumError, match=r"1 of 4 .*within 0\.3 s.*min_results=2") as caught:
        await proxy.clients(calls).options(min_results=2, timeout_s=0.3).call("hold_if")
    assert time.perf_counter() - began < 10
    assert caught.value.results == {ids[0]: "released"}
    assert set(caught.value.failures) <= set(ids[1:])
    assert all(isinstance(error, tfr.CallTimeoutError) for error in caught.value.failures.values())
    assert isinstance(caught.value, RuntimeError)
    assert await proxy.custom_method(ids[1], "same", 1) == 1
    assert proxy.stats()["pending_calls"] == 0


async def test_a_quorum_that_failures_rule_out_does_not_wait_for_the_deadline(
    proxy: tfr.LearnerProxy, fresh: Fresh, latch: Latch
) -> None:
    ids = fresh.apart(2)
    calls = {ids[0]: {"path": latch.path}, ids[1]: {"wrong": 1}}
    async with asyncio.timeout(20):
        with pytest.raises(tfr.QuorumError) as caught:
            await proxy.clients(calls).options(min_results=2, timeout_s=60).call("hold_if")
    assert isinstance(caught.value.failures[ids[1]], TypeError)


async def test_group_with_a_deadline_or_a_quorum_starts_the_fastest_first(
    proxy: tfr.LearnerProxy, fresh: Fresh, latch: Latch, seen: Seen
) -> None:
    ids = fresh.together(6)
    slow = ids[2]
    quick = [one for one in ids if one != slow]
    group = proxy.clients({one: {"until": latch.path if one == slow else None} for one in ids})

    def started() -> list[str]:
        clients = [event.client_id for event in seen.events if isinstance(event, CallStarted)]
        seen.events.clear()
        return clients

    for order in ([ids[0]], [slow]):  # how long each takes is what is learned
        calls = asyncio.ensure_future(group.call("work"))
        await seen.reported(slow)
        await asyncio.sleep(0.3)
        latch.open()
        await calls
        Path(latch.path).unlink()
        assert started()[:1] == order
    # The slow one holds the thread until it is cancelled: none that comes behind it would begin.
    results = await group.options(min_results=5, timeout_s=20).call("work")
    assert list(results) == quick
    assert started()[-1] == slow
    results = await group.options(timeout_s=1, on_error="collect").call("work")
    assert list(results) == quick
    assert {one: type(error) for one, error in results.failures.items()} == {slow: tfr.CallTimeoutError}
    reduced = await group.options(min_results=5, timeout_s=20).reduce("work", tfr.Sum())
    assert (reduced.value, reduced.count) == (5, 5)


async def test_more_results_than_clients_can_never_be_met(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    with pytest.raises(tfr.QuorumError, match="min_results=3"):
        await proxy.clients(fresh.apart(2)).options(min_results=3).call("echo")


async def test_as_completed_yields_in_the_order_of_completion(
    proxy: tfr.LearnerProxy, fresh: Fresh, latch: Latch
) -> None:
    first, second, third = fresh.together(3)
    calls = {first: {"path": latch.path}, second: {"path": None}, third: {"path": None}}
    order = []
    async for one, result in proxy.clients(calls).as_completed("hold_if"):
        assert result == "released"
        order.append(one)
        if len(order) == 2:
            latch.open()
    assert set(order[:2]) == {second, third}
    assert order[2:] == [first]


async def test_as_completed_raises_an_error_at_its_turn_and_cancels_the_rest(
    proxy: tfr.LearnerProxy, fresh: Fresh, latch: Latch
) -> None:
    slow, failing = fresh.together(2)
    with pytest.raises(TypeError, match="wrong"):  # noqa: PT012
        async for _ in proxy.clients({slow: {"path": latch.path}, failing: {"wrong": 1}}).as_completed("hold_if"):
            pytest.fail("nothing completes")
    assert proxy.stats()["pending_calls"] == 0
    assert await proxy.custom_method(slow, "what_happened") in NOT_TO_THE_END


async def test_as_completed_collects_errors_as_results(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    ids = fresh.apart(3)
    group = proxy.clients(_failing(ids, 1)).options(on_error="collect")
    results = {one: result async for one, result in group.as_completed("fail_if")}
    assert isinstance(results.pop(ids[1]), ValueError)
    assert results == {ids[0]: "fine", ids[2]: "fine"}


async def test_leaving_as_completed_early_cancels_the_rest(
    proxy: tfr.LearnerProxy, fresh: Fresh, latch: Latch, seen: Seen
) -> None:
    slow, quick = fresh.together(2)
    async for one, _ in proxy.clients({slow: {"path": latch.path}, quick: {"path": None}}).as_completed("hold_if"):
        assert one == quick
        break
    await seen.ended(slow)
    assert await proxy.custom_method(slow, "what_happened") in NOT_TO_THE_END


async def test_cancelling_a_group_call_cancels_its_calls(
    proxy: tfr.LearnerProxy, fresh: Fresh, latch: Latch, seen: Seen
) -> None:
    ids = fresh.together(3)
    task = asyncio.create_task(proxy.clients(ids).call("hold_async", latch.path))
    for one in ids:
        await seen.reported(one)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert proxy.stats()["pending_calls"] == 0
    for one in ids:
        assert await proxy.custom_method(one, "what_happened") == ["hold begins", ("hold cancelled", True)]


async def test_arguments_that_cannot_be_sent_fail_for_every_client(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    with pytest.raises(tfr.GroupCallError) as caught:
        await proxy.clients(fresh.apart(2)).call("append", lambda: 1)
    assert all(isinstance(error, tfr.SerializationError) for error in caught.value.exceptions)


@pytest.mark.parametrize("what", ["no memory", "a released reference"])
async def test_arguments_that_cannot_be_packed_fail_for_every_client(
    proxy: tfr.LearnerProxy, fresh: Fresh, what: str
) -> None:
    argument: Any = NoMemory()
    if what == "a released reference":
        argument = await proxy.share(torch.ones(3))
        await argument.release()
    group = proxy.clients(fresh.apart(2)).options(on_error="collect")
    for failures in (
        (await group.call("append", argument)).failures,
        dict([pair async for pair in group.as_completed("append", argument)]),
    ):
        assert [type(error) for error in failures.values()] == (
            [MemoryError] * 2 if what == "no memory" else [tfr.SerializationError] * 2
        )
    with pytest.raises(tfr.GroupCallError) as caught:
        await group.reduce("append", tfr.Sum(), argument)
    assert list(caught.value.failures) == list(group)


async def test_an_error_that_is_no_exception_is_raised_itself(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    ids = fresh.apart(2)
    with pytest.raises(BaseException, match="not an Exception") as caught:
        await proxy.clients(ids).options(on_error="collect").call("fail", "fatal")
    assert type(caught.value).__name__ == "Fatal"
    assert proxy.stats()["pending_calls"] == 0


async def test_a_model_for_many_clients_arrives_at_each(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    ids = fresh.apart(10)
    weights = {"w": torch.arange(100_000.0)}
    await proxy.clients(ids).set_model_weights(weights)
    for result in (await proxy.clients(ids).get_model_weights()).values():
        assert torch.equal(result["w"], weights["w"])


async def test_arguments_that_clients_have_in_common_are_packed_once(
    proxy: tfr.LearnerProxy, fresh: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CountsPacking, "num_packed", 0)
    group, argument = proxy.clients(fresh.apart(5)), CountsPacking()
    assert set((await group.call("append", argument)).values()) == {1}
    assert CountsPacking.num_packed == 1
    assert [result async for _, result in group.as_completed("append", argument)] == [2] * 5
    assert CountsPacking.num_packed == 2
    assert (await group.reduce("append", tfr.Sum(), argument)).value == 15
    assert CountsPacking.num_packed == 3


@pytest.mark.parametrize("how", ["call", "reduce"])
@pytest.mark.parametrize("num_elements", [3, 2_000, 50_000])
async def test_clients_have_memory_of_their_own_for_arguments_that_they_have_in_common(
    proxy: tfr.LearnerProxy, fresh: Fresh, how: str, num_elements: int
) -> None:
    ids, weights = fresh.together(4), torch.zeros(num_elements)
    group = proxy.clients({one: {} if number < 3 else {"value": weights} for number, one in enumerate(ids)})
    if how == "call":
        await group.call("keep", value=weights)
    else:
        with pytest.raises(tfr.GroupCallError):  # keep returns None, of which there is no sum
            await group.reduce("keep", tfr.Sum(), value=weights)
    weights += 1
    await proxy.custom_method(ids[0], "add_to_kept", 5.0)
    await proxy.custom_method(ids[3], "add_to_kept", 7.0)
    kept = await proxy.clients(ids).call("live")
    assert [value.unique().tolist() for value in kept.values()] == [[5.0], [0.0], [0.0], [7.0]]


async def test_a_group_has_no_private_methods(proxy: tfr.LearnerProxy, one: str) -> None:
    with pytest.raises(AttributeError):
        _ = proxy.clients([one])._private
    with pytest.raises(tfr.GroupCallError) as caught:
        await proxy.clients([one]).call("_private")
    assert isinstance(caught.value.exceptions[0], tfr.MethodNotFoundError)


async def test_a_group_of_a_group_is_refused_since_its_own_arguments_would_be_left_out(
    proxy: tfr.LearnerProxy, fresh: Fresh
) -> None:
    group = proxy.clients({fresh.one(): {"value": 1}})
    with pytest.raises(tfr.ConfigError, match=r"give list\(group\)"):
        proxy.clients(group)
    assert proxy.clients(list(group)).client_ids == group.client_ids
