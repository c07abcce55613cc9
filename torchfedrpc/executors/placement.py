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


def place_clients(client_ids: Sequence[str], endpoints: Mapping[str, str], machines: Sequence[str]) -> dict[str, int]:
    """Give every client that is not local a worker: the one its endpoint names, else even shares of neighbours.

    Args:
        client_ids: all clients, in order.
        endpoints: client id -> endpoint.
        machines: the machine of each worker; worker i is ``worker{i + 1}``, of rank i + 1.

    Returns:
        Client id -> index of its worker.

    Raises:
        ConfigError: an endpoint is malformed, or names no worker of this run.
    """
    places: dict[str, int] = {}
    num_on_machine: Counter[str] = Counter()
    free = [client_id for client_id in client_ids if client_id not in endpoints]
    for position, client_id in enumerate(free):
        places[client_id] = position * len(machines) // len(free)
    for client_id, text in endpoints.items():
        endpoint = Endpoint.parse(client_id, text)
        if endpoint.kind == "local":
            continue
        if endpoint.kind == "rank":
            there = [endpoint.rank - 1] if 1 <= endpoint.rank <= len(machines) else []
        else:
            there = [index for index, machine in enumerate(machines) if machine == endpoint.machine]
        if not there:
            hosts = ", ".join(f"host:{machine}" for machine in dict.fromkeys(machines))
            raise ConfigError(
                f"client_endpoints.{client_id} is {text!r}, and this run has no such worker: it has worker1 to "
                f"worker{len(machines)} (rank:1 to rank:{len(machines)}) on {hosts}"
            )
        places[client_id] = there[num_on_machine[text] % len(there)]
        num_on_machine[text] += 1
    return places
