"""A trainer's attributes in checkpoints: what is one object is one after a resume, or the save is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchfedrpc as tfr
from torchfedrpc.errors import SnapshotError
from torchfedrpc.federation.trainer_state import give_state, state_of
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.packing import pack

ALLOW = AllowList([__name__])


class Holder:
    """An object of the trainer's own that has something."""

    def __init__(self, held: Any) -> None:
        self.held = held


class Aliases:
    """The attributes of a trainer that knows one model by several names."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model: Any = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
        self.optimiser = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.models: dict[str, Any] = {"global": self.model, "other": [nn.Linear(1, 1)]}
        self.head: Any = self.model[2].weight
        self.last_layer = self.model[2]
        self.nested = [{"mean": self.model[1].running_mean}, 3]
        self.also_nested = self.nested
        self.same = self.model
        self.round = 0

    def step(self) -> None:
        self.round += 1
        self.model(torch.randn(4, 2)).square().sum().backward()
        self.optimiser.step()
        self.optimiser.zero_grad()


def resumed(trainer: Any, fresh: Any) -> Any:
    state = state_of(vars(trainer), ALLOW, trainer)
    give_state(fresh, pack(state).open(ALLOW))
    return fresh


def test_aliases_of_a_model_are_aliases_after_a_resume() -> None:
    trainer = Aliases()
    trainer.step()
    fresh = resumed(trainer, Aliases())
    made = fresh.model
    assert fresh.models["global"] is fresh.same is made
    assert fresh.head is made[2].weight
    assert fresh.last_layer is made[2]
    assert fresh.nested[0]["mean"] is made[1].running_mean
    assert fresh.also_nested is fresh.nested
    assert fresh.nested[1] == 3
    for one in (trainer, fresh):
        torch.manual_seed(5)
        one.step()
    assert torch.equal(fresh.models["global"][2].weight, trainer.head)
    assert fresh.round == trainer.round == 2


def test_model_of_the_constructor_stays_the_same_object() -> None:
    trainer, fresh = Aliases(), Aliases()
    made, optimiser = fresh.model, fresh.optimiser
    resumed(trainer, fresh)
    assert (fresh.model, fresh.optimiser) == (made, optimiser)


def test_values_keep_their_aliases() -> None:
    trainer, fresh = Aliases(), Aliases()
    shared = torch.ones(3)
    trainer.one, trainer.other = [shared], {"view": shared[1:]}  # type: ignore[attr-defined]
    resumed(trainer, fresh)
    fresh.one[0] += 1  # type: ignore[attr-defined]
    assert fresh.other["view"].tolist() == [2, 2]  # type: ignore[attr-defined]


REFUSED: dict[str, tuple[Callable[[Aliases], Any], str]] = {
    "part in an object": (lambda trainer: Holder(trainer.model), "'extra'.* is the same object as"),
    "part in an object alone": (
        lambda trainer: Holder(trainer.model[0]),
        "'extra'.* is part of the trainer's attribute 'model' too",
    ),
    "parameter in a tuple": (lambda trainer: (trainer.head,), "'extra'.* is the same object as"),
    "view of a parameter": (lambda trainer: trainer.head.detach()[0], "'extra'.* shares memory with"),
    "autograd graph": (lambda trainer: trainer.head * 2, "'extra'.*autograd graph"),
    "trainer itself": (Holder, "'extra'.* refers to the Aliases itself"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_alias_that_would_be_lost_is_refused_with_its_attribute(name: str) -> None:
    trainer = Aliases()
    make, words = REFUSED[name]
    trainer.extra = make(trainer)  # type: ignore[attr-defined]
    with pytest.raises(SnapshotError) as caught:
        state_of(vars(trainer), ALLOW, trainer)
    assert re.search(words, str(caught.value)), caught.value
    assert "define state_dict()" in str(caught.value)


class Simple:
    """A learner."""

    def __init__(self, client_id: str) -> None:
        self.num_calls = 0

    def count(self) -> int:
        self.num_calls += 1
        return self.num_calls


class Trainer(tfr.AbstractFederationTrainer):
    """Trains one model, and evaluates it by another name."""

    def __init__(self, *args: Any, hides: bool = False) -> None:
        super().__init__(*args)
        self.model = nn.Linear(1, 1)
        self.models: dict[str, Any] = {"global": self.model}
        if hides:
            self.holder = Holder(self.model)

    async def train(self) -> list[float]:
        async for _ in self.rounds():
            await self.learner_proxy.clients().call("count")
            with torch.no_grad():
                self.model.weight.fill_(self.model.weight.item() + 1)
        return self.models["global"].weight.tolist()[0]


async def trained(folder: Path, num_rounds: int, *, resume: str = "auto", hides: bool = False) -> list[float]:
    async with tfr.LearnerProxy(Simple, ["one"], runtime="local") as proxy:
        torch.manual_seed(0)
        trainer = Trainer({"num_rounds": num_rounds}, proxy, hides=hides)
        trainer.checkpoints = tfr.Checkpoints(folder, resume=resume)
        return await trainer.train()


async def test_resumed_trainer_evaluates_the_model_that_it_trains(tmp_path: Path) -> None:
    whole = await trained(tmp_path / "whole", 4)
    await trained(tmp_path / "halves", 2)
    assert await trained(tmp_path / "halves", 4) == whole


async def test_save_that_would_lose_an_alias_is_refused_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await trained(tmp_path, 1, hides=True)
    assert not list(tmp_path.glob("*.checkpoint"))
    assert "cannot be saved because of 'holder': .holder.held is the same object as .models['global']" in caplog.text


SEEN: list[Any] = []


class MakesAnAttribute(tfr.FedAvgTrainer):
    """Makes an attribute with a state in its `train`."""

    async def train(self) -> Any:
        self.extra = nn.Linear(1, 1)
        assert self.weights is not None
        SEEN.append((self.is_resumed, len(self.history), self.weights["w"].item()))  # type: ignore[arg-type]
        return await super().train()


class Adds:
    """A learner that adds one."""

    def __init__(self, client_id: str) -> None: ...

    def train_epoch(self, model_weights: Any, round_num: int = 0, local_epochs: int = 1) -> dict[str, Any]:
        weights = {name: value + 1 for name, value in model_weights.items()}
        return {"model_weights": weights, "num_samples": 1, "train_loss": 0.0}


async def test_what_there_is_of_the_state_is_restored_before_train(tmp_path: Path) -> None:
    for num_rounds in (2, 4):
        async with tfr.LearnerProxy(Adds, ["a"], runtime="local") as proxy:
            trainer = MakesAnAttribute({"num_rounds": num_rounds}, proxy, initial_weights={"w": torch.zeros(())})
            trainer.checkpoints = tfr.Checkpoints(tmp_path, resume="auto")
            await trainer.train()
    assert SEEN == [(False, 0, 0.0), (True, 2, 2.0)]
