"""What pseudo and distributed mode have in common: learners on workers, and where they go as those come and go."""

from __future__ import annotations

import asyncio
import itertools
import logging
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError, WorkerLostError
from torchfedrpc.events import WorkerJoined, WorkerLeft, WorkerLost, WorldFormed
from torchfedrpc.executors.base import ExecutorSpec
from torchfedrpc.executors.journal import Record
from torchfedrpc.executors.moving import MovingExecutor
from torchfedrpc.executors.placement import (
    LOCAL,
    addresses,
    even_out,
    place_again,
    place_clients,
)
from torchfedrpc.host.call import Call, Outcome
from torchfedrpc.host.faults import Fault
from torchfedrpc.rpc.backend import torch_rpc
from torchfedrpc.rpc.handshake import load_token
from torchfedrpc.rpc.heartbeat import Loss
from torchfedrpc.rpc.member import Member
from torchfedrpc.rpc.sources import DialledSource, JoinedSource, Source
from torchfedrpc.rpc.worker_client import RemoteHost
from torchfedrpc.rpc.worker_group import WorkerGroup

logger = logging.getLogger(__name__)

_REPLACED_WITHIN_S = 120.0  # by a process that the run starts itself
_FIRST_TIMEOUT_S = 120.0  # until a worker joins a run that has no others


