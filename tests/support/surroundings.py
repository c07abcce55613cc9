"""What learners see of their process, in every mode, and after the driver has changed its own: a script.

Prints a line of JSON: what the driver had as it opened its proxies, and what learners saw, by where they were.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from typing import Any

import torch
from torch.distributions import Distribution

import torchfedrpc as tfr
from torchfedrpc.host.torch_settings import read_settings

CLIENTS = ["a", "b", "c", "d"]  # two on each of two workers


def seen() -> dict[str, Any]:
    return {
        "settings": read_settings(),
        "dtype": str(torch.ones(1).dtype),
        "flags": list(sys.flags),
        "warn": sys.warnoptions,
        "options": sys._xoptions,
        "folder": os.getcwd(),
        "mark": os.environ.get("MARK"),
        "path": list(sys.path),
        "arguments": list(sys.argv),
    }


class Reader:
    """Tells what it sees."""

    def __init__(self, client_id: str) -> None:
        self.at_first = seen()

    def look(self) -> dict[str, Any]:
        return seen()

    async def look_async(self) -> dict[str, Any]:
        return await asyncio.create_task(self._look())

    async def _look(self) -> dict[str, Any]:
        return seen()

    def look_back(self) -> dict[str, Any]:
        return self.at_first

    def hashes(self) -> tuple[int, str]:
        return hash("text"), os.environ["PYTHONHASHSEED"]

    def process_id(self) -> int:
        return os.getpid()


def set_everything() -> None:
    """Set torch's global settings to what they are not by default."""
    sys.setrecursionlimit(1234)
    sys.set_int_max_str_digits(6000)
    torch.set_default_dtype(torch.float64)
    torch.set_flush_denormal(True)
    torch._C._set_deterministic_algorithms(True, warn_only=True)  # without its import of torch's compiler
    utils: Any = torch.utils
    utils.deterministic.fill_uninitialized_memory = False
    torch.set_warn_always(True)
    torch.autograd.set_detect_anomaly(True, check_nan=False)
    Distribution.set_default_validate_args(True)  # without -O the default
    torch.sparse.check_sparse_tensor_invariants.enable()
    torch.set_float32_matmul_precision("high")
    backends: Any = torch.backends
    backends.mha.set_fastpath_enabled(False)
    backends.quantized.engine = "onednn"
    backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic = False, True, True
    if backends.cudnn.is_available():  # as of builds for CUDA
        backends.cudnn.benchmark_limit = 7
    backends.mkldnn.enabled, backends.mkldnn.deterministic = False, True
    backends.nnpack.set_flags(False)
    backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    backends.cuda.enable_flash_sdp(False)
    backends.cuda.enable_mem_efficient_sdp(False)
    torch.__future__.set_swap_module_params_on_conversion(True)
    if sys.argv[1] == "new":
        backends.fp32_precision = "tf32"
        backends.mkldnn.conv.fp32_precision = "bf16"


def change_everything() -> None:
    """What the driver may do for itself after it has opened a proxy."""
    os.chdir("/")
    os.environ["MARK"] = "later"
    sys.path.append("/nowhere")
    sys.argv.append("later")
    torch.set_default_dtype(torch.float32)
    torch.set_flush_denormal(False)
    torch.autograd.set_detect_anomaly(False)


async def looks(proxy: tfr.LearnerProxy) -> list[Any]:
    methods = ("look", "look_async", "look_back")
    return [look for method in methods for look in (await proxy.clients().call(method)).values()]


async def main() -> None:
    default = read_settings()
    set_everything()
    found: dict[str, Any] = {"default": default, "driver": seen()}
    folder, path, arguments = os.getcwd(), list(sys.path), list(sys.argv)
    async with tfr.LearnerProxy(Reader, CLIENTS, runtime="local") as proxy:
        found["local"] = await looks(proxy)
    async with tfr.LearnerProxy(Reader, CLIENTS, runtime={"num_processes": 2}, seed=3) as proxy:
        found["workers"] = await looks(proxy)
        hashes = list((await proxy.clients().call("hashes")).values())
        change_everything()
        os.kill(await proxy.custom_method("a", "process_id"), signal.SIGKILL)
        found["replacement"] = await looks(proxy)
        hashes += (await proxy.clients().call("hashes")).values()
        found["hashes"] = hashes
    os.chdir(folder)
    sys.path[:], sys.argv[:] = path, arguments
    set_everything()
    os.environ["MARK"] = "before"
    async with tfr.LearnerProxy(Reader, CLIENTS, runtime="local") as proxy:
        change_everything()
        found["local after a change"] = [look["settings"] for look in await looks(proxy)]
    print("found", json.dumps(found))


if __name__ == "__main__":
    tfr.run(main)
