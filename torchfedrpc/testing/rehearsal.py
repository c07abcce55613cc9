"""Learner on a host in this process with synchronous calls, for checks by replay."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch

from torchfedrpc.errors import ConfigError, MethodNotFoundError
from torchfedrpc.host.call import Call, Outcome, Registration
from torchfedrpc.host.learner_host import LearnerHost
from torchfedrpc.host.mailbox import Reply
from torchfedrpc.host.snapshot import seal
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.wire.fingerprint import difference
from torchfedrpc.wire.packing import Packed, pack

_WORKER = "a rehearsal"


@dataclass(frozen=True)
class Step:
    """Call to make.

    Attributes:
        method: The method's name.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    method: str
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, entry: str | Sequence[Any]) -> Step:
        """Parse a method's name, ``(method, args)``, ``(method, kwargs)`` or ``(method, args, kwargs)``.

        Raises:
            ConfigError: If the entry has none of these forms.
        """
        match entry:
            case str(method) | [str(method)]:
                return cls(method)
            case [str(method), Mapping() as kwargs]:
                return cls(method, kwargs=kwargs)
            case [str(method), list() | tuple() as args]:
                return cls(method, args)
            case [str(method), list() | tuple() as args, Mapping() as kwargs]:
                return cls(method, args, kwargs)
        raise ConfigError(
            f"{entry!r} is no call: give a method's name, (method, args), (method, kwargs) or (method, args, kwargs) "
            f"with a tuple and a dict"
        )


@contextlib.contextmanager
def rehearsal(spec: LearnerSpec, client_id: str, kwargs: Packed) -> Iterator[Rehearsal]:
    """Provide a learner on a new host, and close the host at the end.

    Args:
        spec: Makes the learner.
        client_id: The learner's client.
        kwargs: Keyword arguments for its constructor.
    """
    host = LearnerHost(spec, worker=_WORKER)
    try:
        yield Rehearsal(host, client_id, kwargs)
    finally:
        host.close()


class Rehearsal:
    """One learner, created by its first call or by `restore`."""

    def __init__(self, host: LearnerHost, client_id: str, kwargs: Packed) -> None:
        self._host = host
        self._client_id = client_id
        self._mailbox = host.register(Registration(client_id, kwargs))
        self._call_ids = itertools.count()

    @property
    def learner(self) -> Any:
        """The learner; None before it is created."""
        return self._mailbox.learner

    def call(self, step: Step, number: int | None = None) -> Any:
        """Return the result of a method, or the list of the items of a generator method.

        Args:
            step: The call.
            number: Its number among those of its method, which seeds it; None if the host counts.

        Raises:
            Exception: If the constructor or the method raised it.
        """
        self.make()
        method = getattr(self.learner, step.method, None)
        if inspect.isgeneratorfunction(method) or inspect.isasyncgenfunction(method):
            return list(self._items(step, number))
        return self._ask("call", step.method, (tuple(step.args), dict(step.kwargs)), number)

    def snapshot(self) -> bytes:
        """Return the learner's snapshot.

        Raises:
            SnapshotError: If its state cannot be captured.
        """
        return bytes(seal(self._ask("snapshot", "snapshot", None)))

    def restore(self, snapshot: bytes) -> None:
        """Create the learner from a snapshot.

        Raises:
            SnapshotError: If the learner cannot restore the state.
        """
        self._ask("restore", "restore", (torch.frombuffer(bytearray(snapshot), dtype=torch.uint8), None))

    def make(self) -> None:
        """Create the learner, unless it was."""
        # Only the learner shows whether a method is a generator. Any call creates the learner, even a refused one.
        if not self._mailbox.made:
            with contextlib.suppress(MethodNotFoundError):
                self._ask("call", "_", ((), {}))

    def _ask(
        self, kind: Literal["call", "snapshot", "restore"], method: str, arguments: Any, number: int | None = None
    ) -> Any:
        call = Call(next(self._call_ids), self._client_id, method, pack(arguments), kind=kind, number=number)
        outcome = self._wait(call, partial(self._host.submit, call))
        return outcome.result(call, self._host.allow, _WORKER)

    def _items(self, step: Step, number: int | None) -> Iterator[Any]:
        arguments = pack((tuple(step.args), dict(step.kwargs)))
        call = Call(next(self._call_ids), self._client_id, step.method, arguments, kind="stream", number=number)
        outcome = self._wait(call, partial(self._host.submit, call))
        for step_number in itertools.count(1):
            item = outcome.result(call, self._host.allow, _WORKER)
            if outcome.kind == "end":
                return
            yield item
            outcome = self._wait(call, partial(self._host.advance, call.call_id, step_number))

    def _wait(self, call: Call, send: Callable[[Reply], None]) -> Outcome:
        future: Future[Outcome] = Future()
        send(future.set_result)
        outcome = future.result()
        if outcome.is_final:
            self._host.acknowledge([call.call_id])
        return outcome


def differing_attributes(
    learner: Any, other: Any, *, ignore: Collection[str] = (), with_gradients: bool = False
) -> list[str]:
    """Return the names of the attributes that one of two learners lacks, or has with another value."""
    ours, theirs = (dict(getattr(one, "__dict__", {})) for one in (learner, other))
    names = [name for name in dict.fromkeys(itertools.chain(theirs, ours)) if name not in ignore]
    return [name for name in names if _differs(name, ours, theirs, with_gradients=with_gradients)]


def _differs(name: str, ours: dict[str, Any], theirs: dict[str, Any], *, with_gradients: bool) -> bool:
    if name not in ours or name not in theirs:
        return True
    try:
        return difference(ours[name], theirs[name], with_gradients=with_gradients) is not None
    except Exception:  # for example a lock, which cannot be pickled and is created again by the constructor
        return type(ours[name]) is not type(theirs[name])
