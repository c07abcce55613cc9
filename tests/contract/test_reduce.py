"""Reductions: results added up where they are, with the same bits in every mode, and nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NUM_CLIENTS, Fresh, Latch, Seen, opened, submitted
from internals import check_nothing_goes_on
from summing import Adder, Brackets, Failing, Kept, Noted, SlowToPack, Threads, Unopenable, Unpackable

import torchfedrpc as tfr
from torchfedrpc.events import CallEnded, Event
from torchfedrpc.reduce.tree import Forest, fold, merged


@pytest.fixture(scope="module")
def proxy(runner: asyncio.Runner, runtime: dict[str, Any]) -> Iterator[tfr.LearnerProxy]:
    """An open proxy of `Adder` learners; every test takes clients of its own by `fresh`."""
    clients = [f"client_{number}" for number in range(NUM_CLIENTS)]
    with opened(runner, tfr.LearnerProxy(Adder, clients, runtime=runtime, seed=11)) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def _nothing_goes_on(runner: asyncio.Runner, proxy: tfr.LearnerProxy) -> Iterator[None]:
    yield
    runner.run(check_nothing_goes_on(proxy))


def number(client_id: str) -> str:
    return client_id.rpartition("_")[2]


def brackets(client_ids: Iterable[str], failed: Iterable[str] = ()) -> str | None:
    """How the texts of these clients come together."""
    in_order = sorted(client_ids, key=lambda one: int(number(one)))
    return fold([None if one in failed else number(one) for one in in_order], "({}+{})".format)


def shuffled(client_ids: Iterable[str]) -> list[str]:
    """In an order that is always the same."""
    in_order = list(client_ids)
    return random.Random(3).sample(in_order, len(in_order))


def bits(value: Any) -> str:
    """A hash of a state dict's bits."""
    digest = hashlib.sha256()
    for name in sorted(value):
        tensor = value[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# Values.


@pytest.mark.parametrize("method", ["text", "text_async"])
@pytest.mark.parametrize("count", [1, 2, 9])
async def test_results_are_added_up_in_the_order_of_the_clients(
    proxy: tfr.LearnerProxy, fresh: Fresh, method: str, count: int
) -> None:
    ids = fresh.apart(count)
    for group in (ids, shuffled(ids)):
        result = await proxy.clients(group).reduce(method, Brackets())
        assert isinstance(result, tfr.ReduceResult)
        assert (result.value, result.count, result.failures) == (brackets(ids), count, {})


async def test_a_class_stands_for_a_reducer_and_a_reducer_may_be_used_again(
    proxy: tfr.LearnerProxy, fresh: Fresh
) -> None:
    ids, reducer = fresh.apart(3), Brackets()
    for given in (Brackets, reducer, reducer):
        assert (await proxy.clients(ids).reduce("text", given)).value == brackets(ids)
    assert reducer.text == ""


async def test_a_reducer_that_has_a_result_counts_it_with_each_client(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    reducer = tfr.Sum()
    reducer.add(torch.full((2,), 10.0))
    for _ in range(2):
        total = await proxy.clients(fresh.apart(3)).reduce("same", reducer, torch.ones(2))
        assert total.value.tolist() == [33.0, 33.0]


async def test_a_clients_own_arguments_are_merged_over_the_calls(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    first, second, third = fresh.together(3)
    group = proxy.clients({first: {"text": "a"}, second: {}, third: {"text": "c"}})
    assert (await group.reduce("text", Brackets(), text="x")).value == "((a+x)+c)"
    assert (await proxy.clients([first, second]).reduce("same", Kept(), "positional")).value == ["positional"] * 2


async def test_a_reduction_is_what_a_tree_over_the_results_gives(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    """Of results that cancel each other, integers and booleans among them."""
    ids = fresh.apart(11)
    in_order = sorted(ids, key=proxy.client_ids.index)
    await proxy.clients(ids).call("keep", None)
    before = {one: data async for one, data in proxy.snapshots(ids)}
    results = await proxy.clients(ids).call("train")
    forest = Forest(tfr.WeightedMean(), len(ids))
    for place, one in enumerate(in_order):
        forest.add(place, results[one])
    expected = merged(forest.take(), len(ids)).finish()
    await proxy.restore(before)
    result = await proxy.clients(ids).reduce("train", tfr.WeightedMean())
    assert bits(result.value) == bits(expected)
    assert result.value["num_batches_tracked"].dtype == torch.int64
    assert result.value["mask"].dtype == torch.bool


@pytest.mark.parametrize(
    ("reducer", "expected"), [(Kept(), [[1] * 3] * 2), (tfr.Sum(), [2] * 3)], ids=["Kept", "Sum"]
)
async def test_a_reducer_keeps_what_it_was_given_while_the_learner_goes_on(
    proxy: tfr.LearnerProxy, fresh: Fresh, latch: Latch, reducer: Any, expected: list[Any]
) -> None:
    quick, slow = sorted(fresh.together(2), key=proxy.client_ids.index)
    (holding,) = await submitted(proxy, proxy.custom_method(slow, "text_once_open_async", latch.path))
    (reduction,) = await submitted(proxy, proxy.clients([quick, slow]).reduce("change_and_give", reducer))
    for count in (2, 3):
        assert (await proxy.custom_method(quick, "change_and_give")).tolist() == [count] * 3
    assert not reduction.done()
    latch.open()
    value = (await reduction).value
    assert [one.tolist() for one in value] == expected
    await holding


async def test_torch_adds_up_with_as_many_threads_everywhere(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    before = torch.get_num_threads()
    assert (await proxy.clients(fresh.apart(5)).reduce("text", Threads())).value == [1]
    assert await asyncio.to_thread(torch.get_num_threads) == before


async def test_a_shared_argument_arrives_at_each(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    ref = await proxy.share(torch.ones(50_000))
    value = (await proxy.clients(fresh.apart(5)).reduce("same", tfr.Sum(), ref)).value
    assert torch.equal(value, torch.full((50_000,), 5.0))
    ids = fresh.apart(3)
    result = await proxy.clients(ids).reduce("train", tfr.WeightedMean(), size=50_000, shared=ref)
    assert result.value["w"].shape == (50_000,)
    await ref.release()


async def test_two_reductions_at_once_have_the_same_clients(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    ids = fresh.apart(6)
    first, second, third = await asyncio.gather(
        proxy.clients(ids).reduce("text", Brackets()),
        proxy.clients(ids[:4]).reduce("text_async", Brackets()),
        proxy.clients(shuffled(ids)).reduce("append", tfr.Sum(), "x"),
    )
    assert (first.value, second.value, third.value) == (brackets(ids), brackets(ids[:4]), 6)


async def test_calls_behind_a_reduction_run_behind_it(
    proxy: tfr.LearnerProxy, fresh: Fresh, latch: Latch, seen: Seen
) -> None:
    ids = fresh.apart(4)
    arguments: dict[str, dict[str, Any]] = {one: {} for one in ids} | {ids[0]: {"until": latch.path}}
    (reduction,) = await submitted(proxy, proxy.clients(arguments).reduce("text_once_open_async", Brackets()))
    behind = [asyncio.ensure_future(proxy.clients(ids).call("append", item)) for item in "ab"]
    await asyncio.gather(*(seen.ended(one) for one in ids[1:]))
    assert not reduction.done()
    latch.open()
    assert [set((await one).values()) for one in behind] == [{1}, {2}]
    assert (await reduction).value == brackets(ids)
    assert (await proxy.clients(ids).reduce("append", tfr.Sum(), "c")).value == 3 * 4


async def test_a_reduction_runs_behind_a_call_with_a_large_argument_of_the_same_tick(
    proxy: tfr.LearnerProxy, fresh: Fresh
) -> None:
    one, other = fresh.together(2)
    call = asyncio.ensure_future(proxy.custom_method(one, "append", bytes(20_000)))
    reduction = asyncio.ensure_future(proxy.clients([one, other]).reduce("append", tfr.Sum(), "x"))
    assert await call == 1
    assert (await reduction).value == 2 + 1


# Errors.


async def test_objects_that_are_no_reducers_are_refused(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    class Half:
        def add(self, result: Any) -> None: ...

    class Local(Brackets):
        pass

    group = proxy.clients(fresh.apart(2))
    with pytest.raises(TypeError, match="lacks merge, finish"):
        await group.reduce("text", Half())
    with pytest.raises(tfr.SerializationError, match="Local"):
        await group.reduce("text", Local())
    unpicklable = Brackets()
    unpicklable.text = lambda: "x"  # type: ignore[assignment]
    with pytest.raises(tfr.SerializationError):
        await group.reduce("text", unpicklable)
    with pytest.raises(tfr.UntrustedTypeError, match="trusted_modules"):
        await group.reduce("text", Elsewhere())
    assert (await group.call("what_happened")).values().__len__() == 2
    assert set(map(tuple, (await group.call("what_happened")).values())) == {()}


class Elsewhere(Brackets):
    """A reducer of a module that is not the learner's."""


async def test_a_reducer_that_its_worker_cannot_open_is_the_error_of_each_call(
    proxy: tfr.LearnerProxy, fresh: Fresh, mode: str
) -> None:
    ids = fresh.apart(2)
    if mode == "local":
        assert (await proxy.clients(ids).reduce("text", Unopenable())).count == 2
        return
    with pytest.raises(tfr.GroupCallError) as caught:
        await proxy.clients(ids).reduce("text", Unopenable())
    assert {type(error) for error in caught.value.exceptions} == {tfr.SerializationError}
    assert all("not at home" in str(error) for error in caught.value.exceptions)


async def test_results_without_the_key_are_errors_of_their_clients(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    ids = fresh.apart(3)
    for group in (proxy.clients(ids), proxy.clients(ids).options(on_error="collect")):
        with pytest.raises(tfr.GroupCallError) as caught:
            await group.reduce("train", tfr.WeightedMean(weight="num_sample"))
        errors = caught.value
        assert set(errors.failures) == set(ids)
        assert all("no 'num_sample'" in str(error) for error in errors.failures.values())
        assert all(one in str(error.__notes__) for one, error in errors.failures.items())


@pytest.mark.parametrize("apart", [False, True])
async def test_results_that_do_not_go_together_name_both_clients(
    proxy: tfr.LearnerProxy, fresh: Fresh, apart: bool
) -> None:
    ids = sorted(fresh.apart(2) if apart else fresh.together(2), key=proxy.client_ids.index)
    sizes = {ids[1]: {"size": 3}, ids[0]: {"size": 2}}
    for group in (proxy.clients(sizes), proxy.clients(sizes).options(on_error="collect")):
        with pytest.raises(ValueError, match=rf"of_size of {ids[0]} and {ids[1]}: .*float32 \[2\].*float32 \[3\]"):
            await group.reduce("of_size", tfr.Mean())


@pytest.mark.parametrize("kind", ["value", "unsendable", "stop"])
@pytest.mark.parametrize("apart", [False, True])
async def test_errors_of_a_merge_name_both_clients(
    proxy: tfr.LearnerProxy, fresh: Fresh, apart: bool, kind: str
) -> None:
    ids = sorted(fresh.apart(2) if apart else fresh.together(2), key=proxy.client_ids.index)
    with pytest.raises(ValueError, match=rf"text of {ids[0]} and {ids[1]}: "):
        await proxy.clients(ids).reduce("text", Failing("merge", kind))


@pytest.mark.parametrize("kind", ["value", "unsendable", "stop"])
async def test_errors_of_add_are_those_of_the_clients_call(proxy: tfr.LearnerProxy, fresh: Fresh, kind: str) -> None:
    ids = fresh.apart(2)
    with pytest.raises(tfr.GroupCallError) as caught:
        await proxy.clients(ids).reduce("text", Failing("add", kind))
    for one, error in caught.value.failures.items():
        assert isinstance(error, ValueError if kind == "value" else tfr.RemoteError)
        assert f"{one}.text on " in str(error.__notes__)


async def test_errors_of_finish_are_raised(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    ids = fresh.apart(2)
    with pytest.raises(ValueError, match="no finish for"):
        await proxy.clients(ids).reduce("text", Failing("finish", "value"))
    async with asyncio.timeout(20):
        with pytest.raises(RuntimeError, match="StopIteration"):
            await proxy.clients(ids).reduce("text", Failing("finish", "stop"))


async def test_a_reducer_that_can_no_longer_be_packed_is_an_error(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    with pytest.raises(tfr.SerializationError, match=r"lambda") as caught:
        await proxy.clients(fresh.apart(2)).reduce("text", Unpackable())
    assert "text" in str(caught.value.__notes__)


# Options.


def failing(ids: list[str], *numbers: int) -> dict[str, dict[str, Any]]:
    return {one: {"fails": number in numbers} for number, one in enumerate(ids)}


async def test_failures_are_raised_together_after_all_calls_have_ended(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    ids = fresh.apart(4)
    with pytest.raises(tfr.GroupCallError, match="collect") as caught:
        await proxy.clients(failing(ids, 1, 3)).reduce("text_or_fail", Brackets())
    assert list(caught.value.failures) == [ids[1], ids[3]]
    assert proxy.stats()["pending_calls"] == 0
    assert set(map(len, (await proxy.clients(ids).call("what_happened")).values())) == {1}


async def test_collect_adds_up_what_there_is(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    ids = fresh.apart(7)
    group = proxy.clients(failing(ids, 0, 3)).options(on_error="collect")
    result = await group.reduce("text_or_fail", Brackets())
    assert (result.value, result.count) == (brackets(ids, [ids[0], ids[3]]), 5)
    assert list(result.failures) == [ids[0], ids[3]]
    assert f"{ids[0]} fails" in str(result.failures[ids[0]])


async def test_where_all_clients_fail_there_is_no_value_and_no_error_is_lost(
    proxy: tfr.LearnerProxy, fresh: Fresh
) -> None:
    ids = fresh.apart(2)
    for on_error in ("collect", "raise"):
        group = proxy.clients(failing(ids, 0, 1)).options(on_error=on_error)
        with pytest.raises(tfr.GroupCallError, match=rf"failed for {ids[0]}, {ids[1]}, first with") as caught:
            await group.reduce("text_or_fail", Brackets())
        assert list(caught.value.failures) == ids


async def test_reduce_of_a_group_without_clients_is_refused(proxy: tfr.LearnerProxy) -> None:
    for on_error in ("collect", "raise"):
        with pytest.raises(tfr.ConfigError, match="text: there is nothing to reduce, since the group has no clients"):
            await proxy.clients([]).options(on_error=on_error).reduce("text", Brackets())


async def test_min_results_adds_up_the_first_and_cancels_the_rest(
    proxy: tfr.LearnerProxy, fresh: Fresh, latch: Latch
) -> None:
    ids = fresh.apart(6)
    for slow in ((ids[0], ids[3]), (ids[1], ids[5])):
        arguments = {one: {"until": latch.path if one in slow else None} for one in ids}
        group = proxy.clients(arguments).options(min_results=4, timeout_s=60)
        result = await group.reduce("text_once_open_async", Brackets())
        assert (result.value, result.count) == (brackets(ids, slow), 4)
        assert proxy.stats()["pending_calls"] == 0


async def test_too_few_results_by_the_deadline_are_a_quorum_error(
    proxy: tfr.LearnerProxy, fresh: Fresh, latch: Latch
) -> None:
    ids = fresh.apart(4)
    arguments = {one: {"until": latch.path if number else None} for number, one in enumerate(ids)}
    with pytest.raises(tfr.QuorumError, match=r"1 of 4 .*within 1 s.*min_results=2") as caught:
        await proxy.clients(arguments).options(min_results=2, timeout_s=1).reduce("text_once_open_async", Brackets())
    assert list(caught.value.results) == [ids[0]]


async def test_clients_that_are_late_are_left_out(proxy: tfr.LearnerProxy, fresh: Fresh, latch: Latch) -> None:
    ids = fresh.apart(5)
    arguments = {one: {"until": latch.path if one in ids[1:3] else None} for one in ids}
    group = proxy.clients(arguments).options(on_error="collect", timeout_s=1)
    result = await group.reduce("text_once_open_async", Brackets())
    assert (result.value, result.count) == (brackets(ids, ids[1:3]), 3)
    assert list(result.failures) == ids[1:3]
    assert all(isinstance(error, tfr.CallTimeoutError) for error in result.failures.values())


@pytest.mark.parametrize("answered", [False, True])
async def test_a_result_that_comes_as_its_call_is_cancelled_counts_once_or_not_at_all(
    proxy: tfr.LearnerProxy, fresh: Fresh, latch: Latch, tmp_path: Path, answered: bool
) -> None:
    """The last call is answered, or about to be, at the very time at which there are enough results."""
    ids = sorted(fresh.apart(6), key=proxy.client_ids.index)
    last, notes = ids[3], tmp_path / "notes"  # its neighbour in the tree is on the other worker

    def on_event(event: Event) -> None:
        if isinstance(event, CallEnded) and event.client_id != last and event.method == "text_once_open_async":
            ended.append(event.client_id)
            if len(ended) == 5:
                latch.open()
                deadline = time.monotonic() + 20
                while not (notes.exists() and number(last) in notes.read_text().split()):
                    assert time.monotonic() < deadline
                if answered:
                    time.sleep(0.1)  # the loop stands still, and the answer waits for it

    ended: list[str] = []
    unsubscribe = proxy.subscribe(on_event)
    arguments = {one: {"until": latch.path if one == last else None} for one in ids}
    try:
        group = proxy.clients(arguments).options(min_results=5, timeout_s=60)
        result = await group.reduce("text_once_open_async", Noted(str(notes)))
    finally:
        unsubscribe()
    assert result.count in (5, 6)
    assert result.value == brackets(ids, [last] if result.count == 5 else [])
    assert result.failures == {}
    assert (await proxy.clients(ids).reduce("text", Brackets())).value == brackets(ids)


async def test_a_collection_that_takes_too_long_is_a_timeout(
    proxy: tfr.LearnerProxy, fresh: Fresh, latch: Latch
) -> None:
    async with asyncio.timeout(30):
        with pytest.raises(tfr.CallTimeoutError, match=r"text: .*timeout_s=1"):
            await proxy.clients(fresh.apart(2)).options(timeout_s=1).reduce("text", SlowToPack(latch.path))
    latch.open()
    ids = fresh.apart(2)
    assert (await proxy.clients(ids).reduce("text", Brackets())).value == brackets(ids)


@pytest.mark.parametrize("timeout_s", [None, 60.0])
@pytest.mark.parametrize("collecting", [False, True])
async def test_a_cancelled_reduction_leaves_the_learners_usable_and_nothing_behind(
    proxy: tfr.LearnerProxy, fresh: Fresh, latch: Latch, seen: Seen, collecting: bool, timeout_s: float | None
) -> None:
    ids = fresh.apart(4)
    reducer = SlowToPack(latch.path) if collecting else Brackets()
    arguments = {one: {"until": None if collecting or one != ids[0] else latch.path} for one in ids}
    group = proxy.clients(arguments).options(timeout_s=timeout_s)
    reduction = asyncio.ensure_future(group.reduce("text_once_open_async", reducer))
    await asyncio.gather(*(seen.ended(one) for one in (ids if collecting else ids[1:])))
    async with asyncio.timeout(20):
        while collecting and not Path(latch.path + ".packing").exists():
            await asyncio.sleep(0.001)
    assert not reduction.done()
    reduction.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reduction
    latch.open()
    assert (await proxy.clients(ids).reduce("text", Brackets())).value == brackets(ids)
    await check_nothing_goes_on(proxy)


async def test_sparse_tensors_are_added_up_beside_dense_ones(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    ids = fresh.apart(4)
    for reducer, factor in ((tfr.Sum(), 4), (tfr.Mean(), 1)):
        value = (await proxy.clients(ids).reduce("sparse_and_dense", reducer)).value
        assert torch.equal(value["sparse"].to_dense(), factor * torch.eye(3))
        assert torch.equal(value["dense"], factor * torch.ones(300, 300))


# Traffic and memory.


async def test_bytes_received_by_the_driver_grow_with_the_workers(
    proxy: tfr.LearnerProxy, mode: str, num_hosts: int
) -> None:
    size, half = 30_001, NUM_CLIENTS // 2
    ids = proxy.client_ids[half - 16 : half + 16]
    most = 0

    def on_event(event: Event) -> None:
        nonlocal most
        if isinstance(event, CallEnded):
            most = max(most, sum(type(one) is torch.Tensor and one.numel() == size for one in gc.get_objects()))

    unsubscribe = proxy.subscribe(on_event)
    gc.freeze()  # what there is already need not be looked at
    try:
        before = proxy.stats()["bytes_received"]
        result = await proxy.clients(ids).reduce("of_size", tfr.Sum(), size)
        received = proxy.stats()["bytes_received"] - before
    finally:
        unsubscribe()
        gc.unfreeze()
    assert result.value.tolist() == [32.0] * size
    if mode == "local":
        assert received == 0
    else:
        assert num_hosts * 4 * size <= received < (num_hosts + 1) * 4 * size
        assert most <= num_hosts
