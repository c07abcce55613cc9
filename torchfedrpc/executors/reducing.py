"""Reductions over workers: a call whose result lies at its worker is not over before that was collected."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import CallTimeoutError, WorkerLostError
from torchfedrpc.executors.asking import AskingExecutor
from torchfedrpc.executors.journal import Asked, Record
from torchfedrpc.executors.reduction import Collecting, Reduction
from torchfedrpc.host.call import Call, Outcome, Part
from torchfedrpc.reduce.tree import MergeError, Node
from torchfedrpc.rpc.member import Member
from torchfedrpc.rpc.worker_client import RemoteHost
from torchfedrpc.wire.packing import pack


class ReducingExecutor(AskingExecutor):
    """Has results added up where they are. What a lost worker had of them is made again elsewhere.

    A result at a worker is collected once all calls of its reduction there have ended. It is collected at once where
    somebody cannot wait for that: a snapshot of its learner, which would have the call and not the result; the next
    worker of its learner; or the memory of the driver, which keeps the call's arguments.

    Args:
        config: the run's configuration.
    """

    def __init__(self, config: RuntimeConfig | None = None) -> None:
        super().__init__(config)
        self._reductions: dict[int, RemoteCollecting] = {}
        self._postponed: set[Record] = set()  # whose snapshot waits until their results are collected
        self._told: list[RemoteHost] = []  # of this world: who knows which reductions are over
        self._has_reduced = False

    def reduction(self, reduction: Reduction) -> Collecting:
        """Take part in a reduction."""
        self._has_reduced = True
        self._reductions[reduction.number] = collecting = RemoteCollecting(self, reduction)
        return collecting

    def reached(self, label: str) -> tuple[RemoteHost | None, Member | None]:
        """A worker in the present world, and the worker itself; None where it is not there."""
        group = self._group
        return (group.hosts.get(label), group.members.get(label)) if group is not None else (None, None)

    def request(self, label: str, reduction: Reduction, skipped: Sequence[str] = (), *, waits: bool = False) -> Call:
        """What asks a worker for its partial results.

        Args:
            label: the worker.
            reduction: the reduction.
            skipped: clients that count for nothing.
            waits: whether it waits there for the calls that were submitted before.
        """
        places = [reduction.part(one).place for one in skipped if self.worker_of(one) == label]
        arguments, part = pack((reduction.number, places)), Part(reduction.number, 0) if waits else None
        return Call(self._own_call_id(), label, "reduce", arguments, kind="collect", part=part)

    def settle_absorbed(self, record: Record, asked: Asked) -> None:
        """What a call was absorbed by is here, or nobody wants it any more: the call is over."""
        if record.asked.get(asked.call.call_id) is not asked:
            return
        self._ledger.settle(record, asked, Outcome("value"))
        if record in self._postponed and not self._hurry(record):
            self._postponed.discard(record)
            if record.awaits_snapshot:  # the learner was not lost meanwhile
                super()._request_snapshot(record)
        self._settled(record)

    def collects(self, label: str) -> list[int]:
        """Ids of the requests to a worker for partial results that were not answered."""
        return [call_id for collecting in self._reductions.values() for call_id in collecting.unanswered(label)]

    def end_reduction(self, reduction: Reduction) -> None:
        """A reduction is over."""
        collecting = self._reductions.pop(reduction.number, None)
        if collecting is None:
            return
        for host in self._hosts():
            member = self._opened().members[host.label]
            if member in collecting.members:
                collecting.begin(host, member)  # it may not have been told in this world
                host.end_reduction(reduction.number)

    def _hosts(self) -> list[RemoteHost]:
        return list(self._group.hosts.values()) if self._group is not None else []

    def _collecting(self, call: Call) -> RemoteCollecting | None:
        return self._reductions.get(call.part.reduction) if call.part is not None else None

    def _ask(self, host: RemoteHost, record: Record, asked: Asked) -> None:
        collecting = self._collecting(asked.call)
        if collecting is not None and not asked.is_cancelled:
            member = self._opened().members[record.label]
            collecting.is_asked(record.label, asked.call)
            collecting.begin(host, member)
            if collecting.has(asked.call, member):  # since an earlier world
                asked.asked_through = host
                return
            if collecting.has_collected(asked.call):  # of a worker that was lost before it could answer
                asked.call = replace(asked.call, part=None)
        super()._ask(host, record, asked)

    def _cancel(self, call: Call) -> None:
        collecting = self._collecting(call)
        if collecting is None or not collecting.has(call):  # else it counts
            super()._cancel(call)

    def _arrived(self, host: RemoteHost, record: Record, asked: Asked, outcome: Outcome) -> None:
        is_current = self._host(record) is host and record.asked.get(asked.call.call_id) is asked
        if not (is_current and self._is_absorbed(host, record, asked, outcome)):
            super()._arrived(host, record, asked, outcome)

    def _is_absorbed(self, host: RemoteHost, record: Record, asked: Asked, outcome: Outcome) -> bool:
        collecting = self._collecting(asked.call)
        if collecting is None or asked.is_cancelled or outcome.kind != "value":
            return False
        if collecting.has_collected(asked.call):  # which has overtaken this answer
            return False
        record.is_registered = True
        host.acknowledge(asked.call, outcome)  # this process is not asked for it again
        collecting.absorbed(record, asked, self._opened().members[record.label], outcome)
        return True

    def _request_snapshot(self, record: Record) -> None:
        if self._hurry(record):
            record.awaits_snapshot = True
            self._postponed.add(record)
        else:
            super()._request_snapshot(record)

    def _hurry(self, record: Record) -> bool:
        """Have the results of a learner collected now; whether any lie at its worker."""
        hurrying = [one.hurry(record) for one in list(self._reductions.values())]
        return any(hurrying)

    def _uncollectable(self, request: Call, error: Exception) -> None:
        """RPC cannot carry a worker's partial results."""
        for collecting in self._reductions.values():
            collecting.fail(request, error)

    def _collect_again(self) -> None:
        """Workers have come or gone."""
        told, self._told = self._told, self._hosts()
        for host in self._told:
            if self._has_reduced and host not in told:
                # That a reduction is over got lost, perhaps, with an earlier world: they are told which are not.
                host.begin_reduction(0, pack(None), 0, tuple(self._reductions))
                host.end_reduction(0)
        for collecting in list(self._reductions.values()):
            collecting.go_on()


