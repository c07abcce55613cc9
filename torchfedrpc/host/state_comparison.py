"""Comparison of a rebuilt state with the live one: types, values, attributes, and identity of objects.

Both object graphs are walked together; `object_parts` returns the parts of an object by its type. Numbers, strings
and the like are compared by value (floats by bits), functions and classes by identity. Every other object of the live
graph corresponds to exactly one object of the rebuilt graph. Instances are compared attribute by attribute, also if
torch's own ``__getstate__`` leaves some out. If a user's class defines ``__reduce__`` or ``__setstate__``, the
results of these or of ``__getstate__`` are compared. C types are compared by their reduction for pickle.
"""

from __future__ import annotations

import functools
import marshal
import reprlib
import sys
from collections.abc import Iterable
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchfedrpc.host.object_parts import (
    ATOMS,
    CONSTANTS,
    UNSET,
    Kind,
    has_stable_hash,
    has_value,
    is_found_by_value,
    is_foundation,
    kind_of,
    reachable,
)
from torchfedrpc.host.tensor_comparison import Memory

Path = tuple[Any, str, Any] | None  # the path of the owner; "attribute", "key", "of keys" or "part"; the name
Pair = tuple[Any, Any, Path]  # a live object, its rebuilt counterpart, and their path

_NOTHING: list[Any] = [("attributes", {})]


class Difference(NamedTuple):
    """The first place where a rebuilt state is not equal to the live one.

    Attributes:
        path: The path, such as ``.model.layers[0].weight.grad``.
        attribute: The first part of the path.
        reason: The difference, as the rest of a sentence that begins with the path.
    """

    path: str
    attribute: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path or 'it'} {self.reason}"


