"""The commands of docs/clusters.md: run as they stand, on two network namespaces where they need two machines."""

from __future__ import annotations

import ast
import json
import os
import shlex
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from doc_snippets import Snippet, snippets
from folders import ROOT
from nodes import NEEDS_NAMESPACES, by_cable, inside, nodes
from processes import Process, environment
from torchrun import write_script
from warm_python import UNDER_HOSTNAME
from workers import make_token

__all__ = ["nodes"]  # a fixture
PAGE = ROOT / "docs" / "clusters.md"
SNIPPETS = snippets(PAGE)
(SCRIPT,) = [snippet.code for snippet in SNIPPETS if snippet.what == "where.py"]
BIN = Path(sys.executable).parent


def _blocks_for(test: str) -> list[Snippet]:
    return [snippet for snippet in SNIPPETS if snippet.what.endswith(f"::{test}")]


def _command(line: str, nodes: dict[str, str], node: int) -> tuple[list[str], dict[str, str]]:
    """A line of the page as a command on a node, and the variables before it."""
    for address, own in zip(("10.0.0.1", "10.0.0.7"), nodes.values(), strict=True):
        line = line.replace(address, own)
    words, variables = shlex.split(line), {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    programs = {
        "torchrun": [sys.executable, "-m", "torch.distributed.run"],
        "python": [sys.executable],
        "torchfedrpc-worker": [sys.executable, "-m", "torchfedrpc.worker_cli"],
        "torchfedrpc": [sys.executable, "-m", "torchfedrpc"],
    }
    return [*inside(list(nodes)[node]), *UNDER_HOSTNAME, f"node-{node}", *programs[words[0]], *words[1:]], variables


@pytest.mark.timeout(420)
@pytest.mark.root
@NEEDS_NAMESPACES[1]
@pytest.mark.parametrize(
    "block", _blocks_for("test_two_machines_run_the_lines_of_the_page"), ids=["static", "c10d", "variables"]
)
def test_two_machines_run_the_lines_of_the_page(nodes: dict[str, str], tmp_path: Path, block: Snippet) -> None:
    (tmp_path / "where.py").write_text(SCRIPT)
    lines = block.code.splitlines()
    assert len(lines) == 2
    with ExitStack() as stack:
        processes = []
        for node, line in enumerate(lines):
            command, variables = _command(line, nodes, node)
            processes.append(stack.enter_context(Process(*command, folder=tmp_path, variables=variables)))
        for process in processes:
            assert process.ended(200) == 0, "\n".join(one.output for one in processes)
        (found,) = [line for one in processes for line in one.lines if line.startswith("machines: ")]
    assert found.endswith("node-1")
    assert ("node-0" in found) == ("nproc" in block.code)


@pytest.mark.timeout(420)
@pytest.mark.root
@NEEDS_NAMESPACES[1]
def test_a_worker_is_checked_and_serves_by_the_lines_of_the_page(nodes: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "where.py").write_text(SCRIPT)
    make_token(tmp_path)
    (block,) = _blocks_for("test_a_worker_is_checked_and_serves_by_the_lines_of_the_page")
    lines = zip((1, 0, 0), block.code.splitlines(), strict=True)
    listen, check, drive = (_command(line, nodes, node)[0] for node, line in lines)
    with Process(*listen, folder=tmp_path) as worker:
        worker.line("listening on ")
        with Process(*check, folder=tmp_path) as checking:
            assert checking.ended(60) == 0, checking.output
        assert {line.split()[0] for line in checking.lines} == {"ok"}
        with Process(*drive, folder=tmp_path) as driver:
            assert driver.ended(60) == 0, driver.output
        assert driver.lines[-1] == "machines: node-1"


@pytest.mark.timeout(420)
@pytest.mark.root
@NEEDS_NAMESPACES[1]
def test_a_check_names_the_ports_that_a_firewall_closes(tmp_path: Path) -> None:
    make_token(tmp_path)
    with by_cable(firewall=True) as nodes:  # which lets no connection from the second node to ephemeral ports pass
        listen, _ = _command("torchfedrpc-worker --listen 10.0.0.7:8080 --token-file token", nodes, 1)
        check, _ = _command("torchfedrpc check 10.0.0.7:8080 --token-file token", nodes, 0)
        with Process(*listen, folder=tmp_path) as worker:
            worker.line("listening on ")
            with Process(*check, folder=tmp_path) as checking:
                assert checking.ended(60) == 1, checking.output
        (failed,) = [line for line in checking.lines if line.startswith("FAIL")]
        here = next(iter(nodes.values()))
    assert failed.startswith(f"FAIL ports     {here}:"), failed
    assert "cannot be reached from node-1 (no answer within 5 s)" in failed


@pytest.mark.timeout(420)
@pytest.mark.root
@NEEDS_NAMESPACES[1]
def test_machines_with_other_interface_names_share_a_range(nodes: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "where.py").write_text(SCRIPT)
    make_token(tmp_path)
    listen, _ = _command("torchfedrpc-worker --listen 10.0.0.7:8080 --token-file token", nodes, 1)
    network = next(iter(nodes.values())).rpartition(".")[0] + ".0/24"
    for interface, status in ((network, 0), (next(iter(nodes)), 1)):  # that of the first node has another name
        runtime = {"client_endpoints": {"client_1": "10.0.0.7:8080"}, "token_file": "token", "interface": interface}
        code = f"import torchfedrpc as tfr, where; tfr.run(where.main, {runtime})"
        drive, _ = _command(f"python -c {shlex.quote(code)}", nodes, 0)
        with Process(*listen, folder=tmp_path) as worker, Process(*drive, folder=tmp_path) as driver:
            worker.line("listening on ")
            assert driver.ended(60) == status, driver.output
    assert f"runtime.interface={interface}: node-1 has no such network interface" in driver.output
    assert "give a range of addresses, such as 10.0.0.0/24" in driver.output


ROUNDS = """
class Model:
    def __init__(self, client_id):
        self.weights = torch.zeros(20_000)

    def train(self, weights):
        self.weights = weights + 1
        return self.weights

async def main(address, token, wan):
    runtime = {"client_endpoints": {"client_1": address}, "token_file": token, **json.loads(wan)}
    async with tfr.LearnerProxy(Model, ["client_1"], runtime=runtime) as proxy:
        lost = []
        proxy.subscribe(lambda event: lost.append(event) if isinstance(event, tfr.WorkerLost) else None)
        weights = torch.zeros(20_000)
        for _ in range(20):
            weights = await proxy.execute_remote_method("client_1", "train", weights)
    print("result", len(lost), weights.sum().item())

if __name__ == "__main__":
    tfr.run(main, *sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.root
@NEEDS_NAMESPACES[1]
def test_values_for_a_wan_hold_on_a_slow_link_that_loses_packets(tmp_path: Path) -> None:
    (block,) = _blocks_for("test_values_for_a_wan_hold_on_a_slow_link_that_loses_packets")
    wan = ast.literal_eval(block.code.partition("=")[2].strip())
    script, token = write_script(tmp_path, ROUNDS), make_token(tmp_path)
    with by_cable(delay_s=0.04, loss=0.02, bytes_per_s=2.5e6) as nodes:
        listen, _ = _command("torchfedrpc-worker --listen 10.0.0.7:8080 --token-file token", nodes, 1)
        here, there = nodes
        with Process(*listen, folder=tmp_path) as worker:
            worker.line("listening on ")
            command = [*inside(here), sys.executable, str(script), f"{nodes[there]}:8080", token, json.dumps(wan)]
            with Process(*command, folder=tmp_path) as driver:
                assert driver.ended(300) == 0, driver.output
    assert driver.lines[-1] == "result 0 400000.0"


@pytest.mark.timeout(420)
def test_the_script_of_slurm_runs_its_tasks_as_ranks(tmp_path: Path) -> None:
    """A program of the name of srun starts two tasks, with the variables of one machine."""
    (tmp_path / "where.py").write_text(SCRIPT)
    srun = tmp_path / "srun"
    srun.write_text(
        "#!/bin/bash\nshift\nfor rank in 0 1; do\n"
        "  SLURM_JOB_ID=7 SLURM_STEP_ID=0 SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_STEP_NUM_TASKS=2 \\\n"
        '    SLURM_STEP_TASKS_PER_NODE=2 SLURM_STEP_NODELIST=node1 "$@" &\ndone\nwait\n'
    )
    srun.chmod(0o755)
    batch = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
    path = os.pathsep.join([str(tmp_path), str(BIN), os.environ["PATH"]])
    ran = subprocess.run(
        ["bash", str(ROOT / "examples" / "slurm.sh"), "where.py"],
        cwd=tmp_path,
        env={**environment(), **batch, "PATH": path},
        capture_output=True,
        text=True,
        timeout=220,
    )
    assert "machines: " in ran.stdout, ran.stdout + ran.stderr


@pytest.mark.timeout(420)
def test_pods_of_the_manifest_are_ranks(tmp_path: Path) -> None:
    service, job = yaml.safe_load_all((ROOT / "examples" / "kubernetes.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    variables = {one["name"]: one.get("value") for one in container["env"]}
    (index,) = [one["valueFrom"]["fieldRef"]["fieldPath"] for one in container["env"] if one["name"] == "RANK"]
    assert (job["apiVersion"], job["kind"], spec["completionMode"]) == ("batch/v1", "Job", "Indexed")
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert spec["completions"] == spec["parallelism"] == int(variables["WORLD_SIZE"])
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert variables["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    (tmp_path / "where.py").write_text(SCRIPT)
    with ExitStack() as stack:
        pods = []
        for rank in range(spec["completions"]):
            own = {**variables, "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
            command = [sys.executable, *container["command"][1:]]
            pods.append(stack.enter_context(Process(*command, folder=tmp_path, variables=own)))
        assert [pod.ended(200) for pod in pods] == [0] * len(pods), "\n".join(pod.output for pod in pods)
        assert pods[0].lines[-1].startswith("machines: ")


def test_the_image_runs_a_command_of_the_package() -> None:
    lines = [line.split(" ", 1) for line in (ROOT / "examples" / "Dockerfile").read_text().splitlines() if line]
    instructions = {word: rest for word, rest in lines if word.isupper()}
    (program,) = ast.literal_eval(instructions["ENTRYPOINT"])
    listen, address, option, token = ast.literal_eval(instructions["CMD"])
    assert (program, listen, option) == ("torchfedrpc-worker", "--listen", "--token-file")
    assert address.startswith("0.0.0.0:")  # that of the machine, with --network=host
    assert f":{token}:ro" in PAGE.read_text()
    assert instructions["USER"] == "federation"
