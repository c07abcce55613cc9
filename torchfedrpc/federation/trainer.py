"""The base of every trainer: its settings, its cohorts, its rounds."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from torchfedrpc.errors import ConfigError
from torchfedrpc.federation.aggregation import weighted_mean
from torchfedrpc.federation.sampling import sample_clients
from torchfedrpc.federation.settings import as_settings
from torchfedrpc.observe.events import RoundStarted
from torchfedrpc.proxy import LearnerProxy


class AbstractFederationTrainer(ABC):
    """A federated algorithm: it decides who trains when, on which weights, and what becomes of the results.

    Subclasses write `train`. The same trainer runs in every execution mode.

    Args:
        config: a mapping or an object. The base reads ``num_rounds`` (for `rounds`), ``clients_per_round``
            (default: all) and ``seed`` (default: 0) of it; everything else is the subclass's own.
        learner_proxy: an open proxy, through which learners are called.

    Attributes:
        config: the settings; keys of a mapping, and of mappings within, are attributes too.
        learner_proxy: as given.

    Raises:
        ConfigError: one of the settings above cannot be met.
    """

    def __init__(self, config: Any, learner_proxy: LearnerProxy) -> None:
        self.config = as_settings(config)
        self.learner_proxy = learner_proxy
        num_clients = len(learner_proxy.client_ids)
        self._seed = self._count("seed", default=0, least=0)
        self._cohort_size = self._count("clients_per_round", default=num_clients, least=1, most=num_clients)

    @abstractmethod
    async def train(self) -> Any:
        """Run the algorithm from beginning to end."""

    def select_clients(self, round_num: int) -> list[str]:
        """Draw the cohort of a round, from the seed and ``round_num`` alone.

        Returns:
            ``clients_per_round`` different ids, in the order of ``learner_proxy.client_ids``.
        """
        return sample_clients(self.learner_proxy.client_ids, self._cohort_size, seed=self._seed, round_num=round_num)

    async def aggregate_weights(
        self, weights_list: Sequence[Mapping[str, Tensor]], num_samples: Sequence[float] | None = None
    ) -> dict[str, Tensor]:
        """Average models.

        Args:
            weights_list: a state dict of each client, all with the same names and shapes.
            num_samples: the weight of each; by default all count alike.

        Raises:
            ValueError: the list is empty, the state dicts do not match, or the weights are unusable.
        """
        # On a thread, because a large mean takes longer than heartbeats and deadlines can wait.
        return await asyncio.to_thread(weighted_mean, weights_list, num_samples)

    async def rounds(self) -> AsyncIterator[int]:
        """Count the rounds, from 0 to ``num_rounds - 1``, and tell subscribers when one begins.

        Raises:
            ConfigError: the config has no usable ``num_rounds``.
        """
        num_rounds = self.num_rounds
        for round_num in range(num_rounds):
            self.learner_proxy.publish(RoundStarted(round_num, num_rounds))
            yield round_num

    @property
    def num_rounds(self) -> int:
        """The rounds of a whole run.

        Raises:
            ConfigError: the config has none, or no count.
        """
        return self._count("num_rounds", default=None, least=0)

    def _count(self, name: str, *, default: int | None, least: int, most: int | None = None) -> int:
        """Read a whole number from the config; a missing one, and None, stand for the default."""
        given = getattr(self.config, name, None)
        value = default if given is None else given
        if isinstance(value, int) and not isinstance(value, bool) and least <= value <= (most or value):
            return value
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}, the number of clients"
        raise ConfigError(f"the trainer's {name} must be a whole number {bounds}, not {value!r}")
