"""Client of one worker in one world: sends calls in few messages, and settles a future for each."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from torchfedrpc.errors import ConfigError, SerializationError, WorkerLostError
from torchfedrpc.events import Event
from torchfedrpc.host.call import Batch, Call, Outcome, Registration, TakeBack
from torchfedrpc.rpc import endpoint
from torchfedrpc.rpc.backend import torch_rpc
from torchfedrpc.rpc.message import (
    MappedDevices,
    batch_message,
    call_message,
    file_message,
    parcel_message,
    read_outcome,
    read_report,
)
from torchfedrpc.rpc.rrefs import hold
from torchfedrpc.tasks import call_on
from torchfedrpc.wire.file import Address, TensorFiles
from torchfedrpc.wire.packing import Packed, Parcel, home_device
from torchfedrpc.wire.shared import SharedValue, shared_values

logger = logging.getLogger(__name__)

_SLOW_BYTES = 8 << 20  # a request of this size may need seconds between sites
_SLOW_S = 10.0
_METHODS = ("call", "stream", "barrier")
_MAX_KEPT_BYTES = 8 << 20  # outcomes that a worker keeps until the next request to it acknowledges them
_MAX_ITEMS = 64  # in one request, so that the worker begins with it while the next one is packed
_LARGE_BYTES = 256 << 10  # a larger item begins a new request, so that those before it do not wait for it
_LATE_S = 0.02  # items that are not urgent wait so long for others to share a request with
_RREF_TIMEOUT_S = 2.0  # it blocks the event loop; a worker answers beside its training, within a millisecond
_MAX_OPEN = 2  # empty requests that are sent only so that the worker can answer


Request = Call | Batch | TakeBack


class WorldOver(Exception):
    """The world ended before an answer came. Send the request again in the next world."""


class UndeliverableError(Exception):
    """RPC cannot carry a call or its answer, though the worker lives; the reason is the ``__cause__``."""


@dataclass(frozen=True)
class ProgressArrived(Event):
    """Arrival of the progress ``value``, report number ``number`` of ``call``; a repeated call reports it again."""

    call: Call
    number: int
    value: Packed


@dataclass
class Traffic:
    """Bytes that went to a worker of a run and came from it, in all worlds.

    Attributes:
        num_sent_bytes: Arguments of calls.
        num_received_bytes: Results of calls.
        num_snapshot_bytes: Snapshots, in both directions; they are not counted as calls of the user.
    """

    num_sent_bytes: int = 0
    num_received_bytes: int = 0
    num_snapshot_bytes: int = 0


@dataclass
class _Share:
    value: SharedValue
    lent: tuple[TensorFiles, list[Address]] | None  # files that the worker opens; None if the value is sent
    num_calls: int | None  # calls of this tick that have it; None if the worker keeps it for later calls


@dataclass(frozen=True, slots=True)
class _Question:
    request: Request
    future: asyncio.Future[Outcome]
    home: torch.device | None
    lent: Sequence[TensorFiles | None]  # returned to the pool when the answer shows that the worker has opened them
    is_cancel: bool = False


class WorkerClient:
    """Sends requests to one worker while a world lasts. All methods are called on the driver's event loop.

    Items of one tick of the loop share a request, in order. The worker answers a request as soon as an outcome or a
    report is ready, with all that are ready then. So a request is always open while an answer is due.

    Args:
        label: The worker's name in messages, such as ``worker1``.
        name: Its RPC name.
        secret: First bytes of each request to this worker in this world.
        covered: Devices of the driver that the world's device map connects with this worker.
        traffic: Counts bytes.
        events: Receives the progress that methods report.
        sees_files: Whether the worker can open memory files of this process.
        pid: The worker's process if this one can open its memory files, else None.
        known: Clients whose learners the worker has registered in an earlier world.
        suspects: Ids of calls that RPC failed to carry before; these and their answers travel alone.

    Attributes:
        broken: Set once RPC has lost a request or an answer, or the world has ended.
        failures: What RPC has lost: the requests that may be concerned, and the exception.
    """

    def __init__(
        self,
        label: str,
        name: str,
        secret: bytes,
        covered: MappedDevices,
        traffic: Traffic,
        *,
        events: asyncio.Queue[Event],
        sees_files: bool,
        pid: int | None,
        known: Container[str] = (),
        suspects: Container[int],
    ) -> None:
        self.label = label
        self.broken = asyncio.Event()
        self.failures: list[tuple[list[Request], Exception]] = []
        self._loop = asyncio.get_running_loop()
        self._worker: Any = torch_rpc().get_worker_info(name)
        self._secret = secret
        self._covered = covered
        self._traffic = traffic
        self._events = events
        self._sees_files = sees_files
        self._pid = pid
        self._known = known
        self._suspects = suspects
        self._is_open = True
        self._is_late_with_rrefs = False  # since the last answer
        self._learners: dict[str, Any] = {}  # client id -> RRef of its learner; None until it has arrived
        self._outgoing: list[tuple[int, tuple[Any, ...] | _Share]] = []  # each with its size in bytes
        self._shares: dict[int, _Share] = {}  # of this tick, by the value's number
        self._placed: set[int] = set()  # numbers of the values that the worker keeps
        self._will_flush = False
        self._late: asyncio.TimerHandle | None = None  # sends items that are not urgent
        self._next_request = 0
        self._num_open = 0
        self._numbers = itertools.count()
        self._questions: dict[int, _Question] = {}
        self._in_order = endpoint.InOrder()
        self._num_heard = 0
        self._acknowledged: list[int] = []
        self._num_kept_bytes = 0

    def register(self, registration: Registration) -> None:
        """Register a learner with the worker, unless that was done in this world. Calls may follow at once."""
        client_id = registration.client_id
        if client_id not in self._learners:
            self._learners[client_id] = None
            kwargs = None if client_id in self._known else parcel_message(registration.kwargs, self._covered)
            self._put(("register", client_id, kwargs, registration.build))

    def register_all(self, batch: Batch, registrations: Mapping[str, Registration]) -> None:
        """Register the learners of a batch that were not registered in this world.

        The worker does not need those that it has forgotten since it received the batch in an earlier world: it has
        given their calls back.
        """
        for _, call in batch.calls:
            if call.client_id not in self._learners and (known := registrations.get(call.client_id)) is not None:
                self.register(known)

    def confirmed(self) -> set[str]:
        """Return the clients whose learners the worker has confirmed as registered."""
        return {client_id for client_id, rref in self._learners.items() if rref is not None}

    def forget(self, client_id: str) -> None:
        """Let the worker drop a learner, which has moved. No call of it may be open."""
        self._learners.pop(client_id, None)
        self._put(("forget", client_id))

    def submit(self, call: Call) -> asyncio.Future[Outcome]:
        """Send a call, after the shared values that it refers to and that the worker lacks.

        Returns:
            A future of its (first) outcome. It raises `WorldOver` if the world ends before, and `UndeliverableError`
            if RPC cannot carry the call or its answer.
        """
        num_bytes = call.arguments.num_bytes
        if call.kind in _METHODS:
            self._traffic.num_sent_bytes += num_bytes
        else:
            self._traffic.num_snapshot_bytes += num_bytes
        lent = self._lent(call.arguments)
        message = call_message(call, self._covered)
        return self._ask(call, "submit", message, home=home_device(call.arguments), lent=lent, num_bytes=num_bytes)

    def run_batch(self, batch: Batch) -> asyncio.Future[Outcome]:
        """Send a batch. See `submit`."""
        common = batch.common  # sent once
        others = [call.arguments for _, call in batch.calls if call.arguments is not common]
        lent = list(self._lent(common, len(batch.calls) - len(others)))
        self._traffic.num_sent_bytes += common.num_bytes
        home = home_device(common)
        for arguments in others:
            lent += self._lent(arguments)
            self._traffic.num_sent_bytes += arguments.num_bytes
            home = home or home_device(arguments)
        return self._ask(batch, "batch", batch_message(batch, self._covered), home=home, lent=lent)

    def advance(self, request: Call | Batch, step: int, sent: Packed | None = None) -> asyncio.Future[Outcome]:
        """Ask an open stream for its item number ``step``, or a watched batch for the calls ended since then.

        Args:
            request: The call of the stream, or the batch.
            step: Number of the item, from 0.
            sent: Value that is sent into the stream's generator, if any.
        """
        if sent is None:
            return self._ask(request, "advance", request.call_id, step)
        self._traffic.num_sent_bytes += sent.num_bytes
        message = parcel_message(sent, self._covered)
        home = home_device(sent)
        return self._ask(request, "advance", request.call_id, step, message, home=home, num_bytes=sent.num_bytes)

    def cancel(self, call: Call) -> asyncio.Future[Outcome]:
        """Cancel a call. Returns a future of its outcome."""
        return self._ask(call, "cancel", call.call_id, is_cancel=True)

    def take_back(self, request: TakeBack) -> asyncio.Future[Outcome]:
        """Request calls back that have not begun. Returns a future of their ids."""
        return self._ask(request, "take_back", request.call_id, request.candidates, request.half)

    def cancel_batch(self, batch: Batch) -> None:
        """Cancel the calls of a batch that have not ended. Its answer has the results of the others."""
        self._put(("cancel_batch", batch.call_id))

    def rref(self, client_id: str) -> Any:
        """Return the RRef of a registered learner, which this worker owns. Blocks if the RRef has not arrived.

        Raises:
            WorkerLostError: If the worker does not answer within 2 s, or the connection to it breaks.
            ConfigError: If this process cannot have RRefs, see `hold`.
        """
        if self._learners[client_id] is None:
            if self._is_late_with_rrefs:  # else the event loop would wait 2 s for each learner of a frozen worker
                raise WorkerLostError(
                    f"{self.label} has not answered since an RRef of its learners was asked for in vain: await a "
                    f"call of {client_id}, and ask again"
                )
            self._flush()  # its registration goes first
            try:
                fork = self._send(endpoint.rref, None, client_id, timeout_s=_RREF_TIMEOUT_S).wait()
                self._learners[client_id] = hold(fork, self._worker)
            except (RuntimeError, SerializationError) as error:
                self._is_late_with_rrefs = True
                raise WorkerLostError(
                    f"{self.label} did not give the RRef of {client_id} within {_RREF_TIMEOUT_S:g} s, since it is "
                    f"lost, or busy with what was sent before: await a call of this client, and ask again ({error})"
                ) from error
        return self._learners[client_id]

    async def is_reached(self) -> bool:
        """Return whether the worker answers. Waits until it does, or until the connection breaks."""
        answered: asyncio.Future[bool] = self._loop.create_future()

        def settle(reached: bool) -> None:
            if not answered.done():
                answered.set_result(reached)

        if (sent := self._ping()) is None:
            return False
        sent.add_done_callback(lambda future: call_on(self._loop, settle, _is_value(future)))
        return await answered

    def unshare(self, value: SharedValue) -> None:
        """Let the worker drop a shared value after the calls that were sent before."""
        if value.number in self._placed:
            self._placed.discard(value.number)
            self._put_late(("unshare", value.number))

    def fail(self, request: Request, error: Exception) -> None:
        """Raise an error at the callers of a request."""
        for number, question in list(self._questions.items()):
            if question.request.call_id == request.call_id:
                del self._questions[number]
                if not question.future.done():
                    question.future.set_exception(error)

    def close(self) -> None:
        """Raise `WorldOver` at all callers, and ignore answers from now on."""
        self._is_open = False
        self.broken.set()
        if self._late is not None:
            self._late.cancel()
        questions = list(self._questions.values())
        for kept in (self._shares, self._placed, self._learners, self._questions, self._outgoing):
            kept.clear()
        for question in questions:
            if not question.future.done():
                question.future.set_exception(WorldOver())

    # Requests.

    def _ask(
        self,
        request: Request,
        verb: str,
        *arguments: Any,
        home: torch.device | None = None,
        lent: Sequence[TensorFiles | None] = (),
        num_bytes: int = 0,
        is_cancel: bool = False,
    ) -> asyncio.Future[Outcome]:
        future: asyncio.Future[Outcome] = self._loop.create_future()
        if not self._is_open:
            future.set_exception(WorldOver())
            return future
        number = next(self._numbers)
        self._questions[number] = _Question(request, future, home, lent, is_cancel)
        item = (verb, number, *arguments)
        if request.call_id in self._suspects:
            self._flush()
            self._request([item], alone=number)
        else:
            self._put(item, num_bytes)
        return future

    def _lent(self, arguments: Packed, num_calls: int = 1) -> Sequence[TensorFiles | None]:
        """Send the values that calls share with others, unless the worker has them.

        Args:
            arguments: The arguments of the calls.
            num_calls: Number of calls to this worker that have these.
        """
        if not isinstance(arguments, Parcel) or not arguments.apart:
            return ()
        return [self._share(value, num_calls) for value in shared_values(arguments)]

    def _share(self, value: SharedValue, num_calls: int) -> TensorFiles | None:
        """Send a value unless the worker has it. Returns the files that it opens, in use until the answer."""
        value.num_unsent = max(value.num_unsent - num_calls, 0)
        if value.number in self._placed:
            return None
        if (share := self._shares.get(value.number)) is not None:
            assert share.num_calls is not None
            share.num_calls += num_calls
            return None
        self._traffic.num_sent_bytes += value.num_bytes
        lent = value.lend() if self._sees_files else None
        share = _Share(value, lent, num_calls if value.is_for_tick else None)
        if value.is_for_tick:
            self._shares[value.number] = share
        else:
            self._placed.add(value.number)
        self._put(share, value.num_bytes if lent is None else 0)
        return lent[0] if lent is not None else None

    def _share_item(self, share: _Share) -> tuple[Any, ...]:
        value = share.value
        if share.num_calls is not None and value.num_unsent:  # calls that wait for their turn need it too
            share.num_calls = None
            self._placed.add(value.number)
        if share.lent is not None:
            return "share_files", value.number, file_message(value.parcel, share.lent[1]), share.num_calls
        return "share", value.number, parcel_message(value.parcel, self._covered), share.num_calls

    def _put(self, item: tuple[Any, ...] | _Share, num_bytes: int = 0) -> None:
        self._outgoing.append((num_bytes, item))
        if len(self._outgoing) >= _MAX_ITEMS and not self._shares:  # more calls of this tick may have these values
            self._flush()
        elif not self._will_flush:
            self._will_flush = True
            self._loop.call_soon(self._flush)

    def _put_late(self, item: tuple[Any, ...]) -> None:
        """Send an item with the next ones, or a little later."""
        self._outgoing.append((0, item))
        if self._late is None and not self._will_flush:
            self._late = self._loop.call_later(_LATE_S, self._flush)

    def _flush(self) -> None:
        """Send all items, in requests of at most 64. A large item begins a new request."""
        self._will_flush = False
        outgoing, self._outgoing = self._outgoing, []
        self._shares.clear()
        if self._late is not None:
            self._late.cancel()
            self._late = None
        items: list[tuple[Any, ...]] = []
        for num_bytes, item in outgoing:
            if items and (num_bytes > _LARGE_BYTES or len(items) >= _MAX_ITEMS):
                self._request(items)
                items = []
            items.append(self._share_item(item) if isinstance(item, _Share) else item)
            if num_bytes >= _SLOW_BYTES and self._request(items):
                self._watch_transfer(num_bytes)
                items = []
        if items:
            self._request(items)

    def _keep_open(self) -> None:
        """Send empty requests, if needed, so that the worker can answer. Items that wait will open one anyway."""
        if self._is_open and not self._will_flush:
            if self._num_open < min(len(self._questions), _MAX_OPEN):
                self._flush()
            while self._num_open < min(len(self._questions), _MAX_OPEN) and self._request([]):
                pass

    def _request(self, items: Sequence[tuple[Any, ...]], alone: int | None = None) -> bool:
        if not self._is_open:
            return False
        try:
            sent = self._send(endpoint.serve, alone, items)
        except RuntimeError as error:
            self._failed(alone, error)
            return False
        self._num_open += alone is None
        sent.add_done_callback(partial(self._answered, alone))
        return True

    def _watch_transfer(self, num_bytes: int) -> None:
        """Tell every 10 s that a large request is still on its way: a ping behind it has no answer."""

        began, is_there = self._loop.time(), False

        def tell() -> None:
            if self._is_open and not is_there:
                seconds = self._loop.time() - began
                logger.info("sending %.0f MB to %s for %.0f s", num_bytes / 1e6, self.label, seconds)
                self._loop.call_later(_SLOW_S, tell)

        def arrived(_: Any) -> None:
            nonlocal is_there
            is_there = True

        if (sent := self._ping()) is not None:
            sent.add_done_callback(arrived)
            self._loop.call_later(_SLOW_S, tell)

    def _ping(self) -> Any:
        """Send a request without items, which carries acknowledgements. Returns None if it cannot be sent."""
        try:
            return self._send(endpoint.acknowledge, None)
        except RuntimeError:
            return None

    def _send(self, entry: Any, alone: int | None, *args: Any, timeout_s: float = 0) -> Any:
        acknowledged, self._acknowledged = tuple(self._acknowledged), []
        self._num_kept_bytes = 0
        # 0 disables RPC's own timeout. The event loop keeps deadlines; only `rref` blocks it.
        header = (self._secret, self._next_request, self._num_heard, acknowledged, alone)
        sent = torch_rpc().rpc_async(self._worker, entry, args=(header, *args), timeout=timeout_s)
        self._next_request += 1  # only if it was sent: the worker waits for each number
        return sent

    # Answers.

    def _answered(self, alone: int | None, future: Any) -> None:
        """Read an answer; called on a thread of RPC."""
        if not self._is_open:
            return
        try:
            message = future.wait()
            if message is None:  # the worker is leaving this world
                return
            number, parts, registered = message
            self._in_order.check(number)
            read = [(question, self._read(question, part)) for question, part in parts]
            answers = [(question, answer) for question, answer in read if answer is not None]
            rrefs = [(client_id, self._held(fork)) for client_id, fork in registered] if registered else []
        except Exception as error:  # RPC raises errors of several types for a broken connection
            call_on(self._loop, self._failed, alone, error)
            return
        self._in_order.put(number, partial(call_on, self._loop, self._deliver, alone, answers, rrefs))

    def _read(self, number: int | None, part: Any) -> Any:
        """Return a report or an outcome; None if its memory files cannot be opened, for example after a loss."""
        if number is None:
            return read_report(part)
        question = self._questions.get(number)
        try:
            return read_outcome(part, question.home if question is not None else None, self._pid)
        except (OSError, SerializationError) as error:
            call_on(self._loop, self._missed, number, error)
            return None

    def _held(self, fork: object) -> Any:
        """Return the RRef of a learner; None if this process cannot have any, for which `rref` raises an error."""
        try:
            return hold(fork, self._worker)
        except ConfigError:
            return None

    def _deliver(
        self, alone: int | None, answers: list[tuple[int | None, Any]], rrefs: list[tuple[str, Any]]
    ) -> None:
        if not self._is_open:
            return
        for client_id, rref in rrefs:
            if client_id in self._learners:
                self._learners[client_id] = rref
        self._num_open -= alone is None
        self._num_heard += 1
        self._is_late_with_rrefs = False
        for number, answer in answers:
            if number is None:
                self._events.put_nowait(ProgressArrived(*answer))
            elif (question := self._questions.pop(number, None)) is not None:
                for files in question.lent:
                    if files is not None:
                        files.answered()
                self._settle(question, answer)
        # Callers that have an answer usually send something now; their requests go before an empty one.
        self._loop.call_soon(self._keep_open)

    def _settle(self, question: _Question, outcome: Outcome) -> None:
        request = question.request
        num_bytes = outcome.parcel.num_bytes if outcome.parcel is not None else 0
        if isinstance(request, Call) and request.kind not in _METHODS:
            self._traffic.num_snapshot_bytes += num_bytes
        else:
            self._traffic.num_received_bytes += num_bytes
        if question.future.done():  # cancelled: `cancel` requests the outcome, which the worker keeps until then
            return
        question.future.set_result(outcome)
        if outcome.kind != "item" or question.is_cancel:  # the worker can drop it
            self._acknowledged.append(request.call_id)
            self._num_kept_bytes += num_bytes
            if self._num_kept_bytes > _MAX_KEPT_BYTES and self._is_open:
                self._ping()

    def _missed(self, number: int, error: Exception) -> None:
        """Report an outcome whose files could not be opened, if a caller waits for it."""
        if self._is_open and (question := self._questions.get(number)) is not None:
            self._break([question], error)

    def _failed(self, alone: int | None, error: Exception) -> None:
        """Report a lost request or answer. It may have had any open question, unless it travelled alone."""
        if self._is_open:
            lost = self._questions.keys() if alone is None else {alone} & self._questions.keys()
            self._break([self._questions[number] for number in lost], error)

    def _break(self, lost: Iterable[_Question], error: Exception) -> None:
        self.failures.append(([question.request for question in lost], error))
        self.broken.set()


def _is_value(future: Any) -> bool:
    try:
        future.wait()
    except Exception:  # RPC raises errors of several types for a broken connection
        return False
    return True