class RemoteExecutor(MovingExecutor):
    """Places clients on workers, in a world of torch RPC, and places them again as workers come and go.

    Args:
        config: the run's configuration.
    """

    def __init__(self, config: RuntimeConfig | None = None) -> None:
        super().__init__(config)
        self._sources: list[Source] = []
        self._joined: JoinedSource | None = None
        self._is_open = False
        self._source_of: dict[str, Source] = {}  # label of each worker there ever was -> where it came from
        self._in_world: set[str] = set()  # workers that could be called last
        self._places: dict[str, str] = {}  # client id -> label of its worker
        self._machines: dict[str, str] = {}  # label of each worker -> its machine
        self._leaving: set[str] = set()  # workers that get no more calls
        self._waited_for: dict[str, asyncio.TimerHandle] = {}  # label of a worker that may come again -> until when
        self._why_waited_for: dict[str, str] = {}  # its label -> how the last of its name was lost
        self._missed: dict[str, str] = {}  # label of one that has not come in time -> what callers are told
        self._num_lost = 0
        self._gone: dict[str, str] = {}  # label of a worker that was lost for good -> what its clients are told
        self._stats_at_close: dict[str, Any] = {}
        self._failure: ConfigError | WorkerLostError | None = None  # why no worker can be called any more
        self._last_loss = ""  # how the last worker was lost
        self._news = asyncio.Event()  # a world was formed, or none can be

    async def open(self, spec: ExecutorSpec) -> None:
        """Gather the workers, form a world with them and place the clients."""
        await super().open(spec)
        torch_rpc()  # refuse before any process is started
        self._sources = self._make_sources(spec)
        members = await self._gather()
        if members:
            self._place_all(self._machines)
        self._group = WorkerGroup(members, spec.learner, self, self._reported)
        await self._group.open()
        self._is_open = True
        self._in_world = set(self._group.members)
        for source in self._sources:
            source.start(partial(self._admit, source))
        if not members:
            await self._first_to_join()
            self._place_all(self._present())
        self._group.hear_leavers()

    async def close(self) -> None:
        """End the world, and let the workers go."""
        if not self._is_open:
            for source in self._sources:
                source.abandon()
        self._is_open = False
        self._stats_at_close = {**self.stats(), "journal_bytes": 0, "workers": {}}
        for timer in self._waited_for.values():
            timer.cancel()
        try:
            await super().close()
        finally:
            await asyncio.gather(*(source.close(self.ends_early) for source in self._sources))

    def worker_of(self, client_id: str) -> str:
        """``worker1`` and so on, or the address of one that listens; of a learner that moves, the one it leaves."""
        label = self.label_of(client_id)
        if label is None:
            raise KeyError(client_id)
        return label

    def label_of(self, client_id: str) -> str | None:
        """The same; None of a client that others have."""
        record = self._ledger.get(client_id)
        return record.label if record is not None else self._places.get(client_id)

    def rref(self, client_id: str) -> Any:
        """The learner's RRef; a learner that is not on its worker yet is registered there, or rebuilt, for that."""
        record = self._record(client_id)
        reason = record.given_up or self._unreachable(record)
        if reason is None:
            self._push(record)
            if (host := self._host(record)) is not None and client_id in host:
                return host.rref(client_id)
            reason = record.given_up or (
                "its learner has no RRef while the world is formed anew, its worker leaves, or others are rebuilt "
                "before it; await a call of this client, and ask again"
            )
        raise WorkerLostError(f"{client_id} on {self.worker_of(client_id)}: {reason}")

    def workers(self) -> list[str]:
        """``worker1`` and so on, and the addresses of those that listen."""
        return list(self._machines)

    @property
    def join_address(self) -> str | None:
        """Where workers can join, as ``HOST:PORT``."""
        return self._joined.address if self._joined is not None else None

    async def arm(self, faults: Mapping[str, Sequence[Fault]]) -> None:
        """Let faults strike workers at calls to come."""
        await asyncio.gather(*(self._opened().arm(label, of_label) for label, of_label in faults.items()))

    def stats(self) -> dict[str, Any]:
        """Bytes sent and received, and for each worker how many learners it has; how many workers were lost."""
        if (group := self._group) is None:
            return self._stats_at_close
        traffic, members = list(group.traffic.values()), group.members.values()
        return {
            "bytes_sent": sum(one.num_sent_bytes for one in traffic),
            "bytes_received": sum(one.num_received_bytes for one in traffic),
            "snapshot_bytes": sum(one.num_snapshot_bytes for one in traffic),
            "journal_bytes": self._ledger.num_journal_bytes,
            "workers_lost": self._num_lost,
            "workers": {member.label: {"learners": len(member.learners)} for member in members},
        }

    async def _gather(self) -> list[Member]:
        """The workers of all sources, by rank."""
        gathering = [asyncio.ensure_future(source.gather()) for source in self._sources]
        try:
            gathered = await asyncio.gather(*gathering)
        finally:
            for task in gathering:
                task.cancel()
            await asyncio.gather(*gathering, return_exceptions=True)
        for source, members in zip(self._sources, gathered, strict=True):
            for member in members:
                self._name(source, member)
        return [member for members in gathered for member in members]

    def _place_all(self, machines: Mapping[str, str]) -> None:
        self._places = place_clients(list(self._spec.clients), self.config.client_endpoints, machines)

    async def _first_to_join(self) -> None:
        """Wait until a run that has no other workers can call one that has joined.

        Raises:
            ConfigError: none that can serve joined within 120 s, or a setting of this process is wrong for any.
            WorkerLostError: no world could be formed with those who did.
        """
        assert self._joined is not None
        print(f"waiting for a worker: {self._joined.command}", file=sys.stderr, flush=True)
        while not self._in_world and self._failure is None:
            self._news.clear()
            try:
                async with asyncio.timeout(_FIRST_TIMEOUT_S):
                    await self._news.wait()
            except TimeoutError:
                if self._opened().is_taking_in:  # for no longer than that takes at most
                    continue
                why = f" ({self._last_loss})" if self._last_loss else ""
                raise ConfigError(
                    f"no worker that can serve has joined within {_FIRST_TIMEOUT_S:.0f} s{why}: start one by "
                    f"{self._joined.command}"
                ) from None
        if self._failure is not None:
            raise self._failure

    def _make_sources(self, spec: ExecutorSpec) -> list[Source]:
        """Where workers come from; a mode may have others besides."""
        sources: list[Source] = []
        listening = addresses(self.config.client_endpoints)
        if listening or self.config.join_at is not None:
            token = load_token(self.config.token_file)
            if listening:
                sources.append(DialledSource(listening, token))
            if self.config.join_at is not None:
                self._joined = JoinedSource(self.config.join_at, token)
                sources.append(self._joined)
        return sources

    def _new_record(self, client_id: str) -> Record:
        constructor = self._spec.constructor_arguments(client_id)
        record = Record(client_id, self._places[client_id], constructor)
        record.given_up = self._gone.get(record.label) or (str(self._failure) if self._failure is not None else None)
        return record

    def _host(self, record: Record) -> RemoteHost | None:
        return None if record.label in self._leaving and record.moving_to is None else super()._host(record)

    def _unreachable(self, record: Record) -> str | None:
        return self._missed.get(record.label)

    # Workers come and go.

    def _name(self, source: Source, member: Member) -> None:
        if not member.label:
            numbers = (f"worker{number}" for number in itertools.count(1))
            member.label = next(label for label in numbers if label not in self._source_of)
        self._source_of[member.label] = source
        self._machines[member.label] = member.machine

    def _admit(self, source: Source, member: Member) -> None:
        if self._is_open:
            self._name(source, member)
            self._opened().admit(member)

    @property
    def expects_workers(self) -> bool:
        """Whether others may come where none is left."""
        return any(source.expects_workers for source in self._sources)

    def worker_leaving(self, member: Member) -> None:
        """A worker asks to be released: its learners move to others, or wait until it comes again."""
        logger.info("%s leaves: its learners are moved", member.label)
        self._leaving.add(member.label)
        clients = self._clients_of(member.label)
        targets = place_again(clients, self.config.client_endpoints, self._present(), self._places)
        for client_id in clients:
            self._relocate(client_id, targets.get(client_id, member.label))
        self._release_if_idle(member.label)

    def worker_lost(self, member: Member, loss: Loss) -> None:
        """A worker is gone: whose calls it ran, and where its learners go."""
        self._num_lost += 1
        self._in_world.discard(member.label)
        self._leaving.discard(member.label)
        self._spec.publish(WorkerLost(member.label, loss.reason))
        records = [record for record in self._ledger if record.label == member.label]
        running = loss.running if loss.running is not None else _first_sent(records)
        where = self._last_loss = f"{member.label} was lost ({loss.reason})"
        if self.config.on_worker_lost == "fail":
            self._gone[member.label] = f"{where}, and its learner with it; runtime.on_worker_lost=recover rebuilds it"
        for record in records:
            self._suffer(record, member, where, frozenset(running))
        for record in records:
            record.label = self._places[record.client_id]  # another, if it was moving there
        self._collect_again()
        if self.config.on_worker_lost == "recover":
            self._do_without(member, where)
            return
        for client_id in self._clients_of(member.label):
            moving = self._ledger.get(client_id)
            if moving is not None and moving.label != member.label:  # it stays where it is
                self._relocate(client_id, moving.label)

    def _do_without(self, member: Member, where: str) -> None:
        """A worker is gone, and its learners with it: their clients wait for the next of its name, or have others."""
        source, label = self._source_of[member.label], member.label
        keeps_place = source.lost(member)
        clients = self._clients_of(label)
        if not keeps_place:
            del self._machines[label]
            targets = place_again(clients, self.config.client_endpoints, self._present(), self._places)
            for client_id, place in targets.items():
                record = self._ledger.get(client_id)
                if record is not None and record.label == label:  # its learner is gone as well
                    self._places[client_id] = record.label = place
                else:
                    self._relocate(client_id, place)
            clients = [client_id for client_id in clients if client_id not in targets]
            if not self.expects_workers and self._present():
                for client_id in clients:
                    endpoint = self.config.client_endpoints[client_id]
                    self._give_up(self._record(client_id), f"no worker is left where {endpoint!r} wants it")
        if clients and self.expects_workers:
            self._why_waited_for[label] = where
            if label not in self._waited_for:
                timeout_s = _REPLACED_WITHIN_S if source.replaces else self.config.rejoin_timeout_s
                loop = asyncio.get_running_loop()
                self._waited_for[label] = loop.call_later(timeout_s, self._miss, label, timeout_s)

    def _miss(self, label: str, timeout_s: float) -> None:
        """Nobody has come in the place of a worker: whoever waits has waited long enough."""
        del self._waited_for[label]
        how = (
            "see its output for why"
            if self._source_of[label].replaces
            else "start one again, or raise runtime.rejoin_timeout_s"
        )
        reason = (
            f"{self._why_waited_for[label]}, and none has come in its place within {timeout_s:g} s: {how}; later "
            f"calls are answered once it is there"
        )
        self._missed[label] = reason
        for record in [record for record in self._ledger if record.label == label]:
            self._answer_missed(record, reason)

    def _answer_missed(self, record: Record, reason: str) -> None:
        """Tell all who wait for a learner whose worker has not come."""
        asked, record.asked = record.asked, {}
        record.awaits_snapshot = False
        for one in asked.values():
            if one.reply is not None and not one.is_own:
                one.reply(self._lost(one.call, reason))

    def _suffer(self, record: Record, member: Member, where: str, running: frozenset[int]) -> None:
        """A learner's worker was lost: note it, or give the learner up."""
        record.num_losses += bool(running & record.asked.keys())
        record.asked = {call_id: asked for call_id, asked in record.asked.items() if not asked.is_own}
        for asked in record.asked.values():
            asked.forget_worker()
        record.awaits_snapshot = record.is_registered = False
        record.moving_to = None
        record.held = []
        if member.label in self._gone:
            self._give_up(record, self._gone[member.label])
        elif record.unrecoverable is not None and record.client_id in member.learners:
            self._give_up(record, f"{where}, and its learner could not be rebuilt: {record.unrecoverable}")
        elif record.num_losses > self.config.max_recoveries:
            self._give_up(
                record,
                f"{where} while a call of this learner was running (times in succession: {record.num_losses}), so it "
                f"was given up: see the worker's output for why it ends; runtime.max_recoveries="
                f"{self.config.max_recoveries} is how often it is rebuilt",
            )

    def _present(self) -> dict[str, str]:
        """The workers that clients can be placed on: label -> machine."""
        members = self._opened().members
        return {label: member.machine for label, member in members.items() if label not in self._leaving}

    def _clients_of(self, label: str) -> list[str]:
        return [client_id for client_id, place in self._places.items() if place == label]

    def _relocate(self, client_id: str, label: str) -> None:
        """Give a client another worker; its learner moves there between two calls."""
        self._places[client_id] = label
        record = self._ledger.get(client_id)
        if record is None:
            return
        if record.given_up is not None:
            record.label = label
        elif record.label != label or label in self._leaving:
            self._begin_move(record, label)
        elif record.moving_to is not None:  # it stays after all
            record.moving_to = None
            self._push_again(record)

    def _moved(self, record: Record, left: str) -> None:
        if (reason := self._unreachable(record)) is not None:
            self._answer_missed(record, reason)
        self._release_if_idle(left)

    def _give_up(self, record: Record, reason: str) -> None:
        super()._give_up(record, reason)
        self._release_if_idle(record.label)

    def _stays(self, record: Record, reason: str) -> None:
        if record.label in self._leaving:
            self._give_up(record, f"{record.label} left, and its learner could not be moved: {reason}")
        else:
            self._places[record.client_id] = record.label

    def _release_if_idle(self, label: str) -> None:
        """Let a worker go that has asked for it, once no learner is left there."""
        member = self._opened().members.get(label)
        if member is None or label not in self._leaving:
            return
        records = (self._ledger.get(client_id) for client_id in member.learners)
        if any(record is not None and record.given_up is None and record.label == label for record in records):
            return
        self._in_world.discard(label)
        self._leaving.discard(label)
        self._opened().release(label)
        self._spec.publish(WorkerLeft(label))
        self._do_without(member, f"{label} has left")
        for record in self._ledger:
            if record.asked and record.label != label:
                self._push_again(record)  # what waited for a place

    def world_formed(self, generation: int, seconds: float) -> None:
        """The workers can be called again: ask for everything that was not answered."""
        self._spec.publish(WorldFormed(generation, seconds))
        members = self._opened().members
        newcomers, self._in_world = members.keys() - self._in_world, set(members)
        self._news.set()
        for label in newcomers:
            self._missed.pop(label, None)
            if (timer := self._waited_for.pop(label, None)) is not None:
                timer.cancel()
            self._spec.publish(WorkerJoined(label))
        if newcomers:
            self._balance()
        waiting = [record for record in self._ledger if record.asked]
        waiting.sort(key=lambda record: min(asked.number for asked in record.asked.values()))
        for record in waiting:
            self._push_again(record)
        self._collect_again()
        self._call_next()

    def _balance(self) -> None:
        """Give those who have come their share of the clients."""

        def is_cheap(client_id: str) -> bool:
            return self._ledger.get(client_id) is None

        clients = [client_id for client_id in self._spec.clients if client_id in self._places]
        endpoints, members, present = self.config.client_endpoints, self._opened().members, self._present()
        stranded = [
            client_id for client_id in endpoints if self._places.get(client_id, LOCAL) not in {*members, LOCAL}
        ]
        for client_id, label in place_again(stranded, endpoints, present, self._places).items():
            self._relocate(client_id, label)
        # Those who are about to be there again keep their share.
        labels = [label for label in self._machines if label in present or self._source_of[label].replaces]
        moved = even_out(clients, endpoints, labels, self._places, is_cheap)
        for client_id, label in moved.items():
            self._relocate(client_id, label)
        for label in [label for label in self._waited_for if not self._clients_of(label)]:
            self._waited_for.pop(label).cancel()

    def world_failed(self, error: ConfigError | WorkerLostError) -> None:
        """No worker can be called any more."""
        self._failure = error
        self._news.set()
        for record in self._ledger:
            self._give_up(record, str(error))

    def undeliverable(self, call: Call, error: Exception) -> None:
        """RPC cannot carry this call: what it has done to its learner is not known."""
        if call.kind == "collect":
            self._uncollectable(call, error)
            return
        record = self._record(call.client_id)
        asked = record.asked.get(call.call_id)
        if asked is None:
            return
        reason = f"torch RPC cannot carry the call or its answer: {error}"
        if asked.is_own and asked.call.kind != "snapshot":
            self._give_up(record, f"it could not be rebuilt on {record.label}: {reason}")
            return
        self._ledger.settle(record, asked, Outcome("failed", cut_off=True))
        self._settled(record)
        if asked.reply is not None:
            asked.reply(self._lost(call, reason))

    def asked(self, label: str) -> list[int]:
        """Ids of the calls to a worker that were sent and not answered."""
        return self.collects(label) + [
            call_id
            for record in self._ledger
            if record.label == label
            for call_id, asked in record.asked.items()
            if asked.asked_through is not None
        ]


def _first_sent(records: Sequence[Record]) -> list[int]:
    """The call that ran most likely, where that is not known: the first of all that were sent."""
    sent = [asked for record in records for asked in record.asked.values() if asked.asked_through is not None]
    return [min(sent, key=lambda asked: asked.number).call.call_id] if sent else []
