"""Noticing that a worker is lost: its sidecar beats, and the driver watches the beats of all."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from torchfedrpc.errors import ConfigError
from torchfedrpc.host.activity import Activity
from torchfedrpc.rpc import heartbeat_process as sidecar
from torchfedrpc.rpc.forks import close_in_children

# At once: a sidecar sends 4 bytes a second, so this is a backlog of minutes, which costs the loop a millisecond.
_READ_BYTES = 4096
# Of a line: the ids of all calls that a worker can run, 511 of up to 20 digits, are not as many.
_LINE_BYTES = 12 << 10
_IDS = re.compile(rb"(-?[0-9]{1,19}( -?[0-9]{1,19})*)?")


class Sidecar:
    """The process that beats for this one, from now until the end of either.

    If the driver closes its end of the socket, this process has ``grace_s`` to leave.

    Args:
        pulse: the connected socket to the driver's `Watch`, owned from now on.
        activity: the calls of this process.
        interval_s: seconds between two beats.
        grace_s: seconds after which this process is killed once the driver is gone.
    """

    def __init__(
        self,
        pulse: socket.socket,
        activity: Activity,
        interval_s: float = sidecar.INTERVAL_S,
        grace_s: float = sidecar.GRACE_S,
    ) -> None:
        with pulse, contextlib.ExitStack() as opened:
            self._alive, process = _end_of_this_process()
            opened.callback(os.close, process)
            descriptors = [pulse.fileno(), activity.descriptor, process]
            stat = -1
            if os.path.exists(sidecar.STAT):
                stat = os.open(sidecar.STAT, os.O_RDONLY)
                opened.callback(os.close, stat)
                descriptors.append(stat)
            elif not os.path.exists(sidecar.PS):
                raise ConfigError(
                    f"this system has neither {sidecar.STAT} nor {sidecar.PS}, and nobody would notice that a worker "
                    f"is stopped: set runtime.execution_mode=local"
                )
            arguments = [pulse.fileno(), activity.descriptor, process, stat, os.getpid(), interval_s, grace_s]
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", sidecar.__file__, *map(str, arguments)],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def wait_for_beat(self) -> None:
        """Return once it has beaten, so that from then on its silence means something."""
        output = self._process.stdout
        assert output is not None
        if not output.closed:
            with output:
                output.read(1)

    def suspend(self) -> None:
        """Have it say nothing more, as if it were cut off from the driver."""
        self._process.send_signal(signal.SIGUSR1)

    def stop(self) -> None:
        """End it, which ends the pulse."""
        with self._process:
            self._process.kill()
        if self._alive is not None:
            self._alive.close()


def _end_of_this_process() -> tuple[socket.socket | None, int]:
    """A descriptor to hand over that can be read once this process has ended, and what is to be kept till then.

    Handed over open, it means this process for ever, whoever gets its number next.
    """
    try:
        return None, os.pidfd_open(os.getpid())
    except (AttributeError, OSError):  # another system than Linux, or a sandbox that forbids it
        kept, handed_over = socket.socketpair()
        close_in_children(kept)
        return kept, handed_over.detach()


@dataclass(frozen=True, slots=True)
class Loss:
    """How a worker was lost.

    Attributes:
        reason: what is known, as a clause about the worker.
        running: the ids of the calls that it was running; None where that is not known.
    """

    reason: str
    running: tuple[int, ...] | None


class _Pulse:
    """What came from one sidecar."""

    def __init__(self, connection: socket.socket, seen_at: float) -> None:
        self.connection = connection
        self.seen_at = seen_at
        self.running: tuple[int, ...] | None = None
        self.ended = False
        self.asks_to_leave = False
        self.is_malformed = False
        self._unfinished = b""

    def end_allowance(self) -> None:
        """Its sidecar has started: silence counts from now on at the latest."""
        self.seen_at = min(self.seen_at, time.monotonic())

    def take(self, data: bytes) -> None:
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        for line in lines:
            mark, ids = line[:1], line[1:]
            if not mark:
                self.running = None
                self.seen_at = time.monotonic()
            elif mark in (sidecar.STOPPED, sidecar.ENDED):
                if not _IDS.fullmatch(ids):
                    self.is_malformed = True
                    return
                self.running = tuple(map(int, ids.split()))
                self.ended = mark == sidecar.ENDED
                self.end_allowance()
            elif mark == sidecar.LEAVING:
                self.asks_to_leave = True
            # else it is the rest of a line that an earlier watch has begun to read
        self.is_malformed = max(map(len, [*lines, self._unfinished])) > _LINE_BYTES


class Watch:
    """Watches the pulses of workers on the running event loop.

    Args:
        timeout_s: seconds without a beat after which a worker is lost.
        on_lost: called on the loop, once for each worker that is lost, with its key.
        on_leaving: called on the loop, once for each worker that asks to leave, with its key.
    """

    def __init__(
        self,
        timeout_s: float,
        on_lost: Callable[[Hashable, Loss], None],
        on_leaving: Callable[[Hashable], None] = lambda key: None,
    ) -> None:
        self._timeout_s = timeout_s
        self._on_lost = on_lost
        self._on_leaving = on_leaving
        self._pulses: dict[Hashable, _Pulse] = {}
        self._loop = asyncio.get_running_loop()
        self._period_s = min(sidecar.INTERVAL_S, timeout_s / 4)
        self._schedule()

    def add(self, key: Hashable, connection: socket.socket, allowance_s: float = 0.0) -> None:
        """Watch a worker.

        Args:
            key: names it, and no other that is watched.
            connection: the other end of its sidecar's socket, owned from now on.
            allowance_s: seconds that its first beat may take, beyond the timeout.
        """
        connection.setblocking(False)
        close_in_children(connection)
        self._pulses[key] = _Pulse(connection, time.monotonic() + allowance_s)
        self._loop.add_reader(connection, self._read, key)

    def end_allowance(self, key: Hashable) -> None:
        """Expect beats of a worker from now on, if it is watched: its sidecar has begun."""
        if (pulse := self._pulses.get(key)) is not None:
            pulse.end_allowance()

    def release(self, key: Hashable) -> socket.socket:
        """Watch a worker no longer, and leave its socket open: another `Watch` may take it, at any time.

        Raises:
            KeyError: no worker of that key is watched.
        """
        connection = self._pulses.pop(key).connection
        self._loop.remove_reader(connection)
        return connection

    def remove(self, key: Hashable) -> None:
        """Watch a worker no longer, if it is watched: it is not lost whatever it does, and has its grace to leave."""
        if key in self._pulses:
            self.release(key).close()

    def close(self) -> None:
        """Watch nobody any more."""
        self._timer.cancel()
        for key in list(self._pulses):
            self.remove(key)

    def _schedule(self) -> None:
        self._due_at = self._loop.time() + self._period_s
        self._timer = self._loop.call_at(self._due_at, self._tick)

    def _tick(self) -> None:
        late_s = self._loop.time() - self._due_at
        self._schedule()
        if late_s > self._period_s:
            # The driver, or all of the machine, has slept: that time is held against nobody. No more than that time,
            # or else a driver that is often late would never find anybody lost.
            now = time.monotonic()
            for pulse in self._pulses.values():
                pulse.seen_at = max(pulse.seen_at, min(pulse.seen_at + late_s, now))
        for key, pulse in list(self._pulses.items()):
            if self._is_silent(key, pulse):
                self._read(key)  # what a driver that slept has not read yet
            if self._is_silent(key, pulse):
                self._lose(key, f"no heartbeat for {self._timeout_s:g} s: it was stopped, or cut off")

    def _is_silent(self, key: Hashable, pulse: _Pulse) -> bool:
        return self._pulses.get(key) is pulse and time.monotonic() - pulse.seen_at > self._timeout_s

    def _read(self, key: Hashable) -> None:
        pulse = self._pulses.get(key)
        if pulse is None:
            return
        try:
            data = pulse.connection.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(key, f"the connection to its sidecar broke: {error}")
            return
        pulse.take(data)
        if pulse.is_malformed:
            self._lose(key, "its sidecar sent what is no line of a heartbeat")
        elif pulse.ended:
            self._lose(key, "its process ended")
        elif not data:
            self._lose(key, "its sidecar ended")
        elif pulse.asks_to_leave:
            pulse.asks_to_leave = False
            self._on_leaving(key)

    def _lose(self, key: Hashable, reason: str) -> None:
        running = self._pulses[key].running
        # Closed at the end: its sidecar would wake a stopped worker for its last seconds, unless it is killed before.
        with self.release(key):
            self._on_lost(key, Loss(reason, running))
