"""Draw who ran what when in a round of clients that sleep: learners that stay on their workers, and stateless ones.

A round is that of the row ``skewed_eight`` of the table. The picture is docs/timeline.png.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import workload

import torchfedrpc as tfr

ROOT = Path(__file__).resolve().parent.parent.parent
KIND = "skewed"
NUM_ROUNDS = 12  # the last one is drawn; by then most clients' durations are known

ran: list[tuple[int, float, float]] = []  # in a worker: client, begin and end of each call of the last round

Calls = dict[int, list[tuple[int, float, float]]]
"""Process of each worker -> its calls: client, begin and end in seconds since the round began."""


class Sleeper:
    """A client that sleeps, and notes when."""

    stateless = True

    def __init__(self, client_id: str) -> None:
        self.number = int(client_id.removeprefix("client_")) - 1

    def sleep(self) -> int:
        """Sleep as long as its client does."""
        began = time.perf_counter()
        time.sleep(workload.sleep_s(KIND, self.number))
        ran.append((self.number, began, time.perf_counter()))
        return self.number

    def take(self) -> tuple[int, list[tuple[int, float, float]]]:
        """The process, and what it ran since this was asked last."""
        taken = ran.copy()
        ran.clear()
        return os.getpid(), taken


class StickySleeper(Sleeper):
    """One that stays on its worker."""

    stateless = False


async def last_round(learner: type) -> tuple[Calls, float]:
    """The calls of the last round, and its seconds."""
    runtime = {"num_processes": workload.NUM_SLEEPING_WORKERS, "num_clients": workload.NUM_SLEEPERS}
    async with tfr.LearnerProxy(learner, runtime={"execution_mode": "pseudo", **runtime}) as proxy:
        client_ids, calls, began = proxy.client_ids, Calls(), 0.0
        for round_num in range(NUM_ROUNDS):
            cohort = proxy.clients([client_ids[client] for client in workload.sleepers(KIND, round_num)])
            began = time.perf_counter()
            await cohort.reduce("sleep", tfr.Sum)
            seconds = time.perf_counter() - began
            calls = {}
            for process, taken in (await proxy.clients().call("take")).values():
                calls.setdefault(process, []).extend(taken)
    return {
        process: [(client, begin - began, end - began) for client, begin, end in sorted(own, key=lambda one: one[1])]
        for process, own in sorted(calls.items())
    }, seconds


def draw(rounds: dict[str, tuple[Calls, float]], best_s: float, path: Path) -> None:
    """Draw a row of bars for each worker, one bar for each call."""
    figure, panels = plt.subplots(len(rounds), 1, sharex=True, figsize=(9, 5.4), constrained_layout=True)
    for panel, (title, (calls, seconds)) in zip(panels, rounds.items(), strict=True):
        for row, own in enumerate(calls.values()):
            spans = [(begin * 1e3, (end - begin) * 1e3) for _, begin, end in own]
            panel.broken_barh(spans, (row - 0.4, 0.8), facecolors="#4477aa", edgecolors="white", linewidth=0.6)
        panel.axvline(best_s * 1e3, color="#cc6677", linestyle="--", label=f"best schedule: {best_s * 1e3:.0f} ms")
        panel.axvline(seconds * 1e3, color="#333333", label=f"the round: {seconds * 1e3:.0f} ms")
        panel.set(title=title, ylabel="worker", yticks=range(len(calls)), yticklabels=range(1, len(calls) + 1))
        panel.invert_yaxis()
        panel.legend(loc="upper right", frameon=True)
    panels[-1].set_xlabel("milliseconds since the round began")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run both kinds of learners, and draw their last rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "timeline.png")
    path: Path = parser.parse_args().picture
    kinds: dict[str, Any] = {
        "learners with state, each on its worker": StickySleeper,
        "stateless learners, dealt to all workers": Sleeper,
    }
    rounds = {title: asyncio.run(last_round(learner)) for title, learner in kinds.items()}
    draw(rounds, workload.best_schedule_s(KIND, NUM_ROUNDS - 1), path)
    for title, (_, seconds) in rounds.items():
        print(f"{title}: {seconds * 1e3:.0f} ms")
    print(path)


if __name__ == "__main__":
    main()
