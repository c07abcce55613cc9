"""The driver's stand-in for the host of one worker in one world: the same verbs, each an rpc_async."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from torchfedrpc.host.answer import call_on
from torchfedrpc.host.call import Call, Outcome
from torchfedrpc.host.mailbox import Reply
from torchfedrpc.rpc import endpoint
from torchfedrpc.rpc.backend import torch_rpc
from torchfedrpc.rpc.message import MappedDevices, call_message, home_device, parcel_message, read_outcome
from torchfedrpc.wire.packing import Packed

logger = logging.getLogger(__name__)

_METHODS = ("call", "stream")
_MAX_KEPT_BYTES = 8 << 20  # outcomes that a worker keeps until the next request to it acknowledges them


@dataclass
class Traffic:
    """What went to a worker and came from it, in all worlds.

    Attributes:
        num_sent_bytes: of calls' arguments.
        num_received_bytes: of their results.
        num_snapshot_bytes: of snapshots, both ways: when they are taken is no matter of the calls.
    """

    num_sent_bytes: int = 0
    num_received_bytes: int = 0
    num_snapshot_bytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class RemoteHost:
    """The host of one worker, as the driver reaches it while a world lasts.

    Args:
        label: the worker's name in messages, such as ``worker1``.
        name: its RPC name.
        generation: number of the world.
        covered: the driver's devices that the world's device map takes to this worker.
        traffic: counts bytes.
        on_error: takes this host, the call, and the exception, where a request or its answer got lost; on any thread.
    """

    def __init__(
        self,
        label: str,
        name: str,
        generation: int,
        covered: MappedDevices,
        traffic: Traffic,
        on_error: Callable[[RemoteHost, Call, Exception], None],
    ) -> None:
        self.label = label
        self._worker: Any = torch_rpc().get_worker_info(name)
        self._generation = generation
        self._covered = covered
        self._traffic = traffic
        self._on_error = on_error
        self._is_open = True
        self._next_number = 0
        # Client id -> RRef of its mailbox, None until it has come. An RRef tells its owner by the first world that
        # this process was ever in, so calls go to the worker and not to rref.owner().
        self._learners: dict[str, Any] = {}
        self._acknowledged: list[int] = []
        self._num_kept_bytes = 0

    def __contains__(self, client_id: str) -> bool:
        return client_id in self._learners

    def register(self, client_id: str, kwargs: Packed | None, build: int) -> None:
        """Make room for a learner; calls may follow at once, they arrive behind this.

        Args:
            client_id: whose.
            kwargs: for the learner's constructor; None where the worker has the learner from an earlier world.
            build: which one of this client's learners it is to be; another one that the worker has is of no use.
        """
        self._learners[client_id] = None
        try:
            future = self._send(endpoint.register, client_id, parcel_message(kwargs, self._covered), build)
        except RuntimeError:  # the call behind this fails likewise, and is asked again together with this
            return
        future.add_done_callback(partial(self._registered, client_id))

    def forget(self, client_id: str) -> None:
        """A learner has moved elsewhere, and all of its calls here were answered."""
        self._learners.pop(client_id, None)
        with contextlib.suppress(RuntimeError):  # where it does not get there, the learner lies there for nothing
            self._send(endpoint.forget, client_id)

    def submit(self, call: Call, reply: Reply) -> None:
        """Send a call."""
        if call.kind in _METHODS:
            self._traffic.num_sent_bytes += call.arguments.num_bytes
        else:
            with self._traffic.lock:
                self._traffic.num_snapshot_bytes += call.arguments.num_bytes
        self._ask(call, reply, endpoint.submit, call_message(call, self._covered))

    def advance(self, call: Call, step: int, reply: Reply) -> None:
        """Ask an open stream for its item number ``step``."""
        self._ask(call, reply, endpoint.advance, call.call_id, step)

    def cancel(self, call: Call, reply: Reply) -> None:
        """Tell the worker that nobody waits for this call any more; ``reply`` takes what became of it."""
        self._ask(call, reply, endpoint.cancel, call.call_id)

    def acknowledge(self, call: Call, outcome: Outcome) -> None:
        """The worker need not keep this outcome; it is told with the next request, or at once where it keeps much."""
        self._acknowledged.append(call.call_id)
        self._num_kept_bytes += outcome.parcel.num_bytes if outcome.parcel is not None else 0
        if self._num_kept_bytes > _MAX_KEPT_BYTES and self._is_open:
            self._ping()

    async def is_reached(self) -> bool:
        """Whether the worker answers; ends when it does, or when the connection to it breaks."""
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[bool] = loop.create_future()

        def settle(reached: bool) -> None:
            if not answered.done():
                answered.set_result(reached)

        def done(future: Any) -> None:
            call_on(loop, settle, _is_value(future))

        if (sent := self._ping()) is None:
            return False
        sent.add_done_callback(done)
        return await answered

    def _ping(self) -> Any:
        """Send a request without content, which carries what is acknowledged; None where it cannot be sent."""
        try:
            return self._send(endpoint.acknowledge)
        except RuntimeError:
            return None

    def close(self) -> None:
        """Answer nobody any more, and drop the RRefs before the world ends that they belong to."""
        self._is_open = False
        self._learners.clear()

    def _send(self, entry: Any, *args: Any) -> Any:
        acknowledged, self._acknowledged = tuple(self._acknowledged), []
        self._num_kept_bytes = 0
        # Deadlines are kept by the caller's event loop, so RPC's own is off.
        header = (self._generation, self._next_number, acknowledged)
        sent = torch_rpc().rpc_async(self._worker, entry, args=(header, *args), timeout=0)
        self._next_number += 1  # not for what could not be sent: the worker would wait for it
        return sent

    def _ask(self, call: Call, reply: Reply, entry: Any, *args: Any) -> None:
        try:
            future = self._send(entry, *args)
        except RuntimeError as error:
            self._on_error(self, call, error)
            return
        future.add_done_callback(partial(self._answered, call, reply, home_device(call.arguments)))

    def _answered(self, call: Call, reply: Reply, home: torch.device | None, future: Any) -> None:
        """On a thread of RPC."""
        if not self._is_open:
            return
        try:
            message = future.wait()
            if message is None:  # the worker is leaving this world
                return
            outcome = read_outcome(message, home)
        except Exception as error:  # whatever RPC makes of a connection that broke
            self._on_error(self, call, error)
            return
        if outcome.parcel is not None:
            with self._traffic.lock:  # several threads of RPC come here
                if call.kind in _METHODS:
                    self._traffic.num_received_bytes += outcome.parcel.num_bytes
                else:
                    self._traffic.num_snapshot_bytes += outcome.parcel.num_bytes
        reply(outcome)

    def _registered(self, client_id: str, future: Any) -> None:
        """On a thread of RPC."""
        try:
            rref = future.wait()
        except Exception as error:  # the worker is lost; the call behind this tells
            logger.debug("registering %s on %s failed: %s", client_id, self.label, error)
            return
        if self._is_open and client_id in self._learners:
            self._learners[client_id] = rref


def _is_value(future: Any) -> bool:
    try:
        future.wait()
    except Exception:  # whatever RPC makes of a connection that broke
        return False
    return True
