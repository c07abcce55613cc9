"""All workers of a run, as their driver sees them: told what to do over their links, called in one world."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torchfedrpc.errors import ConfigError, WorkerLostError
from torchfedrpc.host.process import choose_device, torch_defaults, visible_gpus
from torchfedrpc.host.runner import Report
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.rpc import endpoint, world
from torchfedrpc.rpc.interfaces import LOOPBACK, address_of, interface_of
from torchfedrpc.rpc.link import Link, Message
from torchfedrpc.rpc.main_module import describe_main
from torchfedrpc.rpc.remote_host import RemoteHost

# Over all runs of this process, since torch RPC remembers a world by the names of its members.
_generations = itertools.count(1)
_LEAVE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Member:
    """A worker that has its link to the driver.

    Attributes:
        link: the driver's end.
        machine: the name of the machine that it runs on.
        elsewhere: whether that is another machine than the driver's (names need not differ).
        imports_main: whether it has to import the driver's script to know what is defined there.
    """

    link: Link
    machine: str
    elsewhere: bool = False
    imports_main: bool = False


class WorkerGroup:
    """The workers of a run in their world; rank r is ``hosts[r - 1]``.

    Args:
        members: the workers, by rank.
        learner: what learners they make.
    """

    def __init__(self, members: Sequence[Member], learner: LearnerSpec) -> None:
        self.members = tuple(members)
        self.hosts: list[RemoteHost] = []
        self._learner = learner
        self._store: Any = None
        self._joining: asyncio.Future[None] | None = None  # the driver's own joining of the world

    async def form(self, on_report: Report) -> None:
        """Let all workers import the learner, then form the world with them.

        Args:
            on_report: takes what running methods report, on a thread of RPC.

        Raises:
            ConfigError: a worker cannot import the learner, or the interface does not exist.
            WorkerLostError: a worker ended meanwhile.
        """
        answers = await self._prepare()
        interface, address = self._interface()
        self._store, port = world.serve_store(address)
        plan = world.WorldPlan(
            generation=next(_generations),
            num_workers=len(self.members),
            store_host=address,
            store_port=port,
            interface=interface,
            transport=self._learner.runtime.transport,
            gpus_in_sight=all(answer["visible_gpus"] == visible_gpus() for answer in answers),
            device_maps=[_device_pair(self._learner, torch.device(answer["device"])) for answer in answers],
        )
        endpoint.listening = endpoint.Listener(on_report)
        message = {"do": "join", "plan": plan.to_message()}
        joining = self._tell_all(lambda index: {**message, "rank": index + 1})
        ours = interface or interface_of(address)
        self._joining = asyncio.ensure_future(asyncio.to_thread(world.join, plan, 0, ours))
        await asyncio.gather(asyncio.shield(self._joining), joining)
        self.hosts = [
            RemoteHost(plan.name(rank), f"worker{rank}", frozenset([torch.device(pair[0])] if pair else []))
            for rank, pair in enumerate(plan.device_maps, start=1)
        ]

    async def disband(self) -> None:
        """End the world; the workers that still are there stay at hand for another."""
        for host in self.hosts:
            host.forget()
        self.hosts = []
        # A worker that is gone, or frozen, cannot leave; the world ends without it.
        with contextlib.suppress(TimeoutError, WorkerLostError):
            async with asyncio.timeout(_LEAVE_TIMEOUT_S):
                await self._tell_all(lambda index: {"do": "leave"})
        joining, self._joining = self._joining, None
        if joining is not None:
            # Where joining was cut short it still goes on in its thread; what it makes must be unmade.
            await asyncio.wait([joining])
            if joining.exception() is None:
                await asyncio.to_thread(world.leave)
        self._store = endpoint.listening = None

    async def _prepare(self) -> list[Message]:
        """Let all workers import the learner; each answers with its device and the GPUs that it sees."""
        learner = self._learner
        main = describe_main() if "__main__" in learner.allow_list().trusted else None
        return await self._tell_all(
            lambda index: {
                "do": "prepare",
                "spec": learner.to_message(),
                "label": f"worker{index + 1}",
                "local_index": index,
                "main": main if self.members[index].imports_main else None,
                "defaults": torch_defaults(),
            }
        )

    def _interface(self) -> tuple[str | None, str]:
        """The interface on which this world listens (None: each its own), and the driver's address there."""
        name = self._learner.runtime.interface
        if name is not None:
            return name, address_of(name)
        elsewhere = [member.link for member in self.members if member.elsewhere]
        return (None, elsewhere[0].local_address()) if elsewhere else (LOOPBACK, address_of(LOOPBACK))

    async def _tell_all(self, message: Callable[[int], Message]) -> list[Message]:
        telling = (self._tell(index, message(index)) for index in range(len(self.members)))
        answers = await asyncio.gather(*telling, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    async def _tell(self, index: int, message: Message) -> Message:
        answer = await self.members[index].link.request(message, f"worker{index + 1}")
        if (reason := answer.get("error")) is None:
            return answer
        kind = ConfigError if message["do"] == "prepare" else WorkerLostError
        error = kind(f"worker{index + 1} could not {message['do']}: {reason}")
        error.add_note(answer["traceback"])
        raise error


def _device_pair(learner: LearnerSpec, device: torch.device) -> tuple[str, str] | None:
    """The driver's device and a worker's, between which tensors go directly."""
    if device.type != "cuda" or not torch.cuda.is_available() or learner.runtime.device_map == "none":
        return None
    return str(choose_device(torch.cuda.current_device())), str(device)
