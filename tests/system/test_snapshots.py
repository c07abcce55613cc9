"""proxy.snapshots and proxy.restore, in every mode and between modes."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import aclosing
from typing import Any

import pytest
from conftest import Fresh, Latch, Seen, opened
from learners import Mortal
from losses import SEED

import torchfedrpc as tfr
from torchfedrpc.host import snapshot
from torchfedrpc.wire.allowlist import AllowList

ALLOW = AllowList(["learners"])


@pytest.fixture(scope="module")
def proxy(runner: asyncio.Runner, runtime: dict[str, Any]) -> Iterator[tfr.LearnerProxy]:
    clients = [f"client_{number}" for number in range(40)]
    with opened(runner, tfr.LearnerProxy(Mortal, clients, runtime=runtime, seed=SEED)) as proxy:
        yield proxy


async def snapshots_of(proxy: tfr.LearnerProxy, *clients: str) -> dict[str, bytes]:
    return {client: data async for client, data in proxy.snapshots(clients or None)}


async def steps(proxy: tfr.LearnerProxy, client: str, number: int) -> list[Any]:
    return [await proxy.custom_method(client, "step") for _ in range(number)]


async def test_snapshots_come_as_bytes_for_all_clients_in_order(proxy: tfr.LearnerProxy) -> None:
    taken = [(client, type(data)) async for client, data in proxy.snapshots()]
    assert taken == [(client, bytes) for client in proxy.client_ids]
    some = [proxy.client_ids[30], proxy.client_ids[2]]
    assert [client async for client, _ in proxy.snapshots(some)] == some


async def test_a_snapshot_comes_behind_the_calls_before_it_and_keeps_nothing_of_those_after(
    proxy: tfr.LearnerProxy, one: str, seen: Seen, latch: Latch
) -> None:
    calls = [asyncio.ensure_future(proxy.custom_method(one, "hold", latch.path))]
    await seen.reported(one)
    taking = asyncio.ensure_future(snapshots_of(proxy, one))
    calls.append(asyncio.ensure_future(proxy.custom_method(one, "append", "after")))
    await asyncio.sleep(0)  # tasks begin in their order, and what they ask for is submitted in their first step
    latch.open()
    taken = await taking
    await asyncio.gather(*calls)
    await proxy.restore(taken)
    assert await proxy.custom_method(one, "what_happened") == ["hold begins", "hold released"]


async def test_a_restored_learner_goes_on_from_its_snapshot_with_the_same_bits(
    proxy: tfr.LearnerProxy, one: str
) -> None:
    await steps(proxy, one, 2)
    taken = await snapshots_of(proxy, one)
    expected = await steps(proxy, one, 3)
    await proxy.restore(taken)
    assert await steps(proxy, one, 3) == expected
    await proxy.restore(taken)  # as often as one likes
    assert await steps(proxy, one, 3) == expected


async def test_a_learner_that_was_never_called_is_made_anew(proxy: tfr.LearnerProxy, one: str) -> None:
    taken = await snapshots_of(proxy, one)
    expected = await steps(proxy, one, 2)
    await proxy.restore(taken)
    assert await steps(proxy, one, 2) == expected


def _damaged(data: bytes) -> bytes:
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


def _of(field: str, value: str) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        changes: dict[str, Any] = {field: value}
        return bytes(snapshot.dump(dataclasses.replace(snapshot.load(data, ALLOW), **changes), ALLOW))

    return change


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (_damaged, "damaged"),
        (lambda data: data[: len(data) // 2], "damaged"),
        (lambda data: data[:5], "no snapshot, or cut short"),
        (lambda data: b"", "must be bytes as snapshots"),
        (lambda data: "text", "must be bytes as snapshots"),
        (_of("client_id", "another"), "snapshot of 'another' and not of"),
        (_of("learner", "learners.Nursery"), r"is of a learners\.Nursery, and the run's learner is learners\.Mortal"),
    ],
)
async def test_bytes_that_are_not_its_snapshot_leave_a_learner_as_it_was(
    proxy: tfr.LearnerProxy, fresh: Fresh, change: Callable[[bytes], Any], complaint: str
) -> None:
    one, other = fresh.together(2)
    await steps(proxy, one, 1)
    taken = await snapshots_of(proxy, one, other)
    await steps(proxy, one, 1)
    expected = await steps(proxy, one, 1)
    await proxy.restore(taken)
    await steps(proxy, one, 1)
    with pytest.raises(tfr.GroupCallError, match=complaint) as caught:
        await proxy.restore({one: change(taken[one]), other: taken[other]})
    assert {client: type(error) for client, error in caught.value.failures.items()} == {one: tfr.SnapshotError}
    assert await steps(proxy, one, 1) == expected


async def test_restore_reports_every_failure_by_client_and_restores_the_others(
    proxy: tfr.LearnerProxy, fresh: Fresh
) -> None:
    first, second, third, fourth = ids = fresh.apart(4)
    taken = await snapshots_of(proxy, *ids)
    expected = {one: await steps(proxy, one, 2) for one in ids}
    damaged = {first: _damaged(taken[first]), third: _of("client_id", "another")(taken[third])}
    with pytest.raises(tfr.GroupCallError, match=f"restore failed for {first}, {third}, first with Snap") as caught:
        await proxy.restore(taken | damaged)
    failures = caught.value.failures
    assert list(failures) == [first, third]
    assert "damaged" in str(failures[first])
    assert "snapshot of 'another'" in str(failures[third])
    assert list(caught.value.results) == [second, fourth]
    assert {one: await steps(proxy, one, 2) for one in (second, fourth)} == {
        one: expected[one] for one in (second, fourth)
    }
    assert (await steps(proxy, first, 1))[0] not in expected[first]  # it goes on from where it was


async def test_an_unknown_client_is_refused_before_anything_is_restored(proxy: tfr.LearnerProxy, one: str) -> None:
    taken = await snapshots_of(proxy, one)
    first = await steps(proxy, one, 1)
    with pytest.raises(tfr.UnknownClientError):
        await proxy.restore({one: taken[one], "nobody": taken[one]})
    assert await steps(proxy, one, 1) != first
    with pytest.raises(tfr.UnknownClientError):
        await snapshots_of(proxy, one, "nobody")


@pytest.mark.parametrize("what", ["lock", "generator"])
async def test_a_learner_that_cannot_be_captured_is_an_error_that_names_the_attribute(
    proxy: tfr.LearnerProxy, one: str, what: str
) -> None:
    await proxy.custom_method(one, "hide", what)
    with pytest.raises(tfr.SnapshotError, match=rf"{one} .*'hidden'"):
        await snapshots_of(proxy, one)
    assert await proxy.custom_method(one, "append", 1) == 1


async def test_a_learner_whose_stream_this_task_reads_cannot_be_captured_meanwhile(
    proxy: tfr.LearnerProxy, one: str
) -> None:
    async with aclosing(proxy.stream(one, "count", 3)) as items:
        await anext(items)
        with pytest.raises(tfr.TorchFedRpcError, match="would wait for ever"):
            await snapshots_of(proxy, one)


async def test_restore_takes_a_mapping_and_names_an_id_in_short(proxy: tfr.LearnerProxy) -> None:
    with pytest.raises(tfr.ConfigError, match="a mapping of client id -> bytes, not a list"):
        await proxy.restore([("a", b"")])  # type: ignore[arg-type]
    with pytest.raises(tfr.UnknownClientError) as caught:
        await proxy.restore({"x" * 10**6: b""})
    assert len(str(caught.value)) < 1000
    for odd in (["a"], None):
        with pytest.raises(tfr.UnknownClientError):
            proxy.client(odd)  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        proxy.client(proxy.client_ids[0]).client_id = "b"  # type: ignore[misc]
