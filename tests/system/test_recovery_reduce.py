"""A worker that is lost, or leaves, in the middle of a reduction: its results are made again, and counted once."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from conftest import Latch, opened
from losses import (
    SEED,
    Losses,
    brackets,
    check_draw,
    check_nothing_goes_on,
    draw,
    kill,
    number,
    of_draw,
    on_1,
    on_2,
    once_ended,
    pseudo,
    seen,
)
from summing import Adder, Brackets, Deadly, Noted, SlowToPack

import torchfedrpc as tfr
from torchfedrpc.executors.reducing import ReducingExecutor
from torchfedrpc.rpc.worker_client import RemoteHost
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


@pytest.mark.usefixtures("asked_when_due")
@pytest.mark.parametrize("killed", [["worker1"], ["worker1", "worker2"]], ids="-".join)
async def test_workers_are_lost_once_all_results_are_added_and_before_they_are_collected(
    proxy: tfr.LearnerProxy,
    drawn: dict[str, list[str]],
    seen: Losses,
    on_1: Iterator[str],
    on_2: Iterator[str],
    killed: list[str],
) -> None:
    clients = [*islice(on_1, 3), *islice(on_2, 4)]
    await check_draw(proxy, drawn, clients, 0)
    unsubscribe = once_ended(proxy, len(clients), lambda: [kill(proxy, worker) for worker in killed])
    await check_draw(proxy, drawn, clients, 1)
    unsubscribe()
    assert sorted(seen.workers) == killed
    await check_draw(proxy, drawn, clients, 2)


async def test_partial_results_come_with_the_last_answers(
    proxy: tfr.LearnerProxy, on_1: Iterator[str], on_2: Iterator[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each worker is asked once, with the calls, and not again once they have ended."""
    clients, executor, asked = [*islice(on_1, 3), *islice(on_2, 4)], proxy._router._main, []
    request = ReducingExecutor.request

    def noted(self: Any, label: str, *args: Any, **kwargs: Any) -> Any:
        asked.append((label, kwargs, sum(len(record.asked) for record in executor._ledger)))
        return request(self, label, *args, **kwargs)

    monkeypatch.setattr(ReducingExecutor, "request", noted)
    result = await proxy.clients(clients).reduce("text", Brackets())
    assert result.value == brackets(map(number, clients))
    assert asked == [("worker1", {"waits": True}, 7), ("worker2", {"waits": True}, 7)]


async def test_partial_results_that_were_asked_for_with_a_call_that_goes_on_are_asked_for_again(
    proxy: tfr.LearnerProxy, seen: Losses, on_1: Iterator[str], on_2: Iterator[str], latch: Latch
) -> None:
    """A quorum need not wait for what was asked for with all of its calls."""
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


@pytest.mark.usefixtures("asked_when_due")
async def test_a_world_is_formed_again_while_results_lie_at_the_workers(
    proxy: tfr.LearnerProxy,
    drawn: dict[str, list[str]],
    seen: Losses,
    on_1: Iterator[str],
    on_2: Iterator[str],
    latch: Latch,
    tmp_path: Path,
) -> None:
    """Those of the worker that lives are neither made again nor sent again nor counted twice."""
    lost, survivors, holding = next(on_1), list(islice(on_2, 3)), next(on_2)
    notes = tmp_path / "notes"
    hold: Any = asyncio.ensure_future(proxy.custom_method(holding, "note_and_hold", str(notes), latch.path))
    await seen.reported(holding)
    clients = [lost, *survivors[:2]]
    ended = asyncio.Event()
    unsubscribe = once_ended(proxy, 1, ended.set)
    reduction = asyncio.ensure_future(proxy.clients([lost, holding]).reduce("text", Noted(str(notes))))
    await ended.wait()
    unsubscribe()
    group: Any = proxy._router._main._group
    for world in range(1, 3):
        group._break()
        await seen.world(world)
    kill(proxy, "worker1")
    await seen.world(3)
    latch.open()
    assert (await reduction).value == brackets([number(lost), number(holding)])
    await hold
    assert sorted(notes.read_text().split()) == sorted([holding, number(lost), number(lost), number(holding)])
    await check_draw(proxy, drawn, clients, 0)


