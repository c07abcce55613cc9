"""The ``torchfedrpc`` command: runs an experiment or a sweep configured by hydra, or a subcommand."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError, GroupCallError, SnapshotError, TorchFedRpcError, WorkerLostError
from torchfedrpc.experiments.experiment import ExperimentConfig, run_experiment
from torchfedrpc.launcher import Launch
from torchfedrpc.private_files import close_to_others, make_private, replaced
from torchfedrpc.run import drive
from torchfedrpc.signals import run_interruptible

COMMANDS = {
    "info": "torchfedrpc.experiments.info",
}
"""Subcommand -> module with ``main(arguments: Sequence[str]) -> int``, which returns the exit status."""

_BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"  # runs jobs in the driver's process

ConfigStore.instance().store(group="runtime", name="schema", node=RuntimeConfig)


@hydra.main(version_base="1.3", config_path="pkg://torchfedrpc.conf", config_name="config")
def _task(config: DictConfig) -> float:
    """Run one job and return the final test accuracy, which sweepers optimise."""
    _check_launcher()
    try:
        return _run(config, Path(HydraConfig.get().runtime.output_dir))
    except (ConfigError, GroupCallError, SnapshotError, WorkerLostError) as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN or "HYDRA_FULL_ERROR" in os.environ:
            raise  # hydra continues with the other jobs
        sys.exit(_one_line(error))


def _check_launcher() -> None:
    """Check that the jobs of a sweep run in the driver of the launch, if there is a launch.

    Raises:
        ConfigError: If hydra's launcher starts the jobs in other processes, which the ranks do not serve.
    """
    config = HydraConfig.get()
    target = str(config.launcher._target_)
    is_sweep = config.mode == RunMode.MULTIRUN
    if is_sweep and target != _BASIC_LAUNCHER and Launch.from_environment() is not None:
        name = config.runtime.choices.get("hydra/launcher")
        raise ConfigError(
            f"hydra/launcher={name} ({target}) starts the jobs of a sweep in processes of its own, and the ranks of "
            f"a launch serve rank 0 alone: set hydra/launcher=basic, which runs the jobs one after another on all "
            f"ranks, or start the sweep without torchrun, with runtime=pseudo or runtime=local"
        )


def _run(config: DictConfig, output_dir: Path) -> float:
    experiment = ExperimentConfig.of(plain(config))
    close_to_others(output_dir)  # hydra has created it, and written the whole configuration into it
    make_private(output_dir)
    with experiment.checkpoints(output_dir) as checkpoints:
        with replaced(output_dir / "config.yaml") as file:
            file.write(OmegaConf.to_yaml(config, resolve=True).encode())
        accuracy = run_interruptible(
            lambda: run_experiment(experiment, output_dir, checkpoints=checkpoints),
            notice=f"interrupted; outputs so far: {output_dir}",
        )
    print(f"outputs: {output_dir}", flush=True)
    return accuracy


def main() -> None:
    """Run the command line; on the other ranks of a launch, serve learners until rank 0 ends."""
    module = COMMANDS.get(sys.argv[1]) if len(sys.argv) > 1 else None
    try:
        if module is not None:
            sys.exit(_call_command(module, sys.argv[2:]))
        drive(_task)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


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
