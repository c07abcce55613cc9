"""Endpoints of clients, and placement of clients on workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torchfedrpc.errors import ConfigError
from torchfedrpc.rpc.interfaces import parse_address

LOCAL = "local"
HTTP = "http://"


@dataclass(frozen=True)
class ClientEndpoint:
    """Requested place of a client.

    Attributes:
        kind: ``rank``: the worker of a rank; ``host``: any worker on a machine; ``address``: the worker that listens
            at an address; ``local``: the driver's process.
        rank: The rank, for ``rank``.
        name: The machine, for ``host``, or the address, for ``address``.
    """

    kind: Literal["rank", "host", "address", "local"]
    rank: int = 0
    name: str = ""

    @classmethod
    def parse(cls, client_id: str, text: str) -> ClientEndpoint:
        """Parse ``worker1``, ``rank:2``, ``host:NAME``, ``local``, or an address with an optional scheme.

        Raises:
            ConfigError: If the text has none of these forms.
        """
        kind, _, rest = text.partition(":")
        if text == LOCAL:
            return cls("local")
        if text.startswith("worker") and text.removeprefix("worker").isdecimal():
            return cls("rank", rank=int(text.removeprefix("worker")))
        if kind == "rank" and rest.isdecimal():
            return cls("rank", rank=int(rest))
        if kind == "host" and rest and not set(rest) & set("/:"):
            return cls("host", name=rest)
        address = text.removeprefix("tcp://").removeprefix(HTTP)
        try:
            host, port = parse_address(address.removesuffix("/") if address != text else text)
        except ConfigError:
            raise ConfigError(
                f"client_endpoints.{client_id} is {text!r}: name a worker of the launch as worker1, rank:2 or "
                f"host:NAME, one that listens as HOST:PORT, or local for the driver's own process"
            ) from None
        return cls("address", name=f"{host}:{port}")


def addresses(endpoints: Mapping[str, str]) -> list[str]:
    """Return the distinct addresses among endpoints, in order."""
    parsed = [ClientEndpoint.parse(client_id, text) for client_id, text in endpoints.items()]
    return list(dict.fromkeys(endpoint.name for endpoint in parsed if endpoint.kind == "address"))


def place_clients(
    client_ids: Sequence[str], endpoints: Mapping[str, str], machines: Mapping[str, str]
) -> dict[str, str]:
    """Place every client that is not local: on the worker of its endpoint, else in equal shares of neighbours.

    Args:
        client_ids: All clients, in order.
        endpoints: Client id -> endpoint.
        machines: Label of each worker -> its machine, by rank. ``worker1`` is the label of rank 1; the label of a
            listening worker is its address.

    Returns:
        Client id -> label of its worker.

    Raises:
        ConfigError: If an endpoint is malformed, or names no worker of this run.
    """
    places: dict[str, str] = {}
    labels = open_to_all(list(machines), addresses(endpoints))
    num_on_machine: Counter[str] = Counter()
    free = [client_id for client_id in client_ids if client_id not in endpoints]
    for position, client_id in enumerate(free):
        places[client_id] = labels[position * len(labels) // len(free)]
    for client_id, text in endpoints.items():
        endpoint = ClientEndpoint.parse(client_id, text)
        if endpoint.kind == "local":
            continue
        there = workers_at(endpoint, machines)
        if not there:
            hosts = ", ".join(f"host:{machine}" for machine in dict.fromkeys(machines.values()))
            raise ConfigError(
                f"client_endpoints.{client_id} is {text!r}, and this run has no such worker: it has "
                f"{', '.join(machines)} (rank:1 is worker1) on {hosts}"
            )
        places[client_id] = there[num_on_machine[text] % len(there)]
        num_on_machine[text] += 1
    return places


def open_to_all(labels: Sequence[str], named: Container[str]) -> list[str]:
    """Return the workers for clients without an endpoint: those that none names by its address, else all.

    Args:
        labels: The workers.
        named: The `addresses` of all endpoints.
    """
    return [label for label in labels if label not in named] or list(labels)


def place_again(
    client_ids: Sequence[str], endpoints: Mapping[str, str], machines: Mapping[str, str], places: Mapping[str, str]
) -> dict[str, str]:
    """Place clients of a lost worker again: at the machine or address of their endpoint, else on any worker.

    Args:
        client_ids: The clients to place, in order.
        endpoints: Client id -> endpoint.
        machines: Label of each remaining worker -> its machine.
        places: Client id -> label of its worker before.

    Returns:
        Client id -> label of the least loaded worker. Clients without a possible worker are omitted.
    """
    loads = Counter(dict.fromkeys(machines, 0))
    loads.update(label for label in places.values() if label in machines)
    moved: dict[str, str] = {}
    everywhere, for_all = list(machines), open_to_all(list(machines), addresses(endpoints))
    for client_id in client_ids:
        there = everywhere
        if client_id in endpoints:
            endpoint = ClientEndpoint.parse(client_id, endpoints[client_id])
            there = workers_at(endpoint, machines) if endpoint.kind in ("host", "address") else there
        else:
            there = for_all
        if there:
            moved[client_id] = min(there, key=lambda label: loads[label])
            loads[moved[client_id]] += 1
    return moved


def even_out(
    client_ids: Sequence[str],
    endpoints: Mapping[str, str],
    labels: Sequence[str],
    places: Mapping[str, str],
    is_cheap: Callable[[str], bool],
) -> dict[str, str]:
    """Move as few clients as possible to give workers equal shares after some have joined.

    Args:
        client_ids: All clients that have a worker, in order.
        endpoints: Client id -> endpoint. Clients with an endpoint do not move.
        labels: Labels of the present workers.
        places: Client id -> label of its worker, which may be absent.
        is_cheap: Returns whether a move of this client is free, since it has no learner yet.

    Returns:
        Client id -> label of its new worker, of the clients that move.
    """
    pool = open_to_all(labels, addresses(endpoints))
    free = [client_id for client_id in client_ids if client_id not in endpoints]
    clients_of: dict[str, list[str]] = {label: [] for label in pool}
    moving: list[str] = []
    for client_id in free:
        clients_of.get(places[client_id], moving).append(client_id)
    # Workers with most clients get the larger shares, so that fewer clients move.
    by_load = sorted(pool, key=lambda label: -len(clients_of[label]))
    shares = {label: len(free) // len(pool) + (rank < len(free) % len(pool)) for rank, label in enumerate(by_load)}
    for label in pool:
        clients = sorted(clients_of[label], key=is_cheap)  # cheap ones last: the tail of the list moves
        moving += clients[shares[label] :]
        clients_of[label] = clients[: shares[label]]
    following = iter(moving)
    return {next(following): label for label in pool for _ in range(shares[label] - len(clients_of[label]))}


def workers_at(endpoint: ClientEndpoint, machines: Mapping[str, str]) -> list[str]:
    """Return the workers of an endpoint that is not local, among those whose machines are given."""
    if endpoint.kind == "rank":
        return [label for label in machines if label == f"worker{endpoint.rank}"]
    if endpoint.kind == "address":
        return [label for label in machines if label == endpoint.name]
    return [label for label, machine in machines.items() if machine == endpoint.name]
