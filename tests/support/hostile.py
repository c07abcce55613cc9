"""Pickles of an attacker, written opcode by opcode, and a check of whether they have run code."""

from __future__ import annotations

import collections
import enum
import os
import pickle
import struct
import tempfile
import uuid
import zlib
from collections.abc import Callable
from os import system
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core import numeric
from torch import Tensor

from torchfedrpc.host import snapshot
from torchfedrpc.wire import packing
from torchfedrpc.wire.packing import Parcel

# One path for each process of tests, and for the workers that it starts.
CANARY = Path(os.environ.setdefault("TORCHFEDRPC_TEST_CANARY", f"{tempfile.gettempdir()}/canary_{uuid.uuid4()}"))
DEEP = 60_000
HERE = __name__
ran: list[Any] = []
assert system is os.system  # a name that a trusted module has imported


class Colour(enum.Enum):
    """An enum of a trusted module; its members are for all of a process."""

    RED = 1


class Trusted:
    """A class of a trusted module."""

    def train(self) -> str:
        return "trained"


class Array(np.ndarray):
    """A class of arrays of a trusted module."""


class Weights(Tensor):
    """A class of tensors of a trusted module."""


def run(*args: Any) -> None:
    """A function of a trusted module, which no pickle may call."""
    ran.append(args)


