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
        self._at_cut: dict[str, Mapping[str, int]] = {}

    def next_number(self, client_id: str, method: str) -> int:
        """Return the number of a client's next call of a method, from 0, and count that call."""
        counts = self._of_clients.get(client_id, {})
        number = counts.get(method, 0)
        self._of_clients[client_id] = {**counts, method: number + 1}
        return number

    def cut(self) -> None:
        """Keep the present counts for `capture`."""
        self._at_cut = self._of_clients.copy()

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
