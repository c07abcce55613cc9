"""Events: what happens in a run, told to whoever subscribes. Imports nothing of this library."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """Anything a subscriber is told."""


@dataclass(frozen=True)
class CallStarted(Event):
    """A call was submitted (it may still wait in its learner's queue)."""

    call_id: int
    client_id: str
    method: str


@dataclass(frozen=True)
class CallEnded(Event):
    """A call ended after ``seconds``; ``error`` is None where it gave a result."""

    call_id: int
    client_id: str
    method: str
    seconds: float
    error: BaseException | None


@dataclass(frozen=True)
class ProgressReported(Event):
    """A running method called ``current_call().report(progress)``; it comes before the call's `CallEnded`."""

    call_id: int
    client_id: str
    method: str
    progress: Any


@dataclass(frozen=True)
class WorkerLost(Event):
    """The worker of that name is gone, ``reason`` says how.

    Its learners are rebuilt as they are called, unless ``on_worker_lost=fail``.
    """

    worker: str
    reason: str


@dataclass(frozen=True)
class WorkerJoined(Event):
    """The worker of that name can be called: it has joined the run, or come in the place of one that was gone."""

    worker: str


@dataclass(frozen=True)
class WorkerLeft(Event):
    """The worker of that name has left in order; its learners were moved, or wait until it comes again."""

    worker: str


@dataclass(frozen=True)
class WorldFormed(Event):
    """After a loss or a joining the workers can be called again, ``seconds`` later, as the world ``generation``."""

    generation: int
    seconds: float


@dataclass(frozen=True)
class RoundStarted(Event):
    """A trainer begins round ``round_num`` (from 0) of ``num_rounds``."""

    round_num: int
    num_rounds: int


@dataclass(frozen=True)
class RoundEnded(Event):
    """A trainer has finished a round; ``metrics`` are its numbers by name."""

    round_num: int
    num_rounds: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """The run can go on from the end of round ``round_num``.

    Of ``num_learners`` the state had changed and was written, ``num_bytes`` in all; it took ``seconds``, beside the
    rounds that followed.
    """

    round_num: int
    num_learners: int
    num_bytes: int
    seconds: float


Subscriber = Callable[[Event], object]


class EventBus:
    """Hands each event to every subscriber, in the order of subscription, on the thread that publishes it.

    Attributes:
        subscribers: The subscribers, in order.
    """

    def __init__(self) -> None:
        self.subscribers: list[Subscriber] = []

    def subscribe(self, callback: Subscriber) -> Callable[[], None]:
        """Call ``callback(event)`` for each event from now on.

        Returns:
            A function that ends the subscription.
        """
        self.subscribers.append(callback)

        def unsubscribe() -> None:
            if callback in self.subscribers:
                self.subscribers.remove(callback)

        return unsubscribe

    def publish(self, event: Event) -> None:
        """Call all subscribers. The error of one is logged, and the others are called all the same."""
        for callback in tuple(self.subscribers):
            try:
                callback(event)
            except Exception:
                logger.exception("a subscriber failed on %r", event)
