"""Static worlds of torch RPC: how a process joins and leaves one, and how the driver forms one after another."""

from __future__ import annotations

import asyncio
import atexit
import functools
import itertools
import os
import secrets
import socket
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError, WorkerLostError
from torchfedrpc.host.process import choose_device, visible_gpus
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.rpc import guard
from torchfedrpc.rpc.backend import set_connection_warnings, torch_rpc
from torchfedrpc.rpc.control_link import Message
from torchfedrpc.rpc.interfaces import LOOPBACK, address_of, interface_of
from torchfedrpc.rpc.member import Member
from torchfedrpc.rpc.rrefs import MAX_MEMBERS
from torchfedrpc.tasks import all_of

_INTERFACE = "TP_SOCKET_IFNAME"
_JOIN_TIMEOUT_S = 30.0
_NUM_THREADS = 4  # more threads are slower, since they hand the GIL around more often
_SECRET_BYTES = 32

# Before torch 2.8 the libuv store does not take a listening socket; the other store always did.
_HAS_LIBUV_LISTENER = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)

_distributed: Any = torch.distributed  # exports less to type checkers than it has
_cuda: Any = torch.cuda
_has_autograd = False
_has_rrefs = False
_agents_store: _LettingStore | None = None  # an agent does not keep it alive
_interface: str | None = None  # of this process's first agent; torch lets all later ones listen there too


Tell = Callable[[Member, Message], Coroutine[Any, Any, Message]]

# Over all runs of this process. Torch RPC needs no such number; the event `WorldFormed` has it.
_generations = itertools.count(1)


@dataclass(frozen=True)
class WorldPlan:
    """The description of a world, which all members get as JSON.

    Attributes:
        generation: number of the world, unique in the driver's process.
        store_host: the address at which the driver serves the world's store.
        store_port: the store's port.
        transport: TensorPipe's transport.
        channels: TensorPipe's channels for tensors in host memory.
        gpus_in_sight: whether all members see the same GPUs, as sharing of GPU memory needs.
        device_maps: per worker the driver's device and the worker's, between which tensors go directly.
    """

    generation: int
    store_host: str
    store_port: int
    transport: str
    channels: list[str]
    gpus_in_sight: bool
    device_maps: list[tuple[str, str] | None]

    @property
    def size(self) -> int:
        """Number of members: the driver and the workers."""
        return 1 + len(self.device_maps)

    def name(self, rank: int) -> str:
        """Return the RPC name of a member, which has only letters and digits.

        A rank has the same name in all worlds, since a process's RRef context keeps the names of its first world.
        """
        return f"rank{rank}"

    def to_message(self) -> dict[str, Any]:
        """Convert to plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> WorldPlan:
        """Return the plan that `to_message` has converted."""
        maps = [tuple(pair) if pair else None for pair in message["device_maps"]]
        return cls(**{**message, "device_maps": maps})


def choose_transport(runtime: RuntimeConfig) -> tuple[str, list[str]]:
    """Choose TensorPipe's transport, and its channels for tensors in host memory.

    With the defaults a whole round is fastest. ``shm`` has shorter empty calls, but a thread of each process spins on
    a core. ``mpt_uv`` adds half a millisecond to each message with tensors of any size.

    Raises:
        ConfigError: If this build of torch lacks the configured ones.
    """
    transport = "uv" if runtime.transport == "auto" else runtime.transport
    channels = runtime.channels or [name for name in ("cma", "basic") if _has(_channels=[name])]
    if not _has(_transports=[transport]):
        raise ConfigError(f"runtime.transport={transport}: this build of torch does not have it; set transport=auto")
    if not _has(_channels=channels):
        raise ConfigError(f"runtime.channels={channels}: this build of torch has not all of them; set channels=[]")
    return transport, channels


def _has(**options: list[str]) -> bool:
    """Return whether torch's TensorPipe has these transports or channels; macOS lacks ``shm`` and ``cma``."""
    try:
        torch_rpc().TensorPipeRpcBackendOptions(**options)
    except RuntimeError:
        return False
    return True


