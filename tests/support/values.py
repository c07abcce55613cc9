"""The corpus of values that calls, snapshots and comparisons have to keep: name -> value. Tests only read them."""

from __future__ import annotations

import collections
import datetime
import decimal
import pathlib
import types
import uuid
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in [
        *("float32", "float64", "float16", "bfloat16", "bool", "complex64", "complex128"),
        *("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
        *(name for name in dir(torch) if name.startswith("float8_")),
    ]
}


def of_dtype(dtype: torch.dtype) -> Tensor:
    """A tensor [2, 3] of any bits."""
    generator = torch.Generator().manual_seed(3)
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (6 * dtype.itemsize,), generator=generator)
    return raw.to(torch.uint8).view(dtype).reshape(2, 3)


DENSE: dict[str, Tensor] = {
    "0-d": torch.tensor(1.5),
    "empty": torch.empty(0),
    "empty with sizes": torch.empty(3, 0, 5),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "channels last": torch.arange(48.0).reshape(2, 2, 3, 4).to(memory_format=torch.channels_last),
    "permuted": torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
    "one of each": torch.ones(1, 1, 1),
}
"""Tensors whose elements fill their memory."""

VIEWS: dict[str, Tensor] = {
    "gaps": torch.arange(20_000.0)[:6_000:3],
    "block": torch.arange(10_000.0).reshape(100, 100)[10:30, 10:40],
    "expanded": torch.ones(3, 1).expand(3, 1000),
    "0-d expanded": torch.ones(()).expand(2, 3),
    "overlapping": torch.arange(1_000.0).as_strided((3, 3), (2, 1)),
    "offset": torch.arange(10_000.0)[7_000:],
}
"""Tensors whose storage has more or fewer elements than they have."""

QUANTISED: dict[str, Callable[[], Tensor]] = {
    "per tensor": lambda: torch.quantize_per_tensor(torch.rand(3, 4), 0.1, 3, torch.qint8),
    "per channel": lambda: torch.quantize_per_channel(
        torch.rand(3, 4), torch.rand(3).double() + 0.1, torch.tensor([0, 1, 2]), 0, torch.quint8
    ),
}

SPARSE_LAYOUTS: dict[str, torch.layout] = {
    str(layout).removeprefix("torch."): layout
    for layout in (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
}


def of_layout(layout: torch.layout) -> Tensor:
    """A sparse tensor [4, 4]."""
    dense = torch.tensor([[0.0, 1, 0, 2], [0, 0, 0, 0], [3, 0, 4, 0], [0, 0, 0, 5]])
    if layout is torch.sparse_coo:
        return dense.to_sparse()
    blocked = layout in (torch.sparse_bsr, torch.sparse_bsc)
    return dense.to_sparse(layout=layout, blocksize=(2, 2) if blocked else None)


PLAIN: dict[str, Any] = {
    "none": None,
    "numbers": [True, -(2**70), 1.5, float("inf"), 2 + 3j],
    "text": "größe \\ \N{SNOWMAN} \0 \x1b",
    "surrogate": "\ud800",
    "bytes": [b"\0\xff" * 5000, bytearray(b"abc")],
    "containers": (1, [2, {3: {4}}, frozenset([5])], collections.OrderedDict(a=1), collections.Counter("aab")),
    "ellipsis": [..., slice(1, 2, 3), range(3)],
    "dates": [datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC), datetime.timedelta(1), datetime.date(2024, 1, 1)],
    "exact": [decimal.Decimal("1.1"), Fraction(1, 3), uuid.UUID(int=5)],
    "path": pathlib.Path("/a/b"),
    "namespace": types.SimpleNamespace(a=[1]),
    "deque": collections.deque([1, 2], maxlen=3),
    "torch": [torch.float32, torch.device("cpu"), torch.Size([1, 2]), torch.channels_last, torch.strided],
    "numpy scalars": [np.float32(1.5), np.int64(3), np.bool_(True), np.datetime64("2024-01-01")],
    "deep": [[[[[[[[[1]]]]]]]]],
}
"""Values that ``==`` compares."""

ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "float": np.arange(6.0).reshape(2, 3),
    "large": np.random.default_rng(1).random(100_000),
    "0-d": np.array(5),
    "empty": np.empty((0, 3), dtype=np.int16),
    "fortran": np.asfortranarray(np.arange(60_000.0).reshape(200, 300)),
    "strided": np.arange(40_000)[::3],
    "reversed": np.arange(10_000)[::-1],
    "big endian": np.arange(5, dtype=">f8"),
    "structured": np.array([(1, 2.5), (3, 4.5)], dtype=[("a", "i4"), ("b", "f8")]),
    "text": np.array(["ä", "bc"]),
    "dates": np.array(["2024-01-01"], dtype="datetime64[D]"),
    "bool": np.array([True, False]),
    "complex": np.array([1 + 2j]),
    "objects": np.array([1, "a", None], dtype=object),
}


def everything() -> dict[str, Any]:
    """All of these, without the kinds of tensors that torch warns of: quantised ones, and compressed sparse ones."""
    return {
        **{f"dtype {name}": of_dtype(dtype) for name, dtype in DTYPES.items()},
        **{f"dense {name}": value for name, value in DENSE.items()},
        **{f"view {name}": value for name, value in VIEWS.items()},
        "sparse": of_layout(torch.sparse_coo),
        **{f"plain {name}": value for name, value in PLAIN.items()},
        **{f"array {name}": value for name, value in ARRAYS.items()},
    }
