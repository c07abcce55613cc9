"""Saving of a run between two rounds, written in parallel with the next one, and restoring from a checkpoint."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from torchfedrpc.errors import ConfigError, SnapshotError, TorchFedRpcError
from torchfedrpc.events import CheckpointSaved
from torchfedrpc.executors.consistent_snapshot import Cut
from torchfedrpc.executors.snapshot_throttle import BUDGET_BYTES
from torchfedrpc.federation.callback_calls import CallbackCalls
from torchfedrpc.federation.checkpoint_store import Checkpoint, Save
from torchfedrpc.federation.checkpoints import Checkpoints, Resumable, check_equal
from torchfedrpc.federation.trainer_state import MissingAttributeError
from torchfedrpc.signals import Finishing
from torchfedrpc.wire.packing import Parcel, pack

logger = logging.getLogger(__name__)

T = TypeVar("T")

_CAPTURE_S = 1.0  # the next round waits so long for learners' states, which its calls would queue behind
_POSTPONE_S = 1.0  # a save is postponed if the previous one outlasts the round by more than this
_CLOSE_S = 30.0  # timeout for a save that waits for a learner in a cancelled call


class Saver:
    """Saver of one run of a trainer, from `begin` to `close`.

    Attributes:
        num_done: Number of rounds in the newest checkpoint.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        trainer: Resumable,
        callbacks: CallbackCalls,
        config: dict[str, Any],
        owns_folder: bool,
    ) -> None:
        self.num_done = 0
        self._checkpoints = checkpoints
        self._trainer = trainer
        self._callbacks = callbacks
        self._proxy = trainer.learner_proxy
        self._config = config
        self._owns_folder = owns_folder
        self._found: Checkpoint | None = None  # what the run resumes from
        self._base: Checkpoint | None = None
        self._saved: dict[str, int] = {}  # version of each learner's state in the base
        self._given_up: set[str] = set()  # learners that were given up and have had a warning
        self._saving: asyncio.Task[None] | None = None
        self._is_due = False
        self._has_warned_of_pool = False
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="torchfedrpc-checkpoints")
        self._finishing = Finishing()
        if checkpoints.every is None:
            self._finishing.close()

    @classmethod
    async def begin(cls, checkpoints: Checkpoints, trainer: Resumable, callbacks: CallbackCalls) -> Saver:
        """Open the checkpoints, and restore trainer, callbacks and learners if there is one to resume from.

        It comes before the trainer's `train`.

        Raises:
            ConfigError: If another run uses the folder, or the checkpoint has another configuration.
            SnapshotError: If all checkpoints are damaged.
            GroupCallError: If learners cannot be restored.
        """
        config = await asyncio.to_thread(checkpoints.config_of, trainer)
        owns_folder = not checkpoints.is_open
        found = await asyncio.to_thread(checkpoints.open)
        saver = cls(checkpoints, trainer, callbacks, config, owns_folder)
        trainer.learner_proxy.before_close(saver.close)
        if found is not None:
            await saver._restore(found)
        return saver

    @property
    def is_resumed(self) -> bool:
        """Whether the run goes on from a checkpoint."""
        return self._found is not None

    async def begin_loop(self) -> None:
        """Restore the trainer once more, since the code of `train` before its loop may have set attributes anew.

        Raises:
            ConfigError: If the trainer lacks an attribute with a state dict.
        """
        if self._found is not None:
            state = await self._read_state(self._found)
            self._trainer.load_state_dict(state["trainer"])
            _set_random_streams(state["streams"])

    async def round_done(self, num_done: int, *, is_last: bool) -> None:
        """Save a round that has ended, before the next one begins, if a checkpoint is due.

        This waits for the states of learners, for at most a second: one may be busy with a call that was cut off. An
        earlier save that is still writing delays it by at most another second, and the next checkpoint by a round if
        it takes longer. After the last round, and after a signal that then cancels the run, this waits for the disk.

        Args:
            num_done: Number of rounds done.
            is_last: Whether the run stops here, though it may have fewer rounds than it was to have.
        """
        is_interrupted = self._finishing.is_requested
        is_last = is_last or is_interrupted or num_done >= self._trainer.num_rounds
        every = self._checkpoints.every
        self._is_due |= every is not None and (is_last or num_done % every == 0)
        if self._is_due and (is_last or await self._has_settled(_POSTPONE_S)):
            await self._settle()
            await self._settle_pools()
            self._is_due = False
            captured = self._start(num_done)
            if is_last:
                await self._settle()
            else:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(captured.wait(), _CAPTURE_S)
        if is_interrupted:
            self._finishing.done()
            await asyncio.get_running_loop().create_future()  # until the run is cancelled

    async def close(self) -> None:
        """Finish a save in progress, for at most 30 s. A second call does nothing."""
        try:
            if self._saving is not None and not await self._has_settled(_CLOSE_S):
                self._saving.cancel()
                await asyncio.wait([self._saving])
        finally:
            self._finishing.close()
            self._disk.shutdown(wait=False)
            if self._owns_folder:
                self._checkpoints.close()
                self._owns_folder = False

    async def _has_settled(self, timeout_s: float) -> bool:
        return self._saving is None or bool((await asyncio.wait([self._saving], timeout=timeout_s))[0])

    async def _settle(self) -> None:
        if self._saving is not None:
            await asyncio.shield(self._saving)

    async def _settle_pools(self) -> None:
        """Wait until the calls in flight of all pools have ended; their results are part of the trainer's state."""
        kept = {id(value) for value in vars(self._trainer).values()}
        for pool in self._proxy.pools:
            if pool.in_flight and id(pool) not in kept and not self._has_warned_of_pool:
                self._has_warned_of_pool = True
                logger.warning(
                    "calls of a pool are in flight as a round ends, and a resume will not have their results (%s): "
                    "keep the pool as an attribute of the trainer",
                    ", ".join(pool.in_flight),
                )
            await pool.settle()

    def _start(self, num_done: int) -> asyncio.Event:
        """Capture the trainer's present state, and start to capture and write those of learners.

        Returns:
            Set when the states of learners have been captured and written; only the commit is left.
        """
        captured = asyncio.Event()
        if self._proxy.stats()["pending_calls"]:
            logger.warning(
                "calls are running as round %d ends: its checkpoint has what they do to learners, not their results",
                num_done,
            )
        versions = self._proxy.changes()
        changed = {name: version for name, version in versions.items() if self._saved.get(name) != version}
        try:
            states = {"trainer": self._trainer.state_dict(), "callbacks": self._callbacks.state_dict()}
            state = pack({**states, "streams": _random_streams()})
            cut = self._proxy.cut(changed)
        except Exception as error:
            self._log_failure(num_done, error)
            captured.set()
        else:
            self._saving = asyncio.ensure_future(self._save(num_done, state, cut, changed, captured))
        return captured

    async def _save(
        self, num_done: int, state: Parcel, cut: Cut, changed: Mapping[str, int], captured: asyncio.Event
    ) -> None:
        began = time.monotonic()
        try:
            save = await self._on_disk(partial(self._checkpoints.store.begin, num_done, self._base))
            try:
                num_bytes = await self._write_learners(save, cut)
                captured.set()
                self._base = await self._on_disk(partial(save.commit, self._config, state))
            except BaseException:
                await self._on_disk(save.abort)
                raise
        except Exception as error:
            if isinstance(error, SnapshotError):  # the file may be damaged, so the next save contains all learners
                self._saved, self._base = {}, None
            self._log_failure(num_done, error)
            return
        finally:
            cut.close()
            captured.set()
        self.num_done = num_done
        self._saved.update(changed)
        self._proxy.publish(CheckpointSaved(num_done - 1, len(changed), num_bytes, time.monotonic() - began))

    async def _write_learners(self, save: Save, cut: Cut) -> int:
        """Write snapshots as they arrive, and return their size in bytes."""
        num_bytes = 0
        async for client_id, data in cut:
            num_bytes += len(data)
            if data:
                await self._on_disk(partial(save.add, client_id, data))
                continue
            save.leave_out(client_id)
            if client_id not in self._given_up:
                self._given_up.add(client_id)
                logger.warning(
                    "%s was given up, so checkpoints no longer have it: a run that resumes makes it anew", client_id
                )
        return num_bytes

    def _log_failure(self, num_done: int, error: Exception) -> None:
        """Log that a round has no checkpoint; the run continues."""
        last = f"the last one is of round {self.num_done}" if self.num_done else "there is none yet"
        logger.error(
            "no checkpoint of round %d in %s: %s: %s; the run goes on, and %s",
            num_done,
            self._checkpoints.store.folder,
            type(error).__name__,
            error,
            last,
            exc_info=None if isinstance(error, OSError | TorchFedRpcError) else error,
        )

    async def _read_state(self, found: Checkpoint) -> dict[str, Any]:
        return await self._on_disk(partial(found.read_state, self._trainer.trusted_modules))

    async def _on_disk(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, function)

    async def _restore(self, found: Checkpoint) -> None:
        check_equal(found, self._config, with_proxy=True)
        if found.round_num > self._trainer.num_rounds:
            raise ConfigError(
                f"the checkpoint has done {found.round_num} rounds, and num_rounds is {self._trainer.num_rounds}: it "
                f"may grow, not shrink"
            )
        logger.info("going on after round %d, from %s", found.round_num, found.store.folder)
        self._found = found
        state = await self._read_state(found)
        snapshots = found.snapshots()
        while batch := await self._on_disk(partial(_next_batch, snapshots)):
            await self._proxy.continue_from(batch)
        try:
            self._trainer.load_state_dict(state["trainer"])
        except MissingAttributeError:  # `train` may make it before its loop, as `begin_loop` sees
            logger.debug("a part of the trainer's state is restored at its loop alone", exc_info=True)
        self._callbacks.load_state_dict(state["callbacks"])
        _set_random_streams(state["streams"])
        self._saved = self._proxy.changes()
        self._base, self.num_done = found, found.round_num


def _next_batch(snapshots: Iterator[tuple[str, bytes]]) -> dict[str, bytes]:
    """Return the next snapshots of 32 MiB together, or a single larger one."""
    batch: dict[str, bytes] = {}
    num_bytes = 0
    while num_bytes < BUDGET_BYTES and (following := next(snapshots, None)) is not None:
        batch[following[0]] = following[1]
        num_bytes += len(following[1])
    return batch


def _random_streams() -> dict[str, Any]:
    """Return the state of the process's global random streams, from which a trainer may draw between rounds."""
    return {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}


def _set_random_streams(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])
