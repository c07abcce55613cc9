"""Random pickles of allow-listed names and all permitted opcodes, as an attacker would write them by hand."""

from __future__ import annotations

import random
import struct
import sys
from collections.abc import Callable
from typing import Any

import hostile
import torch
import torch.utils.data
from hostile import binary, called, named, number, text

from torchfedrpc.wire import allowlist, arrays, encodings, packing

_TEXTS = (
    *(
        "C",
        "F",
        "cpu",
        "cuda",
        "float32",
        "sparse_coo",
        "sparse_compressed",
        "per_tensor",
        "per_channel",
        "conj",
        "neg",
    ),
    *("<f8", "<i4", "|O", "|u1", "|V8", "<U3", "<M8[ns]", "|S0", "?", "parameter", "__dict__", "__class__", "step"),
    *("data", "forward", "_modules", "_parameters", "training", "param_groups", "state", "defaults", "maps", "a", ""),
    *(
        "MT19937",
        "PCG64",
        "Philox",
        "SFC64",
        "bit_generator",
        "pos",
        "key",
        "inc",
        "1.5",
        "1e999",
        "NaN",
        "RED",
        "train",
    ),
)
_NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    -1,
    -2,
    255,
    256,
    2**16,
    2**20,
    2**31 - 1,
    2**31,
    2**32,
    2**40,
    2**61 - 1,
    2**63 - 1,
    -(2**63),
)
_OPCODES = b"Rbsuea\x90\x91\x81\x92t\x85\x86\x87\x94(01h)]}N"
_ENDS = (b"b", b"R", b"a", b"Ns", b"\x86b", b"\x85R", b"\x85\x81")
_KINDS = (*encodings.MAKERS, *arrays._MAKERS, *arrays._ARRAYS, "plain", "dense", "special", "apart")


def _names() -> tuple[bytes, ...]:
    listed = [named(module, name) for module, name in sorted(allowlist.LISTED)]
    families = [
        named(module, name)
        for module in sorted(sys.modules)
        if module.startswith(("torch.nn.modules.", "torch.optim", "torch.utils.data", "torch.amp"))
        for name, entry in sorted(vars(sys.modules[module]).items())
        if isinstance(entry, type) and entry.__module__ == module and allowlist._is_of_torch(entry)
    ]
    others = [
        *(
            named("builtins", name)
            for name in ("ValueError", "OSError", "SystemExit", "UnicodeDecodeError", "ExceptionGroup")
        ),
        *(named("torch", name) for name in ("float32", "OutOfMemoryError", "per_tensor_affine")),
        *(named("numpy", name) for name in ("float64", "void", "object_")),
        *(named(hostile.HERE, name) for name in ("Trusted", "Colour", "Array", "Weights", "Victim")),
        named("http", "HTTPStatus"),
    ]
    return (*listed * 3, *families, *others * 3)


