"""What pseudo and distributed mode have in common: learners on worker ranks, and where they go when one is lost."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import WorkerLostError
from torchfedrpc.executors.asking import AskingExecutor
from torchfedrpc.executors.base import ExecutorSpec
from torchfedrpc.executors.ledger import Record
from torchfedrpc.executors.placement import place_again, place_clients
from torchfedrpc.host.call import Call, Outcome
from torchfedrpc.host.faults import Fault
from torchfedrpc.observe.events import WorkerLost, WorldFormed
from torchfedrpc.rpc.member import Member
from torchfedrpc.rpc.pulse import Loss
from torchfedrpc.rpc.worker_group import WorkerGroup


class RemoteExecutor(AskingExecutor):
    """Places clients on workers, in a world of torch RPC, and places them again when a worker is lost.

    Args:
        config: the run's configuration.
    """

    def __init__(self, config: RuntimeConfig | None = None) -> None:
        super().__init__(config)
        self._places: dict[str, str] = {}  # client id -> label of its worker
        self._machines: dict[str, str] = {}  # label of each worker -> its machine
        self._restoring: asyncio.Task[None] | None = None
        self._num_lost = 0
        self._gone: dict[str, str] = {}  # label of a worker that was lost for good -> what its clients are told
        self._failed: str | None = None  # why no worker can be called any more

    async def open(self, spec: ExecutorSpec) -> None:
        """Gather the workers, form a world with them and place the clients."""
        await super().open(spec)
        members = await self._gather(spec)
        self._machines = {member.label: member.machine for member in members}
        self._places = place_clients(list(spec.clients), self.config.client_endpoints, self._machines)
        self._group = self._make_group(members, spec)
        await self._group.open()

    async def close(self) -> None:
        """End the world."""
        if self._restoring is not None:
            self._restoring.cancel()
        await super().close()

    def worker_of(self, client_id: str) -> str:
        """``worker1`` and so on."""
        return self._places[client_id]

    def workers(self) -> list[str]:
        """``worker1`` and so on."""
        return list(self._machines)

    async def arm(self, faults: Mapping[str, Sequence[Fault]]) -> None:
        """Let faults strike workers at calls to come."""
        await asyncio.gather(*(self._opened().arm(label, of_label) for label, of_label in faults.items()))

    def stats(self) -> dict[str, Any]:
        """Bytes sent and received, and for each worker how many learners it has; how many workers were lost."""
        group = self._group
        traffic = group.traffic.values() if group is not None else []
        members = group.members.values() if group is not None else []
        return {
            "bytes_sent": sum(one.num_sent_bytes for one in traffic),
            "bytes_received": sum(one.num_received_bytes for one in traffic),
            "journal_bytes": self._ledger.num_journal_bytes,
            "workers_lost": self._num_lost,
            "workers": {member.label: {"learners": len(member.learners)} for member in members},
        }

    @abstractmethod
    async def _gather(self, spec: ExecutorSpec) -> Sequence[Member]:
        """The workers, by rank."""

    def _make_group(self, members: Sequence[Member], spec: ExecutorSpec) -> WorkerGroup:
        return WorkerGroup(members, spec.learner, self, self._reporter())

    def _new_record(self, client_id: str) -> Record:
        constructor = self._spec.constructor_arguments(client_id)
        record = Record(client_id, self._places[client_id], constructor)
        record.given_up = self._gone.get(record.label) or self._failed
        return record

    # What the group tells.

    def worker_lost(self, member: Member, loss: Loss) -> None:
        """A worker is gone: whose calls it ran, and where its learners go."""
        self._num_lost += 1
        self._spec.publish(WorkerLost(member.label, loss.reason))
        clients = [client_id for client_id, label in self._places.items() if label == member.label]
        records = [record for client_id in clients if (record := self._ledger.get(client_id)) is not None]
        running = loss.running if loss.running is not None else _first_sent(records)
        where = f"{member.label} was lost ({loss.reason})"
        if self.config.on_worker_lost == "fail":
            self._gone[member.label] = f"{where}, and its learner with it; runtime.on_worker_lost=recover rebuilds it"
        for record in records:
            self._suffer(record, member, where, frozenset(running))
        if self.config.on_worker_lost == "recover" and not self._opened().replaces:
            self._move(clients)

    def _suffer(self, record: Record, member: Member, where: str, running: frozenset[int]) -> None:
        """A learner's worker was lost: note it, or give the learner up."""
        record.num_losses += bool(running & record.asked.keys())
        record.asked = {call_id: asked for call_id, asked in record.asked.items() if not asked.is_own}
        for asked in record.asked.values():
            asked.forget_worker()
        record.awaits_snapshot = record.is_registered = False
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

    def _move(self, clients: Sequence[str]) -> None:
        """Place clients on the workers that are left."""
        group = self._opened()
        machines = {label: self._machines[label] for label in group.members}
        moved = place_again(clients, self.config.client_endpoints, machines, self._places)
        for client_id in clients:
            record = self._ledger.get(client_id)
            if client_id in moved:
                self._places[client_id] = moved[client_id]
                if record is not None:
                    record.label = moved[client_id]
            elif group.members:
                endpoint = self.config.client_endpoints[client_id]
                self._give_up(self._record(client_id), f"no worker is left where {endpoint!r} wants it")

    def world_formed(self, generation: int, seconds: float) -> None:
        """The workers can be called again: ask for everything that was not answered."""
        self._spec.publish(WorldFormed(generation, seconds))
        waiting = [record for record in self._ledger if record.asked]
        waiting.sort(key=lambda record: min(asked.number for asked in record.asked.values()))
        members = self._opened().members
        for record in waiting:
            if record.client_id in members[record.label].learners or not record.snapshot_number:
                self._push_again(record)
        if self._restoring is not None:
            self._restoring.cancel()
        self._restoring = asyncio.ensure_future(self._restore_in_turn(waiting))

    async def _restore_in_turn(self, records: Sequence[Record]) -> None:
        """Rebuild learners one after another: all of their snapshots at once may be more than memory holds."""
        for record in records:
            self._push_again(record)
            restores = [asked for asked in record.asked.values() if asked.is_own and asked.call.kind == "restore"]
            if restores and restores[0].asked_through is self._host(record):
                restored = asyncio.Event()
                restores[0].reply = lambda outcome, restored=restored: restored.set()
                await restored.wait()

    def _push_again(self, record: Record) -> None:
        try:
            self._push(record)
        except Exception as error:  # nobody would hear of it, and the record's callers would wait for ever
            self._give_up(record, f"it could not be rebuilt on {record.label}: {type(error).__name__}: {error}")

    def world_failed(self, error: WorkerLostError) -> None:
        """No worker can be called any more."""
        self._failed = str(error)
        for record in self._ledger:
            self._give_up(record, str(error))

    def undeliverable(self, call: Call, error: Exception) -> None:
        """RPC cannot carry this call: what it has done to its learner is not known."""
        record = self._record(call.client_id)
        asked = record.asked.get(call.call_id)
        if asked is None:
            return
        reason = f"torch RPC cannot carry the call or its answer: {error}"
        if asked.is_own and asked.call.kind != "snapshot":
            self._give_up(record, f"it could not be rebuilt on {record.label}: {reason}")
            return
        self._ledger.settle(record, asked, Outcome("failed", cut_off=True))
        if asked.reply is not None:
            asked.reply(self._lost(call, reason))
        if self._ledger.needs_snapshot(record):
            self._request_snapshot(record)

    def asked(self, label: str) -> list[int]:
        """Ids of the calls to a worker that were sent and not answered."""
        return [
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
