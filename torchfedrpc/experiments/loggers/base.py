"""Base class of loggers: what they log, on a thread of their own, and what becomes of a failure."""

from __future__ import annotations

import asyncio
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torchfedrpc.errors import ConfigError
from torchfedrpc.events import RoundEnded
from torchfedrpc.experiments.history import RoundMeter
from torchfedrpc.federation.callbacks import Callback, Run
from torchfedrpc.federation.checkpoints import plain

_FILES = ("model.pt", "best.pt", "metrics.png", "partition.png", "report.html")


@dataclass(frozen=True)
class Outcome:
    """End of a run.

    Attributes:
        status: ``finished``, ``failed`` or ``interrupted``.
        reason: The error, or why the run stopped early; empty if all rounds are done.
        files: The files of the output folder that this run has written, of those that loggers keep.
    """

    status: str
    reason: str
    files: Sequence[Path]


class RunLogger(Callback):
    """Base class of loggers. A subclass writes to its tool; a thread of the logger calls its methods, in order.

    Rounds that could not be written are written with the next one. A failure after the start is logged with the
    logger's name, and the run goes on.

    Attributes:
        tracker_state: What the logger needs to go on after a resume, as plain data; part of the checkpoints.
    """

    may_fail: ClassVar[bool] = True

    def __init__(self) -> None:
        self.tracker_state: dict[str, Any] = {}
        self._unwritten: list[tuple[int, dict[str, float]]] = []
        self._submitted: list[Future[None]] = []

    @abstractmethod
    def open(self, run: Run, settings: Mapping[str, Any]) -> None:
        """Begin to log a run, or go on with it.

        Args:
            run: The run.
            settings: Its settings, as plain values by dotted key.
        """

    @abstractmethod
    def write(self, round_num: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a round: those of the trainer, ``seconds``, ``bytes_sent`` and ``bytes_received``."""

    @abstractmethod
    def close(self, outcome: Outcome) -> None:
        """End the log of the run."""

    async def on_run_start(self, run: Run) -> None:
        """Begin to log."""
        self._began = time.time()
        self._meter = RoundMeter(run.proxy)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"torchfedrpc-{type(self).__name__}")
        try:
            await self._on_thread(lambda: self.open(run, plain(run.config)))
        except BaseException:
            self._thread.shutdown(wait=False)
            raise

    async def on_round_end(self, run: Run, ended: RoundEnded) -> None:
        """Write a round, and those before it that could not be written."""
        metrics = {name: float(value) for name, value in ended.metrics.items()}
        self._unwritten.append((ended.round_num, metrics | self._meter.take()))
        await self._on_thread(self._write)

    async def on_run_end(self, run: Run, error: BaseException | None) -> None:
        """Write what is left, and close."""
        paths = [run.output_dir / name for name in _FILES] if run.output_dir is not None else []
        files = [path for path in paths if path.exists() and path.stat().st_mtime >= self._began - 1]
        reason = run.stop_reason or "" if error is None else f"{type(error).__name__}: {error}".rstrip(": ")
        outcome = Outcome(_status(error), reason, files)
        try:
            await self._on_thread(lambda: self._finish(outcome))
        finally:
            self._thread.shutdown(wait=False)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs."""
        return {"tool": self.tracker_state, "unwritten": self._unwritten}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a result of `state_dict`."""
        self.tracker_state, self._unwritten = state["tool"], state["unwritten"]

    def _write(self) -> None:
        submitted, self._submitted = self._submitted, []
        for future in submitted:  # which have run by now
            future.result()
        while self._unwritten:
            self.write(*self._unwritten[0])
            del self._unwritten[0]

    def _finish(self, outcome: Outcome) -> None:
        try:
            self._write()
        except Exception as error:
            error.add_note(f"{len(self._unwritten)} rounds are not logged; history.jsonl has them")
            raise
        finally:
            self.close(outcome)

    def submit(self, function: Callable[[], None]) -> None:
        """Run a function on the logger's thread, behind those before; an exception is raised at the next write."""
        self._submitted.append(self._thread.submit(function))

    async def _on_thread(self, function: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, function)


def _status(error: BaseException | None) -> str:
    if error is None:
        return "finished"
    return "failed" if isinstance(error, Exception) else "interrupted"


def name_of(run: Run) -> str | None:
    """Return a name for a run by its output folder, such as ``my_sweep/3``; None without one."""
    return None if run.output_dir is None else "/".join(run.output_dir.absolute().parts[-2:])


def output_path(logger: RunLogger, given: str | Path | None, run: Run, name: str) -> Path:
    """Return the file or folder of a logger: the given one, or one in the output folder. Its folder is created.

    Raises:
        ConfigError: If there is neither.
    """
    if given is None and run.output_dir is None:
        raise ConfigError(f"{type(logger).__name__} has no folder: give it path=..., or set trainer.output_dir")
    path = Path(given) if given is not None else Path(str(run.output_dir), name)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
