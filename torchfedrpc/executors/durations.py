"""Durations of calls, which determine in which order, and on which worker if stateless, calls of a group run.

Results do not depend on it.
"""

from __future__ import annotations

import statistics
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from torchfedrpc.host.call import Call, Outcome

_NUM_KEPT = 3  # durations of a client's last calls; the median counts, since a worker may be disturbed for a while
UNUSUAL = 1.5  # ratio to the usual duration above (or below) which a client is submitted out of the group's order
_SMOOTHING = 0.2  # weight of a call's duration in the mean of its method, which so follows some ten calls
_MAX_CLIENTS = 1 << 16  # with one method each; about 20 MB


class Durations:
    """LRU cache of the durations of calls, by client and method."""

    def __init__(self) -> None:
        self._seconds: OrderedDict[tuple[str, str], tuple[float, ...]] = OrderedDict()  # client, method -> last calls
        self._at_least: OrderedDict[tuple[str, str], float] = OrderedDict()  # lower bounds, from interrupted calls
        self._of_methods: dict[str, float] = {}  # smoothed over the calls of all clients

    def note(self, call: Call, outcome: Outcome) -> None:
        """Record the duration of a call, also of an interrupted one."""
        key = call.client_id, call.method
        if outcome.kind == "value":
            seconds, method = outcome.seconds, call.method
            self._seconds[key] = (*self._seconds.pop(key, ()), seconds)[-_NUM_KEPT:]
            before = self._of_methods.get(method, seconds)
            self._of_methods[method] = before + _SMOOTHING * (seconds - before)
            self._at_least.pop(key, None)
            if len(self._seconds) > _MAX_CLIENTS:
                self._seconds.popitem(last=False)
        elif outcome.cut_off and outcome.seconds and call.kind == "call":
            self._at_least[key] = max(outcome.seconds, self._at_least.pop(key, 0.0))
            if len(self._at_least) > _MAX_CLIENTS:
                self._at_least.popitem(last=False)

    def of_call(self, call: Call) -> float | None:
        """Return the expected seconds of a call: of its client's last calls, else the mean of all; None before any.

        The mean, since it is added up to the work of a worker; `expected` has the median, which one slow client does
        not move, since it decides which clients leave the group's order.
        """
        key = call.client_id, call.method
        last = self._seconds.get(key)
        expected = statistics.median_low(last) if last else self._of_methods.get(call.method)
        at_least = self._at_least.get(key) if self._at_least else None
        return expected if at_least is None else max(expected or 0.0, at_least)

    def expected(self, client_ids: Sequence[str], method: str) -> dict[str, float]:
        """Return the expected seconds per client: the median of its last calls, else the median of the other clients.

        If no call of the method has ended, the expectation is 0 s. An interrupted client is expected to take at least
        the duration at its interruption, until a call of it ends.
        """
        known: dict[str, float] = {}
        for client_id in client_ids:
            if last := self._seconds.get((client_id, method)):
                known[client_id] = statistics.median_low(last)
        usual = statistics.median(known.values()) if known else 0.0
        expected: dict[str, float] = {}
        for client_id in client_ids:
            at_least = self._at_least.get((client_id, method), 0.0)
            expected[client_id] = max(known.get(client_id, usual), at_least)
        return expected


def longest_first(expected: Mapping[str, float]) -> list[str]:
    """Return clients in descending order of expected duration; clients with an ordinary duration keep their order.

    Keeping the order lets results of neighbours arrive one after another, so that a reduction holds few of them.
    """
    ordinary = UNUSUAL * statistics.median(expected.values()) if expected else 0.0
    slow = [client_id for client_id, seconds in expected.items() if seconds > ordinary]
    slow.sort(key=expected.__getitem__, reverse=True)
    return list(dict.fromkeys([*slow, *expected]))


def fastest_first(expected: Mapping[str, float]) -> list[str]:
    """Return clients in ascending order of expected duration, for a group with a deadline or a quorum.

    Clients with a usual duration keep their order, as in `longest_first`.
    """
    usual = statistics.median(expected.values()) if expected else 0.0

    def seconds(client_id: str) -> float:
        own = expected[client_id]
        return usual if usual <= own * UNUSUAL and own <= usual * UNUSUAL else own

    return sorted(expected, key=seconds)
