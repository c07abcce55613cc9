"""How pickles make numpy's arrays: by functions that check what numpy takes on trust.

Numpy's own would read any bytes as pointers to objects (an array of objects made on a buffer, a dtype whose fields
become objects after its array was made) and read past the end of memory (fields and counters out of range).
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from torchfedrpc.errors import SerializationError

_SIMPLE_DTYPE = re.compile(r"[<>|=]?[?bBhHiIlLqQefdgFDGSUVOMmaic]\d*|[<>|=]?u\d+")
_ALIGNED_STRUCT = 0x80
_MT19937_WORDS, _PHILOX_WORDS = 624, 4
_from_bytes: Any = getattr(np, "_core", None) or np.core  # the latter before numpy 2


def is_generator(obj: object) -> bool:
    """Whether it is a random generator of numpy's."""
    return isinstance(obj, (np.random.BitGenerator, np.random.Generator, np.random.RandomState))


class ArrayClass:
    """Stands for a class of arrays in a pickle, which may name it for `reconstruct` and not call it.

    Args:
        cls: `numpy.ndarray` or a class derived from it.
    """

    __slots__ = ("cls",)

    def __init__(self, cls: type[np.ndarray[Any, Any]]) -> None:
        self.cls = cls

    def __repr__(self) -> str:
        return f"<the array class {self.cls.__module__}.{self.cls.__qualname__}, in a pickle>"


def reconstruct(array_class: Any, shape: Any, type_code: Any) -> Any:
    """An empty array, whose state is to follow: what numpy's pickles begin with.

    Raises:
        SerializationError: another call than numpy's own pickles make.
    """
    if not isinstance(array_class, ArrayClass) or shape != (0,) or type_code not in (b"b", "b"):
        raise SerializationError("a pickle makes an array in a way that numpy's own pickles do not")
    return _from_bytes.multiarray._reconstruct(array_class.cls, shape, type_code)


def make_dtype(name: Any, align: Any = False, copy: Any = True) -> np.dtype[Any]:
    """A dtype without fields, of its own, whose state may follow.

    Args:
        name: its kind and size, such as ``f8``.
        align: numpy's pickles have it; without fields it says nothing.
        copy: the same; a common dtype must not be changed by a state, so there is always a copy.

    Raises:
        SerializationError: another call than numpy's own pickles make.
    """
    if not isinstance(name, str) or not _SIMPLE_DTYPE.fullmatch(name):
        raise SerializationError(f"a pickle makes a numpy dtype of {name!r}, which numpy's own pickles do not")
    return np.dtype(name, copy=True)


def set_array_state(array: Any, state: Any) -> None:
    """Give an array from `reconstruct` its shape, dtype and values.

    Raises:
        SerializationError: it has them, or they do not agree with each other.
    """
    if array.shape != (0,) or array.dtype != np.int8:
        raise SerializationError("a pickle changes an array that is in use")  # others may look into its memory
    match state:
        case (int(), tuple(shape), np.dtype() as dtype, bool() | int(), content, *_) if all(
            type(size) is int and size >= 0 for size in shape
        ):
            count = math.prod(shape)
            if dtype.hasobject:
                fits = dtype == np.dtype(object) and type(content) is list and len(content) == count
            else:
                fits = isinstance(content, bytes | str) and len(content) == count * dtype.itemsize
            if fits:
                array.__setstate__(state)
                return
    raise SerializationError("a pickle holds an array whose shape, dtype and values do not agree")


def set_dtype_state(dtype: np.dtype[Any], state: Any) -> None:
    """Give a dtype from `make_dtype` its byte order, fields or unit; its size and what it refers to stay.

    Raises:
        SerializationError: they do not agree with the dtype, or fields are objects.
    """
    version, order, base, names, fields, itemsize, alignment, flags, *metadata = state
    if dtype.kind == "V":
        proper = _void_dtype(dtype.itemsize, base, names, fields, flags)
        if proper.hasobject or proper.itemsize != dtype.itemsize or itemsize != dtype.itemsize:
            raise SerializationError(
                "a numpy dtype whose fields are objects or do not fit into it cannot be read: send a dict of arrays"
            )
        plain_state: Any = proper.__reduce__()
        order, base, names, fields, itemsize, alignment, flags = plain_state[2][1:8]
    elif not (
        base is names is fields is None
        and itemsize in (-1, dtype.itemsize)
        and alignment in (-1, dtype.alignment)
        and flags == dtype.flags
    ):
        raise SerializationError(f"a pickle makes of the numpy dtype {dtype} what it is not")
    setter: Any = dtype
    setter.__setstate__((version, order, base, names, fields, itemsize, alignment, flags, *metadata))


def check_generator(generator: Any) -> None:
    """Refuse a random generator that would read beyond its state.

    Args:
        generator: a bit generator, `numpy.random.Generator` or `RandomState`, its state already set.

    Raises:
        SerializationError: so it would.
    """
    bits = getattr(generator, "_bit_generator", generator)
    state: Any = bits.state
    if isinstance(bits, np.random.MT19937):
        fits = 0 <= state["state"]["pos"] <= _MT19937_WORDS
    elif isinstance(bits, np.random.Philox):
        fits = 0 <= state["buffer_pos"] <= _PHILOX_WORDS
    else:
        fits = True
    if not fits:
        raise SerializationError("a random generator of numpy has a state that is out of range")


def _void_dtype(num_bytes: int, base: Any, names: Any, fields: Any, flags: Any) -> np.dtype[Any]:
    if base is not None:
        inner, shape = base
        return np.dtype((_known(inner), shape))
    if not names:
        return np.dtype(f"V{num_bytes}")
    parts = [fields[name] for name in names]
    spec = {
        "names": list(names),
        "formats": [_known(part[0]) for part in parts],
        "offsets": [part[1] for part in parts],
        "titles": [part[2] if len(part) > 2 else None for part in parts],
        "itemsize": num_bytes,
    }
    return np.dtype(spec, align=bool(flags & _ALIGNED_STRUCT))  # type: ignore[call-overload,no-any-return]


def _known(dtype: Any) -> np.dtype[Any]:
    if not isinstance(dtype, np.dtype):
        raise SerializationError(f"a pickle has {dtype!r} where a numpy dtype belongs")
    return dtype
