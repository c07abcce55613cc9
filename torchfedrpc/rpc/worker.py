"""A worker: it obeys the messages of its driver on the control link, until it is stopped or the driver is gone."""

from __future__ import annotations

import atexit
import base64
import contextlib
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torchfedrpc import launcher
from torchfedrpc.host.activity import Activity
from torchfedrpc.host.faults import Fault
from torchfedrpc.host.learner_host import LearnerHost
from torchfedrpc.host.process import choose_device, frozen_modules, process_settings, visible_gpus
from torchfedrpc.host.process_state import ProcessState
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.host.torch_settings import adopt_settings
from torchfedrpc.rpc import endpoint, world
from torchfedrpc.rpc.control_link import Link, Message, in_short
from torchfedrpc.rpc.endpoint import Endpoint
from torchfedrpc.rpc.heartbeat import HeartbeatProcess
from torchfedrpc.rpc.heartbeat_connection import dial_heartbeat
from torchfedrpc.rpc.interfaces import address_of, interface_of, name_of
from torchfedrpc.rpc.surroundings import Session, adopt_main
from torchfedrpc.rpc.worker_log import WorkerLog
from torchfedrpc.wire.file import TensorFiles

# Exit statuses.
_DRIVER_GONE = 1
_GIVEN_UP = 1
_ABANDONED = 3  # a method went on after the end, and its thread was left behind
# A launcher looks at its ranks one by one, torchrun ten times a second, and blames the first that it finds ended. The
# driver should be the first.
_LAST_S = 0.5
_SIGNALS_S = 0.5  # until a signal is handled that did not interrupt the main thread's wait


@dataclass(frozen=True)
class Ending:
    """How a worker's work ended.

    Attributes:
        is_clean: whether all threads ended in time.
        reason: why the driver gave this worker up, or ended its run early; empty after a good run.
        was_asked: whether a signal asked this worker to leave.
    """

    is_clean: bool
    reason: str
    was_asked: bool = False


def main(link_descriptor: int) -> None:
    """Run a worker process that the driver started on its own machine.

    Args:
        link_descriptor: its end of the control link.
    """
    launcher.become_worker()
    with _handling({signal.SIGINT: signal.SIG_IGN}):
        ending = serve(_link_of(link_descriptor), is_own=True)
    _end_process(ending, 0)


def main_remote(link_descriptor: int) -> None:
    """Run a worker process that ``torchfedrpc-worker --listen`` started for a driver on any machine.

    Args:
        link_descriptor: its end of the control link.
    """
    ending = serve_remote(_link_of(link_descriptor))
    if ending.reason:
        print(_given_up(ending.reason), file=sys.stderr)
    _end_process(ending, _GIVEN_UP if ending.reason else 0)


def _link_of(descriptor: int) -> Link:
    os.set_inheritable(descriptor, False)
    return Link(socket.socket(fileno=descriptor))


def _end_process(ending: Ending, status: int) -> None:
    if ending.is_clean:
        atexit._run_exitfuncs()  # without the rest of the interpreter's end, which takes a second
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if ending.is_clean else _ABANDONED)


def _given_up(reason: str) -> str:
    return f"the driver does without this worker: {reason}"


def serve_remote(link: Link, welcome: str = "") -> Ending:
    """Serve learners for a driver that did not start this process; returns how that ended.

    Once the worker has joined its first world, ``welcome`` is printed unless it is empty.

    SIGTERM and SIGINT ask the driver to do without this worker: it moves the learners elsewhere and then stops the
    worker. A second signal ends the process at once.
    """
    launcher.become_worker()
    activity = Activity()

    def leave(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGINT, end)
        activity.ask_to_leave()

    def end(number: int, frame: object) -> None:
        os._exit(128 + number)

    with _handling({signal.SIGTERM: leave, signal.SIGINT: leave}):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})  # see processes.py
        return serve(
            link, activity=activity, notice="the driver is gone, or has given this worker up\n", welcome=welcome
        )


def serve_launch(link: Link, local_index: int) -> Ending:
    """Serve learners as a rank of a launch; returns how that ended.

    A launcher passes Ctrl-C and SIGTERM on to every rank. The driver handles them and stops its workers, or its end
    stops them.
    """
    with _handling({signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.SIG_IGN}):
        return serve(link, local_index=local_index, owns_process=False)


