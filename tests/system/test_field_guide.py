"""What torch RPC does when one leans on it, hazard by hazard, and that none of it reaches a user.

| hazard | shown by |
| --- | --- |
| RPC's few threads are blocked by calls that wait | here: `..._wait_at_one_worker` |
| `rpc.remote`, `rref.rpc_async`, `rpc_sync`, graceful shutdown, time limits | here: `..._entry_of_rpc_...` |
| exceptions mangled, made RuntimeError, returned as objects; SystemExit | contract/test_errors, test_exceptions |
| arguments and results changed after they were submitted | contract/test_values |
| `_lazy_clone` dangles | here: `..._lazy_clone_...` |
| nested, mkldnn and freed tensors abort the process | contract/test_errors, test_tensors |
| a failed pickle, or a reference cycle, pins tensors | test_freed_memory |
| shutdown hangs with a dead peer | here: `..._frozen_...`; test_recovery_limits |
| leaving a process that serves aborts it | here: `..._never_closes_...` |
| a killed, a stopped, a cut off peer; a peer that dies as a world is formed | test_recovery, test_heartbeat |
| a world cannot be mended, its numbers and names clash in the next | test_recovery, contract/test_closing |
| workers go on when the driver is gone | here: `..._driver_is_killed`; test_modes, test_heartbeat |
| a second attempt under torchrun meets the keys of the first | test_torchrun: `..._started_again_by_torchrun` |
| names that are not resolved, several interfaces | test_two_nodes |
| plain pickle, from any process that connects | test_guard, test_hostile, test_allowlist; loopback: test_modes |
| the default transport burns a core in each process | here: `..._idle_...` |
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import Latch
from internals import worker_processes
from learners import Probe
from processes import Process, children_of, is_alive, wait_for_end
from torchrun import write_script

import torchfedrpc as tfr
from torchfedrpc.rpc.worker_client import WorkerClient

PACKAGE = Path(tfr.__file__).parent
RPC = sorted((PACKAGE / "rpc").glob("*.py"))
CLOSED_WITHIN_S = 10.0
GONE_WITHIN_S = 5.0


# Calls.


async def test_other_learners_are_served_though_many_calls_wait_at_one_worker(latch: Latch) -> None:
    ids = [f"client_{number}" for number in range(41)]  # ten times RPC's threads, and one
    async with tfr.LearnerProxy(Probe, ids, runtime={"num_processes": 1}) as proxy:
        holding = [asyncio.ensure_future(proxy.custom_method(one, "hold_async", latch.path)) for one in ids[:-1]]
        async with asyncio.timeout(20):
            assert await proxy.custom_method(ids[-1], "same", 5) == 5
            holding[0].cancel()
            await asyncio.wait(holding[:1])
        latch.open()
        assert await asyncio.gather(*holding[1:]) == ["released"] * 39


def _calls(path: Path, name: str) -> list[ast.Call]:
    tree = ast.walk(ast.parse(path.read_text()))
    return [node for node in tree if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == name]


def test_no_entry_of_rpc_is_used_that_can_hang_or_leak() -> None:
    for path in RPC:
        for name in ("remote", "to_here", "rpc_sync", "local_value", "confirmed_by_owner"):
            assert not _calls(path, name), f"{path.name} calls {name}"
    sent = [call for path in RPC for call in _calls(path, "rpc_async")]
    assert sent
    for call in sent:
        assert ast.unparse(call.func) == "torch_rpc().rpc_async"  # not an RRef's, which fetches its type first
        assert "timeout=timeout_s" in ast.unparse(call)
    assert inspect.signature(WorkerClient._send).parameters["timeout_s"].default == 0  # deadlines are ours
    agents = "rpc.api._get_current_rpc_agent().shutdown"  # which waits for no other process
    left = [call for path in RPC for call in _calls(path, "shutdown") if "rpc" in ast.unparse(call.func)]
    left = [call for call in left if ast.unparse(call.func) != agents]
    assert left
    assert all("graceful=False" in ast.unparse(call) for call in left)


def test_no_lazy_clone_is_made() -> None:
    assert not [path for path in PACKAGE.rglob("*.py") if _calls(path, "_lazy_clone")]


# Ends.


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
async def test_a_proxy_closes_in_time_though_a_worker_was_killed_or_frozen_a_moment_ago(
    number: signal.Signals,
) -> None:
    loop = asyncio.get_running_loop()
    async with tfr.LearnerProxy(Probe, ["a", "b"], runtime={"num_processes": 2}) as proxy:
        await proxy.clients().call("same", 1)
        pids = worker_processes(proxy)
        sidecars = [child for pid in pids for child in children_of(pid)]
        os.kill(pids[0], number)
        began = loop.time()
    assert loop.time() - began < CLOSED_WITHIN_S
    assert not [pid for pid in pids if is_alive(pid)]
    wait_for_end(sidecars, GONE_WITHIN_S)


def numbers(script: Process) -> list[int]:
    """The numbers of a script's next line, which begins with the names of worker and client if one has printed it."""
    return [int(word) for word in script.next_line().rpartition("] ")[2].split()]