def serve_store(host: str) -> tuple[Any, int]:
    """Serve a world's store on one address only, since TCPStore would listen on all.

    Returns:
        The store, which serves as long as it lives, and its port.
    """
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    timeout = timedelta(seconds=_JOIN_TIMEOUT_S)
    store = _distributed.TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timeout,
        master_listen_fd=listener.detach(),
        use_libuv=_HAS_LIBUV_LISTENER,
    )
    return store, port


def check_interface(interface: str) -> None:
    """Check that this process can listen on an interface.

    An agent of the driver on loopback is fine too, since no member connects to it.

    Raises:
        ConfigError: If torch RPC has listened on another one in this process, and would do so again.
    """
    if _interface not in (None, LOOPBACK, interface):
        raise ConfigError(
            f"torch RPC listens on one network interface for the life of a process: here on {_interface}, which an "
            f"earlier proxy used, and this one is for {interface}. Set runtime.interface={_interface}, or open this "
            f"proxy in a new process"
        )


def join(plan: WorldPlan, rank: int, interface: str) -> None:
    """Join a world. Returns when all members have joined, or the driver has given the world up.

    This does the same as ``init_rpc``, without its process group. The group collects the device maps, which the plan
    has, and lets members wait for each other, which the driver does by the control links. A member that froze in the
    group would hold up the others for ever.

    Args:
        plan: the world.
        rank: this process's rank in it.
        interface: this process's network interface for it.

    Raises:
        WorkerLostError: If a member is missing after 30 s.
    """
    global _agents_store, _interface
    rpc = torch_rpc()
    # The driver is a client of its own store too: torch keeps the first agent of a process, and what the agent holds,
    # until the process ends.
    timeout = timedelta(seconds=_JOIN_TIMEOUT_S)
    maps, reverse_maps, devices = _devices(plan, rank)
    options = rpc.TensorPipeRpcBackendOptions(
        num_worker_threads=_NUM_THREADS,
        rpc_timeout=_JOIN_TIMEOUT_S,
        device_maps=maps,
        _transports=[plan.transport],
        _channels=_channels(plan),
    )
    if devices:
        _cuda.init()  # requests with CUDA tensors may come before anything of this process uses CUDA
    _start_autograd(rank)
    _leave_at_exit()
    guard.install()
    set_connection_warnings(False)
    try:
        client = _distributed.TCPStore(plan.store_host, plan.store_port, is_master=False, timeout=timeout)
        world_size = plan.size
        # Torch looks for the owner of any later RRef in the driver's first agent, whose world may have fewer ranks.
        num_names = max(world_size, MAX_MEMBERS) if rank == 0 and not _has_rrefs else world_size
        _agents_store = store = _LettingStore(client, _stand_ins(plan, range(world_size, num_names)))
        with _bound_to(interface):
            agent = rpc.TensorPipeAgent(store, plan.name(rank), rank, num_names, options, reverse_maps, devices)
            _interface = _interface or interface  # the agent looks it up as it starts, in the next line
            rpc.api._init_rpc_states(agent)
        _start_rrefs()
    except BaseException as error:
        if rpc.api._is_current_rpc_agent_set():  # an agent runs already
            leave()
        _clean_up()
        if isinstance(error, RuntimeError):
            raise WorkerLostError(
                f"a member did not join within {_JOIN_TIMEOUT_S:.0f} s, or ended: {error}"
            ) from error
        raise


def leave() -> None:
    """Leave the world without waiting for others, since a graceful shutdown can hang on a dead member."""
    rpc = torch_rpc()
    # RPC's own shutdown first reads the RRefs of others without a lock, while its threads may delete them.
    rpc.api._get_current_rpc_agent().shutdown()
    rpc.shutdown(graceful=False)
    _clean_up()


