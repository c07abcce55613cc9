"""Checkpoints of a trainer's run: when they are taken, what is in them, and how a run goes on from one."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import hashlib
import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from torchfedrpc.errors import ConfigError, SnapshotError, TorchFedRpcError
from torchfedrpc.executors.cut import Cut
from torchfedrpc.federation.checkpoint_folder import Checkpoint, CheckpointFolder
from torchfedrpc.interrupts import Finishing
from torchfedrpc.observe.events import CheckpointSaved
from torchfedrpc.proxy import LearnerProxy
from torchfedrpc.wire.fingerprint import fingerprint
from torchfedrpc.wire.packing import Parcel, pack

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PATIENCE_S = 1.0
_LAST_PATIENCE_S = 30.0  # for a learner that a cancelled call still has
_RESTORED_AT_ONCE_BYTES = 32 << 20
SUBFOLDER = "checkpoints"
"""Where an output folder has its checkpoints."""

_FACTS = "proxy."  # prefix of what is compared in any case
_MISSING = object()
_MAY_DIFFER = ("num_rounds", "trainer.num_rounds")  # it may grow


class Stateful(Protocol):
    """What can be saved and given its state back."""

    def state_dict(self) -> dict[str, Any]:
        """All that matters later."""

    def load_state_dict(self, state: Any) -> object:
        """Go on from what `state_dict` gave."""


class Resumable(Stateful, Protocol):
    """What a checkpoint asks of a trainer."""

    config: Any
    learner_proxy: LearnerProxy

    @property
    def num_rounds(self) -> int:
        """The rounds of a whole run."""

    @property
    def trusted_modules(self) -> list[str]:
        """Packages whose classes may be part of its state."""


class Checkpoints:
    """Where a trainer's run is saved, how often, and from where it goes on.

    Set it on a trainer that loops over ``self.rounds()``, before it trains:

        trainer.checkpoints = tfr.Checkpoints("runs/digits", every=5, resume="auto")

    The folder belongs to one run at a time. A checkpoint has the trainer's ``state_dict()``, the state of every
    learner that was called, and the driver's global random streams, all as of the end of a round. Saving goes on
    beside the next round; of the learners only those are written that were called since.

    Args:
        folder: where checkpoints are kept.
        every: rounds from one to the next, at least 1; the last round is saved as well. None to save none.
        num_kept: how many are kept; the one before the last serves where the last was damaged.
        resume: ``never`` begins anew; what an earlier run has left in the folder is set aside. ``auto`` goes on from
            this folder's last checkpoint, where there is one. Anything else is another folder (of checkpoints, or
            one that has such a folder as ``checkpoints``) to go on from where this one has none.
        config: what has to be equal for a run to go on, but for ``num_rounds``, which may grow. Default: the
            trainer's config. Learners, clients and seed of the proxy are compared in any case.

    Attributes:
        parts: what else belongs to the run, by name: it is saved, and given its state back, with the trainer.

    Raises:
        ConfigError: a setting cannot be met.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        every: int | None = 1,
        num_kept: int = 3,
        resume: str | Path = "never",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value in (("every", every), ("num_kept", num_kept)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"checkpoints: {name} must be a whole number of at least 1, not {value!r}")
        self.every = every
        self.parts: dict[str, Stateful] = {}
        self._own = CheckpointFolder(Path(folder), num_kept=num_kept)
        self._other: CheckpointFolder | None = None
        if str(resume) not in ("never", "auto"):
            other = _checkpoints_in(Path(resume))
            self._other = CheckpointFolder(other) if other.resolve() != Path(folder).resolve() else None
        self._begins_anew = str(resume) == "never"
        self._config = config
        self._is_open = False
        self._found: Checkpoint | None = None

    @property
    def folder(self) -> CheckpointFolder:
        """The files."""
        return self._own

    def open(self) -> Checkpoint | None:
        """Lock the folder, and find what the run goes on from; a second time, give that again.

        Returns:
            The checkpoint; None where the run begins at its first round.

        Raises:
            ConfigError: another run has the folder, there is nothing where ``resume`` looks, or the configuration
                differs where it matters.
            SnapshotError: checkpoints are there, and all are damaged.
        """
        if self._is_open:
            return self._found
        self._own.lock()
        try:
            self._found = self._find()
            if self._found is not None and self._config is not None:
                check_equal(self._found, plain(self._config))
        except BaseException:
            self.close()
            raise
        self._is_open = True
        return self._found

    def close(self) -> None:
        """Leave the folder to other runs."""
        self._is_open, self._found = False, None
        for folder in (self._own, self._other):
            if folder is not None:
                folder.unlock()

    def __enter__(self) -> Checkpoints:
        self.open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def is_open(self) -> bool:
        """Whether the folder is this run's."""
        return self._is_open

    def config_of(self, trainer: Resumable) -> dict[str, Any]:
        """What has to be equal for a run of this trainer to go on, by dotted key."""
        config = plain(trainer.config if self._config is None else self._config)
        return config | {f"{_FACTS}{name}": value for name, value in trainer.learner_proxy.identity().items()}

    def _find(self) -> Checkpoint | None:
        if self._begins_anew:
            if (aside := self._own.set_aside()) is not None:
                logger.warning("resume=never: the checkpoints of an earlier run are in %s now", aside)
            return None
        if (found := self._own.load()) is not None:
            return found
        if self._other is not None:
            if self._other.path.is_dir():
                self._other.lock()
                found = self._other.load()
            if found is None:
                raise ConfigError(f"resume={self._other.path}: there is no checkpoint; resume=never begins anew")
            return found
        if self._own.is_used:
            logger.warning(
                "%s has no checkpoint, though a run was here: starting at round 0 (a run is saved at the end of its "
                "rounds, and only if its trainer loops over self.rounds())",
                self._own.path,
            )
        return None


