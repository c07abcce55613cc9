"""Each call begins with the settings of opening and a fresh context, whatever other calls of its process have set."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import Seen, opened
from disturbing import Disturbing, look

import torchfedrpc as tfr
from torchfedrpc.config import RuntimeConfig
from torchfedrpc.events import EventBus
from torchfedrpc.executors.base import ExecutorSpec
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.host.torch_settings import warn_of_default_device

CLIENTS: dict[str, dict[str, Any]] = {f"client_{number}": {} for number in range(40)}
CLIENTS |= {"sets much": {"at_first": "much"}, "sets what is rare": {"at_first": "rare"}}


@pytest.fixture(scope="module")
def proxy(runner: asyncio.Runner, lone_runtime: dict[str, Any]) -> Iterator[tfr.LearnerProxy]:
    with opened(runner, tfr.LearnerProxy(Disturbing, CLIENTS, runtime=lone_runtime)) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def clients(proxy: tfr.LearnerProxy) -> Iterator[str]:
    return iter(proxy.client_ids)


@pytest.fixture(scope="module")
def fresh_look() -> dict[str, Any]:
    """What a call finds as it begins."""
    found = look()
    found["settings"]["torch.set_num_threads"] = 1
    return found


@pytest.fixture(autouse=True)
def _driver_is_undisturbed() -> Iterator[None]:
    before = look()
    yield
    assert look() == before


def differing(found: dict[str, Any], other: dict[str, Any]) -> set[str]:
    flat, flat_other = ({**one, **one["settings"], "settings": None} for one in (found, other))
    return {name for name in flat if flat[name] != flat_other[name]}


async def test_call_leaves_nothing_to_others(
    proxy: tfr.LearnerProxy, clients: Iterator[str], fresh_look: dict[str, Any]
) -> None:
    disturbing, other = next(clients), next(clients)
    assert await proxy.custom_method(other, "look") == fresh_look
    disturbed = await proxy.custom_method(disturbing, "disturb")
    assert len(differing(disturbed, fresh_look)) >= 15
    assert await proxy.custom_method(other, "look") == fresh_look
    assert await proxy.custom_method(disturbing, "look") == fresh_look
    with pytest.raises(ValueError, match="disturbed"):
        await proxy.custom_method(disturbing, "fail")
    assert await proxy.custom_method(other, "look") == fresh_look


async def test_constructor_leaves_nothing_to_calls(
    proxy: tfr.LearnerProxy, clients: Iterator[str], fresh_look: dict[str, Any]
) -> None:
    for client in ("sets much", "sets what is rare", next(clients)):
        assert await proxy.custom_method(client, "look") == fresh_look
        assert await proxy.custom_method(client, "rare")


async def test_async_method_finds_its_own_settings_at_its_next_step(
    proxy: tfr.LearnerProxy, clients: Iterator[str], fresh_look: dict[str, Any]
) -> None:
    seen = Seen()
    unsubscribe = proxy.subscribe(seen)
    disturbing, other = next(clients), next(clients)
    waiting = asyncio.ensure_future(proxy.custom_method(disturbing, "disturb_and_wait", "disturbed"))
    await seen.reported(disturbing)
    assert await proxy.custom_method(other, "let_pass", "disturbed") == fresh_look
    first, later, of_task = await waiting
    assert first == later == of_task
    assert len(differing(first, fresh_look)) >= 15
    unsubscribe()


@pytest.mark.parametrize("method", ["disturb_in_steps", "disturb_in_async_steps"])
async def test_stream_finds_its_own_settings_at_its_next_step(
    proxy: tfr.LearnerProxy, clients: Iterator[str], fresh_look: dict[str, Any], method: str
) -> None:
    streaming, other = next(clients), next(clients)
    items = []
    async for item in proxy.stream(streaming, method):
        items.append(item)
        assert await proxy.custom_method(other, "look") == fresh_look
    assert items[0] == fresh_look
    assert items[1] == items[2]
    assert len(differing(items[1], fresh_look)) >= 15


async def test_device_block_of_a_waiting_method_is_not_of_other_calls(
    proxy: tfr.LearnerProxy, clients: Iterator[str], fresh_look: dict[str, Any]
) -> None:
    seen = Seen()
    unsubscribe = proxy.subscribe(seen)
    ours, other = next(clients), next(clients)
    waiting = asyncio.ensure_future(proxy.custom_method(ours, "wait_on_meta", "device"))
    await seen.reported(ours)
    assert await proxy.custom_method(other, "let_pass_async", "device") == fresh_look
    assert await waiting == "meta"
    unsubscribe()


async def test_shared_object_does_not_depend_on_the_call_that_makes_it(
    proxy: tfr.LearnerProxy, clients: Iterator[str]
) -> None:
    assert await proxy.custom_method(next(clients), "share") == "torch.float32 cpu True"


async def test_warning_says_that_the_drivers_default_device_reaches_no_learner(
    caplog: pytest.LogCaptureFixture, fresh_look: dict[str, Any]
) -> None:
    spec, _ = LearnerSpec.of(Disturbing, 0, RuntimeConfig())
    torch.set_default_device("meta")
    try:
        warn_of_default_device()
        host = ExecutorSpec(spec, {"a": {}}, EventBus()).make_host()
    finally:
        torch.set_default_device(None)
    assert await host.execute_method("a", "look") == fresh_look
    assert await asyncio.to_thread(host.close)
    assert any("set_default_device('meta') holds for this thread alone" in one.message for one in caplog.records)


async def test_change_of_the_drivers_own_after_opening_is_not_of_learners(
    proxy: tfr.LearnerProxy, clients: Iterator[str], fresh_look: dict[str, Any]
) -> None:
    client = next(clients)
    torch.set_default_dtype(torch.float64)
    try:
        assert await proxy.custom_method(client, "look") == fresh_look
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
