"""Results of runs, read from their output folders, and their settings as far as they differ."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from torchfedrpc.events import RoundEnded
from torchfedrpc.experiments import job
from torchfedrpc.experiments.history import TEST_ACCURACY, Cost, RoundRecord
from torchfedrpc.experiments.setting_names import by_numbers, flattened
from torchfedrpc.federation.watched_metric import WatchedMetric, sign_of

SEED = "seed"
_OF_NO_RESULT = {"resume", "checkpoint_every", "logger", "trace", "trace_calls", "report", "client_scores"}
_MAX_DIGITS = 8
_FIELDS = {item.name for item in dataclasses.fields(RoundRecord)} - {"more"}


@dataclass(frozen=True)
class RunResult:
    """What a run has left in its output folder.

    Attributes:
        folder: The folder.
        status: ``done``, ``failed``, ``interrupted``, ``killed``, ``running``, or ``unknown``.
        error: The error of a failed run, one line.
        settings: Key -> value, as text: the whole configuration, and the options of groups.
        overrides: The settings of the command line, ``key=value``.
        records: The rounds.
        accuracy: Final test accuracy, 0 to 1; None if there is none, as of a run that is not done.
    """

    folder: Path
    status: str
    error: str
    settings: Mapping[str, str] = field(repr=False)
    overrides: Sequence[str]
    records: Sequence[RoundRecord] = field(repr=False)
    accuracy: float | None

    @property
    def is_done(self) -> bool:
        """Whether the run has all its rounds, as far as is known."""
        return self.status in ("done", "unknown")

    @property
    def seed(self) -> str:
        """The seed, as text; empty if it is not known."""
        return self.settings.get(SEED, "")

    def shown(self, key: str) -> str:
        """Return a setting for a table, with long numbers rounded."""
        value = self.settings.get(key, "-")
        try:
            return f"{float(value):.4g}" if len(value) > _MAX_DIGITS else value
        except ValueError:
            return value

    def final(self, metric: str = TEST_ACCURACY) -> float | None:
        """Return the last value of a metric; None if there is none, as of a run that is not done."""
        if metric == TEST_ACCURACY:
            return self.accuracy
        values = self._values(metric) if self.is_done else []
        return values[-1] if values else None

    def best(self, metric: str = TEST_ACCURACY) -> float | None:
        """Return the best value of a metric in all rounds; None if there is none, or its name tells no best one."""
        if (sign := sign_of(metric)) is None:
            return None
        return max(self._values(metric), key=lambda value: sign * value, default=self.final(metric))

    def _values(self, metric: str) -> list[float]:
        return [found[metric] for record in self.records if metric in (found := record.metrics)]

    @property
    def loss(self) -> float | None:
        """The test loss after the last round."""
        return self.records[-1].test_loss if self.records else None

    @property
    def seconds(self) -> float:
        """Seconds of all rounds."""
        return sum(record.seconds for record in self.records)

    @property
    def num_bytes(self) -> int:
        """Bytes between driver and workers, in both directions."""
        return sum(record.bytes_sent + record.bytes_received for record in self.records)

    def cost(self, target: float, metric: str = TEST_ACCURACY) -> Cost | None:
        """Return the cost up to the first round whose metric is at least as good as a target; None without one.

        Raises:
            ConfigError: If the name of the metric does not tell whether higher values are better.
        """
        watched = WatchedMetric("compare", metric, None)
        for count, record in enumerate(self.records, 1):
            if watched.is_reached_by(RoundEnded(record.round, len(self.records), record.metrics), target):
                return Cost.of(self.records[:count])
        return None


def find_runs(folder: Path) -> list[RunResult]:
    """Return the runs in a folder: its own, or those in its subfolders, by the numbers in their names."""
    names = (job.FILE, "history.jsonl")
    folders = {path.parent for name in names for path in folder.glob(f"**/{name}")}
    return [read_run(one) for one in sorted(folders, key=lambda path: by_numbers(str(path.relative_to(folder))))]


def read_run(folder: Path) -> RunResult:
    """Return what a run has left in a folder; a file that is missing or damaged counts as empty."""
    ended = job.read_job(folder)
    records = _records(folder / "history.jsonl")
    overrides = job.read_overrides(folder)
    choices = (_yaml(folder / ".hydra" / "hydra.yaml") or {}).get("hydra", {}).get("runtime", {}).get("choices", {})
    config = _yaml(folder / "config.yaml") or _yaml(folder / ".hydra" / "config.yaml") or {}
    given = dict(_split(one) for one in overrides)
    flat = {key: _text(value) for key, value in flattened(config)}
    groups = {str(key): _text(value) for key, value in choices.items() if not str(key).startswith("hydra/")}
    accuracy = ended.get("accuracy")
    status = ended.get("status") or "unknown"
    if accuracy is None and records and status == "unknown":
        accuracy = records[-1].test_accuracy
    return RunResult(
        folder=folder,
        status=status,
        error=ended.get("error") or "",
        settings={**given, **groups, **flat},
        overrides=overrides,
        records=records,
        accuracy=accuracy,
    )


def differing(runs: Sequence[RunResult]) -> list[str]:
    """Return the keys of the settings that differ among runs: those of the command lines, else of the whole."""
    given = list(dict.fromkeys(_split(one)[0] for run in runs for one in run.overrides))
    keys = given or list(dict.fromkeys(key for run in runs for key in run.settings))
    return [
        key
        for key in keys
        if key.split(".")[0] not in _OF_NO_RESULT
        and len({run.settings.get(key) for run in runs}) > 1
        and not job.is_of_hydra(key)
    ]


def grouped(runs: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    """Return the runs by their differing settings other than the seed, as a text; in the order of the runs."""
    keys = [key for key in differing(runs) if key != SEED]
    groups: dict[str, list[RunResult]] = {}
    for run in runs:
        name = " ".join(f"{key}={run.shown(key)}" for key in keys)
        groups.setdefault(name or "all", []).append(run)
    return groups


def mean_and_std(values: Iterable[float | None]) -> tuple[float, float] | None:
    """Return mean and standard deviation (of a sample; 0 for one value) of the values; None without any."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    mean = sum(known) / len(known)
    return mean, (sum((value - mean) ** 2 for value in known) / max(len(known) - 1, 1)) ** 0.5


def _records(path: Path) -> list[RoundRecord]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    records = []
    for line in lines:
        try:
            values = json.loads(line)
            more = {key: value for key, value in values.items() if key not in _FIELDS}
            records.append(RoundRecord(**{key: value for key, value in values.items() if key in _FIELDS}, more=more))
        except (ValueError, TypeError, AttributeError):  # the line that a killed run was writing
            break
    return records


def _yaml(path: Path) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OSError, OmegaConfBaseException, ValueError):
        return None
    except Exception as error:  # yaml's own, whose type is not ours to import
        if type(error).__module__.startswith("yaml"):
            return None
        raise


def _split(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.lstrip("+~").partition("@")[0], value


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
