"""Makes Linux look like another system: a process with this folder in PYTHONPATH finds no name that is missing there.

``HIDDEN_SYSTEM`` says which: ``macos`` and ``windows`` hide what their Python lacks, and ``sandbox`` is a Linux that
forbids files in memory and process descriptors, and shows no ``/proc``. Processes that this one starts are the same.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import fcntl
import io
import mmap
import os
import select
import shutil
import signal
import socket
import sys
import types
from typing import Any

_LINUX_ONLY = {
    os: "memfd_create MFD_CLOEXEC MFD_ALLOW_SEALING pidfd_open sched_getaffinity sched_setaffinity eventfd splice "
    "copy_file_range O_PATH posix_fadvise getxattr setxattr setns unshare timerfd_create",
    fcntl: "F_ADD_SEALS F_GET_SEALS F_SEAL_SEAL F_SEAL_SHRINK F_SEAL_GROW F_SEAL_WRITE F_SETLEASE F_GETLEASE "
    "F_SETSIG F_GETSIG F_NOTIFY F_OFD_SETLK F_SETPIPE_SZ F_GETPIPE_SZ",
    signal: "pidfd_send_signal SIGRTMIN SIGRTMAX SIGPOLL SIGPWR SIGSTKFLT SIGCLD sigtimedwait sigwaitinfo",
    socket: "TCP_KEEPIDLE TCP_USER_TIMEOUT SO_BINDTODEVICE AF_NETLINK AF_PACKET AF_VSOCK SO_PEERCRED",
    select: "POLLRDHUP",
    mmap: "MAP_POPULATE MADV_DONTFORK",
}
# os.getuid is missing there too, but pytest asks for it wherever sys.platform is not "win32".
_UNIX_ONLY = {
    os: "fork forkpty register_at_fork pread pwrite preadv pwritev geteuid getegid getpgid setsid killpg fchmod "
    "chown fchown lchown O_NOFOLLOW O_CLOEXEC O_NONBLOCK O_DIRECTORY O_NOCTTY O_SYNC waitid WNOHANG statvfs mkfifo "
    "nice getloadavg posix_spawn set_blocking sysconf uname wait",
    signal: "pthread_kill pthread_sigmask SIGKILL SIGSTOP SIGCONT SIGUSR1 SIGUSR2 SIGHUP SIGURG SIGCHLD SIGQUIT "
    "SIGPIPE sigwait",
    socket: "MSG_DONTWAIT",  # not AF_UNIX, without which socket.socketpair fails here
    mmap: "MAP_PRIVATE MAP_SHARED PROT_READ PROT_WRITE",
}


def _delete(names: dict[Any, str]) -> None:
    for module, text in names.items():
        for name in text.split():
            if hasattr(module, name):
                delattr(module, name)
    if hasattr(os, "process_cpu_count"):  # of Python 3.13; without sched_getaffinity it is this one
        os.process_cpu_count = os.cpu_count


def _without_proc(function: Any) -> Any:
    def look(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
        if isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith("/proc"):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return function(path, *args, **kwargs)

    return look


def _hide_proc() -> None:
    builtins.open = io.open = _without_proc(io.open)
    for name in ("open", "stat", "lstat", "readlink", "listdir", "scandir", "access"):
        setattr(os, name, _without_proc(getattr(os, name)))


def _forbid(*args: Any) -> int:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


class _NamedLibrary(ctypes.CDLL):
    """Windows has no library without a name."""

    def __init__(self, name: Any, *args: Any, **kwargs: Any) -> None:
        if name is None:
            raise TypeError("bad argument type for built-in operation")
        super().__init__(name, *args, **kwargs)


def _lock(descriptor: int, mode: int, num_bytes: int) -> None:
    """Lock bytes from the file's position on; who reads them fails, which Linux cannot imitate."""
    _lockf(descriptor, _LOCK, num_bytes, 0, os.SEEK_CUR)


_lockf, _LOCK = fcntl.lockf, fcntl.LOCK_EX | fcntl.LOCK_NB
_MSVCRT: Any = types.SimpleNamespace(locking=_lock, LK_NBLCK=2)


match os.environ.get("HIDDEN_SYSTEM"):
    case "macos":
        _delete(_LINUX_ONLY)
        _hide_proc()
    case "windows":
        _delete(_LINUX_ONLY)

        import torch.distributed  # noqa: F401 - it was built for the system on which it runs

        shutil._use_fd_functions = False  # type: ignore[attr-defined]
        _delete(_UNIX_ONLY)
        _hide_proc()
        ctypes.CDLL = _NamedLibrary  # type: ignore[misc]
        for missing in ("fcntl", "resource", "pwd", "torch.distributed.rpc"):
            sys.modules[missing] = None  # type: ignore[assignment]
        sys.modules["msvcrt"] = _MSVCRT
    case "sandbox":
        os.memfd_create = os.pidfd_open = _forbid  # type: ignore[assignment]
        _hide_proc()
