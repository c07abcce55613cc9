"""Differential privacy of clients: the mean of clipped changes with Gaussian noise, and its accountant."""

from __future__ import annotations

import functools
import logging
import math
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchfedrpc.errors import ConfigError
from torchfedrpc.federation.aggregation import StateDict, check_match
from torchfedrpc.federation.cohort_trainer import CohortTrainer
from torchfedrpc.federation.cohorts import UniformCohort
from torchfedrpc.registry import aggregator

logger = logging.getLogger(__name__)

_STREAM = 0xD1FF  # separates the noise from other draws with the same seed


@aggregator("gaussian")
class GaussianMean:
    """Mean of clipped changes with Gaussian noise (DP-FedAvg, McMahan et al. 2018, ICLR).

    With the global weights ``w`` and ``n`` models: ``w + (sum(clip(w_i - w)) + noise) / n``, where ``clip`` scales a
    change to an L2 norm of at most ``clip_norm`` over all parameters, and the noise has the standard deviation
    ``noise_multiplier * clip_norm``. Models count alike, and one that is not finite as no change. All parameters that
    are floats have noise, frozen ones too. Integers and entries that stay with the clients keep their global value;
    other buffers are refused.

    Args:
        clip_norm: The largest norm of a change, above 0.
        noise_multiplier: Standard deviation of the noise in the sum, relative to ``clip_norm``; at least 0.
        seed: Seed of the noise, for simulations: the noise depends on seed and round alone, so knowledge of the seed
            reveals it. None: A secret seed is drawn from the operating system's entropy in the first round. It is
            part of checkpoints, so that a round which runs again has the same noise, and reveals nothing more.
        delta: Delta of the ``epsilon`` in the metrics of each round, see `epsilon`; above 0 and below 1. None: No
            accountant, and so no checks that it covers the trainer.

    Raises:
        ConfigError: If a value is out of range, or the package dp-accounting is missing.
    """

    def __init__(
        self, clip_norm: float, noise_multiplier: float, *, seed: int | None, delta: float | None = 1e-5
    ) -> None:
        checks: list[tuple[str, Any, Callable[[Any], bool], str]] = [
            ("clip_norm", clip_norm, lambda number: 0 < number < math.inf, "a number above 0"),
            ("noise_multiplier", noise_multiplier, lambda number: 0 <= number < math.inf, "a number of at least 0"),
            ("delta", 0.5 if delta is None else delta, lambda number: 0 < number < 1, "above 0 and below 1, or null"),
            (
                "seed",
                0 if seed is None else seed,
                lambda number: number >= 0 and isinstance(number, int),
                "0, 1, 2, ..., or null",
            ),
        ]
        for name, value, is_valid, expected in checks:
            if isinstance(value, bool) or not isinstance(value, int | float) or not is_valid(value):
                raise ConfigError(f"aggregator.{name} is {expected}, not {value!r:.200}")
        if delta is not None:
            if noise_multiplier == 0:
                raise ConfigError(
                    "without noise epsilon is infinite: set aggregator.noise_multiplier above 0, or aggregator.delta "
                    "to null to clip only"
                )
            _accounting()
        self.clip_norm = clip_norm
        self.noise_multiplier = noise_multiplier
        self.seed = seed
        self.delta = delta
        self._names: list[str] = []  # of the parameters that are clipped
        self._sampled = (0, 0)  # clients in a round, of all clients
        self._round: tuple[StateDict, int] | None = None
        self._secret: int | None = None  # the seed drawn

    def begin_run(self, trainer: CohortTrainer) -> None:
        """Check that a trainer fits. `CohortTrainer` calls it in its constructor.

        Raises:
            ConfigError: If the weights have entries that would leak, or with ``delta`` if no accountant covers the
                trainer.
        """
        names, personal = trainer.parameter_names(), trainer.personal_names()
        assert trainer.weights is not None
        if odd := [name for name in trainer.weights if name not in names and name not in personal]:
            raise ConfigError(
                f"a mean of {odd[0]} would leak, since it is no parameter that can be clipped: take a model without "
                f"buffers (model.batch_norm=false), or trainer=fedbn, whose buffers stay with the clients"
            )
        if self.delta is not None and (reason := _not_covered(trainer)) is not None:
            raise ConfigError(
                f"no accountant covers {reason}: change that, or set aggregator.delta to null for no epsilon"
            )
        num_clients = len(trainer.learner_proxy.client_ids)
        self._names = [name for name in names if name not in personal]
        self._sampled = getattr(trainer.config, "clients_per_round", None) or num_clients, num_clients

    def begin_round(self, weights: StateDict, round_num: int) -> dict[str, float]:
        """Set the global weights of a round.

        Returns:
            With ``delta``, the ``epsilon`` of all rounds up to this one.
        """
        self._round = weights, round_num
        if self.seed is None and self._secret is None:
            self._secret = secrets.randbits(128)
        if self.delta is None:
            return {}
        size, num_clients = self._sampled
        return {
            "epsilon": epsilon(
                self.noise_multiplier,
                cohort_size=size,
                num_clients=num_clients,
                num_rounds=round_num + 1,
                delta=self.delta,
            )
        }

    def __call__(self, models: Sequence[StateDict], num_samples: Sequence[float], /) -> dict[str, Tensor]:
        """Return the mean, whatever the numbers of samples.

        Raises:
            ConfigError: If the trainer has not called `begin_run` and `begin_round`.
            ValueError: If there are no models, or they do not match the global weights.
        """
        if self._round is None or not self._names:
            raise ConfigError(
                "the gaussian aggregator needs the global weights: call its begin_run(trainer) once, and its "
                "begin_round(weights, round_num) before each round, as tfr.FedAvgTrainer does"
            )
        (weights, round_num), self._round = self._round, None
        if not models:
            raise ValueError("nothing to aggregate: the list of models is empty")
        before = {name: weights[name].to(torch.float64) for name in self._names}
        total = self._noise(before, round_num)
        for index, model in enumerate(models):
            check_match(weights, model, index)
            change = {name: model[name].to(value) - value for name, value in before.items()}
            norm = math.sqrt(sum(float(value.square().sum()) for value in change.values()))
            if not math.isfinite(norm):
                logger.warning("model %d of round %d is not finite, and counts as no change", index, round_num + 1)
                continue
            factor = min(1.0, self.clip_norm / norm) if norm else 1.0
            for name, value in change.items():
                total[name] += factor * value
        mean = {name: (value + total[name] / len(models)).to(weights[name].dtype) for name, value in before.items()}
        return {name: mean.get(name, value) for name, value in weights.items()}

    def _noise(self, like: StateDict, round_num: int) -> dict[str, Tensor]:
        seed = self._secret if self.seed is None else self.seed
        assert seed is not None
        state = np.random.SeedSequence([_STREAM, seed, round_num]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]))
        scale = self.noise_multiplier * self.clip_norm
        return {
            name: (torch.randn(value.shape, generator=generator, dtype=torch.float64) * scale).to(value.device)
            for name, value in like.items()
        }


