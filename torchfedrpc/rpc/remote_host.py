"""The driver's stand-in for the host of one worker: the same verbs, each an rpc_async."""

from __future__ import annotations

import logging
import threading
from functools import partial
from typing import Any

import torch

from torchfedrpc.errors import WorkerLostError
from torchfedrpc.host.call import Call, Outcome
from torchfedrpc.host.mailbox import Reply
from torchfedrpc.rpc import endpoint
from torchfedrpc.rpc.backend import torch_rpc
from torchfedrpc.rpc.message import MappedDevices, call_message, home_device, parcel_message, read_outcome
from torchfedrpc.wire.failure import Failure
from torchfedrpc.wire.packing import Packed

logger = logging.getLogger(__name__)


class RemoteHost:
    """The host of one worker, as the driver reaches it.

    Args:
        name: the worker's RPC name.
        label: its name in messages, such as ``worker1``.
        covered: the driver's devices that the world's device map takes to this worker.
    """

    def __init__(self, name: str, label: str, covered: MappedDevices) -> None:
        self.label = label
        self.num_sent_bytes = self.num_received_bytes = 0
        self._worker: Any = torch_rpc().get_worker_info(name)
        self._covered = covered
        self._next_number = 0
        # Client id -> RRef of its mailbox, None until it has come. An RRef tells its owner by the first world that
        # this process was ever in, so calls go to the worker and not to rref.owner().
        self._learners: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __contains__(self, client_id: str) -> bool:
        return client_id in self._learners

    def __len__(self) -> int:
        return len(self._learners)

    def register(self, client_id: str, kwargs: Packed) -> None:
        """Make room for a learner; calls may follow at once, they arrive behind this."""
        self._learners[client_id] = None
        try:
            future = self._send(endpoint.register, client_id, parcel_message(kwargs, self._covered))
        except RuntimeError as error:  # the worker is lost; the call behind this says so
            logger.debug("registering %s on %s failed: %s", client_id, self.label, error)
        else:
            future.add_done_callback(partial(self._registered, client_id))

    def submit(self, call: Call, reply: Reply) -> None:
        """Send a call."""
        home = home_device(call.arguments)
        self._ask(call, reply, home, endpoint.submit, call_message(call, self._covered))
        self.num_sent_bytes += call.arguments.num_bytes

    def advance(self, call: Call, reply: Reply) -> None:
        """Ask an open stream for its next item."""
        self._ask(call, reply, home_device(call.arguments), endpoint.advance, call.call_id)

    def cancel(self, call: Call) -> None:
        """Tell the worker that nobody waits for this call any more."""
        try:
            self._send(endpoint.cancel, call.call_id)
        except RuntimeError as error:  # the worker is lost, and the call with it
            logger.debug("cancelling a call of %s on %s failed: %s", call.client_id, self.label, error)

    def forget(self) -> None:
        """Drop the RRefs, before the world ends that they belong to."""
        self._learners.clear()

    def _send(self, entry: Any, *args: Any) -> Any:
        # Deadlines are kept by the caller's event loop, so RPC's own is off.
        with self._lock:
            sent = torch_rpc().rpc_async(self._worker, entry, args=(self._next_number, *args), timeout=0)
            self._next_number += 1  # not for what could not be sent: the worker would wait for it
            return sent

    def _ask(self, call: Call, reply: Reply, home: torch.device | None, entry: Any, message: Any) -> None:
        try:
            future = self._send(entry, message)
        except RuntimeError as error:
            reply(self._lost(call, error))
            return
        future.add_done_callback(partial(self._answered, call, reply, home))

    def _answered(self, call: Call, reply: Reply, home: torch.device | None, future: Any) -> None:
        """On a thread of RPC."""
        try:
            outcome = read_outcome(future.wait(), home)
        except Exception as error:  # whatever RPC makes of a connection that broke
            outcome = self._lost(call, error)
        if outcome.parcel is not None:
            with self._lock:  # several threads of RPC come here
                self.num_received_bytes += outcome.parcel.num_bytes
        reply(outcome)

    def _registered(self, client_id: str, future: Any) -> None:
        """On a thread of RPC; where the worker is lost, the call behind it says so."""
        try:
            rref = future.wait()
        except Exception as error:
            logger.debug("registering %s on %s failed: %s", client_id, self.label, error)
            return
        if client_id in self._learners:
            self._learners[client_id] = rref

    def _lost(self, call: Call, error: Exception) -> Outcome:
        lost = WorkerLostError(
            f"{call.client_id}.{call.method}: {self.label} is lost or cut off ({_first_line(error)}). "
            f"See its output for why; open a new proxy to go on"
        )
        return Outcome("failed", failure=Failure.capture(lost))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
