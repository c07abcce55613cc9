"""The ``torchfedrpc`` command: runs an experiment or a sweep configured by hydra, or ``torchfedrpc info``."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import tempfile
from pathlib import Path

import hydra
import numpy as np
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError, GroupCallError, SnapshotError, WorkerLostError
from torchfedrpc.experiments.experiment import ExperimentConfig, run_experiment
from torchfedrpc.host.process import num_usable_cores
from torchfedrpc.launcher import Launch
from torchfedrpc.private_files import close_to_others, make_private, replaced
from torchfedrpc.rpc import world
from torchfedrpc.rpc.backend import torch_rpc
from torchfedrpc.run import drive, leave_no_word
from torchfedrpc.signals import run_interruptible
from torchfedrpc.version import __version__

_INFO = "Print the versions, the machine and the transport between processes; torchfedrpc --help is of experiments."
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
        sys.exit("\n".join([f"torchfedrpc: {error}", *getattr(error, "__notes__", [])]))


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
    if sys.argv[1:2] == ["info"]:
        leave_no_word()  # this process does not run a rank's script, even if a launcher's variables are set
        argparse.ArgumentParser("torchfedrpc info", description=_INFO).parse_args(sys.argv[2:])
        print(describe())
        return
    try:
        drive(_task)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def plain(config: DictConfig) -> dict[str, object]:
    """Return the resolved configuration as dicts and lists, which can be sent to workers."""
    plain = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def describe() -> str:
    """Return one line per fact that a bug report or a measurement should state."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    facts = {
        "torchfedrpc": __version__,
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, CPU capability {torch.backends.cpu.get_cpu_capability()}",
        "numpy": np.__version__,
        "system": platform.platform(),
        "cores": f"{num_usable_cores()} of {os.cpu_count()}",
        "GPUs": ", ".join(gpus) or "none",
        "calls between processes": _road(),
        "snapshots on disk": tempfile.gettempdir(),
    }
    return "\n".join(f"{name + ':':<25}{fact}" for name, fact in facts.items())


def _road() -> str:
    try:
        torch_rpc()
    except ConfigError as error:
        return f"not available: {error}"
    transport, channels = world.choose_transport(RuntimeConfig())
    return f"TensorPipe, transport {transport}, channels {' '.join(channels)} (runtime.transport, runtime.channels)"
