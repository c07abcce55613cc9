"""Kinds whose state is in single values: numbers, dates, enums, patterns, exceptions, functions, handles."""

from __future__ import annotations

import asyncio
import datetime
import decimal
import enum
import fractions
import functools
import hashlib
import io
import logging
import operator
import pathlib
import re
import tempfile
import threading
import types
import uuid
import zoneinfo
from collections import namedtuple
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from corpus.bits import bits
from corpus.registry import kind

UNSET = object()


class Phase(enum.Enum):
    """Where a learner is."""

    WARM = enum.auto()
    TRAIN = enum.auto()


class Rights(enum.Flag):
    """What a learner may do."""

    READ = 1
    WRITE = 2


class Level(enum.IntEnum):
    """How much a learner says."""

    LOW = 1
    HIGH = 2


Point = namedtuple("Point", "x y")


class Record(NamedTuple):
    """A typed row."""

    name: str
    loss: float = 0.0


@dataclass
class Settings:
    """Settings with a list of their own."""

    rate: float = 0.1
    history: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Fixed:
    """Settings that cannot be changed."""

    rate: float


@kind(refused="'best'")
class Sentinel:
    """A sentinel of the module, compared by `is`."""

    def __init__(self, client_id: str) -> None:
        self.best: Any = UNSET
        self.count = 0

    def step(self) -> str:
        was_unset = self.best is UNSET
        self.count += 1
        if self.count == 3:
            self.best = 1.0
        return bits(was_unset)


@kind()
class BuiltinSingletons:
    """None, Ellipsis and NotImplemented, compared by `is`."""

    def __init__(self, client_id: str) -> None:
        self.marks = [None, ..., NotImplemented]

    def step(self) -> str:
        self.marks = [*self.marks[1:], self.marks[0]]
        return bits([one is ... for one in self.marks])


@kind()
class Enums:
    """Enum, Flag and IntEnum, compared by `is`."""

    def __init__(self, client_id: str) -> None:
        self.phase, self.rights, self.level = Phase.WARM, Rights.READ, Level.LOW
        self.by_phase = {Phase.WARM: 0, Phase.TRAIN: 0}

    def step(self) -> str:
        was = self.phase is Phase.WARM, Rights.WRITE in self.rights, self.level is Level.LOW
        self.by_phase[self.phase] += 1
        self.phase, self.rights, self.level = Phase.TRAIN, self.rights | Rights.WRITE, Level.HIGH
        return bits(was, list(self.by_phase.values()))


@kind()
class Records:
    """namedtuples, dataclasses, frozen ones with slots, and a SimpleNamespace."""

    def __init__(self, client_id: str) -> None:
        self.point, self.record = Point(0, 1), Record("a")
        self.settings, self.fixed = Settings(), Fixed(0.1)
        self.space = types.SimpleNamespace(history=self.settings.history)

    def step(self) -> str:
        self.point = self.point._replace(x=self.point.x + 1)
        self.record = self.record._replace(loss=self.record.loss + 0.1)
        self.space.history.append(self.fixed.rate)
        self.fixed = Fixed(self.fixed.rate / 3)
        return bits(self.point, self.record, self.settings, self.fixed)


@kind()
class Numbers:
    """Large integers, complex numbers, Fraction and Decimal."""

    def __init__(self, client_id: str) -> None:
        self.big, self.z = 3**200, 1 + 2j
        self.share, self.price = fractions.Fraction(1, 3), decimal.Decimal("0.10")

    def step(self) -> str:
        self.big, self.z = self.big * 7 + 1, self.z * self.z
        self.share, self.price = self.share / 7, self.price + decimal.Decimal("0.010")
        return bits(self.big, self.z, self.share, self.price)


@kind()
class Dates:
    """Dates and times, with `fold` and a fixed offset."""

    def __init__(self, client_id: str) -> None:
        zone = datetime.timezone(datetime.timedelta(hours=2), "here")
        self.at = datetime.datetime(2024, 10, 27, 2, 30, 0, 5, zone, fold=1)
        self.day, self.gap = datetime.date(2024, 2, 28), datetime.timedelta(days=1, microseconds=1)

    def step(self) -> str:
        self.day += self.gap
        return bits(self.at, self.at.fold, self.at.tzname(), self.day, self.gap)


