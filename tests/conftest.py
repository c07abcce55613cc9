"""Coroutine tests, the execution modes, and the check that nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import inspect
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_python
from file_order import pytest_addoption, pytest_collection_modifyitems, pytest_configure
from learners import Probe
from leftovers import held

import torchfedrpc as tfr
from torchfedrpc.events import CallEnded, Event, ProgressReported
from torchfedrpc.launcher import Launch

__all__ = ["pytest_addoption", "pytest_collection_modifyitems", "pytest_configure"]

LAUNCHED = Launch.from_environment() is not None
# TEST_MODES=local runs the behaviour of one mode alone, as where a system has no other.
MODES = ["distributed"] if LAUNCHED else os.environ.get("TEST_MODES", "local,pseudo").split(",")
NUM_CLIENTS = 400
_LEAK_TIMEOUT_S = 10.0

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as under nohup; the processes that tests start inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Coroutine tests.


def pytest_itemcollected(item: pytest.Item) -> None:
    if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
        item.fixturenames.insert(0, "runner")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    runner = pyfuncitem.funcargs["runner"]
    assert isinstance(runner, asyncio.Runner)
    runner.run(pyfuncitem.obj(**arguments))
    return True


@pytest.fixture(scope="module")
def runner(_nothing_left_behind: None) -> Iterator[asyncio.Runner]:
    """One event loop for all coroutines of a module: its proxy lives on it."""
    with asyncio.Runner() as runner:
        yield runner


class LoopErrors(logging.Handler):
    """What event loops log as errors: exceptions that were never retrieved, and those of callbacks."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._texts.append(self.format(record))

    def check(self) -> None:
        """Fail if there were any since the last check."""
        texts, self._texts = self._texts, []
        if texts:
            pytest.fail("\n".join(["an event loop has logged errors:", *texts]), pytrace=False)


@pytest.fixture(scope="session")
def loop_errors() -> Iterator[LoopErrors]:
    errors, logger = LoopErrors(), logging.getLogger("asyncio")
    logger.addHandler(errors)
    yield errors
    logger.removeHandler(errors)


@pytest.fixture(autouse=True)
def _no_loop_errors(loop_errors: LoopErrors) -> Iterator[None]:
    """Event loops, of all kinds of tests, log no errors; an error that shows late fails the test under way."""
    yield
    loop_errors.check()


# Optional packages.


def needs(module: str) -> None:
    """Skip a test where an optional package is missing; in continuous integration (`CI` is set) fail it."""
    if os.environ.get("CI"):
        importlib.import_module(module)
    else:
        pytest.importorskip(module)


# Modes.


