"""The table of stages: where the time of an awaited no-op call goes, beside one by raw RPC."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from contenders.stamps import MEAN, STAGES
from table_contenders import Contender, Measured, Unable
from table_measure import Effort, Spread
from table_rows import US, Program
from table_text import Cells

_OURS = Program(US, "torchfedrpc_stages")
_RAW = Program("raw RPC", "raw_stages")
_COUNT = 300


def measured(effort: Effort) -> list[Cells]:
    """Lines of the stages in order, their header first; in us, medians of the rounds' medians and of their means."""
    by_program = {program: asyncio.run(_stages(program, effort)) for program in (_OURS, _RAW)}
    header = ("stage", *(f"{program.label}{what}, us" for program in by_program for what in ("", MEAN)))
    lines = [header]
    for stage in [*STAGES.values(), "all"]:
        of_each = (stages.get(stage + what) for stages in by_program.values() for what in ("", MEAN))
        lines.append((stage, *("" if value is None else f"{value:.0f}" for value in of_each)))
    return lines


async def _stages(program: Program, effort: Effort) -> dict[str, float]:
    contender = Contender(program, ["stages"], quick=effort.quick, timeout_s=effort.timeout_s)
    rounds: list[Measured] = []
    try:
        await contender.prepare()
        for _ in range(effort.rounds):
            rounds.append(await contender.ask("stages", _COUNT))
    except Unable as error:
        print(f"stages of {program.label}: {error}")
    finally:
        await contender.end()
    return {
        name: Spread.of([one.extra[name] for one in rounds if name in one.extra]).median
        for name in (rounds[0].extra if rounds else ())
    }


def on_terminal(lines: Sequence[Cells]) -> str:
    """Lines as columns."""
    return "\n".join(f"{stage:40}{''.join(value.rjust(24) for value in values)}" for stage, *values in lines)
