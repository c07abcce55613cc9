"""Fault injection for tests: kill, freeze, sever or slow a worker at its n-th call, or the driver at a round."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from torchfedrpc.errors import ConfigError, WorkerLostError
from torchfedrpc.events import Event, RoundStarted, WorkerLost
from torchfedrpc.host.faults import Fault, FaultKind, check_seconds, freeze, is_count, kill
from torchfedrpc.proxy import LearnerProxy

DRIVER = "driver"


@dataclass(frozen=True)
class DriverFault:
    """Fault of the driver at the start of a round.

    Attributes:
        kind: ``kill``, ``freeze`` or ``slow``.
        at_round: The number of the round, from 0.
        seconds: Seconds for which the process is frozen, or its event loop blocked.
    """

    kind: FaultKind
    at_round: int
    seconds: float

    def strike(self) -> None:
        """Inject the fault into this process."""
        if self.kind == "kill":
            kill()
        elif self.kind == "freeze":
            freeze(self.seconds)
        else:
            time.sleep(self.seconds)


@dataclass(frozen=True)
class Faults:
    """Faults to inject into a run. Each method returns a new object with one more fault.

        faults = Faults().kill("worker1", at_call=5).slow("worker2", at_call=1, seconds=0.2)
        async with LearnerProxy(...) as proxy, faults.injected(proxy):
            ...

    Workers have the names of error messages: ``worker1``, ``worker2``, ..., and ``local`` for learners in the
    driver's process. ``at_call`` counts, from 1, the calls that begin on a worker while the faults are injected; a
    process that replaces a lost worker has no faults. The driver is named ``driver``. ``at_round`` is the
    ``round_num`` of `RoundStarted`, from 0. The trainer's ``rounds()`` publishes this event; a trainer with another
    loop has to publish it too.

    All methods raise `ConfigError` if the fault is invalid.
    """

    of_workers: tuple[tuple[str, Fault], ...] = ()
    of_driver: tuple[DriverFault, ...] = ()

    def kill(self, target: str, *, at_call: int | None = None, at_round: int | None = None) -> Faults:
        """Kill a worker (SIGKILL) at the start of its call number ``at_call``, or the driver at a round."""
        return self._with("kill", target, at_call, at_round)

    def freeze(
        self, target: str, *, at_call: int | None = None, at_round: int | None = None, seconds: float = 0.0
    ) -> Faults:
        """Stop a worker (SIGSTOP) at the start of its call number ``at_call``, or the driver at a round.

        Args:
            target: Name of a worker, or ``driver``.
            at_call: For a worker: Number of the call, from 1.
            at_round: For the driver: Number of the round, from 0.
            seconds: Duration of the stop; 0 stops forever. 0 is refused for the driver, since the test would hang.
        """
        return self._with("freeze", target, at_call, at_round, seconds)

    def sever(self, target: str, *, at_call: int) -> Faults:
        """Stop the heartbeat of a worker at the start of its call number ``at_call``; the worker runs on."""
        return self._with("sever", target, at_call, None)

    def slow(self, target: str, *, at_call: int | None = None, at_round: int | None = None, seconds: float) -> Faults:
        """Delay each call of a worker, or block the driver's event loop at a round.

        Args:
            target: Name of a worker, including ``local``, or ``driver``.
            at_call: For a worker: Number of the first delayed call, from 1.
            at_round: For the driver: Number of the round, from 0.
            seconds: Delay of each call, or duration for which the event loop is blocked.
        """
        return self._with("slow", target, at_call, at_round, seconds)

    @contextlib.asynccontextmanager
    async def injected(self, proxy: LearnerProxy) -> AsyncIterator[None]:
        """Inject these faults into an open proxy's run until the block ends; they replace all earlier ones.

        Raises:
            ConfigError: If the run has no such worker, or its mode does not support such a fault.
            AssertionError: If a ``kill`` has not struck by the end of the block, since the worker ran fewer calls.
        """
        proxy._calls.check_open()
        router, of_worker = proxy._router, defaultdict[str, list[Fault]](list)
        for worker, fault in self.of_workers:
            of_worker[worker].append(fault)
        await router.arm(of_worker)
        lost: set[str] = set()

        def notice(event: Event) -> None:
            if isinstance(event, WorkerLost):
                lost.add(event.worker)
            self._strike_driver(event)

        unsubscribe = proxy.subscribe(notice)
        try:
            yield
            for worker, fault in self.of_workers:
                if fault.kind == "kill" and worker not in lost:
                    raise AssertionError(f"{worker} was to be killed at its call {fault.at_call}, which never came")
        finally:
            unsubscribe()
            for worker in of_worker.keys() & set(router.workers()):  # the others were lost and not replaced
                with contextlib.suppress(WorkerLostError):  # the injected fault
                    await router.arm({worker: []})

    def _strike_driver(self, event: Event) -> None:
        if isinstance(event, RoundStarted):
            for fault in self.of_driver:
                if fault.at_round == event.round_num:
                    fault.strike()

    def _with(
        self, kind: FaultKind, target: str, at_call: int | None, at_round: int | None, seconds: float = 0.0
    ) -> Faults:
        if (at_call is None) == (at_round is None):
            raise ConfigError(
                f"{kind} of {target!r} needs to know when, by one of the two: a worker's at_call, or the driver's "
                f"at_round"
            )
        if target != DRIVER:
            if at_call is None:
                raise ConfigError(f"{kind} of {target!r} is at a call of it, at_call=...: only the driver has rounds")
            return replace(self, of_workers=(*self.of_workers, (target, Fault(kind, at_call, seconds))))
        if kind == "sever":
            raise ConfigError("the driver cannot be severed: sever each of its workers")
        if at_round is None:
            raise ConfigError(f"{kind} of the driver is at a round, at_round=...: only workers have calls")
        if not is_count(at_round) or at_round < 0:
            raise ConfigError(f"at_round counts rounds from 0, so it cannot be {at_round!r}")
        check_seconds(kind, seconds)
        if kind == "freeze" and not seconds:
            raise ConfigError("a driver frozen for ever would hold up the test: freeze('driver', ..., seconds=5)")
        return replace(self, of_driver=(*self.of_driver, DriverFault(kind, at_round, seconds)))
