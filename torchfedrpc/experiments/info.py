"""``torchfedrpc info``: facts that a bug report or a measurement should state."""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from collections.abc import Sequence

import numpy as np
import torch

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError
from torchfedrpc.host.process import num_usable_cores
from torchfedrpc.rpc import world
from torchfedrpc.rpc.backend import torch_rpc
from torchfedrpc.run import leave_no_word
from torchfedrpc.version import __version__

_DESCRIPTION = (
    "Print the versions, the machine and the transport between processes; torchfedrpc --help is of experiments."
)


def main(arguments: Sequence[str]) -> int:
    """Print the facts.

    Returns:
        The exit status.
    """
    leave_no_word()  # this process does not run a rank's script, even if a launcher's variables are set
    argparse.ArgumentParser("torchfedrpc info", description=_DESCRIPTION).parse_args(arguments)
    print(describe())
    return 0


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
