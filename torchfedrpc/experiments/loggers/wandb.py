"""Weights & Biases, by its client."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from torchfedrpc.experiments import extras
from torchfedrpc.experiments.loggers.base import Outcome, RunLogger, name_of
from torchfedrpc.federation.callbacks import Run


class WandbLogger(RunLogger):
    """Logs to a run of Weights & Biases: settings as its config, metrics by round, files as an artifact, the status.

    A run that resumes goes on in the run with the same id. Offline it writes a second folder ``offline-run-*`` with
    that id; upload them one after another, with ``wandb sync --append``.

    Args:
        project: Name of the project.
        mode: ``offline`` writes to disk, for ``wandb sync`` later. ``online`` needs ``wandb login``.
        options: Further arguments of ``wandb.init``, such as ``name``, ``entity``, ``tags`` or ``dir``. The default
            of ``dir`` is the run's output folder.

    Raises:
        ConfigError: If wandb is not installed.
    """

    def __init__(
        self, project: str = "torchfedrpc", *, mode: str = "offline", options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        extras.require("wandb", "logger=wandb", extra="wandb")
        self._project, self._mode, self._options = project, mode, dict(options or {})

    def open(self, run: Run, settings: Mapping[str, Any]) -> None:
        """Begin the run, or go on with it."""
        import wandb  # noqa: PLC0415 - optional, and slow to import

        is_resumed = "run_id" in self.tracker_state
        self.tracker_state.setdefault("run_id", self._options.pop("id", None) or secrets.token_hex(4))
        options = {"dir": run.output_dir and run.output_dir.absolute(), "name": name_of(run), **self._options}
        self._run = wandb.init(
            project=self._project,
            mode=self._mode,  # type: ignore[arg-type]
            id=self.tracker_state["run_id"],
            resume="allow" if is_resumed and self._mode == "online" else None,
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True),
            **options,
        )
        self._run.config.update(dict(settings), allow_val_change=True)

    def write(self, round_num: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a round."""
        self._run.log(dict(metrics), step=round_num)

    def close(self, outcome: Outcome) -> None:
        """Log the files, and end the run with its status."""
        import wandb  # noqa: PLC0415

        if outcome.files:
            artifact = wandb.Artifact(f"run-{self._run.id}", type="run")
            for path in outcome.files:
                artifact.add_file(str(path))
            self._run.log_artifact(artifact)
        self._run.summary.update({"status": outcome.status, "reason": outcome.reason})
        self._run.finish(exit_code=0 if outcome.status == "finished" else 1)
