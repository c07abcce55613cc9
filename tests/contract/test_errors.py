"""Errors: bad input is refused clearly, a learner's exception arrives as it was, and the next call works."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import learners
import numpy as np
import pytest
import strangers
import torch
from conftest import Fresh
from learners import bad_tensor

import torchfedrpc as tfr
from torchfedrpc.events import CallEnded


@pytest.fixture
def one(runner: asyncio.Runner, proxy: tfr.LearnerProxy, fresh: Fresh) -> Iterator[str]:
    """A client whose learner, after the test, still answers; and nothing is pending."""
    client_id = fresh.one()
    yield client_id
    assert runner.run(proxy.options(timeout_s=20).custom_method(client_id, "same", [1])) == [1]
    assert proxy.stats()["pending_calls"] == 0


# Names.


@pytest.mark.parametrize(
    "call",
    [
        lambda proxy: proxy.train_epoch(client_id="client_33x"),
        lambda proxy: proxy.get_model_weights("client_33x"),
        lambda proxy: proxy.custom_method("client_33x", "echo"),
        lambda proxy: _awaited(lambda: proxy.client("client_33x")),
        lambda proxy: _awaited(lambda: proxy.clients(["client_1", "client_33x"])),
        lambda proxy: _awaited(lambda: proxy.stream("client_33x", "count", 1)),
    ],
    ids=["train_epoch", "get_model_weights", "custom_method", "client", "clients", "stream"],
)
async def test_an_unknown_client_is_refused_and_near_ones_named(proxy: tfr.LearnerProxy, one: str, call: Any) -> None:
    with pytest.raises(tfr.UnknownClientError, match=r"no client 'client_33x' \(did you mean 'client_33") as caught:
        await call(proxy)
    assert isinstance(caught.value, KeyError)


async def _awaited(function: Any) -> Any:
    return function()


@pytest.mark.parametrize("name", ["train_epok", "_private", "number", "__init__", "__dict__", "", "a.b", "no such"])
async def test_a_name_of_no_public_method_is_refused(proxy: tfr.LearnerProxy, one: str, name: str) -> None:
    with pytest.raises(tfr.MethodNotFoundError) as caught:
        await proxy.custom_method(one, name)
    assert isinstance(caught.value, AttributeError)
    assert one in str(caught.value)
    assert "Probe" in str(caught.value)
    if name == "train_epok":
        assert "did you mean 'train_epoch'" in str(caught.value)


async def test_a_private_method_whose_public_name_is_near_names_it(proxy: tfr.LearnerProxy, one: str) -> None:
    with pytest.raises(tfr.MethodNotFoundError, match=r"private.*'evaluate'"):
        await proxy.custom_method(one, "_evaluate")


async def test_a_property_that_fails_is_an_error_of_the_learners(proxy: tfr.LearnerProxy, one: str) -> None:
    with pytest.raises(ValueError, match="a property that fails"):
        await proxy.custom_method(one, "broken")


async def test_wrong_arguments_are_an_ordinary_type_error(proxy: tfr.LearnerProxy, one: str) -> None:
    with pytest.raises(TypeError, match="no_such_argument"):
        await proxy.custom_method(one, "append", no_such_argument=1)


# What cannot be sent.


class Unpicklable:
    def __reduce__(self) -> Any:
        raise RuntimeError("this object does not pickle")


def _deep() -> list[Any]:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    return deep


ARGUMENTS = {
    "lambda": lambda: lambda: 1,
    "generator": lambda: (number for number in range(3)),
    "lock": threading.Lock,
    "file": lambda: memoryview(b"x"),
    "refuses": Unpicklable,
    "local class": lambda: type("Local", (), {})(),
    "module": lambda: asyncio,
    "too deep": _deep,
}


@pytest.mark.parametrize("name", ARGUMENTS)
async def test_arguments_that_cannot_be_pickled_are_refused_before_the_call(
    proxy: tfr.LearnerProxy, one: str, name: str
) -> None:
    value = ARGUMENTS[name]()
    for call in (
        lambda: proxy.custom_method(one, "append", value),
        lambda: proxy.custom_method(one, "append", item={"nested": [value]}),
        lambda: proxy.set_model_weights(one, value),
    ):
        with pytest.raises(tfr.SerializationError, match=one) as caught:
            await call()
        assert isinstance(caught.value, TypeError)
    with pytest.raises(tfr.SerializationError):
        proxy.stream(one, "count", value)
    assert await proxy.custom_method(one, "what_happened") == []


@pytest.mark.parametrize(
    "value",
    [strangers.Stranger(), [strangers.Stranger], strangers.StrangeError("x"), learners.a_function, len, np.sum],
    ids=[
        "instance",
        "class",
        "exception",
        "function of the module",
        "builtin function",
        "numpy's function",
    ],
)
async def test_arguments_outside_the_allow_list_are_refused(proxy: tfr.LearnerProxy, one: str, value: Any) -> None:
    with pytest.raises(tfr.UntrustedTypeError) as caught:
        await proxy.custom_method(one, "append", value)
    assert isinstance(caught.value, tfr.SerializationError)
    assert await proxy.custom_method(one, "what_happened") == []


async def test_a_refused_type_is_named_with_the_setting_that_allows_it(proxy: tfr.LearnerProxy, one: str) -> None:
    for call in (
        proxy.custom_method(one, "append", strangers.Stranger()),
        proxy.custom_method(one, "returns_a_stranger"),
    ):
        with pytest.raises(tfr.UntrustedTypeError, match=r"strangers\.Stranger.*trusted_modules=\[strangers\]"):
            await call


async def test_a_result_that_cannot_be_pickled_names_the_method(proxy: tfr.LearnerProxy, one: str) -> None:
    with pytest.raises(tfr.SerializationError, match=rf"{one}\.returns_a_lambda"):
        await proxy.custom_method(one, "returns_a_lambda")


async def test_a_result_that_is_a_generator_points_to_stream(proxy: tfr.LearnerProxy, one: str) -> None:
    for method, arguments in (("returns_a_generator", ()), ("count", (3,)), ("count_async", (3,))):
        with pytest.raises(tfr.SerializationError, match=r"proxy\.stream"):
            await proxy.custom_method(one, method, *arguments)


@pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning")
@pytest.mark.parametrize("kind", ["nested", "nested strided", "mkldnn", "meta", "freed", "lazy"])
async def test_tensors_that_would_abort_a_process_are_refused_both_ways(
    proxy: tfr.LearnerProxy, one: str, kind: str
) -> None:
    with pytest.raises(tfr.SerializationError, match=r"tensor|parameter"):
        await proxy.custom_method(one, "append", [bad_tensor(kind)])
    with pytest.raises(tfr.SerializationError, match=rf"{one}\.returns_bad_tensor"):
        await proxy.custom_method(one, "returns_bad_tensor", kind)
    assert await proxy.custom_method(one, "what_happened") == []


async def test_a_freed_tensor_beside_a_tied_one_is_refused(proxy: tfr.LearnerProxy, one: str) -> None:
    tensor = torch.ones(4)
    pair = [tensor, tensor[2:]]
    tensor.untyped_storage().resize_(0)
    with pytest.raises(tfr.SerializationError, match="freed"):
        await proxy.custom_method(one, "append", pair)


# A learner's exceptions.

ARRIVE = {
    "value": (ValueError, ("plain", 1)),
    "unicode": (ValueError, ("größe \\x é\\u12 \N{SNOWMAN} %s {}",)),
    "key": (KeyError, ("missing",)),
    "odd": (learners.Odd, ("code 7",)),
    "keyword_only": (learners.KeywordOnly, ("because",)),
    "bad_text": (learners.BadText, ()),
    "reduced": (learners.Reduced, ("arg",)),
    "timeout": (TimeoutError, ("the learner's own",)),
    "os_subclass": (learners.FileTrouble, (13, "trouble")),
    "slotted": (learners.Slotted, ("in a slot",)),
    "undecodable": (UnicodeDecodeError, ("utf-8", b"\xff", 0, 1, "bad byte")),
    "undecodable_subclass": (learners.Undecodable, ("utf-8", b"\xff", 0, 1, "bad byte")),
    "recursion": (RecursionError, ()),
    "fatal": (learners.Fatal, ("not an Exception",)),
}


@pytest.mark.parametrize("method", ["fail", "fail_async"])
@pytest.mark.parametrize("kind", ARRIVE)
async def test_an_exception_arrives_as_its_own_type_with_its_args(
    proxy: tfr.LearnerProxy, one: str, kind: str, method: str
) -> None:
    expected, arguments = ARRIVE[kind]
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - the type is what is tested
        await proxy.custom_method(one, method, kind)
    error = caught.value
    assert type(error) is expected
    assert error.args == arguments
    assert any(one in note and method in note for note in error.__notes__)
    assert _worker_of(proxy) in error.__notes__[-1]
    assert method in str(error.__cause__)
    assert "learners.py" in str(error.__cause__)
    if kind != "fatal":
        assert "the cause" in str(error.__cause__)


def _worker_of(proxy: tfr.LearnerProxy) -> str:
    return "local" if proxy.mode == "local" else "worker"


async def test_an_exception_keeps_its_attributes_and_notes(proxy: tfr.LearnerProxy, one: str) -> None:
    with pytest.raises(ValueError, match="plain") as caught:
        await proxy.custom_method(one, "fail", "value")
    assert torch.equal(vars(caught.value)["extra"]["weights"], torch.ones(2))
    assert "a note of the learner's" in caught.value.__notes__
    with pytest.raises(learners.Odd) as odd:
        await proxy.custom_method(one, "fail", "odd")
    assert (odd.value.code, odd.value.where) == (7, "here")
    with pytest.raises(learners.KeywordOnly) as keyword:
        await proxy.custom_method(one, "fail", "keyword_only")
    assert keyword.value.reason == "because"


async def test_an_os_error_keeps_errno_and_file(proxy: tfr.LearnerProxy, one: str) -> None:
    with pytest.raises(FileNotFoundError, match="No such file") as caught:
        await proxy.custom_method(one, "fail", "os")
    assert caught.value.errno == 2
    assert caught.value.filename == "/nowhere"


async def test_an_os_error_with_another_constructor_keeps_its_fields(proxy: tfr.LearnerProxy, one: str) -> None:
    with pytest.raises(learners.FileTrouble) as caught:
        await proxy.custom_method(one, "fail", "os_subclass")
    assert (caught.value.errno, caught.value.strerror, caught.value.filename) == (13, "trouble", "/somewhere")
    assert caught.value.code == 13
    assert str(caught.value) == "[Errno 13] trouble: '/somewhere'"


async def test_attributes_in_slots_are_kept(proxy: tfr.LearnerProxy, one: str) -> None:
    with pytest.raises(learners.Slotted) as caught:
        await proxy.custom_method(one, "fail", "slotted")
    assert caught.value.detail == "in a slot"
    with pytest.raises(np.exceptions.AxisError) as axis:
        await proxy.custom_method(one, "fail", "axis")
    assert str(axis.value) == "axis 5 is out of bounds for array of dimension 1"


async def test_a_unicode_error_keeps_its_text(proxy: tfr.LearnerProxy, one: str) -> None:
    for kind in ("undecodable", "undecodable_subclass"):
        with pytest.raises(UnicodeDecodeError, match="can't decode byte 0xff in position 0: bad byte"):
            await proxy.custom_method(one, "fail", kind)


async def test_an_exception_group_arrives_with_its_members(proxy: tfr.LearnerProxy, one: str) -> None:
    with pytest.raises(ExceptionGroup, match="several") as caught:
        await proxy.custom_method(one, "fail", "group")
    assert [type(error) for error in caught.value.exceptions] == [ValueError, KeyError]


async def test_torchs_own_errors_arrive(proxy: tfr.LearnerProxy, one: str) -> None:
    with pytest.raises(vars(torch.linalg)["LinAlgError"], match="singular"):
        await proxy.custom_method(one, "fail", "linalg")
    with pytest.raises(AssertionError) as caught:
        await proxy.custom_method(one, "fail", "assertion")
    assert torch.equal(caught.value.args[1], torch.ones(2))


REMOTE = {
    "with_lock": ("learners.WithLock", "holds a file"),
    "lambda_arg": ("ValueError", "<function"),
    "stranger": ("strangers.StrangeError", "from elsewhere"),
    "system_exit": ("SystemExit", "3"),
    "keyboard": ("KeyboardInterrupt", ""),
    "generator_exit": ("GeneratorExit", ""),
    "cancelled": ("CancelledError", ""),
    "stop": ("StopIteration", "5"),
    "stop_async": ("StopAsyncIteration", ""),
}


@pytest.mark.parametrize("method", ["fail", "fail_async"])
@pytest.mark.parametrize("kind", REMOTE)
async def test_an_exception_that_cannot_travel_or_breaks_loops_arrives_as_remote_error(
    proxy: tfr.LearnerProxy, one: str, kind: str, method: str
) -> None:
    if (kind, method) == ("stop", "fail_async"):
        with pytest.raises(RuntimeError, match="coroutine raised StopIteration"):  # as Python has it
            await proxy.custom_method(one, method, kind)
        return
    name, text = REMOTE[kind]
    with pytest.raises(tfr.RemoteError) as caught:
        await proxy.custom_method(one, method, kind)
    error = caught.value
    assert isinstance(error, RuntimeError)
    assert error.type_name.endswith(name)
    assert text in error.message
    assert method in error.remote_traceback
    assert "the cause" in error.remote_traceback
    assert any(one in note and method in note for note in error.__notes__)


async def test_an_exception_runs_no_code_on_arrival(
    proxy: tfr.LearnerProxy, one: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(learners.Reduced):
        await proxy.custom_method(one, "fail", "reduced")
    assert "must not run" not in capfd.readouterr().out


async def test_failures_in_great_number_leave_no_call_behind(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    ids = fresh.apart(6)
    kinds = [*ARRIVE, *REMOTE]
    kinds.remove("fatal")
    calls = [proxy.custom_method(ids[number % 6], "fail", kinds[number % len(kinds)]) for number in range(300)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(result, Exception) for result in results)
    assert [await proxy.custom_method(one, "append", 1) for one in ids] == [1] * 6


async def test_a_failed_calls_event_carries_its_error(proxy: tfr.LearnerProxy, one: str, seen: Any) -> None:
    with pytest.raises(ValueError, match="plain"):
        await proxy.custom_method(one, "fail", "value")
    ended = seen.events[-1]
    assert isinstance(ended, CallEnded)
    assert isinstance(ended.error, ValueError)
