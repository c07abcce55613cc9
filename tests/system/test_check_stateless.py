"""`check_stateless`: it passes what may declare ``stateless``, and names what calls leave behind."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

import torchfedrpc as tfr
from torchfedrpc.errors import ConfigError

check_stateless = functools.partial(tfr.testing.check_stateless, repeat=1)  # the calls as they are given

counted: list[str] = []
WEIGHTS = {"weight": torch.ones(1, 3), "bias": torch.zeros(1)}
TRAINING: list[Any] = [("train_epoch", {"weights": WEIGHTS}), ("evaluate", {"weights": WEIGHTS})] * 2


class Plain:
    """Has the weights from each call, and a cache."""

    stateless = True

    def __init__(self, client_id: str, *, width: int = 3) -> None:
        self.client_id = client_id
        self.inputs = torch.randn(8, width)
        self.model = nn.Linear(width, 1)

    def train_epoch(self, weights: dict[str, Any]) -> dict[str, Any]:
        self.model.load_state_dict(weights)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        optimizer.zero_grad()
        (self.model(self.inputs) + torch.randn(8, 1)).square().mean().backward()
        optimizer.step()
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def evaluate(self, weights: dict[str, Any]) -> float:
        return float((self.inputs @ weights["weight"].T + weights["bias"]).sum() + torch.rand(()))

    def batches(self) -> Any:
        for row in self.inputs:
            yield row + torch.rand(3)


class Momentum(Plain):
    """Keeps what its optimiser has seen."""

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        self.velocity = torch.zeros(1, 3)

    def train_epoch(self, weights: dict[str, Any]) -> dict[str, Any]:
        trained = super().train_epoch(weights)
        self.velocity = 0.9 * self.velocity + trained["weight"]
        return {**trained, "weight": trained["weight"] - 0.1 * self.velocity}


class Latest(Plain):
    """A later call finds what an earlier one has left; an earlier one is not changed."""

    def train_epoch(self, weights: dict[str, Any]) -> dict[str, Any]:
        self.best = weights["bias"]
        return super().train_epoch(weights)

    def evaluate(self, weights: dict[str, Any]) -> float:
        return float(getattr(self, "best", torch.ones(1)).sum())


class Lazy(Plain):
    """Makes its model at the first call, which so draws more than later ones."""

    def train_epoch(self, weights: dict[str, Any]) -> dict[str, Any]:
        if not hasattr(self, "lazy"):
            self.lazy = nn.Linear(3, 1)
        return super().train_epoch(weights)


class Timed:
    """Gives another result each time, and keeps nothing."""

    started: list[int] = []

    def __init__(self, client_id: str) -> None:
        self.started.append(0)
        self.number = len(self.started)

    def evaluate(self) -> dict[str, int]:
        return {"seconds": self.number, "loss": 1}


class Counting:
    """Counts in a variable of its module."""

    def __init__(self, client_id: str) -> None:
        self.client_id = client_id

    def evaluate(self) -> int:
        counted.append(self.client_id)
        return len(counted)


class Failing(Latest):
    """Raises once it was trained."""

    def evaluate(self, weights: dict[str, Any]) -> float:
        if hasattr(self, "best"):
            raise ValueError("on purpose")
        return 0.0


def test_a_learner_that_keeps_nothing_passes() -> None:
    check_stateless(Plain, [*TRAINING, "batches", "batches"], kwargs={"width": 3})


def test_a_kept_attribute_is_named() -> None:
    with pytest.raises(ConfigError, match=r"call 3 of 4 \(train_epoch\) gives another result\['weight'\]") as caught:
        check_stateless(Momentum, TRAINING)
    assert "'velocity'" in str(caught.value)
    assert "stateless = False" in str(caught.value)
    assert "'inputs'" not in str(caught.value)


def test_an_attribute_that_only_the_reverse_order_shows_is_named() -> None:
    calls = [("evaluate", {"weights": WEIGHTS}), ("train_epoch", {"weights": WEIGHTS})]
    with pytest.raises(ConfigError, match=r"call 1 of 2 \(evaluate\) .* the calls behind it") as caught:
        check_stateless(Latest, calls)
    assert "'best'" in str(caught.value)


def test_a_call_that_raises_on_a_used_learner_is_a_difference() -> None:
    with pytest.raises(ConfigError, match=r"raises ValueError \(on purpose\)"):
        check_stateless(Failing, TRAINING)


def test_a_cache_whose_making_draws_is_named() -> None:
    with pytest.raises(ConfigError, match="'lazy'"):
        check_stateless(Lazy, TRAINING)


def test_what_lies_outside_the_learner_is_said_to() -> None:
    with pytest.raises(
        ConfigError, match=r"\(evaluate\) gives another result .*second new learner.*outside the learner"
    ):
        check_stateless(Counting, ["evaluate", "evaluate"])


def test_a_result_that_differs_between_new_learners_is_no_matter_of_attributes() -> None:
    with pytest.raises(ConfigError, match=r"\['seconds'\] .*on a second new learner.*ignore=") as caught:
        check_stateless(Timed, ["evaluate", "evaluate"])
    assert "Changed by calls" not in str(caught.value)
    check_stateless(Timed, ["evaluate", "evaluate"], ignore=["seconds"])


def test_keys_that_may_differ_are_ignored() -> None:
    check_stateless(Momentum, TRAINING, ignore=["weight"])


def test_calls_are_repeated_by_default() -> None:
    with pytest.raises(ConfigError, match=r"call 1 of 1 \(train_epoch\), repetition 2, gives another result"):
        tfr.testing.check_stateless(Momentum, TRAINING[:1])


def test_calls_without_sense_are_refused() -> None:
    for calls, repeat in (([], 2), (TRAINING[:1], 1), (TRAINING, 0)):
        with pytest.raises(ConfigError, match="two calls or more"):
            tfr.testing.check_stateless(Plain, calls, repeat=repeat)
    with pytest.raises(ConfigError, match="a collection of keys"):
        check_stateless(Plain, TRAINING, ignore="loss")
    with pytest.raises(ConfigError, match="takes a list"):
        check_stateless(Plain, "train_epoch")
