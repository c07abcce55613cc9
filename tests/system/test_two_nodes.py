"""Distributed mode on two machines: network namespaces of this one, joined by a cable of their own."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from nodes import NEEDS_NAMESPACES, by_cable, inside, nodes
from processes import Process
from torchrun import rank_variables, run_script, write_script
from warm_python import UNDER_HOSTNAME

pytestmark = NEEDS_NAMESPACES
__all__ = ["nodes"]  # a fixture

SCRIPT = """
import socket

async def main():
    ids = [f"client_{number}" for number in range(6)]
    async with tfr.LearnerProxy(Probe, ids, seed=3) as proxy:
        draws = await proxy.clients().call("draw")
        stream = [item async for item in proxy.stream("client_5", "draw_async_stream", 2)]
        tensor = torch.arange(1_000_000.0)
        back = await proxy.clients().call("same", tensor)
        assert all(torch.equal(value, tensor) for value in back.values())
        nodes = await proxy.clients().call("node")
        processes = await proxy.clients().call("process_id")
        workers = len(set(processes.values()))
    result = {"draws": dict(draws), "stream": stream, "nodes": sorted(set(nodes.values())), "workers": workers}
    sys.stdout.write("result " + json.dumps(result) + "\\n")

if __name__ == "__main__":
    tfr.run(main)
"""


def _launch(
    nodes: dict[str, str], script: Path, *, hostnames: bool, launcher: list[str], flags: tuple[str, ...] = ()
) -> tuple[list[int], str]:
    """Start torchrun on both nodes: their exit statuses and their output, one after the other."""
    commands = []
    for rank, (name, address) in enumerate(nodes.items()):
        torchrun = [sys.executable, *flags, "-m", "torch.distributed.run", "--nnodes=2"]
        torchrun.append(f"--nproc-per-node={2 - rank}")
        torchrun += [part.format(rank=rank, address=address, is_host=int(rank == 0)) for part in launcher]
        with_name = [*UNDER_HOSTNAME, f"node-{rank}"]
        command = [*inside(name), *(with_name if hostnames else []), *torchrun, str(script)]
        commands.append((command, {"TFR_NODE": f"node {rank}"}))
    return _run(commands)


def _run(commands: list[tuple[list[str], dict[str, str]]]) -> tuple[list[int], str]:
    """Run commands with their variables: their exit statuses and their output, one after the other."""
    with contextlib.ExitStack() as stack:
        made = [Process(*command, variables=variables) for command, variables in commands]
        processes = [stack.enter_context(process) for process in made]
        try:
            statuses = [process.ended(timeout_s=150) for process in processes]
        except subprocess.TimeoutExpired:
            raise AssertionError("the launch did not end:\n" + "\n".join(one.output for one in processes)) from None
        return statuses, "\n".join(process.output for process in processes)


def _result(output: str) -> str:
    found = [line for line in output.splitlines() if line.startswith("result ")]
    assert len(found) == 1, output
    return found[0]


STATIC = ["--node-rank={rank}", "--master-addr=10.99.0.1", "--master-port=29411"]
C10D = ["--rdzv-backend=c10d", "--rdzv-endpoint=10.99.0.1:29412", "--rdzv-conf=is_host={is_host}"]
C10D += ["--local-addr={address}", "--rdzv-id=one"]


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("launcher", "hostnames"),
    [(STATIC, True), pytest.param(C10D, False, marks=pytest.mark.slow)],
    ids=["static, names of their own", "c10d, one name"],
)
def test_a_proxy_reaches_workers_on_both_machines_and_the_bits_are_those_of_local_mode(
    nodes: dict[str, str], tmp_path: Path, launcher: list[str], hostnames: bool
) -> None:
    script = write_script(tmp_path, SCRIPT)
    codes, output = _launch(nodes, script, hostnames=hostnames, launcher=launcher, flags=("-B",))  # a fresh start
    assert codes == [0, 0], output
    distributed = json.loads(_result(output).removeprefix("result "))
    assert distributed.pop("nodes") == ["node 0", "node 1"]
    assert distributed.pop("workers") == 2
    code, output = run_script(script)
    assert code == 0, output
    local = json.loads(_result(output).removeprefix("result "))
    assert distributed["draws"] == local["draws"]
    assert distributed["stream"] == local["stream"]


@pytest.mark.timeout(240)
def test_ranks_that_environment_variables_alone_start_on_two_machines_find_each_other(
    nodes: dict[str, str], tmp_path: Path
) -> None:
    script = write_script(tmp_path, SCRIPT)
    here, there = nodes
    commands = []
    for rank, (node, local_rank) in enumerate([(here, 0), (here, 1), (there, 0)]):
        variables = rank_variables(rank, local_rank, 3, nodes[here], 29413)
        command = [*inside(node), sys.executable, str(script)]
        commands.append((command, {**variables, "TFR_NODE": "node 0" if node == here else "node 1"}))
    codes, output = _run(commands)
    assert codes == [0, 0, 0], output
    found = json.loads(_result(output).removeprefix("result "))
    assert (found["nodes"], found["workers"]) == (["node 0", "node 1"], 2)


@pytest.mark.timeout(240)
def test_a_firewall_between_machines_ends_a_launch_with_the_address_that_it_hides(tmp_path: Path) -> None:
    script = write_script(tmp_path, SCRIPT)
    with by_cable(firewall=True) as nodes:
        codes, output = _launch(nodes, script, hostnames=True, launcher=STATIC)
    assert 0 not in codes, output
    for what in ("ConfigError: rank 2 cannot join the launch", "ConfigError: rank 2 could not join the launch"):
        address = r"10\.99\.0\.1:\d+ cannot be reached from node-1 \(no answer within 5 s\)"
        assert re.search(f"{what}: {address}", output), output


@pytest.mark.timeout(240)
def test_a_module_that_one_machine_lacks_ends_a_launch_with_its_name(nodes: dict[str, str], tmp_path: Path) -> None:
    missing = 'if os.environ["TFR_NODE"] == "node 1":\n    import learners_of_node_0\n'
    script = write_script(tmp_path, missing, SCRIPT)
    codes, output = _launch(nodes, script, hostnames=True, launcher=STATIC)
    assert 0 not in codes, output
    assert "ConfigError: rank 2 failed on node-1 before it reached tfr.run: ModuleNotFoundError: No module" in output
    assert "No module named 'learners_of_node_0'" in output
