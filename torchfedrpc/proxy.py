"""What a trainer holds: a proxy for the learners of all clients."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import hashlib
import inspect
import operator
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, ClassVar, Never

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.dispatch import Dispatcher, LearnerStream
from torchfedrpc.errors import ConfigError, GroupCallError
from torchfedrpc.events import Event, EventBus, Subscriber
from torchfedrpc.executors.base import ExecutorSpec
from torchfedrpc.executors.consistent_snapshot import Cut
from torchfedrpc.executors.router import ExecutorRouter
from torchfedrpc.executors.shared_arguments import SharedRef
from torchfedrpc.group import LearnerGroup
from torchfedrpc.host.methods import hidden_methods, public_methods
from torchfedrpc.host.process import process_settings
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.host.torch_settings import warn_of_default_device
from torchfedrpc.launcher import check_is_driver
from torchfedrpc.options import CALL_OPTIONS, UNCHANGED, CallOptions, OnError, Unchanged
from torchfedrpc.wire.fingerprint import fingerprint

_SETTINGS_OF_BITS = ("deterministic", "max_concurrent_calls", "torch_threads")


class LearnerHandle:
    """One client's learner: every public method of it is an async method here.

    Args:
        dispatcher: sends the calls.
        client_id: whose learner.
        options: what holds for the calls.
        learner: has the class whose methods an editor completes.
    """

    def __init__(self, dispatcher: Dispatcher, client_id: str, options: CallOptions, learner: LearnerSpec) -> None:
        dispatcher.check_client(client_id)
        self._dispatcher = dispatcher
        self._options = options
        self._learner = learner
        self._client_id = client_id

    @property
    def client_id(self) -> str:
        """Whose learner it is."""
        return self._client_id

    def options(
        self,
        *,
        timeout_s: float | Unchanged | None = UNCHANGED,
        retries: int | Unchanged = UNCHANGED,
        **unknown: Never,
    ) -> LearnerHandle:
        """The same handle with other options; those that are not given stay as they are.

        Args:
            timeout_s: seconds for queue, transfer and run of a call together, above 0. None: no such deadline, and
                ``runtime.call_timeout_s`` holds for the run.
            retries: how often a call is sent again whose method was not begun, because its constructor failed, for
                example; at least 0.
            **unknown: refused, with the nearest option.

        Raises:
            ConfigError: no such option, or a value has the wrong type or is out of range.
        """
        options = self._options.updated({"timeout_s": timeout_s, "retries": retries, **unknown}, CALL_OPTIONS)
        return LearnerHandle(self._dispatcher, self.client_id, options, self._learner)

    @property
    def rref(self) -> Any:
        """The learner's ``torch.distributed.rpc`` RRef, which its worker owns; None in local mode.

        It is of the present world: after the loss of a worker, once another has joined, or in another session, ask
        for it again; an old one may name another learner. A learner that has not been called yet is registered for
        it, and is made by its first call. That blocks the event loop until its worker has answered, about a
        millisecond, or longer behind large arguments that are on their way (2 s at most): await a call first where
        that matters. ``rref.owner()`` is where its calls go. The learner itself stays on its worker:
        ``rref.to_here()`` raises.

        Raises:
            ConfigError: The proxy is closed or runs in another thread, or this process has called ``init_rpc`` before
                it opened the proxy.
            WorkerLostError: The learner's worker is lost or does not answer, or the world is being formed anew. Await
                a call of the client, then ask again.
        """
        return self._dispatcher.rref(self.client_id)

    def __getattr__(self, method: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        if method.startswith("_"):
            raise AttributeError(method)

        async def call(*args: Any, **kwargs: Any) -> Any:
            return await self._dispatcher.call(self._options, self.client_id, method, args, kwargs)

        return call

    def __dir__(self) -> Iterable[str]:
        return [*super().__dir__(), *public_methods(self._learner.load())]

    def __repr__(self) -> str:
        return f"LearnerHandle({self.client_id!r})"


class LearnerProxy:
    """Calls methods of learners, wherever they live, as plain async functions.

    Use it as an async context manager; one proxy can be open in a process at a time, on rank 0 alone. It can be
    opened again once it was closed, or could not be opened: then with new learners and nothing of the session before;
    what subscribes to its events stays. Arguments and results are passed by value in every mode, and a learner's
    calls run one at a time in the order submitted.

    Args:
        learner: a class, a factory function, or a name registered with ``@tfr.learner``. Called as
            ``learner(client_id, **kwargs)`` in the process that owns the client, at the client's first call.
        clients: the clients' ids, or a mapping id -> keyword arguments for its constructor. None makes
            ``client_1 .. client_N`` from ``runtime.num_clients``.
        runtime: a `RuntimeConfig`, a mapping of its keys, an OmegaConf node, a mode's name, or None.
        seed: seeds every call, with the client's id, the method's name and the number of the call.

    Raises:
        ConfigError: an argument or a setting cannot be met; the message says what to do.

    Warns:
        UserWarning: a method of the learner has a name that handles or groups have themselves, such as ``options``.
            `execute_remote_method` and ``group.call`` can call it. If a factory makes the learners, the process that
            makes the first one logs this as a warning.
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
            spec = dataclasses.replace(spec, taken_names=_taken_names())  # of no known class before it is called
        elif hidden := hidden_methods(factory, _taken_names()):
            warnings.warn(hidden, stacklevel=2)
        kwargs_by_client = _clients(clients, config, common_kwargs)
        for client_id in config.client_endpoints:
            if client_id not in kwargs_by_client:
                raise ConfigError(f"client_endpoints names {client_id!r}, which is no client of this proxy")
        self._router = ExecutorRouter(config)
        self._events = EventBus()
        self._dispatcher = Dispatcher(self._router, tuple(kwargs_by_client), self._events)
        self._spec = ExecutorSpec(spec, kwargs_by_client, self._events.publish)
        self._options = CallOptions()
        self._exit = AsyncExitStack()
        self._before_close: list[Callable[[], Coroutine[Any, Any, None]]] = []

    async def __aenter__(self) -> LearnerProxy:
        check_is_driver()
        if LearnerProxy._open_in_process is not None:
            raise ConfigError(
                "this proxy is open already: use it, or leave its async with block before it is opened again"
                if LearnerProxy._open_in_process is self
                else "a proxy is open in this process already, and there can be one at a time: close it first (leave "
                "its async with block), or give the clients of both to one proxy"
            )
        stack = AsyncExitStack()
        spec = dataclasses.replace(self._spec, publish=self._dispatcher.begin())
        try:
            LearnerProxy._open_in_process = self
            stack.callback(self._closed)
            stack.enter_context(process_settings(self._spec.learner.runtime))
            warn_of_default_device()
            stack.push_async_exit(self._close_router)
            await self._router.open(spec)
        except BaseException as error:
            await _to_its_end(stack.__aexit__(type(error), error, error.__traceback__))
            raise
        self._dispatcher.open(asyncio.get_running_loop())
        self._exit = stack
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._dispatcher.check_loop()
        except ConfigError:
            if self._dispatcher.is_stranded:  # nothing can close it in order; its workers end all the same
                with contextlib.suppress(Exception):
                    await _to_its_end(self._exit.__aexit__(kind, error, traceback))
                self._before_close.clear()
                self._take_no_calls()
            raise
        self._exit.callback(self._take_no_calls)
        while self._before_close:
            self._exit.push_async_callback(self._before_close.pop(0))
        await _to_its_end(self._exit.__aexit__(kind, error, traceback))

    async def _close_router(self, kind: object, error: BaseException | None, traceback: object) -> None:
        await self._router.close(_why_early(error))

    def _take_no_calls(self) -> None:
        self._dispatcher.close()

    def _closed(self) -> None:
        LearnerProxy._open_in_process = None

    def __repr__(self) -> str:
        return f"LearnerProxy({self._spec.learner.name}, {len(self._spec.clients)} clients, {self.mode})"

    @property
    def client_ids(self) -> list[str]:
        """All clients, in the order in which they were given."""
        return list(self._dispatcher.client_ids)

    @property
    def mode(self) -> str:
        """Where learners run: ``local``, ``pseudo``, ``distributed``, or a mode of the user's own."""
        return self._router.mode

    @property
    def join_address(self) -> str | None:
        """Where workers can join this run, ``HOST:PORT``; None where ``runtime.join_at`` is not set."""
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
        """A view of this proxy with other options; those that are not given stay as they are.

        The view is the same open proxy; it need not be closed.

        Args:
            timeout_s: seconds for queue, transfer and run of a call together, above 0; of a stream, for each step.
                None: no such deadline, and ``runtime.call_timeout_s`` holds for the run.
            retries: how often a call is sent again whose method was not begun, because its constructor failed, for
                example; at least 0.
            on_error: of groups: ``raise`` a GroupCallError where clients fail, or ``collect`` their exceptions in
                ``failures``.
            min_results: of groups: return once that many clients have succeeded, at least 1, and cancel the other
                calls. None: wait for all clients.
            **unknown: refused, with the nearest option.

        Raises:
            ConfigError: no such option, or a value has the wrong type or is out of range.
        """
        changes = {"timeout_s": timeout_s, "retries": retries, "on_error": on_error, "min_results": min_results}
        view = copy.copy(self)
        view._options = self._options.updated({**changes, **unknown})
        view._exit = AsyncExitStack()
        return view

    async def execute_remote_method(self, client_id: str, method_name: str, /, *args: Any, **kwargs: Any) -> Any:
        """Call any public method of a client's learner.

        Raises:
            UnknownClientError: no such client.
            MethodNotFoundError: no such public method; near matches are named.
            SerializationError: an argument or the result cannot be sent.
            CallTimeoutError: a deadline passed.
            Exception: what the method raised, as the same type, its ``__cause__`` the remote traceback.
        """
        return await self._dispatcher.call(self._options, client_id, method_name, args, kwargs)

    async def custom_method(self, client_id: str, method_name: str, /, *args: Any, **kwargs: Any) -> Any:
        """The same as `execute_remote_method`."""
        return await self._dispatcher.call(self._options, client_id, method_name, args, kwargs)

    async def train_epoch(self, /, client_id: str, **kwargs: Any) -> Any:
        """Call the learner's ``train_epoch(**kwargs)``."""
        return await self._dispatcher.call(self._options, client_id, "train_epoch", (), kwargs)

    async def evaluate(self, /, client_id: str, **kwargs: Any) -> Any:
        """Call the learner's ``evaluate(**kwargs)``."""
        return await self._dispatcher.call(self._options, client_id, "evaluate", (), kwargs)

    async def get_model_weights(self, client_id: str) -> Any:
        """Call the learner's ``get_model_weights()``."""
        return await self._dispatcher.call(self._options, client_id, "get_model_weights", (), {})

    async def set_model_weights(self, client_id: str, weights: Any) -> Any:
        """Call the learner's ``set_model_weights(weights)``."""
        return await self._dispatcher.call(self._options, client_id, "set_model_weights", (weights,), {})

    def client(self, client_id: str) -> LearnerHandle:
        """A handle whose methods are the learner's: ``await proxy.client("client_1").train_epoch()``.

        Raises:
            UnknownClientError: no such client.
        """
        return LearnerHandle(self._dispatcher, client_id, self._options, self._spec.learner)

    def clients(self, ids: Iterable[str] | Mapping[str, Mapping[str, Any]] | None = None) -> LearnerGroup:
        """A group of clients to call together; all of them, unless ids are given.

        Args:
            ids: client ids, or a mapping id -> keyword arguments of that client's own.

        Raises:
            UnknownClientError: an id is no client's.
            ConfigError: an id is given twice, or a group is given, whose own keyword arguments and options would be
                left out.
        """
        if ids is None:
            ids = self._dispatcher.client_ids
        elif isinstance(ids, LearnerGroup):
            raise ConfigError("clients() takes ids and no group: call the group itself, or give list(group)")
        return LearnerGroup(self._dispatcher, _kwargs_by_id(ids), self._options, self._spec.learner)

    def stream(self, client_id: str, method: str, /, *args: Any, **kwargs: Any) -> LearnerStream:
        """Iterate over what a generator method yields: ``async for item in proxy.stream(...)``.

        The generator, sync or async, makes one step for each item asked for, and no step ahead. It holds its
        learner until it ends; leaving the loop closes it. ``options(timeout_s=...)`` holds for each step.

        Raises:
            UnknownClientError: no such client.
            SerializationError: an argument cannot be sent.
        """
        return self._dispatcher.stream(self._options, client_id, method, args, kwargs)

    async def share(self, obj: Any) -> SharedRef:
        """Place an object once for all workers: given as an argument of calls, the reference arrives as the object.

        The value is taken now; it travels to a worker with the first call there that has it. Each call has an object
        of its own, which costs memory only where it is written. It is freed when the reference is dropped, or by
        ``await ref.release()``.

        Raises:
            SerializationError: it cannot be sent.
            ConfigError: the mode has no such references.
        """
        return self._dispatcher.share(obj)

    async def snapshots(self, ids: Iterable[str] | None = None) -> AsyncIterator[tuple[str, bytes]]:
        """The learners' states as bytes, one client at a time: ``async for client_id, data in proxy.snapshots()``.

        A snapshot comes behind the calls that were submitted before it. It holds what ``state_dict()`` gives where
        the learner has that and ``load_state_dict``, else ``__getstate__()`` or its attributes, and the counts that
        seed its next calls. `tfr.testing.check_snapshot` proves that this is complete.

        Args:
            ids: of which clients; all, unless given.

        Raises:
            UnknownClientError: an id is no client's.
            SnapshotError: a state cannot be captured; the message names the attribute and the remedy.
        """
        for client_id in self._dispatcher.client_ids if ids is None else list(_kwargs_by_id(ids)):
            yield client_id, await self._dispatcher.snapshot(self._options, client_id)

    async def restore(self, snapshots: Mapping[str, bytes]) -> None:
        """Give learners the states of snapshots; each is made anew for that, and its next call goes on from there.

        Args:
            snapshots: client id -> what `snapshots` gave, in this run or another, in whatever mode.

        Raises:
            UnknownClientError: an id is no client's; nothing is restored then.
            ConfigError: the snapshots are no mapping.
            GroupCallError: some learners could not be restored, and the others were; its ``failures`` has the error
                of each client, one of those that follow.
            SnapshotError: the bytes are damaged, of another client or learner; that learner stays as it was.
            WorkerLostError: the learner was given up.
            UntrustedTypeError: they hold a type that ``runtime.trusted_modules`` does not cover.
        """
        self._dispatcher.check_open()
        if not isinstance(snapshots, Mapping):
            raise ConfigError(f"restore() takes a mapping of client id -> bytes, not a {type(snapshots).__name__}")
        for client_id in snapshots:
            self._dispatcher.check_client(client_id)
        restoring = [self._dispatcher.restore(self._options, *item) for item in snapshots.items()]
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

    @property
    def trusted_modules(self) -> frozenset[str]:
        """The packages whose classes may travel."""
        return self._spec.learner.allow_list().trusted

    def identity(self) -> dict[str, Any]:
        """What two runs must have in common for the state of one's learners to be of use to the other's."""
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
            **{name: getattr(learner.runtime, name) for name in _SETTINGS_OF_BITS},
        }

    def changes(self) -> dict[str, int]:
        """For each client whose learner may have changed a number; where it is the same later, it has not since."""
        return self._dispatcher.changes()

    def cut(self, client_ids: Iterable[str]) -> Cut:
        """The states of learners as of now, all at one moment, which `Checkpoints` saves while calls go on.

        Raises:
            LearnerBusyError: a stream is open.
        """
        return self._dispatcher.cut(client_ids)

    def before_close(self, callback: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Await ``callback()`` as the proxy closes, while learners can still be called."""
        self._before_close.append(callback)

    def subscribe(self, callback: Subscriber) -> Callable[[], None]:
        """Call ``callback(event)`` on the event loop for each event of the run; returns what ends that."""
        return self._events.subscribe(callback)

    def publish(self, event: Event) -> None:
        """Tell subscribers an event of the trainer's own."""
        self._events.publish(event)

    def stats(self) -> dict[str, Any]:
        """Numbers of the run, with the same keys in every mode.

        Returns:
            A dict of its own, with

            - ``mode``: as `mode`.
            - ``calls``: calls of methods so far; each step of a stream counts.
            - ``failed_calls``: those of them that raised, for example because they were cancelled.
            - ``pending_calls``: calls that wait for their results now.
            - ``bytes_sent``: bytes of calls' arguments sent to workers; 0 in local mode.
            - ``bytes_received``: bytes of calls' results received from workers; 0 in local mode.
            - ``snapshot_bytes``: bytes of snapshots to and from workers; 0 in local mode.
            - ``journal_bytes``: bytes of arguments that the driver keeps now, to make lost calls again.
            - ``workers_lost``: workers lost so far.
            - ``workers``: name of a process that has learners -> ``{"learners": how many}``; in local mode the only
              one is ``local``. Empty once the proxy is closed.
        """
        return self._dispatcher.stats()


def _why_early(error: BaseException | None) -> str:
    """Why a run that ends with this error ends early, for its workers; empty where it ends well."""
    if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
        return ""
    if isinstance(error, asyncio.CancelledError | KeyboardInterrupt):
        return "the run was interrupted"
    return f"the run has failed with {type(error).__name__}"


async def _to_its_end(closing: Coroutine[Any, Any, object]) -> None:
    """Await a clean-up whole, though the task be cancelled meanwhile: half of it would spoil the next proxy."""
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
    """The public names that handles and groups have themselves, so that they call no learner's method."""
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
    """Client id -> keyword arguments of its constructor."""
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
