"""Chaos: faults strike a federated run at random moments, and it has to end with the bits of an undisturbed one."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import faulthandler
import itertools
import logging
import random
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import chaos_nodes
import torch
from chaos_faults import FAULTS, Log, Scene, Timing
from chaos_leftovers import held, left_over, marked
from chaos_run import ChaosTrainer, Digests, differing, federate, open_proxy, undisturbed

import torchfedrpc as tfr
from torchfedrpc.observe.events import RoundEnded

NUM_WORKERS = 3
MAX_ROUNDS = 10
HEARTBEATS_S = (1.0, 2.0)  # taken in turn
HANG_S = 90.0  # for a round; a loss takes some seconds, a multiple of it on a machine with too much to do
_QUICK = 6
_RUN_SEED = 7
_TIMED_ROUNDS = 3
_LINKS_EVERY = 25  # so many faults, one of a link


@dataclass
class Report:
    """The table, printed as it comes about.

    Attributes:
        rows: of the faults so far, the timing.
        num_hangs: rounds that did not end.
        num_failures: rounds that ended with an error.
        num_differences: runs or rounds with other bits than an undisturbed run.
        leftovers: what was left behind, each as a line.
    """

    rows: list[Timing] = field(default_factory=list)
    num_hangs: int = 0
    num_failures: int = 0
    num_differences: int = 0
    leftovers: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Whether nothing is to be mended."""
        return not (self.num_hangs or self.num_failures or self.num_differences or self.leftovers)

    def head(self) -> None:
        """Say what the columns are."""
        print(
            "noticed: until the struck worker is known to be lost, back: from the last strike until the workers can"
        )
        print("be called again, results: until the struck round has all of its results; in seconds\n")
        print(f"{'':>3}  {'fault':37}{'worker':24}{'noticed':>8}{'back':>8}{'results':>8}  {'lost':>4}  bits equal")

    def row(self, fault: str, struck: Sequence[str], timing: Timing | None, verdict: str) -> None:
        """One fault more; without a timing it counts as none."""
        number = ""
        if timing is not None:
            self.rows.append(timing)
            number = str(len(self.rows))
        values = (timing.noticed_s, timing.formed_s, timing.results_s) if timing else (None, None, None)
        numbers = "".join(f"{'-' if value is None else format(value, '.2f'):>8}" for value in values)
        num_lost = str(timing.num_lost) if timing else ""
        print(f"{number:>3}  {fault:37}{','.join(struck):24}{numbers}  {num_lost:>4}  {verdict}", flush=True)

    def compared(self, fault: str, struck: Sequence[str], timing: Timing | None, different: Sequence[str]) -> None:
        """One fault more, and what of the round's results, if anything, has other bits than it should have."""
        self.num_differences += bool(different)
        self.row(fault, struck, timing, f"NO: {', '.join(different)}" if different else "yes")

    def left_over(self, things: Sequence[str]) -> None:
        """A run has ended, and these are still there."""
        self.leftovers += things
        for thing in things:
            print(f"     left over: {thing}")

    def summary(self) -> None:
        """Say what it comes to."""
        print(
            f"\n{len(self.rows)} faults, {self.num_hangs} hangs, {self.num_failures} errors, "
            f"{self.num_differences} differences, {len(self.leftovers)} leftovers"
        )
        for name, values in (
            ("noticed", [row.noticed_s for row in self.rows if row.noticed_s is not None]),
            ("back", [row.formed_s for row in self.rows if row.formed_s is not None]),
            ("results", [row.results_s for row in self.rows if row.results_s is not None]),
        ):
            if values:
                print(f"{name:8} median {statistics.median(values):6.2f} s, at most {max(values):6.2f} s")


class Reference:
    """What an undisturbed run gives, in local mode."""

    def __init__(self) -> None:
        self._digests: dict[int, list[Digests]] = {}

    async def digests(self, num_rounds: int) -> list[Digests]:
        """Those of each round, and of the end."""
        if num_rounds not in self._digests:
            self._digests[num_rounds] = await whole_run({"execution_mode": "local"}, num_rounds)
        return self._digests[num_rounds]


