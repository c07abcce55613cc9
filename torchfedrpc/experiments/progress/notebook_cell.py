"""Live progress in the output of a notebook's cell, which stays there after the run."""

from __future__ import annotations

import html
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from IPython.display import display

from torchfedrpc.events import CallEnded, CallStarted, Event, RoundEnded, RoundStarted, Subscriber

_REFRESH_S = 0.2


class CellProgress:
    """Bar with rounds, calls in flight and the metrics of the last round.

    Args:
        describe: Returns the main metrics of a round, each as a short text.
    """

    def __init__(self, describe: Callable[[RoundEnded], list[str]]) -> None:
        self._describe = describe
        self._num_done = self._num_rounds = self._num_in_flight = 0
        self._metrics = ""
        self._shown_at = 0.0
        self._handle: Any = None

    def __enter__(self) -> Subscriber:
        self._handle = display(self, display_id=True)
        return self._show

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._num_in_flight = 0
        self._handle.update(self)

    def __repr__(self) -> str:
        in_flight = f"{self._num_in_flight} in flight" if self._num_in_flight else ""
        return "  ".join(filter(None, [f"round {self._num_done}/{self._num_rounds}", self._metrics, in_flight]))

    def _repr_html_(self) -> str:
        bar = f'<progress value="{self._num_done}" max="{self._num_rounds or 1}" aria-label="rounds"></progress>'
        return f"<div>{bar} {html.escape(repr(self))}</div>"

    def _show(self, event: Event) -> None:
        match event:
            case CallStarted():
                self._num_in_flight += 1
            case CallEnded():
                self._num_in_flight -= 1
            case RoundStarted(round_num=round_num, num_rounds=num_rounds):
                self._num_done, self._num_rounds = round_num, num_rounds
            case RoundEnded(round_num=round_num, num_rounds=num_rounds):
                self._num_done, self._num_rounds = round_num + 1, num_rounds
                self._metrics = "  ".join(self._describe(event))
            case _:
                return
        if (now := time.monotonic()) - self._shown_at > _REFRESH_S:
            self._shown_at = now
            self._handle.update(self)
