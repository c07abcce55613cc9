"""RRefs of learners over losses, worlds and evictions: none is of another world, and none is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.rpc as rpc
from conftest import Seen
from internals import break_world, world_is_there
from losses import Losses
from torchrun import run_script

import torchfedrpc as tfr
from torchfedrpc.host.mailbox import Mailbox
from torchfedrpc.rpc.rrefs import OwnedRRefs, hold

TWO = {"execution_mode": "pseudo", "num_processes": 2}
ONE = {"execution_mode": "pseudo", "num_processes": 1}
CLIENTS = [f"client_{number}" for number in range(40)]


class Owner:
    """Knows how many RRefs its process owns, and how much memory that has."""

    def __init__(self, client_id: str) -> None:
        self.num_steps = 0

    def step(self) -> int:
        self.num_steps += 1
        return self.num_steps

    def process_id(self) -> int:
        return os.getpid()

    def num_owned(self) -> int:
        api: Any = rpc
        return int(api._rref_context_get_debug_info()["num_owner_rrefs"])

    def memory(self) -> int:
        return resident_bytes()

    def registers_and_gives_up(self) -> list[int]:
        """How many RRefs this process owns, as learners are registered, registered again, given up and closed."""
        rrefs, counts = OwnedRRefs(), [self.num_owned()]
        for step in (
            lambda: rrefs.own("a", Mailbox("a", None)),
            lambda: rrefs.own("a", Mailbox("a", None)),
            lambda: rrefs.own("b", Mailbox("b", None)),
            lambda: rrefs.give_up("a"),
            rrefs.close,
            lambda: rrefs.own("c", Mailbox("c", None)),
        ):
            step()
            counts.append(self.num_owned())
        return [count - counts[0] for count in counts]


class Noted(Owner):
    """Notes in a file that it is made, and can end its process."""

    def __init__(self, client_id: str, path: str) -> None:
        super().__init__(client_id)
        with Path(path).open("a") as file:
            file.write("made\n")

    def end_process(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


async def owners(proxy: tfr.LearnerProxy) -> set[tuple[str, int]]:
    """RPC name of each owner, and the process that runs the learner's calls."""
    processes = await proxy.clients().call("process_id")
    return {(proxy.client(client).rref.owner().name, process) for client, process in processes.items()}


async def test_rrefs_after_a_loss_are_those_of_the_next_world() -> None:
    seen = Losses()
    async with tfr.LearnerProxy(Owner, CLIENTS, runtime=TWO) as proxy:
        proxy.subscribe(seen)
        before = await owners(proxy)
        lost, kept = proxy.client(CLIENTS[0]), proxy.client(CLIENTS[-1])
        old = lost.rref, kept.rref
        os.kill(await lost.process_id(), signal.SIGKILL)
        await seen.loss()
        with pytest.raises(tfr.WorkerLostError, match=f"{CLIENTS[0]} on worker1: .*await a call of this client"):
            _ = lost.rref
        await proxy.clients().call("step")
        assert lost.rref is not old[0]
        assert kept.rref is not old[1]
        after = await owners(proxy)
        assert len(before) == len(after) == 2
        assert len({process for _, process in before} & {process for _, process in after}) == 1


async def test_rrefs_of_a_learner_that_is_given_up_raise() -> None:
    seen = Seen()
    async with tfr.LearnerProxy(Owner, CLIENTS, runtime=TWO | {"on_worker_lost": "fail"}) as proxy:
        proxy.subscribe(seen)
        handle = proxy.client(CLIENTS[0])
        os.kill(await handle.process_id(), signal.SIGKILL)
        with pytest.raises(tfr.WorkerLostError):
            await handle.step()
        with pytest.raises(tfr.WorkerLostError, match=f"{CLIENTS[0]} on worker1: worker1 was lost"):
            _ = handle.rref


async def test_reading_the_rref_of_a_learner_that_is_given_up_does_not_rebuild_it(tmp_path: Path) -> None:
    made = tmp_path / "made"
    runtime = ONE | {"max_recoveries": 0, "journal_max_calls": 1}
    async with tfr.LearnerProxy(Noted, {"a": {"path": str(made)}}, runtime=runtime) as proxy:
        for _ in range(3):
            await proxy.client("a").step()
        with pytest.raises(tfr.WorkerLostError):
            await proxy.client("a").end_process()
        await world_is_there(proxy)
        for _ in range(2):
            with pytest.raises(tfr.WorkerLostError, match="so it was given up"):
                _ = proxy.client("a").rref
        assert proxy.stats()["workers"]["worker1"]["learners"] == 0
    assert made.read_text() == "made\n"


async def test_rrefs_are_read_in_the_event_loop_alone() -> None:
    async with tfr.LearnerProxy(Owner, ["a"], runtime=ONE) as proxy:
        handle = proxy.client("a")
        with pytest.raises(tfr.ConfigError, match="is read in the event loop of the proxy"):
            await asyncio.to_thread(lambda: handle.rref)
        assert handle.rref is not None


