"""Kinds that differ in the learner's own class: slots, properties, and the protocols of pickle."""

from __future__ import annotations

import collections
import functools
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from corpus.bits import bits
from corpus.registry import kind


@kind()
class Slots:
    """A learner with `__slots__`."""

    __slots__ = ("count", "weights")

    def __init__(self, client_id: str) -> None:
        self.count, self.weights = 0, torch.zeros(2)

    def step(self) -> str:
        self.count += 1
        self.weights += 1
        return bits(self.count, self.weights)


@kind()
class SlotsDeleted:
    """A learner with `__slots__`, one of which is deleted."""

    __slots__ = ("count", "warm_up")

    def __init__(self, client_id: str) -> None:
        self.count, self.warm_up = 0, 3

    def step(self) -> str:
        had = hasattr(self, "warm_up")
        if had:
            del self.warm_up
        self.count += 1
        return bits(had, self.count)


class _Base:
    __slots__ = ("a",)


@kind()
class SlotsAndDict(_Base):
    """A learner with slots of its base and attributes of its own, both deleted later."""

    def __init__(self, client_id: str) -> None:
        self.a, self.b, self.count = 1, 2, 0

    def step(self) -> str:
        had = hasattr(self, "a"), hasattr(self, "b")
        for name in ("a", "b"):
            if hasattr(self, name):
                delattr(self, name)
        self.count += 1
        return bits(had, self.count)


@kind()
class AttributeDeleted:
    """A learner that deletes an attribute of its constructor."""

    def __init__(self, client_id: str) -> None:
        self.warm_up = True

    def step(self) -> str:
        had = hasattr(self, "warm_up")
        self.__dict__.pop("warm_up", None)
        return bits(had)


@kind()
@dataclass
class DataClass:
    """A learner that is a dataclass."""

    client_id: str
    rate: float = 0.1
    history: list[float] = field(default_factory=list)

    def step(self) -> str:
        self.rate /= 3
        self.history.append(self.rate)
        return bits(self.history)


@kind()
@dataclass(slots=True)
class DataClassSlots:
    """A learner that is a dataclass with slots."""

    client_id: str
    rate: float = 0.1
    history: list[float] = field(default_factory=list)

    def step(self) -> str:
        self.rate /= 3
        self.history.append(self.rate)
        return bits(self.history)


@kind()
class Properties:
    """A learner with a property whose setter changes more than one attribute."""

    def __init__(self, client_id: str) -> None:
        self._rate, self.changes = 0.1, 0

    @property
    def rate(self) -> float:
        return self._rate

    @rate.setter
    def rate(self, value: float) -> None:
        self._rate = value
        self.changes += 1

    def step(self) -> str:
        self.rate = self.rate / 3
        return bits(self.rate, self.changes)


@kind(*["step"] * 4)
class CachedProperty:
    """A learner whose cached property training deletes."""

    def __init__(self, client_id: str) -> None:
        self.weight = torch.ones(3)
        _ = self.norm

    @functools.cached_property
    def norm(self) -> float:
        return float(self.weight.norm())

    def step(self) -> str:
        before = self.norm
        self.weight += 1
        del self.norm
        return bits(before, "norm" in vars(self))


@kind(refused="'scale'")
class CachedMethod:
    """`functools.lru_cache` on a method, whose cache is not part of the learner."""

    def __init__(self, client_id: str) -> None:
        self.count = 0

    @functools.lru_cache  # noqa: B019 - as users write it
    def scale(self) -> int:
        return self.count

    def step(self) -> str:
        self.count += 1
        return bits(self.scale(), self.count)


@kind()
class GetState:
    """`__getstate__` that leaves a lock out, which the constructor makes."""

    def __init__(self, client_id: str) -> None:
        self.lock, self.count = threading.Lock(), 0

    def __getstate__(self) -> dict[str, Any]:
        return {"count": self.count}

    def step(self) -> str:
        with self.lock:
            self.count += 1
        return bits(self.count)


@kind()
class GetAndSetState:
    """`__getstate__` and `__setstate__` with a state that is no dict."""

    def __init__(self, client_id: str) -> None:
        self.lock, self.count = threading.Lock(), 0

    def __getstate__(self) -> int:
        return self.count

    def __setstate__(self, state: int) -> None:
        self.count, self.lock = state, threading.Lock()

    def step(self) -> str:
        self.count += 1
        return bits(self.count)


@kind()
class GetStateOfTensors:
    """`__getstate__` that gives a tuple of tensors."""

    def __init__(self, client_id: str) -> None:
        self.a, self.b = torch.zeros(2), torch.ones(2)

    def __getstate__(self) -> tuple[Tensor, Tensor]:
        return self.a, self.b

    def __setstate__(self, state: tuple[Tensor, Tensor]) -> None:
        self.a, self.b = state

    def step(self) -> str:
        self.a += self.b
        return bits(self.a)


