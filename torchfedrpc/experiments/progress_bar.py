"""Live progress bar, drawn by rich."""

from __future__ import annotations

from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from torchfedrpc.events import CallEnded, CallStarted, Event, RoundEnded, RoundStarted, Subscriber


class BarProgress:
    """Progress bar with rounds, calls in flight, accuracy and remaining time; it stays visible after the run.

    Args:
        stream: A terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self._num_in_flight = 0
        self._progress = Progress(
            TextColumn("[bold]rounds"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[in_flight]:>3} in flight"),
            TextColumn("accuracy {task.fields[accuracy]}"),
            TimeRemainingColumn(),
            console=Console(file=stream),
            refresh_per_second=5,
        )
        self._task = self._progress.add_task("rounds", total=None, in_flight=0, accuracy="  -  ")

    def __enter__(self) -> Subscriber:
        self._progress.start()
        return self._show

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def _show(self, event: Event) -> None:
        match event:
            case CallStarted():
                self._num_in_flight += 1
                self._progress.update(self._task, in_flight=self._num_in_flight)
            case CallEnded():
                self._num_in_flight -= 1
                self._progress.update(self._task, in_flight=self._num_in_flight)
            case RoundStarted(round_num=round_num, num_rounds=num_rounds):
                self._progress.update(self._task, total=num_rounds, completed=round_num)
            case RoundEnded(round_num=round_num, num_rounds=num_rounds, metrics=metrics):
                self._progress.update(self._task, total=num_rounds, completed=round_num + 1)
                if "test_accuracy" in metrics:
                    self._progress.update(self._task, accuracy=f"{metrics['test_accuracy']:.3f}")
            case _:
                pass
