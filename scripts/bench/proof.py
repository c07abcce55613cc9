"""What the comparison of a snapshot with the live learner costs: a snapshot with it and without it.

Printed are mean and median milliseconds of a snapshot, and how many times as long it takes with the comparison.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import nn

from torchfedrpc.host import snapshot
from torchfedrpc.host.snapshot import Snapshot, capture, dump
from torchfedrpc.wire.allowlist import AllowList


class Point:
    """A small object."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.weight = number / 3
        self.name = f"point {number}"


class Learner:
    """Has whatever a case gives it."""

    def __init__(self, client_id: str = "client_1") -> None:
        self.client_id = client_id
        self.content: Any = None


def many_tensors() -> Any:
    """150 layers, so 300 parameters, with an optimiser that has stepped: 900 tensors in all."""
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(150)))
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    model(torch.ones(1, 16)).sum().backward()
    optimiser.step()
    return model, optimiser


CASES: dict[str, Callable[[], Any]] = {
    "300 parameters, gradients, momentum": many_tensors,
    "one tensor of 40 MB": lambda: torch.ones(10_000_000),
    "10,000 small objects": lambda: [Point(number) for number in range(10_000)],
    "100,000 floats in a list": lambda: [number / 3 for number in range(100_000)],
}


def seconds(learner: Learner, allow: AllowList, num_repeats: int) -> list[float]:
    """Seconds of each of some snapshots."""
    taken = []
    for _ in range(num_repeats + 1):  # the first warms up
        began = time.perf_counter()
        dump(Snapshot("client_1", "learner", {}, capture(learner)), allow, learner)
        taken.append(time.perf_counter() - began)
    return taken[1:]


def main() -> None:
    """Measure all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    allow = AllowList([__name__])
    print("| a learner with | without: mean, median ms | with: mean, median ms | ratio of means, medians |")
    print("| --- | --- | --- | --- |")
    for name, make in CASES.items():
        learner = Learner()
        learner.content = make()
        with mock.patch.object(snapshot, "_difference", return_value=None):
            without = seconds(learner, allow, repeats)
        with_it = seconds(learner, allow, repeats)
        columns = [(statistics.mean(times) * 1000, statistics.median(times) * 1000) for times in (without, with_it)]
        ratios = [one / other for one, other in zip(columns[1], columns[0], strict=True)]
        cells = [f"{mean:.1f}, {median:.1f}" for mean, median in columns] + [f"{ratios[0]:.2f}, {ratios[1]:.2f}"]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
