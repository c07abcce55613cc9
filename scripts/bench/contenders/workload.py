"""The work that all contenders do: weights, data, models, a training step, digests; needs torch and numpy only.

Workloads that a peer may serve, and what one repetition of each is:

- ``noop``: one awaited call of a method without arguments that returns None, on one worker. Check: ``NO_OP_CHECK``.
- ``gathered``: ``NUM_GATHERED_CALLS`` such calls at once over ``NUM_GATHERED_LEARNERS`` learners on two workers,
  until all have their results. Check: ``NO_OP_CHECK``.
- ``push``: `model_weights` (40 MB) as the argument of a call on one worker, which has it in its own memory when the
  call ends. Check: `digest` of what arrived last, taken on the worker.
- ``pull``: a call that returns the `model_weights` that its worker keeps. Check: `digest` of what arrived last.
- ``small``: the same as ``push`` with `small_weights`.
- ``mlp``, ``cnn``: one round of FedAvg, in one process: the weights go to the `selected` clients, each runs
  `train_client`, and the results are averaged, weighted by samples. The first round of a request has number 0 and
  starts from `initial_weights`. Check: `fingerprint` of the weights after the last round.
- ``mlp_two``, ``cnn_two``: the same with the clients on two workers.
- ``equal_eight``, ``skewed_eight``: one round of a cohort of `sleepers`, each of which sleeps for `sleep_s`, on eight
  workers. Check: the sum of the clients' numbers.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import numpy as np
import torch
from protocol import Measured, Repeat
from torch import Tensor, nn

Weights = dict[str, Tensor]

KINDS = ("mlp", "cnn")

NO_OP_CHECK = "None"
NUM_GATHERED_CALLS = 3000
NUM_GATHERED_LEARNERS = 100

NUM_CLIENTS = 100
NUM_SELECTED = 20
NUM_SAMPLES = 50
BATCH_SIZE = 10
LEARNING_RATE = 0.05


NUM_SLEEPERS = 200
NUM_SLEEPING_WORKERS = 8
SLEEP_S = 0.03  # of equal clients, and the median of skewed ones


def model_weights() -> Weights:
    """A state dict of 40 MB: ten float32 tensors of shape (1000, 1000)."""
    generator = torch.Generator().manual_seed(1)
    return {f"layer{number}": torch.rand(1000, 1000, generator=generator) for number in range(10)}


def small_weights() -> Weights:
    """300 float32 tensors of shape (1000,)."""
    generator = torch.Generator().manual_seed(2)
    return {f"tensor{number}": torch.rand(1000, generator=generator) for number in range(300)}


def digest(weights: Weights) -> str:
    """Names, shapes, dtypes and bytes of weights, as a hash."""
    state = hashlib.sha256()
    for name, tensor in weights.items():
        state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        state.update(tensor.numpy().tobytes())
    return state.hexdigest()


def fingerprint(weights: Weights) -> list[float]:
    """Two numbers for each tensor, which differ little where the order of additions alone was another."""
    numbers = []
    for tensor in weights.values():
        values = tensor.detach().double().flatten()
        waves = torch.cos(torch.arange(len(values), dtype=torch.float64))
        numbers += [float(values.norm()), float(values @ waves)]
    return numbers


def make_model(kind: str) -> nn.Module:
    """A new model, ``mlp`` or ``cnn``, for images of 28x28 and ten classes."""
    if kind == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 10),
    )


def initial_weights(kind: str) -> Weights:
    """The weights before round 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return {name: tensor.clone() for name, tensor in make_model(kind).state_dict().items()}


@functools.cache
def shared_model(kind: str) -> nn.Module:
    """The model that all clients of a process train one after another; `train_client` gives it its weights."""
    return make_model(kind)


@functools.cache
def client_data(client: int) -> tuple[Tensor, Tensor]:
    """A client's images [50, 1, 28, 28] and labels [50], made once in a process.

    Args:
        client: 0 .. NUM_CLIENTS - 1.
    """
    generator = torch.Generator().manual_seed(1000 + client)
    labels = torch.randint(10, (NUM_SAMPLES,), generator=generator)
    images = torch.rand(NUM_SAMPLES, 1, 28, 28, generator=generator)
    images[torch.arange(NUM_SAMPLES), 0, labels * 2] += 1.0  # a bright line shows the class
    return images, labels


def selected(round_num: int) -> list[int]:
    """The clients of a round, numbers 0 .. NUM_CLIENTS - 1."""
    chosen = np.random.default_rng((4, round_num)).choice(NUM_CLIENTS, NUM_SELECTED, replace=False)
    return [int(client) for client in np.sort(chosen)]


