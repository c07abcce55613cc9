"""By-value packing: any object as a pickle without tensors, and beside it the tensors, copied once."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from torchfedrpc.errors import SerializationError, UntrustedTypeError
from torchfedrpc.wire import arrays, encodings, rebuild
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.cuda_order import fence
from torchfedrpc.wire.file import UNAVAILABLE, TensorFiles
from torchfedrpc.wire.scan import BUILD, REDUCE, check_depth, with_requests
from torchfedrpc.wire.tensors import (
    PlainTensors,
    View,
    check_can_travel,
    gather_slots,
    is_joined,
    is_plain,
    lay_out,
    restore_special,
    take_apart,
)

_NONE = pickle.dumps(None, protocol=5)  # what most methods return
_NOTHING = pickle.dumps(((), {}), protocol=5)  # a call's arguments, where it has none
_PLAIN: dict[bytes, Callable[[], Any]] = {_NONE: lambda: None, _NOTHING: lambda: ((), {})}
_MAPPED_BYTES = 2 << 20  # smaller ones are copied or sent: to map them would cost as much
_INLINE_BYTES = 4096  # smaller numpy arrays stay in the pickle: a tensor of their own costs more than the copy


class SentApart:
    """Base of what stands in a call's arguments for a value that does not travel with them.

    It is no ABC, for which it takes several times as long to be told from what is none, and every argument is asked.
    """

    @property
    def value(self) -> SentApart:
        """What opens it."""
        raise NotImplementedError

    def open(self, allow: AllowList) -> Any:
        """The value itself, as one of the caller's own."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Parcel:
    """An object on its way, in memory that nobody else holds.

    Attributes:
        head: the object as a pickle in which each tensor is a number, and large numpy buffers are left out.
        views: for each tensor's number how it lies in the slots.
        slots: dense tensors without gradient, of any dtype and device.
        num_buffers: so many of the last slots are the numpy buffers, as uint8 on the CPU.
        ready: makes the calling thread's CUDA streams wait for the slots' values; None where they are there.
        apart: what the pickle names that is opened apart.
        files: where the slots lie, if in files that other processes of this machine may map.
        copies_buffers: whether numpy arrays get memory of their own, which can be resized, as they are opened.
    """

    head: bytes
    views: list[View]
    slots: list[Tensor]
    num_buffers: int
    ready: Callable[[], None] | None = None
    apart: tuple[SentApart, ...] = ()
    files: TensorFiles | None = None
    copies_buffers: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of the pickle and the tensors together."""
        return len(self.head) + (sum(slot.nbytes for slot in self.slots) if self.slots else 0)

    @property
    def is_large(self) -> bool:
        """Whether files are for it: its tensors are worth that, and all in host memory."""
        return _are_large(self.slots)

    def copy(self) -> Parcel:
        """The same parcel on memory of its own, for a second opening."""
        if self.ready is not None:
            self.ready()
        with PlainTensors():
            slots = _copies(self.views, self.slots)
        return Parcel(self.head, self.views, slots, self.num_buffers, None, self.apart)

    def open(self, allow: AllowList) -> Any:
        """The object, built on the parcel's own memory, which it has alone afterwards: a parcel is opened once.

        Whoever still holds the parcel holds none of its tensors any more.

        Raises:
            UntrustedTypeError: it names a type outside the allow-list.
            SerializationError: it cannot be read.
        """
        if self.head in _PLAIN:  # more often than not
            return _PLAIN[self.head]()
        if self.ready is not None:
            self.ready()
        try:
            with torch.inference_mode(False) if self.slots else nullcontext():
                builder = _Builder(self, allow)
                obj = _Unpickler(self.head, self._buffers(), builder, allow).load()
                check_depth(self.head, obj)
        except (SerializationError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise SerializationError(f"{type(error).__name__}: {_text_of(error)}") from error
        self.slots.clear()
        return obj

    def _buffers(self) -> list[memoryview]:
        first = len(self.slots) - self.num_buffers
        if not (0 <= first <= len(self.slots) and all(isinstance(slot, Tensor) for slot in self.slots)):
            raise SerializationError(
                f"a parcel has {len(self.slots)} slots, not all tensors or not {self.num_buffers} of them buffers"
            )
        return [slot.numpy().data for slot in self.slots[first:]]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """What stands for a parcel that could not be received; whoever opens it gets the error."""

    error: Exception
    num_bytes = 0

    def copy(self) -> Unreadable:
        """The same."""
        return self

    def open(self, allow: AllowList) -> Any:
        """Raise the error."""
        raise self.error


@dataclass(frozen=True, slots=True)
class Reference:
    """What stands for a parcel where isolation is off: the object itself."""

    target: Any
    num_bytes = 0

    def copy(self) -> Reference:
        """The same reference."""
        return self

    def open(self, allow: AllowList) -> Any:
        """The object itself."""
        return self.target


Packed = Parcel | Unreadable | Reference
"""An object on its way, in whichever of its forms: each has ``open``, ``copy`` and ``num_bytes``."""


def pack(
    obj: Any,
    *,
    copy: bool = True,
    join: bool | None = None,
    may_refer: bool = False,
    in_files: bool = False,
) -> Parcel:
    """Take the value of an object, as it is now.

    Tensors keep dtype, shape, strides, requires_grad, Parameter-ness and ``grad``; those that share a storage stay
    tied. Autograd history does not travel.

    Args:
        obj: anything that pickles; tensors anywhere in it.
        copy: False lets the slots alias the object's memory, for a caller that reads them at once.
        join: whether small tensors become one slot together, which costs less to send; where there is a copy, if
            not given.
        may_refer: whether it may hold what is `SentApart`, as only the arguments of a call may.
        in_files: whether the tensors of a large object go into files that other processes may map.

    Raises:
        SerializationError: it holds something that cannot be pickled, or a tensor that cannot travel.
        OSError: there is no room for its files.
    """
    if obj is None:
        return Parcel(_NONE, [], [], 0)
    file, table = io.BytesIO(), _Table()
    try:
        _Pickler(file, table).dump(obj)
        views: list[View] = []
        slots: list[Tensor] = []
        buffers: list[Tensor] = []
        if table.tensors or table.buffers:
            with PlainTensors():
                views, slots = gather_slots(
                    table.tensors, copy=copy and not in_files, join=copy if join is None else join
                )
                buffers = [_copy_buffer(raw) for raw in table.buffers]
    except (SerializationError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise SerializationError(f"{type(error).__name__}: {error}") from error
    if table.apart and not may_refer:
        raise SerializationError("a SharedRef is for the arguments of a call, where it stands for its object")
    files = None
    if in_files and (slots or buffers):
        with PlainTensors():
            files, mapped = mapped_copies([*slots, *buffers])
            slots, buffers = (mapped, []) if files is not None else (_copies(views, slots), buffers)
    slots += buffers
    return Parcel(file.getvalue(), views, slots, len(table.buffers), fence(slots), tuple(table.apart), files)


_PACKED_NOTHING = Parcel(_NOTHING, [], [], 0)


def pack_nothing() -> Parcel:
    """The arguments of a call that has none."""
    return _PACKED_NOTHING


def restore(kind: str, *parts: Any) -> Any:
    """What a parcel's pickle names where `_Builder.restore` has to stand.

    Raises:
        SerializationError: always; such a pickle is opened by `Parcel.open` alone.
    """
    raise SerializationError(f"this pickle is the head of a parcel ({kind}): open it with Parcel.open")


class _Table:
    """The tensors and buffers that a pickle leaves out, in the order in which it names them."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.buffers: list[memoryview] = []
        self.apart: list[SentApart] = []

    def add_apart(self, value: SentApart) -> int:
        if value not in self.apart:
            self.apart.append(value)
        return self.apart.index(value)

    def add_tensor(self, tensor: Tensor) -> int:
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def add_buffer(self, buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < _INLINE_BYTES:
            return True
        self.buffers.append(raw)
        return False


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, table: _Table) -> None:
        super().__init__(file, protocol=5, buffer_callback=table.add_buffer)
        self._table = table

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is Tensor and not (obj.requires_grad or obj.__dict__ or obj.grad is not None) and is_plain(obj):
            return restore, ("plain", self._table.add_tensor(obj))
        if isinstance(obj, Tensor):
            with PlainTensors(), torch._C.DisableTorchFunctionSubclass():
                return restore, self._tensor(obj)
        if isinstance(obj, SentApart):
            return restore, ("apart", self._table.add_apart(obj.value))
        if _is_of_numpy(obj):
            return self._numpy(obj)
        if isinstance(obj, torch.optim.Optimizer):
            return encodings.reduce_optimizer(obj)
        if type(obj) is Fraction:
            return Fraction, (obj.numerator, obj.denominator)
        if type(obj).__name__ == "PyRRef":  # named, since not every build of torch has RPC
            raise SerializationError(
                "an RRef stays with its proxy: call its learner through the proxy, and send what that gives"
            )
        parts = encodings.take_apart(obj)
        return NotImplemented if parts is None else (restore, parts)

    def _numpy(self, obj: Any) -> Any:
        if (taken := arrays.take_apart(obj)) is None:
            return NotImplemented
        kind, *parts = taken
        if kind == "array":
            parts[-1] = pickle.PickleBuffer(parts[-1])
        state = (arrays.items_of(obj),) if kind == "objects" else ()  # apart: the array may be among its own items
        return restore, (kind, *parts), *state

    def _tensor(self, tensor: Tensor) -> tuple[Any, ...]:
        check_can_travel(tensor)
        plain = tensor.detach()
        if type(tensor) not in (Tensor, Parameter):
            plain = plain.as_subclass(Tensor)
        kind = None if type(tensor) is Tensor else "parameter" if type(tensor) is Parameter else type(tensor)
        state = tensor.__dict__ or None
        grad = tensor.grad if tensor.is_leaf else None
        if parts := take_apart(plain):
            return "special", tensor.requires_grad, kind, state, grad, *parts
        lazily = ""
        if plain.is_conj():
            plain, lazily = plain.conj(), "conj"
        if plain.is_neg():
            plain, lazily = torch._neg_view(plain), f"{lazily}neg"
        if plain._is_zerotensor():  # has no memory
            plain = plain.clone()
        number = self._table.add_tensor(plain)
        if kind is None and state is None and grad is None and not tensor.requires_grad and not lazily:
            return "plain", number
        return "dense", tensor.requires_grad, kind, state, grad, number, lazily


