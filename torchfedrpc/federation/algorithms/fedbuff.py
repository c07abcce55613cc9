"""FedBuff: asynchronous clients, and a buffer on the server."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Mapping
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from torchfedrpc.errors import ConfigError, GroupCallError
from torchfedrpc.federation.algorithms.fedavg import FedAvgTrainer
from torchfedrpc.federation.results import check_alike
from torchfedrpc.registry import trainer

logger = logging.getLogger(__name__)

_STREAM = 0xB0FF  # separates the draws of clients from others with the same seed


@trainer("fedbuff")
class FedBuffTrainer(FedAvgTrainer):
    """Asynchronous FedAvg: ``num_in_flight`` clients train at a time, each from the weights of its beginning (Nguyen
    2022).

    A round adds ``buffer_size`` changes, weighted by their staleness ``s`` (the number of rounds since their
    beginning): ``w = w + server_learning_rate / buffer_size * sum((w_i - w_begin) / sqrt(1 + s_i))``. With a
    simulation results come in the order of its virtual clock, and are the same each time; without one as they come.
    Clients are drawn uniformly from those that are not in flight. Defaults: a buffer of 10, as in section 5 of the
    paper, and 20 in flight, or all clients if there are fewer.

    Attributes:
        pool: The calls in flight.
    """

    settings: ClassVar[Mapping[str, Any]] = {
        "weighting": "uniform",
        "buffer_size": 10,
        "num_in_flight": None,
        "server_learning_rate": 1.0,
    }
    not_state: ClassVar[frozenset[str]] = FedAvgTrainer.not_state | {"_buffer_size", "_round_num"}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parameter_names()  # refuses weights that cannot be stepped
        if self.cohort is not None:
            raise ConfigError(
                "FedBuff draws a client whenever one is free, and would ignore the cohort: leave it out"
            )
        for name in ("clients_per_round", "min_results", "deadline_s"):
            if self.setting(name) is not None:
                raise ConfigError(
                    f"FedBuff has no cohorts, and would ignore the trainer's {name}: leave it out; num_in_flight and "
                    f"buffer_size say how many clients train"
                )
        if self.simulation is not None and (self.simulation.dropout or self.simulation.deadline_s is not None):
            raise ConfigError(
                "FedBuff waits for each client, however slow: set simulation.dropout=0 and simulation.deadline_s=null"
            )
        num_clients = len(self.learner_proxy.client_ids)
        self._buffer_size = self._count("buffer_size", default=10, least=1)
        self._round_num = 0
        self._num_drawn = 0
        self._begun: dict[str, tuple[int, Mapping[str, Tensor]]] = {}  # client in flight -> round and weights then
        in_flight = self._count("num_in_flight", default=min(20, num_clients), least=1, most=num_clients)
        clock = None if self.simulation is None else self._seconds
        self.pool = self.learner_proxy.pool(self._next_client, in_flight, clock=clock, on_error="collect")

    async def train(self) -> Mapping[str, Tensor] | None:
        """Run all rounds.

        Returns:
            The final global weights, a state dict.
        """
        if self.simulation is None:
            logger.warning(
                "FedBuff takes results as they come, so a run is not reproducible: give it simulated clients "
                "(simulation=clients) for one that is"
            )
        try:
            weights = await super().train()
            await self.pool.settle()  # so that learners' states depend on no clock
        finally:
            await self.pool.close()
        self._begun.clear()
        return weights

    async def train_round(self, round_num: int) -> dict[str, float]:
        """Fill the buffer once, and replace ``weights``.

        Returns:
            FedAvg's metrics, and ``staleness``: the mean of the changes' staleness.
        """
        self._round_num = round_num
        updates: list[tuple[str, dict[str, Any]]] = []
        staleness: list[int] = []
        num_dropped, num_in_a_row = 0, 0
        await self._begin_round(round_num)
        while len(updates) < self._buffer_size:
            client_id, result = await anext(self.pool)
            begun, weights = self._begun.pop(client_id)
            if isinstance(result, Exception):
                num_dropped, num_in_a_row = num_dropped + 1, num_in_a_row + 1
                self._check_failure(client_id, result, num_in_a_row)
                continue
            num_in_a_row = 0
            result = await self._compression.decoded(client_id, result, weights)
            staleness.append(round_num - begun)
            check_alike([(client_id, result)], self.weights)
            model = self._applied(result["model_weights"], weights, staleness[-1])
            updates.append((client_id, {**result, "model_weights": model}))
        aggregate = await self._aggregated(updates)
        self.weights = self._stepped(aggregate)
        self.simulated_seconds = self.pool.now_s
        return {
            **self._metrics(num_dropped=num_dropped + len(updates) - self.num_results),
            "staleness": sum(staleness) / len(staleness),
        }

    def step(self, aggregate: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the new global weights."""
        return self.moved(aggregate, self._number("server_learning_rate", is_above=True))

    def _applied(
        self, model: Mapping[str, Tensor], begun: Mapping[str, Tensor], staleness: int
    ) -> Mapping[str, Tensor]:
        """Return the present weights with a client's change, weighted by its staleness."""
        assert self.weights is not None
        factor = (1 + staleness) ** -0.5
        changed = {name: self.weights[name] + factor * (model[name] - begun[name]) for name in self.parameter_names()}
        return {**model, **changed}

    def _check_failure(self, client_id: str, error: Exception, num_in_a_row: int) -> None:
        """Warn of a client that is left out.

        Raises:
            GroupCallError: If none may be, or as many have failed in a row as there are clients.
        """
        text = f"train_epoch failed for {client_id} with {type(error).__name__}: {error}"
        if self.setting("on_failure") == "raise":
            hint = "the trainer's on_failure=drop leaves such clients out"
            raise GroupCallError(f"{text}; {hint}", {client_id: error}, {}) from error
        if num_in_a_row >= len(self.learner_proxy.client_ids):
            raise GroupCallError(f"{text}, the last of {num_in_a_row} in a row", {client_id: error}, {}) from error
        logger.warning("%s is left out: %s: %s", client_id, type(error).__name__, error)

    def _next_client(self) -> tuple[str, Awaitable[Any]] | None:
        free = [client_id for client_id in self.learner_proxy.client_ids if client_id not in self._begun]
        generator = np.random.default_rng([_STREAM, self._seed, self._num_drawn])
        self._num_drawn += 1
        client_id = free[int(generator.integers(len(free)))]
        assert self.weights is not None
        self._begun[client_id] = self._round_num, self.weights
        settings = {"model_weights": self.weights, "round_num": self._round_num, **self.local_settings()}
        return client_id, self.learner_proxy.client(client_id).train_epoch(**settings)

    def _seconds(self, client_id: str, number: int) -> float:
        assert self.simulation is not None
        return self.simulation.seconds(client_id, number, self.local_settings()["local_epochs"])
