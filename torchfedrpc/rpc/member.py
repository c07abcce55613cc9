"""A worker as its driver knows it."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torchfedrpc.errors import ConfigError, WorkerLostError
from torchfedrpc.rpc.control_link import Link, Message, in_short
from torchfedrpc.rpc.heartbeat import Loss
from torchfedrpc.wire.file import TensorFile

_DEVICE = re.compile(r"cpu|cuda:[0-9]{1,3}")


class RefusalError(WorkerLostError):
    """A worker that is there cannot do what it is told."""


@dataclass(eq=False)
class Member:
    """One worker process.

    Attributes:
        label: its name, such as ``worker1``, or the address where it listens; a replacement has the name of the one
            that it replaces.
        link: the driver's end of the control link.
        heartbeat: the driver's end of its heartbeat connection; None until it is opened.
        machine: the name of the machine that it runs on.
        dismiss: lets it go, wherever it is; takes why it was given up, empty where it was not.
        how_it_ended: what else is known of the process's end, as a clause behind "it ended"; empty for nothing.
        elsewhere: whether it is on another machine than the driver's (names need not differ).
        imports_main: how it comes to know what the driver's script defines: it has to import it, by its ``path`` or
            by its ``name``; None: it runs the script itself.
        learners: the clients whose learners it has.
        device: its device.
        visible_gpus: the GPUs that it is limited to.
        sees_files: whether it finds the files of the driver's process.
        pid: its process, where the driver finds the files of that; None where it does not.
        local_index: its number among the run's workers on its machine, from 0.
        has_served: whether it could be called at some time.
        wants_to_leave: whether it has asked to be released, and nobody was told yet.
        lost: becomes how it was lost, once it is; made when a run begins.
    """

    label: str
    link: Link
    heartbeat: socket.socket | None
    machine: str
    dismiss: Callable[[str], None]
    how_it_ended: Callable[[], str] = lambda: ""
    elsewhere: bool = False
    imports_main: Literal["path", "name"] | None = None
    learners: set[str] = field(default_factory=set)
    device: str = "cpu"
    visible_gpus: str | None = None
    sees_files: bool = False
    pid: int | None = None
    local_index: int = -1
    has_served: bool = False
    wants_to_leave: bool = False
    lost: asyncio.Future[Loss] = field(init=False)
    _turn: asyncio.Lock = field(init=False)

    def begin(self) -> None:
        """Begin a run on the running event loop."""
        self.learners = set()
        self.has_served = self.wants_to_leave = False
        self.lost = asyncio.get_running_loop().create_future()
        self._turn = asyncio.Lock()

    async def tell(self, message: Message) -> Message:
        """Have the worker do something, and await its answer.

        Raises:
            ConfigError: it cannot prepare for a run.
            RefusalError: it cannot do something else.
            WorkerLostError: its link ended, or what it answers is none.
        """
        async with self._turn:
            answer = await self.link.request(message, self.label)
        match answer:
            case {"error": str(reason), "traceback": str(traceback)}:
                kind = ConfigError if message["do"] == "prepare" else RefusalError
                error = kind(f"{self.label} could not {message['do']}: {in_short(reason)}")
                error.add_note(in_short(traceback))
                raise error
            case {"error": _}:
                raise self.misunderstood(message)
        return answer

    def adopt(self, answer: Message) -> bool:
        """Take what the worker tells of itself once it is prepared; whether that is of the right form."""
        match answer:
            case {
                "device": str(device),
                "visible_gpus": str() | None as visible_gpus,
                "sees_files": bool(sees_files),
                "files": [_, _] | None as files,
                "problems": list(problems),
            } if _DEVICE.fullmatch(device) and all(isinstance(problem, str) for problem in problems):
                self.device, self.visible_gpus, self.sees_files = device, visible_gpus, sees_files
                self.pid = files[0] if files is not None and TensorFile.is_found(*files) else None
                return True
        return False

    def misunderstood(self, message: Message) -> WorkerLostError:
        """The error for an answer of another form."""
        return WorkerLostError(
            f"{self.label} was told to {message['do']}, and its answer is not of the form that this version of "
            f"torchfedrpc sends; it is given up"
        )
