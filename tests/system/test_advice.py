"""Advice in error messages: each is taken here, and must help."""

from __future__ import annotations

import array
import asyncio
import collections
import dataclasses
import functools
import re
import sys
import threading
import warnings
import zoneinfo
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import strangers
import torch
from conftest import opened, submitted
from strangers import StrangeError, Stranger
from torch import nn
from torch.utils import data

import torchfedrpc as tfr
from torchfedrpc.config import RuntimeConfig
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.testing import check_snapshot
from torchfedrpc.testing.rehearsal import Step, rehearsal
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.packing import pack

_ADVISED = re.compile(r"trusted_modules=\[([\w.]+)\]")


def send(value: Any, *trusted: str) -> Any:
    """A value on its way to a process with these trusted modules."""
    return pack(value).open(AllowList(trusted))


def refusal(value: Any, *trusted: str) -> str | None:
    """The message of the error that a value meets on its way; None where it travels."""
    try:
        came = send(value, *trusted)
    except tfr.SerializationError as error:
        return str(error)
    assert type(came) is type(value)
    return None


def advised_package(message: str) -> str | None:
    """The package that a message advises to trust."""
    found = _ADVISED.search(message)
    return found[1] if found else None


# trusted_modules.


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(2, 2))]


def optimiser() -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters(), lr=0.1)


@dataclasses.dataclass
class Own:
    """A class of this module, which is not trusted where no run names it."""

    value: int = 1


def own_function() -> None:
    """A function of this module."""


# What users put into arguments, results and attributes, and what no list or only a user's list covers.
VALUES: dict[str, Callable[[], Any]] = {
    "a class of the user's": Own,
    "a stranger's class": Stranger,
    "a stranger's exception": lambda: StrangeError("text"),
    "a function of the user's": lambda: own_function,
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(4, 2, 8),
    "DataLoader": lambda: data.DataLoader(data.TensorDataset(torch.ones(2))),
    "RandomSampler": lambda: data.RandomSampler(range(3)),
    "CyclicLR": lambda: torch.optim.lr_scheduler.CyclicLR(optimiser(), 0.1, 0.2),
    "Adafactor": lambda: torch.optim.Adafactor(parameters()),
    "Muon": lambda: torch.optim.Muon(parameters()),
    "GradScaler": lambda: torch.amp.GradScaler("cpu"),
    "AveragedModel": lambda: torch.optim.swa_utils.AveragedModel(nn.Linear(1, 1)),
    "torch.nn.functional.relu": lambda: nn.functional.relu,
    "torch.relu": lambda: torch.relu,
    "a masked array": lambda: np.ma.masked_array([1.0], [True]),
    "an array of StringDType": lambda: np.array(["a"], np.dtypes.StringDType()),
    "numpy.float32": lambda: np.float32,
    "numpy.add": lambda: np.add,
    "re.Pattern": lambda: re.compile("a"),
    "a list's iterator": lambda: iter([1]),
    "ZoneInfo": lambda: zoneinfo.ZoneInfo("UTC"),
    "array.array": lambda: array.array("d", [1.0]),
    "UserDict": lambda: collections.UserDict(a=1),
    "functools.partial": lambda: functools.partial(int, "1"),
    "a builtin function": lambda: print,
    "a type of the standard library": lambda: threading.Thread,
}
if not hasattr(torch.optim, "Muon"):  # before torch 2.9
    del VALUES["Muon"]


@pytest.mark.parametrize("name", VALUES, ids=lambda name: name.replace(" ", "-"))
def test_untrusted_value_travels_once_the_package_that_the_error_names_is_trusted(name: str) -> None:
    value = VALUES[name]()
    if (message := refusal(value)) is None:
        return
    if (package := advised_package(message)) is None:
        assert re.search(r"send |not_state|state_dict", message), f"no next step: {message}"
        return
    assert package not in sys.stdlib_module_names, f"the standard library cannot be trusted: {message}"
    assert refusal(value, package) is None


@pytest.mark.parametrize("cls", [Own, Stranger])
def test_refusal_of_an_untrusted_class_names_its_package(cls: type) -> None:
    assert advised_package(refusal(cls()) or "") == cls.__module__.partition(".")[0]


