"""The opcodes of a pickle, checked and rewritten before it is loaded.

CPython's unpickler makes numbers, texts, tuples and empty containers by itself. Every opcode that calls, makes or
changes an object is replaced by a request to ``persistent_load``, where `rebuild` holds the rules.
"""

from __future__ import annotations

import functools
import gc
import re
from collections import OrderedDict, defaultdict, deque
from typing import Any

from torchfedrpc.errors import SerializationError

MAX_DEPTH = 2000
"""Levels of containers inside containers. Some operations, such as hashing a tuple, recurse in C without a limit."""

_SHALLOW_BYTES = 4096  # a shorter pickle is not deep enough for any stack
_CONTAINERS = frozenset((tuple, list, dict, set, frozenset, OrderedDict, defaultdict, deque))

# The opcodes of protocols 4 and 5, as CPython's pickler writes them. Older opcodes are missing (they can place
# an object at memo entry 2**31, and so claim 32 GiB), and opcodes of extension registries and persistent ids.
_PROTO, _FRAME, _STOP, _MARK, _POP, _POP_MARK = b"\x80\x95.(01"
_NONE, _NEWTRUE, _NEWFALSE, _BININT, _BININT1, _BININT2, _BINFLOAT, _LONG1, _LONG4 = b"N\x88\x89JKMG\x8a\x8b"
_SHORT_BINBYTES, _BINBYTES, _BINBYTES8, _BYTEARRAY8 = b"CB\x8e\x96"
_SHORT_BINUNICODE, _BINUNICODE, _BINUNICODE8 = b"\x8cX\x8d"
_EMPTY_TUPLE, _EMPTY_LIST, _EMPTY_DICT, _EMPTY_SET = b")]}\x8f"
_TUPLE, _TUPLE1, _TUPLE2, _TUPLE3, _FROZENSET = b"t\x85\x86\x87\x91"
_APPEND, _APPENDS, _SETITEM, _SETITEMS, _ADDITEMS = b"aesu\x90"
_MEMOIZE, _BINGET, _LONG_BINGET = b"\x94hj"
_STACK_GLOBAL, _REDUCE, _NEWOBJ, _NEWOBJ_EX, _BUILD = b"\x93R\x81\x92b"

_ONE_BYTE = b"(01N\x88\x89)]}\x8ft\x85\x86\x87\x91aesu\x90\x94\x93R\x81\x92b"  # all but STOP
_HARMLESS = b"(01N\x88\x89)]}\x8ft\x85\x86\x87\x94\x93"  # the common opcodes that are not replaced
_FIXED = {_BININT1: 1, _BININT2: 2, _BININT: 4, _BINFLOAT: 8, _BINGET: 1, _LONG_BINGET: 4}
_COUNTED_BY_1 = (_SHORT_BINUNICODE, _SHORT_BINBYTES, _LONG1)
_COUNTED_BY_MORE = {_BINUNICODE: 4, _BINBYTES: 4, _LONG4: 4, _BINUNICODE8: 8, _BINBYTES8: 8, _BYTEARRAY8: 8}

# The replacement of an opcode with a rule: its operands as one tuple (target, argument, opcode), and BINPERSID.
REDUCE, NEWOBJ, NEWOBJ_EX, BUILD = _REDUCE, _NEWOBJ, _NEWOBJ_EX, _BUILD
APPEND, APPENDS, SETITEM, SETITEMS, ADDITEMS, FROZENSET = (
    _APPEND,
    _APPENDS,
    _SETITEM,
    _SETITEMS,
    _ADDITEMS,
    _FROZENSET,
)


def _request(before: bytes, op: int) -> bytes:
    return before + bytes((_BININT1, op, _TUPLE3)) + b"Q"


_REQUESTS = {
    **{bytes((op,)): _request(b"", op) for op in (_REDUCE, _NEWOBJ, _BUILD, _APPEND)},
    **{bytes((op,)): _request(b"t", op) for op in (_APPENDS, _SETITEMS, _ADDITEMS)},  # all items, as a tuple
    **{bytes((op,)): _request(b"\x86", op) for op in (_SETITEM, _NEWOBJ_EX)},  # two operands, as a tuple
    bytes((_FROZENSET,)): _request(b"tN", _FROZENSET),
}


def _request_for(found: re.Match[bytes]) -> bytes:
    return found[1] + _REQUESTS[found[2]] if found[2] else found[1]


