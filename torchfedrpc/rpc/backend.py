"""The only import of torch.distributed.rpc. Other modules of this folder get it from here."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import torch

from torchfedrpc.errors import ConfigError

try:
    import torch.distributed.rpc as _rpc
except ImportError:  # some builds of torch have no distributed package
    _rpc = None  # type: ignore[assignment]


def torch_rpc() -> Any:
    """Return the module torch.distributed.rpc.

    Raises:
        ConfigError: If this build of torch has none.
    """
    if _rpc is None or not _rpc.is_available():
        raise ConfigError(
            "this build of torch has no torch.distributed.rpc, which pseudo and distributed mode need: set "
            "runtime.execution_mode=local, or install torch for Linux or macOS"
        )
    return _rpc


def async_entry(function: Any) -> Any:
    """Mark an entry point that returns a future of its result."""
    if _rpc is None or not _rpc.is_available():
        return function
    marked: Any = _rpc.functions.async_execution  # untyped there
    return marked(function)


def set_connection_warnings(shown: bool) -> None:
    """Enable or disable the warnings of torch's C++ code about connections that end (enabled by default).

    The end of a world closes all connections, and the loss of a worker is reported by our own error. If the user has
    set TORCH_CPP_LOG_LEVEL, which torch reads when it is imported, that holds.
    """
    if "TORCH_CPP_LOG_LEVEL" in os.environ:
        return
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    try:
        level = ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "FLAGS_caffe2_log_level")
    except (OSError, ValueError):  # a build that names it otherwise keeps its warnings
        return
    level.value = 1 if shown else 2
