"""The opcodes of a pickle, checked and rewritten before it is loaded.

CPython's unpickler makes numbers, texts, tuples and empty containers by itself. Every opcode that calls, makes or
changes an object is replaced by a request to ``persistent_load``, where `rebuild` holds the rules.
"""

from __future__ import annotations

import functools
import re

from torchfedrpc.errors import SerializationError

MAX_DEPTH = 2000
"""Levels of objects inside objects. Some types free or hash their content by C recursion, which ends the process
where the stack does: 3,000 nested arrays of objects are enough, and 200,000 nested tuples."""

HARMLESS_ARRAYS, _HARMLESS_MADE = 600, 50_000  # fewer arrays, or objects, cannot exhaust a stack however they nest

# The opcodes of protocols 4 and 5, as CPython's pickler writes them. Missing are the older ones (which can place
# an object at memo entry 2**31, and so claim 32 GiB), those of extension registries and persistent ids.
_PROTO, _FRAME, _STOP, _MARK, _POP, _POP_MARK = b"\x80\x95.(01"
_NONE, _NEWTRUE, _NEWFALSE, _BININT, _BININT1, _BININT2, _BINFLOAT, _LONG1, _LONG4 = b"N\x88\x89JKMG\x8a\x8b"
_SHORT_BINBYTES, _BINBYTES, _BINBYTES8, _BYTEARRAY8, _NEXT_BUFFER, _READONLY_BUFFER = b"CB\x8e\x96\x97\x98"
_SHORT_BINUNICODE, _BINUNICODE, _BINUNICODE8 = b"\x8cX\x8d"
_EMPTY_TUPLE, _EMPTY_LIST, _EMPTY_DICT, _EMPTY_SET = b")]}\x8f"
_TUPLE, _TUPLE1, _TUPLE2, _TUPLE3, _FROZENSET = b"t\x85\x86\x87\x91"
_APPEND, _APPENDS, _SETITEM, _SETITEMS, _ADDITEMS = b"aesu\x90"
_MEMOIZE, _BINGET, _LONG_BINGET = b"\x94hj"
_STACK_GLOBAL, _REDUCE, _NEWOBJ, _NEWOBJ_EX, _BUILD = b"\x93R\x81\x92b"

_ONE_BYTE = b"(01N\x88\x89\x97\x98)]}\x8ft\x85\x86\x87\x91aesu\x90\x94\x93R\x81\x92b"  # all but STOP
_HARMLESS = b"(01N\x88\x89\x97\x98)]}\x8ft\x85\x86\x87\x94\x93"  # those of them that are not replaced
_MAKERS = b"(]})\x8f\x85\x86\x87R\x81\x92"  # each object with content needs one of these of its own
_FIXED = {_BININT1: 1, _BININT2: 2, _BININT: 4, _BINFLOAT: 8, _BINGET: 1, _LONG_BINGET: 4}
_COUNTED_BY_1 = (_SHORT_BINUNICODE, _SHORT_BINBYTES, _LONG1)
_COUNTED_BY_MORE = {_BINUNICODE: 4, _BINBYTES: 4, _LONG4: 4, _BINUNICODE8: 8, _BINBYTES8: 8, _BYTEARRAY8: 8}

# What opcodes with a rule become: their operands as one tuple (target, argument, opcode), and BINPERSID.
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


def check_opcodes(head: bytes) -> None:
    """Check a pickle that an unpickler with a strict ``find_class`` is about to load without requests.

    Args:
        head: a pickle from any sender.

    Raises:
        SerializationError: If it uses opcodes that CPython's pickler of protocol 4 and 5 does not, sets the state of
            an object, fills a dict or a set (hashing can take for ever), claims more bytes than it has, or nests too
            many objects too deeply.
    """
    _parts(head, _opcodes_of_sequences())


