"""Kinds whose state is in tensors: their layout, what they share, and what they are beside numbers."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from corpus.bits import bits
from corpus.registry import kind


def table(rows: int = 3000, columns: int = 7) -> Tensor:
    """Numbers whose sum depends on the order of addition, as memory layout does."""
    return torch.randn(rows, columns) * torch.logspace(-3, 3, rows)[:, None]


@kind()
class ColumnView:
    """A column of a table, which has gaps in memory."""

    def __init__(self, client_id: str) -> None:
        self.y = table()[:, 5]

    def step(self) -> str:
        self.y *= 1.1
        return bits(self.y.sum(), self.y.stride())


@kind()
class ColumnAndTable:
    """A column beside its table, which a call changes."""

    def __init__(self, client_id: str) -> None:
        self.table = table(20)
        self.y = self.table[:, 5]

    def step(self) -> str:
        self.table += 1
        return bits(self.y.sum(), self.y)


@kind()
class Expanded:
    """An expanded tensor, written through its base."""

    def __init__(self, client_id: str) -> None:
        self.base = torch.zeros(1, 3)
        self.wide = self.base.expand(1000, 3)

    def step(self) -> str:
        self.base += 1
        return bits(self.wide.sum(), self.wide.stride())


@kind()
class ExpandedAlone:
    """An expanded tensor without its base; one write changes all rows."""

    def __init__(self, client_id: str) -> None:
        self.wide = torch.ones(1, 3).expand(1000, 3)

    def step(self) -> str:
        self.wide[0] += 1
        return bits(self.wide.sum(), self.wide.stride(), self.wide.untyped_storage().nbytes())


@kind()
class Overlapping:
    """Sliding windows by `as_strided`, which overlap."""

    def __init__(self, client_id: str) -> None:
        self.windows = torch.arange(10.0).as_strided((7, 4), (1, 1))

    def step(self) -> str:
        self.windows[0, 3] += 1
        return bits(self.windows.sum(), self.windows.stride())


@kind()
class Conjugated:
    """A conjugate view beside its base."""

    def __init__(self, client_id: str) -> None:
        self.z = torch.randn(4, dtype=torch.complex64)
        self.conjugate = self.z.conj()

    def step(self) -> str:
        self.z += 1j
        return bits(self.conjugate.is_conj(), torch.view_as_real(self.conjugate.resolve_conj()))


@kind()
class Negated:
    """The imaginary part of a conjugate, a negative view."""

    def __init__(self, client_id: str) -> None:
        self.z = torch.randn(4, dtype=torch.complex64)
        self.imaginary = self.z.conj().imag

    def step(self) -> str:
        self.z += 1j
        return bits(self.imaginary.is_neg(), self.imaginary.resolve_neg())


@kind()
class RealPart:
    """Real view and complex tensor on one memory."""

    def __init__(self, client_id: str) -> None:
        self.z = torch.randn(4, dtype=torch.complex64)
        self.parts = torch.view_as_real(self.z)

    def step(self) -> str:
        self.parts[:, 1] += 1
        return bits(self.z.imag, self.parts)


@kind()
class ChannelsLast:
    """Images in `channels_last`, reduced in the order of memory."""

    def __init__(self, client_id: str) -> None:
        self.images = (torch.randn(4, 3, 31, 31) * 1000).to(memory_format=torch.channels_last)

    def step(self) -> str:
        self.images *= 1.01
        return bits(self.images.sum(), self.images.stride())


@kind()
class Permuted:
    """A permuted tensor whose size-1 dimension has a stride of its own."""

    def __init__(self, client_id: str) -> None:
        self.t = (torch.randn(50, 1, 40) * 1000).permute(2, 1, 0)

    def step(self) -> str:
        self.t *= 1.01
        return bits(self.t.sum(), self.t.stride())


@kind()
class OddStrides:
    """A tensor of one row whose stride torch does not look at."""

    def __init__(self, client_id: str) -> None:
        self.row = torch.arange(40.0).as_strided((1, 4), (17, 1))

    def step(self) -> str:
        self.row += 1
        return bits(self.row, self.row.stride())


@kind()
class SmallFloats:
    """Tensors in bfloat16, float16 and both kinds of float8."""

    def __init__(self, client_id: str) -> None:
        kinds = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
        self.parts = [torch.randn(8).to(dtype) for dtype in kinds]

    def step(self) -> str:
        self.parts = [(part.float() * 1.25).to(part.dtype) for part in self.parts]
        return bits(*self.parts)


@kind()
class OtherTypes:
    """Complex, boolean, and unsigned tensors."""

    def __init__(self, client_id: str) -> None:
        self.z = torch.randn(5, dtype=torch.complex128)
        self.mask = torch.rand(5) > 0.5
        self.counts = torch.zeros(5, dtype=torch.uint16)

    def step(self) -> str:
        self.z *= 1j
        self.mask = ~self.mask
        self.counts = (self.counts.int() + self.mask).to(torch.uint16)
        return bits(self.z, self.mask, self.counts)


@kind()
class SparseCoo:
    """A sparse tensor that is not coalesced, and one that is."""

    def __init__(self, client_id: str) -> None:
        self.loose = torch.sparse_coo_tensor(torch.tensor([[0, 0, 2]]), torch.tensor([1.0, 2.0, 3.0]), (4,))
        self.tidy = self.loose.coalesce()

    def step(self) -> str:
        self.loose = self.loose + self.tidy
        return bits(self.loose._nnz(), self.loose.is_coalesced(), self.tidy.is_coalesced(), self.loose.to_dense())


@kind()
class SparseCsr:
    """A sparse matrix in CSR."""

    def __init__(self, client_id: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.matrix = torch.eye(4).to_sparse_csr()
        self.x = torch.randn(4, 1)

    def step(self) -> str:
        self.matrix = self.matrix * 2
        self.x = self.matrix @ self.x
        return bits(str(self.matrix.layout), self.x)


@kind()
class Quantised:
    """Quantised tensors, by tensor and by channel."""

    def __init__(self, client_id: str) -> None:
        x = torch.randn(3, 4)
        self.q = torch.quantize_per_tensor(x, 0.1, 3, torch.qint8)
        self.c = torch.quantize_per_channel(
            x, torch.tensor([0.1, 0.2, 0.3]), torch.zeros(3, dtype=torch.int64), 0, torch.qint8
        )

    def step(self) -> str:
        self.q = torch.quantize_per_tensor(self.q.dequantize() * 1.1, 0.1, 3, torch.qint8)
        return bits(self.q.int_repr(), self.q.q_zero_point(), self.c.int_repr(), self.c.q_per_channel_scales())


@kind(refused="'features'")
class InferenceTensor:
    """A tensor made in inference mode, of which autograd takes no part."""

    def __init__(self, client_id: str) -> None:
        with torch.inference_mode():
            self.features = torch.randn(4)

    def step(self) -> str:
        try:
            self.features.mul_(torch.ones(4, requires_grad=True))
            written = "written"
        except RuntimeError:
            written = "refused"
        return bits(self.features.is_inference(), written, self.features.detach())


@kind()
class Resized:
    """A tensor that grows by `resize_`."""

    def __init__(self, client_id: str) -> None:
        self.log = torch.zeros(1)

    def step(self) -> str:
        size = len(self.log)
        self.log.resize_(size + 1)
        self.log[size] = size
        return bits(self.log)


@kind()
class ResizedAlias:
    """Two tensors on one memory, of which one is resized."""

    def __init__(self, client_id: str) -> None:
        self.a = torch.zeros(4)
        self.b = self.a[:2]

    def step(self) -> str:
        self.a += 1
        self.a.resize_(len(self.a) + 100).fill_(float(len(self.a)))
        return bits(len(self.a), self.b)


class Tagged(Tensor):
    """A tensor that belongs to a client."""


@kind()
class TensorSubclass:
    """A subclass of Tensor with an attribute."""

    def __init__(self, client_id: str) -> None:
        self.t = torch.zeros(3).as_subclass(Tagged)
        self.t.owner = client_id

    def step(self) -> str:
        owner = self.t.owner
        self.t = self.t + 1
        self.t.owner = owner
        return bits(type(self.t).__name__, self.t.owner, self.t.as_subclass(Tensor))


@kind()
class TensorAttributes:
    """Plain tensors with attributes, which refer to another tensor."""

    def __init__(self, client_id: str) -> None:
        self.base = torch.zeros(2)
        self.t = torch.ones(2)
        self.t.reference = self.base

    def step(self) -> str:
        self.base += 1
        return bits(self.t.reference, self.t.reference is self.base)


@kind()
class ParameterFixed:
    """A Parameter without requires_grad, and a list that holds it twice."""

    def __init__(self, client_id: str) -> None:
        self.p = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.twice = [self.p, self.p]

    def step(self) -> str:
        self.twice[0] += 1
        return bits(type(self.p).__name__, self.p.requires_grad, self.twice[1], self.twice[0] is self.p)


@kind()
class TensorKeys:
    """A dict whose keys are tensors."""

    def __init__(self, client_id: str) -> None:
        self.keys = [torch.zeros(1), torch.zeros(1)]
        self.counts = dict.fromkeys(self.keys, 0)

    def step(self) -> str:
        self.counts[self.keys[1]] += 1
        return bits(list(self.counts.values()), len(self.counts))


@kind()
class ZeroDimensional:
    """0-d and empty tensors."""

    def __init__(self, client_id: str) -> None:
        self.count = torch.tensor(0)
        self.nothing = torch.empty(0, 3)

    def step(self) -> str:
        self.count += 1
        self.nothing = torch.cat([self.nothing, torch.empty(0, 3)])
        return bits(self.count, self.nothing.shape)


@kind()
class NanPayload:
    """NaNs with a payload, and a negative zero."""

    def __init__(self, client_id: str) -> None:
        self.t = torch.tensor([0x7FC01234, -0x80000000, 0x7F801234, 0x3F800000, 5], dtype=torch.int32).view(
            torch.float32
        )

    def step(self) -> str:
        self.t = self.t.roll(1)
        return bits(self.t)


@kind()
class TypeView:
    """Two dtypes on one memory."""

    def __init__(self, client_id: str) -> None:
        self.floats = torch.ones(4)
        self.words = self.floats.view(torch.int32)

    def step(self) -> str:
        self.words += 1
        return bits(self.floats.view(torch.int32), self.words)


@kind()
class StorageOffset:
    """A slice of a large memory, and a slice of that."""

    def __init__(self, client_id: str) -> None:
        self.part = torch.arange(100.0)[10:13]
        self.inner = self.part[1:]

    def step(self) -> str:
        self.part += 1
        return bits(self.part, self.inner)


@kind()
class DataAlias:
    """`.data` of a parameter, kept beside it."""

    def __init__(self, client_id: str) -> None:
        self.p = nn.Parameter(torch.zeros(2))
        self.data = self.p.data

    def step(self) -> str:
        self.data += 1
        return bits(self.p)


@kind(refused="'storage'")
class StorageKept:
    """A tensor's storage as an attribute."""

    def __init__(self, client_id: str) -> None:
        self.t = torch.zeros(2)
        self.storage = self.t.untyped_storage()

    def step(self) -> str:
        self.storage[0] = self.storage[0] + 1
        return bits(self.t.view(torch.int32))