# Values that travel in each run.
PLAIN: dict[str, Callable[[], Any]] = {
    "dtype": lambda: torch.float16,
    "layout": lambda: torch.sparse_coo,
    "memory format": lambda: torch.channels_last,
    "qscheme": lambda: torch.per_tensor_affine,
    "device and size": lambda: (torch.device("cpu"), torch.Size([2])),
    "tensor": lambda: torch.ones(2),
    "parameter": lambda: nn.Parameter(torch.ones(2)),
    "generator": lambda: torch.Generator(),
    "module": lambda: nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1)),
    "optimiser": lambda: torch.optim.Adam(parameters()),
    "schedule": lambda: torch.optim.lr_scheduler.StepLR(optimiser(), 2),
    "torch exception": lambda: vars(torch.linalg)["LinAlgError"]("x"),
    "array": lambda: np.arange(3.0),
    "dtype of numpy": lambda: np.dtype("f4"),
    "structured array": lambda: np.zeros(2, [("x", "f4")]),
    "array of objects": lambda: np.array([None, "a"], object),
    "numpy scalar": lambda: np.float32(1),
    "numpy generator": lambda: np.random.default_rng(1),
    "numpy state": lambda: np.random.RandomState(1),
    "seed sequence": lambda: np.random.SeedSequence(1),
    "numpy exception": lambda: np.exceptions.AxisError(1, 1),
    "containers": lambda: [collections.OrderedDict(a=1), collections.Counter("a"), collections.deque([1], 2)],
    "defaultdict": lambda: collections.defaultdict(list, a=[1]),
    "exception": lambda: ValueError("x"),
    "complex": lambda: (1j, range(3), slice(1), {1}, frozenset([1]), ...),
}
_PACKAGES = ("torch", "numpy", "strangers")


@pytest.mark.parametrize(("package", "name"), [(package, name) for package in _PACKAGES for name in PLAIN])
def test_trusted_package_takes_nothing_away_from_what_travels_without_it(package: str, name: str) -> None:
    value = PLAIN[name]()
    assert type(send(value)) is type(value)
    assert type(send(value, package)) is type(value)


@pytest.mark.parametrize("package", ["functools", "builtins", "operator", "os", "subprocess"])
def test_standard_library_cannot_be_trusted_as_a_whole(package: str) -> None:
    with pytest.raises(tfr.ConfigError, match=package):
        RuntimeConfig(trusted_modules=[package])


def test_exception_of_a_strangers_package_arrives_as_its_own_type_once_it_is_trusted() -> None:
    error = StrangeError("text")
    assert advised_package(refusal(error) or "") == strangers.__name__
    assert send(error, strangers.__name__).args == ("text",)


# Tensors.


def quantised() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_channel(torch.ones(2, 2), torch.ones(2), torch.zeros(2), 0, torch.quint8)


def nested() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])


def run_once(parameter: Any, module: nn.LazyLinear = nn.LazyLinear(2)) -> Any:  # noqa: B008 - of the test
    module(torch.ones(1, 3))
    return module.weight


@pytest.mark.parametrize(
    ("make", "advice", "follow"),
    [
        (quantised, r"send tensor.dequantize\(\)", lambda t: t.dequantize()),
        (nested, r"send the list of its parts, tensor.unbind\(\)", lambda t: list(t.unbind())),
        (lambda: torch.ones(2).to_mkldnn(), r"send tensor.to_dense\(\)", lambda t: t.to_dense()),
        (lambda: torch.empty(2, device="meta"), "materialise it", lambda t: torch.empty_like(t, device="cpu")),
        (lambda: torch.empty(2, device="meta"), "or send its shape", lambda t: t.shape),
        (lambda: nn.LazyLinear(2).weight, "run the module once before", run_once),
    ],
)
def test_tensor_that_cannot_travel_does_so_in_the_form_that_the_error_names(
    make: Callable[[], Any], advice: str, follow: Callable[[Any], Any]
) -> None:
    value = make()
    with pytest.raises(tfr.SerializationError, match=advice):
        send(value)
    assert send(follow(value)) is not None


# Snapshots.


class Locked:
    """A learner with a lock, which cannot be captured."""

    def __init__(self, client_id: str) -> None:
        self.lock, self.count = threading.Lock(), 0

    def step(self) -> int:
        with self.lock:
            self.count += 1
        return self.count


class LockedByDict(Locked):
    """The same after the advice of ``state_dict()``."""

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class LockedNotState(Locked):
    """The same after the advice of ``not_state``."""

    not_state = {"lock"}


class CountsByNumber(Locked):
    """A state that is no dict."""

    def __getstate__(self) -> int:
        return self.count


class CountsBySetState(CountsByNumber):
    """The same after the advice of ``__setstate__``."""

    def __setstate__(self, state: int) -> None:
        self.lock, self.count = threading.Lock(), state


def snapshot_error(learner: type) -> str:
    """The message of the error that a learner's snapshot raises."""
    spec, _ = LearnerSpec.of(learner, 0, RuntimeConfig())
    with rehearsal(spec, "client_1", pack({})) as run:
        run.call(Step("step"))
        with pytest.raises(tfr.SnapshotError) as caught:
            run.snapshot()
    return str(caught.value)


@pytest.mark.parametrize(
    ("learner", "advice", "mended"),
    [
        (Locked, r"'lock'.*state_dict\(\)/load_state_dict\(\)", LockedByDict),
        pytest.param(Locked, r"'lock'.*not_state", LockedNotState),
        (CountsByNumber, "define __setstate__", CountsBySetState),
    ],
)
def test_uncapturable_learner_is_captured_after_the_advice(learner: type, advice: str, mended: type) -> None:
    assert re.search(advice, snapshot_error(learner))
    check_snapshot(mended, ["step"])


