"""CSV file with a row per round."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchfedrpc.experiments.loggers.base import Outcome, RunLogger, output_path
from torchfedrpc.federation.callbacks import Run
from torchfedrpc.private_files import replaced


class CsvLogger(RunLogger):
    """Writes a row per round, with all metrics as columns.

    Args:
        path: The file. Default: ``metrics.csv`` in the run's output folder.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        super().__init__()
        self._given = path

    def open(self, run: Run, settings: Mapping[str, Any]) -> None:
        """Write the rows of a run that resumes."""
        self._path = output_path(self, self._given, run, "metrics.csv")
        self._rows: list[dict[str, float]] = self.tracker_state.setdefault("rows", [])
        self._write_all(self._rows)

    def write(self, round_num: int, metrics: Mapping[str, float]) -> None:
        """Append a row. A new metric is a new column of the whole file."""
        row = {"round": round_num, **metrics}
        if row.keys() <= set(self._columns):
            with self._path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns).writerow(row)
        else:
            self._write_all([*self._rows, row])
        self._rows.append(row)

    def close(self, outcome: Outcome) -> None:
        """Do nothing: the file is closed after each row."""

    def _write_all(self, rows: list[dict[str, float]]) -> None:
        self._columns = list({name: None for row in rows for name in row})
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns)
        writer.writeheader()
        writer.writerows(rows)
        with replaced(self._path) as file:
            file.write(text.getvalue().encode())
