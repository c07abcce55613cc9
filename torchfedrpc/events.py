"""Events of a run and the bus that publishes them. Imports no other module of this library."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """Base class of all events."""


@dataclass(frozen=True)
class RunStarted(Event):
    """Start of a run of a trainer, in the execution mode ``mode``, with ``num_clients`` clients."""

    mode: str
    num_clients: int


@dataclass(frozen=True)
class RunEnded(Event):
    """End of a run of a trainer; ``error`` is None if it ended well."""

    error: BaseException | None


@dataclass(frozen=True)
class CallStarted(Event):
    """Submission of a call. The call may still wait in its learner's queue."""

    call_id: int
    client_id: str
    method: str


@dataclass(frozen=True)
class CallTimes:
    """Stages of a call, in seconds. Their sum is `CallEnded.seconds`.

    The durations on a worker are measured by the worker. What is left is divided between ``transfer_s`` and
    ``return_s`` by the clocks. Worker processes on the driver's machine have the driver's clock. Those on other
    machines are compared with it by the fastest exchange of a call and its outcome so far; the error is at most half
    of that exchange's time on the way (`round_trip_s` in ``proxy.stats()``).

    In local mode, ``transfer_s`` and ``return_s`` are the changes of thread. Each item of a stream is a call. A call
    of a reduce ends when its worker reports that, before the partial results. A call that is sent more than once,
    after a retry or a loss, has the stages of its last attempt; the time before, that of replays included, is
    ``queue_s``. A call that ends without an outcome, by a deadline, a cancellation or a loss, has all time since it
    was sent in ``run_s``, and without having been sent in ``queue_s``.

    Attributes:
        queue_s: Waiting: for admission, earlier calls of the learner, a worker, and other calls of that worker.
            Packing the arguments is a part of it.
        transfer_s: Sending the call to its worker, until it is in the worker's queue.
        run_s: From the beginning on the worker to the packed result: making the learner or reading it from disk,
            opening the arguments, the method. An async method may wait meanwhile.
        return_s: Sending the result to the driver, and opening it there.
    """

    queue_s: float
    transfer_s: float
    run_s: float
    return_s: float


@dataclass(frozen=True)
class CallEnded(Event):
    """End of a call after ``seconds``; ``error`` is None if it returned a result.

    ``worker`` is the name of the process to which it was sent last, empty if it was not sent. ``times`` are its
    stages: None in an execution mode that overrides `execute_method` alone, and for calls that were submitted before
    the first subscription.
    """

    call_id: int
    client_id: str
    method: str
    seconds: float
    error: BaseException | None
    worker: str = ""
    times: CallTimes | None = None


@dataclass(frozen=True)
class ProgressReported(Event):
    """Progress that a running method reported by ``current_call().report(progress)``; precedes its `CallEnded`."""

    call_id: int
    client_id: str
    method: str
    progress: Any


@dataclass(frozen=True)
class WorkerLost(Event):
    """Loss of the worker ``worker``, with its ``reason``.

    Its learners are rebuilt at their next call, unless ``on_worker_lost=fail``.
    """

    worker: str
    reason: str


@dataclass(frozen=True)
class WorkerJoined(Event):
    """Arrival of the worker ``worker``: it joined the run or replaced a lost one, and accepts calls.

    ``has_returned`` shows that a worker of this name has served before, and was lost or has left.
    """

    worker: str
    has_returned: bool = False


@dataclass(frozen=True)
class WorkerLeft(Event):
    """Orderly departure of the worker ``worker``. Its learners were moved, or wait until it returns."""

    worker: str


@dataclass(frozen=True)
class WorkerLogged(Event):
    """Record that the process ``worker`` logged or printed.

    Attributes:
        worker: Name of the process.
        client_id: The client whose method logged it; None if no method did.
        level: Level as in `logging`, such as ``logging.INFO``.
        logger: Name of the logger; of printed lines ``stdout`` or ``stderr``.
        message: The message, with the traceback if it has one.
        time: When it was logged, by the worker's clock, in seconds since the epoch.
    """

    worker: str
    client_id: str | None
    level: int
    logger: str
    message: str
    time: float


@dataclass(frozen=True)
class ReplayStarted(Event):
    """Start of the replay of ``num_calls`` calls of a client's journal on ``worker``, which rebuilds its learner.

    `ReplayEnded` follows, unless that worker is lost too or the learner cannot be rebuilt.
    """

    client_id: str
    worker: str
    num_calls: int


@dataclass(frozen=True)
class ReplayEnded(Event):
    """End of the replay of ``num_calls`` calls of a client's journal on ``worker``, after ``seconds``."""

    client_id: str
    worker: str
    num_calls: int
    seconds: float


@dataclass(frozen=True)
class WorldFormed(Event):
    """New world, number ``generation``, after a loss or a join; forming it took ``seconds``."""

    generation: int
    seconds: float


@dataclass(frozen=True)
class RoundStarted(Event):
    """Start of round ``round_num`` (from 0) of ``num_rounds``."""

    round_num: int
    num_rounds: int


@dataclass(frozen=True)
class RoundEnded(Event):
    """End of round ``round_num`` (from 0) of ``num_rounds``; ``metrics`` maps names to values."""

    round_num: int
    num_rounds: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """Checkpoint from which the run can resume after round ``round_num``.

    The states of ``num_learners`` learners had changed and were written, ``num_bytes`` bytes in all. Writing took
    ``seconds``, in parallel with the following rounds.
    """

    round_num: int
    num_learners: int
    num_bytes: int
    seconds: float


Subscriber = Callable[[Event], object]


class EventBus:
    """Publisher that calls every subscriber in the order of subscription, on the publishing thread.

    Attributes:
        subscribers: The subscribers, in order.
    """

    def __init__(self) -> None:
        self.subscribers: list[Subscriber] = []

    def subscribe(self, callback: Subscriber) -> Callable[[], None]:
        """Call ``callback(event)`` for each event from now on.

        Returns:
            The function that ends the subscription.
        """
        subscribers = self.subscribers
        subscribers.append(callback)

        def unsubscribe() -> None:
            if callback in subscribers:
                subscribers.remove(callback)

        return unsubscribe

    def hand_over(self) -> EventBus:
        """Return a new bus with all subscribers. This one has none from now on, and publishes nothing more."""
        following = EventBus()
        following.subscribers, self.subscribers = self.subscribers, []
        return following

    def publish(self, event: Event) -> None:
        """Call all subscribers. An exception of a subscriber is logged; the others are still called."""
        for callback in tuple(self.subscribers):
            try:
                callback(event)
            except Exception:
                logger.exception("a subscriber failed on %r", event)
