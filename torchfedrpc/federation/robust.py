"""Aggregators that survive clients whose models are wrong, on purpose or not. All models count alike.

A model with values that are not finite counts as one that is farther off than any other. What an algorithm averages
beside the models, such as SCAFFOLD's changes of control variates, is aggregated in the same way; by multi-Krum, which
selects by the models alone, as the median.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from torchfedrpc.errors import ConfigError
from torchfedrpc.federation.aggregation import StateDict, check_match, weighted_mean
from torchfedrpc.registry import aggregator


class RobustAggregator(ABC):
    """Base class of these aggregators."""

    def __call__(self, models: Sequence[StateDict], num_samples: Sequence[float], /) -> dict[str, Tensor]:
        """Return the aggregate of the models.

        Raises:
            ValueError: If there are too few models, or they do not match.
        """
        return self.aggregate(models, [{}] * len(models))[0]

    @abstractmethod
    def aggregate(
        self, models: Sequence[StateDict], others: Sequence[StateDict]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the aggregate of the models, and that of other tensors of the same clients.

        Args:
            models: A state dict per client.
            others: Other tensors of each client by name.

        Raises:
            ValueError: If there are too few models, or they do not match.
        """


@aggregator("median")
class CoordinateMedian(RobustAggregator):
    """Median of each coordinate (Yin et al. 2018, definition 1): of an even number, the mean of the middle two."""

    def aggregate(
        self, models: Sequence[StateDict], others: Sequence[StateDict]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the medians; of integers and booleans the lower ones."""
        num_trimmed = (_count(models, others) - 1) // 2
        return _trimmed(models, num_trimmed), _trimmed(others, num_trimmed)


@aggregator("trimmed_mean")
class TrimmedMean(RobustAggregator):
    """Mean of each coordinate without its highest and lowest values (Yin et al. 2018, definition 2).

    Args:
        fraction: Fraction of the models that is left out at each end, at least 0 and below 0.5; at least that of the
            attackers. The number of models is rounded up.

    Raises:
        ConfigError: If the fraction is out of range.
    """

    def __init__(self, fraction: float = 0.2) -> None:
        if not 0 <= fraction < 0.5:
            raise ConfigError(f"aggregator.fraction is at least 0 and below 0.5, not {fraction!r}")
        self.fraction = fraction

    def aggregate(
        self, models: Sequence[StateDict], others: Sequence[StateDict]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the means; of integers and booleans the lower medians."""
        num_models = _count(models, others)
        num_trimmed = math.ceil(round(self.fraction * num_models, 9))  # 0.07 * 100 is above 7 in floats
        if 2 * num_trimmed >= num_models:
            raise ValueError(
                f"a trimmed mean of {num_models} models without {num_trimmed} at each end has none left: lower "
                f"aggregator.fraction, or take more clients"
            )
        return _trimmed(models, num_trimmed), _trimmed(others, num_trimmed)


@aggregator("multi_krum")
class MultiKrum(RobustAggregator):
    """Mean of the models that are nearest to their neighbours (Blanchard et al. 2017).

    The score of a model is the sum of its squared distances to its ``n - num_attackers - 2`` nearest ones.

    Args:
        num_attackers: Number of wrong models to survive, the paper's ``f``; ``2 * f + 2`` must be below the number of
            models.
        num_selected: Number of models in the mean; 1 is Krum. Default: All but ``num_attackers``.

    Raises:
        ConfigError: If a number is out of range.
    """

    def __init__(self, num_attackers: int = 1, num_selected: int | None = None) -> None:
        if num_attackers < 0:
            raise ConfigError(f"aggregator.num_attackers is at least 0, not {num_attackers!r}")
        if num_selected is not None and num_selected < 1:
            raise ConfigError(f"aggregator.num_selected is at least 1, not {num_selected!r}")
        self.num_attackers = num_attackers
        self.num_selected = num_selected

    def aggregate(
        self, models: Sequence[StateDict], others: Sequence[StateDict]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the mean of the selected models, and the medians of the others, which tell nothing of a model."""
        num_models, num_attackers = _count(models, others), self.num_attackers
        num_selected = num_models - num_attackers if self.num_selected is None else self.num_selected
        if num_models <= 2 * num_attackers + 2 or num_selected > num_models:
            raise ValueError(
                f"multi-Krum with {num_attackers} attackers and {num_selected} selected models needs more than "
                f"{max(2 * num_attackers + 2, num_selected - 1)} models, and has {num_models}: take more clients, or "
                f"lower aggregator.num_attackers"
            )
        distances = _squared_distances(models)
        nearest = distances.sort(dim=1).values[:, 1 : num_models - num_attackers - 1]  # the first one is to itself
        order = nearest.sum(dim=1).sort(stable=True).indices[:num_selected]
        selected = weighted_mean([models[index] for index in sorted(order.tolist())])
        return selected, _trimmed(others, (num_models - 1) // 2)


def is_robust(made: Any) -> TypeGuard[RobustAggregator]:
    """Return whether an aggregator is one of these, without a `__call__` of its own, which would be left out."""
    return isinstance(made, RobustAggregator) and type(made).__call__ is RobustAggregator.__call__


def _count(models: Sequence[StateDict], others: Sequence[StateDict]) -> int:
    """Return the number of models; they and what is beside them must match."""
    if not models:
        raise ValueError("nothing to aggregate: the list of models is empty")
    for states in (models, others):
        for index, state in enumerate(states):
            check_match(states[0], state, index)
    return len(models)


def _trimmed(models: Sequence[StateDict], num_trimmed: int) -> dict[str, Tensor]:
    """Return the means of each coordinate's values without some at each end."""
    kept = slice(num_trimmed, len(models) - num_trimmed)
    middle = (len(models) - 1) // 2
    result = {}
    for name, first in models[0].items():
        ordered = torch.stack([model[name].to(first.device, first.dtype) for model in models]).sort(dim=0).values
        result[name] = (
            ordered[kept].double().mean(dim=0).to(first.dtype) if first.is_floating_point() else ordered[middle]
        )
    return result


def _squared_distances(models: Sequence[StateDict]) -> Tensor:
    """Return [num_models, num_models], float64; infinite where a model is not finite."""
    total = torch.zeros(len(models), len(models), dtype=torch.float64)
    for name, first in models[0].items():
        if first.is_floating_point() or first.is_complex():
            dtype = torch.complex128 if first.is_complex() else torch.float64
            values = torch.stack([model[name].to("cpu", dtype).flatten() for model in models])
            for index, value in enumerate(values):  # a row at once bounds the memory
                total[index] += (values - value).abs().square().sum(dim=1)
    total = total.nan_to_num(nan=torch.inf, posinf=torch.inf)
    return total.fill_diagonal_(0)