def _is_of_numpy(obj: Any) -> bool:
    """Whether it is an array, a dtype, a scalar or a generator of numpy's; without importing numpy.random."""
    return isinstance(obj, np.ndarray | np.generic | np.dtype) or type(obj).__module__.startswith("numpy.random")


def _are_large(slots: list[Tensor]) -> bool:
    return sum(slot.nbytes for slot in slots) >= _MAPPED_BYTES and all(slot.is_cpu for slot in slots)


def mapped_copies(slots: list[Tensor]) -> tuple[TensorFiles | None, list[Tensor]]:
    """Copies of slots, and their files; None where these are not worth while, or cannot be had."""
    if not _are_large(slots):
        return None, []
    try:
        files = TensorFiles.of(slots)
        return files, files.tensors()
    except OSError as error:
        if error.errno not in UNAVAILABLE:
            raise
        return None, []


def _copies(views: list[View], slots: list[Tensor]) -> list[Tensor]:
    """Copies of slots, but for those whose tensors each opening copies anyway."""
    copied = {view[0] for view in views if is_joined(view)}
    return [slot if place in copied else slot.clone() for place, slot in enumerate(slots)]


def _copy_buffer(raw: memoryview) -> Tensor:
    """A numpy buffer's bytes, as a uint8 tensor of shape (num_bytes,)."""
    slot = torch.empty(raw.nbytes, dtype=torch.uint8, device="cpu")
    slot.numpy()[:] = np.frombuffer(raw, dtype=np.uint8)
    return slot


