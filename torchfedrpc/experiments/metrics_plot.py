"""Plot of a run's metrics, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from torchfedrpc.experiments.history import RoundRecord
from torchfedrpc.private_files import replaced


def draw_metrics(
    records: Sequence[RoundRecord],
    path: Path,
    *,
    baseline_accuracy: Sequence[float] = (),
    baseline_loss: Sequence[float] = (),
) -> None:
    """Plot accuracy and loss per round into a PNG file.

    Args:
        records: The history of the run.
        path: The output file.
        baseline_accuracy: Accuracy of centralised training on the same test set, per round's amount of training.
        baseline_loss: Loss of centralised training, likewise.
    """
    # Not pyplot, which keeps global state and needs a backend.
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    num_done = [record.round + 1 for record in records]
    _draw(left, num_done, [record.test_accuracy for record in records], "federated, test", style="C0-")
    _draw(right, num_done, [record.test_loss for record in records], "federated, test", style="C0-")
    _draw(right, num_done, [record.train_loss for record in records], "federated, train", style="C0:")
    _draw(left, num_done, baseline_accuracy, "centralised, test", style="C1--")
    _draw(right, num_done, baseline_loss, "centralised, test", style="C1--")
    for axes, name in ((left, "accuracy"), (right, "loss")):
        axes.set_xlabel("rounds")
        axes.set_ylabel(name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    with replaced(path) as file:
        figure.savefig(file, dpi=120, format="png")


def _draw(axes: Axes, num_done: Sequence[int], values: Sequence[float | None], label: str, *, style: str) -> None:
    """Plot the measured values; the longer of rounds and values is truncated."""
    points = [(number, value) for number, value in zip(num_done, values, strict=False) if value is not None]
    if points:
        axes.plot(*zip(*points, strict=True), style, label=label, marker="." if len(points) < 3 else None)
