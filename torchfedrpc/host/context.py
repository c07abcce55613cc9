"""`current_call`: the services of a host for a running method."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from torchfedrpc.host.call_scope import CallScope, scope_here
from torchfedrpc.host.mailbox import Job
from torchfedrpc.host.process_state import ProcessState
from torchfedrpc.host.randomness import call_seed

T = TypeVar("T")


@dataclass(eq=False)
class CallContext:
    """The call that is running, as `current_call` gives it.

    Attributes:
        client_id: The client of the learner.
        method: The method's name; ``__init__`` while the learner is made.
        call_id: Unique in a run.
        device: Device for the learner's tensors.
        trusted_modules: The packages that the run trusts, the learner's own among them.
    """

    client_id: str
    method: str
    call_id: int
    device: torch.device
    trusted_modules: frozenset[str]
    _seed: int = field(repr=False)
    _job: Job = field(repr=False)
    _process: ProcessState = field(repr=False)
    _generator: torch.Generator | None = field(default=None, repr=False)

    @property
    def cancelled(self) -> bool:
        """Whether the result is no longer wanted: a deadline passed, or the caller was cancelled.

        A long sync method should check it now and then, and return.
        """
        return self._job.cancelled

    @property
    def generator(self) -> torch.Generator:
        """A generator on `device`, seeded for this call; made at first use.

        Raises:
            RuntimeError: If a factory of `shared` asks the call for it, and not ``current_call()`` of its own.
        """
        scope = scope_here.get(None)
        if scope is not None and scope.is_nested and scope.call is not self:
            raise RuntimeError(
                "a factory of shared() may run in any call: it takes current_call().generator, which depends on the "
                "key alone, and not the generator of the call that asked for the object"
            )
        if self._generator is None:
            self._generator = torch.Generator(self.device).manual_seed(self._seed)
        return self._generator

    def report(self, progress: Any) -> None:
        """Send progress of this call to the driver's subscribers. It arrives before the call's result.

        A report of a task that outlives the call arrives with a later answer of its worker, if there is one.

        Raises:
            SerializationError: If ``progress`` cannot be sent.
        """
        self._process.send_report(self._job, progress)

    def shared(self, key: Hashable, factory: Callable[[], T]) -> T:
        """Return an object that learners of a process share, such as a dataset, made by ``factory()`` if needed.

        If the learners of local mode have several GPUs, those of each GPU share one, as with a worker for each GPU.
        Its random draws depend only on (run seed, ``repr(key)``), so use strings, numbers or tuples of them as keys;
        also those from ``current_call().generator``, asked for in the factory.
        """

        def make() -> T:  # in a scope apart from the running call, since placement decides which call needs it first
            scope = CallScope(
                self._process,
                self._job,
                self.method,
                call_seed(self._process.seed, "shared", repr(key)),
                is_thorough=True,
                is_nested=True,
            )
            return scope.new_context().run(scope.run, factory)

        shared = self._process.shared[self._job.mailbox.device]
        return shared.get(key, make, in_constructor=self.method == "__init__")


def current_call() -> CallContext:
    """Return the call in which this code runs.

    Raises:
        RuntimeError: If this code does not run in a learner's constructor or method, or runs in a thread that was
            started without the context of the call.
    """
    scope = scope_here.get(None)
    if scope is None:
        raise RuntimeError("current_call() is for code that a proxy's call runs: a learner's constructor or method")
    if scope.call is None:
        job, process = scope.job, scope.process
        scope.call = CallContext(
            client_id=job.call.client_id,
            method=scope.method,
            call_id=job.call.call_id,
            device=job.mailbox.device or process.device,
            trusted_modules=process.allow.trusted,
            _seed=scope.seed,
            _job=job,
            _process=process,
        )
    call: CallContext = scope.call
    return call
