"""Reduction of a batch on its host: results of calls are reduced there, and partial results are returned."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from torchfedrpc.host.call import Batch, Outcome
from torchfedrpc.reduce.partial import open_reducer, pack_nodes
from torchfedrpc.reduce.reducers import is_builtin
from torchfedrpc.reduce.tree import Forest, MergeError
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.exceptions import Failure
from torchfedrpc.wire.packing import Packed, Reference, pack


class BatchJob:
    """State of a batch from its request to its final outcome.

    `add` and `partial_results` are thread-safe. The host's lock guards everything else.

    Args:
        batch: The calls and the reducer.
        allow: The allow-list of types.
        by_value: Whether results, and partial results, are copied.
        home: Device to which tensors of partial results on GPUs go; None leaves them where they are.

    Attributes:
        batch: The batch.
        reply: Receives the next outcome; None if no request is pending.
        outcomes: Places and outcomes of the calls that have ended, without values.
    """

    def __init__(self, batch: Batch, allow: AllowList, *, by_value: bool, home: torch.device | None = None) -> None:
        self.batch = batch
        self.reply: Callable[[Outcome], None] | None = None
        self.outcomes: list[tuple[int, Outcome]] = []
        self._num_known = 0  # number of outcomes that the driver has received
        self._allow = allow
        self._by_value = by_value
        self._opening = threading.Lock()
        self._home = home
        self._forests: dict[torch.device | None, Forest] = {}  # by the learners' GPU, as with a worker for each GPU
        self._is_builtin = True  # or no result has come

    def add(self, place: int, result: Any, device: torch.device | None = None) -> None:
        """Add the result of a client's call, on the thread of its method. A user-defined reducer gets it by value.

        Args:
            place: The client's place in the reduction.
            result: The result.
            device: See `Mailbox.device`. Results of each GPU are added up there.

        Raises:
            MergeError: If it cannot be merged with the result of another client.
            SerializationError: If the reducer cannot be deserialized here.
            Exception: If the reducer's ``add`` raised it.
        """
        forest = self._forest(device)
        if self._by_value and not self._is_builtin:
            result = pack(result).open(self._allow)
        try:
            forest.add(place, result)
        except MergeError as error:
            raise self._sendable(error) from error.reason

    def ended(self, place: int, outcome: Outcome) -> bool:
        """Record the outcome of a call, and return whether all calls of the batch have ended."""
        self.outcomes.append((place, replace(outcome, parcel=None)))
        return len(self.outcomes) == len(self.batch.calls)

    def watch(self, num_known: int, reply: Callable[[Outcome], None]) -> None:
        """Register a request for the outcomes after the first ``num_known``."""
        self._num_known, self.reply = num_known, reply

    def next_reply(self) -> tuple[Callable[[Outcome], None], Outcome] | None:
        """Return the pending request and its new outcomes; None if there is no request or no outcome."""
        new = tuple(self.outcomes[self._num_known :])
        if not (self.batch.is_watched and self.reply is not None and new):
            return None
        reply, self.reply = self.reply, None
        return reply, Outcome("item", of_calls=new)

    @property
    def is_quick(self) -> bool:
        """Whether collecting and packing the partial results of ended calls runs no user code, and waits for nothing.

        A call that was cut off may still merge its result.
        """
        if any(outcome.cut_off or outcome.kind == "cancelled" for _, outcome in self.outcomes):
            return False
        return self._is_builtin

    def partial_results(self) -> Packed:
        """Return the largest complete nodes.

        Raises:
            MergeError: If two results cannot be merged.
            SerializationError: If they cannot be sent.
        """
        if not self._forests:  # no call has returned a result
            return pack_nodes([])
        try:
            nodes = [node for forest in list(self._forests.values()) for node in forest.take()]
        except MergeError as error:
            raise self._sendable(error) from error.reason
        if not self._by_value:
            return Reference(nodes)
        return pack_nodes(nodes) if self._home is None else pack_nodes(nodes).on(self._home)

    def _forest(self, device: torch.device | None) -> Forest:
        with self._opening:
            if (forest := self._forests.get(device)) is None:
                reducer = open_reducer(self.batch.prototype.copy(), self._allow, device)
                self._is_builtin = is_builtin(reducer)
                forest = self._forests[device] = Forest(reducer, self.batch.num_places)
            return forest

    def _sendable(self, error: MergeError) -> MergeError:
        """Return the error with a reason of a type that the allow-list covers."""
        reason = Failure.capture(error.reason).restore(self._allow, "as results were added up")
        return MergeError(error.places, reason)
