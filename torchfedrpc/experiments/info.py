"""Report of ``torchfedrpc info``: versions, the machine, and the transport of calls between processes."""

from __future__ import annotations

import os
import platform
import tempfile

import numpy as np
import torch

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError
from torchfedrpc.host.process import num_usable_cores
from torchfedrpc.rpc import world
from torchfedrpc.rpc.backend import torch_rpc
from torchfedrpc.version import __version__


def describe() -> str:
    """Return one line per fact that a bug report or a measurement should state."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    facts = {
        "torchfedrpc": __version__,
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, CPU capability {torch.backends.cpu.get_cpu_capability()}",
        "numpy": np.__version__,
        "system": platform.platform(),
        "cores": f"{num_usable_cores()} of {os.cpu_count()}",
        "GPUs": ", ".join(gpus) or "none",
        "calls between processes": _road(),
        "snapshots on disk": tempfile.gettempdir(),
    }
    return "\n".join(f"{name + ':':<25}{fact}" for name, fact in facts.items())


def _road() -> str:
    try:
        torch_rpc()
    except ConfigError as error:
        return f"not available: {error}"
    transport, channels = world.choose_transport(RuntimeConfig())
    return f"TensorPipe, transport {transport}, channels {' '.join(channels)} (runtime.transport, runtime.channels)"