class DriverPlace:
    """The driver as a member of one world after another.

    Args:
        learner: the learner that the workers make.
    """

    def __init__(self, learner: LearnerSpec) -> None:
        self._learner = learner
        # A separate thread, since user code may have filled the threads of the event loop.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="torchfedrpc-world")
        self._store: Any = None  # of the present world; served until all of its members have left it
        self._plan: WorldPlan | None = None
        self._joining: asyncio.Future[None] | None = None  # the driver's own joining of its present world
        self._leaving: asyncio.Future[None] | None = None

    def check_interface(self, members: Sequence[Member]) -> None:
        """Check that the driver can listen in a world of these members.

        Raises:
            ConfigError: If the interface does not exist, or as for the function `check_interface`.
        """
        check_interface(interface_of(self.address(members)))

    async def join(self, members: Sequence[Member], tell: Tell) -> tuple[WorldPlan, dict[str, bytes]]:
        """Form a world with these workers, which are in none.

        Args:
            members: the workers, by rank.
            tell: sends a worker a message, and returns its answer.

        Returns:
            The world, and by label the first bytes of all requests to that worker. Each worker gets only its own
            secret, so that it cannot pose as the driver to another.

        Raises:
            WorkerLostError: If a member was lost meanwhile, or could not join.
        """
        address = self.address(members)
        transport, channels = choose_transport(self._learner.runtime)
        self._store, port = serve_store(address)
        self._plan = plan = WorldPlan(
            generation=next(_generations),
            store_host=address,
            store_port=port,
            transport=transport,
            channels=channels,
            gpus_in_sight=all(member.visible_gpus == visible_gpus() for member in members),
            device_maps=[_device_pair(self._learner, torch.device(member.device)) for member in members],
        )
        keys = {member.label: secrets.token_bytes(_SECRET_BYTES) for member in members}
        self._joining = self._in_thread(partial(join, plan, 0, interface_of(address)))
        message = {"do": "join", "plan": plan.to_message()}
        joining = [
            tell(
                member,
                {
                    **message,
                    "rank": rank,
                    "secret": keys[member.label].hex(),
                    "interface": self.interface(member, address),
                    "asked": list(member.sent),
                    "shows_files": member.pid is not None,
                },
            )
            for rank, member in enumerate(members, start=1)
        ]
        try:
            await all_of(self._joined(), *joining)
        except BaseException:
            self.let_go()
            raise
        return plan, keys

    def let_go(self) -> None:
        """Give the present world up: members that are joining it wait for no other, and leave it with all others.

        The store is served on, since a member may connect to it only later, and looks for a closed one for 30 s.
        """
        if self._store is not None and self._plan is not None:
            for key, value in _stand_ins(self._plan, range(self._plan.size)).items():
                self._store.set(key, value)

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
        """Return the driver's address in a world of these members."""
        if (name := self._learner.runtime.interface) is not None:
            return address_of(name)
        elsewhere = [member.link for member in members if member.elsewhere]
        return elsewhere[0].local_address() if elsewhere else address_of(LOOPBACK)

    def interface(self, member: Member, address: str) -> str | None:
        """Return the interface on which a worker listens; None for that of its control link."""
        name = self._learner.runtime.interface
        return name if name is not None or member.elsewhere else interface_of(address)

    async def _joined(self) -> None:
        assert self._joining is not None
        await asyncio.shield(self._joining)

    async def _end_world(self, joining: asyncio.Future[None]) -> None:
        # A joining that was cut short still goes on in its thread, and its result must be undone.
        if not joining.done():  # a future that is done may be of a closed loop, see LearnerProxy.__aexit__
            await asyncio.wait([joining])
        if joining.exception() is None:
            await self._in_thread(leave)

    def _in_thread(self, function: Callable[[], None]) -> asyncio.Future[None]:
        return asyncio.get_running_loop().run_in_executor(self._thread, function)


