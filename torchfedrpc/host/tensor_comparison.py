"""Comparison of tensors and numpy arrays: layout, values by bits, and which of them share memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchfedrpc.wire.tensors import equal_bytes, memory_of, reach, take_apart

Describe = Callable[[Any], str]


def tensor_parts(tensor: Tensor) -> list[tuple[str, Any]]:
    """Return the parts of a tensor besides its values and attributes, as (path, part)."""
    parts: list[tuple[str, Any]] = [(".grad", tensor.grad)]
    hooks: Any = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
    if any(hooks):
        parts += zip(("._backward_hooks", "._post_accumulate_grad_hooks"), hooks, strict=True)
    kind, *dense = take_apart(tensor) or ("",)
    return parts + [(f".{kind}[{index}]", part) for index, part in enumerate(dense)]


class Memory:
    """Memory ranges of the tensors and arrays of two object graphs, pair by pair."""

    def __init__(self) -> None:
        # Device -> ranges: start in the live graph, start in the rebuilt one, num_bytes, path.
        self._stretches: dict[str, list[tuple[int, int, int, Any]]] = {}

    def add(self, live: Any, rebuilt: Any, path: Any) -> None:
        """Add a tensor or array and its rebuilt counterpart."""
        if (found := _extent(live)) is not None:
            device, before, num_bytes = found
            stretch = _address(live) + before, _address(rebuilt) + before, num_bytes, path
            self._stretches.setdefault(device, []).append(stretch)

    def difference(self, describe: Describe) -> tuple[Any, str] | None:
        """Return the path and the reason of memory that is shared in one graph only; None if there is none.

        Args:
            describe: Formats a path.
        """
        for stretches in self._stretches.values():
            for side, reason in ((0, "shares memory with {}, and would not"), (1, "would share memory with {}")):
                ordered = sorted(stretches, key=lambda stretch: stretch[side])
                # Overlapping ranges form a block. In both graphs, each range must have the same offset in its block.
                stop, shift, first = -1, 0, None
                for stretch in ordered:
                    start, own_shift = stretch[side], stretch[1] - stretch[0]
                    if start >= stop:
                        stop, shift, first = start + stretch[2], own_shift, stretch[3]
                        continue
                    if own_shift != shift:
                        return stretch[3], reason.format(describe(first))
                    stop = max(stop, start + stretch[2])
        return None

    def occupant(self, part: Any, default: Any) -> Any:
        """Return the path of a live tensor or array that shares memory with a part; ``default`` if none does."""
        if (found := _extent(part)) is not None:
            device, before, num_bytes = found
            start = _address(part) + before
            for own_start, _, own_bytes, path in self._stretches.get(device, ()):
                if start < own_start + own_bytes and own_start < start + num_bytes:
                    return path
        return default


def _extent(part: Any) -> tuple[str, int, int] | None:
    """Return the memory range of a tensor or array: device, bytes before its first element, bytes in all."""
    if isinstance(part, Tensor):
        if part.layout != torch.strided or not part.numel() or part.is_meta:
            return None
        return str(part.device), *_span(part.shape, [step * part.itemsize for step in part.stride()], part.itemsize)
    return ("cpu", *_span(part.shape, part.strides, part.itemsize)) if part.size else None


def _span(shape: Any, strides: Any, item_bytes: int) -> tuple[int, int]:
    low, high = reach(shape, strides)
    return low, high - low + item_bytes


def _address(part: Any) -> int:
    address: int = part.data_ptr() if isinstance(part, Tensor) else part.ctypes.data
    return address


def tensor_difference(live: Tensor, rebuilt: Tensor) -> str | None:
    """Return a difference between tensors of one type that is not in their attributes or `tensor_parts`; or None."""
    if live.grad_fn is not None or not live.is_leaf:
        return "holds an autograd graph: keep tensor.detach(), or call backward() in the same call"
    if live.is_inference():  # also if both share memory, and so are both of this kind
        return "is an inference tensor, and would be a plain one: clone() it outside of inference_mode()"
    # By raw bits: in torch 2.6, a set of dispatch keys is equal to itself only.
    if torch._C._dispatch_keys(live).raw_repr() != torch._C._dispatch_keys(rebuilt).raw_repr():
        return f"would be another kind of tensor ({_kind_of(rebuilt)} instead of {_kind_of(live)})"
    hooks, later_hooks = live._backward_hooks, live._post_accumulate_grad_hooks
    if (hooks and not rebuilt._backward_hooks) or (later_hooks and not rebuilt._post_accumulate_grad_hooks):
        return "has hooks (register_hook), which would be lost"
    if live.device != rebuilt.device:
        return f"is on {live.device}, and would be on {rebuilt.device}"
    if live.dtype != rebuilt.dtype or live.shape != rebuilt.shape:
        return f"would be {_shown(rebuilt)} instead of {_shown(live)}"
    if live.requires_grad != rebuilt.requires_grad:
        return f"would have requires_grad={rebuilt.requires_grad}"
    if getattr(live, "names", ()) != getattr(rebuilt, "names", ()):
        return "would lose the names of its dimensions"
    if live.layout != torch.strided:  # its parts are compared
        return None
    if live.numel() and live.stride() != rebuilt.stride():
        return f"would have strides {rebuilt.stride()} instead of {live.stride()}"
    if live.is_quantized or not live.numel() or live.data_ptr() == rebuilt.data_ptr() or _same_bits(live, rebuilt):
        return None
    return "would have other values"


def array_difference(live: np.ndarray[Any, Any], rebuilt: np.ndarray[Any, Any]) -> str | None:
    """Return a difference between arrays of one type that is not in attributes or object elements; or None."""
    if (reason := dtype_difference(live.dtype, rebuilt.dtype)) is not None:
        return reason
    if live.shape != rebuilt.shape:
        return f"would have the shape {rebuilt.shape} instead of {live.shape}"
    if live.size and live.strides != rebuilt.strides:
        return f"would have strides {rebuilt.strides} instead of {live.strides}"
    if live.flags.writeable != rebuilt.flags.writeable:
        return f"would {'not ' if live.flags.writeable else ''}be writeable"
    if live.dtype.hasobject or live.ctypes.data == rebuilt.ctypes.data:
        return None
    return None if live.tobytes() == rebuilt.tobytes() else "would have other values"


def dtype_difference(live: np.dtype[Any], rebuilt: np.dtype[Any]) -> str | None:
    """Return a difference between two numpy dtypes; None if there is none."""
    if type(live) is not type(rebuilt) or live != rebuilt or live.isalignedstruct != rebuilt.isalignedstruct:
        return f"would have the dtype {rebuilt} instead of {live}"
    if live.metadata is not None and live.metadata != rebuilt.metadata:
        return "would lose the metadata of its dtype"
    return None


def _same_bits(live: Tensor, rebuilt: Tensor) -> bool:
    one, other = (tensor.detach().resolve_conj().resolve_neg().contiguous() for tensor in (live, rebuilt))
    if not (one.is_cpu and other.is_cpu):
        return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    return equal_bytes(memory_of(one), memory_of(other))


def _kind_of(tensor: Tensor) -> str:
    traits = [
        name
        for name, holds in (
            ("conjugated view", tensor.is_conj()),
            ("negated view", tensor.is_neg()),
            ("zero tensor", tensor._is_zerotensor()),
            (str(tensor.layout), tensor.layout != torch.strided),
            (str(tensor.device), tensor.device.type != "cpu"),
        )
        if holds
    ]
    return ", ".join(traits) or "plain"


def _shown(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
