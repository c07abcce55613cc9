"""Cohorts: which clients take part in a round."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from torchfedrpc.errors import ConfigError
from torchfedrpc.federation.trainer import AbstractFederationTrainer, sample_clients
from torchfedrpc.registry import cohort

logger = logging.getLogger(__name__)

_STREAM = 0xC0408  # separates these draws from others with the same seed


class Cohort(Protocol):
    """Choice of the clients of a round. It must be a function of the trainer's state and the round."""

    async def __call__(self, trainer: Any, round_num: int, clients: Sequence[str], size: int, /) -> Sequence[str]:
        """Return the clients of a round.

        Args:
            trainer: The trainer, with ``config``, ``weights`` and ``learner_proxy``.
            round_num: The round.
            clients: All clients that may be chosen.
            size: The trainer's ``clients_per_round``.
        """


@cohort("uniform")
class UniformCohort:
    """Clients drawn uniformly, without replacement (McMahan et al. 2017)."""

    async def __call__(self, trainer: Any, round_num: int, clients: Sequence[str], size: int, /) -> Sequence[str]:
        """Return a cohort."""
        return sample_clients(clients, min(size, len(clients)), seed=_seed(trainer), round_num=round_num)


@cohort("weighted")
class WeightedCohort:
    """Clients drawn by their numbers of samples, without replacement.

    Their models are to count alike (``weighting=uniform``): by numbers of samples, these would count twice (Li et al.
    2020, ICLR).

    Args:
        num_samples: Client -> its number of samples.
    """

    draws_by_samples = True

    def __init__(self, num_samples: Mapping[str, int]) -> None:
        self.num_samples = num_samples

    async def __call__(self, trainer: Any, round_num: int, clients: Sequence[str], size: int, /) -> Sequence[str]:
        """Return a cohort; clients without samples are not in it."""
        return _drawn_by_samples(self.num_samples, clients, size, [_seed(trainer), round_num])


@cohort("round_robin")
class RoundRobinCohort:
    """Clients one after another, in the order of ``proxy.client_ids``."""

    async def __call__(self, trainer: Any, round_num: int, clients: Sequence[str], size: int, /) -> Sequence[str]:
        """Return a cohort."""
        size = min(size, len(clients))
        return [clients[(round_num * size + place) % len(clients)] for place in range(size)]


@cohort("power_of_choice")
class PowerOfChoiceCohort:
    """Of some candidates, drawn by their numbers of samples, those with the highest loss (Cho et al. 2020).

    Candidates are scored by ``evaluate(model_weights=...)`` of their learners, whose ``loss`` counts; a loss that is
    NaN counts as the highest. If the trainer's ``on_failure`` is ``drop``, candidates that fail are left out. Models
    are to count alike (``weighting=uniform``), as in the paper.

    Args:
        num_samples: Client -> its number of samples.
        num_candidates: The paper's ``d``, at least ``clients_per_round``.
    """

    draws_by_samples = True

    def __init__(self, num_samples: Mapping[str, int], num_candidates: int) -> None:
        self.num_samples = num_samples
        self.num_candidates = num_candidates

    async def __call__(self, trainer: Any, round_num: int, clients: Sequence[str], size: int, /) -> Sequence[str]:
        """Return a cohort.

        Raises:
            ConfigError: If there are fewer candidates than the cohort has clients.
            GroupCallError: If a candidate fails, and may not be left out.
        """
        if self.num_candidates < size:
            raise ConfigError(
                f"cohort.num_candidates={self.num_candidates} is below trainer.clients_per_round={size}: raise it"
            )
        seeds = [_seed(trainer), round_num]
        candidates = _drawn_by_samples(self.num_samples, clients, self.num_candidates, seeds)
        on_error = "collect" if getattr(trainer.config, "on_failure", "raise") == "drop" else "raise"
        group = trainer.learner_proxy.clients(candidates).options(on_error=on_error)
        scores = await group.evaluate(model_weights=trainer.weights)
        for client_id, error in scores.failures.items():
            logger.warning("%s is no candidate: %s: %s", client_id, type(error).__name__, error)
        losses = {client_id: float(score["loss"]) for client_id, score in scores.items()}
        by_loss = sorted(losses, key=lambda one: -math.inf if math.isnan(losses[one]) else -losses[one])
        chosen = set(by_loss[:size])
        return [client_id for client_id in candidates if client_id in chosen]


@cohort("windows")
class AvailabilityWindows:
    """Clients drawn uniformly from those that are available: each one for some rounds, and then not for some.

    A client is available in a part ``fraction`` of each ``period`` of rounds, whose begin is drawn once.

    Args:
        period: Number of rounds of a period.
        fraction: Fraction of it, above 0, up to 1.

    Raises:
        ConfigError: If a value is out of range.
    """

    def __init__(self, period: int = 10, fraction: float = 0.5) -> None:
        if period < 1 or not 0 < fraction <= 1:
            raise ConfigError(
                f"cohort.period is at least 1 and cohort.fraction above 0, up to 1, not {period!r} and {fraction!r}"
            )
        self.period = period
        self.fraction = fraction

    async def __call__(self, trainer: Any, round_num: int, clients: Sequence[str], size: int, /) -> Sequence[str]:
        """Return a cohort: at most ``size`` clients, fewer if fewer are available."""
        begins = np.random.default_rng([_STREAM, _seed(trainer)]).integers(self.period, size=len(clients))
        length = max(1, round(self.fraction * self.period))
        available = [
            client_id
            for client_id, begin in zip(clients, begins, strict=True)
            if (round_num + int(begin)) % self.period < length
        ]
        return sample_clients(available, min(size, len(available)), seed=_seed(trainer), round_num=round_num)


def _seed(trainer: AbstractFederationTrainer) -> int:
    return int(getattr(trainer.config, "seed", None) or 0)


def _drawn_by_samples(
    num_samples: Mapping[str, int], clients: Sequence[str], size: int, seeds: Sequence[int]
) -> list[str]:
    """Return different clients, drawn by their numbers of samples.

    Raises:
        ConfigError: If a client's number is missing or invalid, or all are 0.
    """
    if odd := [one for one in clients if not 0 <= num_samples.get(one, -1) < math.inf]:
        raise ConfigError(f"the cohort needs the number of samples of {odd[0]}, and has {num_samples.get(odd[0])!r}")
    weights: npt.NDArray[np.float64] = np.array([num_samples[client_id] for client_id in clients], dtype=np.float64)
    if not weights.any():
        raise ConfigError("the cohort draws clients by their numbers of samples, and all of them are 0")
    generator = np.random.default_rng([_STREAM, *seeds])
    size = min(size, int((weights > 0).sum()))
    chosen = generator.choice(len(clients), size=size, replace=False, p=weights / weights.sum())
    return [clients[number] for number in np.sort(chosen)]
