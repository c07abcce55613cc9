"""Queue of a worker's answers in one world: each request is answered with all outcomes and reports that are ready."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from torchfedrpc.host.call import Call, Outcome
from torchfedrpc.rpc.message import MappedDevices, outcome_message, report_message
from torchfedrpc.rpc.rrefs import OwnedRRefs
from torchfedrpc.wire.packing import Packed, Parcel

Reported = tuple[Call, int, Packed]  # arguments of a `Report`

_MAX_BYTES = 1 << 20  # in one message after its first answer, so that large outcomes do not delay the others


@dataclass(slots=True)
class _Answer:
    message: Any
    parcel: Packed | None = None
    reported: Reported | None = None
    future: Any = None  # of the request to answer with this alone, if any


class Answers:
    """Answers of a worker in the order in which they became ready, and the open requests that will carry them.

    A request is answered as soon as one answer is ready, with all that are ready then. So outcomes of calls that end
    in quick succession share a message, and none waits for a slower call. Thread-safe; only `close` may block.

    Args:
        device: The worker's device; futures are bound to its streams.
        covered: Devices of the worker that the world's device map connects with the driver.
        rrefs: RRefs of the worker's learners; each answer carries those that were not sent yet.
        unheard: Reports of earlier worlds that the driver may not have received; they are sent first.
    """

    def __init__(
        self, device: torch.device, covered: MappedDevices, rrefs: OwnedRRefs, unheard: Iterable[Reported] = ()
    ) -> None:
        self._devices: list[Any] = [device] if device.type == "cuda" else []
        self._covered = covered
        self._rrefs = rrefs
        self._lock = threading.Lock()  # guards what follows
        self._telling = threading.Lock()  # held by the thread that answers requests
        self._ready: deque[_Answer] = deque()
        self._waiting: deque[Any] = deque()
        self._alone: dict[int, Any] = {}  # number of a question -> future of the request to answer with it alone
        self._told: deque[tuple[int, Reported]] = deque()  # reports, by the number of the message that carries them
        self._number = 0
        self._is_open = True
        for reported in unheard:
            self._ready.append(_of_report(reported))

    def request(self, alone: int | None = None) -> Any:
        """Return the future of a request, whose value `torch.distributed.rpc` sends back.

        Args:
            alone: Number of the only question of the request, if the answer to this request is to carry the outcome
                of that question alone; None for any answers.
        """
        future: Any = torch.futures.Future(devices=self._devices)
        with self._lock:
            if not self._is_open:
                future.set_result(None)
                return future
            if alone is not None:
                self._alone[alone] = future
                return future
            self._waiting.append(future)
        self._tell()
        return future

    def outcome(self, question: int, outcome: Outcome) -> None:
        """Answer a question. Ignored if the world is over: the driver asks again in the next one."""
        message = (question, outcome_message(outcome, self._covered))
        with self._lock:
            if not self._is_open:
                return
            self._ready.append(_Answer(message, outcome.parcel, future=self._alone.pop(question, None)))
        self._tell()

    def report(self, reported: Reported) -> None:
        """Send a report of progress."""
        answer = _of_report(reported)
        with self._lock:
            self._ready.append(answer)
        self._tell()

    def heard(self, number: int) -> None:
        """Note how many messages have arrived at the driver. Their reports are not sent again."""
        with self._lock:
            while self._told and self._told[0][0] < number:
                self._told.popleft()

    def close(self) -> list[Reported]:
        """Answer all open requests with None, and stop. A future must not be settled after RPC's agent is gone.

        Returns:
            Reports that the driver may not have received.
        """
        with self._telling, self._lock:
            self._is_open = False
            unanswered = [*self._waiting, *self._alone.values()]
            unanswered += [answer.future for answer in self._ready if answer.future is not None]
            self._waiting.clear()
            self._alone.clear()
            unheard = [reported for _, reported in self._told]
            unheard += [answer.reported for answer in self._ready if answer.reported is not None]
            self._ready.clear()
        for future in unanswered:
            future.set_result(None)
        return unheard

    def _tell(self) -> None:
        """Answer requests as long as answers are ready, unless another thread does so."""
        while True:
            with self._lock:
                if not self._ready or not (self._waiting or self._ready[0].future is not None):
                    return
                if not self._telling.acquire(blocking=False):
                    return
                taken = [self._ready.popleft()]
                future = taken[0].future
                if future is None:
                    future, num_bytes = self._waiting.popleft(), 0
                    while self._ready and self._ready[0].future is None:
                        num_bytes += parcel.num_bytes if (parcel := self._ready[0].parcel) is not None else 0
                        if num_bytes > _MAX_BYTES:
                            break
                        taken.append(self._ready.popleft())
                number, self._number = self._number, self._number + 1
                for answer in taken:
                    if answer.reported is not None:
                        self._told.append((number, answer.reported))
            try:
                for answer in taken:
                    if isinstance(answer.parcel, Parcel) and answer.parcel.ready is not None:
                        answer.parcel.ready.wait()  # orders this thread's CUDA streams behind the method's
                future.set_result((number, [answer.message for answer in taken], self._rrefs.untold()))
            finally:
                self._telling.release()


def _of_report(reported: Reported) -> _Answer:
    call, number, progress = reported
    return _Answer((None, report_message(call, number, progress)), reported=reported)
