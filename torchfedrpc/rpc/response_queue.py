"""What a worker has to tell its driver in one world: outcomes and reports, as many as are there for each request."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from torchfedrpc.host.call import Call, Outcome
from torchfedrpc.rpc.message import MappedDevices, outcome_message, report_message
from torchfedrpc.rpc.rrefs import OwnedRRefs
from torchfedrpc.wire.packing import Packed, Parcel

Reported = tuple[Call, int, Packed]  # as a `Report` takes it

_MAX_BYTES = 1 << 20  # in one message, beside its first answer: large ones are not to keep the others waiting


@dataclass(frozen=True, slots=True)
class _Answer:
    message: Any
    num_bytes: int = 0
    ready: Callable[[], None] | None = None
    reported: Reported | None = None
    future: Any = None  # its own, where it goes alone


class Answers:
    """Answers of a worker, in the order in which they came about, and the requests that wait to carry them.

    A request is answered as soon as there is anything to tell, with all there is: so the answers to calls that end
    in quick succession share a message, and none waits for a slower one. Any thread may call any method; none waits,
    but `close`.

    Args:
        device: the worker's device, whose streams a future takes along.
        covered: the worker's devices that the world's device map takes to the driver.
        rrefs: of the worker's learners; what the driver has not been told of them goes along with each answer.
        unheard: reports that the driver may not have heard in earlier worlds; they come first.
    """

    def __init__(
        self, device: torch.device, covered: MappedDevices, rrefs: OwnedRRefs, unheard: Iterable[Reported] = ()
    ) -> None:
        self._devices: list[Any] = [device] if device.type == "cuda" else []
        self._covered = covered
        self._rrefs = rrefs
        self._lock = threading.Lock()  # guards what follows
        self._telling = threading.Lock()  # held by the one thread that answers requests
        self._ready: deque[_Answer] = deque()
        self._waiting: deque[Any] = deque()
        self._alone: dict[int, Any] = {}  # number of a question -> its own future
        self._told: deque[tuple[int, Reported]] = deque()  # reports, by the number of the message that has them
        self._number = 0
        self._is_open = True
        for reported in unheard:
            self._ready.append(_of_report(reported))

    def request(self, alone: int | None = None) -> Any:
        """The future of a request, which `torch.distributed.rpc` sends back when it is settled.

        Args:
            alone: number of the one question in it, where its outcome is to come alone in the answer to this very
                request.
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
        """Answer a question; in vain where the world is over, in whose successor it is asked again."""
        parcel = outcome.parcel
        ready = parcel.ready if isinstance(parcel, Parcel) else None
        num_bytes = parcel.num_bytes if parcel is not None else 0
        message = (question, outcome_message(outcome, self._covered))
        with self._lock:
            if not self._is_open:
                return
            self._ready.append(_Answer(message, num_bytes, ready, future=self._alone.pop(question, None)))
        self._tell()

    def report(self, reported: Reported) -> None:
        """Tell what a method reports."""
        answer = _of_report(reported)
        with self._lock:
            self._ready.append(answer)
        self._tell()

    def heard(self, number: int) -> None:
        """So many messages have arrived: their reports need not be told again."""
        with self._lock:
            while self._told and self._told[0][0] < number:
                self._told.popleft()

    def close(self) -> list[Reported]:
        """Answer nobody any more; gives the reports that the driver has not heard, as far as is known.

        RPC must not be left with a future that may be settled after its agent is gone.
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
        while self._can_tell() and self._telling.acquire(blocking=False):
            try:
                self._settle_one()
            finally:
                self._telling.release()

    def _can_tell(self) -> bool:
        return bool(self._ready and (self._waiting or self._ready[0].future is not None))

    def _settle_one(self) -> None:
        with self._lock:
            if not self._can_tell():
                return
            taken = [self._ready.popleft()]
            future = taken[0].future
            if future is None:
                future, num_bytes = self._waiting.popleft(), 0
                while self._ready and self._ready[0].future is None:
                    num_bytes += self._ready[0].num_bytes
                    if num_bytes > _MAX_BYTES:
                        break
                    taken.append(self._ready.popleft())
            number, self._number = self._number, self._number + 1
            self._told += [(number, answer.reported) for answer in taken if answer.reported is not None]
        for answer in taken:
            if answer.ready is not None:
                answer.ready()  # whichever thread this is, it sends what the method's thread has made
        future.set_result((number, [answer.message for answer in taken], self._rrefs.untold()))


def _of_report(reported: Reported) -> _Answer:
    call, number, progress = reported
    return _Answer((None, report_message(call, number, progress)), reported=reported)
