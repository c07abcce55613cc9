"""Progress display of a run: a live bar on a terminal, else one line per round."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TextIO

from torchfedrpc.events import Event, RoundEnded, Subscriber
from torchfedrpc.experiments import extras


def live_progress(stream: TextIO) -> AbstractContextManager[Subscriber]:
    """Return a progress display for a stream: a bar if it is a terminal and rich is installed, else lines.

    Returns:
        A context manager that provides a callback for ``proxy.subscribe``.
    """
    if stream.isatty() and extras.available("rich"):
        from torchfedrpc.experiments.progress_bar import BarProgress  # noqa: PLC0415 - rich is optional

        return BarProgress(stream)
    return LineProgress(stream)


class LineProgress:
    """Progress display that writes a line at the end of each round.

    Args:
        stream: The output stream.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._round_ends: list[float] = []

    def __enter__(self) -> Subscriber:
        self._round_ends = [time.monotonic()]
        return self._show

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Do nothing: no resource is open."""

    def _show(self, event: Event) -> None:
        if not isinstance(event, RoundEnded):
            return
        num_done = event.round_num + 1
        parts = [f"round {num_done:>{len(str(event.num_rounds))}}/{event.num_rounds}"]
        parts += describe_metrics(event)
        self._round_ends.append(time.monotonic())
        if num_done < event.num_rounds:
            parts.append(f"{self._round_s() * (event.num_rounds - num_done):.0f} s left")
        print("  ".join(parts), file=self._stream, flush=True)

    def _round_s(self) -> float:
        """Return the mean seconds of a round. The first of several is omitted, since it loads data and libraries."""
        ends = self._round_ends if len(self._round_ends) == 2 else self._round_ends[1:]
        return (ends[-1] - ends[0]) / (len(ends) - 1)


def describe_metrics(ended: RoundEnded) -> list[str]:
    """Return the main metrics of a round, each as a short text."""
    formats = {
        "test_accuracy": "accuracy {:.3f}",
        "test_loss": "loss {:.3f}",
        "train_loss": "train loss {:.3f}",
        "num_clients": "{:.0f} clients",
    }
    return [text.format(ended.metrics[name]) for name, text in formats.items() if name in ended.metrics]
