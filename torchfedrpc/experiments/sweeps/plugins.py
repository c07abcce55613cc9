"""Hydra's plugins for sweeps: what to install for them, and the direction in which optuna optimises."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Sequence
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments import extras

INSTALL_COMMAND = "pip install 'torchfedrpc[sweeps]'"
_PLUGINS = {
    "hydra/launcher=joblib": "hydra_joblib_launcher",
    "hydra/launcher=submitit_local": "hydra_submitit_launcher",
    "hydra/launcher=submitit_slurm": "hydra_submitit_launcher",
    "hydra/sweeper=optuna": "hydra_optuna_sweeper",
}


def check_installed(arguments: Sequence[str]) -> None:
    """Check that the plugins that a command line names are installed.

    Raises:
        ConfigError: If one is missing; the message gives the install command.
    """
    for argument in arguments:
        plugin = _PLUGINS.get(re.sub("^[+]*", "", argument))
        if plugin is not None and not extras.available(f"hydra_plugins.{plugin}"):
            raise ConfigError(f"{argument} needs {plugin}, which is not installed: {INSTALL_COMMAND}")


def register() -> None:
    """Have ``hydra/sweeper=optuna`` maximise what a job returns, its accuracy, and go on after a failed job.

    The plugin's default is to minimise, and to end the sweep at the first failure.
    """
    Plugins.instance()  # it runs the modules of all plugins, which store their defaults
    if not extras.available("hydra_plugins.hydra_optuna_sweeper"):
        return
    from hydra_plugins.hydra_optuna_sweeper.config import OptunaSweeperConf  # noqa: PLC0415 - it is optional

    changes = [("direction", Any, "maximize"), ("max_failure_rate", float, 1.0)]
    node = make_dataclass("OptunaSweeperConf", changes, bases=(OptunaSweeperConf,))
    ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node=node, provider="torchfedrpc")


def stop_local_jobs() -> None:
    """Interrupt the jobs that submitit has started on this machine, which outlive this process otherwise."""
    for task in Path("/proc/self/task").glob("*/children"):
        for pid in task.read_text().split():
            with contextlib.suppress(OSError):  # it has ended
                if b"submitit.local._local" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(int(pid), signal.SIGINT)
