"""The entry points that the driver invokes on a worker.

They run on RPC's own threads and never wait there: calls are handed to the host, which answers through futures.

Any process that reaches the port can invoke them. A request counts only with the secret that this worker's driver has
told it over the link, which is compared before anything else of the request is looked at.
"""

from __future__ import annotations

import hmac
import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from torchfedrpc.errors import SerializationError
from torchfedrpc.host.call import Call, Outcome, Registration
from torchfedrpc.host.learner_host import LearnerHost
from torchfedrpc.rpc.backend import async_entry
from torchfedrpc.rpc.in_order import InOrder
from torchfedrpc.rpc.message import MappedDevices, read_batch, read_call, read_files, read_parcel
from torchfedrpc.rpc.response_queue import Answers, Reported
from torchfedrpc.rpc.rrefs import OwnedRRefs
from torchfedrpc.wire.exceptions import Failure
from torchfedrpc.wire.packing import Packed, Unreadable
from torchfedrpc.wire.shared import SharedValue

logger = logging.getLogger(__name__)

_Action = Callable[[LearnerHost], object]


class Endpoint:
    """A worker's side of the calls from its driver, through all the worlds of a run.

    Args:
        device: this worker's device.
        driver_pid: the driver's process, where this worker finds that one's files.
    """

    def __init__(self, device: torch.device, driver_pid: int | None = None) -> None:
        self.driver_pid = driver_pid
        self.host: LearnerHost
        self.device = device
        self._world: _World | None = None
        self._unheard: list[Reported] = []  # reports made while there is no world, or lost with one
        self._lock = threading.Lock()  # held while a report goes where reports go

    def connect(self, secret: bytes, covered: MappedDevices) -> None:
        """Serve in a world; to be called before it is joined.

        Args:
            secret: what the driver's requests to this worker in that world begin with.
            covered: the devices of this worker that the world's device map takes to the driver.
        """
        self.host.unshare_all()
        with self._lock:
            rrefs = OwnedRRefs()
            self._world = _World(secret, Answers(self.device, covered, rrefs, self._unheard), rrefs)
            self._unheard = []

    def disconnect(self) -> None:
        """Answer nobody any more; to be called before the world is left, which cuts off what is on its way.

        The driver asks again in the next world for what it has had no answer to.
        """
        with self._lock:
            world, self._world = self._world, None
            if world is not None:
                self._unheard = world.answers.close()
                world.rrefs.close()

    def world(self, header: object) -> _World | None:
        """The present world; None where a request's header does not have its secret."""
        world = self._world
        given = header[0] if type(header) is tuple and header else None
        secret = given if type(given) is bytes else b""
        return world if world is not None and hmac.compare_digest(secret, world.secret) else None

    def report(self, call: Call, number: int, progress: Packed) -> None:
        """Tell the driver what a method reports: it hears that before the call's outcome."""
        with self._lock:
            if self._world is None:
                self._unheard.append((call, number, progress))
            else:
                self._world.answers.report((call, number, progress))


class _World:
    """What an endpoint has at hand while it is in a world."""

    def __init__(self, secret: bytes, answers: Answers, rrefs: OwnedRRefs) -> None:
        self.secret = secret
        self.answers = answers
        self.rrefs = rrefs
        self.requests = InOrder()


serving: Endpoint | None = None  # a worker's own endpoint, during a run


@async_entry
def serve(header: tuple[Any, ...], items: Sequence[tuple[Any, ...]]) -> Any:
    """Take a driver's request; the future's value is what this worker has to tell, once there is anything.

    Args:
        header: the secret, number of the request in its world, how many answers the driver has heard, which outcomes
            need not be kept for it any more, and the question that is to be answered alone, if any.
        items: what to do, in order: a verb of `_VERBS` and its arguments. One that cannot be read is answered with
            an error where it is a question, else logged; the others are done.

    Returns:
        A future of (number of the answer, [(question, outcome) or (None, report), ...], [(client id, its learner's
        RRef), ...]); of None, where this worker leaves the world, or the secret is that of another.

    Raises:
        SerializationError: the header or the items are of another form; nothing of the request is done.
    """
    endpoint = serving
    if endpoint is None or (world := endpoint.world(header)) is None:
        return _nothing()  # an error would be printed, by RPC on both sides
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
            except Exception:  # those behind must not suffer for it
                logger.exception("a request could not be carried out")

    world.requests.put(number, run)
    return future


def acknowledge(header: tuple[Any, ...]) -> None:
    """Outcomes have arrived, and no other request is there to say so; answers show that this worker is reached."""
    endpoint = serving
    if endpoint is not None and (world := endpoint.world(header)) is not None:
        number, _ = _heed(endpoint, world, header)
        world.requests.put(number, lambda: None)


