"""Kinds whose state is in numpy arrays: their layout, what they share, and their kinds of elements."""

from __future__ import annotations

import array
from typing import Any

import numpy as np
import torch

from corpus.bits import bits
from corpus.registry import kind


def table(rows: int = 3000, columns: int = 7) -> Any:
    """Numbers whose sum depends on the order of addition, as memory layout does."""
    numbers = np.random.standard_normal((rows, columns)) * np.logspace(-3, 3, rows)[:, None]
    return numbers.astype(np.float32)


@kind()
class ArrayColumn:
    """A column of an array, which has gaps in memory."""

    def __init__(self, client_id: str) -> None:
        self.y = table()[:, 5]

    def step(self) -> str:
        self.y *= np.float32(1.1)
        return bits(self.y.sum(), self.y.strides)


@kind()
class ArrayFortran:
    """An array in Fortran order."""

    def __init__(self, client_id: str) -> None:
        self.y = np.asfortranarray(table())

    def step(self) -> str:
        self.y *= np.float32(1.1)
        return bits(self.y.sum(), self.y.strides, self.y.flags.f_contiguous)


@kind()
class ArrayPermuted:
    """An array whose axes are in no usual order."""

    def __init__(self, client_id: str) -> None:
        self.y = np.random.standard_normal((20, 30, 40)).astype(np.float32).transpose(1, 0, 2)

    def step(self) -> str:
        self.y *= np.float32(1.1)
        return bits(self.y.sum(), self.y.strides)


@kind()
class ArrayReversed:
    """An array with a negative stride."""

    def __init__(self, client_id: str) -> None:
        self.y = table(3000, 1)[::-1, 0]

    def step(self) -> str:
        self.y *= np.float32(1.1)
        return bits(self.y.sum(), self.y.strides)


@kind(refused="'first'")
class ArrayAliases:
    """A view beside its array, which a call changes."""

    def __init__(self, client_id: str) -> None:
        self.data = np.zeros(6)
        self.first = self.data[:3]

    def step(self) -> str:
        self.data += 1
        return bits(self.first, self.first.base is self.data)


@kind(refused="'tensor'")
class ArrayOfTensor:
    """`torch.from_numpy`: an array and a tensor on one memory."""

    def __init__(self, client_id: str) -> None:
        self.array = np.zeros(3, np.float32)
        self.tensor = torch.from_numpy(self.array)

    def step(self) -> str:
        self.array += 1
        return bits(self.tensor)


@kind(refused="'seen'")
class TensorOfArray:
    """`tensor.numpy()` of a parameter that is trained."""

    def __init__(self, client_id: str) -> None:
        self.model = torch.nn.Linear(2, 1)
        self.seen = self.model.weight.detach().numpy()

    def step(self) -> str:
        with torch.no_grad():
            self.model.weight += 1
        return bits(self.seen)


@kind()
class ArrayBroadcast:
    """`np.broadcast_to`, which is read-only and has strides of zero."""

    def __init__(self, client_id: str) -> None:
        self.wide = np.broadcast_to(np.float32(0.1), (5000,))
        self.count = np.float32(0)

    def step(self) -> str:
        self.count += self.wide.sum()
        return bits(self.count, self.wide.strides, self.wide.flags.writeable)


@kind()
class ArrayObjects:
    """An array of objects, two of which are one."""

    def __init__(self, client_id: str) -> None:
        one = [0]
        self.objects = np.empty(3, object)
        self.objects[:] = [one, one, "text"]

    def step(self) -> str:
        self.objects[0].append(len(self.objects[0]))
        return bits(self.objects, self.objects[0] is self.objects[1])


@kind()
class ArrayStructured:
    """A structured array."""

    def __init__(self, client_id: str) -> None:
        self.rows = np.zeros(3, [("x", "f4"), ("n", ">i2"), ("name", "U4")])

    def step(self) -> str:
        self.rows["x"] += 1
        self.rows["name"][0] += "a"
        return bits(self.rows.tolist(), str(self.rows.dtype))


@kind()
class ArrayDates:
    """datetime64, timedelta64, text, bytes and big-endian arrays."""

    def __init__(self, client_id: str) -> None:
        self.days = np.array(["2024-02-28", "NaT"], "datetime64[D]")
        self.texts, self.raw = np.array(["a", "größer"]), np.array([b"a\0b", b"c"])
        self.big = np.arange(3, dtype=">f8")

    def step(self) -> str:
        self.days = self.days + np.timedelta64(1, "D")
        self.big += 0.5
        return bits(str(self.days), self.texts.tolist(), self.raw.tolist(), self.big.tolist(), str(self.big.dtype))


@kind(refused="'y'")
class ArrayMasked:
    """A masked array."""

    def __init__(self, client_id: str) -> None:
        self.y = np.ma.masked_array([1.0, 2.0, 3.0], [False, True, False])

    def step(self) -> str:
        self.y += 1
        self.y.mask[0] = not self.y.mask[0]
        return bits(self.y.tolist(), self.y.fill_value)


