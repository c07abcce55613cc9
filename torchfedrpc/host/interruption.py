"""KeyboardInterrupt in a thread that runs a learner's method."""

from __future__ import annotations

import ctypes
import sys

_OURS = ("torchfedrpc.host.", "torchfedrpc.wire.", "torchfedrpc.reduce.")
# The functions that run code of learners, and handle whatever it raises.
_CALLERS = {
    ("torchfedrpc.host.runner", "_call"),
    ("torchfedrpc.host.runner", "item"),
    ("torchfedrpc.host.learner_cache", "<lambda>"),
}


def interrupt(thread: int) -> bool:
    """Raise KeyboardInterrupt in a thread if it runs code of a learner now, and none of ours within that.

    Args:
        thread: Identifier of the thread.

    Returns:
        Whether it was raised. It takes effect at the next bytecode, so that a long call of C code ends first.
    """
    frame = sys._current_frames().get(thread)
    if frame is None or _name(frame.f_globals).startswith(_OURS):
        return False
    while frame is not None and not _name(frame.f_globals).startswith(_OURS):
        frame = frame.f_back
    if frame is None or (_name(frame.f_globals), frame.f_code.co_name) not in _CALLERS:
        return False
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(KeyboardInterrupt))
    return True


def _name(names: dict[str, object]) -> str:
    return str(names.get("__name__", ""))
