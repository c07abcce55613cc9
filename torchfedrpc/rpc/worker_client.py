"""The driver's stand-in for the host of one worker in one world: the same verbs, gathered into few rpc_asyncs."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from torchfedrpc.errors import ConfigError, SerializationError, WorkerLostError
from torchfedrpc.host.answer import call_on
from torchfedrpc.host.call import Call, Outcome
from torchfedrpc.host.mailbox import Reply
from torchfedrpc.host.runner import Report
from torchfedrpc.rpc import endpoint
from torchfedrpc.rpc.backend import torch_rpc
from torchfedrpc.rpc.in_order import InOrder
from torchfedrpc.rpc.message import (
    MappedDevices,
    call_message,
    file_message,
    home_device,
    parcel_message,
    read_outcome,
    read_report,
)
from torchfedrpc.rpc.rrefs import hold
from torchfedrpc.wire.file import Address, TensorFiles
from torchfedrpc.wire.packing import Packed
from torchfedrpc.wire.shared import SharedValue, shared_values

_METHODS = ("call", "stream", "collect")
_MAX_KEPT_BYTES = 8 << 20  # outcomes that a worker keeps until the next request to it acknowledges them
_MAX_ITEMS = 64  # in one request: the worker begins with the first as the next are packed
_LARGE_BYTES = 256 << 10  # an item so large begins a request of its own: those before it need not wait for it
_LATE_S = 0.02  # what is not urgent waits so long for other items to go along with
_RREF_TIMEOUT_S = 2.0  # the event loop waits: a worker answers this beside its training, within a millisecond
_MAX_OPEN = 2  # requests that wait for an answer, where no other need for them is


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


@dataclass
class _Share:
    value: SharedValue
    lent: tuple[TensorFiles, list[Address]] | None  # where the worker finds it, if it is not sent
    num_calls: int | None  # that have it in this tick; None where it is kept for others


@dataclass(frozen=True, slots=True)
class _Question:
    call: Call
    reply: Reply
    home: torch.device | None
    lent: Sequence[TensorFiles | None]  # kept, whatever becomes of the values, as long as it may be looked for


class RemoteHost:
    """The host of one worker, as the driver reaches it while a world lasts; of the driver's event loop alone.

    What is said in one tick of the loop goes in one request, in order. The worker answers a request once it has
    anything to tell, and tells all it has; so there is always one open while an answer is due.

    Args:
        label: the worker's name in messages, such as ``worker1``.
        name: its RPC name.
        secret: what requests to this worker begin with in this world.
        covered: the driver's devices that the world's device map takes to this worker.
        traffic: counts bytes.
        report: takes what running methods report.
        sees_files: whether the worker finds the files of this process.
        pid: the worker's process, where this one finds the files of that; None where it does not.
        suspects: ids of calls that RPC has failed once: they go alone, and so do their answers.
        on_error: takes this host, the calls that were asked for, and the exception, where a request or its answer
            got lost.
    """

    def __init__(
        self,
        label: str,
        name: str,
        secret: bytes,
        covered: MappedDevices,
        traffic: Traffic,
        *,
        report: Report,
        sees_files: bool,
        pid: int | None,
        suspects: Container[int],
        on_error: Callable[[RemoteHost, Sequence[Call], Exception], None],
    ) -> None:
        self.label = label
        self._loop = asyncio.get_running_loop()
        self._worker: Any = torch_rpc().get_worker_info(name)
        self._secret = secret
        self._covered = covered
        self._traffic = traffic
        self._report = report
        self._sees_files = sees_files
        self._pid = pid
        self._suspects = suspects
        self._on_error = on_error
        self._is_open = True
        self._is_late_with_rrefs = False  # and was not heard of since
        self._learners: dict[str, Any] = {}  # client id -> its learner's RRef; None until that has come
        self._outgoing: list[tuple[int, tuple[Any, ...] | _Share]] = []  # each with its size in bytes
        self._shares: dict[int, _Share] = {}  # of this tick, by the value's number
        self._placed: set[int] = set()  # numbers of the values that the worker keeps
        self._reductions: set[int] = set()  # numbers of those that the worker takes part in
        self._will_flush = False
        self._late: asyncio.TimerHandle | None = None  # when to send what is not urgent
        self._next_request = 0
        self._num_open = 0
        self._numbers = itertools.count()
        self._questions: dict[int, _Question] = {}
        self._in_order = InOrder()
        self._num_heard = 0
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
        self._put(("register", client_id, parcel_message(kwargs, self._covered), build))

    def forget(self, client_id: str) -> None:
        """A learner has moved elsewhere, and all of its calls here were answered."""
        self._learners.pop(client_id, None)
        self._put(("forget", client_id))

    def submit(self, call: Call, reply: Reply) -> None:
        """Send a call, behind the values that its arguments refer to and that the worker does not have yet."""
        lent = [self._share(value) for value in shared_values(call.arguments)]
        num_bytes = call.arguments.num_bytes
        if call.kind in _METHODS:
            self._traffic.num_sent_bytes += num_bytes
        else:
            self._traffic.num_snapshot_bytes += num_bytes
        self._ask(call, reply, "submit", call_message(call, self._covered), num_bytes=num_bytes, lent=lent)

    def advance(self, call: Call, step: int, reply: Reply) -> None:
        """Ask an open stream for its item number ``step``."""
        self._ask(call, reply, "advance", call.call_id, step)

    def cancel(self, call: Call, reply: Reply) -> None:
        """Tell the worker that nobody waits for this call any more; ``reply`` takes what became of it."""
        self._ask(call, reply, "cancel", call.call_id)

    def acknowledge(self, call: Call, outcome: Outcome) -> None:
        """The worker need not keep this outcome; it is told with the next request, or at once where it keeps much."""
        self._acknowledged.append(call.call_id)
        self._num_kept_bytes += outcome.parcel.num_bytes if outcome.parcel is not None else 0
        if self._num_kept_bytes > _MAX_KEPT_BYTES and self._is_open:
            self._ping()

    def rref(self, client_id: str) -> Any:
        """The RRef of a registered learner, which this worker owns. Waits for the worker where it has not come yet.

        Raises:
            WorkerLostError: The worker does not answer within 2 s, or the connection to it breaks.
            ConfigError: This process cannot have RRefs, as of `hold`.
        """
        if self._learners[client_id] is None:
            if self._is_late_with_rrefs:  # else the event loop would wait as long for each learner of a frozen worker
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
        """Whether the worker answers; ends when it does, or when the connection to it breaks."""
        answered: asyncio.Future[bool] = self._loop.create_future()

        def settle(reached: bool) -> None:
            if not answered.done():
                answered.set_result(reached)

        if (sent := self._ping()) is None:
            return False
        sent.add_done_callback(lambda future: call_on(self._loop, settle, _is_value(future)))
        return await answered

    def unshare(self, value: SharedValue) -> None:
        """No call that is to come refers to this value."""
        if value.number in self._placed:
            self._placed.discard(value.number)
            self._put_late(("unshare", value.number))

    def begin_reduction(self, number: int, prototype: Packed, num_places: int, going_on: tuple[int, ...]) -> None:
        """Let the worker take part in a reduction, unless it does; as of `Reductions.begin`."""
        if number not in self._reductions:
            self._reductions.add(number)
            self._put(("reduce", number, parcel_message(prototype, self._covered), num_places, going_on))

    def end_reduction(self, number: int) -> None:
        """A reduction is over."""
        if number in self._reductions:
            self._reductions.discard(number)
            self._put_late(("end_reduction", number))

    def close(self) -> None:
        """Answer nobody any more."""
        self._is_open = False
        if self._late is not None:
            self._late.cancel()
        self._shares.clear()
        self._placed.clear()
        self._reductions.clear()
        self._learners.clear()
        self._questions.clear()
        self._outgoing.clear()

    # Asking.

    def _ask(
        self,
        call: Call,
        reply: Reply,
        verb: str,
        *arguments: Any,
        num_bytes: int = 0,
        lent: Sequence[TensorFiles | None] = (),
    ) -> None:
        number = next(self._numbers)
        self._questions[number] = _Question(call, reply, home_device(call.arguments), lent)
        item = (verb, number, *arguments)
        if call.call_id in self._suspects:
            self._flush()
            self._request([item], alone=number)
        else:
            self._put(item, num_bytes)

    def _share(self, value: SharedValue) -> TensorFiles | None:
        """See that the worker will have a value; in which files it may look for it, to be kept until it has."""
        if value.number in self._placed:
            return None
        if (share := self._shares.get(value.number)) is not None:
            assert share.num_calls is not None
            share.num_calls += 1
            return share.lent[0] if share.lent is not None else None
        self._traffic.num_sent_bytes += value.num_bytes
        lent = value.lend() if self._sees_files else None
        share = _Share(value, lent, 1 if value.is_for_tick else None)
        if value.is_for_tick:
            self._shares[value.number] = share
        else:
            self._placed.add(value.number)
        self._put(share, value.num_bytes if lent is None else 0)
        return lent[0] if lent is not None else None

    def _share_item(self, share: _Share) -> tuple[Any, ...]:
        value = share.value
        if share.lent is not None:
            return "share_files", value.number, file_message(value.parcel, share.lent[1]), share.num_calls
        return "share", value.number, parcel_message(value.parcel, self._covered), share.num_calls

    def _put(self, item: tuple[Any, ...] | _Share, num_bytes: int = 0) -> None:
        self._outgoing.append((num_bytes, item))
        if len(self._outgoing) >= _MAX_ITEMS and not self._shares:  # of which the tick may have more calls
            self._flush()
        elif not self._will_flush:
            self._will_flush = True
            self._loop.call_soon(self._flush_tick)

    def _put_late(self, item: tuple[Any, ...]) -> None:
        """Send an item with the next ones, or a little later."""
        self._outgoing.append((0, item))
        if self._late is None and not self._will_flush:
            self._late = self._loop.call_later(_LATE_S, self._flush)

    def _flush_tick(self) -> None:
        self._will_flush = False
        self._flush()

    def _flush(self) -> None:
        """Send what there is, in requests of some items each; what follows a large item need not wait for it."""
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
        if items:
            self._request(items)

    def _keep_open(self) -> None:
        """See that the worker can answer; what is about to be said anyway opens a request by itself."""
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

    def _ping(self) -> Any:
        """Send a request without content, which carries what is acknowledged; None where it cannot be sent."""
        try:
            return self._send(endpoint.acknowledge, None)
        except RuntimeError:
            return None

    def _send(self, entry: Any, alone: int | None, *args: Any, timeout_s: float = 0) -> Any:
        acknowledged, self._acknowledged = tuple(self._acknowledged), []
        self._num_kept_bytes = 0
        # 0 means no timeout of RPC's own: deadlines are kept by the event loop, which only `rref` blocks.
        header = (self._secret, self._next_request, self._num_heard, acknowledged, alone)
        sent = torch_rpc().rpc_async(self._worker, entry, args=(header, *args), timeout=timeout_s)
        self._next_request += 1  # not for what could not be sent: the worker would wait for it
        return sent

    # Answers.

    def _answered(self, alone: int | None, future: Any) -> None:
        """On a thread of RPC."""
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
            rrefs = [(client_id, self._held(fork)) for client_id, fork in registered]
        except Exception as error:  # whatever RPC makes of a connection that broke
            call_on(self._loop, self._failed, alone, error)
            return
        self._in_order.put(number, partial(call_on, self._loop, self._deliver, alone, answers, rrefs))

    def _read(self, number: int | None, part: Any) -> Any:
        """A report or an outcome; None where that is not in its worker's memory, as where the worker is gone."""
        if number is None:
            return read_report(part)
        question = self._questions.get(number)
        try:
            return read_outcome(part, question.home if question is not None else None, self._pid)
        except (OSError, SerializationError) as error:
            call_on(self._loop, self._missed, number, error)
            return None

    def _held(self, fork: object) -> Any:
        """A learner's RRef; None where this process cannot have any, which `rref` tells the user who asks for it."""
        try:
            return hold(fork, self._worker)
        except ConfigError:
            return None

    def _deliver(
        self, alone: int | None, answers: list[tuple[int | None, Any]], rrefs: list[tuple[str, Any]]
    ) -> None:
        if not self._is_open:
            return
        self._learners.update((client_id, rref) for client_id, rref in rrefs if client_id in self._learners)
        self._num_open -= alone is None
        self._num_heard += 1
        self._is_late_with_rrefs = False
        for number, answer in answers:
            if number is None:
                self._report(*answer)
            elif (question := self._questions.pop(number, None)) is not None:
                self._count(question.call, answer)
                question.reply(answer)
        # Those who were answered have something to ask now, more often than not: let them ask first.
        self._loop.call_soon(self._keep_open)

    def _count(self, call: Call, outcome: Outcome) -> None:
        if outcome.parcel is None:
            return
        if call.kind in _METHODS:
            self._traffic.num_received_bytes += outcome.parcel.num_bytes
        else:
            self._traffic.num_snapshot_bytes += outcome.parcel.num_bytes

    def _missed(self, number: int, error: Exception) -> None:
        """An outcome could not be found; that matters where somebody still waits for it."""
        if self._is_open and (question := self._questions.get(number)) is not None:
            self._on_error(self, [question.call], error)

    def _failed(self, alone: int | None, error: Exception) -> None:
        """A request got lost, or its answer: it may be that of any call that is asked for, unless it went alone."""
        if self._is_open:
            lost = self._questions if alone is None else {alone} & self._questions.keys()
            self._on_error(self, [self._questions[number].call for number in lost], error)


def _is_value(future: Any) -> bool:
    try:
        future.wait()
    except Exception:  # whatever RPC makes of a connection that broke
        return False
    return True
