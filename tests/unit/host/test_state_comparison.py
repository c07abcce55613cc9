"""The comparison of a rebuilt state with the live one: each kind of difference is found, and nothing else is one."""

from __future__ import annotations

import array
import collections
import copy
import dataclasses
import datetime
import decimal
import enum
import functools
import io
import math
import operator
import pathlib
import pickle
import random
import re
import time
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from values import everything

from torchfedrpc.host.state_comparison import Apart, first_difference
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.packing import pack

UNSET = object()
NAN = float("nan")


class Plain:
    """Whatever attributes a test gives it."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def method(self) -> int:
        return 1


class Mark:
    """Known by identity."""


MARK = Mark()


class Slotted:
    __slots__ = ("__private", "one", "two")

    def __init__(self, one: Any = 1) -> None:
        self.one = one
        self.__private = one

    def private(self) -> Any:
        return self.__private


class SlottedChild(Slotted):
    __slots__ = ("three",)


class OwnState:
    """Leaves its cache out on purpose."""

    def __init__(self, value: Any = 1) -> None:
        self.value = value
        self.cache: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"value": self.value}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.value, self.cache = state["value"], {}


class OwnReduce:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __reduce__(self) -> Any:
        return OwnReduce, (self.value,)


class Noisy(dict[str, Any]):
    """A dict with attributes and ideas of its own about entries."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, [value])


class Items(list[Any]):
    pass


class Number(int):
    pass


class Text(str):
    pass


class Real(float):
    pass


class Raw(bytearray):
    pass


class Queue(collections.deque[Any]):
    pass


class Tags(set[Any]):
    pass


class Pair(NamedTuple):
    one: Any
    two: Any


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Access(enum.Flag):
    READ = 1
    WRITE = 2


@dataclasses.dataclass
class Config:
    rate: float = 0.1


@dataclasses.dataclass(frozen=True)
class Key:
    name: str


CONFIG, KEY = Config(), Key("a")


class OwnError(ValueError):
    def __init__(self, text: str, code: int) -> None:
        super().__init__(text, code)
        self.code = code


class Counting(torch.optim.SGD):
    """Counts its steps beside what its base keeps."""

    num_steps = 0

    def step(self, closure: Any = None) -> Any:
        self.num_steps += 1
        return super().step(closure)


class Cached:
    @functools.lru_cache  # noqa: B019 - what this is about
    def total(self) -> int:
        return 1


class CachedAndKnown(Cached):
    not_state = ("total",)


class CachedProperty:
    @functools.cached_property
    def total(self) -> int:
        return 1


class TensorChild(Tensor):
    pass


class ArrayChild(np.ndarray[Any, Any]):
    pass


def hook(*args: Any) -> None:
    """Does nothing."""


def pickled(obj: Any) -> Any:
    return pickle.loads(pickle.dumps(obj, 5))


def reason(live: Any, rebuilt: Any, **kwargs: Any) -> str | None:
    found = first_difference(live, rebuilt, **kwargs)
    return None if found is None else str(found)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))


def trained(make: Callable[..., Any], **settings: Any) -> dict[str, Any]:
    one = model()
    optimiser = make(one.parameters(), **settings)

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = one(torch.ones(4, 3)).square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    optimiser.zero_grad()
    return {"model": one, "optimiser": optimiser}


def scheduled(make: Callable[..., Any]) -> dict[str, Any]:
    parts = trained(torch.optim.SGD, lr=0.1, momentum=0.9)
    return {**parts, "scheduler": make(parts["optimiser"])}


# What is equal.


def cyclic() -> list[Any]:
    one: list[Any] = []
    one.append({"self": one})
    return one


def deep(levels: int) -> list[Any]:
    one: list[Any] = []
    for _ in range(levels):
        one = [one]
    return one


def doubled(levels: int) -> tuple[Any, ...]:
    one: tuple[Any, ...] = (1.5,)
    for _ in range(levels):
        one = (one, one)
    return one


def moved_to_end() -> collections.OrderedDict[str, int]:
    ordered = collections.OrderedDict(a=1, b=2)
    ordered.move_to_end("a")
    return ordered


def with_attribute(obj: Any) -> Any:
    obj.note = "a note"
    return obj


def raised() -> Exception:
    try:
        raise OwnError("text", 3)
    except OwnError as error:
        return error


