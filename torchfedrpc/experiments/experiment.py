"""Experiment: data, learners and a trainer built from a configuration, and run."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError, suggest
from torchfedrpc.events import RoundEnded
from torchfedrpc.experiments import extras
from torchfedrpc.experiments.baseline import BASELINE_FILE, train_centrally, write_baseline
from torchfedrpc.experiments.classification import ClassificationLearner
from torchfedrpc.experiments.clients import CLIENTS_FILE, ClientLog
from torchfedrpc.experiments.data.cache import load_dataset
from torchfedrpc.experiments.data.samples import Samples, TrainTest
from torchfedrpc.experiments.history import HISTORY_FILE, History, RoundRecord
from torchfedrpc.experiments.progress import live_progress
from torchfedrpc.experiments.protocols import (
    check_aggregator,
    check_dataset,
    check_final_weights,
    check_methods,
    check_model,
    check_partition,
    check_signature,
    check_trainer,
    given,
    settings_of,
)
from torchfedrpc.experiments.recipe import build, check_trusted, locate
from torchfedrpc.experiments.report.page import Report
from torchfedrpc.experiments.round_table import print_table
from torchfedrpc.experiments.trace import Trace
from torchfedrpc.experiments.training import Score, build_model, copy_weights, score
from torchfedrpc.experiments.user_modules import import_user_module
from torchfedrpc.federation.aggregation import Aggregator
from torchfedrpc.federation.callbacks import Callback
from torchfedrpc.federation.checkpoints import SUBFOLDER, Checkpoints
from torchfedrpc.host.process import process_settings
from torchfedrpc.private_files import make_private, replaced
from torchfedrpc.proxy import LearnerProxy

Recipe = Mapping[str, Any]


@dataclass(frozen=True)
class ExperimentConfig:
    """Resolved configuration of an experiment.

    Attributes:
        seed: Seed of all random draws.
        runtime: Where learners run.
        dataset: Recipe of a `TrainTest`. `build` defines what it, ``partition`` and ``model`` may call.
        partition: Recipe of the division among clients.
        model: Recipe of a module.
        learner: Class of the learners as ``_target_``, and its settings. `ClassificationLearner` with
            ``keep_weights`` of false is declared stateless.
        trainer: Class of the trainer as ``_target_``, and its settings.
        aggregator: Function, or class, of the aggregator as ``_target_``, and its settings; None for the trainer's
            own. `torchfedrpc.experiments.protocols` has the arguments and results of all of these.
        imports: Modules to import first; recipes may name what their packages define.
        callbacks: Name -> recipe of a `torchfedrpc.Callback`.
        logger: Name -> recipe of a logger, which is a `torchfedrpc.Callback` as well, called after all others.
        baseline: Settings of `train_centrally`; None for no baseline.
        checkpoint_every: Number of rounds between checkpoints; None for no checkpoints.
        resume: ``never``, ``auto`` or an output folder, as in `Checkpoints`.
        trace: Whether to write ``trace.json``, as `Trace` describes.
        trace_calls: Number of calls in the trace; None for all.
        report: Whether to write ``report.html``.
        client_scores: Whether each client's learner scores the final weights by ``evaluate``, if it has that method.
    """

    seed: int
    runtime: RuntimeConfig
    dataset: Recipe
    partition: Recipe
    model: Recipe
    learner: Recipe
    trainer: Recipe
    aggregator: Recipe | None = None
    imports: Sequence[str] = ()
    callbacks: Mapping[str, Recipe] = dataclasses.field(default_factory=dict)
    logger: Mapping[str, Recipe] = dataclasses.field(default_factory=dict)
    baseline: Recipe | None = None
    checkpoint_every: int | None = 1
    resume: str = "never"
    trace: bool = False
    trace_calls: int | None = 10_000
    report: bool = False
    client_scores: bool = False

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ExperimentConfig:
        """Return a configuration from a mapping; ``runtime`` may be any value that `RuntimeConfig.of` accepts.

        Raises:
            ConfigError: If a key is missing or unknown, a setting of the runtime is invalid, or one of ``imports``
                cannot be imported.
        """
        known = [item.name for item in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(f"unknown key {key}{suggest(key, known)}")
        missing = [item.name for item in dataclasses.fields(cls) if item.name not in values and _is_required(item)]
        if missing:
            raise ConfigError(
                f"the configuration lacks {', '.join(missing)}: give it on the command line, such as model=cnn; "
                f"torchfedrpc --help lists the options of each group"
            )
        for name in ("trace", "report", "client_scores"):
            if not isinstance(value := values.get(name, False), bool):
                raise ConfigError(f"{name} must be true or false, not {value!r}")
        imports = values.get("imports") or []
        imports = [imports] if isinstance(imports, str) else list(imports)
        for module in imports:
            import_user_module(module)
        runtime = RuntimeConfig.of(values["runtime"])
        trusted = list(dict.fromkeys([*runtime.trusted_modules, *imports]))
        runtime = dataclasses.replace(runtime, trusted_modules=trusted)
        return cls(**{**values, "runtime": runtime, "imports": imports})

    @property
    def trusted_modules(self) -> list[str]:
        """Packages that recipes may name, as on workers: the learner's package, and ``runtime.trusted_modules``.

        Those of ``imports`` are among the latter.
        """
        return [locate(self.learner).__module__, *self.runtime.trusted_modules]

    def checkpoints(self, output_dir: Path) -> Checkpoints:
        """Return the checkpoints of a run. Seed, data, model, learner and trainer must be equal to resume from them.

        Raises:
            ConfigError: If ``checkpoint_every`` or ``resume`` is invalid.
        """
        names = ("seed", "dataset", "partition", "model", "learner", "trainer", "aggregator")
        config = {name: getattr(self, name) for name in names}
        return Checkpoints(output_dir / SUBFOLDER, every=self.checkpoint_every, resume=self.resume, config=config)


async def run_experiment(
    config: ExperimentConfig,
    output_dir: Path,
    *,
    checkpoints: Checkpoints | None = None,
    stream: TextIO | None = None,
) -> float:
    """Run an experiment from its first round, or from a checkpoint.

    It writes ``history.jsonl`` (one line per round), ``clients.jsonl``, ``baseline.jsonl``, ``model.pt`` (the final
    weights), if matplotlib is installed ``metrics.png``, with ``trace`` also ``trace.json``, and with ``report``
    ``report.html``.

    Args:
        config: The experiment.
        output_dir: Folder for these files; created with access for its user only if it does not exist.
        checkpoints: The result of ``config.checkpoints(output_dir)``, if it is open already.
        stream: Stream for progress and the final table. Default: stdout.

    Returns:
        The final test accuracy, 0 to 1.

    Raises:
        ConfigError: If a setting is invalid.
    """
    if checkpoints is None:
        with config.checkpoints(output_dir) as opened:
            return await run_experiment(config, output_dir, checkpoints=opened, stream=stream)
    make_private(output_dir)
    stream = stream or sys.stdout
    features = [("live bar", "rich"), ("picture", "matplotlib")]
    if config.report:
        features.append(("charts in the report", "vl_convert"))
    if note := extras.missing_line(features):
        print(note, file=stream)
    callbacks = _callbacks(config)
    check_trainer(config.trainer)
    check_signature("learner", config.learner)
    aggregator = _aggregator(config)
    data: TrainTest = load_dataset(config.dataset, config.trusted_modules)
    check_dataset(config.dataset, data)
    model = build_model(config.model, config.seed, config.trusted_modules)
    check_model(config.model, config.dataset, model, data)
    async with AsyncExitStack() as run:
        weights, history = await _train(
            config, data, model, aggregator, output_dir, checkpoints, callbacks, stream, run
        )
        with replaced(output_dir / "model.pt") as file:
            torch.save(weights, file)
        with process_settings(config.runtime):
            baseline = _train_baseline(config, data)
            accuracy = _metrics(model, data.test, weights)["test_accuracy"]
        write_baseline(output_dir / BASELINE_FILE, baseline)
        _draw(history, baseline, output_dir / "metrics.png")
    print_table(history, stream)
    if baseline:
        print(f"centralised baseline: test accuracy {baseline[-1].accuracy:.3f}", file=stream)
    print(f"final test accuracy: {accuracy:.3f}", file=stream, flush=True)
    return accuracy


async def _train(
    config: ExperimentConfig,
    data: TrainTest,
    model: nn.Module,
    aggregator: Aggregator | None,
    output_dir: Path,
    checkpoints: Checkpoints,
    callbacks: list[Callback],
    stream: TextIO,
    run: AsyncExitStack,
) -> tuple[dict[str, Tensor], list[RoundRecord]]:
    """Run the trainer, and return the final weights and the rounds. The run ends with the stack ``run``."""
    parts = _divide(config, data.train)
    clients = _arguments(config, parts)
    client_log = ClientLog(output_dir / CLIENTS_FILE, parts, data.train.labels.numpy())
    async with LearnerProxy(_learner(config.learner), clients, runtime=config.runtime, seed=config.seed) as proxy:
        found = checkpoints.open()
        going_on = f", going on after round {found.round_num}" if found is not None else ""
        print(f"{len(clients)} clients, {proxy.mode} mode{going_on}", file=stream, flush=True)
        history = History(output_dir / HISTORY_FILE, proxy, goes_on=found is not None)
        make = locate(config.trainer)
        arguments = {
            "initial_weights": copy_weights(model),
            "score": partial(_metrics, model, data.test),
            "history": history,
            "aggregator": aggregator,
        }
        trainer = make(settings_of(config.trainer), proxy, **given("trainer", make, arguments))
        if getattr(trainer, "history", None) is not history:  # as part of its state, no round is there twice
            trainer.history = history
            proxy.subscribe(lambda event: history.append(event) if isinstance(event, RoundEnded) else None)
        check_methods(config.learner, trainer)
        trainer.checkpoints, trainer.callbacks, trainer.output_dir = checkpoints, callbacks, output_dir
        await run.enter_async_context(trainer.running(_as_mapping(config)))
        with live_progress(stream, proxy.stats) as show:
            proxy.subscribe(show)
            weights = await trainer.train()
        check_final_weights(config.trainer, weights, model)
        if config.client_scores and hasattr(locate(config.learner), "evaluate"):
            failure = await client_log.score(proxy, weights)
            if failure is not None:
                print(failure, file=stream)
    return dict(weights), history.records


def _aggregator(config: ExperimentConfig) -> Aggregator | None:
    """Return the aggregator: an instance of its class, or its function with its settings."""
    if config.aggregator is None:
        return None
    check_aggregator(config.aggregator, config.trainer)
    make, settings = locate(config.aggregator), settings_of(config.aggregator)
    made: Aggregator = make(**settings) if isinstance(make, type) else partial(make, **settings)
    return made


def _is_required(item: dataclasses.Field[Any]) -> bool:
    return item.default is item.default_factory is dataclasses.MISSING


def _callbacks(config: ExperimentConfig) -> list[Callback]:
    """Return the callbacks in the order of their calls: loggers come last, since they keep the report.

    Raises:
        ConfigError: If one cannot be made, or the package of a logger is not installed.
    """
    trace = [Trace(max_calls=config.trace_calls)] if config.trace else []
    report = [Report()] if config.report else []
    return [*trace, *_made(config, "callbacks"), *report, *_made(config, "logger")]


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


def _as_mapping(config: ExperimentConfig) -> dict[str, Any]:
    """Return the configuration as dicts, lists and plain values."""
    return dataclasses.asdict(
        config,
        dict_factory=lambda items: {key: value.value if isinstance(value, Enum) else value for key, value in items},
    )


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
    parts = build(config.partition, config.trusted_modules, labels=labels, num_clients=len(client_ids))
    checked = check_partition(config.partition, parts, len(client_ids), len(labels))
    return dict(zip(client_ids, checked, strict=True))


def _arguments(config: ExperimentConfig, parts: Mapping[str, npt.NDArray[np.int64]]) -> dict[str, dict[str, Any]]:
    """Return client id -> arguments of its learner's constructor."""
    learner, settings = locate(config.learner), settings_of(config.learner)
    common = {"dataset": config.dataset, "model": config.model, "seed": config.seed}
    return {
        client_id: given("learner", learner, {"indices": indices, **common}) | settings
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


def _train_baseline(config: ExperimentConfig, data: TrainTest) -> list[Score]:
    if config.baseline is None:
        return []
    return train_centrally(
        model=config.model, data=data, seed=config.seed, trusted_modules=config.trusted_modules, **config.baseline
    )


def _draw(history: Sequence[RoundRecord], baseline: Sequence[Score], path: Path) -> None:
    if not extras.available("matplotlib"):
        return
    from torchfedrpc.experiments.metrics_plot import draw_metrics  # noqa: PLC0415 - matplotlib is optional

    draw_metrics(
        history,
        path,
        baseline_accuracy=[result.accuracy for result in baseline],
        baseline_loss=[result.loss for result in baseline],
    )
