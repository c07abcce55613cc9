"""Journals and memory where calls have much in common: neither grows with the rounds."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import torch
from conftest import shared_memory_of
from internals import remote_learners, values_kept_by_workers
from losses import kill, pid_of, pseudo
from test_recovery_sharing import NUM_BYTES, SIZE, Adding, add

import torchfedrpc as tfr
from torchfedrpc.wire.file_pool import MemoryFile

NUM_ROUNDS = 200
MODEL_BYTES = 4 << 20


class Loading:
    """A learner that takes the weights over, as ``load_state_dict`` does."""

    def __init__(self, client_id: str) -> None:
        self.weights = {f"layer{number}": torch.zeros(1 << 18) for number in range(4)}

    def load(self, weights: dict[str, torch.Tensor]) -> float:
        for name, tensor in self.weights.items():
            tensor.copy_(weights[name])
        return float(self.weights["layer3"][-1])


def held_by(pid: int) -> tuple[int, int]:
    """Resident bytes of a process, and how many mappings and descriptors of shared values it has."""
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident, shared_memory_of(pid)


async def test_rounds_leave_nothing_in_driver_and_workers() -> None:
    runtime = pseudo(on_worker_lost="fail")
    async with tfr.LearnerProxy(Loading, ["a", "b", "c", "d"], runtime=runtime) as proxy:
        weights = {f"layer{number}": torch.zeros(MODEL_BYTES // 16) for number in range(4)}

        async def rounds(count: int, how: str) -> None:
            for _ in range(count):
                for tensor in weights.values():
                    tensor += 1
                argument: Any = weights if how == "group" else await proxy.share(weights)
                (loaded,) = set((await proxy.clients().call("load", argument)).values())
                assert loaded == weights["layer0"][0]

        def pooled() -> list[MemoryFile]:
            files: list[MemoryFile] = remote_learners(proxy)._file_pool._files
            return files

        def num_held_in_driver() -> int:
            return held_by(os.getpid())[1] - sum(1 if file.mapping is None else 3 for file in pooled())

        workers = [pid_of(proxy, "worker1"), pid_of(proxy, "worker2")]
        processes = [os.getpid(), *workers]
        for how in ("group", "reference"):
            await rounds(NUM_ROUNDS // 4, how)
            before = [held_by(pid)[0] for pid in processes]
            await rounds(NUM_ROUNDS, how)
            async with asyncio.timeout(10):
                while num_held_in_driver() or any(held_by(pid)[1] for pid in workers):
                    await proxy.clients().call("load", {f"layer{number}": torch.ones(()) for number in range(4)})
            assert len(pooled()) <= 4
            for pid, then in zip(processes, before, strict=True):
                assert held_by(pid)[0] - then < 10 * MODEL_BYTES, how  # an allocator has its ups and downs


async def test_a_cancelled_reduce_leaves_no_value_at_its_workers() -> None:
    async with tfr.LearnerProxy(Loading, ["a", "b", "c", "d"], runtime=pseudo()) as proxy:
        weights = {f"layer{number}": torch.zeros(1 << 18) for number in range(4)}
        group = proxy.clients()
        await group.call("load", weights)
        for num_ticks in range(6):
            busy = asyncio.ensure_future(proxy.clients(["a", "b"]).call("load", weights))
            for _ in range(4):
                await asyncio.sleep(0)
            reducing = asyncio.ensure_future(group.reduce("load", tfr.Sum(), weights))
            for _ in range(num_ticks):
                await asyncio.sleep(0)
            reducing.cancel()
            await asyncio.gather(reducing, busy, return_exceptions=True)
            await group.call("load", weights)  # behind what was cancelled
            assert not values_kept_by_workers(proxy), num_ticks


async def test_the_journal_counts_what_its_calls_share_once() -> None:
    runtime = pseudo(journal_max_bytes=10 * NUM_BYTES)
    async with tfr.LearnerProxy(Adding, [f"client_{number}" for number in range(12)], runtime=runtime) as proxy:
        ref, weights = await proxy.share(torch.ones(SIZE)), torch.ones(SIZE)
        for _ in range(3):
            await add(proxy, proxy.client_ids, ref)
        assert NUM_BYTES <= proxy.stats()["journal_bytes"] < NUM_BYTES + 50_000
        await add(proxy, proxy.client_ids, weights)
        assert 2 * NUM_BYTES <= proxy.stats()["journal_bytes"] < 2 * NUM_BYTES + 50_000
        for number in range(20):
            weights.fill_(number)
            await add(proxy, proxy.client_ids, weights)
        async with asyncio.timeout(20):
            while proxy.stats()["journal_bytes"] > 10 * NUM_BYTES:
                await proxy.clients().call("process_id")
        kill(proxy, "worker1")
        assert await add(proxy, proxy.client_ids, ref) == {4.0 + 190 + 1}
