"""The ``torchfedrpc`` command: runs an experiment or a sweep configured by hydra, or a subcommand."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError, GroupCallError, SnapshotError, TorchFedRpcError, WorkerLostError
from torchfedrpc.experiments.data.cache import preload_of
from torchfedrpc.experiments.experiment import ExperimentConfig, run_experiment
from torchfedrpc.experiments.job import TRACEBACK_FILE, Job, one_line, read_job, unchanged_process
from torchfedrpc.experiments.sweep import end_early, summarised
from torchfedrpc.experiments.sweep_plugins import check_installed, register
from torchfedrpc.private_files import close_to_others, make_private, replaced
from torchfedrpc.rpc.surroundings import preloading
from torchfedrpc.run import drive
from torchfedrpc.signals import run_interruptible

COMMANDS = {
    "compare": "torchfedrpc.experiments.compare",
    "check": "torchfedrpc.check_cli",
    "info": "torchfedrpc.experiments.info",
    "report": "torchfedrpc.experiments.report",
}
"""Subcommand -> module with ``main(arguments: Sequence[str]) -> int``, which returns the exit status."""

_TOLD_IN_A_LINE = (ConfigError, GroupCallError, SnapshotError, WorkerLostError)
_OF_NO_RESULT = {"resume": "", "checkpoint_every": ""}  # settings that do not change what a job returns

ConfigStore.instance().store(group="runtime", name="schema", node=RuntimeConfig)


@hydra.main(version_base="1.3", config_path="pkg://torchfedrpc.conf", config_name="config")
def _task(config: DictConfig) -> float | None:
    """Run one job and return the final test accuracy, which sweepers optimise.

    If a job of a sweep fails, it returns None: hydra goes on, and an optimiser counts the trial as failed.
    """
    hydra_config = HydraConfig.get()
    is_in_sweep = hydra_config.mode == RunMode.MULTIRUN
    output_dir = Path(hydra_config.runtime.output_dir)
    if is_in_sweep and config.resume == "auto" and (accuracy := _accuracy_if_done(config, output_dir)) is not None:
        print(f"job {hydra_config.job.num} is done already: test accuracy {accuracy:.3f}, {output_dir}", flush=True)
        return accuracy
    job = Job(output_dir)
    try:
        close_to_others(output_dir)  # hydra has created it, and written the whole configuration into it
        make_private(output_dir)
        with job.recorded():
            job.accuracy = _run(config, output_dir)
    except Exception as error:
        is_told_in_full = "HYDRA_FULL_ERROR" in os.environ
        if is_in_sweep:
            if is_told_in_full:
                traceback.print_exception(error)
            where = output_dir / TRACEBACK_FILE
            print(f"job {hydra_config.job.num} failed: {one_line(error)} ({where})", file=sys.stderr, flush=True)
        elif is_told_in_full or not isinstance(error, _TOLD_IN_A_LINE):
            raise
        else:
            sys.exit(_one_line(error))
    return job.accuracy


def _run(config: DictConfig, output_dir: Path) -> float:
    experiment = ExperimentConfig.of(plain(config))
    with experiment.checkpoints(output_dir) as checkpoints:
        with replaced(output_dir / "config.yaml") as file:
            file.write(OmegaConf.to_yaml(config, resolve=True).encode())
        preload = preload_of(experiment.dataset, experiment.trusted_modules)
        with preloading(preload), unchanged_process():
            accuracy = run_interruptible(
                lambda: run_experiment(experiment, output_dir, checkpoints=checkpoints),
                notice=f"interrupted; outputs so far: {output_dir}",
                at_forced_end=end_early,
            )
    print(f"outputs: {output_dir}", flush=True)
    return accuracy


def _accuracy_if_done(config: DictConfig, output_dir: Path) -> float | None:
    """Return the accuracy of an earlier job in this folder; None if it is not done, or had other settings."""
    earlier = read_job(output_dir)
    path = output_dir / "config.yaml"
    if earlier.get("status") != "done" or not path.is_file():
        return None
    files = OmegaConf.to_yaml(config, resolve=True), path.read_text(encoding="utf-8")
    present, former = ({**OmegaConf.create(file), **_OF_NO_RESULT} for file in files)
    return earlier.get("accuracy") if present == former else None


def main() -> None:
    """Run the command line; on the other ranks of a launch, serve learners until rank 0 ends."""
    module = COMMANDS.get(sys.argv[1]) if len(sys.argv) > 1 else None
    try:
        if module is not None:
            sys.exit(_call_command(module, sys.argv[2:]))
        drive(_run_hydra)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _run_hydra() -> None:
    try:
        check_installed(sys.argv[1:])
    except ConfigError as error:
        sys.exit(_one_line(error))
    register()
    with summarised():
        _task()


def _call_command(module: str, arguments: Sequence[str]) -> int:
    """Return the exit status of a subcommand."""
    try:
        status: int = importlib.import_module(module).main(arguments)
    except TorchFedRpcError as error:
        sys.exit(_one_line(error))
    return status


def _one_line(error: BaseException) -> str:
    return "\n".join([f"torchfedrpc: {error}", *getattr(error, "__notes__", [])])


def plain(config: DictConfig) -> dict[str, object]:
    """Return the resolved configuration as dicts and lists, which can be sent to workers."""
    plain = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}