@kind()
class Reduce:
    """A learner with a `__reduce__` of its own."""

    def __init__(self, client_id: str, count: int = 0) -> None:
        self.client_id, self.count = client_id, count

    def __reduce__(self) -> Any:
        return type(self), (self.client_id, self.count)

    def step(self) -> str:
        self.count += 1
        return bits(self.count)


class PartReduce:
    """A part with a `__reduce__` of its own, which counts how often it was made."""

    def __init__(self, values: list[int]) -> None:
        self.values = values

    def __reduce__(self) -> Any:
        return type(self), (self.values,)


@kind()
class PartsReduce:
    """Parts with a `__reduce__` of their own."""

    def __init__(self, client_id: str) -> None:
        self.part = PartReduce([0])

    def step(self) -> str:
        self.part.values.append(len(self.part.values))
        return bits(self.part.values)


class PartForgets:
    """A part whose `__getstate__` leaves something out."""

    def __init__(self) -> None:
        self.kept, self.left_out = 0, 0

    def __getstate__(self) -> dict[str, int]:
        return {"kept": self.kept, "left_out": 0}


@kind(refused="'part'")
class PartsForget:
    """A part whose `__getstate__` forgets a number."""

    def __init__(self, client_id: str) -> None:
        self.part = PartForgets()

    def step(self) -> str:
        self.part.kept += 1
        self.part.left_out += 1
        return bits(self.part.kept, self.part.left_out)


@kind()
class StateDict:
    """`state_dict` and `load_state_dict`, with a lock that the constructor makes."""

    def __init__(self, client_id: str) -> None:
        self.lock, self.count, self.model = threading.Lock(), 0, nn.Linear(2, 1)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        self.model.load_state_dict(state["model"])

    def step(self) -> str:
        self.count += 1
        with torch.no_grad():
            self.model.weight += self.count
        return bits(self.count, self.model.weight)


@kind()
class Delegates:
    """A learner that lends its model's attributes by `__getattr__`."""

    def __init__(self, client_id: str) -> None:
        self.model, self.count = nn.Linear(2, 1), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)

    def step(self) -> str:
        self.count += 1
        with torch.no_grad():
            self.weight.add_(1)
        return bits(self.count, self.weight)


@kind()
class GuardedAttributes:
    """A learner whose `__setattr__` counts."""

    def __init__(self, client_id: str) -> None:
        self.__dict__.update(num_sets=0, value=0)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__["num_sets"] += 1
        self.__dict__[name] = value

    def step(self) -> str:
        self.value += 1
        return bits(self.value, self.num_sets)


@kind()
class PrivateAttributes:
    """Mangled names, a shadowed class attribute, and attributes that are no identifiers."""

    rate = 0.1

    def __init__(self, client_id: str) -> None:
        self.__secret = 0
        setattr(self, "layer 1", 0)

    def step(self) -> str:
        self.__secret += 1
        self.rate = self.rate / 2
        setattr(self, "layer 1", self.__secret)
        return bits(self.__secret, self.rate, vars(self))


@kind("step", "look", "step", "look", refused="what its class inherits from dict")
class LearnerIsDict(dict[Any, Any]):
    """A learner that is a dict."""

    def __init__(self, client_id: str) -> None:
        super().__init__(count=0)

    def step(self) -> str:
        self["count"] += 1
        return bits(dict(self))

    def look(self) -> str:
        return bits(dict(self))


@kind("step", "look", "step", "look")
class LearnerIsUserDict(collections.UserDict[Any, Any]):
    """A learner that is a UserDict."""

    def __init__(self, client_id: str) -> None:
        super().__init__(count=0)

    def step(self) -> str:
        self["count"] += 1
        return bits(self.data)

    def look(self) -> str:
        return bits(self.data)


@kind("step", "look", "step", "look", refused="what its class inherits from list")
class LearnerIsList(list[Any]):
    """A learner that is a list."""

    def __init__(self, client_id: str) -> None:
        super().__init__([0])

    def step(self) -> str:
        self.append(len(self))
        return bits(list(self))

    def look(self) -> str:
        return bits(list(self))


class _Meta(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        made.finished = True
        return made


@kind()
class WithMetaclass(metaclass=_Meta):
    """A learner whose metaclass finishes it."""

    def __init__(self, client_id: str) -> None:
        self.count = 0

    def step(self) -> str:
        self.count += 1
        self.finished = [self.finished]
        return bits(self.count, self.finished)


@kind()
class NotState:
    """A learner that names by `not_state` what its constructor makes anew."""

    not_state = {"loader", "lock"}

    def __init__(self, client_id: str) -> None:
        self.data = torch.randn(4)
        self.lock, self.loader = threading.Lock(), (lambda: self.data)
        self.count = 0

    def step(self) -> str:
        with self.lock:
            self.count += 1
        return bits(self.count, self.loader())
