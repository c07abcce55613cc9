"""Pickles the classes of an interactive session by value, with the functions, globals and modules that they use."""

from __future__ import annotations

import contextlib
import io
import linecache
import marshal
import os
import pickle
import types
from collections.abc import Iterator
from typing import Any

import cloudpickle

from torchfedrpc.errors import ConfigError
from torchfedrpc.interactive import session_names


def pack_session(learner: Any) -> bytes:
    """Pickle all classes of the session, and the learner, as they are now, for `adopt_session`.

    A class that cannot be pickled is left out, unless the learner uses it.

    Args:
        learner: The learner's class or factory.

    Raises:
        ConfigError: If the learner uses something that cannot be pickled; the message names it.
    """
    needed = {learner.__qualname__.partition(".")[0]} if _is_of_session(learner) else set()
    names = {
        name: value
        for name, value in session_names().items()
        if name in needed or (isinstance(value, type) and value.__qualname__ == name and _is_of_session(value))
    }
    try:
        return _pack((_sources(), names))
    except Exception:
        names = {name: value for name, value in names.items() if name in needed or _can_travel(value)}
    try:
        return _pack((_sources(), names))
    except Exception as error:
        used = next((place for place, value in _used_by(learner) if not _can_travel(value)), "something")
        raise ConfigError(
            f"the learner {learner.__qualname__} cannot be sent to worker processes: its code uses {used}, which "
            f"cannot be pickled ({error}): make it in the learner's constructor, put the code that uses it into a "
            f"module and import that, or set runtime.execution_mode=local"
        ) from error


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # it has no types
    """Keeps the file names of code, which tracebacks show, and notes the objects that it has pickled."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.seen: dict[int, Any] = {}

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, types.CodeType):
            return marshal.loads, (marshal.dumps(obj),)
        return super().reducer_override(obj)

    def persistent_id(self, obj: Any) -> None:
        self.seen[id(obj)] = obj


def _pack(value: object) -> bytes:
    file = io.BytesIO()
    _Pickler(file).dump(value)
    return file.getvalue()


def _can_travel(value: object) -> bool:
    try:
        _pack(value)
    except Exception:
        return False
    return True


def _is_of_session(value: object) -> bool:
    return getattr(value, "__module__", None) == "__main__"


def _sources() -> dict[str, list[str]]:
    """Return the lines of cells, which no file has, by the file name of their code."""
    cache = list(linecache.cache.items())
    return {file: entry[2] for file, entry in cache if len(entry) == 4 and not os.path.exists(file)}


def _used_by(learner: object) -> Iterator[tuple[str, Any]]:
    """Yield the globals, and attributes of classes, that a learner's code uses, up to the first that is refused."""
    pickler = _Pickler(io.BytesIO())
    with contextlib.suppress(Exception):
        pickler.dump(learner)
    seen = pickler.seen
    classes = [one for one in seen.values() if isinstance(one, type) and _is_of_session(one)]
    for names, where in ((session_names(), "the global "), *((vars(one), f"{one.__qualname__}.") for one in classes)):
        for name, value in list(names.items()):
            if id(value) in seen and not isinstance(value, type | types.FunctionType | types.ModuleType):
                yield f"{where}{name} (a {type(value).__name__})", value
