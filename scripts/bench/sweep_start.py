"""How soon the next job of a sweep starts: from the end of a job to the first call on a worker, with its data."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

LEARNER = """
import time
from torchfedrpc.experiments.learners.classification import ClassificationLearner

class Timed(ClassificationLearner):
    def train_epoch(self, *args, **kwargs):
        self._train_set()
        with open("calls.txt", "a") as file:
            print(self._seed, time.time(), file=file)
        return super().train_epoch(*args, **kwargs)
"""


def main() -> None:
    """Run a sweep over seeds in pseudo mode, and print the starts of all jobs but the first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=10, help="number of jobs after the first")
    parser.add_argument("--same-data", action="store_true", help="one data set for all seeds")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "timed.py").write_text(LEARNER)
        seeds = ",".join(map(str, range(options.jobs + 1)))
        overrides = [f"seed={seeds}", "runtime=pseudo", "learner._target_=timed.Timed", "trainer.num_rounds=1"]
        overrides += ["baseline=null"]
        overrides += ["dataset.seed=0"] if options.same_data else []
        command = [sys.executable, "-m", "torchfedrpc", "-m", *overrides, "hydra.sweep.dir=sweep"]
        output = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
        if output.returncode != 0:
            sys.exit(output.stdout + output.stderr)
        first_calls: dict[int, float] = {}
        for line in (folder / "calls.txt").read_text().splitlines():
            seed, moment = line.split()
            first_calls.setdefault(int(seed), float(moment))
        ends = [os.stat(folder / "sweep" / str(job) / "job.json").st_mtime for job in range(options.jobs)]
        starts = [first_calls[job + 1] - end for job, end in enumerate(ends)]
    print(json.dumps([round(start, 3) for start in starts]))
    print(
        f"mean {statistics.mean(starts):.3f} s, median {statistics.median(starts):.3f} s, load {os.getloadavg()[0]}"
    )


if __name__ == "__main__":
    main()
