"""Exceptions as values: type, args and attributes arrive, whatever the class does; else `RemoteError`."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import socket
import ssl
import subprocess
import traceback
import urllib.error
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from strangers import StrangeError

from torchfedrpc.errors import ConfigError, GroupCallError, QuorumError, RemoteError, SerializationError
from torchfedrpc.wire.allowlist import AllowList
from torchfedrpc.wire.encodings import exception_state, rebuild_exception
from torchfedrpc.wire.exceptions import Failure, RemoteTraceback
from torchfedrpc.wire.serializer import ParameterSerializer

ALLOW = AllowList([__name__])


class TwoArguments(Exception):
    def __init__(self, code: int, where: str) -> None:
        super().__init__(f"code {code} at {where}")
        self.code, self.where = code, where


class KeywordOnly(Exception):
    def __init__(self, *, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class NewKeyword(Exception):
    def __new__(cls, *, reason: str) -> NewKeyword:
        return super().__new__(cls)

    def __init__(self, *, reason: str) -> None:
        super().__init__()
        self.reason = reason


class NeverRun(Exception):
    """Its constructor and its reducer fail once it travels."""

    armed = False

    def __init__(self) -> None:
        assert not self.armed, "a constructor ran"

    def __reduce__(self) -> Any:
        raise AssertionError("a reducer ran")


class InSlots(Exception):
    __slots__ = ("__private", "code")

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code, self.__private = code, code + 1

    def private(self) -> int:
        return self.__private


class OneSlot(ValueError):
    __slots__ = "code"

    def __init__(self, code: int) -> None:
        self.code = code


class SiteError(OSError):
    def __init__(self, path: str, code: int) -> None:
        super().__init__(code, "no such site", path)
        self.site = path


class Undecodable(UnicodeDecodeError):
    pass


class Grouped(ExceptionGroup[Exception]):
    pass


class Read(Exception):
    @property
    def code(self) -> int:
        return 7


class BadText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@dataclass(frozen=True)
class Frozen(Exception):
    code: int


def captured(error: BaseException) -> Failure:
    try:
        raise error
    except BaseException as raised:
        return Failure.capture(raised)


def arrives(error: BaseException) -> Any:
    return captured(error).restore(ALLOW, "in client_1.train on worker1")


def with_attributes(error: Exception, **attributes: object) -> Exception:
    error.__dict__.update(attributes)
    return error


ERRORS: list[Callable[[], BaseException]] = [
    lambda: ValueError("plain"),
    lambda: ValueError("ü \\ \n \ud800", 3, None, {"a": [1]}),
    lambda: KeyError("key"),
    lambda: Exception(),
    lambda: AssertionError(),
    lambda: ZeroDivisionError("division by zero"),
    lambda: RecursionError("too deep"),
    lambda: MemoryError(),
    lambda: TimeoutError("late"),
    lambda: TimeoutError("late"),
    lambda: FileNotFoundError(2, "No such file", "a", None, "b"),
    lambda: OSError(13, "denied"),
    lambda: OSError("text alone"),
    lambda: BlockingIOError(11, "again", 5),
    lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
    lambda: UnicodeEncodeError("ascii", "ü", 0, 1, "invalid"),
    lambda: SyntaxError("bad", ("file.py", 3, 7, "x =")),
    lambda: ImportError("cannot", name="module", path="/x"),
    lambda: ModuleNotFoundError("No module named 'x'", name="x"),
    lambda: AttributeError("no attribute", name="attr"),
    lambda: NameError("no name", name="variable"),
    lambda: ExceptionGroup("two", [ValueError("a"), KeyError("b")]),
    lambda: Grouped("two", [ValueError("a"), TwoArguments(1, "x")]),
    lambda: UserWarning("careful"),
    lambda: with_attributes(ValueError("x"), hint="try again", tensors=3),
    lambda: TwoArguments(3, "there"),
    lambda: KeywordOnly(reason="why"),
    lambda: NewKeyword(reason="why"),
    lambda: NeverRun(),
    lambda: InSlots(4),
    lambda: OneSlot(4),
    lambda: SiteError("site_7", 2),
    lambda: Undecodable("utf-8", b"\xff", 0, 1, "invalid"),
    lambda: Read("x"),
    lambda: torch.OutOfMemoryError("CUDA out of memory"),
    lambda: np.exceptions.AxisError(5, 1),
    lambda: np.linalg.LinAlgError("singular"),
    lambda: json.JSONDecodeError("bad", "{", 1),
    lambda: subprocess.CalledProcessError(3, ["ls"], "out"),
    lambda: urllib.error.URLError("unreachable"),
    lambda: zipfile.BadZipFile("no zip"),
    lambda: ConfigError("bad key"),
    lambda: QuorumError("too few", {"a": 1}, {"b": ValueError("x")}),
    lambda: RemoteError("pkg.Odd", "text", "Traceback ..."),
    lambda: RemoteTraceback("text"),
]


@pytest.mark.parametrize("make", ERRORS, ids=lambda make: type(make()).__name__)
class TestEveryError:
    def test_arrives_as_its_own_type_with_args_text_and_attributes(self, make: Callable[[], BaseException]) -> None:
        error = make()
        received = arrives(error)
        if isinstance(error, RemoteTraceback):  # no type of a caller's concern
            assert type(received) is RemoteError
            return
        assert type(received) is type(error)
        assert repr(received.args) == repr(error.args)
        assert str(received) == str(error)
        attributes = {name: value for name, value in vars(received).items() if name != "__notes__"}
        assert repr(attributes) == repr({name: v for name, v in vars(error).items() if name != "__notes__"})

    def test_can_be_raised_and_caught(self, make: Callable[[], BaseException]) -> None:
        received = arrives(make())
        with pytest.raises(type(received)) as caught:
            raise received
        assert caught.value is received


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (
            lambda: FileNotFoundError(2, "No such file", "a", None, "b"),
            ["errno", "strerror", "filename", "filename2"],
        ),
        (lambda: SiteError("site_7", 2), ["errno", "strerror", "filename", "site"]),
        (lambda: BlockingIOError(11, "again", 5), ["errno", "characters_written"]),
        (lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), ["encoding", "object", "start", "end", "reason"]),
        (lambda: SyntaxError("bad", ("file.py", 3, 7, "x =")), ["msg", "filename", "lineno", "offset", "text"]),
        (lambda: ImportError("cannot", name="module", path="/x"), ["name", "path", "msg"]),
        (lambda: AttributeError("no", name="attr"), ["name"]),
        (lambda: InSlots(4), ["code"]),
        (lambda: OneSlot(4), ["code"]),
        (lambda: np.exceptions.AxisError(5, 1), ["axis", "ndim"]),
        (lambda: json.JSONDecodeError("bad", "{", 1), ["msg", "doc", "pos", "lineno", "colno"]),
    ],
    ids=lambda value: type(value()).__name__ if callable(value) else "",
)
def test_what_a_builtin_or_a_slot_keeps_aside_arrives_too(make: Callable[[], Any], names: list[str]) -> None:
    error = make()
    received = arrives(error)
    assert [getattr(received, name) for name in names] == [getattr(error, name) for name in names]


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (lambda: OSError(2, "No such file", "a"), {"errno": 5, "strerror": "other", "filename": b"/bytes"}),
        (lambda: UnicodeDecodeError("utf-8", b"\xff\xfe", 0, 1, "bad"), {"end": 2, "reason": "worse", "start": 1}),
        (lambda: SyntaxError("bad", ("file.py", 3, 7, "x =")), {"msg": "worse", "lineno": 9, "end_lineno": 10}),
        (lambda: ImportError("cannot"), {"msg": "other", "name": "module"}),
    ],
    ids=lambda value: type(value()).__name__ if callable(value) else "",
)
def test_attributes_changed_after_construction_arrive(make: Callable[[], Any], changes: dict[str, Any]) -> None:
    error = make()
    for name, value in changes.items():
        setattr(error, name, value)
    received = arrives(error)
    assert type(received) is type(error)
    assert {name: getattr(received, name) for name in changes} == changes
    assert str(received) == str(error)


def test_a_private_slot_arrives() -> None:
    assert arrives(InSlots(4)).private() == 5


def test_a_frozen_dict_of_attributes_is_taken_when_captured() -> None:
    error = with_attributes(ValueError("x"), history=[1])
    failure = captured(error)
    error.history.append(2)  # type: ignore[attr-defined]
    assert failure.restore(ALLOW, "").history == [1]  # type: ignore[attr-defined]


def test_no_constructor_and_no_reducer_of_a_users_class_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    failure = captured(NeverRun())
    monkeypatch.setattr(NeverRun, "armed", True)
    assert type(failure.restore(ALLOW, "")) is NeverRun


def test_tensors_in_an_exception_arrive() -> None:
    received = arrives(with_attributes(ValueError(torch.ones(2)), weights=torch.arange(3)))
    assert received.args[0].tolist() == [1, 1]
    assert received.weights.tolist() == [0, 1, 2]


def test_the_learners_own_notes_come_before_ours() -> None:
    error = ValueError("x")
    error.add_note("the learner's note")
    assert arrives(error).__notes__ == ["the learner's note", "in client_1.train on worker1"]


def test_the_cause_holds_the_remote_traceback_as_text() -> None:
    try:
        try:
            _ = dict[str, int]()["missing"]
        except KeyError as reason:
            raise TwoArguments(1, "there") from reason
    except TwoArguments as error:
        received = Failure.capture(error).restore(ALLOW, "note")
    assert isinstance(received.__cause__, RemoteTraceback)
    text = str(received.__cause__)
    assert "KeyError: 'missing'" in text
    assert "direct cause" in text
    assert 'raise TwoArguments(1, "there") from reason' in text
    assert text.startswith('\n"""\n')


