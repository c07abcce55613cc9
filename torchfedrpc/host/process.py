"""What a process that takes part in a run has set for its whole self."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from torchfedrpc.config import RuntimeConfig


@contextmanager
def process_settings(runtime: RuntimeConfig) -> Iterator[None]:
    """Set torch's threads and determinism as the configuration says; what was before comes back at the end.

    The driver needs the same settings as the workers: what it computes itself (an aggregate, a test score) has
    other last bits with another number of threads.
    """
    num_threads = torch.get_num_threads()
    makes_deterministic = runtime.deterministic and not torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(runtime.torch_threads)
    if makes_deterministic:  # even setting what is set imports torch's compiler, which takes seconds
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS refuses to be deterministic
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
        if makes_deterministic:
            torch.use_deterministic_algorithms(False)


@contextmanager
def frozen_modules() -> Iterator[None]:
    """Keep Python's garbage collector from what a worker has imported: torch and all modules.

    It would look through them again and again as calls come and go, which takes as long as the calls. For workers
    alone: in the user's own process, garbage that is there already would not be freed.
    """
    gc.collect()  # else cyclic garbage would be frozen as well
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def visible_gpus() -> str | None:
    """Which GPUs the process is limited to, as CUDA reads it; None for all."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def choose_device(local_index: int) -> torch.device:
    """The device of the worker with that number on its machine: GPUs in turn, the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_index % torch.cuda.device_count())
