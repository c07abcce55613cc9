"""Federated averaging."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from torchfedrpc.federation.cohort_trainer import CohortTrainer
from torchfedrpc.registry import trainer


@trainer("fedavg")
class FedAvgTrainer(CohortTrainer):
    """Federated averaging: each round trains a cohort from the global weights and averages (McMahan et al. 2017).

    Updates are averaged on the workers. Another aggregator than the mean, and a subclass that overrides
    `aggregate_weights`, receive all updates on the driver.

    Each round: ``w = sum(n_k * w_k) / sum(n_k)`` over the clients ``k`` of the cohort, with ``w_k`` trained from
    ``w`` on ``n_k`` samples.

    Args:
        config: ``num_rounds``, ``local_epochs`` (default: 1) or ``local_steps``, ``clients_per_round``, ``seed``, and
            ``weighting``: models count by the clients' ``samples`` (default), or all the same (``uniform``). With
            ``compression`` (``bf16``, ``int8`` or ``top_k``) learners return updates that
            `torchfedrpc.federation.compression` makes, ``top_k`` with the fraction ``compression_ratio`` of the
            values; it needs ``initial_weights``. ``on_failure`` (``raise`` or ``drop``), ``min_results`` and
            ``deadline_s`` say when a round goes on without some clients.
        learner_proxy: Learners with the `train_epoch` that `Learner` describes.
        initial_weights: Initial global weights, a state dict. Default: Each learner starts with its initial weights.
        score: Returns metrics by name for global weights; called at the end of each round.
        history: Receives the end of each round, with its metrics. Default: A new list.
        buffers: Names of entries of the weights that are no parameters, such as running statistics. Algorithms that
            step or extrapolate parameters take these from the aggregate.
        cohort: Chooses the clients of a round. Default: `select_clients`.
        simulation: Simulated speeds and dropouts of clients.
        aggregator: Makes the new global model of the models of a cohort. Its attributes, or what its ``state_dict()``
            returns, are part of the trainer's state. Default: The models' weighted mean.

    Attributes:
        weights: The global weights, a state dict; None before the first round without ``initial_weights``.
        history: The log of rounds.
        aggregator: The aggregator.
        averaged: Names of further entries of the learners' results that are averaged like the models.
        keeps_learner_state: Whether the algorithm needs state of the learners, so that stateless ones are refused.
        has_personal_models: Whether the models to judge are those of the clients, not the global one.
        averages: Their means in the last round, by name.
        num_results: Number of clients in the last aggregate.
        simulated_seconds: Virtual time of all rounds so far.

    Raises:
        ConfigError: If a setting is invalid; if an aggregator is given to a subclass that overrides
            `aggregate_weights`.
    """

    def step(self, aggregate: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the new global weights, from the aggregate of the clients' models and ``weights``.

        Here they are the aggregate. Subclasses may treat ``weights - aggregate`` as the gradient of an optimiser on
        the server, as FedOpt does (Reddi et al. 2021).
        """
        return aggregate
