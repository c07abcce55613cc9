"""Who should have which learners for a group's calls: so that all workers are done at about the same time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping

_NUM_KEPT = 3  # times of a client's last calls: the middle one counts, since a worker may be disturbed for a while
_TOLERANCE = 0.06  # by which a worker may be later than all would be together; more is worth moves
_LEAST_S = 0.001  # the same in seconds
_BALANCED = 0.03  # with which moves end
_MUCH = 1.5  # times as long as most clients take: so long ones are begun before the others
_NEARLY_BEST = 0.7  # of the gain of the best move, for which one is taken that keeps neighbours together


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


def moves(
    expected: Mapping[str, float],
    places: Mapping[str, str],
    backlog: Mapping[str, float],
    cost_s: Callable[[str], float | None],
    most: int | None = None,
) -> dict[str, str]:
    """Which clients to move so that the last worker is done earlier, and no more of them than pay.

    Of moves that are about as good those are taken at the border of two workers' clients, so that neighbours stay
    together: what a reduction sends depends on it.

    Args:
        expected: client, in order -> seconds that it will take; where all are 0, each counts the same.
        places: client -> its worker.
        backlog: workers that clients may be moved to -> seconds of what they have to do first.
        cost_s: seconds that moving this client takes; None where it cannot be moved.
        most: of those whose move costs anything, move so many; None for all that pay.

    Returns:
        Client -> its new worker.
    """
    is_known = any(expected.values())
    weights = expected if is_known else dict.fromkeys(expected, 1.0)
    loads = dict(backlog) if is_known else dict.fromkeys(backlog, 0.0)
    rank = {client_id: number for number, client_id in enumerate(expected)}
    clients_of: dict[str, list[str]] = {label: [] for label in backlog}
    for client_id, weight in weights.items():
        if places[client_id] in clients_of:
            loads[places[client_id]] += weight
            clients_of[places[client_id]].append(client_id)
    moved: dict[str, str] = {}
    mean = sum(loads.values()) / max(len(loads), 1)
    if is_known and max(loads.values(), default=0.0) < mean + _LEAST_S:
        return {}
    tolerance = _TOLERANCE
    while len(loads) > 1:
        busiest, idlest = max(loads, key=loads.__getitem__), min(loads, key=loads.__getitem__)
        excess, gains = loads[busiest] - loads[idlest], {}
        if loads[busiest] <= (1 + tolerance) * mean:
            break
        tolerance = _BALANCED
        for client_id in clients_of[busiest]:
            weight, cost = weights[client_id], cost_s(client_id)
            if cost is None or not 0 < weight < excess or (cost and (most == 0 or not is_known)):
                continue
            gain = min(weight, excess - weight) - cost  # by which the later one of the two is done earlier
            if gain > 0:
                gains[client_id] = gain
        if not gains:
            break
        others = clients_of[idlest]
        centre = statistics.median(rank[client_id] for client_id in others) if others else 0
        good = [one for one, gain in gains.items() if gain >= _NEARLY_BEST * max(gains.values())]
        chosen = min(good, key=lambda client_id: abs(rank[client_id] - centre))
        clients_of[busiest].remove(chosen)
        others.append(chosen)
        loads[busiest] -= weights[chosen]
        loads[idlest] += weights[chosen]
        moved[chosen] = idlest
        if most and cost_s(chosen):
            most -= 1
    return moved
