"""What tests and chaos know of the inside of an open proxy: the one place to change when that changes."""

from __future__ import annotations

import os
import signal
from typing import Any

from processes import children_of

import torchfedrpc as tfr


def pid_of(proxy: tfr.LearnerProxy, worker: str) -> int | None:
    """The process that serves as a worker now; None if there is none, or another process started it."""
    executor: Any = proxy._router._main
    member = executor._group.members.get(worker)
    process = executor._processes.get(member)
    return process.pid if process is not None else None


def started_pid_of(proxy: tfr.LearnerProxy, worker: str) -> int | None:
    """The same, also of one that was started and is not ready yet."""
    executor: Any = proxy._router._main
    return next((process.pid for member, process in executor._processes.items() if member.label == worker), None)


def worker_of(proxy: tfr.LearnerProxy, client_id: str) -> str:
    """The worker that has a client's learner."""
    executor: Any = proxy._router.get_executor(client_id)
    worker: str = executor.worker_of(client_id)
    return worker


def forming(proxy: tfr.LearnerProxy) -> str:
    """The step of forming a world that is under way: ``all leave``, ``all join``; empty if there is none."""
    executor: Any = proxy._router._main
    group = executor._group
    if group.hosts or group._mending is None or group._mending.done():
        return ""
    place = group._place
    return "all join" if place._store is not None and not place._joining.done() else "all leave"


def is_in_next_world(proxy: tfr.LearnerProxy, worker: str) -> bool:
    """Whether a worker, or the process that replaces it, takes part in the world that is formed."""
    executor: Any = proxy._router._main
    return worker in executor._group.members


def heartbeat_pid(worker_pid: int) -> int | None:
    """The process that sends the heartbeats of a worker process, once it is there."""
    return next(iter(children_of(worker_pid)), None)


def silence(heartbeat_process: int) -> None:
    """Let a worker work on while its heartbeats stop, as where the network fails."""
    os.kill(heartbeat_process, signal.SIGUSR1)
