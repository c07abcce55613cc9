"""Entry points of a worker, which its driver invokes by RPC.

They run on RPC's threads and never block them: calls go to the host, which answers through futures.

Any process that reaches the port can invoke them. A request is served only if it begins with the secret that the
driver has sent over the control link. The secret is compared before anything else of the request is read.
"""

from __future__ import annotations

import hmac
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from torchfedrpc.errors import SerializationError
from torchfedrpc.host.call import Call, Outcome, Registration, TakeBack
from torchfedrpc.host.learner_host import LearnerHost
from torchfedrpc.rpc.backend import async_entry
from torchfedrpc.rpc.message import MappedDevices, read_batch, read_call, read_files, read_parcel
from torchfedrpc.rpc.response_queue import Answers, Reported
from torchfedrpc.rpc.rrefs import OwnedRRefs
from torchfedrpc.wire.exceptions import Failure
from torchfedrpc.wire.packing import Packed, Parcel, Unreadable
from torchfedrpc.wire.shared import SharedValue

logger = logging.getLogger(__name__)

_MAX_EARLY = 1 << 16  # RPC's few threads overtake each other by tens, so that larger gaps are not the driver's
_Action = Callable[[LearnerHost], object]


class InOrder:
    """Runs actions in the order of their numbers, 0, 1, 2, ..., each as soon as all earlier ones have arrived.

    RPC delivers requests on several threads, which may overtake each other.
    """

    def __init__(self) -> None:
        self._next = 0
        self._early: dict[int, Callable[[], object]] = {}
        self._lock = threading.Lock()

    def check(self, number: int) -> None:
        """Check that an action of this number can still be put.

        Raises:
            SerializationError: If an action of this number was put before, or the number is far ahead.
        """
        with self._lock:
            if not self._next <= number < self._next + _MAX_EARLY or number in self._early:
                raise SerializationError(f"request {number} cannot follow, number {self._next} is the next")

    def put(self, number: int, action: Callable[[], object]) -> None:
        """Run an action in its turn, on this thread or that of a later caller. The action must not block."""
        with self._lock:
            self._early[number] = action
            while (due := self._early.pop(self._next, None)) is not None:
                self._next += 1
                due()


class Endpoint:
    """A worker's side of its driver's calls, through all worlds of a run.

    Args:
        device: The worker's device.
        driver_pid: The driver's process, if the worker can open its memory files; else None.
    """

    def __init__(self, device: torch.device, driver_pid: int | None = None) -> None:
        self.driver_pid = driver_pid
        self.host: LearnerHost
        self.device = device
        self._world: _World | None = None
        self._unheard: list[Reported] = []  # reports that were made without a world, or lost with one
        self._lock = threading.Lock()  # held while a report is queued

    def connect(self, secret: bytes, covered: MappedDevices) -> None:
        """Serve in a world. Call this before the world is joined.

        Args:
            secret: First bytes of the driver's requests to this worker in that world.
            covered: Devices of this worker that the world's device map connects with the driver.
        """
        with self._lock:
            rrefs = OwnedRRefs()
            self._world = _World(secret, Answers(self.device, covered, rrefs, self._unheard), rrefs)
            self._unheard = []

    def disconnect(self) -> None:
        """Stop answering. Call this before the world is left, since answers on their way are lost with it.

        The driver repeats unanswered requests in the next world.
        """
        with self._lock:
            world, self._world = self._world, None
            if world is not None:
                self._unheard = world.answers.close()
                world.rrefs.close()

    def world(self, header: object) -> _World | None:
        """Return the present world; None if the header of a request does not begin with its secret."""
        world = self._world
        given = header[0] if type(header) is tuple and header else None
        secret = given if type(given) is bytes else b""
        return world if world is not None and hmac.compare_digest(secret, world.secret) else None

    def report(self, call: Call, number: int, progress: Packed) -> None:
        """Send the progress that a method reports. It arrives before the outcome of the call."""
        with self._lock:
            if self._world is None:
                self._unheard.append((call, number, progress))
            else:
                self._world.answers.report((call, number, progress))


class _World:
    """State of an endpoint in one world. Values and RRefs of learners are sent again in the next one.

    Attributes:
        values: Number -> shared value, for a known number of calls or until ``unshare``. Used in the order of the
            requests.
    """

    def __init__(self, secret: bytes, answers: Answers, rrefs: OwnedRRefs) -> None:
        self.secret = secret
        self.answers = answers
        self.rrefs = rrefs
        self.requests = InOrder()
        self.values: dict[int, SharedValue] = {}

    def with_values(self, call: Call, numbers: Sequence[int]) -> Call:
        """Return a call with the shared values of its arguments.

        Raises:
            KeyError: If the driver has not sent one of these numbers.
        """
        if not numbers:
            return call
        assert isinstance(call.arguments, Parcel)
        return replace(call, arguments=replace(call.arguments, apart=tuple(map(self._take, numbers))))

    def _take(self, number: int) -> SharedValue:
        value = self.values[number]
        if value.is_for_tick:
            value.num_unsent -= 1
            if not value.num_unsent:
                del self.values[number]
        return value


