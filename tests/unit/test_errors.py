"""The errors: each is also the builtin that people catch, and says what it knows."""

from __future__ import annotations

import pickle
import re
from typing import Any

import pytest

import torchfedrpc as tfr
from torchfedrpc import errors
from torchfedrpc.errors import (
    CallTimeoutError,
    CapacityError,
    ConfigError,
    GroupCallError,
    LearnerBusyError,
    MethodNotFoundError,
    QuorumError,
    RemoteError,
    SerializationError,
    SnapshotError,
    TorchFedRpcError,
    UnknownClientError,
    UntrustedTypeError,
    WorkerLostError,
    suggest,
)

BUILTINS: dict[type[TorchFedRpcError], type[Exception]] = {
    ConfigError: ValueError,
    UnknownClientError: KeyError,
    MethodNotFoundError: AttributeError,
    LearnerBusyError: RuntimeError,
    CallTimeoutError: TimeoutError,
    WorkerLostError: ConnectionError,
    SerializationError: TypeError,
    UntrustedTypeError: SerializationError,
    SnapshotError: RuntimeError,
    CapacityError: RuntimeError,
    QuorumError: RuntimeError,
    GroupCallError: ExceptionGroup,
    RemoteError: RuntimeError,
}
DEFINED = [
    entry
    for entry in vars(errors).values()
    if isinstance(entry, type) and issubclass(entry, Exception) and entry.__module__ == errors.__name__
]


@pytest.mark.parametrize("cls", [cls for cls in DEFINED if cls is not TorchFedRpcError], ids=lambda cls: cls.__name__)
class TestEveryError:
    def test_is_ours_and_also_the_builtin_that_people_catch(self, cls: type[TorchFedRpcError]) -> None:
        assert issubclass(cls, TorchFedRpcError)
        assert issubclass(cls, BUILTINS[cls])

    def test_is_drawn_in_the_tree_beside_its_builtin(self, cls: type[TorchFedRpcError]) -> None:
        drawn = dict(re.findall(r"\+-- (\w+)(?: \((\w+)\))?", errors.__doc__ or ""))
        assert cls.__name__ in drawn
        if BUILTINS[cls] is not SerializationError:
            assert drawn[cls.__name__] == BUILTINS[cls].__name__

    def test_is_exported(self, cls: type[TorchFedRpcError]) -> None:
        assert getattr(tfr, cls.__name__) is cls


@pytest.mark.parametrize(
    "error",
    [
        UnknownClientError("no client_7"),
        QuorumError("too few", {"a": 1}, {"b": ValueError("x")}),
        GroupCallError("two failed", {"a": ValueError("x"), "b": KeyError("y")}, {"c": 3}),
        RemoteError("mypkg.Odd", "went wrong", "Traceback ..."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_with_contents_survives_pickle(error: TorchFedRpcError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert repr(copy.__dict__) == repr(error.__dict__)


def test_an_unknown_client_error_shows_its_message_without_quotes() -> None:
    assert str(UnknownClientError("no client 'a'")) == "no client 'a'"
    assert str(UnknownClientError()) == ""


def test_a_quorum_error_carries_what_arrived() -> None:
    results, failure = {"a": 1}, ValueError("x")
    error = QuorumError("one of two", results, {"b": failure})
    results["c"] = 2
    assert str(error) == "one of two"
    assert error.results == {"a": 1}
    assert error.failures == {"b": failure}


def test_a_quorum_error_with_nothing_has_empty_mappings() -> None:
    error = QuorumError("nobody")
    assert (error.results, error.failures) == ({}, {})


def test_a_remote_error_reads_as_type_and_text() -> None:
    error = RemoteError("mypkg.Odd", "went wrong", "Traceback ...")
    assert str(error) == "mypkg.Odd: went wrong"
    assert (error.type_name, error.message, error.remote_traceback) == ("mypkg.Odd", "went wrong", "Traceback ...")


# A group's error.


@pytest.fixture
def failures() -> dict[str, Exception]:
    return {"c": ValueError("bad"), "a": KeyError("gone"), "b": TimeoutError("late")}


def test_a_group_error_holds_the_exceptions_in_the_groups_order(failures: dict[str, Exception]) -> None:
    error = GroupCallError("3 of 4 failed", failures, {"d": 4})
    assert error.exceptions == tuple(failures.values())
    assert list(error.failures) == ["c", "a", "b"]
    assert error.results == {"d": 4}
    assert error.message == "3 of 4 failed"


def test_except_star_splits_a_group_error_by_type_and_keeps_the_clients(failures: dict[str, Exception]) -> None:
    caught: list[Any] = []
    try:
        raise GroupCallError("3 of 4 failed", failures, {"d": 4})
    except* (ValueError, KeyError) as group:
        caught.append(group)
    except* TimeoutError as group:
        caught.append(group)
    assert [type(group) for group in caught] == [GroupCallError, GroupCallError]
    assert caught[0].failures == {"c": failures["c"], "a": failures["a"]}
    assert caught[1].failures == {"b": failures["b"]}
    assert [group.results for group in caught] == [{"d": 4}, {"d": 4}]


def test_remainder_of_except_star_is_raised_with_its_clients(failures: dict[str, Exception]) -> None:
    def handle_missing_keys() -> None:
        try:
            raise GroupCallError("3 failed", failures)
        except* KeyError:
            pass

    with pytest.raises(GroupCallError) as caught:
        handle_missing_keys()
    assert caught.value.failures == {"c": failures["c"], "b": failures["b"]}


def test_a_split_group_error_has_no_empty_part(failures: dict[str, Exception]) -> None:
    error = GroupCallError("3 failed", failures)
    assert error.split(OSError)[0].failures == {"b": failures["b"]}  # type: ignore[union-attr]
    assert error.subgroup(ZeroDivisionError) is None
    matched, rest = error.split(Exception)
    assert matched is error
    assert rest is None


def test_clients_that_failed_with_one_exception_object_stay_apart() -> None:
    shared = ValueError("one object")
    matched = GroupCallError("both", {"a": shared, "b": shared}).subgroup(ValueError)
    assert isinstance(matched, GroupCallError)
    assert matched.failures == {"a": shared, "b": shared}


def test_a_clients_own_exception_group_is_split_too() -> None:
    inner = ExceptionGroup("inner", [ValueError("x"), TypeError("y")])
    error = GroupCallError("2 failed", {"a": inner, "b": KeyError("z")})
    matched, rest = error.split(ValueError)
    assert isinstance(matched, GroupCallError)
    assert isinstance(rest, GroupCallError)
    assert list(matched.failures) == ["a"]
    assert list(rest.failures) == ["a", "b"]
    assert matched.failures["a"].exceptions == (inner.exceptions[0],)  # type: ignore[attr-defined]
    assert rest.failures["a"].exceptions == (inner.exceptions[1],)  # type: ignore[attr-defined]


# Near names.


@pytest.mark.parametrize(
    ("name", "known", "text"),
    [
        ("train_epoc", ["evaluate", "train_epoch"], " (did you mean 'train_epoch'?)"),
        ("client_1", ["client_2", "client_3"], " (did you mean 'client_3' or 'client_2'?)"),
        ("xyz", ["b", "a"], " (known: 'a', 'b')"),
        ("xyz", [], " (known: none)"),
        ("xyz", [f"{n}" for n in range(9)], f" (known: {', '.join(repr(str(n)) for n in range(8))}, ...)"),
    ],
)
def test_near_names_are_suggested_else_the_known_ones_listed(name: str, known: list[str], text: str) -> None:
    assert suggest(name, known) == text
