"""Back-pressure: submitters wait where arguments would fill the memory, and nothing else changes for them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Latch, Seen, opened, submitted
from torchrun import run_script, write_script

import torchfedrpc as tfr

MIB = 1024 * 1024
LIMIT_BYTES = 1_000_000
LARGE = torch.zeros(LIMIT_BYTES // 4 * 6 // 10)  # two of them do not fit under the limit
POLL_S = 0.001


class Keeper:
    """Remembers the numbers of the calls that it had, and nothing of their ballast."""

    def __init__(self, client_id: str) -> None:
        self.numbers: list[int] = []

    def take(self, number: int, *ballast: torch.Tensor) -> None:
        self.numbers.append(number)

    async def hold(self, until: str, *ballast: torch.Tensor) -> None:
        tfr.current_call().report("holding")
        while not Path(until).exists():
            await asyncio.sleep(POLL_S)

    def had(self) -> list[int]:
        return self.numbers

    def count(self, number: int, *ballast: torch.Tensor) -> int:
        self.numbers.append(number)
        return 1

    def stream(self, number: int) -> Iterator[int]:
        self.numbers.append(number)
        yield number

    def total(self, weights: torch.Tensor) -> float:
        return float(weights.sum())


@pytest.fixture(scope="module")
def proxy(runner: asyncio.Runner, runtime: dict[str, Any]) -> Iterator[tfr.LearnerProxy]:
    """In place of the one that has room for everything."""
    clients = [f"client_{number}" for number in range(30)]
    runtime = runtime | {"max_inflight_bytes": LIMIT_BYTES, "journal_max_bytes": LIMIT_BYTES}
    with opened(runner, tfr.LearnerProxy(Keeper, clients, runtime=runtime)) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def clients(proxy: tfr.LearnerProxy) -> Iterator[str]:
    return iter(proxy.client_ids)


async def test_calls_that_wait_for_room_stay_in_their_order(proxy: tfr.LearnerProxy, clients: Iterator[str]) -> None:
    ids = [next(clients) for _ in range(3)]
    calls = []
    for number in range(60):
        ballast = [LARGE] if number % 3 else []  # those without any would fit, and still do not overtake
        calls.append(proxy.custom_method(ids[number // 2 % 3], "take", number, *ballast))
    await asyncio.gather(*calls)
    for place, client in enumerate(ids):
        expected = [number for number in range(60) if number // 2 % 3 == place]
        assert await proxy.custom_method(client, "had") == expected


async def test_streams_snapshots_and_reductions_stay_behind_calls_that_wait_for_room(
    proxy: tfr.LearnerProxy, clients: Iterator[str], latch: Latch, seen: Seen
) -> None:
    one, other = next(clients), next(clients)
    holding = asyncio.ensure_future(proxy.custom_method(other, "hold", latch.path, LARGE))
    await seen.reported(other)

    async def read() -> list[int]:
        return [item async for item in proxy.stream(one, "stream", 2)]

    async def snapshot() -> dict[str, bytes]:
        return {client: data async for client, data in proxy.snapshots([one])}

    reduction = proxy.clients([one]).reduce("count", tfr.Sum(), 3, LARGE)
    waiting = [
        *await submitted(proxy, proxy.custom_method(one, "take", 1, LARGE)),
        *await submitted(proxy, read()),
        *await submitted(proxy, reduction),
        *await submitted(proxy, proxy.custom_method(one, "take", 4, LARGE)),
    ]
    taking = asyncio.ensure_future(snapshot())
    await asyncio.sleep(0)
    last = asyncio.ensure_future(proxy.custom_method(one, "take", 5))
    latch.open()
    await asyncio.gather(holding, last, *waiting)
    assert await proxy.custom_method(one, "had") == [1, 2, 3, 4, 5]
    await proxy.restore(await taking)
    assert await proxy.custom_method(one, "had") == [1, 2, 3, 4]


async def test_calls_that_are_admitted_together_stay_in_their_order(
    proxy: tfr.LearnerProxy, clients: Iterator[str], latch: Latch, seen: Seen
) -> None:
    one, other = next(clients), next(clients)
    small = LARGE[: len(LARGE) // 2]
    holding = asyncio.ensure_future(proxy.custom_method(other, "hold", latch.path, LARGE, small))
    await seen.reported(other)
    waiting = [
        *await submitted(proxy, proxy.clients([one]).reduce("count", tfr.Sum(), 1, small)),
        *await submitted(proxy, proxy.custom_method(one, "take", 2, small)),
    ]
    latch.open()
    await asyncio.gather(holding, *waiting)
    assert await proxy.custom_method(one, "had") == [1, 2]


async def test_call_that_waits_for_room_has_the_value_of_its_admission(
    proxy: tfr.LearnerProxy, clients: Iterator[str], latch: Latch, seen: Seen
) -> None:
    holder, other = next(clients), next(clients)
    weights = LARGE.clone()
    holding = asyncio.ensure_future(proxy.custom_method(holder, "hold", latch.path, LARGE))
    await seen.reported(holder)
    (waiting,) = await submitted(proxy, proxy.custom_method(other, "total", weights))  # which finds no room
    weights.fill_(1)
    latch.open()
    await holding
    assert await waiting == LARGE.numel()


async def test_a_deadline_passes_while_a_call_waits_for_room_and_it_never_runs(
    proxy: tfr.LearnerProxy, clients: Iterator[str], latch: Latch, seen: Seen
) -> None:
    holder, other = next(clients), next(clients)
    holding = asyncio.ensure_future(proxy.custom_method(holder, "hold", latch.path, LARGE))
    await seen.reported(holder)
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(tfr.CallTimeoutError, match=other):
        await proxy.options(timeout_s=0.2).custom_method(other, "take", 1, LARGE)
    assert 0.2 <= loop.time() - began < 1.0
    latch.open()
    await holding
    await proxy.custom_method(other, "take", 2, LARGE)
    assert await proxy.custom_method(other, "had") == [2]


async def test_a_call_that_is_cancelled_as_it_waits_gives_its_place_to_the_next(
    proxy: tfr.LearnerProxy, clients: Iterator[str], latch: Latch, seen: Seen
) -> None:
    holder, other, third = next(clients), next(clients), next(clients)
    holding = asyncio.ensure_future(proxy.custom_method(holder, "hold", latch.path, LARGE))
    await seen.reported(holder)
    too_large = asyncio.ensure_future(proxy.custom_method(other, "take", 1, LARGE, LARGE))
    fitting = asyncio.ensure_future(proxy.custom_method(third, "take", 2, torch.zeros(1000)))
    done, _ = await asyncio.wait([too_large, fitting], timeout=0.2)  # a call that does not wait takes some ms
    assert not done
    too_large.cancel()
    async with asyncio.timeout(30):
        await fitting  # beside the one that holds
    assert not holding.done()
    latch.open()
    await holding
    assert await proxy.custom_method(other, "had") == []


async def test_calls_that_fail_make_room(proxy: tfr.LearnerProxy, clients: Iterator[str]) -> None:
    one = next(clients)
    failing = [proxy.custom_method(one, "no_such_method", LARGE) for _ in range(5)]
    unsendable = [proxy.custom_method(one, "take", LARGE, lambda: 1) for _ in range(5)]
    for error in await asyncio.gather(*failing, *unsendable, return_exceptions=True):
        assert isinstance(error, tfr.MethodNotFoundError | tfr.SerializationError)
    async with asyncio.timeout(30):
        await proxy.custom_method(one, "take", 1, LARGE, LARGE)


# How much memory that needs, as the kernel counts it.

PRESSING = """
from internals import worker_processes
from test_back_pressure import Keeper

