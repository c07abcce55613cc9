"""Status of a run, from its events: rounds, time left, calls in flight, stragglers."""

from __future__ import annotations

import time
from dataclasses import dataclass

from torchfedrpc.events import CallEnded, CallStarted, Event, RoundEnded, RoundStarted

_LATE_S = 1.0  # a shorter call is no straggler
_LATE_FACTOR = 2.0  # of the mean duration of the method's calls


@dataclass(frozen=True)
class CallInFlight:
    """Call without a result so far, submitted at ``began`` by the monotonic clock."""

    client_id: str
    method: str
    began: float


class RunStatus:
    """Status of a run.

    Attributes:
        num_done: Number of rounds done.
        num_rounds: Number of rounds of the whole run; 0 before the first one.
        ended: End of the last round; None before the first one has ended.
        num_calls: Number of calls that have ended.
    """

    def __init__(self) -> None:
        self.num_done = self.num_rounds = self.num_calls = 0
        self.ended: RoundEnded | None = None
        self._calls: dict[int, CallInFlight] = {}
        self._durations: dict[str, tuple[int, float]] = {}  # of a method's calls: number and sum
        self._round_ends = [time.monotonic()]

    def add(self, event: Event) -> None:
        """Take an event."""
        match event:
            case CallStarted():
                self._calls[event.call_id] = CallInFlight(event.client_id, event.method, time.monotonic())
            case CallEnded():
                self._calls.pop(event.call_id, None)
                self.num_calls += 1
                number, total = self._durations.get(event.method, (0, 0.0))
                self._durations[event.method] = number + 1, total + event.seconds
            case RoundStarted():
                self.num_done, self.num_rounds = event.round_num, event.num_rounds
            case RoundEnded():
                self.num_done, self.num_rounds = event.round_num + 1, event.num_rounds
                self.ended = event
                self._round_ends.append(time.monotonic())
            case _:
                pass

    @property
    def num_in_flight(self) -> int:
        """Number of calls without a result so far."""
        return len(self._calls)

    @property
    def longest_s(self) -> float:
        """Seconds since the oldest call in flight was submitted; 0 if there is none."""
        oldest = next(iter(self._calls.values()), None)
        return 0.0 if oldest is None else time.monotonic() - oldest.began

    @property
    def seconds_left(self) -> float | None:
        """Expected seconds until the last round ends; None before the first one and after the last one has ended.

        The first of several rounds does not count, since it loads data and libraries.
        """
        if len(self._round_ends) == 1 or self.num_done >= self.num_rounds:
            return None
        ends = self._round_ends if len(self._round_ends) == 2 else self._round_ends[1:]
        return (ends[-1] - ends[0]) / (len(ends) - 1) * (self.num_rounds - self.num_done)

    def stragglers(self, limit: int = 3) -> list[tuple[CallInFlight, float]]:
        """Return the calls that take much longer than others of their method, longest first, and their seconds."""
        now = time.monotonic()
        late = []
        for call in self._calls.values():
            number, total = self._durations.get(call.method, (0, 0.0))
            if number and now - call.began > max(_LATE_S, _LATE_FACTOR * total / number):
                late.append((call, now - call.began))
        return sorted(late, key=lambda entry: -entry[1])[:limit]
