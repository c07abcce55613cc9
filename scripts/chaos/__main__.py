"""Chaos: faults strike a federated run, which has to go on in time and to end with the bits of an undisturbed one."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import namespaces
import torch

from chaos import links
from chaos.drivers import kill_drivers
from chaos.elastic import ElasticWorkers
from chaos.faults import ELASTIC, WORKERS
from chaos.leaks import marked, nothing_left
from chaos.report import Report
from chaos.stage import Disturbance, expected_digests, pseudo, time_a_round
from chaos.workload import Traps, are_stateless, make_all_stateless

NUM_WORKERS = 3
MAX_ROUNDS = 10
HEARTBEATS_S = (1.0, 2.0)  # taken in turn
_ELASTIC_HEARTBEAT_S = 5.0  # the workers of these runs are not stopped, and a stall of the machine need not count
_LISTENED_TO = [f"client_{number}" for number in range(1, 7)]
_TIMED_ROUNDS = 3
_LAUNCHES_EVERY = 25  # faults, one cuts the link of a launch
_OF_STATE = "snapshot|eviction|learners move"  # faults that stateless learners do not have
_LISTENERS_EVERY = 17  # faults of workers that come and go, one cuts the link of a worker that listens


@dataclass(frozen=True)
class Plan:
    """The numbers of faults.

    Attributes:
        num_faults: Faults of workers that the driver starts.
        num_elastic: Faults of workers that listen or join.
        num_kills: Kills of drivers.
        num_launches: Cuts of the links of launches.
        num_listeners: Cuts of the links of workers that listen.
        num_rounds: Rounds of a run, at most.
        num_listening: Workers that listen in a run.
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
        """All faults."""
        return self.num_faults + self.num_elastic + self.num_kills + self.num_launches + self.num_listeners


_QUICK = Plan(6, 3, 2, 0, 0, num_rounds=6, num_listening=1)


def schedule(names: Iterable[str], num_faults: int, draw: random.Random) -> Iterator[str]:
    """Each kind of fault equally often, in random order."""
    names = list(names)
    while num_faults > 0:
        drawn = draw.sample(names, min(len(names), num_faults))
        yield from drawn
        num_faults -= len(drawn)


@dataclass
class Chaos:
    """Faults of all kinds.

    Attributes:
        plan: How many of each.
        draw: Draws them, and whom they strike when.
        report: Takes a row for each.
        only: A regular expression; faults of workers with other names are left out.
    """

    plan: Plan
    draw: random.Random
    report: Report
    only: str = ""

    async def run(self) -> None:
        """Run all."""
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        plan, report = self.plan, self.report
        expected = await expected_digests(plan.num_rounds)
        round_s = await time_a_round(pseudo(NUM_WORKERS, max(HEARTBEATS_S)), expected[_TIMED_ROUNDS])
        print(f"an undisturbed round takes {round_s:.2f} s; local and pseudo mode agree in all bits")
        make = partial(Disturbance, report=report, draw=self.draw, round_s=round_s)

        for names, turn in self._runs(WORKERS, plan.num_faults, "workers"):
            with TemporaryDirectory() as folder, Traps(Path(folder)) as traps:
                async with nothing_left(report):
                    faults = [(name, *WORKERS[name]) for name in names]
                    runtime = pseudo(NUM_WORKERS, HEARTBEATS_S[turn % len(HEARTBEATS_S)])
                    await make(faults, expected=expected[len(faults)], runtime=runtime, traps=traps).run()

        for names, _ in self._runs(ELASTIC, plan.num_elastic, "workers that listen or join"):
            with TemporaryDirectory() as folder, Traps(Path(folder)) as traps:
                async with nothing_left(report), ElasticWorkers(plan.num_listening, _LISTENED_TO) as elastic:
                    of_run = [(name, partial(ELASTIC[name][0], elastic), ELASTIC[name][1]) for name in names]
                    runtime = {**pseudo(1, _ELASTIC_HEARTBEAT_S), **elastic.runtime}
                    run = make(of_run, expected=expected[len(of_run)], runtime=runtime, traps=traps)
                    await run.run(elastic.dismissed)

        if plan.num_kills:
            await kill_drivers(plan.num_kills, report, expected[plan.num_rounds], self.draw, round_s)

        if plan.num_launches or plan.num_listeners:
            report.begin("links between two nodes")
            expected_there = expected[links.NUM_ROUNDS]
            await links.cut_links(plan.num_launches, plan.num_listeners, report, expected_there, self.draw)

    def _runs(self, table: Iterable[str], num_faults: int, title: str) -> Iterator[tuple[list[str], int]]:
        """The names of the faults of each run, and its number."""
        names = [name for name in table if re.search(self.only, name)]
        if are_stateless():
            names = [name for name in names if not re.search(_OF_STATE, name)]
        if not names or not num_faults:
            return
        self.report.begin(title)
        faults = schedule(names, num_faults, self.draw)
        for number in itertools.count():
            if not (of_run := list(itertools.islice(faults, self.plan.num_rounds))):
                return
            yield of_run, number


def seed_of_commit() -> int:
    """The first digits of the commit that is checked out, as a number; 0 without git."""
    command = ["git", "rev-parse", "--short=8", "HEAD"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return 0
    return int(done.stdout.strip()[:8], 16)


def main() -> int:
    """Parse the command line, and run; returns the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/chaos/run", description=__doc__)
    parser.add_argument("--faults", type=int, default=50, help="of workers that the driver starts, or a launch (50)")
    parser.add_argument("--elastic", type=int, default=20, help="of workers that listen or join (20)")
    parser.add_argument("--kills", type=int, default=20, help="of the driver (20)")
    parser.add_argument("--only", default="", metavar="REGEX", help="faults of workers with such names")
    parser.add_argument("--stateless", action="store_true", help="all learners are stateless")
    parser.add_argument("--seed", type=int, help="draws the faults, workers and moments (default: from the commit)")
    parser.add_argument("--quick", action="store_true", help="a few of each, in about a minute")
    parser.add_argument("--namespaces", action="store_true", help="cut links in a quick run, too; needs root")
    options = parser.parse_args()
    seed = seed_of_commit() if options.seed is None else options.seed
    reason = namespaces.missing()
    if options.namespaces and reason is not None:
        parser.error(f"--namespaces {reason}")
    if options.quick:
        plan = replace(_QUICK, num_launches=int(options.namespaces), num_listeners=int(options.namespaces))
    else:
        num_launches, num_listeners = options.faults // _LAUNCHES_EVERY, options.elastic // _LISTENERS_EVERY
        if reason is not None or options.only:
            num_launches = num_listeners = 0
        num_faults, num_elastic = options.faults - num_launches, options.elastic - num_listeners
        plan = Plan(num_faults, num_elastic, options.kills, num_launches, num_listeners)
    if options.stateless:
        make_all_stateless()
    torch.set_num_threads(1)
    logging.getLogger("torchfedrpc").setLevel(logging.ERROR)  # the losses are in the table
    report = Report()
    print(f"chaos: {plan.num_all} faults, seed {seed}, torch {torch.__version__}", flush=True)
    if reason is not None and not options.quick:
        print(f"no links are cut: that {reason}")
    try:
        with marked():
            asyncio.run(Chaos(plan, random.Random(seed), report, options.only).run())
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("\ninterrupted")
        report.summary()
        return 130
    report.summary()
    return 1 if report.num_problems else 0


if __name__ == "__main__":
    sys.exit(main())