HOLDING = """
import ctypes

class Holding:
    def __init__(self, client_id):
        pass

    def pid(self):
        return os.getpid()

    def hold_the_gil(self):
        print(os.getpid(), flush=True)
        ctypes.PyDLL(None).sleep(300)

async def main():
    async with tfr.LearnerProxy(Holding, ["a", "b", "c"], runtime={"num_processes": 3}) as proxy:
        print(*(await proxy.clients().call("pid")).values(), flush=True)
        await proxy.custom_method("b", "hold_the_gil")

if __name__ == "__main__":
    tfr.run(main)
"""


def test_frozen_busy_and_idle_workers_and_their_sidecars_are_gone_when_the_driver_is_killed(tmp_path: Path) -> None:
    with Process(sys.executable, str(write_script(tmp_path, HOLDING))) as driver:
        workers = numbers(driver)
        assert numbers(driver) == [workers[1]]
        sidecars = [child for pid in workers for child in children_of(pid)]
        assert len(sidecars) == 3
        try:
            os.kill(workers[0], signal.SIGSTOP)
            driver.signal(signal.SIGKILL)
            wait_for_end([*workers, *sidecars], GONE_WITHIN_S)
        finally:
            for pid in filter(is_alive, workers):
                os.kill(pid, signal.SIGKILL)


UNCLOSED = """
async def main():
    proxy = tfr.LearnerProxy(Probe, ["a", "b"], runtime={"num_processes": 2})
    await proxy.__aenter__()
    print(*(await proxy.clients().call("process_id")).values(), flush=True)

if __name__ == "__main__":
    asyncio.run(main())
    print(0, flush=True)
"""


def test_a_script_that_never_closes_its_proxy_ends_as_scripts_do(tmp_path: Path) -> None:
    with Process(sys.executable, str(write_script(tmp_path, UNCLOSED))) as script:
        workers = numbers(script)
        assert numbers(script) == [0]
        assert script.ended(timeout_s=20) == 0, script.output
        assert "terminate called" not in script.output
    wait_for_end(workers, GONE_WITHIN_S)


# Time.


def _worked_s(pid: int) -> float:
    """Seconds of CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def test_idle_processes_of_a_run_use_next_to_no_cpu_time() -> None:
    async with tfr.LearnerProxy(Probe, ["a", "b"], runtime={"num_processes": 2}) as proxy:
        await proxy.clients().call("same", 1)
        pids = [os.getpid(), *worker_processes(proxy)]
        pids += [child for pid in pids[1:] for child in children_of(pid)]
        before, began = [_worked_s(pid) for pid in pids], time.monotonic()
        await asyncio.sleep(1.0)  # what is measured, and not a wait for anything
        took_s = time.monotonic() - began
        shares = [(_worked_s(pid) - used) / took_s for pid, used in zip(pids, before, strict=True)]
    assert max(shares) < 0.2, shares