class _Builder:
    """Makes tensors of a parcel's slots while its pickle is read.

    An object of its own: an unpickler that handed out its own methods would be a reference cycle, and keep the
    tensors alive until the next collection.
    """

    def __init__(self, parcel: Parcel, allow: AllowList) -> None:
        self._apart = parcel.apart
        self._opened: dict[int, Any] = {}  # of those apart, by number: what is twice in the object is the same there
        self._allow = allow
        self._owns_buffers = not parcel.copies_buffers
        self._num_head_bytes = len(parcel.head)
        self.budget = rebuild.Budget(parcel.num_bytes)
        # Arrays of objects whose items are to come, by id, and whether they may be written afterwards.
        self._unfilled: dict[int, tuple[Any, bool]] = {}
        with torch.no_grad() if parcel.views else nullcontext():
            self._tensors = lay_out(parcel.views, parcel.slots, self.budget.spend)

    def restore(self, kind: str, *parts: Any) -> Any:
        """Return the object that the pickler took apart into these parts.

        Raises:
            SerializationError: If they make no object of that kind.
        """
        if type(kind) is not str:
            raise SerializationError("a parcel has a part without a kind")
        if kind == "plain":
            return self._tensors[parts[0]]
        if kind == "dense" or kind == "special":
            return self._restore_tensor(kind, *parts)
        if arrays.is_kind(kind):
            made = arrays.put_together(kind, parts, owned=self._owns_buffers, max_items=self._num_head_bytes)
            fields = getattr(getattr(made, "dtype", made), "names", None) or ()
            memory = getattr(made, "base", None)  # of one with gaps it is larger
            num_bytes = max(getattr(made, "nbytes", 1000), getattr(memory, "nbytes", 0))
            self.budget.spend(num_bytes + 100_000 * len(fields))
            if kind == "objects":
                self._unfilled[id(made)] = made, parts[2] == 1
            return made
        if kind == "apart":
            return self._open_apart(parts[0])
        return encodings.put_together(kind, parts)

    def fill(self, array: Any, items: Any) -> Any:
        """Put the items into an array of objects that `restore` has made; return it.

        Raises:
            UntrustedTypeError: If it is another array.
            SerializationError: If they are not as many as its elements.
        """
        known, is_writeable = self._unfilled.pop(id(array), (None, False))
        if known is not array:
            raise UntrustedTypeError("a pickle changes an array that is in use")
        arrays.fill(array, items, is_writeable=is_writeable)
        self.budget.nest(array, items)
        return array

    def _restore_tensor(self, form: str, requires_grad: Any, cls: Any, state: Any, grad: Any, *rest: Any) -> Tensor:
        if form == "special":
            plain = restore_special(*rest)
        else:
            number, lazily = rest
            plain = self._tensors[number]
            if lazily != "":
                if type(lazily) is not str or lazily not in _LAZILY:
                    raise SerializationError("a tensor came as a view of a kind that there is not")
                plain = _LAZILY[lazily](plain)
        if cls == "parameter":
            tensor: Tensor = Parameter(plain, requires_grad=requires_grad)
        elif cls is None:
            tensor = plain.requires_grad_(requires_grad)
        elif isinstance(cls, type) and issubclass(cls, Tensor):
            tensor = plain.as_subclass(cls).requires_grad_(requires_grad)
        else:
            raise SerializationError(f"a {type(cls).__qualname__} is not a kind of tensor")
        if state:
            if type(state) is not dict or any(callable(getattr(type(tensor), name, None)) for name in state):
                raise SerializationError("a tensor came with attributes that take the place of its methods")
            tensor.__dict__.update(state)
        if grad is not None:
            if not isinstance(grad, Tensor) or grad.grad is not None:  # a chain of them is freed by recursion
                raise SerializationError("a tensor came with a gradient that is none, or has one itself")
            tensor.grad = grad
        return tensor

    def _open_apart(self, number: int) -> Any:
        if number not in self._opened:
            self._opened[number] = self._apart[number].open(self._allow)
        return self._opened[number]


