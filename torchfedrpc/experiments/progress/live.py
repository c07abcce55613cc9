"""Progress display of a run: a live view on a terminal or in a notebook, else lines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TextIO

from torchfedrpc.events import Subscriber
from torchfedrpc.experiments import extras
from torchfedrpc.experiments.progress.lines import LineProgress
from torchfedrpc.interactive import is_notebook


def live_progress(
    stream: TextIO | None = None, stats: Callable[[], Mapping[str, Any]] | None = None
) -> AbstractContextManager[Subscriber]:
    """Return a progress display: a bar in a notebook, a live view on a terminal if rich is installed, else lines.

    Args:
        stream: The output stream. Default: stdout.
        stats: `LearnerProxy.stats` of the run. Default: The view has neither bytes nor workers.

    Returns:
        A context manager that provides a callback for ``proxy.subscribe``.
    """
    if stream in (None, sys.stdout) and is_notebook():
        from torchfedrpc.experiments.progress.notebook_cell import CellProgress  # noqa: PLC0415 - IPython is optional

        return CellProgress()
    stream = stream or sys.stdout
    if stream.isatty() and extras.available("rich"):
        from torchfedrpc.experiments.progress.terminal_view import TerminalView  # noqa: PLC0415 - rich is optional

        return TerminalView(stream, stats)
    return LineProgress(stream)
