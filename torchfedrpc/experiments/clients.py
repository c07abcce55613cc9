"""``clients.jsonl``: a line per client with its share of the training set and, at the end of a run, its score."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from torchfedrpc.experiments.json_values import json_number
from torchfedrpc.private_files import replaced
from torchfedrpc.proxy import LearnerProxy

CLIENTS_FILE = "clients.jsonl"

_MAX_CLASSES = 1000  # more are no classes but, for example, numbers to predict


class ClientLog:
    """The clients of a run, in memory and in a file.

    Args:
        path: The file, which is replaced.
        parts: Client id -> indices of its samples to train on, in the training set.
        labels: [num_samples]; the class of each sample. Labels that are no whole numbers are not counted.
        held_out: Client id -> indices of its held-out samples; None without.
    """

    def __init__(
        self,
        path: Path,
        parts: Mapping[str, npt.NDArray[np.int64]],
        labels: npt.NDArray[Any],
        held_out: Mapping[str, npt.NDArray[np.int64]] | None = None,
    ) -> None:
        self._path = path
        classes = np.unique(labels) if labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer) else labels[:0]
        self._records: dict[str, dict[str, Any]] = {}
        for client_id, indices in parts.items():
            record = self._records[client_id] = {"client": client_id, "num_samples": len(indices)}
            if held_out is not None:
                record["num_held_out"] = len(held_out[client_id])
            if 0 < len(classes) <= _MAX_CLASSES:
                found, counts = np.unique(labels[indices], return_counts=True)
                of_class = dict(zip(found.tolist(), counts.tolist(), strict=True))
                record["classes"] = {str(label): of_class.get(label, 0) for label in classes.tolist()}
        self._write()

    async def score(self, proxy: LearnerProxy, weights: Mapping[str, Any]) -> str | None:
        """Let each client's learner `evaluate` the weights on its samples, and add the results to the file.

        Returns:
            A line that names the first failure, or result without a number; None if there was none.
        """
        without: str | None = None
        results = await proxy.clients().options(on_error="collect").call("evaluate", model_weights=weights)
        for client_id, result in results.items():
            named = result if isinstance(result, Mapping) else {"score": result}
            if self._records[client_id].get("num_held_out") == 0:
                continue  # a score on no samples
            numbers = {str(name): _number(value) for name, value in named.items() if name != "num_samples"}
            scores = {name: number for name, number in numbers.items() if number is not None}
            self._records[client_id]["scores"] = scores
            if not scores:
                without = (
                    without or f"no score by {client_id}: evaluate returned {result!r:.200}, without a finite number"
                )
        self._write()
        for client_id, error in results.failures.items():
            counts = f"{len(results.failures)} of {len(self._records)} clients"
            return (
                f"no score by {counts}: {client_id}: {type(error).__name__}: {error} (client_scores=false skips this)"
            )
        return without

    def _write(self) -> None:
        with replaced(self._path) as file:
            for record in self._records.values():
                file.write(json.dumps(record).encode() + b"\n")


def _number(value: Any) -> float | None:
    """Return a score as a number; None if it is none, or not finite."""
    try:
        return json_number(value)
    except TypeError:
        return None
