"""All workers of a run: their preparation, their losses, and the worlds that they form with the driver."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import logging
import os
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from torchfedrpc.errors import ConfigError, WorkerLostError
from torchfedrpc.events import Event, WorkerJoined, WorkerLeft, WorkerLost, WorldFormed
from torchfedrpc.host.faults import Fault
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.host.torch_settings import OpenedSettings
from torchfedrpc.rpc.control_link import Message
from torchfedrpc.rpc.heartbeat import Heartbeat, Loss, Watch
from torchfedrpc.rpc.heartbeat_connection import open_heartbeat
from torchfedrpc.rpc.member import Member, RefusalError
from torchfedrpc.rpc.preflight import check_own_descriptors
from torchfedrpc.rpc.sources import Source
from torchfedrpc.rpc.surroundings import describe_main, pack_main
from torchfedrpc.rpc.worker_client import Traffic, UndeliverableError, WorkerClient
from torchfedrpc.rpc.worker_log import identities
from torchfedrpc.rpc.workers import Worker, Workers, WorkerState
from torchfedrpc.rpc.world import DriverPlace
from torchfedrpc.tasks import Tasks, all_of
from torchfedrpc.waiting import reported
from torchfedrpc.wire.file import TensorFiles

logger = logging.getLogger(__name__)

_START_S = 120.0  # a new process imports torch before its first heartbeat, perhaps from a cold disk
# Of workers on other machines: on a full link of 20 Mbit/s and 80 ms that loses 2 % of its packets each way, one in
# 1000 beats is more than 2 s late, and one in 10,000 more than 3 s.
_LEAST_HEARTBEAT_TIMEOUT_S = 5.0
_NOTICE_S = 1.0  # if a link or an RPC connection breaks, the heartbeat usually reports the loss within this time
_REAP_S = 0.1  # from the end of a worker's link to the fork server's report of its status
_CLOSE_TIMEOUT_S = 4.0
_LOG_S = 1.0  # for the last lines of a worker's log, which come by its heartbeat process
_WORLDLESS = "the run has no world any more"
_SESSION_CHUNK_BYTES = 8 << 20  # to encode more would hold the event loop up for some 20 ms
_MAX_FAILURES = 5  # in succession, to form a world or to carry one call


@dataclass(frozen=True)
class WorkerLeaving(Event):
    """The worker ``worker`` has asked to leave: its learners have to be moved before `WorkerGroup.release`."""

    worker: str


class WorkerGroup:
    """The workers of a run, and the worlds that they form with the driver.

    A world is never repaired. When a worker is lost or admitted, the other workers leave the world and form the next
    one. They keep their learners and continue their calls.

    Args:
        sources: The sources of workers.
        learner: How workers make learners.

    Attributes:
        workers: The table of workers, which this group keeps.
        events: Events of workers and worlds once the group is open, `WorkerLeaving` and `ProgressArrived` among them.
            A task that waits for events handles one before calls notice the change, or the end of a call that has
            reported progress.
        traffic: Name of a worker -> bytes sent to it and received from it, by former workers of that name too.
    """

    def __init__(self, sources: Sequence[Source], learner: LearnerSpec) -> None:
        self.workers = Workers()
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.traffic: defaultdict[str, Traffic] = defaultdict(Traffic)
        self._sources = sources
        self._learner = learner
        self._recovers = learner.runtime.on_worker_lost == "recover"
        # As of the opening of the proxy, for later workers too.
        self._settings = OpenedSettings.of_this_process(learner.runtime.torch_threads).values
        self._place = DriverPlace(learner)
        self._watch = Watch(learner.runtime.heartbeat_timeout_s, self.events)
        self._watching = Tasks()
        self._generation = 0
        self._is_open = False
        self._world_is_due = asyncio.Event()  # from the end of a world until the next one is formed
        self._num_changes = 0  # losses and arrivals, each of which voids the world that is formed
        self._tasks = Tasks()
        self._num_suspicions: Counter[int] = Counter()  # call id -> number of times that RPC failed to carry it
        self._num_failures: Counter[str] = Counter()  # name -> workers in succession lost before they served
        self._session: bytes | None = None  # the classes of an interactive session
        self._have_served: set[str] = set()
        self._told: dict[str, str] = {}  # name -> how the last newcomer of that name was lost

    async def gather(self) -> None:
        """Gather the workers to begin with from all sources, in the order of their ranks.

        Raises:
            ConfigError: If a setting is wrong for some of them.
            WorkerLostError: If some of them are not reached.
        """
        gathered = await all_of(*(source.gather(self._learner.runtime) for source in self._sources))
        for source, members in zip(self._sources, gathered, strict=True):
            for member in members:
                self.workers.enlist(self._take_on(source, member))

    async def open(self) -> None:
        """Let all workers import the learner, then form the first world with them.

        Raises:
            ConfigError: If a worker cannot import the learner, or this process cannot listen on the interface.
            WorkerLostError: If a worker ended meanwhile, or cannot be reached.
        """
        members = list(self.workers.members.values())
        check_own_descriptors(len(members))
        if members or self._learner.runtime.interface is not None:
            self._place.check_interface(members)
        await all_of(*map(self._prepare, members))
        await self._form(num_changes=0)
        self._have_served.update(self.workers.serve())
        self._is_open = True
        self._tasks.start(self._form_worlds())
        for source in self._sources:
            if source.expects_workers:
                self._tasks.start(self._admit_from(source))
        self._hear_leavers()

    def release(self, label: str) -> None:
        """Release a worker that has no learners. The world continues without it."""
        worker = self.workers[label]
        assert worker.member is not None
        self._num_changes += 1  # it may be a member of the world that is being formed
        self._watch.remove(label)
        self.events.put_nowait(WorkerLeft(label))
        self._remove(worker, worker.member, Loss("it has left", ()), has_left=True)

    async def close(self, reason: str) -> None:
        """End the run, fail its calls, and release the workers. The ranks of a launch stay for another run.

        Args:
            reason: Why the run ends early, for workers that other machines started; empty if it ends well.
        """
        if not self._is_open:
            for source in self._sources:
                source.abandon()
        self._is_open = False
        self.workers.close()
        try:
            await self._leave_run(reason)
        finally:
            await asyncio.gather(*(source.close(reason) for source in self._sources))

    async def _leave_run(self, reason: str) -> None:
        self._tasks.cancel()
        self._place.let_go()
        await self._tasks.wait()
        members = self.workers.members
        for member in members.values():
            member.lose(Loss("the proxy is closed", ()))
        self._send_newcomers_away(reason)
        # A lost or frozen worker does not answer; the world ends without it.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await asyncio.gather(*map(self._close_member, members.values()), return_exceptions=True)
        await self._place.close()
        self._watch.close()
        await self._watching.wait()

    async def _close_member(self, member: Member) -> None:
        """End the run of a worker, and wait for the rest of its log."""
        answer = await member.tell({"do": "close"})
        if (heartbeat := self._watch.heartbeat(member.label)) is not None:
            async with asyncio.timeout(_LOG_S):
                await heartbeat.has_logged(int(answer.get("num_logged", 0)))

    async def arm(self, label: str, faults: Sequence[Fault]) -> None:
        """Inject faults into a worker, for a test.

        Raises:
            WorkerLostError: If the worker is lost.
        """
        worker = self.workers.get(label)
        if worker is None or worker.member is None:
            raise WorkerLostError(f"{label} is lost, so that no fault can strike it")
        await worker.member.tell({"do": "arm", "faults": [asdict(fault) for fault in faults]})

    async def interrupt(self, give_up: bool) -> list[str]:
        """Interrupt cancelled methods that go on.

        Args:
            give_up: Whether to replace the processes of this machine's driver on which some go on.

        Returns:
            The names of the workers on which some go on.
        """
        members = list(self.workers.members.values())
        answers = await asyncio.gather(*(one.tell({"do": "interrupt"}) for one in members), return_exceptions=True)
        running = [
            member
            for member, answer in zip(members, answers, strict=True)
            if not isinstance(answer, BaseException) and answer.get("goes_on") is True
        ]
        for member in running:
            if give_up and member.process is not None:
                self._give_up(member, "a method of it goes on although it was interrupted")
        return [member.label for member in running]

    @property
    def is_taking_in(self) -> bool:
        """Whether a worker that was admitted is being prepared, or a world is being formed."""
        return bool(self.workers.newcomers) or self._world_is_due.is_set()

    def heartbeat(self, label: str) -> Heartbeat | None:
        """Return the heartbeat of a worker; None if it is lost."""
        return self._watch.heartbeat(label)

    @property
    def expects_workers(self) -> bool:
        """Whether further workers may come if none is left."""
        return any(source.expects_workers for source in self._sources)

    # Arrivals.

    def _take_on(self, source: Source, member: Member) -> Worker:
        taken = {one.local_index for one in self._everybody() if one.machine == member.machine}
        worker = self.workers.admit(source, member)
        member.begin()
        member.link.end_when_cut_off(self._learner.runtime.heartbeat_timeout_s)
        member.local_index = next(number for number in itertools.count() if number not in taken)
        if member.heartbeat is not None:  # opened in an earlier run
            self._begin_watch(member, member.heartbeat)
        return worker

    async def _admit_from(self, source: Source) -> None:
        """Prepare each worker that comes while the others work, then form a world with it."""
        while True:
            member = await source.arrivals.get()
            if self.workers.failure is not None:
                source.release(member, _WORLDLESS)
            else:
                self._tasks.start(self._take_in(self._take_on(source, member), member))

    async def _take_in(self, worker: Worker, member: Member) -> None:
        if not (self.workers.members or self._generation):
            try:
                self._check_heartbeat_timeout(member)
                self._place.check_interface([member])
            except ConfigError as error:  # in the driver's own settings, so that no other worker could serve either
                self._give_up(member, str(error))
                self._fail(error)
                return
        try:
            async with asyncio.timeout(_START_S):
                await self._prepare(member)
        except Exception as error:
            logger.info("%s is of no use: %s", worker.label, error)
            self._give_up(member, str(error) or f"it was not ready within {_START_S:.0f} s")
            return
        if worker.newcomer is member:  # not lost meanwhile
            self.workers.enlist(worker)
            self._break()

    def _send_newcomers_away(self, reason: str) -> None:
        for label, member in self.workers.newcomers.items():
            self._watch.remove(label)
            self.workers[label].newcomer = None
            self.workers[label].source.release(member, reason)

    # Departures and losses.

    def _everybody(self) -> list[Member]:
        return [*self.workers.members.values(), *self.workers.newcomers.values()]

    def _hear_leavers(self) -> None:
        """Report the workers that have asked to leave, also those that asked before they could be called."""
        for worker in self.workers:
            if worker.state is WorkerState.SERVING and self._is_open and self._watch.asks_to_leave(worker.label):
                self.workers.leave(worker.label)
                self.events.put_nowait(WorkerLeaving(worker.label))

    def _begin_watch(self, member: Member, connection: socket.socket) -> None:
        self._watching.start(self._attend(member, self._watch.add(member.label, connection)))

    async def _attend(self, member: Member, heartbeat: Heartbeat) -> None:
        """Let a worker leave if it asks to, and do without it once it is lost."""
        signs: list[asyncio.Future[Any]] = [heartbeat.leaving, heartbeat.lost]
        await asyncio.wait(signs, return_when=asyncio.FIRST_COMPLETED)
        if heartbeat.leaving.done():
            self._hear_leavers()
        loss = await heartbeat.lost
        await _reap(member)
        if member in self._everybody():
            self._lose(member.label, loss)

    def _lose(self, label: str, loss: Loss) -> None:
        worker = self.workers[label]
        is_new = worker.newcomer is not None
        member = worker.newcomer or worker.member
        assert member is not None
        if not is_new:
            self._num_changes += 1
            self._place.let_go()  # so that members that are joining do not wait for it
        if not self._is_open:
            worker.member = worker.newcomer = None
            member.lose(loss)
            worker.source.release(member, loss.reason)
            return
        reason = f"{loss.reason}{member.how_it_ended()}"
        is_told = is_new and self._told.get(label) == reason
        if is_new:
            self._told[label] = reason
        logger.log(logging.INFO if is_told else logging.WARNING, "%s is lost: %s", label, reason)
        self.events.put_nowait(WorkerLost(label, reason))
        self._remove(worker, member, replace(loss, reason=reason), has_left=False)
        if is_new and self.workers.members:
            return  # the other workers continue
        if self._num_failures[label] > _MAX_FAILURES:
            self._fail(WorkerLostError(f"{label} was lost {_MAX_FAILURES + 1} times in succession: {reason}"))
        elif self._recovers and not is_new:
            self._break()

    def _remove(self, worker: Worker, member: Member, loss: Loss, *, has_left: bool) -> None:
        """Take the process of a worker out of the table, fail its requests, and let it go."""
        label = worker.label
        self._num_failures[label] = 0 if worker.has_served else self._num_failures[label] + 1
        self.workers.lose(label, f"{label} has left" if has_left else f"{label} was lost ({loss.reason})")
        member.lose(loss)
        worker.source.release(member, "" if has_left else loss.reason)
        if has_left or self._recovers:
            is_replaced = worker.source.lost(member, self._num_failures[label])
            worker.machine = worker.machine if is_replaced else None

    async def _examine(self, member: Member, client: WorkerClient) -> None:
        """Wait until RPC fails a request, and find the one that it cannot carry. The others are sent again."""
        await client.broken.wait()
        if member.client is client:  # the world has not ended
            await asyncio.wait([member.lost], timeout=_NOTICE_S)
        is_reached = member.client is client and await client.is_reached()
        if member.client is not client:
            return
        # A broken connection fails each open request, and any of these may have had any open call.
        suspects = {request.call_id: (request, error) for requests, error in client.failures for request in requests}
        found = {requests[0].call_id for requests, _ in client.failures if is_reached and len(requests) == 1}
        for call_id, (request, error) in suspects.items():
            self._num_suspicions[call_id] += 1
            if call_id in found or self._num_suspicions[call_id] > _MAX_FAILURES:
                del self._num_suspicions[call_id]
                undeliverable = UndeliverableError(f"torch RPC cannot carry the call or its answer: {error}")
                undeliverable.__cause__ = error
                client.fail(request, undeliverable)
        for _, error in client.failures:
            logger.info("a request to %s failed: %s", member.label, error)
        # In this world the worker might wait for the request that it could not read before it serves the next one.
        self._break()

    # Forming worlds.

    def _break(self) -> None:
        """Let the present world end, or the one that is formed: the next one is due."""
        self._num_changes += 1
        if self.workers.failure is None:
            self._world_is_due.set()

    async def _form_worlds(self) -> None:
        """Form one world after another, each when the one before has to end."""
        while self.workers.failure is None:
            await self._world_is_due.wait()
            began = time.monotonic()
            await self._form_next()
            self._announce(time.monotonic() - began)

    async def _form_next(self) -> None:
        """Try to form the next world, until it is formed or no worker can be called for the rest of the run."""
        num_failures = 0
        while self._world_is_due.is_set():
            num_changes = self._num_changes
            try:
                await self._form(num_changes)
                self._world_is_due.clear()
            except Exception as error:
                logger.info("the world could not be re-formed: %s", error)
                if num_changes == self._num_changes:  # a loss or an arrival meanwhile is not a failure
                    num_failures += 1
                if num_failures > _MAX_FAILURES:
                    self._fail(error)

    def _announce(self, seconds: float) -> None:
        """Let the workers of a new world accept calls."""
        if self.workers.failure is None and self.workers.members:
            self.events.put_nowait(WorldFormed(self._generation, seconds))
            for label in self.workers.serve():
                has_returned = label in self._have_served
                logger.info("%s %s", label, "is back" if has_returned else "has joined, and serves")
                self.events.put_nowait(WorkerJoined(label, has_returned))
            self._have_served.update(self.workers.present)
            self._hear_leavers()
        elif not (self.workers.failure or self.workers.newcomers or self.expects_workers):
            self._fail(WorkerLostError("no worker is left"))

    def _fail(self, error: Exception) -> None:
        """Fail all calls, since no worker can be called for the rest of the run."""
        self.workers.fail(error if isinstance(error, ConfigError) else _no_world(error))
        self._world_is_due.clear()
        self._leave_world()
        self._send_newcomers_away(_WORLDLESS)

    async def _form(self, num_changes: int) -> None:
        """Leave the present world, if any, and form the next one of all members.

        Args:
            num_changes: Number of losses and arrivals before.

        Raises:
            WorkerLostError: If a member was lost meanwhile, or could not join.
        """
        self._leave_world()
        members = list(self.workers.members.values())
        await all_of(*(self._tell(member, {"do": "leave"}) for member in members))
        await self._place.leave()
        self._check_unchanged(num_changes)
        if not members:
            return
        plan, keys = await self._place.join(members, self._tell)
        self._check_unchanged(num_changes)
        self._generation = plan.generation
        for rank, (member, pair) in enumerate(zip(members, plan.device_maps, strict=True), start=1):
            client = WorkerClient(
                member.label,
                plan.name(rank),
                keys[member.label],
                frozenset([torch.device(pair[0])] if pair else []),
                self.traffic[member.label],
                events=self.events,
                sees_files=member.sees_files,
                pid=member.pid,
                known=member.confirmed,
                suspects=self._num_suspicions,
            )
            member.enter_world(client)
            self._tasks.start(self._examine(member, client))

    def _check_unchanged(self, num_changes: int) -> None:
        if num_changes != self._num_changes:
            raise WorkerLostError("a worker was lost or came while the world was formed")

    def _leave_world(self) -> None:
        for member in self.workers.members.values():
            member.leave_world()

    async def _prepare(self, member: Member) -> None:
        """Begin to watch a worker's heartbeat, and let the worker import the learner."""
        learner = self._learner
        self._check_heartbeat_timeout(member)
        if member.heartbeat is None:
            await self._open_heartbeat(member)
        main = await self._send_main(member) if "__main__" in learner.allow_list().trusted else None
        probe = None if member.elsewhere else TensorFiles.probe()
        with contextlib.closing(probe) if probe is not None else contextlib.nullcontext():
            message: Message = {
                "do": "prepare",
                "spec": learner.to_message(),
                "label": member.label,
                "local_index": member.local_index,
                "main": main,
                "settings": self._settings,
                "driver": (os.getpid(), probe.addresses()) if probe is not None else None,
                "streams": None if member.elsewhere else identities(),
            }
            async with reported(lambda: f"{member.label} on {member.machine} imports the learner"):
                answer = await self._tell(member, message)
        if not member.adopt(answer):
            self._give_up(member, str(error := member.misunderstood(message)))
            raise error
        for problem in answer["problems"]:
            logger.warning("%s: %s", member.label, problem)

    async def _send_main(self, member: Member) -> Message | None:
        """Return the driver's script, for a worker to import it; None if it need not, or was sent a session instead.

        Raises:
            ConfigError: If the worker may not have the session, or something in it cannot be pickled.
        """
        if member.imports_main is None:
            return None
        if member.imports_main == "path" and self._session is None:  # as of the opening, for replacements too
            self._session = pack_main(self._learner.load())
        if member.imports_main == "name" or self._session is None:
            return describe_main(by_name=member.imports_main == "name")
        for begin in range(0, len(self._session), _SESSION_CHUNK_BYTES):
            data = base64.b64encode(self._session[begin : begin + _SESSION_CHUNK_BYTES]).decode()
            await self._tell(member, {"do": "take_session", "data": data})
        return None

    async def _open_heartbeat(self, member: Member) -> None:
        address = self._place.address([*self.workers.members.values(), member])
        interface = self._place.interface(member, address)
        try:
            async with asyncio.timeout(_START_S):
                connection = await open_heartbeat(
                    member,
                    partial(self._tell, member),
                    address,
                    interface,
                    self._learner.runtime.heartbeat_timeout_s,
                )
        except TimeoutError:
            raise WorkerLostError(f"{member.label} was not ready within {_START_S:.0f} s") from None
        if member not in self._everybody():
            connection.close()
            raise WorkerLostError(f"{member.label} was dismissed meanwhile")
        member.heartbeat = connection
        self._begin_watch(member, connection)

    def _check_heartbeat_timeout(self, member: Member) -> None:
        timeout_s = self._learner.runtime.heartbeat_timeout_s
        if member.elsewhere and timeout_s < _LEAST_HEARTBEAT_TIMEOUT_S:
            raise ConfigError(
                f"runtime.heartbeat_timeout_s={timeout_s:g} is too short for {member.label} on {member.machine}, "
                f"another machine: a link that loses packets is silent for seconds at times; set "
                f"{_LEAST_HEARTBEAT_TIMEOUT_S:g} or more"
            )

    async def _tell(self, member: Member, message: Message) -> Message:
        try:
            return await member.tell(message)
        except WorkerLostError as error:
            if not isinstance(error, RefusalError):
                if member.heartbeat is not None:
                    await asyncio.wait([member.lost], timeout=_NOTICE_S)
                await _reap(member)
                self._give_up(member, "its process ended" if member.how_it_ended() else "its control link ended")
            if member.lost.done():
                reason = f"{member.lost.result().reason}{member.how_it_ended()}"
                raise WorkerLostError(
                    f"{member.label} was lost when it was told to {message['do']}: {reason}"
                ) from error
            if message["do"] == "leave":
                self._give_up(member, str(error))
            raise

    def _give_up(self, member: Member, reason: str) -> None:
        """Handle a worker as lost, unless the watch has done so."""
        if member in self._everybody():
            self._watch.remove(member.label)
            self._lose(member.label, Loss(reason, None))


async def _reap(member: Member) -> None:
    """Wait for the exit status of a process that is lost; one that is frozen has none."""
    if member.process is not None:
        await member.process.ends_within(_REAP_S)


def _no_world(error: Exception) -> WorkerLostError:
    return WorkerLostError(f"the workers could not be brought together again: {error}; see their output for why")
