"""Fingerprints: bytes that are equal if and only if two values are equal bit for bit."""

from __future__ import annotations

import io
import pickle
import reprlib
from typing import Any

from torch import Tensor

from torchfedrpc.wire.serializer import ParameterSerializer

_MAX_DEPTH = 8


def fingerprint(value: Any, *, with_gradients: bool = False) -> bytes:
    """Return bytes that are equal for equal values of equal types.

    Equal means the same bits in floats, tensors and arrays, and the same order in lists and dicts, but not in sets.
    Whether equal parts are one object or two makes no difference, unlike in a pickle.

    Args:
        value: Any object that pickles.
        with_gradients: Whether the gradients of its tensors count.

    Raises:
        Exception: If it cannot be pickled.
    """
    try:
        return _print(value, with_gradients, fast=True)
    except (ValueError, RecursionError):  # it refers to itself
        return _print(value, with_gradients, fast=False)


def difference(one: Any, other: Any, *, with_gradients: bool = False) -> str | None:
    """Return where a value differs from another.

    Args:
        one: A value.
        other: The expected value.
        with_gradients: Whether the gradients of tensors count.

    Returns:
        The path to the first part that differs, such as ``['model_weights']['0.bias']``, with both values if they are
        short; an empty string for the whole; None if they are equal bit for bit.

    Raises:
        Exception: If a value cannot be pickled.
    """
    return _difference(one, other, with_gradients, 0)


def _difference(one: Any, other: Any, with_gradients: bool, depth: int) -> str | None:
    if fingerprint(one, with_gradients=with_gradients) == fingerprint(other, with_gradients=with_gradients):
        return None
    if type(one) is not type(other):
        return f" (a {type(one).__name__} instead of a {type(other).__name__})"
    if isinstance(one, bool | int | float | str | bytes):
        return f" ({reprlib.repr(one)} instead of {reprlib.repr(other)})"
    parts, others = _parts(one), _parts(other)
    for name in (parts | others) if depth < _MAX_DEPTH else ():
        if name not in parts or name not in others:
            return f"{name} ({'one too many' if name in parts else 'missing'})"
        if (path := _difference(parts[name], others[name], with_gradients, depth + 1)) is not None:
            return f"{name}{path}"
    return ""


def _parts(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {f"[{key!r}]": part for key, part in value.items()}
    if isinstance(value, list | tuple):
        return {f"[{index}]": part for index, part in enumerate(value)}
    if isinstance(value, Tensor):
        return {}
    return {f".{name}": part for name, part in getattr(value, "__dict__", {}).items()}


def _print(value: Any, with_gradients: bool, *, fast: bool) -> bytes:
    file = io.BytesIO()
    pickler = _Printer(file, with_gradients)
    pickler.fast = fast
    pickler.dump(value)
    return file.getvalue()


class _Printer(pickle.Pickler):
    """A pickler for fast mode, without a memo: references to one object and to equal objects look the same."""

    def __init__(self, file: io.BytesIO, with_gradients: bool) -> None:
        super().__init__(file, protocol=5)
        self._with_gradients = with_gradients

    def persistent_id(self, obj: Any) -> bytes | tuple[str, list[bytes]] | None:
        if isinstance(obj, Tensor):
            gradient = obj.grad if self._with_gradients and obj.is_leaf else None
            value = type(obj).__qualname__, obj.requires_grad, obj.detach(), vars(obj), gradient
            return ParameterSerializer.serialize(value)
        if isinstance(obj, set | frozenset):
            return type(obj).__name__, sorted(
                _print(element, self._with_gradients, fast=self.fast) for element in obj
            )
        return None
