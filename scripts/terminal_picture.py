"""A picture of the view that a terminal shows during a run, made by a callback: see scripts/screenshots."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

from rich.console import Group
from rich.text import Text

import torchfedrpc as tfr
from torchfedrpc.experiments.progress.run_status import RunStatus
from torchfedrpc.experiments.progress.terminal_view import Workers, save_picture, view_of

_WIDTH = 100
_ROUND = 8


class TerminalPicture(tfr.Callback):
    """Saves the view amid a round. It kills a worker before that, so that a loss and a return are in the picture.

    Args:
        path: The picture, ``.svg`` or ``.png``.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._status = RunStatus()
        self._workers = Workers()
        self._log = _Lines()
        self._num_viewed = 0  # rounds

    def on_run_start(self, run: tfr.Run) -> None:
        """Keep what is logged."""
        logging.getLogger("torchfedrpc").addHandler(self._log)

    def on_round_end(self, run: tfr.Run, ended: tfr.RoundEnded) -> None:
        """Kill a worker some rounds before the picture."""
        if ended.round_num == _ROUND - 4:
            os.kill(run.proxy.stats()["workers"]["worker2"]["pid"], signal.SIGKILL)

    def on_event(self, run: tfr.Run, event: tfr.Event) -> None:
        """Follow the run; save the view when half of the clients of the round have answered."""
        self._status.add(event)
        num_done = self._status.num_done
        if num_done not in (_ROUND - 1, _ROUND) or num_done == self._num_viewed or self._status.num_in_flight != 5:
            return
        self._num_viewed = num_done
        view = view_of(self._status, run.proxy.stats(), self._workers, _WIDTH)
        if num_done == _ROUND:
            save_picture(Group(*self._log.lines, view, ""), self._path)

    def on_run_end(self, run: tfr.Run, error: BaseException | None) -> None:
        """Keep no more of what is logged."""
        logging.getLogger("torchfedrpc").removeHandler(self._log)


class _Lines(logging.Handler):
    """Keeps what is logged, as the command shows it."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter("[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"))
        self.lines: list[Text] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(Text(self.format(record)))
