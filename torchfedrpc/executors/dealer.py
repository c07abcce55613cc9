"""Dealing of stateless calls to workers, by expected durations and by work stealing."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Container, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchfedrpc.errors import WorkerLostError
from torchfedrpc.executors.division import in_ranges, one_by_one
from torchfedrpc.executors.eligible_workers import EligibleWorkers
from torchfedrpc.executors.session import Run
from torchfedrpc.host.call import Call, Registration, TakeBack
from torchfedrpc.rpc.member import Member, WorkerGone
from torchfedrpc.rpc.worker_client import UndeliverableError
from torchfedrpc.rpc.workers import Workers
from torchfedrpc.wire.packing import pack_nothing

logger = logging.getLogger(__name__)

_UNKNOWN_S = 0.001  # expected duration of a call of a method of which none has ended
_MIN_TAKEN_S = 0.003  # least expected work to take: a request and its answer cost about 1 ms of CPU on either side
_MIN_LATE_S = 0.01  # how late a worker is at least before others steal from it: rounds of 20 ms often end 5 ms late
_OBEYED_S = 0.01  # in which a method is expected to end after its cancellation
_STUCK_S = 3600.0  # expected work of a worker with a method that ignores its cancellation

Returned = tuple[list[int], Member | None]
"""Places of calls to deal again, and the worker that gave them back (None if it was lost, or has failed)."""


@dataclass(eq=False, slots=True)
class Assignment:
    """Calls that were given to a worker together.

    Attributes:
        worker: The worker.
        calls: Place -> call, of the calls that have not been given back.
        seconds: Place -> expected duration.
        returned: Receives the places of calls that are given back; None for a session's call, which has an outcome.
        is_stream: Whether its only call is a stream, which is idle between its steps.
        is_range: Whether the calls are of neighbouring clients.
    """

    worker: Member
    calls: dict[int, Call]
    seconds: dict[int, float]
    returned: asyncio.Queue[Returned] | None = None
    is_stream: bool = False
    is_range: bool = False


@dataclass(eq=False, slots=True)
class _Load:
    """The calls that a worker has.

    Attributes:
        assignments: Those that have not ended, in the order in which they were given.
        num_calls: Number of their calls, without streams.
        seconds: Expected duration of these.
        began_at: When the first one is assumed to have begun, by the monotonic clock.
        num_stuck: Number of methods that were cut off and have not ended.
        stuck_since: When the first one of these was cut off.
        is_taking: Whether a request to give calls back is on its way.
        has_none_waiting: Whether the last such request found that all calls had begun.
        is_free: Set while nothing runs or waits.
    """

    assignments: dict[Assignment, None] = field(default_factory=dict)
    num_calls: int = 0
    seconds: float = 0.0
    began_at: float = 0.0
    num_stuck: int = 0
    stuck_since: float = 0.0
    is_taking: bool = False
    has_none_waiting: bool = False
    is_free: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_idle(self) -> bool:
        """Whether it has no calls except streams."""
        return not (self.num_calls or self.num_stuck)

    def remaining_s(self, now: float) -> float:
        """Return the expected seconds until the worker is idle.

        A worker that is late is expected to need as long as it is late, and at least half of the mean duration of its
        calls.
        """
        if self.num_stuck:
            return _STUCK_S if now - self.stuck_since > _OBEYED_S else _OBEYED_S + self.seconds
        if not self.num_calls:
            return 0.0
        return max(abs(self.seconds - (now - self.began_at)), self.seconds / self.num_calls / 2)


class Dealer:
    """Gives calls to workers, and lets an idle worker steal calls from the busiest one.

    Args:
        run: The run.
        workers: The table of workers.
        eligible: The workers that may run the calls of a client.
        max_learners: Number of learners beyond which a worker forgets those without calls; None for any number.
        busy: Clients with calls.

    Attributes:
        eligible: The workers that may run the calls of a client.
    """

    def __init__(
        self,
        run: Run,
        workers: Workers,
        eligible: EligibleWorkers,
        max_learners: int | None = None,
        busy: Container[str] = (),
    ) -> None:
        self.eligible = eligible
        self._run = run
        self._workers = workers
        self._max_learners = max_learners
        self._busy = busy
        self._loads: dict[Member, _Load] = {}
        self._num_calls = 0  # on all workers
        self._timer: asyncio.TimerHandle | None = None  # of the next look at late workers
        self._last: dict[str, str] = {}  # client -> name of the worker of its last call

    # Calls.

    async def assign(self, call: Call, without: Member | None = None) -> Assignment:
        """Give a call to the worker with the least expected work.

        Args:
            call: The call.
            without: Worker that has given it back, which does not get it unless no other accepts it.

        Raises:
            WorkerLostError: If no worker that may run it is left, and none is expected.
            SerializationError: If the constructor's arguments cannot be sent.
        """
        seconds = self._expected_s(call)
        while (worker := self.least_busy(call.client_id, seconds, without)) is None:
            if (reason := self.eligible.why_none(call.client_id)) is not None:
                raise WorkerLostError(reason)
            await self._workers.next_change()
        self.register(worker, call.client_id)
        is_stream = call.kind == "stream"
        assignment = self._give(Assignment(worker, {0: call}, {0: 0.0 if is_stream else seconds}, None, is_stream))
        if without is not None:
            self.rebalance()  # other workers may be idle yet
        return assignment

    def deal(
        self,
        calls: Mapping[int, Call],
        returned: asyncio.Queue[Returned],
        *,
        are_ranges: bool = True,
        without: Member | None = None,
    ) -> tuple[list[Assignment], dict[int, Exception]]:
        """Give calls to the workers that accept them now.

        Args:
            calls: Place -> call, in the order in which each worker is to begin its own.
            returned: Receives the places of calls that a worker gives back.
            are_ranges: Whether each worker has neighbours, so that it merges most of their results. Otherwise the
                calls begin in the given order on whichever worker is free.
            without: Worker that gets none of them, unless no other accepts them.

        Returns:
            The calls of each worker, and the errors of calls whose learners' arguments cannot be sent. A call that no
            worker accepts now is in neither.
        """
        now, of_workers = time.monotonic(), dict[Member, list[int]]()
        seconds = {place: self._expected_s(call) for place, call in calls.items()}
        remaining = defaultdict(float, {worker: load.remaining_s(now) for worker, load in self._loads.items()})
        divide = in_ranges if are_ranges else one_by_one
        for workers, places in self._by_workers(calls, without):
            for worker, own in divide(workers, {place: seconds[place] for place in places}, remaining):
                of_workers.setdefault(worker, []).extend(own)
        order = {place: position for position, place in enumerate(calls)}
        assignments: list[Assignment] = []
        errors: dict[int, Exception] = {}
        for worker, places in of_workers.items():
            errors |= (failed := self._register_all(worker, {place: calls[place].client_id for place in places}))
            if own := sorted((place for place in places if place not in failed), key=order.__getitem__):
                own_s = {place: seconds[place] for place in own}
                own_calls = {place: calls[place] for place in own}
                assignments.append(self._give(Assignment(worker, own_calls, own_s, returned, is_range=are_ranges)))
        return assignments, errors

    def end(self, assignment: Assignment) -> None:
        """Note that calls have ended, or will have no answer. An idle worker takes calls from others."""
        load = self._loads[assignment.worker]
        if assignment is next((one for one in load.assignments if not one.is_stream), None):
            load.began_at = time.monotonic()
        del load.assignments[assignment]
        if not assignment.is_stream:
            load.num_calls -= len(assignment.calls)
            self._num_calls -= len(assignment.calls)
        load.seconds -= sum(assignment.seconds.values())
        self._ended(assignment.worker, load)

    def _ended(self, worker: Member, load: _Load) -> None:
        load.has_none_waiting = False
        if not load.is_idle:
            if load.num_stuck:  # the others wait for a method that ignores its cancellation
                self.rebalance()
            return
        if not load.assignments:
            load.is_free.set()
            if worker.is_gone:
                del self._loads[worker]
        if self._num_calls:
            self.rebalance()
        elif self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def hold(self, call: Call) -> Coroutine[Any, Any, None]:
        """Give no calls to the worker of a call that was cut off, while another is there, until its method ends.

        Returns:
            A coroutine that waits for that end.
        """
        label = self._last.get(call.client_id)
        worker = next((one for one in self._loads if one.label == label and not one.is_gone), None)
        if worker is None:
            return asyncio.sleep(0)
        load = self._loads[worker]
        load.stuck_since = load.stuck_since if load.num_stuck else time.monotonic()
        load.num_stuck += 1
        load.is_free.clear()
        return self._until_free(worker, load, call)

    async def _until_free(self, worker: Member, load: _Load, call: Call) -> None:
        """Wait for the end of the learner's calls on a worker."""
        call_id = self._run.next_call_id()
        try:
            await worker.submit(Call(call_id, call.client_id, call.method, pack_nothing(), kind="barrier", number=0))
        except (WorkerGone, UndeliverableError):
            return
        finally:
            load.num_stuck -= 1
            load.began_at = time.monotonic()
            self._ended(worker, load)

    def next_change(self) -> Coroutine[Any, Any, object]:
        """Return a coroutine that waits until a worker accepts calls, or no longer does, after this call."""
        return self._workers.next_change()

    async def clear(self, worker: Member) -> None:
        """Take all calls back that a worker has not begun, and wait until the others have ended."""
        load = self._loads.get(worker)
        if load is not None and not load.is_free.is_set():
            load.is_taking = True
            await self._take_back(worker, load, list(_calls_of(load)), half=False)
            await load.is_free.wait()

    # Workers.

    def last_worker(self, client_id: str) -> Member | None:
        """Return the worker that a client was last called on; None if there is none, or it is not there any more."""
        return self._workers.present.get(self._last.get(client_id, ""))

    def label_of(self, client_id: str) -> str:
        """Return the name of the worker that a client was last called on, else of one that would be."""
        if (label := self._last.get(client_id)) is not None:
            return label
        worker = self.least_busy(client_id)
        return worker.label if worker is not None else "no worker"

    def least_busy(self, client_id: str, seconds: float = _UNKNOWN_S, without: Member | None = None) -> Member | None:
        """Return the worker that is expected to end a client's next call first.

        Each other busy worker of a GPU is assumed to slow a call down by the call's own duration.

        Args:
            client_id: The client.
            seconds: Expected duration of the call.
            without: Worker that is not returned unless no other accepts the client's calls.

        Returns:
            The worker; None if no worker accepts the client's calls now.
        """
        workers = self.eligible.of(client_id)
        if without is not None:
            workers = [worker for worker in workers if worker is not without] or workers
        if len(workers) < 2:
            return workers[0] if workers else None
        now = time.monotonic()
        num_busy = Counter(_gpu(worker) for worker, load in self._loads.items() if not load.is_idle)

        def rank(worker: Member) -> tuple[float, int]:
            load = self._loads.get(worker)
            own_s = load.remaining_s(now) if load is not None else 0.0
            if (gpu := _gpu(worker)) is not None:
                own_s += seconds * (num_busy[gpu] - (own_s > 0))
            return own_s, len(load.assignments) if load is not None else 0

        return min(workers, key=rank)

    def register(self, worker: Member, client_id: str) -> None:
        """Register a learner with a worker, unless it is. Beyond the limit, the worker forgets idle ones.

        Raises:
            SerializationError: If the constructor's arguments cannot be sent.
        """
        if self._add(worker, client_id):
            self._forget_idle(worker, but=client_id)

    def _register_all(self, worker: Member, clients: Mapping[int, str]) -> dict[int, Exception]:
        """Register the learners of several clients, by place. Returns the errors by place."""
        errors: dict[int, Exception] = {}
        for place, client_id in clients.items():
            try:
                self._add(worker, client_id)
            except Exception as error:  # such as one of memory
                errors[place] = error
        self._forget_idle(worker)
        return errors

    def _add(self, worker: Member, client_id: str) -> bool:
        """Register a learner, or note that it is called again; return whether it is new."""
        is_new = client_id not in worker.registrations
        if is_new:
            worker.register(Registration(client_id, self._run.constructor(client_id), 1))
        elif self._max_learners is not None:
            worker.touch(client_id)
        return is_new

    def _forget_idle(self, worker: Member, but: str | None = None) -> None:
        """Let a worker forget learners without calls, beyond the limit, the least recently called first."""
        registered = worker.registrations
        if self._max_learners is not None and len(registered) > self._max_learners:
            idle = (client_id for client_id in registered if client_id != but and client_id not in self._busy)
            for client_id in list(itertools.islice(idle, len(registered) - self._max_learners)):
                worker.forget(client_id)

    def _expected_s(self, call: Call) -> float:
        return self._run.durations.of_call(call) or _UNKNOWN_S

    def _remaining_s(self, worker: Member, now: float) -> float:
        load = self._loads.get(worker)
        return load.remaining_s(now) if load is not None else 0.0

    def _remaining_of_gpu_s(self, worker: Member, now: float) -> float:
        """Return the expected seconds of work of all workers on a worker's GPU; 0 without a GPU."""
        if (gpu := _gpu(worker)) is None:
            return 0.0
        return sum(load.remaining_s(now) for other, load in self._loads.items() if _gpu(other) == gpu)

    def _by_workers(self, calls: Mapping[int, Call], without: Member | None) -> list[tuple[list[Member], list[int]]]:
        """Group calls by the workers that accept them: the workers, and the places in the order of the calls."""
        groups: dict[tuple[str, ...], tuple[list[Member], list[int]]] = {}
        of_endpoints: dict[str | None, list[int]] = {}  # endpoint -> places in the group of its workers
        for place, call in calls.items():
            endpoint = self.eligible.endpoint(call.client_id)
            if endpoint not in of_endpoints:
                workers = self.eligible.of(call.client_id)
                key = tuple(worker.label for worker in workers)
                if key not in groups:
                    others = [worker for worker in workers if worker is not without]
                    groups[key] = self._alternating(others or workers), []
                of_endpoints[endpoint] = groups[key][1]
            of_endpoints[endpoint].append(place)
        there = (group for group in groups.values() if group[0])
        return sorted(there, key=lambda group: len(group[0]))  # those with a choice last

    def _alternating(self, workers: Iterable[Member]) -> list[Member]:
        """Return workers in an order in which neighbours have different devices, those with the least work first."""
        num_before: Counter[tuple[str, str]] = Counter()
        keyed = []
        now = time.monotonic()
        for worker in workers:
            device = _gpu(worker) or (worker.machine, worker.label)
            keyed.append((num_before[device], self._remaining_of_gpu_s(worker, now), worker))
            num_before[device] += 1
        return [worker for _, _, worker in sorted(keyed, key=lambda entry: entry[:2])]

    def _give(self, assignment: Assignment) -> Assignment:
        worker, calls = assignment.worker, assignment.calls
        for call in calls.values():
            self._last[call.client_id] = worker.label
        load = self._loads.get(worker)
        if load is None:
            load = self._loads[worker] = _Load()
        if not load.num_calls:
            load.began_at, load.seconds = time.monotonic(), 0.0
        load.is_free.clear()
        load.assignments[assignment] = None
        if not assignment.is_stream:
            load.num_calls += len(calls)
            self._num_calls += len(calls)
        load.seconds += sum(assignment.seconds.values())
        load.has_none_waiting = False
        return assignment

    # Calls that are taken back.

    def rebalance(self) -> None:
        """Let each idle worker steal calls from another, the busiest first; look again when the next one is late."""
        now, look_in_s, worth = time.monotonic(), math.inf, list[tuple[float, Member, _Load]]()
        for worker, load in list(self._loads.items()):
            if worker.is_gone and not load.assignments and not load.num_stuck:
                del self._loads[worker]
            is_alone = load.num_calls + load.num_stuck < 2 and len(load.assignments) < 2
            if load.is_taking or load.has_none_waiting or worker.is_gone or is_alone:
                continue
            one_s = load.seconds / max(load.num_calls, 1)  # the running call stays
            remaining_s = load.seconds - (now - load.began_at)
            late_s = max(one_s, _MIN_LATE_S)
            if load.num_stuck or remaining_s > max(one_s, _MIN_TAKEN_S) or -remaining_s > late_s:
                worth.append((abs(remaining_s), worker, load))  # one that is so late may take much longer yet
            else:
                look_in_s = min(look_in_s, remaining_s + late_s)
        worth.sort(key=lambda entry: entry[0])
        idle = [one for one in self._workers.present.values() if not self._remaining_s(one, now)]
        while idle and worth:
            _, worker, load = worth.pop()
            running = None if load.num_stuck else next(_calls_of(load), None)  # as far as the driver knows
            for taker in idle:
                candidates = [pair for pair in _calls_of(load) if self.eligible.accepts(taker, _client_of(pair))]
                if not any(one.is_range for one, _ in candidates):
                    # The worker gives the later half of the list back: here every second call, in order.
                    candidates = candidates[::2] + candidates[1::2]
                if len(candidates) > (running in candidates):
                    idle.remove(taker)
                    load.is_taking = True
                    self._run.in_background(self._take_back(worker, load, candidates, half=True))
                    break
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if idle and look_in_s < math.inf:
            self._timer = asyncio.get_running_loop().call_later(look_in_s, self.rebalance)

    async def _take_back(
        self, worker: Member, load: _Load, candidates: Sequence[tuple[Assignment, int]], *, half: bool
    ) -> int:
        """Request calls back, and return how many were given back."""
        asked = {one.calls[place].call_id: (one, place) for one, place in candidates if place in one.calls}
        try:
            outcome = await worker.take_back(TakeBack(self._run.next_call_id(), tuple(asked), half))
        except (WorkerGone, UndeliverableError):  # the calls themselves meet the loss
            return 0
        finally:
            load.is_taking = False
        if outcome.kind != "value":
            logger.warning("%s gives no calls back: %s", worker.label, outcome.error)
        given: dict[Assignment, list[int]] = {}
        for call_id, _ in outcome.of_calls:
            one, place = asked.get(call_id, (None, 0))
            if one is not None and one in load.assignments and place in one.calls:
                given.setdefault(one, []).append(place)
        for one, places in given.items():
            if one.returned is not None:  # else the session of the call ends it
                for place in places:
                    del one.calls[place]
                    load.seconds -= one.seconds.pop(place)
                load.num_calls -= len(places)
                self._num_calls -= len(places)
                one.returned.put_nowait((places, worker))
        if not given and load.assignments:
            load.has_none_waiting = True
            self.rebalance()
        return sum(map(len, given.values()))


def _gpu(worker: Member) -> tuple[str, str] | None:
    """Return the machine and device of a worker's GPU; None without one."""
    return (worker.machine, worker.device) if worker.device != "cpu" else None


def _client_of(pair: tuple[Assignment, int]) -> str:
    assignment, place = pair
    return assignment.calls[place].client_id


def _calls_of(load: _Load) -> Iterator[tuple[Assignment, int]]:
    return ((one, place) for one in load.assignments for place in one.calls)
