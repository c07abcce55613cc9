"""One static world of torch RPC: joining it and leaving it."""

from __future__ import annotations

import atexit
import functools
import os
import socket
import urllib.parse
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed

from torchfedrpc.errors import WorkerLostError
from torchfedrpc.rpc import guard
from torchfedrpc.rpc.backend import set_connection_warnings, torch_rpc

_SCHEME = "torchfedrpc"
_JOIN_TIMEOUT_S = 30.0
_NUM_THREADS = 4  # more of them hand the GIL around more often and are slower
_TRANSPORTS = {"auto": "uv", "uv": "uv", "shm": "shm"}

_distributed: Any = torch.distributed  # exports less to type checkers than it has
_autograd_rank: int | None = None
_stores: dict[str, Any] = {}  # the store of a world that this process is joining, by its address


@dataclass(frozen=True)
class WorldPlan:
    """What every member must know of a world to join it; plain data, for JSON.

    Attributes:
        generation: number of the world, which no other world of the driver's process has.
        labels: its members by rank: ``driver``, ``worker1``, ...
        store_host: where the driver serves the world's store.
        store_port: its port there.
        interface: network interface to listen on; None: the one with which a member reaches the driver.
        transport: TensorPipe's transport.
        gpus_in_sight: whether all members see the same GPUs, without which they cannot share GPU memory.
        device_maps: per worker the driver's device and the worker's, between which tensors go directly.
    """

    generation: int
    labels: list[str]
    store_host: str
    store_port: int
    interface: str | None
    transport: str
    gpus_in_sight: bool
    device_maps: list[tuple[str, str] | None]

    def name(self, rank: int) -> str:
        """The RPC name of a member; other generations have other names."""
        return f"{self.labels[rank]}_{self.generation}"

    def to_message(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> WorldPlan:
        """What `to_message` described."""
        maps = [tuple(pair) if pair else None for pair in message["device_maps"]]
        return cls(**{**message, "device_maps": maps})


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
    )
    return store, port


def join(plan: WorldPlan, rank: int, interface: str) -> None:
    """Join a world; returns when all its members have. It ends early where the world's store is closed.

    Args:
        plan: the world.
        rank: this process's rank in it.
        interface: this process's network interface for it.

    Raises:
        WorkerLostError: a member did not come within 30 s, or died meanwhile.
    """
    rpc = torch_rpc()
    address = f"{plan.store_host}:{plan.store_port}"
    # The driver too is a client of the store that it serves: torch keeps the first agent of a process, and what the
    # agent holds, until the process ends.
    timeout = timedelta(seconds=_JOIN_TIMEOUT_S)
    _stores[address] = _distributed.TCPStore(plan.store_host, plan.store_port, is_master=False, timeout=timeout)
    _register_rendezvous()
    _leave_at_exit()
    rpc._init_counter = 0  # members have lived through different numbers of worlds; the stores keep them apart
    rpc.constants.DEFAULT_PROCESS_GROUP_TIMEOUT = timedelta(seconds=_JOIN_TIMEOUT_S)  # torch's: 24.8 days
    options = rpc.TensorPipeRpcBackendOptions(
        num_worker_threads=_NUM_THREADS,
        rpc_timeout=_JOIN_TIMEOUT_S,
        init_method=f"{_SCHEME}://{address}",
        device_maps=_device_maps(plan, rank),
        _transports=[_TRANSPORTS[plan.transport]],
        _channels=_channels(plan),
    )
    # torch warns of its own deprecated calls; to catch_warnings here would meddle with what other threads catch.
    warnings.filterwarnings("ignore", module=r"torch\.distributed\.")
    guard.install()
    set_connection_warnings(False)
    try:
        with (
            _bound_to(interface),
            guard.guarded_handshake(),
            _no_greetings(),
            _first_rank(rank),
        ):
            rpc.init_rpc(plan.name(rank), rank=rank, world_size=len(plan.labels), rpc_backend_options=options)
    except BaseException as error:
        if rpc.api._is_current_rpc_agent_set():  # it got as far as an agent that runs
            leave()
        _clean_up()
        if isinstance(error, RuntimeError):
            raise WorkerLostError(
                f"a member did not join within {_JOIN_TIMEOUT_S:.0f} s, or ended: {error}"
            ) from error
        raise
    finally:
        del _stores[address]


def leave() -> None:
    """Leave the world this process is in; never waits for the others (the graceful way can hang on a dead one)."""
    torch_rpc().shutdown(graceful=False)
    torch_rpc().rendezvous_iterator = None  # it keeps the store
    _clean_up()


def _clean_up() -> None:
    guard.remove()
    set_connection_warnings(True)


def _device_maps(plan: WorldPlan, rank: int) -> dict[str, dict[str, str]]:
    """The driver's maps; answers go back by their inverse, so workers need none."""
    if rank != 0:
        return {}
    return {plan.name(worker): {pair[0]: pair[1]} for worker, pair in enumerate(plan.device_maps, start=1) if pair}


def _channels(plan: WorldPlan) -> list[str]:
    gpu = ["cuda_xth", "cuda_basic"] if any(plan.device_maps) else []
    shared = ["cuda_ipc"] if gpu and plan.gpus_in_sight else []
    return [*shared, *gpu, "mpt_uv", "basic"]


@contextmanager
def _no_greetings() -> Iterator[None]:
    """Leave out init_rpc's round of greetings by RPC: a member that dies meanwhile would keep all others waiting.

    Channels are set up by the first calls as well, and the driver knows from the links when all have joined.
    """
    api = torch_rpc().api
    before = api._all_gather
    api._all_gather = lambda *args, **kwargs: None
    try:
        yield
    finally:
        api._all_gather = before


@contextmanager
def _first_rank(rank: int) -> Iterator[None]:
    """Have torch's distributed autograd, which is not used here, see the rank that it was first started with.

    It refuses another, and a smaller world gives some members another.
    """
    global _autograd_rank
    _autograd_rank = rank if _autograd_rank is None else _autograd_rank
    autograd = torch_rpc().dist_autograd
    before = autograd._init
    autograd._init = lambda _: before(_autograd_rank)
    try:
        yield
    finally:
        autograd._init = before


@functools.cache
def _leave_at_exit() -> None:
    """Leave the world of a script that ends without closing its proxy: torch would abort the process."""

    def leave_if_joined() -> None:
        if torch_rpc().api._is_current_rpc_agent_set():
            leave()

    atexit.register(leave_if_joined)


@functools.cache
def _register_rendezvous() -> None:
    _distributed.register_rendezvous_handler(_SCHEME, _rendezvous)


def _rendezvous(url: str, **_: Any) -> Iterator[tuple[Any, int, int]]:
    parts = urllib.parse.urlparse(url)
    query = urllib.parse.parse_qs(parts.query)
    yield _stores[parts.netloc], int(query["rank"][0]), int(query["world_size"][0])


@contextmanager
def _bound_to(interface: str) -> Iterator[None]:
    """Let TensorPipe and gloo listen on that interface; they take it from the environment alone."""
    names = ("TP_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, interface))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
