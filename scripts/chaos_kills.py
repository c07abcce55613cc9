"""Kills of drivers: each is started again, in another mode perhaps, until its run has ended."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos_driver import ALL_DIGESTS, ROUND_DIGESTS, Job
from chaos_leftovers import marked_processes, nothing_left
from chaos_process import Command, running
from chaos_report import HANG_S, Felt, HangError, Report, Section
from chaos_rounds import SEED, pseudo
from chaos_run import Digests, differing

IN_A_ROUND = "kill the driver in a round"
AS_IT_SAVES = "kill the driver as it saves a round"
# What is told, and the seconds after it of which one is drawn; None: those of a round.
_MOMENTS: Mapping[str, tuple[str, float | None]] = {
    IN_A_ROUND: ("RoundStarted", None),
    AS_IT_SAVES: ("RoundEnded", 0.05),  # about what it takes to save one
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

_SECTION = Section(
    "the driver",
    ("gone", "back"),
    "again",
    "gone: until no process of the killed driver's is left, back: from the new start until it goes on where it was;\n"
    "in seconds. again: rounds that had ended and had to be done again. bits: of what the new driver did, up to its\n"
    "own end",
)


@dataclass
class Life:
    """A driver from its start to its end.

    Attributes:
        mode: the name of its mode.
        began: when it was started (monotonic, in seconds).
        told: what it has told.
        killed_by: the fault that has ended it.
        gone_s: seconds from then until none of its processes was left; None where some did not go.
    """

    mode: str
    began: float = field(default_factory=time.monotonic)
    told: list[dict[str, Any]] = field(default_factory=list)
    killed_by: str | None = None
    gone_s: float | None = None

    def rounds(self, what: str) -> list[int]:
        """The rounds of which it has told that."""
        return [one["round_num"] for one in self.told if one["what"] == what]

    @property
    def back_s(self) -> float:
        """Seconds from its start until it went on."""
        return next(one["at"] for one in self.told if one["what"] in ("RoundStarted", ALL_DIGESTS)) - self.began

    @property
    def digests(self) -> list[Digests] | None:
        """What the whole run has given, where it has ended."""
        return self.told[-1]["digests"] if self.told and self.told[-1]["what"] == ALL_DIGESTS else None

    def differing(self, expected: Sequence[Digests]) -> list[str]:
        """Which parts of its rounds, and of the run, have other bits than they should have."""
        given = [(one["digests"], expected[one["round_num"]]) for one in self.told if one["what"] == ROUND_DIGESTS]
        different = {f"{name}" for pair in given for name in differing(*pair)}
        if self.digests is not None:
            different |= {"number of rounds"} if len(self.digests) != len(expected) else set()
            pairs = zip(self.digests, expected, strict=False)
            different |= {f"{name} of the run" for pair in pairs for name in differing(*pair)}
        return sorted(different)


class Past:
    """The lives of one run so far, and where the next has to go on.

    Attributes:
        last: the one before.
    """

    def __init__(self) -> None:
        self.last: Life | None = None
        self._num_saved = 0
        self._num_ended = 0

    def num_again(self, life: Life, num_rounds: int) -> int:
        """How many rounds that had ended a next life does again.

        Raises:
            RuntimeError: it does not go on where it has to.
        """
        begun = life.rounds("RoundStarted")
        first = begun[0] if begun else num_rounds
        if not max(self._num_saved, self._num_ended - _MAX_AGAIN) <= first <= self._num_ended:
            raise RuntimeError(
                f"it went on with round {first}, and {self._num_saved} were saved and {self._num_ended} had ended"
            )
        if begun != list(range(first, first + len(begun))):
            raise RuntimeError(f"it has begun the rounds {begun}")
        return self._num_ended - first

    def add(self, life: Life) -> None:
        """One life more."""
        self.last = life
        self._num_saved = max([self._num_saved, *(number + 1 for number in life.rounds("CheckpointSaved"))])
        self._num_ended = max([self._num_ended, *(number + 1 for number in life.rounds("RoundEnded"))])


class Killer:
    """Runs drivers and kills them.

    Args:
        report: takes a row for each kill.
        expected: the digests of each round, and of the end, as they should be.
        draw: draws the moments.
        round_s: what a round takes.
    """

    def __init__(self, report: Report, expected: Sequence[Digests], draw: random.Random, round_s: float) -> None:
        self._report = report
        self._expected = expected
        self._draw = draw
        self._round_s = round_s
        self._modes = itertools.cycle(_MODES.items())  # from life to life

    async def run(self, faults: Sequence[str]) -> int:
        """A run from beginning to end, of which each life but the last ends by a kill.

        Returns:
            How many of the faults have struck.
        """
        past = Past()
        with tempfile.TemporaryDirectory() as folder:
            for number in itertools.count():
                fault = faults[number] if number < len(faults) else None
                if not await self._next_life(past, folder, fault):
                    break
            if past.last is not None and past.last.digests is not None:
                self._report.left_over([f"{path.name} of a checkpoint" for path in Path(folder).glob("*.tmp*")])
        return number

    async def _next_life(self, past: Past, folder: str, fault: str | None) -> bool:
        """Live once more; whether another life has to follow."""
        mode, runtime = next(self._modes)
        life, before = Life(mode), past.last
        job = Job(runtime, SEED, len(self._expected) - 1, checkpoints=folder)
        try:
            with running(sys.executable, *job.script()) as command:
                await self._live(life, command, fault)
                num_again = past.num_again(life, job.num_rounds)
        except Exception as error:
            if before is not None and before.killed_by is not None:
                self._report.failed_fault(before.killed_by, [f"{before.mode} > {mode}"], error)
            else:
                self._report.failed("the first driver", error)
            return False
        different = life.differing(self._expected)
        if before is not None and before.killed_by is not None:
            felt = Felt((before.gone_s, life.back_s), num_again)
            self._report.fault(before.killed_by, [f"{before.mode} > {mode}"], felt, different)
        else:
            self._report.differing("the first driver", different)
        past.add(life)
        return life.killed_by is not None

    async def _live(self, life: Life, command: Command, fault: str | None) -> None:
        struck_round: int | None = None
        while (told := await self._next(command)) is not None:
            life.told.append(told)
            if fault is None or life.killed_by is not None:
                continue
            if told["what"] == "RoundStarted" and struck_round is None:
                last = len(self._expected) - 2
                struck_round = self._draw.randint(told["round_num"], min(told["round_num"] + _MAX_ROUNDS - 1, last))
            strikes_at, within_s = _MOMENTS[fault]
            if told["what"] == strikes_at and told["round_num"] == struck_round:
                await asyncio.sleep(self._draw.uniform(0.0, within_s or self._round_s))
                await self._kill(life, command, fault)
        if life.killed_by is None and ((status := await command.ended(HANG_S)) or life.digests is None):
            raise RuntimeError(f"the driver ended by itself, with status {status}")

    async def _kill(self, life: Life, command: Command, fault: str) -> None:
        life.killed_by = fault
        at = time.monotonic()
        command.signal(signal.SIGKILL)
        while (left := marked_processes()) and time.monotonic() < at + _GONE_S:
            await asyncio.sleep(_POLL_S)
        if left:
            self._report.left_over([f"of a killed driver: process {pid} ({name})" for pid, name in left.items()])
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        else:
            life.gone_s = time.monotonic() - at

    async def _next(self, command: Command) -> dict[str, Any] | None:
        try:
            return await command.told(HANG_S)
        except HangError:
            command.signal(signal.SIGUSR2)  # for its stacks
            await asyncio.sleep(_DUMP_S)
            raise


async def kill_drivers(
    num_kills: int, report: Report, expected: Sequence[Digests], draw: random.Random, round_s: float
) -> None:
    """So many kills, over as many runs as it takes; half of them in rounds."""
    faults = [(IN_A_ROUND, AS_IT_SAVES)[number % 2] for number in range(num_kills)]
    draw.shuffle(faults)
    report.begin(_SECTION)
    killer = Killer(report, expected, draw, round_s)
    async with nothing_left(report):
        while faults:
            faults = faults[max(await killer.run(faults), 1) :]