class Saver:
    """Saves one run of a trainer, from `begin` to `close`.

    Attributes:
        num_done: rounds that are done and in a checkpoint, those from before this run among them.
    """

    def __init__(self, checkpoints: Checkpoints, trainer: Resumable, config: dict[str, Any]) -> None:
        self._every = checkpoints.every
        self._checkpoints = checkpoints
        self._folder = checkpoints.folder
        self._trainer = trainer
        self._proxy = trainer.learner_proxy
        self._config = config
        self.num_done = 0
        self._base: Checkpoint | None = None
        self._saved: dict[str, int] = {}  # of each learner in the last checkpoint, which number its changes had
        self._lost: set[str] = set()  # those that were warned of, since they were given up
        self._saving: asyncio.Task[None] | None = None
        self._is_due = False
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="torchfedrpc-checkpoints")
        self._finishing = Finishing()
        if self._every is None:
            self._finishing.close()
        self._owns_folder = False

    @classmethod
    async def begin(cls, checkpoints: Checkpoints, trainer: Resumable) -> Saver:
        """Give trainer and learners the state of the checkpoint that the run goes on from, if there is one.

        Raises:
            ConfigError: the folder is another run's, or the checkpoint does not fit this one.
            SnapshotError: a learner's state cannot be restored.
        """
        config = await asyncio.to_thread(checkpoints.config_of, trainer)
        owns_folder = not checkpoints.is_open
        found = await asyncio.to_thread(checkpoints.open)
        saver = cls(checkpoints, trainer, config)
        saver._owns_folder = owns_folder
        trainer.learner_proxy.before_close(saver.close)
        if found is not None:
            await saver._go_on_from(found)
        return saver

    async def round_done(self, num_done: int) -> None:
        """A round has ended, and the next has not begun: save it, if it is time to.

        Does not wait for the disk, but after the last round, and after a signal; then the run is cancelled. Where the
        save before takes longer than the round and a second more, this one is put off until the next round ends.
        """
        is_interrupted = self._finishing.is_requested
        must_be = is_interrupted or num_done >= self._trainer.num_rounds
        self._is_due |= must_be or (self._every is not None and num_done % self._every == 0)
        if self._every is not None and self._is_due and (must_be or await self._is_settled(_PATIENCE_S)):
            await self._settled()
            self._is_due = False
            self._start(num_done)
            if must_be:
                await self._settled()
        if is_interrupted:
            self._finishing.done()
            await asyncio.get_running_loop().create_future()  # until that gets here

    async def close(self) -> None:
        """Finish what is being saved, unless that takes too long; a second time does nothing."""
        try:
            if self._saving is not None and not await self._is_settled(_LAST_PATIENCE_S):
                self._saving.cancel()
                await asyncio.wait([self._saving])
        finally:
            self._finishing.close()
            self._disk.shutdown(wait=False)
            if self._owns_folder:
                self._checkpoints.close()
                self._owns_folder = False

    async def _is_settled(self, timeout_s: float) -> bool:
        """Whether the save that is under way ends in that time."""
        return self._saving is None or bool((await asyncio.wait([self._saving], timeout=timeout_s))[0])

    async def _settled(self) -> None:
        if self._saving is not None:
            await asyncio.shield(self._saving)

    def _start(self, num_done: int) -> None:
        """Take the value of everything as it is now; the states of learners follow one by one."""
        if self._proxy.stats()["pending_calls"]:
            logger.warning(
                "calls are under way as round %d ends: its checkpoint has what they do to learners, not the results",
                num_done - 1,
            )
        changes = self._proxy.changes()
        changed = {client_id: number for client_id, number in changes.items() if self._saved.get(client_id) != number}
        try:
            states = {name: part.state_dict() for name, part in self._checkpoints.parts.items()}
            trainer = self._trainer.state_dict()
            state = pack({"trainer": trainer, "parts": states, "streams": _random_streams()})
            cut = self._proxy.cut(changed)
        except Exception as error:
            self._failed(num_done, error)
            return
        self._saving = asyncio.ensure_future(self._save(num_done, state, cut, changed))

    async def _save(self, num_done: int, state: Parcel, cut: Cut, changed: Mapping[str, int]) -> None:
        began, num_bytes = time.monotonic(), 0
        try:
            files = await self._on_disk(partial(self._folder.begin, num_done, self._base))
            try:
                async for client_id, data in cut:
                    num_bytes += len(data)
                    if data:
                        await self._on_disk(partial(files.add, client_id, data))
                    elif client_id not in self._lost:
                        self._lost.add(client_id)
                        logger.warning("%s was given up, and is in no checkpoint any more", client_id)
                self._base = await self._on_disk(partial(files.commit, self._config, state))
            except BaseException:
                await self._on_disk(files.abort)
                raise
        except Exception as error:
            self._failed(num_done, error)
            return
        finally:
            cut.close()
        self.num_done = num_done
        self._saved.update(changed)
        seconds = time.monotonic() - began
        self._proxy.publish(CheckpointSaved(num_done - 1, len(changed), num_bytes, seconds))

    def _failed(self, num_done: int, error: Exception) -> None:
        """The run goes on; the checkpoint before stays the last."""
        if isinstance(error, SnapshotError) and self._base is not None:  # it may be damaged: the next builds on none
            self._saved, self._base = {}, None
        last = f"the last one is of round {self.num_done - 1}" if self.num_done else "there is none yet"
        logger.error(
            "no checkpoint of round %d in %s: %s: %s; the run goes on, and %s",
            num_done - 1,
            self._folder.path,
            type(error).__name__,
            error,
            last,
            exc_info=None if isinstance(error, OSError | TorchFedRpcError) else error,
        )

    async def _on_disk(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, function)

    async def _go_on_from(self, found: Checkpoint) -> None:
        check_equal(found, self._config)
        if found.round_num > self._trainer.num_rounds:
            raise ConfigError(
                f"the checkpoint has done {found.round_num} rounds, and num_rounds is {self._trainer.num_rounds}: it "
                f"may grow, not shrink"
            )
        state = await self._on_disk(partial(found.read_state, self._trainer.trusted_modules))
        snapshots = found.snapshots()
        while batch := await self._on_disk(partial(_next_batch, snapshots)):
            await self._proxy.restore(batch)
        self._trainer.load_state_dict(state["trainer"])
        for name in self._checkpoints.parts.keys() & state["parts"].keys():
            self._checkpoints.parts[name].load_state_dict(state["parts"][name])
        _set_random_streams(state["streams"])
        self._saved = self._proxy.changes()
        self._base, self.num_done = found, found.round_num


