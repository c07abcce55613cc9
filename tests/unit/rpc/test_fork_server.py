"""The fork server: the state of forked workers, reports of their end, and the end of the server and its workers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from processes import LightProcess, children_of, ends_within

from torchfedrpc.rpc import fork_server as server_module
from torchfedrpc.rpc.processes import ForkedProcess, ForkServer
from torchfedrpc.rpc.surroundings import Preload, Surroundings

# Stands for the worker, without torch: evaluates the lines of its link.
WORKER = """
import json, os, random, signal, socket, sys
def main(link):
    lines = socket.socket(fileno=link).makefile("rw")
    for line in lines:
        print(json.dumps(eval(line, globals())), file=lines, flush=True)
    os._exit(0)
main_remote = main
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a package of the same name, where the server is the real one, and the worker is not."""
    package = tmp_path / "torchfedrpc" / "rpc"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "worker.py").write_text(WORKER)
    (package.parent / "wire").mkdir()
    (package.parent / "wire" / "scan.py").write_text("def compile_patterns(): pass\n")
    (package / "fork_server.py").symlink_to(server_module.__file__)
    return tmp_path


@pytest.fixture
def surroundings(folder: Path) -> Surroundings:
    here = Surroundings.of_this_process()
    return replace(here, path=[str(folder), *sys.path], arguments=["train.py", "x"], folder=str(folder))


@pytest.fixture
def server(surroundings: Surroundings) -> Iterator[ForkServer]:
    server = ForkServer(surroundings)
    yield server
    assert server.end(), "the server has not ended with its last worker"


class Worker:
    """A forked process that evaluates Python expressions."""

    def __init__(self, process: ForkedProcess, link: socket.socket) -> None:
        self.process = process
        self.link = link
        self._lines = link.makefile("rw")

    def tell(self, expression: str) -> None:
        print(expression, file=self._lines, flush=True)

    def ask(self, expression: str) -> Any:
        self.tell(expression)
        return json.loads(self._lines.readline())

    def close(self) -> None:
        with contextlib.suppress(OSError):  # unsent lines
            self._lines.close()
        self.process.close()


@asynccontextmanager
async def forked(server: ForkServer, **changes: Any) -> AsyncIterator[Worker]:
    ours, theirs = socket.socketpair()
    ours.settimeout(20)
    here = replace(server.surroundings, **changes)
    message = {**here.to_message(), "remote": False}
    with ours:
        with theirs:
            worker = Worker(await server.fork(theirs.fileno(), message, here), ours)
        try:
            yield worker
        finally:
            worker.close()


LOADING = """
import threading
loaded = []
def load(what):
    if what == "thread":
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    if what == "error":
        raise RuntimeError("no such data")
    if what in loaded:
        return False
    loaded.append(what)
    return True
