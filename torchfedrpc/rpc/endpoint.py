"""The entry points that the driver invokes on a worker, and the one that workers invoke on the driver.

They run on RPC's own threads and never wait there: calls are handed to the host, which answers through futures.
"""

from __future__ import annotations

import itertools
import threading
from typing import Any

import torch

from torchfedrpc.host.call import Call, Outcome
from torchfedrpc.host.learner_host import LearnerHost
from torchfedrpc.host.mailbox import Reply
from torchfedrpc.host.runner import Report
from torchfedrpc.rpc.backend import async_entry, torch_rpc
from torchfedrpc.rpc.in_order import InOrder
from torchfedrpc.rpc.message import MappedDevices, outcome_message, parcel_message, read_call, read_parcel
from torchfedrpc.wire.packing import Packed, Parcel


class Endpoint:
    """A worker's side of the calls from its driver.

    Args:
        driver: the driver's RPC name.
        rank: this worker's rank.
        device: this worker's device.
        covered: the devices of this worker that the world's device map takes to the driver.
    """

    def __init__(self, driver: str, rank: int, device: torch.device, covered: MappedDevices) -> None:
        self.host: LearnerHost
        self.device = device
        self.covered = covered
        self.requests = InOrder()
        self._driver = driver
        self._rank = rank
        self._report_numbers = itertools.count()
        self._reports: dict[int, list[Any]] = {}  # call that is waited for -> its reports on their way
        self._lock = threading.Lock()

    def report(self, call: Call, progress: Packed) -> None:
        """Send what a method reports to the driver."""
        message = (call.call_id, call.client_id, call.method, parcel_message(progress, frozenset()))
        with self._lock:
            args = (self._rank, next(self._report_numbers), message)
            sent = torch_rpc().rpc_async(self._driver, report, args=args, timeout=0)
            if call.call_id in self._reports:  # somebody waits for the call
                self._reports[call.call_id].append(sent)

    def replying_to(self, future: Any, call_id: int) -> Reply:
        """A reply callback that settles a future, after the call's reports have arrived at the driver."""
        with self._lock:
            self._reports[call_id] = []

        def reply(outcome: Outcome) -> None:
            message = outcome_message(outcome, self.covered)

            def settle(_: Any = None) -> None:
                if isinstance(outcome.parcel, Parcel) and outcome.parcel.ready is not None:
                    outcome.parcel.ready()  # whichever thread this is, it sends what the method's thread has made
                future.set_result(message)

            with self._lock:
                reports = self._reports.pop(call_id, [])
            if reports:
                torch.futures.collect_all(reports).add_done_callback(settle)
            else:
                settle()

        return reply

    def new_future(self) -> Any:
        """A future whose value may hold tensors on this worker's device."""
        devices: list[Any] = [self.device] if self.device.type == "cuda" else []
        return torch.futures.Future(devices=devices)


class Listener:
    """The driver's side of what workers report.

    Args:
        on_report: takes each report, a worker's in the order in which it sent them, on a thread of RPC.
    """

    def __init__(self, on_report: Report) -> None:
        self.on_report = on_report
        self._by_rank: dict[int, InOrder] = {}

    def reports(self, rank: int) -> InOrder:
        """The order of one worker's reports."""
        return self._by_rank.setdefault(rank, InOrder())


serving: Endpoint | None = None  # a worker's own endpoint, while it is in a world
listening: Listener | None = None  # the driver's own, likewise


@async_entry
def submit(number: int, message: Any) -> Any:
    """Run a call; the future's value is its outcome."""
    endpoint = _serving()
    call = read_call(message, endpoint.device)
    future = endpoint.new_future()
    reply = endpoint.replying_to(future, call.call_id)
    endpoint.requests.put(number, lambda: endpoint.host.submit(call, reply))
    return future


@async_entry
def advance(number: int, call_id: int) -> Any:
    """Ask an open stream for its next item; the future's value is the outcome of that step."""
    endpoint = _serving()
    future = endpoint.new_future()
    reply = endpoint.replying_to(future, call_id)
    endpoint.requests.put(number, lambda: endpoint.host.advance(call_id, reply))
    return future


@async_entry
def register(number: int, client_id: str, kwargs: Any) -> Any:
    """Make room for a learner; the future's value is an RRef to its mailbox."""
    endpoint = _serving()
    arguments = read_parcel(kwargs, endpoint.device)
    assert arguments is not None
    future: Any = torch.futures.Future()
    endpoint.requests.put(
        number, lambda: future.set_result(torch_rpc().RRef(endpoint.host.register(client_id, arguments)))
    )
    return future


def cancel(number: int, call_id: int) -> None:
    """Nobody waits for this call any more."""
    endpoint = _serving()
    endpoint.requests.put(number, lambda: endpoint.host.cancel(call_id))


def report(rank: int, number: int, message: Any) -> None:
    """In the driver: a worker's method tells how far it is."""
    listener = listening
    if listener is None:
        return
    call_id, client_id, method, parcel_parts = message
    progress = read_parcel(parcel_parts, None)
    assert progress is not None
    call = Call(call_id, client_id, method, progress)
    listener.reports(rank).put(number, lambda: listener.on_report(call, progress))


def _serving() -> Endpoint:
    if serving is None:
        raise RuntimeError("this process serves no learners")
    return serving