class Apart(NamedTuple):
    """Objects of a learner that its constructor makes again, or that are found by their key.

    Attributes:
        whose: Their name in messages.
        roots: Attribute or key -> the object.
        remedy: Advice for a state that refers to a part of one.
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
) -> Difference | None:
    """Return the first place where a rebuilt object graph differs from the live one; None if they are equal.

    Tracebacks of exceptions and the alignment of memory are not compared. Parts that have the same memory on both
    sides count as equal in value.

    Args:
        live: Any object. It must not change meanwhile.
        rebuilt: Its rebuilt counterpart.
        owner: The learner, to which its state must not refer.
        apart: Objects outside of the graphs; the graphs must not share objects with them.
        are_attributes: Whether both are dicts of all attributes of the owner; then its class is considered too.
    """
    walk = _Walk(owner)
    try:
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            walk.compare(live, rebuilt, are_attributes)
            if (found := walk.memory.difference(_shown)) is not None:
                raise _Found(*found)
            walk.refuse_globals()
            for one in apart:
                walk.refuse_parts_of(one)
    except _Found as found:
        return found.difference
    return None


class _Found(Exception):
    def __init__(self, path: Path, reason: str) -> None:
        super().__init__()
        pieces = _pieces(path)
        self.difference = Difference("".join(pieces), pieces[0] if pieces else "", reason)


class _Walk:
    """One comparison. Its methods raise `_Found` at the first difference.

    Args:
        owner: The learner, if the graphs are its state.
    """

    def __init__(self, owner: Any) -> None:
        self.memory = Memory()
        self._owner = owner
        self._todo: list[Pair] = []
        self._sets: list[Pair] = []  # of objects without a value; compared last
        self._kinds: dict[type, Kind] = {}
        self._rebuilt_of: dict[int, int] = {}
        self._live_of: dict[int, int] = {}
        self._paths: dict[int, Path] = {}
        self._pairs: set[tuple[int, int]] = set()
        self._kept: list[Any] = []  # objects made for the comparison, whose addresses must not be reused
        self._users_classes: set[type] = set()
        self._singletons: dict[int, tuple[Any, Path]] = {}  # instances that may be a global of their module

    def compare(self, live: Any, rebuilt: Any, are_attributes: bool) -> None:
        """Compare two objects, or two dicts of all attributes of the owner."""
        if are_attributes:
            self._note_class(type(self._owner))
            self._attributes(live, rebuilt, None, self._todo)
            self._todo.reverse()
        else:
            self._todo.append((live, rebuilt, None))
        while self._todo or self._sets:
            while self._todo:
                self._compare(*self._todo.pop())
            if self._sets:
                self._match_set(*self._sets.pop())
        if are_attributes:
            self._refuse_caches()

    def _compare(self, one: Any, other: Any, path: Path) -> None:
        cls = type(one)
        if type(other) is not cls:
            raise _Found(path, f"would be a {type(other).__qualname__} instead of a {cls.__qualname__}")
        kind = self._kinds.get(cls)
        if kind is None:
            kind = self._kinds[cls] = kind_of(one)
            if kind.identity is not None and not kind.has_memory:
                self._note_class(cls)
        if kind.refusal is not None and (reason := kind.refusal(one)) is not None:
            raise _Found(path, reason)
        if kind.identity == "object":
            if self._is_known(one, other, path):
                return
        elif kind.identity == "value" and self._is_seen(one, other):
            return
        if kind.difference is not None and (reason := kind.difference(one, other)) is not None:
            raise _Found(path, reason)
        if kind.has_memory:
            self.memory.add(one, other, path)
        if kind.read is None:
            return
        try:
            groups, others = kind.read(one), kind.read(other)
        except Exception as error:
            raise _Found(path, f"cannot be compared: {type(error).__name__}: {error}") from error
        found: list[Pair] = []
        for (name, parts), (_, its) in zip(groups, others, strict=True):
            getattr(self, "_" + name)(parts, its, path, found)
        found.reverse()
        self._todo += found
        if groups == _NOTHING:
            self._singletons[id(one)] = one, path  # it has no state except its identity

    # Groups of parts.

    def _attributes(self, one: dict[Any, Any], other: dict[Any, Any], path: Path, found: list[Pair]) -> None:
        for key, value in one.items():
            its = other.get(key, UNSET)
            if _is_settled(value, its):
                continue
            place = path, "attribute", key
            if its is UNSET:
                raise _Found(place, "would be missing")
            found.append((value, its, place))
        if len(other) > len(one):
            key = next(key for key in other if key not in one)
            raise _Found((path, "attribute", key), "would be there, and is not")

    def _parts(self, one: list[tuple[str, Any]], other: list[tuple[str, Any]], path: Path, found: list[Pair]) -> None:
        if [name for name, _ in one] != [name for name, _ in other]:
            raise _Found(path, "would be reduced to other parts")
        self._kept.append((one, other))
        found += [(value, its, (path, "part", name)) for (name, value), (_, its) in zip(one, other, strict=True)]

    def _items(self, one: list[tuple[Any, Any]], other: list[tuple[Any, Any]], path: Path, found: list[Pair]) -> None:
        if len(one) != len(other):
            raise _Found(path, f"would have {len(other)} entries instead of {len(one)}")
        for (key, value), (its_key, its) in zip(one, other, strict=True):
            if not (type(key) is type(its_key) is str and key == its_key):
                _refuse_nan(key, path)
                found.append((key, its_key, (path, "of keys", key)))
            if not _is_settled(value, its):
                found.append((value, its, (path, "key", key)))

    def _elements(self, one: Any, other: Any, path: Path, found: list[Pair]) -> None:
        if len(one) != len(other):
            raise _Found(path, f"would have {len(other)} elements instead of {len(one)}")
        kinds = set(map(type, one))
        if kinds <= ATOMS and kinds == set(map(type, other)) and marshal.dumps(one, 2) == marshal.dumps(other, 2):
            return  # compared by bits, in C
        for index, (value, its) in enumerate(zip(one, other, strict=True)):
            if not _is_settled(value, its):
                found.append((value, its, (path, "key", index)))

    def _set(self, one: Any, other: Any, path: Path, found: list[Pair]) -> None:
        if len(one) != len(other):
            raise _Found(path, f"would have {len(other)} elements instead of {len(one)}")
        base: Any = set if isinstance(one, set) else frozenset
        elements, others = list(base.__iter__(one)), list(base.__iter__(other))
        for element in elements:
            _refuse_nan(element, path)
        if all(map(has_stable_hash, elements)):
            if set(elements) == set(others) and elements != others:
                raise _Found(path, "would be iterated in another order: keep a dict or a list, or sorted(...) it")
        elif all(map(is_found_by_value, elements)):  # the order depends on the process
            by_value = {element: element for element in others}
            others = [by_value.get(element, UNSET) for element in elements]
        else:
            self._sets.append((one, other, path))
            return
        for element, its in zip(elements, others, strict=True):
            if its is UNSET:
                raise _Found(path, f"would not have the element {reprlib.repr(element)}")
            found.append((element, its, (path, "key", element)))

    def _match_set(self, one: Any, other: Any, path: Path) -> None:
        """Match the elements of sets that are ordered by addresses, so that their order does not pair them."""
        others = {id(element): element for element in other}
        unknown = []
        for element in one:
            its = others.pop(self._rebuilt_of.get(id(element), id(element)), UNSET)
            if its is UNSET:
                unknown.append(element)
        by_class = {type(element): element for element in others.values()}
        if len(by_class) < len(unknown):
            raise _Found(
                path,
                "holds objects that are found by their addresses, so that their order would be another: keep them in "
                "a list, or as keys of a dict",
            )
        for element in unknown:
            its = by_class.get(type(element), UNSET)
            if its is UNSET:
                raise _Found(path, f"would have no {type(element).__qualname__}")
            self._todo.append((element, its, (path, "part", f"{{{type(element).__qualname__}}}")))

    # Identity of objects.

    def _is_known(self, one: Any, other: Any, path: Path) -> bool:
        """Return whether a pair of objects was compared before, and note that they correspond."""
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
        cls = type(one)
        if cls in self._users_classes and not has_value(cls):
            self._singletons[id(one)] = one, path
        return one is other

    def _is_seen(self, one: Any, other: Any) -> bool:
        """Return whether a pair of values was compared before; the identity of values does not matter."""
        pair = id(one), id(other)
        if one is other or pair in self._pairs:
            return True
        self._pairs.add(pair)
        return False

    # Objects outside of the two graphs.

    def refuse_globals(self) -> None:
        """Refuse objects that are globals of a module or class, since code may know them by identity."""
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

    def refuse_parts_of(self, apart: Apart) -> None:
        """Refuse a state that shares objects or memory with objects that are made again beside it."""
        for name, root in apart.roots.items():
            for part in reachable(root, without=self._owner):
                if self._rebuilt_of.get(id(part), id(part)) != id(part) and not has_value(type(part)):
                    path = self._paths[id(part)]
                    raise _Found(path, f"is part of {apart.whose} {name!r} too, and would be another: {apart.remedy}")
                if not isinstance(part, Tensor | np.ndarray):
                    continue
                path = self.memory.occupant(part, UNSET)
                if path is not UNSET:
                    raise _Found(path, f"shares memory with {apart.whose} {name!r}, and would not: {apart.remedy}")

    def _note_class(self, cls: type) -> None:
        self._users_classes |= {base for base in cls.__mro__ if not is_foundation(base)}

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


def _is_settled(value: Any, its: Any) -> bool:
    """Return whether two values are certainly equal, by a fast check."""
    cls = type(value)
    if value is its:
        return cls in CONSTANTS
    return bool(type(its) is cls and cls in ATOMS and value == its and value)  # zeros have a sign


def _refuse_nan(key: Any, path: Path) -> None:
    if isinstance(key, float | complex | np.generic | Decimal):
        if key != key:
            raise _Found(path, "has NaN as a key, which is found by identity, and would not be found")
    elif isinstance(key, tuple | frozenset):
        for part in key:
            _refuse_nan(part, path)


def _shown(path: Path) -> str:
    return "".join(_pieces(path))


def _pieces(path: Path) -> list[str]:
    pieces: list[str] = []
    while path is not None:
        path, kind, name = path
        if kind == "attribute":
            pieces.append(f".{name if isinstance(name, str) else name.__name__}")
        elif kind == "key":
            pieces.append(f"[{reprlib.repr(name)}]")
        elif kind == "of keys":
            pieces.append(f", the key {reprlib.repr(name)}")
        else:
            pieces.append(str(name))
    return pieces[::-1]
