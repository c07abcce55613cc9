"""A run of a configuration in its output folder, and what the command tells of its errors."""

from __future__ import annotations

import traceback
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue

from torchfedrpc.errors import ConfigError, GroupCallError, SnapshotError, WorkerLostError, suggest
from torchfedrpc.experiments.data.cache import preload_of
from torchfedrpc.experiments.experiment import run_experiment
from torchfedrpc.experiments.experiment_config import ExperimentConfig
from torchfedrpc.experiments.job import TRACEBACK_FILE, Job, read_job, unchanged_process
from torchfedrpc.experiments.sweeps.sweep import end_early
from torchfedrpc.federation.callbacks import Callback, Run
from torchfedrpc.federation.checkpoint_store import is_in_use
from torchfedrpc.federation.checkpoints import SUBFOLDER, Checkpoints
from torchfedrpc.private_files import close_to_others, make_private, replaced
from torchfedrpc.rpc.surroundings import preloading
from torchfedrpc.signals import run_interruptible

CONFIG_FILE = "config.yaml"
"""Name of the file with the resolved configuration in an output folder."""

_ONE_LINE_ERRORS = (ConfigError, GroupCallError, SnapshotError, WorkerLostError)


def run_in_folder(config: DictConfig, output_dir: Path) -> float:
    """Run an experiment in an output folder, and write its configuration and its `Job` there.

    Returns:
        The final test accuracy, 0 to 1.

    Raises:
        ConfigError: If a setting is invalid, or another run uses the folder, in which nothing is written then.
    """
    close_to_others(output_dir)  # hydra has created it, and written the whole configuration into it
    make_private(output_dir)
    job = Job(output_dir)
    try:
        experiment = ExperimentConfig.of(plain(config))
        checkpoints = experiment.checkpoints(output_dir)
        checkpoints.open()
    except Exception:
        if is_in_use(output_dir / SUBFOLDER) or read_job(output_dir).get("status") == "done":
            raise
        with job.recorded():
            raise
    with checkpoints:
        try:
            with job.recorded():
                job.accuracy = accuracy = _run(config, experiment, checkpoints, output_dir)
        except ConfigError:
            raise
        except Exception as error:
            error.add_note(f"traceback: {output_dir / TRACEBACK_FILE}")
            raise
    print(f"outputs: {output_dir}", flush=True)
    return accuracy


def _run(config: DictConfig, experiment: ExperimentConfig, checkpoints: Checkpoints, output_dir: Path) -> float:
    stored = _StoredConfig(output_dir / CONFIG_FILE, OmegaConf.to_yaml(config, resolve=True))
    preload = preload_of(experiment.dataset, experiment.trusted_modules)
    with preloading(preload), unchanged_process():
        return run_interruptible(
            lambda: run_experiment(experiment, output_dir, checkpoints=checkpoints, callbacks=[stored]),
            notice=f"interrupted; outputs so far: {output_dir}",
            at_forced_end=end_early,
        )


class _StoredConfig(Callback):
    """Writes the configuration of a run, at once if there is none, else when a run that resumes has been restored.

    So a change that does not fit the checkpoint leaves the configuration as it was.
    """

    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self._text = text
        if not path.exists():
            self._write()

    def on_run_start(self, run: Run) -> None:
        """Replace the configuration."""
        self._write()

    def _write(self) -> None:
        with replaced(self._path) as file:
            file.write(self._text.encode())


def plain(config: DictConfig) -> dict[str, object]:
    """Return the resolved configuration as dicts and lists, which can be sent to workers.

    Raises:
        ConfigError: If a setting has no value.
    """
    try:
        plain = OmegaConf.to_container(config, resolve=True, enum_to_str=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} has no default: give it a value, {error.full_key}=...") from None
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def error_text(error: Exception, *, adds_keys: bool = True) -> str:
    """Return the text that the command prints for an error: a line if the user can act on it, else a traceback.

    Args:
        error: The error.
        adds_keys: Whether ``+key=value`` adds a key, as hydra has it.
    """
    if isinstance(error, ConfigKeyError | ConfigAttributeError) and error.parent_node is not None:
        near = suggest(str(error.key), map(str, error.parent_node))
        advice = f"; +{error.full_key}=... adds one" if adds_keys else ""
        if str(error.full_key).partition(".")[0] == "simulation":
            advice = "; choose simulation=clients as well"
        return f"torchfedrpc: unknown key {error.full_key}{near}{advice}"
    if isinstance(error, _ONE_LINE_ERRORS):
        return "\n".join([f"torchfedrpc: {error}", *getattr(error, "__notes__", [])])
    return "".join(traceback.format_exception(error)).rstrip()
