"""docs/state.md: what comes of each kind of learner in each way of running it."""

from __future__ import annotations

from corpus.learner import TOPICS
from corpus.registry import KINDS, REFUSED, SAME, STAYS, Kind

_HEAD = """# What of a learner's state is carried

A learner is written to disk and read again where `max_resident_learners` evicts it, rebuilt where its worker was
lost, and restored from `proxy.snapshots()`. Each line below is a kind of learner in `tests/support/corpus`.
The test suite runs it alone, then in all of these ways, and compares the results bit by bit.

| word | meaning |
| --- | --- |
| carried | the results are those of a learner that nothing disturbed |
| stays | its state cannot be captured: the learner is not evicted, and a log record names it and the attribute |
| refused | `SnapshotError` names what cannot be captured, as does `WorkerLostError` for a journal past its bounds |
| differs | the results may be others, for the reason given |

What is refused can be left out of the state with `not_state`, or given in another form by `state_dict()` and
`load_state_dict()`. On two workers, without a fault, every kind gives the results of a local run, but for those that
differ.

What other libraries define is of packages that `trusted_modules` names: `transformers` and `tokenizers`,
`torchvision`, `lightning`. [Learners made of other libraries](learners.md) has a whole learner of each.

`PYTHONPATH=tests/support .venv/bin/python -m corpus > docs/state.md` writes this page.
"""
_COLUMNS = ("evicted", "killed", "restored")
_WORDS = {SAME: "carried", STAYS: "stays", REFUSED: "refused"}


def page() -> str:
    """The text of docs/state.md."""
    parts = [_HEAD]
    for topic in TOPICS:
        name = topic.__name__.rpartition(".")[2]
        rows = [entry for entry in KINDS.values() if entry.topic == name]
        lines = [f"## {name.capitalize()}", "", "| kind | evicted | its worker killed | restored | because of |"]
        lines += ["| --- | --- | --- | --- | --- |", *map(_row, rows)]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _row(entry: Kind) -> str:
    if entry.documented is not None:
        words, reason = ["differs"] * len(_COLUMNS), entry.documented
    else:
        words, reason = [_WORDS[entry.expected[way]] for way in _COLUMNS], entry.refused or ""
    if reason.startswith("'"):
        reason = f"`{reason[1:-1]}`"
    return "| " + " | ".join([entry.sentence, *words, reason]) + " |"
