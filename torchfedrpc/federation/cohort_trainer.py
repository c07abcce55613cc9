"""Base class of algorithms that train a cohort in each round: rounds, clients that drop out, aggregation."""

from __future__ import annotations

import asyncio
import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Protocol

from torch import Tensor

from torchfedrpc.errors import CallTimeoutError, ConfigError, GroupCallError
from torchfedrpc.events import RoundEnded
from torchfedrpc.federation.aggregation import Aggregator, Mean
from torchfedrpc.federation.cohorts import Cohort
from torchfedrpc.federation.part_state import PartState
from torchfedrpc.federation.results import (
    ClientResult,
    averages_of,
    check_alike,
    not_finite,
    parts_of,
    reducer_of,
    robust_parts_of,
    steering_names,
)
from torchfedrpc.federation.robust import is_robust
from torchfedrpc.federation.simulation import SimulatedClients, SimulatedRound
from torchfedrpc.federation.trainer import AbstractFederationTrainer
from torchfedrpc.federation.update_compression import UpdateCompression
from torchfedrpc.proxy import LearnerProxy
from torchfedrpc.reduce.reducers import Reducer

logger = logging.getLogger(__name__)

_STATISTICS = ("running_mean", "running_var")  # of normalisation layers


class RoundLog(Protocol):
    """Log of finished rounds, such as a list."""

    def append(self, ended: RoundEnded, /) -> object:
        """Append a finished round."""


