"""A learner that changes what its process and its thread keep beside it, and tells what it finds."""

from __future__ import annotations

import asyncio
import contextvars
import decimal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import torch

import torchfedrpc as tfr
from torchfedrpc.host.torch_settings import read_settings

_own: contextvars.ContextVar[str] = contextvars.ContextVar("own", default="nothing")
RARE = "torch.backends.cuda.enable_math_sdp"  # of those that are compared after constructors alone


def look() -> dict[str, Any]:
    settings = read_settings()
    del settings[RARE]
    return {
        "settings": settings,
        "device": str(torch.empty(1).device),
        "numpy": np.geterr()["divide"],
        "decimal": decimal.getcontext().prec,
        "own": _own.get(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "grad": torch.is_grad_enabled(),
    }


def disturb() -> dict[str, Any]:
    np.seterr(divide="raise")
    decimal.getcontext().prec = 7
    _own.set("a call's")
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_num_threads(2)
    torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision("medium")
    torch._C._set_deterministic_algorithms(True, warn_only=False)  # without its import of torch's compiler
    torch.autograd.set_detect_anomaly(True)
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    torch.backends.cudnn.benchmark = True
    torch.distributions.Distribution.set_default_validate_args(False)
    torch.set_grad_enabled(False)
    return look()


class Disturbing:
    """Changes its surroundings."""

    def __init__(self, client_id: str, at_first: str = "") -> None:
        if at_first == "much":
            disturb()
        elif at_first == "rare":
            torch.backends.cuda.enable_math_sdp(False)

    def look(self) -> dict[str, Any]:
        return look()

    def rare(self) -> bool:
        return bool(torch.backends.cuda.math_sdp_enabled())

    def disturb(self) -> dict[str, Any]:
        return disturb()

    def fail(self) -> None:
        disturb()
        raise ValueError("after it has disturbed")

    async def disturb_and_wait(self, until: str) -> list[dict[str, Any]]:
        first = disturb()
        await asyncio.sleep(0)
        tfr.current_call().report("waiting")
        await tfr.current_call().shared("gate", _Gate).passed(until)
        task = asyncio.create_task(self._look())
        return [first, look(), await task]

    async def _look(self) -> dict[str, Any]:
        return look()

    def let_pass(self, until: str) -> dict[str, Any]:
        tfr.current_call().shared("gate", _Gate).open.add(until)
        return look()

    async def let_pass_async(self, until: str) -> dict[str, Any]:
        """On the thread of the method that waits."""
        return self.let_pass(until)

    def disturb_in_steps(self) -> Iterator[dict[str, Any]]:
        yield look()
        yield disturb()
        yield look()

    async def disturb_in_async_steps(self) -> AsyncIterator[dict[str, Any]]:
        yield look()
        yield disturb()
        yield look()

    async def wait_on_meta(self, until: str) -> str:
        with torch.device("meta"):
            tfr.current_call().report("waiting")
            await tfr.current_call().shared("gate", _Gate).passed(until)
            return str(torch.empty(1).device)

    def share(self) -> str:
        """Let a shared object be made in the midst of a disturbance."""
        disturb()
        made: torch.Tensor = tfr.current_call().shared("shared", _make)
        return f"{made.dtype} {made.device} {made.requires_grad}"


class _Gate:
    """Async methods wait here for other calls of their process."""

    def __init__(self) -> None:
        self.open: set[str] = set()

    async def passed(self, name: str) -> None:
        while name not in self.open:
            await asyncio.sleep(0.001)


def _make() -> torch.Tensor:
    return torch.ones(1, requires_grad=True) * 2
