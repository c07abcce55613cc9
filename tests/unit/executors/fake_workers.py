"""Workers without processes: their learners are lists of what was done to them, and a test answers what it holds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from settling import TIMEOUT_S, within

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import SnapshotError, WorkerLostError
from torchfedrpc.events import EventBus
from torchfedrpc.executors.admission import Admission
from torchfedrpc.executors.durations import Durations
from torchfedrpc.executors.journal import Journal
from torchfedrpc.executors.learner_session import LearnerRun, LearnerSession
from torchfedrpc.host.call import Batch, Call, CallKind, Outcome, TakeBack
from torchfedrpc.host.snapshot import _HEADER
from torchfedrpc.reduce.worker import BatchJob
from torchfedrpc.rpc.heartbeat import Loss
from torchfedrpc.rpc.member import Member
from torchfedrpc.rpc.workers import Workers
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.exceptions import Failure
from torchfedrpc.wire.packing import Packed, pack

ALLOW = AllowList(["summing"])
CUT_OFF = Outcome("cancelled", cut_off=True)
GIVEN_BACK = Outcome("given_back", never_ran=True)


async def until(condition: Callable[[], Any]) -> None:
    """Let the loop run until a condition is met."""
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0)


def call(call_id: int, client_id: str = "a", kind: CallKind = "call", num_floats: int = 0) -> Call:
    return Call(call_id, client_id, "train", pack(((torch.zeros(num_floats),), {})), kind=kind)


class FakeWorker(Member):
    """A worker whose learners note what was done to them.

    Attributes:
        log: Requests in order, such as ``call 3``, ``snapshot``, ``advance 3 1`` and ``cancel 3``.
        limits: Id of each call that was submitted -> its limit in seconds, of the last time.
        learners: Client -> what was done to its learner since it was made, such as ``new 2``, ``3`` and ``3 closed``.
        holds: Requests, by their words in the log or by the first of these, that wait for `answer`.
        num_items: Items of each stream.
        uncapturable: Error of snapshots; None if they succeed.
    """

    def __init__(self, label: str, num_items: int = 3) -> None:
        super().__init__(label, link=None, machine="here")  # type: ignore[arg-type]
        self.begin()
        self.log: list[str] = []
        self.limits: dict[int, float | None] = {}
        self.learners: dict[str, list[str]] = {}
        self.holds: set[str] = set()
        self.num_items = num_items
        self.uncapturable: Exception | None = None
        self.outcomes: dict[str, Outcome | Exception] = {}  # by words in the log: answers instead of the usual ones
        self._pending: dict[str, asyncio.Future[Outcome]] = {}
        self._jobs: dict[int, BatchJob] = {}
        self._finals: dict[int, Outcome] = {}

    def end(self, *running: int) -> None:
        """End the process, which was running some calls."""
        self.lose(Loss("its process ended", running))
        for future in self._pending.values():
            if not future.done():
                future.set_exception(self.gone())
        for job in self._jobs.values():
            job.reply = None
        self._pending.clear()

    def release(self, request: str, outcome: Outcome | None = None) -> None:
        """Answer a request that waits."""
        future = self._pending.pop(request)
        if not future.done():
            future.set_result(outcome or Outcome("value"))

    @property
    def waiting(self) -> list[str]:
        """Requests that wait for an answer."""
        return [request for request, future in self._pending.items() if not future.done()]

    def state_of(self, client_id: str) -> list[str]:
        registration = self.registrations[client_id]
        learner = self.learners.get(client_id)
        if learner is None or learner[0] != f"new {registration.build}":
            learner = self.learners[client_id] = [f"new {registration.build}"]
        return learner

    def forget(self, client_id: str) -> None:
        self.log.append(f"forget {client_id}")
        self.learners.pop(client_id, None)
        super().forget(client_id)

    async def submit(self, call: Call) -> Outcome:
        request = f"{call.kind} {call.call_id}" if call.kind in ("call", "stream") else call.kind
        self.limits[call.call_id] = call.run_timeout_s
        given = await self._asked(request, call.kind)
        learner = self.state_of(call.client_id)
        if call.kind == "snapshot":
            return self._snapshot(learner, call, given)
        if call.kind == "restore":
            state, _ = call.arguments.copy().open(ALLOW)
            learner[1:] = bytes(state.numpy())[_HEADER.size :].decode().splitlines()
        elif call.kind == "stream":
            learner.append(f"{call.call_id} item 0")
            return given or Outcome("item", pack(0))
        elif given is None or not given.never_ran:
            learner.append(str(call.call_id))
        return given or Outcome("value", pack(call.call_id))

    async def advance(self, request: Call | Batch, step: int, sent: Packed | None = None) -> Outcome:
        given = await self._asked(f"advance {request.call_id} {step}", "advance")
        if isinstance(request, Batch):
            return await self._batch_answer(self._jobs[request.call_id], step)
        if given is not None:
            return given
        if step >= self.num_items:
            return Outcome("end")
        self.state_of(request.client_id).append(f"{request.call_id} item {step}")
        return Outcome("item", pack(step))

    async def cancel(self, call: Call) -> Outcome:
        was_running = f"{call.kind} {call.call_id}" in self._pending
        given = await self._asked(f"cancel {call.call_id}", "cancel")
        if given is not None:
            return given
        if call.kind == "stream":
            self.state_of(call.client_id).append(f"{call.call_id} closed")
            return Outcome("cancelled", cut_off=was_running)
        if was_running:
            self.state_of(call.client_id).append(f"{call.call_id} cut off")
        return Outcome("cancelled", cut_off=was_running, never_ran=not was_running)

    async def run_batch(self, batch: Batch) -> Outcome:
        ids = " ".join(str(call.call_id) for _, call in batch.calls)
        await self._asked(f"batch {ids}", "batch")
        job = self._jobs[batch.call_id] = BatchJob(batch, ALLOW, by_value=True)
        for _, call in batch.calls:
            if f"call {call.call_id}" not in self.holds:
                self.end_call(call.call_id)
        return await self._batch_answer(job, 0)

    def end_call(self, call_id: int, outcome: Outcome | None = None) -> None:
        """End a call of a batch; by default it succeeds, and its result is the client's id."""
        job, place, call = next(
            (job, place, call)
            for job in self._jobs.values()
            for place, call in job.batch.calls
            if call.call_id == call_id and job.batch.call_id not in self._finals and not self.is_gone
        )
        if outcome is None:
            answer = self.outcomes.pop(f"call {call_id}", None)
            outcome = answer if isinstance(answer, Outcome) else Outcome("value")
        if not outcome.never_ran:
            self.state_of(call.client_id).append(str(call_id))
        if outcome.kind == "value":
            job.add(place, call.client_id)
        if job.ended(place, outcome):
            final = self.outcomes.pop("partial results", None) or Outcome("value", job.partial_results())
            assert isinstance(final, Outcome)
            ends = tuple(job.outcomes)
            final = (
                Outcome("value", final.parcel, of_calls=ends)
                if final.failure is None
                else Outcome("failed", failure=final.failure, of_calls=ends)
            )
            self._finals[job.batch.call_id] = final
            if job.reply is not None:
                job.reply(final)
                job.reply = None
        elif (due := job.next_reply()) is not None:
            due[0](due[1])

    async def take_back(self, request: TakeBack) -> Outcome:
        given = await self._asked("take back " + " ".join(map(str, request.candidates)), "take back")
        if given is not None:
            return given
        of_batches = [call.call_id for job in self._jobs.values() for _, call in self._open_calls(job)]
        waiting = [one for one in request.candidates if f"call {one}" in self._pending or one in of_batches]
        taken = waiting[len(waiting) // 2 if request.half else 0 :]
        for call_id in taken:
            if call_id in of_batches:
                self.end_call(call_id, GIVEN_BACK)
            else:
                self.release(f"call {call_id}", GIVEN_BACK)
        return Outcome("value", of_calls=tuple((call_id, GIVEN_BACK) for call_id in taken))

    def _open_calls(self, job: BatchJob) -> list[tuple[int, Call]]:
        ended = {place for place, _ in job.outcomes}
        return [(place, call) for place, call in job.batch.calls if place not in ended]

    def cancel_batch(self, batch: Batch) -> None:
        self.log.append("cancel_batch " + " ".join(str(call.call_id) for _, call in batch.calls))
        if self.is_gone:
            return
        for _, call in self._open_calls(self._jobs[batch.call_id]):
            self.end_call(call.call_id, CUT_OFF)

    async def _batch_answer(self, job: BatchJob, num_known: int) -> Outcome:
        if (final := self._finals.get(job.batch.call_id)) is not None:
            return final
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._pending[f"answer {job.batch.call_id}"] = future

        def answer(outcome: Outcome) -> None:
            if not future.done():
                future.set_result(outcome)

        job.watch(num_known, answer)
        if (due := job.next_reply()) is not None:
            due[0](due[1])
        return await future

    async def _asked(self, request: str, kind: str) -> Outcome | None:
        """Note a request, and wait if it is held; returns the answer if it is not the usual one."""
        if self.is_gone:
            raise self.gone()
        self.log.append(request)
        await asyncio.sleep(0)  # the answer never comes at once
        if self.is_gone:
            raise self.gone()
        if request in self.holds or kind in self.holds:
            future = self._pending[request] = asyncio.get_running_loop().create_future()
            outcome = await future
            if request not in self.outcomes:
                return outcome if outcome.kind != "value" or outcome.parcel is not None else None
        answer = self.outcomes.pop(request, None)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _snapshot(self, learner: list[str], call: Call, given: Outcome | None) -> Outcome:
        if self.uncapturable is not None:
            return Outcome("failed", failure=Failure.capture(self.uncapturable))
        if given is not None:
            return given
        data = bytes(_HEADER.size) + "\n".join(learner[1:]).encode()
        limit = call.arguments.copy().open(ALLOW)
        return Outcome("value", pack(len(data) if limit is not None and len(data) > limit else tensor_of(data)))


def tensor_of(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


class FakeRun(LearnerRun):
    """A run that places all clients on one worker.

    Attributes:
        refusals: Clients that could not be captured, each with whether that was told first.
        stay: Whether a learner that cannot be captured may stay on its worker.
    """

    def __init__(self, *, max_recoveries: int = 3, **runtime: Any) -> None:
        config = RuntimeConfig(max_recoveries=max_recoveries, **runtime)
        table: Any = None  # of workers: there is one at a time
        spec: Any = SimpleNamespace(
            learner=SimpleNamespace(allow_list=lambda: ALLOW),
            events=EventBus(),
            clients={client_id: {"client": client_id} for client_id in "abcdef"},
        )
        super().__init__(config, spec, table, Admission(1 << 30), Durations())
        self.refusals: list[tuple[str, bool]] = []
        self.stay = True
        self._target: FakeWorker | None = None
        self._failure: str | None = None
        self._changed = asyncio.Event()

    def place(self, worker: FakeWorker | None) -> None:
        """Place all clients on a worker; None if it is waited for."""
        self._target = worker
        self._changed.set()

    def fail(self, reason: str) -> None:
        """Expect no worker."""
        self._target, self._failure = None, reason
        self._changed.set()

    def session(self, client_id: str = "a") -> LearnerSession:
        return super().session(client_id)

    def journal(self, client_id: str = "a") -> Journal:
        return self.session(client_id)._journal

    async def close(self) -> None:
        """Wait for all that goes on, and check that each turn was passed on."""
        while self._tasks._tasks:
            await within(self._tasks.wait())
        held = [client_id for client_id, session in self.sessions.items() if session.turns.is_held]
        await super().close()
        assert not held, f"turns were never passed on: {held}"

    def present_worker(self, client_id: str) -> FakeWorker | None:
        return self._target if self._target is not None and not self._target.is_gone else None

    async def worker(self, client_id: str) -> FakeWorker:
        while True:
            if (worker := self.present_worker(client_id)) is not None:
                return worker
            if self._failure is not None:
                raise WorkerLostError(self._failure)
            self._changed.clear()
            await self._changed.wait()

    def stays(self, client_id: str, worker: Member) -> bool:
        if self.stay:
            assert isinstance(worker, FakeWorker)
            self.place(worker)
        return self.stay

    def worker_of(self, client_id: str) -> str:
        worker = self.session(client_id).worker or self._target
        return worker.label if worker is not None else "a lost worker"

    def warn_of_refusal(self, client_id: str, error: Exception, *, is_first: bool) -> None:
        self.refusals.append((client_id, is_first))


UNCAPTURABLE = SnapshotError("an autograd graph is kept in an attribute")


def table_of(*workers: FakeWorker) -> Workers:
    """The table of a run whose workers accept calls."""
    table = Workers()
    source: Any = SimpleNamespace(replaces=False)
    for worker in workers:
        table.enlist(table.admit(source, worker))
    table.serve()
    return table