def with_requests(head: bytes) -> bytes:
    """Return a pickle in which each opcode that calls, makes or changes an object is a request.

    The unpickler passes ``(target, argument, opcode)`` to ``persistent_load`` and goes on with what that returns.
    For `REDUCE` these are the function and its arguments; for `NEWOBJ` the class and arguments (`NEWOBJ_EX`: the
    pair of arguments and keywords); for `BUILD` the object and its state; for `APPEND` the list and an item; for
    `SETITEM` the dict and the pair of key and value; for `APPENDS`, `ADDITEMS` and `SETITEMS` the container and all
    items (keys and values in turn); for `FROZENSET` the items and None.

    Args:
        head: a pickle from any sender.

    Raises:
        SerializationError: If it uses opcodes that CPython's pickler of protocol 4 and 5 does not, claims more bytes
            than it has, or nests so many objects deeper than `MAX_DEPTH` that it matters. Arrays of objects are not
            looked into: see `check_depth`.
    """
    parts = _parts(head, _common_opcodes())
    if all(_kept_opcodes().fullmatch(head, start, end) for start, end, is_run in parts if is_run):
        return head
    rewrite = _up_to_a_request().sub
    pieces = [rewrite(_request_for, head[start:end]) if is_run else head[start:end] for start, end, is_run in parts]
    body = b"".join(pieces)
    return bytes((_FRAME,)) + len(body).to_bytes(8, "little") + body  # without one, each opcode is read by itself


