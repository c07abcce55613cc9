"""The driver's own place in the worlds of a run: it serves their stores, joins them with the workers, and leaves."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from torchfedrpc.host.process import choose_device, visible_gpus
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.rpc import world
from torchfedrpc.rpc.all_of import all_of
from torchfedrpc.rpc.control_link import Message
from torchfedrpc.rpc.interfaces import LOOPBACK, address_of, interface_of
from torchfedrpc.rpc.member import Member

_SECRET_BYTES = 32

Tell = Callable[[Member, Message], Awaitable[Message]]

# Over all runs of this process. Torch RPC needs no such number: `WorldFormed` tells subscribers of worlds by it.
_generations = itertools.count(1)


class DriverPlace:
    """The driver as a member of one world after another.

    Args:
        learner: what learners the workers make.
    """

    def __init__(self, learner: LearnerSpec) -> None:
        self._learner = learner
        # A thread of its own: the user's code may have filled those of the event loop.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="torchfedrpc-world")
        self._store: Any = None
        self._joining: asyncio.Future[None] | None = None  # the driver's own joining of its present world
        self._leaving: asyncio.Future[None] | None = None

    def check_interface(self, members: Sequence[Member]) -> None:
        """Check that the driver can listen where a world of these members has it listen.

        Raises:
            ConfigError: as of `world.check_interface`, or the interface does not exist.
        """
        world.check_interface(interface_of(self.address(members)))

    async def join(
        self, members: Sequence[Member], tell: Tell, asked: Callable[[str], list[int]]
    ) -> tuple[world.WorldPlan, dict[str, bytes]]:
        """Form a world with these workers, which are in none.

        Args:
            members: the workers, by rank.
            tell: has a worker do something.
            asked: gives the ids of the calls to a worker that were sent and not answered.

        Returns:
            The world, and by label the secret with which requests to that worker begin. Each worker knows its own
            alone: none can pose as the driver to another.

        Raises:
            WorkerLostError: a member was lost meanwhile, or could not join.
        """
        address = self.address(members)
        transport, channels = world.road(self._learner.runtime)
        self._store, port = world.serve_store(address)
        plan = world.WorldPlan(
            generation=next(_generations),
            labels=["driver", *(member.label for member in members)],
            store_host=address,
            store_port=port,
            transport=transport,
            channels=channels,
            gpus_in_sight=all(member.visible_gpus == visible_gpus() for member in members),
            device_maps=[_device_pair(self._learner, torch.device(member.device)) for member in members],
        )
        keys = {member.label: secrets.token_bytes(_SECRET_BYTES) for member in members}
        self._joining = self._in_thread(partial(world.join, plan, 0, interface_of(address)))
        message = {"do": "join", "plan": plan.to_message()}
        joining = [
            tell(
                member,
                {
                    **message,
                    "rank": rank,
                    "secret": keys[member.label].hex(),
                    "interface": self.interface(member, address),
                    "asked": asked(member.label),
                    "shows_files": member.pid is not None,
                },
            )
            for rank, member in enumerate(members, start=1)
        ]
        await all_of([asyncio.shield(self._joining), *joining], on_failure=self.let_go)
        return plan, keys

    def let_go(self) -> None:
        """Let whoever is joining give up."""
        self._store = None

    async def leave(self) -> None:
        """Leave the present world, if there is one."""
        if self._joining is not None and self._leaving is None:
            self._leaving = asyncio.ensure_future(self._end_world(self._joining))
        if self._leaving is not None:
            await asyncio.shield(self._leaving)
            self._joining = self._leaving = self._store = None

    async def close(self) -> None:
        """Leave, and join no other."""
        await self.leave()
        self._thread.shutdown(wait=False)

    def address(self, members: Sequence[Member]) -> str:
        """The driver's address for a world of these members."""
        if (name := self._learner.runtime.interface) is not None:
            return address_of(name)
        elsewhere = [member.link for member in members if member.elsewhere]
        return elsewhere[0].local_address() if elsewhere else address_of(LOOPBACK)

    def interface(self, member: Member, address: str) -> str | None:
        """The interface on which a worker listens; None: the one by which it reaches the driver at this address."""
        name = self._learner.runtime.interface
        return name if name is not None or member.elsewhere else interface_of(address)

    async def _end_world(self, joining: asyncio.Future[None]) -> None:
        # Where joining was cut short it still goes on in its thread; what it makes must be unmade.
        if not joining.done():  # a future that is done may be of a loop that is closed, see LearnerProxy.__aexit__
            await asyncio.wait([joining])
        if joining.exception() is None:
            await self._in_thread(world.leave)

    def _in_thread(self, function: Callable[[], None]) -> asyncio.Future[None]:
        return asyncio.get_running_loop().run_in_executor(self._thread, function)


def _device_pair(learner: LearnerSpec, device: torch.device) -> tuple[str, str] | None:
    """The driver's device and a worker's, between which tensors go directly."""
    if device.type != "cuda" or not torch.cuda.is_available() or learner.runtime.device_map == "none":
        return None
    return str(choose_device(torch.cuda.current_device())), str(device)
