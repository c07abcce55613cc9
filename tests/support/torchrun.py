"""Scripts of tests, and their launches by torchrun, which end with the test."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from processes import Process

LOADING = """
class Trouble(Exception):
    pass

class Result:
    def __init__(self, values):
        self.values = values

class Loading:
    def __init__(self, client_id):
        self.data = torch.utils.data.TensorDataset(torch.arange(12.0))

    def load(self):
        loader = torch.utils.data.DataLoader(self.data, batch_size=3, num_workers=2, shuffle=True)
        return Result(sorted(value for (batch,) in loader for value in batch.tolist()))

    def fail(self):
        raise Trouble("of the script")

def has_loaded(results):
    return all(type(result) is Result and result.values == list(range(12)) for result in results.values())
"""
"""The part of a script with a learner, `Loading`, that loads data by processes, and classes of results and errors."""


def rank_variables(rank: int, local_rank: int, world_size: int, address: str, port: int) -> dict[str, str]:
    """The variables of a rank of another launcher than torchrun: srun, mpirun, and Lightning's."""
    values = {
        "RANK": rank,
        "LOCAL_RANK": local_rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }
    return {name: str(value) for name, value in values.items()}


def write_script(folder: Path, *parts: str) -> Path:
    """A script of these parts, with the usual imports."""
    head = """
        import asyncio, json, os, sys
        import torch
        import torchfedrpc as tfr
        from learners import Probe
    """
    path = folder / "script.py"
    path.write_text("".join(map(textwrap.dedent, (head, *parts))))
    return path


def launched(
    script: Path, *arguments: str, num_processes: int = 3, launcher: Sequence[str] = (), fresh: bool = False
) -> Process:
    """A launch under way; the end of its block kills what is left of it.

    Args:
        script: The script of all ranks.
        arguments: The arguments of the script.
        num_processes: The number of ranks.
        launcher: More arguments of torchrun.
        fresh: Whether interpreters must not have imported anything before.
    """
    torchrun = [sys.executable, *_flags(fresh), "-m", "torch.distributed.run", "--standalone"]
    return Process(*torchrun, f"--nproc-per-node={num_processes}", *launcher, str(script), *arguments)


def run_launch(
    script: Path,
    *arguments: str,
    num_processes: int = 3,
    launcher: Sequence[str] = (),
    fresh: bool = False,
    timeout_s: float = 100,
) -> tuple[int, str]:
    """A whole launch: its exit status and its output."""
    launch = launched(script, *arguments, num_processes=num_processes, launcher=launcher, fresh=fresh)
    return run_to_end(launch, timeout_s)


def run_script(script: Path, *arguments: str, fresh: bool = False, timeout_s: float = 120) -> tuple[int, str]:
    """A script without a launcher: its exit status and its output.

    Args:
        script: The script.
        arguments: The arguments of the script.
        fresh: Whether its interpreter must not have imported anything before.
        timeout_s: The time limit.
    """
    return run_to_end(Process(sys.executable, *_flags(fresh), str(script), *arguments), timeout_s)


def _flags(fresh: bool) -> list[str]:
    return ["-B"] if fresh else []  # any flag, see warm_python.py


def run_to_end(process: Process, timeout_s: float) -> tuple[int, str]:
    """Wait for the end of a process: its exit status and its output.

    Raises:
        AssertionError: If it does not end in time.
    """
    with process:
        try:
            return process.ended(timeout_s), process.output
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end within {timeout_s} s:\n{process.output}") from None
