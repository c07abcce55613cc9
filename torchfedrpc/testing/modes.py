"""`check_learner`: runs a learner's calls in every mode and compares the results, errors and snapshots."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import select
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError, WorkerLostError
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.proxy import LearnerProxy
from torchfedrpc.testing.rehearsal import Step
from torchfedrpc.testing.snapshots import check_snapshot
from torchfedrpc.testing.stateless import check_stateless
from torchfedrpc.wire.fingerprint import difference

MODES = ("local", "pseudo", "distributed")

_CLIENTS = ("client_1", "client_2")  # two, so that state shared between learners of one process shows as a difference
_START_S = 60.0
_END_S = 10.0

Result = dict[str, Any]
"""Client -> its result of one call, or the exception."""


def check_learner(
    learner: Callable[..., Any] | str,
    calls: Iterable[str | Sequence[Any]],
    *,
    kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    trusted_modules: Sequence[str] = (),
    ignore: Collection[str] = (),
    raises: type[Exception] | tuple[type[Exception], ...] = (),
    modes: Sequence[str] = MODES,
) -> list[Result]:
    """Check that a learner gives the same results, bit for bit, in every mode, and can be rebuilt.

    Two clients make the calls: in this process; in a worker process for each; and in a worker that listens on
    loopback, as on another machine, which imports the learner's module by its name. The results, the exceptions and
    the snapshots of all modes have to be equal. Then `check_snapshot`, or `check_stateless` for a learner that
    declares it, replays the calls in this process. This takes some seconds, mostly to start processes.

    Example:
        ``check_learner(MyLearner, ["train_epoch", ("evaluate", {"split": "test"})])``

    Args:
        learner: A class, a factory, or a registered name, as for `LearnerProxy`.
        calls: Method names, ``(method, args)``, ``(method, kwargs)`` or ``(method, args, kwargs)``, made in this
            order. All items of a generator method are requested.
        kwargs: Keyword arguments for its constructor.
        seed: The run's seed.
        trusted_modules: As ``runtime.trusted_modules``.
        ignore: Keys of a result that may differ, such as a duration, where the result is a dict.
        raises: Exceptions that calls may raise. They are compared, and the replay is left out if one is raised.
        modes: The modes, of ``local``, ``pseudo`` and ``distributed``; results are compared with those of the first.

    Returns:
        For each call client -> result, or the exception, so that a test can look at them.

    Raises:
        ConfigError: If a mode gives another result, exception or snapshot; the message names call, client and mode.
            Also if there are no calls, or an argument is invalid, or an event loop is running.
        SnapshotError: If a learner restored from a snapshot behaves differently.
        Exception: If a call raised it and ``raises`` does not name it.
    """
    if asyncio._get_running_loop() is not None:
        raise ConfigError("check_learner starts event loops of its own: call it in a test that is no coroutine")
    if isinstance(calls, str):
        raise ConfigError(f"check_learner takes a list of calls: [{calls!r}]")
    entries = list(calls)
    steps = [Step.of(entry) for entry in entries]
    if not steps:
        raise ConfigError("check_learner needs at least one call: name the methods that a trainer calls")
    if unknown := [mode for mode in modes if mode not in MODES] or ["none"] * (not modes):
        raise ConfigError(f"check_learner has the modes {', '.join(MODES)}, not {', '.join(unknown)}")
    runtime: dict[str, Any] = {"trusted_modules": list(trusted_modules)}
    spec, _ = LearnerSpec.of(learner, seed, RuntimeConfig.of(runtime))
    clients = {client_id: dict(kwargs or {}) for client_id in _CLIENTS}

    def results_in(mode: str) -> list[Result]:
        with _mode(mode) as settings:
            proxy = LearnerProxy(learner, clients, runtime={**runtime, **settings}, seed=seed)
            return asyncio.run(_results(proxy, steps, raises, keeps_state=not spec.stateless))

    first = results_in(modes[0])
    for mode in modes[1:]:
        names = [f"call {number} ({step.method})" for number, step in enumerate(steps, 1)]
        for name, result, expected in zip([*names, "the snapshot"], results_in(mode), first, strict=False):
            for client_id in _CLIENTS:
                given, wanted = (_kept(one[client_id], ignore) for one in (result, expected))
                if (path := _differs(given, wanted)) is not None:
                    raise ConfigError(
                        f"{spec.name} differs between modes: {name} of {client_id} gives {given!r:.200} in {mode} "
                        f"mode and {wanted!r:.200} in {modes[0]} mode (the difference is at result{path}). A learner "
                        f"may depend on its arguments, its attributes and the seeded random numbers alone, not on "
                        f"what a process has: variables of a module or class, files, clocks, process ids"
                    )
    given = first[: len(steps)]
    if not any(isinstance(value, Exception) for result in given for value in result.values()):
        replay = check_stateless if spec.stateless else check_snapshot
        replay(learner, entries, kwargs=kwargs, seed=seed, trusted_modules=trusted_modules, ignore=ignore)
    return given


async def _results(
    proxy: LearnerProxy, steps: Sequence[Step], raises: Any, *, keeps_state: bool
) -> list[dict[str, Any]]:
    """Return the results of all calls, and at the end the snapshots of learners that keep state."""
    async with proxy:
        results = []
        for step in steps:
            made = await asyncio.gather(*(_result(proxy, client_id, step, raises) for client_id in _CLIENTS))
            results.append(dict(zip(_CLIENTS, made, strict=True)))
        if keeps_state:
            results.append({client_id: data async for client_id, data in proxy.snapshots()})
    return results


async def _result(proxy: LearnerProxy, client_id: str, step: Step, raises: Any) -> Any:
    try:
        try:
            return await proxy.execute_remote_method(client_id, step.method, *step.args, **step.kwargs)
        except TypeError as error:
            if f"proxy.stream({client_id!r}, {step.method!r}) iterates over it" not in str(error):
                raise
        async with contextlib.aclosing(proxy.stream(client_id, step.method, *step.args, **step.kwargs)) as stream:
            return [item async for item in stream]
    except raises as error:
        return error


def _kept(value: Any, ignore: Collection[str]) -> Any:
    return {key: part for key, part in value.items() if key not in ignore} if isinstance(value, dict) else value


def _parts(error: Exception) -> tuple[Any, dict[str, Any]]:
    """Return arguments and attributes of an exception, without its notes, which name the worker."""
    return error.args, {name: value for name, value in vars(error).items() if name != "__notes__"}


def _differs(given: Any, wanted: Any) -> str | None:
    if isinstance(given, Exception) and type(given) is type(wanted):
        return difference(_parts(given), _parts(wanted))
    if isinstance(given, Exception) or isinstance(wanted, Exception):
        return ""
    return difference(given, wanted)


@contextlib.contextmanager
def _mode(mode: str) -> Iterator[dict[str, Any]]:
    """Provide the workers of a mode; yields its settings."""
    if mode == "local":
        yield {"execution_mode": mode}
    elif mode == "pseudo":
        yield {"execution_mode": mode, "num_processes": len(_CLIENTS)}
    else:
        with _listening_worker() as (address, token):
            endpoints = dict.fromkeys(_CLIENTS, address)
            yield {"execution_mode": mode, "client_endpoints": endpoints, "token_file": token}


@contextlib.contextmanager
def _listening_worker() -> Iterator[tuple[str, str]]:
    """Start ``torchfedrpc-worker --listen`` on loopback; yields its address and token file."""
    with tempfile.TemporaryDirectory(prefix="torchfedrpc-check-") as folder:
        token = Path(folder) / "token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        worker = subprocess.Popen(
            [sys.executable, "-m", "torchfedrpc.worker_cli", "--listen", "127.0.0.1:0", "--token-file", str(token)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONHASHSEED": "0"},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert worker.stdout is not None
        reader = threading.Thread(target=deque, args=(worker.stdout, 0))  # of what learners print, which is dropped
        try:
            has_spoken, _, _ = select.select([worker.stdout], [], [], _START_S)
            line = worker.stdout.readline() if has_spoken else ""
            if not line.startswith("listening on "):
                raise WorkerLostError("torchfedrpc-worker did not start: see its output")
            reader.start()
            yield line.split()[-1], str(token)
        finally:
            worker.terminate()
            try:
                worker.wait(_END_S)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
            if reader.ident is not None:
                reader.join()
            worker.stdout.close()
