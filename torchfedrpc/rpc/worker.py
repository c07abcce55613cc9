"""A worker: does what its driver tells it over the control link, until it is told to stop or the driver is gone."""

from __future__ import annotations

import atexit
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
from dataclasses import dataclass, replace
from typing import Any

from torchfedrpc import launcher
from torchfedrpc.host.activity import Activity
from torchfedrpc.host.faults import Fault
from torchfedrpc.host.learner_host import LearnerHost
from torchfedrpc.host.process import choose_device, frozen_modules, process_settings, visible_gpus
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.host.torch_settings import adopt_settings
from torchfedrpc.rpc import endpoint, reach, world
from torchfedrpc.rpc.control_link import Link, Message, end_when_cut_off, in_short
from torchfedrpc.rpc.endpoint import Endpoint
from torchfedrpc.rpc.heartbeat import Sidecar
from torchfedrpc.rpc.interfaces import address_of, interface_of
from torchfedrpc.rpc.main_module import adopt_main
from torchfedrpc.wire.file import TensorFile

_DRIVER_GONE = 1  # exit status
_PATIENCE_S = 15.0  # with a driver that is out of reach before it has told its heartbeat_timeout_s
_GIVEN_UP = 1  # exit status
# A launcher looks at its ranks one by one, torchrun ten times a second, and blames the first that it finds ended: let
# that be the driver.
_LAST_S = 0.5
_ABANDONED = 3  # exit status: a method went on regardless of the end, so its thread had to be left behind


@dataclass(frozen=True)
class Ending:
    """How a worker's work ended.

    Attributes:
        is_clean: whether all threads ended in time.
        reason: why the driver gave this worker up, or ended its run early; empty where it did not.
        was_asked: whether this worker was told by a signal to leave.
    """

    is_clean: bool
    reason: str
    was_asked: bool = False


def main(descriptor: int, pulse_descriptor: int) -> None:
    """Body of a worker process that a driver started.

    Args:
        descriptor: its end of the link.
        pulse_descriptor: its end of the socket for its sidecar's beats.
    """
    os.set_inheritable(descriptor, False)
    os.set_inheritable(pulse_descriptor, False)
    launcher.become_worker()
    with _handling({signal.SIGINT: signal.SIG_IGN}):
        ending = serve(Link(socket.socket(fileno=descriptor)), socket.socket(fileno=pulse_descriptor))
    _end_process(ending, 0)


def _end_process(ending: Ending, status: int) -> None:
    if ending.is_clean:
        atexit._run_exitfuncs()  # the rest of the interpreter's end takes a second, and the driver waits
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if ending.is_clean else _ABANDONED)


def main_remote(descriptor: int, pulse_descriptor: int) -> None:
    """Body of a worker process that somebody else than its driver started, on whichever machine.

    Args:
        descriptor: its end of the link.
        pulse_descriptor: its end of the socket for its sidecar's beats.
    """
    os.set_inheritable(descriptor, False)
    os.set_inheritable(pulse_descriptor, False)
    ending = serve_remote(Link(socket.socket(fileno=descriptor)), socket.socket(fileno=pulse_descriptor))
    if ending.reason:
        print(_given_up(ending.reason), file=sys.stderr)
    _end_process(ending, _GIVEN_UP if ending.reason else 0)


def _given_up(reason: str) -> str:
    return f"the driver does without this worker: {reason}"


def serve_remote(link: Link, pulse: socket.socket) -> Ending:
    """Serve learners until the driver says stop; returns what `serve` does.

    SIGTERM and SIGINT ask the driver to do without this worker: it moves the learners elsewhere and then says stop.
    A second signal ends the process at once.
    """
    launcher.become_worker()
    activity = Activity()

    was_asked = False

    def leave(number: int, frame: object) -> None:
        nonlocal was_asked
        was_asked = True
        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGINT, end)
        activity.ask_to_leave()

    def end(number: int, frame: object) -> None:
        os._exit(128 + number)

    link.end_when_cut_off(_PATIENCE_S)
    end_when_cut_off(pulse, _PATIENCE_S)
    with _handling({signal.SIGTERM: leave, signal.SIGINT: leave}):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})  # see processes.py
        ending = serve(link, pulse, activity=activity, notice="the driver is gone, or has given this worker up\n")
        return replace(ending, was_asked=was_asked)


