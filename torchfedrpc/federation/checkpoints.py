"""Settings of a run's checkpoints, and choice of the checkpoint from which a run resumes."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import hashlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from torchfedrpc.errors import ConfigError
from torchfedrpc.federation.checkpoint_store import Checkpoint, CheckpointStore
from torchfedrpc.proxy import LearnerProxy
from torchfedrpc.wire.fingerprint import fingerprint

logger = logging.getLogger(__name__)

SUBFOLDER = "checkpoints"
"""Name of the folder for checkpoints inside an output folder."""

_PROXY = "proxy."  # prefix of the proxy's settings
_MAY_DIFFER = ("num_rounds", "trainer.num_rounds")  # a later run may have more rounds
_MISSING = object()


class Resumable(Protocol):
    """Trainer with a run that can be saved and resumed."""

    config: Any
    learner_proxy: LearnerProxy

    def state_dict(self) -> dict[str, Any]:
        """Return its state."""

    def load_state_dict(self, state: Any) -> object:
        """Restore a state that `state_dict` returned."""

    @property
    def num_rounds(self) -> int:
        """Number of rounds of a whole run."""

    @property
    def trusted_modules(self) -> list[str]:
        """Packages with classes allowed in its state."""


class Checkpoints:
    """Settings of a run's checkpoints: their folder and frequency, and the checkpoint from which the run resumes.

    Set them on a trainer that loops over ``self.rounds()``, before it trains:

        trainer.checkpoints = tfr.Checkpoints("runs/digits", every=5, resume="auto")

    A checkpoint contains the trainer's ``state_dict()``, the state of every learner that was called, and the driver's
    global random streams, all as of the end of a round. It is written in parallel with the next round; only learners
    called since the previous checkpoint are written. One run uses the folder at a time.

    Args:
        folder: The folder for checkpoints.
        every: Rounds between checkpoints, at least 1; the last round is saved as well. None: Save nothing.
        num_kept: Number of newest checkpoints to keep. An older one is used if the newest is damaged.
        resume: ``never`` starts at the first round and moves an earlier run's checkpoints into a folder
            ``earlier_N``. ``auto`` resumes from the newest checkpoint in the folder, if there is one. Any other value
            is a second folder (of checkpoints, or with a subfolder ``checkpoints``) to resume from if the first has
            none.
        config: Settings that must be equal in a run that resumes, except for ``num_rounds``, which may grow.
            Default: The trainer's config. The proxy's learners, clients and seed must always be equal.

    Attributes:
        store: The checkpoints in the folder.

    Raises:
        ConfigError: If ``every`` or ``num_kept`` is not a whole number of at least 1.
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
        self.store = CheckpointStore(Path(folder), num_kept=num_kept)
        self.is_open = False
        self._resume = str(resume)
        self._other = _other_store(Path(folder), Path(resume)) if self._resume not in ("never", "auto") else None
        self._config = config
        self._found: Checkpoint | None = None

    def open(self) -> Checkpoint | None:
        """Lock the folder and load the checkpoint from which the run resumes. A second call returns it again.

        Returns:
            The checkpoint; None if the run starts at its first round.

        Raises:
            ConfigError: If another run uses the folder, the folder named by ``resume`` has no checkpoint, or the
                configuration differs.
            SnapshotError: If the folder has checkpoints and all of them are damaged.
        """
        if self.is_open:
            return self._found
        try:
            self.store.lock()
            self._found = self._find()
            if self._found is not None and self._config is not None:
                check_equal(self._found, plain(self._config), with_proxy=False)
        except BaseException:
            self.close()
            raise
        self.is_open = True
        return self._found

    def close(self) -> None:
        """Release the folder for other runs. A second call does nothing."""
        self.is_open, self._found = False, None
        self.store.unlock()
        if self._other is not None:
            self._other.unlock()

    def __enter__(self) -> Checkpoints:
        self.open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def config_of(self, trainer: Resumable) -> dict[str, Any]:
        """Return dotted key -> setting, for all settings that must be equal in a run that resumes this trainer's."""
        config = plain(trainer.config if self._config is None else self._config)
        identity = {**trainer.learner_proxy.identity(), "trainer": type(trainer).__qualname__}
        return config | {f"{_PROXY}{name}": value for name, value in identity.items()}

    def _find(self) -> Checkpoint | None:
        if self._resume == "never":
            if (aside := self.store.set_aside()) is not None:
                logger.warning("resume=never: the checkpoints of an earlier run have been moved to %s", aside)
            return None
        if (found := self.store.load()) is not None:
            return found
        if self._other is not None:
            if self._other.folder.is_dir():
                self._other.lock()
                found = self._other.load()
            if found is None:
                raise ConfigError(
                    f"resume={self._other.folder}: there is no checkpoint; resume is never, auto, or a folder with "
                    f"checkpoints"
                )
        elif self.store.is_used:
            logger.warning(
                "%s has no checkpoint, though a run was here: starting at round 0 (a run is saved at the end of its "
                "rounds, and only if its trainer loops over self.rounds())",
                self.store.folder,
            )
        return found


def plain(config: Any) -> dict[str, Any]:
    """Return dotted key -> plain value of all settings; other values are represented by their type and a hash."""
    return dict(_flattened("", settings_of(config)))


def settings_of(config: Any) -> Mapping[str, Any]:
    """Return the settings of a mapping or an object by name."""
    return _items(config) or getattr(config, "__dict__", {})


def check_equal(found: Checkpoint, config: Mapping[str, Any], *, with_proxy: bool) -> None:
    """Compare a checkpoint's configuration with that of a run.

    Args:
        found: The checkpoint.
        config: The run's settings by dotted key.
        with_proxy: Whether to compare the proxy's settings as well.

    Raises:
        ConfigError: If the configurations differ; the message names the keys.
    """
    differing = [
        f"{key} was {_shown(found.config, key)} and is {_shown(config, key)}"
        for key in {**found.config, **config}
        if (with_proxy or not key.startswith(_PROXY))
        and key not in _MAY_DIFFER
        and found.config.get(key, _MISSING) != config.get(key, _MISSING)
    ]
    if differing:
        raise ConfigError(
            f"the checkpoint of round {found.round_num} is of another configuration: {'; '.join(differing)}. Set "
            f"these as they were, choose another folder, or begin anew with resume=never"
        )


def _other_store(folder: Path, resume: Path) -> CheckpointStore | None:
    other = resume / SUBFOLDER if (resume / SUBFOLDER).is_dir() else resume
    return CheckpointStore(other) if other.resolve() != folder.resolve() else None


def _shown(config: Mapping[str, Any], key: str) -> str:
    return repr(config[key]) if key in config else "not set"


def _flattened(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if inner := _items(value):
            yield from _flattened(f"{prefix}{key}.", inner)
        else:
            yield f"{prefix}{key}", _plain(value)


def _items(value: Any) -> Mapping[str, Any] | None:
    """Return the inner settings of a mapping or a plain object."""
    if isinstance(value, Mapping):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
    return vars(value) if isinstance(value, SimpleNamespace | argparse.Namespace) else None


def _plain(value: Any) -> Any:
    if type(value) in (type(None), bool, int, float, str):  # an instance of a subclass would not be read back
        return value if value == value else "nan"  # which is not equal to itself
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, enum.Enum):
        return f"{name}.{value.name}"
    try:
        return f"{name} {hashlib.sha256(fingerprint(value)).hexdigest()[:16]}"
    except Exception:  # a value that cannot be pickled is compared only by its type
        return name
