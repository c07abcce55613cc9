"""Numpy's arrays, dtypes, scalars and generators, taken apart into plain parts and put together by rule.

Numpy's own reconstruction functions never run on data from a sender: they can be made to take bytes for pointers to
objects, and to read past the end of memory. Here the bytes of an array are checked against its shape and dtype, and
arrays of objects are filled item by item.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from torchfedrpc.errors import SerializationError
from torchfedrpc.wire.tensors import SPREAD, reach

_SPREAD_BYTES = 1 << 16  # always allowed for memory with gaps; otherwise `SPREAD` times the elements' size

_SIMPLE_DTYPE = re.compile(
    r"[<>|=]?(?:[?bBhHiIlLqQefdgFDGOc]|[biufcSUVO?]\d{1,9}|[SUV]|[Mm]8?(?:\[\d{0,9}[A-Za-z]{1,2}\])?)"
)
_ALIGNMENT_BYTES = 16  # of memory that numpy allocates
_MT19937_WORDS, _PHILOX_WORDS = 624, 4
_BIT_GENERATORS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")
_MAX_POOL_WORDS = 1024  # of a SeedSequence: 4 by default, mixing takes the square of it
_MAX_SEED_BITS = 1 << 16
_MAX_FIELDS = 1000  # of a dtype, with the fields of its fields, each counted as often as it occurs

# A dtype: its ``str``; ("struct", names, formats, offsets, titles, itemsize, aligned); ("sub", base, shape); or
# ("metadata", dtype, metadata).
_DtypeParts = Any


# Taken apart.


def take_apart(obj: Any) -> tuple[Any, ...] | None:
    """Return the kind and the parts of an object of numpy's, for `put_together`; None for any other object.

    The last part of an ``array`` is its memory. The parts of ``objects`` lack the items, which `fill` takes.

    Raises:
        SerializationError: If it is a masked array or a memory map, or the elements of its dtype own memory.
    """
    if isinstance(obj, np.ndarray):
        return _array_parts(obj)
    if isinstance(obj, np.generic):
        return "scalar", dtype_parts(obj.dtype), obj.tobytes()
    if isinstance(obj, np.dtype):
        return "dtype", dtype_parts(obj)
    if isinstance(obj, np.random.Generator):
        return "generator", obj.bit_generator
    if isinstance(obj, np.random.RandomState):
        return "random_state", obj._bit_generator, _gauss(obj)
    if isinstance(obj, np.random.BitGenerator):
        return _bit_generator_parts(obj)
    if isinstance(obj, np.random.SeedSequence):
        return "seed_sequence", obj.entropy, tuple(obj.spawn_key), obj.pool_size, obj.n_children_spawned
    return None


def items_of(array: np.ndarray[Any, Any]) -> list[Any]:
    """Return the items of an array of objects, in C order."""
    return array.reshape(-1).tolist() if array.ndim else [array.item()]


def dtype_parts(dtype: np.dtype[Any]) -> _DtypeParts:
    """Return the plain parts of a dtype.

    Raises:
        SerializationError: If they do not make the same dtype, for example because another package defines it.
    """
    if dtype.metadata is not None:
        return "metadata", _plain_dtype_parts(np.dtype(dtype, metadata={})), dict(dtype.metadata)
    return _plain_dtype_parts(dtype)


@functools.lru_cache(256)
def _plain_dtype_parts(dtype: np.dtype[Any]) -> _DtypeParts:
    parts: _DtypeParts
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        parts = ("sub", dtype_parts(base), shape)
    elif dtype.names is not None:
        if dtype.hasobject:
            raise _records_of_objects()
        fields: Any = [dtype.fields[name] for name in dtype.names]  # type: ignore[index]
        parts = (
            "struct",
            dtype.names,
            tuple(dtype_parts(field[0]) for field in fields),
            tuple(field[1] for field in fields),
            tuple(field[2] if len(field) > 2 else None for field in fields),
            dtype.itemsize,
            dtype.isalignedstruct,
        )
    else:
        parts = dtype.str
    try:
        made = _make_dtype(parts)
        is_same = made == dtype and type(made) is type(dtype)
    except (SerializationError, TypeError, ValueError):
        is_same = False
    if not is_same:
        raise SerializationError(
            f"a numpy array of dtype {dtype} cannot travel: send it by astype() as one of numbers, bytes, "
            f"text or objects"
        )
    return parts


def _array_parts(array: np.ndarray[Any, Any]) -> tuple[Any, ...] | None:
    if isinstance(array, np.ma.MaskedArray):
        raise SerializationError("a masked numpy array cannot travel: send its data and its mask as two arrays")
    if isinstance(array, np.memmap):
        raise SerializationError(
            "a numpy.memmap cannot travel, it is a file's: send numpy.array(it), or its file name"
        )
    if type(array).__reduce__ is not np.ndarray.__reduce__:
        return None  # the class defines how it is pickled
    cls = None if type(array) is np.ndarray else type(array)
    own = getattr(array, "__dict__", None) or None
    array = array.view(np.ndarray) if cls is not None else array
    flags, shape = int(array.flags.writeable), array.shape
    dtype = dtype_parts(array.dtype)
    if array.dtype.hasobject:  # of objects alone: `dtype_parts` refuses records with some
        return "objects", cls, own, flags, array.shape, _layout(array)
    layout = _layout(array)
    if layout == "F":
        array = array.T
    elif layout != "C":
        array = np.ascontiguousarray(array[tuple(slice(0, 1) if not step else slice(None) for step in array.strides)])
    return "array", cls, own, flags, shape, layout, dtype, _memory(array)


def _layout(array: np.ndarray[Any, Any]) -> str | tuple[tuple[int, ...], int, int]:
    """Return how the elements lie in memory: "C", "F", or strides, start and size of a block of memory, in bytes."""
    if array.flags.c_contiguous:
        return "C"
    if array.flags.f_contiguous:
        return "F"
    low, high = reach(array.shape, array.strides)
    gap = (array.__array_interface__["data"][0] + low) % _ALIGNMENT_BYTES
    start, num_bytes = gap - low, gap + high - low + array.itemsize
    num_compact = math.prod(size for size, step in zip(array.shape, array.strides, strict=True) if step)
    if not _may_spread(num_compact * array.itemsize, num_bytes):
        raise SerializationError(
            f"a numpy array whose {num_compact * array.itemsize} bytes lie in {num_bytes} bytes of memory cannot "
            f"travel as it is: send a copy of it"
        )
    return array.strides, start, num_bytes


def _may_spread(num_bytes: int, num_memory_bytes: int) -> bool:
    return 0 <= num_memory_bytes <= max(_SPREAD_BYTES, SPREAD * num_bytes)


def _memory(array: np.ndarray[Any, Any]) -> memoryview:
    """Return the memory of a C-contiguous array, as bytes."""
    flat: Any = array.reshape(-1)
    return flat.view(np.uint8).data if flat.nbytes else memoryview(b"")  # also where Python's buffers lack the dtype


def _gauss(generator: np.random.RandomState) -> dict[str, Any] | None:
    """Return the state of a generator that holds a normal variate drawn ahead."""
    state: Any = generator.get_state(legacy=False)
    return state if state["has_gauss"] else None


def _bit_generator_parts(bits: np.random.BitGenerator) -> tuple[Any, ...]:
    name = type(bits).__name__
    if name not in _BIT_GENERATORS or type(bits) is not getattr(np.random, name):
        raise SerializationError(f"a bit generator of type {type(bits).__qualname__} cannot travel: use numpy's own")
    seeds: Any = getattr(bits, "seed_seq", None)
    return "bit_generator", name, seeds if isinstance(seeds, np.random.SeedSequence) else None, bits.state


# Put together.


def put_together(kind: str, parts: tuple[Any, ...], *, owned: bool, max_items: int = 1 << 20) -> Any:
    """Return the object that `take_apart` took apart.

    Args:
        kind: From `take_apart`.
        parts: From `take_apart`; they may be forged.
        owned: Whether an array may lie in the memory among its parts, instead of a copy.
        max_items: The most items that can follow for an array of objects.

    Raises:
        SerializationError: If they do not agree with each other.
    """
    if kind in _ARRAYS:
        return _make_array(kind, *parts, owned=owned, max_items=max_items)
    return _MAKERS[kind](*parts)


def is_kind(kind: Any) -> bool:
    """Return whether `put_together` knows that kind."""
    return kind in _MAKERS or kind in _ARRAYS


def fill(array: np.ndarray[Any, Any], items: Any, *, is_writeable: bool) -> None:
    """Put the items into an array of objects, in C order.

    Args:
        array: From `put_together`.
        items: A list of its items.
        is_writeable: Whether it may be written afterwards.

    Raises:
        SerializationError: If they are not as many as its elements.
    """
    if type(items) is not list or len(items) != array.size:
        raise SerializationError("a numpy array of objects came with another number of items than it has elements")
    flat: Any = array.view(np.ndarray).flat
    for index, item in enumerate(items):  # one by one: `flat[:] = items` would look into items that are sequences
        flat[index] = item
    if not is_writeable:
        array.flags.writeable = False


def _make_dtype(parts: Any, made: list[int] | None = None) -> np.dtype[Any]:
    made = made if made is not None else []
    made.append(1)
    if len(made) > _MAX_FIELDS:
        raise SerializationError(f"a numpy dtype has more than {_MAX_FIELDS} parts")
    match parts:
        case str() if _SIMPLE_DTYPE.fullmatch(parts):
            return np.dtype(parts)
        case ("sub", base, tuple(shape)) if _is_shape(shape):
            return np.dtype((_make_dtype(base, made), shape))
        case ("metadata", inner, dict(metadata)):
            plain = _make_dtype(inner, made)
            return np.dtype(plain, metadata=metadata)
        case (
            "struct",
            tuple(names),
            tuple(formats),
            tuple(offsets),
            tuple(titles),
            int(size),
            bool(aligned),
        ) if len(names) <= _MAX_FIELDS and all(
            type(name) is str for name in (*names, *(title for title in titles if title is not None))
        ):
            spec = {
                "names": list(names),
                "formats": [_make_dtype(part, made) for part in formats],
                "offsets": list(offsets),
                "titles": list(titles),
                "itemsize": size,
            }
            dtype: np.dtype[Any] = np.dtype(spec, align=aligned)  # type: ignore[call-overload]
            if dtype.hasobject:
                raise _records_of_objects()
            return dtype
    raise SerializationError("a pickle makes a numpy dtype of parts that make none")


def _records_of_objects() -> SerializationError:
    return SerializationError("a numpy array of records that hold objects cannot travel: send a dict of arrays")


def _is_shape(shape: Any) -> bool:
    return type(shape) is tuple and len(shape) <= 64 and all(type(size) is int and size >= 0 for size in shape)


def _make_array(
    kind: str, cls: Any, own: Any, flags: Any, *parts: Any, owned: bool, max_items: int
) -> np.ndarray[Any, Any]:
    array = _empty_objects(*parts, max_items=max_items) if kind == "objects" else _filled(*parts, owned=owned)
    if flags != 1 and kind != "objects":  # the items are filled first
        array.flags.writeable = False
    if cls is not None:
        if not (isinstance(cls, type) and issubclass(cls, np.ndarray)):
            raise SerializationError(f"a {type(cls).__qualname__} is not a class of arrays")
        array = array.view(cls)
        if own is not None:
            if type(own) is not dict:
                raise SerializationError("a numpy array came with attributes that are no dict")
            array.__dict__.update(own)
    return array


def _empty_objects(shape: Any, layout: Any, *, max_items: int) -> np.ndarray[Any, Any]:
    _check_shape(shape)
    if math.prod(shape) > max_items:
        raise SerializationError("a numpy array of objects came with a shape for more items than a pickle has bytes")
    if layout in ("C", "F"):
        return np.empty(shape, object, layout)
    return _strided(shape, layout, np.dtype(object), math.prod(shape) * np.dtype(object).itemsize)


def _filled(shape: Any, layout: Any, dtype_of: Any, memory: Any, *, owned: bool) -> np.ndarray[Any, Any]:
    dtype = _make_dtype(dtype_of)
    _check_shape(shape)
    if layout in ("C", "F"):
        raw = _bytes_of(memory, math.prod(shape), dtype)
        if owned and raw.nbytes and not raw.readonly:
            return np.ndarray(shape, dtype, raw, order=layout)
        array: np.ndarray[Any, Any] = np.empty(shape, dtype, layout)  # memory that numpy owns can be resized
        if raw.nbytes:
            target: Any = array.T if layout == "F" else array
            target.reshape(-1).view(np.uint8)[:] = np.frombuffer(raw, np.uint8)
        return array
    steps = layout[0] if type(layout) is tuple and layout else ()
    if type(steps) is not tuple or len(steps) != len(shape):
        raise _bad_layout()
    compact = tuple(min(size, 1) if not step else size for size, step in zip(shape, steps, strict=True))
    raw = _bytes_of(memory, math.prod(compact), dtype)
    array = _strided(shape, layout, dtype, raw.nbytes)
    array[tuple(slice(0, size) for size in compact)] = np.frombuffer(raw, dtype).reshape(compact)
    return array


def _strided(shape: Any, layout: Any, dtype: np.dtype[Any], num_bytes: int) -> np.ndarray[Any, Any]:
    """Return a new array with the given memory layout, which is checked."""
    match layout:
        case (tuple(strides), int(start), int(num_memory_bytes)) if len(strides) == len(shape) and all(
            type(step) is int for step in strides
        ):
            low, high = reach(shape, strides)
            if (
                start + low >= 0
                and start + high + dtype.itemsize <= num_memory_bytes
                and 0 not in shape
                and _may_spread(num_bytes, num_memory_bytes)
            ):
                if not dtype.hasobject:
                    memory = np.zeros(num_memory_bytes, np.uint8)
                    return np.ndarray(shape, dtype, memory, start, strides)
                if not any(offset % dtype.itemsize for offset in (start, num_memory_bytes, *strides)):
                    slots = np.empty(num_memory_bytes // dtype.itemsize, object)
                    return np.lib.stride_tricks.as_strided(slots[start // dtype.itemsize :], shape, strides)
    raise _bad_layout()


def _check_shape(shape: Any) -> None:
    if not _is_shape(shape):
        raise SerializationError("a numpy array came with a shape that is none")


def _bad_layout() -> SerializationError:
    return SerializationError("a numpy array came with strides that do not fit into its memory")


def _bytes_of(memory: Any, count: int, dtype: np.dtype[Any]) -> memoryview:
    try:
        raw = memoryview(memory).cast("B")
    except TypeError:
        raise SerializationError("a numpy array came without its bytes") from None
    if dtype.hasobject or not dtype.itemsize or raw.nbytes != count * dtype.itemsize:
        raise SerializationError("a numpy array came with another number of bytes than its shape and dtype need")
    return raw


def _make_scalar(dtype_of: Any, memory: Any) -> Any:
    dtype = _make_dtype(dtype_of)
    if not dtype.itemsize and not len(memory):
        return dtype.type()  # an empty text
    return _filled((), "C", dtype_of, memory, owned=False)[()]


def _make_seeds(entropy: Any, spawn_key: Any, pool_size: Any, num_spawned: Any) -> np.random.SeedSequence:
    numbers = [entropy] if isinstance(entropy, int) else list(entropy) if isinstance(entropy, list | tuple) else None
    if (
        (entropy is not None and numbers is None)
        or not all(isinstance(number, int) for number in numbers or ())
        or type(spawn_key) is not tuple
        or not all(type(key) is int for key in spawn_key)
        or not (type(pool_size) is int and pool_size <= _MAX_POOL_WORDS)
        or type(num_spawned) is not int
        or sum(number.bit_length() for number in (*(numbers or ()), *spawn_key)) > _MAX_SEED_BITS
    ):
        raise SerializationError("a pickle makes a numpy SeedSequence of parts that make none")
    return np.random.SeedSequence(entropy, spawn_key=spawn_key, pool_size=pool_size, n_children_spawned=num_spawned)


def _make_bits(name: Any, seeds: Any, state: Any) -> np.random.BitGenerator:
    if name not in _BIT_GENERATORS or not (seeds is None or type(seeds) is np.random.SeedSequence):
        raise SerializationError("a pickle makes a bit generator of parts that make none")
    # Only a constructor allocates the state. RandomState seeds its bits without a SeedSequence.
    is_legacy = name == "MT19937" and seeds is None
    bits: Any = np.random.RandomState(0)._bit_generator if is_legacy else getattr(np.random, name)(seeds)
    if not isinstance(state, dict) or not isinstance(state.get("state"), dict):
        raise SerializationError("a random generator of numpy came without its state")
    inner = state["state"]
    if name == "MT19937":
        key = inner.get("key")
        fits = isinstance(key, np.ndarray) and key.dtype == np.uint32 and key.shape == (_MT19937_WORDS,)
        fits = fits and _is_within(inner.get("pos"), _MT19937_WORDS)
    elif name == "Philox":
        fits = _is_within(state.get("buffer_pos"), _PHILOX_WORDS) and all(
            isinstance(array, np.ndarray) and array.dtype == np.uint64 and array.shape == (count,)
            for array, count in ((inner.get("counter"), 4), (inner.get("key"), 2), (state.get("buffer"), 4))
        )
    elif name == "SFC64":
        words = inner.get("state")
        fits = isinstance(words, np.ndarray) and words.dtype == np.uint64 and words.shape == (4,)
    else:
        fits = all(type(inner.get(part)) is int for part in ("state", "inc"))
    if not fits:
        raise SerializationError("a random generator of numpy has a state that is out of range")
    bits.state = state
    return bits  # type: ignore[no-any-return]


def _is_within(index: Any, last: int) -> bool:
    return type(index) is int and 0 <= index <= last


def _make_generator(bits: Any) -> np.random.Generator:
    return np.random.Generator(_known_bits(bits))


def _make_random_state(bits: Any, gauss: Any) -> np.random.RandomState:
    generator = np.random.RandomState(_known_bits(bits))
    if gauss is not None:
        drawn = (gauss.get("has_gauss"), gauss.get("gauss")) if type(gauss) is dict else ()
        if type(bits) is not np.random.MT19937 or tuple(map(type, drawn)) != (int, float):
            raise SerializationError("a random generator of numpy has a state that is out of range")
        known = generator.get_state(legacy=False)
        generator.set_state({**known, "has_gauss": int(gauss["has_gauss"]), "gauss": float(gauss["gauss"])})
    return generator


def _known_bits(bits: Any) -> np.random.BitGenerator:
    if not isinstance(bits, np.random.BitGenerator):
        raise SerializationError("a pickle makes a random generator of numpy without its bit generator")
    return bits


_ARRAYS = ("array", "objects")
_MAKERS: dict[str, Callable[..., Any]] = {
    "dtype": _make_dtype,
    "scalar": _make_scalar,
    "seed_sequence": _make_seeds,
    "bit_generator": _make_bits,
    "generator": _make_generator,
    "random_state": _make_random_state,
}