def plain(config: Any) -> dict[str, Any]:
    """Settings by dotted key, with plain values; of anything else its type and a hash of it."""
    return dict(_flattened("", _items(config) or getattr(config, "__dict__", {})))


def check_equal(found: Checkpoint, config: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another configuration.

    Args:
        found: the checkpoint.
        config: this run's, by dotted key; what it does not have of the learners (``proxy.*``) is not compared.

    Raises:
        ConfigError: they differ; the keys are named.
    """
    has_facts = any(key.startswith(_FACTS) for key in config)
    keys = [key for key in {**found.config, **config} if has_facts or not key.startswith(_FACTS)]
    differing = [
        f"{key} was {found.config.get(key, 'not set')!r} and is {config.get(key, 'not set')!r}"
        for key in keys
        if key not in _MAY_DIFFER and found.config.get(key, _MISSING) != config.get(key, _MISSING)
    ]
    if differing:
        raise ConfigError(
            f"the checkpoint of round {found.round_num - 1} is of another configuration: {'; '.join(differing)}. Set "
            f"these as they were, choose another folder, or begin anew with resume=never"
        )


def _flattened(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if inner := _items(value):
            yield from _flattened(f"{prefix}{key}.", inner)
        else:
            yield f"{prefix}{key}", _plain(value)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    try:
        return f"{name} {hashlib.sha256(fingerprint(value)).hexdigest()[:16]}"
    except Exception:  # whatever its pickling raises: one of that type is as good as another
        return name


def _items(value: Any) -> Mapping[str, Any] | None:
    """What a setting has inside, where it is a mapping or an object of plain attributes."""
    if isinstance(value, Mapping):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
    return vars(value) if isinstance(value, SimpleNamespace | argparse.Namespace) else None


def _next_batch(snapshots: Iterator[tuple[str, bytes]]) -> dict[str, bytes]:
    """The next learners' states, as many as may be on their way at once."""
    batch: dict[str, bytes] = {}
    num_bytes = 0
    while num_bytes < _RESTORED_AT_ONCE_BYTES and (following := next(snapshots, None)) is not None:
        batch[following[0]] = following[1]
        num_bytes += len(following[1])
    return batch


def _checkpoints_in(folder: Path) -> Path:
    return folder / SUBFOLDER if (folder / SUBFOLDER).is_dir() else folder


def _random_streams() -> dict[str, Any]:
    """Where the process's own random streams are, from which a trainer may draw between two rounds."""
    return {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}


def _set_random_streams(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])
