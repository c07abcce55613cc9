"""Endpoints, and which worker gets which client."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torchfedrpc.errors import ConfigError
from torchfedrpc.rpc.interfaces import parse_address

LOCAL = "local"
HTTP = "http://"


@dataclass(frozen=True)
class Endpoint:
    """Where a client is to live.

    Attributes:
        kind: on a ``rank``, on any worker of a ``host``, on the worker that listens at an ``address``, or ``local``:
            in the driver's own process.
        rank: of a rank.
        name: of a machine, or the address.
    """

    kind: Literal["rank", "host", "address", "local"]
    rank: int = 0
    name: str = ""

    @classmethod
    def parse(cls, client_id: str, text: str) -> Endpoint:
        """Read ``worker1``, ``rank:2``, ``host:NAME``, ``local``, or an address, which may have a scheme.

        Raises:
            ConfigError: it is none of these.
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
    """The addresses among endpoints, each once, in order."""
    parsed = [Endpoint.parse(client_id, text) for client_id, text in endpoints.items()]
    return list(dict.fromkeys(endpoint.name for endpoint in parsed if endpoint.kind == "address"))


def place_clients(
    client_ids: Sequence[str], endpoints: Mapping[str, str], machines: Mapping[str, str]
) -> dict[str, str]:
    """Give every client that is not local a worker: the one its endpoint names, else even shares of neighbours.

    Args:
        client_ids: all clients, in order.
        endpoints: client id -> endpoint.
        machines: label of each worker (``worker1`` is of rank 1, an address is its own) -> its machine, by rank.

    Returns:
        Client id -> label of its worker.

    Raises:
        ConfigError: an endpoint is malformed, or names no worker of this run.
    """
    places: dict[str, str] = {}
    labels = open_to_all(list(machines), endpoints)
    num_on_machine: Counter[str] = Counter()
    free = [client_id for client_id in client_ids if client_id not in endpoints]
    for position, client_id in enumerate(free):
        places[client_id] = labels[position * len(labels) // len(free)]
    for client_id, text in endpoints.items():
        endpoint = Endpoint.parse(client_id, text)
        if endpoint.kind == "local":
            continue
        there = _workers_at(endpoint, machines)
        if not there:
            hosts = ", ".join(f"host:{machine}" for machine in dict.fromkeys(machines.values()))
            raise ConfigError(
                f"client_endpoints.{client_id} is {text!r}, and this run has no such worker: it has "
                f"{', '.join(labels)} (rank:1 is worker1) on {hosts}"
            )
        places[client_id] = there[num_on_machine[text] % len(there)]
        num_on_machine[text] += 1
    return places


def open_to_all(labels: Sequence[str], endpoints: Mapping[str, str]) -> list[str]:
    """The workers for clients without an endpoint: those that no address names, where there are such."""
    named = addresses(endpoints)
    return [label for label in labels if label not in named] or list(labels)


def place_again(
    client_ids: Sequence[str], endpoints: Mapping[str, str], machines: Mapping[str, str], places: Mapping[str, str]
) -> dict[str, str]:
    """Give clients whose worker is gone another: at the machine or address that their endpoint names, else any.

    Args:
        client_ids: who needs a place, in order.
        endpoints: client id -> endpoint.
        machines: label of each worker that is left -> its machine.
        places: where all clients were.

    Returns:
        Client id -> label; the least loaded worker each time. Clients for which none is left are left out.
    """
    loads = Counter(dict.fromkeys(machines, 0))
    loads.update(label for label in places.values() if label in machines)
    moved: dict[str, str] = {}
    everywhere, for_all = list(machines), open_to_all(list(machines), endpoints)
    for client_id in client_ids:
        there = everywhere
        if client_id in endpoints:
            endpoint = Endpoint.parse(client_id, endpoints[client_id])
            there = _workers_at(endpoint, machines) if endpoint.kind in ("host", "address") else there
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
    """Move as few clients as it takes for workers to have even shares, after some have come.

    Args:
        client_ids: all clients that have a worker, in order.
        endpoints: client id -> endpoint; clients with one stay.
        labels: the workers that are there.
        places: client id -> label of its worker, which need not be there any more.
        is_cheap: whether moving this client costs nothing, since it has no learner yet.

    Returns:
        Client id -> its new worker, of those that move.
    """
    pool = open_to_all(labels, endpoints)
    free = [client_id for client_id in client_ids if client_id not in endpoints]
    clients_of: dict[str, list[str]] = {label: [] for label in pool}
    moving: list[str] = []
    for client_id in free:
        clients_of.get(places[client_id], moving).append(client_id)
    # The larger shares stay where there are most clients already.
    by_load = sorted(pool, key=lambda label: -len(clients_of[label]))
    shares = {label: len(free) // len(pool) + (rank < len(free) % len(pool)) for rank, label in enumerate(by_load)}
    for label in pool:
        clients = sorted(clients_of[label], key=is_cheap)  # these last, so that they go first
        moving += clients[shares[label] :]
        clients_of[label] = clients[: shares[label]]
    moved = {}
    for label in pool:
        for _ in range(shares[label] - len(clients_of[label])):
            moved[moving.pop(0)] = label
    return moved


def _workers_at(endpoint: Endpoint, machines: Mapping[str, str]) -> list[str]:
    if endpoint.kind == "rank":
        return [label for label in machines if label == f"worker{endpoint.rank}"]
    if endpoint.kind == "address":
        return [label for label in machines if label == endpoint.name]
    return [label for label, machine in machines.items() if machine == endpoint.name]
