"""Kinds whose state is in data sets, samplers and loaders, and in what all clients of a process share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import data

import torchfedrpc as tfr
from corpus.bits import bits, problem
from corpus.registry import kind


class Rows(data.Dataset[Tensor]):
    """A data set of the learner's package."""

    def __init__(self, count: int) -> None:
        self.rows = torch.arange(float(count))
        self.reads = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        self.reads += 1
        return self.rows[index] + self.reads


@kind()
class Loader:
    """A shuffling DataLoader over a data set of the learner's package."""

    def __init__(self, client_id: str) -> None:
        self.loader = data.DataLoader(Rows(8), batch_size=3, shuffle=True)

    def step(self) -> str:
        return bits([batch.tolist() for batch in self.loader], self.loader.dataset.reads)


@kind()
class LoaderOfTensors:
    """A DataLoader over a TensorDataset, with a generator of its own."""

    def __init__(self, client_id: str) -> None:
        generator = torch.Generator().manual_seed(3)
        self.loader = data.DataLoader(data.TensorDataset(*problem(8)), 3, shuffle=True, generator=generator)

    def step(self) -> str:
        return bits(list(self.loader))


def collate(rows: list[Tensor]) -> Tensor:
    """A function of the learner's module."""
    return torch.stack(rows).sum()


@kind(refused="'loader'")
class LoaderWithFunction:
    """A DataLoader with a `collate_fn` of the learner's module."""

    def __init__(self, client_id: str) -> None:
        self.loader = data.DataLoader(Rows(8), batch_size=3, collate_fn=collate)

    def step(self) -> str:
        return bits(*self.loader)


@kind(refused="'loader'")
class LoaderWithLambda:
    """A DataLoader with a lambda as `collate_fn`."""

    def __init__(self, client_id: str) -> None:
        self.loader = data.DataLoader(Rows(8), batch_size=3, collate_fn=lambda rows: sum(rows))

    def step(self) -> str:
        return bits(*self.loader)


@kind(refused="'batches'")
class LoaderIterator:
    """An iterator over a DataLoader, part of the way."""

    def __init__(self, client_id: str) -> None:
        self.loader = data.DataLoader(Rows(12), batch_size=2, shuffle=True)
        self.batches = iter(self.loader)

    def step(self) -> str:
        return bits(next(self.batches))


@kind()
class LoaderNotState:
    """A DataLoader with a lambda that `not_state` leaves out."""

    not_state = {"loader"}

    def __init__(self, client_id: str) -> None:
        self.count = 0
        rows = torch.randn(6)
        self.loader = data.DataLoader(data.TensorDataset(rows), 2, shuffle=True, collate_fn=lambda rows: rows)

    def step(self) -> str:
        self.count += 1
        return bits(self.count, [len(batch) for batch in self.loader], next(iter(self.loader))[0][0])


@kind()
class Samplers:
    """Samplers of torch, with and without generators of their own."""

    def __init__(self, client_id: str) -> None:
        rows, generator = range(6), torch.Generator().manual_seed(1)
        self.samplers: list[Any] = [
            data.RandomSampler(rows, generator=generator),
            data.SubsetRandomSampler([1, 3, 5], generator),
            data.WeightedRandomSampler([0.1, 0.9], 4),
            data.BatchSampler(data.SequentialSampler(rows), 4, False),
        ]

    def step(self) -> str:
        return bits([list(sampler) for sampler in self.samplers])


@kind()
class DataSets:
    """Subset, ConcatDataset and random_split of a TensorDataset, which share its tensors."""

    def __init__(self, client_id: str) -> None:
        self.x = torch.arange(8.0)
        whole = data.TensorDataset(self.x)
        self.train, self.test = data.random_split(whole, [5, 3], torch.Generator().manual_seed(2))
        self.both = data.ConcatDataset([self.test, data.Subset(whole, [0])])

    def step(self) -> str:
        self.x += 1
        return bits([row[0] for row in self.train], [row[0] for row in self.both])


class Endless(data.IterableDataset[int]):
    """Numbers without end."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Any:
        while True:
            self.position += 1
            yield self.position


@kind()
class IterableData:
    """An iterable data set that knows its position."""

    def __init__(self, client_id: str) -> None:
        self.rows = Endless()

    def step(self) -> str:
        rows = iter(self.rows)
        return bits([next(rows) for _ in range(3)])


def _shared_rows() -> dict[str, Tensor]:
    return {"x": torch.arange(5000.0)}


@kind()
class SharedData:
    """An attribute from `current_call().shared(...)`."""

    def __init__(self, client_id: str) -> None:
        self.rows = tfr.current_call().shared("corpus-rows", _shared_rows)
        self.count = 0

    def step(self) -> str:
        self.count += 1
        shared = tfr.current_call().shared("corpus-rows", _shared_rows)
        return bits(self.count, self.rows["x"].sum(), self.rows is shared)
