"""Proof that a rebuilt state is equal to the live one: types, values, attributes, and what is one object.

Both object graphs are walked side by side. Numbers, strings and the like are equal by value (floats by bits),
functions and classes by identity. Every other object of the live graph belongs to exactly one of the rebuilt graph:
what was one object is one again. Instances are compared attribute by attribute, also where torch's own
``__getstate__`` leaves some out. Where a user's class defines ``__reduce__`` or ``__setstate__``, what these or
``__getstate__`` give for both is compared. C types are compared by what they give to pickle.
"""

from __future__ import annotations

import collections
import copyreg
import enum
import functools
import marshal
import random
import reprlib
import sys
import types
import weakref
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchfedrpc.host.memory_proof import (
    Memory,
    array_difference,
    dtype_difference,
    sparse_parts,
    tensor_difference,
)
from torchfedrpc.host.object_parts import (
    ATOMS,
    BY_IDENTITY,
    CONSTANTS,
    UNSET,
    bits_of,
    get,
    has_plain_state,
    has_stable_hash,
    has_value,
    is_found_by_value,
    is_foundation,
    name_of,
    plain_value,
    reachable,
    reduced,
    root_of,
    slots_of,
)
from torchfedrpc.wire.encodings import is_scheduled

_CONTENTS = (dict, list, tuple, set, frozenset, collections.deque, bytearray, int, float, complex, str, bytes)
_PROTOCOL = ("__reduce_ex__", "__reduce__", "__getstate__", "__setstate__", "__getnewargs_ex__", "__getnewargs__")
# Their ``__getstate__`` leaves out only what they make again by themselves, with the same value.
_FAITHFUL = (torch.amp.GradScaler,)
# Of an optimiser: the first is a scheduler's wrapper round step(), which only sets the second; that and the third
# decide whether a warning is due. No number depends on them.
_OPTIMISER_WARNS_BY = frozenset(("step", "_opt_called", "_warned_capturable_if_run_uncaptured"))
_EXCEPTION_FIELDS_APART = frozenset(("__dict__", "__traceback__", "__weakref__"))

Path = tuple[Any, str, Any] | None  # the path before; "attribute", "key", "of keys" or "part"; its name

Way = Callable[[Any, Any, Path], None]


class Difference(NamedTuple):
    """The first place where a rebuilt state is not equal to the live one.

    Attributes:
        path: the way there, such as ``.model.layers[0].weight.grad``.
        reason: what would be different, as the rest of a sentence that begins with the path.
    """

    path: str
    reason: str

    @property
    def attribute(self) -> str:
        """The first part of the path."""
        ends = [end for end in (self.path.find(mark, 1) for mark in ".[(") if end > 0]
        return self.path[: min(ends)] if ends else self.path

    def __str__(self) -> str:
        return f"{self.path or 'it'} {self.reason}"


class Apart(NamedTuple):
    """Objects that belong to a learner and are made anew by its constructor, or found again by their key.

    Attributes:
        whose: what to call them in a message.
        roots: attribute or key -> the object.
        remedy: what to do where the state refers to a part of one.
    """

    whose: str
    roots: dict[str, Any]
    remedy: str


def first_difference(
    live: Any,
    rebuilt: Any,
    *,
    owner: Any = None,
    apart: Iterable[Apart] = (),
    are_attributes: bool = False,
    mapped: range = range(0),
) -> Difference | None:
    """The first place where a rebuilt object graph is not equal to the live one; None where they are equal.

    Tracebacks of exceptions and the alignment of memory are not compared. Parts that have the same memory on both
    sides count as equal in value.

    Args:
        live: any object. It must not change meanwhile.
        rebuilt: what was rebuilt of it.
        owner: the learner, to which nothing in its state may refer.
        apart: objects that are no part of the graphs, so that nothing in the graphs may be part of them.
        are_attributes: whether the two are dicts of all attributes of the owner, whose class then counts as well.
        mapped: addresses of the snapshot, where rebuilt tensors may lie; a restored learner has copies of them.
    """
    walk = _Walk(owner, mapped)
    try:
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            if are_attributes:
                walk.compare_attributes(live, rebuilt)
            else:
                walk.compare(live, rebuilt)
            walk.compare_memory()
            walk.look_for_globals()
            for one in apart:
                walk.look_into(one)
    except _Found as found:
        return found.difference
    return None


