"""A learner whose results are added up, and reducers that show how that was done, or do harm."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from learners import Mortal
from torch import Tensor

import torchfedrpc as tfr
from torchfedrpc.rpc import endpoint

_POLL_S = 0.001


class Adder(Mortal):
    """A learner of a numbered client, ``client_7`` say."""

    def text(self, text: str | None = None) -> str:
        return self.client_id.rpartition("_")[2] if text is None else text

    async def text_async(self) -> str:
        await asyncio.sleep(0)
        return self.text()

    def text_once_open(self, until: str | None = None) -> str:
        """The text, once a file is there, where one is named; blind to cancellation."""
        if until is not None:
            tfr.current_call().report("holding")
            while not Path(until).exists():
                time.sleep(_POLL_S)
        return self.text()

    async def text_once_open_async(self, until: str | None = None, ballast: bytes = b"") -> str:
        """The same, which ends when it is cancelled."""
        while until is not None and not Path(until).exists():
            await asyncio.sleep(_POLL_S)
        return self.text()

    def text_or_fail(self, fails: bool = False) -> str:
        self.log.append("text_or_fail")
        if fails:
            raise ValueError(f"{self.client_id} fails")
        return self.text()

    def draw_text_or_fatal(self, fails: bool = False) -> str:
        """Draw as `draw_text` does, then raise what is no Exception, if asked for."""
        text = self.draw_text()
        if fails:
            raise BaseException(f"{self.client_id} fails")
        return text

    def draw_text(self) -> str:
        """What shows whether all calls before it have run, each once."""
        return "/".join(map(str, self.step()))

    def train(self, size: int = 50, shared: Tensor | None = None) -> dict[str, Any]:
        """An update that cancels most of those of other clients."""
        number = int(self.text())
        update = torch.randn(size) * 10.0 ** (number % 7)
        self.kept = {
            "w": update if shared is None else update + shared,
            "half": torch.randn(5).bfloat16(),
            "num_batches_tracked": torch.tensor(number),
            "mask": torch.arange(4) < number % 5,
        }
        return {"model_weights": self.kept, "num_samples": number + 1, "loss": 1 / (number + 1), "correct": number}

    def change_and_give(self) -> Tensor:
        """Its live tensor, after a change in place."""
        self.kept = torch.zeros(3) if self.kept is None else self.kept
        kept: Tensor = self.kept
        return kept.add_(1)

    def of_size(self, size: int) -> Tensor:
        return torch.ones(size)

    def sparse_and_dense(self) -> dict[str, Tensor]:
        return {"sparse": torch.eye(3).to_sparse(), "dense": torch.ones(300, 300)}

    def number_of_batches(self) -> int:
        """Return the number of batches of this worker; of the driver's own host it is not known here."""
        return 0 if endpoint.serving is None else len(endpoint.serving.host._batches)


class Brackets:
    """Its value is how it came about."""

    def __init__(self) -> None:
        self.text = ""

    def add(self, result: Any) -> None:
        self.text = str(result)

    def merge(self, other: Brackets) -> None:
        self.text = f"({self.text}+{other.text})"

    def finish(self) -> str:
        return self.text


class Kept:
    """Keeps the very objects that it was given."""

    def __init__(self) -> None:
        self.results: list[Any] = []

    def add(self, result: Any) -> None:
        self.results.append(result)

    def merge(self, other: Kept) -> None:
        self.results += other.results

    def finish(self) -> list[Any]:
        return self.results


class Threads(Kept):
    """Notes with how many threads torch would add up."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def add(self, result: Any) -> None:
        self.seen.add(torch.get_num_threads())

    def merge(self, other: Kept) -> None:
        assert isinstance(other, Threads)
        self.seen |= other.seen | {torch.get_num_threads()}

    def finish(self) -> Any:
        return sorted(self.seen | {torch.get_num_threads()})


class Noted(Brackets):
    """Notes in a file what was added."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def add(self, result: Any) -> None:
        super().add(result)
        with Path(self.path).open("a") as file:
            file.write(f"{result}\n")


class Unsendable(Exception):
    """An error that cannot travel."""


class Failing(Brackets):
    """Fails at a step.

    Args:
        at: ``add``, ``merge`` or ``finish``.
        kind: of the error.
    """

    def __init__(self, at: str, kind: str) -> None:
        super().__init__()
        self.at = at
        self.kind = kind

    def _at(self, step: str) -> None:
        if step == self.at:
            if self.kind == "stop":
                raise StopIteration(5)
            if self.kind == "unsendable":
                raise Unsendable(lambda: 1)
            raise ValueError(f"no {step} for {self.text}")

    def add(self, result: Any) -> None:
        super().add(result)
        self._at("add")

    def merge(self, other: Brackets) -> None:
        self._at("merge")
        super().merge(other)

    def finish(self) -> str:
        self._at("finish")
        return super().finish()


class SlowToPack(Brackets):
    """Stops the thread that packs it, once there is something to it, until a file is there."""

    def __init__(self, until: str) -> None:
        super().__init__()
        self.until = until

    def __getstate__(self) -> Any:
        if self.text:
            Path(self.until + ".packing").touch()
        while self.text and not Path(self.until).exists():
            time.sleep(_POLL_S)
        return self.__dict__


class Unpackable(Brackets):
    """Cannot be packed once there is something to it."""

    def __getstate__(self) -> Any:
        return self.__dict__ | ({"hidden": lambda: 1} if self.text else {})


class Unopenable(Brackets):
    """Cannot be opened but in the process that made it."""

    def __init__(self) -> None:
        super().__init__()
        self.pid = os.getpid()

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["pid"] != os.getpid():
            raise ValueError("it is not at home here")
        self.__dict__.update(state)


class Deadly(Brackets):
    """Kills the process that does something with it, so many times.

    Args:
        at: ``merge`` or ``pack``; the driver's own process is spared.
        path: of files that count.
        times: how often.
    """

    def __init__(self, at: str, path: str, times: int = 1) -> None:
        super().__init__()
        self.at = at
        self.path = path
        self.times = times
        self.driver = os.getpid()

    def _at(self, step: str) -> None:
        if step != self.at or not self.text or os.getpid() == self.driver:
            return
        for number in range(self.times):
            with contextlib.suppress(FileExistsError):
                Path(f"{self.path}.{number}").touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)

    def merge(self, other: Brackets) -> None:
        self._at("merge")
        super().merge(other)

    def __getstate__(self) -> Any:
        self._at("pack")
        return self.__dict__