@pytest.fixture(scope="module", params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def runtime(mode: str) -> dict[str, Any]:
    """The runtime configuration of the mode; the workers are two."""
    return {"execution_mode": mode} | ({"num_processes": 2} if mode == "pseudo" else {})


@pytest.fixture(scope="module")
def lone_runtime(mode: str, runtime: dict[str, Any]) -> dict[str, Any]:
    """The same with one worker where their number can be chosen: for tests that open proxies of their own."""
    return runtime | ({"num_processes": 1} if mode == "pseudo" else {})


@pytest.fixture(scope="module")
def num_hosts(mode: str) -> int:
    return 1 if mode == "local" else 2


@contextlib.contextmanager
def opened(runner: asyncio.Runner, proxy: tfr.LearnerProxy) -> Iterator[tfr.LearnerProxy]:
    runner.run(proxy.__aenter__())
    try:
        yield proxy
    finally:
        runner.run(proxy.__aexit__(None, None, None))


@pytest.fixture(scope="module")
def proxy(runner: asyncio.Runner, runtime: dict[str, Any]) -> Iterator[tfr.LearnerProxy]:
    """An open proxy of `Probe` learners; every test takes clients of its own by `fresh`."""
    clients = [f"client_{number}" for number in range(NUM_CLIENTS)]
    with opened(runner, tfr.LearnerProxy(Probe, clients, runtime=runtime, seed=11)) as proxy:
        yield proxy


class Fresh:
    """Hands out clients that no test has had yet."""

    def __init__(self, client_ids: list[str]) -> None:
        half = len(client_ids) // 2
        self._halves = [client_ids[:half], client_ids[half:]]  # two workers have even shares of neighbours
        self._turn = 0

    def one(self) -> str:
        return self.apart(1)[0]

    def together(self, count: int) -> list[str]:
        """Clients of one host."""
        return [self._halves[0].pop(0) for _ in range(count)]

    def apart(self, count: int) -> list[str]:
        """Clients of both hosts in turn, where there are two."""
        taken = []
        for _ in range(count):
            self._turn = 1 - self._turn
            taken.append(self._halves[self._turn].pop(0))
        return taken


@pytest.fixture(scope="module")
def fresh(proxy: tfr.LearnerProxy) -> Fresh:
    return Fresh(proxy.client_ids)


@pytest.fixture
def one(fresh: Fresh) -> str:
    return fresh.one()


# What tests wait for.


def shared_memory_of(pid: int) -> int:
    """How many mappings and descriptors of the memory that calls share a process has."""
    count = Path(f"/proc/{pid}/maps").read_text().count("torchfedrpc-shared")
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            count += "torchfedrpc-shared" in os.readlink(entry)
    return count


async def submitted(proxy: tfr.LearnerProxy, *calls: Awaitable[Any], timeout_s: float = 20.0) -> list[Any]:
    """Begin calls, none of which ends soon, and wait until all of them are pending; returns their tasks."""
    count = proxy.stats()["pending_calls"] + len(calls)
    tasks = [asyncio.ensure_future(call) for call in calls]
    async with asyncio.timeout(timeout_s):
        while proxy.stats()["pending_calls"] < count:
            await asyncio.sleep(0)
    return tasks


class Latch:
    """A file that learners wait for, whatever process they are in."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "latch")

    def open(self) -> None:
        Path(self.path).touch()


@pytest.fixture
def latch(tmp_path: Path) -> Iterator[Latch]:
    latch = Latch(tmp_path)
    yield latch
    latch.open()  # of a test that failed, too


class Seen:
    """The events of a proxy, and a way to wait for one."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._changed = asyncio.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self._changed.set()

    def progress(self, client_id: str) -> list[Any]:
        return [
            event.progress
            for event in self.events
            if isinstance(event, ProgressReported) and event.client_id == client_id
        ]

    async def until(self, met: Callable[[], Any], timeout_s: float = 30.0) -> None:
        """Wait until a condition on the events is met."""
        async with asyncio.timeout(timeout_s):
            while not met():
                self._changed.clear()
                await self._changed.wait()

    async def reported(self, client_id: str, count: int = 1) -> None:
        """Wait until a learner has reported so often."""
        await self.until(lambda: len(self.progress(client_id)) >= count)

    async def ended(self, client_id: str) -> None:
        """Wait until a call of the client has ended."""
        await self.until(
            lambda: any(isinstance(event, CallEnded) and event.client_id == client_id for event in self.events)
        )


@pytest.fixture
def seen(proxy: tfr.LearnerProxy) -> Iterator[Seen]:
    seen = Seen()
    unsubscribe = proxy.subscribe(seen)
    yield seen
    unsubscribe()


# Nothing is left behind.


@pytest.fixture(scope="session", autouse=True)
def _temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder for temporary files that no other program uses, for us and our processes."""
    before = tempfile.tempdir, os.environ.get("TMPDIR")
    folder = tmp_path_factory.mktemp("temporary")
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
    yield
    tempfile.tempdir = before[0]
    if before[1] is None:
        del os.environ["TMPDIR"]
    else:
        os.environ["TMPDIR"] = before[1]


@pytest.fixture(scope="session", autouse=True)
def _warm_python(_temporary_folder: None) -> Iterator[None]:
    """Fork the processes that run scripts from one that has imported torch."""
    with pytest.MonkeyPatch.context() as patch:
        if not LAUNCHED and sys.platform == "linux" and "HIDDEN_SYSTEM" not in os.environ:
            patch.setattr(subprocess.Popen, "_execute_child", warm_python.execute_child)
        yield
    warm_python.end_server()


@pytest.fixture(scope="session", autouse=True)
def _warm_torch(_warm_python: None) -> None:
    """Let torch make what a process keeps for ever: thread pools, a folder, and the first RPC agent."""
    weights = torch.ones(64, 64, requires_grad=True)
    (weights @ weights).sum().backward()
    runtime = {"execution_mode": MODES[-1]} | ({"num_processes": 1} if MODES[-1] == "pseudo" else {})

    async def main() -> None:
        async with tfr.LearnerProxy(Probe, ["warm"], runtime=runtime) as proxy:
            await proxy.custom_method("warm", "same", 1)

    asyncio.run(main())


@pytest.fixture(scope="module", autouse=True)
def _nothing_left_behind(_warm_torch: None, loop_errors: LoopErrors) -> Iterator[None]:
    """Processes, threads, descriptors, shared memory and temporary files are as they were before the module."""
    before = held()
    yield
    gc.collect()  # of tasks whose exceptions were not retrieved
    loop_errors.check()
    deadline = time.monotonic() + _LEAK_TIMEOUT_S
    while (left := held() - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left, "left behind: " + "; ".join(left)
