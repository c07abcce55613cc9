"""Partitions of a dataset's samples among clients.

Each function takes the labels ([num_samples], int64) and returns one sorted int64 array of indices per client. Every
client has at least one sample, and together the arrays contain every sample exactly once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from torchfedrpc.errors import ConfigError, suggest
from torchfedrpc.registry import partition

Indices = npt.NDArray[np.int64]


@partition("iid")
def iid(labels: Indices, num_clients: int, *, seed: int = 0) -> list[Indices]:
    """Distribute the samples at random; numbers of samples differ by at most one.

    Raises:
        ConfigError: If there are fewer samples than clients.
    """
    _check_enough(labels, num_clients, 1, "")
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
    _check_alpha(alpha)
    _check_enough(labels, num_clients, min_samples, "partition.min_samples")
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
    _check_enough(labels, num_clients, shards_per_client, "partition.shards_per_client")
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(labels))  # so that the order within a class is random too
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    pieces = np.array_split(by_class, num_clients * shards_per_client)
    dealt = generator.permutation(len(pieces)).reshape(num_clients, shards_per_client)
    return _sorted(np.concatenate([pieces[shard] for shard in hand]) for hand in dealt)


@partition("quantity")
def quantity(
    labels: Indices,
    num_clients: int,
    *,
    law: str = "dirichlet",
    alpha: float = 0.5,
    exponent: float = 1.5,
    min_samples: int = 10,
    seed: int = 0,
) -> list[Indices]:
    """Distribute the samples in different numbers, but with the same mixture of classes for all clients.

    Each client has ``min_samples`` samples, and a share of the rest: drawn from a symmetric Dirichlet distribution
    (the quantity skew of Li et al. 2022), or in proportion to a power of its rank, with ranks in random order. Each
    class is spread evenly over all samples before these are cut, so that mixtures are equal up to whole samples.

    Args:
        labels: The class of each sample.
        num_clients: Number of arrays.
        law: ``dirichlet`` or ``power``.
        alpha: Concentration of the Dirichlet distribution. Near 0 one client has nearly all; 100 makes similar sizes.
        exponent: The client of rank r has a share in proportion to ``r ** -exponent``; 0 for equal sizes.
        min_samples: Minimum number of samples of a client.
        seed: Seed of sizes and samples.

    Raises:
        ConfigError: If ``law`` is unknown, ``alpha`` is not above 0, ``exponent`` is below 0, or there are too few
            samples for ``min_samples`` per client.
    """
    _check_enough(labels, num_clients, min_samples, "partition.min_samples")
    generator = np.random.default_rng(seed)
    if law == "dirichlet":
        _check_alpha(alpha)
        shares = generator.dirichlet(np.full(num_clients, alpha))
    elif law == "power":
        if not exponent >= 0:
            raise ConfigError(f"partition.exponent must be 0 or above, it is {exponent}")
        powers = np.arange(1, num_clients + 1, dtype=np.float64) ** -exponent
        shares = generator.permutation(powers / powers.sum())
    else:
        raise ConfigError(f"partition.law={law} is unknown{suggest(str(law), ('dirichlet', 'power'))}")
    num_free = len(labels) - num_clients * min_samples
    ends = np.round(np.cumsum(shares)[:-1] * num_free).astype(np.int64)
    return _sorted(np.split(_mixed(labels, generator), ends + min_samples * np.arange(1, num_clients)))


@partition("natural")
def natural(
    labels: Indices, num_clients: int, groups: Indices | None = None, *, several_groups: bool = False, seed: int = 0
) -> list[Indices]:
    """Give each client the samples of one group of the data: a writer, a user, a site.

    Args:
        labels: The class of each sample.
        num_clients: Number of arrays.
        groups: [num_samples], int64; the group of each sample. Clients receive groups in the order of their numbers.
        several_groups: Whether clients may have more than one group. Groups are dealt at random then, and numbers of
            groups differ by at most one.
        seed: Seed of the deal with ``several_groups``.

    Raises:
        ConfigError: If the data has no groups, fewer than clients, or more and not ``several_groups``.
    """
    if groups is None:
        raise ConfigError(
            "partition=natural needs the natural client of each sample, and this dataset has none: use one with "
            "groups, such as dataset=fedprox_synthetic, or give tfr.Samples(inputs, labels, groups)"
        )
    if len(groups) != len(labels):
        raise ConfigError(f"there are {len(groups)} groups for {len(labels)} labels: one for each is expected")
    numbers, group_of = np.unique(groups, return_inverse=True)
    num_groups = len(numbers)
    if num_groups < num_clients:
        raise ConfigError(
            f"the dataset has {num_groups} groups, too few for {num_clients} clients: set "
            f"runtime.num_clients={num_groups}, or fewer with partition.several_groups=true"
        )
    if num_groups > num_clients and not several_groups:
        raise ConfigError(
            f"the dataset has {num_groups} groups, and there are {num_clients} clients: set "
            f"runtime.num_clients={num_groups}, or partition.several_groups=true for clients with several groups"
        )
    order = np.random.default_rng(seed).permutation(num_groups) if several_groups else np.arange(num_groups)
    client_of = np.empty(num_groups, dtype=np.int64)
    for client, hand in enumerate(np.array_split(order, num_clients)):
        client_of[hand] = client
    clients = client_of[group_of]
    ends = np.cumsum(np.bincount(clients, minlength=num_clients))[:-1]
    return _sorted(np.split(np.argsort(clients, kind="stable"), ends))


def _mixed(labels: Indices, generator: np.random.Generator) -> Indices:
    """Return all indices in an order in which each class is spread evenly, and random within the class."""
    places = np.empty(len(labels))
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        places[members] = (np.arange(len(members)) + generator.random()) / len(members)
    return np.argsort(places, kind="stable")


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < math.inf:
        raise ConfigError(f"partition.alpha must be above 0 and finite, it is {alpha}")


def _check_enough(labels: Indices, num_clients: int, min_samples: int, setting: str) -> None:
    """Check that each client can have the minimum, which a setting has, if it is not empty.

    Raises:
        ConfigError: If a number is below 1, or there are too few samples.
    """
    if num_clients < 1 or min_samples < 1:
        raise ConfigError(f"cannot give {num_clients} clients {min_samples} samples each: both must be at least 1")
    if len(labels) < num_clients * min_samples:
        remedy = f", or lower {setting}" if setting and min_samples > 1 else ""
        raise ConfigError(
            f"{len(labels)} training samples are too few for {num_clients} clients with at least {min_samples} each: "
            f"have fewer clients, by runtime.num_clients{remedy}"
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