def peaks(pids):
    lines = [open(f"/proc/{pid}/status").read().split("VmHWM:")[1].split()[0] for pid in pids]
    return [int(kib) * 1024 for kib in lines]

async def main(num_calls, num_clients, runtime):
    ids = [f"client_{number}" for number in range(num_clients)]
    async with tfr.LearnerProxy(Keeper, ids, runtime=runtime) as proxy:
        weights = torch.zeros(10_000_000)
        await proxy.clients().call("take", -1)
        pids = [os.getpid(), *worker_processes(proxy)]
        before = peaks(pids)
        await asyncio.gather(
            *(proxy.custom_method(ids[call % num_clients], "take", call, weights) for call in range(num_calls))
        )
        after = peaks(pids)
        had = await proxy.clients().call("had")
    assert [had[one][1:] for one in ids] == [[*range(start, num_calls, num_clients)] for start in range(num_clients)]
    print(json.dumps([before, after]))

if __name__ == "__main__":
    tfr.run(main, int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
"""


def press(folder: Path, num_calls: int, num_clients: int, **runtime: int) -> tuple[list[int], list[int]]:
    """Peaks of resident memory, of the driver and its two workers, before and after calls of 40 MB each."""
    script = write_script(folder, PRESSING)
    runtime |= {"num_processes": 2}
    status, output = run_script(script, str(num_calls), str(num_clients), json.dumps(runtime), timeout_s=850)
    assert status == 0, output
    before, after = json.loads(output.splitlines()[-1])
    return before, after


def test_memory_stays_within_the_limit_while_snapshots_are_on_their_way(tmp_path: Path) -> None:
    before, after = press(tmp_path, 60, 20, max_inflight_bytes=200 * MIB, journal_max_bytes=0)
    grown = [there - here for here, there in zip(before, after, strict=True)]
    assert max(grown) <= 320 * MIB  # of 2,300 that were sent


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_2000_calls_of_40_mb_to_50_learners_leave_the_driver_small(tmp_path: Path) -> None:
    _, after = press(tmp_path, 2000, 50)
    assert after[0] <= 1536 * MIB
    assert max(after[1:]) <= 1536 * MIB
