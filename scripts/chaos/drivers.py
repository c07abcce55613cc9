"""Drivers as processes: each is killed and started again, perhaps in another mode, until its run has ended."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from processes import Process

import torchfedrpc as tfr
from chaos.elastic import ends_well
from chaos.leaks import marked_processes, nothing_left
from chaos.report import HANG_S, HangError, Observed, Report
from chaos.stage import BACK_S, SEED, Log, pseudo
from chaos.workload import ChaosTrainer, Digests, differing, federate, open_proxy
from torchfedrpc.events import (
    CheckpointSaved,
    Event,
    RoundEnded,
    RoundStarted,
    WorkerJoined,
    WorkerLost,
    WorldFormed,
)

ROUND_DIGESTS = "digests of a round"
ALL_DIGESTS = "digests of the run"
_PRINTED = (RoundStarted, RoundEnded, CheckpointSaved, WorkerLost, WorkerJoined, WorldFormed)
_MARK = "chaos "  # begins the lines that are messages

IN_A_ROUND = "kill the driver in a round"
AS_IT_SAVES = "kill the driver as it saves a round"
# The message after which a driver is killed, and the seconds of which one is drawn; None: those of a round.
_MOMENTS: Mapping[str, tuple[str, float | None]] = {
    IN_A_ROUND: ("RoundStarted", None),
    AS_IT_SAVES: ("RoundEnded", 0.05),  # about the time that a save takes
}
_MODES: Mapping[str, dict[str, Any]] = {
    "pseudo 2": pseudo(2, heartbeat_timeout_s=2.0),
    "local": {"execution_mode": "local"},
    "pseudo 1": pseudo(1, heartbeat_timeout_s=2.0),
}
_MAX_ROUNDS = 2  # of a life that ends by a kill
_MAX_AGAIN = 2  # a round may end before the one before it is saved
_GONE_S = 5.0
_POLL_S = 0.02
_DUMP_S = 2.0

# The driver's process.


@dataclass(frozen=True)
class Job:
    """The run of a driver.

    Attributes:
        runtime: The runtime configuration.
        seed: The seed of the learners' random streams.
        num_rounds: How many rounds there are.
        checkpoints: The folder where the run is saved, and from which it continues.
        struck_round: A round that ends no sooner than a worker is lost,
        rejoins: and, if this is true, than a worker has come in its place.
    """

    runtime: dict[str, Any]
    seed: int
    num_rounds: int
    checkpoints: str | None = None
    struck_round: int | None = None
    rejoins: bool = False

    def arguments(self) -> list[str]:
        """The arguments of Python that run this."""
        return ["-m", "chaos.drivers", json.dumps(asdict(self))]


async def main() -> None:
    """Run; print messages, each with its kind as ``what`` and its time as ``at`` (monotonic, in seconds)."""
    job = Job(**json.loads(sys.argv[1]))
    log = Log()

    @contextlib.asynccontextmanager
    async def around(trainer: ChaosTrainer, round_num: int) -> AsyncIterator[None]:
        began = time.monotonic()
        yield
        _print(ROUND_DIGESTS, round_num=round_num, digests=trainer.digests[-1])
        if round_num == job.struck_round:
            await log.until(lambda: log.times(WorkerLost, began))
            then = WorkerJoined if job.rejoins else WorldFormed
            await log.until(lambda: log.times(then, max(log.times(WorkerLost, began))))

    checkpoints = tfr.Checkpoints(job.checkpoints, resume="auto") if job.checkpoints is not None else None
    async with open_proxy(job.runtime, job.seed) as proxy:
        proxy.subscribe(log)
        proxy.subscribe(_print_event)
        digests = await federate(proxy, job.num_rounds, around, checkpoints)
    _print(ALL_DIGESTS, digests=digests)


def _print_event(event: Event) -> None:
    if isinstance(event, _PRINTED):
        _print(type(event).__name__, **asdict(event))


def _print(what: str, **values: Any) -> None:
    # At once, with what other processes print on the same stream before or after it.
    sys.stdout.write(f"{_MARK}{json.dumps({'what': what, 'at': time.monotonic(), **values})}\n")
    sys.stdout.flush()


# Its messages here.


class Driver:
    """A driver's process, or a launch of one, and its messages.

    Args:
        command: Runs it.
    """

    def __init__(self, *command: str) -> None:
        self.process = Process(*command)
        self._num_read = 0

    async def message(self, timeout_s: float = HANG_S) -> dict[str, Any] | None:
        """The next message; None if it has ended.

        Raises:
            HangError: If there is none in time.
        """
        self._num_read += 1
        try:
            line = await asyncio.to_thread(self.process.line_or_end, _MARK, self._num_read, timeout_s)
        except TimeoutError:
            self.process.signal(signal.SIGUSR2)  # for its stacks
            await asyncio.sleep(_DUMP_S)
            raise HangError("it prints no message", timeout_s) from None
        return json.loads(line[line.index(_MARK) + len(_MARK) :]) if line is not None else None


@contextlib.contextmanager
def driving(*command: str) -> Iterator[Driver]:
    """A driver; if an error ends this, its output is shown."""
    driver = Driver(*command)
    try:
        yield driver
    except Exception:
        print(f"process {driver.process.pid} has printed:\n{driver.process.output}", file=sys.stderr)
        raise
    finally:
        driver.process.close()


# Kills.


@dataclass
class Life:
    """A driver from its start to its end.

    Attributes:
        mode: The name of its mode.
        began: When it was started (monotonic, in seconds).
        messages: Its messages.
        killed_by: The fault that has ended it.
        gone_s: Seconds from then until none of its processes was left; None if some did not end.
    """

    mode: str
    began: float = field(default_factory=time.monotonic)
    messages: list[dict[str, Any]] = field(default_factory=list)
    killed_by: str | None = None
    gone_s: float | None = None

    def rounds(self, what: str) -> list[int]:
        """The rounds that it has printed such a message about."""
        return [one["round_num"] for one in self.messages if one["what"] == what]

    @property
    def back_s(self) -> float:
        """Seconds from its start until it continued."""
        at: float = next(one["at"] for one in self.messages if one["what"] in ("RoundStarted", ALL_DIGESTS))
        return at - self.began

    @property
    def digests(self) -> list[Digests] | None:
        """The digests of the whole run; None if it has not ended."""
        last = self.messages[-1] if self.messages else {}
        return last["digests"] if last.get("what") == ALL_DIGESTS else None

    def differing(self, expected: Sequence[Digests]) -> list[str]:
        """The parts of its rounds, and of the run, that have other bits than they should have."""
        rounds = [one for one in self.messages if one["what"] == ROUND_DIGESTS]
        different = {name for one in rounds for name in differing(one["digests"], expected[one["round_num"]])}
        if self.digests is not None:
            different |= {"number of rounds"} if len(self.digests) != len(expected) else set()
            pairs = zip(self.digests, expected, strict=False)
            different |= {f"{name} of the run" for pair in pairs for name in differing(*pair)}
        return sorted(different)


def num_again(life: Life, lives: Sequence[Life], num_rounds: int) -> int:
    """How many rounds that had ended in earlier lives are done again in the next.

    Raises:
        RuntimeError: If it does not continue after the last round that was saved.
    """
    num_saved = max((number + 1 for one in lives for number in one.rounds("CheckpointSaved")), default=0)
    num_ended = max((number + 1 for one in lives for number in one.rounds("RoundEnded")), default=0)
    begun = life.rounds("RoundStarted")
    first = begun[0] if begun else num_rounds
    if not max(num_saved, num_ended - _MAX_AGAIN) <= first <= num_ended:
        raise RuntimeError(f"it continued with round {first}; {num_saved} were saved and {num_ended} had ended")
    if begun != list(range(first, first + len(begun))):
        raise RuntimeError(f"it has begun the rounds {begun}")
    return num_ended - first


@dataclass
class Killer:
    """Runs drivers and kills them.

    Attributes:
        report: Takes a row for each kill.
        expected: The digests of each round, and of the end.
        draw: Draws the moments.
        round_s: The seconds that a round takes.
        modes: The mode and the runtime of each life.
    """

    report: Report
    expected: Sequence[Digests]
    draw: random.Random
    round_s: float
    modes: Iterator[tuple[str, dict[str, Any]]] = field(default_factory=lambda: itertools.cycle(_MODES.items()))

    async def run(self, faults: Sequence[str]) -> int:
        """A run from beginning to end; each life but the last ends by a kill.

        Returns:
            How many of the faults have struck.
        """
        lives: list[Life] = []
        with tempfile.TemporaryDirectory() as folder:
            for fault in (*faults, None):
                life = await self._next_life(lives, folder, fault)
                if life is None:
                    return len(lives)
                lives.append(life)
                if life.killed_by is None:
                    break
            self.report.left_over([f"{path.name} of a checkpoint" for path in Path(folder).glob("*.tmp*")])
        return len(lives) - 1

    async def _next_life(self, lives: Sequence[Life], folder: str, fault: str | None) -> Life | None:
        """Live once more; returns None if that failed."""
        mode, runtime = next(self.modes)
        life, before = Life(mode), lives[-1] if lives else None
        killed_by = before.killed_by if before is not None else None
        struck = [f"{before.mode} > {mode}" if before is not None else mode]
        job = Job(runtime, SEED, len(self.expected) - 1, checkpoints=folder)
        try:
            with driving(sys.executable, *job.arguments()) as driver:
                await self._live(life, driver, fault)
                again = num_again(life, lives, job.num_rounds)
        except Exception as error:
            if killed_by is not None:
                self.report.failed_fault(killed_by, struck, error)
            else:
                self.report.failed("the first driver", error)
            return None
        different = life.differing(self.expected)
        if before is not None and killed_by is not None:
            missed = [f"back within {BACK_S:g} s"] if life.back_s > BACK_S else []
            under_way = [f"{'save' if killed_by == AS_IT_SAVES else 'round'}, {again} rounds done again"]
            observed = Observed(before.gone_s, life.back_s, None, None, under_way, different, missed)
            self.report.fault(killed_by, struck, observed)
        else:
            self.report.differing("the first driver", different)
        return life

    async def _live(self, life: Life, driver: Driver, fault: str | None) -> None:
        struck_round: int | None = None
        while (message := await driver.message()) is not None:
            life.messages.append(message)
            if fault is None or life.killed_by is not None:
                continue
            if message["what"] == "RoundStarted" and struck_round is None:
                first, last = message["round_num"], len(self.expected) - 2
                struck_round = self.draw.randint(first, min(first + _MAX_ROUNDS - 1, last))
            strikes_at, within_s = _MOMENTS[fault]
            if message["what"] == strikes_at and message["round_num"] == struck_round:
                await asyncio.sleep(self.draw.uniform(0.0, within_s or self.round_s))
                await self._kill(life, driver, fault)
        if life.killed_by is None:
            await ends_well(driver.process)
            if life.digests is None:
                raise RuntimeError("the driver ended by itself")

    async def _kill(self, life: Life, driver: Driver, fault: str) -> None:
        life.killed_by = fault
        at = time.monotonic()
        driver.process.signal(signal.SIGKILL)
        while (left := marked_processes()) and time.monotonic() < at + _GONE_S:
            await asyncio.sleep(_POLL_S)
        if left:
            self.report.left_over([f"of a killed driver: process {pid} ({name})" for pid, name in left.items()])
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        else:
            life.gone_s = time.monotonic() - at


async def kill_drivers(
    num_kills: int, report: Report, expected: Sequence[Digests], draw: random.Random, round_s: float
) -> None:
    """Kill drivers, half of them in rounds, over as many runs as that takes."""
    faults = [(IN_A_ROUND, AS_IT_SAVES)[number % 2] for number in range(num_kills)]
    draw.shuffle(faults)
    report.begin("drivers")
    killer = Killer(report, expected, draw, round_s)
    async with nothing_left(report):
        while faults:
            faults = faults[max(await killer.run(faults), 1) :]


if __name__ == "__main__":
    tfr.run(main)
