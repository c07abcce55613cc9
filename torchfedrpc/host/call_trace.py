"""Stages of one call, as the driver and the process that runs it record them."""

from __future__ import annotations

import time
from dataclasses import dataclass

from torchfedrpc.events import CallTimes

Stamps = tuple[float, float, float]
"""When a process received a call, began to run it, and had its outcome: `time.perf_counter` of that process."""


@dataclass(eq=False, slots=True)
class CallTrace:
    """Stages of a call, or of one step of a stream. Kept only while somebody subscribes to events.

    Attributes:
        began_at: When the call was submitted, by `time.perf_counter` of the driver; the other times likewise.
        is_kept: Whether the mode records stages.
        worker: Name of the process to which the call was sent last; empty before that.
        sent_at: When it was sent there.
        stamps: Those of that process, by the driver's clock as well as that is known; None before the outcome.
    """

    began_at: float = 0.0
    is_kept: bool = False
    worker: str = ""
    sent_at: float = 0.0
    stamps: Stamps | None = None

    def begin(self, began_at: float) -> None:
        """Begin with the submission of a call, or of a further step of a stream."""
        self.began_at, self.worker, self.stamps = began_at, "", None

    def sent(self, worker: str) -> None:
        """Record that the call is sent to a worker. Earlier attempts count as waiting."""
        self.worker, self.sent_at, self.stamps = worker, time.perf_counter(), None

    def answered(self, stamps: Stamps | None, offset_s: float = 0.0) -> None:
        """Record the stamps of an outcome, of a process whose clock is ``offset_s`` seconds ahead."""
        if stamps is not None:
            received, begun, ended = stamps
            self.stamps = received - offset_s, begun - offset_s, ended - offset_s

    def times(self, ended_at: float) -> CallTimes | None:
        """Return the stages of a call that ended now; their sum is its duration. None if the mode records none."""
        if not self.is_kept:
            return None
        if not self.worker:
            return CallTimes(ended_at - self.began_at, 0.0, 0.0, 0.0)
        queue_s, since_sent_s = self.sent_at - self.began_at, ended_at - self.sent_at
        if self.stamps is None:
            return CallTimes(queue_s, 0.0, since_sent_s, 0.0)
        received, begun, ended = self.stamps
        # The worker's durations are exact. An outcome of an earlier sending may have longer ones than this sending.
        run_s = min(max(ended - begun, 0.0), since_sent_s)
        wait_s = min(max(begun - received, 0.0), since_sent_s - run_s)
        on_the_way_s = since_sent_s - run_s - wait_s
        transfer_s = min(max(received - self.sent_at, 0.0), on_the_way_s)
        return CallTimes(queue_s + wait_s, transfer_s, run_s, on_the_way_s - transfer_s)
