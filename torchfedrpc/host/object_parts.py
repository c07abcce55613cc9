"""Parts of a Python object by its type, for comparison, and the objects that it refers to."""

from __future__ import annotations

import collections
import copyreg
import enum
import functools
import gc
import random
import reprlib
import struct
import sys
import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchfedrpc.host.tensor_comparison import array_difference, dtype_difference, tensor_difference, tensor_parts
from torchfedrpc.wire.encodings import is_scheduled

ATOMS = frozenset((type(None), bool, int, float, complex, str, bytes, type(...)))
CONSTANTS = ATOMS | {type, types.FunctionType, types.BuiltinFunctionType, torch.dtype}
UNSET: Any = object()
"""Value of an attribute that does not exist."""

_GLOBALS: tuple[Any, ...] = (
    enum.Enum, type, type(NotImplemented), types.FunctionType, types.ModuleType, types.GenericAlias, np.ufunc,
    torch.dtype, torch.layout, torch.memory_format, torch.qscheme,
)  # fmt: skip
_GENERATORS = (torch.Generator, random.Random, np.random.RandomState)
_CONTAINERS = (dict, list, tuple, set, frozenset, collections.deque, bytearray, int, float, complex, str, bytes)
_FOUNDATIONS = sys.stdlib_module_names | {"builtins", "torch", "numpy"}
_PROTOCOL = ("__reduce_ex__", "__reduce__", "__getstate__", "__setstate__", "__getnewargs_ex__", "__getnewargs__")
# Their ``__getstate__`` leaves out only attributes that they recreate with the same value.
_FAITHFUL = (torch.amp.GradScaler,)
# Attributes of optimisers that decide whether a warning is due. No result depends on them.
_OPTIMISER_WARNS_BY = ("_opt_called", "_warned_capturable_if_run_uncaptured")
_EXCEPTION_FIELDS_APART = frozenset(("__dict__", "__traceback__", "__weakref__"))

Group = tuple[Literal["attributes", "items", "elements", "set", "parts"], Any]
"""Parts of an object. ``attributes``: a dict in any order, its keys are names or descriptors of slots; ``items``: the
pairs of a dict, in order; ``elements``: a list; ``set``: a set; ``parts``: a list of (path, part), where parts may be
made for the comparison."""


class Kind(NamedTuple):
    """How objects of a type are compared.

    Attributes:
        identity: ``object`` if references to one object must refer to one object again. ``value`` if identity does
            not matter, and pairs that were compared are remembered. None if comparing is as fast as remembering.
        read: Returns the parts of an object.
        difference: Returns a difference between two objects that is not in their parts; None if there is none.
        refusal: Returns why an object cannot be part of a state; None if it can.
        has_memory: Whether objects are tensors or arrays, which may share memory.
    """

    identity: Literal["object", "value"] | None
    read: Callable[[Any], list[Group]] | None = None
    difference: Callable[[Any, Any], str | None] | None = None
    refusal: Callable[[Any], str | None] | None = None
    has_memory: bool = False


def kind_of(obj: Any) -> Kind:
    """Return how objects of this type are compared."""
    cls = type(obj)
    for family, kind in _FAMILIES:
        if issubclass(cls, family):
            return _with_slots(kind, cls) if kind.identity == "object" and slots_of(cls) else kind
    if cls in _PLAIN:
        return _PLAIN[cls]
    methods = [(base, vars(base)[name]) for base in cls.__mro__ for name in _PROTOCOL if name in vars(base)]
    methods = [(base, method) for base, method in methods if base is not object]
    own = {method.__name__ for base, method in methods if not is_foundation(base) and hasattr(method, "__name__")}
    # With __getstate__ alone, attributes that it leaves out are not recreated, so the attributes are compared.
    if cls in copyreg.dispatch_table or own - {"__getstate__"} or issubclass(cls, _FAITHFUL):
        return Kind("value" if is_foundation(cls) and has_value(cls) else "object", _reduction)
    if issubclass(cls, _CONTAINERS):
        is_value = issubclass(cls, tuple | frozenset) and not hasattr(obj, "__dict__")
        attributes = _attributes_of(cls)
        return Kind("value" if is_value else "object", lambda obj: [*attributes(obj), *_content(obj)])
    if not methods and not _has_plain_state(obj):
        return Kind("object", _reduction)
    is_python = all(isinstance(method, types.FunctionType) for _, method in methods)
    is_torchs = all(root_of(base) in ("torch", "numpy") for base, _ in methods if is_foundation(base))
    if not methods or (is_python and is_torchs):
        return Kind("object", _optimizer if issubclass(cls, torch.optim.Optimizer) else _attributes_of(cls))
    return Kind(
        "value" if has_value(cls) else "object",
        lambda obj: [*_reduction(obj), ("attributes", getattr(obj, "__dict__", {}))],
        refusal=_of_process if issubclass(cls, _GENERATORS) else None,
    )