@dataclass(eq=False)
class _Absorbed:
    """A call whose result lies at its worker; or did, where another worker has it to run again by now."""

    record: Record
    asked: Asked
    member: Member
    is_urgent: bool = False


@dataclass(eq=False)
class _Collect:
    """A request for partial results, to a worker in a world."""

    call: Call
    member: Member
    host: RemoteHost
    places: frozenset[int] = frozenset()  # that are to be among them
    timer: asyncio.TimerHandle | None = None


class RemoteCollecting(Collecting):
    """The share of a reduction that the workers have.

    Args:
        executor: whose calls take part.
        reduction: the reduction.

    Attributes:
        members: the workers that take part.
        asked: label of a worker -> the request to it for its partial results.
        coming: the same for what was asked in advance, and is answered once the worker's calls have ended.
    """

    def __init__(self, executor: ReducingExecutor, reduction: Reduction) -> None:
        self.members: set[Member] = set()
        self.asked: dict[str, _Collect] = {}
        self.coming: dict[str, _Collect] = {}
        self._at: defaultdict[str, set[int]] = defaultdict(set)  # label -> places whose calls it was asked for
        self._num_at: Counter[str | None] | None = None  # label -> how many there will be
        self._will_ask = False
        self._asked_in_advance: set[str] = set()
        self._is_over = False
        self._executor = executor
        self._reduction = reduction
        self._absorbed: dict[int, _Absorbed] = {}  # by place
        self._num_bytes = 0  # of these calls' arguments
        self._skipped: Sequence[str] | None = None  # once every call has ended: the clients that failed
        self._nodes: list[Node] = []
        self._collected_places: set[int] = set()  # that are counted in these
        self._lost: dict[str, Exception] = {}
        self._num_losses = 0  # of workers that were asked, in succession
        self._error: Exception | None = None
        self._changed = asyncio.Event()  # something came, or went wrong

    def is_asked(self, label: str, call: Call) -> None:
        """A worker is about to be asked for a call: behind the last of these for the partial results, too."""
        assert call.part is not None
        self._at[label].add(call.part.place)
        if not self._will_ask:
            self._will_ask = True
            asyncio.get_running_loop().call_soon(self._ask_in_advance)

    def unanswered(self, label: str) -> list[int]:
        """The ids of the requests to a worker for its partial results."""
        return [one.call.call_id for one in (self.asked.get(label), self.coming.get(label)) if one is not None]

    def begin(self, host: RemoteHost, member: Member) -> None:
        """Let a worker take part."""
        self.members.add(member)
        reduction = self._reduction
        host.begin_reduction(
            reduction.number, reduction.prototype, len(reduction.places), tuple(self._executor._reductions)
        )

    def has(self, call: Call, member: Member | None = None) -> bool:
        """Whether the result of a call lies at a worker, or did; at that one, where one is named."""
        one = self._absorbed.get(call.part.place) if call.part is not None else None
        return one is not None and one.asked.call.call_id == call.call_id and member in (None, one.member)

    def has_collected(self, call: Call) -> bool:
        """Whether the result of a call is here, whether it was answered or not."""
        return call.part is not None and call.part.place in self._collected_places

    def absorbed(self, record: Record, asked: Asked, member: Member, outcome: Outcome) -> None:
        """A worker has added a call's result to what it has."""
        assert asked.call.part is not None
        place = asked.call.part.place
        is_again = place in self._absorbed
        is_urgent = record.awaits_snapshot or record.moving_to is not None
        self._absorbed[place] = _Absorbed(record, asked, member, is_urgent)
        if not is_again:
            self._num_bytes += asked.call.arguments.num_bytes
            reply, asked.reply = asked.reply, partial(self._again, place)
            if reply is not None:
                reply(outcome)
        if is_full := self._num_bytes > self._executor.config.journal_max_bytes:
            for one in self._absorbed.values():
                one.is_urgent = True
        if is_urgent or is_full or self._skipped is not None:
            self.go_on()

    def hurry(self, record: Record) -> bool:
        """Collect the result of a learner's call now; whether one lies at its worker."""
        of_record = [one for one in self._absorbed.values() if one.record is record]
        for one in of_record:
            one.is_urgent = True
        if of_record:
            self.go_on()
        return bool(of_record)

    async def collect(self, skipped: Sequence[int]) -> tuple[list[Node], dict[str, Exception]]:
        """The partial results of all workers; what a worker was lost with is waited for once more."""
        self._skipped = [self._reduction.client_ids[place] for place in skipped]
        self.go_on()
        while self._absorbed and self._error is None:
            self._changed.clear()
            await self._changed.wait()
        if self._error is not None:
            raise self._error
        return self._nodes, self._lost

    def awaited(self) -> list[str]:
        """The workers that have something to be collected, or to be run again."""
        return sorted({one.record.label for one in self._absorbed.values()})

    def close(self) -> None:
        """Let the calls be over, and the workers forget."""
        self._is_over = True
        for among in (self.asked, self.coming):
            for label in list(among):
                self._forget(label, among)
        for place, one in list(self._absorbed.items()):
            if self._executor.reached(one.record.label)[1] is one.member:
                self._settle(place)
            else:
                one.asked.reply = None  # it is run again, and over when it is answered
        self._absorbed.clear()
        self._executor.end_reduction(self._reduction)

    def fail(self, request: Call, error: Exception) -> None:
        """The partial results that were asked for with this request will not come."""
        for label, collect in [*self.asked.items(), *self.coming.items()]:
            if collect.call is request:
                self._fail(WorkerLostError(f"torch RPC cannot carry the partial results of {label}: {error}"))

    def go_on(self) -> None:
        """Ask the workers for what is due."""
        if self._error is not None:
            return
        of_label: defaultdict[str, list[_Absorbed]] = defaultdict(list)
        for one in self._absorbed.values():
            of_label[one.record.label].append(one)
        for label, earlier in list(self.asked.items()):
            if self._executor.reached(label)[1] is not earlier.member:
                self._forget(label, self.asked)
                if any(one.member is earlier.member for one in self._absorbed.values()):  # and not given up
                    self._count_loss(label)
        for label, earlier in list(self.coming.items()):
            host, member = self._executor.reached(label)
            if member is not earlier.member:
                self._forget(label, self.coming)
            elif host is not None and host is not earlier.host:  # asked in an earlier world
                self._ask(label, _Collect(earlier.call, member, host), self.coming)
        for label, here in of_label.items():
            host, member = self._executor.reached(label)
            if host is None or member is None:
                continue
            if (collect := self.asked.get(label)) is not None:
                if collect.host is not host:  # asked in an earlier world
                    self._ask(label, _Collect(collect.call, member, host, collect.places), self.asked)
                continue
            present = [one for one in here if one.member is member]
            is_due = self._skipped is not None and len(present) == len(here)
            if is_due and not self._skipped and label in self.coming:
                self._time(label, self.coming[label])  # no call is left for which it waits
            elif is_due or any(one.is_urgent for one in present):
                request = self._executor.request(label, self._reduction, self._skipped or ())
                places = frozenset(one.asked.call.part.place for one in present if one.asked.call.part is not None)
                self._ask(label, _Collect(request, member, host, places), self.asked)

    def _ask_in_advance(self) -> None:
        """Ask those workers that were asked for all calls of their learners; once, since their results are large."""
        self._will_ask = False
        if self._is_over or self._skipped is not None:
            return
        if self._num_at is None:  # where a learner moves meanwhile, its workers are asked when it is due
            self._num_at = Counter(map(self._executor.label_of, self._reduction.client_ids))
        for label, places in self._at.items():
            host, member = self._executor.reached(label)
            if len(places) >= self._num_at[label] and label not in self._asked_in_advance and host and member:
                self._asked_in_advance.add(label)
                request = self._executor.request(label, self._reduction, waits=True)
                self._ask(label, _Collect(request, member, host), self.coming)

    def _ask(self, label: str, collect: _Collect, among: dict[str, _Collect]) -> None:
        self._forget(label, among)
        self.begin(collect.host, collect.member)  # of which it may not have heard in this world
        among[label] = collect
        if among is self.asked:
            self._time(label, collect)
        collect.host.submit(collect.call, partial(self._collected, label, collect))

    def _time(self, label: str, collect: _Collect) -> None:
        timeout_s = self._executor.config.call_timeout_s
        if timeout_s is not None and collect.timer is None:
            collect.timer = asyncio.get_running_loop().call_later(timeout_s, self._late, label, timeout_s)

    def _forget(self, label: str, among: dict[str, _Collect]) -> None:
        """A request is answered, or asked anew, or will not be answered."""
        collect = among.pop(label, None)
        if collect is not None and collect.timer is not None:
            collect.timer.cancel()

    def _late(self, label: str, timeout_s: float) -> None:
        self._fail(
            CallTimeoutError(
                f"{label} did not give its partial results within {timeout_s} s: see what the reducer does, or raise "
                f"runtime.call_timeout_s"
            )
        )

    def _collected(self, label: str, collect: _Collect, outcome: Outcome) -> None:
        collect.host.acknowledge(collect.call, outcome)
        among = next((those for those in (self.asked, self.coming) if those.get(label) is collect), None)
        if among is None:
            return
        self._forget(label, among)
        try:
            nodes: list[Node] = outcome.result(collect.call, self._executor.allow, label)
        except Exception as error:
            self._fail(error)
            return
        counted = {place for _, _, _, places in nodes for place in places}
        missing = (collect.places & self._absorbed.keys()) - counted
        if missing and label not in self.coming:  # by which they may come
            clients = ", ".join(self._reduction.client_ids[place] for place in sorted(missing))
            self._fail(RuntimeError(f"{label} does not have the results of {clients} any more"))
            return
        self._num_losses = 0
        self._nodes += nodes
        self._collected_places |= counted
        for place in counted:
            self._settle(place)
        self.go_on()
        self._changed.set()

    def _count_loss(self, label: str) -> None:
        """A worker was lost while it was asked: its results themselves may be what ends it."""
        self._num_losses += 1
        limit = self._executor.config.max_recoveries
        if self._num_losses > limit:
            self._fail(
                WorkerLostError(
                    f"{label} was lost while its partial results were collected (times in succession: "
                    f"{self._num_losses}), so the reduction was given up: see the worker's output for why it ends; "
                    f"runtime.max_recoveries={limit} is how often they are made again"
                )
            )

    def _again(self, place: int, outcome: Outcome) -> None:
        """A call whose result was lost with its worker has failed, or was given up."""
        one = self._absorbed.pop(place, None)
        if one is None:
            return
        try:
            outcome.result(one.asked.call, self._executor.allow, one.record.label)
        except MergeError as error:
            self._fail(error)
        except Exception as error:
            self._lost[one.record.client_id] = error
        asyncio.get_running_loop().call_soon(self.go_on)  # once all are told that were lost with it
        self._changed.set()

    def _settle(self, place: int) -> None:
        if (one := self._absorbed.pop(place, None)) is not None:
            self._num_bytes -= one.asked.call.arguments.num_bytes
            self._executor.settle_absorbed(one.record, one.asked)

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        self._changed.set()