def test_frames_of_a_library_on_the_outside_are_left_out() -> None:
    inner: dict[str, Any] = {"__name__": "site.learner"}
    outer: dict[str, Any] = {"__name__": "torchfedrpc.host.runner", "inner": inner}
    exec("def fail(): raise ValueError('x')", inner)
    exec("def run(): inner['fail']()", outer)
    with pytest.raises(ValueError, match="x") as caught:
        outer["run"]()
    error = caught.value.with_traceback(caught.tb.tb_next)
    assert "in run" in Failure.capture(error).traceback
    assert "in run" not in Failure.capture(error, skip_modules="torchfedrpc.host").traceback
    assert "in fail" in Failure.capture(error, skip_modules="torchfedrpc.host").traceback


@pytest.mark.parametrize(
    "error",
    [
        SystemExit(2),
        KeyboardInterrupt("stop"),
        GeneratorExit(),
        asyncio.CancelledError(),
        StopIteration(3),
        StopAsyncIteration(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_would_break_the_callers_loop_arrives_as_a_remote_error(error: BaseException) -> None:
    received = arrives(error)
    assert type(received) is RemoteError
    assert received.type_name.rpartition(".")[2] == type(error).__name__
    assert received.message == str(error)
    assert type(error).__name__ in received.remote_traceback


@pytest.mark.parametrize(
    "error",
    [
        SystemExit(2),
        KeyboardInterrupt(),
        GeneratorExit(),
        BaseExceptionGroup("several", [ValueError(), SystemExit(3)]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_the_body_of_a_worker_in_the_wrong_hands_cannot_end_the_driver(error: BaseException) -> None:
    forged = Failure("ValueError", "x", "", ParameterSerializer.serialize(error))
    assert type(forged.restore(ALLOW, "a note")) is RemoteError


@pytest.mark.parametrize("notes", [5, "text", {"a": 1}, None])
def test_notes_that_are_no_list_are_left_out(notes: Any) -> None:
    error = ValueError("x")
    error.__dict__["__notes__"] = notes
    received = arrives(error)
    assert type(received) is ValueError
    traceback.format_exception(received)


@pytest.mark.parametrize("name", ["__class__", "__traceback__", "__dict__", "__setattr__"])
def test_a_forged_state_sets_no_special_attribute(name: str) -> None:
    with pytest.raises(SerializationError, match="among its attributes"):
        rebuild_exception(ValueError, (), {name: {}})


@pytest.mark.parametrize(
    "error",
    [
        socket.gaierror(-2, "Name"),
        ssl.SSLError(1, "bad"),
        http.client.IncompleteRead(b"x"),
        io.UnsupportedOperation("w"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_exceptions_of_the_standard_library_arrive(error: Exception) -> None:
    received = arrives(error)
    assert type(received) is type(error)
    assert received.args == error.args


def test_an_exception_of_an_enum_of_the_standard_library_arrives() -> None:
    received = arrives(KeyError(http.HTTPStatus.NOT_FOUND))
    assert received.args[0] is http.HTTPStatus.NOT_FOUND


def test_a_type_that_is_not_trusted_arrives_as_a_remote_error_that_says_how_to_trust_it() -> None:
    received = arrives(StrangeError("odd"))
    assert type(received) is RemoteError
    assert (received.type_name, received.message) == ("strangers.StrangeError", "odd")
    assert "strangers.StrangeError: odd" in received.remote_traceback
    assert "trusted_modules=[strangers]" in received.__notes__[0]
    assert received.__notes__[1] == "in client_1.train on worker1"


@pytest.mark.parametrize(
    "error",
    [
        ValueError(lambda: None),
        with_attributes(ValueError("x"), stream=(number for number in [1])),
        ValueError(torch.nn.LazyLinear(1)),
    ],
    ids=["args", "attributes", "tensor"],
)
def test_an_exception_with_contents_that_cannot_travel_arrives_as_a_remote_error(error: Exception) -> None:
    received = arrives(error)
    assert type(received) is RemoteError
    assert received.type_name == "ValueError"
    assert "the exception itself could not be sent" in received.remote_traceback


def test_an_exception_that_refers_to_itself_arrives_all_the_same() -> None:
    error = TwoArguments(1, "x")
    error.me = error  # type: ignore[attr-defined]
    received = arrives(error)
    assert (type(received), received.type_name) == (RemoteError, f"{__name__}.TwoArguments")


def test_an_exception_whose_text_fails_arrives() -> None:
    failure = captured(BadText("x"))
    assert failure.message == "<its text failed: RuntimeError>"
    assert type(failure.restore(ALLOW, "")) is BadText


def test_an_exception_that_is_a_frozen_dataclass_arrives() -> None:
    received = arrives(Frozen(3))
    assert type(received) is Frozen
    assert received.code == 3
    assert isinstance(received.__cause__, RemoteTraceback)
    assert received.__notes__ == ["in client_1.train on worker1"]


def test_the_error_of_a_group_arrives_with_its_clients() -> None:
    received = arrives(GroupCallError("two", {"a": ValueError("x"), "b": KeyError("y")}, {"c": 1}))
    assert type(received) is GroupCallError
    assert [str(error) for error in received.exceptions] == ["x", "'y'"]
    assert list(received.failures) == ["a", "b"]
    assert received.failures["a"] is received.exceptions[0]
    assert received.results == {"c": 1}
    part: Any = received.split(KeyError)[0]
    assert list(part.failures) == ["b"]


def test_a_local_class_arrives_as_a_remote_error() -> None:
    class Local(Exception):
        pass

    received = arrives(Local("x"))
    assert type(received) is RemoteError
    assert received.type_name.endswith("<locals>.Local")


@pytest.mark.parametrize("body", [b"", b"damaged", None])
def test_a_damaged_body_still_tells_what_happened(body: bytes | None) -> None:
    received = Failure("pkg.Odd", "text", "Traceback ...", body).restore(ALLOW, "note")
    assert type(received) is RemoteError
    assert str(received) == "pkg.Odd: text"
    assert str(received.__cause__) == '\n"""\nTraceback ..."""'


def test_a_body_that_is_no_exception_is_not_raised() -> None:
    from torchfedrpc.wire.serializer import ParameterSerializer

    body = ParameterSerializer.serialize([1, 2])
    assert type(Failure("pkg.Odd", "text", "", body).restore(ALLOW, "note")) is RemoteError


def test_the_name_of_a_builtin_has_no_module() -> None:
    assert captured(KeyError("x")).type_name == "KeyError"
    assert captured(TwoArguments(1, "x")).type_name == f"{__name__}.TwoArguments"


# The parts.


@pytest.mark.parametrize("cls", [int, "ValueError", len, None, Exception("x")], ids=str)
def test_only_a_type_of_exception_is_rebuilt(cls: Any) -> None:
    with pytest.raises(SerializationError, match="not a type of exception"):
        rebuild_exception(cls, (), {})


def test_the_state_has_neither_args_nor_traceback() -> None:
    with pytest.raises(ValueError, match="x") as caught:
        raise with_attributes(ValueError("x"), code=3)
    assert exception_state(caught.value) == {"code": 3}