@kind()
class ArrayReadOnly:
    """A read-only array."""

    def __init__(self, client_id: str) -> None:
        self.y = np.arange(3.0)
        self.y.flags.writeable = False
        self.big = np.zeros(5000)
        self.big.flags.writeable = False

    def step(self) -> str:
        outcome = []
        for one in (self.y, self.big):
            try:
                one[0] += 1
                outcome.append("written")
            except ValueError:
                outcome.append("refused")
        return bits(outcome)


@kind()
class ArrayZeroDimensional:
    """0-d and empty arrays, and numpy's scalars."""

    def __init__(self, client_id: str) -> None:
        self.count = np.array(0)
        self.empty = np.zeros((0, 3))
        self.scalars = [np.float32(0.1), np.int8(1), np.bool_(True), np.complex64(1j), np.str_("a"), np.float16(0.5)]

    def step(self) -> str:
        self.count += 1
        self.scalars[0] = self.scalars[0] * np.float32(1.1)
        return bits(self.count, self.empty.shape, self.scalars, [type(one).__name__ for one in self.scalars])


@kind()
class ArrayResized:
    """An array that grows by `resize`."""

    def __init__(self, client_id: str) -> None:
        self.log = np.zeros(1)

    def step(self) -> str:
        self.log.resize(len(self.log) + 1000, refcheck=False)
        self.log[-1] = len(self.log)
        return bits(self.log)


@kind(refused="'data'")
class ArrayMapped:
    """A `numpy.memmap` of a file."""

    def __init__(self, client_id: str) -> None:
        import tempfile

        self.file = tempfile.TemporaryFile()  # noqa: SIM115 - as users write it
        self.data = np.memmap(self.file, np.float32, "w+", shape=(4,))

    def step(self) -> str:
        self.data += 1
        return bits(np.asarray(self.data))


class Labelled(np.ndarray):
    """An array with a label, as numpy's guide to subclasses has it."""

    label: str

    def __new__(cls, values: Any, label: str) -> Labelled:
        made = np.asarray(values).view(cls)
        made.label = label
        return made

    def __array_finalize__(self, other: Any) -> None:
        self.label = getattr(other, "label", "none")


@kind()
class ArraySubclass:
    """A subclass of ndarray whose attribute numpy's pickle leaves out."""

    def __init__(self, client_id: str) -> None:
        self.y = Labelled([1.0, 2.0], client_id)

    def step(self) -> str:
        self.y = self.y + 1
        return bits(np.asarray(self.y), self.y.label, type(self.y).__name__)


@kind(refused="'rows'")
class ArrayRecords:
    """A record array."""

    def __init__(self, client_id: str) -> None:
        self.rows = np.rec.array([(1, 2.0), (3, 4.0)], dtype=[("n", int), ("x", float)])

    def step(self) -> str:
        self.rows.x += 1
        return bits(self.rows.tolist(), self.rows.n.tolist())


@kind(refused="'names'")
class ArrayStrings:
    """An array of numpy's variable-length strings."""

    def __init__(self, client_id: str) -> None:
        self.names = np.array(["a", "b" * 40], np.dtypes.StringDType())

    def step(self) -> str:
        self.names[0] = self.names[0] + "x"
        return bits(self.names.tolist(), str(self.names.dtype))


@kind(refused="'op'")
class ArrayFunction:
    """A ufunc as an attribute."""

    def __init__(self, client_id: str) -> None:
        self.op, self.total = np.maximum, 0.0

    def step(self) -> str:
        self.total = float(self.op(self.total + 1, 2.0))
        return bits(self.total)


@kind()
class ArrayAndDtype:
    """dtypes as attributes, and one that two arrays share."""

    def __init__(self, client_id: str) -> None:
        self.dtype = np.dtype([("x", "f4"), ("y", "f8")], align=True)
        self.plain = np.float32

    def step(self) -> str:
        return bits(str(self.dtype), self.dtype.itemsize, self.plain(0.1))


@kind()
class PythonArray:
    """`array.array`."""

    def __init__(self, client_id: str) -> None:
        self.numbers = array.array("d", [1.0, 2.0])

    def step(self) -> str:
        self.numbers.append(len(self.numbers) / 3)
        return bits(self.numbers.tolist())


@kind()
class ByteArrays:
    """Short and long bytearrays that grow."""

    def __init__(self, client_id: str) -> None:
        self.short, self.long = bytearray(b"ab"), bytearray(5000)
        self.same = self.short

    def step(self) -> str:
        self.short += b"c"
        self.long += b"c"
        return bits(self.same, type(self.short).__name__, len(self.long))


@kind(refused="'view'")
class MemoryView:
    """A memoryview of a bytearray."""

    def __init__(self, client_id: str) -> None:
        self.raw = bytearray(4)
        self.view = memoryview(self.raw)

    def step(self) -> str:
        self.view[0] += 1
        return bits(self.raw)