def serve(
    link: Link,
    *,
    local_index: int | None = None,
    activity: Activity | None = None,
    notice: str = "",
    welcome: str = "",
    owns_process: bool = True,
    is_own: bool = False,
) -> Ending:
    """Serve learners until the driver stops this worker.

    Args:
        link: this worker's end of the control link.
        local_index: this worker's number on its machine, for its share of the GPUs; None lets the driver choose.
        activity: shows the running calls to the heartbeat process; made unless given.
        notice: a line for stderr if the driver is gone.
        welcome: a line for stdout once this worker has joined its first world.
        owns_process: whether this process only serves, so that it may end in the middle of an import.
        is_own: whether the driver started this process, so that it may send classes by value.

    Returns:
        How that ended.
    """
    messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
    worker = _Worker(link, local_index, activity or Activity(), welcome, is_own=is_own)
    threading.Thread(
        target=_listen, args=(link, messages, worker, notice, owns_process), name="torchfedrpc-link", daemon=True
    ).start()
    while (message := _next(messages))["do"] != "stop":
        number = message.pop("number")
        try:
            answer = worker.obey(message)
        except (Exception, SystemExit) as error:  # a script may call sys.exit as it is imported
            answer = {
                "error": in_short(f"{type(error).__name__}: {error}"),
                "traceback": in_short(traceback.format_exc()),
            }
        worker.is_preparing = False
        with contextlib.suppress(OSError):  # the driver is gone, which the link's thread notices too
            link.send({**answer, "number": number})
    return worker.end(message["reason"])


def _next(messages: queue.SimpleQueue[Message]) -> Message:
    """Wait for a message. A signal that came in the moment before the wait is handled between two short ones."""
    while True:
        with contextlib.suppress(queue.Empty):
            return messages.get(timeout=_SIGNALS_S)


def _listen(
    link: Link, messages: queue.SimpleQueue[Message], worker: _Worker, notice: str, owns_process: bool
) -> None:
    """Receive messages; when the driver is gone, end this process whatever its other threads do."""
    with contextlib.suppress(ValueError):  # the driver ended in the middle of a message
        while (message := link.receive()) is not None:
            is_last = message["do"] == "stop"  # read before the main thread takes the message apart
            worker.is_preparing |= message["do"] == "prepare"
            if is_last and worker.is_preparing and owns_process:  # an import may never end
                reason = message["reason"]
                if reason:
                    os.write(2, f"{_given_up(reason)}\n".encode())
                os._exit(_GIVEN_UP if reason else 0)
            messages.put(message)
            if is_last:
                return
    os.write(2, notice.encode())  # another thread may hold the lock of sys.stderr
    if not owns_process:
        time.sleep(_LAST_S)
    os._exit(_DRIVER_GONE)


