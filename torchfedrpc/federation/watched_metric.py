"""Metric that a callback watches: whether a round improves it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torchfedrpc.errors import ConfigError, suggest
from torchfedrpc.events import RoundEnded

_SIGNS = {"min": -1.0, "max": 1.0}
_ENDINGS = {"spread": -1.0} | {
    f"{metric}{of_clients}": sign
    for metric, sign in (("loss", -1.0), ("accuracy", 1.0))
    for of_clients in ("", "_weighted", "_worst_decile")
}
"""Ending of a metric's name -> its sign."""


def sign_of(metric: str) -> float | None:
    """Return 1 if higher values of a metric are better, -1 if lower ones are; None if its name does not tell."""
    return next((sign for ending, sign in _ENDINGS.items() if metric.endswith(ending)), None)


def check_target(owner: str, metric: str, target: float) -> None:
    """Check a target of a metric.

    Raises:
        ConfigError: If it is not finite, or outside 0 to 1 for an accuracy; the message begins with the owner.
    """
    if isinstance(target, bool) or not isinstance(target, int | float) or not math.isfinite(target):
        raise ConfigError(f"{owner}: target must be a finite number, not {target!r}")
    if "accuracy" in metric and not 0 < target <= 1:
        raise ConfigError(f"{owner}: the target of {metric} is above 0, up to 1, not {target!r}")


class WatchedMetric:
    """A metric, its best value so far, and the round that had it.

    Args:
        owner: Name of the callback, for error messages.
        name: Name of the metric.
        mode: ``min`` or ``max``. None: ``min`` if the name ends with ``loss`` or ``spread``, ``max`` if with
            ``accuracy``; also before ``_weighted`` and ``_worst_decile``.
        min_delta: A value improves the best one if it is better by more than this.

    Attributes:
        best: The best value; None before the first one.
        best_round: Its round.

    Raises:
        ConfigError: If ``mode`` is another one, or cannot be told from the name, or ``min_delta`` is negative.
    """

    def __init__(self, owner: str, name: str, mode: str | None, min_delta: float = 0.0) -> None:
        sign = sign_of(name) if mode is None else _SIGNS.get(mode)
        if mode is None and sign is None:
            raise ConfigError(f"{owner}: set mode to min or max, which the name of the metric {name} does not tell")
        if sign is None:
            raise ConfigError(f"{owner}: mode must be min or max, not {mode!r}")
        if not min_delta >= 0:
            raise ConfigError(f"{owner}: min_delta must be at least 0, not {min_delta!r}")
        self.name = name
        self.best: float | None = None
        self.best_round = -1
        self._owner = owner
        self._sign = sign
        self._min_delta = min_delta
        self._is_known = False  # whether a round has had the metric

    def is_improved_by(self, ended: RoundEnded) -> bool | None:
        """Compare the metric of a round with the best so far, and keep it if it is better; NaN is not.

        Returns:
            Whether it is better; None if this round does not have the metric, which an earlier one had.

        Raises:
            ConfigError: If no round has had the metric so far; the message names the nearest one.
        """
        if self.name not in ended.metrics:
            if self._is_known:
                return None
            hint = suggest(self.name, ended.metrics) if ended.metrics else ": publish tfr.RoundEnded with metrics"
            raise ConfigError(
                f"{self._owner}: the trainer published no metric {self.name!r} in round {ended.round_num}{hint}"
            )
        self._is_known = True
        value = float(ended.metrics[self.name])
        if math.isnan(value) or (self.best is not None and not self._sign * (value - self.best) > self._min_delta):
            return False
        self.best, self.best_round = value, ended.round_num
        return True

    def is_reached_by(self, ended: RoundEnded, target: float) -> bool:
        """Return whether a round has the metric, and it is at least as good as a target."""
        return self.name in ended.metrics and self._sign * (float(ended.metrics[self.name]) - target) >= 0

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and its round, and of which metric they are."""
        what = {"name": self.name, "sign": self._sign}
        return {**what, "best": self.best, "best_round": self.best_round, "is_known": self._is_known}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a result of `state_dict`.

        Raises:
            ConfigError: If it is of another metric, or mode.
        """
        if (state["name"], state["sign"]) != (self.name, self._sign):
            modes = {sign: mode for mode, sign in _SIGNS.items()}
            raise ConfigError(
                f"{self._owner} watches {self.name} (mode={modes[self._sign]}), and watched {state['name']} "
                f"(mode={modes[state['sign']]}) in the checkpoint: set it as it was, or begin anew with resume=never"
            )
        self.best, self.best_round, self._is_known = state["best"], state["best_round"], state["is_known"]
