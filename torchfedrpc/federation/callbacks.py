"""Callbacks: the methods that a run calls at its start, its events, its rounds and its end."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torchfedrpc.events import Event, RoundEnded
from torchfedrpc.proxy import LearnerProxy


@dataclass(eq=False)
class Run:
    """A run of a trainer, as its callbacks see it.

    Attributes:
        config: The run's settings. In the ``torchfedrpc`` command the whole resolved configuration, else the
            trainer's config.
        proxy: The proxy of the learners. The command has closed it by `Callback.on_run_end`.
        trainer: The trainer; Any, since callbacks read attributes of its subclass, such as ``weights``.
        output_dir: Folder for files of the run; None if the trainer has none.
        first_round: Number of the first round; above 0 if the run resumes from a checkpoint.
        stop_reason: Why the run stops early; None if it does not.
    """

    config: Mapping[str, Any]
    proxy: LearnerProxy
    trainer: Any
    output_dir: Path | None = None
    first_round: int = 0
    stop_reason: str | None = None

    def stop(self, reason: str) -> None:
        """End the run after the present round, with a checkpoint if it has checkpoints. The first reason counts.

        In `Callback.on_run_start` it ends the run before its next round. A run that resumes from its last checkpoint
        stays stopped, unless the callback that stopped it is left out.

        Args:
            reason: The reason, for the log.
        """
        self.stop_reason = self.stop_reason or reason


class Callback:
    """Base class of callbacks: every method does nothing until a subclass overrides it.

    Set them before `train`: ``trainer.callbacks = [MyCallback()]``. Their methods run on the event loop, in the order
    of the list, and all but `on_event` may be ``async``; a plain method that takes long delays the calls of learners.
    A callback with ``state_dict()`` and ``load_state_dict(state)`` has its state, which must be plain data, in the
    checkpoints; a run that resumes restores it before `on_run_start`.

    An exception ends the run: that of `on_run_start` at once, that of `on_event` at the end of the round.

    Attributes:
        may_fail: Whether an exception after `on_run_start` is only logged, and the run goes on. Loggers set it.
    """

    may_fail: ClassVar[bool] = False

    def on_run_start(self, run: Run) -> Awaitable[None] | None:
        """Called once, before the first round, or before the first remaining round of a run that resumes."""

    def on_round_end(
        self, run: Run, ended: RoundEnded
    ) -> Awaitable[Mapping[str, float] | None] | Mapping[str, float] | None:
        """Called at the end of each round, before its checkpoint.

        Args:
            run: The run.
            ended: The event that the trainer published in this round; without metrics if it published none. It has
                the metrics that callbacks before this one returned.

        Returns:
            Further metrics of the round, for the callbacks after this one; None for none.
        """

    def on_event(self, run: Run, event: Event) -> None:
        """Called for each event between `on_run_start` and `on_run_end`, at once."""

    def on_run_end(self, run: Run, error: BaseException | None) -> Awaitable[None] | None:
        """Called once, if `on_run_start` returned.

        Args:
            run: The run.
            error: The exception that ended the run; `asyncio.CancelledError` after Ctrl-C. None if all rounds are
                done, or `Run.stop` ended it.
        """
