"""The rows of the table: the contenders, their work, and the targets of torchfedrpc."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from protocol import UNEVENNESS

Kind = Literal["time", "speed", "difference", "value"]
"""What a number is: ``time``: ours / theirs, ``speed``: theirs / ours, ``difference``: ours less theirs, ``value``.

The target of a speed is the least, that of another kind the most.
"""


@dataclass(frozen=True)
class Program:
    """A contender's program.

    Attributes:
        label: Its name in the table.
        file: Its file in ``contenders/``.
        peer: The environment in ``.peers/`` that it runs in; None for that of torchfedrpc.
    """

    label: str
    file: str
    peer: str | None = None


@dataclass(frozen=True)
class Entry:
    """A contender in a row.

    Attributes:
        program: The program.
        workload: The work, by its name on the command line.
        label: Its name in the table.
        apart: The name of a separate process; empty if one process does all work of the program in a setting.
    """

    program: Program
    workload: str
    label: str
    apart: str = ""


@dataclass(frozen=True)
class Line:
    """A line of the table: one number of ours, alone or beside another contender's.

    Attributes:
        against: The label of the other entry; None for a ``value``.
        kind: How the two are compared.
        target: The least ``speed``, or the most of other kinds; None if the line is for orientation.
        what: The name of the number, if that is not the row's title.
        quantity: ``seconds`` of a repetition, `UNEVENNESS`, or the name of another number that the contenders give.
        is_of_mean: Whether the target is for the means, and not for the medians.
    """

    against: str | None
    kind: Kind
    target: float | None = None
    what: str = ""
    quantity: str = "seconds"
    is_of_mean: bool = False


@dataclass(frozen=True)
class Row:
    """Some contenders that do the same work. The first entry is torchfedrpc's.

    Attributes:
        name: For ``--rows``.
        title: The name of the row in the table.
        setting: Rows with the same setting follow one another and share processes.
        entries: The contenders.
        lines: The lines of the table.
        count: Repetitions in each batch; None to fit a batch into a given time.
        tolerance: The difference that numbers of two results may have, relatively and absolutely.
    """

    name: str
    title: str
    setting: str
    entries: tuple[Entry, ...]
    lines: tuple[Line, ...]
    count: int | None = None
    tolerance: float = 5e-4


US = "torchfedrpc"
CALLS = Program(US, "torchfedrpc_contender")
STATES = Program(US, "torchfedrpc_states")
RAW = Program("raw RPC", "raw_rpc")
MEMCPY = Program("memcpy", "plain")
PLAIN = Program("plain loop", "plain")
BY_HAND = Program("two processes by hand", "plain")
STARTS = Program(US, "starts")
RAY = Program("Ray", "ray_contender", "ray")
MONARCH = Program("Monarch", "monarch_contender", "monarch")
FLOWER = Program("Flower", "flower_contender", "flower")
PFL = Program("pfl-research", "pfl_contender", "pfl")
ONE_WORKER = "calls: one worker"
ALL_PEERS = (RAY, MONARCH, FLOWER, PFL)


def rows(*, merged: bool = False) -> list[Row]:
    """All rows, those of one setting together.

    Args:
        merged: Let as many rows as can share processes, which the memory that they measure shows a little, and leave
            out the starts that are not ours.
    """
    calls, states = [*_calls(), *_models(), *_sums()], [*_snapshots(), *_checkpoints()]
    starts = [_starts(), _imports()]
    if merged:
        calls, states = [_merged(row, "calls") for row in calls], [_merged(row, "states") for row in states]
        starts = [_ours(row) for row in starts]
    return [*calls, *_fedavg(), *_many(), *states, *starts]


def _merged(row: Row, setting: str) -> Row:
    return replace(row, setting=setting, entries=tuple(replace(entry, apart="") for entry in row.entries))


def _ours(row: Row) -> Row:
    own = tuple(entry for entry in row.entries if entry.label in (US, "a second proxy"))
    return replace(row, entries=own, lines=())


def without_peers(row: Row) -> Row:
    """The row without contenders that need a separate environment."""
    entries = tuple(entry for entry in row.entries if entry.program.peer is None)
    labels = {None, *(entry.label for entry in entries)}
    return replace(row, entries=entries, lines=tuple(line for line in row.lines if line.against in labels))


def _entry(program: Program, workload: str, label: str = "", apart: str = "") -> Entry:
    return Entry(program, workload, label or program.label, apart)


def _calls() -> list[Row]:
    def same(workload: str, *programs: Program) -> tuple[Entry, ...]:
        return tuple(_entry(program, workload) for program in (CALLS, RAW, *programs))

    def moved(workload: str, title: str) -> Row:
        lines = (
            Line("raw RPC", "speed", 0.6),
            Line("memcpy", "speed"),
            Line("Ray", "speed", 4.0),
            Line("Monarch", "speed", 4.0),
        )
        return Row(workload, title, ONE_WORKER, same(workload, MEMCPY, RAY, MONARCH), lines)

    def in_a_row(workload: str, title: str) -> Row:
        lines = (
            Line("raw RPC", "time", 1.7, is_of_mean=True),
            Line(None, "value", 1.3, "mean / median", UNEVENNESS),
        )
        return Row(f"{workload}_60", f"{title}, 60 calls in a row", ONE_WORKER, same(workload), lines, count=60)

    def spared(workload: str, raw_workload: str, title: str) -> Row:
        entries = (_entry(CALLS, workload), _entry(RAW, raw_workload))
        return Row(workload, title, ONE_WORKER, entries, (Line("raw RPC", "speed", 0.9),))

    return [
        Row(
            "noop",
            "awaited no-op call, one worker",
            ONE_WORKER,
            (*same("noop", RAY, MONARCH), _entry(RAW, "noop_on_thread", "raw RPC, a thread")),
            (
                Line("raw RPC", "time", 1.4),
                Line("raw RPC, a thread", "time"),
                Line("Ray", "time", 0.6),
                Line("Monarch", "time"),
            ),
        ),
        moved("push", "40 MB state dict, push by value"),
        moved("pull", "40 MB state dict, pull by value"),
        in_a_row("push", "40 MB state dict, push by value"),
        in_a_row("pull", "40 MB state dict, pull by value"),
        spared("push_shared", "push", "40 MB, push by a SharedRef that is there"),
        spared("push_anew", "push", "40 MB, push by a SharedRef made for the call"),
        spared("pull_given", "pull_given", "40 MB, pull of what its learner does not keep"),
        Row(
            "small",
            "300 tensors of 1000 floats, push",
            ONE_WORKER,
            same("small", MEMCPY, RAY, MONARCH),
            (Line("raw RPC", "time", 0.8), Line("memcpy", "time"), Line("Ray", "time"), Line("Monarch", "time")),
        ),
        Row(
            "gathered",
            "3,000 no-op calls gathered over 100 learners on 2 workers",
            "calls: two workers",
            same("gathered", RAY, MONARCH),
            (Line("raw RPC", "speed", 1.7), Line("Ray", "speed", 5.0), Line("Monarch", "speed", 5.0)),
        ),
    ]


def _models() -> list[Row]:
    def fan(name: str, how: str) -> Row:
        entries = (_entry(CALLS, f"{name}_64"), _entry(CALLS, f"{name}_2", "ours, 2 learners"))
        title = f"40 MB model to 64 learners on 2 workers, {how}"
        return Row(name, title, "calls: models", entries, (Line("ours, 2 learners", "time", 2.0),))

    return [fan("fan_group", "group call"), fan("fan_loop", "the seed's loop")]


def _sums() -> list[Row]:
    gather, few = "ours, gathered", "ours, 16 learners"
    received, growth = "bytes to the driver", "driver's peak growth"
    entries = (
        _entry(CALLS, "reduce_64"),
        _entry(CALLS, "gather_64", gather, apart="gathering"),
        _entry(CALLS, "reduce_16", few, apart="few"),
    )
    lines = (
        Line(gather, "speed", 2.0),
        Line(few, "time", None),
        Line(few, "time", 1.1, received, "received_mb"),
        Line(gather, "time", None, received, "received_mb"),
        Line(few, "difference", 40.0, growth, "growth_mb"),
        Line(gather, "time", None, growth, "growth_mb"),
    )
    return [
        Row(
            "reduce", "FedAvg reduce, 64 learners x 40 MB on 2 workers", "calls: sums", entries, lines, tolerance=1e-2
        )
    ]


def _fedavg() -> list[Row]:
    sticky, best = "ours, with state", "best schedule"

    def rounds(kind: str, in_words: str, local: float, two: float) -> list[Row]:
        ahead = tuple(Line(peer.label, "time", 1.0) for peer in ALL_PEERS)
        alone = tuple(_entry(program, kind) for program in (CALLS, PLAIN, PFL))  # others have workers only
        both = tuple(_entry(program, f"{kind}_two") for program in (BY_HAND, *ALL_PEERS))
        return [
            Row(
                kind,
                f"FedAvg round, 20 of 100 clients, {in_words}, local",
                "rounds: local",
                alone,
                (Line("plain loop", "time", local), Line(PFL.label, "time")),
            ),
            Row(
                f"{kind}_two",
                f"FedAvg round, 20 of 100 clients, {in_words}, 2 workers",
                "rounds: two workers",
                (
                    _entry(CALLS, f"{kind}_two", apart="two workers"),
                    _entry(CALLS, f"{kind}_two_sticky", sticky, apart="sticky"),
                    _entry(PLAIN, kind),
                    *both,
                ),
                (Line(BY_HAND.label, "time", two), Line(sticky, "time"), Line("plain loop", "time"), *ahead),
            ),
        ]

    def eight(kind: str, in_words: str) -> Row:
        entries = (
            _entry(CALLS, f"{kind}_eight"),
            _entry(CALLS, f"{kind}_eight_sticky", sticky, apart="sticky"),
            _entry(PLAIN, f"{kind}_eight", best),
        )
        lines = (Line(best, "time", 1.15), Line(sticky, "time"))
        return Row(
            f"{kind}_eight", f"round of clients that sleep, {in_words}, 8 workers", "eight workers", entries, lines
        )

    unsorted = [*rounds("mlp", "MLP", 1.2, 1.15), *rounds("cnn", "CNN", 1.03, 1.05)]
    sleeping = [eight("equal", "32 of 200 equal ones"), eight("skewed", "64 of 200 skewed ones")]
    return [*sorted(unsorted, key=lambda row: row.setting), *sleeping]


def _many() -> list[Row]:
    def row(name: str, where: str, opens: str) -> Row:
        lines = (
            Line(None, "value", 1.0, f"proxy opens{opens}", "opens_s"),
            Line(None, "value", 5.0, "growth of memory over the rounds", "growth_percent"),
            Line(None, "value", None, "memory after the second round", "resident_mb"),
            Line(None, "value", None, "a round"),
        )
        title = f"100,000 clients, 1,000 a round, 100 resident, {where}"
        return Row(name, title, name, (_entry(STATES, name),), lines, count=20)

    return [row("many", "local", ""), row("many_two", "2 workers", ", beside one of two clients")]


def _snapshots() -> list[Row]:
    contents = {
        "layers": "300 parameters, gradients, momentum",
        "tensor": "one tensor of 40 MB",
        "objects": "10,000 small objects",
        "floats": "100,000 floats in a list",
    }
    against = "not compared"

    def row(name: str, title: str) -> Row:
        entries = (_entry(STATES, f"proven-{name}"), _entry(STATES, f"unproven-{name}", against))
        lines = (Line(against, "time"),)
        return Row(f"snapshot_{name}", f"snapshot of {title}, compared with its learner", "snapshots", entries, lines)

    return [row(name, title) for name, title in contents.items()]


def _checkpoints() -> list[Row]:
    def row(num_called: int) -> Row:
        against = "no checkpoints"
        entries = (
            _entry(STATES, f"saved-{num_called}", apart="saved"),
            _entry(STATES, f"unsaved-{num_called}", against, apart="unsaved"),
        )
        lines = (
            Line(against, "time"),
            Line(None, "value", None, "a save, beside the rounds", "save_s"),
            Line(None, "value", None, "its snapshots", "saved_mb"),
            Line(None, "value", None, "file with all checkpoints", "disk_mb"),
            Line(against, "difference", None, "driver's peak memory", "peak_mb"),
            Line(None, "value", None, "a resume, until its first round", "resume_s"),
        )
        title = f"round of {num_called} of 100 learners of 4 MB, a checkpoint every ten rounds"
        return Row(f"saved_{num_called}", title, f"checkpoints of {num_called}", entries, lines, count=40)

    store = (Line(None, "value"), Line(None, "value", None, "read", "read_s"))
    evicted = Row("evicted", "1,000 evicted learners of 200 kB", "evictions", (_entry(STATES, "evicted"),), store)
    return [row(100), row(3), evicted]


def _starts() -> Row:
    others = {
        "start_again": "a second proxy",
        "import_torch": "import torch",
        "start_spawn": "spawned",
        "start_forkserver": "forkserver",
        "start_forked": "forked once more",
    }
    entries = (_entry(STARTS, "start_torchfedrpc"), *(_entry(STARTS, name, label) for name, label in others.items()))
    lines = tuple(Line(label, "time") for label in others.values())
    title = "pseudo mode with 2 workers, until both answer"
    return Row("start", title, "imports", entries, lines, count=1)


def _imports() -> Row:
    entries = (_entry(STARTS, "import_torchfedrpc"), _entry(STARTS, "import_torch", "import torch"))
    lines = (Line("import torch", "difference", 0.05),)
    return Row("import", "import torchfedrpc", "imports", entries, lines, count=5)
