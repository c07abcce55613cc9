"""Means of models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

StateDict = Mapping[str, Tensor]
"""A model's parameters and buffers by name, as ``Module.state_dict()`` gives them."""


@torch.no_grad()
def weighted_mean(states: Sequence[StateDict], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """Average state dicts entry by entry, as FedAvg does (McMahan et al. 2017).

    Additions follow the order of ``states``, so equal arguments give equal bits. Sums are kept in the
    entry's own dtype, those of floats below 32 bits in float32 and those of integers in float64; beside the
    sum there is at most one temporary of an entry's size.

    Args:
        states: at least one state dict; all have the same names and shapes.
        weights: one number >= 0 for each, such as its count of samples. Default: all count alike.

    Returns:
        The mean, on the device and in the dtype of the first state dict. Integers are rounded to the
        nearest, halves to even; a boolean is true where more than half of the weight says so.

    Raises:
        ValueError: there is nothing to average, the state dicts do not match, or the weights are unusable.
        TypeError: an entry is no tensor.
    """
    factors = _checked_weights(len(states), weights)
    for place, state in enumerate(states):
        _check_match(states[0], state, place)
    return {name: _mean([state[name] for state in states], factors) for name in states[0]}


def _mean(tensors: list[Tensor], factors: list[float]) -> Tensor:
    first = tensors[0]
    dtype = _sum_dtype(first.dtype)
    total = torch.zeros_like(first, dtype=dtype, requires_grad=False)
    for tensor, factor in zip(tensors, factors, strict=True):
        total.add_(tensor.to(device=first.device, dtype=dtype), alpha=factor)
    total /= math.fsum(factors)
    if first.dtype == torch.bool:
        return total > 0.5
    return total.to(first.dtype) if _is_inexact(first.dtype) else total.round_().to(first.dtype)


def _is_inexact(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    if not _is_inexact(dtype):
        return torch.float64
    if dtype.is_complex:
        return torch.complex64 if dtype.itemsize < torch.complex64.itemsize else dtype
    return torch.float32 if dtype.itemsize < torch.float32.itemsize else dtype


def _checked_weights(num_states: int, weights: Sequence[float] | None) -> list[float]:
    if num_states == 0:
        raise ValueError("nothing to aggregate: the list of state dicts is empty")
    if weights is None:
        return [1.0] * num_states
    factors = [float(weight) for weight in weights]
    if len(factors) != num_states:
        raise ValueError(f"{num_states} state dicts need as many weights, not {len(factors)}")
    if not all(math.isfinite(factor) and factor >= 0 for factor in factors) or not sum(factors) > 0:
        raise ValueError(f"weights must be finite, none below 0 and not all 0; they begin with {factors[:8]}")
    return factors


def _check_match(first: StateDict, other: StateDict, place: int) -> None:
    if first.keys() != other.keys():
        odd = [name for name in (*first, *other) if name not in first or name not in other]
        raise ValueError(f"the state dicts at 0 and {place} differ in their names: only one has {', '.join(odd[:5])}")
    for name, tensor in other.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"entry {name!r} of the state dict at {place} is a {type(tensor).__name__}, not a tensor")
        if tensor.shape != first[name].shape:
            raise ValueError(
                f"entry {name!r} has shape {list(tensor.shape)} in the state dict at {place}, "
                f"and {list(first[name].shape)} in the one at 0"
            )
