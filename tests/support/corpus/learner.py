"""The corpus as one learner for a proxy: a client's name tells which kind it is."""

from __future__ import annotations

from collections import Counter
from typing import Any

from corpus import (
    arrays,
    asynchronous,
    containers,
    data,
    gradients,
    libraries,
    modules,
    optimisers,
    plain,
    randomness,
    tensors,
    values,
)
from corpus.registry import kind_of

TOPICS = (
    gradients, optimisers, modules, tensors, arrays, containers, values, plain, data, randomness, asynchronous,
    libraries,
)  # fmt: skip

num_made: Counter[str] = Counter()  # client -> how often a learner of it was made in this process


def make(client_id: str) -> Any:
    """The learner of a client."""
    num_made[client_id] += 1
    return kind_of(client_id).learner(client_id)
