"""``torchfedrpc info``: facts that a bug report or a measurement should state, and a call in each mode."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import numpy as np
import torch

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError
from torchfedrpc.host.process import num_usable_cores
from torchfedrpc.launcher import Launch
from torchfedrpc.proxy import LearnerProxy
from torchfedrpc.rpc import world
from torchfedrpc.rpc.backend import torch_rpc
from torchfedrpc.run import cancel_end_report, run
from torchfedrpc.version import __version__

_DESCRIPTION = (
    "Print the versions, the machine and the transport between processes, and make a call in each mode; torchfedrpc "
    "--help describes experiments."
)
_TIMEOUT_S = 90.0  # of the launch by torchrun
_NUM_CALLS = 20
_LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


class Caller:
    """Learner of the calls.

    Args:
        client_id: Its client.
    """

    def __init__(self, client_id: str) -> None:
        self.client_id = client_id

    def pid(self) -> int:
        """Return the id of the process that runs this."""
        return os.getpid()


def main(arguments: Sequence[str]) -> int:
    """Print the facts, then a line for each mode.

    Returns:
        The exit status: 1 if a call failed.
    """
    parser = argparse.ArgumentParser("torchfedrpc info", description=_DESCRIPTION)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)  # of the launch that this starts
    if parser.parse_args(arguments).rank:
        if (line := run(_timed_call, "distributed")) is not None:
            print(line, flush=True)
        return 0
    cancel_end_report()  # this process does not run a rank's script, even if a launcher's variables are set
    print(describe(), flush=True)
    if Launch.from_environment() is not None:
        print("no calls are made under a launcher: run torchfedrpc info without torchrun")
        return 0
    status = 0
    for mode in ("local", "pseudo", "distributed"):
        try:
            took = _launched_call() if mode == "distributed" else run(_timed_call, mode)
        except Exception as error:  # whatever it is, the other modes are of interest too
            took, status = f"failed: {type(error).__name__}: {error}", 1
        print(f"{f'a call in {mode} mode:':<29}{took}", flush=True)
    return status


def describe() -> str:
    """Return one line per fact."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    facts = {
        "torchfedrpc": __version__,
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, CPU capability {torch.backends.cpu.get_cpu_capability()}",
        "numpy": np.__version__,
        "system": platform.platform(),
        "cores": f"{num_usable_cores()} of {os.cpu_count()}",
        "GPUs": ", ".join(gpus) or "none",
        "calls between processes": _transport(),
        "snapshots on disk": tempfile.gettempdir(),
    }
    return "\n".join(f"{name + ':':<25}{fact}" for name, fact in facts.items())


def _transport() -> str:
    try:
        torch_rpc()
    except ConfigError as error:
        return f"not available: {error}"
    transport, channels = world.choose_transport(RuntimeConfig())
    return f"TensorPipe, transport {transport}, channels {' '.join(channels)} (runtime.transport, runtime.channels)"


async def _timed_call(mode: str) -> str:
    """Return what a call in a mode takes: the first one, which starts the workers, and the median of more."""
    begun = time.perf_counter()
    runtime = RuntimeConfig(execution_mode=mode, num_processes=1 if mode == "pseudo" else None)
    async with LearnerProxy(Caller, ["client_1"], runtime=runtime) as proxy:
        caller = proxy.client("client_1")
        pid = await caller.pid()
        first_s = time.perf_counter() - begun
        seconds = []
        for _ in range(_NUM_CALLS):
            before = time.perf_counter()
            await caller.pid()
            seconds.append(time.perf_counter() - before)
    where = "in this process" if pid == os.getpid() else "in a worker"
    return f"{1000 * statistics.median(seconds):.2f} ms {where}; the first after {first_s:.2f} s"


def _launched_call() -> str:
    """Return what a call takes under torchrun, from a launch of two ranks.

    Raises:
        ConfigError: If the launch fails, or takes too long.
    """
    command = [sys.executable, *_LAUNCH, "-m", "torchfedrpc", "info", "--rank"]
    launch = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    try:
        output, errors = launch.communicate(timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"the launch took more than {_TIMEOUT_S:.0f} s: {' '.join(command)}") from None
    finally:
        if launch.poll() is None:
            launch.terminate()  # torchrun ends its ranks
            launch.communicate()
    lines = output.strip().splitlines()
    if launch.returncode != 0 or not lines:
        told = [line for line in errors.splitlines() if line.startswith("torchfedrpc:")] or errors.splitlines()[-1:]
        raise ConfigError(f"the launch ended with status {launch.returncode}: {' '.join(told)}")
    return lines[-1]
