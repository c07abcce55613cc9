"""A reduction as the driver has it: which clients take part, and the partial results of the hosts."""

from __future__ import annotations

import asyncio
import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from torchfedrpc.host.call import Part
from torchfedrpc.reduce.reducers import Reducer, are_small
from torchfedrpc.reduce.tree import Forest, Node
from torchfedrpc.wire.packing import Packed, pack

_numbers = itertools.count(1)


class Reduction:
    """What all executors have to know of a reduction.

    Args:
        prototype: the reducer, as nobody has added to it.
        client_ids: who takes part, in the order in which results are added up.

    Attributes:
        number: unique in this process.
        prototype: the reducer, packed; to be copied for each opening.
        client_ids: who takes part, by place.
    """

    def __init__(self, prototype: Reducer, client_ids: Sequence[str]) -> None:
        self.number = next(_numbers)
        self.prototype: Packed = pack(prototype)
        self._reducer = copy.deepcopy(prototype)
        self.client_ids = tuple(client_ids)
        self.places = range(len(self.client_ids))
        self._place_of = {client_id: place for place, client_id in enumerate(self.client_ids)}

    def forest(self) -> Forest:
        """A forest of it, with nothing in it."""
        return Forest(self._reducer, self.places)

    def part(self, client_id: str, *, is_awaited: bool = False) -> Part:
        """What a client's result is."""
        return Part(self.number, self._place_of[client_id], is_awaited)

    async def finish(self, nodes: Iterable[Node]) -> Any:
        """The value of all partial results together, of one client at least.

        Raises:
            MergeError: two of them do not go together.
            Exception: what the reducer's ``finish`` raised.
        """
        nodes = list(nodes)
        if are_small(reducer for _, _, reducer, _ in nodes):
            return self._finish(nodes, torch.get_num_threads())
        return await asyncio.to_thread(self._finish, nodes, torch.get_num_threads())

    def _finish(self, nodes: Iterable[Node], num_threads: int) -> Any:
        """On a thread that may have served others: a reducer's own sums have other bits with other threads."""
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        try:
            forest = self.forest()
            for node in nodes:
                forest.put(*node)
            for place in forest.waiting():
                forest.skip(place)
            value, _ = forest.finish()
            return value
        except StopIteration as error:  # no future could take it, and its awaiter would wait for ever
            raise RuntimeError(f"the reducer raised StopIteration: {error}") from error
        finally:
            torch.set_num_threads(before)


class Collecting(ABC):
    """One executor's share of a reduction, from its calls' answers until its hosts' partial results are here."""

    def take(self, client_id: str, result: Any) -> None:  # noqa: B027
        """Take what a call has returned: None, where its result stays with others on its host.

        Raises:
            MergeError: it does not go together with another client's.
            Exception: what the reducer raised.
        """

    @abstractmethod
    async def collect(self, skipped: Sequence[int]) -> tuple[list[Node], dict[str, Exception]]:
        """The partial results, to be asked for once every call is answered.

        Args:
            skipped: places of the clients of this share that failed, or were given up.

        Returns:
            The nodes; they may count clients that were given up, whose results came all the same. And those clients
            that failed meanwhile, since their learners were lost.

        Raises:
            MergeError: two results do not go together.
        """

    def awaited(self) -> list[str]:
        """The workers whose partial results are waited for now, for messages."""
        return []

    @abstractmethod
    def close(self) -> None:
        """The reduction is over; hosts forget what they have of it."""


class Gathering(Collecting):
    """The share of an executor that knows of no reductions, whose calls return their results to the driver.

    Args:
        reduction: the reduction.
    """

    def __init__(self, reduction: Reduction) -> None:
        self._reduction = reduction
        self._forest = reduction.forest()

    def take(self, client_id: str, result: Any) -> None:
        """Add a client's result."""
        self._forest.add(self._reduction.part(client_id).place, result)

    async def collect(self, skipped: Sequence[int]) -> tuple[list[Node], dict[str, Exception]]:
        """What all results come to."""
        for place in set(skipped).intersection(self._forest.waiting()):
            self._forest.skip(place)
        return self._forest.take(), {}

    def close(self) -> None:
        """Nothing is left anywhere."""


class GroupReduction:
    """A reduction over all executors that have clients in it.

    Args:
        reduction: the reduction.
        shares: client id -> the share of its executor.
    """

    def __init__(self, reduction: Reduction, shares: Mapping[str, Collecting]) -> None:
        self.reduction = reduction
        self._shares = shares
        self._collectings = list({id(share): share for share in shares.values()}.values())

    def take(self, client_id: str, result: Any) -> None:
        """Take what a client's call has returned; as of `Collecting.take`."""
        self._shares[client_id].take(client_id, result)

    async def finish(self, failed: Iterable[str]) -> tuple[Any, list[str], dict[str, Exception]]:
        """What all results come to; to be asked for once every call has ended.

        Args:
            failed: the clients whose call failed, or was given up.

        Returns:
            The value, None where no client counts; whose results it has, in order; and those clients that failed
            meanwhile.

        Raises:
            MergeError: two results do not go together.
        """
        # No share is told of the others' clients: what is not known to fail may yet come, and counts where it does.
        skipped: dict[int, list[int]] = {id(one): [] for one in self._collectings}
        for client_id in failed:
            skipped[id(self._shares[client_id])].append(self.reduction.part(client_id).place)
        collecting = [asyncio.ensure_future(one.collect(skipped[id(one)])) for one in self._collectings]
        try:
            collected = await asyncio.gather(*collecting)
        finally:
            for one in collecting:
                one.cancel()
            await asyncio.gather(*collecting, return_exceptions=True)
        nodes = [node for nodes, _ in collected for node in nodes]
        lost = {client_id: error for _, of_one in collected for client_id, error in of_one.items()}
        counted = [self.reduction.client_ids[place] for place in sorted(place for *_, of in nodes for place in of)]
        value = await self.reduction.finish(nodes) if nodes else None
        return value, counted, lost

    def awaited(self) -> list[str]:
        """The workers whose partial results are waited for now, for messages."""
        return [label for one in self._collectings for label in one.awaited()]

    def close(self) -> None:
        """The reduction is over, however it has ended."""
        for collecting in self._collectings:
            collecting.close()
