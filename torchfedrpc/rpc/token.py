"""The shared token by which drivers and workers know each other, read from a file that only its owner can read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from torchfedrpc.errors import ConfigError

VARIABLE = "TORCHFEDRPC_TOKEN_FILE"

# A proof lets a stranger try tokens for as long as it likes (see greeting.py). 32 random characters, be they no more
# than hexadecimal digits, are 128 bits; they have 14 different ones on average, and fewer than 8 next to never.
_LEAST_BYTES = 32
_LEAST_DIFFERENT = 8
_MOST_BYTES = 1 << 16
_HOW_TO_MAKE = "python -c 'import secrets; print(secrets.token_hex(32))' > FILE; chmod 600 FILE"


def has_token_file(path: str | None) -> bool:
    """Whether a token's file is named, by a setting or by the environment."""
    return bool(path or os.environ.get(VARIABLE))


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
        token = os.read(descriptor, _MOST_BYTES).strip()
    finally:
        os.close(descriptor)
    if len(token) < _LEAST_BYTES or len(set(token)) < _LEAST_DIFFERENT:
        raise ConfigError(
            f"token file {name}: {len(token)} bytes, {len(set(token))} different ones among them, can be guessed; at "
            f"least {_LEAST_BYTES} random ones are needed, make them by {_HOW_TO_MAKE}"
        )
    return token


def _check(name: str, status: os.stat_result) -> None:
    """Refuse what others may have read or written."""
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"token file {name} is no regular file; make one by {_HOW_TO_MAKE}")
    if status.st_size > _MOST_BYTES:
        raise ConfigError(
            f"token file {name} has {status.st_size} bytes, as no token has; make one by {_HOW_TO_MAKE}"
        )
    if status.st_uid not in (os.geteuid(), 0):
        raise ConfigError(f"token file {name} belongs to another user (uid {status.st_uid}): make a copy of your own")
    if status.st_mode & 0o077:
        raise ConfigError(
            f"token file {name} is open to others (mode {stat.S_IMODE(status.st_mode):04o}): chmod 600 {name}"
        )
