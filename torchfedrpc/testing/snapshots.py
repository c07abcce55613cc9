"""`check_snapshot`: checks by replay that a learner's snapshots are complete."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError, SnapshotError
from torchfedrpc.host.snapshot import load
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.testing.rehearsal import Rehearsal, Step, differing_attributes, rehearsal
from torchfedrpc.wire.fingerprint import difference
from torchfedrpc.wire.packing import Packed, pack


def check_snapshot(
    learner: Callable[..., Any] | str,
    calls: Iterable[str | Sequence[Any]],
    *,
    client_id: str = "client_1",
    kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    trusted_modules: Sequence[str] = (),
    ignore: Collection[str] = (),
    repeat: int = 2,
) -> None:
    """Check by replay that a learner restored from a snapshot behaves like an undisturbed one.

    The calls run undisturbed first. Then, for each call, a new learner is restored from the snapshot taken after it,
    and the remaining calls run there. All results and the final state must be equal bit for bit. Pass the calls that
    a trainer makes in a round, in their order: state that no call depends on is not checked.

    Everything runs in this process, on threads, as in local mode; the calling thread, or its event loop, blocks. So
    state outside the learner (a variable of its module, a class attribute, a cache) is detected only if the calls
    change it. State that is set once and lost with the process appears to be kept.

    Example:
        ``check_snapshot(MyLearner, ["train_epoch", ("evaluate", {"split": "test"})])``

    Args:
        learner: A class, a factory, or a registered name, as for `LearnerProxy`.
        calls: Method names, ``(method, args)``, ``(method, kwargs)`` or ``(method, args, kwargs)``. All items of a
            generator method are requested.
        client_id: The learner's first argument.
        kwargs: Keyword arguments for its constructor.
        seed: The run's seed.
        trusted_modules: As ``runtime.trusted_modules``.
        ignore: Keys of a result, and attributes or keys of the state, that may differ, such as a duration.
        repeat: Number of times the calls are made. The default is 2, since state that a call leaves behind affects
            the next call of its kind.

    Raises:
        SnapshotError: If the state cannot be captured or restored, or a replay differs; the message names the first
            differing call, the snapshot before it, and the attributes that were lost.
        ConfigError: If there are no calls, or an entry of ``calls`` is invalid.
        Exception: If the constructor or a call raised it in the undisturbed run.
    """
    runtime = RuntimeConfig(call_timeout_s=None, trusted_modules=list(trusted_modules))
    spec, defaults = LearnerSpec.of(learner, seed, runtime)
    if isinstance(calls, str):
        raise ConfigError(f"check_snapshot takes a list of calls: [{calls!r}]")
    steps = [Step.of(entry) for entry in calls] * repeat
    if not steps:
        raise ConfigError("check_snapshot needs at least one call: name the methods that a trainer calls")
    _Check(spec, client_id, pack({**defaults, **(kwargs or {})}), steps, frozenset(ignore)).run()


class _Differs(Exception):
    """First difference of a replay; the ``__cause__`` is the exception that the replay raised, if any."""


@dataclass(frozen=True)
class _Check:
    spec: LearnerSpec
    client_id: str
    kwargs: Packed
    steps: list[Step]
    ignore: frozenset[str]

    def run(self) -> None:
        with self._opened() as undisturbed:
            results = [undisturbed.call(step) for step in self.steps]
            final = undisturbed.snapshot()
        snapshots = self._observe(results, final)
        # From last to first: each replay finds the state outside the learner as all calls have left it.
        for split in range(len(self.steps), 0, -1):
            with self._opened() as restored:
                restored.restore(snapshots[split - 1])
                try:
                    self._follow(restored, results, final, split)
                except _Differs as reason:
                    raise SnapshotError(
                        f"the snapshot of {self.spec.name} after {self._name(split - 1)} is not complete: restored "
                        f"from it, {reason}. {self._lost(split, snapshots[split - 1])}"
                    ) from reason.__cause__

    def _observe(self, results: list[Any], final: bytes) -> list[bytes]:
        """Return the snapshot after each call of a second run, and check that this run equals the first."""
        snapshots: list[bytes] = []
        try:
            with self._opened() as observed:
                self._follow(observed, results, final, 0, lambda: snapshots.append(observed.snapshot()))
        except _Differs as reason:
            raise SnapshotError(self._not_alike(str(reason), results, final)) from reason.__cause__
        return snapshots

    def _not_alike(self, text: str, results: list[Any], final: bytes) -> str:
        try:
            with self._opened() as plain:
                self._follow(plain, results, final, 0)
        except _Differs:
            return (
                f"{self.spec.name} cannot be replayed, snapshot or not: when the same calls run again, {text}. "
                f"It depends on something outside the learner and its arguments, such as a variable of a module, a "
                f"class attribute, a cache, a clock, or random numbers that are not seeded: keep it in an attribute, "
                f"or name in ignore=[...] what may differ"
            )
        return (
            f"taking a snapshot changes {self.spec.name}: when one is taken after each call, {text}. Its "
            f"state_dict() or __getstate__() must leave the learner as it is"
        )

    def _follow(
        self,
        run: Rehearsal,
        results: list[Any],
        final: bytes,
        first: int,
        after_each: Callable[[], None] = lambda: None,
    ) -> None:
        """Make the calls from number ``first`` on, and raise at the first difference."""
        for number in range(first, len(self.steps)):
            try:
                result = run.call(self.steps[number])
            except Exception as error:
                raise _Differs(f"{self._name(number)} raises {type(error).__name__}: {error}") from error
            if (path := difference(self._kept(result), self._kept(results[number]))) is not None:
                raise _Differs(f"{self._name(number)} gives another result{path}")
            after_each()
        if (path := difference(self._state(run.snapshot()), self._state(final))) is not None:
            raise _Differs(f"every result is the same, but in the end the state{path} is another")

    def _lost(self, split: int, snapshot: bytes) -> str:
        """Return a sentence that names the attributes that a restored learner lacks or has with another value."""
        with self._opened() as original, self._opened() as restored:
            for step in self.steps[:split]:
                original.call(step)
            restored.restore(snapshot)
            now, before = restored.learner, original.learner
        for of_what, with_gradients in (("", False), ("the gradients in ", True)):
            if lost := differing_attributes(now, before, ignore=self.ignore, with_gradients=with_gradients):
                return (
                    f"Not restored: {of_what}{', '.join(map(repr, lost))}. state_dict() and load_state_dict(), or "
                    f"__getstate__() and __setstate__(), must carry all that a later call depends on"
                )
        return (
            "All its attributes are restored, so what was lost is outside of them (a variable of a module, a class "
            "attribute, a cache, a closure), or that two of them share an object: keep it in an attribute"
        )

    def _state(self, snapshot: bytes) -> Any:
        kind, content = load(snapshot, self.spec.allow_list()).state
        if kind == "attributes":
            return self._kept({**content["values"], **content["slots"]})
        return [self._kept(part) for part in content] if isinstance(content, tuple) else self._kept(content)

    def _kept(self, value: Any) -> Any:
        if self.ignore and isinstance(value, dict):
            return {key: part for key, part in value.items() if key not in self.ignore}
        return value

    def _name(self, number: int) -> str:
        return f"call {number + 1} of {len(self.steps)} ({self.steps[number].method})"

    def _opened(self) -> AbstractContextManager[Rehearsal]:
        return rehearsal(self.spec, self.client_id, self.kwargs)