@kind(refused="'at'")
class Zone:
    """A time in a zone of the IANA database."""

    def __init__(self, client_id: str) -> None:
        self.at = datetime.datetime(2024, 3, 31, 1, 30, tzinfo=zoneinfo.ZoneInfo("UTC"))

    def step(self) -> str:
        self.at += datetime.timedelta(hours=1)
        return bits(self.at.isoformat(), self.at.tzinfo is zoneinfo.ZoneInfo("UTC"))


@kind()
class Names:
    """Paths, UUIDs, ranges, slices and bytes."""

    def __init__(self, client_id: str) -> None:
        self.path, self.id = pathlib.Path("/data") / client_id, uuid.UUID(int=5)
        self.rows, self.part, self.raw = range(1, 10, 3), slice(1, None, 2), b"\0\xff"

    def step(self) -> str:
        self.path /= "a"
        self.raw += b"\x01"
        return bits(self.path, self.id, list(self.rows), self.part, self.raw)


@kind(refused="'pattern'")
class Pattern:
    """A compiled regular expression."""

    def __init__(self, client_id: str) -> None:
        self.pattern = re.compile(r"(?P<name>\w+)-(\d+)", re.IGNORECASE)
        self.text = client_id

    def step(self) -> str:
        self.text = self.pattern.sub(r"\g<name>-\g<2>0", self.text)
        return bits(self.text, self.pattern.flags)


class Trouble(Exception):
    """An exception with an attribute."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


def _trouble() -> Exception:
    try:
        try:
            raise KeyError("cause")
        except KeyError as cause:
            raise Trouble("text", 7) from cause
    except Trouble as error:
        error.add_note("a note")
        return error


@kind()
class StoredException:
    """Exceptions that a learner keeps, with attributes and notes."""

    def __init__(self, client_id: str) -> None:
        self.errors: list[Exception] = []

    def step(self) -> str:
        error = Trouble("text", len(self.errors))
        error.add_note("a note")
        self.errors.append(error)
        return bits([(type(one).__name__, one.args, one.code, one.__notes__) for one in self.errors])


@kind(refused="'error'")
class ChainedException:
    """Exceptions that a learner keeps, with the exceptions that caused them."""

    def __init__(self, client_id: str) -> None:
        self.error: Exception = _trouble()
        self.error.__traceback__ = None

    def step(self) -> str:
        self.error.code += 1
        return bits(repr(self.error.__cause__), self.error.__suppress_context__, self.error.code)


@kind(refused="'schedule'")
class LambdaKept:
    """A lambda as an attribute."""

    def __init__(self, client_id: str) -> None:
        self.schedule = lambda number: 0.5**number
        self.count = 0

    def step(self) -> str:
        self.count += 1
        return bits(self.schedule(self.count))


def halved(x: float, by: float = 2.0) -> float:
    """A function of the learner's module."""
    return x / by


@kind(refused="'schedule'")
class FunctionKept:
    """A function of the learner's module as an attribute."""

    def __init__(self, client_id: str) -> None:
        self.schedule, self.value = halved, 1.0

    def step(self) -> str:
        self.value = self.schedule(self.value)
        return bits(self.value)


@kind(refused="'schedule'")
class PartialKept:
    """A `functools.partial` of a function."""

    def __init__(self, client_id: str) -> None:
        self.schedule, self.value = functools.partial(halved, by=3.0), 1.0

    def step(self) -> str:
        self.value = self.schedule(self.value)
        return bits(self.value)


@kind()
class PartialOfLayer:
    """A `functools.partial` of a class of layers, with numbers filled in."""

    def __init__(self, client_id: str) -> None:
        self.make_norm, self.x = functools.partial(torch.nn.LayerNorm, eps=0.1), torch.randn(3)

    def step(self) -> str:
        self.x = self.make_norm(3)(self.x).detach()
        return bits(self.x)


@kind()
class TorchFunctionKept:
    """A function of torch as an attribute."""

    def __init__(self, client_id: str) -> None:
        self.activation, self.x = torch.nn.functional.relu, torch.randn(3)

    def step(self) -> str:
        self.x = self.activation(self.x) - 0.1
        return bits(self.x)