class CohortTrainer(AbstractFederationTrainer):
    """Base class of trainers whose rounds train a cohort from the global weights, and step to its aggregate.

    `torchfedrpc.FedAvgTrainer` describes arguments and attributes.
    """

    not_state: ClassVar[frozenset[str]] = AbstractFederationTrainer.not_state | {
        "_aggregator_metrics",
        "_compression",
        "_score",
        "aggregator",
        "buffers",
        "cohort",
        "simulation",
    }  # aggregator, cohort and simulation have a `PartState`
    settings: ClassVar[Mapping[str, Any]] = {
        "local_steps": None,
        "weighting": "samples",
        "on_failure": "raise",
        "min_results": None,
        "deadline_s": None,
        "compression": None,
        "compression_ratio": 0.01,
    }
    averaged: ClassVar[tuple[str, ...]] = ("train_loss",)
    keeps_learner_state: ClassVar[bool] = False
    has_personal_models: ClassVar[bool] = False

    def __init__(
        self,
        config: Any,
        learner_proxy: LearnerProxy,
        *,
        initial_weights: Mapping[str, Tensor] | None = None,
        score: Callable[[Mapping[str, Tensor]], Mapping[str, float]] | None = None,
        history: RoundLog | None = None,
        buffers: Collection[str] = (),
        cohort: Cohort | None = None,
        simulation: SimulatedClients | None = None,
        aggregator: Aggregator | None = None,
    ) -> None:
        super().__init__(config, learner_proxy)
        self.aggregator: Aggregator = Mean() if aggregator is None else aggregator
        if not isinstance(self.aggregator, Mean) and self._overrides_aggregation():
            raise ConfigError(
                f"{type(self).__qualname__} aggregates by its own aggregate_weights, and would ignore the aggregator "
                f"{aggregator!r}: leave one of them out"
            )
        self.weights: Mapping[str, Tensor] | None = None if initial_weights is None else _copied(initial_weights)
        self.history: RoundLog = [] if history is None else history
        if cohort is not None and type(self).select_clients is not AbstractFederationTrainer.select_clients:
            raise ConfigError(
                f"{type(self).__qualname__} chooses clients by its own select_clients, and would ignore the cohort "
                f"{cohort!r}: leave one of them out"
            )
        self.buffers = frozenset(buffers)
        self.cohort = cohort
        self.simulation = simulation
        if isinstance(simulation, SimulatedClients):
            simulation.begin_run(learner_proxy.client_ids)
        self.simulated_seconds = 0.0
        self.averages: Mapping[str, Any] = {}
        self.num_results = 0
        self._aggregator_metrics: Mapping[str, float] = {}
        self._score = score
        if self.keeps_learner_state and learner_proxy.are_stateless:
            raise ConfigError(
                f"the learners of {type(self).__qualname__} keep state from round to round, and these are stateless: "
                f"leave stateless out of their class or factory"
            )
        for name, options in (("weighting", ("samples", "uniform")), ("on_failure", ("raise", "drop"))):
            if (value := self.setting(name)) not in options:
                raise ConfigError(f"the trainer's {name} is {' or '.join(options)}, not {value!r}")
        if self.setting("min_results") is not None:
            is_own = cohort is not None or type(self).select_clients is not AbstractFederationTrainer.select_clients
            most = len(learner_proxy.client_ids) if is_own else self._cohort_size
            self._count("min_results", default=1, least=1, most=most, of_most="the size of a cohort")
        if self.setting("deadline_s") is not None:
            self._number("deadline_s", is_above=True)
        if getattr(cohort, "draws_by_samples", False) and not self._is_uniform:
            logger.warning(
                "%s draws clients by their numbers of samples, and weighting=samples counts these once more: "
                "weighting=uniform is what its paper has",
                type(cohort).__qualname__,
            )
        self._compression = UpdateCompression(self, self.weights)
        if (begin_run := getattr(self.aggregator, "begin_run", None)) is not None:
            begin_run(self)
        self._aggregator_state = PartState(self, "aggregator")
        self._cohort_state = PartState(self, "cohort")
        self._simulation_state = PartState(self, "simulation")
        self._note_settings()

    async def train(self) -> Mapping[str, Tensor] | None:
        """Run all rounds.

        Returns:
            The final global weights, a state dict.
        """
        async for round_num in self.rounds():
            metrics = await self.train_round(round_num)
            ended = RoundEnded(round_num, self.num_rounds, metrics)
            self.history.append(ended)
            self.learner_proxy.publish(ended)
        return self.weights

    async def train_round(self, round_num: int) -> dict[str, float]:
        """Run one round and replace ``weights``. Without a client that takes part they stay as they are.

        Returns:
            ``train_loss`` (mean over the cohort's samples), ``num_clients``, and the metrics of ``score``; where
            clients may drop out also ``num_dropped``, with a simulation ``simulated_seconds`` since the run's
            beginning, and with ``compression`` the ``update_bytes`` and ``uncompressed_bytes`` of the results. An
            aggregator may add metrics.
        """
        self._note_settings()
        settings = self.local_settings()
        clients = await self.choose_clients(round_num)
        plan = self._plan(round_num, clients, settings.get("local_epochs", 1))
        failures: Mapping[str, Exception] = {}
        await self._begin_round(round_num)
        if len(plan.epochs) >= (self.setting("min_results") or 1):
            aggregate, failures = await self._train_cohort(round_num, plan.epochs, settings)
            self.weights = self._stepped(aggregate)
        else:
            least = self.setting("min_results") or "no"
            logger.warning(
                "round %d has no results: %d clients take part in it%s",
                round_num + 1,
                len(plan.epochs),
                f", and min_results is {least}" if plan.epochs else "",
            )
        for client_id, error in failures.items():
            logger.warning(
                "%s is left out of round %d: %s: %s", client_id, round_num + 1, type(error).__name__, error
            )
        if plan.dropped:
            logger.info("round %d: %s dropped out, or were late", round_num + 1, _shown(plan.dropped))
        self.simulated_seconds += plan.seconds
        return self._metrics(num_dropped=len(clients) - self.num_results)

    async def choose_clients(self, round_num: int) -> Sequence[str]:
        """Return the clients of a round: those of ``cohort``, or of `select_clients`.

        Raises:
            ConfigError: If it has a client twice, or one that the proxy does not have.
        """
        clients = self.learner_proxy.client_ids
        if self.cohort is None:
            owner, chosen = f"{type(self).__qualname__}.select_clients()", self.select_clients(round_num)
        else:
            owner, chosen = repr(self.cohort), list(await self.cohort(self, round_num, clients, self._cohort_size))
        if len(set(chosen)) < len(chosen) or set(chosen) - set(clients):
            raise ConfigError(f"{owner} must choose different clients of the proxy, not {chosen!s:.200}")
        return chosen

    def _plan(self, round_num: int, clients: Sequence[str], num_epochs: int) -> SimulatedRound:
        if self.simulation is None:
            return SimulatedRound(dict.fromkeys(clients, num_epochs), [], 0.0)
        return self.simulation.plan(clients, round_num, num_epochs)

    async def _train_cohort(
        self, round_num: int, epochs: Mapping[str, int], settings: Mapping[str, Any]
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Exception]]:
        """Return the aggregate, and the exceptions of clients that were dropped."""
        arguments = {"model_weights": self.weights, "round_num": round_num, **settings}
        usual = settings.get("local_epochs", 1)
        calls = {client: {} if number == usual else {"local_epochs": number} for client, number in epochs.items()}
        cohort = self.learner_proxy.clients(calls).options(**self._call_options())
        if (reducer := self._reducer(len(calls))) is not None:
            reduced = await cohort.reduce("train_epoch", reducer, **arguments)
            self._check_failures(reduced.failures)
            self.num_results = reduced.count
            aggregate, self.averages = parts_of(reduced.value, self.aggregator)
            return aggregate, reduced.failures
        updates = await cohort.train_epoch(**arguments)
        self._check_failures(updates.failures)
        if not updates:
            raise GroupCallError(f"train_epoch failed for all of {', '.join(updates.failures)}", updates.failures, {})
        decode = self._compression.decoded
        decoded = [(client, await decode(client, update, self.weights)) for client, update in updates.items()]
        return await self._aggregated(decoded), updates.failures

    async def _begin_round(self, round_num: int) -> None:
        """Forget the last round, and give the aggregator the global weights."""
        self.averages, self.num_results, self._aggregator_metrics = {}, 0, {}
        self._compression.begin_round()
        self._note_settings()
        if (begin_round := getattr(self.aggregator, "begin_round", None)) is not None:
            weights = None if self.weights is None else _copied(self.weights)
            self._aggregator_metrics = await asyncio.to_thread(begin_round, weights, round_num) or {}

    def _note_settings(self) -> None:
        """Note the settings of the objects that the trainer was given, before these change in a round."""
        for part in (self._aggregator_state, self._cohort_state, self._simulation_state):
            part.note_settings()

    def _metrics(self, *, num_dropped: int) -> dict[str, float]:
        """Return the metrics of a round that has ended."""
        metrics = {"train_loss": self.averages.get("train_loss", math.nan), "num_clients": self.num_results}
        if self.simulation is not None or self._call_options():
            metrics["num_dropped"] = num_dropped
        if self.simulation is not None:
            metrics["simulated_seconds"] = self.simulated_seconds
        scores = self._score(self.weights) if self._score and self.weights is not None else {}
        return {**metrics, **self._aggregator_metrics, **self._compression.metrics(), **scores}

    def _call_options(self) -> dict[str, Any]:
        """Return the options of a cohort's calls; empty if all clients must give a result."""
        given = {"min_results": "min_results", "deadline_s": "timeout_s"}
        options = {option: value for name, option in given.items() if (value := self.setting(name)) is not None}
        if self.setting("on_failure") == "drop" or "timeout_s" in options:
            options["on_error"] = "collect"
        return options

    def _check_failures(self, failures: Mapping[str, Exception]) -> None:
        """Check that clients were late, and have not failed, unless they may.

        Raises:
            GroupCallError: If one has failed.
        """
        failed = {client: error for client, error in failures.items() if not isinstance(error, CallTimeoutError)}
        if failed and self.setting("on_failure") == "raise":
            error = next(iter(failed.values()))
            raise GroupCallError(
                f"train_epoch failed for {', '.join(failed)}, first with {type(error).__name__}: {error}; the "
                f"trainer's on_failure=drop leaves such clients out",
                failed,
                {},
            )

    def _stepped(self, aggregate: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the new global weights.

        Raises:
            ConfigError: If `step` returns no state dict, or one with other names, or the clients' models have other
                names than ``weights``.
            FloatingPointError: If they are not finite.
        """
        if self.weights is not None and self.weights.keys() != aggregate.keys():
            odd_name = min(self.weights.keys() ^ aggregate.keys())
            owner = "the global weights" if odd_name in self.weights else "the clients' models"
            raise ConfigError(
                f"only {owner} have {odd_name!r}: the model_weights that learners return must have the names of "
                f"those that they receive"
            )
        weights = self.step(aggregate)
        if (odd := _odd_names(weights, aggregate)) is not None:
            raise ConfigError(
                f"{type(self).__qualname__}.step() returned {odd:.200}: it must return the new global weights, a "
                f"state dict with the names of its argument, {list(aggregate)!s:.200}"
            )
        odd_values = [name for name, value in weights.items() if not value.isfinite().all()]
        if odd_values:
            raise FloatingPointError(
                f"{odd_values[0]} of the new global weights is not finite: a client has diverged, or the aggregate; "
                f"lower the learning rates, or take a robust aggregator such as tfr.CoordinateMedian, which names it"
            )
        return weights

    @abstractmethod
    def step(self, aggregate: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the new global weights, from the aggregate of the clients' models and ``weights``."""

    def parameter_names(self) -> list[str]:
        """Return the names of the entries of ``weights`` that are parameters: floats outside ``buffers``.

        Raises:
            ConfigError: If there are no weights yet, running statistics among them that ``buffers`` lacks, or complex
                parameters.
        """
        name = type(self).__qualname__
        if self.weights is None:
            raise ConfigError(f"{name} starts from the global weights: give it initial_weights=")
        odd = [key for key in self.weights if key.endswith(_STATISTICS) and key not in self.buffers]
        if odd:
            raise ConfigError(
                f"{name} would step running statistics like parameters: name all buffers of the model, such as "
                f"{odd[0]}, in buffers=[name for name, _ in model.named_buffers()]"
            )
        names = [key for key in self.weights if key not in self.buffers]
        if odd := [key for key in names if self.weights[key].is_complex()]:
            raise ConfigError(f"{name} cannot step {odd[0]}, which is complex: keep its parts as two real parameters")
        return [key for key in names if self.weights[key].is_floating_point()]

    def personal_names(self) -> frozenset[str]:
        """Return the names of entries that stay with the clients, so that learners return them as received."""
        return frozenset()

    def moved(self, aggregate: Mapping[str, Tensor], rate: float) -> Mapping[str, Tensor]:
        """Return ``weights + rate * (aggregate - weights)``; entries that are no parameters as in the aggregate."""
        names = self.parameter_names()
        assert self.weights is not None
        return {**aggregate, **{key: self.weights[key].lerp(aggregate[key], rate) for key in names}}

    async def aggregate_weights(
        self, weights_list: Sequence[Mapping[str, Tensor]], num_samples: Sequence[float] | None = None
    ) -> dict[str, Tensor]:
        """Return the aggregate of models, a state dict, by ``aggregator``. Its exceptions are propagated.

        Args:
            weights_list: A state dict per client, all with the same names and shapes.
            num_samples: Number of samples of each client. Default: 1.

        Raises:
            ConfigError: If the aggregator returns no state dict, or one with other names.
        """
        counts = [1.0] * len(weights_list) if num_samples is None else num_samples
        aggregate = await asyncio.to_thread(self.aggregator, weights_list, counts)
        if (odd := _odd_names(aggregate, weights_list[0])) is not None:
            raise ConfigError(
                f"the aggregator {self.aggregator!r} returned {odd:.200}: it must return a state dict with the names "
                f"of the models, {list(weights_list[0])!s:.200}"
            )
        return _copied(aggregate)  # which the aggregator may keep

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state_dict` returned; a list that was given as ``history`` is filled."""
        given = self.history
        try:
            super().load_state_dict(state)
        finally:
            if isinstance(given, list) and isinstance(self.history, list):
                given[:] = self.history
                self.history = given

    def _reducer(self, num_clients: int) -> Reducer | None:
        """Return what forms the aggregate of some clients on the workers; None if the driver needs all updates."""
        if num_clients == 1 or self._compression.codec is not None or self._overrides_aggregation():
            return None
        return reducer_of(self.aggregator, self.averaged, is_uniform=self._is_uniform)

    async def _aggregated(self, results: Sequence[ClientResult]) -> Mapping[str, Tensor]:
        """Set ``averages`` and return the aggregate, from clients and their results.

        Raises:
            ValueError: If the models of two clients differ in names, shapes or kinds of dtype.
        """
        check_alike(results, self.weights)
        results = await self._finite(results)
        updates = [update for _, update in results]
        self.num_results = len(updates)
        of_plain = partial(averages_of, updates, is_uniform=self._is_uniform)
        if is_robust(self.aggregator):
            steering = steering_names(updates[0], self.averaged)
            aggregate, robust = await asyncio.to_thread(robust_parts_of, updates, steering, self.aggregator)
            self.averages = {**of_plain([name for name in self.averaged if name not in steering]), **robust}
            return aggregate
        self.averages = await asyncio.to_thread(of_plain, self.averaged)
        if len(updates) == 1 and self._is_plain_mean:
            return dict(updates[0]["model_weights"])  # the mean of one has its bits
        counts = [1 if self._is_uniform else update["num_samples"] for update in updates]
        return await self.aggregate_weights([update["model_weights"] for update in updates], counts)

    async def _finite(self, results: Sequence[ClientResult]) -> Sequence[ClientResult]:
        """Return the results whose models are finite; with a warning also the others, for another aggregator.

        Raises:
            FloatingPointError: If one is not finite, and may not be left out of a mean.
        """
        odd = await asyncio.to_thread(not_finite, results)
        if not odd:
            return results
        is_dropping = self.setting("on_failure") == "drop" and len(odd) < len(results)
        if self._is_plain_mean and not is_dropping:
            client, entry = next(iter(odd.items()))
            raise FloatingPointError(
                f"{entry} of the model of {client} is not finite: the client has diverged; lower the learning rates, "
                f"set the trainer's on_failure to drop, or take a robust aggregator such as tfr.CoordinateMedian"
            )
        does = "is left out" if is_dropping else "counts as far off"
        for client_id, entry in odd.items():
            logger.warning("%s of the model of %s is not finite, and %s", entry, client_id, does)
        return [result for result in results if result[0] not in odd] if is_dropping else results

    @property
    def _is_uniform(self) -> bool:
        return bool(self.setting("weighting") == "uniform")

    @property
    def _is_plain_mean(self) -> bool:
        kind: type = type(self.aggregator)
        return kind is Mean and not self._overrides_aggregation()

    @classmethod
    def _overrides_aggregation(cls) -> bool:
        return cls.aggregate_weights is not CohortTrainer.aggregate_weights

    def local_settings(self) -> dict[str, Any]:
        """Return the keyword arguments of ``train_epoch`` beside weights and round, the same for every client."""
        amount = {"local_epochs": self._count("local_epochs", default=1, least=1)}
        if self.setting("local_steps") is not None:
            if self.simulation is not None:
                raise ConfigError(
                    "simulated clients count epochs: set local_epochs, and the trainer's local_steps to null"
                )
            amount = {"local_steps": self._count("local_steps", default=1, least=1)}
        return {**amount, **self._compression.arguments()}


def _shown(clients: Sequence[str]) -> str:
    """Return the first clients, and the number of the others."""
    return ", ".join(clients[:5]) + (f" and {len(clients) - 5} more" if len(clients) > 5 else "")


def _copied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in weights.items()}


def _odd_names(returned: Any, expected: Mapping[str, Any]) -> str | None:
    """Return, as a text, what was returned in place of a state dict with the expected names; None for such a one."""
    if isinstance(returned, Mapping):
        return None if returned.keys() == expected.keys() else str(list(returned))
    return f"a {type(returned).__name__}"
