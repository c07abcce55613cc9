"""Partitions of a dataset's samples among clients.

Each function takes the labels ([num_samples], int64) and returns one sorted int64 array of indices per client.
Together the arrays contain every sample exactly once.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from torchfedrpc.errors import ConfigError
from torchfedrpc.registry import partition

Indices = npt.NDArray[np.int64]


@partition("iid")
def iid(labels: Indices, num_clients: int, *, seed: int = 0) -> list[Indices]:
    """Distribute the samples at random; numbers of samples differ by at most one.

    Raises:
        ConfigError: If there are fewer samples than clients.
    """
    _check_enough(labels, num_clients, min_samples=1)
    order = np.random.default_rng(seed).permutation(len(labels))
    return _sorted(np.array_split(order, num_clients))


@partition("dirichlet")
def dirichlet(
    labels: Indices, num_clients: int, *, alpha: float = 0.5, min_samples: int = 10, seed: int = 0
) -> list[Indices]:
    """Distribute the samples in different mixtures of classes, and in different numbers.

    Every class is divided among the clients in proportions drawn from a symmetric Dirichlet distribution (Hsu et al.
    2019, in the form of Yurochkin et al. 2019, which gives clients different sizes). A client with less than
    ``min_samples`` receives samples of the largest client.

    Args:
        labels: The class of each sample.
        num_clients: Number of arrays.
        alpha: Concentration. Near 0 a client has one or two classes; at 100 all have nearly the same mixture.
        min_samples: Minimum number of samples of a client.
        seed: Seed of proportions and samples.

    Raises:
        ConfigError: If ``alpha`` is not above 0, or there are too few samples for ``min_samples`` per client.
    """
    if not alpha > 0:
        raise ConfigError(f"partition.alpha must be above 0, it is {alpha}")
    _check_enough(labels, num_clients, min_samples)
    generator = np.random.default_rng(seed)
    held: list[list[Indices]] = [[] for _ in range(num_clients)]
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        shares = generator.dirichlet(np.full(num_clients, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        for client, part in enumerate(np.split(members, cuts)):
            held[client].append(part)
    parts = [generator.permutation(np.concatenate(of_client)) for of_client in held]
    _top_up(parts, min_samples)
    return _sorted(parts)


@partition("shards")
def shards(labels: Indices, num_clients: int, *, shards_per_client: int = 2, seed: int = 0) -> list[Indices]:
    """Sort by class, cut into equal shards, and give each client a few: it has about as many classes.

    This is the "pathological" non-IID division of McMahan et al. 2017.

    Raises:
        ConfigError: If there are fewer samples than shards.
    """
    _check_enough(labels, num_clients, min_samples=shards_per_client)
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(labels))  # so that the order within a class is random too
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    pieces = np.array_split(by_class, num_clients * shards_per_client)
    dealt = generator.permutation(len(pieces)).reshape(num_clients, shards_per_client)
    return _sorted(np.concatenate([pieces[shard] for shard in hand]) for hand in dealt)


def _check_enough(labels: Indices, num_clients: int, min_samples: int) -> None:
    if num_clients < 1 or min_samples < 1:
        raise ConfigError(f"cannot give {num_clients} clients {min_samples} samples each: both must be at least 1")
    if len(labels) < num_clients * min_samples:
        raise ConfigError(
            f"{len(labels)} training samples are too few for {num_clients} clients with at least "
            f"{min_samples} each: have fewer clients (runtime.num_clients), or ask for less"
        )


def _top_up(parts: list[Indices], min_samples: int) -> None:
    """Fill every part up to ``min_samples``, in place, from the end of the largest; parts are in random order."""
    for short, part in enumerate(parts):
        while (missing := min_samples - len(part)) > 0:
            largest = max(range(len(parts)), key=lambda number: len(parts[number]))
            moved = min(missing, len(parts[largest]) - min_samples)
            parts[largest], gift = np.split(parts[largest], [-moved])
            part = parts[short] = np.concatenate([part, gift])


def _sorted(parts: Iterable[Indices]) -> list[Indices]:
    return [np.sort(part).astype(np.int64) for part in parts]
