"""How long calls take, by which a group call starts the longest first. No result depends on it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping

_NUM_KEPT = 3  # times of a client's last calls: the middle one counts, since a worker may be disturbed for a while
_MUCH = 1.5  # times as long as most clients take: so long ones are begun before the others


class Durations:
    """How long calls ran, by client and method."""

    def __init__(self) -> None:
        self._seconds: dict[str, dict[str, tuple[float, ...]]] = {}  # method -> client -> of its last calls

    def saw(self, client_id: str, method: str, seconds: float) -> None:
        """A call ran for so long."""
        of_method = self._seconds.setdefault(method, {})
        of_method[client_id] = (*of_method.get(client_id, ()), seconds)[-_NUM_KEPT:]

    def expected(self, client_ids: Iterable[str], method: str) -> dict[str, float]:
        """Seconds that each of these clients will take: as most of its last calls did, else as most others will.

        Where no call of the method was seen, all take 0 seconds.
        """
        of_method = self._seconds.get(method, {})
        seen = {one: statistics.median_low(of_method[one]) for one in client_ids if one in of_method}
        usual = statistics.median(seen.values()) if seen else 0.0
        return {client_id: seen.get(client_id, usual) for client_id in client_ids}


def longest_first(expected: Mapping[str, float]) -> list[str]:
    """Clients by the time that they will take, those that will take about as long as most of the others in order.

    For then results of neighbours come one after another, and a reduction holds few of them.
    """
    ordinary = _MUCH * statistics.median(expected.values()) if expected else 0.0
    return sorted(expected, key=lambda client_id: -expected[client_id] if expected[client_id] > ordinary else 0.0)