@kind(refused="'hook'")
class BoundMethod:
    """A bound method of the learner."""

    def __init__(self, client_id: str) -> None:
        self.hook, self.count = self._advance, 0

    def _advance(self) -> None:
        self.count += 1

    def step(self) -> str:
        self.hook()
        return bits(self.count)


@kind(refused="'hook'")
class BoundMethodOfPart:
    """A bound method of another object."""

    def __init__(self, client_id: str) -> None:
        self.history: list[int] = []
        self.hook = self.history.append

    def step(self) -> str:
        self.hook(len(self.history))
        return bits(self.history)


@kind()
class ClassKept:
    """Classes as attributes, of the learner's module and of torch."""

    def __init__(self, client_id: str) -> None:
        self.make, self.layer, self.plain = Settings, torch.nn.Linear, dict

    def step(self) -> str:
        return bits(self.make(0.5), self.layer(1, 1).in_features, self.plain(a=1))


@kind(refused="'get'")
class ItemGetter:
    """`operator.itemgetter`."""

    def __init__(self, client_id: str) -> None:
        self.get, self.rows = operator.itemgetter(0), [[0, 1]]

    def step(self) -> str:
        self.rows[0][0] += 1
        return bits(self.get(self.rows[0]))


@kind(refused="'np'")
class ModuleKept:
    """A module as an attribute."""

    def __init__(self, client_id: str) -> None:
        import math

        self.np, self.x = math, 0.0

    def step(self) -> str:
        self.x = self.np.cos(self.x)
        return bits(self.x)


@kind(refused="'lock'")
class LockKept:
    """A lock."""

    def __init__(self, client_id: str) -> None:
        self.lock, self.count = threading.Lock(), 0

    def step(self) -> str:
        with self.lock:
            self.count += 1
        return bits(self.count)


@kind(refused="'event'")
class EventKept:
    """An event of threading, and a queue with items."""

    def __init__(self, client_id: str) -> None:
        import queue

        self.event = threading.Event()
        self.items: queue.Queue[Any] = queue.Queue()

    def step(self) -> str:
        was = self.event.is_set()
        self.event.set()
        self.items.put(1)
        return bits(was, self.items.qsize())


@kind(refused="'lock'")
class AsyncLock:
    """An `asyncio.Lock` around a step."""

    def __init__(self, client_id: str) -> None:
        self.lock, self.count = asyncio.Lock(), 0

    async def step(self) -> str:
        async with self.lock:
            self.count += 1
            await asyncio.sleep(0)
        return bits(self.count)


@kind(refused="'file'")
class OpenFile:
    """An open file that a learner appends to."""

    def __init__(self, client_id: str) -> None:
        self.file = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as users write it

    def step(self) -> str:
        self.file.write("a")
        self.file.flush()
        return bits(self.file.tell())


@kind(refused="'text'")
class TextBuffer:
    """`io.StringIO` as a log."""

    def __init__(self, client_id: str) -> None:
        self.text = io.StringIO()

    def step(self) -> str:
        self.text.write("a")
        return bits(self.text.getvalue(), self.text.tell())


@kind(refused="'digest'")
class Digest:
    """A hash that goes on from call to call."""

    def __init__(self, client_id: str) -> None:
        self.digest = hashlib.sha256()

    def step(self) -> str:
        self.digest.update(b"a")
        return bits(self.digest.hexdigest()[:8])


@kind(refused="'logger'")
class LoggerKept:
    """A logger as an attribute."""

    def __init__(self, client_id: str) -> None:
        self.logger, self.count = logging.getLogger("corpus"), 0

    def step(self) -> str:
        self.count += 1
        self.logger.debug("step")
        return bits(self.count, self.logger.name)


@kind()
class Texts:
    """Strings of all kinds, lone surrogates included."""

    def __init__(self, client_id: str) -> None:
        self.text = "größe \N{SNOWMAN} \0 \ud800"

    def step(self) -> str:
        self.text = self.text[1:] + self.text[0]
        return bits(ascii(self.text))