def compile_patterns() -> None:
    """Compile all patterns now. It takes 0.1 s, which the first value in a process takes otherwise."""
    for pattern in (_opcodes_of_sequences, _common_opcodes, _kept_opcodes, _up_to_a_request, _plain_data):
        pattern()


def check_opcodes(head: bytes) -> None:
    """Check a pickle that an unpickler with a strict ``find_class`` is about to load without requests.

    Args:
        head: A pickle from any sender.

    Raises:
        SerializationError: If it uses opcodes that CPython's pickler of protocol 4 and 5 does not, sets the state of
            an object, fills a dict or a set (hashing can take for ever), or claims more bytes than it has.
    """
    _parts(head, _opcodes_of_sequences())


def is_plain_data(head: bytes) -> bool:
    """Return whether a short pickle holds only numbers, texts, tuples, lists and dicts, and none of them twice.

    Such a pickle can be loaded as it is: it calls nothing, and its few keys are hashed in no time, since without
    references to earlier objects no tuple has more parts than the pickle has bytes.
    """
    return len(head) <= _SHALLOW_BYTES and _plain_data().fullmatch(head) is not None


def with_requests(head: bytes) -> bytes:
    """Return a pickle in which each opcode that calls, makes or changes an object is a request.

    The unpickler passes ``(target, argument, opcode)`` to ``persistent_load`` and continues with the returned object.
    For `REDUCE` these are the function and its arguments; for `NEWOBJ` the class and arguments (`NEWOBJ_EX`: the
    pair of arguments and keywords); for `BUILD` the object and its state; for `APPEND` the list and an item; for
    `SETITEM` the dict and the pair of key and value; for `APPENDS`, `ADDITEMS` and `SETITEMS` the container and all
    items (keys and values in turn); for `FROZENSET` the items and None.

    Args:
        head: A pickle from any sender.

    Raises:
        SerializationError: If it uses opcodes that CPython's pickler of protocol 4 and 5 does not, or claims more
            bytes than it has.
    """
    return _with_requests_of_short(head) if len(head) <= _SHALLOW_BYTES else _with_requests(head)


def _with_requests(head: bytes) -> bytes:
    parts = _parts(head, _common_opcodes())
    if all(_kept_opcodes().fullmatch(head, start, end) for start, end, is_run in parts if is_run):
        return head
    rewrite = _up_to_a_request().sub
    pieces = [rewrite(_request_for, head[start:end]) if is_run else head[start:end] for start, end, is_run in parts]
    body = b"".join(pieces)
    return bytes((_FRAME,)) + len(body).to_bytes(8, "little") + body  # without it, each opcode is read separately


# The calls of a round often have equal short pickles, of which only the tensors beside them differ.
_with_requests_of_short = functools.lru_cache(maxsize=64)(_with_requests)


def check_depth(head: bytes, obj: Any) -> None:
    """Check that the object of a pickle does not nest containers too deeply.

    The walk is by levels, without recursion.

    Args:
        head: The pickle.
        obj: The object loaded from it.

    Raises:
        SerializationError: If containers lie in each other more than `MAX_DEPTH` deep.
    """
    seen: set[int] = set()
    level = [obj]
    for _ in range(MAX_DEPTH if len(head) > _SHALLOW_BYTES else 0):
        parts = gc.get_referents(*level)
        if _CONTAINERS.isdisjoint(map(type, parts)):
            return
        unseen = {id(part): part for part in parts if type(part) in _CONTAINERS and id(part) not in seen}
        seen.update(unseen)
        level = list(unseen.values())
    if len(head) > _SHALLOW_BYTES and level:
        raise SerializationError(
            f"a pickle nests objects more than {MAX_DEPTH} deep: send a flat list or tensor of them"
        )


def _parts(head: bytes, common: re.Pattern[bytes]) -> list[tuple[int, int, bool]]:
    """Check the opcodes of a pickle; return its parts: start, end, and whether it is a run of common opcodes.

    The other parts are opcodes with long arguments. Frames are left out: a frame gives the bytes to read ahead, a
    number that changes as opcodes are replaced.
    """
    parts: list[tuple[int, int, bool]] = []
    position, size = 0, len(head)
    match = common.match
    while True:
        end = match(head, position).end()  # type: ignore[union-attr]  # it matches nothing, too
        parts.append((position, end, True))
        position = end
        op = head[position] if position < size else None
        if op == _STOP:
            parts.append((position, size, False))
            break
        if op == _FRAME:
            position += 9
            if _after_counted(head, position - 9, 8) > size:
                raise _claim()
        elif op in _COUNTED_BY_MORE:
            position = _after_counted(head, position, _COUNTED_BY_MORE[op])
            parts.append((end, position, False))
        else:
            raise _refusal(head, position)
        if position > size:
            raise _claim()
    return parts


