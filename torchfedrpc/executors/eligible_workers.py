"""Workers that may run the calls of a stateless learner, as far as endpoints restrict them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torchfedrpc.executors.placement import ClientEndpoint, addresses, open_to_all, workers_at
from torchfedrpc.rpc.member import Member
from torchfedrpc.rpc.workers import Workers, WorkerState


class EligibleWorkers:
    """The workers of a run by client.

    Args:
        workers: The table of workers.
        endpoints: Client -> endpoint. Other clients run on any worker that no endpoint names by its address.
    """

    def __init__(self, workers: Workers, endpoints: Mapping[str, str]) -> None:
        self._workers = workers
        self._texts = endpoints
        self._endpoints = {client_id: ClientEndpoint.parse(client_id, text) for client_id, text in endpoints.items()}
        self._addresses = frozenset(addresses(endpoints))
        self._machines: dict[str, str] = {}  # name of each worker -> its machine, also once it is lost

    def note_machines(self) -> None:
        """Note the machines of the workers that are there now."""
        self._machines |= self._workers.known_machines

    def of(self, client_id: str) -> list[Member]:
        """Return the workers that accept calls of a client now."""
        present = self._workers.present
        if not self._endpoints:
            return list(present.values())
        return [present[label] for label in self._among(client_id, list(present))]

    def endpoint(self, client_id: str) -> str | None:
        """Return the endpoint of a client; clients with the same one may run on the same workers."""
        return self._texts.get(client_id)

    def accepts(self, worker: Member, client_id: str) -> bool:
        """Return whether a worker accepts calls of a client now."""
        return not self._endpoints or worker in self.of(client_id)

    def is_wanted(self, label: str) -> bool:
        """Return whether an endpoint names a worker."""
        machine = {label: self._machines.get(label, "")}
        remote = (endpoint for endpoint in self._endpoints.values() if endpoint.kind != "local")
        return any(workers_at(endpoint, machine) for endpoint in remote)

    def why_none(self, client_id: str) -> str | None:
        """Return the reason why no worker accepts calls of a client, now or soon; None if one does or is expected."""
        if self._workers.failure is not None:
            return str(self._workers.failure)
        there = [self._workers[label] for label in self._among(client_id, [worker.label for worker in self._workers])]
        if any(worker.state is not WorkerState.GAVE_UP for worker in there):
            return None
        where = f" where {self._texts[client_id]!r} wants it" if client_id in self._texts else ""
        reasons = "; ".join(dict.fromkeys(worker.reason for worker in there))
        return f"no worker is left{where}: {reasons or 'none is expected'}"

    def _among(self, client_id: str, labels: Sequence[str]) -> list[str]:
        endpoint = self._endpoints.get(client_id)
        if endpoint is not None and endpoint.kind == "rank":
            named = self._workers.get(f"worker{endpoint.rank}")
            if named is None or named.state is WorkerState.GAVE_UP:  # then on any worker, as learners with state
                endpoint = None
        if endpoint is None:
            return open_to_all(labels, self._addresses)
        return workers_at(endpoint, {label: self._machines.get(label, "") for label in labels})
