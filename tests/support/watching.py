"""A hydra callback that writes down what the process of a sweep holds after each job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from leftovers import held


class Watch(Callback):
    """Writes a line for each job: its processes, threads, descriptors, shared memory and temporary files.

    Args:
        path: where to.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def on_job_end(self, config: Any, job_return: Any, **kwargs: Any) -> None:
        """Write the line of a job; its folder is left out, so that equal lines are of equal jobs."""
        lines = [line.replace(config.hydra.runtime.output_dir, "") for line in sorted(held().elements())]
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(lines) + "\n")
