"""Stateless learners: the same values whether an instance is new or used, and wherever it is."""

from __future__ import annotations

import asyncio
import functools
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import torchfedrpc as tfr
from torchfedrpc.errors import ConfigError, GroupCallError, SerializationError

CLIENTS = [f"client_{number}" for number in range(12)]
WEIGHTS = torch.ones(3)

learners: weakref.WeakSet[Drawer] = weakref.WeakSet()  # of this process


class Drawer:
    """Draws, and keeps what no process can send."""

    def __init__(self, client_id: str, *, scale: float = 1.0) -> None:
        self.client_id = client_id
        self.bias = torch.randn(()) * scale
        self.unsendable = lambda: 1
        learners.add(self)

    def draw(self, offset: float = 0.0) -> float:
        return float(torch.randn(()) + self.bias + offset)

    async def draw_async(self) -> float:
        return self.draw()

    def update(self, weights: torch.Tensor) -> dict[str, Any]:
        return {"model_weights": {"w": weights + torch.randn(3) + self.bias}, "num_samples": 2}

    def draws(self) -> Iterator[float]:
        while True:
            yield self.draw()

    def set_model_weights(self, weights: torch.Tensor) -> None:
        self.bias = weights

    def num_learners(self) -> int:
        return len(learners)

    def fail(self) -> None:
        raise ValueError(f"{self.client_id} fails on purpose")


class Stateless(Drawer):
    stateless = True


def make_stateless(client_id: str) -> Drawer:
    return Drawer(client_id)


make_stateless.stateless = True  # type: ignore[attr-defined]


def make_silently(client_id: str) -> Stateless:
    return Stateless(client_id)


partial_stateless: Any = functools.partial(Drawer, scale=2.0)
partial_stateless.stateless = True


async def journey(learner: Any, runtime: dict[str, Any]) -> list[Any]:
    """The values of calls of every kind."""
    seen: list[Any] = []
    async with tfr.LearnerProxy(learner, CLIENTS, runtime=runtime, seed=3) as proxy:
        for number in range(3):
            seen.append(dict(await proxy.clients(CLIENTS[number::2]).call("draw", offset=1.0)))
            seen.append(dict(await proxy.clients({CLIENTS[0]: {"offset": 2.0}, CLIENTS[1]: {}}).call("draw")))
            seen.append(dict(await proxy.clients(CLIENTS[::3]).call("draw_async")))
            seen.append([await proxy.custom_method(client, "draw") for client in CLIENTS[number:6]])
            reduced = await proxy.clients(CLIENTS[number:]).reduce("update", tfr.WeightedMean(), weights=WEIGHTS)
            seen.append((reduced.value["w"].tolist(), reduced.count))
            async with aclosing(proxy.stream(CLIENTS[number], "draws")) as stream:
                seen.append([item async for item in first(stream, 3)])
            seen.append({client: value async for client, value in proxy.clients().as_completed("draw")})
        result = await proxy.clients().options(on_error="collect").call("fail")
        seen.append({client: str(error) for client, error in result.failures.items()})
    return seen


async def first(stream: AsyncIterator[Any], count: int) -> AsyncIterator[Any]:
    for _ in range(count):
        yield await anext(stream)


async def test_values_are_those_of_a_learner_with_state_that_keeps_nothing(runtime: dict[str, Any]) -> None:
    expected = await journey(Drawer, {"execution_mode": "local"})
    assert await journey(Stateless, runtime) == expected
    assert await journey(make_stateless, runtime) == expected


async def test_values_do_not_depend_on_how_many_learners_are_kept(runtime: dict[str, Any]) -> None:
    assert await journey(Stateless, runtime | {"max_resident_learners": 1}) == await journey(Stateless, runtime)


