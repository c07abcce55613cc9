"""Base class of trainers: settings, cohorts, and rounds."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from torchfedrpc.errors import ConfigError, suggest
from torchfedrpc.events import RoundStarted
from torchfedrpc.federation.aggregation import weighted_mean
from torchfedrpc.federation.callback_calls import CallbackCalls
from torchfedrpc.federation.callbacks import Callback, Run
from torchfedrpc.federation.checkpoints import Checkpoints, settings_of
from torchfedrpc.federation.saver import Saver
from torchfedrpc.federation.trainer_state import give_state, has_state_dict, state_of, why_not_data
from torchfedrpc.proxy import LearnerProxy
from torchfedrpc.wire.allowlist import AllowList

logger = logging.getLogger(__name__)

_STREAM = 0x5E1EC7  # separates the draws of cohorts from others with the same seed


class AbstractFederationTrainer(ABC):
    """Base class of federated algorithms: they choose cohorts and weights, and aggregate the results.

    Subclasses implement `train`. The same trainer runs in every execution mode. A trainer that loops over `rounds`,
    and keeps the state of later rounds in attributes, can be saved and resumed: see `Checkpoints`.

    Args:
        config: A mapping or an object. The base class reads ``num_rounds`` (for `rounds`), ``clients_per_round``
            (default: all clients) and ``seed`` (default: 0). Subclasses read further settings, and name them in
            ``settings``.
        learner_proxy: An open proxy, which calls the learners.

    Attributes:
        config: The settings; keys of a mapping, also of nested ones, are attributes too.
        learner_proxy: The proxy.
        checkpoints: Where and how often the run is saved; None (default) to save nothing. Set it before `train`.
        callbacks: The callbacks of the run, in the order of their calls; default: none. Set them before `train`.
        output_dir: Folder for files of callbacks; None (default) if there is none. Set it before `train`.
        not_state: Names of attributes that do not belong to the trainer's state; a subclass may add more.
        settings: Further settings of the class and their defaults, such as ``{"mu": 0.1}``, beside those of its base
            classes. They complete a config that is a mapping, and are options of the ``torchfedrpc`` command.

    Raises:
        ConfigError: If one of these settings is invalid.
    """

    not_state: ClassVar[frozenset[str]] = frozenset(
        {"config", "learner_proxy", "checkpoints", "callbacks", "output_dir"}
        | {"_callback_calls", "_not_saved", "_saver", "_seed", "_cohort_size"}
    )
    settings: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if inspect.iscoroutinefunction(train := vars(cls).get("train")):
            setattr(cls, "train", _as_run(train))  # noqa: B010 - a type checker refuses the assignment

    def __init__(self, config: Any, learner_proxy: LearnerProxy) -> None:
        self.checkpoints: Checkpoints | None = None
        self.callbacks: list[Callback] = []
        self.output_dir: str | Path | None = None
        self._callback_calls: CallbackCalls | None = None
        self._saver: Saver | None = None
        self._not_saved: set[str] = set()  # attributes that cannot be saved and have had a warning
        self.config = as_settings({**self.all_settings(), **config} if isinstance(config, Mapping) else config)
        self.learner_proxy = learner_proxy
        num_clients = len(learner_proxy.client_ids)
        self._seed = self._count("seed", default=0, least=0)
        self._cohort_size = self._count("clients_per_round", default=num_clients, least=1, most=num_clients)

    @abstractmethod
    async def train(self) -> Any:
        """Run the whole algorithm. It is one run for the callbacks, from its first round to its return."""

    @asynccontextmanager
    async def running(self, config: Mapping[str, Any] | None = None) -> AsyncIterator[Run]:
        """Extend the run that `train` is for the callbacks: it ends with this block.

        So files that are written after `train` are there at `Callback.on_run_end`, and their failure is the run's.

        Args:
            config: The settings that callbacks see. Default: The trainer's config.

        Raises:
            ConfigError: If one of ``callbacks`` is not a `Callback`.
        """
        if self._callback_calls is not None:
            yield self._callback_calls.run
            return
        settings = settings_of(self.config) if config is None else config
        folder = None if self.output_dir is None else Path(self.output_dir)
        calls = CallbackCalls(Run(settings, self.learner_proxy, self, folder), self.callbacks)
        self._callback_calls = calls
        error: BaseException | None = None
        try:
            if self.checkpoints is not None:
                self._saver = await Saver.begin(self.checkpoints, self, calls)
            yield calls.run
        except BaseException as raised:
            error = raised
            raise
        finally:
            saver, self._saver, self._callback_calls = self._saver, None, None
            if saver is not None and error is None:
                await saver.close()
            await calls.end(error)

    @classmethod
    def all_settings(cls) -> dict[str, Any]:
        """Return the ``settings`` of the class and its base classes."""
        of_classes = [vars(base).get("settings") for base in reversed(cls.__mro__)]
        return {name: value for one in of_classes if isinstance(one, Mapping) for name, value in one.items()}

    def select_clients(self, round_num: int) -> list[str]:
        """Draw the cohort of a round, as a function of the seed and ``round_num`` only.

        Returns:
            ``clients_per_round`` different ids, in the order of ``learner_proxy.client_ids``.
        """
        return sample_clients(self.learner_proxy.client_ids, self._cohort_size, seed=self._seed, round_num=round_num)

    async def aggregate_weights(
        self, weights_list: Sequence[Mapping[str, Tensor]], num_samples: Sequence[float] | None = None
    ) -> dict[str, Tensor]:
        """Return the weighted mean of models, a state dict.

        Args:
            weights_list: A state dict per client, all with the same names and shapes.
            num_samples: The weight of each state dict. Default: Equal weights.

        Raises:
            ValueError: If the list is empty, the state dicts do not match, or the weights are invalid.
        """
        # On a thread, since a large mean would block the event loop for longer than heartbeats and deadlines allow.
        return await asyncio.to_thread(weighted_mean, weights_list, num_samples)

    async def rounds(self) -> AsyncIterator[int]:
        """Yield the numbers of the rounds, 0 to ``num_rounds - 1``; publish their starts, and call the callbacks.

        With ``checkpoints`` the run is saved between two rounds and resumes from a checkpoint: the states of trainer
        and learners are restored before `train`, and that of the trainer once more here. The code of `train` before
        its loop runs again after a resume, unless it asks `is_resumed`. So the loop must depend on attributes of the
        trainer and on learners only, not on local variables.

        Raises:
            ConfigError: If the config has no valid ``num_rounds``, or the checkpoint does not fit this run.
            SnapshotError: If the checkpoint cannot be read.
            Exception: If a callback raised it.
        """
        if self._callback_calls is None and self.callbacks:
            raise ConfigError("a trainer with callbacks must loop over self.rounds() inside its train()")
        calls = self._callback_calls or CallbackCalls(Run(settings_of(self.config), self.learner_proxy, self), [])
        num_rounds = self.num_rounds
        if self._saver is None and self.checkpoints is not None:
            self._saver = await Saver.begin(self.checkpoints, self, calls)
        saver = self._saver
        if saver is not None:
            await saver.begin_loop()
        first_round = saver.num_done if saver is not None else 0
        await calls.start(first_round)
        for round_num in range(first_round, num_rounds):
            if calls.run.stop_reason is not None:
                break
            self.learner_proxy.publish(RoundStarted(round_num, num_rounds))
            yield round_num
            await calls.end_round(round_num, num_rounds)
            if saver is not None:
                await saver.round_done(round_num + 1, is_last=calls.run.stop_reason is not None)
        if saver is not None:
            self._saver = None
            await saver.close()

    @property
    def is_resumed(self) -> bool:
        """Whether the run goes on from a checkpoint, as `train` may ask before its loop: the state is restored."""
        return self._saver is not None and self._saver.is_resumed

    def state_dict(self) -> dict[str, Any]:
        """Return the state of later rounds, for a checkpoint; subclasses may override it.

        The state contains every attribute except those in ``not_state``: the ``state_dict()`` of attributes with
        ``state_dict`` and ``load_state_dict`` (a module, an optimiser), else the value. References to parts of such a
        module are kept, also in other attributes and in dicts and lists of the trainer. An attribute that cannot be
        saved is skipped, with one warning.

        Raises:
            SnapshotError: If a value would not be restored equal, or two values would no longer share an object.
        """
        saved = {
            name: value
            for name, value in vars(self).items()
            if name not in self.not_state and (has_state_dict(value) or self._is_data(name, value))
        }
        return state_of(saved, AllowList(self.trusted_modules), self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
        give_state(self, state)

    @property
    def trusted_modules(self) -> list[str]:
        """Packages of classes allowed in its state: the trainer's, the learner's and ``runtime.trusted_modules``."""
        return [type(self).__module__, *self.learner_proxy.trusted_modules]

    def _is_data(self, name: str, value: Any) -> bool:
        reason = why_not_data(value, self.trusted_modules)
        if reason is not None and name not in self._not_saved:
            self._not_saved.add(name)
            logger.warning(
                "%s.%s is no part of checkpoints: %s; name it in not_state if a run need not have it to go on, "
                "else define state_dict() and load_state_dict()",
                type(self).__qualname__,
                name,
                reason,
            )
        return reason is None

    @property
    def num_rounds(self) -> int:
        """The number of rounds of a whole run.

        Raises:
            ConfigError: If the config has no such setting, or it is not a whole number of at least 0.
        """
        return self._count("num_rounds", default=None, least=0)

    def setting(self, name: str) -> Any:
        """Return a setting of the config; if it lacks it, the default in the class's ``settings``, else None."""
        return getattr(self.config, name, self.all_settings().get(name))

    def _number(self, name: str, *, least: float = 0.0, is_above: bool = False, below: float = math.inf) -> float:
        """Return a setting that is a number of at least ``least``, or above it, and below a bound.

        Raises:
            ConfigError: If it is none.
        """
        value = self.setting(name)
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if is_number and least <= value < below and not (is_above and value == least):
            return float(value)
        bounds = f"{'above' if is_above else 'of at least'} {least:g}"
        limit = "" if below == math.inf else f" and below {below:g}"
        raise ConfigError(f"the trainer's {name} must be a number {bounds}{limit}, not {value!r}")

    def _count(
        self,
        name: str,
        *,
        default: int | None,
        least: int,
        most: int | None = None,
        of_most: str = "the number of clients",
    ) -> int:
        """Return a whole number from the config; the default if it is missing or None."""
        given = self.setting(name)
        value = default if given is None else given
        if isinstance(value, int) and not isinstance(value, bool) and least <= value <= (most or value):
            return value
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}, {of_most}"
        raise ConfigError(f"the trainer's {name} must be a whole number {bounds}, not {value!r}")