def serve_launch(link: Link, pulse: socket.socket, local_index: int) -> Ending:
    """Serve learners as a rank of a launch; returns what `serve` does.

    A launcher passes Ctrl-C and SIGTERM on to every rank: the driver handles them and tells its workers, or takes
    them along when it ends.
    """
    with _handling({signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.SIG_IGN}):
        return serve(link, pulse, local_index, owns_process=False)


def serve(
    link: Link,
    pulse: socket.socket,
    local_index: int | None = None,
    activity: Activity | None = None,
    notice: str = "",
    *,
    owns_process: bool = True,
) -> Ending:
    """Serve learners until the driver says stop.

    Args:
        link: this worker's end of the link.
        pulse: this worker's end of the socket for its sidecar's beats.
        local_index: this worker's number on its machine, for its share of the GPUs; None lets the driver tell.
        activity: tells what this process does; made unless given.
        notice: a line for stderr where the driver is gone.
        owns_process: whether this process is there for nothing else, so that it may end while it imports.

    Returns:
        How that ended.
    """
    messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
    worker = _Worker(link, pulse, local_index, activity or Activity())
    threading.Thread(
        target=_listen, args=(link, messages, worker, notice, owns_process), name="torchfedrpc-link", daemon=True
    ).start()
    while (message := messages.get())["do"] != "stop":
        number = message.pop("number")
        try:
            answer = worker.obey(message)
        except (Exception, SystemExit) as error:  # a script may call sys.exit as it is imported
            told = f"{type(error).__name__}: {error}"
            answer = {"error": in_short(told), "traceback": in_short(traceback.format_exc())}
        worker.is_preparing = False
        with contextlib.suppress(OSError):  # the driver is gone, which the link's thread sees too
            link.send({**answer, "number": number})
    return Ending(worker.end(), message["reason"])


