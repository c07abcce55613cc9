"""Configuration of a run: placement of learners, timeouts and limits."""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

from torchfedrpc.errors import ConfigError, suggest

_CHANNELS = ("mpt_uv", "cma", "basic")
_LEAST = {
    "num_clients": 1,
    "torch_threads": 1,
    "max_concurrent_calls": 1,
    "max_recoveries": 0,
    "journal_max_calls": 1,
    "journal_max_bytes": 0,
    "max_pending_calls": 1,
    "max_inflight_bytes": 1,
    "max_resident_learners": 1,
    "workers_per_device": 1,
}
_MIB = 1024 * 1024


# Hydra finds a member by its name, a mapping by its value. Name and value are the same string for both to work.


class ExecutionMode(StrEnum):
    """Built-in values of ``execution_mode``; ``@tfr.executor`` registers further modes."""

    auto = "auto"
    local = "local"
    pseudo = "pseudo"
    distributed = "distributed"


class OnWorkerLost(StrEnum):
    """Policy for the learners of a lost worker."""

    recover = "recover"
    fail = "fail"


class Isolation(StrEnum):
    """Policy for passing arguments and results between driver and learners in local mode."""

    value = "value"
    none = "none"


class DeviceMap(StrEnum):
    """Policy for sending CUDA tensors between driver and workers."""

    auto = "auto"
    none = "none"


class LogLevel(StrEnum):
    """Level from which log records of workers reach the driver."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"
    critical = "critical"
    off = "off"

    @property
    def number(self) -> int:
        """The level as `logging` counts it; above all of them for ``off``."""
        return logging.CRITICAL + 1 if self == LogLevel.off else int(getattr(logging, self.upper()))


class Transport(StrEnum):
    """TensorPipe's transport."""

    auto = "auto"
    uv = "uv"
    shm = "shm"


