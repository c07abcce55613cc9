"""MLflow, by its client."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torchfedrpc.experiments import extras
from torchfedrpc.experiments.loggers.base import Outcome, RunLogger, name_of
from torchfedrpc.federation.callbacks import Run

_STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
_BATCH = 100  # parameters in one request, MLflow's limit
_VALUE_LENGTH = 6000  # of a parameter, MLflow's limit


class MlflowLogger(RunLogger):
    """Logs to a run of MLflow: settings as parameters, metrics by round, files as artifacts, and the status.

    A run that resumes goes on in its run of MLflow. A setting that has changed since is a tag ``resumed.NAME``, as
    MLflow keeps parameters as they are.

    Args:
        experiment: Name of the experiment, which is created if it does not exist.
        run_name: Name of the run. Default: the last two parts of its output folder.
        tracking_uri: Where MLflow keeps runs: the address of a server, or ``sqlite:///FILE``. Default: As for MLflow,
            ``MLFLOW_TRACKING_URI`` or a file in the working directory.
        tags: Tags of the run.

    Raises:
        ConfigError: If mlflow is not installed.
    """

    def __init__(
        self,
        experiment: str = "torchfedrpc",
        *,
        run_name: str | None = None,
        tracking_uri: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        extras.require("mlflow", "logger=mlflow", extra="mlflow")
        self._experiment, self._run_name, self._tracking_uri = experiment, run_name, tracking_uri
        self._tags = dict(tags or {})

    def open(self, run: Run, settings: Mapping[str, Any]) -> None:
        """Create the run, or set it to running again."""
        from mlflow import MlflowClient  # noqa: PLC0415 - optional, and slow to import
        from mlflow.entities import Param  # noqa: PLC0415

        self._client = MlflowClient(self._tracking_uri)
        given = {key: str(value)[:_VALUE_LENGTH] for key, value in settings.items()}
        if "run_id" not in self.tracker_state:
            found = self._client.get_experiment_by_name(self._experiment)
            number = found.experiment_id if found else self._client.create_experiment(self._experiment)
            created = self._client.create_run(number, tags=self._tags, run_name=self._run_name or name_of(run))
            self.tracker_state.update(run_id=created.info.run_id, num_rounds=0)
        self._run_id = self.tracker_state["run_id"]
        params = self._client.get_run(self._run_id).data.params
        new = [Param(key, value) for key, value in given.items() if key not in params]
        for start in range(0, len(new), _BATCH):
            self._client.log_batch(self._run_id, params=new[start : start + _BATCH])
        for key, value in given.items():
            if params.get(key, value) != value:
                self._client.set_tag(self._run_id, f"resumed.{key}", value)
        self._client.update_run(self._run_id, status="RUNNING")
        self._num_logged = self._last_step() + 1

    def write(self, round_num: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a round, unless MLflow has them from before a resume."""
        from mlflow.entities import Metric  # noqa: PLC0415

        if round_num >= self._num_logged:
            now = int(time.time() * 1000)
            self._client.log_batch(
                self._run_id, metrics=[Metric(name, value, now, round_num) for name, value in metrics.items()]
            )

    def close(self, outcome: Outcome) -> None:
        """Log the files, and end the run with its status."""
        for path in outcome.files:
            self._client.log_artifact(self._run_id, str(path))
        if outcome.reason:
            self._client.set_tag(self._run_id, "end", outcome.reason[:_VALUE_LENGTH])
        self._client.set_terminated(self._run_id, _STATUS[outcome.status])

    def _last_step(self) -> int:
        """Return the last round that MLflow has; -1 if it has none."""
        names = self._client.get_run(self._run_id).data.metrics
        steps = (point.step for name in names for point in self._client.get_metric_history(self._run_id, name))
        return max(steps, default=-1)
