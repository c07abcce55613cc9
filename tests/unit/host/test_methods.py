"""Which methods of a learner may be called."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest

import torchfedrpc as tfr
from torchfedrpc.errors import MethodNotFoundError
from torchfedrpc.host.methods import find_method, public_methods


class Helper:
    def __call__(self) -> str:
        return "helper"


class Site:
    rounds = 3
    nothing = None
    helper = Helper()

    def __init__(self) -> None:
        self.asked = 0
        self.as_attribute = lambda: "attribute"

    def train_epoch(self) -> str:
        return "trained"

    async def evaluate(self) -> None: ...

    @staticmethod
    def static() -> str:
        return "static"

    @classmethod
    def made(cls) -> str:
        return "class"

    @property
    def size(self) -> int:
        self.asked += 1
        return 3

    @property
    def broken(self) -> int:
        raise RuntimeError("the property itself")

    partial = functools.partialmethod(train_epoch)

    def _private(self) -> None: ...

    def __mangled(self) -> None: ...


class Dynamic:
    def __getattr__(self, name: str) -> Any:
        if name == "made_up":
            return lambda: "made up"
        raise AttributeError(name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train_epoch", "trained"),
        ("static", "static"),
        ("made", "class"),
        ("helper", "helper"),
        ("as_attribute", "attribute"),
        ("partial", "trained"),
    ],
)
def test_public_callables_are_found(name: str, value: str) -> None:
    assert find_method(Site(), name, "client_1")() == value


def test_a_method_made_by_getattr_is_found() -> None:
    assert find_method(Dynamic(), "made_up", "client_1")() == "made up"


def test_the_method_is_bound_to_this_learner() -> None:
    site = Site()
    method: Any = find_method(site, "train_epoch", "client_1")
    assert method.__self__ is site


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("_private", "client_1: Site._private is private; only public methods can be called"),
        ("__init__", "client_1: Site.__init__ is private"),
        ("__class__", "client_1: Site.__class__ is private"),
        ("_Site__mangled", "client_1: Site._Site__mangled is private"),
        ("_train_epoch", "(did you mean 'train_epoch'?)"),
        ("train", "client_1: Site has no method 'train' (did you mean 'train_epoch'?)"),
        ("zzz", "client_1: Site has no method 'zzz' (known: "),
        ("", "client_1: Site has no method ''"),
        ("rounds", "client_1: Site.rounds is no method but a int; add a method that returns it"),
        ("nothing", "client_1: Site.nothing is no method but a NoneType"),
        ("size", "client_1: Site.size is no method but a int"),
        ("train_epoch.__globals__", "client_1: Site has no method 'train_epoch.__globals__'"),
    ],
)
def test_name_of_no_public_method_is_refused_with_near_matches(name: str, message: str) -> None:
    with pytest.raises(MethodNotFoundError, match=re.escape(message)):
        find_method(Site(), name, "client_1")


def test_an_error_inside_a_property_is_its_own() -> None:
    with pytest.raises(RuntimeError, match="the property itself"):
        find_method(Site(), "broken", "client_1")


@pytest.mark.parametrize("of", [Site, Site()], ids=["class", "instance"])
def test_the_list_of_methods_has_the_public_callables_alone(of: Any) -> None:
    names = set(public_methods(of))
    assert {"evaluate", "helper", "static", "train_epoch"} <= names
    assert not names & {"_private", "_Site__mangled", "__init__", "broken", "nothing", "rounds", "size"}


def test_class_methods_are_listed_too() -> None:
    assert {"made", "partial"} <= set(public_methods(Site()))


def test_listing_the_methods_evaluates_no_property() -> None:
    site = Site()
    public_methods(site)
    with pytest.raises(MethodNotFoundError):
        find_method(site, "zzz", "client_1")
    assert site.asked == 0


class Counted(type):
    """Counts how often the names of a class are asked for."""

    num_asked = 0

    def __dir__(cls) -> list[str]:
        Counted.num_asked += 1
        return list(super().__dir__())


class Listed(metaclass=Counted):
    def __init__(self, client_id: str) -> None: ...

    def train_epoch(self) -> None: ...


def test_names_for_completion_are_listed_when_they_are_asked_for() -> None:
    proxy = tfr.LearnerProxy(Listed, ["client_1"])
    Counted.num_asked = 0
    for _ in range(3):
        handle = proxy.client("client_1").options(timeout_s=1)
    assert Counted.num_asked == 0
    assert {"train_epoch", "options", "client_id"} <= set(dir(handle))
    assert Counted.num_asked == 1
