"""The kinds of learners in the corpus: what each is asked, and what each way of running it should give."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

# How each kind is run. All but the first disturb its learner, or put it elsewhere.
WAYS = ("beside others", "evicted", "two workers", "killed", "restored")

# What may come of it.
SAME = "same"  # the results of a learner that is alone in its process, bit by bit
STAYS = "stays"  # the same; it was not evicted, and a log record or a warning names it
REFUSED = "refused"  # an error of this library instead of a result
DIFFERS = "DIFFERS"  # other results, without an error: documented for a few kinds, else a defect
FAILS = "FAILS"  # an error that is not of this library
UNDISTURBED = "UNDISTURBED"  # the harness has not done what it should

NUM_ROUNDS = 4  # no kind has more calls: each round is a pair of workers more where all are killed

_REFUSAL = {
    "beside others": SAME,
    "evicted": STAYS,
    "two workers": SAME,
    "killed": REFUSED,
    "restored": REFUSED,
}


@dataclass(frozen=True)
class Ask:
    """One call of a learner.

    Attributes:
        method: the method's name.
        args: its arguments.
        timeout_s: the call's deadline.
        streams: whether it is a generator method, of which all items are taken.
    """

    method: str
    args: tuple[Any, ...] = ()
    timeout_s: float | None = None
    streams: bool = False

    @property
    def is_alone(self) -> bool:
        """Whether it is called when no other client is."""
        return self.timeout_s is not None


@dataclass(frozen=True)
class Kind:
    """A kind of learner.

    Attributes:
        name: the beginning of its clients' names.
        topic: the module that defines it.
        learner: its class.
        calls: what each client is asked, one after another.
        clients: their names.
        refused: the attribute (or other part) that keeps a snapshot from being taken; None where there is one.
        documented: why its results may differ; None where they must not.
        expected: way -> `SAME`, `STAYS` or `REFUSED`.
        needs: the optional packages that its learner imports.
    """

    name: str
    topic: str
    learner: type
    calls: tuple[Ask, ...]
    clients: tuple[str, ...]
    refused: str | None
    documented: str | None
    expected: dict[str, str]
    needs: tuple[str, ...] = ()

    @property
    def is_present(self) -> bool:
        """Whether it can run here; in continuous integration (`CI` is set) it has to."""
        return bool(os.environ.get("CI")) or all(map(importlib.util.find_spec, self.needs))

    @property
    def sentence(self) -> str:
        """The kind in a line, for the table."""
        return (self.learner.__doc__ or "").strip().splitlines()[0].rstrip(".")


KINDS: dict[str, Kind] = {}
_KIND_OF: dict[str, Kind] = {}


def ask(method: str, *args: Any, timeout_s: float | None = None) -> Ask:
    """A call with arguments, or with a deadline."""
    return Ask(method, args, timeout_s)


def stream(method: str, *args: Any) -> Ask:
    """A call of a generator method."""
    return Ask(method, args, streams=True)


def kind(
    *calls: str | Ask,
    refused: str | None = None,
    documented: str | None = None,
    num_clients: int = 1,
    ways: dict[str, str] | None = None,
    needs: tuple[str, ...] = (),
) -> Callable[[type], type]:
    """Put a class into the corpus.

    Args:
        calls: what it is asked; three times ``step`` where none are given.
        refused: the part of its state that cannot be captured, as the error names it.
        documented: the reason why its results may differ.
        num_clients: how many learners of it there are; those of one kind follow each other.
        ways: outcomes that are others than those that follow from ``refused``.
        needs: the optional packages that its learner imports.
    """

    def register(cls: type) -> type:
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__).lower()
        assert name not in KINDS, f"two kinds are named {name}"
        assert cls.__doc__, f"{cls.__name__} needs a docstring"
        asks = tuple(Ask(one) if isinstance(one, str) else one for one in calls or ("step",) * 3)
        assert len(asks) <= NUM_ROUNDS, f"{cls.__name__} has more than {NUM_ROUNDS} calls"
        clients = tuple(f"{name}-{number}" for number in range(1, num_clients + 1))
        expected = dict(_REFUSAL) if refused is not None else dict.fromkeys(WAYS, SAME)
        topic = cls.__module__.rpartition(".")[2]
        found = Kind(name, topic, cls, asks, clients, refused, documented, expected | (ways or {}), needs)
        KINDS[name] = found
        _KIND_OF.update(dict.fromkeys(clients, found))
        cls.ready = _ready
        return cls

    return register


def kind_of(client_id: str) -> Kind:
    """The kind of a client's learner."""
    return _KIND_OF[client_id]


def present() -> list[Kind]:
    """The kinds whose packages are installed."""
    return [entry for entry in KINDS.values() if entry.is_present]


def clients() -> Iterator[str]:
    """All clients that can run here, kind after kind."""
    for entry in present():
        yield from entry.clients


def _ready(learner: Any) -> None:
    """Do nothing, as the second call of a journal, which a snapshot follows where ``journal_max_calls`` is 1."""