"""
LOADED = "[__import__('loading').loaded, os.getppid()]"


def _preload(folder: Path, what: str, group: str = "") -> Preload:
    (folder / "loading.py").write_text(LOADING)
    return Preload("loading:load", {"what": what}, group)


async def test_workers_of_a_template_have_what_it_loads_and_no_worker_changes_it(
    server: ForkServer, folder: Path
) -> None:
    async with forked(server, preload=_preload(folder, "a")) as first:
        assert first.ask(LOADED)[0] == ["a"]
        first.ask("__import__('loading').loaded.append('changed')")
        async with forked(server, preload=_preload(folder, "a")) as second:
            assert second.ask(LOADED) == [["a"], first.ask("os.getppid()")]
        template = first.ask("os.getppid()")
    async with forked(server, preload=_preload(folder, "b")) as third:
        assert third.ask(LOADED) == [["a", "b"], template]
    async with forked(server, preload=_preload(folder, "b", group="other")) as fourth:
        loaded, other = fourth.ask(LOADED)
        assert loaded == ["b"]
        assert other not in (template, server.popen.pid)
    async with forked(server) as plain:
        assert plain.ask("'loading' in sys.modules") is False
        assert plain.ask("os.getppid()") == server.popen.pid


@pytest.mark.parametrize("what", ["thread", "error"])
async def test_workers_are_forked_without_what_cannot_be_loaded_before_a_fork(
    server: ForkServer, folder: Path, what: str
) -> None:
    for _ in range(2):
        async with forked(server, preload=_preload(folder, what)) as worker:
            assert worker.ask("['loading' in sys.modules, os.getppid()]") == [False, server.popen.pid]


async def test_oldest_of_many_templates_ends(server: ForkServer, folder: Path) -> None:
    templates = []
    for number in range(6):
        async with forked(server, preload=_preload(folder, "a", group=str(number))) as worker:
            templates.append(worker.ask("os.getppid()"))
    assert await asyncio.to_thread(ends_within, templates[0], 5)
    assert set(templates[2:]) <= set(children_of(server.popen.pid))


async def test_worker_has_path_arguments_folder_and_variables_of_the_request(
    server: ForkServer, folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    variables = {**server.surroundings.variables, "PYTEST_CURRENT_TEST": "another"}
    async with forked(server, arguments=["other.py"], folder=str(other), variables=variables) as worker:
        found = worker.ask("[sys.path[0], sys.argv, os.getcwd(), os.environ['PYTEST_CURRENT_TEST']]")
        assert found == [str(folder), ["other.py"], str(other), "another"]
        assert worker.ask("os.getpgid(0)") == worker.process.pid == worker.ask("os.getpid()")


async def test_worker_has_only_its_own_descriptors(server: ForkServer) -> None:
    async with forked(server) as first, forked(server) as second:
        count = "len(os.listdir('/proc/self/fd'))"  # with the one of the listing
        assert [first.ask(count), second.ask(count)] == [5, 5]  # three standard streams, and the link


async def test_worker_writes_where_its_driver_writes_now(
    server: ForkServer, capfd: pytest.CaptureFixture[str]
) -> None:
    async with forked(server) as worker:
        worker.ask("print('some output', flush=True), print('an error', file=sys.stderr)")
    found = capfd.readouterr()
    assert (found.out, found.err) == ("some output\n", "an error\n")


@pytest.mark.parametrize(
    "expression",
    [
        "random.random()",
        "__import__('numpy').random.random()",
        "str(__import__('uuid').uuid4())",
        "__import__('multiprocessing').current_process().authkey.hex()",
        "next(__import__('tempfile')._get_candidate_names())",
    ],
)
async def test_workers_draw_different_random_numbers(server: ForkServer, expression: str) -> None:
    async with forked(server) as first, forked(server) as second:
        assert first.ask(expression) != second.ask(expression)


@pytest.mark.parametrize(
    ("ending", "clause"),
    [
        ("os._exit(0)", " with exit status 0"),
        ("os._exit(3)", " with exit status 3"),
        ("os.kill(os.getpid(), signal.SIGKILL)", " by SIGKILL, which the system sends where memory runs out"),
        ("os.kill(os.getpid(), signal.SIGTERM)", " by SIGTERM"),
        ("os.abort()", " by SIGABRT"),
    ],
)
async def test_driver_receives_the_exit_status_of_a_worker(server: ForkServer, ending: str, clause: str) -> None:
    async with forked(server) as worker:
        assert not await worker.process.ends_within(0.05)
        assert worker.process.how_it_ended() == ""
        worker.tell(ending)
        assert await worker.process.ends_within(10)
        assert worker.process.how_it_ended() == clause


async def test_status_is_known_as_the_link_ends(server: ForkServer) -> None:
    async with forked(server) as worker:
        worker.tell("os._exit(3)")
        assert worker.link.recv(1) == b""
        assert await worker.process.ends_within(0.1)
        assert worker.process.status() == 3


async def test_status_of_a_worker_that_runs_or_is_frozen_takes_no_time(server: ForkServer) -> None:
    async with forked(server) as worker:
        worker.process.send_signal(signal.SIGSTOP)
        began_s = time.monotonic()
        assert [worker.process.status() for _ in range(20)] == [None] * 20
        assert time.monotonic() - began_s < 1  # the event loop asks


async def test_signals_reach_a_worker(server: ForkServer) -> None:
    async with forked(server) as worker:
        worker.process.send_signal(signal.SIGSTOP)
        worker.process.send_signal(signal.SIGKILL)
        assert await worker.process.ends_within(10)
        worker.process.send_signal(signal.SIGKILL)


async def test_worker_is_killed_as_its_driver_lets_go_of_it(server: ForkServer) -> None:
    async with forked(server) as worker:
        os.kill(worker.process.pid, signal.SIGSTOP)
    try:
        assert await asyncio.to_thread(ends_within, worker.process.pid, 5)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.process.pid, signal.SIGKILL)


async def test_workers_end_with_a_server_that_is_killed(surroundings: Surroundings) -> None:
    server = ForkServer(surroundings)
    async with forked(server) as worker:
        server.popen.kill()
        assert await worker.process.ends_within(10)
        assert worker.process.status() == -signal.SIGKILL
        assert await asyncio.to_thread(ends_within, worker.process.pid, 5)
    assert server.end()


async def test_server_that_cannot_import_ends_like_a_worker(folder: Path, surroundings: Surroundings) -> None:
    (folder / "torchfedrpc" / "rpc" / "worker.py").write_text("import os; os._exit(7)")
    server = ForkServer(surroundings)
    async with forked(server) as worker:
        assert worker.link.recv(1) == b""
        assert await worker.process.ends_within(0.1)
        assert worker.process.status() == 7
    assert server.end()


async def test_failure_to_fork_is_an_error_of_the_driver(folder: Path, surroundings: Surroundings) -> None:
    code = "import errno, os\ndef fork(): raise OSError(errno.EAGAIN, 'none left')\nos.fork = fork\n"
    (folder / "torchfedrpc" / "rpc" / "worker.py").write_text(code)
    server = ForkServer(surroundings)
    with pytest.raises(BlockingIOError):
        async with forked(server):
            pass
    assert server.end()


async def test_request_that_is_cancelled_leaves_no_worker(folder: Path, surroundings: Surroundings) -> None:
    code = "import time\ntime.sleep(0.5)\n" + WORKER
    (folder / "torchfedrpc" / "rpc" / "worker.py").write_text(code)
    server = ForkServer(surroundings)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05), forked(server):
            pass
    async with forked(server) as worker:
        async with asyncio.timeout(5):
            while children_of(server.popen.pid) != [worker.process.pid]:
                await asyncio.sleep(0.01)
        assert worker.ask("len(os.listdir('/proc/self/task'))") <= 2  # OpenBLAS may have a thread
    assert server.end()


# A driver without torch: for each line of its input it does that, and writes the processes that it has then.
DRIVER = r"""
import asyncio, os, socket
from torchfedrpc.rpc import processes
from torchfedrpc.rpc.processes import start_worker
from torchfedrpc.rpc.surroundings import Preload, Surroundings
sys.path.insert(0, sys.argv.pop(1))