def _listen(
    link: Link, messages: queue.SimpleQueue[Message], worker: _Worker, notice: str, owns_process: bool
) -> None:
    """Take messages from the link; when the driver is gone, so is this process, whatever it is doing."""
    with contextlib.suppress(ValueError):  # the driver ended in the middle of a message
        while (message := link.receive()) is not None:
            is_last = message["do"] == "stop"  # whoever takes it takes it apart
            worker.is_preparing |= message["do"] == "prepare"
            if is_last and worker.is_preparing and owns_process:  # an import may take for ever
                reason = message["reason"]
                if reason:
                    os.write(2, f"{_given_up(reason)}\n".encode())
                os._exit(_GIVEN_UP if reason else 0)
            messages.put(message)
            if is_last:
                return
    os.write(2, notice.encode())  # sys.stderr may be locked by what is running
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
    """What a worker has at hand between messages: its host for a run, its endpoint for the worlds of that run.

    Attributes:
        is_preparing: whether it is told to begin a run, and has not answered yet.
    """

    def __init__(self, link: Link, pulse: socket.socket, local_index: int | None, activity: Activity) -> None:
        self.is_preparing = False
        self._clean = True
        self._is_joined = False
        self._link = link
        self._pulse = pulse
        self._local_index = local_index
        self._activity = activity
        self._sidecar: Sidecar | None = None
        self._host: LearnerHost | None = None
        self._endpoint: Endpoint | None = None
        self._stack = ExitStack()
        self._probe: TensorFile | None = None  # which the driver looks for, to find out whether it sees such files
        self._door = socket.socket()  # which the driver tries, to find out whether it reaches this worker

    def obey(self, message: Message) -> Message:
        """Do what a message says, and answer it."""
        verbs: dict[str, Callable[..., Message]] = {
            "prepare": self.prepare,
            "join": self.join,
            "leave": self.leave,
            "close": self.close,
            "arm": self.arm,
            "reach": self.reach,
        }
        return verbs[message.pop("do")](**message)

    def prepare(
        self,
        spec: Message,
        label: str,
        local_index: int,
        main: Message | None,
        settings: dict[str, Any],
        driver: list[Any] | None = None,
    ) -> Message:
        """Begin a run: import what its learners need; they are made later, one by one."""
        self.close()  # a run whose end did not get through
        learner = LearnerSpec.from_message(spec)
        if self._sidecar is None:
            self._link.end_when_cut_off(learner.runtime.heartbeat_timeout_s)
            end_when_cut_off(self._pulse, learner.runtime.heartbeat_timeout_s)
            self._sidecar = Sidecar(self._pulse, self._activity)
        if main is not None:
            adopt_main(main)
        device = choose_device(local_index if self._local_index is None else self._local_index)
        learner.load()
        self._stack.enter_context(frozen_modules())
        self._stack.enter_context(process_settings(learner.runtime))
        problems = adopt_settings(settings)  # after the import, which may set its own
        driver_pid = driver[0] if driver is not None and TensorFile.is_found(*driver) else None
        own = None
        if driver is not None:
            self._probe = TensorFile.probe()
            own = (os.getpid(), self._probe.address()) if self._probe is not None else None
        self._endpoint = Endpoint(device, driver_pid)
        self._host = LearnerHost(
            learner,
            worker=label,
            device=device,
            report=self._endpoint.report,
            activity=self._activity,
            together=self._endpoint.together,
        )
        self._endpoint.host = self._host
        endpoint.serving = self._endpoint
        self._sidecar.wait_for_beat()
        sees_files = driver_pid is not None
        return {
            "device": str(device),
            "visible_gpus": visible_gpus(),
            "sees_files": sees_files,
            "files": own,
            "problems": problems,
        }

    def reach(self, host: str, port: int, interface: str | None) -> Message:
        """Find out whether this worker and the driver reach each other, as members of a world have to.

        Args:
            host: an address of the driver.
            port: where it listens there now.
            interface: this worker's network interface; None: the one with which it reaches the driver.
        """
        address = address_of(interface) if interface is not None else self._link.local_address()
        self._door.close()
        self._door = socket.create_server((address, 0))
        reach.dial(host, port)
        return {"host": address, "port": self._door.getsockname()[1]}

    def join(
        self, plan: Message, rank: int, secret: str, interface: str | None, asked: list[int], shows_files: bool
    ) -> Message:
        """Join a world and serve in it.

        Args:
            plan: the world.
            rank: this worker's rank in it.
            secret: what the driver's requests to this worker begin with, in hexadecimal digits.
            interface: its network interface for it; None: the one with which it reaches the driver.
            asked: ids of the calls to this worker that the driver has had no answer to.
            shows_files: whether the driver finds the files of this process.
        """
        assert self._host is not None
        assert self._endpoint is not None
        self._door.close()
        self._probe = None  # it was found, or was not
        world_plan = world.WorldPlan.from_message(plan)
        covered = frozenset([self._endpoint.device] if world_plan.device_maps[rank - 1] else [])
        self._host.keep_only(asked)
        self._host.show_files(shows_files)
        self._endpoint.connect(bytes.fromhex(secret), covered)
        world.join(world_plan, rank, interface or interface_of(self._link.local_address()))
        self._is_joined = True
        return {}

    def leave(self) -> Message:
        """Leave the world; the host goes on with what it has, for the next world to ask for."""
        if self._endpoint is not None:
            self._endpoint.disconnect()
        if self._is_joined:
            world.leave()
            self._is_joined = False
        return {}

    def close(self) -> Message:
        """End the run."""
        if self._host is not None:
            self._clean &= self._host.close()
        self.leave()
        self._door.close()
        self._probe = None
        self._host = self._endpoint = endpoint.serving = None
        self._stack.close()
        return {}

    def arm(self, faults: list[dict[str, Any]]) -> Message:
        """Let faults strike at calls to come, for a test."""
        assert self._host is not None
        assert self._sidecar is not None
        self._host.arm([Fault(**fault) for fault in faults], self._sidecar.suspend)
        return {}

    def end(self) -> bool:
        """End the run and the pulse; whether all of this process's threads ended in time."""
        self.close()
        if self._sidecar is not None:
            self._sidecar.stop()
        self._activity.close()
        self._pulse.close()
        self._link.close()
        return self._clean
