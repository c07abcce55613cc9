"""Settings of the runtime, seen in what a run's processes get: TensorPipe's threads, and where they listen."""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LAUNCHED
from nodes import NEEDS_NAMESPACES, inside, nodes
from processes import Process
from torchrun import run_to_end, write_script

import torchfedrpc as tfr
from torchfedrpc.config import RuntimeConfig
from torchfedrpc.rpc import world

__all__ = ["nodes"]  # a fixture
pytestmark = pytest.mark.skipif(LAUNCHED, reason="starts workers of its own")


def tensorpipe_threads() -> Counter[str]:
    """How many threads of each kind TensorPipe has in this process; it names each after the transport or channel."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            names.append((task / "comm").read_text().strip())
    return Counter(name for name in names if name.startswith("TP_"))


class Inspector:
    """A learner that looks at the process it is in."""

    def __init__(self, client_id: str) -> None:
        pass

    def threads(self, tensor: torch.Tensor) -> tuple[dict[str, int], torch.Tensor]:
        return dict(tensorpipe_threads()), tensor


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"TP_UV_loop": 1, "TP_CMA_loop": 1}),
        ({"transport": "uv"}, {"TP_UV_loop": 1, "TP_CMA_loop": 1}),
        ({"transport": "shm"}, {"TP_SHM_reactor": 1, "TP_CMA_loop": 1}),
        ({"channels": ["basic"]}, {"TP_UV_loop": 1}),
        ({"channels": ["mpt_uv", "basic"]}, {"TP_UV_loop": 17}),  # 16 connections, with a loop for each
    ],
    ids=str,
)
async def test_transport_and_channels_are_those_that_tensorpipe_runs(
    settings: dict[str, Any], expected: dict[str, int]
) -> None:
    before, tensor = tensorpipe_threads(), torch.rand(300_000)
    async with tfr.LearnerProxy(Inspector, ["a"], runtime={"num_processes": 1, **settings}) as proxy:
        threads, back = await proxy.client("a").threads(tensor)
        own = tensorpipe_threads() - before
    for found in (threads, own):
        found.pop("TP_IBV_loop", None)  # shm sets it up by the way
        assert found == expected
    assert torch.equal(back, tensor)


async def test_interface_other_than_that_of_an_earlier_proxy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "_interface", "wg0")  # as after a proxy there
    with pytest.raises(tfr.ConfigError, match=r"here on wg0, .* this one is for lo\. Set runtime\.interface=wg0"):
        async with tfr.LearnerProxy(Inspector, ["a"], runtime={"num_processes": 1}):
            raise AssertionError("it opened")


def test_interface_of_a_world_that_no_member_joins_binds_no_later_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "_interface", None)
    monkeypatch.setattr(world, "_JOIN_TIMEOUT_S", 0.5)
    store, port = world.serve_store("127.0.0.1")
    transport, channels = world.choose_transport(RuntimeConfig())
    plan = world.WorldPlan(1, "127.0.0.1", port, transport, channels, True, [None])
    with pytest.raises(tfr.WorkerLostError, match=r"a member did not join"):
        world.join(plan, 0, "eth0")  # torch looks an interface up as an agent starts, which this one does not
    world.check_interface("wg0")
    del store


async def test_interface_that_has_no_address_is_refused_by_name() -> None:
    with pytest.raises(tfr.ConfigError, match=r"runtime\.interface=nowhere0: .* has no such network interface.*lo"):
        async with tfr.LearnerProxy(Inspector, ["a"], runtime={"num_processes": 1, "interface": "nowhere0"}):
            raise AssertionError("it opened")


SCRIPT = """
    from nodes import listening_addresses

    async def main(*interfaces):
        for interface in interfaces:
            async with tfr.LearnerProxy(Probe, ["a", "b"], runtime={"interface": interface, **RUNTIME}) as proxy:
                await proxy.clients().call("same", torch.zeros(100_000))
                pids = {os.getpid(), *(await proxy.clients().call("process_id")).values()}
                found = {pid: listening_addresses(pid) for pid in pids}
            print("result", json.dumps(list(found.values())), flush=True)

    if __name__ == "__main__":
        tfr.run(main, *sys.argv[1:])
"""


def addresses_in(node: str, script: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> list[list[list[str]]]:
    """Run the script on a node; for each of its proxies, and each process then, the addresses of its ports."""
    command = [*inside(node), sys.executable, *launcher, str(script), *arguments]
    status, output = run_to_end(Process(*command), timeout_s=100)
    assert status == 0, output
    lines = [line.removeprefix("result ") for line in output.splitlines() if line.startswith("result ")]
    return [json.loads(line) for line in lines]


def check_all(found: list[list[str]], num_processes: int, address: str) -> None:
    """Every process listens, and on this address alone."""
    assert len(found) == num_processes
    for addresses in found:
        assert addresses
        assert set(addresses) == {address}


class TestInterface:
    """On a machine with a network, which listens there with all ports of torch RPC and of ours, and nowhere else."""

    pytestmark = NEEDS_NAMESPACES

    def test_workers_and_driver_listen_on_the_interface_alone(self, nodes: dict[str, str], tmp_path: Path) -> None:
        script = write_script(tmp_path, "RUNTIME = {'num_processes': 2}", SCRIPT)
        node, address = next(iter(nodes.items()))
        (named,) = addresses_in(node, script, node)  # the interface has the node's name
        check_all(named, 3, address)

    def test_ranks_of_a_launch_listen_on_the_interface_alone(self, nodes: dict[str, str], tmp_path: Path) -> None:
        script = write_script(tmp_path, "RUNTIME = {}", SCRIPT)
        node, address = next(iter(nodes.items()))
        launcher = ("-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2", "--master-addr=127.0.0.1")
        (named,) = addresses_in(node, script, node, launcher=(*launcher, "--master-port=29413"))
        check_all(named, 2, address)
