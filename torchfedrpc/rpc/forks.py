"""Sockets that are closed in forked children, such as those of a DataLoader. A copy would hide this process's end."""

from __future__ import annotations

import functools
import os
import socket
import weakref

_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def close_in_children(connection: socket.socket) -> None:
    """Close a connected socket in processes that are forked from now on. It stays open in this one."""
    _sockets.add(connection)
    _close_when_forked()


@functools.cache
def _close_when_forked() -> None:
    def close_all() -> None:
        for connection in list(_sockets):
            connection.close()

    os.register_at_fork(after_in_child=close_all)