@contextlib.contextmanager
def _handling(handlers: Mapping[signal.Signals, Any]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Worker:
    """The state of a worker between messages: its host in a run, its endpoint in the worlds of that run.

    Attributes:
        is_preparing: whether it begins a run and has not answered yet.
    """

    def __init__(
        self, link: Link, local_index: int | None, activity: Activity, welcome: str = "", *, is_own: bool = False
    ) -> None:
        self.is_preparing = False
        self._welcome = welcome
        self._is_clean = True
        self._is_joined = False
        self._link = link
        self._heartbeat_process: HeartbeatProcess | None = None
        self._local_index = local_index
        self._activity = activity
        self._host: LearnerHost | None = None
        self._endpoint: Endpoint | None = None
        self._log: WorkerLog | None = None
        self._stack = ExitStack()
        self._session = Session(is_own=is_own)
        self._probe: TensorFiles | None = None  # the driver looks for it, to learn if it sees our files
        self._server = socket.socket()  # the driver connects to it, to learn whether it reaches this worker

    def obey(self, message: Message) -> Message:
        """Obey a message; returns the answer."""
        verbs: dict[str, Callable[..., Message]] = {
            "connect": self.connect,
            "take_session": self.take_session,
            "prepare": self.prepare,
            "join": self.join,
            "leave": self.leave,
            "close": self.close,
            "arm": self.arm,
            "interrupt": self.interrupt,
        }
        return verbs[message.pop("do")](**message)

    def connect(self, host: str, port: int, secret: str, interface: str | None, cut_off_timeout_s: float) -> Message:
        """Start the heartbeat on a new connection, and listen on an ephemeral port until the next message.

        Args:
            host: the driver's address in the world.
            port: the driver's port for this connection.
            secret: the first bytes on the connection, in hexadecimal digits.
            interface: this worker's network interface, or a range of addresses; None for that of the control link.
            cut_off_timeout_s: see `end_when_cut_off`.
        """
        address = address_of(interface) if interface is not None else self._link.local_address()
        self._link.end_when_cut_off(cut_off_timeout_s)
        connection = dial_heartbeat(host, port, bytes.fromhex(secret), cut_off_timeout_s, interface)
        self._heartbeat_process = HeartbeatProcess(connection, self._activity)
        self._heartbeat_process.wait_for_beat()
        self._server = socket.create_server((address, 0))
        return {"host": address, "port": self._server.getsockname()[1]}

    def take_session(self, data: str) -> Message:
        """Take a part of the classes of an interactive session, which `prepare` adopts."""
        self._session.take(base64.b64decode(data))
        return {}

    def prepare(
        self,
        spec: Message,
        label: str,
        local_index: int,
        main: Message | None,
        settings: dict[str, Any],
        driver: list[Any] | None = None,
        streams: list[Any] | None = None,
    ) -> Message:
        """Begin a run: import the learner's module. Learners are made later, one by one."""
        self.close()  # a run whose end was not received
        learner = LearnerSpec.from_message(spec)
        if self._heartbeat_process is not None:
            level, of_driver = learner.runtime.worker_log_level, [one and tuple(one) for one in streams or ()]
            self._log = self._stack.enter_context(WorkerLog(self._heartbeat_process.log, level, of_driver))
        self._session.adopt()
        if main is not None:
            adopt_main(main)
        device = choose_device(local_index if self._local_index is None else self._local_index)
        learner.load()
        self._stack.enter_context(frozen_modules())
        self._stack.enter_context(process_settings(learner.runtime))
        problems = adopt_settings(settings)  # after the import, which may set others
        driver_pid = driver[0] if driver is not None and TensorFiles.is_found(*driver) else None
        own = None
        if driver is not None:
            self._probe = TensorFiles.probe()
            own = (os.getpid(), self._probe.addresses()) if self._probe is not None else None
        self._endpoint = Endpoint(device, driver_pid)
        process = ProcessState(learner, device, report=self._endpoint.report, activity=self._activity)
        self._endpoint.host = self._host = LearnerHost(learner, process, worker=label)
        endpoint.serving = self._endpoint
        return {
            "device": str(device),
            "visible_gpus": visible_gpus(),
            "sees_files": driver_pid is not None,
            "files": own,
            "problems": problems,
            "process_id": os.getpid(),
        }

    def join(
        self, plan: Message, rank: int, secret: str, interface: str | None, asked: list[int], shows_files: bool
    ) -> Message:
        """Join a world and serve in it.

        Args:
            plan: the world.
            rank: this worker's rank in it.
            secret: the first bytes of the driver's requests to this worker, in hexadecimal digits.
            interface: its network interface for the world, or a range; None for the one of the control link.
            asked: ids of the calls to this worker whose answers the driver does not have.
            shows_files: whether the driver finds the files of this process.
        """
        assert self._host is not None
        assert self._endpoint is not None
        self._server.close()
        self._probe = None
        world_plan = world.WorldPlan.from_message(plan)
        covered = frozenset([self._endpoint.device] if world_plan.device_maps[rank - 1] else [])
        self._host.keep_only(asked)
        self._host.show_files(shows_files)
        self._endpoint.connect(bytes.fromhex(secret), covered)
        own = name_of(interface) if interface is not None else interface_of(self._link.local_address())
        world.join(world_plan, rank, own)
        self._is_joined = True
        if self._welcome:
            print(self._welcome, file=sys.__stdout__, flush=True)  # for who started the worker, not for the driver
            self._welcome = ""
        return {}

    def leave(self) -> Message:
        """Leave the world. The host keeps its learners, calls and outcomes for the next world."""
        if self._endpoint is not None:
            self._endpoint.disconnect()
        if self._is_joined:
            world.leave()
            self._is_joined = False
        return {}

    def close(self) -> Message:
        """End the run. The answer has the number of lines that it has logged."""
        if self._host is not None:
            self._is_clean &= self._host.close()
        self.leave()
        self._server.close()
        self._probe = None
        self._host = self._endpoint = endpoint.serving = None
        self._stack.close()
        log, self._log = self._log, None
        return {"num_logged": log.num_written() if log is not None else 0}

    def arm(self, faults: list[dict[str, Any]]) -> Message:
        """Let faults strike later calls, for a test."""
        assert self._host is not None
        self._host.arm([Fault(**fault) for fault in faults])
        return {}

    def interrupt(self) -> Message:
        """Interrupt cancelled methods that go on."""
        return {"goes_on": self._host is not None and self._host.interrupt()}

    def end(self, reason: str) -> Ending:
        """End the run, the heartbeat and the control link."""
        self.close()
        if self._heartbeat_process is not None:
            self._heartbeat_process.stop()
        ending = Ending(self._is_clean, reason, self._activity.asks_to_leave)
        self._activity.close()
        self._link.close()
        return ending
