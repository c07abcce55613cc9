"""Numbers of the calls of stateless learners, which the driver counts, since any worker may run the next call."""

from __future__ import annotations

from collections.abc import Mapping

from torchfedrpc.errors import SnapshotError
from torchfedrpc.host.snapshot import Snapshot, check_belongs, dump_counts


class CallCounts:
    """Number of calls of each client and method; all that a checkpoint has of stateless learners.

    Args:
        learner: ``module.qualname`` of the run's learner.
    """

    def __init__(self, learner: str) -> None:
        self._learner = learner
        self._of_clients: dict[str, Mapping[str, int]] = {}  # the inner mappings are replaced, never changed
        self._free: dict[tuple[str, str], set[int]] = {}  # client, method -> numbers that were given back
        self._at_cut: dict[str, Mapping[str, int]] = {}

    def next_number(self, client_id: str, method: str) -> int:
        """Return the number of a client's next call of a method, from 0, and count that call."""
        if self._free and (free := self._free.get((client_id, method))):
            number = min(free)
            free.discard(number)
            return number
        counts = self._of_clients.get(client_id, {})
        number = counts.get(method, 0)
        self._of_clients[client_id] = {**counts, method: number + 1}
        return number

    def give_back(self, client_id: str, method: str, number: int) -> None:
        """Give the number of a call that was lost to the next call of the method."""
        counts = self._of_clients.get(client_id, {})
        count = counts.get(method, 0)
        if not self._at_cut.get(client_id, {}).get(method, 0) <= number < count:  # from before a cut or a restore
            return
        free = self._free.setdefault((client_id, method), set())
        free.add(number)
        while count - 1 in free:
            count -= 1
            free.discard(count)
        self._of_clients[client_id] = {**counts, method: count}

    def cut(self) -> None:
        """Keep the present counts for `capture`. Free numbers below them go to no call, here and in a resume."""
        self._at_cut = self._of_clients.copy()
        self._free.clear()

    def capture(self, client_id: str) -> bytes:
        """Return a client's counts as of the last `cut`, as a snapshot without state."""
        return dump_counts(client_id, self._learner, self._at_cut.get(client_id, {}))

    def restore(self, snapshot: Snapshot, client_id: str) -> None:
        """Continue a client's counts from a snapshot.

        Raises:
            SnapshotError: If it belongs to another client or learner, or has a state.
        """
        check_belongs(snapshot, client_id, self._learner)
        if snapshot.made:
            raise SnapshotError(
                f"this snapshot of {client_id!r} has a state, and {self._learner} is stateless: restore it with "
                f"stateless = False, as it was taken"
            )
        self._of_clients[client_id] = dict(snapshot.counts)
        for key in [key for key in self._free if key[0] == client_id]:
            del self._free[key]
