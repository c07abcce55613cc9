"""The script of a heartbeat process: a worker cannot send heartbeats itself while its GIL is held.

It is run by its path and imports little, so that it is small and starts fast. It writes lines to the heartbeat
connection: an empty line is a heartbeat, a mark with call ids shows what a stopped or ended worker was running, and
another mark shows that the worker asks to leave. After its first heartbeat it writes one character to stdout.
"""

from __future__ import annotations

import os
import select
import signal
import sys

INTERVAL_S = 0.25
GRACE_S = 3.0
BEAT = b"\n"
STOPPED = b"="
ENDED = b"."
LEAVING = b"-"

STAT = "/proc/self/stat"
PS = "/bin/ps"  # on systems without /proc

_READ_BYTES = 4096


def look(stat: bytes) -> tuple[str, int]:
    """Return the state of a process, and a number that grows whenever the process makes progress.

    Args:
        stat: the content of its ``/proc/PID/stat``.
    """
    fields = stat.rpartition(b")")[2].split()
    minor_faults, major_faults, user_time, system_time = (int(fields[index]) for index in (7, 9, 11, 12))
    return fields[0].decode(), minor_faults + major_faults + user_time + system_time


def look_by_ps(worker: int) -> tuple[str, str]:
    """Do the same by ``ps``; the processor time as text shows progress.

    Args:
        worker: the process's number.
    """
    import subprocess  # noqa: PLC0415 - with /proc this script starts faster without it

    try:
        shown = subprocess.run([PS, "-o", "state=,time=", "-p", str(worker)], stdout=subprocess.PIPE, timeout=1)
    except subprocess.TimeoutExpired:
        return "D", ""
    state, _, worked = shown.stdout.decode().strip().partition(" ")
    return (state[:1] or "X").replace("U", "D"), worked  # macOS says U for uninterruptible


def running(activity: int) -> list[int]:
    """The ids of the running calls in the `Activity` with that descriptor, in order."""
    return sorted(call_id for call_id in memoryview(os.pread(activity, _READ_BYTES, 0)).cast("q")[:-2] if call_id)


def wants_to_leave(activity: int) -> bool:
    """Whether the process of that `Activity` asks to leave."""
    return any(os.pread(activity, 8, _READ_BYTES - 8))


def is_severed(activity: int) -> bool:
    """Whether the process of that `Activity` is to look cut off, so that nothing more is sent."""
    return any(os.pread(activity, 8, _READ_BYTES - 16))


def record(mark: bytes, activity: int) -> bytes:
    """The line that shows the running calls."""
    return mark + " ".join(map(str, running(activity))).encode() + b"\n"


def send(connection: int, data: bytes) -> bytes:
    """Send as much as fits without waiting, and return the rest."""
    try:
        return data[os.write(connection, data) :]
    except BlockingIOError:
        return data


def tell_begun() -> bool:
    """Tell the worker of the first heartbeat; returns whether the worker is still there."""
    try:
        return bool(os.write(sys.stdout.fileno(), b"."))
    except BrokenPipeError:
        return False


def is_closed(connection: int) -> bool:
    """Whether the driver's end of a readable connection is closed."""
    try:
        return not os.read(connection, _READ_BYTES)
    except BlockingIOError:
        return False


def wait(descriptor: int, event: int, timeout_s: float) -> bool:
    """Wait for one event; returns whether it came."""
    poll = select.poll()
    poll.register(descriptor, event)
    return bool(poll.poll(timeout_s * 1000))


def watch(
    connection: int, activity: int, process: int, stat: int, worker: int, interval_s: float, grace_s: float
) -> None:
    """Send heartbeats until the worker ends.

    Raises:
        OSError: If the driver is gone, or has given the worker up.
    """
    poll = select.poll()
    poll.register(process, select.POLLIN)
    poll.register(connection, select.POLLIN)
    unsent, has_told, has_begun = b"", False, False
    worked: object = 0
    while True:
        had_worked = worked
        try:
            state, worked = look(os.pread(stat, _READ_BYTES, 0)) if stat >= 0 else look_by_ps(worker)
        except ProcessLookupError:
            state = "X"
        if state in "TZX":
            line = record(STOPPED, activity)
        elif state != "D" or worked != had_worked:  # a process that waits for its disk may be swapped out
            line = BEAT
        else:
            line = b""
        # If the socket is full, the oldest unsent line is kept and later ones are dropped.
        if not has_told and not unsent and wants_to_leave(activity):
            line, has_told = line + LEAVING + b"\n", True
        unsent = b"" if is_severed(activity) else send(connection, unsent or line)
        if not has_begun:
            has_begun = tell_begun()
        ready = [descriptor for descriptor, _ in poll.poll(interval_s * 1000)]
        if process in ready or os.getppid() != worker:
            break
        if connection in ready and is_closed(connection):
            raise ConnectionResetError
    unsent = b"" if is_severed(activity) else unsent + record(ENDED, activity)
    while unsent and wait(connection, select.POLLOUT, grace_s):
        unsent = send(connection, unsent)


def end(process: int, worker: int, grace_s: float) -> None:
    """Let the worker leave, for which it must not be stopped, and kill it after its grace."""
    send_signal(worker, signal.SIGCONT)
    if not wait(process, select.POLLIN, grace_s):
        send_signal(worker, signal.SIGKILL)


def send_signal(worker: int, number: int) -> None:
    """Send the worker a signal. No other process has its number as long as it is the parent of this one."""
    try:
        if os.getppid() == worker:
            os.kill(worker, number)
    except ProcessLookupError:  # it has ended in between
        return


def main(
    connection: int, activity: int, process: int, stat: int, worker: int, interval_s: float, grace_s: float
) -> None:
    """Run until the worker's end.

    Args:
        connection: descriptor of the heartbeat connection.
        activity: descriptor of the memory of the worker's `Activity`.
        process: a descriptor that is readable once the worker has ended.
        stat: descriptor of the worker's ``/proc/PID/stat``; -1 on systems without.
        worker: the worker's process id.
        interval_s: seconds between two heartbeats.
        grace_s: seconds in which the worker has to end once the driver is gone.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # often sent to all; it ends with its worker
        signal.signal(number, signal.SIG_IGN)
    os.set_blocking(connection, False)
    try:
        watch(connection, activity, process, stat, worker, interval_s, grace_s)
    except OSError:
        end(process, worker, grace_s)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:6]), *map(float, sys.argv[6:8]))
