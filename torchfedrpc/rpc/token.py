"""The shared token by which drivers and workers know each other, read from a file that only its owner can read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from torchfedrpc.errors import ConfigError

VARIABLE = "TORCHFEDRPC_TOKEN_FILE"

_LEAST_BYTES = 16
_HOW_TO_MAKE = "python -c 'import secrets; print(secrets.token_hex(32))' > FILE; chmod 600 FILE"


def load_token(path: str | None) -> bytes:
    """Read the token, without the whitespace around it.

    Args:
        path: its file; None takes what the environment variable TORCHFEDRPC_TOKEN_FILE names.

    Raises:
        ConfigError: there is no such file, others than its owner can read or write it, or it is too short.
    """
    name = path or os.environ.get(VARIABLE)
    if not name:
        raise ConfigError(
            f"driver and workers need a shared token: make one ({_HOW_TO_MAKE}), copy it to each machine, and name "
            f"the file by runtime.token_file, --token-file or {VARIABLE}"
        )
    try:
        # Non-blocking, since a pipe of that name would be waited for.
        descriptor = os.open(Path(name).expanduser(), os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(f"token file {name}: {error.strerror}; make one by {_HOW_TO_MAKE}") from None
    try:
        _check(name, os.fstat(descriptor))
        token = b"".join(iter(lambda: os.read(descriptor, 4096), b"")).strip()
    finally:
        os.close(descriptor)
    if len(token) < _LEAST_BYTES:
        raise ConfigError(
            f"token file {name}: {len(token)} bytes can be guessed, at least {_LEAST_BYTES} are needed; make one by "
            f"{_HOW_TO_MAKE}"
        )
    return token


def _check(name: str, status: os.stat_result) -> None:
    """Refuse what others may have read or written."""
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"token file {name} is no regular file; make one by {_HOW_TO_MAKE}")
    if status.st_uid not in (os.geteuid(), 0):
        raise ConfigError(f"token file {name} belongs to another user (uid {status.st_uid}): make a copy of your own")
    if status.st_mode & 0o077:
        raise ConfigError(
            f"token file {name} is open to others (mode {stat.S_IMODE(status.st_mode):04o}): chmod 600 {name}"
        )