class Forger:
    """Writes one random pickle after another, each a function of its seed alone."""

    def __init__(self) -> None:
        self._names = _names()
        self._functions = tuple(encodings.listed_functions())
        self._makers: tuple[Callable[[random.Random, int], bytes], ...] = (
            self._restored,
            self._restored,
            self._array,
            self._objects,
            self._tensor,
            self._call,
            self._instance,
            self._container,
            self._container,
        )

    def pickle(self, seed: int) -> bytes:
        """Return the pickle of that seed."""
        draw = random.Random(seed)
        parts = [self._value(draw, 4) for _ in range(draw.randint(1, 4))]
        if draw.random() < 0.5:
            parts.append(
                bytes(draw.choices(b"Rbsuea\x90\x91\x81\x92t\x85\x86\x87\x94(01h)]}N", k=draw.randint(1, 6)))
            )
        if draw.random() < 0.5:
            parts.append(
                self._value(draw, 2) + draw.choice((b"b", b"R", b"a", b"Ns", b"\x86b", b"\x85R", b"\x85\x81"))
            )
        return hostile.whole(*parts)

    def _atom(self, draw: random.Random) -> bytes:
        kind = draw.randrange(8)
        if kind == 0:
            return number(draw.choice(_NUMBERS))
        if kind == 1:
            return b"K" + bytes([draw.randrange(6)])
        if kind == 2:
            return text(draw.choice(_TEXTS))
        if kind == 3:
            return binary(draw.randbytes(draw.choice((0, 1, 3, 8, 16, 40))))
        if kind == 4:
            return b"G" + struct.pack(">d", draw.choice((0.0, -1.5, float("inf"), float("nan"), 1e300)))
        if kind == 5:
            return b"h" + bytes([draw.randrange(12)])
        return draw.choice((b"N", b"\x88", b"\x89", b")", b"]", b"}", b"\x8f"))

    def _value(self, draw: random.Random, depth: int) -> bytes:
        if depth <= 0 or draw.random() < 0.35:
            value = self._atom(draw) if draw.random() < 0.8 else draw.choice(self._names)
        else:
            value = draw.choice(self._makers)(draw, depth - 1)
        return value + b"\x94" if draw.random() < 0.3 else value

    def _values(self, draw: random.Random, depth: int, most: int = 4) -> bytes:
        return b"".join(self._value(draw, depth) for _ in range(draw.randint(0, most)))

    def _numbers(self, draw: random.Random, most: int = 3) -> bytes:
        return b"(" + b"".join(b"K" + bytes([draw.randrange(5)]) for _ in range(draw.randint(0, most))) + b"t"

    def _odd(self, draw: random.Random, proper: bytes) -> bytes:
        """Mostly what is proper."""
        return proper if draw.random() < 0.85 else self._value(draw, 1)

    def _restored(self, draw: random.Random, depth: int) -> bytes:
        if draw.random() < 0.2:
            return called(hostile.RESTORE, text("function"), text(draw.choice(self._functions)))
        return called(hostile.RESTORE, text(draw.choice(_KINDS)), self._values(draw, depth, 7))

    def _array(self, draw: random.Random, depth: int) -> bytes:
        shape = b"K" + bytes([draw.randrange(4)]) + b"\x85"
        layout = draw.choice((text("C"), text("F"), self._layout(draw)))
        parts = (
            self._odd(draw, draw.choice((b"N", named(hostile.HERE, "Array")))),
            self._odd(draw, b"N"),
            self._odd(draw, b"K\x01"),
            self._odd(draw, shape if draw.random() < 0.7 else self._numbers(draw)),
            self._odd(draw, layout),
            self._odd(draw, text(draw.choice(("<f8", "<f4", "|u1", "|O", "|V8", "<U2")))),
            self._odd(draw, draw.choice((binary(bytes(draw.choice((0, 8, 16, 24, 32)))), b"K\x00", b"K\x01"))),
        )
        return called(hostile.RESTORE, text("array"), *parts)

    def _layout(self, draw: random.Random) -> bytes:
        strides = number(draw.choice((0, 4, 8, 16, -8, 1, 2**20))) + b"\x85"
        return strides + number(draw.choice((0, 8, 16, 64))) + number(draw.choice((8, 16, 32, 64, 2**16))) + b"\x87"

    def _objects(self, draw: random.Random, depth: int) -> bytes:
        count = draw.randrange(4)
        shape = b"K" + bytes([count]) + b"\x85"
        layout = draw.choice((text("C"), text("F"), self._layout(draw)))
        made = called(
            hostile.RESTORE, text("objects"), b"NN", self._odd(draw, b"K\x01"), self._odd(draw, shape), layout
        )
        items = b"](" + b"".join(self._value(draw, depth) for _ in range(count)) + b"e"
        return made + self._odd(draw, items) + b"b"

    def _tensor(self, draw: random.Random, depth: int) -> bytes:
        plain = called(hostile.RESTORE, text("plain"), b"K\x00")
        if draw.random() < 0.4:
            return plain
        head = (
            self._odd(draw, draw.choice((b"\x88", b"\x89"))),
            self._odd(draw, draw.choice((b"N", text("parameter")))),
        )
        state = self._odd(draw, b"N")
        grad = self._odd(draw, draw.choice((b"N", plain)))
        if draw.random() < 0.5:
            rest = self._odd(draw, b"K\x00") + self._odd(draw, text(draw.choice(("", "conj", "neg", "conjneg"))))
            return called(hostile.RESTORE, text("dense"), *head, state, grad, rest)
        kind = draw.choice(("sparse_coo", "sparse_compressed", "per_tensor", "per_channel"))
        parts = b"".join(
            self._odd(draw, draw.choice((plain, self._numbers(draw)))) for _ in range(draw.randint(2, 5))
        )
        return called(hostile.RESTORE, text("special"), *head, state, grad, text(kind), parts)

    def _call(self, draw: random.Random, depth: int) -> bytes:
        return called(draw.choice(self._names), self._values(draw, depth, 3))

    def _instance(self, draw: random.Random, depth: int) -> bytes:
        made = draw.choice(self._names) + self._odd(draw, b")") + b"\x81"
        if draw.random() < 0.2:
            made = draw.choice(self._names) + self._odd(draw, b")") + self._odd(draw, b"}") + b"\x92"
        keys = [text(draw.choice(_TEXTS)) + self._value(draw, depth) for _ in range(draw.randint(0, 3))]
        return made + self._odd(draw, b"}(" + b"".join(keys) + b"u") + b"b"

    def _container(self, draw: random.Random, depth: int) -> bytes:
        kind = draw.randrange(6)
        if kind == 0:
            return b"](" + self._values(draw, depth) + b"e"
        if kind == 1:
            return b"(" + self._values(draw, depth) + b"t"
        if kind == 2:
            pairs = b"".join(self._value(draw, depth) + self._value(draw, depth) for _ in range(draw.randint(0, 3)))
            return b"}(" + pairs + b"u"
        if kind == 3:
            return b"\x8f(" + self._values(draw, depth) + b"\x90"
        if kind == 4:
            return b"(" + self._values(draw, depth) + b"\x91"
        return self._value(draw, depth) + b"(" + self._values(draw, depth) + draw.choice((b"u", b"e", b"\x90"))


def parcel(head: bytes) -> Any:
    """Return a parcel of that head: some tensors, some of them a view."""
    views: list[Any] = [0, (1, "float32", (2, 2), (2, 1), 0)]
    return packing.Parcel(head, views, [torch.zeros(4), torch.arange(16, dtype=torch.uint8)])