class Disturbance:
    """Strikes every round of a run with the next of some faults.

    Args:
        faults: their names, one for each round.
        report: takes a row for each.
        expected: the digests of each round as they should be.
        draw: draws whom and when.
        round_s: what a round takes.
        heartbeat_timeout_s: the run's.
    """

    def __init__(
        self,
        faults: Sequence[str],
        report: Report,
        expected: Sequence[Digests],
        draw: random.Random,
        round_s: float,
        heartbeat_timeout_s: float,
    ) -> None:
        self.log = Log()
        self.num_done = 0
        self._faults = faults
        self._report = report
        self._expected = expected
        self._draw = draw
        self._round_s = round_s
        self._heartbeat_timeout_s = heartbeat_timeout_s

    @contextlib.asynccontextmanager
    async def __call__(self, trainer: ChaosTrainer, round_num: int) -> AsyncIterator[None]:
        """Around a round."""
        fault = self._faults[round_num]
        self.num_done = round_num + 1
        scene = Scene(trainer, round_num, self.log, self._draw, self._round_s, self._heartbeat_timeout_s)
        striking = asyncio.ensure_future(FAULTS[fault](scene))
        # Where the event loop itself hangs, this is all that can be had.
        faulthandler.dump_traceback_later(2 * HANG_S, exit=True)
        dumping = asyncio.get_running_loop().call_later(HANG_S - 1.0, dump, trainer.learner_proxy)
        try:
            async with asyncio.timeout(HANG_S) as limit:
                await scene.ready.wait()
                yield
                await striking
                timing = await scene.over()
        except BaseException as error:
            verdict = self._verdict(error, hung=limit.expired())
            if verdict is not None:
                self._report.row(fault, scene.struck, Timing(None, None, None, 0), verdict)
            raise
        finally:
            dumping.cancel()
            faulthandler.cancel_dump_traceback_later()
            striking.cancel()
            await asyncio.gather(striking, return_exceptions=True)
        self._report.compared(fault, scene.struck, timing, differing(trainer.digests[-1], self._expected[round_num]))

    def _verdict(self, error: BaseException, *, hung: bool) -> str | None:
        if hung:
            self._report.num_hangs += 1
            return f"HANG: nothing for {HANG_S:.0f} s"
        if isinstance(error, asyncio.CancelledError):
            return None
        self._report.num_failures += 1
        return f"ERROR: {error!r}"


def dump(proxy: tfr.LearnerProxy) -> None:
    """Show where everybody is, driver and workers."""
    print("\nA round hangs. The driver's tasks and threads, then those of its workers:", file=sys.stderr)
    for task in asyncio.all_tasks():
        task.print_stack(file=sys.stderr)
    faulthandler.dump_traceback(all_threads=True)
    executor: Any = proxy._router._main
    group = executor._group
    print("in the world:", list(group.hosts), "members:", list(group.members), group._mending, file=sys.stderr)
    for record in executor._ledger:
        for asked in record.asked.values():
            call = f"{asked.call.kind} {asked.call.call_id}, {record.client_id}.{asked.call.method} on {record.label}"
            state = f"sent: {asked.asked_through is not None}, to rebuild: {asked.is_own}, items: {asked.num_items}"
            print(f"not answered: {call} ({state})", file=sys.stderr)
    for process in executor._processes.values():
        process._process.send_signal(signal.SIGUSR2)
        time.sleep(0.5)  # they write to the same stream


async def whole_run(runtime: dict[str, Any], num_rounds: int) -> list[Digests]:
    """An undisturbed run: its digests."""
    async with open_proxy(runtime, _RUN_SEED) as proxy:
        return await federate(proxy, num_rounds, undisturbed)


def pseudo(heartbeat_timeout_s: float) -> dict[str, Any]:
    """The runtime that is disturbed; its journals are short, so that there are snapshots."""
    return {
        "execution_mode": "pseudo",
        "num_processes": NUM_WORKERS,
        "heartbeat_timeout_s": heartbeat_timeout_s,
        "journal_max_calls": 5,
    }


async def time_a_round(num_rounds: int, expected: Sequence[Digests]) -> float:
    """Run undisturbed in pseudo mode, which also warms this process up: the seconds of a round.

    Raises:
        SystemExit: its bits are not those of local mode, so that there is nothing to compare with.
    """
    ended: list[float] = []
    async with open_proxy(pseudo(max(HEARTBEATS_S)), _RUN_SEED) as proxy:
        proxy.subscribe(lambda event: isinstance(event, RoundEnded) and ended.append(time.monotonic()))
        if await federate(proxy, num_rounds, undisturbed) != expected:
            raise SystemExit("an undisturbed run in pseudo mode has other bits than in local mode")
    return statistics.median(late - early for early, late in itertools.pairwise(ended))