EQUAL: dict[str, Any] = {
    "atoms": [None, True, 1, -(2**70), 1.5, -0.0, math.inf, NAN, complex(0.0, -0.0), "text", "\ud800", b"raw", ...],
    "mixed numbers": [1, 1.0, True, "1"],
    "dict": {"b": 1, "a": [2.5], 3: None, (1, "x"): 2},
    "cycle": cyclic(),
    "deep list": deep(300),
    "doubled tuples": doubled(60),
    "set": {3, 1, 2, 100, 17},
    "set in the order of its strings' hashes": {f"client_{number}" for number in range(300)},
    "frozenset of strings": frozenset(("one", "two", "three")),
    "set of enums and dtypes": {Colour.RED, torch.float32},
    "set of frozen dataclasses": {Key("a"), Key("b")},
    "set with one object": {Plain(a=1)},
    "set of known objects": (lambda a, b: [a, b, {a, b}])(Plain(n=1), Plain(n=2)),
    "set of parameters": (lambda m: [m, set(m.parameters())])(model()),
    "defaultdict": collections.defaultdict(list, a=[1]),
    "ordered dict": moved_to_end(),
    "counter": collections.Counter("abca"),
    "chain map": collections.ChainMap({"a": 1}, {"b": 2}),
    "named tuple": Pair([1], {2}),
    "dict subclass": with_attribute(Items([1, 2])),
    "number subclass": with_attribute(Number(3)),
    "text subclass": with_attribute(Text("text")),
    "float subclass": with_attribute(Real(1.5)),
    "bytearray": [bytearray(b"raw"), Raw(b"raw")],
    "deque subclass": with_attribute(Queue([1], maxlen=2)),
    "set subclass": with_attribute(Tags([1])),
    "range and slice": [range(1, 10, 3), slice(1, None)],
    "object": Plain(a=1, b=[2]),
    "bare object of its own": (lambda one: [one, one])(object()),
    "slots": SlottedChild(2),
    "own getstate": OwnState([1]),
    "own reduce": OwnReduce([1]),
    "bound method": (lambda one: [one, one.method])(Plain(a=1)),
    "bound builtin": (lambda one: [one, one.append])([1]),
    "partial": functools.partial(cast("Any", hook), 1, a=[2]),
    "functions and classes": [hook, Plain, len, math.sin, torch.relu, nn.Linear, dict[str, int], NotImplemented],
    "enum and flag": [Colour.BLUE, Access.READ | Access.WRITE],
    "dates": [
        datetime.datetime(2020, 1, 2, fold=1, tzinfo=datetime.UTC),
        datetime.date(2020, 1, 2),
        datetime.timedelta(3),
        datetime.timezone(datetime.timedelta(hours=1)),
    ],
    "path and uuid": [pathlib.Path("a") / "b", uuid.UUID(int=3), re.compile("a", re.IGNORECASE)],
    "array module": array.array("d", [1.0, 2.0]),
    "bytes in memory": io.BytesIO(b"raw"),
    "iterators": [iter([1, 2]), operator.attrgetter("a")],
    "struct sequence": time.gmtime(0),
    "random": random.Random(3),
    "exceptions": [OwnError("a", 3), OSError(2, "no", "file"), UnicodeDecodeError("utf8", b"x", 0, 1, "no")],
    "raised exception, its traceback apart": raised(),
    "exception group": ExceptionGroup("two", [ValueError(1), TypeError(2)]),
    "tensors": [torch.ones(2, 3), torch.tensor(1.5), torch.empty(0, 3), torch.ones(2, dtype=torch.bfloat16)],
    "tied views": (lambda t: [t, t[2:], t.view(2, 3)])(torch.arange(6.0)),
    "parameter": nn.Parameter(torch.ones(2)),
    "dtypes": [np.dtype("f4"), np.dtype([("a", "i4")], align=True)],
    "numpy generators": [np.random.default_rng(3), np.random.RandomState(4), np.random.SeedSequence(5)],
    "generator tied to its bits": (lambda bits: [bits, np.random.Generator(bits)])(np.random.PCG64(3)),
    "torch modules": [
        model(),
        nn.LSTM(2, 3),
        nn.TransformerEncoderLayer(4, 2),
        nn.MultiheadAttention(4, 2),
        nn.Conv2d(1, 2, 3),
        nn.ParameterDict({"a": nn.Parameter(torch.ones(1))}),
        nn.Upsample(scale_factor=2),
        nn.MaxPool2d(2),
        nn.Embedding(3, 2, padding_idx=0),
    ],
    "frozen and in evaluation": model().requires_grad_(False).eval(),
    "averaged model": torch.optim.swa_utils.AveragedModel(nn.Linear(2, 1)),
    "gradient scaler": (lambda scaler: (scaler.scale(torch.ones(1)), scaler)[1])(torch.amp.GradScaler("cpu")),
    "data loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.arange(4.0))),
    "step lr": scheduled(lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2)),
    "cosine": scheduled(lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 5)),
    "warm restarts": scheduled(lambda opt: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(opt, 5)),
    "one cycle": scheduled(lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=9)),
    "plateau": scheduled(torch.optim.lr_scheduler.ReduceLROnPlateau),
    "exponential": scheduled(lambda opt: torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)),
    "lambda": scheduled(lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, math.sqrt)),
    "swa": scheduled(lambda opt: torch.optim.swa_utils.SWALR(opt, 0.1)),
} | {
    f"optimiser {make.__name__}": trained(make, **cast("dict[str, Any]", settings))
    for make, settings in [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.AdamW, {}),
        (torch.optim.NAdam, {}),
        (torch.optim.RAdam, {}),
        (torch.optim.Adamax, {}),
        (torch.optim.Adagrad, {}),
        (torch.optim.Adadelta, {}),
        (torch.optim.RMSprop, {"centered": True}),
        (torch.optim.Rprop, {}),
        (torch.optim.ASGD, {}),
    ]
}


