"""``torchfedrpc resume``: continues a run in its output folder, by the configuration that it has there."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments.run_folder import CONFIG_FILE, run_in_folder
from torchfedrpc.federation.checkpoint_store import CheckpointStore
from torchfedrpc.federation.checkpoints import SUBFOLDER
from torchfedrpc.run import drive

_DESCRIPTION = (
    "Continue a run from the last checkpoint in its output folder, with the settings of its config.yaml. Start it in "
    "the folder where the run was started, if its classes are defined there; under torchrun as well."
)


def main(arguments: Sequence[str]) -> int:
    """Continue a run; on the other ranks of a launch, serve learners until rank 0 ends.

    Returns:
        The exit status.

    Raises:
        ConfigError: If the folder has no run to continue, or a setting is unknown.
    """
    parser = argparse.ArgumentParser("torchfedrpc resume", description=_DESCRIPTION)
    parser.add_argument("folder", type=Path, metavar="DIR", help="output folder of the run")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="settings to change, such as runtime.num_processes=4; what results depend on must stay, and only "
        "trainer.num_rounds may grow",
    )
    given = parser.parse_args(arguments)
    drive(lambda: _resume(given.folder, given.overrides))
    return 0


def _resume(folder: Path, overrides: Sequence[str]) -> None:
    config = _config(folder, overrides)
    if not _has_checkpoint(folder / SUBFOLDER):
        raise ConfigError(
            f"{folder} has no checkpoint to resume from: the run ended before its first one, or had "
            f"checkpoint_every=null; start it anew"
        )
    run_in_folder(config, folder)


def _has_checkpoint(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    store = CheckpointStore(folder)
    store.lock()
    try:
        return store.load() is not None
    finally:
        store.unlock()


def _config(folder: Path, overrides: Sequence[str]) -> DictConfig:
    file = folder / CONFIG_FILE
    if not file.is_file():
        jobs = sorted(path.parent for path in folder.glob(f"*/{CONFIG_FILE}"))
        advice = f"it is a sweep: resume one of its jobs, such as {jobs[0]}" if jobs else "give a run's output folder"
        raise ConfigError(f"{folder} has no {CONFIG_FILE}: {advice}")
    config = OmegaConf.load(file)
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{file} is no configuration of a run")
    OmegaConf.set_struct(config, True)
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"{override!r} is no KEY=VALUE")
    config.merge_with_dotlist([*overrides, "resume=auto"])
    return config
