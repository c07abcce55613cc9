"""The heartbeat of workers: a worker's process that sends it, and the driver's watch that notices lost workers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from torchfedrpc.errors import ConfigError
from torchfedrpc.events import Event
from torchfedrpc.host.activity import Activity
from torchfedrpc.rpc import heartbeat_process
from torchfedrpc.rpc.control_link import close_in_children, pair_for_child
from torchfedrpc.rpc.log_line import read_line

_READ_BYTES = 16 << 10  # at once, of beats and log lines; so many beats cost the loop some milliseconds
# The ids of all calls that a page of `Activity` can hold, 510 of up to 20 digits, need fewer bytes.
_LINE_BYTES = 12 << 10
_PIPE_BYTES = 256 << 10  # of log lines that wait, 128 a worker and second on average
_LOG_END = b"]"
_IDS = re.compile(rb"(-?[0-9]{1,19}( -?[0-9]{1,19})*)?")


class HeartbeatProcess:
    """A process that sends heartbeats for this one until either of them ends.

    If the driver closes its end of the connection, this process has ``grace_s`` to leave before it is killed.

    Args:
        connection: the heartbeat connection to the driver's `Watch`, owned from now on.
        activity: the running calls of this process.
        interval_s: seconds between two heartbeats.
        grace_s: seconds until this process is killed once the driver is gone.

    Attributes:
        log: descriptor of a pipe for lines of `worker_log`, which it sends on; it does not block.

    Raises:
        ConfigError: If this system does not show the state of a process.
    """

    def __init__(
        self,
        connection: socket.socket,
        activity: Activity,
        interval_s: float = heartbeat_process.INTERVAL_S,
        grace_s: float = heartbeat_process.GRACE_S,
    ) -> None:
        with connection, contextlib.ExitStack() as opened:
            self._alive, process = _end_of_this_process()
            opened.callback(os.close, process)
            descriptors = [connection.fileno(), activity.descriptor, process]
            stat = -1
            if os.path.exists(heartbeat_process.STAT):
                stat = os.open(heartbeat_process.STAT, os.O_RDONLY)
                opened.callback(os.close, stat)
                descriptors.append(stat)
            elif not os.path.exists(heartbeat_process.PS):
                raise ConfigError(
                    f"this system has neither {heartbeat_process.STAT} nor {heartbeat_process.PS}, so that a stopped "
                    f"worker would go unnoticed: set runtime.execution_mode=local"
                )
            reading, self.log = os.pipe()
            opened.callback(os.close, reading)
            os.set_blocking(self.log, False)
            _enlarge_pipe(self.log)
            descriptors.append(reading)
            of_worker = [connection.fileno(), activity.descriptor, process, stat, reading, os.getpid()]
            arguments = [*of_worker, interval_s, grace_s]
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", heartbeat_process.__file__, *map(str, arguments)],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def wait_for_beat(self) -> None:
        """Wait for its first heartbeat, after which silence means a loss."""
        output = self._process.stdout
        assert output is not None
        if not output.closed:
            with output:
                output.read(1)

    def stop(self) -> None:
        """End it, and the heartbeat connection with it."""
        with self._process:
            self._process.kill()
        os.close(self.log)
        if self._alive is not None:
            self._alive.close()


def _enlarge_pipe(descriptor: int) -> None:
    """Let a pipe hold `_PIPE_BYTES`, where the system and the user's limit allow that."""
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import fcntl  # noqa: PLC0415 - only Unix has it, and the package can be imported on other systems

        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


def _end_of_this_process() -> tuple[socket.socket | None, int]:
    """Return a descriptor that becomes readable when this process ends, and a socket to keep open until then.

    An inherited descriptor stands for this process even if another one gets its number later.
    """
    try:
        return None, os.pidfd_open(os.getpid())
    except (AttributeError, OSError):  # another system than Linux, or a sandbox that forbids it
        kept, inherited = pair_for_child()
        return kept, inherited.detach()


@dataclass(frozen=True, slots=True)
class Loss:
    """How a worker was lost.

    Attributes:
        reason: a clause about the worker.
        running: the ids of the calls that it was running; None if unknown.
    """

    reason: str
    running: tuple[int, ...] | None


