"""How long calls take, which decides the order in which a group call starts them. No result depends on it."""

from __future__ import annotations

import statistics
from collections import OrderedDict
from collections.abc import Iterable, Mapping

from torchfedrpc.host.call import Call, Outcome

_NUM_KEPT = 3  # times of a client's last calls: the middle one counts, since a worker may be disturbed for a while
_MUCH = 1.5  # times as long as most clients take, or as short: such clients are begun out of the group's order
_MAX_CLIENTS = 1 << 16  # with one method each; about 20 MB


class Durations:
    """How long calls ran, by client and method; those that were called least recently are forgotten."""

    def __init__(self) -> None:
        self._seconds: OrderedDict[tuple[str, str], tuple[float, ...]] = OrderedDict()  # client, method -> last calls
        self._at_least: OrderedDict[tuple[str, str], float] = OrderedDict()  # of clients that were cut off since

    def __len__(self) -> int:
        return len(self._seconds)

    def note(self, call: Call, outcome: Outcome) -> None:
        """Note how long a call ran, also one that was cut off."""
        if outcome.kind == "value":
            self.saw(call.client_id, call.method, outcome.seconds)
        elif outcome.cut_off and outcome.seconds and call.kind == "call":
            self.cut_off(call.client_id, call.method, outcome.seconds)

    def saw(self, client_id: str, method: str, seconds: float) -> None:
        """Note that a call ran for so long."""
        key = client_id, method
        self._seconds[key] = (*self._seconds.pop(key, ()), seconds)[-_NUM_KEPT:]
        self._at_least.pop(key, None)
        if len(self._seconds) > _MAX_CLIENTS:
            self._seconds.popitem(last=False)

    def cut_off(self, client_id: str, method: str, seconds: float) -> None:
        """Note that a call had run for so long when a deadline or a cancel cut it off."""
        key = client_id, method
        self._at_least[key] = max(seconds, self._at_least.pop(key, 0.0))
        if len(self._at_least) > _MAX_CLIENTS:
            self._at_least.popitem(last=False)

    def expected(self, client_ids: Iterable[str], method: str) -> dict[str, float]:
        """Seconds that each of these clients will take: as most of its last calls did, else as most others will.

        Where no call of the method has ended, all take 0 seconds. A client that was cut off takes at least as long as
        it ran then, until a call of it ends.
        """
        client_ids = list(client_ids)
        known = {one: self._seconds.get((one, method)) for one in client_ids}
        seen = {one: statistics.median_low(seconds) for one, seconds in known.items() if seconds}
        usual = statistics.median(seen.values()) if seen else 0.0
        return {one: max(seen.get(one, usual), self._at_least.get((one, method), 0.0)) for one in client_ids}


def longest_first(expected: Mapping[str, float]) -> list[str]:
    """Clients by the time that they will take, those that will take about as long as most of the others in order.

    For then results of neighbours come one after another, and a reduction holds few of them.
    """
    ordinary = _MUCH * statistics.median(expected.values()) if expected else 0.0
    return sorted(expected, key=lambda client_id: -expected[client_id] if expected[client_id] > ordinary else 0.0)


def fastest_first(expected: Mapping[str, float]) -> list[str]:
    """Clients by the time that they will take, for a group that waits for some of them or until a deadline.

    Those that will take about as long as most are in order, as of `longest_first`.
    """
    usual = statistics.median(expected.values()) if expected else 0.0

    def seconds(client_id: str) -> float:
        own = expected[client_id]
        return usual if usual <= own * _MUCH and own <= usual * _MUCH else own

    return sorted(expected, key=seconds)
