"""The base of every trainer: its settings, its cohorts, its rounds."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from torchfedrpc.errors import ConfigError, SerializationError
from torchfedrpc.events import RoundStarted
from torchfedrpc.federation.aggregation import weighted_mean
from torchfedrpc.federation.checkpoints import Checkpoints
from torchfedrpc.federation.sampling import sample_clients
from torchfedrpc.federation.saver import Saver
from torchfedrpc.federation.settings import as_settings
from torchfedrpc.federation.trainer_state import give_state, has_state_dict, state_of
from torchfedrpc.proxy import LearnerProxy
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.packing import pack

logger = logging.getLogger(__name__)


class AbstractFederationTrainer(ABC):
    """A federated algorithm: it decides who trains when, on which weights, and what becomes of the results.

    Subclasses write `train`. The same trainer runs in every execution mode. One that loops over `rounds`, and keeps
    in attributes of its own what later rounds depend on, can be saved and resumed: see `Checkpoints`.

    Args:
        config: a mapping or an object. The base reads ``num_rounds`` (for `rounds`), ``clients_per_round``
            (default: all) and ``seed`` (default: 0) of it; everything else is the subclass's own.
        learner_proxy: an open proxy, through which learners are called.

    Attributes:
        config: the settings; keys of a mapping, and of mappings within, are attributes too.
        learner_proxy: as given.
        checkpoints: where the run is saved; None, unless it is set before `train`.
        not_state: names of attributes that are no part of the trainer's state; a subclass may have more.

    Raises:
        ConfigError: one of the settings above cannot be met.
    """

    not_state: ClassVar[frozenset[str]] = frozenset(
        {"config", "learner_proxy", "checkpoints", "_not_saved", "_seed", "_cohort_size"}
    )

    def __init__(self, config: Any, learner_proxy: LearnerProxy) -> None:
        self.checkpoints: Checkpoints | None = None
        self._not_saved: set[str] = set()  # attributes that were warned of
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

        With ``checkpoints`` the run is saved between two rounds, and goes on from a checkpoint: trainer and learners
        get their state back before the first round that is left. What `train` has done before its loop is then done
        again, so the loop must depend on attributes of the trainer and on learners alone, not on local variables.

        Raises:
            ConfigError: the config has no usable ``num_rounds``, or the checkpoint does not fit this run.
            SnapshotError: the checkpoint cannot be read.
        """
        num_rounds = self.num_rounds
        saver = await Saver.begin(self.checkpoints, self) if self.checkpoints is not None else None
        for round_num in range(saver.num_done if saver is not None else 0, num_rounds):
            self.learner_proxy.publish(RoundStarted(round_num, num_rounds))
            yield round_num
            if saver is not None:
                await saver.round_done(round_num + 1)
        if saver is not None:
            await saver.close()

    def state_dict(self) -> dict[str, Any]:
        """What later rounds depend on, for a checkpoint; a subclass may say it better.

        It has every attribute but those in ``not_state``: the ``state_dict()`` of those that have one which can be
        loaded (a module, an optimiser), else the value itself. Parts of such a module stay its parts, also as other
        attributes and in dicts and lists of the trainer. One that cannot be saved is warned of once.

        Raises:
            SnapshotError: a value would not come back equal, or untied from another.
        """
        saved = {
            name: value
            for name, value in vars(self).items()
            if name not in self.not_state and (has_state_dict(value) or self._is_data(name, value))
        }
        return state_of(saved, AllowList(self.trusted_modules), self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        give_state(self, state)

    @property
    def trusted_modules(self) -> list[str]:
        """Packages whose classes may be part of its state: its own, the learner's and ``runtime.trusted_modules``."""
        return [type(self).__module__, *self.learner_proxy.trusted_modules]

    def _is_data(self, name: str, value: Any) -> bool:
        try:
            pack(value, copy=False).open(AllowList(self.trusted_modules))
        except SerializationError as error:
            if name not in self._not_saved:
                self._not_saved.add(name)
                logger.warning(
                    "%s.%s is no part of checkpoints: %s; name it in not_state if a run need not have it to go on, "
                    "else define state_dict() and load_state_dict()",
                    type(self).__qualname__,
                    name,
                    error,
                )
            return False
        return True

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
