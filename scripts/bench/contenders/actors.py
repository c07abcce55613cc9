"""Calls and FedAvg with actors of Ray or Monarch, by hand: two processes with an actor and fifty learners each.

What a practised user does is done. Weights travel as NumPy arrays, which both send much faster than tensors. In a
round of FedAvg an actor trains half of the clients in one call and gives their average.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import workload
from protocol import Cannot, Repeat, calling
from workload import Arrays, Weights

NUM_ACTORS = workload.NUM_PROCESSES


class Learner:
    """A learner; several share an actor."""

    def no_op(self) -> None:
        """Nothing."""


class Worker:
    """The actor."""

    def __init__(self) -> None:
        workload.make_ready()
        self.learners = [Learner() for _ in range(workload.NUM_GATHERED_LEARNERS // NUM_ACTORS)]
        self.kept = workload.model_weights()
        self.received: Weights = {}

    def no_op(self) -> None:
        """Nothing."""

    def no_op_of(self, learner: int) -> None:
        """Nothing, done by one of the learners."""
        return self.learners[learner].no_op()

    def push(self, arrays: Arrays) -> None:
        """Take weights and keep them until the next."""
        self.received = workload.as_weights(arrays)

    def received_digest(self) -> str:
        """Of the weights that were pushed last."""
        return workload.digest(self.received)

    def pull(self) -> Arrays:
        """Give the worker's own weights."""
        return workload.as_arrays(self.kept)

    def train(self, kind: str, arrays: Arrays, clients: list[int]) -> Arrays:
        """Train clients from the same weights and give their average."""
        return workload.train_share(kind, arrays, clients)


def refuse_local(workloads: tuple[str, ...]) -> None:
    """Refuse FedAvg in one process.

    Raises:
        Cannot: If the workloads are nothing else.
    """
    torch.set_num_threads(1)
    if set(workloads) <= set(workload.KINDS):
        raise Cannot("an actor is a process: see the rounds on two workers")


def calls(
    call: Callable[..., Any],
    many: Callable[[list[tuple[int, int]]], Any],
    received: Callable[[Arrays], Weights],
    train: workload.Train,
) -> dict[str, Repeat]:
    """All workloads.

    Args:
        call: Calls a method of the first actor; its result can be awaited.
        many: Calls ``no_op_of`` for each pair of an actor and a learner, and waits for all.
        received: Makes weights that belong to this process of what a call returned.
        train: Has the actors train, see `workload.rounds_by_hand`.
    """
    large, small = (workload.as_arrays(made()) for made in (workload.model_weights, workload.small_weights))
    numbers = [number % workload.NUM_GATHERED_LEARNERS for number in range(workload.NUM_GATHERED_CALLS)]
    learners = [(number % NUM_ACTORS, number // NUM_ACTORS) for number in numbers]

    async def pull() -> Weights:
        return received(await call("pull"))

    return {
        "noop": calling(lambda: call("no_op"), str),
        "gathered": calling(lambda: many(learners), lambda results: str(results[-1])),
        "push": calling(lambda: call("push", large), lambda _: call("received_digest")),
        "small": calling(lambda: call("push", small), lambda _: call("received_digest")),
        "pull": calling(pull, workload.digest),
        **workload.rounds_by_hand(train),
    }
