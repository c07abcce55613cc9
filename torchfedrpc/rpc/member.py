"""A worker process on the driver's side, and the requests to it through all worlds."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torchfedrpc.errors import ConfigError, WorkerLostError
from torchfedrpc.host.call import Batch, Call, Outcome, Registration, TakeBack
from torchfedrpc.rpc.control_link import Link, Message, in_short
from torchfedrpc.rpc.heartbeat import Loss
from torchfedrpc.rpc.processes import Process
from torchfedrpc.rpc.worker_client import Request, UndeliverableError, WorkerClient, WorldOver
from torchfedrpc.rpc.worker_clock import WorkerClock
from torchfedrpc.wire.file import TensorFiles
from torchfedrpc.wire.packing import Packed

_DEVICE = re.compile(r"cpu|cuda:[0-9]{1,3}")


class RefusalError(WorkerLostError):
    """A worker is present and could not carry out a message of the control link."""


class WorkerGone(Exception):
    """A worker was lost, or has left, before an answer came.

    Attributes:
        reason: How it ended.
        running: Ids of the calls that it was running, or, if that is unknown, of the call that was sent first.
    """

    def __init__(self, reason: str, running: frozenset[int]) -> None:
        super().__init__(reason)
        self.reason = reason
        self.running = running


@dataclass(eq=False)
class Member:
    """One worker process.

    Attributes:
        label: Its name, such as ``worker1``, or the address at which it listens. A replacement has the name of the
            worker that it replaces.
        link: The driver's end of the control link.
        machine: Name of its machine.
        heartbeat: The driver's end of the heartbeat connection; None until it is opened.
        process: The process, if the driver has started it.
        elsewhere: Whether it is on another machine than the driver (machine names need not differ).
        imports_main: How it imports the driver's script: by its ``path`` or by its ``name``; None if it runs the
            script itself.
        registrations: Client -> the learner that it has, or makes at the next call.
        device: Its device.
        visible_gpus: The GPUs that it is limited to.
        sees_files: Whether it can open memory files of the driver.
        pid: Its process id if the driver can open its memory files, else None.
        local_index: Its number among the run's workers on its machine, from 0.
        lost: Future of how it was lost; made when a run begins.
        client: Sends requests to it in the present world; None while the world is re-formed.
        confirmed: Clients whose learners it has confirmed as registered, in earlier worlds.
        sent: Id of each request without a final answer -> number of its calls, in the order of sending.
        busy_s: Seconds that its calls have run, of those that have ended.
        process_id: Its process id on its machine; None until it is prepared.
        clock: Its clock, compared with the driver's.
    """

    label: str
    link: Link
    machine: str
    heartbeat: socket.socket | None = None
    process: Process | None = None
    elsewhere: bool = False
    imports_main: Literal["path", "name"] | None = None
    registrations: dict[str, Registration] = field(default_factory=dict)
    device: str = "cpu"
    visible_gpus: str | None = None
    sees_files: bool = False
    pid: int | None = None
    local_index: int = -1
    client: WorkerClient | None = None
    confirmed: set[str] = field(default_factory=set)
    sent: dict[int, int] = field(default_factory=dict)
    busy_s: float = 0.0
    process_id: int | None = None
    clock: WorkerClock = field(default_factory=WorkerClock)
    lost: asyncio.Future[Loss] = field(init=False)
    _cancelled: set[int] = field(default_factory=set)  # ids of batches
    _unread: dict[int, Outcome] = field(default_factory=dict)  # of calls that were cancelled as their outcomes came
    _changed: asyncio.Event = field(init=False)
    _turn: asyncio.Lock = field(init=False)

    def begin(self) -> None:
        """Begin a run on the running event loop."""
        self.registrations, self.confirmed, self.sent, self.client = {}, set(), {}, None
        self._cancelled, self._unread = set(), {}
        self.lost = asyncio.get_running_loop().create_future()
        self._changed = asyncio.Event()
        self._turn = asyncio.Lock()

    def enter_world(self, client: WorkerClient) -> None:
        """Send requests through a client, in a world that was formed."""
        self.client = client
        self._changed.set()

    def leave_world(self) -> None:
        """Let requests wait for the next world, also those that were sent and have no answer."""
        client, self.client = self.client, None
        self._changed.clear()
        if client is not None:
            self.confirmed |= client.confirmed()
            client.close()

    def lose(self, loss: Loss) -> None:
        """Fail all requests: the process is gone, or was released."""
        if self.lost.done():
            return
        running = loss.running if loss.running is not None else list(self.sent)[:1]
        self.lost.set_result(replace(loss, running=tuple(running)))
        self.leave_world()
        self._changed.set()

    @property
    def clock_ahead_s(self) -> float:
        """Seconds that its clock is ahead of the driver's, as well as that is known."""
        return self.clock.offset_s

    def gone(self) -> WorkerGone:
        """Return the error of requests to a process that is gone."""
        loss = self.lost.result()
        return WorkerGone(loss.reason, frozenset(loss.running or ()))

    @property
    def address(self) -> str | None:
        """IP address of its control link; None if it is a process of this machine without one."""
        return self.link.peer_address()

    def how_it_ended(self) -> str:
        """Return how the process ended, as a clause after "it ended"; empty if that is unknown."""
        return self.process.how_it_ended() if self.process is not None else ""

    @property
    def is_gone(self) -> bool:
        """Whether it was lost or released."""
        return self.lost.done()

    def register(self, registration: Registration) -> None:
        """Register a learner, which its next call makes."""
        self.registrations[registration.client_id] = registration

    def touch(self, client_id: str) -> None:
        """Move a registration behind the others, of which the first is the least recently used."""
        self.registrations[client_id] = self.registrations.pop(client_id)

    def forget(self, client_id: str) -> None:
        """Let it drop a learner. All calls of the learner must have ended."""
        if self.registrations.pop(client_id, None) is not None:
            self.confirmed.discard(client_id)
            if self.client is not None:
                self.client.forget(client_id)

    def submit(self, call: Call) -> Coroutine[Any, Any, Outcome]:
        """Run a call of a registered learner, or join it. Returns its (first) outcome.

        Raises:
            WorkerGone: If the worker is lost.
            UndeliverableError: If RPC cannot carry the call or its answer.
        """
        self.sent[call.call_id] = 1
        if call.trace is not None:
            call.trace.sent(self.label)

        def send(client: WorkerClient) -> asyncio.Future[Outcome]:
            client.register(self.registrations[call.client_id])
            return client.submit(call)

        return self._ask(call, send, sent_at=time.perf_counter())

    def run_batch(self, batch: Batch) -> Coroutine[Any, Any, Outcome]:
        """Run a batch, or join it; as of `submit`."""
        self.sent[batch.call_id] = len(batch.calls)
        batch.sent(self.label)

        def send(client: WorkerClient) -> asyncio.Future[Outcome]:
            client.register_all(batch, self.registrations)
            return client.run_batch(batch)

        return self._ask(batch, send)

    def advance(self, request: Call | Batch, step: int, sent: Packed | None = None) -> Coroutine[Any, Any, Outcome]:
        """Ask an open stream for its item number ``step``, or a watched batch for the calls ended since then.

        Args:
            request: The call of the stream, or the batch.
            step: Number of the item, from 0.
            sent: Value that is sent into the stream's generator, if any.

        Raises:
            WorkerGone: If the worker is lost.
            UndeliverableError: If RPC cannot carry the answer.
        """
        if isinstance(request, Call) and request.trace is not None:
            request.trace.sent(self.label)
        return self._ask(request, lambda client: client.advance(request, step, sent))

    def cancel_batch(self, batch: Batch) -> None:
        """Cancel the calls of a batch that have not ended; its final outcome has the results of the others."""
        self._cancelled.add(batch.call_id)
        if self.client is not None:
            self.client.cancel_batch(batch)

    def take_back(self, request: TakeBack) -> Coroutine[Any, Any, Outcome]:
        """Request calls back that have not begun; the outcome has their ids. Errors are those of `advance`."""
        self.sent[request.call_id] = 0
        return self._ask(request, lambda client: client.take_back(request))

    async def cancel(self, call: Call) -> Outcome:
        """Cancel a call. Returns its outcome. Errors are those of `advance`."""
        if (outcome := self._unread.pop(call.call_id, None)) is None:
            outcome = await self._ask(call, lambda client: client.cancel(call))
        self.sent.pop(call.call_id, None)
        return outcome

    async def _ask(
        self, request: Request, send: Callable[[WorkerClient], asyncio.Future[Outcome]], sent_at: float | None = None
    ) -> Outcome:
        """Send a request in the present world, and in each later one until an answer comes.

        Args:
            request: The request.
            send: Sends it.
            sent_at: The present time, if the clocks are to be compared by it.
        """
        while True:
            client = self.client or await self._next_client()
            answer = send(client)
            if self._cancelled and isinstance(request, Batch) and request.call_id in self._cancelled:
                client.cancel_batch(request)
            try:
                outcome = await answer
            except WorldOver:
                sent_at = None
                continue
            except BaseException as error:
                self._fail(request, answer, error)
                raise
            if (stamps := outcome.stamps) is not None:
                self.busy_s += stamps[2] - stamps[1]
                if sent_at is not None:
                    self.clock.note(sent_at, stamps)
                if isinstance(request, Call) and request.trace is not None:
                    request.trace.answered(stamps, self.clock.offset_s)
            if outcome.kind != "item":
                self.sent.pop(request.call_id, None)
                self._cancelled.discard(request.call_id)
                for _, ended in outcome.of_calls:
                    if ended.stamps is not None:
                        self.busy_s += ended.stamps[2] - ended.stamps[1]
            return outcome

    def _fail(self, request: Request, answer: asyncio.Future[Outcome], error: BaseException) -> None:
        """Note that the caller of a request gets an error.

        If the caller was cancelled in the very tick in which the outcome came, the worker may have forgotten it
        already: `cancel` returns it.
        """
        if isinstance(error, UndeliverableError):
            self.sent.pop(request.call_id, None)
        elif answer.done() and not answer.cancelled() and answer.exception() is None:
            outcome = answer.result()
            if outcome.is_final:
                self._unread[request.call_id] = outcome

    async def _next_client(self) -> WorkerClient:
        """Wait for the next world of this worker.

        Raises:
            WorkerGone: If the worker is lost.
        """
        while self.client is None:
            if self.lost.done():
                raise self.gone()
            await self._changed.wait()
        return self.client

    async def tell(self, message: Message) -> Message:
        """Send a message by the control link, and await the answer.

        Raises:
            ConfigError: If the worker cannot prepare for a run.
            RefusalError: If it cannot carry out another message.
            WorkerLostError: If the link ended, or the answer is malformed.
        """
        async with self._turn:
            answer = await self.link.request(message, self.label)
        match answer:
            case {"error": str(reason), "traceback": str(traceback)}:
                kind = ConfigError if message["do"] == "prepare" else RefusalError
                error = kind(f"{self.label} could not {message['do']}: {in_short(reason)}")
                error.add_note(in_short(traceback))
                raise error
            case {"error": _}:
                raise self.misunderstood(message)
        return answer

    def adopt(self, answer: Message) -> bool:
        """Take the answer of a prepared worker. Returns whether it has the right form."""
        match answer:
            case {
                "device": str(device),
                "visible_gpus": str() | None as visible_gpus,
                "sees_files": bool(sees_files),
                "files": [_, [_]] | None as files,
                "problems": list(problems),
                "process_id": int(process_id),
            } if _DEVICE.fullmatch(device) and all(isinstance(problem, str) for problem in problems):
                self.device, self.visible_gpus, self.sees_files = device, visible_gpus, sees_files
                self.pid = files[0] if files is not None and TensorFiles.is_found(*files) else None
                self.process_id = process_id
                self.clock.is_common = self.pid is not None or self.process is not None
                return True
        return False

    def misunderstood(self, message: Message) -> WorkerLostError:
        """Return the error of an answer that has another form."""
        return WorkerLostError(
            f"{self.label} was told to {message['do']}, and its answer is not of the form that this version of "
            f"torchfedrpc sends; it is given up"
        )
