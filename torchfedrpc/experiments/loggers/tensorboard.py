"""TensorBoard, by torch.utils.tensorboard."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchfedrpc.experiments import extras
from torchfedrpc.experiments.loggers.base import Outcome, RunLogger, output_path
from torchfedrpc.federation.callbacks import Run

_END = ".end"  # suffix of the file with the status


class TensorBoardLogger(RunLogger):
    """Writes the metrics as scalars, and the settings as hyperparameters, with the status of the run.

    A run that resumes in the same folder goes on there; rounds that it repeats replace the earlier ones.

    Args:
        path: The folder. Default: ``tensorboard`` in the run's output folder.

    Raises:
        ConfigError: If tensorboard is not installed.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        super().__init__()
        extras.require("tensorboard", "logger=tensorboard")
        self._given = path

    def open(self, run: Run, settings: Mapping[str, Any]) -> None:
        """Open the folder, and write the settings."""
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - optional
        from torch.utils.tensorboard.summary import hparams  # noqa: PLC0415

        folder = output_path(self, self._given, run, "tensorboard")
        for path in folder.glob(f"*{_END}"):
            path.unlink()  # TensorBoard takes the first status that it finds, which is that of before the resume
        self._folder = str(folder)
        self._writer = SummaryWriter(self._folder, purge_step=run.first_round or None)
        known = {
            key: value if isinstance(value, bool | int | float) else str(value) for key, value in settings.items()
        }
        _, start, _ = hparams(known, {})
        self._writer._get_file_writer().add_summary(start)
        self._writer.flush()

    def write(self, round_num: int, metrics: Mapping[str, float]) -> None:
        """Write the scalars of a round."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, round_num)
        self._writer.flush()

    def close(self, outcome: Outcome) -> None:
        """Write the status and the reason."""
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

        if outcome.reason:
            self._writer.add_text("end", f"{outcome.status}: {outcome.reason}")
        self._writer.close()
        with SummaryWriter(self._folder, filename_suffix=_END) as writer:
            writer._get_file_writer().add_summary(_session_end(outcome.status == "finished"))


def _session_end(is_success: bool) -> Any:
    """Return the summary that ends a session of the HParams plugin; torch's has no status but success."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata  # noqa: PLC0415 - optional
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2  # noqa: PLC0415

    status = api_pb2.STATUS_SUCCESS if is_success else api_pb2.STATUS_FAILURE
    end = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
    content = plugin_data_pb2.HParamsPluginData(session_end_info=end, version=metadata.PLUGIN_DATA_VERSION)
    data = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME, content=content.SerializeToString())
    value = Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=SummaryMetadata(plugin_data=data))
    return Summary(value=[value])
