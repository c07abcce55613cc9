"""Reductions in runs of their own: what becomes of results that are lost for good, and workers that come and go."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from internals import check_nothing_goes_on
from losses import SEED, Losses, check_draw, draw, of_draw, pid_of, pseudo
from summing import Adder, Brackets, Deadly, SlowToPack
from workers import joining, make_token

import torchfedrpc as tfr
from torchfedrpc.events import CallEnded, WorkerJoined, WorkerLeft
from torchfedrpc.testing import Faults

ALL = [f"client_{number}" for number in range(6)]


@pytest.fixture(scope="module")
def drawn(runner: asyncio.Runner) -> dict[str, list[str]]:
    """Client -> what its `draw_text` gives, time after time, in an undisturbed run."""
    return runner.run(draw(ALL))


# Limits.


@pytest.mark.parametrize("options", [{}, {"on_error": "collect"}, {"min_results": 4}], ids=str)
async def test_results_that_are_lost_are_errors_where_workers_are_not_replaced(options: dict[str, Any]) -> None:
    clients = ALL[:4]
    async with tfr.LearnerProxy(Adder, clients, runtime=pseudo(on_worker_lost="fail"), seed=SEED) as proxy:
        failures: Mapping[str, BaseException]
        reduction = proxy.clients(clients).options(**options).reduce("text", Brackets())
        async with Faults().kill("worker1", at_call=2).injected(proxy):
            if "on_error" in options:
                result = await reduction
                assert (result.value, result.count) == ("(2+3)", 2)
                failures = result.failures
            else:
                with pytest.raises((tfr.GroupCallError, tfr.QuorumError)) as caught:
                    await reduction
                assert isinstance(caught.value, tfr.QuorumError if "min_results" in options else tfr.GroupCallError)
                failures = caught.value.failures
        assert list(failures) == clients[:2]
        for client, error in failures.items():
            assert isinstance(error, tfr.WorkerLostError)
            assert f"{client}.text on worker1" in str(error)
        assert (await proxy.clients(clients[2:]).reduce("text", Brackets())).value == "(2+3)"


@pytest.mark.parametrize("options", [{"min_results": 2}, {"on_error": "collect"}], ids=str)
async def test_a_frozen_worker_that_has_no_result_fails_no_reduction(options: dict[str, Any]) -> None:
    clients = ALL[:4]
    async with tfr.LearnerProxy(Adder, clients, runtime=pseudo(heartbeat_timeout_s=30), seed=SEED) as proxy:
        await proxy.clients(clients).reduce("text", Brackets())
        frozen = pid_of(proxy, "worker1")
        os.kill(frozen, signal.SIGSTOP)
        try:
            result = await proxy.clients(clients).options(timeout_s=2, **options).reduce("text", Brackets())
        finally:
            os.kill(frozen, signal.SIGCONT)
        assert (result.value, result.count) == ("(2+3)", 2)
        assert list(result.failures) == ([] if "min_results" in options else clients[:2])
        assert (await proxy.clients(clients).reduce("text", Brackets())).value == "((0+1)+(2+3))"
        assert (result.value, result.count) == ("(2+3)", 2)
        await check_nothing_goes_on(proxy)


async def test_a_reducer_that_kills_its_worker_each_time_is_given_up(tmp_path: Path) -> None:
    clients = ALL[:3]
    runtime = pseudo(num_processes=1, max_recoveries=1)
    async with tfr.LearnerProxy(Adder, clients, runtime=runtime, seed=SEED) as proxy:
        async with asyncio.timeout(60):
            with pytest.raises(tfr.WorkerLostError, match=r"worker1.*max_recoveries=1") as caught:
                await proxy.clients(clients).reduce("text", Deadly("pack", str(tmp_path / "killed"), 99))
        assert "text" in str(caught.value.__notes__)
        assert len(list(tmp_path.glob("killed.*"))) == 2
        assert (await proxy.clients(clients).reduce("text", Brackets())).value == "((0+1)+2)"


async def test_a_worker_that_is_lost_while_it_is_asked_is_an_error_of_each_client(tmp_path: Path) -> None:
    clients, runtime = ALL[:4], pseudo(on_worker_lost="fail", max_recoveries=0)
    async with tfr.LearnerProxy(Adder, clients, runtime=runtime, seed=SEED) as proxy:
        group = proxy.clients(clients).options(on_error="collect")
        result = await group.reduce("text", Deadly("pack", str(tmp_path / "killed")))
        assert result.value in ("(0+1)", "(2+3)")
        assert {type(error) for error in result.failures.values()} == {tfr.WorkerLostError}
        assert all(f"{client}.text on worker" in str(error) for client, error in result.failures.items())


async def test_a_collection_that_never_ends_is_a_timeout_of_its_worker(tmp_path: Path) -> None:
    clients, until = ALL[:3], tmp_path / "until"
    runtime = pseudo(num_processes=1, call_timeout_s=2)
    async with tfr.LearnerProxy(Adder, clients, runtime=runtime, seed=SEED) as proxy:
        async with asyncio.timeout(20):
            with pytest.raises(tfr.CallTimeoutError, match=r"worker1 .*runtime\.call_timeout_s") as caught:
                await proxy.clients(clients).reduce("text", SlowToPack(str(until)))
        assert "text" in str(caught.value.__notes__)
        until.touch()
        assert (await proxy.clients(clients).reduce("text", Brackets())).value == "((0+1)+2)"


# Workers that come and go.


async def test_workers_join_and_leave_in_the_middle_of_a_reduction(
    drawn: dict[str, list[str]], tmp_path: Path
) -> None:
    clients, token = ALL, make_token(tmp_path)
    runtime = {"execution_mode": "pseudo", "num_processes": 1, "join_at": "127.0.0.1:0", "token_file": token}
    async with tfr.LearnerProxy(Adder, clients, runtime=runtime, seed=SEED) as proxy:
        seen = Losses()
        proxy.subscribe(seen)
        assert proxy.join_address is not None
        await check_draw(proxy, drawn, clients, 0)

        async def held(until: str) -> asyncio.Future[Any]:
            """A reduction of which one client's result is missing."""
            behind = asyncio.ensure_future(proxy.custom_method(clients[0], "text_once_open_async", until))
            await asyncio.sleep(0)
            before = len(seen.events)
            reduction = asyncio.ensure_future(proxy.clients(clients).reduce("draw_text", Brackets()))
            await seen.until(lambda: sum(isinstance(one, CallEnded) for one in seen.events[before:]) == 5)
            waiting.append(behind)
            return reduction

        waiting: list[Any] = []
        first = await held(str(tmp_path / "first"))
        with joining(proxy.join_address, token) as worker:
            await seen.until(lambda: any(isinstance(one, WorkerJoined) for one in seen.events), timeout_s=60)
            await asyncio.sleep(0.2)
            (tmp_path / "first").touch()
            assert (await first).value == of_draw(drawn, clients, 1)
            async with asyncio.timeout(20):
                while set(where(proxy, clients)) != {"worker1", "worker2"}:
                    await asyncio.sleep(0.01)
            second = await held(str(tmp_path / "second"))
            worker.signal(signal.SIGTERM)
            await asyncio.sleep(0.2)
            (tmp_path / "second").touch()
            assert (await second).value == of_draw(drawn, clients, 2)
            await seen.until(lambda: any(isinstance(one, WorkerLeft) for one in seen.events), timeout_s=60)
            assert await asyncio.to_thread(worker.ended) == 0
        assert seen.workers == []
        await asyncio.gather(*waiting)
        await check_nothing_goes_on(proxy)


def where(proxy: tfr.LearnerProxy, clients: list[str]) -> list[str]:
    return [proxy._router.get_executor(client).worker_of(client) for client in clients]


async def test_learners_of_the_driver_take_part_beside_those_of_workers() -> None:
    clients = ALL[:5]
    runtime = pseudo(client_endpoints={clients[2]: "local"})
    async with tfr.LearnerProxy(Adder, clients, runtime=runtime, seed=SEED) as proxy:
        assert (await proxy.clients().reduce("text", Brackets())).value == "(((0+1)+(2+3))+4)"
