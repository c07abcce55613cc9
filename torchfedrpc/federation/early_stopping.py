"""Early stopping: the run ends when a metric has not improved for some rounds, or has reached a target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchfedrpc.errors import ConfigError
from torchfedrpc.events import RoundEnded
from torchfedrpc.federation.callbacks import Callback, Run
from torchfedrpc.federation.watched_metric import WatchedMetric, check_target


class EarlyStopping(Callback):
    """Stops the run after ``patience`` rounds in a row without a better metric, or once it has reached ``target``.

    A run that resumes counts on.

    Args:
        metric: Name of a metric in `RoundEnded`. Rounds without it do not count, once a round has had it.
        mode: ``min`` or ``max``. Default: ``min`` if the name ends with ``loss``, ``max`` if with ``accuracy``.
        patience: Number of rounds, at least 1; None never stops for want of a better metric.
        min_delta: A metric is better if it exceeds the best one by more than this, in its own unit.
        target: Value that ends the run when the metric is at least as good; above 0, up to 1, for an accuracy.

    Attributes:
        metric: Name of the metric.
        target: The target.
        num_rounds_to_target: Number of rounds until the target was reached; None if it was not.

    Raises:
        ConfigError: If a setting is invalid; at the end of the first round, if it has no such metric.
    """

    def __init__(
        self,
        metric: str = "test_loss",
        *,
        mode: str | None = None,
        patience: int | None = 10,
        min_delta: float = 0.0,
        target: float | None = None,
    ) -> None:
        if patience is not None and (not isinstance(patience, int) or isinstance(patience, bool) or patience < 1):
            raise ConfigError(f"EarlyStopping: patience must be a whole number of at least 1, not {patience!r}")
        if patience is None and target is None:
            raise ConfigError("EarlyStopping without patience and target never stops: set one of them")
        if target is not None:
            check_target("EarlyStopping", metric, target)
        self.metric = metric
        self.target = target
        self.num_rounds_to_target: int | None = None
        self._watched = WatchedMetric("EarlyStopping", metric, mode, min_delta)
        self._patience = patience
        self._num_worse = 0

    def on_round_end(self, run: Run, ended: RoundEnded) -> None:
        """Stop the run if the target is reached, or the patience is over."""
        is_better = self._watched.is_improved_by(ended)
        if is_better is not None:
            self._num_worse = 0 if is_better else self._num_worse + 1
        if self.target is not None and self._watched.is_reached_by(ended, self.target):
            self.num_rounds_to_target = ended.round_num + 1
            run.stop(f"{self.metric} has reached its target {self.target:g}: it is {ended.metrics[self.metric]:.6g}")
        elif self._patience is not None and self._num_worse >= self._patience:
            best = self._watched.best
            found = (
                f"the best was {best:.6g} in round {self._watched.best_round + 1}"
                if best is not None
                else "it was NaN"
            )
            rounds = "a round" if self._num_worse == 1 else f"{self._num_worse} rounds"
            run.stop(f"{self._watched.name} has not improved for {rounds}; {found}")

    def state_dict(self) -> dict[str, Any]:
        """Return the best metric, the number of rounds since, and when the target was reached."""
        return {
            "watched": self._watched.state_dict(),
            "num_worse": self._num_worse,
            "num_rounds_to_target": self.num_rounds_to_target,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a result of `state_dict`."""
        self._watched.load_state_dict(state["watched"])
        self._num_worse = state["num_worse"]
        self.num_rounds_to_target = state.get("num_rounds_to_target")