@pytest.mark.parametrize("name", EQUAL)
def test_state_equals_its_rebuilt_twin(name: str) -> None:
    rebuild = copy.deepcopy if name == "tied views" else pickled  # pickle alone unties these
    assert reason(EQUAL[name], rebuild(EQUAL[name])) is None


def test_state_equals_itself() -> None:
    for value in EQUAL.values():
        assert reason(value, value) is None


@pytest.mark.parametrize("name", everything())
def test_value_of_the_corpus_equals_its_copy_in_a_message(name: str) -> None:
    value = everything()[name]
    assert reason(value, value) is None
    assert reason(value, pack(value).open(AllowList())) is None


# What is different: live, rebuilt, the path, and words of the reason.


def hooked(tensor: Tensor, register: str) -> Tensor:
    getattr(tensor, register)(hook)
    return tensor


def with_gradient(tensor: Tensor) -> Tensor:
    tensor.grad = torch.ones_like(tensor)
    return tensor


def with_attributes(error: BaseException, **attributes: Any) -> BaseException:
    for name, value in attributes.items():
        setattr(error, name, value)
    return error


def shrunk() -> set[int]:
    """A set in a table that is larger than its elements need, so that these lie in another order."""
    large = set(range(1000))
    for number in set(range(1000)) - {33, 2, 65, 800}:
        large.discard(number)
    return large


def compiled() -> nn.Module:
    one = nn.Linear(1, 1)
    one._compiled_call_impl = hook  # as Module.compile() does
    return one


def pair_of_views() -> list[Tensor]:
    whole = torch.arange(6.0)
    return [whole[:4], whole[2:]]


TABLE = torch.arange(6.0).view(2, 3)
ARRAY = np.arange(6.0).reshape(2, 3)
SGD = functools.partial(trained, torch.optim.SGD, lr=0.1)

