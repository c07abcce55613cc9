"""Asking workers: a call is asked until it is answered, again in each world, and once its learner is rebuilt."""

from __future__ import annotations

import asyncio
import logging
import warnings
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError, WorkerLostError
from torchfedrpc.executors.base import CallExecutor
from torchfedrpc.executors.journal import Asked, Ledger, Record
from torchfedrpc.executors.room import Room
from torchfedrpc.executors.turns import Turns
from torchfedrpc.host.call import Call, Outcome
from torchfedrpc.host.mailbox import Reply
from torchfedrpc.host.snapshot import seal
from torchfedrpc.rpc.worker_client import RemoteHost
from torchfedrpc.rpc.worker_group import WorkerGroup
from torchfedrpc.wire.packing import Packed, pack
from torchfedrpc.wire.shared import SharedValue

logger = logging.getLogger(__name__)


class AskingExecutor(CallExecutor):
    """Sends what the ledger has to the workers of a group, and notes their answers in it.

    A lost learner is made again at its next call: its constructor, its last snapshot, the calls since then, and then
    the calls that wait for it. Everything happens on the event loop.

    Args:
        config: the run's configuration.
    """

    def __init__(self, config: RuntimeConfig | None = None) -> None:
        super().__init__(config)
        self._group: WorkerGroup | None = None
        self._ledger = Ledger(self.config, self._admission.hold)
        self._storing: set[asyncio.Task[None]] = set()
        self._room = Room()
        self._turns: dict[str, Turns] = {}  # label of a worker -> whose state is on its way to or from it
        self._warned_of: set[str | None] = set()  # attributes that were warned of, since they cannot be captured

    async def close(self) -> None:
        """Answer nobody any more."""
        self._sharing.close()
        for record in self._ledger:
            for asked in record.asked.values():
                if asked.reply is not None and not asked.is_own:
                    asked.reply(Outcome("cancelled", never_ran=True))
        group, self._group = self._group, None
        if group is not None:
            await group.close(self.ends_early)
        await asyncio.gather(*self._storing, return_exceptions=True)
        self._ledger.close()

    @abstractmethod
    def _new_record(self, client_id: str) -> Record:
        """The record of a client that was not called before."""

    @abstractmethod
    def _unreachable(self, record: Record) -> str | None:
        """Why a learner's worker cannot be called now, nor soon; None where it can, or is waited for."""

    @abstractmethod
    def _went_on(self, record: Record) -> None:
        """A call of a learner was answered, or a snapshot of it stored."""

    async def capture(self, client_id: str) -> bytes:
        """A snapshot for a cut; empty for a learner that was given up, which has no state any more."""
        record = self._ledger.get(client_id)
        if record is not None and record.given_up is not None:
            return b""
        return await super().capture(client_id)

    def _take_shared(self, obj: Any) -> Packed:
        members = self._opened().members.values()
        # In a file it need not be sent at all to those who can map that.
        return pack(obj, in_files=any(one.sees_files for one in members))

    def _unshare(self, value: SharedValue) -> None:
        if self._group is not None:
            for host in self._group.hosts.values():
                host.unshare(value)

    def _submit(self, call: Call, reply: Reply) -> None:
        record = self._record(call.client_id)
        if (reason := record.given_up or self._unreachable(record)) is not None:
            reply(self._lost(call, reason))
            return
        asked = self._ledger.ask(record, call, reply)
        host = self._host(record)
        if host is not None and record.client_id in host and self._is_there(record) and record.moving_to is None:
            self._ask(host, record, asked)
        else:
            self._push(record)

    def _advance(self, call: Call, step: int, reply: Reply) -> None:
        record = self._record(call.client_id)
        asked = record.asked.get(call.call_id)
        if asked is None:
            reply(self._lost(call, record.given_up or self._unreachable(record) or "it was given up"))
            return
        asked.reply, asked.is_waiting = reply, True
        self._ask_further(record, asked)

    def _cancel(self, call: Call) -> None:
        record = self._ledger.get(call.client_id)
        asked = record.asked.get(call.call_id) if record is not None else None
        if record is None or asked is None:
            return
        asked.was_waiting = asked.is_waiting
        asked.is_cancelled, asked.reply, asked.is_waiting = True, None, False
        if asked.asked_through is None and not asked.num_items:
            del record.asked[call.call_id]
        else:
            self._ask_further(record, asked)

    def _record(self, client_id: str) -> Record:
        self._opened()
        record = self._ledger.get(client_id)
        if record is None:
            record = self._new_record(client_id)
            self._ledger.add(record)
        return record

    def _host(self, record: Record) -> RemoteHost | None:
        """The learner's worker in the present world; None while the world is re-formed."""
        return self._group.hosts.get(record.label) if self._group is not None else None

    @abstractmethod
    def label_of(self, client_id: str) -> str | None:
        """The worker of a client; None of one that this executor does not have."""

    def _is_there(self, record: Record) -> bool:
        """Whether its worker has the learner, as far as it was told."""
        member = self._group.members.get(record.label) if self._group is not None else None
        return member is not None and record.client_id in member.learners

    def _push(self, record: Record) -> None:
        """Ask the learner's worker for all that it was not asked for in the present world."""
        host = self._host(record)
        if host is None:
            return
        member = self._opened().members[record.label]
        if record.client_id not in member.learners:
            if record.snapshot_number and not self._has_turn(record, self._push_again):
                return
            if not self._plan_rebuild(record):
                return
            record.num_builds += 1
            member.learners.add(record.client_id)
        if record.client_id not in host:
            # The request that registered it may have got lost with an earlier world.
            constructor = None if record.is_registered else record.constructor
            host.register(record.client_id, constructor, record.num_builds)
        for asked in list(record.asked.values()):
            if asked.asked_through is not host and not record.holds_back(asked):
                self._ask(host, record, asked)

    def _ask_further(self, record: Record, asked: Asked) -> None:
        """Ask anew for a call whose worker has it; where it is about to have it, it is asked for what holds then."""
        host = self._host(record)
        if host is not None and host is asked.asked_through and asked.num_items_here == asked.num_items:
            self._ask(host, record, asked)

    def _ask(self, host: RemoteHost, record: Record, asked: Asked) -> None:
        """Ask for the next outcome of a call; a stream is brought first to where it was."""
        asked.asked_through = host
        reply = partial(self._arrived, host, record, asked)
        if asked.num_items_here == asked.num_items:
            if asked.is_cancelled:
                host.cancel(asked.call, reply)
                return
            if not asked.is_waiting:
                return
        if asked.num_items_here == 0:
            host.submit(asked.call, reply)
        else:
            host.advance(asked.call, asked.num_items_here, reply)

    def _arrived(self, host: RemoteHost, record: Record, asked: Asked, outcome: Outcome) -> None:
        if self._host(record) is not host or record.asked.get(asked.call.call_id) is not asked:
            return  # an answer out of a world that is over, or to a call that is answered
        record.is_registered = True
        if not outcome.is_final:
            self._item_arrived(host, record, asked, outcome)
            return
        if self._ledger.holds(record, asked):
            record.held.append((host, asked, outcome))
            return
        host.acknowledge(asked.call, outcome)
        if asked.is_cancelled and not asked.is_own:
            self._note_duration(asked.call, outcome)
        self._ledger.settle(record, asked, outcome)
        if asked.is_own and outcome.kind == "failed" and (outcome.never_ran or asked.call.kind == "restore"):
            assert outcome.failure is not None
            self._give_up(record, f"it could not be rebuilt on {record.label}: {outcome.failure.message}")
            return
        is_newer = asked.number > record.snapshot_number  # else the learner was rebuilt from its last snapshot
        if asked.call.kind == "restore" and outcome.kind == "value" and is_newer and record.journal:
            self._keep(record, asked.number, lambda: asked.call.arguments.copy().open(self.allow)[0])
        try:
            self._settled(record)
        finally:  # behind it: a snapshot is asked for before the caller takes the value of the next call's arguments
            if asked.reply is not None:
                asked.reply(outcome)

    def _settled(self, record: Record) -> None:
        """A call of a learner is over: see whether its journal has become too long, and let others go on."""
        if self._ledger.is_cut_off(record):
            self._request_snapshot(record)
        elif self._ledger.has_long_journal(record) or self._ledger.may_try_again(record):
            self._snapshot_in_turn(record)
        self._relieve_memory()
        self._went_on(record)
        self._call_next()

    def _relieve_memory(self) -> None:
        """See that the journals' arguments are within their bound, or will be."""
        for record in self._ledger.relief():
            self._snapshot_in_turn(record)

    def _item_arrived(self, host: RemoteHost, record: Record, asked: Asked, outcome: Outcome) -> None:
        asked.num_items_here += 1
        if asked.num_items_here <= asked.num_items:  # delivered before its worker was lost
            self._ask(host, record, asked)
            return
        asked.num_items += 1
        if asked.is_own:  # more than the lost learner gave: it must not be left open
            asked.is_cancelled = True
            self._ask(host, record, asked)
            return
        asked.is_waiting = False
        reply, asked.reply = asked.reply, None
        if reply is not None:
            reply(outcome)

    def _reported(self, call: Call, number: int, progress: Packed) -> None:
        record = self._ledger.get(call.client_id)
        asked = record.asked.get(call.call_id) if record is not None else None
        # A learner that is rebuilt reports all of it again, and so does a worker that was cut off as it did.
        if asked is not None and not asked.is_own and number >= asked.num_reports:
            asked.num_reports = number + 1
            self._spec.publish_progress(call, progress)

    def _push_again(self, record: Record) -> None:
        try:
            self._push(record)
        except Exception as error:  # nobody would hear of it, and the record's callers would wait for ever
            self._give_up(record, f"it could not be rebuilt on {record.label}: {type(error).__name__}: {error}")

    # Snapshots. Few of those that can wait are on their way to or from a worker at once; other workers wait for none
    # of them. That of a cut-off call cannot: answers are held back until it has come.

    def _has_turn(self, record: Record, follow: Callable[[Record], None]) -> bool:
        """Whether a learner's state may be on its way now; where not, ``follow`` is called once it may."""
        if record.label not in self._turns:
            self._turns[record.label] = Turns(record.label, self._room)
        return self._turns[record.label].take(record, follow)

    def _call_next(self) -> None:
        """Let those go on whose turn has come."""
        for turns in list(self._turns.values()):
            turns.go_on()

    def _snapshot_in_turn(self, record: Record) -> None:
        """Have a snapshot take the place of a learner's journal."""
        is_lost = record.unrecoverable is not None and not self._ledger.may_try_again(record)
        if record.awaits_snapshot or record.given_up is not None or is_lost:
            return
        if self._has_turn(record, self._snapshot_in_turn):
            self._request_snapshot(record)

    def _request_snapshot(self, record: Record) -> None:
        record.awaits_snapshot = True
        limit_bytes = pack(self._ledger.limit_bytes(record))
        call = Call(self._own_call_id(), record.client_id, "snapshot", limit_bytes, kind="snapshot")
        asked = self._ledger.ask(record, call, None, is_own=True)
        self._ledger.put_behind(record, [one for one in record.asked.values() if record.holds_back(one)])
        asked.reply = lambda outcome: self._keep(record, asked.number, partial(self._result, outcome, call))
        self._push(record)

    def _keep(self, record: Record, number: int, read: Callable[[], torch.Tensor | int]) -> None:
        """Store the learner's state as of call ``number``, which ``read`` gives as uint8 [num_bytes], or its size."""
        task = asyncio.ensure_future(self._store(record, number, read))
        self._storing.add(task)
        task.add_done_callback(self._storing.discard)

    async def _store(self, record: Record, number: int, read: Callable[[], torch.Tensor | int]) -> None:
        try:
            await self._try_to_store(record, number, read)
        finally:  # whatever went wrong: callers wait for the outcomes that were held for this snapshot
            self._deliver_held(record)

    async def _try_to_store(self, record: Record, number: int, read: Callable[[], torch.Tensor | int]) -> None:
        try:
            state = read()
            if isinstance(state, int):  # it would not free enough
                record.state_bytes = state
                return
            record.state_bytes = state.nbytes
            self._room.saw(state.nbytes)
            if not self._ledger.keep(record, number, state):
                await asyncio.to_thread(lambda: self._ledger.store(record, number, seal(state)))
            self._ledger.took(record, number)
        except Exception as error:
            if record.moving_to is not None:
                self._cannot_move(record, error)
            elif self._is_there(record) and record.given_up is None:
                self._cannot_capture(record, error)
            else:  # it was lost meanwhile: its journal still has all that it has done
                logger.info("a snapshot of %s could not be stored: %s", record.client_id, error)

    def _deliver_held(self, record: Record) -> None:
        """A snapshot has come, or will not: deliver the outcomes that were held for it."""
        record.awaits_snapshot = False
        if self._group is None:  # closed meanwhile
            return
        if self._ledger.is_cut_off(record):  # again, since it was asked for
            self._request_snapshot(record)
        held, record.held = record.held, []
        for answer in held:
            self._arrived(answer[0], record, *answer[1:])
        self._relieve_memory()
        self._went_on(record)
        self._call_next()

    @abstractmethod
    def _cannot_move(self, record: Record, error: Exception) -> None:
        """The state of a learner that is to move cannot be captured."""

    def _cannot_capture(self, record: Record, error: Exception) -> None:
        self._ledger.refused(record, str(error))
        message = f"{record.client_id} could not be rebuilt if its worker were lost: {error}"
        attribute = getattr(error, "attribute", None)
        if attribute in self._warned_of:
            logger.log(logging.INFO if record.num_refusals == 1 else logging.DEBUG, message)
            return
        self._warned_of.add(attribute)
        try:
            warnings.warn(f"{message} (this is said once, of the first such client)", stacklevel=2)
        except Exception:  # warnings are errors, which no caller is here to catch
            logger.warning(message)

    def _plan_rebuild(self, record: Record) -> bool:
        """Put what rebuilds the learner before its calls; whether it can be rebuilt."""
        try:
            data = self._ledger.snapshot(record)
        except OSError as error:
            self._give_up(record, f"its snapshot could not be read from disk ({error})")
            return False
        restore = None
        if data is not None:
            self._room.saw(len(data))
            arguments = pack((torch.frombuffer(bytearray(data), dtype=torch.uint8), None))
            restore = Call(self._own_call_id(), record.client_id, "restore", arguments, kind="restore")
        self._ledger.plan_rebuild(record, restore)
        return True

    def _give_up(self, record: Record, reason: str) -> None:
        record.given_up = reason
        record.awaits_snapshot = False
        record.moving_to = None
        record.held = []
        self._ledger.give_up(record)
        asked, record.asked = record.asked, {}
        for one in asked.values():
            if one.reply is not None and not one.is_own:
                one.reply(self._lost(one.call, reason))
        self._call_next()

    def _lost(self, call: Call, reason: str) -> Outcome:
        where = f"{call.client_id}.{call.method} on {self.worker_of(call.client_id)}"
        return Outcome("failed", error=WorkerLostError(f"{where}: {reason}"), never_ran=True)

    def _opened(self) -> WorkerGroup:
        if self._group is None:
            raise ConfigError("this executor is not open: await executor.open(spec) first")
        return self._group