def _common_opcode(*first: bytes, one_byte: bytes, is_single: bool = False) -> bytes:
    """Return a pattern of one opcode with less than 256 bytes of argument, or of one of ``first``.

    Opcodes without argument are matched in runs, unless ``is_single``.
    """

    fixed = [re.escape(bytes((op,))) + b".{%d}" % num_bytes for op, num_bytes in _FIXED.items()]
    one = b"[" + re.escape(one_byte) + (b"]" if is_single else b"]++")
    return b"(?s:" + b"|".join((*first, one, *fixed, *map(_counted, _COUNTED_BY_1))) + b")"


def _counted(op: int, then: bytes = b"") -> bytes:
    """Return a pattern of an opcode whose argument has its length in the first byte."""
    by_length = b"|".join(re.escape(bytes((length,))) + b".{%d}" % length for length in range(256))
    return re.escape(bytes((op,))) + b"(?:" + by_length + b")" + then


_PROTOCOL = rb"\x80[\x00-\x05]"


@functools.cache
def _common_opcodes() -> re.Pattern[bytes]:
    """A run of opcodes; a loop in Python would take three times as long."""
    return re.compile(_common_opcode(_PROTOCOL, one_byte=_ONE_BYTE) + b"*+")


@functools.cache
def _kept() -> bytes:
    """A pattern of a run of opcodes that stay as they are.

    The pattern includes a new list of atoms, and a new dict of atoms with texts as keys: their opcodes change only
    that list or dict, and hashing such keys takes no time.
    """
    atom = _common_opcode(rb"K.K.\x86", one_byte=b"N\x88\x89)", is_single=True) + rb"\x94?"
    entry = _counted(_SHORT_BINUNICODE, b"\x94") + atom
    flat_list = rb"\]\x94?(?:(?:\((?:" + atom + rb")++e)++|" + atom + rb"a)"
    flat_dict = rb"\}\x94?(?:(?:\((?:" + entry + rb")++u)++|" + entry + rb"s)"
    one_byte = _HARMLESS.translate(None, b"]}")
    return _common_opcode(_PROTOCOL, flat_list, flat_dict, rb"[\]}]", one_byte=one_byte) + b"*+"


@functools.cache
def _kept_opcodes() -> re.Pattern[bytes]:
    return re.compile(_kept())


@functools.cache
def _up_to_a_request() -> re.Pattern[bytes]:
    """A run of opcodes that stay as they are, and the opcode behind it, which is replaced."""
    return re.compile(b"(" + _kept() + b")([" + re.escape(b"".join(_REQUESTS)) + b"]|\\Z)", re.DOTALL)


@functools.cache
def _plain_data() -> re.Pattern[bytes]:
    one_byte = re.escape(b"(N\x88\x89)]}t\x85\x86\x87aesu\x94")
    numbers = [re.escape(bytes((op,))) + b".{%d}" % _FIXED[op] for op in (_BININT1, _BININT2, _BININT, _BINFLOAT)]
    opcode = b"|".join((b"[" + one_byte + b"]++", *numbers, *map(_counted, _COUNTED_BY_1)))
    return re.compile(rb"(?s:\x80[\x04\x05](?:\x95.{8})?(?:" + opcode + rb")*+\.)")


@functools.cache
def _opcodes_of_sequences() -> re.Pattern[bytes]:
    one_byte = _ONE_BYTE.translate(None, bytes((_BUILD, _SETITEM, _SETITEMS, _ADDITEMS, _FROZENSET)))
    return re.compile(_common_opcode(_PROTOCOL, one_byte=one_byte) + b"*+")


def _after_counted(head: bytes, position: int, width: int) -> int:
    start = position + 1 + width
    return start + int.from_bytes(head[position + 1 : start], "little")


def _claim() -> SerializationError:
    return SerializationError("a pickle claims more bytes than it has")


def _refusal(head: bytes, position: int) -> SerializationError:
    if position >= len(head):
        return SerializationError("a pickle is cut short")
    return SerializationError(
        f"a pickle has the opcode {head[position : position + 1]!r} at byte {position}, which is damaged or not from "
        f"here: send what torchfedrpc packed"
    )