def _parts(head: bytes, common: re.Pattern[bytes]) -> list[tuple[int, int, bool]]:
    """Check the opcodes of a pickle; return its parts: start, end, and whether it is a run of common opcodes.

    The other parts are opcodes with long arguments. Frames are left out: a frame says how much to read ahead, which
    is another amount where opcodes are replaced.
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
    if size > _HARMLESS_MADE and _makes_more(head, parts, _HARMLESS_MADE):
        check_depth(head)
    return parts


def _common_opcode(*first: bytes, one_byte: bytes, is_single: bool = False) -> bytes:
    """A pattern of one opcode with less than 256 bytes of argument, or of one of ``first``.

    Unless it has to be a single one, it takes any number of opcodes without argument at once.
    """

    fixed = [re.escape(bytes((op,))) + b".{%d}" % num_bytes for op, num_bytes in _FIXED.items()]
    one = b"[" + re.escape(one_byte) + (b"]" if is_single else b"]++")
    return b"(?s:" + b"|".join((*first, one, *fixed, *map(_counted, _COUNTED_BY_1))) + b")"


def _counted(op: int, then: bytes = b"") -> bytes:
    """A pattern of an opcode whose argument is counted by one byte."""
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

    A new list of atoms is among them, and a new dict of atoms by texts: their opcodes change nothing but that list or
    dict, and hashing such keys takes no time.
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
    """A run of opcodes that stay as they are, and the one after it, which is replaced."""
    return re.compile(b"(" + _kept() + b")([" + re.escape(b"".join(_REQUESTS)) + b"]|\\Z)", re.DOTALL)


@functools.cache
def _opcodes_of_sequences() -> re.Pattern[bytes]:
    one_byte = _ONE_BYTE.translate(None, bytes((_BUILD, _SETITEM, _SETITEMS, _ADDITEMS, _FROZENSET)))
    return re.compile(_common_opcode(_PROTOCOL, one_byte=one_byte) + b"*+")


@functools.cache
def _opcodes_that_make_nothing() -> re.Pattern[bytes]:
    """A run of opcodes that make no object with content, or a tuple of numbers, which is never deep."""
    number = rb"(?:K.|M..|J.{4}|G.{8}|[N\x88\x89])"
    flat = number + rb"(?:\x85|" + number + rb"(?:\x86|" + number + rb"\x87?)?)?"
    protocol = rb"\x80."
    one_byte = bytes(set(_ONE_BYTE) - set(_MAKERS))
    return re.compile(_common_opcode(flat, protocol, one_byte=one_byte) + b"++")


def _makes_more(head: bytes, parts: list[tuple[int, int, bool]], limit: int) -> bool:
    """Whether more objects with content are made than that, tuples of numbers not counted."""
    runs = [head[start:end] for start, end, is_run in parts if is_run]
    if sum(len(run) - len(run.translate(None, _MAKERS)) for run in runs) <= limit:
        return False
    nothing = _opcodes_that_make_nothing()
    return sum(len(nothing.sub(b"", run)) for run in runs) > limit


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


def check_depth(head: bytes) -> None:
    """Refuse a pickle that nests objects deeper than `MAX_DEPTH`; its opcodes must be `checked` before.

    Raises:
        SerializationError: it does, or takes from the stack what is not there.
    """
    _Depths().check(head)


class _Depths:
    """How deep objects lie in each other, found by going through the opcodes without making anything.

    Objects are numbers, 0 stands for all that hold nothing. What is put into an object after that object was itself
    put somewhere makes all around it deeper, whatever that is: such additions count as a level each.
    """

    def __init__(self) -> None:
        self._depths = [0]
        self._held = [False]
        self._num_late = 0
        self._stack: list[int] = []
        self._outer: list[list[int]] = []
        self._memo: list[int] = []

    def check(self, head: bytes) -> None:
        """Go through a pickle whose opcodes are known to be complete.

        Raises:
            SerializationError: it is too deep, or asks for what is not there.
        """
        try:
            self._walk(head)
        except IndexError as error:
            raise SerializationError("a pickle takes more from the stack than there is") from error

    def _walk(self, head: bytes) -> None:
        memo, position, step = self._memo, 0, _steps()
        while (op := head[position]) != _STOP:
            stack = self._stack
            if op in _ATOMS:
                stack.append(0)
            elif op == _BINGET:
                stack.append(memo[head[position + 1]])
            elif op == _LONG_BINGET:
                stack.append(memo[int.from_bytes(head[position + 1 : position + 5], "little")])
            elif op == _MEMOIZE:
                memo.append(stack[-1])
            elif _TUPLE1 <= op <= _TUPLE3:
                self._make(self._pop(op - _TUPLE1 + 1))
            elif op in (_REDUCE, _NEWOBJ, _STACK_GLOBAL):
                self._make(self._pop(2))
            elif op == _NEWOBJ_EX:
                self._make(self._pop(3))
            elif op in (_EMPTY_LIST, _EMPTY_DICT, _EMPTY_SET):
                self._make([])
            elif op == _MARK:
                self._outer.append(stack)
                self._stack = []
            elif op in (_TUPLE, _FROZENSET):
                self._make(self._pop_mark())
            elif op in (_APPENDS, _SETITEMS, _ADDITEMS):
                content = self._pop_mark()
                self._fill(self._stack[-1], content)
            elif op in (_APPEND, _BUILD):
                self._fill(stack[-2], self._pop(1))
            elif op == _SETITEM:
                self._fill(stack[-3], self._pop(2))
            elif op == _POP_MARK or (op == _POP and not stack):
                self._pop_mark()
            elif op == _POP:
                stack.pop()
            if size := step[op]:
                position += size
            elif op in _COUNTED_BY_MORE:
                position = _after_counted(head, position, _COUNTED_BY_MORE[op])
            else:
                position += 2 + head[position + 1]

    def _pop(self, count: int) -> list[int]:
        content = self._stack[-count:]
        del self._stack[-count:]
        return content

    def _pop_mark(self) -> list[int]:
        content, self._stack = self._stack, self._outer.pop()
        return content

    def _make(self, content: list[int]) -> None:
        self._stack.append(len(self._depths))
        self._depths.append(0)
        self._held.append(False)
        if content:
            self._fill(self._stack[-1], content)

    def _fill(self, container: int, content: list[int]) -> None:
        depths, held = self._depths, self._held
        depth = 1 + max(depths[number] for number in content) if content else 0
        for number in content:
            held[number] = True
        if depth > depths[container]:
            depths[container] = depth
            self._num_late += held[container]
            if depth + self._num_late > MAX_DEPTH:
                raise SerializationError(
                    f"a pickle nests objects more than {MAX_DEPTH} deep: send a flat list or tensor of them"
                )


_ATOMS = frozenset((*_COUNTED_BY_1, *_COUNTED_BY_MORE, _NONE, _NEWTRUE, _NEWFALSE, _BININT, _BININT1, _BININT2)) | {
    _BINFLOAT,
    _EMPTY_TUPLE,
    _NEXT_BUFFER,
}


def _steps() -> list[int]:
    """For each opcode how many bytes it takes with its argument; 0 where a count before the argument says so."""
    steps = [0] * 256
    for op in (*_ONE_BYTE, _BUILD):
        steps[op] = 1
    for op, num_bytes in _FIXED.items():
        steps[op] = 1 + num_bytes
    steps[_PROTO], steps[_FRAME] = 2, 9
    return steps
