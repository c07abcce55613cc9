"""Local training and scoring."""

from __future__ import annotations

import math
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch

from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments.baseline import train_centrally
from torchfedrpc.experiments.data.synthetic import synthetic
from torchfedrpc.experiments.training import (
    LocalTraining,
    build_model,
    copy_weights,
    fit,
    proximal,
    score,
    trained_parameters,
)

MLP = {"_target_": "torchfedrpc.experiments.models.MLP"}


def test_training_learns() -> None:
    data = synthetic(num_samples=500)
    model = build_model(MLP, seed=0)
    before = score(model, data.test)
    indices = torch.arange(len(data.train))
    first_loss = fit(model, data.train, indices, num_epochs=1, training=LocalTraining())
    second_loss = fit(model, data.train, indices, num_epochs=3, training=LocalTraining())
    assert second_loss.loss < first_loss.loss
    assert score(model, data.test).accuracy > 0.9 > before.accuracy


def test_an_epoch_sees_only_the_indices() -> None:
    data = synthetic(num_samples=200)
    indices = torch.tensor([1, 5, 8])
    inputs = torch.full_like(data.train.inputs, torch.nan)
    inputs[indices] = data.train.inputs[indices]
    samples = type(data.train)(inputs, data.train.labels)
    loss = fit(build_model(MLP, seed=0), samples, indices, num_epochs=2, training=LocalTraining(batch_size=2))
    assert math.isfinite(loss.loss)


def test_the_train_loss_is_the_mean_over_samples() -> None:
    data = synthetic(num_samples=200)
    model = build_model(MLP, seed=0)
    expected = score(model, data.train).loss
    still = LocalTraining(batch_size=7, learning_rate=0.0)
    loss = fit(model, data.train, torch.arange(len(data.train)), num_epochs=2, training=still)
    assert loss.loss == pytest.approx(expected, rel=1e-5)


def test_the_proximal_term_pulls_towards_where_training_began() -> None:
    data = synthetic(num_samples=200)

    def distance(mu: float) -> float:
        torch.manual_seed(0)
        model = build_model(MLP, seed=0)
        start = copy_weights(model)
        hooks = [proximal(trained_parameters(model), mu)]
        plan = LocalTraining(learning_rate=0.05)
        fit(model, data.train, torch.arange(len(data.train)), num_epochs=3, training=plan, hooks=hooks)
        return sum(float((value - start[name]).square().sum()) for name, value in model.state_dict().items())

    assert distance(10.0) < 0.5 * distance(0.0)


def test_cancelled_training_stops_before_its_next_step() -> None:
    data = synthetic(num_samples=200)
    answers = iter([False, False, True])
    with pytest.raises(CancelledError):
        fit(
            build_model(MLP, seed=0),
            data.train,
            torch.arange(len(data.train)),
            num_epochs=1,
            training=LocalTraining(batch_size=1),
            is_cancelled=lambda: next(answers),
        )
    assert next(answers, None) is None


def test_the_baseline_follows_its_seed_and_leaves_the_random_stream_alone() -> None:
    data = synthetic(num_samples=500)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    scores = train_centrally(model=MLP, data=data, seed=3, num_rounds=2, learning_rate=0.1)
    assert torch.equal(torch.rand(1), expected)
    assert scores == train_centrally(model=MLP, data=data, seed=3, num_rounds=2, learning_rate=0.1)
    assert len(scores) == 2
    assert scores[-1].accuracy > 0.9


def _trained(**settings: Any) -> dict[str, torch.Tensor]:
    data = synthetic(num_samples=200)
    torch.manual_seed(0)
    model = build_model(MLP, seed=0)
    fit(model, data.train, torch.arange(100), num_epochs=2, training=LocalTraining(**settings))
    return copy_weights(model)


def _is_other(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    "settings",
    [
        {"optimiser": {"_target_": "torch.optim.AdamW"}},
        {"schedule": {"_target_": "torch.optim.lr_scheduler.ExponentialLR", "gamma": 0.5}},
        {"loss": {"_target_": "torch.nn.CrossEntropyLoss", "label_smoothing": 0.3}},
        {"max_gradient_norm": 0.01},
        {"autocast": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_each_setting_changes_the_training(settings: dict[str, Any]) -> None:
    assert _is_other(_trained(**settings), _trained())
    assert not _is_other(_trained(**settings), _trained(**settings))


def test_steps_may_be_counted_instead_of_epochs() -> None:
    data = synthetic(num_samples=200)
    model = build_model(MLP, seed=0)
    for num_steps in (0, 3, 17):
        done = fit(model, data.train, torch.arange(40), num_steps=num_steps, training=LocalTraining(batch_size=8))
        assert done.num_steps == num_steps
    assert fit(model, data.train, torch.arange(0), num_steps=5, training=LocalTraining()).num_steps == 0


def test_gradients_are_clipped_to_their_norm() -> None:
    data = synthetic(num_samples=200)
    model = build_model(MLP, seed=0)
    before = copy_weights(model)
    plan = LocalTraining(batch_size=100, learning_rate=1.0, max_gradient_norm=0.5)
    fit(model, data.train, torch.arange(100), num_steps=1, training=plan)
    moved = sum(float((value - before[name]).square().sum()) for name, value in model.state_dict().items())
    assert moved**0.5 == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": "abc"}, r"learner\.learning_rate is a number of at least 0, not 'abc'"),
        ({"learning_rate": -0.1}, r"learner\.learning_rate is a number of at least 0, not -0\.1"),
        ({"batch_size": 0}, r"learner\.batch_size is a whole number of at least 1, not 0"),
        ({"batch_size": 2.5}, r"learner\.batch_size is a whole number"),
        ({"momentum": 2}, r"learner\.momentum is a number of at least 0 and below 1, not 2"),
        ({"weight_decay": -1}, r"learner\.weight_decay is a number of at least 0"),
        ({"max_gradient_norm": -1}, r"learner\.max_gradient_norm is a number above 0, or null, not -1"),
        ({"max_gradient_norm": 0}, r"learner\.max_gradient_norm is a number above 0, or null, not 0"),
        (
            {"optimiser": {"_target_": "torch.optim.AdamW", "lr": 1e-4}},
            r"has lr=0\.0001, and learner\.learning_rate",
        ),
        (
            {"optimiser": {"_target_": "torch.optim.AdamW", "weight_decay": 0.3}, "weight_decay": 0.1},
            r"has weight_decay=0\.3, and learner\.weight_decay is 0\.1",
        ),
    ],
)
def test_settings_that_would_go_wrong_or_be_ignored_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LocalTraining(**settings)


def test_an_optimiser_has_its_own_weight_decay_unless_the_learner_has_one() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    recipe = {"_target_": "torch.optim.AdamW"}
    for settings, expected in (
        ({"optimiser": recipe}, 0.01),
        ({"optimiser": recipe, "weight_decay": 0.2}, 0.2),
        ({"optimiser": {**recipe, "weight_decay": 0.3}}, 0.3),
    ):
        optimiser = LocalTraining(**settings).make_optimiser(parameters, [])
        assert optimiser.param_groups[0]["weight_decay"] == expected
    assert LocalTraining(optimiser={"_target_": "torch.optim.Rprop"}).make_optimiser(parameters, [])


def test_momentum_of_another_optimiser_than_sgd_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"learner\.momentum=0\.9 is of SGD"):
        LocalTraining(momentum=0.9, optimiser={"_target_": "torch.optim.AdamW"})
    with pytest.raises(ConfigError, match="FedNova normalises the changes of SGD"):
        LocalTraining(optimiser={"_target_": "torch.optim.AdamW"}).gradient_weight(3)
