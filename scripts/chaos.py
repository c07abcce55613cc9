"""Chaos: faults strike a federated run at random moments, and it has to end with the bits of an undisturbed one."""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import chaos_links
import chaos_nodes
import torch
from chaos_elastic import ELASTIC, elastic
from chaos_faults import FAULTS
from chaos_kills import kill_drivers
from chaos_leftovers import marked, nothing_left
from chaos_report import Report
from chaos_rounds import Disturbance, expected_digests, pseudo, time_a_round
from chaos_scene import section

NUM_WORKERS = 3
MAX_ROUNDS = 10
HEARTBEATS_S = (1.0, 2.0)  # taken in turn
_TIMED_ROUNDS = 3
_LAUNCHES_EVERY = 25  # faults, one cuts the link of a launch
_LISTENERS_EVERY = 17  # faults of those that listen or join, one cuts the link of a worker that listens


@dataclass(frozen=True)
class Plan:
    """How much is done.

    Attributes:
        num_faults: of workers that the driver starts.
        num_elastic: of workers that listen or join.
        num_kills: of drivers.
        num_launches: of the links of launches.
        num_listeners: of the links of workers that listen.
        num_rounds: of a run, at most.
        num_listening: workers that listen in one run.
    """

    num_faults: int
    num_elastic: int
    num_kills: int
    num_launches: int
    num_listeners: int
    num_rounds: int = MAX_ROUNDS
    num_listening: int = 2

    @property
    def num_all(self) -> int:
        """All of them."""
        return self.num_faults + self.num_elastic + self.num_kills + self.num_launches + self.num_listeners


_QUICK = Plan(6, 3, 2, 0, 0, num_rounds=6, num_listening=1)


def schedule(names: Iterable[str], num_faults: int, draw: random.Random) -> Iterator[str]:
    """Each kind of fault equally often, in random order."""
    names = list(names)
    while num_faults > 0:
        turn = names[:num_faults]
        draw.shuffle(turn)
        yield from turn
        num_faults -= len(turn)


async def chaos(plan: Plan, draw: random.Random, report: Report) -> None:
    """All of it."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    expected = await expected_digests(plan.num_rounds)
    round_s = await time_a_round(pseudo(NUM_WORKERS, max(HEARTBEATS_S)), expected[_TIMED_ROUNDS])
    print(f"an undisturbed round takes {round_s:.2f} s; local and pseudo mode agree in all bits")

    faults, turn = list(schedule(FAULTS, plan.num_faults, draw)), 0
    if faults:
        report.begin(section("workers"))
    while faults:
        named = [(name, FAULTS[name]) for name in faults[: plan.num_rounds]]
        runtime = pseudo(NUM_WORKERS, HEARTBEATS_S[turn % len(HEARTBEATS_S)])
        disturbance = Disturbance(named, report, expected[len(named)], draw, round_s, runtime)
        async with nothing_left(report):
            await disturbance.run()
        faults, turn = faults[max(disturbance.num_done, 1) :], turn + 1

    faults = list(schedule(ELASTIC, plan.num_elastic, draw))
    if faults:
        report.begin(section("workers that listen or join"))
    while faults:
        names = faults[: min(plan.num_rounds, len(ELASTIC))]
        num_done = await elastic(names, plan.num_listening, report, expected[len(names)], draw, round_s)
        faults = faults[max(num_done, 1) :]

    if plan.num_kills:
        await kill_drivers(plan.num_kills, report, expected[plan.num_rounds], draw, round_s)

    if plan.num_launches or plan.num_listeners:
        report.begin(section("links between two nodes"))
        expected_there = expected[chaos_links.NUM_ROUNDS]
        await chaos_links.cut_links(plan.num_launches, plan.num_listeners, report, expected_there, draw)


def main() -> int:
    """Parse the command line, and run; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--faults", type=int, default=50, help="of workers that the driver starts, or a launch (default: 50)"
    )
    parser.add_argument("--elastic", type=int, default=17, help="of workers that listen or join (default: 17)")
    parser.add_argument("--kills", type=int, default=20, help="of the driver (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="draws what strikes whom, and when (default: 0)")
    parser.add_argument("--quick", action="store_true", help="a few of each, in about a minute")
    parser.add_argument("--namespaces", action="store_true", help="cut links in a quick run, too; needs root")
    options = parser.parse_args()
    reason = chaos_nodes.missing()
    if options.namespaces and reason is not None:
        parser.error(f"--namespaces {reason}")
    if options.quick:
        plan = replace(_QUICK, num_launches=int(options.namespaces), num_listeners=int(options.namespaces))
    else:
        num_launches, num_listeners = options.faults // _LAUNCHES_EVERY, options.elastic // _LISTENERS_EVERY
        if reason is not None:
            num_launches = num_listeners = 0
        num_faults, num_elastic = options.faults - num_launches, options.elastic - num_listeners
        plan = Plan(num_faults, num_elastic, options.kills, num_launches, num_listeners)
    torch.set_num_threads(1)
    logging.getLogger("torchfedrpc").setLevel(logging.ERROR)  # the losses are in the table
    report = Report()
    print(f"chaos: {plan.num_all} faults, seed {options.seed}, torch {torch.__version__}")
    if reason is not None and not options.quick:
        print(f"no links are cut: that {reason}")
    try:
        with marked():
            asyncio.run(chaos(plan, random.Random(options.seed), report))
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("\ninterrupted")
        report.summary()
        return 130
    report.summary()
    return 1 if report.num_problems else 0


if __name__ == "__main__":
    sys.exit(main())
