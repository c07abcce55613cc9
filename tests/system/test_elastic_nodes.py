"""Workers on another machine, with the configuration and the trainer that a deployment brings along."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from nodes import NEEDS_NAMESPACES, by_cable, inside, nodes
from processes import LightProcess, Process
from torchrun import run_script, run_to_end, write_script
from workers import joining, listening, make_token

pytestmark = NEEDS_NAMESPACES
__all__ = ["nodes"]  # a fixture

SCRIPT = """
    from test_seed_examples import MyFedAvgTrainer, SeedLearner

    async def main(*endpoints, token_file=None, join_at=None):
        clients = ["client_1", "client_2", "client_3"]
        runtime = {"execution_mode": "distributed"} if endpoints or join_at else {}
        if endpoints:
            runtime["client_endpoints"] = dict(zip(clients, endpoints))
        if token_file:
            runtime |= {"token_file": token_file, "join_at": join_at}
        async with tfr.LearnerProxy(SeedLearner, clients, runtime=runtime, seed=3) as proxy:
            trainer = MyFedAvgTrainer({"num_rounds": 6, "clients_per_round": 2, "seed": 1}, proxy)
            accuracy, weights = await trainer.train()
            workers = sorted({proxy._router.get_executor(one).worker_of(one) for one in clients})
        print("result " + json.dumps([accuracy, weights["w"].tolist(), proxy.mode, workers]))

    if __name__ == "__main__":
        options = dict(one.split("=", 1) for one in sys.argv[1:] if "=" in one)
        tfr.run(main, *[one for one in sys.argv[1:] if "=" not in one], **options)
"""
RELAY = """
import asyncio, sys

async def pipe(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()

async def serve(reader, writer):
    there = await asyncio.open_connection("127.0.0.1", int(sys.argv[2]))
    await asyncio.gather(pipe(reader, there[1]), pipe(there[0], writer))

async def main():
    server = await asyncio.start_server(serve, sys.argv[1], 8080)
    print("ready", flush=True)
    await server.serve_forever()

asyncio.run(main())
"""


def result(output: str) -> list[object]:
    (line,) = [line for line in output.splitlines() if line.startswith("result ")]
    found: list[object] = json.loads(line.removeprefix("result "))
    return found


def started(node: str, script: Path, *arguments: str) -> Process:
    """The script under way on a node; it is killed at the end."""
    return Process(*inside(node), sys.executable, str(script), *arguments)


def drive(node: str, script: Path, *arguments: str) -> tuple[int, str]:
    """Run the script on a node: its exit status and its output."""
    return run_to_end(started(node, script, *arguments), timeout_s=60)


@contextlib.contextmanager
def relayed(node: str, address: str, port: str) -> Iterator[None]:
    """A gateway that forwards port 8080 of an address to a port of that node's loopback."""
    relay = subprocess.Popen(
        [*inside(node), sys.executable, "-c", RELAY, address, port], stdout=subprocess.PIPE, text=True
    )
    assert relay.stdout is not None
    try:
        assert relay.stdout.readline() == "ready\n"
        yield
    finally:
        relay.kill()
        relay.communicate()


def test_the_configuration_of_a_deployment_works_on_machines_of_its_own(
    nodes: dict[str, str], tmp_path: Path
) -> None:
    script, token = write_script(tmp_path, SCRIPT), make_token(tmp_path)
    here, there = nodes
    code, output = run_script(script)
    assert code == 0, output
    expected = result(output)
    assert expected[2] == "local"
    with contextlib.ExitStack() as stack:
        addresses = [
            stack.enter_context(listening(token, f"{nodes[there]}:{port}", inside(there)))[1]
            for port in (8080, 8081, 8082)
        ]
        endpoints = [f"http://{address}" for address in addresses]
        code, output = drive(here, script, *endpoints, f"token_file={token}")
        assert code == 0, output
        assert result(output) == [*expected[:2], "distributed", addresses]
        assert output.count("no HTTP is spoken") == 1


@pytest.mark.slow
def test_a_worker_of_another_machine_joins(nodes: dict[str, str], tmp_path: Path) -> None:
    script, token = write_script(tmp_path, SCRIPT), make_token(tmp_path)
    here, there = nodes
    expected = result(run_script(script)[1])
    address = f"{nodes[here]}:29600"
    with joining(address, token, inside(there)) as worker:
        code, output = drive(here, script, f"token_file={token}", f"join_at={address}")
        assert code == 0, output
        assert worker.ended() == 0, worker.output
    assert result(output) == [*expected[:2], "distributed", ["worker1"]]


def test_a_site_behind_a_gateway_is_told_what_it_needs(nodes: dict[str, str], tmp_path: Path) -> None:
    script, token = write_script(tmp_path, SCRIPT), make_token(tmp_path)
    here, there = nodes
    with (
        listening(token, prefix=inside(there)) as (_, hidden),
        relayed(there, nodes[there], hidden.partition(":")[2]),
    ):
        code, output = drive(here, script, f"{nodes[there]}:8080", f"token_file={token}")
    assert code == 1, output
    assert "cannot be reached from" in output
    assert "WireGuard: set runtime.interface=wg0" in output


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_first_joiner_behind_a_firewall_is_refused_and_the_run_goes_on_with_the_next(tmp_path: Path) -> None:
    script, token = write_script(tmp_path, SCRIPT), make_token(tmp_path)
    with by_cable(firewall=True) as nodes:
        here, there = nodes
        address = f"{nodes[here]}:29600"
        with started(here, script, f"token_file={token}", f"join_at={address}") as driver:
            driver.next_line("^waiting for a worker")
            with joining(address, token, inside(there)) as refused:
                assert refused.ended(100) == 1
                assert f"{nodes[here]}:" in refused.output
                assert "(no answer within 5 s)" in refused.output
            with joining(address, token, inside(here)) as worker:
                assert driver.ended(100) == 0, driver.output
                assert worker.ended() == 0, worker.output
    assert result(driver.output)[2:] == ["distributed", ["worker2"]]


def test_idle_connections_outlive_a_network_that_loses_packets() -> None:
    ends = """
        import socket, time
        from torchfedrpc.rpc.control_link import end_when_cut_off

        host, is_server = sys.argv[1], sys.argv[2] == "server"
        if is_server:
            server = socket.create_server((host, 29600), backlog=64)
            print("ready", flush=True)
        connections = []
        for _ in range(40):
            connections.append(server.accept()[0] if is_server else socket.create_connection((host, 29600)))
            end_when_cut_off(connections[-1], 2.0)
        time.sleep(10)  # each is probed ten times by either end
        ended = []
        for connection in connections:
            try:
                ended.append(connection.recv(1, socket.MSG_DONTWAIT))
            except BlockingIOError:  # nothing has come, not even its end
                pass
            except OSError as error:
                ended.append(error.errno)
        print(ended, flush=True)
        sys.stdin.readline()
    """
    with by_cable(delay_s=0.04, loss=0.02) as nodes, contextlib.ExitStack() as stack:
        processes = []
        for node, role in zip(nodes, ("server", "client"), strict=True):
            process = LightProcess(ends, next(iter(nodes.values())), role, prefix=inside(node))
            stack.callback(process.close)
            processes.append(process)
            if role == "server":
                assert process.line() == "ready"
        assert [process.line() for process in processes] == ["[]", "[]"]
