"""Offset of a worker's clock, and the round trip to it, from calls and their outcomes."""

from __future__ import annotations

import time

from torchfedrpc.host.call_trace import Stamps

# Clocks of two machines drift apart by up to some 50 microseconds a second, so that an old exchange tells less.
_DRIFT = 50e-6


class WorkerClock:
    """The clock of a worker, compared with that of the driver as NTP does: by the exchange that was fastest.

    An exchange is a call and its outcome. Half of its time on the way, that is without the worker's time, bounds the
    error of the offset.

    Attributes:
        is_common: Whether driver and worker have one clock, since they are on one machine.
        offset_s: Seconds that the worker's clock is ahead.
        round_trip_s: Time on the way of the fastest exchange, in seconds; None before the first.
    """

    def __init__(self) -> None:
        self.is_common = False
        self.offset_s = 0.0
        self.round_trip_s: float | None = None
        self._seen_at = 0.0

    def note(self, sent_at: float, stamps: Stamps) -> None:
        """Compare the clocks by a call that was sent at ``sent_at`` and whose outcome has just arrived."""
        now = time.perf_counter()
        received, _, ended = stamps
        round_trip_s = (now - sent_at) - (ended - received)
        best = self.round_trip_s
        if best is None or 0 <= round_trip_s < best + (now - self._seen_at) * _DRIFT:
            self.round_trip_s, self._seen_at = round_trip_s, now
            if not self.is_common:
                self.offset_s = ((received - sent_at) + (ended - now)) / 2