def _device_pair(learner: LearnerSpec, device: torch.device) -> tuple[str, str] | None:
    """Return the devices of the driver and of a worker between which tensors go directly; None for none."""
    if device.type != "cuda" or not torch.cuda.is_available() or learner.runtime.device_map == "none":
        return None
    return str(choose_device(torch.cuda.current_device())), str(device)


class _LettingStore(_distributed.Store):  # type: ignore[misc]
    """A store that releases the GIL while it waits.

    The constructor of torch's agent waits at its store with the GIL held, as long as a member is missing. The event
    loop would stand still, and the loss of the member would go unnoticed.

    Args:
        store: the store of the world, whose methods release the GIL.
        absent: values of keys that are answered without it.
    """

    def __init__(self, store: Any, absent: Mapping[str, bytes]) -> None:
        super().__init__()
        self._store = store
        self._absent = absent

    def set(self, key: str, value: bytes) -> None:
        """Store a value."""
        self._store.set(key, value)

    def compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        """Store a value if the present one is as expected; returns the value afterwards."""
        value: bytes = self._store.compare_set(key, expected, desired)
        return value

    def get(self, key: str) -> bytes:
        """Wait for a value."""
        absent = self._absent.get(key)
        value: bytes = self._store.get(key) if absent is None else absent
        return value


def _stand_ins(plan: WorldPlan, ranks: Iterable[int]) -> dict[str, bytes]:
    """Return the keys in a store for which torch's agents wait, for ranks that do not set them."""
    names = {f"names/{rank}": plan.name(rank).encode() for rank in ranks}
    return names | {f"addrs/{plan.name(rank)}": b"" for rank in ranks}


def _clean_up() -> None:
    global _agents_store
    _agents_store = None
    guard.remove()
    set_connection_warnings(True)


def _devices(plan: WorldPlan, rank: int) -> tuple[Any, Any, list[torch.device]]:
    """Return a member's device maps, the inverse of the others' maps to it, and its devices.

    Only the driver has maps; answers travel by their inverse.
    """
    pairs = {number: pair for number, pair in enumerate(plan.device_maps, start=1) if pair}
    if rank == 0:
        maps = {plan.name(number): {ours: theirs} for number, (ours, theirs) in pairs.items()}
        return maps, {}, [torch.device(ours) for ours in sorted({ours for ours, _ in pairs.values()})]
    if rank not in pairs:
        return {}, {}, []
    theirs, ours = (torch.device(name) for name in pairs[rank])
    return {}, {plan.name(0): {ours: theirs}}, [ours]


def _channels(plan: WorldPlan) -> list[str]:
    gpu = ["cuda_xth", "cuda_basic"] if any(plan.device_maps) else []
    shared = ["cuda_ipc"] if gpu and plan.gpus_in_sight else []
    return [*shared, *gpu, *plan.channels]


def _start_autograd(rank: int) -> None:
    """Start torch's distributed autograd, which RPC needs for each message although it is not used here.

    It takes the rank of the first world for the life of the process.
    """
    global _has_autograd
    if not _has_autograd:
        torch_rpc().dist_autograd._init(rank)
        _has_autograd = True


def _start_rrefs() -> None:
    """Make the RRef context of this process, with its first agent, and let it send no messages; see `rpc.rrefs`."""
    global _has_rrefs
    if not _has_rrefs:
        torch_rpc().api._destroy_rref_context(True)  # it is empty, and stays in use
        _has_rrefs = True


@functools.cache
def _leave_at_exit() -> None:
    """Leave the world at exit if a script has not closed its proxy, since torch would abort the process."""

    def leave_if_joined() -> None:
        if torch_rpc().api._is_current_rpc_agent_set():
            leave()

    atexit.register(leave_if_joined)


@contextmanager
def _bound_to(interface: str) -> Iterator[None]:
    """Let TensorPipe listen on that interface, which it reads from the environment."""
    before = os.environ.get(_INTERFACE)
    os.environ[_INTERFACE] = interface
    try:
        yield
    finally:
        if before is None:
            del os.environ[_INTERFACE]
        else:
            os.environ[_INTERFACE] = before
