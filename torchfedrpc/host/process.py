"""Process-wide settings of a run: torch's threads and determinism, the garbage collector, the device."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from torchfedrpc.config import RuntimeConfig


@contextmanager
def process_settings(runtime: RuntimeConfig) -> Iterator[None]:
    """Set torch's threads and determinism as configured, and restore them at the end.

    The driver needs the settings of the workers: with another number of threads, aggregates and scores that it
    computes itself would differ in their last bits.
    """
    num_threads = torch.get_num_threads()
    makes_deterministic = runtime.deterministic and not torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(runtime.torch_threads)
    if makes_deterministic:  # setting it imports torch's compiler, which takes seconds, also if it is set already
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
    """Exclude the objects of imported modules from garbage collection, in a worker.

    A full collection visits all objects of torch, which takes as long as many calls. The user's process is left
    alone, since existing garbage there would never be freed.
    """
    gc.collect()  # else cyclic garbage would be frozen as well
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def visible_gpus() -> str | None:
    """Return the GPUs that this process can use (``CUDA_VISIBLE_DEVICES``); None for all."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def choose_device(local_index: int) -> torch.device:
    """Return the device of a worker by its number on its machine: GPUs in turn, or the CPU without a GPU."""
    devices = visible_devices()
    return devices[local_index % len(devices)]


def visible_devices() -> list[torch.device]:
    """Return the GPUs that this process can use, or the CPU without a GPU."""
    if not torch.cuda.is_available():
        return [torch.device("cpu")]
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def default_num_workers(workers_per_device: int) -> int:
    """Return the number of worker processes that keep this machine busy: so many per GPU, or one per core."""
    if torch.cuda.is_available():
        return torch.cuda.device_count() * workers_per_device
    return num_usable_cores()


def num_usable_cores() -> int:
    """Return the number of cores that this process may use, or of the machine if the system has no such limit."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def resident_bytes() -> int | None:
    """Return the resident memory of this process; None on systems that do not show it in ``/proc``."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