class Heartbeat:
    """The heartbeat of one worker.

    Args:
        key: its name.
        connection: the driver's end of the heartbeat connection.
        events: receives what the worker logs.

    Attributes:
        connection: the driver's end of the heartbeat connection.
        lost: future of how the worker was lost; cancelled if it is no longer watched.
        leaving: future that is settled once the worker asks to leave.
        running: the calls that a stopped or ended worker was running; None if unknown.
        seen_at: when the last sign of life came, by the monotonic clock.
        ended: whether the worker's process has ended.
        is_out_of_memory: whether the system has killed a process of the worker's control group as memory ran out.
        memory_bytes: the memory that the worker used lately; None if unknown.
        num_logged: number of lines of its log so far.
        is_malformed: whether the received data has another form.
    """

    def __init__(self, key: Hashable, connection: socket.socket, events: asyncio.Queue[Event]) -> None:
        loop = asyncio.get_running_loop()
        self.connection = connection
        self.lost: asyncio.Future[Loss] = loop.create_future()
        self.leaving: asyncio.Future[None] = loop.create_future()
        self.running: tuple[int, ...] | None = None
        self.seen_at = time.monotonic()
        self.ended = False
        self.is_malformed = False
        self.is_out_of_memory = False
        self.memory_bytes: int | None = None
        self.num_logged = 0
        self._key = key
        self._events = events
        self._logged: asyncio.Future[Any] = self.lost.get_loop().create_future()
        self._unfinished = b""

    def take(self, data: bytes) -> None:
        """Read the lines in received data."""
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        for line in lines:
            mark, ids = line[:1], line[1:]
            if not mark:
                self.running = None
                self.seen_at = time.monotonic()
            elif mark != heartbeat_process.LOGGED and line.endswith(_LOG_END):
                continue  # the rest of a line that an earlier watch has begun to read
            elif mark in (heartbeat_process.STOPPED, heartbeat_process.ENDED):
                if not _IDS.fullmatch(ids):
                    self.is_malformed = True
                    return
                self.running = tuple(map(int, ids.split()))
                self.ended = mark == heartbeat_process.ENDED
            elif mark == heartbeat_process.LOGGED:
                self._take_log(ids)
            elif mark == heartbeat_process.MEMORY and ids.isdigit():
                self.memory_bytes = int(ids)
            elif mark == heartbeat_process.OUT_OF_MEMORY:
                self.is_out_of_memory = True
            elif mark == heartbeat_process.LEAVING and not self.leaving.done():
                self.leaving.set_result(None)
            # Other lines are the rest of a line that an earlier watch has begun to read.
        self.is_malformed |= max(map(len, [*lines, self._unfinished])) > _LINE_BYTES

    def _take_log(self, line: bytes) -> None:
        self.num_logged += 1
        if not self._logged.done():
            self._logged.set_result(None)
        if (event := read_line(str(self._key), line)) is not None:  # else it is the rest of a line
            self._events.put_nowait(event)

    async def has_logged(self, num_logged: int) -> None:
        """Wait until so many lines of its log have arrived, or it is no longer watched."""
        while self.num_logged < num_logged and not self.lost.done():
            self._logged = self.lost.get_loop().create_future()
            await asyncio.wait([self.lost, self._logged], return_when=asyncio.FIRST_COMPLETED)


class Watch:
    """Watches the heartbeats of workers on the running event loop.

    Args:
        timeout_s: seconds without a heartbeat after which a worker is lost.
        events: receives what workers log, as `WorkerLogged`.
    """

    def __init__(self, timeout_s: float, events: asyncio.Queue[Event] | None = None) -> None:
        self._timeout_s = timeout_s
        self._events: asyncio.Queue[Event] = events if events is not None else asyncio.Queue()
        self._heartbeats: dict[Hashable, Heartbeat] = {}
        self._loop = asyncio.get_running_loop()
        self._period_s = min(heartbeat_process.INTERVAL_S, timeout_s / 4)
        self._schedule()

    def add(self, key: Hashable, connection: socket.socket) -> Heartbeat:
        """Watch a worker until it is lost or removed.

        Args:
            key: identifies the worker among the watched ones.
            connection: the driver's end of its heartbeat connection, which the caller closes. The worker then leaves
                within its grace.
        """
        connection.setblocking(False)
        close_in_children(connection)
        heartbeat = self._heartbeats[key] = Heartbeat(key, connection, self._events)
        self._loop.add_reader(connection, self._read, key)
        return heartbeat

    def heartbeat(self, key: Hashable) -> Heartbeat | None:
        """Return the heartbeat of a watched worker; None of another."""
        return self._heartbeats.get(key)

    def asks_to_leave(self, key: Hashable) -> bool:
        """Return whether a watched worker has asked to leave."""
        return key in self._heartbeats and self._heartbeats[key].leaving.done()

    def remove(self, key: Hashable) -> None:
        """Stop watching a worker, if it is watched. A later `Watch` may take its connection."""
        heartbeat = self._heartbeats.pop(key, None)
        if heartbeat is not None:
            self._loop.remove_reader(heartbeat.connection)
            heartbeat.lost.cancel()

    def close(self) -> None:
        """Remove all workers."""
        self._timer.cancel()
        for key in list(self._heartbeats):
            self.remove(key)

    def _schedule(self) -> None:
        self._due_at = self._loop.time() + self._period_s
        self._timer = self._loop.call_at(self._due_at, self._tick)

    def _tick(self) -> None:
        late_s = self._loop.time() - self._due_at
        self._schedule()
        if late_s > self._period_s:
            # The event loop was blocked, or the machine has slept. That time does not count as silence; no more than
            # that, or a driver that is often late would never notice a loss.
            now = time.monotonic()
            for heartbeat in self._heartbeats.values():
                heartbeat.seen_at = max(heartbeat.seen_at, min(heartbeat.seen_at + late_s, now))
        for key, heartbeat in list(self._heartbeats.items()):
            if self._is_silent(key, heartbeat):
                self._read(key)  # data that a blocked loop has not read yet
            if self._is_silent(key, heartbeat):
                self._lose(key, f"no heartbeat for {self._timeout_s:g} s: it was stopped, or cut off")

    def _is_silent(self, key: Hashable, heartbeat: Heartbeat) -> bool:
        return self._heartbeats.get(key) is heartbeat and time.monotonic() - heartbeat.seen_at > self._timeout_s

    def _read(self, key: Hashable) -> None:
        heartbeat = self._heartbeats.get(key)
        if heartbeat is None:
            return
        try:
            data = heartbeat.connection.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(key, f"its heartbeat connection broke: {error}")
            return
        heartbeat.take(data)
        if heartbeat.is_malformed:
            self._lose(key, "its heartbeat process sent malformed data")
        elif heartbeat.ended:
            memory = ", and the system ended a process there as memory ran out" if heartbeat.is_out_of_memory else ""
            self._lose(key, f"its process ended{memory}")
        elif not data:
            self._lose(key, "its heartbeat process ended")

    def _lose(self, key: Hashable, reason: str) -> None:
        heartbeat = self._heartbeats[key]
        heartbeat.lost.set_result(Loss(reason, heartbeat.running))
        self.remove(key)
