"""One static world of torch RPC: joining it and leaving it."""

from __future__ import annotations

import atexit
import functools
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError, WorkerLostError
from torchfedrpc.rpc import guard
from torchfedrpc.rpc.backend import set_connection_warnings, torch_rpc
from torchfedrpc.rpc.interfaces import LOOPBACK
from torchfedrpc.rpc.rrefs import MAX_MEMBERS

_INTERFACE = "TP_SOCKET_IFNAME"
_JOIN_TIMEOUT_S = 30.0
_NUM_THREADS = 4  # more of them hand the GIL around more often and are slower

# Before torch 2.8 its store of libuv does not take a socket that listens; the other one has always done.
_HAS_LIBUV_LISTENER = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)

_distributed: Any = torch.distributed  # exports less to type checkers than it has
_cuda: Any = torch.cuda
_has_autograd = False
_has_rrefs = False
_agents_store: _LettingStore | None = None  # an agent does not keep it alive
_interface: str | None = None  # of this process's first agent; torch has all later ones listen there too


@dataclass(frozen=True)
class WorldPlan:
    """What every member must know of a world to join it; plain data, for JSON.

    Attributes:
        generation: number of the world, which no other world of the driver's process has.
        labels: its members by rank: ``driver``, ``worker1``, ...
        store_host: where the driver serves the world's store.
        store_port: its port there.
        transport: TensorPipe's transport.
        channels: TensorPipe's channels for tensors in host memory.
        gpus_in_sight: whether all members see the same GPUs, without which they cannot share GPU memory.
        device_maps: per worker the driver's device and the worker's, between which tensors go directly.
    """

    generation: int
    labels: list[str]
    store_host: str
    store_port: int
    transport: str
    channels: list[str]
    gpus_in_sight: bool
    device_maps: list[tuple[str, str] | None]

    def name(self, rank: int) -> str:
        """The RPC name of a member, of letters and digits, as a label need not be.

        It is the same in all worlds: the RRef context of a process knows members by the names of its first one.
        """
        return f"rank{rank}"

    def to_message(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> WorldPlan:
        """What `to_message` described."""
        maps = [tuple(pair) if pair else None for pair in message["device_maps"]]
        return cls(**{**message, "device_maps": maps})


def road(runtime: RuntimeConfig) -> tuple[str, list[str]]:
    """TensorPipe's transport, and its channels for tensors in host memory.

    The default is what costs a whole round least: ``shm``, with which an empty call is quicker, has a thread of each
    process spin on one core; ``mpt_uv`` adds half a millisecond to each message that has tensors, however small.

    Raises:
        ConfigError: torch has not got what the settings name.
    """
    transport = "uv" if runtime.transport == "auto" else runtime.transport
    channels = runtime.channels or [name for name in ("cma", "basic") if _has(_channels=[name])]
    if not _has(_transports=[transport]):
        raise ConfigError(f"runtime.transport={transport}: this build of torch does not have it; set transport=auto")
    if not _has(_channels=channels):
        raise ConfigError(f"runtime.channels={channels}: this build of torch has not all of them; set channels=[]")
    return transport, channels


def _has(**named: list[str]) -> bool:
    """Whether torch's TensorPipe has these; on macOS it is without ``shm`` and ``cma``."""
    try:
        torch_rpc().TensorPipeRpcBackendOptions(**named)
    except RuntimeError:
        return False
    return True


def serve_store(host: str) -> tuple[Any, int]:
    """Serve a world's store on one address alone (by itself TCPStore listens on all of them).

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

    An agent on loopback is as good: no member connects to the driver's.

    Raises:
        ConfigError: torch RPC has listened on another one in this process before, and would again.
    """
    if _interface not in (None, LOOPBACK, interface):
        raise ConfigError(
            f"torch RPC listens on one network interface for the life of a process: here on {_interface}, which an "
            f"earlier proxy used, and this one is for {interface}. Set runtime.interface={_interface}, or open this "
            f"proxy in a new process"
        )


def join(plan: WorldPlan, rank: int, interface: str) -> None:
    """Join a world; returns when all its members have. It ends early where the world's store is closed.

    This is what ``init_rpc`` does, without its process group: that asks all members for their device maps, which the
    plan tells, and makes them wait for each other, which the driver does by their links. A member that freezes in it
    would hold up the others for ever.

    Args:
        plan: the world.
        rank: this process's rank in it.
        interface: this process's network interface for it.

    Raises:
        WorkerLostError: a member did not come within 30 s, or died meanwhile.
    """
    global _agents_store, _interface
    rpc = torch_rpc()
    # The driver too is a client of the store that it serves: torch keeps the first agent of a process, and what the
    # agent holds, until the process ends.
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
        world_size = len(plan.labels)
        num_names = max(world_size, MAX_MEMBERS) if rank == 0 and not _has_rrefs else world_size
        _agents_store = store = _LettingStore(client, _absent(plan, num_names))
        with _bound_to(interface):
            agent = rpc.TensorPipeAgent(store, plan.name(rank), rank, num_names, options, reverse_maps, devices)
            _interface = _interface or interface  # which the agent looks up as it starts, in the next line
            rpc.api._init_rpc_states(agent)
        _start_rrefs()
    except BaseException as error:
        if rpc.api._is_current_rpc_agent_set():  # it got as far as an agent that runs
            leave()
        _clean_up()
        if isinstance(error, RuntimeError):
            raise WorkerLostError(
                f"a member did not join within {_JOIN_TIMEOUT_S:.0f} s, or ended: {error}"
            ) from error
        raise


def leave() -> None:
    """Leave the world this process is in; never waits for the others (the graceful way can hang on a dead one)."""
    rpc = torch_rpc()
    # RPC's own shutdown looks through the RRefs of others first, under no lock, as its threads may be deleting them.
    rpc.api._get_current_rpc_agent().shutdown()
    rpc.shutdown(graceful=False)
    _clean_up()


class _LettingStore(_distributed.Store):  # type: ignore[misc]
    """A store under which other threads run on while somebody waits at it.

    The constructor of torch's agent waits at its store with the GIL held, for as long as a member is missing: the
    event loop would stand still, and nobody would notice that the member is lost.

    Args:
        store: where everything is kept; its own methods let the GIL go.
        absent: what it answers itself.
    """

    def __init__(self, store: Any, absent: Mapping[str, bytes]) -> None:
        super().__init__()
        self._store = store
        self._absent = absent

    def set(self, key: str, value: bytes) -> None:
        """Store a value."""
        self._store.set(key, value)

    def compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        """Store a value where the present one is as expected; gives what is there then."""
        value: bytes = self._store.compare_set(key, expected, desired)
        return value

    def get(self, key: str) -> bytes:
        """Wait for a value."""
        absent = self._absent.get(key)
        value: bytes = self._store.get(key) if absent is None else absent
        return value


def _absent(plan: WorldPlan, num_names: int) -> dict[str, bytes]:
    """What the store tells an agent of members that the world does not have.

    Later worlds may have them, and torch looks for the owner of an RRef in the driver's first agent alone.
    """
    ranks = range(len(plan.labels), num_names)
    names = {f"names/{rank}": plan.name(rank).encode() for rank in ranks}
    return names | {f"addrs/{plan.name(rank)}": b"" for rank in ranks}


def _clean_up() -> None:
    global _agents_store
    _agents_store = None
    guard.remove()
    set_connection_warnings(True)


def _devices(plan: WorldPlan, rank: int) -> tuple[Any, Any, list[torch.device]]:
    """A member's device maps, the inverse of the others' maps to it, and its devices.

    The driver alone has maps; answers go back by their inverse.
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
    """Start torch's distributed autograd, which RPC asks for at each message, though nothing here uses it.

    It takes one rank for the life of the process, and a member of later worlds may have others.
    """
    global _has_autograd
    if not _has_autograd:
        torch_rpc().dist_autograd._init(rank)
        _has_autograd = True


def _start_rrefs() -> None:
    """Make the RRef context of this process, of its first agent, and let it send no messages; see `rpc.rrefs`."""
    global _has_rrefs
    if not _has_rrefs:
        torch_rpc().api._destroy_rref_context(True)  # an empty one, which is used all the same
        _has_rrefs = True


@functools.cache
def _leave_at_exit() -> None:
    """Leave the world of a script that ends without closing its proxy: torch would abort the process."""

    def leave_if_joined() -> None:
        if torch_rpc().api._is_current_rpc_agent_set():
            leave()

    atexit.register(leave_if_joined)


@contextmanager
def _bound_to(interface: str) -> Iterator[None]:
    """Let TensorPipe listen on that interface, which it takes from the environment alone."""
    before = os.environ.get(_INTERFACE)
    os.environ[_INTERFACE] = interface
    try:
        yield
    finally:
        if before is None:
            del os.environ[_INTERFACE]
        else:
            os.environ[_INTERFACE] = before
