"""Picture of a partition: classes and numbers of samples of the clients, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from torchfedrpc.private_files import replaced

_MAX_NAMED = 40  # more names of clients would overlap
_MAX_COUNTED = 12  # more columns leave no room for counts in the cells
_MAX_ROWS = 960  # height in pixels; more clients share rows


def draw_partition(parts: Mapping[str, npt.NDArray[np.int64]], labels: npt.NDArray[np.int64], path: Path) -> None:
    """Draw which share of a client's samples has each class, and how many samples a client has, into a PNG file.

    Up to 40 clients are drawn from the top in their order, by name. More are sorted by their largest class, and where
    there are more than pixels, a row is the mean of several.

    Args:
        parts: Client id -> indices of its samples.
        labels: [num_samples]; the class of each sample.
        path: The output file.
    """
    classes, columns = np.unique(labels, return_inverse=True)
    counts = np.array([np.bincount(columns[part], minlength=len(classes)) for part in parts.values()])
    shares = counts / counts.sum(axis=1, keepdims=True)
    is_named = len(parts) <= _MAX_NAMED
    if not is_named:
        order = np.lexsort((-shares.max(axis=1), shares.argmax(axis=1)))
        counts, shares = counts[order], shares[order]
    edges = np.linspace(0, len(parts), min(len(parts), _MAX_ROWS) + 1).astype(np.int64)
    shares = np.add.reduceat(shares, edges[:-1]) / np.diff(edges)[:, None]
    sizes = np.add.reduceat(counts.sum(axis=1), edges[:-1]) / np.diff(edges)
    # Not pyplot, which keeps global state and needs a backend.
    figure = Figure(figsize=(10, max(3.0, min(8.0, 1.6 + 0.24 * len(parts)))), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    extent = (-0.5, len(classes) - 0.5, len(parts) - 0.5, -0.5)
    image = left.imshow(shares, aspect="auto", cmap="Blues", vmin=0, interpolation_stage="rgba", extent=extent)
    figure.colorbar(image, ax=left, label="share of the client's samples")
    left.set_xlabel("class")
    _name_columns(left, classes)
    if is_named:
        left.set_yticks(range(len(parts)), list(parts))
    else:
        left.set_ylabel(f"{len(parts)} clients, sorted by their largest class")
        left.yaxis.set_major_locator(MaxNLocator(integer=True))
    if is_named and len(classes) <= _MAX_COUNTED:
        _write_counts(left, counts, shares)
    right.stairs(sizes, edges - 0.5, orientation="horizontal", fill=True)
    right.set_xlabel("samples")
    right.set_xlim(left=0)
    right.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    right.grid(axis="x", alpha=0.3)
    with replaced(path) as file:
        figure.savefig(file, dpi=120, format="png")


def _name_columns(axes: Axes, classes: npt.NDArray[np.int64]) -> None:
    """Label columns by their classes, which may have gaps."""

    def name(place: float, _: int | None) -> str:
        return str(classes[round(place)]) if 0 <= round(place) < len(classes) else ""

    axes.xaxis.set_major_locator(MaxNLocator(20, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(name))


def _write_counts(axes: Axes, counts: npt.NDArray[np.int64], shares: npt.NDArray[np.float64]) -> None:
    is_dark = shares > 0.6 * shares.max()
    for (row, column), count in np.ndenumerate(counts):
        if count:
            colour = "white" if is_dark[row, column] else "0.2"
            axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color=colour)
