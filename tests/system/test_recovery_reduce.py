"""A worker that is lost, or leaves, in the middle of a reduction: its results are made again, and counted once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from conftest import Latch, opened
from internals import check_nothing_goes_on, group_of
from losses import (
    SEED,
    Losses,
    brackets,
    check_draw,
    draw,
    kill,
    number,
    on_1,
    on_2,
    once_ended,
    pseudo,
    seen,
)
from summing import Adder, Brackets, Deadly, Noted, SlowToPack

import torchfedrpc as tfr
from torchfedrpc.rpc.worker_client import WorkerClient
from torchfedrpc.testing import Faults

__all__ = ["on_1", "on_2", "seen"]  # fixtures

ALL = [f"client_{number}" for number in range(240)]


@pytest.fixture(scope="module")
def drawn(runner: asyncio.Runner) -> dict[str, list[str]]:
    return runner.run(draw(ALL))


@pytest.fixture(scope="module")
def proxy(runner: asyncio.Runner, drawn: dict[str, list[str]]) -> Iterator[tfr.LearnerProxy]:
    """Learners on two workers; every test takes clients of its own by `on_1` and `on_2`."""
    with opened(runner, tfr.LearnerProxy(Adder, ALL, runtime=pseudo(heartbeat_timeout_s=1.5), seed=SEED)) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def _nothing_goes_on(runner: asyncio.Runner, request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "proxy" in request.fixturenames:
        runner.run(check_nothing_goes_on(request.getfixturevalue("proxy")))


# Lost workers.


@pytest.mark.parametrize("at_call", [1, 3])
async def test_a_worker_is_lost_while_its_calls_wait_or_run(
    proxy: tfr.LearnerProxy,
    drawn: dict[str, list[str]],
    seen: Losses,
    on_1: Iterator[str],
    on_2: Iterator[str],
    at_call: int,
) -> None:
    clients = [*islice(on_1, 4), *islice(on_2, 3)]
    async with Faults().kill("worker1", at_call=at_call).injected(proxy):
        await check_draw(proxy, drawn, clients, 0)
    assert seen.workers == ["worker1"]
    await check_draw(proxy, drawn, clients, 1)


async def test_a_worker_is_lost_between_two_reductions(
    proxy: tfr.LearnerProxy, drawn: dict[str, list[str]], seen: Losses, on_1: Iterator[str], on_2: Iterator[str]
) -> None:
    clients = [*islice(on_1, 2), next(on_2)]
    await check_draw(proxy, drawn, clients, 0)
    kill(proxy, "worker1")
    await seen.loss()
    await check_draw(proxy, drawn, clients, 1)


async def test_each_worker_gets_one_request_for_its_calls(
    proxy: tfr.LearnerProxy, on_1: Iterator[str], on_2: Iterator[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clients, asked = [*islice(on_1, 3), *islice(on_2, 4)], []
    run_batch = WorkerClient.run_batch

    def noted(self: WorkerClient, batch: Any) -> Any:
        asked.append((self.label, len(batch.calls)))
        return run_batch(self, batch)

    monkeypatch.setattr(WorkerClient, "run_batch", noted)
    result = await proxy.clients(clients).reduce("text", Brackets())
    assert result.value == brackets(map(number, clients))
    assert asked == [("worker1", 3), ("worker2", 4)]


async def test_a_quorum_does_not_wait_for_a_learner_that_is_busy(
    proxy: tfr.LearnerProxy, seen: Losses, on_1: Iterator[str], on_2: Iterator[str], latch: Latch
) -> None:
    clients, slow = [*islice(on_1, 3), *islice(on_2, 2)], next(on_2)
    holding: Any = asyncio.ensure_future(proxy.custom_method(slow, "text_once_open_async", latch.path))
    await asyncio.sleep(0)
    result = await proxy.clients([*clients, slow]).options(min_results=5).reduce("text", Brackets())
    assert (result.value, result.count) == (brackets(map(number, clients)), 5)
    latch.open()
    await holding


@pytest.mark.parametrize(("at", "times"), [("merge", 1), ("pack", 1), ("pack", 2)])
async def test_a_worker_is_lost_as_results_are_merged_or_collected(
    proxy: tfr.LearnerProxy,
    drawn: dict[str, list[str]],
    seen: Losses,
    on_1: Iterator[str],
    on_2: Iterator[str],
    tmp_path: Path,
    at: str,
    times: int,
) -> None:
    clients = [*islice(on_1, 3), *islice(on_2, 3)]
    await check_draw(proxy, drawn, clients, 0, Deadly(at, str(tmp_path / "killed"), times))
    assert len(seen.workers) in range(1, times + 1)  # both workers may die at once
    await check_draw(proxy, drawn, clients, 1)


async def test_worlds_are_formed_again_while_batches_run(
    proxy: tfr.LearnerProxy, seen: Losses, on_1: Iterator[str], on_2: Iterator[str], latch: Latch, tmp_path: Path
) -> None:
    """A surviving worker runs no call twice; the calls of the lost one are made again."""
    quick, slow = [next(on_1), next(on_2)], [next(on_1), next(on_2)]
    notes = tmp_path / "notes"
    arguments: dict[str, Any] = {one: {"until": None} for one in quick} | {one: {"until": latch.path} for one in slow}
    group = proxy.clients(arguments)
    reduction = asyncio.ensure_future(group.reduce("text_once_open_async", Noted(str(notes))))
    await asyncio.gather(*map(seen.ended, quick))
    for world in range(1, 3):
        group_of(proxy)._break()
        await seen.world(world)
    kill(proxy, "worker1")
    await seen.world(3)
    latch.open()
    assert (await reduction).value == brackets(sorted(map(number, [*quick, *slow]), key=int))
    assert sorted(notes.read_text().split()) == sorted(map(number, [*quick, quick[0], *slow]))


async def test_learners_can_be_captured_while_their_results_lie_at_the_workers(
    proxy: tfr.LearnerProxy,
    drawn: dict[str, list[str]],
    seen: Losses,
    on_1: Iterator[str],
    on_2: Iterator[str],
    latch: Latch,
) -> None:
    clients, slow = [*islice(on_1, 2), *islice(on_2, 2)], next(on_2)
    everybody = [*clients, slow]
    await proxy.clients(clients).call("draw_text")
    holding = asyncio.ensure_future(proxy.custom_method(slow, "text_once_open_async", latch.path))
    await asyncio.sleep(0)
    reduction = asyncio.ensure_future(proxy.clients(everybody).reduce("draw_text", Brackets()))
    await asyncio.gather(*(seen.ended(one) for one in clients))
    snapshots = {one: data async for one, data in proxy.snapshots(clients)}
    kill(proxy, "worker1")
    await seen.loss()
    latch.open()
    assert (await reduction).value == brackets([*(drawn[one][1] for one in clients), drawn[slow][0]])
    await holding
    await proxy.clients(clients).call("draw_text")
    await proxy.restore(snapshots)
    assert dict(await proxy.clients(clients).call("draw_text")) == {one: drawn[one][2] for one in clients}


async def test_calls_beside_one_that_raises_no_exception_are_part_of_the_state(
    proxy: tfr.LearnerProxy,
    drawn: dict[str, list[str]],
    seen: Losses,
    on_1: Iterator[str],
) -> None:
    clients = list(islice(on_1, 3))
    arguments = {one: {"fails": one == clients[1]} for one in clients}
    with pytest.raises(BaseException, match="fails") as caught:
        await proxy.clients(arguments).reduce("draw_text_or_fatal", Brackets())
    assert type(caught.value) is BaseException
    before = await proxy.clients(clients).call("get_model_weights")
    kill(proxy, "worker1")
    after = await proxy.clients(clients).call("get_model_weights")
    assert [after[one].tolist() for one in clients] == [before[one].tolist() for one in clients]


async def test_a_result_behind_a_call_that_was_cut_off_is_made_again_on_the_right_state(
    proxy: tfr.LearnerProxy,
    drawn: dict[str, list[str]],
    seen: Losses,
    on_1: Iterator[str],
    on_2: Iterator[str],
    latch: Latch,
) -> None:
    clients = [next(on_1), next(on_1)]
    await check_draw(proxy, drawn, clients, 0)
    holding = [asyncio.ensure_future(proxy.custom_method(one, "hold_async", latch.path)) for one in clients]
    await asyncio.gather(*map(seen.reported, clients))
    for one in holding:
        one.cancel()
    await asyncio.gather(*holding, return_exceptions=True)
    unsubscribe = once_ended(proxy, 2, lambda: kill(proxy, "worker1"))
    await check_draw(proxy, drawn, clients, 1)
    unsubscribe()
    assert await proxy.clients(clients).call("draw_text") == {one: drawn[one][2] for one in clients}
    assert seen.workers == ["worker1"]


@pytest.mark.parametrize("kills", [False, True])
async def test_calls_behind_one_that_was_cut_off_do_not_wait_for_another_workers_batch(
    proxy: tfr.LearnerProxy,
    seen: Losses,
    on_1: Iterator[str],
    on_2: Iterator[str],
    latch: Latch,
    tmp_path: Path,
    kills: bool,
) -> None:
    quick, slow = next(on_1), next(on_2)
    arguments: dict[str, Any] = {quick: {"until": None}, slow: {"until": latch.path}}
    reduction = asyncio.ensure_future(proxy.clients(arguments).reduce("text_once_open_async", Brackets()))
    await seen.ended(quick)
    cut_off = asyncio.ensure_future(proxy.custom_method(quick, "hold_async", str(tmp_path / "never")))
    await seen.reported(quick)
    cut_off.cancel()
    async with asyncio.timeout(20):
        assert await proxy.custom_method(quick, "append", "x") == 3
    assert not reduction.done()
    if kills:
        kill(proxy, "worker1")
        await seen.loss()
    latch.open()
    assert (await reduction).value == brackets([number(quick), number(slow)])
    assert await proxy.custom_method(quick, "what_happened") == ["hold begins", ("hold cancelled", True), "x"]


async def test_a_reduction_that_is_cancelled_as_a_worker_is_replaced_leaves_the_learners_usable(
    proxy: tfr.LearnerProxy,
    drawn: dict[str, list[str]],
    seen: Losses,
    on_1: Iterator[str],
    on_2: Iterator[str],
    latch: Latch,
) -> None:
    clients = [*islice(on_1, 2), *islice(on_2, 2)]
    await check_draw(proxy, drawn, clients, 0)
    unsubscribe = once_ended(proxy, 4, lambda: kill(proxy, "worker1"))
    reduction = asyncio.ensure_future(proxy.clients(clients).reduce("draw_text", SlowToPack(latch.path)))
    await seen.loss()
    unsubscribe()
    reduction.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reduction
    latch.open()
    await check_draw(proxy, drawn, clients, 2)