class _Found(Exception):
    def __init__(self, path: Path, reason: str) -> None:
        super().__init__()
        self.difference = Difference(_shown(path), reason)


class _Walk:
    """One comparison.

    Args:
        owner: the learner, if the graphs are its state.
        mapped: as of `first_difference`.
    """

    def __init__(self, owner: Any, mapped: range) -> None:
        self._owner = owner
        self._mapped = mapped
        self._todo: list[tuple[Any, Any, Path]] = []
        self._sets: list[tuple[Any, Any, Path]] = []  # of objects without a value: compared once all else is known
        self._rebuilt_of: dict[int, int] = {}
        self._live_of: dict[int, int] = {}
        self._paths: dict[int, Path] = {}
        self._pairs: set[tuple[int, int]] = set()
        self._kept: list[Any] = []  # what was made for the comparison: its addresses must not be used again
        self._compare_by: dict[type, Way] = {}
        self._users_classes: set[type] = set()
        self._singletons: dict[int, tuple[Any, Path]] = {}  # instances that may be a global of their module
        self._memory = Memory()

    def compare_attributes(self, live: dict[str, Any], rebuilt: dict[str, Any]) -> None:
        """Compare all attributes of the owner."""
        self._users_classes |= {base for base in type(self._owner).__mro__ if not is_foundation(base)}
        self._attributes(live, rebuilt, None, frozenset())
        self._finish()
        self._refuse_caches()

    def compare(self, live: Any, rebuilt: Any) -> None:
        """Compare two objects."""
        self._todo.append((live, rebuilt, None))
        self._finish()

    def _finish(self) -> None:
        while self._todo or self._sets:
            while self._todo:
                one, other, path = self._todo.pop()
                kind = type(one)
                if type(other) is not kind:
                    raise _Found(path, f"would be a {type(other).__qualname__} instead of a {kind.__qualname__}")
                compare = self._compare_by.get(kind)
                if compare is None:
                    compare = self._compare_by[kind] = self._way_of(one)
                compare(one, other, path)
            if self._sets:
                self._match_set(*self._sets.pop())

    def compare_memory(self) -> None:
        """Compare which tensors and arrays share memory."""
        if (found := self._memory.difference(_shown)) is not None:
            raise _Found(*found)

    def look_for_globals(self) -> None:
        """Refuse objects that code knows by identity: of a module or class, and state outside of any object."""
        for cls in self._users_classes:
            for name, value in vars(cls).items():
                self._refuse_global(value, f"{cls.__module__}.{cls.__qualname__}.{name}")
        modules = {cls.__module__ for cls in self._users_classes}
        modules |= {type(one).__module__ for one, _ in self._singletons.values()}
        if any(type(one) is object for one, _ in self._singletons.values()):
            modules |= sys.modules.keys()
        for module in modules:
            if (loaded := sys.modules.get(module)) is not None:
                for name, value in list(vars(loaded).items()) if hasattr(loaded, "__dict__") else ():
                    self._refuse_global(value, f"{module}.{name}")

    def look_into(self, apart: Apart) -> None:
        """Refuse a state that has objects or memory in common with what is made anew beside it."""
        for name, root in apart.roots.items():
            for part in reachable(root, self._owner):
                if self._rebuilt_of.get(id(part), id(part)) != id(part) and not has_value(type(part)):
                    path = self._paths[id(part)]
                    raise _Found(path, f"is part of {apart.whose} {name!r} too, and would be another: {apart.remedy}")
                if not isinstance(part, Tensor | np.ndarray):
                    continue
                path = self._memory.occupant(part, UNSET)
                if path is not UNSET:
                    raise _Found(path, f"shares memory with {apart.whose} {name!r}, and would not: {apart.remedy}")

    # How objects of a type are compared.

    def _way_of(self, one: Any) -> Way:
        kind = type(one)
        if issubclass(kind, torch.Generator | random.Random) or kind.__name__ == "RandomState":
            own: Any = (torch.default_generator, getattr(random, "_inst", None), np.random.mtrand._rand)
            if any(one is generator for generator in own):
                return self._process_generator
        families: tuple[tuple[Any, Way], ...] = (
            (enum.Enum, self._identical),
            (BY_IDENTITY, self._identical),
            (types.BuiltinFunctionType, self._builtin),
            (types.MethodType, self._method),
            (Tensor, self._tensor),
            (np.ndarray, self._array),
            (np.generic, self._numpy_scalar),
            (np.dtype, self._dtype),
            (torch.Generator, self._torch_generator),
            (np.random.BitGenerator, self._bit_generator),
            (BaseException, self._exception),
            (weakref.ref, self._weak_reference),
        )
        for family, way in families:
            if issubclass(kind, family):
                return way
        if kind in ATOMS:
            return self._atom
        if kind is object:
            return self._bare
        plain: dict[type, Way] = {
            dict: self._dict, list: self._list, tuple: self._tuple, set: self._set, frozenset: self._set,
        }  # fmt: skip
        if kind in plain:
            return plain[kind]
        is_users = not is_foundation(kind)
        if is_users:
            self._users_classes |= {base for base in kind.__mro__ if not is_foundation(base)}
        protocol = [(base, vars(base)[name]) for base in kind.__mro__ for name in _PROTOCOL if name in vars(base)]
        protocol = [(base, method) for base, method in protocol if base is not object]
        own = {
            method.__name__ for base, method in protocol if not is_foundation(base) and hasattr(method, "__name__")
        }
        # With __getstate__ alone nothing makes anew what that leaves out, so the attributes themselves are compared.
        says_itself = kind in copyreg.dispatch_table or bool(own - {"__getstate__"})
        if says_itself or issubclass(kind, _FAITHFUL):
            return functools.partial(self._by_reduction, is_value=not is_users and has_value(kind))
        slots = slots_of(kind)
        if issubclass(kind, _CONTENTS):
            return functools.partial(self._content, slots=slots)
        if not protocol and not has_plain_state(one):
            return functools.partial(self._by_reduction, is_value=False)
        is_python = all(isinstance(method, types.FunctionType) for _, method in protocol)
        is_torchs = all(root_of(base) in ("torch", "numpy") for base, _ in protocol if is_foundation(base))
        if not protocol or (is_python and is_torchs):
            leaves_out = _OPTIMISER_WARNS_BY if issubclass(kind, torch.optim.Optimizer) else frozenset()
            return functools.partial(self._instance, slots=slots, leaves_out=leaves_out)
        return functools.partial(self._by_reduction, is_value=has_value(kind), has_attributes=True)

    def _process_generator(self, one: Any, other: Any, path: Path) -> None:
        raise _Found(
            path, "is the process's own generator, which each call seeds: keep a generator of the learner's own"
        )

    def _atom(self, one: Any, other: Any, path: Path) -> None:
        if not (one == other and one) and one is not other and bits_of(one) != bits_of(other):
            raise _Found(path, f"would be {reprlib.repr(other)} instead of {reprlib.repr(one)}")

    def _identical(self, one: Any, other: Any, path: Path) -> None:
        if one is other or (is_scheduled(one) and is_scheduled(other)):
            return
        if isinstance(one, types.GenericAlias) and one == other:
            return
        raise _Found(path, f"is {name_of(one)}, and would be another object")

    def _bare(self, one: Any, other: Any, path: Path) -> None:
        if not self._is_known(one, other, path):
            self._singletons[id(one)] = one, path

    def _builtin(self, one: Any, other: Any, path: Path) -> None:
        if one is not other:
            if one.__name__ != other.__name__ or isinstance(one.__self__, types.ModuleType | type(None)):
                raise _Found(path, f"is {name_of(one)}, and would be another object")
            self._push([(".__self__", one.__self__, other.__self__)], path)

    def _method(self, one: Any, other: Any, path: Path) -> None:
        self._identical(one.__func__, other.__func__, path)
        self._push([(".__self__", one.__self__, other.__self__)], path)

    def _weak_reference(self, one: Any, other: Any, path: Path) -> None:
        if not self._is_known(one, other, path):
            self._push([("()", one(), other())], path)

    def _by_reduction(
        self, one: Any, other: Any, path: Path, *, is_value: bool, has_attributes: bool = False
    ) -> None:
        if one is other or (is_value and self._is_seen(one, other)):
            return
        if not is_value and self._is_known(one, other, path):
            return
        try:
            parts = [reduced(obj) for obj in (one, other)]
        except Exception as error:
            raise _Found(path, f"cannot be compared: {type(error).__name__}: {error}") from error
        self._kept += parts
        if len(parts[0]) != len(parts[1]):
            raise _Found(path, f"would be reduced in another way by its {type(one).__qualname__}")
        names = ("", "", "", "[...]", "[...]", "")
        self._push(list(zip(names, *parts, strict=False)), path)
        if has_attributes and hasattr(one, "__dict__"):
            self._attributes(vars(one), vars(other), path, frozenset())

    def _instance(self, one: Any, other: Any, path: Path, *, slots: list[Any], leaves_out: frozenset[str]) -> None:
        if self._is_known(one, other, path):
            return
        if not slots and not getattr(one, "__dict__", None):
            self._singletons[id(one)] = one, path  # it has nothing but its identity
        if leaves_out and not is_scheduled(one.__dict__.get("step")):
            leaves_out = leaves_out - {"step"}  # some other wrapper, which may do anything
        self._slots(one, other, path, slots)
        if hasattr(one, "__dict__"):
            attributes = one.__dict__
            if leaves_out and "differentiable" not in attributes.get("defaults", {"differentiable": 0}):
                # Optimizer.__setstate__ adds it to those whose step() does not ask for it, such as LBFGS.
                attributes = {**attributes, "defaults": {**attributes["defaults"], "differentiable": False}}
                self._kept.append(attributes)
            self._attributes(attributes, other.__dict__, path, leaves_out)

    def _content(self, one: Any, other: Any, path: Path, *, slots: list[Any]) -> None:
        """An instance of a builtin type's subclass: as that type has it, and then its attributes."""
        is_value = isinstance(one, tuple | frozenset) and not hasattr(one, "__dict__")
        if self._is_seen(one, other) if is_value else self._is_known(one, other, path):
            return
        self._slots(one, other, path, slots)
        if hasattr(one, "__dict__"):
            self._attributes(one.__dict__, other.__dict__, path, frozenset())
        if isinstance(one, collections.OrderedDict):
            order = collections.OrderedDict.__iter__  # not that of the dict below, after move_to_end
            self._items([(key, dict.__getitem__(one, key)) for key in order(one)],
                        [(key, dict.__getitem__(other, key)) for key in order(other)], path)  # fmt: skip
        elif isinstance(one, dict):
            if isinstance(one, collections.defaultdict):
                self._push([(".default_factory", one.default_factory, other.default_factory)], path)
            self._items(list(dict.items(one)), list(dict.items(other)), path)
        elif isinstance(one, list):
            self._elements(list.copy(one), list.copy(other), path)
        elif isinstance(one, tuple):
            self._elements(tuple.__getitem__(one, slice(None)), tuple.__getitem__(other, slice(None)), path)
            if not isinstance(one, torch.Size) and hasattr(one, "n_sequence_fields"):  # has more than its elements
                self._push([("", _kept(self, reduced(one)[1]), _kept(self, reduced(other)[1]))], path)
        elif isinstance(one, collections.deque):
            if one.maxlen != other.maxlen:
                raise _Found(path, f"would have maxlen={other.maxlen}")
            deque_iter = collections.deque.__iter__
            self._elements(list(deque_iter(one)), list(deque_iter(other)), path)
        elif isinstance(one, set | frozenset):
            self._set_elements(one, other, path)
        else:
            self._atom(plain_value(one), plain_value(other), path)

    def _dict(self, one: Any, other: Any, path: Path) -> None:
        if not self._is_known(one, other, path):
            self._items(list(one.items()), list(other.items()), path)

    def _list(self, one: Any, other: Any, path: Path) -> None:
        if not self._is_known(one, other, path):
            self._elements(one, other, path)

    def _tuple(self, one: Any, other: Any, path: Path) -> None:
        if not self._is_seen(one, other):
            self._elements(one, other, path)

    def _set(self, one: Any, other: Any, path: Path) -> None:
        if type(one) is frozenset:
            if not self._is_seen(one, other):
                self._set_elements(one, other, path)
        elif not self._is_known(one, other, path):
            self._set_elements(one, other, path)

    def _exception(self, one: Any, other: Any, path: Path) -> None:
        if self._is_known(one, other, path):
            return
        fields = [".args", ".__cause__", ".__context__", ".__suppress_context__"]
        children = [(name, getattr(one, name[1:]), getattr(other, name[1:])) for name in fields]
        for base in type(one).__mro__:
            for name, descriptor in vars(base).items():
                is_field = isinstance(descriptor, types.MemberDescriptorType | types.GetSetDescriptorType)
                if is_field and f".{name}" not in fields and name not in _EXCEPTION_FIELDS_APART:
                    has = [get(descriptor, obj) for obj in (one, other)]
                    if has[0] is not UNSET or has[1] is not UNSET:
                        children.append((f".{name}", *has))
        self._push(children, path)
        self._attributes(one.__dict__, other.__dict__, path, frozenset())

    def _tensor(self, one: Any, other: Any, path: Path) -> None:
        if self._is_known(one, other, path):
            return
        if (reason := tensor_difference(one, other, self._mapped)) is not None:
            raise _Found(path, reason)
        for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            if getattr(one, hooks) and not getattr(other, hooks):
                raise _Found(path, "has hooks (register_hook), which would be lost")
            if getattr(one, hooks):
                self._push([(f".{hooks}", getattr(one, hooks), getattr(other, hooks))], path)
        if one.layout == torch.strided:
            if one.numel():
                self._memory.add_tensor(one, other, path)
        else:
            if one.layout == torch.sparse_coo and one.is_coalesced() != other.is_coalesced():
                raise _Found(path, f"would have is_coalesced()={other.is_coalesced()}")
            parts = sparse_parts(one, other)
            self._kept.append(parts)
            self._push(parts, path)
        children = [] if one.grad is other.grad is None else [(".grad", one.grad, other.grad)]
        self._push(children, path)
        if one.__dict__ or other.__dict__:
            self._attributes(one.__dict__, other.__dict__, path, frozenset())
        self._slots(one, other, path, slots_of(type(one)) if type(one) is not Tensor else [])

    def _array(self, one: Any, other: Any, path: Path) -> None:
        if self._is_known(one, other, path):
            return
        if (reason := array_difference(one, other)) is not None:
            raise _Found(path, reason)
        if one.size:
            self._memory.add_array(one, other, path)
        if one.dtype == object:
            flat = [list(array.view(np.ndarray).ravel()) for array in (one, other)]
            self._elements(flat[0], flat[1], path)
        elif one.dtype.hasobject:
            parts = [array.tolist() for array in (one, other)]
            self._kept += parts
            self._push([("", *parts)], path)
        if hasattr(one, "__dict__"):
            self._attributes(one.__dict__, other.__dict__, path, frozenset())

    def _numpy_scalar(self, one: Any, other: Any, path: Path) -> None:
        reason = dtype_difference(one.dtype, other.dtype)
        if reason is not None or one.tobytes() != other.tobytes():
            raise _Found(path, reason or f"would be {reprlib.repr(other)} instead of {reprlib.repr(one)}")

    def _dtype(self, one: Any, other: Any, path: Path) -> None:
        if (reason := dtype_difference(one, other)) is not None:
            raise _Found(path, reason)

    def _torch_generator(self, one: Any, other: Any, path: Path) -> None:
        if self._is_known(one, other, path):
            return
        same = one.device == other.device and torch.equal(one.get_state(), other.get_state())
        if not same:
            raise _Found(path, "would draw other numbers")

    def _bit_generator(self, one: Any, other: Any, path: Path) -> None:
        if self._is_known(one, other, path):
            return
        parts = [(".state", one.state, other.state)]
        if hasattr(one, "seed_seq"):
            parts.append((".seed_seq", one.seed_seq, other.seed_seq))
        self._kept.append(parts)
        self._push(parts, path)

    # What objects consist of.

    def _attributes(self, one: dict[str, Any], other: dict[str, Any], path: Path, leaves_out: frozenset[str]) -> None:
        found, num_missing = [], 0
        for name, value in one.items():
            its = other.get(name, UNSET)
            if _is_settled(value, its):
                continue
            if its is UNSET:
                if name in leaves_out:
                    num_missing += 1
                    continue
                raise _Found((path, "attribute", name), "would be missing")
            found.append((value, its, (path, "attribute", name)))
        if len(other) + num_missing > len(one):
            for name in other.keys() - one.keys():
                raise _Found((path, "attribute", name), "would be there, and is not")
        self._todo += reversed(found)

    def _slots(self, one: Any, other: Any, path: Path, slots: list[Any]) -> None:
        for descriptor in slots:
            value, its = get(descriptor, one), get(descriptor, other)
            if value is UNSET and its is UNSET:
                continue
            place = (path, "attribute", descriptor.__name__)
            if its is UNSET or value is UNSET:
                raise _Found(place, "would be missing" if its is UNSET else "would be there, and is not")
            self._todo.append((value, its, place))

    def _items(self, one: list[tuple[Any, Any]], other: list[tuple[Any, Any]], path: Path) -> None:
        if len(one) != len(other):
            raise _Found(path, f"would have {len(other)} entries instead of {len(one)}")
        found = []
        for (key, value), (its_key, its) in zip(one, other, strict=True):
            if not (type(key) is type(its_key) is str and key == its_key):
                _refuse_nan(key, path)
                found.append((key, its_key, (path, "of keys", key)))
            if not _is_settled(value, its):
                found.append((value, its, (path, "key", key)))
        self._todo += reversed(found)

    def _elements(self, one: Any, other: Any, path: Path) -> None:
        if len(one) != len(other):
            raise _Found(path, f"would have {len(other)} elements instead of {len(one)}")
        kinds = set(map(type, one))
        if kinds <= ATOMS and kinds == set(map(type, other)) and marshal.dumps(one, 2) == marshal.dumps(other, 2):
            return  # by their bits, at the speed of C
        found = [
            (value, its, (path, "key", index))
            for index, (value, its) in enumerate(zip(one, other, strict=True))
            if not _is_settled(value, its)
        ]
        self._todo += reversed(found)

    def _set_elements(self, one: Any, other: Any, path: Path) -> None:
        if len(one) != len(other):
            raise _Found(path, f"would have {len(other)} elements instead of {len(one)}")
        base: Any = set if isinstance(one, set) else frozenset
        elements, others = list(base.__iter__(one)), list(base.__iter__(other))
        for element in elements:
            _refuse_nan(element, path)
        if all(map(has_stable_hash, elements)):
            if set(elements) == set(others) and elements != others:
                raise _Found(path, "would be iterated in another order: keep a dict or a list, or sorted(...) it")
            pairs = list(zip(elements, others, strict=True))
        elif all(map(is_found_by_value, elements)):  # the order depends on the process
            by_value = {element: element for element in others}
            pairs = [(element, by_value.get(element, UNSET)) for element in elements]
        else:
            self._sets.append((one, other, path))
            return
        for element, its in pairs:
            if its is UNSET:
                raise _Found(path, f"would not have the element {reprlib.repr(element)}")
            self._todo.append((element, its, (path, "key", element)))

    def _match_set(self, one: Any, other: Any, path: Path) -> None:
        """A set whose elements are found by their addresses, so that its order says nothing about which is which."""
        others = {id(element): element for element in other}
        unknown = []
        for element in one:
            its = others.pop(self._rebuilt_of.get(id(element), id(element)), UNSET)
            if its is UNSET:
                unknown.append(element)
        by_kind = {type(element): element for element in others.values()}
        if len(by_kind) < len(unknown):
            raise _Found(
                path,
                "holds objects that are found by their addresses, so that their order would be another: keep them in "
                "a list, or as keys of a dict",
            )
        for element in unknown:
            its = by_kind.get(type(element), UNSET)
            if its is UNSET:
                raise _Found(path, f"would have no {type(element).__qualname__}")
            self._todo.append((element, its, (path, "part", f"{{{type(element).__qualname__}}}")))

    def _push(self, children: list[tuple[str, Any, Any]], path: Path) -> None:
        self._todo += [(one, other, (path, "part", name)) for name, one, other in reversed(children)]

    # What is one object.

    def _is_known(self, one: Any, other: Any, path: Path) -> bool:
        """Whether this pair has been met; it is noted from now on.

        Raises:
            _Found: one of both belongs to another object.
        """
        if one is self._owner:
            raise _Found(path, f"refers to the {type(one).__qualname__} itself, and would refer to a copy")
        known = self._rebuilt_of.get(id(one))
        if known is not None:
            if known != id(other):
                raise _Found(path, f"is the same object as {_shown(self._paths[id(one)])}, and would be another")
            return True
        if id(other) in self._live_of:
            first = _shown(self._paths[self._live_of[id(other)]])
            raise _Found(path, f"is another object than {first}, and would be the same")
        self._rebuilt_of[id(one)], self._live_of[id(other)], self._paths[id(one)] = id(other), id(one), path
        kind = type(one)
        if kind in self._users_classes and not has_value(kind):
            self._singletons[id(one)] = one, path
        return one is other

    def _is_seen(self, one: Any, other: Any) -> bool:
        """Whether this pair of values has been compared; which object a value is does not matter."""
        pair = id(one), id(other)
        if pair in self._pairs:
            return True
        self._pairs.add(pair)
        return False

    def _refuse_global(self, value: Any, name: str) -> None:
        one, path = self._singletons.get(id(value), (None, None))
        if one is not None and one is value and self._rebuilt_of[id(value)] != id(value):
            raise _Found(path, f"is {name}, and would be another object: use an enum member or None as such a mark")

    def _refuse_caches(self) -> None:
        left_out = set(getattr(type(self._owner), "not_state", ()))
        for cls in self._users_classes:
            for name, value in vars(cls).items():
                is_cache = isinstance(value, functools._lru_cache_wrapper) and name not in left_out
                if is_cache and value.cache_info().currsize:
                    raise _Found(
                        (None, "attribute", name),
                        f"is cached by lru_cache in the class {cls.__qualname__}, outside of the learner: use "
                        f"functools.cached_property, or name {name!r} in the learner's not_state if it may be "
                        f"computed again",
                    )


def _kept(walk: _Walk, obj: Any) -> Any:
    walk._kept.append(obj)
    return obj


def _is_settled(value: Any, its: Any) -> bool:
    """Whether two values are equal for sure, found out without a turn of their own."""
    kind = type(value)
    if value is its:
        return kind in CONSTANTS
    return bool(type(its) is kind and kind in ATOMS and value == its and value)  # zeros have a sign


def _refuse_nan(key: Any, path: Path) -> None:
    if isinstance(key, float | complex | np.generic | Decimal):
        if key != key:
            raise _Found(path, "has NaN as a key, which is found by identity, and would not be found")
    elif isinstance(key, tuple | frozenset):
        for part in key:
            _refuse_nan(part, path)


def _shown(path: Path) -> str:
    pieces: list[str] = []
    while path is not None:
        path, kind, name = path
        if kind == "attribute":
            pieces.append(f".{name}")
        elif kind == "key":
            pieces.append(f"[{reprlib.repr(name)}]")
        elif kind == "of keys":
            pieces.append(f", the key {reprlib.repr(name)}")
        else:
            pieces.append(str(name))
    return "".join(reversed(pieces))