DIFFERENT: dict[str, tuple[Any, Any, str]] = {
    "type": ({"a": 1}, {"a": True}, r"\['a'\] would be a bool instead of a int"),
    "number": ([1, [2.5]], [1, [2.25]], r"\[1\]\[0\] would be 2.25 instead of 2.5"),
    "sign of zero": ([0.0, None], [-0.0, None], r"\[0\] would be -0.0"),
    "sign of zero among floats": ([0.0], [-0.0], r"\[0\] would be -0.0"),
    "payload of NaN": (NAN, np.frombuffer(b"\x01\0\0\0\0\0\xf8\x7f")[0].item(), "would be nan"),
    "sign of a complex zero": (complex(0.0, 0.0), complex(0.0, -0.0), "would be"),
    "text": ("one", "other", "would be 'other'"),
    "length of a list": ([1], [1, 2], "2 elements instead of 1"),
    "length of a dict": ({"a": 1}, {}, "0 entries instead of 1"),
    "order of a dict": ({"a": 1, "b": 2}, {"b": 2, "a": 1}, "the key 'a' would be 'b'"),
    "order of an ordered dict": (moved_to_end(), collections.OrderedDict(a=1, b=2), "the key 'b' would be 'a'"),
    "key of a dict": ({1: 2}, {1.0: 2}, "the key 1 would be a float"),
    "NaN as a key": ({NAN: 1}, {NAN: 1}, "has NaN as a key"),
    "NaN in a key": ({(1, NAN): 1}, {(1, NAN): 1}, "has NaN as a key"),
    "NaN in a set": ({NAN}, {NAN}, "has NaN as a key"),
    "order of a set": (shrunk(), pickled(shrunk()), "iterated in another order"),
    "element of a set": ({1, 2}, {1, 3}, r"\[2\] would be 3"),
    "element of a set of strings": ({"a", "b"}, {"a", "c"}, "would not have the element 'b'"),
    "type of an element": ({"a", 1}, {"a", True}, r"\[1\] would be a bool"),
    "set of objects": ({Plain(n=1), Plain(n=2)}, {Plain(n=1), Plain(n=2)}, "found by their addresses"),
    "object in a set": ({Plain(n=1)}, {Plain(n=2)}, r"\.n would be 2"),
    "maxlen": (
        collections.deque([1], maxlen=2),
        collections.deque([1]),
        r"\.maxlen would be a NoneType",
    ),
    "default factory": (collections.defaultdict(list), collections.defaultdict(set), r"\.default_factory is .*list"),
    "two objects for one": ((lambda one: [one, one])([]), [[], []], r"\[1\] is the same object as \[0\]"),
    "one object for two": ([[], []], (lambda one: [one, one])([]), r"\[1\] is another object than \[0\]"),
    "alias by attribute": (
        (lambda one: Plain(a=one, b=[one]))(Plain()),
        Plain(a=Plain(), b=[Plain()]),
        r"\.b\[0\] is the same object as \.a",
    ),
    "alias of a bytearray": ((lambda one: [one, one])(bytearray()), [bytearray(), bytearray()], "the same object"),
    "tuple that holds an alias": ((lambda one: [(one,), (one,)])([]), [([],), ([],)], r"\[1\]\[0\] is the same"),
    "missing attribute": (Plain(a=1), Plain(), r"\.a would be missing"),
    "attribute too many": (Plain(), Plain(a=1), r"\.a would be there, and is not"),
    "missing slot": (Slotted(), (lambda one: (delattr(one, "one"), one)[1])(Slotted()), r"\.one would be missing"),
    "private slot": (Slotted([1]), (lambda one: (setattr(one, "one", [1]), one)[1])(Slotted([2])), "would be"),
    "slot of a child": ((lambda o: (setattr(o, "three", 1), o)[1])(SlottedChild()), SlottedChild(), r"\.three"),
    "attribute of a list": (with_attribute(Items()), Items(), r"\.note would be missing"),
    "attribute of a number": (with_attribute(Number(1)), Number(1), r"\.note would be missing"),
    "value of a number": (Number(1), Number(2), "would be 2"),
    "value of a text": (Text("a"), Text("b"), "would be 'b'"),
    "content of a bytearray": (Raw(b"a"), Raw(b"b"), "would be b'b'"),
    "entries of an own dict": (Noisy(a=1), Noisy(a=[1]), r"\['a'\] would be a list"),
    "attribute of a set": (with_attribute(Tags()), Tags(), r"\.note"),
    "attribute of a counter": (
        with_attribute(type("Sub", (collections.Counter,), {})("a")),
        collections.Counter("a"),
        "Counter instead of a Sub",
    ),
    "own state": (OwnState(1), OwnState(2), r"\['value'\] would be 2"),
    "own reduce": (OwnReduce([1]), OwnReduce([2]), "would be 2"),
    "function": (hook, pickled, "is .*hook, and would be another"),
    "class": ([Plain], [Mark], "is .*Plain, and would be"),
    "method of another": (Plain(a=1).method, Plain(a=2).method, r"\.__self__\.a would be 2"),
    "method of a twin": ((lambda o: [o, o.method])(Plain()), [Plain(), Plain().method], "is the same object"),
    "partial": (functools.partial(hook, 1), functools.partial(hook, 2), "would be 2"),
    "enum": (Colour.RED, Colour.BLUE, "would be another"),
    "fold of a time": (datetime.time(1, fold=1), datetime.time(1), "would be"),
    "digits of a decimal": (decimal.Decimal("1.0"), decimal.Decimal("1.00"), "would be '1.00'"),
    "array of numbers": (array.array("d", [1.0]), array.array("d", [2.0]), "would be"),
    "position of an iterator": (iter([1, 2]), (lambda one: (next(one), one)[1])(iter([1, 2])), "would be 1"),
    "random generator": (random.Random(1), random.Random(2), "would be"),
    "attribute of a random generator": (with_attribute(random.Random(1)), random.Random(1), r"\.note"),
    "exception's args": (ValueError(1), ValueError(2), r"\.args\[0\]"),
    "exception's cause": (
        with_attributes(ValueError(), __cause__=KeyError()),
        with_attributes(ValueError(), __cause__=None),
        r"\.__cause__ would be a NoneType",
    ),
    "exception's context": (with_attributes(ValueError(), __context__=KeyError()), ValueError(), r"\.__context__"),
    "exception's note": (with_attributes(ValueError(), __notes__=["n"]), ValueError(), r"\.__notes__"),
    "exception's attribute": (OwnError("a", 1), OwnError("a", 2), r"\.code would be 2"),
    "exception's errno": (with_attributes(OSError(1, "no"), errno=5), OSError(1, "no"), r"\.errno would be 1"),
    "exception's reason": (
        with_attributes(UnicodeDecodeError("utf8", b"x", 0, 1, "no"), reason="yes"),
        UnicodeDecodeError("utf8", b"x", 0, 1, "no"),
        r"\.reason",
    ),
    # Tensors.
    "values": (torch.ones(2), torch.zeros(2), "other values"),
    "bits of NaN": (torch.tensor([NAN]), torch.tensor([2143289345], dtype=torch.int32).view(torch.float32), "values"),
    "dtype": (torch.ones(2), torch.ones(2).double(), r"would be float64\[2\] instead of float32\[2\]"),
    "shape": (torch.ones(2), torch.ones(1, 2), r"float32\[1, 2\]"),
    "gaps": (TABLE[:, 1], TABLE[:, 1].clone(), r"strides \(1,\) instead of \(3,\)"),
    "expanded": (torch.ones(1).expand(3), torch.ones(3), r"strides \(1,\) instead of \(0,\)"),
    "transposed": (TABLE.t(), TABLE.t().contiguous(), "strides"),
    "requires grad": (torch.ones(1, requires_grad=True), torch.ones(1), "requires_grad=False"),
    "parameter": (nn.Parameter(torch.ones(1)), torch.ones(1), "would be a Tensor instead of a Parameter"),
    "gradient": (with_gradient(nn.Parameter(torch.ones(2))), nn.Parameter(torch.ones(2)), r"\.grad would be a None"),
    "gradient's values": (
        with_gradient(nn.Parameter(torch.ones(2))),
        (lambda one: (setattr(one, "grad", torch.zeros(2)), one)[1])(nn.Parameter(torch.ones(2))),
        r"\.grad would have other values",
    ),
    "graph": (nn.Parameter(torch.ones(2)) * 2, torch.full((2,), 2.0), "autograd graph: keep tensor.detach"),
    "hook": (hooked(nn.Parameter(torch.ones(2)), "register_hook"), nn.Parameter(torch.ones(2)), "has hooks"),
    "late hook": (
        hooked(nn.Parameter(torch.ones(2)), "register_post_accumulate_grad_hook"),
        nn.Parameter(torch.ones(2)),
        "has hooks",
    ),
    "conjugated": (torch.ones(2, dtype=torch.cfloat).conj(), torch.ones(2, dtype=torch.cfloat), "conjugated view"),
    "negated": (torch._neg_view(torch.ones(2)), -torch.ones(2), "instead of negated view"),
    "inference": (torch.inference_mode()(torch.ones)(2), torch.ones(2), "is an inference tensor"),
    "attribute of a tensor": (with_attribute(torch.ones(2)), torch.ones(2), r"\.note would be missing"),
    "subclass of tensor": (torch.ones(2).as_subclass(TensorChild), torch.ones(2), "Tensor instead of a TensorChild"),
    "layout": (torch.eye(2).to_sparse(), torch.eye(2), "sparse_coo"),
    "sparse values": (torch.eye(2).to_sparse(), (2 * torch.eye(2)).to_sparse(), r"\.sparse_coo\[1\] would have"),
    "coalesced": (
        torch.eye(2).to_sparse(),
        torch.sparse_coo_tensor(torch.tensor([[0, 1], [0, 1]]), torch.ones(2), (2, 2), check_invariants=True),
        r"\.sparse_coo\[3\] would be False",
    ),
    "untied storage": (
        pair_of_views(),
        [one.clone() for one in pair_of_views()],
        r"\[1\] shares memory with \[0\], and would not",
    ),
    "tied storage": (
        [torch.zeros(4), torch.zeros(4)],
        (lambda one: [one[:4], cast("Any", one[4:].new_zeros(0)).set_(one.untyped_storage(), 2, (4,))])(
            torch.zeros(8)
        ),
        r"would share memory",
    ),
    "other offset": (
        (lambda one: [one[:4], one[1:5]])(torch.zeros(8)),
        (lambda one: [one[:4], one[2:6]])(torch.zeros(8)),
        "shares memory",
    ),
    # Arrays.
    "array values": (np.arange(3), np.arange(1, 4), "other values"),
    "array of objects": (
        np.array([1, [2]], dtype=object),
        np.array([1, [3]], dtype=object),
        r"\[1\]\[0\] would be 3",
    ),
    "array dtype": (np.ones(2), np.ones(2, dtype="f4"), "dtype float32 instead of float64"),
    "array byte order": (np.ones(2), np.ones(2, dtype=">f8"), "dtype >f8"),
    "dtype's metadata": (
        np.zeros(1, dtype=np.dtype("i4", metadata={"unit": "m"})),
        np.zeros(1, dtype="i4"),
        "metadata",
    ),
    "dtype's alignment": (np.dtype([("a", "i4")], align=True), np.dtype([("a", "i4")]), "dtype"),
    "array shape": (np.ones(2), np.ones((1, 2)), r"shape \(1, 2\)"),
    "array gaps": (ARRAY[:, 1], ARRAY[:, 1].copy(), "strides"),
    "array order": (np.asfortranarray(ARRAY), ARRAY.copy(), "strides"),
    "array read only": ((lambda one: (one.setflags(write=False), one)[1])(np.ones(2)), np.ones(2), "be writeable"),
    "array subclass": (np.ones(2).view(ArrayChild), np.ones(2), "ndarray instead of a ArrayChild"),
    "attribute of an array": (with_attribute(np.ones(2).view(ArrayChild)), np.ones(2).view(ArrayChild), r"\.note"),
    "numpy scalar": (np.float64(1.0), np.float64(2.0), "would be"),
    "untied arrays": ((lambda one: [one, one[1:]])(np.ones(4)), [np.ones(4), np.ones(3)], "shares memory with"),
    "array untied from a tensor": (
        (lambda one: [one, one.numpy()])(torch.ones(4)),
        [torch.ones(4), np.ones(4, dtype="f4")],
        r"\[1\] shares memory with \[0\]",
    ),
    "numpy generator": (np.random.default_rng(1), np.random.default_rng(2), r"\.state\['state'\]"),
    "spawned seeds": (
        (lambda one: (one.spawn(2), one)[1])(np.random.SeedSequence(1)),
        np.random.SeedSequence(1),
        "would be 0 instead of 2",
    ),
    "generator untied from its bits": (
        (lambda bits: [bits, np.random.Generator(bits)])(np.random.PCG64(3)),
        [np.random.PCG64(3), np.random.default_rng(3)],
        "is the same object",
    ),
    "torch generator": (torch.Generator().manual_seed(1), torch.Generator().manual_seed(2), "draw other numbers"),
    # Modules and optimisers.
    "module in training": (nn.Dropout().eval(), nn.Dropout(), r"\.training would be True instead of False"),
    "compiled module": (compiled(), nn.Linear(1, 1), r"\._compiled_call_impl would be missing"),
    "module's hook": (
        (lambda one: (one.register_forward_hook(hook), one)[1])(nn.ReLU()),
        nn.ReLU(),
        r"\._forward_hooks would have 0 entries",
    ),
    "untied weights": (
        (lambda one: Plain(model=one, head=one.weight))(nn.Linear(1, 1)),
        Plain(model=nn.Linear(1, 1), head=nn.Linear(1, 1).weight),
        r"\.head is the same object as \.model\._parameters\['weight'\]|other values",
    ),
    "optimiser's own counter": (
        trained(Counting, lr=0.1),
        pickled(trained(Counting, lr=0.1)),
        r"\['optimiser'\]\.num_steps would be missing",
    ),
    "lbfgs": (
        trained(torch.optim.LBFGS),
        pickled(trained(torch.optim.LBFGS)),
        r"\[.optimiser.\]\._\w+ would be",
    ),
    "optimiser's hook": (
        (lambda parts: (parts["optimiser"].register_step_post_hook(hook), parts)[1])(SGD()),
        SGD(),
        r"\._optimizer_step_post_hooks would have 0 entries",
    ),
    "optimiser's own wrapper": (
        (lambda parts: (setattr(parts["optimiser"], "step", hook), parts)[1])(SGD()),
        SGD(),
        r"\['optimiser'\]\.step would be missing",
    ),
    "optimiser untied from its model": (
        SGD(),
        {"model": SGD()["model"], "optimiser": SGD()["optimiser"]},
        "is the same object as",
    ),
    "learning rate": (
        torch.optim.SGD([torch.zeros(1)], lr=0.1),
        torch.optim.SGD([torch.zeros(1)], lr=0.2),
        r"\.defaults\['lr'\] would be 0.2",
    ),
    # What code knows by identity.
    "mark of a module": (Plain(value=MARK), Plain(value=Mark()), r"\.value is test_state_comparison.MARK"),
    "bare mark of a module": (Plain(value=UNSET), Plain(value=object()), r"\.value is test_state_comparison.UNSET"),
    "mark of a library": (
        Plain(value=dataclasses.MISSING),
        Plain(value=cast("Any", type(dataclasses.MISSING))()),
        r"\.value is dataclasses.MISSING",
    ),
    "global configuration": (
        Plain(config=CONFIG),
        Plain(config=Config()),
        r"\.config is test_state_comparison.CONFIG",
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_difference_is_found_with_its_path(name: str) -> None:
    live, rebuilt, words = DIFFERENT[name]
    found = reason(live, rebuilt)
    assert found is not None
    assert re.search(words, found), found


def test_path_leads_to_the_first_difference() -> None:
    live: Any
    rebuilt: Any
    live, rebuilt = ({"model": nn.Sequential(nn.Linear(1, 1)), "names": ["a", Plain(b=(1, last))]} for last in (2, 3))
    found = first_difference(live["names"], rebuilt["names"])
    assert found is not None
    assert found.path == "[1].b[1]"
    for live, rebuilt, attribute in (
        (Plain(layers=[Plain(bias=1)]), Plain(layers=[Plain(bias=2)]), ".layers"),
        ({"0.weight": [1]}, {"0.weight": [2]}, "['0.weight']"),
    ):
        found = first_difference(live, rebuilt)
        assert found is not None
        assert found.attribute == attribute


def test_global_that_is_a_value_may_be_copied() -> None:
    assert reason(Plain(key=KEY), pickled(Plain(key=KEY))) is None


def test_mark_that_pickles_by_name_stays_itself() -> None:
    assert reason(Plain(mark=MARK), Plain(mark=MARK)) is None


def test_state_that_refers_to_its_learner_is_refused() -> None:
    owner = Plain()
    live = {"callbacks": [Plain(owner=owner)]}
    assert "refers to the Plain itself" in str(reason(live, copy.deepcopy(live), owner=owner))


def test_cache_of_a_method_counts_once_it_has_entries() -> None:
    Cached.total.cache_clear()
    owner = Cached()
    assert reason({}, {}, owner=owner, are_attributes=True) is None
    owner.total()
    found = reason({}, {}, owner=owner, are_attributes=True)
    assert ".total is cached by lru_cache in the class Cached" in str(found)
    assert reason({}, {}, owner=CachedAndKnown(), are_attributes=True) is None
    assert reason({}, {}, owner=owner) is None  # whose state is said otherwise
    one = CachedProperty()
    assert one.total == 1
    assert reason(vars(one), pickled(vars(one)), owner=one, are_attributes=True) is None


def test_optimiser_that_a_scheduler_wraps_is_equal_without_the_wrapper() -> None:
    parts = scheduled(lambda opt: torch.optim.lr_scheduler.StepLR(opt, 1))
    assert "step" in vars(parts["optimiser"])
    assert "step" not in vars(pickled(parts)["optimiser"])
    assert reason(parts, pickled(parts)) is None


def common_parts() -> dict[str, tuple[Any, Any, str]]:
    data: Any = Plain(rows=[1])
    x = torch.ones(4)
    return {
        "object": ({"data": data}, [data], r"\['data'\] is part of attribute 'loader' too"),
        "inner object": ({"rows": data.rows}, functools.partial(hook, data), r"\['rows'\] is part of"),
        "view": ({"x": x[1:]}, Plain(x=x), r"\['x'\] shares memory with attribute 'loader'"),
        "array": ({"x": x}, [x.numpy()], "shares memory"),
        "closure": ({"x": x}, lambda: x, "is part of"),
    }


@pytest.mark.parametrize("name", common_parts())
def test_state_has_nothing_in_common_with_what_is_made_anew(name: str) -> None:
    state, loader, words = common_parts()[name]
    found = reason(state, copy.deepcopy(state), apart=[Apart("attribute", {"loader": loader}, "name it as well")])
    assert found is not None
    assert re.search(words + ".*: name it as well", found), found


def test_values_and_classes_may_be_in_what_is_made_anew_too() -> None:
    state = {"name": "client", "key": KEY, "cls": Plain, "enum": Colour.RED, "pair": (1, 2), "dtype": torch.float32}
    apart = Apart("attribute", {"loader": list(state.values())}, "")
    assert reason(state, pickled(state), apart=[apart]) is None


def test_deep_and_wide_states_take_linear_time() -> None:
    assert reason(deep(100_000), deep(100_000)) is None
    one = doubled(2000)
    assert reason(one, doubled(2000)) is None
    chain: Any = None
    for _ in range(50_000):
        chain = Plain(next=chain)
    assert reason(chain, chain) is None
    for nested in (one, chain):  # freed level by level: C frees it by recursion
        while nested:
            nested = nested[0] if isinstance(nested, tuple) else getattr(nested, "next", None)


def test_comparison_leaves_tensors_without_a_trace() -> None:
    parts = SGD()
    with_gradient(parts["model"][0].weight)
    versions = [parameter._version for parameter in parts["model"].parameters()]
    assert reason(parts, parts) is None
    assert [parameter._version for parameter in parts["model"].parameters()] == versions


def test_types_that_pickle_cannot_reduce_are_refused_and_not_passed_over() -> None:
    generators = [(number for number in range(3)) for _ in range(2)]
    assert "cannot be compared: TypeError" in str(reason([generators[0]], [generators[1]]))


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_compressed_sparse_tensors_are_compared_by_their_parts() -> None:
    one, other = torch.eye(3).to_sparse_csr(), (2 * torch.eye(3)).to_sparse_csr()
    assert reason(one, pickled(one)) is None
    assert ".sparse_compressed[2] would have other values" in str(reason(one, other))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:TypedStorage")
def test_quantised_tensors_are_compared_with_their_scales() -> None:
    by_tensor = [torch.quantize_per_tensor(scale * torch.ones(3), scale, 2, torch.qint8) for scale in (0.1, 0.2)]
    no_shift = torch.zeros(2, dtype=torch.int64)
    by_channel = [
        torch.quantize_per_channel(factor * torch.ones(2, 2), factor * torch.ones(2), no_shift, 0, torch.qint8)
        for factor in (1, 2)
    ]
    for (one, other), words in (
        (by_tensor, ".per_tensor[1] would be 0.2 instead of 0.1"),
        (by_channel, ".per_channel[1] would have other values"),
    ):
        assert reason(one, pickled(one)) is None
        assert words in str(reason(one, other))


class LeavesOut:
    """Leaves a number out of its state, and makes nothing anew."""

    def __init__(self) -> None:
        self.kept, self.left_out = 1, 2

    def __getstate__(self) -> dict[str, int]:
        return {"kept": self.kept}


class MakesAnew(LeavesOut):
    """Says itself what becomes of what it leaves out."""

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__dict__.update(state, left_out=0)


def test_state_that_a_part_leaves_out_is_missed_unless_the_part_makes_it_anew() -> None:
    found = first_difference([LeavesOut()], pickle.loads(pickle.dumps([LeavesOut()])))
    assert str(found) == "[0].left_out would be missing"
    assert first_difference([MakesAnew()], pickle.loads(pickle.dumps([MakesAnew()]))) is None


@pytest.mark.parametrize(
    "generator", [torch.default_generator, np.random.mtrand._rand, random._inst], ids=["torch", "numpy", "random"]
)
def test_generators_of_the_process_are_refused(generator: Any) -> None:
    found = first_difference(
        [generator], [copy.deepcopy(generator)] if generator is not torch.default_generator else [generator]
    )
    assert found is not None
    assert "the process's own generator" in str(found)
