"""The heartbeat: a lost worker is noticed soon, with the calls it was running; a busy worker is not lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path

import pytest
from processes import LightProcess, ends_within, state_of

from torchfedrpc.host.activity import Activity
from torchfedrpc.rpc import heartbeat_process
from torchfedrpc.rpc.heartbeat import Heartbeat, HeartbeatProcess, Loss, Watch

GRACE_S = 0.5
TIMEOUT_S = 1.0
SLACK_S = 1.0  # for a busy machine

# Prints the id of its heartbeat process, then runs the lines that it is sent.
WORKER = """
import ctypes, hashlib, os, signal, socket
from torchfedrpc.host.activity import Activity
from torchfedrpc.rpc.heartbeat import HeartbeatProcess

descriptor, interval_s, grace_s, *call_ids = sys.argv[1:]
activity = Activity()
connection = socket.socket(fileno=int(descriptor))
beating = HeartbeatProcess(connection, activity, float(interval_s), float(grace_s))
for call_id in call_ids:
    activity.enter(int(call_id))
print(beating.pid, flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""


class Worker(LightProcess):
    """A process with a heartbeat; ``connection`` is the driver's end of it."""

    def __init__(self, *call_ids: int, interval_s: float, is_full: bool) -> None:
        self.connection, theirs = socket.socketpair()
        with theirs:
            if is_full:
                fill(theirs)
            descriptor = theirs.fileno()
            super().__init__(WORKER, descriptor, interval_s, GRACE_S, *call_ids, pass_fds=[descriptor])
        self.beating = int(self.line())
        if not is_full:
            assert self.connection.recv(1) == heartbeat_process.BEAT

    def close(self) -> None:
        self.connection.close()
        super().close()


def fill(connection: socket.socket) -> None:
    """Let no more fit into a socket's buffer."""
    connection.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            connection.send(heartbeat_process.BEAT)


Start = Callable[..., Worker]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[Worker] = []

    def start(*call_ids: int, interval_s: float = heartbeat_process.INTERVAL_S, is_full: bool = False) -> Worker:
        started.append(Worker(*call_ids, interval_s=interval_s, is_full=is_full))
        return started[-1]

    yield start
    for worker in started:
        worker.close()
    assert all(ends_within(worker.beating, GRACE_S + SLACK_S) for worker in started)


class Losses(dict[Hashable, Loss]):
    """Who was lost, and how; ``watch`` notices it."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__()
        self.watch = Watch(timeout_s)
        self._heartbeats: dict[Hashable, Heartbeat] = {}

    def add(self, key: Hashable, connection: socket.socket) -> None:
        self._heartbeats[key] = heartbeat = self.watch.add(key, connection)
        heartbeat.lost.add_done_callback(lambda lost: lost.cancelled() or self.update({key: lost.result()}))

    async def of(self, key: Hashable, within_s: float) -> Loss:
        async with asyncio.timeout(within_s):
            return await asyncio.shield(self._heartbeats[key].lost)

    def forget(self, key: Hashable) -> None:
        """Leave the connection of a worker that is no longer watched open."""
        del self._heartbeats[key]

    def close(self) -> None:
        self.watch.close()
        for heartbeat in self._heartbeats.values():
            heartbeat.connection.close()


@contextlib.contextmanager
def watching(*workers: Worker, timeout_s: float = TIMEOUT_S) -> Iterator[tuple[Watch, Losses]]:
    """Watch workers; they are let go at the end."""
    with contextlib.closing(Losses(timeout_s)) as losses:
        for worker in workers:
            losses.add(worker, worker.connection)
        yield losses.watch, losses


# Lost.


@pytest.mark.parametrize("order", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(3)", "sys.exit()"])
async def test_a_worker_that_ends_is_lost_within_a_second_with_its_calls(start: Start, order: str) -> None:
    worker, other = start(3, 40), start(5)
    with watching(worker, other) as (_, losses):
        worker.tell(order)
        assert await losses.of(worker, 1.0) == Loss("its process ended", (3, 40))
    assert list(losses) == [worker]


async def test_an_idle_worker_that_is_killed_was_running_nothing(start: Start) -> None:
    worker = start()
    with watching(worker) as (_, losses):
        worker.popen.kill()
        assert await losses.of(worker, 1.0) == Loss("its process ended", ())


async def test_a_stopped_worker_is_lost_at_the_timeout_with_its_calls(start: Start) -> None:
    worker = start(7)
    with watching(worker) as (_, losses):
        os.kill(worker.pid, signal.SIGSTOP)
        stopped_at = time.monotonic()
        loss = await losses.of(worker, TIMEOUT_S + SLACK_S)
        assert time.monotonic() - stopped_at > TIMEOUT_S - heartbeat_process.INTERVAL_S
    assert loss == Loss("no heartbeat for 1 s: it was stopped, or cut off", (7,))


async def test_a_worker_killed_while_it_is_stopped_is_lost_within_a_second(start: Start) -> None:
    worker = start(7)
    with watching(worker, timeout_s=30) as (_, losses):
        os.kill(worker.pid, signal.SIGSTOP)
        worker.popen.kill()
        assert await losses.of(worker, 1.0) == Loss("its process ended", (7,))


async def test_a_worker_whose_heartbeat_process_is_killed_is_lost_within_a_second(start: Start) -> None:
    worker = start(7)
    with watching(worker) as (_, losses):
        os.kill(worker.beating, signal.SIGKILL)
        assert await losses.of(worker, 1.0) == Loss("its heartbeat process ended", None)


async def test_a_worker_whose_heartbeat_process_is_severed_is_lost_at_the_timeout_and_lives(start: Start) -> None:
    worker = start(7)
    with watching(worker) as (_, losses):
        worker.tell("activity.sever()")
        loss = await losses.of(worker, TIMEOUT_S + SLACK_S)
        assert loss == Loss("no heartbeat for 1 s: it was stopped, or cut off", None)
        assert worker.popen.poll() is None
    assert ends_within(worker.pid, GRACE_S + SLACK_S)


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b"x" * 20_000, id="endless"),
        pytest.param(b"1" * 13_000 + b"\n", id="long"),
        pytest.param(b"=1 x\n", id="ids of text"),
        pytest.param(b".\xff\n", id="no text"),
        pytest.param(b"=" + b"9" * 5000 + b"\n", id="a huge id"),
        pytest.param(b"=1  2\n", id="an empty id"),
    ],
)
async def test_a_heartbeat_process_that_sends_no_heartbeat_is_lost_and_others_are_watched_on(line: bytes) -> None:
    ours, theirs = socket.socketpair()
    honest, beating = socket.socketpair()
    with theirs, beating, contextlib.closing(Losses(TIMEOUT_S)) as losses:
        losses.add("hostile", ours)
        losses.add("honest", honest)
        theirs.sendall(line)
        loss = await losses.of("hostile", 1.0)
        assert loss == Loss("its heartbeat process sent malformed data", None)
        beating.sendall(b"=-3 4\n.5\n")
        assert await losses.of("honest", 1.0) == Loss("its process ended", (5,))


async def test_a_flood_of_heartbeats_does_not_hold_up_the_loop() -> None:
    ours, theirs = socket.socketpair()
    with theirs, contextlib.closing(Losses(TIMEOUT_S)) as losses:
        losses.add("flooding", ours)
        theirs.setblocking(False)
        longest = 0.0
        for _ in range(200):
            with contextlib.suppress(BlockingIOError):
                while True:
                    theirs.send(heartbeat_process.BEAT * 65536)
            began = time.monotonic()
            await asyncio.sleep(0)
            longest = max(longest, time.monotonic() - began)
    assert longest < 0.5


async def test_an_end_is_noticed_though_another_process_has_a_copy_of_the_socket() -> None:
    ours, theirs = socket.socketpair()
    with theirs, contextlib.closing(Losses(30)) as losses:
        losses.add(1, ours)
        theirs.send(heartbeat_process.ENDED + b"4 5\n")
        assert await losses.of(1, 1.0) == Loss("its process ended", (4, 5))


async def test_a_worker_that_never_sent_a_heartbeat_is_lost_at_the_timeout() -> None:
    ours, theirs = socket.socketpair()
    with theirs, contextlib.closing(Losses(0.2)) as losses:
        losses.add(1, ours)
        await losses.of(1, 0.2 + SLACK_S)


# Not lost.


async def test_a_busy_worker_is_not_lost(start: Start) -> None:
    async def seconds_of(worker: Worker, order: str) -> float:
        began = time.monotonic()
        worker.tell(order)
        assert await asyncio.to_thread(worker.line) == "done"
        return time.monotonic() - began

    sleeps_with_the_gil, works_with_the_gil, works_without = start(7), start(7), start(7)
    with watching(sleeps_with_the_gil, works_with_the_gil, works_without) as (_, losses):
        seconds = await asyncio.gather(
            seconds_of(sleeps_with_the_gil, "ctypes.PyDLL(None).usleep(3_000_000)"),
            seconds_of(works_with_the_gil, "sum(range(3 * 10**8))"),
            seconds_of(works_without, "hashlib.pbkdf2_hmac('sha256', b'', b'', 16 * 10**6)"),
        )
    assert min(seconds) > 1.5 * TIMEOUT_S
    assert not losses


async def test_a_worker_that_is_stopped_and_goes_on_in_time_is_not_lost(start: Start) -> None:
    worker = start(7)
    with watching(worker, timeout_s=5) as (_, losses):
        os.kill(worker.pid, signal.SIGSTOP)
        await asyncio.sleep(2 * heartbeat_process.INTERVAL_S)  # some signs that it is stopped
        os.kill(worker.pid, signal.SIGCONT)
        await asyncio.sleep(2 * heartbeat_process.INTERVAL_S)
        os.kill(worker.beating, signal.SIGKILL)
        # What it ran while it was stopped is not what it runs now.
        assert await losses.of(worker, 1.0) == Loss("its heartbeat process ended", None)


async def test_a_heartbeat_process_outlives_the_signals_that_are_sent_to_all(start: Start) -> None:
    worker = start(interval_s=0.02)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(worker.beating, number)
    worker.connection.settimeout(5)
    lines: list[bytes] = []
    while len(lines) < 20:
        lines += worker.connection.recv(100).splitlines()
    assert {line[:1] for line in lines} <= {b"", heartbeat_process.MEMORY}


async def test_a_driver_that_slept_loses_dead_workers_alone(start: Start) -> None:
    alive, dead = start(1), start(2)
    with watching(alive, dead) as (_, losses):
        dead.popen.kill()
        time.sleep(1.5 * TIMEOUT_S)  # the event loop with it
        await losses.of(dead, 1.0)
        await asyncio.sleep(2 * heartbeat_process.INTERVAL_S)
    assert list(losses) == [dead]


async def test_a_driver_that_is_often_late_loses_the_stopped_all_the_same(start: Start) -> None:
    alive, stopped = start(1, interval_s=0.05), start(2, interval_s=0.05)
    with watching(alive, stopped, timeout_s=0.3) as (_, losses):
        os.kill(stopped.pid, signal.SIGSTOP)
        deadline = time.monotonic() + 10
        while stopped not in losses and time.monotonic() < deadline:
            time.sleep(0.2)
            await asyncio.sleep(0)
    assert list(losses) == [stopped]


async def test_a_removed_worker_is_not_lost_and_ends_within_its_grace(start: Start) -> None:
    worker = start(7)
    with watching(worker) as (watch, losses):
        watch.remove(worker)
        watch.remove(worker)
        worker.connection.close()
        assert await asyncio.to_thread(ends_within, worker.pid, GRACE_S + SLACK_S)
    assert not losses


async def test_closed_watch_loses_no_worker(start: Start) -> None:
    first, second = start(1), start(2)
    with watching(first, second, timeout_s=0.3) as (watch, losses):
        os.kill(first.pid, signal.SIGSTOP)
        await losses.of(first, 5)
        watch.close()
        os.kill(second.pid, signal.SIGSTOP)
        await asyncio.sleep(0.8)
        assert list(losses) == [first]


async def test_request_to_leave_is_noticed_once_and_is_no_loss(start: Start) -> None:
    worker = start(7, interval_s=0.02)
    with watching(worker) as (watch, losses):
        assert not watch.asks_to_leave(worker)
        worker.tell("activity.ask_to_leave()")
        async with asyncio.timeout(5):
            while not watch.asks_to_leave(worker):
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert not losses
        watch.remove(worker)
        assert not watch.asks_to_leave(worker)


# From one watch to the next.


async def test_a_released_worker_lives_on_and_another_watch_takes_it(start: Start) -> None:
    worker = start(7, interval_s=0.02)
    with watching(worker) as (watch, losses):
        watch.remove(worker)
        losses.forget(worker)
    await asyncio.sleep(TIMEOUT_S)  # more time than a watched worker has, and than its grace
    with watching(worker) as (_, losses):
        await asyncio.sleep(2 * heartbeat_process.INTERVAL_S)
        assert not losses
        worker.popen.kill()
        assert await losses.of(worker, 1.0) == Loss("its process ended", (7,))


async def test_a_worker_stopped_between_two_watches_is_lost_with_its_calls(start: Start) -> None:
    worker = start(7)
    with watching(worker) as (watch, losses):
        os.kill(worker.pid, signal.SIGSTOP)
        await asyncio.sleep(2 * heartbeat_process.INTERVAL_S)
        watch.remove(worker)
        losses.forget(worker)
    with watching(worker) as (_, losses):
        assert (await losses.of(worker, TIMEOUT_S + SLACK_S)).running == (7,)


@pytest.mark.parametrize("is_full", [False, True])
async def test_a_worker_that_ends_between_two_watches_is_lost_with_its_calls(start: Start, is_full: bool) -> None:
    worker = start(7, is_full=is_full)
    worker.popen.kill()
    with watching(worker) as (_, losses):
        assert await losses.of(worker, 1.0) == Loss("its process ended", (7,))


async def test_message_half_read_by_one_watch_is_not_misread_by_the_next() -> None:
    ours, theirs = socket.socketpair()
    with theirs, contextlib.ExitStack() as stack:
        first = Watch(30)
        stack.callback(first.close)
        first.add(1, ours)
        theirs.send(heartbeat_process.ENDED + b"12")
        await asyncio.sleep(0.05)
        first.remove(1)
        losses = stack.enter_context(contextlib.closing(Losses(30)))
        losses.add(1, ours)
        theirs.send(b"34 5\n")
        theirs.close()
        assert await losses.of(1, 1.0) == Loss("its heartbeat process ended", None)


# The driver is gone.


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_worker_is_gone_within_its_grace_once_the_driver_is(start: Start, is_stopped: bool) -> None:
    worker = start(7)
    if is_stopped:
        os.kill(worker.pid, signal.SIGSTOP)
    worker.connection.close()
    assert worker.ending(GRACE_S + SLACK_S) == -signal.SIGKILL


def test_a_worker_that_holds_its_gil_is_gone_within_its_grace_once_the_driver_is(start: Start) -> None:
    worker = start(7)
    worker.tell("print('held', flush=True); ctypes.PyDLL(None).usleep(60_000_000)")
    assert worker.line() == "held"
    worker.connection.close()
    assert worker.ending(GRACE_S + SLACK_S) == -signal.SIGKILL


def test_a_worker_is_let_go_by_itself(start: Start) -> None:
    worker = start(7)
    worker.tell("signal.signal(signal.SIGCONT, lambda *_: os._exit(7))")
    assert worker.line() == "done"
    worker.connection.close()
    assert worker.ending(GRACE_S + SLACK_S) == 7


@pytest.mark.parametrize("then", ["pass", "watch.remove(1)"], ids=["watched", "released"])
def test_a_child_that_the_driver_forked_does_not_hide_its_end(start: Start, then: str) -> None:
    worker = start(7)
    driver = LightProcess(
        """
        import asyncio, os, signal, socket
        from torchfedrpc.rpc.heartbeat import Watch

        async def main(connection):
            watch = Watch(10)
            watch.add(1, connection)
            exec(sys.argv[2])
            child = os.fork()
            while not child:
                signal.pause()
            print(child, flush=True)
            await asyncio.sleep(60)

        asyncio.run(main(socket.socket(fileno=int(sys.argv[1]))))
        """,
        worker.connection.fileno(),
        then,
        pass_fds=[worker.connection.fileno()],
    )
    child = int(driver.line())
    worker.connection.close()
    assert worker.popen.poll() is None
    driver.close()
    try:
        assert worker.ending(GRACE_S + SLACK_S) == -signal.SIGKILL
        assert state_of(child) == "S"
    finally:
        os.kill(child, signal.SIGKILL)


# Nothing is left, and what /proc says is read right.


def test_a_heartbeat_process_that_is_stopped_leaves_no_process_and_no_descriptor() -> None:
    activity = Activity()
    before = os.listdir("/proc/self/fd")
    ours, theirs = socket.socketpair()
    beside = HeartbeatProcess(theirs, activity)
    beside.wait_for_beat()
    assert ours.recv(1) == heartbeat_process.BEAT
    beside.wait_for_beat()  # it has beaten, for any watch
    assert len(os.listdir("/proc/self/fd")) == len(before) + 2  # `ours`, and the pipe for the log
    beside.stop()
    assert not Path(f"/proc/{beside.pid}").exists()
    assert ours.recv(1) == b""
    ours.close()
    assert len(os.listdir("/proc/self/fd")) == len(before)
    activity.close()


def test_a_worker_that_logs_more_than_its_driver_reads_beats() -> None:
    activity, received = Activity(), b""
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 10)
    beside = HeartbeatProcess(theirs, activity, interval_s=0.05)
    while len(received) < 400_000:
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(beside.log, heartbeat_process.LOGGED + b"x" * 1000 + b"\n")
        received += ours.recv(2 << 10)
        time.sleep(0.005)  # it reads a third of what could be sent
    beside.stop()
    ours.close()
    activity.close()
    assert received[200_000:].count(b"\n" + heartbeat_process.BEAT) >= 2


def test_a_heartbeat_process_has_no_descriptors_but_its_own(start: Start) -> None:
    worker = start()
    assert len(os.listdir(f"/proc/{worker.beating}/fd")) == 3 + 5


def test_the_state_of_a_process_with_an_odd_name_is_read_right() -> None:
    fields = " ".join(map(str, range(4, 53))).encode()
    assert heartbeat_process.look(b"12 (R) 1 (x) S " + fields) == ("S", 10 + 12 + 14 + 15)


@pytest.mark.parametrize(
    ("states", "beats"),
    [
        (["S 5", "S 5", "S 5"], 3),  # idle
        (["D 5", "D 6", "D 7"], 3),  # it waits for its disk now and then, and gets on
        (["S 5", "D 5", "D 5", "D 5"], 1),  # swapped out, say
        (["S 5", "D 5", "D 5", "D 6", "D 6", "S 6"], 3),
    ],
    ids=str,
)
def test_heartbeat_process_beats_for_a_worker_in_uninterruptible_sleep_only_while_it_gets_on(
    monkeypatch: pytest.MonkeyPatch, states: list[str], beats: int
) -> None:
    activity, looks = Activity(), iter(states)
    ours, theirs = socket.socketpair()
    stat = os.open("/proc/self/stat", os.O_RDONLY)
    process = os.pidfd_open(os.getpid())
    pread, log = os.pread, heartbeat_process.Log(-1)

    def read(descriptor: int, count: int, offset: int) -> bytes:
        if descriptor != stat:
            return pread(descriptor, count, offset)
        if (look := next(looks, None)) is None:
            raise ConnectionResetError("all has been looked at")
        state, user_time = look.split()
        return f"7 (python) {state} {'0 ' * 10}{user_time} {'0 ' * 30}".encode()

    monkeypatch.setattr("torchfedrpc.rpc.heartbeat_process.os.pread", read)
    monkeypatch.setattr(heartbeat_process, "tell_begun", lambda: True)
    try:
        with pytest.raises(ConnectionResetError, match="looked at"):
            heartbeat_process.watch(
                theirs.fileno(), activity.descriptor, process, stat, log, os.getppid(), 0.0, GRACE_S
            )
        theirs.close()
        assert ours.recv(100).replace(heartbeat_process.MEMORY + b"0\n", b"") == heartbeat_process.BEAT * beats
    finally:
        activity.close()
        ours.close()
        theirs.close()
        os.close(stat)
        os.close(process)
