"""Aggregators that survive clients whose models are wrong, on purpose or not. All models count alike.

A model with values that are not finite counts as one that is farther off than any other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchfedrpc.errors import ConfigError
from torchfedrpc.federation.aggregation import StateDict, check_match, weighted_mean
from torchfedrpc.registry import aggregator


@aggregator("median")
class CoordinateMedian:
    """Median of each coordinate (Yin et al. 2018, definition 1): of an even number, the mean of the middle two."""

    def __call__(self, models: Sequence[StateDict], num_samples: Sequence[float], /) -> dict[str, Tensor]:
        """Return the medians; of integers and booleans the lower ones.

        Raises:
            ValueError: If there are no models, or they do not match.
        """
        return _trimmed(models, (_count(models) - 1) // 2)


@aggregator("trimmed_mean")
class TrimmedMean:
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

    def __call__(self, models: Sequence[StateDict], num_samples: Sequence[float], /) -> dict[str, Tensor]:
        """Return the means; of integers and booleans the lower medians.

        Raises:
            ValueError: If all models would be left out, or they do not match.
        """
        num_models = _count(models)
        num_trimmed = -int(-self.fraction * num_models // 1)
        if 2 * num_trimmed >= num_models:
            raise ValueError(
                f"a trimmed mean of {num_models} models without {num_trimmed} at each end has none left: lower "
                f"aggregator.fraction, or take more clients"
            )
        return _trimmed(models, num_trimmed)


@aggregator("multi_krum")
class MultiKrum:
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

    def __call__(self, models: Sequence[StateDict], num_samples: Sequence[float], /) -> dict[str, Tensor]:
        """Return the mean of the selected models.

        Raises:
            ValueError: If there are too few models, or they do not match.
        """
        num_models, num_attackers = _count(models), self.num_attackers
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
        return weighted_mean([models[index] for index in sorted(order.tolist())])


def _count(models: Sequence[StateDict]) -> int:
    """Return the number of models, which must match."""
    if not models:
        raise ValueError("nothing to aggregate: the list of models is empty")
    for index, model in enumerate(models):
        check_match(models[0], model, index)
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
        if first.is_floating_point():
            values = torch.stack([model[name].to("cpu", torch.float64).flatten() for model in models])
            for index, value in enumerate(values):  # a row at once bounds the memory
                total[index] += (values - value).square().sum(dim=1)
    total = total.nan_to_num(nan=torch.inf, posinf=torch.inf)
    return total.fill_diagonal_(0)
