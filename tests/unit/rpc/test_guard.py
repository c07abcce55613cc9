"""The guard: RPC's own messages for our entry points are read, and nothing else is."""

from __future__ import annotations

import collections
import functools
import io
import operator
import os
import pickle
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from strangers import StrangeError, Stranger
from torch.distributed.rpc import api, internal

from torchfedrpc.host.learner_host import LearnerHost
from torchfedrpc.rpc import endpoint, guard
from torchfedrpc.rpc.guard import GuardedUnpickler
from torchfedrpc.wire import packing

ENTRIES = [endpoint.serve, endpoint.acknowledge, endpoint.rref]


@pytest.fixture(autouse=True)
def _guarded() -> Iterator[None]:
    guard.install()
    yield
    guard.remove()


def received(obj: Any) -> Any:
    """What RPC reads of what RPC has written."""
    return internal.deserialize(*internal.serialize(obj))


@dataclass
class Reduced:
    """Pickles as a call of whatever is given."""

    function: Any
    args: tuple[Any, ...]

    def __reduce__(self) -> Any:
        return self.function, self.args


def named(module: str, name: str) -> bytes:
    """A pickle of nothing but a global's name."""
    return b"\x80\x04" + pickle.SHORT_BINUNICODE + bytes([len(module)]) + module.encode() + (
        pickle.SHORT_BINUNICODE + bytes([len(name)]) + name.encode() + pickle.STACK_GLOBAL + pickle.STOP
    )  # fmt: skip


def read(data: bytes) -> Any:
    return GuardedUnpickler(io.BytesIO(data)).load()


# What is read.


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.__name__)
def test_a_call_of_each_of_our_entries_is_read_with_its_tensors(entry: Callable[..., Any]) -> None:
    arguments = ((3, "client_1", "train", None, False), (b"head", [0], [torch.arange(3.0)], 0, None))
    call = received(internal.PythonUDF(entry, (1, arguments), {}))
    assert type(call) is internal.PythonUDF
    assert call.func is entry
    number, (fields, parcel) = call.args
    assert (number, fields) == (1, arguments[0])
    assert parcel[2][0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "value",
    [None, 3, 2.5, "ü", b"bytes", [1, (2,)], torch.tensor(3), [torch.ones(2), torch.ones(0)]],
    ids=lambda value: type(value).__name__,
)
def test_an_answer_of_plain_values_and_tensors_is_read(value: Any) -> None:
    assert repr(received(value)) == repr(value)


@pytest.mark.parametrize("cls", [ValueError, RuntimeError, KeyError, MemoryError, AttributeError, OSError])
def test_an_error_of_rpc_itself_is_read(cls: type[Exception]) -> None:
    error = received(internal.RemoteException("what happened", cls))
    assert type(error) is internal.RemoteException
    assert error.msg == "what happened"
    assert error.exception_type is cls


def test_the_receiver_of_tensors_is_read() -> None:
    receiver = read(pickle.dumps(Reduced(getattr, (internal._InternalRPCPickler, "_tensor_receiver")), protocol=4))
    assert receiver == internal._InternalRPCPickler._tensor_receiver


# What is refused.


