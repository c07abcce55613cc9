"""Learners for the tests: worker processes import them, and pytest collects none."""

from __future__ import annotations

import asyncio
import ctypes
import functools
import gc
import logging
import os
import random
import threading
import time
import warnings
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import strangers
import torch
from torch import Tensor, nn

import torchfedrpc as tfr

_log = logging.getLogger("learners.probe")
_POLL_S = 0.001
_meetings: dict[str, int] = {}
_steps = 0  # of async methods, in this process
_shared_made: list[str] = []


class Odd(Exception):
    """An exception with several constructor arguments that are not its args."""

    def __init__(self, code: int, where: str) -> None:
        super().__init__(f"code {code}")
        self.code = code
        self.where = where


class KeywordOnly(Exception):
    """An exception that pickle could not make again."""

    def __init__(self, *, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class WithLock(Exception):
    """An exception that cannot be pickled."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.stream = open(os.devnull)  # noqa: SIM115 - held on purpose
        self.stream.close()


class BadText(Exception):
    """An exception whose text fails."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class Reduced(Exception):
    """An exception whose own ``__reduce__`` must not be used."""

    def __reduce__(self) -> Any:
        return os.system, ("echo this must not run",)


class FileTrouble(OSError):
    """An OSError with a constructor of its own."""

    def __init__(self, path: str, code: int) -> None:
        super().__init__(code, "trouble", path)
        self.code = code


class Slotted(Exception):
    """An exception with an attribute in a slot."""

    __slots__ = ("detail",)

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class Undecodable(UnicodeDecodeError):
    """A subclass of a builtin that keeps its fields in C."""


class Fatal(BaseException):
    """Not an Exception, and no loop breaker either."""


class Tagged(torch.Tensor):
    """A tensor subclass."""


class Batch:
    """A plain class of the learner's own module."""

    def __init__(self, data: Any) -> None:
        self.data = data


def a_function() -> None:
    """What no pickle may name, also of a trusted module."""


class SlowToPack:
    """Stops the thread that packs it until a file is there."""

    def __init__(self, until: str) -> None:
        self.until = until

    def __getstate__(self) -> dict[str, Any]:
        Path(self.until + ".packing").touch()
        _wait_for(self.until)
        return {"until": self.until}


class CountsPacking:
    """Counts how often it is packed in this process."""

    num_packed = 0

    def __getstate__(self) -> dict[str, Any]:
        type(self).num_packed += 1
        return {}


def _raise(kind: str) -> None:
    errors: dict[str, Any] = {
        "value": lambda: ValueError("plain", 1),
        "unicode": lambda: ValueError("größe \\x é\\u12 \N{SNOWMAN} %s {}"),
        "key": lambda: KeyError("missing"),
        "odd": lambda: Odd(7, "here"),
        "keyword_only": lambda: KeywordOnly(reason="because"),
        "with_lock": lambda: WithLock("holds a file"),
        "lambda_arg": lambda: ValueError(lambda: 1),
        "bad_text": BadText,
        "reduced": lambda: Reduced("arg"),
        "stranger": lambda: strangers.StrangeError("from elsewhere"),
        "system_exit": lambda: SystemExit(3),
        "keyboard": KeyboardInterrupt,
        "generator_exit": GeneratorExit,
        "cancelled": asyncio.CancelledError,
        "stop": lambda: StopIteration(5),
        "stop_async": StopAsyncIteration,
        "timeout": lambda: TimeoutError("the learner's own"),
        "os": lambda: FileNotFoundError(2, "No such file", "/nowhere"),
        "os_subclass": lambda: FileTrouble("/somewhere", 13),
        "slotted": lambda: Slotted("in a slot"),
        "undecodable": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad byte"),
        "undecodable_subclass": lambda: Undecodable("utf-8", b"\xff", 0, 1, "bad byte"),
        "group": lambda: ExceptionGroup("several", [ValueError("a"), KeyError("b")]),
        "fatal": lambda: Fatal("not an Exception"),
        "recursion": RecursionError,
        "assertion": lambda: AssertionError("x", torch.ones(2)),
    }
    if kind == "axis":
        np.zeros(3).sum(axis=5)
    if kind == "linalg":
        torch.linalg.inv(torch.zeros(2, 2))
    error = errors[kind]()
    if kind == "value":
        error.add_note("a note of the learner's")
        error.extra = {"weights": torch.ones(2)}
    if kind == "fatal":
        raise error
    try:
        dict[str, int]()["the cause"]
    except KeyError as cause:
        raise error from cause


def _wait_for(path: str) -> None:
    while not Path(path).exists():
        time.sleep(_POLL_S)


class Probe:
    """A learner that does whatever a test asks of it."""

    number = 3  # public, and no method

    def __init__(self, client_id: str, **kwargs: Any) -> None:
        self.client_id = client_id
        self.kwargs = kwargs
        self.log: list[Any] = []
        self.kept: Any = None
        self.birth = _draw()
        self.born_in = tfr.current_call().method

    def constructor_kwargs(self) -> dict[str, Any]:
        return self.kwargs

    # The usual methods.

    def train_epoch(self, /, **kwargs: Any) -> dict[str, Any]:
        return {"client": self.client_id, "method": "train_epoch", "kwargs": kwargs}

    def evaluate(self, /, **kwargs: Any) -> dict[str, Any]:
        return {"client": self.client_id, "method": "evaluate", "kwargs": kwargs}

    def get_model_weights(self) -> Any:
        return self.kept

    def set_model_weights(self, weights: Any) -> None:
        self.kept = weights

    # A name that the proxy has too.

    def stream(self, *args: Any) -> Any:
        return args

    # Values.

    def echo(self, /, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    async def echo_async(self, /, *args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(0)
        return args, kwargs

    def log_all(self, messages: list[str], level: str) -> None:
        for message in messages:
            _log.log(getattr(logging, level.upper()), "%s", message)

    def log_and_fail(self) -> None:
        try:
            _raise("value")
        except ValueError:
            _log.exception("about to fail")
            raise

    async def log_async(self, level: str) -> None:
        await self.log_step("begins", level)
        await asyncio.sleep(0.01)
        await self.log_step("ends", level)

    async def log_step(self, step: str, level: str) -> None:
        _log.log(getattr(logging, level.upper()), "%s %s", self.client_id, step)

    def print_all(self, lines: list[str]) -> None:
        for line in lines:
            print(line)

    def warn(self, message: str) -> None:
        warnings.warn(message, stacklevel=1)

    def same(self, value: Any) -> Any:
        return value

    def keep(self, value: Any) -> None:
        self.kept = value

    def live(self) -> Any:
        """The very object that was kept."""
        return self.kept

    def add_to_kept(self, amount: float) -> None:
        """In place, on every tensor and array kept."""
        for value in self.kept.values() if isinstance(self.kept, dict) else [self.kept]:
            with torch.no_grad():
                value += amount

    def scribble(self, value: Any) -> None:
        """Change an argument in place."""
        if isinstance(value, list):
            value.append("scribbled")
        elif isinstance(value, dict):
            value["scribbled"] = True
        else:
            value += 1

    def build_model(self) -> None:
        self.kept = nn.Linear(3, 2)

    def live_state_dict(self) -> Any:
        return self.kept.state_dict()

    def step_model(self) -> None:
        with torch.no_grad():
            for parameter in self.kept.parameters():
                parameter.add_(1.0)

    def describe(self, value: Any) -> dict[str, Any]:
        """What a tensor looks like on this side."""
        return {
            "type": type(value).__name__,
            "dtype": str(value.dtype),
            "shape": tuple(value.shape),
            "stride": tuple(value.stride()) if value.layout is torch.strided else None,
            "requires_grad": value.requires_grad,
            "is_leaf": value.is_leaf,
        }

    def tied(self, first: Tensor, second: Tensor) -> bool:
        """Whether a change of the one is seen in the other."""
        before = second.clone()
        first.add_(1)
        return not torch.equal(second, before)

    def returns_a_lambda(self) -> Any:
        return lambda: 1

    def returns_a_stranger(self) -> Any:
        return strangers.Stranger()

    def returns_a_generator(self) -> Any:
        return (number for number in range(3))

    def returns_bad_tensor(self, kind: str) -> Tensor:
        return bad_tensor(kind)

    def slow_to_pack(self, until: str) -> SlowToPack:
        return SlowToPack(until)

    async def slow_to_pack_async(self, until: str) -> SlowToPack:
        return SlowToPack(until)

    # Order and time.

    def append(self, item: Any) -> int:
        self.log.append(item)
        return len(self.log)

    async def append_async(self, item: Any) -> int:
        self.log.append(("begin", item))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        self.log.append(("end", item))
        return len(self.log)

    def what_happened(self) -> list[Any]:
        return self.log

    def hold(self, until: str) -> str:
        """Report that it runs, then wait for a file or for the end of the call."""
        call = tfr.current_call()
        self.log.append("hold begins")
        call.report("holding")
        while not Path(until).exists():
            if call.cancelled:
                self.log.append("hold saw cancelled")
                return "cancelled"
            time.sleep(_POLL_S)
        self.log.append("hold released")
        return "released"

    def work(self, until: str | None = None) -> int:
        """As `hold` where a file is named, else nothing."""
        if until is not None:
            self.hold(until)
        return 1

    def hold_regardless(self, until: str) -> str:
        """As `hold`, and blind to cancellation."""
        self.log.append("hold begins")
        tfr.current_call().report("holding")
        _wait_for(until)
        self.log.append(("hold ends", tfr.current_call().cancelled))
        return "released"

    def compute(self, until: str) -> int:
        """Compute until a file is there, and hardly ever let another thread run."""
        tfr.current_call().report("computing")
        total = 0
        while not Path(until).exists():
            total += sum(range(10_000))
        return total

    async def hold_async(self, until: str) -> str:
        self.log.append("hold begins")
        tfr.current_call().report("holding")
        try:
            while not Path(until).exists():
                await asyncio.sleep(_POLL_S)
        except asyncio.CancelledError:
            self.log.append(("hold cancelled", tfr.current_call().cancelled))
            raise
        self.log.append("hold released")
        return "released"

    async def hold_if(self, path: str | None) -> str:
        """Hold where a path is given."""
        if path is None:
            return "released"
        try:
            while not Path(path).exists():
                await asyncio.sleep(_POLL_S)
        except asyncio.CancelledError:
            self.log.append(("hold cancelled", tfr.current_call().cancelled))
            raise
        self.log.append("hold released")
        return "released"

    async def hold_stubbornly(self, until: str) -> str:
        """Async, and goes on when it is cancelled."""
        tfr.current_call().report("holding")
        while not Path(until).exists():
            try:
                await asyncio.sleep(_POLL_S)
            except asyncio.CancelledError:
                self.log.append("cancel ignored")
        return "released"

    def nap(self, seconds: float) -> str:
        time.sleep(seconds)
        return "slept"

    async def nap_async(self, seconds: float) -> str:
        await asyncio.sleep(seconds)
        return "slept"

    async def meet(self, key: str, num_learners: int) -> int:
        """Return once so many learners of this process are in here at once."""
        _meetings[key] = _meetings.get(key, 0) + 1
        while _meetings[key] < num_learners:
            await asyncio.sleep(_POLL_S)
        return _meetings[key]

    async def count_own_steps(self, until: str) -> int:
        global _steps
        tfr.current_call().report("stepping")
        count = 0
        while not Path(until).exists():
            _steps += 1
            count += 1
            await asyncio.sleep(0)
        return count

    def steps_meanwhile(self, seconds: float) -> int:
        """Steps of async methods of this process while this sync method runs."""
        before = _steps
        time.sleep(seconds)
        return _steps - before

    def num_frozen(self) -> int:
        """How many objects the garbage collector of this process leaves alone."""
        return gc.get_freeze_count()

    def process_id(self) -> int:
        return os.getpid()

    def node(self) -> str | None:
        return os.environ.get("TFR_NODE")

    def die(self) -> None:
        os.kill(os.getpid(), 9)

    # The current call.

    def context(self) -> dict[str, Any]:
        call = tfr.current_call()
        return {
            "client_id": call.client_id,
            "method": call.method,
            "call_id": call.call_id,
            "device": str(call.device),
            "cancelled": call.cancelled,
            "generator": isinstance(call.generator, torch.Generator) and call.generator is call.generator,
        }

    async def context_async(self) -> dict[str, Any]:
        await asyncio.sleep(0)
        await asyncio.gather(asyncio.sleep(0), asyncio.sleep(0))
        return self.context()

    def context_stream(self) -> Iterator[Any]:
        yield self.context()
        yield self.context()

    def report_all(self, values: list[Any]) -> str:
        for value in values:
            tfr.current_call().report(value)
        return "reported"

    def report_live(self) -> None:
        progress = torch.zeros(1)
        for _ in range(3):
            tfr.current_call().report(progress)
            progress += 1

    def report_unsendable(self) -> None:
        tfr.current_call().report(lambda: 1)

    def shared_object(self, key: str) -> tuple[int, int, Tensor]:
        """(process, times made, its random content)."""

        def make() -> Tensor:
            _shared_made.append(key)
            return torch.rand(3)

        content = tfr.current_call().shared(key, make)
        return os.getpid(), _shared_made.count(key), content

    def draw_from_generator(self) -> Tensor:
        call = tfr.current_call()
        return torch.rand(3, generator=call.generator, device=call.device)

    # Randomness.

    def draw(self) -> Any:
        return _draw()

    def draw_other(self) -> Any:
        return _draw()

    async def draw_async(self, num_steps: int) -> Any:
        drawn = []
        for _ in range(num_steps):
            drawn.append(_draw())
            await asyncio.sleep(0)
        return drawn

    async def draw_after(self, until: str) -> Any:
        """Draws, lets others draw meanwhile, draws again."""
        first = _draw()
        tfr.current_call().report("drew")
        while not Path(until).exists():
            await asyncio.sleep(_POLL_S)
        return first, _draw()

    def draw_stream(self, num_items: int) -> Iterator[Any]:
        for _ in range(num_items):
            yield _draw()

    async def draw_async_stream(self, num_items: int) -> AsyncIterator[Any]:
        for _ in range(num_items):
            await asyncio.sleep(0)
            yield _draw()

    def seed_globally(self) -> None:
        """What a careless learner does."""
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        np.random.standard_normal()

    def drawn_at_birth(self) -> Any:
        return self.birth, self.born_in

    # State that a thread keeps.

    def leave_grad_off(self) -> None:
        torch.set_grad_enabled(False)

    async def no_grad_while_waiting(self, until: str) -> bool:
        with torch.no_grad():
            tfr.current_call().report("holding")
            while not Path(until).exists():
                await asyncio.sleep(_POLL_S)
            return torch.is_grad_enabled()

    def grad_enabled(self) -> bool:
        return torch.is_grad_enabled()

    async def grad_enabled_async(self) -> bool:
        await asyncio.sleep(0)
        return torch.is_grad_enabled()

    def num_threads(self) -> int:
        return torch.get_num_threads()

    # Errors.

    def fail(self, kind: str) -> None:
        _raise(kind)

    async def fail_async(self, kind: str) -> None:
        await asyncio.sleep(0)
        _raise(kind)

    def fail_if(self, fails: bool, value: Any = "fine") -> Any:
        if fails:
            raise ValueError(f"{self.client_id} fails")
        return value

    def _private(self) -> str:
        return "secret"

    @property
    def broken(self) -> Any:
        raise ValueError("a property that fails")

    # Streams.

    def count(self, stop: int) -> Iterator[int]:
        try:
            for number in range(stop):
                self.log.append(number)
                yield number
        finally:
            self.log.append("closed")

    async def count_async(self, stop: int) -> AsyncIterator[int]:
        try:
            for number in range(stop):
                await asyncio.sleep(0)
                self.log.append(number)
                yield number
        finally:
            await asyncio.sleep(0)
            self.log.append("closed")

    def talk(self, total: Any) -> Generator[Any, Any, None]:
        try:
            while (value := (yield total)) != "end":
                self.log.append(value)
                total = total if value is None else total + value
            self.log.append("end")
        finally:
            self.log.append("closed")

    async def talk_async(self, total: Any) -> AsyncGenerator[Any, Any]:
        try:
            while (value := (yield total)) != "end":
                await asyncio.sleep(0)
                self.log.append(value)
                total = total if value is None else total + value
            self.log.append("end")
        finally:
            self.log.append("closed")

    def plain_iterator(self, items: list[Any]) -> Iterator[Any]:
        return iter(items)

    def each_of(self, items: list[Any]) -> Iterator[Any]:
        yield from items

    def count_then_fail(self, stop: int) -> Iterator[int]:
        yield from range(stop)
        raise ValueError("after the last item")

    async def count_then_fail_async(self, stop: int) -> AsyncIterator[int]:
        for number in range(stop):
            yield number
        raise ValueError("after the last item")

    def stream_live(self) -> Iterator[Any]:
        self.kept = torch.zeros(2)
        for _ in range(3):
            yield self.kept
            self.kept += 1

    def stream_unsendable(self) -> Iterator[Any]:
        try:
            yield 1
            yield lambda: 2
        finally:
            self.log.append("closed")

    def stream_with_hold(self, until: str) -> Iterator[str]:
        try:
            yield "first"
            yield self.hold(until)
        finally:
            self.log.append("closed")

    async def stream_with_hold_async(self, until: str) -> AsyncIterator[str]:
        try:
            yield "first"
            yield await self.hold_async(until)
        finally:
            self.log.append("closed")


def _draw() -> tuple[Any, ...]:
    return (
        torch.rand(2).tolist(),
        torch.randperm(5).tolist(),
        np.random.rand(),
        np.random.standard_normal(),
        random.random(),
        random.gauss(0, 1),
    )


def bad_tensor(kind: str) -> Tensor:
    """A tensor that must be refused before it is sent."""
    if kind == "nested":
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    if kind == "nested strided":
        return torch._nested_tensor_from_tensor_list([torch.ones(2), torch.ones(3)])
    if kind == "mkldnn":
        return torch.ones(2, 2).to_mkldnn()
    if kind == "meta":
        return torch.ones(2, device="meta")
    if kind == "freed":
        tensor = torch.ones(4)
        tensor.untyped_storage().resize_(0)
        return tensor
    if kind == "lazy":
        return nn.LazyLinear(2).weight
    raise ValueError(kind)


class Nursery:
    """A learner that fails to be made as often as its arguments say, and remembers what it was given."""

    given: dict[str, list[Any]] = {}

    def __init__(self, client_id: str, failures: int = 0, weights: Tensor | None = None) -> None:
        self.client_id = client_id
        tries = self.given.setdefault(client_id, [])
        tries.append(None if weights is None else weights.tolist())
        if weights is not None:
            weights.add_(1)
        if len(tries) <= failures:
            raise ValueError(f"{client_id}: try {len(tries)}")

    def tries(self) -> list[Any]:
        return self.given[self.client_id]


def make_probe(client_id: str, **kwargs: Any) -> Probe:
    """A factory."""
    return Probe(client_id, made_by="factory", **kwargs)


probe_with_kwargs = functools.partial(Probe, common=1, own=1)


class Outer:
    """Holds a learner inside."""

    class Inner(Probe):
        """A learner that is found by a dotted name."""


class Loading:
    """A learner that reads its data with worker processes of its own."""

    def __init__(self, client_id: str) -> None:
        self.data = torch.utils.data.TensorDataset(torch.arange(12.0))

    def load(self) -> list[float]:
        loader = torch.utils.data.DataLoader(self.data, batch_size=3, num_workers=2, shuffle=True)
        return [value for (batch,) in loader for value in batch.tolist()]


def make_a_closure() -> Any:
    """A learner that no worker could find."""

    class Hidden(Probe):
        pass

    return Hidden


class Mortal(Probe):
    """A learner whose process may end: what it runs is also noted in a file, which outlives the process."""

    def step(self) -> list[float]:
        """Draw, add to what was drawn so far, and return that."""
        self.kept = (0 if self.kept is None else self.kept) + torch.rand(2)
        return list(self.kept.tolist())

    def note(self, path: str, item: Any = "") -> int:
        with Path(path).open("a") as file:
            file.write(f"{self.client_id} {item}\n")
        return self.append(item)

    def note_and_hold(self, path: str, until: str) -> int:
        count = self.note(path)
        tfr.current_call().report("holding")
        _wait_for(until)
        return count

    def report_and_hold(self, until: str) -> str:
        for number in range(2):
            tfr.current_call().report(number)
        _wait_for(until)
        tfr.current_call().report(2)
        return "reported"

    def block(self, how: str, seconds: int) -> str:
        """Keep this process busy: with the GIL held, or in operators of torch."""
        tfr.current_call().report("blocking")
        end = time.monotonic() + seconds
        if how == "gil":
            ctypes.PyDLL(None).sleep(seconds)
        while time.monotonic() < end:
            torch.linalg.svdvals(torch.rand(600, 600))
        return how

    def hide(self, what: str) -> None:
        """Keep what cannot be captured, or nothing."""
        kinds: dict[str, Any] = {
            "lock": threading.Lock,
            "generator": lambda: (number for number in range(3)),
            "nothing": list,
        }
        self.hidden: Any = kinds[what]()


class Stillborn:
    """A learner whose first making fails, and whose second ends its process; it counts them in a file."""

    def __init__(self, client_id: str, path: str) -> None:
        with Path(path).open("a") as file:
            file.write("made\n")
        self.num_made = len(Path(path).read_text().splitlines())
        if self.num_made == 1:
            raise ValueError("the first fails")
        if self.num_made == 2:
            os.kill(os.getpid(), 9)

    def made(self) -> int:
        return self.num_made


class Shadowed:
    """Some of its methods have names that handles or groups have themselves."""

    def __init__(self, client_id: str) -> None:
        self.client_id = client_id  # an attribute, which no handle would call

    def options(self) -> str:
        return "its options"

    def reduce(self) -> str:
        return "its reduce"

    def train_epoch(self) -> str:
        return "trained"


def shadowed(client_id: str) -> Shadowed:
    """A factory: nothing tells the class of what it makes before it is called."""
    return Shadowed(client_id)
