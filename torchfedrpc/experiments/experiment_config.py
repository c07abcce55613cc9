"""Configuration of an experiment."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError, suggest
from torchfedrpc.experiments.recipe import locate
from torchfedrpc.experiments.user_modules import import_user_module
from torchfedrpc.federation.checkpoints import SUBFOLDER, Checkpoints

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
        cohort: Class or function of the choice of clients as ``_target_``, and its settings; None for the trainer's
            own.
        simulation: Recipe of `SimulatedClients`; None for none.
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
        held_out: Fraction of each client's samples that ``evaluate`` scores on and training leaves out; at least 0,
            below 1.
        evaluate_every: Number of rounds between evaluations by all clients, see `ClientEvaluation`; None for none.
    """

    seed: int
    runtime: RuntimeConfig
    dataset: Recipe
    partition: Recipe
    model: Recipe
    learner: Recipe
    trainer: Recipe
    aggregator: Recipe | None = None
    cohort: Recipe | None = None
    simulation: Recipe | None = None
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
    held_out: float = 0.0
    evaluate_every: int | None = None

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
        held_out = values.get("held_out", 0.0)
        if isinstance(held_out, bool) or not isinstance(held_out, int | float) or not 0 <= held_out < 1:
            raise ConfigError(
                f"held_out is the fraction of each client's samples to score it on, at least 0 and below 1, not "
                f"{held_out!r}"
            )
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
        names = ["seed", "dataset", "partition", "held_out", "model", "learner"]
        names += ["trainer", "aggregator", "cohort", "simulation"]
        config = {name: getattr(self, name) for name in names}
        return Checkpoints(output_dir / SUBFOLDER, every=self.checkpoint_every, resume=self.resume, config=config)

    def as_mapping(self) -> dict[str, Any]:
        """Return the configuration as dicts, lists and plain values."""
        return dataclasses.asdict(
            self,
            dict_factory=lambda items: {
                key: value.value if isinstance(value, Enum) else value for key, value in items
            },
        )


def _is_required(item: dataclasses.Field[Any]) -> bool:
    return item.default is item.default_factory is dataclasses.MISSING
