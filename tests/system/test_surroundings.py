"""Workers have the driver's interpreter flags, folder, environment and settings as of opening, replacements too."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import SUPPORT
from processes import environment

import torchfedrpc as tfr

FLAGS = ["-O", "-W", "ignore::FutureWarning", "-W", "error::ResourceWarning", "-X", "no_debug_ranges"]
FLAGS += ["-X", "utf8", "-X", "int_max_str_digits=5000"]
THREADS = "torch.set_num_threads"  # of the driver's thread they are set as its proxy opens
NOT_TOLD = {THREADS, "python -O", "torch.set_default_device"}
NOT_HERE = {  # those that a CPU build of torch, without opt_einsum, has no other value for; or that others stand for
    "torch.backends.opt_einsum",
    "torch.backends.mkldnn.allow_tf32",
    "torch.backends.cudnn.allow_tf32",
    "torch.backends.cudnn.depthwise_kernel",
    "torch.backends.cuda.matmul.allow_fp16_accumulation",
    "torch.backends.cpu fp16 reductions",
    "torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp",
    "torch.backends.cuda.sdp_priority_order",
    "torch.backends.cuda.enable_math_sdp",
    "torch.backends.cuda.enable_cudnn_sdp",
    "torch.backends.cuda.enable_overrideable_sdp",
    "torch.backends.cuda.enable_fa3_sdp",
    "torch.backends.cuda.preferred_linalg_library",
    "torch.backends.cuda.preferred_blas_library",
    "torch.backends.cuda.preferred_rocm_fa_library",
    "torch.__future__.set_overwrite_module_params_on_conversion",
}


@pytest.mark.parametrize(("api", "hash_seed"), [("legacy", None), ("new", "7")])
@pytest.mark.timeout(300)
def test_learners_see_the_drivers_settings_in_every_mode(tmp_path: Path, api: str, hash_seed: str | None) -> None:
    if api == "new" and not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("needs torch 2.9")
    variables: dict[str, Any] = {**environment(), "MARK": "before", "TMPDIR": os.environ["TMPDIR"]}
    if hash_seed is not None:
        variables["PYTHONHASHSEED"] = hash_seed
    done = subprocess.run(
        [sys.executable, *FLAGS, str(SUPPORT / "surroundings.py"), api],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=tmp_path,
        env=variables,
    )
    [line] = [line for line in done.stdout.splitlines() if line.startswith("found ")] or [done.stderr]
    found = json.loads(line.removeprefix("found "))
    default, driver = found["default"], found["driver"]
    set_here = {name for name, value in driver["settings"].items() if value != default[name]}
    assert default.keys() - set_here <= NOT_TOLD | NOT_HERE
    driver["settings"][THREADS] = 1
    assert driver["options"]["int_max_str_digits"] == "5000"
    assert (driver["flags"][3], driver["folder"]) == (1, str(tmp_path))  # optimize
    for place in ("local", "workers", "replacement"):
        for look in found[place]:
            assert look == driver, place
    for settings in found["local after a change"]:
        assert settings == driver["settings"]
    hashes = {tuple(pair) for pair in found["hashes"]}
    assert len(hashes) == 1
    if hash_seed is not None:
        assert {seed for _, seed in hashes} == {hash_seed}


class Waiting:
    """Tells the timeout of new sockets."""

    def __init__(self, client_id: str) -> None:
        pass

    def default_timeout(self) -> float | None:
        return socket.getdefaulttimeout()


async def test_the_drivers_default_timeout_of_sockets_does_not_end_workers() -> None:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(0.05)
    try:
        async with tfr.LearnerProxy(Waiting, ["a"], runtime="pseudo") as proxy:
            await asyncio.sleep(0.2)  # longer than the timeout
            assert await proxy.client("a").default_timeout() is None
    finally:
        socket.setdefaulttimeout(before)
