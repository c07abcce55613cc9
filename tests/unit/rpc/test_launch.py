"""The ranks of a launch and their driver: how they find each other, with which token, and at which address."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from processes import environment
from torchrun import rank_variables
from workers import make_token

from torchfedrpc import waiting as reports
from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import ConfigError
from torchfedrpc.launcher import Launch
from torchfedrpc.rpc import handshake
from torchfedrpc.rpc import launch as module
from torchfedrpc.rpc.handshake import TOKEN_VARIABLE
from torchfedrpc.rpc.launch import LaunchedWorkers, dial_driver

_distributed: Any = torch.distributed
_TIMEOUT_S = 20.0


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The launcher's store."""
    store = _distributed.HashStore()
    monkeypatch.setattr(module, "_open_store", lambda launch, **options: store)
    return store


@pytest.fixture
def launch(store: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Launch]:
    """The launch of two ranks, as one of them has it."""
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    monkeypatch.setattr(module, "_STALE_S", 0.5)
    return lambda rank: Launch(rank, 2, rank, 1, "127.0.0.1", 29500, agent_store=True)


@pytest.fixture
def driver(launch: Callable[[int], Launch]) -> Iterator[LaunchedWorkers]:
    workers = LaunchedWorkers(launch(0))
    yield workers
    for member in workers._members.values():  # which it would leave open until the process ends
        member.link.close()
    workers._members.clear()
    workers.end(failed=True)


class Rank(threading.Thread):
    """Rank 1, which joins on a thread of its own."""

    def __init__(self, launch: Launch) -> None:
        super().__init__()
        self._launch = launch
        self.became: Any = None
        self.start()

    def run(self) -> None:
        try:
            self.became = dial_driver(self._launch)
        except Exception as error:
            self.became = error

    def ended(self) -> Any:
        """What has become of it."""
        self.join(_TIMEOUT_S)
        assert not self.is_alive()
        return self.became

    def close(self) -> None:
        """Leave the driver that it has joined."""
        self.ended().close()


def published(store: Any) -> str:
    text: str = store.get(module._DRIVER_KEY).decode()
    return text