@dataclass
class RuntimeConfig:
    """Placement of learners and limits of a run. The keys are flat and the same in every front end.

    A configuration is immutable after its checks: setting an attribute raises ConfigError, and
    ``dataclasses.replace(config, call_timeout_s=60)`` returns a changed copy. A proxy keeps a copy. Keys with choices
    hold members of an Enum, which equal their names; a name as a string is accepted as well.

    Attributes:
        execution_mode: An `ExecutionMode` (``auto``, ``local``, ``pseudo``, ``distributed``), or a name registered
            with ``@tfr.executor``. ``auto`` selects, in this order: distributed if the launcher's WORLD_SIZE is above
            1 or ``client_endpoints`` is set; pseudo if ``use_multiprocessing`` is true or ``num_processes`` > 0;
            distributed if ``join_at`` is set; else local.
        num_clients: Number of clients (``client_1 .. client_N``) of a proxy without client ids. Default: the keys of
            ``client_endpoints``, else one client per process of ``num_processes``.
        num_processes: Number of worker processes in pseudo mode; the other modes ignore it. Default: as many as
            visible GPUs times ``workers_per_device``, without a GPU one per core that this process may use; no more
            than clients.
        workers_per_device: Number of worker processes for each visible GPU in pseudo mode, unless ``num_processes``
            is set. Workers have the GPUs in turn. More than one pays where learners leave their GPU idle; each has a
            CUDA context and a memory cache of its own.
        use_multiprocessing: Lets ``auto`` select pseudo mode.
        client_endpoints: Client id -> endpoint: ``worker1``, ``rank:2``, ``host:NAME`` (any worker on that machine),
            ``local`` (the driver's process), or the address of a listening worker (``torchfedrpc-worker --listen``):
            ``HOST:PORT`` or ``tcp://HOST:PORT``. ``http://HOST:PORT`` is accepted too, though no HTTP is spoken.
            Clients without an endpoint are spread over the workers without an address here, or over all workers if
            every worker has one. Local mode ignores this key.
        call_timeout_s: Seconds a method may run, time in queues excluded. A call that makes the learner, or reads it
            from disk, does so in this time. None: No limit. Local mode does not apply it while a debugger is
            attached.
        heartbeat_timeout_s: Seconds without a heartbeat after which a frozen or unreachable worker counts as lost. At
            least 1, and at least 5 for workers on other machines, since a link with packet loss can be silent for
            seconds. A killed worker is detected sooner; a busy worker is never lost. The default outlasts usual
            stalls of a machine. A lower value detects losses sooner, but takes a stall from swapping or of a virtual
            machine for a loss.
        on_worker_lost: ``recover`` rebuilds the learners of a lost worker on other workers and continues with the
            same bits; ``fail`` raises WorkerLostError for their calls.
        max_recoveries: Number of consecutive rebuilds of a learner with a running call when its worker was lost; then
            its calls raise WorkerLostError. The limit ends the loop of a learner that kills its worker each time. At
            0 the first loss is final. With ``max_concurrent_calls`` above 1, the loss counts for every learner with a
            running call.
        journal_max_calls: Number of calls in a learner's journal before a snapshot is taken; at least 1. It bounds
            the replay of a recovery. With the default, snapshots are rare beside calls. A journal entry takes about
            200 bytes beside its arguments.
        journal_max_bytes: Bytes of arguments that the driver keeps in memory for the journals of all learners. Above
            this bound, snapshots are taken that free four times their size; if these free too little, snapshots of
            any size. Bytes above the bound count towards ``max_inflight_bytes``, so new calls wait for them. A value
            shared by calls counts once. The default holds a 40 MB model twelve times. Snapshots in memory take up to
            a quarter of the bound; others are stored on disk.
        max_pending_calls: Number of calls that may be pending in the whole run; a further call raises CapacityError.
            None: No limit, since a pending call costs little beside its arguments, which ``max_inflight_bytes``
            bounds.
        max_inflight_bytes: Bytes of arguments that the driver holds for calls in flight. Further calls wait in FIFO
            order; the values of their arguments are captured at admission. A larger single call is admitted alone.
            The default keeps the links busy and the driver's memory small.
        max_resident_learners: Number of learners that each process keeps in memory, beside the running ones. The
            least recently used learners are evicted to disk, as snapshots in `tempfile`'s folder, until their next
            call. None: No eviction.
        isolation: ``value`` copies arguments and results in local mode too; ``none`` passes references there,
            and all learners have the first GPU.
        interface: Network interface for workers of several machines: a name that all of them have, such as ``wg0``,
            or a range of addresses, such as ``10.0.0.0/24``, of which each machine has one. Default: loopback if all
            workers are on one machine, else the interface that routes to the driver. Every port of the driver is on
            it, including the handshake port for the ranks of a launch; ``join_at`` has its own address.
        token_file: File with the token shared by the driver and the workers that listen or join. Only its owner may
            be able to read it. Default: the file that the environment variable TORCHFEDRPC_TOKEN_FILE names. The
            other ranks of a launch read that variable only; without it the launch's token is in the launcher's store.
        join_at: ``HOST:PORT`` at which the driver accepts workers that join a running job
            (``torchfedrpc-worker --join HOST:PORT``). With port 0 the system chooses one; see ``proxy.join_address``.
            Default: No worker can join.
        rejoin_timeout_s: Seconds that calls wait for a worker if theirs is lost and no other worker may take its
            clients: for a listening worker to restart, or for a worker to join. Then they raise WorkerLostError until
            a worker is available. The default is enough to start a process on a busy machine.
        deterministic: Use torch's deterministic algorithms in every process that runs learners (CUDA).
        torch_threads: Number of intra-op threads of each process. The default 1 gives the same bits on machines of
            any size.
        max_concurrent_calls: Number of sync methods that run at the same time in one process.
        device_map: ``auto`` sends CUDA tensors device to device between driver and workers; ``none`` stages them
            through host memory, where those of a result stay unless the arguments have some on a GPU. So they do with
            several GPUs in local mode.
        trusted_modules: Top-level packages for the allow-list, beside the learner's package. Their classes may be
            sent, and recipes (``_target_``) may name their classes and functions.
        transport: TensorPipe's transport. ``auto`` is ``uv``: torch's default, ``shm``, has lower latency but keeps
            one core busy in every process.
        channels: TensorPipe's channels for tensors in host memory, in order of preference: ``cma`` (between processes
            of a machine that may read each other's memory, and skipped for others), ``mpt_uv`` (multiple connections,
            for large tensors over a fast network), ``basic`` (required). Default: ``cma`` and ``basic``. Channels for
            CUDA tensors, if any, come before them.
        worker_log_level: Level from which log records of workers reach the driver, as events `WorkerLogged` and in
            its logging: ``debug``, ``info``, ``warning``, ``error``, ``critical`` or ``off``. Warnings and printed
            lines reach it too; printed lines count as ``info``, and stay on the worker's own streams above that.

    Raises:
        ConfigError: If a value has the wrong type or is out of range.
    """

    _is_checked: ClassVar[bool] = False  # freezes instances: hydra's overrides fail on a frozen dataclass

    execution_mode: str = ExecutionMode.auto  # str, since modes can be registered
    num_clients: int | None = None
    num_processes: int | None = None
    workers_per_device: int = 1
    use_multiprocessing: bool = False
    client_endpoints: dict[str, str] = field(default_factory=dict)
    call_timeout_s: float | None = 300.0
    heartbeat_timeout_s: float = 10.0
    on_worker_lost: OnWorkerLost = OnWorkerLost.recover
    max_recoveries: int = 3
    journal_max_calls: int = 256
    journal_max_bytes: int = 512 * _MIB
    max_pending_calls: int | None = None
    max_inflight_bytes: int = 512 * _MIB
    max_resident_learners: int | None = None
    isolation: Isolation = Isolation.value
    interface: str | None = None
    token_file: str | None = None
    join_at: str | None = None
    rejoin_timeout_s: float = 30.0
    deterministic: bool = False
    torch_threads: int = 1
    max_concurrent_calls: int = 1
    device_map: DeviceMap = DeviceMap.auto
    trusted_modules: list[str] = field(default_factory=list)
    transport: Transport = Transport.auto
    channels: list[str] = field(default_factory=list)
    worker_log_level: LogLevel = LogLevel.info

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(RuntimeConfig)
        for item in dataclasses.fields(self):
            value, hint = getattr(self, item.name), hints[item.name]
            if isinstance(hint, type) and issubclass(hint, StrEnum):
                setattr(self, item.name, _chosen(item.name, value, hint))
            elif not _fits(value, hint):
                raise ConfigError(f"runtime.{item.name} must be {item.type}, not {value!r} ({type(value).__name__})")
            elif (container := typing.get_origin(hint)) in (list, dict):
                setattr(self, item.name, container(value))  # a copy: the caller may change its container later
        self.execution_mode = ExecutionMode.__members__.get(self.execution_mode, self.execution_mode)
        for module in self.trusted_modules:
            root = module.partition(".")[0]
            if root in sys.stdlib_module_names:
                raise ConfigError(
                    f"runtime.trusted_modules must not name {module}: with classes of the standard library a message "
                    f"could run anything. Name packages of your own"
                )
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"runtime.{name} must be at least {least}, not {value}")
        if self.channels and ("basic" not in self.channels or not {*self.channels} <= {*_CHANNELS}):
            raise ConfigError(
                f"runtime.channels must be among {', '.join(_CHANNELS)}, the last of them included, not "
                f"{self.channels!r}"
            )
        if self.num_processes is not None and self.num_processes < 0:
            raise ConfigError(f"runtime.num_processes must not be negative, it is {self.num_processes}")
        if self.call_timeout_s is not None and not 0 < self.call_timeout_s < math.inf:
            raise ConfigError(
                f"runtime.call_timeout_s must be above 0 seconds (None for no limit), but it is {self.call_timeout_s}"
            )
        if not 0 < self.rejoin_timeout_s < math.inf:
            raise ConfigError(
                f"runtime.rejoin_timeout_s must be above 0 seconds and finite, but it is {self.rejoin_timeout_s}"
            )
        if not 1 <= self.heartbeat_timeout_s < math.inf:
            raise ConfigError(
                f"runtime.heartbeat_timeout_s must be at least 1 second and finite, but it is "
                f"{self.heartbeat_timeout_s}"
            )
        super().__setattr__("_is_checked", True)

    def __delattr__(self, name: str) -> None:
        raise ConfigError(f"a RuntimeConfig keeps {name}: make another one by dataclasses.replace(config, ...)")

    def __setattr__(self, name: str, value: object) -> None:
        if self._is_checked and name not in self.__dataclass_fields__:
            raise ConfigError(f"runtime has no key {name!r}{suggest(name, list(self.__dataclass_fields__))}")
        if self._is_checked:
            raise ConfigError(
                f"runtime.{name} cannot be set to {value!r}: a configuration keeps the values that were checked; "
                f"make another one, dataclasses.replace(config, {name}={value!r})"
            )
        super().__setattr__(name, value)

    @classmethod
    def of(cls, runtime: RuntimeConfig | Mapping[str, Any] | str | None) -> RuntimeConfig:
        """Return a configuration made from any accepted form; a `RuntimeConfig` is copied and checked again.

        Args:
            runtime: A `RuntimeConfig`, a mapping of its keys, an OmegaConf node, the name of a mode, or None for the
                defaults.

        Raises:
            ConfigError: If a key is unknown (the message names the nearest), or a value has the wrong type or is out
                of range.
        """
        if runtime is None:
            return cls()
        if isinstance(runtime, RuntimeConfig):
            return dataclasses.replace(runtime)
        if isinstance(runtime, str):
            return cls(execution_mode=runtime)
        omegaconf = sys.modules.get("omegaconf")  # not imported here: a node exists only if it is imported already
        if omegaconf is not None and omegaconf.OmegaConf.is_config(runtime):
            return cls.of(omegaconf.OmegaConf.to_object(runtime))
        if not isinstance(runtime, Mapping):
            raise ConfigError(
                f"runtime must be a RuntimeConfig, a mapping, an OmegaConf node or a mode's name, "
                f"not {type(runtime).__name__}"
            )
        known = [item.name for item in dataclasses.fields(cls)]
        for key in runtime:
            if key not in known:
                raise ConfigError(f"unknown key runtime.{key}{suggest(str(key), known, limit=len(known))}")
        return cls(**runtime)

    def default_client_ids(self) -> list[str]:
        """Return the client ids of a proxy without explicit ones.

        Raises:
            ConfigError: If no key gives the number of clients.
        """
        if self.num_clients is None and self.client_endpoints:
            return list(self.client_endpoints)
        count = self.num_clients or self.num_processes
        if not count:
            raise ConfigError("no clients: give LearnerProxy(learner, clients=[...]) or set runtime.num_clients")
        return [f"client_{number}" for number in range(1, count + 1)]


def _chosen(key: str, value: object, choices: type[StrEnum]) -> StrEnum:
    """Return the member of an Enum that a key's value names.

    Raises:
        ConfigError: If the value is not a string, or names no member.
    """
    names = ", ".join(choices)
    if not isinstance(value, str):
        raise ConfigError(f"runtime.{key} must be one of {names}, not {value!r} ({type(value).__name__})")
    try:
        return choices(value)
    except ValueError:
        raise ConfigError(f"runtime.{key} must be one of {names}, not {value!r}") from None


def _fits(value: object, hint: Any) -> bool:
    """Return whether a value has the annotated type. An int passes for a float; a bool passes for neither."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, option) for option in arguments)
    if origin is list:
        return isinstance(value, list | tuple) and all(_fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(
            _fits(key, arguments[0]) and _fits(item, arguments[1]) for key, item in value.items()
        )
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