@kind()
class TypesAsValues:
    """dtypes, devices, sizes, layouts and memory formats as attributes."""

    def __init__(self, client_id: str) -> None:
        self.kinds = [torch.float16, torch.device("cpu"), torch.Size([2, 3]), torch.strided, torch.channels_last]

    def step(self) -> str:
        self.kinds = [*self.kinds[1:], self.kinds[0]]
        return bits(*map(str, self.kinds), [type(one).__name__ for one in self.kinds])


@kind(refused="'plan'")
class MetaTensor:
    """A tensor on the meta device."""

    def __init__(self, client_id: str) -> None:
        self.plan = torch.empty(3, 4, device="meta")

    def step(self) -> str:
        self.plan = torch.cat([self.plan, self.plan])
        return bits(self.plan.shape, str(self.plan.device))


@kind(refused="'t'")
class NestedTensor:
    """A nested (jagged) tensor."""

    def __init__(self, client_id: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.t: Any = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])

    def step(self) -> str:
        self.t = self.t * 2
        return bits(*self.t.unbind())


@kind()
class SharedResultMemory:
    """A tensor that was returned to the trainer and is changed afterwards."""

    def __init__(self, client_id: str) -> None:
        self.t = torch.zeros(50_000)

    def step(self) -> Tensor:
        self.t += 1
        return self.t
