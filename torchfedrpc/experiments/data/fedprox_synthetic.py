"""Synthetic(alpha, beta) of the FedProx paper: users whose models and inputs differ. Needs only torch."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments.data.samples import Samples, TrainTest
from torchfedrpc.registry import dataset

_NUM_FEATURES = 60
_NUM_CLASSES = 10
_LEAST_SAMPLES = 50


@dataset("fedprox_synthetic")
def fedprox_synthetic(
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    iid: bool = False,
    num_users: int = 30,
    test_fraction: float = 0.1,
    seed: int = 0,
) -> TrainTest:
    """Generate Synthetic(alpha, beta); inputs are [num_samples, 60], float32, in 10 classes. Users are the groups.

    User k labels its inputs x by ``argmax(W_k x + b_k)``. Its weights are drawn from N(u_k, 1), with u_k from
    N(0, alpha). Its inputs are drawn from N(v_k, S), where S is diagonal with S_jj = j^-1.2, the elements of v_k are
    drawn from N(B_k, 1), and B_k from N(0, beta). The second parameter of N is the variance. A user has 50 samples,
    and more by a lognormal distribution with parameters 4 and 2. Source: Li et al. 2020, "Federated Optimization in
    Heterogeneous Networks", section 5.1.

    Args:
        alpha: How much the models of users differ.
        beta: How much the inputs of users differ.
        iid: Whether all users have one model, with weights from N(0, 1), and inputs with mean 0, as Synthetic-IID.
        num_users: Number of users.
        test_fraction: Fraction of each user's samples in the test set.
        seed: Seed of the models, samples and the split.

    Raises:
        ConfigError: If ``alpha`` or ``beta`` is below 0, there is no user, or a fraction leaves an empty set.
    """
    if not (0 <= alpha < math.inf and 0 <= beta < math.inf):
        raise ConfigError(f"dataset.alpha and dataset.beta must be 0 or above, they are {alpha} and {beta}")
    if num_users < 1:
        raise ConfigError(f"dataset.num_users must be at least 1, it is {num_users}")
    if not 1 / _LEAST_SAMPLES <= test_fraction <= 1 - 1 / _LEAST_SAMPLES:
        raise ConfigError(f"dataset.test_fraction must be between 0.02 and 0.98, it is {test_fraction}")
    generator = np.random.default_rng(seed)
    sizes = _LEAST_SAMPLES + generator.lognormal(4, 2, num_users).astype(np.int64)
    scales = np.arange(1, _NUM_FEATURES + 1) ** (-1.2 / 2)
    shared = _model(generator, 0.0)
    train, test = [], []
    for user, size in enumerate(sizes):
        weights, bias = shared if iid else _model(generator, generator.normal(0, math.sqrt(alpha)))
        centre = generator.normal(generator.normal(0, math.sqrt(beta)), 1, _NUM_FEATURES) * (not iid)
        inputs = generator.normal(centre, scales, (size, _NUM_FEATURES))
        labels = np.argmax(inputs @ weights.T + bias, axis=1)
        samples = Samples(torch.from_numpy(inputs).float(), torch.from_numpy(labels), torch.full((int(size),), user))
        num_test = round(test_fraction * int(size))
        test.append(samples.take(torch.arange(num_test)))
        train.append(samples.take(torch.arange(num_test, int(size))))
    return TrainTest(Samples.concatenated(train), Samples.concatenated(test))


def _model(generator: np.random.Generator, mean: float) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Draw weights, [10, 60], and biases, [10], from N(mean, 1)."""
    weights = generator.normal(mean, 1, (_NUM_CLASSES, _NUM_FEATURES))
    return weights, generator.normal(mean, 1, _NUM_CLASSES)