async def test_results_at_a_worker_are_not_sent_for_again_in_the_next_world(
    proxy: tfr.LearnerProxy,
    seen: Losses,
    on_1: Iterator[str],
    on_2: Iterator[str],
    latch: Latch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clients, slow = [*islice(on_1, 2), *islice(on_2, 2)], next(on_2)
    arguments: dict[str, Any] = {one: {"until": None} for one in clients} | {slow: {"until": latch.path}}
    ended = asyncio.Event()
    unsubscribe = once_ended(proxy, len(clients), ended.set)
    reduction = asyncio.ensure_future(proxy.clients(arguments).reduce("text_once_open_async", Brackets()))
    await ended.wait()
    unsubscribe()
    executor: Any = proxy._router._main
    asked_for, submit = [], RemoteHost.submit

    def noted(host: RemoteHost, call: Any, *args: Any, **kwargs: Any) -> Any:
        if call.kind == "call":
            asked_for.append(call.client_id)
        return submit(host, call, *args, **kwargs)

    monkeypatch.setattr(RemoteHost, "submit", noted)
    executor._group._break()
    await seen.world()
    latch.open()
    assert (await reduction).value == brackets(map(number, [*clients, slow]))
    assert asked_for == [slow]


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
async def test_calls_behind_one_that_was_cut_off_do_not_wait_for_a_reduction(
    proxy: tfr.LearnerProxy,
    seen: Losses,
    on_1: Iterator[str],
    on_2: Iterator[str],
    latch: Latch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kills: bool,
) -> None:
    """Their snapshot must not be asked for again and again, since it has the result that lies at the worker."""
    quick, slow = next(on_1), next(on_2)
    arguments: dict[str, Any] = {quick: {"until": None}, slow: {"until": latch.path}}
    reduction = asyncio.ensure_future(proxy.clients(arguments).reduce("text_once_open_async", Brackets()))
    await seen.ended(quick)
    executor: Any = proxy._router._main
    request, requested = executor._request_snapshot, []
    monkeypatch.setattr(executor, "_request_snapshot", lambda record: (requested.append(record), request(record)))
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
    assert len(requested) < 10
    assert await proxy.custom_method(quick, "what_happened") == ["hold begins", ("hold cancelled", True), "x"]


async def test_few_arguments_are_kept_for_results_that_lie_at_the_workers(
    proxy: tfr.LearnerProxy,
    on_1: Iterator[str],
    on_2: Iterator[str],
    seen: Losses,
    latch: Latch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clients, slow = [*islice(on_1, 4), *islice(on_2, 4)], next(on_2)
    executor: Any = proxy._router._main
    monkeypatch.setattr(executor, "config", dataclasses.replace(executor.config, journal_max_bytes=40_000))
    arguments: dict[str, Any] = {one: {"until": None, "ballast": bytes(10_000)} for one in clients}
    arguments[slow] = {"until": latch.path}
    reduction = asyncio.ensure_future(proxy.clients(arguments).reduce("text_once_open_async", Brackets()))
    await asyncio.gather(*map(seen.ended, clients))

    def kept() -> int:
        return sum(len(record.asked) for record in executor._ledger)

    async with asyncio.timeout(20):
        while kept() > 5:
            await asyncio.sleep(0.01)
    assert not reduction.done()
    latch.open()
    result = await reduction
    assert (result.value, result.count) == (brackets(map(number, [*clients, slow])), 9)


@pytest.mark.usefixtures("asked_when_due")
@pytest.mark.parametrize("kills", [False, True])
async def test_a_result_that_is_collected_before_its_call_is_answered_counts_once(
    proxy: tfr.LearnerProxy,
    drawn: dict[str, list[str]],
    seen: Losses,
    on_1: Iterator[str],
    on_2: Iterator[str],
    latch: Latch,
    monkeypatch: pytest.MonkeyPatch,
    kills: bool,
) -> None:
    clients, others, slow = list(islice(on_1, 3)), list(islice(on_2, 2)), next(on_2)
    executor: Any = proxy._router._main
    host = executor._group.hosts["worker1"]
    submit, late = host.submit, []

    def submit_late(call: Any, reply: Any) -> None:
        """Have the answer of one call wait."""
        submit(call, (lambda outcome: late.append((reply, outcome))) if call.client_id == clients[1] else reply)

    monkeypatch.setattr(host, "submit", submit_late)
    holding = asyncio.ensure_future(proxy.custom_method(slow, "text_once_open_async", latch.path))
    await asyncio.sleep(0)
    reduction = asyncio.ensure_future(proxy.clients([*clients, *others, slow]).reduce("draw_text", Brackets()))
    await asyncio.gather(seen.ended(clients[0]), seen.ended(clients[2]))
    while not late:
        await asyncio.sleep(0.01)
    (collecting,) = executor._reductions.values()
    assert collecting.hurry(executor._ledger.get(clients[0]))
    while not collecting._collected_places:
        await asyncio.sleep(0.01)
    assert len(collecting._collected_places) == 3
    monkeypatch.undo()
    if kills:
        kill(proxy, "worker1")
        await seen.loss()
    else:
        for reply, outcome in late:
            reply(outcome)
    latch.open()
    result = await reduction
    assert (result.value, result.count) == (of_draw(drawn, [*clients, *others, slow]), 6)
    await holding
    await check_draw(proxy, drawn, [*clients, *others, slow], 1)


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
