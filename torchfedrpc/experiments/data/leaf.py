"""JSON files of the benchmark LEAF, whose users are the groups."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments.data.conversion import whole_numbers
from torchfedrpc.experiments.data.samples import Samples, TrainTest
from torchfedrpc.registry import dataset


@dataset("leaf")
def leaf(*, root: str, shape: Sequence[int] | None = None) -> TrainTest:
    """Load JSON files of LEAF (Caldas et al. 2018), as its preprocessing writes them.

    The folders ``train`` and ``test`` in ``root`` have files with ``users``, ``num_samples``, and ``user_data``,
    which has ``x`` (numbers) and ``y`` (classes from 0) of each user. Users are the groups, in the order of the files
    by name; those who are in the test set alone come last.

    Args:
        root: Folder of ``train`` and ``test``, such as ``leaf/data/femnist/data``.
        shape: Shape of an input, such as [1, 28, 28]. Default: As in the files.

    Raises:
        ConfigError: If a folder is missing, a file is damaged or of another kind, or inputs do not fit ``shape``.
    """
    numbers: dict[str, int] = {}
    parts = [_read(Path(root).expanduser(), part, shape, numbers) for part in ("train", "test")]
    return TrainTest(*parts)


def _read(root: Path, part: str, shape: Sequence[int] | None, numbers: dict[str, int]) -> Samples:
    """Read the files of a folder; new users are added to ``numbers``."""
    paths = sorted((root / part).glob("*.json"))
    if not paths:
        raise ConfigError(
            f"dataset.root={root}: there are no files {part}/*.json: set dataset.root to the folder that has train/ "
            f"and test/, which LEAF's preprocess.sh writes"
        )
    seen: dict[str, Path] = {}
    found = []
    for path in paths:
        for user, data in _users(path):
            if user in seen:
                raise ConfigError(f"{path}: user {user} is also in {seen[user]}: keep one of them")
            seen[user] = path
            if len(data["y"]):
                number = numbers.setdefault(user, len(numbers))
                found.append(_samples(f"{path}: user {user}", data, shape, number))
    if not found:
        raise ConfigError(f"{root / part}: no user has samples")
    shapes = {tuple(samples.inputs.shape[1:]) for samples in found}
    if len(shapes) > 1:
        raise ConfigError(f"{root / part}: inputs have several shapes, such as {sorted(shapes)[:2]}: one is expected")
    return Samples.concatenated(found)


def _users(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the users of a file, with their ``x`` and ``y``."""
    try:
        content = json.loads(path.read_bytes())
        counts = dict(zip(content["users"], content["num_samples"], strict=True))
        users = {user: content["user_data"][user] for user in counts}
        wrong = [user for user, data in users.items() if not len(data["x"]) == len(data["y"]) == counts[user]]
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{path} is no file of LEAF, or damaged: {type(error).__name__} {error}; a JSON object with users, "
            f"num_samples and user_data is expected"
        ) from error
    if wrong:
        raise ConfigError(f"{path} is damaged: num_samples of user {wrong[0]} is not the number of its x and its y")
    yield from users.items()


def _samples(name: str, data: Mapping[str, Any], shape: Sequence[int] | None, number: int) -> Samples:
    try:
        inputs = torch.from_numpy(np.asarray(data["x"], dtype=np.float32))
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{name}: x must be numbers of one shape: {error}; turn texts and file names into numbers"
        ) from error
    if shape is not None:
        try:
            inputs = inputs.reshape(len(inputs), *shape)
        except RuntimeError:
            found = list(inputs.shape[1:])
            raise ConfigError(
                f"{name}: an input has shape {found}, which dataset.shape={list(shape)} does not fit"
            ) from None
    labels = whole_numbers(data["y"], f"{name}: label")
    return Samples(inputs, labels, torch.full((len(labels),), number))
