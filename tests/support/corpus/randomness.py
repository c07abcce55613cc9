"""Kinds whose results are drawn: by their calls' streams, and by generators that they keep."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

import torchfedrpc as tfr
from corpus.bits import bits
from corpus.registry import kind


@kind()
class DrawsOfCalls:
    """Draws from torch, numpy and random in each call."""

    def __init__(self, client_id: str) -> None:
        self.birth = torch.rand(2)

    def step(self) -> str:
        self.birth = self.birth + torch.randn(2)
        return bits(self.birth, np.random.rand(), random.random())


@kind()
class DrawsOfContext:
    """Draws from `current_call().generator`."""

    def __init__(self, client_id: str) -> None:
        self.total = torch.zeros(2)

    def step(self) -> str:
        self.total += torch.rand(2, generator=tfr.current_call().generator)
        return bits(self.total)


@kind("step", "reseed", "step", "step")
class SeedsInCalls:
    """A call that sets the seeds."""

    def __init__(self, client_id: str) -> None:
        self.total = 0.0

    def step(self) -> str:
        self.total += float(torch.rand(())) + np.random.rand() + random.random()
        return bits(self.total)

    def reseed(self) -> str:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        return self.step()


@kind(*["step"] * 4)
class TorchGenerator:
    """A `torch.Generator`, with half a pair of normal numbers left, under two names."""

    def __init__(self, client_id: str) -> None:
        self.generator = torch.Generator().manual_seed(5)
        self.same = self.generator

    def step(self) -> str:
        one = torch.randn(1, generator=self.generator, dtype=torch.float64)
        return bits(one, torch.rand(1, generator=self.same), self.same is self.generator)


@kind(*["step"] * 4)
class NumpyGenerators:
    """numpy generators, two of which have one bit generator."""

    def __init__(self, client_id: str) -> None:
        self.first = np.random.default_rng(5)
        self.second = np.random.Generator(self.first.bit_generator)
        self.others = [
            np.random.Generator(made(3)) for made in (np.random.Philox, np.random.SFC64, np.random.MT19937)
        ]

    def step(self) -> str:
        draws = [one.integers(1000, dtype=np.uint32) for one in (self.first, self.second, *self.others)]
        return bits(list(map(int, draws)))


@kind(*["step"] * 4)
class NumpyRandomState:
    """`RandomState`, with half a pair of normal numbers left."""

    def __init__(self, client_id: str) -> None:
        self.state = np.random.RandomState(5)

    def step(self) -> str:
        return bits(self.state.randn(), self.state.randint(100))


@kind()
class NumpySeeds:
    """A `SeedSequence` that spawns, and a generator that does."""

    def __init__(self, client_id: str) -> None:
        self.seeds, self.generator = np.random.SeedSequence(5), np.random.default_rng(6)

    def step(self) -> str:
        child = self.generator.spawn(1)[0]
        return bits(self.seeds.spawn(1)[0].generate_state(1).tolist(), self.seeds.n_children_spawned, child.random())


class Biased(random.Random):
    """A generator with an attribute."""

    bias = 0.0


@kind(*["step"] * 4)
class PythonRandom:
    """`random.Random`, with half a pair of Gaussian numbers left."""

    def __init__(self, client_id: str) -> None:
        self.random = random.Random(5)

    def step(self) -> str:
        return bits(self.random.gauss(0, 1), self.random.random())


@kind(refused="'biased'")
class PythonRandomSubclass:
    """A subclass of `random.Random` with an attribute, which its pickle leaves out."""

    def __init__(self, client_id: str) -> None:
        self.biased = Biased(6)

    def step(self) -> str:
        self.biased.bias += 1
        return bits(self.biased.random(), self.biased.bias)


@kind(refused="'random'")
class SystemRandom:
    """`random.SystemRandom`, whose numbers come from the kernel."""

    def __init__(self, client_id: str) -> None:
        self.random: Any = random.SystemRandom()
        self.count = 0

    def step(self) -> str:
        self.count += 1 + int(self.random.random())
        return bits(self.count, type(self.random).__name__)
