"""``torchfedrpc report``: the report of an output folder, of a run that was interrupted too."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments import extras
from torchfedrpc.experiments.history import HISTORY_FILE
from torchfedrpc.experiments.report.page import REPORT_FILE, write_report
from torchfedrpc.experiments.trace import TRACE_FILE
from torchfedrpc.run import cancel_end_report


def main(arguments: Sequence[str]) -> int:
    """Write a report and print its path.

    Returns:
        The exit status.

    Raises:
        ConfigError: If the folder has no files of a run.
    """
    parser = argparse.ArgumentParser("torchfedrpc report", description="Write a page about a run.")
    parser.add_argument("folder", type=Path, help="output folder of the run, which may be under way or interrupted")
    parser.add_argument("--output", type=Path, help=f"file to write (default: {REPORT_FILE} in the folder)")
    given = parser.parse_args(arguments)
    cancel_end_report()  # this process does not run a rank's script, even if a launcher's variables are set
    if not any((given.folder / name).exists() for name in (HISTORY_FILE, TRACE_FILE)):
        raise ConfigError(
            f"{given.folder} is no output folder of a run: it has neither {HISTORY_FILE} nor {TRACE_FILE}. Give the "
            f"folder that the run named in its last line, such as outputs/2026-01-31/12-00-00"
        )
    if note := extras.missing_line([("charts", "vl_convert")]):
        print(note)
    print(write_report(given.folder, given.output))
    return 0