async def test_fifty_worlds_leave_no_rref_behind() -> None:
    seen = Losses()
    held = []
    async with tfr.LearnerProxy(Owner, CLIENTS, runtime=TWO) as proxy:
        proxy.subscribe(seen)
        await proxy.clients().call("step")
        for number in range(1, 51):
            break_world(proxy)
            await seen.world(number)
            await proxy.clients().call("step")
            held += [proxy.client(client).rref for client in CLIENTS]
            if number == 5:
                memory = await proxy.client(CLIENTS[0]).memory()
        assert await proxy.client(CLIENTS[0]).num_owned() == len(CLIENTS) // 2
        assert await proxy.client(CLIENTS[0]).step() == 52
        assert await proxy.client(CLIENTS[0]).memory() - memory < 4 << 20
        assert len(await owners(proxy)) == 2
    assert len({str(rref) for rref in held}) == len(held)


async def test_a_worker_gives_up_the_rrefs_of_learners_that_leave_it() -> None:
    async with tfr.LearnerProxy(Owner, ["a"], runtime=ONE) as proxy:
        assert await proxy.client("a").registers_and_gives_up() == [0, 1, 1, 2, 1, 0, 0]


async def passes(num_clients: int, **limits: Any) -> tuple[list[int], list[int], int]:
    """Memory of driver and worker after each of three passes over many clients; how many RRefs the worker owns."""
    clients = [f"client_{number}" for number in range(num_clients)]
    here, there = [], []
    async with tfr.LearnerProxy(Owner, clients, runtime=ONE | limits) as proxy:
        for _ in range(3):
            for first in range(0, num_clients, 1000):
                await proxy.clients(clients[first : first + 1000]).call("step")
            here.append(resident_bytes())
            there.append(await proxy.client(clients[0]).memory())
        return here, there, await proxy.client(clients[0]).num_owned()


@pytest.mark.parametrize("num_clients", [3_000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.timeout(1200)
async def test_rrefs_of_many_learners_with_few_in_memory_do_not_leak(num_clients: int) -> None:
    # Without journals, which keep 200 bytes of each call beside its arguments until a snapshot takes their place.
    here, there, num_owned = await passes(num_clients, max_resident_learners=100, on_worker_lost="fail")
    assert num_owned == num_clients
    for memory in (here, there):
        assert memory[2] - memory[1] < max(8 << 20, 0.02 * memory[1]), memory


SCRIPT = """
import asyncio, os, signal
import torchfedrpc as tfr

class Owner:
    def __init__(self, client_id): pass
    def process_id(self): return os.getpid()

async def main():
    global held
    async with tfr.LearnerProxy(Owner, ["a", "b"], runtime={"execution_mode": "pseudo", "num_processes": 2}) as proxy:
        held = [proxy.client("a").rref, proxy.client("b").rref]
        os.kill(await proxy.client("a").process_id(), signal.SIGKILL)

if __name__ == "__main__":
    asyncio.run(main())
    print("ended with", len(held))
"""


def test_a_process_ends_in_order_with_rrefs_alive_and_a_dead_worker(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    status, output = run_script(script)
    assert (status, output) == (0, "ended with 2"), output


@pytest.mark.parametrize(
    "fork",
    [
        None,
        (),
        (1, 1, 0, 1, 1, 1),
        (1, 1 << 15, 0, 1, 1, 1, "PyObject"),
        (1, 1, 1 << 63, 1, 1, 1, "PyObject"),
        (1, -1, 0, 1, 1, 1, "PyObject"),
        (1, "1", 0, 1, 1, 1, "PyObject"),
        (1, 1, 0, 1, 1, 1, "Tensor"),
        (1, 1, 0, 1, 1, 1, "PyObject", 0),
    ],
    ids=repr,
)
def test_an_rref_of_another_form_is_refused(fork: object) -> None:
    with pytest.raises(tfr.SerializationError, match="an RRef is not of the form"):
        hold(fork, None)


FOREIGN = """
import asyncio, sys
import torch.distributed.rpc as rpc
import torchfedrpc as tfr

class Owner:
    def __init__(self, client_id): self.n = 0
    def step(self):
        self.n += 1
        return self.n

async def main():
    async with tfr.LearnerProxy(Owner, ["a"], runtime={"execution_mode": "pseudo", "num_processes": 1}) as proxy:
        calls = [await proxy.client("a").step() for _ in range(3)]
        try:
            proxy.client("a").rref
        except tfr.ConfigError as error:
            print(calls, error)

if __name__ == "__main__":
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{sys.argv[2]}")
    rpc.init_rpc(sys.argv[1], rank=0, world_size=1, rpc_backend_options=options)
    rpc.shutdown()
    asyncio.run(main())
"""


@pytest.mark.parametrize("name", ["mine", "rank0"])
def test_a_process_with_an_earlier_rpc_world_calls_learners_and_has_no_rrefs(tmp_path: Path, name: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(FOREIGN)
    _, output = run_script(script, name, str(tmp_path / "store"))
    assert "[1, 2, 3] there are no RRefs in a process that has called" in output, output
