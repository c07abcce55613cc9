"""Best model: the weights of the round with the best metric, in a file."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchfedrpc.errors import ConfigError, suggest
from torchfedrpc.events import RoundEnded
from torchfedrpc.federation.callbacks import Callback, Run
from torchfedrpc.federation.watched_metric import WatchedMetric
from torchfedrpc.private_files import replaced


class BestModel(Callback):
    """Saves the trainer's ``weights`` whenever a metric is better than in all rounds before.

    The file is a dict, which ``torch.load(path, weights_only=True)`` loads: ``weights`` (a state dict, on the CPU),
    ``metric`` (its name), ``value``, ``round`` (from 0), and ``metrics`` (all of that round).

    Args:
        metric: Name of a metric in `RoundEnded`.
        mode: ``min`` or ``max``. Default: ``min`` if the name ends with ``loss``, ``max`` if with ``accuracy``.
        path: The file. Default: ``best.pt`` in the run's output folder.
        weights: Name of the trainer's attribute with the weights, a state dict or a module.

    Raises:
        ConfigError: If a setting is invalid; at the start of the run, if there is no folder or the trainer has no
            such attribute; at the end of the first round, if it has no such metric.
    """

    def __init__(
        self,
        metric: str = "test_accuracy",
        *,
        mode: str | None = None,
        path: str | Path | None = None,
        weights: str = "weights",
    ) -> None:
        self._watched = WatchedMetric("BestModel", metric, mode)
        self._path = None if path is None else Path(path)
        self._weights = weights
        self._best: dict[str, Any] | None = None  # what the file has

    def on_run_start(self, run: Run) -> None:
        """Write the file of a run that resumes."""
        if self._path is None:
            if run.output_dir is None:
                raise ConfigError("BestModel has no folder: give it path=..., or set trainer.output_dir")
            self._path = run.output_dir / "best.pt"
        if not hasattr(run.trainer, self._weights):
            raise ConfigError(
                f"BestModel: {type(run.trainer).__qualname__} has no attribute {self._weights!r}"
                f"{suggest(self._weights, vars(run.trainer))}; set weights to the attribute with the model"
            )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._best is None:
            self._path.unlink(missing_ok=True)  # of another run
        else:
            self._write()

    async def on_round_end(self, run: Run, ended: RoundEnded) -> None:
        """Save the weights if the metric is better."""
        if self._watched.is_improved_by(ended):
            self._best = {
                "weights": _state_dict(getattr(run.trainer, self._weights)),
                "metric": self._watched.name,
                "value": self._watched.best,
                "round": ended.round_num,
                "metrics": {name: float(value) for name, value in ended.metrics.items()},
            }
            await asyncio.to_thread(self._write)

    def _write(self) -> None:
        assert self._path is not None
        with replaced(self._path) as file:
            torch.save(self._best, file)

    def state_dict(self) -> dict[str, Any]:
        """Return the best metric, and the content of the file."""
        return {"watched": self._watched.state_dict(), "best": self._best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a result of `state_dict`."""
        self._watched.load_state_dict(state["watched"])
        self._best = state["best"]


def _state_dict(weights: Any) -> dict[str, Tensor]:
    """Return a copy of a model's weights on the CPU."""
    found = weights.state_dict() if isinstance(weights, torch.nn.Module) else weights
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in found.items()}