# Parts of objects.


def _with_slots(kind: Kind, cls: type) -> Kind:
    """Return a kind for a user's class that adds slots."""
    read, attributes = kind.read or (lambda obj: []), _attributes_of(cls)
    return kind._replace(read=lambda obj: [*read(obj), *attributes(obj)])


def _attributes_of(cls: type) -> Callable[[Any], list[Group]]:
    slots = slots_of(cls)
    if not slots:
        return lambda obj: [("attributes", getattr(obj, "__dict__", {}))]

    def read(obj: Any) -> list[Group]:
        of_slots = {slot: value for slot in slots if (value := get(slot, obj)) is not UNSET}
        return [("attributes", {**of_slots, **getattr(obj, "__dict__", {})})]

    return read


def _optimizer(optimizer: Any) -> list[Group]:
    [(_, every)] = _attributes_of(type(optimizer))(optimizer)
    attributes = {name: value for name, value in every.items() if name not in _OPTIMISER_WARNS_BY}
    if is_scheduled(attributes.get("step")):
        del attributes["step"]  # the wrapper of a scheduler, which only notes calls
    # Optimizer.__setstate__ adds it to optimisers that lack it, such as LBFGS.
    defaults = {"differentiable": False, **attributes.pop("defaults", {})}
    return [("parts", [(".defaults", defaults)]), ("attributes", attributes)]


def _exception(error: BaseException) -> list[Group]:
    fields = {
        descriptor: value
        for base in type(error).__mro__
        for name, descriptor in vars(base).items()
        if isinstance(descriptor, types.MemberDescriptorType | types.GetSetDescriptorType)
        and name not in _EXCEPTION_FIELDS_APART
        and (value := get(descriptor, error)) is not UNSET
    }
    return [("attributes", {**vars(error), **fields})]


def _content(obj: Any) -> list[Group]:
    """Return the content of an instance of a builtin type or of a subclass, without attributes."""
    if isinstance(obj, collections.OrderedDict):  # after move_to_end, the order of the underlying dict differs
        return [("items", [(key, dict.__getitem__(obj, key)) for key in collections.OrderedDict.__iter__(obj)])]
    if isinstance(obj, collections.defaultdict):
        return [("parts", [(".default_factory", obj.default_factory)]), ("items", list(dict.items(obj)))]
    if isinstance(obj, dict):
        return [("items", list(dict.items(obj)))]
    if isinstance(obj, list):
        return [("elements", list.copy(obj))]
    if isinstance(obj, tuple):
        elements: Group = ("elements", tuple.__getitem__(obj, slice(None)))
        if not isinstance(obj, torch.Size) and hasattr(obj, "n_sequence_fields"):  # it has more than its elements
            return [elements, ("parts", [("", reduced(obj)[1])])]
        return [elements]
    if isinstance(obj, collections.deque):
        return [("parts", [(".maxlen", obj.maxlen)]), ("elements", list(collections.deque.__iter__(obj)))]
    if isinstance(obj, set | frozenset):
        return [("set", obj)]
    if isinstance(obj, bytes | bytearray):
        return [("parts", [("", bytes(memoryview(obj)))])]
    base: Any = next(base for base in (int, float, complex, str) if isinstance(obj, base))
    return [("parts", [("", base(*base.__getnewargs__(obj)))])]