def _text_of(error: Exception) -> str:
    """Return the text of an error in which nothing is shown that a sender has made: that can be endless."""
    return str(error) if all(type(part) in (str, int) for part in error.args) else ""


_LAZILY: dict[str, Callable[[Tensor], Tensor]] = {
    "conj": torch.conj,
    "neg": torch._neg_view,
    "conjneg": lambda plain: torch.conj(torch._neg_view(plain)),
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, head: bytes, buffers: list[memoryview], builder: _Builder, allow: AllowList) -> None:
        super().__init__(io.BytesIO(with_requests(head)), buffers=buffers)
        self._builder = builder
        self._allow = allow

    def persistent_load(self, request: Any) -> Any:
        """Carry out what `with_requests` has made of an opcode that calls, makes or changes an object."""
        target, argument, op = request
        if op == REDUCE:
            if target is restore:
                if type(argument) is not tuple:
                    raise SerializationError("a parcel has a part without a tuple of parts")
                return self._builder.restore(*argument)
        elif op == BUILD and isinstance(target, np.ndarray):
            return self._builder.fill(target, argument)
        return rebuild.answer(self._allow, self._builder.budget, target, argument, op)

    def find_class(self, module: str, name: str) -> Any:
        if module == __name__ and name == restore.__name__:
            return restore
        return self._allow.find(module, name)