@async_entry
def rref(header: tuple[Any, ...], client_id: str) -> Any:
    """The RRef of a learner that need not have been called yet, in its turn among the requests.

    Args:
        header: as of `serve`.
        client_id: whose learner; a request before this one has registered it.

    Returns:
        A future of what the driver makes the RRef of; of None where there is none, as of `serve`.

    Raises:
        SerializationError: The header or the client's id is of another form.
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
    """Check a request's header and take its acknowledgements; its number, and the question to answer alone.

    Raises:
        SerializationError: It is of another form, or a request of that number cannot follow; nothing is done.
    """
    number, heard, acknowledged, alone = _fields(header)
    world.requests.check(number)
    endpoint.host.acknowledge(acknowledged)
    world.answers.heard(heard)
    return number, alone


def _fields(header: tuple[Any, ...]) -> tuple[int, int, tuple[int, ...], int | None]:
    """What a header has behind the secret.

    Raises:
        SerializationError: it is of another form.
    """
    match header:
        case (_, int(number), int(heard), tuple(acknowledged), int() | None as alone) if {
            *map(type, acknowledged)
        } <= {int}:
            return number, heard, acknowledged, alone
    raise SerializationError("a request's header is not of the form that this version of torchfedrpc sends")


def _read(endpoint: Endpoint, world: _World, item: Any) -> _Action:
    """What an item asks for; where it cannot be read, to answer that."""
    try:
        verb, *arguments = item
        numbers = arguments[:1] if verb in ("submit", "batch") else arguments if verb in _QUESTIONS else ()
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


# Verbs: each reads its item on the thread where RPC delivers it, and gives what to do in the item's turn.


def _submit(endpoint: Endpoint, world: _World, question: int, message: Any) -> _Action:
    """Run a call, or join it; its (first) outcome is the answer."""
    (call, numbers), reply = read_call(message, endpoint.device), partial(world.answers.outcome, question)
    return _answering(reply, lambda host: host.submit(call, reply, numbers))


def _batch(endpoint: Endpoint, world: _World, question: int, message: Any) -> _Action:
    """Run a batch, or join it; its (first) outcome is the answer."""
    (batch, numbers), reply = read_batch(message, endpoint.device), partial(world.answers.outcome, question)
    return _answering(reply, lambda host: host.run_batch(batch, reply, numbers))


def _cancel_batch(endpoint: Endpoint, world: _World, call_id: int) -> _Action:
    """Cancel the calls of a batch that have not ended."""
    return lambda host: host.cancel(call_id)


def _advance(endpoint: Endpoint, world: _World, question: int, call_id: int, step: int) -> _Action:
    """Ask an open stream for an item, or a batch for the calls that have ended; the outcome is the answer."""
    reply = partial(world.answers.outcome, question)
    return _answering(reply, lambda host: host.advance(call_id, step, reply))


def _cancel(endpoint: Endpoint, world: _World, question: int, call_id: int) -> _Action:
    """Nobody waits for this call any more; what became of it is the answer."""
    reply = partial(world.answers.outcome, question)
    return _answering(reply, lambda host: host.cancel(call_id, reply))


def _register(endpoint: Endpoint, world: _World, client_id: str, kwargs: Any, build: int) -> _Action:
    """Make room for a learner."""
    arguments = read_parcel(kwargs, endpoint.device)

    def register(host: LearnerHost) -> None:
        if arguments is None:  # registered in an earlier world
            mailbox = host.mailbox(client_id)
        else:
            mailbox = host.register(Registration(client_id, arguments, build))
        world.rrefs.own(client_id, mailbox)

    return register


def _forget(endpoint: Endpoint, world: _World, client_id: str) -> _Action:
    """A learner has moved elsewhere."""

    def forget(host: LearnerHost) -> None:
        world.rrefs.give_up(client_id)
        host.forget(client_id)

    return forget


def _share(endpoint: Endpoint, world: _World, number: int, message: Any, num_calls: int | None) -> _Action:
    """Keep a value for calls that refer to it."""
    parcel = read_parcel(message, endpoint.device)
    assert parcel is not None
    value = SharedValue(parcel, number, num_calls)
    return lambda host: host.share(value)


def _share_files(endpoint: Endpoint, world: _World, number: int, message: Any, num_calls: int | None) -> _Action:
    """Keep a value that lies in files of the driver's process."""
    try:
        parcel: Packed = read_files(message, endpoint.driver_pid)
    except Exception as error:
        parcel = Unreadable(error)
    value = SharedValue(parcel, number, num_calls)
    return lambda host: host.share(value)


def _unshare(endpoint: Endpoint, world: _World, number: int) -> _Action:
    """No call that is to come refers to that value."""
    return lambda host: host.unshare(number)


_QUESTIONS = ("submit", "batch", "advance", "cancel")

_VERBS: dict[str, Callable[..., _Action]] = {
    "submit": _submit,
    "batch": _batch,
    "cancel_batch": _cancel_batch,
    "advance": _advance,
    "cancel": _cancel,
    "register": _register,
    "forget": _forget,
    "share": _share,
    "share_files": _share_files,
    "unshare": _unshare,
}


def _answering(reply: Callable[[Outcome], None], action: _Action) -> _Action:
    """The action, whose failure is the answer: this may be the thread of another request, which must not suffer."""

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
