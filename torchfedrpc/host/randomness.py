"""Global random generators of a process: seeded for each call, with the process's own state set aside."""

from __future__ import annotations

import ctypes
import hashlib
import random
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_numpy: Any = np.random  # the type stubs lack set_bit_generator
_NUM_WORDS = 624  # of the state of a Mersenne Twister


def call_seed(seed: int, *names: object) -> int:
    """Return a 63-bit seed from the run's seed and names (client, method, number of the call).

    `random`, numpy and torch's CUDA generators use all bits. torch's CPU generator uses the low 32 bits: of 77,000
    calls, two have the same torch stream with a probability of one half, and different streams of numpy and `random`.
    """
    text = "\0".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


class StreamState(NamedTuple):
    """State of the global generators.

    Attributes:
        python: State of `random`.
        torch_cpu: State of torch's CPU generator.
        torch_gpus: States of the generators of the GPUs.
        numpy_generator: The bit generator of `numpy.random`.
        numpy_gauss: A normal variate that `numpy.random` has drawn in advance, if any.
    """

    python: Any
    torch_cpu: Tensor
    torch_gpus: list[Tensor]
    numpy_generator: Any
    numpy_gauss: float | None


class RandomStreams:
    """The global generators of torch (CPU and GPUs of learners), numpy and `random`.

    The process's own state is captured once for calls that follow each other directly, since this takes longer than
    seeding a call.

    Args:
        devices: The devices of the learners; those that are GPUs have a generator each.

    Attributes:
        aside: The process's own state while calls use the generators; else None.
        spare: Bit generators of calls that have ended, for later calls.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self.aside: StreamState | None = None
        self._of_gpus = [_gpu_generator(device) for device in devices if device.type == "cuda"]
        self._words: Any = _numpy.PCG64DXSM(0)
        self._words_seed = self._words.state
        self.spare: list[Twister] = []  # making one takes 250 us

    def seed(self, seed: int) -> Twister:
        """Seed all generators.

        Args:
            seed: From `call_seed`.

        Returns:
            The bit generator of numpy.
        """
        random.seed(seed)
        torch.default_generator.manual_seed(seed)
        for generator in self._of_gpus:
            generator.manual_seed(seed)
        twister = self.spare.pop() if self.spare else Twister()
        # np.random.seed() takes no more than 32 bits as a number, and 25 us for an array; this takes 5 us.
        self._words_seed["state"]["state"] = seed
        self._words.state = self._words_seed
        twister.words[:] = self._words.random_raw(_NUM_WORDS // 2)
        twister.position[0] = _NUM_WORDS
        _numpy.set_bit_generator(twister.generator)  # drops a variate drawn in advance
        return twister

    def capture(self) -> StreamState:
        """Return the state of the generators."""
        return StreamState(
            python=random.getstate(),
            torch_cpu=torch.default_generator.get_state(),
            torch_gpus=[generator.get_state() for generator in self._of_gpus] if self._of_gpus else [],
            numpy_generator=_numpy.get_bit_generator(),
            numpy_gauss=_numpy_gauss(),
        )

    def restore(self, state: StreamState) -> None:
        """Restore the state of the generators."""
        random.setstate(state.python)
        torch.default_generator.set_state(state.torch_cpu)
        if self._of_gpus:
            for generator, of_gpu in zip(self._of_gpus, state.torch_gpus, strict=True):
                generator.set_state(of_gpu)
        _numpy.set_bit_generator(state.numpy_generator)
        if state.numpy_gauss is not None:
            whole = _numpy.get_state(legacy=False)
            _numpy.set_state({**whole, "has_gauss": 1, "gauss": state.numpy_gauss})

    def give_back(self) -> None:
        """Restore the process's own state, if it is set aside."""
        if self.aside is not None:
            self.restore(self.aside)
            self.aside = None


class Twister:
    """A bit generator for numpy's global one, with a view of the words of its state in memory.

    Raises:
        RuntimeError: If this build of numpy has another memory layout.
    """

    __slots__ = ("generator", "position", "words")

    def __init__(self) -> None:
        self.generator = _numpy.MT19937(0)
        memory = (ctypes.c_uint32 * (_NUM_WORDS + 1)).from_address(self.generator.ctypes.state_address)
        state = np.frombuffer(memoryview(memory), np.uint32)
        told = self.generator.state["state"]
        if state.tolist() != [*told["key"].tolist(), told["pos"]]:
            raise RuntimeError(
                f"numpy {np.__version__} keeps the state of MT19937 in another way than calls are seeded by: "
                f"install another version of numpy, and report this"
            )
        self.words, self.position = state[:_NUM_WORDS].view(np.uint64), state[_NUM_WORDS:]


class _WithoutWords:
    """Replaces numpy's bit generator while the state that `numpy.random` keeps beside it is read."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator
        self.state = {"bit_generator": "MT19937"}

    def __getattr__(self, name: str) -> Any:  # of another thread that draws or seeds at this moment
        return getattr(self.generator, name)


def _numpy_gauss() -> float | None:
    """Return a normal variate that numpy has drawn in advance. get_state() would copy 624 words too, in 50 us."""
    owner: Any = _numpy.mtrand._rand
    generator = owner._bit_generator
    owner._bit_generator = _WithoutWords(generator)
    try:
        state = owner.get_state(legacy=False)
    finally:
        owner._bit_generator = generator
    return state["gauss"] if state["has_gauss"] else None


def _gpu_generator(device: torch.device) -> torch.Generator:
    torch.cuda.init()
    return torch.cuda.default_generators[device.index or 0]
