"""Experiment: data, learners and a trainer built from a configuration, and run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments import extras
from torchfedrpc.experiments.baseline import BASELINE_FILE, train_centrally, write_baseline
from torchfedrpc.experiments.clients import CLIENTS_FILE, ClientLog
from torchfedrpc.experiments.data.cache import load_dataset
from torchfedrpc.experiments.data.held_out import split_held_out
from torchfedrpc.experiments.data.samples import Samples, TrainTest
from torchfedrpc.experiments.experiment_config import ExperimentConfig, Recipe
from torchfedrpc.experiments.history import HISTORY_FILE, Cost, History
from torchfedrpc.experiments.learners.classification import ClassificationLearner
from torchfedrpc.experiments.progress import live_progress
from torchfedrpc.experiments.protocol_checks import (
    check_aggregator,
    check_dataset,
    check_evaluates,
    check_final_weights,
    check_held_out,
    check_initial_weights,
    check_methods,
    check_model,
    check_partition,
    check_signature,
    check_taken,
    check_trainer,
    given,
    settings_of,
    shared_samples,
    title,
    unheld_classes,
)
from torchfedrpc.experiments.recipe import build, check_trusted, locate
from torchfedrpc.experiments.report.page import Report
from torchfedrpc.experiments.round_table import print_table
from torchfedrpc.experiments.trace import Trace
from torchfedrpc.experiments.training import Score, build_model, copy_weights, score
from torchfedrpc.federation.aggregation import Aggregator
from torchfedrpc.federation.callbacks import Callback
from torchfedrpc.federation.checkpoints import Checkpoints
from torchfedrpc.federation.client_evaluation import ClientEvaluation
from torchfedrpc.federation.cohorts import Cohort, UniformCohort
from torchfedrpc.federation.early_stopping import EarlyStopping
from torchfedrpc.federation.simulation import SimulatedClients
from torchfedrpc.host.process import process_settings
from torchfedrpc.private_files import make_private, replaced
from torchfedrpc.proxy import LearnerProxy


async def run_experiment(
    config: ExperimentConfig,
    output_dir: Path,
    *,
    checkpoints: Checkpoints | None = None,
    callbacks: Sequence[Callback] = (),
    stream: TextIO | None = None,
) -> float:
    """Run an experiment from its first round, or from a checkpoint.

    It writes ``history.jsonl`` (one line per round), ``clients.jsonl``, ``baseline.jsonl``, ``model.pt`` (the final
    weights), if matplotlib is installed ``metrics.png`` and ``partition.png``, with ``trace`` also ``trace.json``,
    and with ``report`` ``report.html``.

    Args:
        config: The experiment.
        output_dir: Folder for these files; created with access for its user only if it does not exist.
        checkpoints: The result of ``config.checkpoints(output_dir)``, if it is open already.
        callbacks: Callbacks that are called before those of the configuration.
        stream: Stream for progress and the final table. Default: stdout.

    Returns:
        The final test accuracy, 0 to 1.

    Raises:
        ConfigError: If a setting is invalid.
    """
    if checkpoints is None:
        with config.checkpoints(output_dir) as opened:
            return await run_experiment(config, output_dir, checkpoints=opened, callbacks=callbacks, stream=stream)
    make_private(output_dir)
    stream = stream or sys.stdout
    if note := extras.missing_line(_features(config)):
        print(note, file=stream)
    parts = _Parts.of(config, output_dir, callbacks)
    async with AsyncExitStack() as run:
        weights = await _train(config, parts, checkpoints, output_dir, stream, run)
        with replaced(output_dir / "model.pt") as file:
            torch.save(weights, file)
        with process_settings(config.runtime):
            baseline = _train_baseline(config, parts)
            accuracy = _metrics(parts.model, parts.data.test, weights)["test_accuracy"]
        write_baseline(output_dir / BASELINE_FILE, baseline)
        _draw(parts, baseline, output_dir)
    print_table(parts.history.records, stream)
    for line in _targets(parts):
        print(line, file=stream)
    if baseline:
        print(f"centralised baseline: test accuracy {baseline[-1].accuracy:.3f}", file=stream)
    print(f"final test accuracy: {accuracy:.3f}", file=stream, flush=True)
    return accuracy


def _targets(parts: _Parts) -> Iterator[str]:
    """Yield a line about each target of the callbacks: what it has cost, or that it was not reached."""
    for callback in parts.callbacks:
        if not isinstance(callback, EarlyStopping) or callback.target is None:
            continue
        target = f"{callback.metric} of {callback.target:g}"
        if (num_rounds := callback.num_rounds_to_target) is None:
            yield f"the target {target} was not reached"
        else:
            yield f"to the target {target}: {Cost.of(parts.history.records[:num_rounds])}"


def _features(config: ExperimentConfig) -> list[tuple[str, str]]:
    """Return what optional packages bring to a run: name and module of each."""
    features = [("live bar", "rich"), ("picture", "matplotlib")]
    return [*features, ("charts in the report", "vl_convert")] if config.report else features


@dataclass(frozen=True)
class _Parts:
    """What an experiment is made of, on the driver.

    Attributes:
        data: The data.
        model: The model, with the initial weights.
        indices: Client id -> indices of its samples to train on, in the training set.
        held_out: Client id -> indices of its held-out samples there; None without.
        cohort: What chooses the clients of a round; None for the trainer's own.
        simulation: Simulated clients; None for none.
        aggregator: The aggregator; None for the trainer's own.
        history: The log of rounds.
        callbacks: All callbacks, in the order of their calls: the evaluation comes first, for its metrics, and
            loggers last, since they keep the report.
    """

    data: TrainTest
    model: nn.Module
    indices: dict[str, npt.NDArray[np.int64]]
    held_out: dict[str, npt.NDArray[np.int64]] | None
    cohort: Cohort | None
    simulation: SimulatedClients | None
    aggregator: Aggregator | None
    history: History
    callbacks: list[Callback]

    @classmethod
    def of(cls, config: ExperimentConfig, output_dir: Path, callbacks: Sequence[Callback]) -> _Parts:
        """Make and check the parts; what takes long comes last.

        Raises:
            ConfigError: If one cannot be made, or the package of a logger is not installed.
        """
        history = History(output_dir / HISTORY_FILE)
        trace = [Trace(max_calls=config.trace_calls)] if config.trace else []
        report = [Report()] if config.report else []
        evaluation = [] if config.evaluate_every is None else [ClientEvaluation(config.evaluate_every)]
        followers = [*callbacks, *trace, *_made(config, "callbacks"), *report, *_made(config, "logger")]
        called = [*evaluation, history, *followers]
        check_trainer(config.trainer)
        check_signature("learner", config.learner)
        if config.held_out:
            check_held_out(config.learner)
        if evaluation:
            check_evaluates(config.learner)
        for kind, recipe in (("dataset", config.dataset), ("model", config.model)):
            check_trusted(recipe, config.trusted_modules)
            check_signature(kind, recipe)
        aggregator, simulation = _aggregator(config), _simulation(config)
        data: TrainTest = load_dataset(config.dataset, config.trusted_modules)
        check_dataset(config.dataset, data)
        indices, held_out = _divide(config, data.train), None
        if config.held_out:
            indices, held_out = split_held_out(indices, config.held_out, config.seed)
        cohort = _cohort(config, {client_id: len(share) for client_id, share in indices.items()})
        model = build_model(config.model, config.seed, config.trusted_modules)
        check_model(config.model, config.dataset, model, data)
        return cls(data, model, indices, held_out, cohort, simulation, aggregator, history, called)


async def _train(
    config: ExperimentConfig,
    parts: _Parts,
    checkpoints: Checkpoints,
    output_dir: Path,
    stream: TextIO,
    run: AsyncExitStack,
) -> dict[str, Tensor]:
    """Run the trainer, and return the final weights. The run ends with the stack ``run``."""
    labels = parts.data.train.labels.numpy()
    shares = [*parts.indices.values()]
    for note in (shared_samples(shares), unheld_classes(shares, labels, parts.data.test.labels.numpy())):
        if note is not None:
            print(note, file=stream)
    if getattr(locate(config.trainer), "has_personal_models", False) and config.evaluate_every is None:
        print("test accuracies are of the global model; evaluate_every=1 adds those of the clients' own", file=stream)
    clients = _arguments(config, parts.indices, parts.held_out)
    client_log = ClientLog(output_dir / CLIENTS_FILE, parts.indices, labels, parts.held_out)
    async with LearnerProxy(_learner(config.learner), clients, runtime=config.runtime, seed=config.seed) as proxy:
        found = checkpoints.open()
        going_on = f", going on after round {found.round_num}" if found is not None else ""
        print(f"{len(clients)} clients, {proxy.mode} mode{going_on}", file=stream, flush=True)
        make = locate(config.trainer)
        arguments = {
            "initial_weights": copy_weights(parts.model),
            "buffers": [name for name, _ in parts.model.named_buffers()],
            "score": partial(_metrics, parts.model, parts.data.test),
            "cohort": parts.cohort,
            "simulation": parts.simulation,
            "aggregator": parts.aggregator,
        }
        trainer = make(settings_of(config.trainer), proxy, **given("trainer", make, arguments))
        check_methods(config.learner, trainer)
        check_initial_weights(config.trainer, trainer)
        trainer.checkpoints, trainer.callbacks, trainer.output_dir = checkpoints, parts.callbacks, output_dir
        await run.enter_async_context(trainer.running(config.as_mapping()))
        with live_progress(stream, proxy.stats) as show:
            proxy.subscribe(show)
            weights = await trainer.train()
        check_final_weights(config.trainer, weights, parts.model)
        if config.client_scores and hasattr(locate(config.learner), "evaluate"):
            failure = await client_log.score(proxy, weights)
            if failure is not None:
                print(failure, file=stream)
    return dict(weights)


def _aggregator(config: ExperimentConfig) -> Aggregator | None:
    """Return the aggregator: an instance of its class, or its function with its settings."""
    if config.aggregator is None:
        return None
    check_aggregator(config.aggregator, config.trainer)
    make, settings = locate(config.aggregator), settings_of(config.aggregator)
    made: Aggregator = make(**settings) if isinstance(make, type) else partial(make, **settings)
    return made


def _cohort(config: ExperimentConfig, num_samples: Mapping[str, int]) -> Cohort | None:
    """Return what chooses the clients of a round; None for the trainer's own, which is uniform."""
    if config.cohort is None or (make := locate(config.cohort)) is UniformCohort:
        return None
    check_signature("cohort", config.cohort)
    check_taken("cohort", title("cohort", config.cohort), config.trainer)
    settings = settings_of(config.cohort)
    if not isinstance(make, type):
        return partial(make, **settings)
    made: Cohort = make(**given("cohort", make, {"num_samples": num_samples}), **settings)
    return made


