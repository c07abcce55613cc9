"""What a running method can ask of its host: `current_call`."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from torchfedrpc.host.randomness import RandomStreams, call_seed
from torchfedrpc.host.torch_modes import TorchModes

T = TypeVar("T")


class SharedObjects:
    """Objects that all learners of a process have in common, each made once.

    Args:
        seed: the run's seed.
        device: the host's device.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        self._device = device
        self._objects: dict[Hashable, Any] = {}
        self._lock = threading.RLock()  # a factory may ask for another shared object

    def get(self, key: Hashable, factory: Callable[[], T]) -> T:
        """The object of that key, made by ``factory()`` where there is none yet."""
        with self._lock:
            if key not in self._objects:
                # Modes and streams of its own: who comes first depends on placement, and the object must not.
                with TorchModes(), RandomStreams(call_seed(self._seed, "shared", repr(key)), self._device):
                    self._objects[key] = factory()
            made: T = self._objects[key]
            return made


@dataclass(eq=False)
class CallContext:
    """The call that is running, as `current_call` gives it.

    Attributes:
        client_id: whose learner.
        method: the method's name; ``__init__`` while the learner is made.
        call_id: unique in a run.
        device: where this process's learners should put their tensors.
        trusted_modules: the packages that the run trusts, the learner's own among them.
    """

    client_id: str
    method: str
    call_id: int
    device: torch.device
    trusted_modules: frozenset[str]
    _seed: int = field(repr=False)
    _shared: SharedObjects = field(repr=False)
    _is_cancelled: Callable[[], bool] = field(repr=False)
    _report: Callable[[Any], None] = field(repr=False)
    _generator: torch.Generator | None = field(default=None, repr=False)

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for the result any more: a deadline passed, or the caller was cancelled.

        A long sync method should look at it now and then, and return.
        """
        return self._is_cancelled()

    @property
    def generator(self) -> torch.Generator:
        """A generator on `device`, seeded for this call alone; made at first use."""
        if self._generator is None:
            self._generator = torch.Generator(self.device).manual_seed(self._seed)
        return self._generator

    def report(self, progress: Any) -> None:
        """Tell the driver's subscribers how far this call is; they get the value before the call's result.

        Raises:
            SerializationError: ``progress`` cannot be sent.
        """
        self._report(progress)

    def shared(self, key: Hashable, factory: Callable[[], T]) -> T:
        """One object per process, such as a dataset: made by ``factory()`` at the first call with that key.

        Its random draws depend on (run seed, ``repr(key)``) alone, so use strings, numbers or tuples of them.
        """
        return self._shared.get(key, factory)


_current: contextvars.ContextVar[CallContext] = contextvars.ContextVar("torchfedrpc_current_call")


def current_call() -> CallContext:
    """The call in which this code runs.

    Raises:
        RuntimeError: it does not run in a learner's constructor or method (or in a thread that one started
            without its context).
    """
    try:
        return _current.get()
    except LookupError:
        raise RuntimeError(
            "current_call() is for code that a proxy's call runs: a learner's constructor or method"
        ) from None


def bind(context: CallContext) -> contextvars.Token[CallContext]:
    """Make a call the current one of this thread or task."""
    return _current.set(context)


def unbind(token: contextvars.Token[CallContext]) -> None:
    """Undo `bind`."""
    _current.reset(token)
