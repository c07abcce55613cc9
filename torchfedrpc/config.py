"""The runtime configuration: where learners run and under which limits."""

from __future__ import annotations

import dataclasses
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
}
_MIB = 1024 * 1024


# Hydra finds a member by its name, a mapping by its value: they are the same. Each equals its name as a string.


class ExecutionMode(StrEnum):
    """The modes that ``execution_mode`` has beside those registered with ``@tfr.executor``."""

    auto = "auto"
    local = "local"
    pseudo = "pseudo"
    distributed = "distributed"


class OnWorkerLost(StrEnum):
    """What becomes of the learners of a lost worker."""

    recover = "recover"
    fail = "fail"


class Isolation(StrEnum):
    """How arguments and results pass between driver and learners in local mode."""

    value = "value"
    none = "none"


class DeviceMap(StrEnum):
    """How CUDA tensors travel between driver and workers."""

    auto = "auto"
    none = "none"


class Transport(StrEnum):
    """TensorPipe's transport."""

    auto = "auto"
    uv = "uv"
    shm = "shm"


@dataclass
class RuntimeConfig:
    """Where learners run and under which limits; the same keys everywhere, flat.

    A configuration keeps the values that were checked as it was made: to set one later raises ConfigError, and
    ``dataclasses.replace(config, call_timeout_s=60)`` makes another one. A proxy has a copy of its own. Keys with
    choices hold members of an Enum, which equal their names; a name as a string is accepted as well.

    Attributes:
        execution_mode: an `ExecutionMode` (``auto``, ``local``, ``pseudo``, ``distributed``), or a name registered
            with ``@tfr.executor``. ``auto`` takes distributed where a launcher's WORLD_SIZE is above 1 or
            ``client_endpoints`` are given, pseudo where ``use_multiprocessing`` or ``num_processes`` > 0,
            distributed where ``join_at`` is given, else local.
        num_clients: how many clients a proxy makes (``client_1 .. client_N``) when it is given no ids. Without
            it, the keys of ``client_endpoints``, else one client for each of ``num_processes``.
        num_processes: worker processes of pseudo mode; ignored in the others. Default: one for each core, and
            no more than clients.
        use_multiprocessing: makes ``auto`` choose pseudo mode.
        client_endpoints: client id -> ``worker1``, ``rank:2``, ``host:NAME`` (any worker on that machine),
            ``local`` (the driver's own process), or the address of a worker that listens
            (``torchfedrpc-worker --listen``): ``HOST:PORT`` or ``tcp://HOST:PORT``, and ``http://HOST:PORT`` too,
            though no HTTP is spoken. Clients not named here are spread over the workers that no address names, or
            over all where there are no others. Local mode has no workers and takes no notice of it.
        call_timeout_s: seconds a method may run, its time in queues not counted; None for no limit. In local
            mode it is not applied while a debugger is attached.
        heartbeat_timeout_s: seconds without a heartbeat after which a frozen or unreachable worker counts as lost, at
            least 1, and at least 5 where workers are on other machines, since a link that loses packets is silent for
            seconds at times. A killed one is noticed sooner, and a busy one is never lost. The default outlasts a
            machine's usual stalls; less notices sooner, and takes a stall of swapping or of a virtual machine for a
            loss.
        on_worker_lost: ``recover`` rebuilds the learners of a lost worker elsewhere and goes on, to the same bits;
            ``fail`` raises WorkerLostError for their calls.
        max_recoveries: how often in succession a learner is rebuilt of which a call was running as its worker was
            lost; then it is given up with WorkerLostError. A few, since a learner that kills its worker each time
            would go on for ever; at 0 the first loss is final. With ``max_concurrent_calls`` above 1 that counts for
            all learners with a call that was running.
        journal_max_calls: calls kept for each learner since its last snapshot, at least 1; beyond that a snapshot is
            taken. It bounds what a recovery has to run again; the default makes snapshots rare beside the calls. Each
            call takes about 200 bytes there, beside its arguments.
        journal_max_bytes: Bytes of those calls' arguments that the driver keeps in memory, of all learners together.
            Above that, snapshots are taken that free four times their own size; if these are too few, others of any
            size. What is above the bound counts in ``max_inflight_bytes``, so that new calls wait. A value that many
            calls share counts once. The default holds a 40 MB model twelve times. Snapshots in memory take up to a
            quarter as much; others are on disk.
        max_pending_calls: calls that may wait for their results at once, in the whole run; one more raises
            CapacityError. None for no limit: waiting calls cost little beside their arguments, which
            ``max_inflight_bytes`` bounds.
        max_inflight_bytes: bytes of arguments that the driver has in its hands at once; whoever submits more waits.
            The value of their arguments is taken when it is their turn. A single call that is larger goes alone. The
            default keeps the links busy and the driver small.
        max_resident_learners: learners that each process keeps in memory, beside those that are running; the least
            recently used of the others wait on disk, as snapshots in `tempfile`'s folder, until they are called
            again. None keeps all.
        isolation: ``value`` copies arguments and results also in local mode, ``none`` passes references there.
        interface: network interface that workers of several machines use, such as ``wg0``. Default: loopback
            where all are on one machine, else the interface that routes to the driver. Every port of the driver is
            there too, that of the handshake with the ranks of a launch included, but for that of ``join_at``.
        token_file: file with the shared token of the driver and the workers that listen or join, which nobody else
            may read. Default: the one that the environment variable TORCHFEDRPC_TOKEN_FILE names. The other ranks
            of a launch take it from that variable alone; without it the launch's token is in the launcher's store.
        join_at: ``HOST:PORT`` where the driver takes workers in that join a running job
            (``torchfedrpc-worker --join HOST:PORT``); port 0 lets the system choose, ``proxy.join_address`` tells.
            Default: nobody can join.
        rejoin_timeout_s: seconds that calls wait for a worker where theirs is lost and no other may take its clients:
            for one that listens to be started again, or for one to join. Then they raise WorkerLostError, until one
            is there. The default is enough to start a process on a busy machine.
        deterministic: use torch's deterministic algorithms in every process that runs learners (CUDA).
        torch_threads: intra-op threads of each process; 1 gives the same bits on every machine size.
        max_concurrent_calls: sync methods that run at once in one process.
        device_map: ``auto`` sends CUDA tensors device to device between driver and workers, ``none`` stages
            them through host memory.
        trusted_modules: top-level packages, beside the learner's own, whose classes may travel, and whose classes and
            functions recipes (``_target_``) may name.
        transport: TensorPipe's transport. ``auto`` is ``uv``: torch's own choice, ``shm``, has less latency but
            keeps one core busy in every process.
        channels: TensorPipe's channels for tensors in host memory, the preferred one first: ``cma`` (between
            processes of a machine that may read each other's memory, and not used between others), ``mpt_uv`` (many
            connections, for large tensors over a fast network), ``basic``, which has to be among them. Default:
            ``cma`` and ``basic``. Those for CUDA tensors come before them where there are any.

    Raises:
        ConfigError: a value has the wrong type or is out of range.
    """

    _is_checked: ClassVar[bool] = False  # hydra's overrides need a class that is not frozen, so instances are

    execution_mode: str = ExecutionMode.auto  # any name: modes can be registered
    num_clients: int | None = None
    num_processes: int | None = None
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

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(RuntimeConfig)
        for item in dataclasses.fields(self):
            value, hint = getattr(self, item.name), hints[item.name]
            if isinstance(hint, type) and issubclass(hint, StrEnum):
                setattr(self, item.name, _chosen(item.name, value, hint))
            elif not _fits(value, hint):
                raise ConfigError(f"runtime.{item.name} must be {item.type}, not {value!r} ({type(value).__name__})")
            elif (container := typing.get_origin(hint)) in (list, dict):
                setattr(self, item.name, container(value))  # later changes of the caller's own do not reach it
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
        """Make a configuration of whatever a user hands over; of a `RuntimeConfig` a copy, which is checked again.

        Args:
            runtime: a `RuntimeConfig`, a mapping of its keys, an OmegaConf node, a mode's name, or None for the
                defaults.

        Raises:
            ConfigError: an unknown key (the nearest is named), a wrong type, or a value out of range.
        """
        if runtime is None:
            return cls()
        if isinstance(runtime, RuntimeConfig):
            return dataclasses.replace(runtime)
        if isinstance(runtime, str):
            return cls(execution_mode=runtime)
        omegaconf = sys.modules.get("omegaconf")  # a node exists only where omegaconf is imported
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
        """The ids of a proxy that is given none.

        Raises:
            ConfigError: nothing tells how many clients there are.
        """
        if self.num_clients is None and self.client_endpoints:
            return list(self.client_endpoints)
        count = self.num_clients or self.num_processes
        if not count:
            raise ConfigError("no clients: give LearnerProxy(learner, clients=[...]) or set runtime.num_clients")
        return [f"client_{number}" for number in range(1, count + 1)]


def _chosen(key: str, value: object, choices: type[StrEnum]) -> StrEnum:
    """The member of an Enum that a value of a key names.

    Raises:
        ConfigError: The value is no string, or names no member.
    """
    names = ", ".join(choices)
    if not isinstance(value, str):
        raise ConfigError(f"runtime.{key} must be one of {names}, not {value!r} ({type(value).__name__})")
    try:
        return choices(value)
    except ValueError:
        raise ConfigError(f"runtime.{key} must be one of {names}, not {value!r}") from None


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is of the annotated type; an int passes for a float, a bool for neither."""
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
