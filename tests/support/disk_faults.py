"""A disk that fails, or a process that is killed, at one step of SQLite's or of a rename: for tests of storage."""

from __future__ import annotations

import _sqlite3
import contextlib
import ctypes
import errno
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

_Write = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, use_errno=True)
_WriteAt = ctypes.CFUNCTYPE(
    ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, use_errno=True
)
_Truncate = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int64, use_errno=True)
_Unlink = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, use_errno=True)
_CALLS = {"write": _Write, "pwrite": _WriteAt, "pwrite64": _WriteAt, "ftruncate": _Truncate, "unlink": _Unlink}
_Set = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_Get = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)


class _Vfs(ctypes.Structure):
    """The beginning of SQLite's ``struct sqlite3_vfs``."""

    _fields_ = (
        *(("version", ctypes.c_int), ("file_bytes", ctypes.c_int), ("max_path", ctypes.c_int)),
        *((name, ctypes.c_void_p) for name in ("next", "name", "data")),
        *((f"method_{number}", ctypes.c_void_p) for number in range(13)),
        *(("set_system_call", _Set), ("get_system_call", _Get)),
    )


def _vfs() -> Any:
    library = ctypes.CDLL(_sqlite3.__file__)
    library.sqlite3_vfs_find.restype = ctypes.POINTER(_Vfs)
    return library.sqlite3_vfs_find(None)


def has_hooks() -> bool:
    """Whether this build of Python lets a test into SQLite's system calls."""
    return hasattr(ctypes.CDLL(_sqlite3.__file__), "sqlite3_vfs_find")


@contextlib.contextmanager
def _hooked(before: Callable[[str, Callable[..., int], tuple[Any, ...]], bool]) -> Iterator[None]:
    """Call a function before each step; where it gives False, the step fails as if the disk were full."""
    vfs, kept, real_os = _vfs(), [], {name: getattr(os, name) for name in ("replace", "unlink")}

    def hook(name: str, kind: Any, real: Callable[..., int]) -> Any:
        def step(*arguments: Any) -> int:
            if before(name, real, arguments):
                return real(*arguments)
            ctypes.set_errno(errno.ENOSPC)
            return -1

        return kind(step)

    def os_hook(name: str) -> Callable[..., Any]:
        def step(*arguments: Any, **keywords: Any) -> Any:
            if before(name, real_os[name], arguments):
                return real_os[name](*arguments, **keywords)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return step

    for name, kind in _CALLS.items():
        if address := vfs.contents.get_system_call(vfs, name.encode()):
            kept.append(hook(name, kind, kind(address)))
            vfs.contents.set_system_call(vfs, name.encode(), ctypes.cast(kept[-1], ctypes.c_void_p))
    for name in real_os:
        setattr(os, name, os_hook(name))
    try:
        yield
    finally:
        for name, function in real_os.items():
            setattr(os, name, function)
        for name in _CALLS:
            vfs.contents.set_system_call(vfs, name.encode(), None)


@contextlib.contextmanager
def failing_at(number: int, *, lasting: bool = False) -> Iterator[list[int]]:
    """Let the disk be full at one step, or from then on but for removals; gives how many steps there were."""
    count = [0]

    def before(name: str, real: Callable[..., int], arguments: tuple[Any, ...]) -> bool:
        count[0] += 1
        return not (count[0] == number or (lasting and count[0] > number and name != "unlink"))

    with _hooked(before):
        yield count


@contextlib.contextmanager
def killed_at(number: int) -> Iterator[list[int]]:
    """Kill this process at one step; of a write, half has been done."""
    count = [0]

    def before(name: str, real: Callable[..., int], arguments: tuple[Any, ...]) -> bool:
        count[0] += 1
        if count[0] == number:
            if name in ("write", "pwrite", "pwrite64"):
                real(*arguments[:2], arguments[2] // 2, *arguments[3:])
            os.kill(os.getpid(), signal.SIGKILL)
        return True

    with _hooked(before):
        yield count