@functools.lru_cache(maxsize=256)
def epsilon(
    noise_multiplier: float,
    *,
    cohort_size: int,
    num_clients: int,
    num_rounds: int,
    delta: float,
    sampling: str = "fixed",
) -> float:
    """Return epsilon of ``num_rounds`` rounds of `GaussianMean`, by Renyi differential privacy (Mironov 2017).

    Args:
        noise_multiplier: As in `GaussianMean`.
        cohort_size: Number of clients in a round; with ``poisson`` its expectation.
        num_clients: Number of all clients.
        num_rounds: Number of rounds.
        delta: Delta.
        sampling: ``fixed``: cohorts of ``cohort_size``, drawn uniformly without replacement, as trainers do. Epsilon
            holds for the replacement of one client's data, which changes the sum by up to ``2 * clip_norm``, so the
            noise counts half (Wang et al. 2019, AISTATS, theorem 27). ``poisson``: each client takes part with
            probability ``cohort_size / num_clients``, as most papers count, and epsilon holds for one client more or
            less (Mironov et al. 2019). It is smaller, and not that of a cohort of fixed size.

    Raises:
        ConfigError: If ``sampling`` is unknown, or the package dp-accounting is missing.
    """
    if sampling not in ("fixed", "poisson"):
        raise ConfigError(f"sampling is fixed or poisson, not {sampling!r:.200}")
    dp, rdp = _accounting()
    if sampling == "poisson":
        event = dp.PoissonSampledDpEvent(cohort_size / num_clients, dp.GaussianDpEvent(noise_multiplier))
        accountant = rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
    else:
        gaussian = dp.GaussianDpEvent(noise_multiplier / 2)
        event = dp.SampledWithoutReplacementDpEvent(num_clients, cohort_size, gaussian)
        accountant = rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
        if cohort_size < num_clients:  # the bound without sampling holds as well, and is lower for large cohorts
            all_clients = epsilon(
                noise_multiplier,
                cohort_size=num_clients,
                num_clients=num_clients,
                num_rounds=num_rounds,
                delta=delta,
            )
            accountant.compose(event, num_rounds)
            return min(all_clients, float(accountant.get_epsilon(delta)))
    accountant.compose(event, num_rounds)
    return float(accountant.get_epsilon(delta))


def _not_covered(trainer: CohortTrainer) -> str | None:
    """Return why an accountant for cohorts of fixed size does not cover a trainer; None if it does."""
    kind, config = type(trainer), trainer.config
    if kind.train_round is not CohortTrainer.train_round:
        return f"the rounds of {kind.__qualname__}, which are not FedAvg's"
    if odd := [name for name in trainer.averaged if name != "train_loss"]:
        return f"{kind.__qualname__}, since {odd[0]} of the clients is averaged without noise"
    if not isinstance(trainer.cohort, UniformCohort | None) or (kind.select_clients, kind.choose_clients) != (
        CohortTrainer.select_clients,
        CohortTrainer.choose_clients,
    ):
        return f"the cohorts of {trainer.cohort or kind.__qualname__}: only uniform ones of fixed size"
    if getattr(config, "on_failure", "raise") != "raise":
        return "cohorts without the clients that failed (the trainer's on_failure)"
    for name in ("min_results", "deadline_s"):
        if getattr(config, name, None) is not None:
            return f"cohorts without the clients that are late (the trainer's {name})"
    if trainer.simulation is not None and (trainer.simulation.dropout or trainer.simulation.deadline_s is not None):
        return "cohorts from which clients drop out (simulation.dropout and simulation.deadline_s)"
    return None


def _accounting() -> tuple[Any, Any]:
    """Return the modules dp_accounting and dp_accounting.rdp."""
    try:
        import dp_accounting  # noqa: PLC0415 - optional
        from dp_accounting import rdp  # noqa: PLC0415 - likewise
    except ImportError as error:
        raise ConfigError(
            "epsilon needs dp_accounting, which is not installed: pip install 'torchfedrpc[privacy]'; or set "
            "aggregator.delta to null to train without it"
        ) from error
    return dp_accounting, rdp
