"""Compression of updates: a client's change of the weights in fewer bytes, as pure functions of state dicts.

An update has the change of each trained parameter; all other entries, such as buffers and integers, are exact.
Changes are computed in float32, of float64 parameters in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from torchfedrpc.errors import ConfigError, suggest
from torchfedrpc.federation.aggregation import StateDict

Update = Mapping[str, Any]
"""What `encode` returns: ``exact``, a state dict, and ``change``, which only the codec can read."""

CODECS = ("bf16", "int8", "top_k")


def check_codec(codec: Any, ratio: Any) -> None:
    """Check a trainer's ``compression``, which may be None, and ``compression_ratio``.

    Raises:
        ConfigError: If there is no such codec, or the ratio is out of range.
    """
    if codec is not None and codec not in CODECS:
        raise ConfigError(
            f"the trainer's compression is null, {', '.join(CODECS[:-1])} or {CODECS[-1]}, not {codec!r:.200}"
            f"{suggest(str(codec), CODECS)}"
        )
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise ConfigError(f"the trainer's compression_ratio is above 0 and at most 1, not {ratio!r:.200}")


def encode(
    weights: StateDict,
    received: StateDict,
    trained: Collection[str],
    codec: str,
    *,
    ratio: float = 1.0,
    residual: StateDict | None = None,
) -> tuple[Update, StateDict]:
    """Return an update, and the residual: what the codec leaves out of the change and the residual before.

    With error feedback the residual is added to the next change, so nothing is lost for good (Seide et al. 2014;
    Karimireddy et al. 2019). Bounds of the residual ``e`` of a change ``x``, beside rounding in its dtype:

    - ``bf16``: ``|e| <= 2^-8 * |x|`` for each value (of at least 2^-126), by rounding to the nearest.
    - ``int8``: ``|e| <= max|x| / 254`` for each value of a tensor, by rounding to the nearest of 255 multiples of
      ``max|x| / 127``.
    - ``top_k``: ``||e||^2 <= (1 - k / n) * ||x||^2`` for the whole update of ``n`` values, of which it has the ``k =
      ceil(ratio * n)`` largest magnitudes (Stich et al. 2018); of equal ones the first.

    Args:
        weights: The weights after training.
        received: The weights before.
        trained: Names of the trained parameters. Those that are no floats are exact.
        codec: ``bf16``, ``int8`` or ``top_k``.
        ratio: Fraction of the values that ``top_k`` takes, above 0 and at most 1.
        residual: The residual of the update before. Default: Zeros.

    Raises:
        FloatingPointError: If a change is not finite, or too large for the codec.
    """
    # In the order of `received`, which the decoder has too: another one would move values of top_k to other entries.
    names = [name for name in received if name in trained and weights[name].is_floating_point()]
    change = {name: _wide(weights[name]) - _wide(received[name]).to(weights[name].device) for name in names}
    if residual:
        change = {name: value + residual[name].to(value.device) for name, value in change.items()}
    encoded: Any
    if codec == "top_k":
        encoded = _largest(change, ratio)
        decoded = _of_largest(encoded, change)
    else:
        to_code, to_change = _BY_TENSOR[codec]
        encoded = {name: to_code(value) for name, value in change.items()}
        decoded = {name: to_change(encoded[name]).to(value.dtype) for name, value in change.items()}
    rest = {name: value - decoded[name] for name, value in change.items()}
    if odd := [name for name, value in rest.items() if not value.isfinite().all()]:
        raise FloatingPointError(f"the change of {odd[0]} is not finite, or too large for {codec}")
    exact = {name: value for name, value in weights.items() if name not in change}
    return {"exact": exact, "change": encoded}, rest


def decode(update: Any, received: StateDict, codec: str) -> dict[str, Tensor]:
    """Return the weights that an update stands for, in the order and the dtypes of ``received``.

    Args:
        update: The first result of `encode`, maybe of a client that is wrong.
        received: The weights from which the client trained.
        codec: As in `encode`.

    Raises:
        ValueError: If the update is none of this codec, or does not match the weights.
    """
    try:
        exact, encoded = update["exact"], update["change"]
        names = [name for name in received if name not in exact]
        before = {name: _wide(received[name]) for name in names}
        if codec == "top_k":
            change = _of_largest(encoded, before)
        else:
            change = {name: _BY_TENSOR[codec][1](encoded[name]).to(value.device) for name, value in before.items()}
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"an update is none of {codec}: {type(error).__name__}: {error}") from error
    if odd := [name for name in exact if name not in received]:
        raise ValueError(f"an update has {odd[0]!r}, which the weights lack")
    if odd := [name for name in names if change[name].shape != received[name].shape]:
        found = f"shape {list(change[odd[0]].shape)}, and in the weights {list(received[odd[0]].shape)}"
        raise ValueError(f"entry {odd[0]!r} has in an update {found}")
    changed = {
        name: (value + change[name].to(value.dtype)).to(received[name].dtype) for name, value in before.items()
    }
    return {name: changed[name] if name in changed else exact[name] for name in received}


def tensor_bytes(value: Any) -> int:
    """Return the number of bytes of the tensors in nested mappings."""
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(tensor_bytes, value.values())) if isinstance(value, Mapping) else 0


def _wide(value: Tensor) -> Tensor:
    return value.detach() if value.dtype == torch.float64 else value.detach().float()


def _to_int8(change: Tensor) -> dict[str, Tensor]:
    values = change.double()
    scale = (values.abs().max() if values.numel() else values.new_zeros(())) / 127
    steps = (values / scale if scale > 0 else torch.zeros_like(values)).round()
    return {"steps": steps.clamp(-127, 127).to(torch.int8), "scale": torch.where(scale.isfinite(), scale, torch.nan)}


def _of_int8(code: Mapping[str, Tensor]) -> Tensor:
    scale = code["scale"]
    if code["steps"].dtype != torch.int8 or scale.dim():
        raise ValueError(f"steps of {code['steps'].dtype} and a scale of shape {list(scale.shape)}")
    return code["steps"].double() * scale


_BY_TENSOR: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "bf16": (lambda change: change.to(torch.bfloat16), lambda code: code.double()),
    "int8": (_to_int8, _of_int8),
}
"""Codec -> encoder and decoder of one tensor."""


def _largest(change: StateDict, ratio: float) -> dict[str, Tensor]:
    """Return ``indices`` into the flat change, in order, and ``values``."""
    flat = torch.cat([value.flatten() for value in change.values()]) if change else torch.zeros(0)
    size = flat.abs()
    count = min(flat.numel(), math.ceil(ratio * flat.numel()))
    if count == 0:
        return {"indices": torch.zeros(0, dtype=torch.int32), "values": flat}
    least = size.topk(count, sorted=False).values.min()
    above, ties = size > least, (size == least).nonzero().flatten()
    above[ties[: count - int(above.sum())]] = True  # topk may take any of them
    indices = above.nonzero().flatten()
    return {"indices": indices.to(torch.int32 if flat.numel() < 2**31 else torch.int64), "values": flat[indices]}


def _of_largest(code: Mapping[str, Tensor], like: StateDict) -> dict[str, Tensor]:
    sizes = [value.numel() for value in like.values()]
    values = code["values"]
    flat = values.new_zeros(sum(sizes))
    indices = code["indices"].long()
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < len(flat):
        raise ValueError(f"indices from {int(indices.min())} to {int(indices.max())} of {len(flat)} values")
    flat[indices] = values
    return {
        name: part.view_as(value).to(value.device, value.dtype)
        for part, (name, value) in zip(flat.split(sizes), like.items(), strict=True)
    }