serving: Endpoint | None = None  # a worker's own endpoint, during a run


@async_entry
def serve(header: tuple[Any, ...], items: Sequence[tuple[Any, ...]]) -> Any:
    """Serve a request of the driver. The future is settled when the worker has an outcome or a report.

    Args:
        header: Secret, number of the request in its world, number of answers that the driver has received, call ids
            whose outcomes it has received, and the number of the question to answer separately (or None).
        items: Items in order, each a verb of `_VERBS` and its arguments. An item that cannot be read is answered
            with an error if it is a question, and logged otherwise; the other items are carried out.

    Returns:
        A future of (number of the answer, [(question, outcome) or (None, report), ...], [(client id, RRef of its
        learner), ...]). Its value is None if the worker leaves the world, or if the secret is wrong.

    Raises:
        SerializationError: If the header or the items have another form. Nothing of the request is carried out.
    """
    endpoint = serving
    if endpoint is None or (world := endpoint.world(header)) is None:
        return _nothing()  # RPC would print an error on both sides
    if not isinstance(items, list | tuple):
        raise SerializationError(f"a request's items are a list, not a {type(items).__name__}")
    number, alone = _heed(endpoint, world, header)
    host, answers = endpoint.host, world.answers
    actions = [_read(endpoint, world, item) for item in items]
    future = answers.request(alone)

    def run() -> None:
        for action in actions:
            try:
                action(host)
            except Exception:  # the other items are carried out all the same
                logger.exception("a request could not be carried out")

    world.requests.put(number, run)
    return future


def acknowledge(header: tuple[Any, ...]) -> None:
    """Take acknowledgements that no other request carries. The answer shows that the worker is reached."""
    endpoint = serving
    if endpoint is not None and (world := endpoint.world(header)) is not None:
        number, _ = _heed(endpoint, world, header)
        world.requests.put(number, lambda: None)


@async_entry
def rref(header: tuple[Any, ...], client_id: str) -> Any:
    """Return the RRef of a learner, which need not have been called. It is made in the order of the requests.

    Args:
        header: See `serve`.
        client_id: The client; an earlier request has registered its learner.

    Returns:
        A future of the data from which the driver makes the RRef; its value is None as for `serve`.

    Raises:
        SerializationError: If the header or the client id has another form.
    """
    endpoint = serving
    if endpoint is None or (world := endpoint.world(header)) is None:
        return _nothing()
    if type(client_id) is not str:
        raise SerializationError(f"a client's id is a string, not a {type(client_id).__name__}")
    number, _ = _heed(endpoint, world, header)
    future: Any = torch.futures.Future()
    world.requests.put(number, lambda: future.set_result(world.rrefs.of(client_id)))
    return future


def _heed(endpoint: Endpoint, world: _World, header: tuple[Any, ...]) -> tuple[int, int | None]:
    """Check the header of a request, and take its acknowledgements.

    Returns:
        Number of the request, and the question to answer separately (or None).

    Raises:
        SerializationError: If the header has another form, or its number cannot follow the earlier ones. Nothing is
            acknowledged then.
    """
    number, heard, acknowledged, alone = _fields(header)
    world.requests.check(number)
    endpoint.host.acknowledge(acknowledged)
    world.answers.heard(heard)
    return number, alone


def _fields(header: tuple[Any, ...]) -> tuple[int, int, tuple[int, ...], int | None]:
    """Return the fields of a header after the secret.

    Raises:
        SerializationError: If the header has another form.
    """
    match header:
        case (_, int(number), int(heard), tuple(acknowledged), int() | None as alone) if {
            *map(type, acknowledged)
        } <= {int}:
            return number, heard, acknowledged, alone
    raise SerializationError("a request's header is not of the form that this version of torchfedrpc sends")


def _read(endpoint: Endpoint, world: _World, item: Any) -> _Action:
    """Return the action of an item. If the item cannot be read, the action reports that."""
    try:
        verb, *arguments = item
        numbers = arguments[: _NUM_NUMBERS[verb]] if verb in _QUESTIONS else ()
        if {*map(type, numbers)} - {int}:
            raise SerializationError(f"{verb} takes numbers")
        return _VERBS[verb](endpoint, world, *arguments)
    except Exception as error:
        return _refusal(
            world.answers, item, SerializationError(f"a request cannot be read: {type(error).__name__}: {error}")
        )


def _refusal(answers: Answers, item: Any, error: SerializationError) -> _Action:
    match item:
        case (verb, int(question), *_) if verb in _QUESTIONS:
            reply = partial(answers.outcome, question)
            return lambda host: reply(Outcome("failed", failure=Failure.capture(error), never_ran=True))
    return lambda host: logger.error("a part of a request is left out: %s", error)


# Verbs. Each reads its item on the thread on which RPC delivers it, and returns the action for the item's turn.


