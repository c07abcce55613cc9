"""A sweep: its folder belongs to one command at a time, and ends with a table, ``sweep.csv`` and ``sweep.png``."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from torchfedrpc.experiments import extras
from torchfedrpc.experiments.data.cache import keeping_datasets
from torchfedrpc.experiments.job import mark_killed
from torchfedrpc.experiments.sweeps.plugins import stop_local_jobs
from torchfedrpc.experiments.sweeps.results import find_runs, grouped
from torchfedrpc.experiments.sweeps.summary import describe_states, print_groups, print_runs, write_csv
from torchfedrpc.launcher import Launch
from torchfedrpc.private_files import close_to_others, make_private
from torchfedrpc.storage import FileLock

BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"  # runs jobs in the driver's process

_SIGTERM_STATUS = 128 + signal.SIGTERM


class Sweep:
    """A sweep that this process drives.

    Args:
        folder: Its folder.
        is_basic: Whether the jobs run in this process, and handle signals.

    Raises:
        BlockingIOError: If another sweep uses the folder.
    """

    def __init__(self, folder: Path, *, is_basic: bool) -> None:
        self.folder = folder
        make_private(folder)
        close_to_others(folder)
        self._stack = ExitStack()
        lock = FileLock(folder / "sweep.lock")
        self._stack.callback(lock.release)
        self._stack.enter_context(keeping_datasets())
        self._is_basic = is_basic
        if not is_basic:
            before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(_SIGTERM_STATUS))
            self._stack.callback(signal.signal, signal.SIGTERM, before)

    def end(self, *, draws: bool) -> bool:
        """Write the table, ``sweep.csv`` and the picture of what has been done, and release the folder.

        Args:
            draws: Whether to draw the picture, which takes a second.

        Returns:
            Whether all jobs are done.
        """
        with self._stack:
            if not self._is_basic:
                stop_local_jobs()
            mark_killed(self.folder)
            runs = find_runs(self.folder)
            if not runs:
                return False
            groups = grouped(runs)
            print(f"\n{describe_states(runs)}", flush=True)
            print_runs(runs, self.folder, sys.stdout)
            if any(len(group) > 1 for group in groups.values()):
                print_groups(groups, sys.stdout)
            write_csv(runs, self.folder / "sweep.csv")
            if draws and extras.available("matplotlib") and any(run.accuracy is not None for run in runs):
                from torchfedrpc.experiments.sweeps.plot import draw_runs  # noqa: PLC0415 - matplotlib is optional

                draw_runs(groups, self.folder / "sweep.png")
            print(f"sweep: {self.folder}", flush=True)
            return all(run.status == "done" for run in runs)


_current: Sweep | None = None


class SweepCallback(Callback):
    """Hydra's callback that begins a sweep, in the process of its command."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Begin the sweep. What is wrong ends the command, since hydra only warns of errors of a callback."""
        global _current
        _check_launcher(config)
        folder = Path(str(config.hydra.sweep.dir)).absolute()
        try:
            _current = Sweep(folder, is_basic=str(config.hydra.launcher._target_) == BASIC_LAUNCHER)
        except BlockingIOError as error:
            sys.exit(
                f"torchfedrpc: another sweep uses {folder} ({error.strerror}): wait for its end, or set "
                f"hydra.sweep.dir to another folder"
            )
        except Exception as error:
            sys.exit(f"torchfedrpc: {error}")
        OmegaConf.save(config, folder / "multirun.yaml")  # hydra's own sweeper does so, others do not


def end_early() -> None:
    """Write the table and ``sweep.csv`` of the sweep that this process drives, if any, before it is ended."""
    if (sweep := _current) is not None:
        sweep.end(draws=False)


@contextmanager
def summarised() -> Iterator[None]:
    """Summarise the sweep that a block runs, however it ends.

    Raises:
        SystemExit: With status 1, if a job has failed.
    """
    global _current
    draws = True
    try:
        yield
    except BaseException as error:
        status = getattr(error, "code", None)
        draws = not isinstance(error, KeyboardInterrupt) and status != _SIGTERM_STATUS
        raise
    finally:
        sweep, _current = _current, None
        is_complete = sweep is None or sweep.end(draws=draws)
    if not is_complete:
        sys.exit(1)


def _check_launcher(config: DictConfig) -> None:
    """End the command if jobs would start in other processes, which the ranks of a launch do not serve."""
    target = str(config.hydra.launcher._target_)
    if target != BASIC_LAUNCHER and Launch.from_environment() is not None:
        name = config.hydra.runtime.choices.get("hydra/launcher")
        sys.exit(
            f"torchfedrpc: hydra/launcher={name} ({target}) starts the jobs of a sweep in processes of its own, and "
            f"the ranks of a launch serve rank 0 alone: set hydra/launcher=basic, which runs the jobs one after "
            f"another on all ranks, or start the sweep without torchrun, with runtime=pseudo or runtime=local"
        )
