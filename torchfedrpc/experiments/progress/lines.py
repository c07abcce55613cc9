"""Progress display of lines: the end of each round."""

from __future__ import annotations

from types import TracebackType
from typing import TextIO

from torchfedrpc.events import Event, RoundEnded, Subscriber
from torchfedrpc.experiments.progress.run_status import RunStatus


class LineProgress:
    """Progress display that writes a line at the end of each round. Losses and returns of workers are in the log.

    Args:
        stream: The output stream.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __enter__(self) -> Subscriber:
        self._status = RunStatus()
        return self._show

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Do nothing: no resource is open."""

    def _show(self, event: Event) -> None:
        self._status.add(event)
        if isinstance(event, RoundEnded):
            print(describe_round(event, self._status), file=self._stream, flush=True)


def describe_round(ended: RoundEnded, status: RunStatus) -> str:
    """Return the line of a round: its number, its main metrics, and the time left."""
    num_done = ended.round_num + 1
    parts = [f"round {num_done:>{len(str(ended.num_rounds))}}/{ended.num_rounds}", *describe_metrics(ended)]
    if status.seconds_left is not None:
        parts.append(f"{status.seconds_left:.0f} s left")
    return "  ".join(parts)


def describe_metrics(ended: RoundEnded) -> list[str]:
    """Return the main metrics of a round, each as a short text."""
    formats = {
        "test_accuracy": "accuracy {:.3f}",
        "test_loss": "loss {:.3f}",
        "train_loss": "train loss {:.3f}",
        "num_clients": "{:.0f} clients",
    }
    return [text.format(ended.metrics[name]) for name, text in formats.items() if name in ended.metrics]
