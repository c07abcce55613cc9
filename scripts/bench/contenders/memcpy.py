"""Copies weights into memory that is there already: what moving so many bytes costs at the very least."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

import torch
from protocol import Measured, Repeat, serve, timed_plain
from workload import Weights, digest, model_weights, small_weights


@asynccontextmanager
async def prepare(workloads: tuple[str, ...], quick: bool) -> AsyncIterator[Mapping[str, Repeat]]:
    """``push`` and ``pull`` are the same here."""
    torch.set_num_threads(1)
    made: dict[str, Callable[[], Weights]] = {"push": model_weights, "pull": model_weights, "small": small_weights}
    yield {workload: copying(made[workload]()) for workload in workloads if workload in made}


def copying(weights: Weights) -> Repeat:
    """Copy these."""
    target = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}

    def copy() -> None:
        for name, tensor in weights.items():
            target[name].copy_(tensor)

    def repeat(count: int) -> Measured:
        seconds, _ = timed_plain(copy, count)
        return Measured(seconds, digest(target))

    repeat(2)
    return repeat


if __name__ == "__main__":
    serve(prepare, "torch")