def schedule(num_faults: int, draw: random.Random) -> Iterator[str]:
    """Each kind of fault equally often, in random order."""
    names = list(FAULTS)
    while num_faults > 0:
        turn = names[:num_faults]
        draw.shuffle(turn)
        yield from turn
        num_faults -= len(turn)


async def disturb(
    faults: Sequence[str], report: Report, reference: Reference, draw: random.Random, round_s: float, timeout_s: float
) -> int:
    """Run once, disturbed in each round.

    Returns:
        How many of the faults have struck.
    """
    expected = await reference.digests(len(faults))
    before = held()
    disturbance = Disturbance(faults, report, expected, draw, round_s, timeout_s)
    num_problems = report.num_hangs + report.num_failures
    try:
        async with open_proxy(pseudo(timeout_s), _RUN_SEED) as proxy:
            proxy.subscribe(disturbance.log)
            digests = await federate(proxy, len(faults), disturbance)
        if different := differing(digests[-1], expected[-1]):
            report.compared("the end", [], None, different)
    except Exception as error:
        if report.num_hangs + report.num_failures == num_problems:  # outside of a round
            report.num_failures += 1
            report.row("the end", [], None, f"ERROR: {error!r}")
    report.left_over(sorted(await asyncio.to_thread(left_over, before)))
    return disturbance.num_done


async def cut_links(num_links: int, report: Report, reference: Reference, draw: random.Random) -> None:
    """Sever links between two network namespaces."""
    expected = await reference.digests(chaos_nodes.NUM_ROUNDS)
    for _ in range(num_links):
        outcome = await asyncio.to_thread(chaos_nodes.sever, draw, HEARTBEATS_S[0], _RUN_SEED, HANG_S)
        report.left_over(outcome.leftovers)
        if outcome.problem is not None:
            report.num_failures += not outcome.is_hang
            report.num_hangs += outcome.is_hang
            print(outcome.output, file=sys.stderr)
            report.row(chaos_nodes.FAULT, outcome.struck, outcome.timing, outcome.problem)
            continue
        pairs = zip(outcome.digests, expected, strict=True)
        different = sorted({name for pair in pairs for name in differing(*pair)})
        report.compared(chaos_nodes.FAULT, outcome.struck, outcome.timing, different)


async def chaos(num_faults: int, num_links: int, seed: int, report: Report) -> None:
    """All of it."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    draw, reference, reason = random.Random(seed), Reference(), chaos_nodes.missing()
    num_links = 0 if reason else num_links
    faults = list(schedule(num_faults - num_links, draw))
    round_s = await time_a_round(_TIMED_ROUNDS, await reference.digests(_TIMED_ROUNDS))
    print(f"an undisturbed round takes {round_s:.2f} s; local and pseudo mode agree in all bits")
    report.head()
    turn = 0
    while faults:
        timeout_s = HEARTBEATS_S[turn % len(HEARTBEATS_S)]
        num_done = await disturb(faults[:MAX_ROUNDS], report, reference, draw, round_s, timeout_s)
        faults, turn = faults[max(num_done, 1) :], turn + 1
    if reason is None:
        await cut_links(num_links, report, reference, draw)
    else:
        report.row(chaos_nodes.FAULT, [], None, f"skipped: {reason}")


def main() -> int:
    """Parse the command line, and run; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=50, help="how many (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="draws what strikes whom, and when (default: 0)")
    parser.add_argument("--quick", action="store_true", help=f"{_QUICK} faults, in half a minute")
    parser.add_argument("--namespaces", action="store_true", help="sever a link in a quick run, too; needs root")
    options = parser.parse_args()
    num_faults = _QUICK if options.quick else max(1, options.faults)
    num_links = max(num_faults // _LINKS_EVERY, int(options.namespaces))
    if options.namespaces and (reason := chaos_nodes.missing()) is not None:
        parser.error(f"--namespaces {reason}")
    torch.set_num_threads(1)
    logging.getLogger("torchfedrpc").setLevel(logging.ERROR)  # the losses are in the table
    report = Report()
    print(f"chaos: {num_faults} faults, seed {options.seed}, {NUM_WORKERS} workers, torch {torch.__version__}")
    try:
        with marked():
            asyncio.run(chaos(num_faults, num_links, options.seed, report))
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("\ninterrupted")
        report.summary()
        return 130
    report.summary()
    return 0 if report.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
