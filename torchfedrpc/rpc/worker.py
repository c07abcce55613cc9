"""A worker: does what its driver tells it over the control link, until it is told to stop or the driver is gone."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack

import torch

from torchfedrpc import launcher
from torchfedrpc.host.learner_host import LearnerHost
from torchfedrpc.host.process import adopt_torch_defaults, choose_device, process_settings, visible_gpus
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.rpc import endpoint, world
from torchfedrpc.rpc.endpoint import Endpoint
from torchfedrpc.rpc.interfaces import interface_of
from torchfedrpc.rpc.link import Link, Message
from torchfedrpc.rpc.main_module import adopt_main

logger = logging.getLogger(__name__)

_DRIVER_GONE = 1  # exit status
_ABANDONED = 3  # exit status: a method went on regardless of the end, so its thread had to be left behind


def main(descriptor: int) -> None:
    """Body of a worker process that a driver started: ``descriptor`` is its end of the link."""
    os.set_inheritable(descriptor, False)
    launcher.become_worker()
    clean = serve(Link(socket.socket(fileno=descriptor)), local_index=None)
    sys.stdout.flush()
    sys.stderr.flush()
    if not clean:
        os._exit(_ABANDONED)


def serve(link: Link, local_index: int | None) -> bool:
    """Serve learners until the driver says stop.

    Args:
        link: this worker's end of the link.
        local_index: this worker's number on its machine, for its share of the GPUs; None lets the driver tell.

    Returns:
        Whether all of this process's threads ended in time.
    """
    messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(link, messages), name="torchfedrpc-link", daemon=True).start()
    worker = _Worker(link, local_index)
    with _ignoring_interrupts():
        while True:
            message = messages.get()
            if message["do"] == "stop":
                worker.leave()
                return worker.clean
            number = message.pop("number")
            try:
                answer = worker.obey(message)
            except (Exception, SystemExit) as error:  # a script may call sys.exit as it is imported
                answer = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
            link.send({**answer, "number": number})


def _listen(link: Link, messages: queue.SimpleQueue[Message]) -> None:
    """Take messages from the link; when the driver is gone, so is this process, whatever it is doing."""
    with contextlib.suppress(ValueError):  # the driver ended in the middle of a message
        while (message := link.receive()) is not None:
            messages.put(message)
            if message["do"] == "stop":
                return
    os._exit(_DRIVER_GONE)


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Ctrl-C reaches every process of a terminal; the driver handles it and tells its workers."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Worker:
    """What a worker has at hand between messages."""

    def __init__(self, link: Link, local_index: int | None) -> None:
        self.clean = True
        self._joined = False
        self._link = link
        self._local_index = local_index
        self._host: LearnerHost | None = None
        self._device = torch.device("cpu")
        self._stack = ExitStack()

    def obey(self, message: Message) -> Message:
        verb = message.pop("do")
        if verb == "prepare":
            return self.prepare(**message)
        if verb == "join":
            return self.join(**message)
        if verb == "leave":
            return self.leave()
        raise ValueError(f"unknown message {verb!r}")

    def prepare(
        self, spec: Message, label: str, local_index: int, main: Message | None, defaults: dict[str, str]
    ) -> Message:
        """Import what the learners need; they are made later, one by one."""
        if main is not None:
            adopt_main(main)
        learner = LearnerSpec.from_message(spec)
        self._device = choose_device(local_index if self._local_index is None else self._local_index)
        self._label = label
        self._learner = learner
        learner.load()
        adopt_torch_defaults(defaults)  # after the import, which may set its own
        return {"device": str(self._device), "visible_gpus": visible_gpus()}

    def join(self, plan: Message, rank: int) -> Message:
        """Join a world and serve in it."""
        world_plan = world.WorldPlan.from_message(plan)
        covered = frozenset([self._device] if world_plan.device_maps[rank - 1] else [])
        served = Endpoint(world_plan.name(0), rank, self._device, covered)
        self._stack.enter_context(process_settings(self._learner.runtime))
        self._host = LearnerHost(self._learner, worker=self._label, device=self._device, report=served.report)
        served.host = self._host
        endpoint.serving = served
        world.join(world_plan, rank, world_plan.interface or interface_of(self._link.local_address()))
        self._joined = True
        return {}

    def leave(self) -> Message:
        """End the host and leave the world."""
        if self._host is not None:
            self.clean &= self._host.close()
            self._host = endpoint.serving = None
        if self._joined:
            world.leave()
            self._joined = False
        self._stack.close()
        return {}