class Victim:
    """A learner of a process that such pickles reach."""

    def __init__(self, client_id: str) -> None:
        self.client_id = client_id

    def echo(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    def harm(self) -> list[str]:
        return harm()

    def reply(self, name: str) -> Any:
        """Answer with a pickle of the corpus, as a worker in the wrong hands would."""
        return Raw(name)


class Raw:
    """Packs as one of the calls that pickles of the corpus make."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> Any:
        return {
            "os.system": (os.system, (f"touch {CANARY}",)),
            "eval": (eval, (f"open({str(CANARY)!r}, 'w')",)),
            "trusted function": (run, ("a result",)),
        }[self.name]


# Harm.


def _attributes(watched: Any) -> dict[str, Any]:
    return {
        name: value for name, value in vars(watched).items() if name != "__slotnames__"
    }  # pickle keeps that there


_WATCHED: dict[Any, dict[str, Any]] = {
    watched: _attributes(watched)
    for watched in (
        Trusted,
        Colour,
        Colour.RED,
        Array,
        collections.Counter,
        torch.nn.Linear,
        torch.OutOfMemoryError,
        vars(numeric)["_frombuffer"],
        packing.restore,
        packing._Builder.restore,
    )
}


def harm() -> list[str]:
    """What such pickles have done in this process."""
    done = [f"changed {watched}" for watched, before in _WATCHED.items() if _attributes(watched) != before]
    if CANARY.exists():
        done.append("a file was made")
    if "HOSTILE" in os.environ:
        done.append("the environment was changed")
    if ran:
        done.append(f"functions ran: {ran}")
    return done


# Writing pickles.


def text(value: str) -> bytes:
    data = value.encode()
    return b"\x8c" + bytes([len(data)]) + data if len(data) < 256 else b"X" + struct.pack("<I", len(data)) + data


def binary(value: bytes) -> bytes:
    return b"C" + bytes([len(value)]) + value


def number(value: int) -> bytes:
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def called(function: bytes, *args: bytes) -> bytes:
    return function + b"(" + b"".join(args) + b"tR"


def keyed(**values: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in values.items()) + b"u"


def attributes(target: bytes, **values: bytes) -> bytes:
    """Sets attributes as those in slots are set, which works on classes too."""
    return target + b"N" + keyed(**values) + b"\x86b"


def keep(index: int) -> bytes:
    """Memoize what is on the stack, the next index being that, and take it away."""
    assert index < 256
    return b"\x940"


def get(index: int) -> bytes:
    return b"h" + bytes([index])


def whole(*parts: bytes) -> bytes:
    return b"\x80\x05" + b"".join(parts) + b"."


RUN = text(f"touch {CANARY}")
CODE = text(f"open({str(CANARY)!r}, 'w').close()")
TRUSTED = named(HERE, "Trusted")
RESTORE = named("torchfedrpc.wire.packing", "restore")
DTYPE = named("numpy", "dtype")
NDARRAY = named("numpy", "ndarray")
EMPTY = called(named("numpy._core.multiarray", "_reconstruct"), NDARRAY, b"K\x00\x85", binary(b"b"))
NO, YES = b"\x89", b"\x88"
POINTER = binary(struct.pack("<Q", 0x4141414141414141))


def dtype(name: str, state: bytes = b"") -> bytes:
    return called(DTYPE, text(name), NO, YES) + (state and state + b"b")


def dtype_state(
    itemsize: int, names: bytes = b"N", fields: bytes = b"N", flags: int = 0, base: bytes = b"N"
) -> bytes:
    order = text("|")
    return b"(K\x03" + order + base + names + fields + number(itemsize) + b"K\x01" + bytes((75, flags)) + b"t"


def array_state(shape: bytes, kind: bytes, content: bytes) -> bytes:
    return b"(K\x01" + shape + kind + NO + content + b"tb"


def one_field(kind: bytes, offset: int) -> bytes:
    return keyed(a=kind + number(offset) + b"\x86")


_CALLS: dict[str, bytes] = {
    "os.system": called(named("os", "system"), RUN),
    "posix.system": called(named("posix", "system"), RUN),
    "nt.system": called(named("nt", "system"), RUN),
    "os.putenv": called(named("os", "putenv"), text("HOSTILE"), text("1")),
    "subprocess.Popen": called(named("subprocess", "Popen"), b"](" + text("touch") + text(str(CANARY)) + b"e"),
    "subprocess.run": called(named("subprocess", "run"), b"](" + text("touch") + text(str(CANARY)) + b"e"),
    "pty.spawn": called(named("pty", "spawn"), RUN),
    "eval": called(named("builtins", "eval"), CODE),
    "exec": called(named("builtins", "exec"), CODE),
    "open": called(named("builtins", "open"), text(str(CANARY)), text("w")),
    "__import__": called(named("builtins", "__import__"), text("antigravity")),
    "__builtin__.eval": called(named("__builtin__", "eval"), CODE),
    "getattr chain": called(
        called(named("builtins", "getattr"), called(named("builtins", "__import__"), text("os")), text("system")), RUN
    ),
    "setattr": called(named("builtins", "setattr"), TRUSTED, text("train"), b"N"),
    "type": called(named("builtins", "type"), text("X"), b")", b"}"),
    "dotted globals": named("collections", "OrderedDict.__init__.__globals__"),
    "dotted method": called(named("pathlib", "Path.unlink"), called(named("pathlib", "Path"), text(str(CANARY)))),
    "dotted subclasses": called(named("builtins", "dict.__subclasses__")),
    "dotted from trusted": called(named(HERE, "os.system"), RUN),
    "dotted trusted method": called(named(HERE, "Trusted.train"), b"N"),
    "imported by trusted": called(named(HERE, "system"), RUN),
    "trusted function": called(named(HERE, "run"), RUN),
    "trusted module's builtins": called(named(HERE, "__builtins__.eval"), CODE),
    "copyreg._reconstructor": called(named("copyreg", "_reconstructor"), TRUSTED, named("builtins", "object"), b"N"),
    "copyreg.add_extension": called(named("copyreg", "add_extension"), text("os"), text("system"), b"K\x01"),
    "operator.attrgetter": called(called(named("operator", "attrgetter"), text("system")), named("os", "path")),
    "operator.methodcaller": called(called(named("operator", "methodcaller"), text("mro")), TRUSTED),
    "functools.partial": called(called(named("functools", "partial"), named(HERE, "run"), RUN)),
    "functools.reduce": called(named("functools", "reduce"), named("builtins", "eval"), b"]" + CODE + b"a"),
    "builtins.map": called(named("builtins", "list"), called(named("builtins", "map"), named(HERE, "run"), b"]Na")),
    "types.FunctionType": called(named("types", "FunctionType"), b"N", b"}"),
    "types.CodeType": called(named("types", "CodeType"), b"K\x00" * 5),
    "types.MethodType": called(called(named("types", "MethodType"), named(HERE, "run"), b"N")),
    "marshal.loads": called(named("marshal", "loads"), binary(b"N")),
    "pickle.loads": called(named("pickle", "loads"), binary(whole(called(named(HERE, "run"), b"N")))),
    "importlib.import_module": called(named("importlib", "import_module"), text("antigravity")),
    "runpy": called(named("runpy", "run_path"), text(__file__)),
    "ctypes.CDLL": called(named("ctypes", "CDLL"), b"N"),
    "code interpreter": called(named("code", "InteractiveInterpreter")),
    "timeit": called(named("timeit", "timeit"), CODE, text("pass"), b"N", b"K\x01"),
    "shutil.rmtree": called(named("shutil", "rmtree"), text(str(CANARY))),
    "weakref.ref": called(named("weakref", "ref"), TRUSTED),
    "logging config": called(named("logging.config", "fileConfig"), text(str(CANARY))),
    "torch.load": called(named("torch", "load"), text(str(CANARY))),
    "torch.serialization.load": called(named("torch.serialization", "load"), text(str(CANARY))),
    "torch storage gadget": called(named("torch.storage", "_load_from_bytes"), binary(b"x")),
    "torch rebuild gadget": called(named("torch._utils", "_rebuild_tensor_v2"), b"N", b"K\x00", b")", b")", NO, b"N"),
    "torch rebuild device gadget": called(
        named("torch._utils", "_rebuild_device_tensor_from_numpy"), b"N", b"N", b"N", NO
    ),
    "torch name with a dot": called(named("torch._utils", "torch.load"), text(str(CANARY))),
    "torch.hub.load": called(named("torch.hub", "load"), text("x/y"), text("z")),
    "torch inline C++": called(named("torch.utils.cpp_extension", "load_inline"), text("x"), CODE),
    "torch.jit.load": called(named("torch.jit", "load"), text(str(CANARY))),
    "torch.package": called(named("torch.package", "PackageImporter"), text(str(CANARY))),
    "torch global hook": called(
        named("torch.nn.modules.module", "register_module_forward_hook"), named("builtins", "print")
    ),
    "torch.distributed.rpc": called(named("torch.distributed.rpc", "rpc_sync"), text("w"), named("os", "system")),
    "numpy.load": called(named("numpy", "load"), text(str(CANARY)), b"N", YES),
    "numpy f2py eval": called(named("numpy.f2py.crackfortran", "myeval"), CODE),
    "numpy runstring": called(named("numpy.testing._private.utils", "runstring"), CODE, b"}"),
    "ours: a host": called(named("torchfedrpc.host.learner_host", "LearnerHost"), b"N"),
    "ours: run": called(named("torchfedrpc", "run"), named(HERE, "run")),
    "ours: a guard's undoing": called(named("torchfedrpc.rpc.guard", "remove")),
}

_SETTING: dict[str, bytes] = {
    "attributes of a trusted class": attributes(TRUSTED, train=named("builtins", "int")),
    "dict state of a trusted class": TRUSTED + keyed(train=b"N") + b"b",
    "attributes of a trusted class out of the memo": TRUSTED + keep(0) + attributes(get(0), train=b"N"),
    "attributes of a trusted class by way of an array": called(
        named("numpy._core.multiarray", "scalar"), dtype("O"), attributes(TRUSTED, train=b"N")
    ),
    "attributes of a class of arrays": attributes(named(HERE, "Array"), tolist=b"N"),
    "attributes of what stands for a class of arrays": attributes(NDARRAY, cls=TRUSTED),
    "attributes of an enum": attributes(named(HERE, "Colour"), RED=b"N"),
    "attributes of a member of an enum": attributes(called(named(HERE, "Colour"), b"K\x01"), _value_=b"K\x02"),
    "dict state of a member of an enum": called(named(HERE, "Colour"), b"K\x01") + keyed(_value_=b"K\x02") + b"b",
    "attributes of a class of the standard library": attributes(named("collections", "Counter"), update=TRUSTED),
    "attributes of a class of torch": attributes(named("torch.nn.modules.linear", "Linear"), forward=TRUSTED),
    "attributes of a class of exceptions": attributes(named("torch", "OutOfMemoryError"), args=b"N"),
    "attributes of a function of numpy": attributes(named("numpy._core.numeric", "_frombuffer"), __defaults__=b")"),
    "dict state of a function of numpy": named("numpy._core.numeric", "_frombuffer") + keyed(a=b"N") + b"b",
    "attributes of a function of ours": attributes(RESTORE, __kwdefaults__=b"}"),
    "dict state of a function of ours": RESTORE + keyed(a=b"N") + b"b",
    "state that is no dict": called(TRUSTED) + b"(K\x01K\x02tb",
    "items of a class": TRUSTED + text("train") + b"Ns",
    "append to a class": TRUSTED + b"Na",
    "append to a class with a list's methods": named("collections", "deque") + b"(NNe",
    "add to a class": named("builtins", "set") + b"(NN\x90",
}

_NUMPY: dict[str, bytes] = {
    "an array of objects on foreign memory": called(NDARRAY, b"K\x01\x85", dtype("O"), POINTER),
    "an array of objects, named by a class": called(NDARRAY, b"K\x01\x85", named("builtins", "dict"), POINTER),
    "an array of objects by NEWOBJ": NDARRAY + b"K\x01\x85" + dtype("O") + POINTER + b"\x87\x81",
    "an array of objects by NEWOBJ_EX": NDARRAY
    + b")"
    + keyed(shape=b"K\x01", dtype=text("O"), buffer=POINTER)
    + b"\x92",
    "a trusted array of objects": called(named(HERE, "Array"), b"K\x01\x85", text("O"), POINTER),
    "an array of objects from a buffer": called(
        named("numpy._core.numeric", "_frombuffer"), POINTER, dtype("O"), b"K\x01\x85", text("C")
    ),
    "an array of another size than its list": EMPTY + array_state(b"K\x09\x85", dtype("O"), b"]Na"),
    "an array of objects as bytes": EMPTY + array_state(b"K\x01\x85", dtype("O"), POINTER),
    "an array of another size than its bytes": EMPTY + array_state(b"K\x09\x85", dtype("f8"), POINTER),
    "an array of negative size": EMPTY + array_state(b"J\xff\xff\xff\xff\x85", dtype("f8"), binary(b"")),
    "an array of huge size": EMPTY + array_state(number(2**61) + b"K\x08\x86", dtype("f8"), binary(b"")),
    "an array's memory taken away from under another": EMPTY
    + array_state(b"K\x08\x85", dtype("u1"), POINTER)
    + b"\x94"
    + called(named("numpy._core.numeric", "_frombuffer"), get(0), dtype("u1"), b"K\x08\x85", text("C"))
    + get(0)
    + array_state(b"K\x01\x85", dtype("u1"), binary(b"x")),
    "reconstruct with a shape": called(
        named("numpy._core.multiarray", "_reconstruct"), NDARRAY, number(2**50) + b"\x85", binary(b"b")
    ),
    "reconstruct another class": called(
        named("numpy._core.multiarray", "_reconstruct"), TRUSTED, b"K\x00\x85", binary(b"b")
    ),
    "a field outside its record": dtype("V8", dtype_state(8, b"\x8c\x01a\x85", one_field(dtype("f8"), 10**9), 16)),
    "a field before its record": dtype("V8", dtype_state(8, b"\x8c\x01a\x85", one_field(dtype("f8"), -8), 16)),
    "a field of objects": dtype("V8", dtype_state(8, b"\x8c\x01a\x85", one_field(dtype("O"), 0), 27)),
    "a field of objects that hides": dtype("V8", dtype_state(8, b"\x8c\x01a\x85", one_field(dtype("O"), 0), 16)),
    "a field that is no dtype": dtype("V8", dtype_state(8, b"\x8c\x01a\x85", one_field(text("O"), 0), 16)),
    "a field that is missing": dtype("V8", dtype_state(8, b"\x8c\x01b\x85", one_field(dtype("f8"), 0), 16)),
    "a dtype of arrays of objects": dtype("V8", dtype_state(8, base=dtype("O") + b"K\x01\x85\x86")),
    "a dtype that grows": dtype("S8", dtype_state(2**40)),
    "a dtype that becomes objects": dtype("i8", dtype_state(-1, flags=63)),
    "a dtype by a list of fields": called(DTYPE, b"]" + text("a") + text("O") + b"\x86a"),
    "a dtype by a string of fields": dtype("O,O"),
    "a dtype with memory of its own": dtype("T"),
    "a scalar of objects": called(named("numpy._core.multiarray", "scalar"), dtype("O"), TRUSTED),
    "a scalar of too few bytes": called(named("numpy._core.multiarray", "scalar"), dtype("f8"), binary(b"x")),
    "a generator that reads past its state": called(
        named("numpy.random._pickle", "__bit_generator_ctor"), text("MT19937")
    )
    + keyed(
        bit_generator=text("MT19937"),
        state=keyed(key=b"](" + b"K\x01" * 624 + b"e", pos=number(2**30)),
    )
    + b"b",
    "a generator that reads before its state": called(
        named("numpy.random._pickle", "__bit_generator_ctor"), text("Philox")
    )
    + keyed(
        bit_generator=text("Philox"),
        state=keyed(counter=b"](" + b"K\x01" * 4 + b"e", key=b"](K\x01K\x01e"),
        buffer=b"](" + b"K\x01" * 4 + b"e",
        buffer_pos=number(-(2**20)),
        has_uint32=b"K\x00",
        uinteger=b"K\x00",
    )
    + b"b",
}

_PARTS: dict[str, bytes] = {
    "a tensor that is not there": called(RESTORE, text("plain"), b"K\x07"),
    "a tensor before the first": called(RESTORE, text("plain"), number(-5)),
    "a tensor by name": called(RESTORE, text("plain"), text("0")),
    "a tensor of a kind that is none": called(RESTORE, text("dense"), NO, TRUSTED, b"N", b"N", b"K\x00", text("")),
    "a tensor that is a function": called(RESTORE, text("dense"), NO, RESTORE, b"N", b"N", b"K\x00", text("")),
    "a tensor with a state that is no dict": called(
        RESTORE, text("dense"), NO, b"N", b"K\x01", b"N", b"K\x00", text("")
    ),
    "a special tensor of no parts": called(RESTORE, text("special"), NO, b"N", b"N", b"N", text("sparse_coo")),
    "an unknown special tensor": called(RESTORE, text("special"), NO, b"N", b"N", b"N", text("nested")),
    "sparse indices that are numbers": called(
        RESTORE, text("special"), NO, b"N", b"N", b"N", text("sparse_coo"), b"K\x00", b"K\x00", b"K\x00\x85", YES
    ),
    "a restored part of no kind": called(RESTORE, text("everything")),
    "restore without a kind": called(RESTORE),
    "an exception that is none": called(RESTORE, text("exception"), TRUSTED, b")", b"}"),
    "an exception that is a function": called(RESTORE, text("exception"), RESTORE, b")", b"}"),
    "an exception of arguments that are none": called(
        RESTORE, text("exception"), named("builtins", "ValueError"), b"K\x01", b"}"
    ),
    "an exception with a state that is no dict": called(
        RESTORE, text("exception"), named("builtins", "ValueError"), b")", b"]"
    ),
    "an exception with names that are none": called(
        RESTORE, text("exception"), named("builtins", "ValueError"), b")", b"}K\x01Ns"
    ),
    "an exception that lacks what it needs": called(
        RESTORE, text("exception"), named("builtins", "UnicodeDecodeError"), b")", b"}"
    ),
    "a torch generator of odd state": called(
        named("torch._C", "Generator"), called(named("torch", "device"), text("cpu"))
    )
    + b"(K\x01N"
    + called(RESTORE, text("plain"), b"K\x00")
    + b"tb",
    "a layer of impossible size": called(named("torch.nn.modules.linear", "Linear"), number(2**50), number(2**50)),
}

_FILLING: dict[str, bytes] = {
    "an item of an array": called(
        RESTORE, text("array"), b"NNK\x01", b"K\x01\x85", text("C"), text("<f8"), binary(bytes(8))
    )
    + b"K\x00G"
    + bytes(8)
    + b"s",
    "items of a tensor": called(RESTORE, text("plain"), b"K\x00") + b"(K\x00K\x01u",
    "an item of a range": called(named("builtins", "range"), b"K\x00", b"K\x03", b"K\x01") + b"K\x00K\x01s",
    "items of an array of objects that is in use": called(
        RESTORE, text("objects"), b"NNK\x01", b"K\x01\x85", text("C")
    )
    + b"]Nab]Nab",
    "the state of a tensor": called(RESTORE, text("plain"), b"K\x00") + keyed(data=b"N") + b"b",
    "the state of a dtype": called(RESTORE, text("dtype"), text("<f8")) + b"(K\x03b",
    "a layer appended to a list of layers": named("torch.nn.modules.container", "ModuleList") + b")\x81Na",
    "members of a dict": b"}(NN\x90",
    "members of a list": b"](NN\x90",
    "a factory that is a function": called(
        named("collections", "defaultdict"), called(RESTORE, text("function"), text("torch.nn.functional.relu"))
    ),
    "a function of torch, called": called(
        called(RESTORE, text("function"), text("torch.nn.functional.relu")), called(RESTORE, text("plain"), b"K\x00")
    ),
    "a function of torch that is not listed": called(RESTORE, text("function"), text("torch.load")),
    "a partial of a class that is no layer": called(RESTORE, text("partial"), TRUSTED, b")", b"}"),
    "a partial of an optimiser": called(RESTORE, text("partial"), named("torch.optim.sgd", "SGD"), b")", b"}"),
    "a layer with a text filled in": called(
        RESTORE, text("partial"), named("torch.nn.modules.linear", "Linear"), text("x") + b"\x85", b"}"
    ),
    "a partial of a layer, called": called(
        called(RESTORE, text("partial"), named("torch.nn.modules.linear", "Linear"), b")", b"}"), b"K\x01", b"K\x01"
    ),
    "a factory that is a partial of a layer": called(
        named("collections", "defaultdict"),
        called(RESTORE, text("partial"), named("torch.nn.modules.linear", "Linear"), b"K\x01K\x01\x86", b"}"),
    ),
    "a layer, made without its constructor's consent": named("torch.nn.modules.linear", "Linear") + b"K\x01\x85\x81",
    "a pipe that opens files": named("torch.utils.data.datapipes.iter.fileopener", "FileOpenerIterDataPipe")
    + b")\x81",
    "bits by NEWOBJ": named("numpy.random._pcg64", "PCG64") + b")\x81" + keyed(a=b"N") + b"b",
    "a fraction of text": called(named("fractions", "Fraction"), text("1e99999999")),
    "a fraction that takes long to cancel": called(
        named("fractions", "Fraction"),
        *(b"\x8b" + struct.pack("<i", 99_999) + part * 99_998 + b"\x01" for part in (b"\xfd", b"\xfb")),
    ),
    "a list of a range": called(named("builtins", "list"), called(named("builtins", "range"), number(3 * 10**8))),
    "a list of a range in full": called(
        named("builtins", "list"), called(named("builtins", "range"), b"K\x00", number(3 * 10**8), b"K\x01")
    ),
    "a counter of a range": called(
        named("collections", "Counter"), called(named("builtins", "range"), b"K\x00", number(3 * 10**8), b"K\x01")
    ),
    "a sequence of seeds with a huge pool": called(
        RESTORE, text("seed_sequence"), b"K\x01", b")", number(10**6), b"K\x00"
    ),
    "an array of a huge shape": called(
        RESTORE, text("array"), b"NNK\x01", number(2**40) + b"\x85", text("C"), text("<f8"), binary(bytes(8))
    ),
    "an array of huge gaps": called(
        RESTORE,
        text("array"),
        b"NNK\x01",
        b"K\x02\x85",
        number(2**36) + b"\x85K\x00" + number(2**36 + 8) + b"\x87",
        text("<f8"),
        binary(bytes(16)),
    ),
    "an array of objects of a huge shape": called(
        RESTORE, text("objects"), b"NNK\x01", number(2**28) + b"\x85", text("C")
    )
    + b"]b",
    "an array that begins before its memory": called(
        RESTORE,
        text("array"),
        b"NNK\x01",
        b"K\x02\x85",
        number(-16) + b"\x85K\x08K\x18\x87",
        text("<f8"),
        binary(bytes(16)),
    ),
    "objects at odd addresses": called(RESTORE, text("objects"), b"NNK\x01", b"K\x02\x85", b"K\x10\x85K\x04K\x20\x87")
    + b"](NNeb",
    "an array.array of text": called(RESTORE, text("array.array"), text("u"), binary(b"\xff" * 4)),
    "a member of what is no enum": called(RESTORE, text("member"), TRUSTED, text("train")),
}
_BIG_RANGE = called(named("builtins", "range"), b"K\x00", number(3 * 10**8), b"K\x01")
_NAMESPACE = called(named("types", "SimpleNamespace"))


def _with_gradient(gradient: bytes) -> bytes:
    return called(RESTORE, text("dense"), NO, b"N", b"N", gradient, b"K\x00", text(""))


_SECOND_LOOK: dict[str, bytes] = {
    "__setstate__ set on an instance, then called": _NAMESPACE
    + keyed(__setstate__=named("builtins", "list"))
    + b"b"
    + _BIG_RANGE
    + b"b",
    "a state whose keys() are called": named("torch.nn.modules.linear", "Identity")
    + b")\x81"
    + _NAMESPACE
    + keyed(keys=named("builtins", "list"))
    + b"bb",
    "a method of a layer replaced": named("torch.nn.modules.linear", "Linear")
    + b")\x81"
    + keyed(forward=named("builtins", "list"))
    + b"b",
    "a method of a tensor replaced": called(
        RESTORE, text("dense"), NO, b"N", keyed(detach=named("builtins", "list")), b"N", b"K\x00", text("")
    ),
    "the attributes of a tensor that are no dict": called(
        RESTORE, text("dense"), NO, b"N", _NAMESPACE, b"N", b"K\x00", text("")
    ),
    "an optimiser over a range": named("torch.optim.adam", "Adam")
    + b")\x81"
    + keyed(defaults=b"}", param_groups=b"]" + keyed(params=_BIG_RANGE) + b"a", state=b"}")
    + b"b",
    "an optimiser whose defaults are called": named("torch.optim.sgd", "SGD")
    + b")\x81"
    + keyed(defaults=_NAMESPACE, param_groups=b"]", state=b"}")
    + b"b",
    "a recurrent layer of a billion layers": named("torch.nn.modules.rnn", "LSTM")
    + b")\x81"
    + keyed(num_layers=number(10**9), bidirectional=NO, all_weights=b"](](K\x00ee", bias=NO, proj_size=b"K\x00")
    + b"b",
    "parts that are a range": RESTORE + _BIG_RANGE + b"R",
    "arguments of an exception that are a range": called(
        RESTORE, text("exception"), named("builtins", "ValueError"), _BIG_RANGE, b"}"
    ),
    "args of an exception that are a range": called(
        RESTORE, text("exception"), named("builtins", "ValueError"), b")", keyed(args=_BIG_RANGE)
    ),
    "a state of random that is a range": called(named("random", "Random")) + b"K\x02" + _BIG_RANGE + b"N\x87b",
    "a UUID of parts": named("uuid", "UUID") + b")\x81" + keyed(int=b")") + b"b",
    "a decimal of many digits that is none": called(named("decimal", "Decimal"), text("1" * 60_000 + "x")),
    "text without length": called(
        RESTORE, text("array"), b"NNK\x01", number(3000) + b"\x85", text("C"), text("|S0"), binary(b"")
    ),
    "a gradient with a gradient": _with_gradient(_with_gradient(_with_gradient(b"N"))),
    "numpy's class of arrays as a layer": named("torch.nn.modules.container", "Sequential")
    + b")\x81"
    + keyed(_modules=b"}" + text("0") + named("numpy", "ndarray") + b"s")
    + b"b",
}
_COLLISIONS = [number(count * (2**61 - 1)) for count in range(1, 40_000)]
_NESTED = b")\x94" + b"".join(b"0" + (b"h" + bytes([level])) * 2 + b"\x86\x94" for level in range(60)) + b"0"
_SLOW: dict[str, bytes] = {
    "keys of one hash": whole(b"}(", *(key + b"N" for key in _COLLISIONS), b"u"),
    "keys of one hash, one by one": whole(b"}", *(key + b"Ns" for key in _COLLISIONS)),
    "members of one hash": whole(b"\x8f(", *_COLLISIONS, b"\x90"),
    "members of one hash, one by one": whole(b"\x8f", *(b"(" + key + b"\x90" for key in _COLLISIONS)),
    "a flat dict with a key out of turn": whole(_NESTED, b"}\x94(" + text("a") + b"\x94NN" + b"h\x3cNu"),
    "a frozenset of one hash": whole(b"(", *_COLLISIONS, b"\x91"),
    "a key of 2**60 parts": whole(_NESTED, b"}h\x3cNs"),
    "a member of 2**60 parts": whole(_NESTED, b"\x8f(h\x3c\x90"),
    "a frozenset of 2**60 parts": whole(_NESTED, b"(h\x3c\x91"),
    "a kind of 2**60 parts": whole(_NESTED, called(RESTORE, b"h\x3c")),
    "a function of 2**60 parts": whole(_NESTED, called(RESTORE, text("function"), b"h\x3c")),
    "a class of 2**60 parts": whole(_NESTED, called(RESTORE, text("exception"), b"h\x3c", b")", b"}")),
    "an enum of 2**60 parts": whole(_NESTED, called(RESTORE, text("member"), b"h\x3c", text("RED"))),
    "a member of an enum of 2**60 parts": whole(
        _NESTED, called(RESTORE, text("member"), named(HERE, "Colour"), b"h\x3c")
    ),
    "a view of a kind of 2**60 parts": whole(
        _NESTED, called(RESTORE, text("dense"), NO, b"NNN", called(RESTORE, text("plain"), b"K\x00"), b"h\x3c")
    ),
    "an exception's attribute of 2**60 parts": whole(
        _NESTED, called(RESTORE, text("exception"), named("builtins", "ValueError"), b")", b"]h\x3ca")
    ),
    "a call of 2**60 parts": whole(_NESTED, called(b"h\x3c")),
    "an array of 2**60 parts": whole(_NESTED, called(RESTORE, text("array"), *(b"h\x3c" for _ in range(7)))),
}

_OPCODES: dict[str, bytes] = {
    "protocol 0": f"cos\nsystem\n(S'touch {CANARY}'\ntR.".encode(),
    "GLOBAL": b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.",
    "INST": f"(S'touch {CANARY}'\nios\nsystem\n.".encode(),
    "INST of a trusted class": f"(i{HERE}\nTrusted\n.".encode(),
    "OBJ": b"(" + named("os", "system") + RUN + b"o.",
    "PERSID": b"Psomething\n.",
    "BINPERSID of a class and its state": whole(TRUSTED, b"N", keyed(train=b"N"), b"\x86\x86Q"),
    "EXT1": b"\x80\x02\x82\x01.",
    "EXT2": b"\x80\x02\x83\x01\x00.",
    "EXT4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "DUP, a billion laughs": whole(b"]", (b"](" + b"2" * 9 + b"e") * 20),
    "PUT far away": b"\x80\x02Np2000000000\n.",
    "LONG_BINPUT far away": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "BINGET of nothing": whole(b"h\x07"),
    "LONG_BINGET of nothing": whole(b"j\xff\xff\xff\xff"),
    "an unknown opcode": whole(b"\xff"),
    "a protocol of the future": b"\x80\x63N.",
    "nothing on the stack": whole(b"R"),
    "no mark": whole(b"Nt"),
    "a buffer that is not there": whole(b"\x97"),
}

_SIZES: dict[str, bytes] = {
    "BINBYTES8 of an exabyte": whole(b"\x8e", struct.pack("<Q", 2**60)),
    "BINUNICODE8 of an exabyte": whole(b"\x8d", struct.pack("<Q", 2**60)),
    "BYTEARRAY8 of an exabyte": whole(b"\x96", struct.pack("<Q", 2**60)),
    "BYTEARRAY8 of 8 GiB": whole(b"\x96", struct.pack("<Q", 2**33)),
    "BINBYTES8 of a negative size": whole(b"\x8e", b"\xff" * 8),
    "BINBYTES of 4 GiB": whole(b"B", b"\xff" * 4),
    "BINUNICODE of 2 GiB": whole(b"X", struct.pack("<I", 2**31 - 1)),
    "LONG4 of 2 GiB": whole(b"\x8b", struct.pack("<i", 2**31 - 1)),
    "LONG4 of a negative size": whole(b"\x8b", struct.pack("<i", -1)),
    "FRAME of an exabyte": whole(b"\x95", struct.pack("<Q", 2**60), b"N"),
    "FRAME of a negative size": whole(b"\x95", b"\xff" * 8, b"N"),
    "an integer of 10,000 digits": b"\x80\x02I" + b"9" * 10_000 + b"\n.",
}

_DEEP: dict[str, bytes] = {
    "deep lists": whole(b"]" * DEEP, b"a" * (DEEP - 1)),
    "deep tuples": whole(b")", b"\x85" * DEEP),
    "deep tuples as a key": whole(b"})", b"\x85" * 300_000, b"Ns"),
    "deep tuples around a number": whole(b"K\x01", b"\x85" * DEEP),
    "deep tuples by the memo": whole(
        b")\x94", *(b"0j" + struct.pack("<I", index) + b"\x85\x94" for index in range(DEEP))
    ),
    "deep dicts": whole(b"}K\x01" * DEEP, b"N", b"s" * DEEP),
    "deep frozensets": whole(b"(" * DEEP, b"N", b"\x91" * DEEP),
    "deep slices": whole(named("builtins", "slice"), keep(0), get(0) * DEEP, b"N", b"\x85R" * DEEP),
    "deep arrays": whole(
        *(named("numpy._core.multiarray", "_reconstruct"), keep(0)),
        *(NDARRAY, b"K\x00\x85C\x01b\x87", keep(1)),
        *(dtype("O"), keep(2)),
        *((get(0) + get(1) + b"R(K\x01K\x01\x85" + get(2) + b"\x89]") * 5000, b"N", b"atb" * 5000),
    ),
    "deep arrays, the outer ones first": whole(
        *(named("numpy._core.multiarray", "_reconstruct"), keep(0)),
        *(NDARRAY, b"K\x00\x85C\x01b\x87", keep(1)),
        *(dtype("O"), keep(2)),
        *(get(0), get(1), b"R\x94"),
        *(
            b"(K\x01K\x01\x85" + get(2) + b"\x89]" + get(0) + get(1) + b"R\x94atb0j" + struct.pack("<I", index)
            for index in range(4, 5004)
        ),
        *(b"0", get(3)),
    ),
    "marks without end": whole(b"(" * DEEP),
}  # fmt: skip

_PARTS_OF_PICKLES = (_CALLS, _SETTING, _NUMPY, _PARTS, _FILLING, _SECOND_LOOK)
CORPUS: dict[str, bytes] = (
    {
        name: whole(part)
        for part_of in (_CALLS, _SETTING, _NUMPY, _PARTS, _FILLING, _SECOND_LOOK)
        for name, part in part_of.items()
    }
    | _OPCODES
    | _SIZES
    | _DEEP
    | _SLOW
)
"""Pickles by name; each is an error wherever it is read, a parcel of one float tensor (`parcel`) included."""


# Carriers.


def parcel(head: bytes) -> Parcel:
    """A parcel of that head and one tensor."""
    return Parcel(head, [0], [torch.zeros(4)])


_PREFIX = struct.Struct("<4sIQQ")


def serialized(head: bytes, table: bytes | None = None, memory: bytes = bytes(16)) -> bytes:
    """The same as bytes for `ParameterSerializer.deserialize`, well-formed; or with table and memory of one's own."""
    table = table or pickle.dumps(([0], [("float32", (4,), (1,), 16, False)]))
    prefix = _PREFIX.pack(b"TFR\x03", zlib.crc32(table + head), len(table), len(head))
    body = prefix + table + head
    return body + bytes(-len(body) % 64) + memory


def parts_of(data: bytes) -> tuple[bytes, bytes, bytes]:
    """Table, head and memory of bytes from `ParameterSerializer.serialize`."""
    _, _, table_bytes, head_bytes = _PREFIX.unpack_from(data)
    head_at = _PREFIX.size + table_bytes
    end = head_at + head_bytes
    return data[_PREFIX.size : head_at], data[head_at:end], data[end + -end % 64 :]


def snapshot_of(head: bytes) -> bytes:
    """The same as a snapshot, with a right checksum."""
    return snapshot_around(serialized(head))


def snapshot_around(payload: bytes | bytearray) -> bytes:
    """Any bytes as a snapshot, with a right checksum."""
    return snapshot._HEADER.pack(snapshot._MAGIC, snapshot._VERSION, zlib.crc32(payload)) + payload


# Parcels.

_PLAIN = whole(called(RESTORE, text("plain"), b"K\x00"))


def _array_on(memory: bytes) -> bytes:
    """A pickle of an array of two floats that lies on a tensor of the parcel."""
    return whole(
        called(RESTORE, text("array"), b"NNK\x01", b"K\x02\x85", text("C"), text("<f8"), memory),
    )


_BYTES = _array_on(b"K\x00")


def _forged(views: Any = (0,), slots: Any = None, head: Any = _PLAIN) -> Any:
    return lambda: Parcel(head, list(views), [torch.zeros(4)] if slots is None else slots())


PARCELS: dict[str, Callable[[], Parcel]] = {
    "a head that is None": _forged(head=None),
    "a head that is text": _forged(head="N."),
    "views that are None": _forged([None]),
    "views that are too short": _forged([]),
    "a view that is text": _forged(["0"]),
    "a view that is out of range": _forged([1]),
    "a view before the first slot": _forged([-2]),
    "a view of a slot out of range": _forged([(1, "float32", (4,), (1,), 0)]),
    "a view beyond the memory": _forged([(0, "float32", (5,), (1,), 0)]),
    "a view from before the memory": _forged([(0, "float32", (1,), (1,), -1)]),
    "a view of negative steps": _forged([(0, "float32", (4,), (-1,), 3)]),
    "a view of negative size": _forged([(0, "float32", (-4,), (1,), 0)]),
    "a view of huge steps": _forged([(0, "float32", (2,), (2**62,), 0)]),
    "a view of a huge offset": _forged([(0, "float32", (1,), (1,), 2**62)]),
    "a view whose size overflows": _forged([(0, "float32", (2**32, 2**32), (2**32, 1), 0)]),
    "a view beyond all numbers": _forged([(0, "float32", (2**100,), (1,), 0)]),
    "a view of fractions": _forged([(0, "float32", (1.5,), (1,), 0)]),
    "a view of more sizes than strides": _forged([(0, "float32", (1, 1), (1,), 0)]),
    "a view of a wider dtype": _forged([(0, "complex128", (4,), (1,), 0)]),
    "a view of no dtype": _forged([(0, "load", (4,), (1,), 0)]),
    "a view of a dtype that is none": _forged([(0, None, (4,), (1,), 0)]),
    "a view of too few parts": _forged([(0, "float32")]),
    "slots that are no tensors": _forged(slots=lambda: [TRUSTED]),
    "slots that are functions": _forged(slots=lambda: [run]),
    "slots that are None": _forged(slots=lambda: [None]),
    "no slots": _forged(slots=list),
    "a sparse slot": _forged([(0, "float32", (1,), (1,), 0)], lambda: [torch.eye(2).to_sparse()]),
    "an array on a tensor that is not there": _forged(head=_array_on(b"K\x05")),
    "an array on a tensor of negative number": _forged(head=_array_on(number(-7))),
    "an array on a tensor of another dtype": _forged(head=_BYTES),
    "an array on fewer bytes than it needs": _forged(slots=lambda: [torch.zeros(4, dtype=torch.uint8)], head=_BYTES),
    "an array on bytes in two dimensions": _forged(slots=lambda: [torch.zeros(4, 4, dtype=torch.uint8)], head=_BYTES),
    "an array on one byte that is repeated": _forged(
        [(0, "uint8", (2**33,), (0,), 0)], lambda: [torch.zeros(16, dtype=torch.uint8)], _BYTES
    ),
    "an array on a tensor without memory": _forged(
        slots=lambda: [torch.zeros(16, dtype=torch.uint8, device="meta")], head=_BYTES
    ),
}
"""Parcels by name, as they could arrive through RPC; each is an error as it is opened."""
