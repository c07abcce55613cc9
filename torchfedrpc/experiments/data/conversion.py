"""Inputs and labels of common kinds as tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchfedrpc.errors import ConfigError

_HALF_RANGE = 127.5  # pixels range from 0 to 255


def stack_inputs(values: Iterable[Any], name: str) -> Tensor:
    """Return inputs as one tensor, [num_samples, ...], float32.

    Args:
        values: Tensors, arrays, lists and numbers, whose values are kept, or images of PIL, which become [channels,
            height, width] between -1 and 1.
        name: Name of the values in error messages.

    Raises:
        ConfigError: If there are none, one is of another kind, or they differ in shape.
    """
    tensors: list[Tensor] = []
    for number, value in enumerate(values):
        tensor = _tensor(value)
        if tensor is None:
            raise ConfigError(
                f"{name}: input {number} is {_shown(value)}: numbers, arrays, tensors or images are expected"
            )
        if tensors and tensor.shape != tensors[0].shape:
            raise ConfigError(
                f"{name}: input {number} has shape {list(tensor.shape)}, and input 0 has {list(tensors[0].shape)}: "
                f"bring all to one shape first"
            )
        tensors.append(tensor)
    if not tensors:
        raise ConfigError(f"{name}: there are no samples")
    return torch.stack(tensors)


def whole_numbers(values: Sequence[Any] | Tensor, name: str) -> Tensor:
    """Return classes or groups as a tensor, [num_samples], int64.

    Args:
        values: Whole numbers from 0, of any numeric type.
        name: Name of one of the values in error messages.

    Raises:
        ConfigError: If a value is no whole number from 0.
    """
    numbers = [_whole_number(value) for value in values]
    for place, number in enumerate(numbers):
        if number is None:
            raise ConfigError(
                f"{name} {place} is {_shown(values[place])}: whole numbers from 0 are expected; number them first"
            )
    return torch.tensor(numbers, dtype=torch.int64)


def group_numbers(values: Sequence[Any] | Tensor, name: str) -> Tensor:
    """Return groups as a tensor, [num_samples], int64: whole numbers as they are, texts numbered in sorted order.

    Args:
        values: All whole numbers from 0, or all texts.
        name: Name of one of the values in error messages.

    Raises:
        ConfigError: If a value is another one.
    """
    if not isinstance(values, Tensor) and all(isinstance(value, str) for value in values):
        places = {text: place for place, text in enumerate(sorted(set(values)))}
        return torch.tensor([places[text] for text in values], dtype=torch.int64)
    return whole_numbers(values, name)


def _tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", torch.float32)
    if hasattr(value, "getbands"):
        return _image(value)
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths
        return None
    return torch.from_numpy(array.astype(np.float32)) if array.dtype.kind in "biuf" else None


def _image(image: Any) -> Tensor | None:
    """Return an image of PIL with 8 bits per channel, or fewer, as [channels, height, width]; None for others."""
    pixels = np.asarray(image.convert("RGB") if image.mode == "P" else image)
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * 255
    if pixels.dtype != np.uint8:
        return None
    channels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(channels.astype(np.float32)) / _HALF_RANGE - 1


def _whole_number(value: Any) -> int | None:
    value = _scalar(value)
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return int(value) if is_whole and value >= 0 else None


def _scalar(value: Any) -> Any:
    """Return the number in a tensor or array that has one; any other value as it is."""
    of_one = (isinstance(value, Tensor) and value.numel() == 1) or (
        isinstance(value, np.ndarray | np.generic) and value.size == 1
    )
    return value.item() if of_one else value


def _shown(value: Any) -> str:
    value = _scalar(value)
    return repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