def _submit(endpoint: Endpoint, world: _World, question: int, message: Any) -> _Action:
    """Run a call, or join it if it is known. The answer is its (first) outcome."""
    (call, numbers), reply = read_call(message, endpoint.device), partial(world.answers.outcome, question)
    return _answering(reply, lambda host: host.submit(world.with_values(call, numbers), reply))


def _batch(endpoint: Endpoint, world: _World, question: int, message: Any) -> _Action:
    """Run a batch, or join it if it is known. The answer is its (first) outcome."""
    (batch, numbers), reply = read_batch(message, endpoint.device), partial(world.answers.outcome, question)

    def run_batch(host: LearnerHost) -> None:
        calls = zip(batch.calls, numbers, strict=True)
        with_values = tuple([(place, world.with_values(call, of_call)) for (place, call), of_call in calls])
        host.run_batch(replace(batch, calls=with_values), reply)

    return _answering(reply, run_batch)


def _cancel_batch(endpoint: Endpoint, world: _World, call_id: int) -> _Action:
    """Cancel the calls of a batch that have not ended."""
    return lambda host: host.cancel(call_id)


def _advance(
    endpoint: Endpoint, world: _World, question: int, call_id: int, step: int, message: Any = None
) -> _Action:
    """Request the next item of an open stream, or the calls of a batch that have ended. The answer is the outcome."""
    sent, reply = read_parcel(message, endpoint.device), partial(world.answers.outcome, question)
    return _answering(reply, lambda host: host.advance(call_id, step, reply, sent))


def _cancel(endpoint: Endpoint, world: _World, question: int, call_id: int) -> _Action:
    """Cancel a call. The answer is its outcome."""
    reply = partial(world.answers.outcome, question)
    return _answering(reply, lambda host: host.cancel(call_id, reply))


def _take_back(
    endpoint: Endpoint, world: _World, question: int, call_id: int, candidates: Any, half: bool
) -> _Action:
    """Give calls back that have not begun. The answer has their ids."""
    if type(candidates) is not tuple or {*map(type, candidates)} - {int}:
        raise SerializationError("take_back takes the ids of calls")
    request, reply = TakeBack(call_id, candidates, bool(half)), partial(world.answers.outcome, question)
    return _answering(reply, lambda host: host.take_back(request, reply))


def _register(endpoint: Endpoint, world: _World, client_id: str, kwargs: Any, build: int) -> _Action:
    """Register a learner, which its first call makes."""
    arguments = read_parcel(kwargs, endpoint.device)

    def register(host: LearnerHost) -> None:
        if arguments is None:  # registered in an earlier world
            mailbox = host.mailbox(client_id)
        else:
            mailbox = host.register(Registration(client_id, arguments, build))
        world.rrefs.own(client_id, mailbox)

    return register


def _forget(endpoint: Endpoint, world: _World, client_id: str) -> _Action:
    """Drop a learner that has moved to another worker."""

    def forget(host: LearnerHost) -> None:
        world.rrefs.give_up(client_id)
        host.forget(client_id)

    return forget


def _share(endpoint: Endpoint, world: _World, number: int, message: Any, num_calls: int | None) -> _Action:
    """Keep a value for the calls that refer to it."""
    parcel = read_parcel(message, endpoint.device)
    assert parcel is not None
    value = SharedValue(parcel, number, num_calls)
    return lambda host: world.values.update({number: value})


def _share_files(endpoint: Endpoint, world: _World, number: int, message: Any, num_calls: int | None) -> _Action:
    """Keep a value that lies in memory files of the driver."""
    try:
        parcel: Packed = read_files(message, endpoint.driver_pid)
    except Exception as error:
        parcel = Unreadable(error)
    value = SharedValue(parcel, number, num_calls)
    return lambda host: world.values.update({number: value})


def _unshare(endpoint: Endpoint, world: _World, number: int) -> _Action:
    """Drop a value; no later call refers to it."""
    return lambda host: world.values.pop(number, None)


_QUESTIONS = ("submit", "batch", "advance", "cancel", "take_back")

_NUM_NUMBERS = {"submit": 1, "batch": 1, "advance": 3, "cancel": 2, "take_back": 2}  # that come first in a question

_VERBS: dict[str, Callable[..., _Action]] = {
    "submit": _submit,
    "batch": _batch,
    "cancel_batch": _cancel_batch,
    "advance": _advance,
    "cancel": _cancel,
    "take_back": _take_back,
    "register": _register,
    "forget": _forget,
    "share": _share,
    "share_files": _share_files,
    "unshare": _unshare,
}


def _answering(reply: Callable[[Outcome], None], action: _Action) -> _Action:
    """Return an action that answers with its error, if it raises one; it may run on the thread of another request."""

    def run(host: LearnerHost) -> None:
        try:
            action(host)
        except Exception as error:
            logger.exception("a request could not be carried out")
            reply(Outcome("failed", failure=Failure.capture(error), never_ran=True))

    return run


def _nothing() -> Any:
    future: Any = torch.futures.Future()
    future.set_result(None)
    return future
