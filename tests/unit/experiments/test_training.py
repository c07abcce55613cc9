"""Local training and scoring."""

from __future__ import annotations

from concurrent.futures import CancelledError

import pytest
import torch

from torchfedrpc.experiments.baseline import train_centrally
from torchfedrpc.experiments.data.synthetic import synthetic
from torchfedrpc.experiments.training import Optimisation, build_model, copy_weights, fit, score

MLP = {"_target_": "torchfedrpc.experiments.models.MLP"}


def test_training_learns() -> None:
    data = synthetic(num_samples=500)
    model = build_model(MLP, seed=0)
    before = score(model, data.test)
    indices = torch.arange(len(data.train))
    first_loss = fit(model, data.train, indices, num_epochs=1, optimisation=Optimisation())
    second_loss = fit(model, data.train, indices, num_epochs=3, optimisation=Optimisation())
    assert second_loss < first_loss
    assert score(model, data.test).accuracy > 0.9 > before.accuracy


def test_an_epoch_sees_only_the_indices() -> None:
    data = synthetic(num_samples=200)
    indices = torch.tensor([1, 5, 8])
    inputs = torch.full_like(data.train.inputs, torch.nan)
    inputs[indices] = data.train.inputs[indices]
    samples = type(data.train)(inputs, data.train.labels)
    loss = fit(build_model(MLP, seed=0), samples, indices, num_epochs=2, optimisation=Optimisation(batch_size=2))
    assert loss == loss


def test_the_train_loss_is_the_mean_over_samples() -> None:
    data = synthetic(num_samples=200)
    model = build_model(MLP, seed=0)
    expected = score(model, data.train).loss
    still = Optimisation(batch_size=7, learning_rate=0.0)
    loss = fit(model, data.train, torch.arange(len(data.train)), num_epochs=2, optimisation=still)
    assert loss == pytest.approx(expected, rel=1e-5)


def test_the_proximal_term_pulls_towards_where_training_began() -> None:
    data = synthetic(num_samples=200)

    def distance(mu: float) -> float:
        torch.manual_seed(0)
        model = build_model(MLP, seed=0)
        start = copy_weights(model)
        plan = Optimisation(learning_rate=0.05, proximal_mu=mu)
        fit(model, data.train, torch.arange(len(data.train)), num_epochs=3, optimisation=plan)
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
            optimisation=Optimisation(batch_size=1),
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
