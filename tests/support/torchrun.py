"""Start torchrun in a test, and end it and all its ranks with the test."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from processes import children_of, environment


def rank_variables(rank: int, local_rank: int, world_size: int, address: str, port: int) -> dict[str, str]:
    """What a launcher that is not torchrun gives a rank: srun, mpirun, and Lightning's."""
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


@contextlib.contextmanager
def launched(
    script: Path, *arguments: str, num_processes: int = 3, launcher: Sequence[str] = ()
) -> Iterator[subprocess.Popen[str]]:
    """A launch under way; what is left of it is killed at the end.

    Args:
        script: what all ranks run.
        arguments: the script's.
        num_processes: the ranks.
        launcher: more arguments for torchrun.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    command += launcher
    process = subprocess.Popen(
        [*command, str(script), *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        _kill(process)
        process.communicate()


def _kill(process: subprocess.Popen[str]) -> None:
    """Kill a launch and its ranks, where it is still there."""
    if process.poll() is not None:
        return
    for pid in [*children_of(process.pid), process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def run_launch(
    script: Path,
    *arguments: str,
    num_processes: int = 3,
    launcher: Sequence[str] = (),
    timeout_s: float = 100,
) -> tuple[int, str]:
    """A whole launch: its exit status and its output."""
    with launched(script, *arguments, num_processes=num_processes, launcher=launcher) as process:
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            _kill(process)
            output, _ = process.communicate()
            raise AssertionError(f"the launch did not end within {timeout_s} s:\n{output}") from None
        return process.returncode, output


def run_script(script: Path, *arguments: str, fresh: bool = False, timeout_s: float = 120) -> tuple[int, str]:
    """A script on its own, without a launcher: its exit status and its output.

    Args:
        script: what runs.
        arguments: the script's.
        fresh: whether its interpreter must not have imported anything before.
        timeout_s: within which it has to end.
    """
    done = subprocess.run(
        [sys.executable, *(["-B"] if fresh else []), str(script), *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    return done.returncode, done.stdout
