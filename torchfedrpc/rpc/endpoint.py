"""The entry points that the driver invokes on a worker, and the one that workers invoke on the driver.

They run on RPC's own threads and never wait there: calls are handed to the host, which answers through futures.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from torchfedrpc.host.call import Call, Outcome
from torchfedrpc.host.learner_host import LearnerHost
from torchfedrpc.host.mailbox import Reply
from torchfedrpc.host.runner import Report
from torchfedrpc.rpc.backend import async_entry, torch_rpc
from torchfedrpc.rpc.in_order import InOrder
from torchfedrpc.rpc.message import MappedDevices, outcome_message, parcel_message, read_call, read_parcel
from torchfedrpc.wire.failure import Failure
from torchfedrpc.wire.packing import Packed, Parcel

_ARRIVAL_TIMEOUT_S = 1.0
_Reported = tuple[Call, int, Packed]  # as a `Report` takes it


logger = logging.getLogger(__name__)


class Endpoint:
    """A worker's side of the calls from its driver, through all the worlds of a run.

    Args:
        device: this worker's device.
    """

    def __init__(self, device: torch.device) -> None:
        self.host: LearnerHost
        self.device = device
        self._world: _World | None = None
        self._unsent: list[_Reported] = []  # made while there is no world, or lost with one
        self._lock = threading.Lock()

    def connect(
        self, generation: int, driver: str, rank: int, covered: MappedDevices, asked: Iterable[int] = ()
    ) -> None:
        """Serve in a world; to be called before it is joined.

        Args:
            generation: the world's number.
            driver: the driver's RPC name in it.
            rank: this worker's rank in it.
            covered: the devices of this worker that the world's device map takes to the driver.
            asked: ids of the calls that the driver will ask for again: their reports come before their answers.
        """
        world = _World(generation, driver, rank, covered)
        world.reports = {call_id: [] for call_id in asked}
        self._world = world

    def flush(self) -> None:
        """Send what was reported while there was no world; to be called after it is joined."""
        with self._lock:
            unsent, self._unsent = self._unsent, []
            for reported in unsent:
                self._report(reported)

    def disconnect(self) -> None:
        """Answer nobody any more; to be called before the world is left, which cuts off what is on its way.

        RPC must not be left with a future that may be set after its agent is gone. The driver asks again in the next
        world for what it has had no answer to.
        """
        with self._lock:
            world, self._world = self._world, None
            unanswered = list(world.unanswered.values()) if world is not None else []
            if world is not None:
                world.unanswered.clear()
        for future in unanswered:
            future.set_result(None)
        if world is not None:
            _wait([sent for sent, _ in world.on_their_way])
            with self._lock:
                self._unsent[:0] = [reported for sent, reported in world.on_their_way if not _has_arrived(sent)]

    def world(self, generation: int) -> _World | None:
        """The world of that number, if this worker is in it."""
        world = self._world
        return world if world is not None and world.generation == generation else None

    def report(self, call: Call, number: int, progress: Packed) -> None:
        """Send what a method reports to the driver."""
        with self._lock:
            if self._unsent:  # it must not overtake these
                self._unsent.append((call, number, progress))
            else:
                self._report((call, number, progress))

    def replying(self, world: _World, call_id: int | None = None) -> tuple[Any, Reply]:
        """A future, and a reply callback that settles it: after that call's reports have arrived at the driver."""
        devices: list[Any] = [self.device] if self.device.type == "cuda" else []
        future: Any = torch.futures.Future(devices=devices)
        with self._lock:
            number = next(world.numbers)
            world.unanswered[number] = future
            if call_id is not None:
                world.reports.setdefault(call_id, [])

        def reply(outcome: Outcome) -> None:
            message = outcome_message(outcome, world.covered)

            def settle(_: Any = None) -> None:
                with self._lock:
                    if world.unanswered.pop(number, None) is None:  # the world is over
                        return
                if isinstance(outcome.parcel, Parcel) and outcome.parcel.ready is not None:
                    outcome.parcel.ready()  # whichever thread this is, it sends what the method's thread has made
                future.set_result(message)

            with self._lock:
                reports = [] if call_id is None else world.reports.pop(call_id, [])
            if reports:
                torch.futures.collect_all(reports).add_done_callback(settle)
            else:
                settle()

        return future, reply

    def _report(self, reported: _Reported) -> None:
        world = self._world
        call, number, progress = reported
        message = (call.call_id, call.client_id, call.method, number, parcel_message(progress, frozenset()))
        try:
            if world is None:
                raise RuntimeError("between two worlds")
            args = (world.rank, world.num_reports, message)
            sent = torch_rpc().rpc_async(world.driver, report, args=args, timeout=0)
        except RuntimeError:
            self._unsent.append(reported)
            return
        world.num_reports += 1
        while world.on_their_way and _has_arrived(world.on_their_way[0][0]):
            world.on_their_way.popleft()
        world.on_their_way.append((sent, reported))
        if call.call_id in world.reports:  # somebody waits for the call
            world.reports[call.call_id].append(sent)