def _reduction(obj: Any) -> list[Group]:
    names = ("", "", "", "[...]", "[...]", "")
    return [("parts", list(zip(names, reduced(obj), strict=False)))]


def _tensor(tensor: Tensor) -> list[Group]:
    return [("parts", tensor_parts(tensor)), ("attributes", tensor.__dict__)]


def _array(array: Any) -> list[Group]:
    if array.dtype == object:
        content: Group = ("elements", list(array.view(np.ndarray).ravel()))
    else:
        content = ("parts", [("", array.tolist())] if array.dtype.hasobject else [])
    return [content, ("attributes", getattr(array, "__dict__", {}))]


def _bit_generator(generator: Any) -> list[Group]:
    return [("parts", [(".state", generator.state), (".seed_seq", getattr(generator, "seed_seq", None))])]


def _partial(partial: functools.partial[Any]) -> list[Group]:
    # Its reduction differs once its ``__dict__`` was looked at, even if that is empty.
    parts = [(".func", partial.func), (".args", partial.args), (".keywords", partial.keywords)]
    return [("parts", parts), ("attributes", partial.__dict__)]


def _self_of(method: Any) -> list[Group]:
    return [("parts", [(".__self__", method.__self__)])]


# Differences between two objects that are not in their parts.


def _other_atom(one: Any, other: Any) -> str | None:
    if (one == other and one) or one is other or _bits_of(one) == _bits_of(other):
        return None
    return f"would be {reprlib.repr(other)} instead of {reprlib.repr(one)}"


def _other_global(one: Any, other: Any) -> str | None:
    if one is other or (isinstance(one, types.GenericAlias) and one == other):
        return None
    return f"is {name_of(one)}, and would be another object"


def _other_builtin(one: Any, other: Any) -> str | None:
    if one is other or (one.__name__ == other.__name__ and _is_bound(one)):
        return None
    return f"is {name_of(one)}, and would be another object"


def _is_bound(builtin: Any) -> bool:
    return not isinstance(builtin.__self__, types.ModuleType | type(None))


def _other_numpy_scalar(one: Any, other: Any) -> str | None:
    if (reason := dtype_difference(one.dtype, other.dtype)) is not None or one.tobytes() == other.tobytes():
        return reason
    return f"would be {reprlib.repr(other)} instead of {reprlib.repr(one)}"


def _other_generator(one: Any, other: Any) -> str | None:
    is_same = one.device == other.device and torch.equal(one.get_state(), other.get_state())
    return None if is_same else "would draw other numbers"


def _of_process(generator: Any) -> str | None:
    own: Any = (torch.default_generator, getattr(random, "_inst", None), np.random.mtrand._rand)
    if not any(generator is one for one in own):
        return None
    return "is the process's own generator, which each call seeds: keep a generator of the learner's own"


# The first family that a type belongs to is used.

_FAMILIES: tuple[tuple[Any, Kind], ...] = (
    (_GLOBALS, Kind(None, difference=_other_global)),
    (types.BuiltinFunctionType, Kind(None, lambda one: _self_of(one) if _is_bound(one) else [], _other_builtin)),
    (types.MethodType, Kind(None, _self_of, lambda one, other: _other_global(one.__func__, other.__func__))),
    (Tensor, Kind("object", _tensor, tensor_difference, has_memory=True)),
    (np.ndarray, Kind("object", _array, array_difference, has_memory=True)),
    (np.generic, Kind(None, difference=_other_numpy_scalar)),
    (np.dtype, Kind(None, difference=dtype_difference)),
    (torch.Generator, Kind("object", difference=_other_generator, refusal=_of_process)),
    (np.random.BitGenerator, Kind("object", _bit_generator)),
    (BaseException, Kind("object", _exception)),
    (functools.partial, Kind("object", _partial)),
    (weakref.ref, Kind("object", lambda one: [("parts", [("()", one())])])),
)
_PLAIN: dict[type, Kind] = {
    **dict.fromkeys(ATOMS, Kind(None, difference=_other_atom)),
    object: Kind("object", lambda obj: [("attributes", {})]),
    dict: Kind("object", lambda obj: [("items", list(obj.items()))]),
    list: Kind("object", lambda obj: [("elements", obj)]),
    tuple: Kind("value", lambda obj: [("elements", obj)]),
    set: Kind("object", lambda obj: [("set", obj)]),
    frozenset: Kind("value", lambda obj: [("set", obj)]),
}


