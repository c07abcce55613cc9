"""Members of a world: torch RPC lets each call functions of the others, and the guard refuses all but our own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import LAUNCHED, opened
from losses import Losses, kill, seen
from raw_peer import functions
from torch.distributed import rpc

import torchfedrpc as tfr
from torchfedrpc.rpc import endpoint, guard

__all__ = ["seen"]  # a fixture
pytestmark = pytest.mark.skipif(LAUNCHED, reason="starts workers of its own")

_TIMEOUT_S = 20.0


def call_all(peer: str, canary: str) -> dict[str, str]:
    """Call functions of another member by torch RPC alone; what became of each, in words."""
    return {name: call(peer, function, args) for name, function, args in functions(canary)}


def call(peer: str, function: Any, args: tuple[Any, ...]) -> str:
    api: Any = rpc
    try:
        return f"gave {api.rpc_sync(peer, function, args=args, timeout=_TIMEOUT_S)!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def peers() -> dict[int, str]:
    """The names of the members of this process's world, by rank."""
    api: Any = rpc
    return {info.id: info.name for info in api.api._get_current_rpc_agent().get_worker_infos()}


class Intruder:
    """A learner that turns against the driver."""

    def __init__(self, client_id: str) -> None:
        pass

    def call_driver(self, canary: str) -> dict[str, str]:
        return call_all(peers()[0], canary)

    def call_driver_once(self, canary: str) -> str:
        return call(peers()[0], Path.touch, (Path(canary),))

    def acknowledge_to_driver(self) -> str:
        return call(peers()[0], endpoint.acknowledge, ((bytes(32), 0, 0, (), None),))


@pytest.fixture(scope="module")
def proxy(runner: asyncio.Runner) -> Iterator[tfr.LearnerProxy]:
    with opened(runner, tfr.LearnerProxy(Intruder, ["a"], runtime={"num_processes": 1})) as proxy:
        runner.run(proxy.client("a").acknowledge_to_driver())
        yield proxy


def check(outcomes: dict[str, str], canary: Path) -> None:
    """Every function was refused, and none has run."""
    assert {"os.system", "eval", "getattr", "a part of an entry", "the guard's end"} <= outcomes.keys()
    for name, became in outcomes.items():
        assert "UnpicklingError" in became, (name, became)
        assert "refused " in became, (name, became)
    assert not canary.exists()


async def test_driver_runs_no_python_function_for_a_worker(proxy: tfr.LearnerProxy, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    check(await proxy.client("a").call_driver(str(canary)), canary)


async def test_worker_runs_no_python_function_for_the_driver(proxy: tfr.LearnerProxy, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    check(await asyncio.to_thread(call_all, peers()[1], str(canary)), canary)


async def test_entry_points_can_be_called_by_members(proxy: tfr.LearnerProxy) -> None:
    stranger = (bytes(32), 0, 0, (), None)  # with another secret, for which an entry point does nothing
    assert await proxy.client("a").acknowledge_to_driver() == "gave None"
    assert await asyncio.to_thread(call, peers()[1], endpoint.acknowledge, (stranger,)) == "gave None"


async def test_without_the_guard_the_driver_runs_what_a_worker_calls(proxy: tfr.LearnerProxy, tmp_path: Path) -> None:
    """So what the tests before this one try would work."""
    canary = tmp_path / "canary"
    guard.remove()
    try:
        assert await proxy.client("a").call_driver_once(str(canary)) == "gave None"
    finally:
        guard.install()
    assert canary.exists()


async def test_members_of_a_world_formed_after_a_loss_are_guarded(
    proxy: tfr.LearnerProxy, seen: Losses, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    kill(proxy, "worker1")
    await seen.loss()
    check(await proxy.client("a").call_driver(str(canary)), canary)
    check(await asyncio.to_thread(call_all, peers()[1], str(canary)), canary)