def _as_run(train: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Coroutine[Any, Any, Any]]:
    """Return a subclass's `train` as one run of the trainer, so that its end is known, an error included."""

    @functools.wraps(train)
    async def train_as_run(self: AbstractFederationTrainer, *args: Any, **kwargs: Any) -> Any:
        async with self.running():
            return await train(self, *args, **kwargs)

    return train_as_run


def sample_clients(client_ids: Sequence[str], num_selected: int, *, seed: int, round_num: int) -> list[str]:
    """Draw a cohort uniformly and without replacement, as a function of seed and round only.

    No draw depends on an earlier one, so a run that resumes at round 7 selects the same cohort as the first run did.

    Args:
        client_ids: All clients.
        num_selected: Size of the cohort, at most the number of clients.
        seed: The run's seed, not negative.
        round_num: The round, from 0.

    Returns:
        The cohort, in the order of ``client_ids``.
    """
    if num_selected == len(client_ids):
        return list(client_ids)
    generator = np.random.default_rng([_STREAM, seed, round_num])
    chosen = generator.choice(len(client_ids), size=num_selected, replace=False)
    return [client_ids[number] for number in np.sort(chosen)]


class Settings(dict[str, Any]):
    """Mapping with attribute access to its keys. Nested mappings, also in lists, are converted as well."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__({key: _attributes(value) for key, value in values.items()})

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no setting named {name!r}{suggest(name, map(str, self))}") from None


def as_settings(config: Any) -> Any:
    """Return a mapping as `Settings`, and any other object unchanged."""
    return _attributes(config)


def _attributes(value: Any) -> Any:
    if isinstance(value, Settings):
        return value
    if isinstance(value, Mapping):
        return Settings(value)
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(map(_attributes, value))
    return value
