"""The one import of torch.distributed.rpc; everything else here asks this module for it."""

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
    """The module torch.distributed.rpc.

    Raises:
        ConfigError: this build of torch has none.
    """
    if _rpc is None or not _rpc.is_available():
        raise ConfigError(
            "this build of torch has no torch.distributed.rpc, which pseudo and distributed mode need: set "
            "runtime.execution_mode=local, or install torch for Linux or macOS"
        )
    return _rpc


def async_entry(function: Any) -> Any:
    """Mark a function that others invoke by RPC as one that returns a future of its result."""
    if _rpc is None or not _rpc.is_available():
        return function
    marked: Any = _rpc.functions.async_execution  # untyped there
    return marked(function)


def set_connection_warnings(shown: bool) -> None:
    """Let torch's C++ code warn (its default) of every connection that ends, or not.

    A world's end closes all connections, and a lost worker is told by our own error. torch reads
    TORCH_CPP_LOG_LEVEL once, when it is imported; who has set that, has it.
    """
    if "TORCH_CPP_LOG_LEVEL" in os.environ:
        return
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    try:
        level = ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "FLAGS_caffe2_log_level")
    except (OSError, ValueError):  # a build that names it otherwise keeps its warnings
        return
    level.value = 1 if shown else 2
