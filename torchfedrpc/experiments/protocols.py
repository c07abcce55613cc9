"""What a trainer, learner, dataset, model, partition and aggregator of an experiment look like.

Each kind is a protocol of the class or function that is registered or named by ``_target_``. Beside the arguments of
the protocol it is called with its settings, the other keys of its recipe. A run begins with a check of all of them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import nn

from torchfedrpc.experiments.data.samples import TrainTest
from torchfedrpc.federation.aggregation import Aggregator, StateDict

__all__ = ["Aggregator", "Dataset", "LearnerFactory", "Model", "Partition", "Trainer", "TrainsEpochs"]


class Trainer(Protocol):
    """Algorithm of an experiment: a subclass of `torchfedrpc.AbstractFederationTrainer`, or of a bundled trainer.

    Its class is called as ``cls(config, learner_proxy, **given)``. ``config`` has the settings. Of the keyword
    arguments ``initial_weights`` (a state dict), ``buffers`` (names of its entries that are no parameters), ``score``
    (a function from a state dict to test metrics by name) and ``aggregator`` it receives those that its constructor
    names. It loops over ``self.rounds()``, and publishes `torchfedrpc.RoundEnded` with the metrics of each round.
    """

    def train(self) -> Awaitable[StateDict]:
        """Run all rounds, as an ``async`` method, and return the final weights."""


class LearnerFactory(Protocol):
    """Class of the learners, or a function that makes one.

    It is called on the client's worker. Of the keyword arguments ``dataset`` and ``model`` (recipes, for
    `torchfedrpc.build`), ``indices`` (the client's samples to train on, [num_samples], int64, indices of the training
    set), ``held_out`` (those to score on, likewise; None without the setting ``held_out``) and ``seed`` it receives
    those that it names.
    """

    def __call__(self, client_id: str, /, **given_and_settings: Any) -> Any:
        """Return the learner of a client. The bundled trainers call its `TrainsEpochs` method."""


class TrainsEpochs(Protocol):
    """Learner for the bundled trainers."""

    def train_epoch(
        self, *, model_weights: StateDict, round_num: int, local_epochs: int, **of_the_trainer: Any
    ) -> Mapping[str, Any]:
        """Train from the global weights.

        Returns:
            ``model_weights`` (a state dict), ``num_samples`` (the weight in the mean) and ``train_loss``.
        """


class Dataset(Protocol):
    """Function or class that makes the data of an experiment, on the driver and on each worker."""

    def __call__(self, **settings: Any) -> TrainTest:
        """Return the same data in every process."""


class Model(Protocol):
    """Function or class that makes the model."""

    def __call__(self, **settings: Any) -> nn.Module:
        """Return a module from inputs [batch, ...] to logits [batch, num_classes]."""


class Partition(Protocol):
    """Function that divides the training set among the clients."""

    def __call__(
        self, *, labels: npt.NDArray[np.int64], num_clients: int, **settings: Any
    ) -> Sequence[npt.NDArray[np.int64]]:
        """Return the indices of each client's samples, [num_samples], in the order of the clients.

        A partition whose signature names ``groups`` receives the natural client of each sample ([num_samples],
        int64), or None for a dataset without.
        """
