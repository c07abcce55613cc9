"""`check_stateless`: checks by replay that no call leaves anything in a learner that a later call needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.testing.rehearsal import Rehearsal, Step, differing_attributes, rehearsal
from torchfedrpc.wire.fingerprint import difference
from torchfedrpc.wire.packing import Packed, pack


def check_stateless(
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
    """Check by replay that a learner may declare ``stateless = True``.

    Each call runs on two new learners first, with the calls in this order and in the reverse one. Then all calls run
    on one learner, in this order and in the reverse one. Every call must give the same result each time, bit for bit.
    Pass the calls that a trainer makes in two rounds, with arguments that differ as a trainer's do: state that no
    call depends on, such as a cache, is not detected.

    Everything runs in this process, on threads, as in local mode; the calling thread, or its event loop, blocks.

    Example:
        ``check_stateless(MyLearner, [("train_epoch", {"weights": first}), ("train_epoch", {"weights": second})])``

    Args:
        learner: A class, a factory, or a registered name, as for `LearnerProxy`.
        calls: Method names, ``(method, args)``, ``(method, kwargs)`` or ``(method, args, kwargs)``. All items of a
            generator method are requested.
        client_id: The learner's first argument.
        kwargs: Keyword arguments for its constructor.
        seed: The run's seed.
        trusted_modules: As ``runtime.trusted_modules``.
        ignore: Keys of a result that may differ, such as a duration, where the result is a dict.
        repeat: Number of times the calls are made, at least 1; there must be two calls in all.

    Raises:
        ConfigError: If a call gives another result; the message names the call and the attributes that calls have
            changed. Also if there are fewer than two calls, or an entry of ``calls`` is invalid.
        Exception: If the constructor or a call raised it on a new learner.
    """
    runtime = RuntimeConfig(call_timeout_s=None, trusted_modules=list(trusted_modules))
    spec, defaults = LearnerSpec.of(learner, seed, runtime)
    if isinstance(calls, str):
        raise ConfigError(f"check_stateless takes a list of calls: [{calls!r}]")
    if isinstance(ignore, str):
        raise ConfigError(f"ignore takes a collection of keys: [{ignore!r}]")
    steps = [Step.of(entry) for entry in calls]
    if len(steps) * repeat < 2:
        raise ConfigError(
            "check_stateless needs two calls or more, the second of which could meet what the first has left: name "
            "the methods that a trainer calls, with repeat=2 if it is one"
        )
    packed = pack({**defaults, **(kwargs or {})})
    _Check(spec, client_id, packed, _numbered(steps * repeat), len(steps), frozenset(ignore)).run()


def _numbered(steps: list[Step]) -> list[tuple[Step, int]]:
    """Return each step with its number among those of its method, from 0."""
    counts: Counter[str] = Counter()
    numbered = []
    for step in steps:
        numbered.append((step, counts[step.method]))
        counts[step.method] += 1
    return numbered


@dataclass(frozen=True)
class _Check:
    spec: LearnerSpec
    client_id: str
    kwargs: Packed
    steps: list[tuple[Step, int]]  # all repetitions
    num_given: int
    ignore: frozenset[str]

    def run(self) -> None:
        forward = range(len(self.steps))
        expected = {number: self._on_new(number) for number in forward}
        self._check_are_repeatable(forward[::-1], expected)
        for order, when in ((forward, "after the calls before it"), (forward[::-1], "after the calls behind it")):
            with ExitStack() as stack:
                used = stack.enter_context(rehearsal(self.spec, self.client_id, self.kwargs))
                for number in order:
                    if (reason := self._differs(used, number, expected[number])) is not None:
                        raise ConfigError(
                            f"{self.spec.name} is not stateless: {self._name(number)} {reason} on a learner {when}. "
                            f"{self._changed(used)}"
                        )

    def _on_new(self, number: int) -> Any:
        with rehearsal(self.spec, self.client_id, self.kwargs) as new:
            return new.call(*self.steps[number])

    def _check_are_repeatable(self, order: Iterable[int], expected: Mapping[int, Any]) -> None:
        """Check that calls on other new learners give the expected results."""
        for number in order:
            with rehearsal(self.spec, self.client_id, self.kwargs) as new:
                if (reason := self._differs(new, number, expected[number])) is not None:
                    raise ConfigError(
                        f"{self.spec.name}: {self._name(number)} {reason} on a second new learner. It depends on "
                        f"something outside the learner and its arguments, such as a variable of a module, a class "
                        f"attribute or a clock: give it as an argument, or name keys of a result that may differ in "
                        f"ignore=[...]"
                    )

    def _differs(self, run: Rehearsal, number: int, expected: Any) -> str | None:
        """Make a call, and return how its result differs; None if it does not."""
        try:
            result = run.call(*self.steps[number])
        except Exception as error:
            return f"raises {type(error).__name__} ({error})"
        path = difference(self._kept(result), self._kept(expected))
        return None if path is None else f"gives another result{path}"

    def _changed(self, used: Rehearsal) -> str:
        """Return a sentence that names the attributes that calls have changed."""
        with rehearsal(self.spec, self.client_id, self.kwargs) as new:
            new.make()
            names = differing_attributes(used.learner, new.learner)
        if not names:
            return (
                "Its attributes are those of a new one, so the difference is outside of them (in a module, in a "
                "class attribute, in an object that learners share): give it as an argument"
            )
        return (
            f"Changed by calls: {', '.join(map(repr, names))}; some may be harmless, such as caches. Give as an "
            f"argument what a later call needs, make in the constructor what draws random numbers as it is made, or "
            f"set stateless = False"
        )

    def _kept(self, value: Any) -> Any:
        if self.ignore and isinstance(value, dict):
            return {key: part for key, part in value.items() if key not in self.ignore}
        return value

    def _name(self, number: int) -> str:
        repetition, place = divmod(number, self.num_given)
        again = f", repetition {repetition + 1}," if repetition else ""
        return f"call {place + 1} of {self.num_given} ({self.steps[number][0].method}){again}"