def _simulation(config: ExperimentConfig) -> SimulatedClients | None:
    if config.simulation is None:
        return None
    check_taken("simulation", "the simulated clients", config.trainer)
    made: SimulatedClients = locate(config.simulation)(**settings_of(config.simulation))
    return made


def _made(config: ExperimentConfig, group: str) -> list[Callback]:
    made: list[Callback] = []
    for name, recipe in (getattr(config, group) or {}).items():
        try:
            made.append(locate(recipe)(**settings_of(recipe)))
        except TypeError as error:
            raise ConfigError(f"{group}.{name}: {error}") from error
        if not isinstance(made[-1], Callback):
            raise ConfigError(f"{group}.{name}: {recipe['_target_']} makes no tfr.Callback; derive its class from it")
    return made


def _metrics(model: nn.Module, test_set: Samples, weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the metrics of weights, which are loaded into a model, on held-out samples."""
    model.load_state_dict(weights)
    result = score(model, test_set)
    return {"test_accuracy": result.accuracy, "test_loss": result.loss}


def _divide(config: ExperimentConfig, train_set: Samples) -> dict[str, npt.NDArray[np.int64]]:
    """Return client id -> indices of its samples."""
    client_ids = config.runtime.default_client_ids()
    check_trusted(config.partition, config.trusted_modules)
    check_signature("partition", config.partition)
    labels = train_set.labels.numpy()
    groups = None if train_set.groups is None else train_set.groups.numpy()
    arguments = {"labels": labels, "num_clients": len(client_ids), "groups": groups}
    arguments = given("partition", locate(config.partition), arguments)
    parts = build(config.partition, config.trusted_modules, **arguments)
    checked = check_partition(config.partition, parts, len(client_ids), len(labels))
    return dict(zip(client_ids, checked, strict=True))


def _arguments(
    config: ExperimentConfig,
    parts: Mapping[str, npt.NDArray[np.int64]],
    held_out: Mapping[str, npt.NDArray[np.int64]] | None,
) -> dict[str, dict[str, Any]]:
    """Return client id -> arguments of its learner's constructor."""
    learner, settings = locate(config.learner), settings_of(config.learner)
    of_client = dict.fromkeys(parts).get if held_out is None else held_out.get
    common = {"dataset": config.dataset, "model": config.model, "seed": config.seed}
    return {
        client_id: given("learner", learner, {"indices": indices, "held_out": of_client(client_id), **common})
        | settings
        for client_id, indices in parts.items()
    }


def _learner(recipe: Recipe) -> Callable[..., Any]:
    """Return what makes the learners. The bundled ones are stateless without ``keep_weights``."""
    learner: Any = locate(recipe)
    if learner is ClassificationLearner and recipe.get("keep_weights") is False:  # another class may have other state
        learner = partial(learner)
        learner.stateless = True
    made: Callable[..., Any] = learner
    return made


def _train_baseline(config: ExperimentConfig, parts: _Parts) -> list[Score]:
    if config.baseline is None:
        return []
    data = parts.data
    if parts.held_out is not None:  # which the clients do not train on either
        data = TrainTest(data.train.take(torch.from_numpy(np.concatenate([*parts.indices.values()]))), data.test)
    return train_centrally(
        model=config.model, data=data, seed=config.seed, trusted_modules=config.trusted_modules, **config.baseline
    )


def _draw(parts: _Parts, baseline: Sequence[Score], output_dir: Path) -> None:
    if not extras.available("matplotlib"):
        return
    from torchfedrpc.experiments.metrics_plot import draw_metrics  # noqa: PLC0415 - matplotlib is optional
    from torchfedrpc.experiments.partition_plot import draw_partition  # noqa: PLC0415 - likewise

    draw_partition(parts.indices, parts.data.train.labels.numpy(), output_dir / "partition.png")
    draw_metrics(
        parts.history.records,
        output_dir / "metrics.png",
        baseline_accuracy=[result.accuracy for result in baseline],
        baseline_loss=[result.loss for result in baseline],
    )
