"""Checkpoints of a trainer's run: where they are, how often they are taken, and which one a run goes on from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torchfedrpc.errors import ConfigError
from torchfedrpc.federation.checkpoint_config import FACTS, check_equal, plain
from torchfedrpc.federation.checkpoint_folder import Checkpoint, CheckpointFolder
from torchfedrpc.proxy import LearnerProxy

logger = logging.getLogger(__name__)

SUBFOLDER = "checkpoints"
"""Where an output folder has its checkpoints."""


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
        for name, value in (("every (checkpoint_every)", every), ("num_kept", num_kept)):
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
                check_equal(self._found, plain(self._config), with_facts=False)
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
        return config | {f"{FACTS}{name}": value for name, value in trainer.learner_proxy.identity().items()}

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
                raise ConfigError(
                    f"resume={self._other.path}: there is no checkpoint; resume is never, auto, or a folder that "
                    f"has some"
                )
            return found
        if self._own.is_used:
            logger.warning(
                "%s has no checkpoint, though a run was here: starting at round 0 (a run is saved at the end of its "
                "rounds, and only if its trainer loops over self.rounds())",
                self._own.path,
            )
        return None


def _checkpoints_in(folder: Path) -> Path:
    return folder / SUBFOLDER if (folder / SUBFOLDER).is_dir() else folder