@pytest.mark.parametrize(
    "function",
    [
        os.system,
        api._gather_to_leader,
        api._broadcast_to_followers,
        subprocess.Popen,
        eval,
        exec,
        __import__,
        open,
        print,
        setattr,
        operator.attrgetter,
        functools.partial,
        pickle.loads,
        torch.load,
        torch.hub.load,
        torch.ones,
        torch.add,
        collections.OrderedDict,
        Stranger,
        LearnerHost,
        packing.pack,
        packing.restore,
        endpoint.Endpoint,
        endpoint._submit,
        endpoint._register,
        vars(endpoint)["read_call"],
        guard.remove,
        internal.deserialize,
        internal._run_function,
        api.rpc_sync,
        api.shutdown,
    ],
    ids=lambda function: f"{function.__module__}.{function.__name__}",
)
@pytest.mark.parametrize("place", ["function", "argument", "called"])
def test_any_other_function_is_refused_wherever_it_stands(function: Callable[..., Any], place: str) -> None:
    message = {
        "function": internal.PythonUDF(function, (), {}),
        "argument": internal.PythonUDF(endpoint.serve, (0, [("deep", [function])]), {}),
        "called": [Reduced(function, ())],
    }[place]
    data = internal.serialize(message)
    with pytest.raises(pickle.UnpicklingError, match=r"refused .*: only torchfedrpc's own entry points"):
        internal.deserialize(*data)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torchfedrpc.rpc.endpoint", "submit.__globals__"),
        ("torchfedrpc.rpc.endpoint", "submit.__wrapped__"),
        ("torchfedrpc.rpc.endpoint", "torch"),
        ("torchfedrpc.rpc.endpoint", "serving"),
        ("torchfedrpc.rpc.endpoint", "missing"),
        ("torchfedrpc.rpc.guard", "install"),
        ("torch.distributed.rpc.internal", "PythonUDF.__new__"),
        ("torch.distributed.rpc.internal", "_InternalRPCPickler.serialize"),
        ("torch.distributed.rpc.internal", "_unpickler"),
        ("torch.distributed.rpc.internal", "pickle"),
        ("torch.distributed.rpc.api", "_init_rpc_backend"),
        ("builtins", "object"),
        ("builtins", "type"),
        ("builtins", "BaseException"),
        ("builtins", "SystemExit"),
        ("builtins", "KeyboardInterrupt"),
        ("builtins", "ValueError.__class__"),
        ("builtins", "missing"),
        ("__builtin__", "eval"),
        ("__main__", "anything"),
        ("strangers", "StrangeError"),
        ("no_such_module_anywhere", "x"),
        ("", ""),
    ],
)
def test_any_other_name_is_refused(module: str, name: str) -> None:
    with pytest.raises(pickle.UnpicklingError, match="refused"):
        read(named(module, name))


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (internal._InternalRPCPickler, "serialize"),
        (internal._InternalRPCPickler, "deserialize"),
        (internal._InternalRPCPickler, "__init__"),
        (internal._InternalRPCPickler, "_script_module_receiver"),
        (internal._InternalRPCPickler, "_tensor_reducer"),
        (internal.PythonUDF, "_make"),
        (internal.PythonUDF, "_tensor_receiver"),
        (endpoint.serve, "__globals__"),
        (ValueError, "__subclasses__"),
        ("text", "format"),
        ({}, "update"),
    ],
)
def test_getattr_gives_no_other_attribute(owner: Any, name: str) -> None:
    data = pickle.dumps(Reduced(getattr, (owner, name)), protocol=4)
    with pytest.raises(pickle.UnpicklingError, match=r"refused builtins\.getattr on anything but"):
        read(data)


def test_getattr_takes_no_default() -> None:
    data = pickle.dumps(Reduced(getattr, (internal._InternalRPCPickler, "missing", 3)), protocol=4)
    with pytest.raises(pickle.UnpicklingError, match="refused a message: TypeError"):
        read(data)


def test_a_message_sets_no_attributes() -> None:
    class_state = named("torch.distributed.rpc.internal", "PythonUDF")[:-1] + b"N}\x8c\x04funcNs\x86b."
    entry_state = named("torchfedrpc.rpc.endpoint", "submit")[:-1] + b"}\x8c\x04nameNsb."
    for data in (class_state, entry_state):
        with pytest.raises(pickle.UnpicklingError, match=r"refused a message: .* opcode b'[bs]'"):
            read(data)
    assert internal.PythonUDF._fields == ("func", "args", "kwargs")
    assert not hasattr(endpoint.serve, "name")


def test_a_message_that_claims_more_than_it_has_is_refused_before_memory_is_taken() -> None:
    with pytest.raises(pickle.UnpicklingError, match="claims more bytes"):
        read(b"\x80\x05\x96" + (2**60).to_bytes(8, "little") + b".")
    with pytest.raises(pickle.UnpicklingError, match="opcode b'r'"):
        read(b"\x80\x04Nr\xff\xff\xff\x7f.")


def test_getattr_itself_does_not_come_out() -> None:
    assert read(named("builtins", "getattr")) is not getattr


def test_an_exception_object_of_another_package_is_refused() -> None:
    data = internal.serialize(StrangeError("x"))
    with pytest.raises(pickle.UnpicklingError, match=r"refused strangers\.StrangeError"):
        internal.deserialize(*data)


def test_a_refused_call_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    data = internal.serialize([Reduced(print, ("this must not run",))])
    with pytest.raises(pickle.UnpicklingError):
        internal.deserialize(*data)
    assert capsys.readouterr().out == ""


def test_a_refused_module_is_not_imported() -> None:
    import sys

    sys.modules.pop("this", None)
    with pytest.raises(pickle.UnpicklingError):
        read(named("this", "s"))
    assert "this" not in sys.modules


# In place and away.


def test_without_the_guard_rpc_reads_as_it_always_did() -> None:
    data = internal.serialize(collections.OrderedDict(a=1))
    with pytest.raises(pickle.UnpicklingError):
        internal.deserialize(*data)
    guard.remove()
    assert internal.deserialize(*data) == {"a": 1}
    assert internal._unpickler is pickle.Unpickler