async def test_learners_beyond_the_limit_are_dropped_even_if_they_cannot_be_captured(
    lone_runtime: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    async with tfr.LearnerProxy(Stateless, CLIENTS, runtime=lone_runtime | {"max_resident_learners": 2}) as proxy:
        for _ in range(2):
            await proxy.clients().call("draw")
        assert await proxy.custom_method(CLIENTS[0], "num_learners") == 2
    assert "max_resident_learners" not in caplog.text


async def test_a_factory_and_a_partial_can_carry_the_promise(lone_runtime: dict[str, Any]) -> None:
    for learner in (make_stateless, partial_stateless):
        async with tfr.LearnerProxy(learner, CLIENTS[:1], runtime=lone_runtime) as proxy:
            await proxy.custom_method(CLIENTS[0], "draw")
            with pytest.raises(ConfigError, match="is stateless"):
                await anext(proxy.snapshots())


async def test_a_factory_that_does_not_carry_the_promise_of_its_class_is_warned_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with tfr.LearnerProxy(make_silently, CLIENTS, runtime="local") as proxy:
        await proxy.clients().call("draw")
    assert caplog.text.count("Stateless says stateless = True, and contract.test_stateless.make_silently") == 1
    caplog.clear()
    async with tfr.LearnerProxy(make_stateless, CLIENTS, runtime="local") as proxy:
        await proxy.clients().call("draw")
    assert not caplog.records


@pytest.mark.parametrize("learner", [Stateless, Drawer])
async def test_arguments_of_a_constructor_that_cannot_be_sent_are_the_error_of_each_call(
    lone_runtime: dict[str, Any], learner: type
) -> None:
    clients = {client: {"scale": lambda: 1.0} for client in CLIENTS[:2]}
    async with tfr.LearnerProxy(learner, clients, runtime=lone_runtime) as proxy, asyncio.timeout(20):
        for _ in range(2):
            with pytest.raises(SerializationError, match="the constructor arguments of client_0 cannot be sent"):
                await anext(proxy.stream(CLIENTS[0], "draws"))
            with pytest.raises(SerializationError, match="the constructor arguments of client_0 cannot be sent"):
                await proxy.custom_method(CLIENTS[0], "draw")
        reduced = proxy.clients().options(on_error="collect").reduce("update", tfr.WeightedMean(), weights=WEIGHTS)
        with pytest.raises(GroupCallError, match=r"client_0, client_1, .* constructor arguments of client_0 cannot"):
            await reduced


async def test_a_stream_is_numbered_at_its_first_step(runtime: dict[str, Any]) -> None:
    async def drawn(learner: Any, runtime: Any) -> list[float]:
        async with tfr.LearnerProxy(learner, CLIENTS, runtime=runtime, seed=3) as proxy:
            unread, later = proxy.stream(CLIENTS[0], "draws"), proxy.stream(CLIENTS[0], "draws")
            items = []
            for stream in (proxy.stream(CLIENTS[0], "draws"), later):
                items.append(await anext(stream))
                await stream.aclose()
            await unread.aclose()
            return items

    assert await drawn(Stateless, runtime) == await drawn(Drawer, "local")


def test_a_promise_that_is_no_bool_is_refused() -> None:
    learner: Any = functools.partial(Drawer)
    learner.stateless = "yes"
    with pytest.raises(ConfigError, match="stateless is True or False, not 'yes'"):
        tfr.LearnerProxy(learner, CLIENTS)


async def test_snapshots_and_restore_say_what_to_do_instead(lone_runtime: dict[str, Any]) -> None:
    async with tfr.LearnerProxy(Stateless, CLIENTS, runtime=lone_runtime) as proxy:
        with pytest.raises(
            ConfigError, match=r"stateless, so that snapshots\(\) has no state to return.* stateless = False"
        ):
            await anext(proxy.snapshots())
        with pytest.raises(ConfigError, match=r"restore\(\) has no state to restore"):
            await proxy.restore({CLIENTS[0]: b""})


async def test_weights_that_no_later_call_would_have_are_refused(lone_runtime: dict[str, Any]) -> None:
    async with tfr.LearnerProxy(Stateless, CLIENTS, runtime=lone_runtime) as proxy:
        for call in (
            proxy.set_model_weights(CLIENTS[0], WEIGHTS),
            proxy.custom_method(CLIENTS[0], "set_model_weights", WEIGHTS),
            proxy.client(CLIENTS[0]).set_model_weights(WEIGHTS),
            proxy.clients().call("set_model_weights", WEIGHTS),
        ):
            with pytest.raises(ConfigError, match=r"stateless, .* stateless = False \(learner\.keep_weights=true"):
                await call


async def test_a_call_beside_an_open_stream_of_the_client_is_refused(lone_runtime: dict[str, Any]) -> None:
    async with tfr.LearnerProxy(Stateless, CLIENTS, runtime=lone_runtime) as proxy:
        async with aclosing(proxy.stream(CLIENTS[0], "draws")) as stream:
            await anext(stream)
            with pytest.raises(ConfigError, match=r"close it first \(await stream.aclose\(\)\)"):
                await proxy.custom_method(CLIENTS[0], "draw")
            result = await proxy.clients(CLIENTS[:2]).options(on_error="collect").call("draw")
            assert list(result.failures) == CLIENTS[:1]
            reduced = (
                await proxy.clients(CLIENTS[:2])
                .options(on_error="collect")
                .reduce("update", tfr.WeightedMean(), weights=WEIGHTS)
            )
            assert list(reduced.failures) == CLIENTS[:1]
        await proxy.custom_method(CLIENTS[0], "draw")


class Trainer(tfr.AbstractFederationTrainer):
    """Ends in the middle of a run, if it is told to."""

    not_state = tfr.AbstractFederationTrainer.not_state | {"end_at"}
    end_at: int | None = None

    def __init__(self, config: Any, proxy: tfr.LearnerProxy) -> None:
        super().__init__(config, proxy)
        self.seen: list[Any] = []

    async def train(self) -> list[Any]:
        async for round_num in self.rounds():
            if round_num == self.end_at:
                raise KeyError("the end")
            self.seen.append(dict(await self.learner_proxy.clients(self.select_clients(round_num)).call("draw")))
        return self.seen


async def train(
    folder: Path, runtime: dict[str, Any], end_at: int | None = None, learner: Any = Stateless
) -> list[Any]:
    config = SimpleNamespace(num_rounds=5, clients_per_round=4, seed=1)
    with tfr.Checkpoints(folder, resume="auto") as checkpoints:
        async with tfr.LearnerProxy(learner, CLIENTS, runtime=runtime, seed=3) as proxy:
            trainer = Trainer(config, proxy)
            trainer.checkpoints, trainer.end_at = checkpoints, end_at
            return await trainer.train()


async def test_a_run_resumes_with_the_counts_of_its_calls(runtime: dict[str, Any], tmp_path: Path) -> None:
    expected = await train(tmp_path / "whole", runtime)
    with pytest.raises(KeyError):
        await train(tmp_path / "parts", runtime, end_at=3)
    assert await train(tmp_path / "parts", runtime) == expected


async def test_a_checkpoint_of_stateless_learners_is_not_one_of_learners_with_state(
    runtime: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(KeyError):
        await train(tmp_path, runtime, end_at=3, learner=make_stateless)
    make_stateless.stateless = False  # type: ignore[attr-defined]
    try:
        with pytest.raises(ConfigError, match="stateless was True and is not set"):
            await train(tmp_path, runtime, learner=make_stateless)
    finally:
        make_stateless.stateless = True  # type: ignore[attr-defined]
