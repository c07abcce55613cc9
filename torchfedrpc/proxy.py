"""`LearnerProxy`: calls the learners of all clients from the driver."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import hashlib
import inspect
import logging
import operator
import warnings
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, ClassVar, Never

from torchfedrpc.calls import Calls
from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError, GroupCallError, LearnerBusyError
from torchfedrpc.events import Event, Subscriber
from torchfedrpc.executors.base import ExecutorSpec
from torchfedrpc.executors.consistent_snapshot import Cut
from torchfedrpc.executors.router import ExecutorRouter
from torchfedrpc.executors.shared_arguments import SharedRef
from torchfedrpc.group import LearnerGroup
from torchfedrpc.host.methods import hidden_methods, public_methods
from torchfedrpc.host.process import process_settings
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.host.torch_settings import warn_of_default_device
from torchfedrpc.interrupts import ending_interrupted_methods
from torchfedrpc.launcher import check_is_driver
from torchfedrpc.options import CALL_OPTIONS, UNCHANGED, CallOptions, OnError, Unchanged
from torchfedrpc.pool import Clock, LearnerPool, NextClient
from torchfedrpc.stream import LearnerStream
from torchfedrpc.wire.fingerprint import fingerprint

logger = logging.getLogger(__name__)

_NUM_NAMED = 8  # workers in the log line of the opening; more are counted
_SETTINGS_OF_BITS = ("deterministic", "max_concurrent_calls", "torch_threads")


class LearnerHandle:
    """Handle of one client's learner. Every public method of the learner is an async method of the handle.

    Args:
        calls: The proxy's calls.
        client_id: The client's id.
        options: Options of the calls.
        learner: Provides the learner's class, for tab completion.
    """

    def __init__(self, calls: Calls, client_id: str, options: CallOptions, learner: LearnerSpec) -> None:
        calls.check_client(client_id)
        self._calls = calls
        self._options = options
        self._learner = learner
        self._client_id = client_id

    @property
    def client_id(self) -> str:
        """The client's id."""
        return self._client_id

    def options(
        self,
        *,
        timeout_s: float | Unchanged | None = UNCHANGED,
        retries: int | Unchanged = UNCHANGED,
        **unknown: Never,
    ) -> LearnerHandle:
        """Return a handle of the same learner with changed options. Omitted options keep their value.

        Args:
            timeout_s: seconds for queue, transfer and run of a call together, above 0. None: No such deadline;
                ``runtime.call_timeout_s`` limits the run.
            retries: Number of times a call is sent again if its method has not begun, for example because the
                learner's constructor failed. At least 0.
            **unknown: Refused; the error names the nearest option.

        Raises:
            ConfigError: If an option is unknown, or a value has the wrong type or is out of range.
        """
        options = self._options.updated({"timeout_s": timeout_s, "retries": retries, **unknown}, CALL_OPTIONS)
        return LearnerHandle(self._calls, self.client_id, options, self._learner)

    @property
    def rref(self) -> Any:
        """The ``torch.distributed.rpc`` RRef of the learner, owned by the learner's worker; None in local mode.

        The RRef belongs to the current world. Read the property again after the loss of a worker, after a worker has
        joined, and in another session: an old RRef may name another learner. The first access registers the learner;
        the learner's first call constructs it. The access blocks the event loop until the worker has answered: about
        1 ms, or longer behind large arguments in transfer (2 s at most). Await a call of the learner first if that
        matters. ``rref.owner()`` is the worker that runs the learner's calls. ``rref.to_here()`` raises, since the
        learner stays on its worker.

        Raises:
            ConfigError: If the proxy is closed or runs in another thread, or if this process called ``init_rpc``
                before it opened the proxy.
            WorkerLostError: If the learner's worker is lost or does not answer, or if the world is being formed
                again. Await a call of the client, then read the property again.
        """
        self._calls.check_open()
        if asyncio._get_running_loop() is None:
            raise ConfigError(
                f"the RRef of {self.client_id} is read in the event loop of the proxy, and not in a thread"
            )
        return self._calls.router.get_executor(self.client_id).rref(self.client_id)

    def __getattr__(self, method: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        if method.startswith("_"):
            raise AttributeError(method)

        async def call(*args: Any, **kwargs: Any) -> Any:
            return await self._calls.call(self._options, self.client_id, method, args, kwargs)

        return call

    def __dir__(self) -> Iterable[str]:
        return [*super().__dir__(), *public_methods(self._learner.load())]

    def __repr__(self) -> str:
        return f"LearnerHandle({self.client_id!r})"


class LearnerProxy:
    """Proxy that calls methods of learners in any process as async functions.

    Use it as an async context manager. A process can have one open proxy at a time, on rank 0 only. A proxy can be
    opened again after it was closed or failed to open. The new session has new learners and no state of the previous
    session; event subscriptions are kept. Arguments and results are passed by value in every mode. A learner's calls
    run one at a time, in the order of submission.

    Args:
        learner: A class, a factory function, or a name registered with ``@tfr.learner``. The process that owns the
            client calls ``learner(client_id, **kwargs)`` at the client's first call.
        clients: The client ids, or a mapping of client id to keyword arguments for its constructor. None: The ids
            ``client_1 .. client_N`` with N from ``runtime.num_clients``.
        runtime: A `RuntimeConfig`, a mapping of its keys, an OmegaConf node, the name of a mode, or None for the
            defaults.
        seed: Seeds every call, together with the client id, the method name and the number of the call.

    Raises:
        ConfigError: If an argument or a setting is invalid; the message says what to do.

    Warns:
        UserWarning: If a method of the learner has the name of a method of handles or groups, such as ``options``.
            `execute_remote_method` and ``group.call`` can call it. If a factory makes the learners, the process that
            makes the first learner logs the warning.
    """

    _open_in_process: ClassVar[LearnerProxy | None] = None

    def __init__(
        self,
        learner: Callable[..., Any] | str,
        clients: Iterable[str] | Mapping[str, Mapping[str, Any]] | None = None,
        *,
        runtime: RuntimeConfig | Mapping[str, Any] | str | None = None,
        seed: int = 0,
    ) -> None:
        config = RuntimeConfig.of(runtime)
        try:
            seed = operator.index(seed)
        except TypeError:
            raise ConfigError(f"the seed must be a whole number, not {seed!r}") from None
        spec, common_kwargs = LearnerSpec.of(learner, seed, config)
        if not isinstance(factory := spec.load(), type):
            spec = dataclasses.replace(spec, taken_names=_taken_names())  # its class is unknown before the call
        elif hidden := hidden_methods(factory, _taken_names()):
            warnings.warn(hidden, stacklevel=2)
        kwargs_by_client = _clients(clients, config, common_kwargs)
        for client_id in config.client_endpoints:
            if client_id not in kwargs_by_client:
                raise ConfigError(f"client_endpoints names {client_id!r}, which is no client of this proxy")
        self._router = ExecutorRouter(config)
        self._calls = Calls(self._router, tuple(kwargs_by_client), are_stateless=spec.stateless)
        self._spec = ExecutorSpec(spec, kwargs_by_client, self._calls.opening.events)
        self._options = CallOptions()
        self._exit = AsyncExitStack()
        self._pools: weakref.WeakSet[LearnerPool] = weakref.WeakSet()
        self._before_close: list[Callable[[], Coroutine[Any, Any, None]]] = []

    async def __aenter__(self) -> LearnerProxy:
        check_is_driver()
        if LearnerProxy._open_in_process is not None:
            raise ConfigError(
                "this proxy is open already: use it, or leave its async with block before it is opened again"
                if LearnerProxy._open_in_process is self
                else "a proxy is open in this process already, and there can be one at a time: close it first (leave "
                "its async with block, or await tfr.LearnerProxy.current().close()), or give the clients of both to "
                "one proxy"
            )
        stack = AsyncExitStack()
        self._calls.begin()
        spec = dataclasses.replace(self._spec, events=self._calls.opening.events)
        try:
            LearnerProxy._open_in_process = self
            stack.callback(self._closed)
            stack.enter_context(process_settings(self._spec.learner.runtime))
            warn_of_default_device()
            await stack.enter_async_context(ending_interrupted_methods(self._router.interrupt))
            stack.push_async_exit(self._close_router)
            await self._router.open(spec)
        except BaseException as error:
            await _to_its_end(stack.__aexit__(type(error), error, error.__traceback__))
            raise
        self._calls.open(asyncio.get_running_loop())
        self._exit = stack
        logger.info("%d clients in %s mode: %s", len(self._spec.clients), self.mode, _named(self.stats()["workers"]))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._calls.check_loop()
        except ConfigError:
            if self._calls.is_stranded:  # the event loop is closed: no orderly close, but workers still end
                with contextlib.suppress(Exception):
                    await _to_its_end(self._exit.__aexit__(kind, error, traceback))
                self._before_close.clear()
                self._calls.close()
            raise
        self._exit.callback(self._calls.close)
        for pool in self.pools:
            self._exit.push_async_callback(pool.close)
        while self._before_close:
            self._exit.push_async_callback(self._before_close.pop(0))
        await _to_its_end(self._exit.__aexit__(kind, error, traceback))

    async def open(self) -> LearnerProxy:
        """Open this proxy without a block, for one cell of a notebook, and the next ones: ``await proxy.open()``.

        Returns:
            This proxy. `close` closes it.

        Raises:
            ConfigError: If a proxy is open, or the workers cannot be prepared; other errors are those of the block.
        """
        return await self.__aenter__()

    async def close(self) -> None:
        """Close this proxy, as the end of its block does. A closed one stays so."""
        await self.__aexit__(None, None, None)

    @classmethod
    def current(cls) -> LearnerProxy | None:
        """Return the proxy that is open in this process; None if there is none."""
        return LearnerProxy._open_in_process

    async def _close_router(self, kind: object, error: BaseException | None, traceback: object) -> None:
        await self._router.close(_why_early(error))

    def _closed(self) -> None:
        LearnerProxy._open_in_process = None

    def __repr__(self) -> str:
        return f"LearnerProxy({self._spec.learner.name}, {len(self._spec.clients)} clients, {self.mode})"

    @property
    def client_ids(self) -> list[str]:
        """All client ids, in the order given."""
        return list(self._calls.client_ids)

    @property
    def are_stateless(self) -> bool:
        """Whether the learners are declared stateless: no call leaves anything that a later one needs."""
        return self._spec.learner.stateless

    @property
    def mode(self) -> str:
        """The execution mode: ``local``, ``pseudo``, ``distributed``, or a registered mode."""
        return self._router.mode

    @property
    def join_address(self) -> str | None:
        """The address ``HOST:PORT`` at which workers can join this run; None if ``runtime.join_at`` is not set."""
        return self._router.join_address

    def options(
        self,
        *,
        timeout_s: float | Unchanged | None = UNCHANGED,
        retries: int | Unchanged = UNCHANGED,
        on_error: OnError | Unchanged = UNCHANGED,
        min_results: int | Unchanged | None = UNCHANGED,
        **unknown: Never,
    ) -> LearnerProxy:
        """Return a view of this proxy with changed options. Omitted options keep their value.

        The view shares the session of this proxy and needs no closing.

        Args:
            timeout_s: seconds for queue, transfer and run of a call together, above 0; for a stream, of each step.
                None: No such deadline; ``runtime.call_timeout_s`` limits the run.
            retries: Number of times a call is sent again if its method has not begun, for example because the
                learner's constructor failed. At least 0.
            on_error: For groups: ``raise`` raises a GroupCallError if clients fail; ``collect`` stores their
                exceptions in ``failures``.
            min_results: For groups: Return after this number of clients has succeeded, at least 1, and cancel the
                other calls. None: Wait for all clients.
            **unknown: Refused; the error names the nearest option.

        Raises:
            ConfigError: If an option is unknown, or a value has the wrong type or is out of range.
        """
        changes = {"timeout_s": timeout_s, "retries": retries, "on_error": on_error, "min_results": min_results}
        view = copy.copy(self)
        view._options = self._options.updated({**changes, **unknown})
        view._exit = AsyncExitStack()
        return view

    async def execute_remote_method(self, client_id: str, method_name: str, /, *args: Any, **kwargs: Any) -> Any:
        """Call a public method of a client's learner and return its result.

        Raises:
            UnknownClientError: If there is no such client.
            MethodNotFoundError: If the learner has no such public method; the message names near matches.
            SerializationError: If an argument or the result cannot be sent.
            CallTimeoutError: If a deadline passed.
            Exception: If the method raised. The type is the same, and ``__cause__`` has the remote traceback.
        """
        return await self._calls.call(self._options, client_id, method_name, args, kwargs)

    async def custom_method(self, client_id: str, method_name: str, /, *args: Any, **kwargs: Any) -> Any:
        """Call a public method of a client's learner; the same as `execute_remote_method`."""
        return await self._calls.call(self._options, client_id, method_name, args, kwargs)

    async def train_epoch(self, /, client_id: str, **kwargs: Any) -> Any:
        """Call the learner's ``train_epoch(**kwargs)``."""
        return await self._calls.call(self._options, client_id, "train_epoch", (), kwargs)

    async def evaluate(self, /, client_id: str, **kwargs: Any) -> Any:
        """Call the learner's ``evaluate(**kwargs)``."""
        return await self._calls.call(self._options, client_id, "evaluate", (), kwargs)

    async def get_model_weights(self, client_id: str) -> Any:
        """Call the learner's ``get_model_weights()``."""
        return await self._calls.call(self._options, client_id, "get_model_weights", (), {})

    async def set_model_weights(self, client_id: str, weights: Any) -> Any:
        """Call the learner's ``set_model_weights(weights)``."""
        return await self._calls.call(self._options, client_id, "set_model_weights", (weights,), {})

    def client(self, client_id: str) -> LearnerHandle:
        """Return the handle of a client's learner, as in ``await proxy.client("client_1").train_epoch()``.

        Raises:
            UnknownClientError: If there is no such client.
        """
        return LearnerHandle(self._calls, client_id, self._options, self._spec.learner)

    def clients(self, ids: Iterable[str] | Mapping[str, Mapping[str, Any]] | None = None) -> LearnerGroup:
        """Return a group of clients, which are called together.

        Args:
            ids: Client ids, or a mapping of client id to keyword arguments for that client. None: All clients.

        Raises:
            UnknownClientError: If there is no client of an id.
            ConfigError: If an id is given twice, or if a group is given: its keyword arguments and options would be
                lost.
        """
        if ids is None:
            ids = self._calls.client_ids
        elif isinstance(ids, LearnerGroup):
            raise ConfigError("clients() takes ids and no group: call the group itself, or give list(group)")
        return LearnerGroup(self._calls, _kwargs_by_id(ids), self._options, self._spec.learner)

    def stream(self, client_id: str, method: str, /, *args: Any, **kwargs: Any) -> LearnerStream:
        """Iterate over the items of a generator method: ``async for item in proxy.stream(...)``.

        The generator, sync or async, makes one step per requested item, without prefetching. It holds its learner
        until it ends. Leaving the loop closes it. ``options(timeout_s=...)`` limits each step.

        Raises:
            UnknownClientError: If there is no such client.
            SerializationError: If an argument cannot be sent.
        """
        invocation = self._calls.invocation(self._options, client_id, method, args, kwargs)
        steps = self._router.get_executor(client_id).stream(invocation)
        return LearnerStream(self._calls, self._options, invocation, steps)

    def pool(
        self,
        next_client: NextClient,
        num_in_flight: int,
        *,
        clock: Clock | None = None,
        on_error: OnError = "raise",
    ) -> LearnerPool:
        """Keep a number of calls in flight: ``async for client_id, result in proxy.pool(next_client, 6)``.

        Args:
            next_client: Returns the next client and a call of it that has not begun, such as
                ``("client_1", proxy.client("client_1").train_epoch())``; None if there are no more.
            num_in_flight: Number of calls in flight, at least 1.
            clock: Virtual seconds of a call, from its client and its number in the pool. Results then come in the
                order of virtual time. Default: As they end.
            on_error: ``raise`` raises the exception of a call when its result is due, and the loop may go on;
                ``collect`` gives it as the result.

        Raises:
            ConfigError: If ``num_in_flight`` is no whole number of at least 1, or ``on_error`` is invalid.
        """
        pool = LearnerPool(next_client, num_in_flight, clock, on_error=on_error, trusted_modules=self.trusted_modules)
        self._pools.add(pool)
        return pool

    @property
    def pools(self) -> list[LearnerPool]:
        """The pools that are in use."""
        return list(self._pools)

    async def share(self, obj: Any) -> SharedRef:
        """Return a reference to an object that each worker receives once.

        In the arguments of calls, the reference arrives as the object. The value is captured by this call. It is sent
        to a worker with the first call there that uses it. Each call gets a separate object; memory is copied on
        write. The value is freed when the reference is dropped, or by ``await ref.release()``.

        Raises:
            SerializationError: If the object cannot be sent.
            ConfigError: If the mode does not support shared references.
        """
        self._calls.check_open()
        return self._router.share(obj)

    async def snapshots(self, ids: Iterable[str] | None = None) -> AsyncIterator[tuple[str, bytes]]:
        """Yield snapshots of learners, one client at a time: ``async for client_id, data in proxy.snapshots()``.

        A snapshot is queued behind the calls submitted before it. It contains ``state_dict()`` if the learner has
        ``state_dict`` and ``load_state_dict``, else ``__getstate__()`` or the learner's attributes, and the counters
        that seed the learner's next calls. `tfr.testing.check_snapshot` checks that a snapshot is complete.

        Args:
            ids: The clients. None: All clients.

        Yields:
            The client id and the snapshot as bytes.

        Raises:
            UnknownClientError: If there is no client of an id.
            SnapshotError: If a state cannot be captured; the message names the attribute and the remedy.
            ConfigError: If the learners are stateless.
        """
        self._check_have_state("snapshots")
        for client_id in self._calls.client_ids if ids is None else list(_kwargs_by_id(ids)):
            snapshot = self._router.get_executor(client_id).snapshot(client_id)
            yield client_id, await self._calls.apart(self._options, client_id, "snapshot", snapshot)

    async def restore(self, snapshots: Mapping[str, bytes]) -> None:
        """Restore learners from snapshots. Each learner is constructed again, and its next call continues from there.

        Args:
            snapshots: Client id -> snapshot from `snapshots`, of this or another run, in any mode.

        Raises:
            UnknownClientError: If there is no client of an id; no learner is restored then.
            ConfigError: If the snapshots are not a mapping, or the learners are stateless.
            GroupCallError: If some learners could not be restored; the others were. Its ``failures`` has one of the
                following errors per failed client.
            SnapshotError: If the bytes are damaged, or belong to another client or learner; that learner keeps its
                state.
            WorkerLostError: If the learner was given up.
            UntrustedTypeError: If the bytes contain a type that ``runtime.trusted_modules`` does not cover.
        """
        self._check_have_state("restore")
        await self.continue_from(snapshots)

    async def continue_from(self, snapshots: Mapping[str, bytes]) -> None:
        """Restore the snapshots of a `cut`, as `restore` does and with its errors.

        The snapshots of stateless learners have the numbers of their calls; one with a state raises `SnapshotError`.
        """
        self._calls.check_open()
        if not isinstance(snapshots, Mapping):
            raise ConfigError(f"restore() takes a mapping of client id -> bytes, not a {type(snapshots).__name__}")
        for client_id in snapshots:
            self._calls.check_client(client_id)
        restoring = [self._restore(*item) for item in snapshots.items()]
        outcomes = dict(zip(snapshots, await asyncio.gather(*restoring, return_exceptions=True), strict=True))
        failures = {client_id: error for client_id, error in outcomes.items() if isinstance(error, Exception)}
        for error in outcomes.values():
            if isinstance(error, BaseException) and not isinstance(error, Exception):
                raise error
        if failures:
            first = next(iter(failures.values()))
            num_restored = len(outcomes) - len(failures)
            raise GroupCallError(
                f"restore failed for {', '.join(failures)}, first with {type(first).__name__}: {first}"
                + (f"; {num_restored} of {len(outcomes)} learners were restored" if num_restored else ""),
                failures,
                {client_id: None for client_id in outcomes if client_id not in failures},
            )

    def _check_have_state(self, what: str) -> None:
        """Check that the learners are not stateless.

        Raises:
            ConfigError: If they are.
        """
        if self._spec.learner.stateless:
            name, verb = self._spec.learner.name, "return" if what == "snapshots" else "restore"
            raise ConfigError(
                f"{name} is stateless, so that {what}() has no state to {verb}: give each call what it needs, set "
                f"stateless = False if a call leaves something for a later one, or resume a run by tfr.Checkpoints"
            )

    async def _restore(self, client_id: str, snapshot: bytes) -> None:
        """Restore one learner, which counts as a change at its start and at its end."""
        num_changes = self._calls.opening.num_changes
        num_changes[client_id] += 1
        try:
            restored = self._router.get_executor(client_id).restore(client_id, snapshot)
            await self._calls.apart(self._options, client_id, "restore", restored)
        finally:
            num_changes[client_id] += 1

    @property
    def trusted_modules(self) -> frozenset[str]:
        """The top-level packages that the allow-list for received classes covers."""
        return self._spec.learner.allow_list().trusted

    def identity(self) -> dict[str, Any]:
        """Return the run fingerprint. A checkpoint can be restored only into a run with the same fingerprint."""
        ids, arguments = hashlib.sha256(), hashlib.sha256()
        for client_id, kwargs in self._spec.clients.items():
            ids.update(f"{client_id!r},".encode())
            arguments.update(fingerprint(kwargs))
        learner = self._spec.learner
        return {
            "learner": learner.name,
            "seed": learner.seed,
            "clients": f"{len(self._spec.clients)} ({ids.hexdigest()[:16]})",
            "constructor_arguments": arguments.hexdigest()[:16],
            **({"stateless": True} if learner.stateless else {}),
            **{name: getattr(learner.runtime, name) for name in _SETTINGS_OF_BITS},
        }

    def changes(self) -> dict[str, int]:
        """Return a version number per client. Equal versions mean the learner's state has not changed in between.

        The number changes at the start and at the end of each call or restore.
        """
        return dict(self._calls.opening.num_changes)

    def cut(self, client_ids: Iterable[str]) -> Cut:
        """Return a consistent snapshot of learners, as of this call. `Checkpoints` stores it while calls go on.

        Raises:
            LearnerBusyError: If a stream is open.
        """
        for client_id in self._calls.opening.open_streams.values():
            raise LearnerBusyError(
                f"a stream of {client_id} is open: close it before the state of its learner is taken"
            )
        return self._router.cut(client_ids)

    def before_close(self, callback: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Register a coroutine function to await when the proxy closes, while learners can still be called."""
        self._before_close.append(callback)

    def subscribe(self, callback: Subscriber) -> Callable[[], None]:
        """Call ``callback(event)`` on the event loop for each event of the run; return the unsubscribe function."""
        return self._calls.opening.events.subscribe(callback)

    def publish(self, event: Event) -> None:
        """Publish an event of the trainer to all subscribers."""
        self._calls.opening.events.publish(event)

    def stats(self) -> dict[str, Any]:
        """Return the counters of the run, with the same keys in every mode.

        Returns:
            A new dict with the keys

            - ``mode``: The execution mode, as `mode`.
            - ``calls``: Number of calls of methods so far; each step of a stream counts.
            - ``failed_calls``: Number of those calls that raised; cancelled calls count.
            - ``pending_calls``: Number of calls that wait for their results now.
            - ``bytes_sent``: Bytes of calls' arguments sent to workers; 0 in local mode.
            - ``bytes_received``: Bytes of calls' results received from workers; 0 in local mode.
            - ``snapshot_bytes``: Bytes of snapshots sent to and received from workers; 0 in local mode.
            - ``journal_bytes``: Bytes of arguments that the journal holds now, for the replay of lost calls.
            - ``workers_lost``: Number of workers lost so far.
            - ``workers``: Name of a process with learners -> its numbers, which docs/monitoring.md explains:
                ``learners``, ``state``, ``machine``, ``address``, ``pid``, ``heartbeat_age_s``, ``round_trip_s``,
                ``bytes_sent``, ``bytes_received``, ``busy_s``, ``queue``, ``memory_bytes``. In local mode the only
                name is ``local``. Empty after the proxy is closed.
        """
        return self._calls.stats()


def _named(workers: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the first workers, each with its process and machine, and the number of the others."""
    names = [
        f"{label} (process {facts.get('pid')} on {facts.get('machine')})"
        for label, facts in list(workers.items())[:_NUM_NAMED]
    ]
    if len(workers) > _NUM_NAMED:
        names.append(f"and {len(workers) - _NUM_NAMED} more")
    return ", ".join(names) or "no worker so far"


def _why_early(error: BaseException | None) -> str:
    """Return the reason that workers get for the early end of the run; empty if the run ended well."""
    if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
        return ""
    if isinstance(error, asyncio.CancelledError | KeyboardInterrupt):
        return "the run was interrupted"
    return f"the run has failed with {type(error).__name__}"


async def _to_its_end(closing: Coroutine[Any, Any, object]) -> None:
    """Await a clean-up to its end despite cancellation: a partial clean-up would break the next proxy."""
    task = asyncio.ensure_future(closing)
    cancelled = False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError
    task.result()


def _taken_names() -> dict[str, list[str]]:
    """Return the public names of handles and groups, which hide methods of the same name of a learner."""
    owners = {"proxy.client(...)": LearnerHandle, "proxy.clients(...)": LearnerGroup}
    return {
        name: [one for one in (*dir(owner), *inspect.get_annotations(owner)) if not one.startswith("_")]
        for name, owner in owners.items()
    }


def _clients(
    clients: Iterable[str] | Mapping[str, Mapping[str, Any]] | None,
    config: RuntimeConfig,
    common_kwargs: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Return client id -> keyword arguments of its constructor."""
    if clients is None:
        clients = config.default_client_ids()
    given = _kwargs_by_id(clients)
    for client_id, kwargs in given.items():
        if not isinstance(client_id, str):
            raise ConfigError(f"client ids are strings, {client_id!r} is a {type(client_id).__name__}")
        try:
            client_id.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"the client id {client_id!a} is no valid text ({error.reason}): no id may have a lone surrogate, "
                f"as undecodable file names have; name the client otherwise"
            ) from None
        if not isinstance(kwargs, Mapping):
            raise ConfigError(f"the constructor arguments of {client_id} must be a mapping, not {kwargs!r}")
    if not given:
        raise ConfigError("a proxy needs at least one client")
    return {str(client_id): {**common_kwargs, **kwargs} for client_id, kwargs in given.items()}


def _kwargs_by_id(ids: Iterable[str] | Mapping[str, Mapping[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
    if isinstance(ids, Mapping):
        return ids
    if isinstance(ids, str):
        raise ConfigError(f"clients must be several ids, not the string {ids!r}: write [{ids!r}]")
    if isinstance(ids, set | frozenset):
        raise ConfigError(
            f"clients must have an order, and that of a {type(ids).__name__} differs between processes: give a list, "
            f"such as sorted(ids)"
        )
    kwargs_by_id: dict[str, Mapping[str, Any]] = {}
    for client_id in ids:
        if client_id in kwargs_by_id:
            raise ConfigError(f"the client {client_id!r} is given twice")
        kwargs_by_id[client_id] = {}
    return kwargs_by_id
