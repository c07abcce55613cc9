"""Numerics of sums and means of tensors: dtypes of intermediate sums, rounding, and error bounds.

| values | dtype of the sum | result of a mean | result of a sum |
| --- | --- | --- | --- |
| floats of at most 32 bits | float32, then float64 | in their dtype | in their dtype |
| float64 | float64 | float64 | float64 |
| complex | by their real and imaginary parts | in their dtype | in their dtype |
| integers | float64, for a sum int64 | nearest integer, halves to even, in their dtype | exact, in their dtype |
| bool | float64, for a sum bool | true for more than half of the weight | true if any is, as with ``+`` |

Every operation here is elementwise, so its bits depend only on its operands: not on strides, threads or the position
in a vector register. A mean of integers is exact before it is rounded if the weights are integers and the weighted
sum stays below 2**53.

Error bound: let u be half an ulp, 2**-24 in float32. A client's value ``w * x`` is rounded if the weight is not
representable in float32 (integers up to 2**24 are), in the product, in each of at most `NUM_FLOAT32_SUMS` sums on the
way to the root, and in the quotient. Further sums are kept in float64; their rounding errors are negligible. So for
any values and any number of clients, a mean is within ``(1 + 1 + 5 + 1) u``, which is 4 ulp, of the exact one,
relative to the mean of the magnitudes ``|x|``; a sum is within 3 ulp. (Pairwise summation: Higham, Accuracy and
Stability of Numerical Algorithms, section 4.2.) Without float64 the bound would grow with log2 of the number of
clients, and would be reached if one client's values dominate. A result with fewer bits is rounded once more, by half
an ulp of its dtype. For float64 values the bound is ``(d + 3) u``, with d the number of sums on the longest path and
u = 2**-53.
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_FLOAT32_SUMS = 5
"""Number of consecutive sums in float32: those of 32 clients, in a balanced tree."""

_WIDER = {torch.float32: torch.float64, torch.complex64: torch.complex128}


def weighted(tensor: Tensor, weight: float = 1, *, exact: bool = False, out: Tensor | None = None) -> Tensor:
    """Return a tensor times a weight, in separate memory, as a term of a sum.

    Args:
        tensor: Dense or in COO layout, of any shape, dtype and device.
        weight: Finite; 1 returns a copy.
        exact: Whether for a sum rather than a mean: integers are kept as int64 and booleans as bool.
        out: A result of `weighted` for another tensor of this shape and device; overwritten if possible.
    """
    plain, dtype = tensor.detach(), _kept_dtype(tensor.dtype, exact=exact)
    if type(plain) is not Tensor:
        plain = plain.as_subclass(Tensor)
    if out is not None and (out.dtype != dtype or out.layout is not torch.strided):
        out = None
    if weight != 1 and plain.dtype == dtype and not dtype.is_complex:
        return torch.mul(plain, float(weight), out=out)
    total = plain.to(dtype, copy=True).resolve_conj() if out is None else out.copy_(plain)
    return total if weight == 1 else _scaled(total, weight)


def added(total: Tensor, other: Tensor, num_sums: int) -> Tensor:
    """Return the sum of two results for tensors of one shape and kind, on the first one's device.

    Args:
        total: The first term; consumed, usually overwritten with the sum.
        other: The second term.
        num_sums: Number of sums on the longest path from a client to this one, inclusive.
    """
    if num_sums > NUM_FLOAT32_SUMS:
        total = total.to(_WIDER.get(total.dtype, total.dtype))
    if other.dtype != total.dtype or other.device != total.device:
        other = other.to(device=total.device, dtype=total.dtype)
    return total.add_(other)


def mean_from(total: Tensor, weight: float, dtype: torch.dtype) -> Tensor:
    """Return the mean, from the weighted sum and the sum of the weights; ``total`` is consumed.

    Args:
        total: A sum of results of `weighted`.
        weight: The sum of the weights; above 0.
        dtype: The dtype of the values, and of the result.
    """
    divisor = torch.full((), float(weight), dtype=_parts(total).dtype)
    if divisor.item() != weight:
        total = total.to(_WIDER.get(total.dtype, total.dtype))
        divisor = torch.full((), float(weight), dtype=torch.float64)
    _parts(total).div_(divisor.to(total.device))  # by a tensor: CUDA multiplies by the reciprocal of a number
    if dtype == torch.bool:
        return total > 0.5
    return total.to(dtype) if _is_inexact(dtype) else total.round_().to(dtype)


def sum_from(total: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum in the dtype of the values; it may be ``total`` itself.

    Args:
        total: A sum of results of `weighted` with ``exact=True``. Sums of 64-bit integers wrap, as in torch.
        dtype: The dtype of the values, and of the result.

    Raises:
        ValueError: If the sum does not fit into an integer dtype of fewer bits.
    """
    if total.dtype == torch.int64 and dtype.itemsize < torch.int64.itemsize and total.numel():
        bounds, least, most = torch.iinfo(dtype), int(total.min()), int(total.max())
        if least < bounds.min or most > bounds.max:
            raise ValueError(f"sums up to {most if most > bounds.max else least}, which does not fit into {dtype}")
    return total.to(dtype)


def kind_of(dtype: torch.dtype) -> str:
    """Return the kind of a dtype. The values of a sum must agree in kind, but may differ in number of bits."""
    if dtype.is_complex:
        return "complex"
    if dtype.is_floating_point:
        return "float"
    return "bool" if dtype == torch.bool else "integer"


def _is_inexact(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _kept_dtype(dtype: torch.dtype, *, exact: bool) -> torch.dtype:
    if dtype.is_complex:
        return torch.complex64 if dtype.itemsize < torch.complex64.itemsize else dtype
    if dtype.is_floating_point:
        return torch.float32 if dtype.itemsize < torch.float32.itemsize else dtype
    if not exact:
        return torch.float64
    return dtype if dtype == torch.bool else torch.int64


def _scaled(total: Tensor, weight: float) -> Tensor:
    _parts(total).mul_(float(weight))
    return total


def _parts(tensor: Tensor) -> Tensor:
    """Return a view of real and imaginary parts, to scale them separately: complex arithmetic rounds more often."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
