"""Endpoints, and which worker gets which client."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torchfedrpc.errors import ConfigError

LOCAL = "local"


@dataclass(frozen=True)
class Endpoint:
    """Where a client is to live: on a rank, on any worker of a machine, or in the driver's own process."""

    kind: Literal["rank", "host", "local"]
    rank: int = 0
    machine: str = ""

    @classmethod
    def parse(cls, client_id: str, text: str) -> Endpoint:
        """Read ``worker1``, ``rank:2``, ``host:NAME`` or ``local``.

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
            return cls("host", machine=rest)
        address = "an address cannot be dialled by this version; " if rest else ""
        raise ConfigError(
            f"client_endpoints.{client_id} is {text!r}: {address}name a worker of the launch as worker1, rank:2 or "
            f"host:NAME, or local for the driver's own process"
        )


def place_clients(
    client_ids: Sequence[str], endpoints: Mapping[str, str], machines: Mapping[str, str]
) -> dict[str, str]:
    """Give every client that is not local a worker: the one its endpoint names, else even shares of neighbours.

    Args:
        client_ids: all clients, in order.
        endpoints: client id -> endpoint.
        machines: label of each worker (``worker1`` is of rank 1) -> its machine, by rank.

    Returns:
        Client id -> label of its worker.

    Raises:
        ConfigError: an endpoint is malformed, or names no worker of this run.
    """
    places: dict[str, str] = {}
    labels = list(machines)
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


def place_again(
    client_ids: Sequence[str], endpoints: Mapping[str, str], machines: Mapping[str, str], places: Mapping[str, str]
) -> dict[str, str]:
    """Give clients whose worker was lost another: one on the machine that its endpoint names, else any.

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
    for client_id in client_ids:
        there = list(machines)
        if client_id in endpoints:
            endpoint = Endpoint.parse(client_id, endpoints[client_id])
            there = _workers_at(endpoint, machines) if endpoint.kind == "host" else there
        if there:
            moved[client_id] = min(there, key=lambda label: loads[label])
            loads[moved[client_id]] += 1
    return moved


def _workers_at(endpoint: Endpoint, machines: Mapping[str, str]) -> list[str]:
    if endpoint.kind == "rank":
        return [label for label in machines if label == f"worker{endpoint.rank}"]
    return [label for label, machine in machines.items() if machine == endpoint.machine]