async def main():
    started, links = [], []
    for line in sys.stdin:
        if line == "start\n":
            ours, theirs = socket.socketpair()
            links.append(ours)
            with theirs:
                started.append(await start_worker(theirs.fileno()))
        else:
            exec(line)
        server = processes.current_fork_server()
        print(*[server.popen.pid if server else 0], *[process.pid for process in started], flush=True)

asyncio.run(main())
"""


@pytest.fixture
def driver(folder: Path) -> Iterator[LightProcess]:
    driver = LightProcess(DRIVER, folder)
    yield driver
    driver.close()


def told(driver: LightProcess, line: str) -> list[int]:
    driver.tell(line)
    return list(map(int, driver.line().split()))


def test_server_serves_all_openings_of_its_driver(driver: LightProcess) -> None:
    first, _ = told(driver, "start")
    again, *_ = told(
        driver, "os.environ['PYTEST_CURRENT_TEST'] = 'another'; sys.path.append('/nowhere'); os.chdir('/')"
    )
    assert again == first == told(driver, "start")[0]


@pytest.mark.parametrize(
    "change", ["os.environ['OMP_NUM_THREADS'] = '3'", "os.nice(1)", "sys.warnoptions.append('ignore')"]
)
def test_server_is_replaced_where_what_it_has_read_at_its_start_has_changed(
    driver: LightProcess, change: str
) -> None:
    former, worker = told(driver, "start")
    told(driver, change)
    server, *_ = told(driver, "start")
    assert server != former
    assert not ends_within(worker, 0), "the worker of the former server goes on"
    told(driver, "started.pop(0).close()")
    assert ends_within(former, 5)
    told(driver, "start")
    assert not Path(f"/proc/{former}").exists(), "a zombie is left"


def test_server_that_was_killed_is_started_anew(driver: LightProcess) -> None:
    former, _ = told(driver, "start")
    os.kill(former, signal.SIGKILL)
    assert ends_within(former, 5)
    server, _, worker = told(driver, "start")
    assert server != former
    assert not ends_within(worker, 0)


@pytest.mark.parametrize("ending", ["sys.exit()", "os._exit(0)", "os.kill(os.getpid(), 9)"])
def test_server_and_workers_end_with_their_driver(driver: LightProcess, ending: str) -> None:
    pids = told(driver, "start")
    os.kill(pids[1], signal.SIGSTOP)
    driver.tell(ending)
    assert all(ends_within(pid, 5) for pid in pids)


def test_server_ends_with_its_driver_while_it_imports(driver: LightProcess, folder: Path) -> None:
    (folder / "torchfedrpc" / "rpc" / "worker.py").write_text("import time\ntime.sleep(60)")
    server, *_ = told(driver, "processes._fork_server(Surroundings.of_this_process())")
    driver.close()
    assert ends_within(server, 5)


def test_server_and_workers_end_though_a_forked_child_of_the_driver_goes_on(driver: LightProcess) -> None:
    pids = told(driver, "start")
    driver.tell("child = os.fork(); import time; time.sleep(0 if child else 60); print(child)")
    child = int(driver.line())
    driver.close()
    try:
        assert all(ends_within(pid, 5) for pid in pids)
    finally:
        os.kill(child, signal.SIGKILL)


def test_server_ends_when_it_is_asked_to(driver: LightProcess) -> None:
    server, _ = told(driver, "start")
    told(driver, "started.pop().close()")
    assert told(driver, "processes.end_fork_server()") == [0]
    assert not Path(f"/proc/{server}").exists()


def test_server_is_left_alone_by_ctrl_c_and_sigterm(driver: LightProcess) -> None:
    server, worker = told(driver, "start")
    assert os.getpgid(server) == server
    os.kill(server, signal.SIGTERM)
    os.kill(server, signal.SIGINT)
    assert told(driver, "start")[:2] == [server, worker]