class KeepsOwn:
    """A learner with an object of a package that is not its own."""

    def __init__(self, client_id: str) -> None:
        self.stranger = Stranger()

    def step(self) -> str:
        return type(self.stranger).__name__


def test_snapshot_of_an_untrusted_attribute_is_taken_once_its_package_is_trusted() -> None:
    message = snapshot_error(KeepsOwn)
    advised = _ADVISED.search(message)
    assert advised is not None
    assert "'stranger'" in message
    check_snapshot(KeepsOwn, ["step"], trusted_modules=[advised[1]])


# Learners, settings, and calls.


def make_learner_here() -> Any:
    class Inner(Locked):
        """Defined in a function."""

    return Inner


def test_learner_that_no_worker_could_find_is_found_after_the_advice() -> None:
    with pytest.raises(tfr.ConfigError, match=r"top level of a module .*, or register a class with @tfr.learner"):
        tfr.LearnerProxy(make_learner_here(), ["a"])
    tfr.learner("advised")(Locked)
    assert tfr.LearnerProxy("advised", ["a"]).client_ids == ["a"]
    assert tfr.LearnerProxy(Locked, ["a"]).client_ids == ["a"]


def test_run_without_clients_has_them_after_either_advice() -> None:
    with pytest.raises(tfr.ConfigError, match=r"clients=\[\.\.\.\]\) or set runtime.num_clients"):
        tfr.LearnerProxy(Locked)
    assert tfr.LearnerProxy(Locked, clients=["a"]).client_ids == ["a"]
    assert tfr.LearnerProxy(Locked, runtime={"num_clients": 2}).client_ids == ["client_1", "client_2"]


def test_clients_given_as_one_string_are_given_as_the_error_writes_them() -> None:
    with pytest.raises(tfr.ConfigError, match=r"write (\['abc'\])"):
        tfr.LearnerProxy(Locked, "abc")
    assert tfr.LearnerProxy(Locked, ["abc"]).client_ids == ["abc"]


class Slow:
    """A learner whose calls take as long as they are told, and whose results cannot always travel."""

    def __init__(self, client_id: str) -> None:
        self.client_id = client_id

    async def wait(self, seconds: float) -> str:
        await asyncio.sleep(seconds)
        return "done"

    def items(self, number: int) -> Iterator[int]:
        yield from range(number)

    def numbers(self) -> list[int]:
        return [0, 1]

    def fail(self) -> None:
        raise StrangeError("text")


@pytest.fixture(scope="module")
def proxy(runner: asyncio.Runner) -> Iterator[tfr.LearnerProxy]:
    runtime = {"execution_mode": "local", "call_timeout_s": 0.2, "max_pending_calls": 2}
    with opened(runner, tfr.LearnerProxy(Slow, ["a", "b", "c"], runtime=runtime)) as proxy:
        yield proxy


async def test_call_that_overran_its_time_ends_under_the_deadline_that_the_error_advises(
    proxy: tfr.LearnerProxy,
) -> None:
    with pytest.raises(tfr.CallTimeoutError, match=r"give this call options\(timeout_s=\.\.\.\)"):
        await proxy.custom_method("a", "wait", 0.6)
    assert await proxy.options(timeout_s=30).custom_method("a", "wait", 0.6) == "done"


async def test_call_beyond_the_capacity_is_taken_after_some_were_awaited(proxy: tfr.LearnerProxy) -> None:
    calls = await submitted(proxy, *(proxy.options(timeout_s=30).custom_method(one, "wait", 0.5) for one in "ab"))
    with pytest.raises(tfr.CapacityError, match="raise it, or await some calls first"):
        await proxy.custom_method("c", "wait", 0)
    await asyncio.gather(*calls)
    assert await proxy.custom_method("c", "wait", 0) == "done"


async def test_generator_result_is_read_by_the_loop_that_the_error_writes(proxy: tfr.LearnerProxy) -> None:
    with pytest.raises(tfr.SerializationError, match=r"async for item in proxy.stream\('a', 'items'\)"):
        await proxy.custom_method("a", "items", 3)
    assert [item async for item in proxy.stream("a", "items", 3)] == [0, 1, 2]


async def test_plain_method_is_awaited_where_its_stream_was_refused(proxy: tfr.LearnerProxy) -> None:
    with pytest.raises(tfr.MethodNotFoundError, match="await the call instead of streaming it"):
        await anext(proxy.stream("a", "numbers"))
    assert await proxy.custom_method("a", "numbers") == [0, 1]


async def test_misspelt_method_is_called_by_the_name_that_the_error_suggests(proxy: tfr.LearnerProxy) -> None:
    with pytest.raises(tfr.MethodNotFoundError, match=r"did you mean 'numbers'\?"):
        await proxy.custom_method("a", "nubmers")
    assert await proxy.custom_method("a", "numbers") == [0, 1]
