"""The entry points that the driver invokes on a worker, and the one that workers invoke on the driver.

They run on RPC's own threads and never wait there: calls are handed to the host, which answers through futures.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from torchfedrpc.host.call import Call, Outcome
from torchfedrpc.host.learner_host import LearnerHost
from torchfedrpc.rpc.backend import async_entry, torch_rpc
from torchfedrpc.rpc.message import Covered, outcome_message, parcel_message, read_call, read_parcel
from torchfedrpc.wire.failure import Failure
from torchfedrpc.wire.packing import Parcel, Reference


class Endpoint:
    """A worker's side of the calls from its driver.

    RPC hands requests to several threads, so that they overtake each other; the driver numbers them, and they are
    put back in order here.

    Args:
        driver: the driver's RPC name.
        device: this worker's device.
        covered: the devices of this worker that the world's device map takes to the driver.
    """

    def __init__(self, driver: str, device: torch.device, covered: Covered) -> None:
        self.host: LearnerHost | None = None
        self.device = device
        self.covered = covered
        self._driver = driver
        self._next_number = 0
        self._early: dict[int, Callable[[LearnerHost], None]] = {}
        self._reports: dict[int, list[Any]] = {}  # call id -> reports on their way
        self._lock = threading.Lock()

    def in_order(self, number: int, action: Callable[[LearnerHost], None]) -> None:
        """Call ``action(host)`` once all requests of lower numbers have come."""
        with self._lock:
            self._early[number] = action
            while (due := self._early.pop(self._next_number, None)) is not None:
                self._next_number += 1
                assert self.host is not None
                due(self.host)

    def report(self, call: Call, progress: Parcel | Reference) -> None:
        """Send what a method reports to the driver."""
        message = parcel_message(progress, frozenset())
        sent = torch_rpc().rpc_async(
            self._driver, report, args=(call.call_id, call.client_id, call.method, message), timeout=0
        )
        self._reports.setdefault(call.call_id, []).append(sent)

    def replying_to(self, future: Any, call_id: int) -> Callable[[Outcome], None]:
        """A reply callback that settles a future, after the call's reports have arrived at the driver."""

        def reply(outcome: Outcome) -> None:
            message = outcome_message(outcome, self.covered)
            if reports := self._reports.pop(call_id, None):
                torch.futures.collect_all(reports).add_done_callback(lambda _: future.set_result(message))
            else:
                future.set_result(message)

        return reply

    def new_future(self) -> Any:
        """A future whose value may hold tensors on this worker's device."""
        devices: list[Any] = [self.device] if self.device.type == "cuda" else []
        return torch.futures.Future(devices=devices)


serving: Endpoint | None = None  # a worker's own endpoint, while it is in a world
listening: Callable[[Call, Parcel], None] | None = None  # in the driver: takes the reports of workers


@async_entry
def submit(number: int, message: Any) -> Any:
    """Run a call; the future's value is its outcome."""
    endpoint = _serving()
    future = endpoint.new_future()

    def act(host: LearnerHost) -> None:
        try:
            call = read_call(message, endpoint.device)
        except Exception as error:  # the device is out of memory, say
            failed = Outcome("failed", failure=Failure.capture(error), never_ran=True)
            future.set_result(outcome_message(failed, endpoint.covered))
        else:
            host.submit(call, endpoint.replying_to(future, call.call_id))

    endpoint.in_order(number, act)
    return future


@async_entry
def advance(number: int, call_id: int) -> Any:
    """Ask an open stream for its next item; the future's value is the outcome of that step."""
    endpoint = _serving()
    future = endpoint.new_future()
    endpoint.in_order(number, lambda host: host.advance(call_id, endpoint.replying_to(future, call_id)))
    return future


@async_entry
def register(number: int, client_id: str, kwargs: Any) -> Any:
    """Make room for a learner; the future's value is an RRef to its mailbox."""
    endpoint = _serving()
    future: Any = torch.futures.Future()

    def act(host: LearnerHost) -> None:
        parcel = read_parcel(kwargs, endpoint.device)
        assert parcel is not None
        future.set_result(torch_rpc().RRef(host.register(client_id, parcel)))

    endpoint.in_order(number, act)
    return future


def cancel(number: int, call_id: int) -> None:
    """Nobody waits for this call any more."""
    _serving().in_order(number, lambda host: host.cancel(call_id))


def report(call_id: int, client_id: str, method: str, message: Any) -> None:
    """In the driver: a worker's method tells how far it is."""
    if listening is not None:
        progress = read_parcel(message, None)
        assert progress is not None
        listening(Call(call_id, client_id, method, progress), progress)


def _serving() -> Endpoint:
    if serving is None:
        raise RuntimeError("this process serves no learners")
    return serving
