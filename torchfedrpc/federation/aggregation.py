"""Aggregators: what makes one model of the models of a cohort; and weighted means."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeGuard

from torch import Tensor

from torchfedrpc.reduce.numerics import added, kind_of, mean_from, weighted
from torchfedrpc.reduce.reducers import Reducer, WeightedMean
from torchfedrpc.reduce.tree import fold
from torchfedrpc.registry import aggregator
from torchfedrpc.wire.tensors import PlainTensors

StateDict = Mapping[str, Tensor]
"""A model's parameters and buffers by name, as returned by ``Module.state_dict()``."""


class Aggregator(Protocol):
    """Function or object that makes one model of the models of a cohort. The bundled trainers take any.

    It is called on the driver, in a thread, with all models. The result of a `ReducingAggregator` is formed on the
    workers instead, so the driver's memory does not grow with the cohort.

    An object may have two more methods. ``begin_run(trainer)`` is called at the end of the constructor of
    `CohortTrainer`, and may refuse it. ``begin_round(weights, round_num)`` is called before each round with the
    global weights, and returns a mapping of metrics for the history.
    """

    def __call__(self, models: Sequence[StateDict], num_samples: Sequence[float], /) -> StateDict:
        """Return the new global model.

        Args:
            models: A state dict per client, in the order of the cohort, all with the same names and shapes.
            num_samples: Number of samples of each client.
        """


class ReducingAggregator(Protocol):
    """Aggregator whose result can be formed from partial results."""

    def reducer(self) -> Reducer:
        """Return a reducer of the results of ``train_epoch``.

        Its value is a mapping with ``model_weights`` (a state dict), and with ``train_loss`` if the history is to
        have it.
        """


def has_reducer(made: Any) -> TypeGuard[ReducingAggregator]:
    """Return whether an aggregator has a reducer, which no subclass has left behind by a `__call__` of its own."""
    kinds = type(made).__mro__
    of_reducer, of_call = (
        next((number for number, kind in enumerate(kinds) if name in vars(kind)), len(kinds))
        for name in ("reducer", "__call__")
    )
    return of_reducer < len(kinds) and of_reducer <= of_call


@aggregator("mean")
class Mean:
    """Mean of the models, weighted by the clients' numbers of samples (McMahan et al. 2017)."""

    def __call__(self, models: Sequence[StateDict], num_samples: Sequence[float], /) -> dict[str, Tensor]:
        """Return the mean, with the bits of `reducer`."""
        return weighted_mean(models, num_samples)

    def reducer(self) -> Reducer:
        """Return the reducer that forms the mean on the workers."""
        return WeightedMean(("model_weights", "train_loss"))


_Part = tuple[Tensor, int]  # a weighted sum, and the number of sums on the longest path to it


def weighted_mean(states: Sequence[StateDict], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """Return the weighted mean of state dicts entry by entry, as in FedAvg (McMahan et al. 2017).

    Additions follow the tree of `torchfedrpc.reduce.tree` over the indices in ``states``. So equal arguments give
    equal bits, and the same bits as a group's ``reduce`` with `WeightedMean` for clients at these indices.
    `torchfedrpc.reduce.numerics` specifies the dtypes of the sums. Beside the means, memory holds at most about log2
    of the number of states temporaries of an entry's size.

    Args:
        states: At least one state dict; all have the same names and shapes, and the same kinds of dtype (bool,
            integer, float, complex).
        weights: One number >= 0 per state dict, such as its count of samples. Default: Equal weights. A state dict
            of weight 0 is ignored, whatever its values.

    Returns:
        The mean, on the device and in the dtype of the first state dict. Integers are rounded to the nearest, halves
        to even; a boolean is true if true values have more than half of the weight.

    Raises:
        ValueError: If there are no state dicts, they do not match, or the weights are invalid.
        TypeError: If an entry is not a tensor.
    """
    factors = _checked_weights(len(states), weights)
    for index, state in enumerate(states):
        check_match(states[0], state, index)
    total_weight = fold(factors, lambda left, right: left + right)
    assert total_weight is not None
    with PlainTensors():
        return {name: _mean([state[name] for state in states], factors, total_weight) for name in states[0]}


def _mean(tensors: list[Tensor], factors: list[float], total_weight: float) -> Tensor:
    first = tensors[0]
    spare: list[Tensor] = []  # buffers to reuse: allocating fresh memory costs more than the sums

    def parts() -> Iterator[_Part | None]:
        for tensor, factor in zip(tensors, factors, strict=True):
            if factor == 0:
                yield None
            else:
                yield weighted(tensor.to(first.device), factor, out=spare.pop() if spare else None), 0

    def merge(left: _Part, right: _Part) -> _Part:
        num_sums = max(left[1], right[1]) + 1
        total = added(left[0], right[0], num_sums)
        spare.extend(tensor for tensor, _ in (left, right) if tensor is not total)
        return total, num_sums

    root = fold(parts(), merge)
    assert root is not None
    return mean_from(root[0], total_weight, first.dtype)


def _checked_weights(num_states: int, weights: Sequence[float] | None) -> list[float]:
    if num_states == 0:
        raise ValueError("nothing to aggregate: the list of state dicts is empty")
    if weights is None:
        return [1.0] * num_states
    factors = [float(weight) for weight in weights]
    if len(factors) != num_states:
        raise ValueError(f"{num_states} state dicts need as many weights, not {len(factors)}")
    if not all(math.isfinite(factor) and factor >= 0 for factor in factors) or not sum(factors) > 0:
        raise ValueError(f"weights must be finite, none below 0 and not all 0; they begin with {factors[:8]}")
    return factors


def check_match(first: StateDict, other: StateDict, index: int, titles: tuple[str, str] | None = None) -> None:
    """Check that a state dict has the names, shapes and kinds of dtype of the first one.

    Args:
        first: The first one.
        other: The state dict.
        index: Its index, for messages.
        titles: What the two are, for messages. Default: The state dicts at 0 and at the index.

    Raises:
        ValueError: If it has not; the message has the first difference.
        TypeError: If an entry is not a tensor.
    """
    title, title_of_first = titles or (f"the state dict at {index}", "the one at 0")
    if first.keys() != other.keys():
        lacking, extra = [name for name in first if name not in other], [name for name in other if name not in first]
        differences = [f"lacks {', '.join(lacking[:5])}"] if lacking else []
        differences += [f"has {', '.join(extra[:5])}, which {title_of_first} lacks"] if extra else []
        raise ValueError(f"{title} {' and '.join(differences)}")
    for name, tensor in other.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"entry {name!r} of {title} is a {type(tensor).__name__}, not a tensor")
        if tensor.shape != first[name].shape:
            raise ValueError(
                f"entry {name!r} has shape {list(tensor.shape)} in {title}, and {list(first[name].shape)} in "
                f"{title_of_first}"
            )
        if kind_of(tensor.dtype) != kind_of(first[name].dtype):
            raise ValueError(
                f"entry {name!r} is {kind_of(tensor.dtype)} in {title}, and {kind_of(first[name].dtype)} in "
                f"{title_of_first}"
            )