async def test_a_token_in_a_file_is_shared_and_never_published(
    driver: LaunchedWorkers, launch: Any, store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = make_token(tmp_path)
    monkeypatch.setenv(TOKEN_VARIABLE, token)
    rank = Rank(launch(1))
    assert len(await driver.gather(RuntimeConfig(token_file=token))) == 1
    assert Path(token).read_text() not in published(store)
    assert '"token": null' in published(store)
    rank.close()


async def test_launch_without_a_token_file_has_a_token_in_the_store(
    driver: LaunchedWorkers, launch: Any, store: Any
) -> None:
    rank = Rank(launch(1))
    assert len(await driver.gather(RuntimeConfig())) == 1
    assert '"token": null' not in published(store)
    rank.close()


@pytest.mark.parametrize(
    ("drivers_has", "rank_has", "reason"),
    [
        (
            True,
            False,
            "the driver has a token file and this rank has none; set TORCHFEDRPC_TOKEN_FILE for every rank",
        ),
        (
            False,
            True,
            "the driver has no token file and this rank has one; set TORCHFEDRPC_TOKEN_FILE for every rank",
        ),
    ],
)
async def test_a_rank_without_the_file_is_refused(
    driver: LaunchedWorkers, launch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    drivers_has: bool, rank_has: bool, reason: str,
) -> None:  # fmt: skip
    token = make_token(tmp_path)
    driver._listener = driver._listen(RuntimeConfig(token_file=token if drivers_has else None))
    if rank_has:
        monkeypatch.setenv(TOKEN_VARIABLE, token)
    error = await asyncio.to_thread(Rank(launch(1)).ended)
    assert isinstance(error, ConfigError)
    assert f"rank 1 cannot join the launch: {reason}" in str(error)


async def test_a_rank_with_another_token_is_refused_and_the_driver_warns(
    driver: LaunchedWorkers, launch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    driver._listener = driver._listen(RuntimeConfig(token_file=make_token(tmp_path)))
    (tmp_path / "other").mkdir()
    monkeypatch.setenv(TOKEN_VARIABLE, make_token(tmp_path / "other"))
    error = await asyncio.to_thread(Rank(launch(1)).ended)
    assert isinstance(error, ConfigError)
    assert "rank 1 cannot join the launch: 127.0.0.1:" in str(error)
    assert "refused the token" in str(error)
    assert (
        "refused a connection from 127.0.0.1: it left after it had seen the proof: it has another token"
        in caplog.text
    )


async def test_a_stranger_who_writes_the_store_is_no_driver_of_ranks_with_a_token_file(
    launch: Any, store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, make_token(tmp_path))
    stranger = LaunchedWorkers(launch(0))
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_token", lambda path: b"0" * 64)
        stranger._listener = stranger._listen(RuntimeConfig(token_file="any"))
    error = await asyncio.to_thread(Rank(launch(1)).ended)
    assert isinstance(error, ConfigError)
    assert not stranger._members
    stranger.end(failed=True)


async def test_a_rank_waits_while_the_driver_asks_for_no_workers(
    driver: LaunchedWorkers, launch: Any, store: Any
) -> None:
    assert published(store) == "null"
    rank = Rank(launch(1))
    await asyncio.to_thread(rank.join, 0.5)
    assert rank.is_alive()
    await asyncio.to_thread(driver.end, failed=False)
    link = await asyncio.to_thread(rank.ended)
    assert link.receive() == {"do": "stop", "reason": ""}
    link.close()
    driver._members.clear()


# Ranks that cannot come.


async def failure_of(driver: LaunchedWorkers) -> str:
    """Why the driver does not wait any longer."""
    async with asyncio.timeout(_TIMEOUT_S):
        with pytest.raises(ConfigError) as raised:
            await driver.gather(RuntimeConfig())
    return str(raised.value)


async def test_ranks_that_are_awaited_are_named_every_10_s(
    driver: LaunchedWorkers, launch: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert reports.REPORT_EVERY_S == 10.0
    monkeypatch.setattr(reports, "REPORT_EVERY_S", 0.2)
    monkeypatch.setattr(module, "_LOOK_S", 0.05)
    waiting = asyncio.ensure_future(driver.gather(RuntimeConfig()))
    async with asyncio.timeout(_TIMEOUT_S):
        while caplog.text.count("waiting for ranks [1] of the launch, for ") < 2:
            await asyncio.sleep(0.01)
    assert {record.levelname for record in caplog.records} == {"WARNING"}  # shown where logging is not configured
    rank = Rank(launch(1))
    assert len(await waiting) == 1
    rank.close()


async def test_an_address_that_a_rank_cannot_reach_ends_the_wait_of_the_driver(
    driver: LaunchedWorkers, launch: Any, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver._listener = driver._listen(RuntimeConfig())
    where = json.loads(published(store))
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    store.set(module._DRIVER_KEY, json.dumps({**where, "port": port}))  # as where a firewall refuses what comes there
    driver._address = address = f"127.0.0.1:{port}"
    rank = Rank(launch(1))
    failure = await failure_of(driver)
    assert f"rank 1 cannot join the launch: {address} cannot be reached from {socket.gethostname()}" in failure
    assert "(Connection refused)" in failure
    assert "ephemeral ports" in failure

    def gone(keys: list[str]) -> bool:
        raise RuntimeError("the store has ended with its launcher")

    monkeypatch.setattr(module, "_wait_for_driver", gone)
    error = await asyncio.to_thread(rank.ended)
    assert isinstance(error, ConfigError)
    assert f"rank 1 could not join the launch: {address} cannot be reached" in str(error)


async def test_an_address_of_an_earlier_attempt_ends_no_wait(
    driver: LaunchedWorkers, launch: Any, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.set(f"{module._FAILED_KEY}/1", json.dumps({"reason": "rank 1 cannot join", "address": "127.0.0.1:9"}))
    waiting = asyncio.ensure_future(driver.gather(RuntimeConfig()))
    await asyncio.wait([waiting], timeout=3 * module._LOOK_S)
    assert not waiting.done()
    rank = Rank(launch(1))
    assert len(await waiting) == 1
    rank.close()


async def test_a_rank_of_another_version_ends_the_wait_of_the_driver(
    driver: LaunchedWorkers, launch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = handshake.own_versions()

    def own_versions() -> dict[str, str]:
        is_rank = isinstance(threading.current_thread(), Rank)
        return {**versions, "torch": "1.0.0"} if is_rank else versions

    monkeypatch.setattr(handshake, "own_versions", own_versions)
    rank = Rank(launch(1))
    failure = await failure_of(driver)
    assert "rank 1 cannot join the launch: 127.0.0.1:" in failure
    assert f"have different versions: torch 1.0.0 and {versions['torch']}" in failure
    assert isinstance(await asyncio.to_thread(rank.ended), ConfigError)


async def test_a_rank_whose_script_fails_ends_the_wait_of_the_driver_once(
    driver: LaunchedWorkers, launch: Any, store: Any
) -> None:
    module.tell_script_ended(launch(1), ModuleNotFoundError("No module named 'learners_of_node_0'"))
    failure = await failure_of(driver)
    assert f"rank 1 failed on {socket.gethostname()} before it reached tfr.run: ModuleNotFoundError" in failure
    assert "No module named 'learners_of_node_0'" in failure
    assert not store.check([f"{module._FAILED_KEY}/1"])  # or the next attempt would end as well
    await asyncio.to_thread(driver.end, failed=False)  # at once: that rank will not come


RANK_SCRIPT = """
import os, subprocess, sys
import torchfedrpc

if (child := os.fork()) == 0:
    raise ValueError("of a child")
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
code = "import torchfedrpc; raise ValueError('of a child')"
assert subprocess.run([sys.executable, "-c", code]).returncode == 1
print("children have failed", flush=True)
sys.stdin.readline()
raise KeyError("of the rank")
"""


@contextlib.contextmanager
def rank_of_launch(folder: Path, text: str) -> Iterator[tuple[Any, subprocess.Popen[str]]]:
    """The store of a launch, and the process of its rank 1, which runs this script."""
    script = folder / "script.py"
    script.write_text(text)
    store = _distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = rank_variables(1, 1, 2, "127.0.0.1", store.port)
    process = subprocess.Popen(
        [sys.executable, str(script)],
        env=environment() | variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        with process:
            yield store, process
    finally:
        process.kill()


def test_driver_notices_the_failure_of_a_rank_and_not_of_its_children(tmp_path: Path) -> None:
    with rank_of_launch(tmp_path, RANK_SCRIPT) as (store, process):
        assert process.stdout is not None
        assert process.stdout.readline() == "children have failed\n"
        assert not store.check([f"{module._FAILED_KEY}/1"])
        process.communicate("\n", timeout=_TIMEOUT_S)
        reason = json.loads(store.get(f"{module._FAILED_KEY}/1"))["reason"]
    assert reason == f"rank 1 failed on {socket.gethostname()} before it reached tfr.run: KeyError: 'of the rank'"


@pytest.mark.parametrize("script", ["import sys, torchfedrpc; sys.exit(1)", "import torchfedrpc"])
def test_driver_notices_a_rank_that_ends_without_an_error(tmp_path: Path, script: str) -> None:
    with rank_of_launch(tmp_path, script) as (store, process):
        process.communicate(timeout=_TIMEOUT_S)
        assert store.check([f"{module._FAILED_KEY}/1"])
        reason = json.loads(store.get(f"{module._FAILED_KEY}/1"))["reason"]
    assert reason.startswith(f"rank 1 ended on {socket.gethostname()} before it reached tfr.run: every rank has to")


def test_rank_that_has_served_tells_no_driver_of_its_end(tmp_path: Path) -> None:
    script = "import torchfedrpc\nasync def main(): pass\ntorchfedrpc.run(main)"
    with rank_of_launch(tmp_path, script) as (store, process):
        workers = LaunchedWorkers(Launch(0, 2, 0, 1, "127.0.0.1", store.port, agent_store=True))
        workers.end(failed=False)  # once the rank has come, which is then asked to leave
        process.communicate(timeout=_TIMEOUT_S)
        assert process.returncode == 0
        assert not store.check([f"{module._FAILED_KEY}/1"])


def test_ranks_that_a_run_has_not_asked_for_are_named_as_it_ends(
    driver: LaunchedWorkers, launch: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reports, "REPORT_EVERY_S", 0.1)
    monkeypatch.setattr(module, "_GATHER_TIMEOUT_S", 1.0)
    monkeypatch.setattr(module, "_LOOK_S", 0.05)
    driver.end(failed=False)
    assert "waiting for ranks [1] of the launch, for " in caplog.text


@pytest.mark.parametrize("master_address", ["192.0.2.1", "nowhere.invalid"])  # not of this machine; unknown
async def test_a_master_address_that_cannot_be_listened_on_is_a_config_error(
    store: Any, monkeypatch: pytest.MonkeyPatch, master_address: str
) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    workers = LaunchedWorkers(Launch(0, 2, 0, 2, master_address, 29500, agent_store=True))
    with pytest.raises(
        ConfigError, match=rf"master address {re.escape(master_address)} \(.+\): set runtime\.interface"
    ):
        await workers.gather(RuntimeConfig())
    workers.end(failed=False)  # a run that needed no workers has succeeded all the same
    with pytest.raises(ConfigError, match=r"the driver has ended, and could not tell this rank: .*interface"):
        await asyncio.to_thread(dial_driver, Launch(1, 2, 1, 2, master_address, 29500, agent_store=True))


def test_a_good_run_without_workers_ends_well_if_the_token_file_cannot_be_read(
    driver: LaunchedWorkers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, str(tmp_path / "missing"))
    driver.end(failed=False)


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_ranks_are_greeted_on_the_interface_that_is_named(num_nodes: int) -> None:
    launch = Launch(0, 2, 0, num_nodes, "localhost", 29500, agent_store=True)
    assert module._listen_addresses(launch, "lo") == ("127.0.0.1", "127.0.0.1")
    with pytest.raises(ConfigError, match=r"runtime\.interface=nowhere0"):
        module._listen_addresses(launch, "nowhere0")


@pytest.mark.parametrize(
    ("num_nodes", "master_address", "where"),
    [
        (1, "192.0.2.7", ("127.0.0.1", "127.0.0.1")),
        (2, "192.0.2.7", ("192.0.2.7", "192.0.2.7")),
        (None, "192.0.2.7", ("192.0.2.7", "192.0.2.7")),
        (None, "127.0.0.1", ("127.0.0.1", "127.0.0.1")),
        (None, "localhost", ("127.0.0.1", "127.0.0.1")),
        (None, "hub", ("hub", "")),  # a name of this machine that has a loopback address here alone
    ],
)
def test_the_launchers_number_of_machines_or_its_master_address_says_where_ranks_are_greeted(
    monkeypatch: pytest.MonkeyPatch, num_nodes: int | None, master_address: str, where: tuple[str, str]
) -> None:
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1" if name == "hub" else name)
    launch = Launch(0, 2, 0, num_nodes, master_address, 29500, agent_store=False)
    assert module._listen_addresses(launch, None) == where
