"""The script of a heartbeat process: a worker cannot send heartbeats itself while its GIL is held.

It is run by its path and imports little, so that it is small and starts fast. It writes lines to the heartbeat
connection: an empty line is a heartbeat, a mark with call ids shows what a stopped or ended worker was running, and
other marks show that the worker asks to leave, how much memory it uses, that memory ran out, or what it logs. After
its first heartbeat it writes one character to stdout.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time

INTERVAL_S = 0.25
GRACE_S = 3.0
BEAT = b"\n"
STOPPED = b"="
ENDED = b"."
LEAVING = b"-"
MEMORY = b"%"
OUT_OF_MEMORY = b"!"
LOGGED = b"+"

STAT = "/proc/self/stat"
PS = "/bin/ps"  # on systems without /proc

_READ_BYTES = 4096
_BEATS_OF_MEMORY = 20  # between two lines on the memory that the worker uses
_LOG_BYTES = 64 << 10  # in one interval: more would delay the heartbeats, and keep the driver busy


def look(stat: bytes) -> tuple[str, int]:
    """Return the state of a process, and a number that grows whenever the process makes progress.

    Args:
        stat: the content of its ``/proc/PID/stat``.
    """
    fields = stat.rpartition(b")")[2].split()
    minor_faults, major_faults, user_time, system_time = (int(fields[index]) for index in (7, 9, 11, 12))
    return fields[0].decode(), minor_faults + major_faults + user_time + system_time


def memory_bytes(stat: bytes) -> int:
    """Return the resident memory of a process, from the content of its ``/proc/PID/stat``."""
    return int(stat.rpartition(b")")[2].split()[21]) * os.sysconf("SC_PAGE_SIZE")


def num_killed_for_memory() -> int:
    """Return how many processes of this control group the system has killed as memory ran out; 0 if unknown."""
    try:
        with open("/proc/self/cgroup") as file:
            path = next(line[3:].strip() for line in file if line.startswith("0::"))
        with open(f"/sys/fs/cgroup{path}/memory.events") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("oom_kill "))
    except (OSError, StopIteration, ValueError):
        return 0


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


class Log:
    """The pipe with lines that the worker logs.

    Args:
        descriptor: its end for reading; -1 if there is none.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._unfinished = b""
        if descriptor >= 0:
            os.set_blocking(descriptor, False)

    def read(self, num_bytes: int) -> bytes:
        """Return the next whole lines. At the end of the pipe, it has no descriptor from then on."""
        try:
            data = os.read(self.descriptor, num_bytes)
        except BlockingIOError:
            return b""
        if not data:
            self.descriptor = -1
        lines, end, self._unfinished = (self._unfinished + data).rpartition(b"\n")
        return lines + end

    def read_all(self) -> bytes:
        """Return the lines that are left, once the worker has ended."""
        read = b""
        while self.descriptor >= 0 and (lines := self.read(_LOG_BYTES)):
            read += lines
        return read


def watch(
    connection: int,
    activity: int,
    process: int,
    stat: int,
    log: Log,
    worker: int,
    interval_s: float,
    grace_s: float,
) -> None:
    """Send heartbeats, and the worker's log, until the worker ends.

    Raises:
        OSError: If the driver is gone, or has given the worker up.
    """
    poll = select.poll()
    poll.register(process, select.POLLIN)
    poll.register(connection, select.POLLIN)
    unsent, has_told, has_begun, num_beats = b"", False, False, 0
    num_killed = num_killed_for_memory()
    worked: object = 0
    while True:
        had_worked, shown = worked, b""
        try:
            shown = os.pread(stat, _READ_BYTES, 0) if stat >= 0 else b""
            state, worked = look(shown) if shown else look_by_ps(worker)
        except ProcessLookupError:
            state = "X"
        if state in "TZX":
            line = record(STOPPED, activity)
        elif state != "D" or worked != had_worked:  # a process that waits for its disk may be swapped out
            line = BEAT
        else:
            line = b""
        if shown and num_beats % _BEATS_OF_MEMORY == 1:
            line += MEMORY + str(memory_bytes(shown)).encode() + b"\n"
        num_beats += 1
        # If the socket is full, lines wait for it, and later ones are dropped. A beat comes behind the log before it.
        if not has_told and not unsent and wants_to_leave(activity):
            line, has_told = line + LEAVING + b"\n", True
        unsent = (
            b"" if is_severed(activity) else send(connection, unsent + line if len(unsent) <= _LOG_BYTES else unsent)
        )
        if not has_begun:
            has_begun = tell_begun()
        ends_at, room = time.monotonic() + interval_s, _LOG_BYTES
        has_ended = False
        while not has_ended and (left_s := ends_at - time.monotonic()) > 0:
            reads = log.descriptor if room > 0 and not unsent and not is_severed(activity) else -1
            if reads >= 0:
                poll.register(reads, select.POLLIN)
            ready = [descriptor for descriptor, _ in poll.poll(left_s * 1000)]
            if reads >= 0:
                poll.unregister(reads)
            has_ended = process in ready or os.getppid() != worker
            if connection in ready and is_closed(connection):
                raise ConnectionResetError
            if reads in ready and not has_ended:
                lines = log.read(room)
                room -= len(lines)
                unsent = send(connection, lines)
        if has_ended:
            break
    if num_killed_for_memory() > num_killed:
        unsent += OUT_OF_MEMORY + b"\n"
    unsent = b"" if is_severed(activity) else unsent + log.read_all() + record(ENDED, activity)
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
    connection: int,
    activity: int,
    process: int,
    stat: int,
    log: int,
    worker: int,
    interval_s: float,
    grace_s: float,
) -> None:
    """Run until the worker's end.

    Args:
        connection: descriptor of the heartbeat connection.
        activity: descriptor of the memory of the worker's `Activity`.
        process: a descriptor that is readable once the worker has ended.
        stat: descriptor of the worker's ``/proc/PID/stat``; -1 on systems without.
        log: descriptor of the pipe with what the worker logs.
        worker: the worker's process id.
        interval_s: seconds between two heartbeats.
        grace_s: seconds in which the worker has to end once the driver is gone.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # often sent to all; it ends with its worker
        signal.signal(number, signal.SIG_IGN)
    os.set_blocking(connection, False)
    try:
        watch(connection, activity, process, stat, Log(log), worker, interval_s, grace_s)
    except OSError:
        end(process, worker, grace_s)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:7]), *map(float, sys.argv[7:9]))
