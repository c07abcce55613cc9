"""The ``torchfedrpc`` command: one experiment, or a sweep of them, configured by hydra; ``torchfedrpc info``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError, SnapshotError, WorkerLostError
from torchfedrpc.federation.experiment import ExperimentConfig, run_experiment
from torchfedrpc.info import describe
from torchfedrpc.interrupts import run_interruptible
from torchfedrpc.observe.folder import close_to_others, make_private, replaced
from torchfedrpc.run import drive

ConfigStore.instance().store(group="runtime", name="schema", node=RuntimeConfig)


@hydra.main(version_base="1.3", config_path="pkg://torchfedrpc.conf", config_name="config")
def _task(config: DictConfig) -> float:
    """Run one job; sweepers optimise what it returns, the final test accuracy."""
    try:
        return _run(config, Path(HydraConfig.get().runtime.output_dir))
    except (ConfigError, SnapshotError, WorkerLostError) as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN or "HYDRA_FULL_ERROR" in os.environ:
            raise  # the other jobs go on
        sys.exit("\n".join([f"torchfedrpc: {error}", *getattr(error, "__notes__", [])]))


def _run(config: DictConfig, output_dir: Path) -> float:
    experiment = ExperimentConfig.of(plain(config))
    close_to_others(output_dir)  # hydra has made it, and written the whole configuration into it
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
    if sys.argv[1:] == ["info"]:
        print(describe())
        return
    try:
        drive(_task)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def plain(config: DictConfig) -> dict[str, object]:
    """The resolved configuration as dicts and lists, which can travel to workers."""
    plain = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}
