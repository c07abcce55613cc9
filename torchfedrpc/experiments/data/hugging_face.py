"""Data sets of the Hugging Face library ``datasets``: saved on disk, or made by a function."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchfedrpc.errors import ConfigError, suggest
from torchfedrpc.experiments import extras
from torchfedrpc.experiments.data.conversion import stack_inputs, whole_numbers
from torchfedrpc.experiments.data.samples import Samples, TrainTest, stratified_split
from torchfedrpc.registry import dataset


@dataset("hugging_face")
def hugging_face(
    *,
    data: Any,
    input: str | Sequence[str] = "image",
    label: str = "label",
    group: str | None = None,
    train: str = "train",
    test: str | None = "test",
    test_fraction: float = 0.2,
    seed: int = 0,
) -> TrainTest:
    """Load columns of a ``datasets.Dataset`` or ``DatasetDict``.

    Images become [channels, height, width] between -1 and 1, arrays and numbers keep their values; all are float32.

    Args:
        data: The object, a recipe of a function that returns it, or a folder that its ``save_to_disk`` wrote.
        input: Column of the inputs; or several columns of numbers, which become one input of that length.
        label: Column of the classes, which are whole numbers from 0.
        group: Column of the natural clients, of any values; they are numbered in their order.
        train: Split of a ``DatasetDict`` for the training set.
        test: Split for the test set; None to hold out a fraction of ``train``, as of a ``Dataset``.
        test_fraction: Fraction of each class that is held out then.
        seed: Seed of what is held out.

    Raises:
        ConfigError: If datasets is not installed, the folder is missing or damaged, or a split or column does not
            exist or has other values.
    """
    extras.require("datasets", "dataset=hugging_face", extra="libraries")
    with _no_monitor_thread():
        splits = _splits(data, [train] if test is None else [train, test])
        parts = [_samples(split, [input] if isinstance(input, str) else list(input), label) for split in splits]
        if group is not None:
            parts = _grouped(parts, [_column(split, group, "group") for split in splits], group)
    if len(parts) == 1:
        return stratified_split(parts[0], test_fraction=test_fraction, seed=seed)
    return TrainTest(*parts)


def _splits(data: Any, names: Sequence[str]) -> list[Any]:
    """Return one split for each name; a single ``Dataset`` is the only one."""
    from datasets import Dataset, load_from_disk  # noqa: PLC0415 - optional, and takes seconds to import

    if isinstance(data, str | Path):
        folder = Path(data).expanduser()
        try:
            data = load_from_disk(str(folder))
        except Exception as error:  # of pyarrow, json and others
            raise ConfigError(
                f"dataset.data={folder}: {_fault(folder)}: {type(error).__name__} {error}; a folder is expected that "
                f"save_to_disk of a datasets.Dataset or DatasetDict wrote"
            ) from error
    if not isinstance(data, Mapping):
        data, names = {"": data}, [""]
    for name, setting in zip(names, ("train", "test"), strict=False):
        if name not in data:
            raise ConfigError(f"dataset.{setting}={name}: there is no such split{suggest(name, data)}")
        if not isinstance(data[name], Dataset):
            found = type(data[name]).__name__
            raise ConfigError(f"dataset.data: a datasets.Dataset or DatasetDict is expected, not a {found}")
    return [data[name] for name in names]


@contextmanager
def _no_monitor_thread() -> Iterator[None]:
    """Keep tqdm from starting its thread in a block: a process with threads cannot be forked into workers."""
    from tqdm import tqdm  # noqa: PLC0415 - comes with datasets

    before, tqdm.monitor_interval = tqdm.monitor_interval, 0
    try:
        yield
    finally:
        tqdm.monitor_interval = before


def _fault(folder: Path) -> str:
    """Return what is wrong with a folder that cannot be loaded: the name of a file, if one cannot be read."""
    from datasets import Dataset  # noqa: PLC0415 - optional

    readers = {
        ".json": lambda path: json.loads(path.read_bytes()),
        ".arrow": lambda path: Dataset.from_file(str(path)),
    }
    for path in sorted(folder.rglob("*")):
        try:
            readers.get(path.suffix, str)(path)
        except Exception:
            return f"{path} is damaged"
    return "it cannot be loaded"


def _samples(split: Any, inputs: Sequence[str], label: str) -> Samples:
    columns = [stack_inputs(_column(split, name, "input"), f"dataset.input={name}") for name in inputs]
    if len(columns) > 1 and any(column.dim() > 1 for column in columns):
        raise ConfigError(f"dataset.input={list(inputs)}: of several columns each must have a number per sample")
    labels = _column(split, label, "label")
    if isinstance(labels[0], str):
        raise ConfigError(
            f"dataset.label={label} has strings, such as {labels[0]!r}: number the classes by "
            f"class_encode_column({label!r}) first"
        )
    tensor: Tensor = columns[0] if len(columns) == 1 else torch.stack(columns, dim=1)
    return Samples(tensor, whole_numbers(labels, f"dataset.label={label}: label"))


def _column(split: Any, name: str, setting: str) -> Any:
    """Return a column: values of a transform that was set on the split, images of PIL, or arrays and numbers."""
    from datasets import Image  # noqa: PLC0415 - optional

    is_transformed = split.format["type"] == "custom"
    names = list(split[0]) if is_transformed else split.column_names
    if name not in names:
        raise ConfigError(f"dataset.{setting}={name}: there is no such column{suggest(name, names)}")
    if is_transformed:
        return [row[name] for row in split]
    if isinstance(split.features[name], Image):
        return split.with_format(None)[name]  # decoded one after another
    return split.with_format("numpy" if setting == "input" else None)[name][:]


def _grouped(parts: Sequence[Samples], columns: Sequence[Sequence[Any]], group: str) -> list[Samples]:
    """Return the samples with the values of a column as groups, which are numbered over all splits."""
    values = {value for column in columns for value in column}
    if None in values:
        raise ConfigError(f"dataset.group={group} has samples without a value: remove them, or fill them in")
    numbers = {value: number for number, value in enumerate(sorted(values))}
    return [
        Samples(part.inputs, part.labels, torch.tensor([numbers[value] for value in column]))
        for part, column in zip(parts, columns, strict=True)
    ]