def train_client(kind: str, weights: Weights, client: int) -> Weights:
    """One local epoch of a client from ``weights``, which stay as they are; the result is the caller's own.

    A client has NUM_SAMPLES samples. Their order is fixed, so that the result depends on the arguments alone.
    """
    model = shared_model(kind)
    model.load_state_dict(weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    images, labels = client_data(client)
    for first in range(0, NUM_SAMPLES, BATCH_SIZE):
        optimizer.zero_grad()
        logits = model(images[first : first + BATCH_SIZE])
        nn.functional.cross_entropy(logits, labels[first : first + BATCH_SIZE]).backward()
        optimizer.step()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def weighted_average(results: Iterable[tuple[Weights, int]]) -> Weights:
    """The average of weights, each with its number of samples; one pass, so that they need not all be kept."""
    total: Weights = {}
    num_samples = 0
    for weights, count in results:
        num_samples += count
        for name, tensor in weights.items():
            if name in total:
                total[name].add_(tensor, alpha=count)
            else:
                total[name] = tensor * count
    return {name: tensor / num_samples for name, tensor in total.items()}


Round = Callable[[Weights, int], "Weights | Awaitable[Weights]"]
"""A round of FedAvg: takes the weights and the number of the round, and gives the next weights; may be async."""


def rounds(kind: str, a_round: Round) -> Repeat:
    """The workload that does so many rounds, from the initial weights on."""

    async def repeat(count: int) -> Measured:
        weights, seconds = initial_weights(kind), []
        for round_num in range(count):
            began = time.perf_counter()
            result = a_round(weights, round_num)
            weights = await result if inspect.isawaitable(result) else result
            seconds.append(time.perf_counter() - began)
        return Measured(seconds, fingerprint(weights))

    return repeat


# Clients that sleep, on more workers than there are cores.

SLEEPS = {"equal": 32, "skewed": 64}
"""How many clients of a kind sleep in a round."""


@functools.cache
def sleep_s(kind: str, client: int) -> float:
    """How long a client sleeps each time; a skewed one by a log-normal distribution."""
    if kind == "equal":
        return SLEEP_S
    return float(SLEEP_S * np.random.default_rng((5, client)).lognormal(0.0, 1.0))


def sleepers(kind: str, round_num: int) -> list[int]:
    """The clients of a round, numbers 0 .. NUM_SLEEPERS - 1."""
    chosen = np.random.default_rng((6, round_num)).choice(NUM_SLEEPERS, SLEEPS[kind], replace=False)
    return [int(client) for client in np.sort(chosen)]


def best_schedule_s(kind: str, round_num: int) -> float:
    """How long a round takes if each client goes to the worker that is free first, the longest first."""
    ends = [0.0] * NUM_SLEEPING_WORKERS
    for seconds in sorted((sleep_s(kind, client) for client in sleepers(kind, round_num)), reverse=True):
        ends[ends.index(min(ends))] += seconds
    return max(ends)


Sleep = Callable[[int], "int | Awaitable[int]"]
"""A round of clients that sleep: takes its number, and gives the sum of the clients' numbers; may be async."""


def sleeping(kind: str, a_round: Sleep) -> Repeat:
    """``equal_eight`` or ``skewed_eight``."""

    async def repeat(count: int) -> Measured:
        total, seconds = 0, []
        for round_num in range(count):
            began = time.perf_counter()
            result = a_round(round_num)
            total += await result if inspect.isawaitable(result) else result
            seconds.append(time.perf_counter() - began)
        return Measured(seconds, str(total))

    return repeat


# FedAvg on two processes that are programmed by hand: each trains half of a round's clients and gives one average.

NUM_PROCESSES = 2

Arrays = dict[str, "np.ndarray[Any, Any]"]  # torch would put each tensor that is sent into a file
Train = Callable[[str, Arrays, list[list[int]]], "list[Arrays] | Awaitable[list[Arrays]]"]


def as_arrays(weights: Weights) -> Arrays:
    """Weights as arrays on the same memory."""
    return {name: tensor.numpy() for name, tensor in weights.items()}


def as_weights(arrays: Arrays) -> Weights:
    """Arrays as weights on the same memory."""
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def make_ready() -> None:
    """Make the data of all clients, in a process that trains them."""
    torch.set_num_threads(1)
    for client in range(NUM_CLIENTS):
        client_data(client)


def train_share(kind: str, arrays: Arrays, clients: list[int]) -> Arrays:
    """Train clients from the same weights and give their average."""
    weights = as_weights(arrays)
    return as_arrays(weighted_average((train_client(kind, weights, client), NUM_SAMPLES) for client in clients))


def rounds_by_hand(train: Train) -> dict[str, Repeat]:
    """``mlp_two`` and ``cnn_two``.

    Args:
        train: Takes the kind, the weights and each process's clients; gives each process's average.
    """

    async def a_round(kind: str, weights: Weights, round_num: int) -> Weights:
        chosen = selected(round_num)
        shares = [chosen[place::NUM_PROCESSES] for place in range(NUM_PROCESSES)]
        results = train(kind, as_arrays(weights), shares)
        averages = await results if inspect.isawaitable(results) else results
        pairs = zip(averages, shares, strict=True)
        return weighted_average((as_weights(average), len(share) * NUM_SAMPLES) for average, share in pairs)

    return {f"{kind}_two": rounds(kind, functools.partial(a_round, kind)) for kind in KINDS}
