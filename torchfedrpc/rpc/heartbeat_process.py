"""A script that runs beside a worker and says that it lives, since a worker can hold its own GIL for minutes.

It is run by its path and imports little, so that it is small and starts fast. It writes lines: an empty one is a
beat, and one of call ids tells what the worker was running, after a mark for a worker that is stopped or has ended.
A mark of its own tells that the worker asks to leave. Its standard output has one character once it has beaten.
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
PS = "/bin/ps"  # where there is no /proc

_READ_BYTES = 4096

suspended = False


def look(stat: bytes) -> tuple[str, int]:
    """The state of a process, and a number that grows whenever it gets anything done.

    Args:
        stat: the content of its ``/proc/PID/stat``.
    """
    fields = stat.rpartition(b")")[2].split()
    minor_faults, major_faults, user_time, system_time = (int(fields[index]) for index in (7, 9, 11, 12))
    return fields[0].decode(), minor_faults + major_faults + user_time + system_time


def look_by_ps(worker: int) -> tuple[str, str]:
    """The same by ``ps``; what changes is the processor's time, as text.

    Args:
        worker: the process's number.
    """
    import subprocess  # noqa: PLC0415 - where there is /proc this starts faster without it

    try:
        shown = subprocess.run([PS, "-o", "state=,time=", "-p", str(worker)], stdout=subprocess.PIPE, timeout=1)
    except subprocess.TimeoutExpired:
        return "D", ""
    state, _, worked = shown.stdout.decode().strip().partition(" ")
    return (state[:1] or "X").replace("U", "D"), worked  # macOS says U for uninterruptible


def running(activity: int) -> list[int]:
    """The ids of the calls that run in the process whose `Activity` has that descriptor, in order."""
    return sorted(call_id for call_id in memoryview(os.pread(activity, _READ_BYTES, 0)).cast("q")[:-1] if call_id)


def wants_to_leave(activity: int) -> bool:
    """Whether the process of that `Activity` has asked to leave."""
    return any(os.pread(activity, 8, _READ_BYTES - 8))


def record(mark: bytes, activity: int) -> bytes:
    """The line that tells which calls are running."""
    return mark + " ".join(map(str, running(activity))).encode() + b"\n"


def send(pulse: int, data: bytes) -> bytes:
    """Send what can be sent without waiting, and return the rest."""
    if suspended:
        return b""
    try:
        return data[os.write(pulse, data) :]
    except BlockingIOError:
        return data


def tell_begun() -> bool:
    """Tell the worker that this has beaten; whether it is still there to hear it."""
    try:
        return bool(os.write(sys.stdout.fileno(), b"."))
    except BrokenPipeError:
        return False


def is_closed(pulse: int) -> bool:
    """Whether the other end of a socket that has something to say is closed."""
    try:
        return not os.read(pulse, _READ_BYTES)
    except BlockingIOError:
        return False


def wait(descriptor: int, event: int, timeout_s: float) -> bool:
    """Wait for one event; whether it came."""
    poll = select.poll()
    poll.register(descriptor, event)
    return bool(poll.poll(timeout_s * 1000))


def watch(pulse: int, activity: int, process: int, stat: int, worker: int, interval_s: float, grace_s: float) -> None:
    """Beat for the worker until it ends.

    Raises:
        OSError: the driver is gone, or has given the worker up.
    """
    poll = select.poll()
    poll.register(process, select.POLLIN)
    poll.register(pulse, select.POLLIN)
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
        elif state != "D" or worked != had_worked:  # one that waits for a disk may be swapped out
            line = BEAT
        else:
            line = b""
        # Where there is no room, since nobody reads, what has waited longest says as much as all that came after.
        if not has_told and not unsent and wants_to_leave(activity):
            line, has_told = line + LEAVING + b"\n", True
        unsent = send(pulse, unsent or line)
        if not has_begun:
            has_begun = tell_begun()
        ready = [descriptor for descriptor, _ in poll.poll(interval_s * 1000)]
        if process in ready or os.getppid() != worker:
            break
        if pulse in ready and is_closed(pulse):
            raise ConnectionResetError
    unsent += record(ENDED, activity)
    while unsent and wait(pulse, select.POLLOUT, grace_s):
        unsent = send(pulse, unsent)


def end(process: int, worker: int, grace_s: float) -> None:
    """Let the worker leave by itself, which it can only do if it is not stopped, and kill it if it does not."""
    tell(worker, signal.SIGCONT)
    if not wait(process, select.POLLIN, grace_s):
        tell(worker, signal.SIGKILL)


def tell(worker: int, number: int) -> None:
    """Send the worker a signal; as long as it is this process's parent no other has its number."""
    try:
        if os.getppid() == worker:
            os.kill(worker, number)
    except ProcessLookupError:  # it has ended in between
        return


def suspend(*_: object) -> None:
    """Say nothing more, on a signal: what a worker that is cut off looks like to its driver."""
    global suspended
    suspended = True


def main(pulse: int, activity: int, process: int, stat: int, worker: int, interval_s: float, grace_s: float) -> None:
    """Run until the worker's end.

    Args:
        pulse: the socket to the driver. This and the next three are descriptors.
        activity: the memory of the worker's `Activity`.
        process: can be read once the worker has ended: a pidfd of it, or the other end of a socket that it keeps.
        stat: its ``/proc/PID/stat``; -1 where there is none.
        worker: its process id.
        interval_s: seconds between two beats.
        grace_s: seconds in which the worker has to be gone once the driver is.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # often sent to all; it ends when its worker does
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, suspend)
    os.set_blocking(pulse, False)
    try:
        watch(pulse, activity, process, stat, worker, interval_s, grace_s)
    except OSError:
        end(process, worker, grace_s)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:6]), *map(float, sys.argv[6:8]))
