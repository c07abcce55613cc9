"""All workers of a run: their preparation, their losses, and the worlds that they form with the driver."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Protocol

import torch

from torchfedrpc.errors import ConfigError, WorkerLostError
from torchfedrpc.host.call import Batch, Call, Report
from torchfedrpc.host.faults import Fault
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.host.torch_settings import OpenedSettings
from torchfedrpc.rpc.control_link import Message
from torchfedrpc.rpc.heartbeat import Loss, Watch
from torchfedrpc.rpc.heartbeat_connection import open_heartbeat
from torchfedrpc.rpc.main_module import describe_main
from torchfedrpc.rpc.member import Member, RefusalError
from torchfedrpc.rpc.worker_client import Traffic, UndeliverableError, WorkerClient
from torchfedrpc.rpc.world import DriverPlace, all_of
from torchfedrpc.wire.file import TensorFile

logger = logging.getLogger(__name__)

_START_S = 120.0  # a new process imports torch before its first heartbeat, perhaps from a cold disk
# Of workers on other machines: on a full link of 20 Mbit/s and 80 ms that loses 2 % of its packets each way, one in
# 1000 beats is more than 2 s late, and one in 10,000 more than 3 s.
_LEAST_HEARTBEAT_TIMEOUT_S = 5.0
_NOTICE_S = 1.0  # if a link or an RPC connection breaks, the heartbeat usually reports the loss within this time
_CLOSE_TIMEOUT_S = 4.0
_WORLDLESS = "the run has no world any more"
_MAX_FAILURES = 5  # in succession, to form a world or to carry one call


class Observer(Protocol):
    """Receives the arrival and the loss of workers, on the event loop."""

    @property
    def expects_workers(self) -> bool:
        """Whether workers may come when none is left."""

    def worker_lost(self, member: Member, loss: Loss) -> None:
        """Handle the loss of a worker. Its answers no longer arrive. Another process may be admitted in its place."""

    def worker_leaving(self, member: Member) -> None:
        """Handle the request of a worker to be released."""

    def world_formed(self, generation: int, seconds: float) -> None:
        """Handle a new world: the workers can be called again. It took ``seconds`` to form."""

    def world_failed(self, error: ConfigError | WorkerLostError) -> None:
        """Handle the end of all worlds: a setting of the driver is wrong, or all workers are lost."""


class WorkerGroup:
    """The workers of a run, and the world that they form.

    A world is never repaired. When a worker is lost or admitted, the other workers leave the world and form the next
    one. They keep their learners and continue their calls.

    Args:
        members: The workers to begin with, by rank.
        learner: How workers make learners.
        observer: Receives the arrival and the loss of workers.
        report: Receives the progress that methods report.

    Attributes:
        members: Label -> worker, of all present workers.
        traffic: Label -> bytes, of all present and former workers.
    """

    def __init__(
        self,
        members: Sequence[Member],
        learner: LearnerSpec,
        observer: Observer,
        report: Report,
    ) -> None:
        self.members = {member.label: member for member in members}
        self.traffic: defaultdict[str, Traffic] = defaultdict(Traffic)
        self._learner = learner
        # As of the opening of the proxy, for later workers too.
        self._settings = OpenedSettings.of_this_process(learner.runtime.torch_threads).values
        self._observer = observer
        self._newcomers: dict[str, Member] = {}  # label -> worker that was admitted and is being prepared
        self._preparing: set[asyncio.Task[None]] = set()
        self._place = DriverPlace(learner)
        self._report = report
        self._watch: Watch
        self._generation = 0
        self._is_open = False
        self._is_whole = True  # whether no member of the world, or of the one that is formed, was lost
        self._mending: asyncio.Task[None] | None = None
        self._suspicions: set[asyncio.Task[None]] = set()
        self._num_suspicions: Counter[int] = Counter()  # call id -> number of times that RPC failed to carry it
        self._num_useless: Counter[str] = Counter()  # name -> workers in succession that were lost before any call
        self._told: dict[str, str] = {}  # name -> how the last newcomer of that name was lost
        self._has_failed = False

    async def open(self) -> None:
        """Let all workers import the learner, then form the first world with them.

        Raises:
            ConfigError: If a worker cannot import the learner, or this process cannot listen on the interface.
            WorkerLostError: If a worker ended meanwhile, or cannot be reached.
        """
        self._watch = Watch(self._learner.runtime.heartbeat_timeout_s, self._lose, self._leaves)
        for member in self.members.values():
            self._take_on(member, self.members)
        if self.members or self._learner.runtime.interface is not None:
            self._place.check_interface(list(self.members.values()))
        await all_of(*(self._prepare(member) for member in self.members.values()))
        await self._form()
        self._is_open = True

    def admit(self, member: Member) -> None:
        """Prepare a worker while the others work, then form a world with it."""
        if self._has_failed:
            member.dismiss(_WORLDLESS)
            return
        self._take_on(member, self._newcomers)
        task = asyncio.ensure_future(self._take_in(member))
        self._preparing.add(task)
        task.add_done_callback(self._preparing.discard)

    def release(self, label: str) -> None:
        """Release a worker that has no learners. The world continues without it."""
        member = self.members.pop(label)
        if member.client is None and self._mending is not None and not self._mending.done():
            self._is_whole = False  # it may be a member of the world that is being formed
        self._watch.remove(label)
        member.lose(Loss("it has left", ()))
        member.dismiss("")

    async def close(self, reason: str) -> None:
        """End the run. The present workers stay available for another run.

        Args:
            reason: Why the run ends early, for workers that are still being prepared; empty if it ends well.
        """
        self._is_open = False
        tasks = [task for task in (self._mending, *self._suspicions, *self._preparing) if task is not None]
        for task in tasks:
            task.cancel()
        self._place.let_go()
        await asyncio.gather(*tasks, return_exceptions=True)
        for member in self.members.values():
            member.lose(Loss("the proxy is closed", ()))
        self._send_newcomers_away(reason)
        # A lost or frozen worker does not answer; the world ends without it.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                closing = [member.tell({"do": "close"}) for member in self.members.values()]
                await asyncio.gather(*closing, return_exceptions=True)
        await self._place.close()
        for member in self.members.values():
            if member.heartbeat is not None:
                self._watch.release(member.label)
        self._watch.close()

    async def arm(self, label: str, faults: Sequence[Fault]) -> None:
        """Inject faults into a worker, for a test.

        Raises:
            WorkerLostError: If the worker is lost.
        """
        if label not in self.members:
            raise WorkerLostError(f"{label} is lost, so that no fault can strike it")
        await self.members[label].tell({"do": "arm", "faults": [asdict(fault) for fault in faults]})

    def suspect(self, client: WorkerClient, requests: Collection[Call | Batch], error: Exception) -> None:
        """Find the request that RPC cannot carry, and raise an error at its caller. The others are sent again."""
        if self._is_present(client):
            task = asyncio.ensure_future(self._examine(client, list(requests), error))
            self._suspicions.add(task)
            task.add_done_callback(self._suspicions.discard)

    def _is_present(self, client: WorkerClient) -> bool:
        """Return whether a client's world is the present one."""
        member = self.members.get(client.label)
        return member is not None and member.client is client

    # Losses.

    @property
    def is_taking_in(self) -> bool:
        """Whether a worker that was admitted is being prepared, or a world is being formed."""
        return bool(self._newcomers) or (self._mending is not None and not self._mending.done())

    def _everybody(self) -> list[Member]:
        return [*self.members.values(), *self._newcomers.values()]

    def _take_on(self, member: Member, among: dict[str, Member]) -> None:
        timeout_s = self._learner.runtime.heartbeat_timeout_s
        member.begin()
        member.link.end_when_cut_off(timeout_s)
        taken = {one.local_index for one in self._everybody() if one.machine == member.machine}
        member.local_index = next(number for number in itertools.count() if number not in taken)
        among[member.label] = member
        if member.heartbeat is not None:  # opened in an earlier run
            self._watch.add(member.label, member.heartbeat)

    def hear_leavers(self) -> None:
        """Report the workers that have asked to leave, also those that asked before they could be called."""
        for member in list(self.members.values()):
            if member.wants_to_leave:
                member.wants_to_leave = False
                self._observer.worker_leaving(member)

    def _leaves(self, key: Hashable) -> None:
        for member in self._everybody():
            member.wants_to_leave |= member.label == key
        if self._is_open:
            self.hear_leavers()

    def _lose(self, key: Hashable, loss: Loss) -> None:
        label = str(key)
        is_new = label in self._newcomers
        member = (self._newcomers if is_new else self.members).pop(label)
        was_reached = member.client is not None
        if not is_new:
            self._is_whole = False
            self._place.let_go()  # so that members that are joining do not wait for it
        if not self._is_open:
            member.lose(loss)
            member.dismiss(loss.reason)
            return
        reason = f"{loss.reason}{member.how_it_ended()}"
        loss = replace(loss, reason=reason)
        member.lose(loss)
        member.dismiss(reason)
        is_told = is_new and self._told.get(label) == reason
        if is_new:
            self._told[label] = reason
        logger.log(logging.INFO if is_told else logging.WARNING, "%s is lost: %s", label, reason)
        self._observer.worker_lost(member, loss)
        self._num_useless[label] += not was_reached
        if is_new and self.members:
            return  # the other workers continue
        if self._num_useless[label] > _MAX_FAILURES:
            self._fail(WorkerLostError(f"{label} was lost {_MAX_FAILURES + 1} times in succession: {reason}"))
        elif self._learner.runtime.on_worker_lost == "recover" and not is_new:
            self._break()

    async def _examine(self, client: WorkerClient, requests: list[Call | Batch], error: Exception) -> None:
        if (member := self.members.get(client.label)) is not None:
            await asyncio.wait([member.lost], timeout=_NOTICE_S)
        if not self._is_present(client):
            return
        is_reached = await client.is_reached()
        if not self._is_present(client):
            return
        is_found = is_reached and len(requests) == 1
        for request in requests:
            self._num_suspicions[request.call_id] += 1
            if is_found or self._num_suspicions[request.call_id] > _MAX_FAILURES:
                del self._num_suspicions[request.call_id]
                undeliverable = UndeliverableError(f"torch RPC cannot carry the call or its answer: {error}")
                undeliverable.__cause__ = error
                client.fail(request, undeliverable)
        # In this world the worker might wait for the request that it could not read before it serves the next one.
        logger.info("a request to %s failed: %s", client.label, error)
        self._break()

    # Forming worlds.

    def _break(self) -> None:
        """Form the next world, unless that is under way."""
        self._is_whole = False
        if not self._has_failed and (self._mending is None or self._mending.done()):
            self._mending = asyncio.ensure_future(self._mend())

    async def _mend(self) -> None:
        began, num_failures = time.monotonic(), 0
        while not self._is_whole:
            self._is_whole = True
            try:
                await self._form()
            except Exception as error:
                logger.info("the world could not be re-formed: %s", error)
                num_failures += self._is_whole  # a loss or an arrival meanwhile is not a failure
                self._is_whole = False
                if num_failures > _MAX_FAILURES:
                    self._fail(error)
                    return
        if self.members:
            self._num_useless.clear()
            self._observer.world_formed(self._generation, time.monotonic() - began)
            self.hear_leavers()
        elif not (self._newcomers or self._observer.expects_workers):
            self._fail(WorkerLostError("no worker is left"))

    async def _take_in(self, member: Member) -> None:
        """Prepare a worker that was admitted, while the others work in their world."""
        label = member.label
        if not (self.members or self._generation):
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
            logger.info("%s is of no use: %s", label, error)
            self._give_up(member, str(error) or f"it was not ready within {_START_S:.0f} s")
            return
        if self._newcomers.get(label) is member:  # not lost meanwhile
            self.members[label] = self._newcomers.pop(label)
            self._break()

    def _send_newcomers_away(self, reason: str) -> None:
        while self._newcomers:
            label, member = self._newcomers.popitem()
            self._watch.remove(label)
            member.dismiss(reason)

    def _fail(self, error: Exception) -> None:
        self._has_failed = True
        self._leave_world()
        self._send_newcomers_away(_WORLDLESS)
        self._observer.world_failed(error if isinstance(error, ConfigError) else _no_world(error))

    async def _form(self) -> None:
        """Leave the present world, if any, and form the next one of all members.

        Raises:
            WorkerLostError: If a member was lost meanwhile, or could not join.
        """
        self._leave_world()
        members = list(self.members.values())
        await all_of(*(self._tell(member, {"do": "leave"}) for member in members))
        await self._place.leave()
        self._check_whole()
        if not members:
            return
        plan, keys = await self._place.join(members, self._tell)
        self._check_whole()
        self._generation = plan.generation
        for member in members:
            member.has_served = True
        for rank, (member, pair) in enumerate(zip(members, plan.device_maps, strict=True), start=1):
            client = WorkerClient(
                member.label,
                plan.name(rank),
                keys[member.label],
                frozenset([torch.device(pair[0])] if pair else []),
                self.traffic[member.label],
                report=self._report,
                sees_files=member.sees_files,
                pid=member.pid,
                known=member.confirmed,
                suspects=self._num_suspicions,
                on_error=self.suspect,
            )
            member.enter_world(client)

    def _check_whole(self) -> None:
        if not self._is_whole:
            raise WorkerLostError("a worker was lost while the world was formed")

    def _leave_world(self) -> None:
        for member in self.members.values():
            member.leave_world()

    async def _prepare(self, member: Member) -> None:
        """Begin to watch a worker's heartbeat, and let the worker import the learner."""
        learner = self._learner
        self._check_heartbeat_timeout(member)
        if member.heartbeat is None:
            await self._open_heartbeat(member)
        imports_main = member.imports_main is not None and "__main__" in learner.allow_list().trusted
        probe = None if member.elsewhere else TensorFile.probe()
        with contextlib.closing(probe) if probe is not None else contextlib.nullcontext():
            message: Message = {
                "do": "prepare",
                "spec": learner.to_message(),
                "label": member.label,
                "local_index": member.local_index,
                "main": describe_main(by_name=member.imports_main == "name") if imports_main else None,
                "settings": self._settings,
                "driver": (os.getpid(), probe.address()) if probe is not None else None,
            }
            answer = await self._tell(member, message)
        if not member.adopt(answer):
            self._give_up(member, str(error := member.misunderstood(message)))
            raise error
        for problem in answer["problems"]:
            logger.warning("%s: %s", member.label, problem)

    async def _open_heartbeat(self, member: Member) -> None:
        address = self._place.address([*self.members.values(), member])
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
        self._watch.add(member.label, connection)

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


def _no_world(error: Exception) -> WorkerLostError:
    return WorkerLostError(f"the workers could not be brought together again: {error}; see their output for why")
