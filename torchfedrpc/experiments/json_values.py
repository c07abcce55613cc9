"""Values as JSON has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_MAX_TEXT = 1000


def json_value(value: Any) -> Any:
    """Return a value that JSON has: null for NaN and infinity, and text for errors and other objects."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    return f"{type(value).__name__}: {value}"[:_MAX_TEXT]


def json_number(value: Any) -> float | None:
    """Return a number, or an array or tensor of one element, as a number that JSON has: None for NaN and infinity.

    Raises:
        TypeError: If it is no number.
    """
    try:
        number = float(value)
    except (ValueError, RuntimeError) as error:  # of texts, and of tensors of several elements
        raise TypeError(str(error)) from None
    return number if math.isfinite(number) else None
