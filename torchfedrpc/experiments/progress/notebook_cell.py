"""Live progress in the output of a notebook's cell, which stays there after the run."""

from __future__ import annotations

import html
import time
from types import TracebackType
from typing import Any

from IPython.display import display

from torchfedrpc.events import Event, Subscriber
from torchfedrpc.experiments.progress.lines import describe_metrics
from torchfedrpc.experiments.progress.run_status import RunStatus

_REFRESH_S = 0.2


class CellProgress:
    """Bar with rounds, calls in flight and the metrics of the last round."""

    def __init__(self) -> None:
        self._status = RunStatus()
        self._is_running = True
        self._shown_at = 0.0
        self._handle: Any = None

    def __enter__(self) -> Subscriber:
        self._handle = display(self, display_id=True)
        return self._show

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_running = False
        self._handle.update(self)

    def __repr__(self) -> str:
        status = self._status
        parts = [f"round {status.num_done}/{status.num_rounds}"]
        if status.ended is not None:
            parts += describe_metrics(status.ended)
        if self._is_running and status.num_in_flight:
            parts.append(f"{status.num_in_flight} in flight")
        return "  ".join(parts)

    def _repr_html_(self) -> str:
        num_done, num_rounds = self._status.num_done, self._status.num_rounds or 1
        bar = f'<progress value="{num_done}" max="{num_rounds}" aria-label="rounds"></progress>'
        return f"<div>{bar} {html.escape(repr(self))}</div>"

    def _show(self, event: Event) -> None:
        self._status.add(event)
        if (now := time.monotonic()) - self._shown_at > _REFRESH_S:
            self._shown_at = now
            self._handle.update(self)
