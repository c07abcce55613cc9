"""What calls have in common is sent once, arrives as each call's own, and is never older than the call."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import NUM_CLIENTS, Fresh, Latch, Seen, opened
from learners import Probe
from torch import Tensor, nn

import torchfedrpc as tfr

SIZE = 600_000  # float32: large enough to lie in files
NUM_BYTES = 4 * SIZE
SHOWS_FILES = Path("/proc/self/fd").exists()  # only Linux does, and elsewhere such values lie in no files


class Sharer(Probe):
    """A learner that knows what its process holds of shared values."""

    def num_files(self) -> int:
        if not SHOWS_FILES:
            return 0
        count = Path("/proc/self/maps").read_text().count("torchfedrpc-shared")
        for entry in Path("/proc/self/fd").iterdir():
            with suppress(OSError):
                count += "torchfedrpc-shared" in os.readlink(entry)
        return count

    def sums(self, *values: Any) -> list[float]:
        return [float(value.sum()) for value in values]

    def total(self, weights: dict[str, Tensor]) -> list[tuple[str, float, bool]]:
        return [(name, float(tensor.detach().sum()), tensor.requires_grad) for name, tensor in weights.items()]

    def write_and_sum(self, weights: Tensor) -> float:
        weights += 1
        return float(weights.sum())

    async def fit(self, weights: Tensor, config: dict[str, Any], *, lr: float = 0.0) -> Any:
        await asyncio.sleep(0)
        return float(weights[0]), config, lr

    def sums_one_by_one(self, weights: Tensor, times: int) -> Iterator[float]:
        for _ in range(times):
            yield float(weights.sum())
            weights += 1


class Counted:
    """Counts how often it is pickled."""

    def __init__(self) -> None:
        self.num_pickles = 0

    def __reduce__(self) -> Any:
        self.num_pickles += 1
        return Counted, ()


@pytest.fixture(scope="module")
def proxy(runner: asyncio.Runner, runtime: dict[str, Any]) -> Iterator[tfr.LearnerProxy]:
    clients = [f"client_{number}" for number in range(NUM_CLIENTS)]
    runtime = runtime | {"journal_max_bytes": 0}  # what a call had is not kept
    with opened(runner, tfr.LearnerProxy(Sharer, clients, runtime=runtime)) as proxy:
        yield proxy


async def sent_by(proxy: tfr.LearnerProxy, calls: Awaitable[Any]) -> int:
    """Bytes that calls took to the workers."""
    before = proxy.stats()["bytes_sent"]
    await calls
    sent: int = proxy.stats()["bytes_sent"] - before
    return sent


def check_once(proxy: tfr.LearnerProxy, num_sent: int, num_bytes: int = NUM_BYTES) -> None:
    """So much was sent that each worker has the value once."""
    num_workers = 0 if proxy.mode == "local" else 2
    assert num_workers * num_bytes <= num_sent <= num_workers * (num_bytes + 20_000)


async def files_of(proxy: tfr.LearnerProxy, *ids: str) -> list[int]:
    """How much of shared values the learners' processes hold."""
    return list((await proxy.clients(ids).call("num_files")).values())


async def until_freed(proxy: tfr.LearnerProxy, before: list[int], *ids: str) -> None:
    """Wait until they hold no more than they did."""
    async with asyncio.timeout(10):
        while any(now > then for now, then in zip(await files_of(proxy, *ids), before, strict=True)):
            await asyncio.sleep(0.01)


# References.


async def test_a_reference_arrives_as_its_object(proxy: tfr.LearnerProxy, one: str) -> None:
    ref = await proxy.share({"w": torch.arange(float(SIZE))})
    (first, second), kwargs = await proxy.custom_method(one, "echo", ref, [ref], named=ref, deep={"x": (ref,)})
    assert torch.equal(first["w"], torch.arange(float(SIZE)))
    assert first is second[0] is kwargs["named"] is kwargs["deep"]["x"][0]
    again = await proxy.custom_method(one, "same", ref)
    assert again is not first


@pytest.mark.parametrize("obj", [None, 7, "text", [1, {}], torch.ones(()), np.ones(3), nn.Linear(2, 2)], ids=repr)
async def test_anything_may_be_shared(proxy: tfr.LearnerProxy, one: str, obj: Any) -> None:
    ref = await proxy.share(obj)
    assert str(await proxy.custom_method(one, "same", ref)) == str(obj)


