"""Long runs: memory, descriptors, threads and shared memory stay as they are, in the driver and its workers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import environment
from torchrun import write_script

MIB = 1024 * 1024
CLIENTS = 50
WARM_ROUND = 300  # when each learner has its first snapshot, which takes the place of 256 calls

# What a process keeps is compared, so freed memory must go back to the kernel: how much of it the C library holds
# back differs from run to run. A tensor of 100 KB gets pages of its own.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}
ENDURING = """
import ctypes, gc, random, signal, threading
from pathlib import Path
from internals import executor_stats, worker_processes

SIZE = json.loads(sys.argv[1])[-1]

def looked(pid):
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "resident": int(status["VmRSS"].split()[0]) * 1024,
        "threads": int(status["Threads"]),
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
    }

def tidied():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return looked(os.getpid())

class Steady:
    def __init__(self, client_id):
        self.weights = torch.zeros(SIZE)
        self.num_calls = 0

    def train(self, weights):
        self.weights = weights + torch.rand(SIZE) / 100
        self.num_calls += 1
        return {"weights": self.weights, "num_calls": self.num_calls}

    def tidied(self):
        return os.getpid(), tidied()

async def fill_thread_pool():
    # The event loop's own pool grows when several of its threads are busy at once, whenever that is.
    barrier = threading.Barrier(min(32, (os.cpu_count() or 1) + 4))
    await asyncio.gather(*(asyncio.to_thread(barrier.wait) for _ in range(barrier.parties)))

async def main(num_rounds, num_clients, kills, look_at, size):
    draw = random.Random(0)
    await fill_thread_pool()
    looks = []
    ids = [f"client_{number}" for number in range(num_clients)]
    async with tfr.LearnerProxy(Steady, ids, runtime={"num_processes": 2}, seed=1) as proxy:
        weights = torch.zeros(SIZE)
        for round_num in range(1, num_rounds + 1):
            calls = asyncio.ensure_future(proxy.clients().call("train", weights))
            if round_num in kills:
                await asyncio.sleep(draw.random() / 50)
                os.kill(draw.choice(worker_processes(proxy)), signal.SIGKILL)
            results = await calls
            assert {result["num_calls"] for result in results.values()} == {round_num}
            weights = torch.stack([result["weights"] for result in results.values()]).mean(0)
            del calls, results
            if round_num in look_at:
                workers = dict([*(await proxy.clients().call("tidied")).values()])
                driver, stats = tidied(), executor_stats(proxy)
                driver["resident"] -= stats["journal_bytes"]  # which differs, within its bound
                looks.append({"driver": driver, "workers": workers})
    print(json.dumps({"looks": looks, "lost": stats["workers_lost"]}))

if __name__ == "__main__":
    tfr.run(main, *json.loads(sys.argv[1]))
"""


def endure(
    folder: Path, num_rounds: int, num_clients: int, kills: list[int], warm_round: int, size: int = 25_000
) -> tuple[Any, Any]:
    """What is seen of the processes after the warm-up and in the end; as many workers are lost as are killed.

    Memory that calls share is behind descriptors, and resident where it is mapped.

    Args:
        folder: for the script.
        num_rounds: each calls all clients.
        num_clients: on two workers.
        kills: the rounds in which a worker is killed.
        warm_round: when to look first.
        size: numbers of the model, of 4 bytes each.
    """
    script = write_script(folder, ENDURING)
    arguments = json.dumps([num_rounds, num_clients, kills, [warm_round, num_rounds], size])
    done = subprocess.run(
        [sys.executable, str(script), arguments],
        env=environment() | ALLOCATOR,
        stdout=subprocess.PIPE,
        text=True,
        timeout=850,
        check=True,
    )
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["lost"] == len(kills)
    warm, last = seen["looks"]
    return warm, last


def assert_flat(warm: Any, last: Any, growth_bytes: int = 5 * MIB) -> None:
    assert last["threads"] == warm["threads"]
    assert last["descriptors"] == warm["descriptors"]
    assert last["resident"] - warm["resident"] < growth_bytes


def test_a_run_of_some_rounds_leaves_nothing_behind_in_any_process(tmp_path: Path) -> None:
    num_rounds, warm_round, size = 60, 20, 200_000
    assert (num_rounds - warm_round) * 4 * size > 5 * 5 * MIB  # a model left behind each round is far too much
    warm, last = endure(tmp_path, num_rounds, 10, kills=[], warm_round=warm_round, size=size)
    assert_flat(warm["driver"], last["driver"])
    for pid, worker in warm["workers"].items():
        assert_flat(worker, last["workers"][pid])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_500_rounds_of_50_learners_leave_nothing_behind_in_any_process(tmp_path: Path) -> None:
    warm, last = endure(tmp_path, 500, CLIENTS, kills=[], warm_round=WARM_ROUND)
    assert_flat(warm["driver"], last["driver"])
    for pid, worker in warm["workers"].items():
        assert_flat(worker, last["workers"][pid])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_500_rounds_with_10_killed_workers_leave_nothing_behind(tmp_path: Path) -> None:
    kills = [20, 40, 130, 210, 290, 330, 360, 390, 420, 450]
    warm, last = endure(tmp_path, 500, CLIENTS, kills, warm_round=WARM_ROUND)
    assert_flat(warm["driver"], last["driver"], 10 * MIB)  # one round's arguments of each lost worker are 20 MB
    before, after = list(warm["workers"].values()), list(last["workers"].values())
    for name in ("threads", "descriptors"):
        assert max(worker[name] for worker in after) <= max(worker[name] for worker in before) + 8
    assert max(worker["resident"] for worker in after) - max(worker["resident"] for worker in before) < 30 * MIB