# Properties of objects and classes.


def reduced(obj: Any) -> tuple[Any, ...]:
    """Return the reduction of an object for pickle, its iterators as lists."""
    reduce = copyreg.dispatch_table.get(type(obj))
    parts: Any = reduce(obj) if reduce is not None else obj.__reduce_ex__(5)
    if isinstance(parts, str):
        return (parts,)
    return tuple(list(part) if index in (3, 4) and part is not None else part for index, part in enumerate(parts))


def reachable(root: Any, *, without: Any = None) -> Iterable[Any]:
    """Return all objects reachable from a root, except classes, modules, globals of functions, and ``without``."""
    seen = {id(root), id(without)}
    todo = [root]
    while todo:
        part = todo.pop()
        kind = type(part)
        if kind in ATOMS or isinstance(part, type | types.ModuleType | types.CodeType | types.FrameType):
            continue
        yield part
        if kind is types.FunctionType:
            following = list(part.__closure__ or ())  # cells, which refer to their contents
        elif isinstance(part, Tensor):
            following = [part.__dict__, part.grad] if part.is_leaf else [part.__dict__]
        else:
            following = gc.get_referents(part)
        for one in following:
            if id(one) not in seen:
                seen.add(id(one))
                todo.append(one)


def has_stable_hash(obj: Any) -> bool:
    """Return whether an object's hash is the same in every process, so that sets of such objects have an order."""
    if type(obj) in (tuple, frozenset):
        return all(map(has_stable_hash, obj))
    return type(obj) in (bool, int, float, complex)


def is_found_by_value(obj: Any) -> bool:
    """Return whether a set or dict finds an object by its value and not by its address."""
    if type(obj) in CONSTANTS or isinstance(obj, _GLOBALS):
        return True
    if isinstance(obj, tuple | frozenset):
        return all(map(is_found_by_value, obj))
    return has_value(type(obj))


def has_value(kind: type) -> bool:
    """Return whether instances are hashed by their value, so that their identity does not matter."""
    own_hash: Any = kind.__hash__
    return own_hash is not None and own_hash is not object.__hash__ and not issubclass(kind, Tensor)


def slots_of(kind: type) -> list[Any]:
    """Return the descriptors of a class's slots."""
    return [
        member
        for base in kind.__mro__
        if "__slots__" in vars(base)
        for member in vars(base).values()
        if isinstance(member, types.MemberDescriptorType)
    ]


def get(descriptor: Any, obj: Any) -> Any:
    """Return the value of a slot or field; `UNSET` if it has none."""
    try:
        return descriptor.__get__(obj, type(obj))
    except AttributeError:
        return UNSET


def root_of(cls: type) -> str:
    """Return the top-level package that defines a class."""
    return str(cls.__module__).partition(".")[0]


def is_foundation(cls: type) -> bool:
    """Return whether a class belongs to Python, torch or numpy."""
    return root_of(cls) in _FOUNDATIONS and cls.__module__ != "__main__"


def name_of(obj: Any) -> str:
    """Return the name of a function or class in a message."""
    name = getattr(obj, "__qualname__", None) or getattr(obj, "__name__", None)
    return f"{getattr(obj, '__module__', '')}.{name}" if name else reprlib.repr(obj)


def _has_plain_state(obj: Any) -> bool:
    """Return whether an object without methods for pickle has no state except attributes and slots."""
    try:
        object.__reduce_ex__(obj, 5)
    except TypeError:  # a C type, which has other state
        return False
    return True


def _bits_of(value: Any) -> Any:
    """Return an object that is equal for numbers with equal bits only; other values as they are."""
    if type(value) is float:
        return struct.pack("<d", value)
    if type(value) is complex:
        return struct.pack("<dd", value.real, value.imag)
    return value