class _World:
    """What an endpoint has at hand while it is in a world."""

    def __init__(self, generation: int, driver: str, rank: int, covered: MappedDevices) -> None:
        self.generation = generation
        self.driver = driver
        self.rank = rank
        self.covered = covered
        self.requests = InOrder()
        self.numbers = itertools.count()
        self.num_reports = 0
        self.on_their_way: deque[tuple[Any, _Reported]] = deque()  # from the first that has not arrived
        self.unanswered: dict[int, Any] = {}
        self.reports: dict[int, list[Any]] = {}  # call that is waited for -> its reports on their way


def _has_arrived(sent: Any) -> bool:
    """Whether a report is known to have arrived."""
    if not sent.done():
        return False
    try:
        sent.value()
    except Exception:  # whatever RPC makes of a connection that broke
        return False
    return True


def _wait(futures: Iterable[Any]) -> None:
    """Wait until these have come to an end; not for long, since the driver, which is leaving too, may be gone."""
    if not (unfinished := [future for future in futures if not future.done()]):
        return
    ended = threading.Event()
    torch.futures.collect_all(unfinished).add_done_callback(lambda _: ended.set())
    ended.wait(_ARRIVAL_TIMEOUT_S)


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


serving: Endpoint | None = None  # a worker's own endpoint, during a run
listening: Listener | None = None  # the driver's own, while it is in a world


@async_entry
def submit(header: tuple[Any, ...], message: Any) -> Any:
    """Run a call; the future's value is its (first) outcome."""
    if (request := _Request.of(header)) is None:
        return _nothing()
    call = read_call(message, request.endpoint.device)
    future, reply = request.endpoint.replying(request.world, call.call_id)
    request.in_turn(lambda host: host.submit(call, reply), reply)
    return future


@async_entry
def advance(header: tuple[Any, ...], call_id: int, step: int) -> Any:
    """Ask an open stream for an item; the future's value is the outcome of that step."""
    if (request := _Request.of(header)) is None:
        return _nothing()
    future, reply = request.endpoint.replying(request.world, call_id)
    request.in_turn(lambda host: host.advance(call_id, step, reply), reply)
    return future


@async_entry
def cancel(header: tuple[Any, ...], call_id: int) -> Any:
    """Nobody waits for this call any more; the future's value is what became of it."""
    if (request := _Request.of(header)) is None:
        return _nothing()
    future, reply = request.endpoint.replying(request.world)
    request.in_turn(lambda host: host.cancel(call_id, reply), reply)
    return future


@async_entry
def register(header: tuple[Any, ...], client_id: str, kwargs: Any, build: int) -> Any:
    """Make room for a learner; the future's value is an RRef to its mailbox."""
    if (request := _Request.of(header)) is None:
        return _nothing()
    arguments = read_parcel(kwargs, request.endpoint.device)
    future: Any = torch.futures.Future()

    def make_room(host: LearnerHost) -> None:
        future.set_result(torch_rpc().RRef(host.register(client_id, arguments, build)))

    request.in_turn(make_room)
    return future


def forget(header: tuple[Any, ...], client_id: str) -> None:
    """A learner has moved elsewhere."""
    if (request := _Request.of(header)) is not None:
        request.in_turn(lambda host: host.forget(client_id))


def acknowledge(header: tuple[Any, ...]) -> None:
    """Outcomes have arrived, and no other request is there to say so; answers show that this worker is reached."""
    if (request := _Request.of(header)) is not None:
        request.in_turn(lambda host: None)


def report(rank: int, number: int, message: Any) -> None:
    """In the driver: a worker's method tells how far it is."""
    listener = listening
    if listener is None:
        return
    call_id, client_id, method, report_number, parcel_parts = message
    progress = read_parcel(parcel_parts, None)
    assert progress is not None
    call = Call(call_id, client_id, method, progress)
    listener.reports(rank).put(number, lambda: listener.on_report(call, report_number, progress))


@dataclass(frozen=True)
class _Request:
    """A request as it arrives: through which world, and when its turn is."""

    endpoint: Endpoint
    world: _World
    number: int

    @classmethod
    def of(cls, header: tuple[Any, ...]) -> _Request | None:
        """Read a header; None where this worker is not in that world (any more)."""
        generation, number, acknowledged = header
        if serving is None or (world := serving.world(generation)) is None:
            return None
        serving.host.acknowledge(acknowledged)
        return cls(serving, world, number)

    def in_turn(self, action: Callable[[LearnerHost], object], reply: Reply | None = None) -> None:
        """Run an action on the host, after those of all requests that were sent before.

        If it fails, ``reply`` takes that: this may be the thread of another request, which must not suffer for it.
        """
        host = self.endpoint.host

        def run() -> None:
            try:
                action(host)
            except Exception as error:
                logger.exception("a request could not be carried out")
                if reply is not None:
                    reply(Outcome("failed", failure=Failure.capture(error), never_ran=True))

        self.world.requests.put(self.number, run)


def _nothing() -> Any:
    """The answer of a worker that leaves: none. An error would be printed, by RPC on both sides."""
    future: Any = torch.futures.Future()
    future.set_result(None)
    return future
