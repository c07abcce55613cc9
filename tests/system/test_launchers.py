"""Launches by srun and mpirun, whose variables are set as Slurm 24.11 and Open MPI 5.0 set them."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from nodes import NEEDS_NAMESPACES, inside, nodes
from processes import Process
from torchrun import run_to_end, write_script

__all__ = ["nodes"]  # a fixture

SCRIPT = """
async def main():
    async with tfr.LearnerProxy(Probe, ["client_1", "client_2"]) as proxy:
        nodes = await proxy.clients().call("node")
        print("result " + json.dumps([proxy.mode, sorted(nodes.values())]), flush=True)

if __name__ == "__main__":
    tfr.run(main)
"""


def srun(rank: int, local_rank: int, tasks: list[int], node_list: str) -> dict[str, str]:
    """The variables of a task of srun, of which each machine has so many."""
    values = {
        "SLURM_JOB_ID": 7,
        "SLURM_STEP_ID": 0,
        "SLURM_PROCID": rank,
        "SLURM_LOCALID": local_rank,
        "SLURM_NTASKS": sum(tasks),
        "SLURM_STEP_NUM_TASKS": sum(tasks),
        "SLURM_STEP_TASKS_PER_NODE": ",".join(map(str, tasks)),
        "SLURM_STEP_NODELIST": node_list,
        "SLURM_JOB_NODELIST": node_list,
    }
    return {name: str(value) for name, value in values.items()}


def mpirun(rank: int, local_rank: int, tasks: list[int], node_list: str) -> dict[str, str]:
    """The variables of a process of mpirun in an allocation of Slurm, whose daemon srun has started."""
    values = {
        "OMPI_COMM_WORLD_RANK": rank,
        "OMPI_COMM_WORLD_SIZE": sum(tasks),
        "OMPI_COMM_WORLD_LOCAL_RANK": local_rank,
        "OMPI_COMM_WORLD_LOCAL_SIZE": tasks[0] if rank < tasks[0] else tasks[1],
        "PMIX_NAMESPACE": "prterun-hub-7@1",
    }
    daemon = srun(0, 0, [1], node_list)
    return {**daemon, **{name: str(value) for name, value in values.items()}}


Variables = Callable[[int, int, list[int], str], dict[str, str]]


def _result(processes: list[Process]) -> list[object]:
    for process in processes:
        try:
            assert process.ended(60) == 0, process.output
        except subprocess.TimeoutExpired:
            raise AssertionError("\n".join(one.output for one in processes)) from None
    (line,) = [line for one in processes for line in one.lines if line.startswith("result ")]
    found: list[object] = json.loads(line.removeprefix("result "))
    return found


@pytest.mark.parametrize("variables", [srun, mpirun])
def test_processes_of_a_launcher_are_ranks_of_one_run(tmp_path: Path, variables: Variables) -> None:
    script = write_script(tmp_path, SCRIPT)
    with ExitStack() as stack:
        made = [
            Process(
                sys.executable,
                str(script),
                variables={**variables(rank, rank, [3], "node1"), "TFR_NODE": f"process {rank}"},
            )
            for rank in range(3)
        ]
        processes = [stack.enter_context(process) for process in made]
        assert _result(processes) == ["distributed", ["process 1", "process 2"]]


def test_script_of_a_batch_job_runs_alone(tmp_path: Path) -> None:
    script = write_script(tmp_path, SCRIPT)
    batch = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "TFR_NODE": "hub"}
    code, output = run_to_end(Process(sys.executable, str(script), variables=batch), 60)
    assert code == 0, output
    assert 'result ["local", ["hub", "hub"]]' in output


def test_ranks_say_every_10_s_what_they_wait_for_and_end_once_rank_0_has_the_port_of_another(tmp_path: Path) -> None:
    quick = """
        from torchfedrpc import waiting

        waiting.REPORT_EVERY_S = 0.5
    """
    script = write_script(tmp_path, quick, SCRIPT)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        first = Process(sys.executable, str(script), variables={**srun(0, 0, [2], "node1"), "MASTER_PORT": port})
        code, output = run_to_end(first, 60)
    assert code == 1
    assert f"rank 0 cannot serve the store of the launch at 127.0.0.1:{port}: " in output
    assert "MASTER_PORT a port that is free there" in output
    with Process(sys.executable, str(script), variables={**srun(1, 1, [2], "node1"), "MASTER_PORT": port}) as second:
        second.next_line(
            rf"rank 1 waits for rank 0, for 1 s so far: 127\.0\.0\.1:{port} cannot be reached from .*refused"
        )


class TestTwoMachines:
    """On two network namespaces, whose addresses are the names of the nodes."""

    pytestmark = NEEDS_NAMESPACES

    @pytest.mark.parametrize("variables", [srun, mpirun])
    def test_processes_of_a_launcher_find_rank_0_on_the_first_node(
        self, nodes: dict[str, str], tmp_path: Path, variables: Variables
    ) -> None:
        script = write_script(tmp_path, SCRIPT)
        here, there = nodes
        with ExitStack() as stack:
            processes = []
            for rank, (node, local_rank) in enumerate([(here, 0), (here, 1), (there, 0)]):
                given = variables(rank, local_rank, [2, 1], ",".join(nodes.values()))
                process = Process(*inside(node), sys.executable, str(script), variables={**given, "TFR_NODE": node})
                processes.append(stack.enter_context(process))
            assert _result(processes) == ["distributed", sorted(nodes)]
