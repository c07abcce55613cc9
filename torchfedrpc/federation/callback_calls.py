"""Calls of a run's callbacks: their order, their exceptions and their state."""

from __future__ import annotations

import inspect
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torchfedrpc.errors import ConfigError, SerializationError
from torchfedrpc.events import Event, RoundEnded, RunEnded, RunStarted
from torchfedrpc.federation.callbacks import Callback, Run
from torchfedrpc.federation.trainer_state import has_state_dict
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.packing import pack

logger = logging.getLogger(__name__)


class CallbackCalls:
    """Calls of the callbacks of one run, from `start` to `end`.

    Args:
        run: The run.
        callbacks: The callbacks, in the order of their calls.

    Raises:
        ConfigError: If one is not a `Callback`, or has only one of ``state_dict`` and ``load_state_dict``.
    """

    def __init__(self, run: Run, callbacks: Sequence[Callback]) -> None:
        self.run = run
        self._named: dict[str, Any] = {}  # Callbacks; some also have state_dict
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise ConfigError(
                    f"trainer.callbacks must be instances of tfr.Callback, and {callback!r} is none: derive its "
                    f"class from tfr.Callback, and give an instance"
                )
            _check_state_methods(callback)
            self._named[_name(callback, self._named)] = callback
        self._started: list[str] = []
        self._is_started = self._is_published = False
        self._failure: Exception | None = None  # of on_event, until the end of the round
        self._ended: RoundEnded | None = None
        self._num_failures: Counter[str] = Counter()
        self._stopped_by = ""
        self._unsubscribe: Callable[[], None] = lambda: None

    async def start(self, first_round: int) -> None:
        """Create the output folder, call `Callback.on_run_start`, and publish `RunStarted`; only once.

        Args:
            first_round: Number of the run's first round.

        Raises:
            Exception: If a callback raised it.
        """
        if self._is_started:
            return
        self._is_started = True
        self.run.first_round = first_round
        if self.run.output_dir is not None:
            self.run.output_dir.mkdir(parents=True, exist_ok=True)
        for name in self._named:
            await self._call(name, "on_run_start")
            self._started.append(name)
        if self._named:
            self._unsubscribe = self.run.proxy.subscribe(self._on_event)
        self.run.proxy.publish(RunStarted(self.run.proxy.mode, len(self.run.proxy.client_ids)))
        self._is_published = True

    async def end_round(self, round_num: int, num_rounds: int) -> None:
        """Call `Callback.on_round_end`; metrics that a callback returns are in the round of those after it.

        Raises:
            Exception: If a callback raised it, now or at an event of the round.
        """
        ended, self._ended = self._ended or RoundEnded(round_num, num_rounds, {}), None
        if ended.round_num != round_num:
            raise ConfigError(
                f"{type(self.run.trainer).__qualname__} has published the end of round {ended.round_num} in round "
                f"{round_num}: give tfr.RoundEnded the number that self.rounds() yields"
            )
        for name in self._started:
            returned = await self._call(name, "on_round_end", ended)
            if isinstance(returned, Mapping):
                ended = RoundEnded(round_num, num_rounds, {**ended.metrics, **returned})
        if self._failure is not None:
            raise self._failure
        if self.run.stop_reason is not None:
            logger.warning("stopping after round %d of %d: %s", round_num + 1, num_rounds, self.run.stop_reason)

    async def end(self, error: BaseException | None) -> None:
        """Publish `RunEnded`, and call `Callback.on_run_end`.

        Args:
            error: The exception that ended the run.

        Raises:
            Exception: If a callback raised it and ``error`` is None.
        """
        if self._is_published:
            self.run.proxy.publish(RunEnded(error))
        if not self._is_started and self._named and error is None:
            logger.warning(
                "no callback of %s was called: its train() must loop over self.rounds()",
                type(self.run.trainer).__qualname__,
            )
        self._unsubscribe()
        failure = self._failure
        for name in self._started:
            try:
                await self._call(name, "on_run_end", error)
            except Exception as raised:
                if failure is not None or error is not None:
                    logger.exception("%s.on_run_end failed", name)
                failure = failure or raised
        for failed, count in self._num_failures.items():
            logger.error("the callback %s failed %d times in this run", failed, count)
        if failure is not None and error is None:
            raise failure

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all callbacks that have one, and the reason of a stop.

        Raises:
            ConfigError: If a state is not plain data.
        """
        states = {name: callback.state_dict() for name, callback in self._named.items() if has_state_dict(callback)}
        for name, state in states.items():
            try:
                pack(state, copy=False).open(AllowList(()))
            except SerializationError as error:
                raise ConfigError(f"{name}.state_dict() must return plain data and tensors: {error}") from error
        return {"states": states, "stop": (self._stopped_by, self.run.stop_reason)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore a result of `state_dict`. Callbacks that it lacks start anew."""
        for name, state in saved["states"].items():
            if has_state_dict(self._named.get(name)):
                self._named[name].load_state_dict(state)
            else:
                logger.info("the checkpoint has a state of the callback %s, which this run does not have", name)
        name, reason = saved["stop"]
        if reason is not None and name in ("", *self._named):
            self._stopped_by, self.run.stop_reason = name, reason
            logger.warning(
                "the run has stopped before, by %s: %s; to go on, resume without this callback", name, reason
            )

    def _on_event(self, event: Event) -> None:
        if isinstance(event, RoundEnded):
            earlier = self._ended.metrics if self._ended is not None else {}
            self._ended = RoundEnded(event.round_num, event.num_rounds, {**earlier, **event.metrics})
        for name in self._started:
            try:
                with self._noted(name, "on_event"):
                    self._named[name].on_event(self.run, event)
            except Exception as error:
                self._failure = self._failure or error

    async def _call(self, name: str, method: str, *args: Any) -> Any:
        with self._noted(name, method):
            result = getattr(self._named[name], method)(self.run, *args)
            return await result if inspect.isawaitable(result) else result

    @contextmanager
    def _noted(self, name: str, method: str) -> Iterator[None]:
        """Note which callback stops the run, and log the exception of one that may fail."""
        before = self.run.stop_reason
        try:
            yield
        except Exception as error:
            if method == "on_run_start" or not self._named[name].may_fail:
                error.add_note(f"in {name}.{method}, a callback of the run")
                raise
            self._num_failures[f"{name}.{method}"] += 1
            if self._num_failures[f"{name}.{method}"] == 1:
                logger.exception("the callback %s.%s failed, and the run goes on", name, method)
        finally:
            if self.run.stop_reason != before:
                self._stopped_by = name


def _check_state_methods(callback: Callback) -> None:
    """Raise ConfigError if a callback has a half of the pair that keeps its state, which would be left out then."""
    for present, lacking in (("state_dict", "load_state_dict"), ("load_state_dict", "state_dict")):
        if hasattr(callback, present) and not hasattr(callback, lacking):
            name = type(callback).__name__
            raise ConfigError(f"{name} has {present}() and no {lacking}(): its state needs both")


def _name(callback: Callback, taken: Iterable[str]) -> str:
    """Return the name of the callback's class, with a number if another callback has it."""
    name = type(callback).__name__
    candidates = (f"{name}_{number}" if number > 1 else name for number in itertools.count(1))
    return next(candidate for candidate in candidates if candidate not in taken)
