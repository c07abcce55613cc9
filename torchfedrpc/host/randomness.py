"""Random streams of a call's own, so that results do not depend on where or beside what it runs."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch


def call_seed(seed: int, *names: object) -> int:
    """A 63-bit seed from the run's seed and the names of what is seeded (client, method, number of the call).

    `random`, numpy and torch's CUDA generators use all of its bits, torch's CPU generator the low 32 alone: of 77,000
    calls, two have the same torch stream with even odds, and different streams of numpy and `random`.
    """
    text = "\0".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


_numpy: Any = np  # the type stubs of its random leave out what swaps the global bit generator
_spare_generators: list[Any] = []  # making one takes longer than all the rest of a call's seeding


@dataclass(slots=True)
class _State:
    python: Any
    torch_cpu: torch.Tensor
    torch_device: torch.Tensor | None
    numpy_generator: Any
    numpy_gauss: dict[str, Any] | None  # the whole legacy state, where it holds a normal variate drawn ahead


class ProcessStreams:
    """The process's own streams, set aside while calls have the global generators.

    To look at them costs more than all the rest of a call's seeding, so calls that follow each other at once leave
    them aside together.

    Args:
        device: whose CUDA generator belongs to them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._aside: _State | None = None

    def set_aside(self) -> None:
        """Keep them, unless they are kept already."""
        if self._aside is None:
            self._aside = _capture(self._device)

    def give_back(self) -> None:
        """Put them in place again, if they were set aside."""
        if self._aside is not None:
            _restore(self._aside, self._device)
            self._aside = None


class RandomStreams:
    """The global generators of torch (CPU and one device), numpy and `random`, seeded for one call.

    A context manager to be entered around each step of the call: a later step goes on where the one before
    ended, and outside the steps the process's own streams are as they were.

    Args:
        seed: from `call_seed`.
        device: whose CUDA generator is seeded too.
        resumable: whether there will be a second step.
        outside: the streams outside, which are set aside and for somebody else to give back; unless given, those
            that are in place before each step are in place after it.

    Attributes:
        is_resumable: may be set within the first step, too.
    """

    def __init__(
        self,
        seed: int,
        device: torch.device,
        *,
        resumable: bool = False,
        outside: ProcessStreams | None = None,
    ) -> None:
        self._seed = seed
        self._device = device
        self.is_resumable = resumable
        self._outside = outside
        self._numpy_generator: Any = None
        self._own: _State | None = None
        self._outer: _State | None = None

    def __enter__(self) -> None:
        if self._outside is not None:
            self._outside.set_aside()
        else:
            self._outer = _capture(self._device)
        if self._own is not None:
            _restore(self._own, self._device)
            return
        random.seed(self._seed)
        torch.default_generator.manual_seed(self._seed)
        if generator := _device_generator(self._device):
            generator.manual_seed(self._seed)
        self._numpy_generator = _spare_generators.pop() if _spare_generators else _numpy.random.MT19937(0)
        _numpy.random.set_bit_generator(self._numpy_generator)
        _numpy.random.seed((self._seed & 0xFFFFFFFF, self._seed >> 32))  # as one number it would have to be 32 bits

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.is_resumable:
            self._own = _capture(self._device)
        else:
            _spare_generators.append(self._numpy_generator)
        if self._outer is not None:
            _restore(self._outer, self._device)
            self._outer = None


def _capture(device: torch.device) -> _State:
    generator = _device_generator(device)
    legacy = _numpy.random.get_state(legacy=False)
    return _State(
        python=random.getstate(),
        torch_cpu=torch.default_generator.get_state(),
        torch_device=generator.get_state() if generator else None,
        numpy_generator=_numpy.random.get_bit_generator(),
        numpy_gauss=legacy if legacy["has_gauss"] else None,
    )


def _restore(state: _State, device: torch.device) -> None:
    random.setstate(state.python)
    torch.default_generator.set_state(state.torch_cpu)
    if (generator := _device_generator(device)) and state.torch_device is not None:
        generator.set_state(state.torch_device)
    _numpy.random.set_bit_generator(state.numpy_generator)  # forgets a variate drawn ahead
    if state.numpy_gauss is not None:
        _numpy.random.set_state(state.numpy_gauss)


def _device_generator(device: torch.device) -> torch.Generator | None:
    if device.type != "cuda":
        return None
    torch.cuda.init()  # type: ignore[no-untyped-call]
    return torch.cuda.default_generators[device.index or 0]
