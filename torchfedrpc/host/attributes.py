"""Attributes of a learner as state: all except shared objects and attributes in ``not_state``."""

from __future__ import annotations

import collections
import copy
import difflib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from torchfedrpc.errors import ConfigError, SnapshotError
from torchfedrpc.host.object_parts import ATOMS, UNSET, get, is_foundation, slots_of
from torchfedrpc.host.shared_objects import SharedObjects
from torchfedrpc.host.state_comparison import Apart

REGISTRIES = ("_parameters", "_buffers", "_modules")
"""The attributes in which a module has its parameters, buffers and submodules."""

_MORE_THAN_ATTRIBUTES = (
    dict, list, tuple, set, frozenset, str, bytes, bytearray, int, float, complex, BaseException, Tensor, np.ndarray,
    collections.deque, random.Random,
)  # fmt: skip


def not_state_of(cls: Any) -> tuple[str, ...]:
    """Return the attributes that a learner's class names in ``not_state``.

    Raises:
        ConfigError: If ``not_state`` is no collection of names.
    """
    names: Any = getattr(cls, "not_state", ())
    if isinstance(names, set | frozenset | tuple | list) and all(type(name) is str for name in names):
        if held := sorted(set(names) & {*REGISTRIES}):
            raise ConfigError(
                f"{cls.__qualname__}.not_state must not name {held[0]!r}, which has all that a module consists of: "
                f"name single parameters, buffers or submodules"
            )
        return tuple(sorted(names))
    given = f"{{{names!r}}}" if isinstance(names, str) else '{"loader"}'
    raise ConfigError(
        f"{cls.__qualname__}.not_state must be a set of attribute names, such as {given}, and is {names!r}"
    )


def attributes_of(learner: Any, shared: SharedObjects | None) -> dict[str, Any]:
    """Return all attributes of a learner except those in ``not_state``, for `set_attributes`.

    Args:
        learner: The learner.
        shared: Shared objects of this process. An attribute that is one of them is kept as its key.

    Returns:
        ``values`` (name -> attribute, in order; None for an excluded one), ``slots``, ``not_state`` (excluded names),
        ``shared`` (name -> key).

    Raises:
        ConfigError: If ``not_state`` is no collection of names.
        SnapshotError: If ``not_state`` names no attribute, or the learner has more than attributes.
    """
    cls = type(learner)
    if isinstance(learner, _MORE_THAN_ATTRIBUTES):
        base = next(base for base in cls.__mro__ if is_foundation(base))
        raise SnapshotError(
            f"a {cls.__qualname__} is a {base.__qualname__}, whose content is no attribute: keep it in an attribute, "
            f"or define state_dict() and load_state_dict()"
        )
    values: dict[str, Any] = dict(_plain_attributes(learner))
    slots = {member.__name__: value for member in slots_of(cls) if (value := get(member, learner)) is not UNSET}
    left_out = not_state_of(cls)
    for name in left_out:
        if name in values:
            values[name] = None
        elif name in slots:
            del slots[name]
        elif (registry := _registry_of(values, name)) is not None:
            values[registry] = copy.copy(values[registry])
            values[registry][name] = None
        elif not hasattr(cls, name) and (near := difflib.get_close_matches(name, [*values, *slots], 1)):
            # A name without a near match may be an attribute that is made later, such as a cache.
            what = f"{cls.__qualname__}.not_state names {name!r}, which is no attribute"
            raise _refusal(name, f"{what}: did you mean {near[0]!r}?")
    keys = {}
    for name, value in list(values.items()):
        if type(value) in ATOMS or shared is None or (found := shared.key_of(value)) is None:
            continue
        keys[name], is_constructors = found
        values[name] = None
        if not is_constructors:
            raise _refusal(
                name,
                f"{name!r} of a {cls.__qualname__} is the shared object {keys[name]!r}, for which no constructor has "
                f"asked, so that another process need not have it: call current_call().shared() in the constructor, "
                f"or name {name!r} in not_state",
            )
    return {"values": values, "slots": slots, "not_state": list(left_out), "shared": keys}


def set_attributes(learner: Any, state: Any, shared: SharedObjects | None) -> None:
    """Give a newly made learner exactly the attributes that `attributes_of` took, and keep those in ``not_state``.

    Raises:
        SnapshotError: If a shared object has not been made in this process.
        Exception: If the state does not come from `attributes_of`.
    """
    cls = type(learner)
    parts = [state[name] for name in ("values", "slots", "shared")]
    if not all(type(part) is dict for part in parts) or type(state["not_state"]) is not list:
        raise SnapshotError(f"the state of a {cls.__qualname__} is none that its attributes give")
    values, slots, left_out = dict(state["values"]), state["slots"], frozenset(state["not_state"])
    fresh = dict(_plain_attributes(learner))
    for name, key in state["shared"].items():
        if shared is None:
            raise SnapshotError(f"{name!r} is the shared object {key!r}, which only a proxy's process has")
        values[name] = shared.find(key)
    for name in left_out:
        if name in values:
            values[name] = fresh.get(name, UNSET)
            if values[name] is UNSET:
                del values[name]
        elif (registry := _registry_of(values, name)) is not None:
            values[registry][name] = fresh[registry][name]
    if values or fresh:
        vars(learner).clear()
        setstate: Any = getattr(cls, "__setstate__", nn.Module.__setstate__)
        if setstate is nn.Module.__setstate__:
            vars(learner).update(values)  # bypasses a __setattr__ that refuses it
        else:
            learner.__setstate__(values)  # torch's, which adds attributes that its __getstate__ leaves out
    for member in slots_of(cls):
        if member.__name__ in slots:
            member.__set__(learner, slots[member.__name__])
        elif member.__name__ not in left_out and get(member, learner) is not UNSET:
            member.__delete__(learner)


def made_anew(learner: Any, shared: SharedObjects | None) -> list[Apart]:
    """Return the objects that must not be part of a learner's state: those in ``not_state``, and shared objects."""
    own: dict[str, Any] = {}
    attributes = getattr(learner, "__dict__", {})
    for name in not_state_of(type(learner)):
        if name in attributes or _registry_of(attributes, name) is None:
            own[name] = getattr(learner, name, None)
        else:
            own[name] = attributes[_registry_of(attributes, name)][name]
    found = [Apart("the attribute in not_state", own, "name both in not_state, or neither")] if own else []
    if shared is not None and (objects := shared.objects()):
        remedy = (
            "keep the shared object itself in an attribute, from the constructor on, or name this one in not_state"
        )
        found.append(Apart("the object shared as", objects, remedy))
    return found


def _refusal(name: str, text: str) -> SnapshotError:
    error = SnapshotError(text)
    error.attribute = repr(name)
    return error


def _plain_attributes(learner: Any) -> Mapping[str, Any]:
    """Return the attributes in a learner's ``__dict__``, except those that torch's own classes recreate."""
    getstate: Any = type(learner).__getstate__
    if getstate in (object.__getstate__, nn.Module.__getstate__):
        return getattr(learner, "__dict__", {})
    state: Mapping[str, Any] = learner.__getstate__()
    return state


def _registry_of(values: Mapping[str, Any], name: str) -> str | None:
    return next((registry for registry in REGISTRIES if name in (values.get(registry) or ())), None)
