"""Saves a run at the ends of its rounds, beside the next, and has it go on from what was saved."""

from __future__ import annotations

import asyncio
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
from torchfedrpc.executors.room import BUDGET_BYTES
from torchfedrpc.federation.checkpoint_config import check_equal
from torchfedrpc.federation.checkpoint_folder import Checkpoint
from torchfedrpc.federation.checkpoints import Checkpoints, Resumable
from torchfedrpc.signals import Finishing
from torchfedrpc.wire.packing import Parcel, pack

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PATIENCE_S = 1.0
_LAST_PATIENCE_S = 30.0  # for a learner that a cancelled call still has


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
            SnapshotError: the checkpoint is damaged.
            GroupCallError: learners' states cannot be restored.
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
                num_done,
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
                        continue
                    files.leave_out(client_id)
                    if client_id not in self._lost:
                        self._lost.add(client_id)
                        logger.warning(
                            "%s was given up, and is in no checkpoint any more: a run that goes on from one makes it "
                            "anew",
                            client_id,
                        )
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
        last = f"the last one is of round {self.num_done}" if self.num_done else "there is none yet"
        logger.error(
            "no checkpoint of round %d in %s: %s: %s; the run goes on, and %s",
            num_done,
            self._folder.path,
            type(error).__name__,
            error,
            last,
            exc_info=None if isinstance(error, OSError | TorchFedRpcError) else error,
        )

    async def _on_disk(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, function)

    async def _go_on_from(self, found: Checkpoint) -> None:
        check_equal(found, self._config, with_facts=True)
        if found.round_num > self._trainer.num_rounds:
            raise ConfigError(
                f"the checkpoint has done {found.round_num} rounds, and num_rounds is {self._trainer.num_rounds}: it "
                f"may grow, not shrink"
            )
        logger.info("going on after round %d, from %s", found.round_num, found.folder)
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


def _next_batch(snapshots: Iterator[tuple[str, bytes]]) -> dict[str, bytes]:
    """The next learners' states, as many as may be on their way at once."""
    batch: dict[str, bytes] = {}
    num_bytes = 0
    while num_bytes < BUDGET_BYTES and (following := next(snapshots, None)) is not None:
        batch[following[0]] = following[1]
        num_bytes += len(following[1])
    return batch


def _random_streams() -> dict[str, Any]:
    """Where the process's own random streams are, from which a trainer may draw between two rounds."""
    return {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}


def _set_random_streams(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])