async def test_a_reference_may_stand_beside_large_arguments_and_inside_them(
    proxy: tfr.LearnerProxy, fresh: Fresh
) -> None:
    ref, beside = await proxy.share(torch.ones(SIZE)), torch.ones(SIZE)
    result = await proxy.clients(fresh.apart(4)).call("sums", ref, beside)
    assert set(map(tuple, result.values())) == {(SIZE, SIZE)}
    result = await proxy.clients(fresh.apart(4)).call("same", [ref, beside])
    assert all(torch.equal(*pair) for pair in result.values())


async def test_a_reference_travels_to_each_worker_once(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    ids, weights = fresh.apart(6), torch.ones(SIZE)
    ref = await proxy.share(weights)

    async def rounds() -> None:
        for _ in range(3):
            assert set((await proxy.clients(ids).call("write_and_sum", ref)).values()) == {2.0 * SIZE}
        for one in ids:
            assert await proxy.custom_method(one, "sums", ref) == [SIZE]

    check_once(proxy, await sent_by(proxy, rounds()))


async def test_a_reference_has_the_value_as_it_was_shared(proxy: tfr.LearnerProxy, one: str) -> None:
    weights = torch.zeros(SIZE)
    ref = await proxy.share(weights)
    weights += 1
    assert await proxy.custom_method(one, "write_and_sum", ref) == SIZE
    assert await proxy.custom_method(one, "sums", ref) == [0]


async def test_a_learner_may_keep_what_was_shared_and_write_into_it(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    ids = fresh.together(3)
    ref = await proxy.share({"w": torch.zeros(SIZE)})
    await proxy.clients(ids).call("keep", ref)
    await proxy.custom_method(ids[0], "add_to_kept", 1.0)
    await ref.release()
    kept = await proxy.clients(ids).call("live")
    assert [value["w"].unique().tolist() for value in kept.values()] == [[1.0], [0.0], [0.0]]
    kept[ids[1]]["w"] += 5
    assert (await proxy.custom_method(ids[1], "live"))["w"].sum() == 0
    await proxy.clients(ids).call("keep", None)


async def test_a_streams_arguments_may_have_references(proxy: tfr.LearnerProxy, one: str) -> None:
    ref = await proxy.share(torch.zeros(SIZE))
    stream = proxy.stream(one, "sums_one_by_one", ref, 3)
    await ref.release()
    assert [item async for item in stream] == [0, SIZE, 2 * SIZE]


async def test_a_released_reference_says_so(proxy: tfr.LearnerProxy, one: str) -> None:
    ref = await proxy.share(torch.ones(SIZE))
    await ref.release()
    await ref.release()
    words = rf"arguments of {one}\.same cannot be sent: .*released: share the object again"
    for argument in (ref, [ref], {"x": [torch.ones(SIZE), ref]}):
        with pytest.raises(tfr.SerializationError, match=words):
            await proxy.custom_method(one, "same", argument)
        with pytest.raises(tfr.SerializationError, match=words):
            await proxy.custom_method(one, "same", value=argument)
        with pytest.raises(tfr.SerializationError, match=words):
            await anext(proxy.stream(one, "same", argument))
    assert await proxy.custom_method(one, "same", 1) == 1
    assert "released" in repr(ref)


@pytest.mark.parametrize("how", ["released", "dropped"])
async def test_a_reference_that_is_done_with_is_freed(proxy: tfr.LearnerProxy, fresh: Fresh, how: str) -> None:
    ids = fresh.apart(2)
    before = await files_of(proxy, *ids)
    ref = await proxy.share(torch.ones(SIZE))
    await proxy.clients(ids).call("sums", ref)
    if SHOWS_FILES:
        assert all(now > then for now, then in zip(await files_of(proxy, *ids), before, strict=True))
    if how == "released":
        await ref.release()
    del ref
    await until_freed(proxy, before, *ids)


async def test_calls_that_are_on_their_way_have_what_is_released_meanwhile(
    proxy: tfr.LearnerProxy, one: str, seen: Seen, latch: Latch
) -> None:
    before = await files_of(proxy, one)
    holding = asyncio.ensure_future(proxy.custom_method(one, "hold", latch.path))
    await seen.reported(one)
    ref = await proxy.share(torch.ones(SIZE))
    queued = asyncio.ensure_future(proxy.custom_method(one, "sums", ref))
    await asyncio.sleep(0)
    await ref.release()
    latch.open()
    await holding
    assert await queued == [SIZE]
    await until_freed(proxy, before, one)


async def test_a_reference_is_not_to_be_kept_returned_or_given_to_a_constructor(
    proxy: tfr.LearnerProxy, one: str
) -> None:
    ref = await proxy.share(torch.ones(3))
    with pytest.raises(tfr.SerializationError, match="arguments of a call"):
        tfr.ParameterSerializer.serialize([ref])
    with pytest.raises(tfr.SerializationError):
        await proxy.share([ref])
    assert await proxy.custom_method(one, "sums", ref) == [3]


# Once per worker.


async def test_a_group_call_sends_once_per_worker(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    ids, weights = fresh.apart(8), {"w": torch.ones(SIZE), "b": torch.ones(3), "c": torch.ones(4)}
    check_once(proxy, await sent_by(proxy, proxy.clients(ids).call("same", weights)))
    own = {one: {"lr": 0.1 * number, "which": [number]} for number, one in enumerate(ids)}
    result: dict[str, Any] = {}

    async def call() -> None:
        result.update(await proxy.clients(own).call("echo", weights, more={"epochs": [1, 2]}))

    check_once(proxy, await sent_by(proxy, call()))
    assert {one: {"lr": kwargs["lr"], "which": kwargs["which"]} for one, (_, kwargs) in result.items()} == own


async def test_a_group_call_pickles_an_argument_once(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    counted = Counted()
    await proxy.clients(fresh.apart(6)).call("keep", [torch.ones(SIZE), counted])
    assert counted.num_pickles == 1


async def test_the_seeds_own_loop_sends_once_per_worker(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    ids, weights = fresh.apart(8), {"w": torch.ones(SIZE), "b": torch.ones(3), "c": torch.ones(4)}
    loops: list[Callable[[str], Coroutine[Any, Any, Any]]] = [
        lambda one: proxy.set_model_weights(one, weights),
        lambda one: proxy.client(one).set_model_weights(weights),
        lambda one: proxy.custom_method(one, "set_model_weights", weights),
        lambda one: proxy.execute_remote_method(one, "set_model_weights", weights=weights),
        lambda one: asyncio.wait_for(proxy.set_model_weights(one, weights), 60),
    ]

    async def wrapped(one: str) -> None:
        with suppress(KeyError):
            await proxy.set_model_weights(one, weights)

    for loop in [*loops, wrapped]:
        check_once(proxy, await sent_by(proxy, asyncio.gather(*map(loop, ids))))

    async def in_a_task_group() -> None:
        async with asyncio.TaskGroup() as group:
            for one in ids:
                group.create_task(proxy.set_model_weights(one, weights))

    check_once(proxy, await sent_by(proxy, in_a_task_group()))


SHARED = {
    "arrays": [np.ones(SIZE, dtype=np.float32), np.ones(3)],
    "bytes": bytes(NUM_BYTES),
    "a module": nn.Linear(SIZE - 1, 1),
    "state of a module": nn.Linear(SIZE - 1, 1).state_dict(),
    "parameters": list(nn.Linear(SIZE - 1, 1).parameters()),
}


@pytest.mark.parametrize("name", SHARED)
async def test_any_large_argument_is_sent_once_per_worker(proxy: tfr.LearnerProxy, fresh: Fresh, name: str) -> None:
    obj = SHARED[name]
    check_once(proxy, await sent_by(proxy, proxy.clients(fresh.apart(6)).call("keep", obj)))


async def test_several_large_arguments_are_each_sent_once_per_worker(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    """As SCAFFOLD does: the weights, and a control variate of the same size."""
    weights, control = {"w": torch.ones(SIZE)}, {"w": torch.zeros(SIZE)}
    ids = fresh.apart(6)
    check_once(proxy, await sent_by(proxy, proxy.clients(ids).call("echo", weights, control=control)), 2 * NUM_BYTES)
    arrays = [np.ones(SIZE, dtype=np.float32)]
    check_once(proxy, await sent_by(proxy, proxy.clients(ids).call("echo", arrays, {"epochs": 1})))


# Never stale.


class Case:
    """Submits two calls with one object in some way, and a change of it between them."""

    def __init__(self, proxy: tfr.LearnerProxy, ids: list[str]) -> None:
        self.array = np.zeros(SIZE, dtype=np.float32)
        self.weights: dict[str, Tensor] = {"w": torch.from_numpy(self.array), "b": torch.zeros(3)}
        self._proxy = proxy
        self._ids = ids

    async def call(self, number: int) -> Any:
        return await self._proxy.custom_method(self._ids[number], "total", self.weights)

    def task(self, number: int) -> asyncio.Task[Any]:
        """A task that is nothing but the call."""
        coroutine = self._proxy.custom_method(self._ids[number], "total", self.weights)
        return asyncio.create_task(coroutine)


CHANGES: dict[str, Callable[[Case], object]] = {
    "torch": lambda case: case.weights["w"].add_(1),
    "one element": lambda case: case.weights["w"].view(-1)[-1:].add_(1),
    "numpy": lambda case: case.array.fill(1),
    "one element by numpy": lambda case: case.array.__setitem__(-1, 1),
    "of .data": lambda case: case.weights["w"].data.add_(1),
    "a .data swap": lambda case: setattr(case.weights["w"], "data", torch.ones(SIZE)),
    "replaced": lambda case: case.weights.update(w=torch.ones(SIZE)),
    "added": lambda case: case.weights.update(more=torch.ones(1)),
    "removed": lambda case: case.weights.pop("b"),
    "reordered": lambda case: case.weights.update(w=case.weights.pop("w")),
    "requires_grad": lambda case: case.weights["w"].requires_grad_(),
    "an optimiser": lambda case: torch._foreach_add_(list(case.weights.values()), 1.0),
    "a small one": lambda case: case.weights["b"].add_(1),
}


async def _two_tasks_and_a_callback(case: Case, change: Callable[[Case], object]) -> list[Any]:
    first = case.task(0)
    asyncio.get_running_loop().call_soon(change, case)
    return list(await asyncio.gather(first, case.task(1)))


async def _two_tasks_and_one_that_wakes(case: Case, change: Callable[[Case], object]) -> list[Any]:
    event = asyncio.Event()

    async def changing() -> None:
        await event.wait()
        change(case)

    between = asyncio.create_task(changing())
    await asyncio.sleep(0)
    first = case.task(0)
    event.set()
    results = await asyncio.gather(first, case.task(1))
    await between
    return list(results)


async def _a_task_that_has_run_before(case: Case, change: Callable[[Case], object]) -> list[Any]:
    first = case.task(0)
    await asyncio.sleep(0)  # submitted, and in the same tick:
    change(case)
    return [await case.call(1), await first][::-1]


async def _two_that_have_run_before(case: Case, change: Callable[[Case], object]) -> list[Any]:
    async def late(number: int) -> Any:
        await asyncio.sleep(0)
        if number:
            change(case)
        return await case.call(number)

    return list(await asyncio.gather(late(0), late(1)))


async def _one_step_of_one_task(case: Case, change: Callable[[Case], object]) -> list[Any]:
    first = case.call(0)
    future: Any = first.send(None)  # submitted

    async def the_rest() -> Any:
        nonlocal future
        while True:
            future._asyncio_future_blocking = False
            await asyncio.wait([future])
            try:
                future = first.send(None)
            except StopIteration as end:
                return end.value

    change(case)
    return [await case.call(1), await the_rest()][::-1]


async def _awaited(case: Case, change: Callable[[Case], object]) -> list[Any]:
    first = await case.call(0)
    change(case)
    return [first, await case.call(1)]


async def _with_a_third(case: Case, change: Callable[[Case], object]) -> list[Any]:
    """The call between makes the others share, so that the change comes between two that do."""
    first, third = case.task(0), case.task(2)
    asyncio.get_running_loop().call_soon(change, case)
    results = await asyncio.gather(first, case.task(1), third)
    assert results[0] == results[2]
    return list(results[:2])


WAYS = [
    *(_awaited, _two_tasks_and_a_callback, _two_tasks_and_one_that_wakes, _a_task_that_has_run_before),
    *(_two_that_have_run_before, _one_step_of_one_task, _with_a_third),
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__.strip("_"))
async def test_a_change_between_two_calls_is_seen_by_the_second(
    proxy: tfr.LearnerProxy, fresh: Fresh, way: Callable[[Case, Callable[[Case], object]], Awaitable[list[Any]]]
) -> None:
    ids = fresh.together(3)
    for name, change in CHANGES.items():
        case = Case(proxy, ids)
        before = [(key, float(tensor.detach().sum()), tensor.requires_grad) for key, tensor in case.weights.items()]
        first, second = await way(case, change)
        after = [(key, float(tensor.detach().sum()), tensor.requires_grad) for key, tensor in case.weights.items()]
        assert before != after, name
        assert (first, second) == (before, after), name


NESTED: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "a list is appended": (lambda: [torch.ones(SIZE)], lambda obj: obj.append(1)),
    "a list in a list is": (lambda: [torch.ones(SIZE), [[]]], lambda obj: obj[1][0].append(1)),
    "a list is another": (lambda: [torch.ones(SIZE), [], []], lambda obj: obj.__setitem__(2, obj[1])),
    "a number in a dict": (lambda: {"w": torch.ones(SIZE), "n": {"x": 1.0}}, lambda obj: obj["n"].update(x=2.0)),
    "an attribute": (lambda: nn.Linear(SIZE, 1).eval(), lambda obj: obj.train()),
    "a buffer of a module": (lambda: nn.BatchNorm1d(SIZE), lambda obj: obj(torch.randn(2, SIZE))),
    "an array": (lambda: [np.zeros(SIZE)], lambda obj: obj[0].__setitem__(5, 1)),
    "a shape": (lambda: torch.ones(2, SIZE), lambda obj: obj.t_()),
    "bytes": (lambda: [bytearray(SIZE)], lambda obj: obj[0].__setitem__(5, 1)),
}


@pytest.mark.parametrize("name", NESTED)
async def test_a_change_deep_within_is_seen_by_the_second(proxy: tfr.LearnerProxy, fresh: Fresh, name: str) -> None:
    make, change = NESTED[name]
    obj, ids = make(), fresh.together(2)
    first = asyncio.create_task(proxy.custom_method(ids[0], "same", obj))
    asyncio.get_running_loop().call_soon(change, obj)
    results = await asyncio.gather(first, proxy.custom_method(ids[1], "same", obj))
    unchanged = make() if name != "a buffer of a module" else None
    if unchanged is not None and name != "an attribute":
        assert _bits(results[0]) == _bits(unchanged)
    assert _bits(results[1]) == _bits(obj)
    assert _bits(results[0]) != _bits(results[1])


def _bits(obj: Any) -> Any:
    if isinstance(obj, nn.Module):
        return obj.training, _bits(list(obj.state_dict().values()))
    if isinstance(obj, list):
        return [_bits(item) for item in obj] + [[first is other for first in obj] for other in obj]
    if isinstance(obj, dict):
        return {name: _bits(item) for name, item in obj.items()}
    return (obj.shape, np.asarray(obj).tobytes()) if isinstance(obj, (Tensor, np.ndarray)) else obj


async def test_ties_between_arguments_are_kept_whatever_else_is_shared(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    names = ["a"]
    weights: dict[str, Any] = {"w": torch.zeros(SIZE), "names": names}
    ids = fresh.together(4)
    tensor = weights["w"]
    tied = await asyncio.gather(
        *(proxy.custom_method(one, "tied", tensor, tensor[5:].view(-1)) for one in ids[:2]),
        proxy.custom_method(ids[2], "tied", tensor, tensor),
    )
    assert tied[2]
    assert tied[0] == tied[1]  # a view of a tensor is tied to it where both travel in one call, in whatever mode
    for one in ids:
        results = await asyncio.gather(
            proxy.custom_method(one, "same", weights), proxy.custom_method(one, "echo", weights, weights["w"], names)
        )
        state, part, same_names = results[1][0]
        assert state["w"].data_ptr() == part.data_ptr()
        assert state["names"] is same_names


@pytest.mark.parametrize("bind", ["list", "dict", "deep"])
async def test_an_object_that_contains_itself_arrives(proxy: tfr.LearnerProxy, one: str, bind: str) -> None:
    obj: Any = [torch.ones(SIZE)]
    if bind == "list":
        obj.append(obj)
    elif bind == "dict":
        obj.append({"up": obj})
    else:
        for _ in range(60):
            obj = [obj, obj]
    async with asyncio.timeout(20):
        back = await proxy.custom_method(one, "same", obj)
    if bind == "list":
        assert back[1] is back
    elif bind == "dict":
        assert back[1]["up"] is back
    else:
        num_levels = 0
        while len(back) == 2:
            assert back[0] is back[1]
            back, num_levels = back[0], num_levels + 1
        assert num_levels == 60
    if bind != "deep":
        assert len(back) == 2
    assert torch.equal(back[0], torch.ones(SIZE))


async def test_an_object_that_cannot_be_sent_any_more_fails_with_its_clients_name(
    proxy: tfr.LearnerProxy, fresh: Fresh
) -> None:
    obj: list[Any] = [torch.ones(SIZE)]
    ids = fresh.together(2)

    async def second() -> Any:
        obj.append(lambda: 1)
        return await proxy.custom_method(ids[1], "same", obj)

    first: Any
    error: Any
    first, error = await asyncio.gather(proxy.custom_method(ids[0], "same", obj), second(), return_exceptions=True)
    assert torch.equal(first[0], torch.ones(SIZE))
    assert isinstance(error, tfr.SerializationError)
    assert f"{ids[1]}.same" in str(error)


# Cancelling, waiting, order.


async def test_calls_that_are_cancelled_do_not_spoil_those_who_share_with_them(
    proxy: tfr.LearnerProxy, fresh: Fresh, latch: Latch
) -> None:
    ids, weights = fresh.together(5), torch.ones(SIZE)
    before = await files_of(proxy, ids[0])

    def submit() -> list[asyncio.Task[Any]]:
        return [asyncio.create_task(proxy.custom_method(one, "write_and_sum", weights)) for one in ids]

    for when in range(3):  # before they are submitted, before they are sent, and as they are queued
        holding = [asyncio.create_task(proxy.custom_method(one, "hold_async", latch.path)) for one in ids]
        await asyncio.sleep(0)
        tasks = submit()
        for _ in range(when):
            await asyncio.sleep(0)
        for task in (tasks[0], tasks[3]):
            task.cancel()
        latch.open()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*holding)
        assert [result for result in results if not isinstance(result, BaseException)] == [2.0 * SIZE] * 3
    del task, tasks, holding, results  # the errors' tracebacks show the arguments
    await until_freed(proxy, before, ids[0])


@pytest.mark.parametrize("options", [{}, {"timeout_s": 60}, {"retries": 2}], ids=str)
async def test_calls_of_one_tick_keep_their_order_with_what_is_shared_among_them(
    proxy: tfr.LearnerProxy, fresh: Fresh, options: dict[str, Any]
) -> None:
    ids, view = fresh.apart(3), proxy.options(**options)
    ref = await proxy.share(torch.full((SIZE,), 3.0))
    weights = [torch.full((SIZE,), float(number)) for number in range(3)]
    calls: list[Coroutine[Any, Any, Any]] = []
    for one in ids:
        calls += [view.custom_method(one, "append", "first"), view.custom_method(one, "keep", weights[0])]
        calls += [view.custom_method(one, "add_to_kept", 1.0), view.custom_method(one, "live")]
        calls += [view.custom_method(one, "keep", ref), view.custom_method(one, "live")]
        calls += [view.custom_method(one, "append_async", "second"), view.custom_method(one, "keep", weights[2])]
        calls += [view.custom_method(one, "live"), view.custom_method(one, "keep", None)]
    results = await asyncio.gather(*calls)
    for number in range(len(ids)):
        of_one = results[10 * number : 10 * (number + 1)]
        assert [of_one[place].unique().tolist() for place in (3, 5, 8)] == [[1.0], [3.0], [2.0]]
    assert await proxy.custom_method(ids[0], "what_happened") == ["first", ("begin", "second"), ("end", "second")]


async def test_snapshots_and_streams_keep_their_place_behind_a_shared_call(
    proxy: tfr.LearnerProxy, fresh: Fresh
) -> None:
    one, other = fresh.together(2)

    async def items(stream: AsyncIterator[Any]) -> list[Any]:
        return [item async for item in stream]

    async def snapshot() -> bytes:
        async for _, data in proxy.snapshots([one]):
            return data
        raise AssertionError

    weights = torch.full((SIZE,), 2.0)
    tasks: list[Any] = [
        asyncio.ensure_future(proxy.custom_method(one, "keep", weights)),
        asyncio.ensure_future(snapshot()),
        asyncio.ensure_future(proxy.custom_method(one, "keep", None)),
        asyncio.ensure_future(items(proxy.stream(one, "sums_one_by_one", weights, 2))),
        asyncio.ensure_future(proxy.custom_method(other, "keep", weights)),
    ]
    _, data, _, streamed, _ = await asyncio.gather(*tasks)
    assert streamed == [2.0 * SIZE, 3.0 * SIZE]
    await proxy.restore({one: data})
    assert torch.equal(await proxy.custom_method(one, "live"), weights)
