"""torchfedrpc's calls, models on their way, and sums on workers, as its users write them; in worker processes."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import memory
import torch
import workload
from protocol import Measured, Repeat, serve, timed, warm_up
from workload import Weights

import torchfedrpc as tfr

NUM_MODEL_LEARNERS = 64
NUM_SAMPLES = 50

stocked: list[Weights] = []  # in a worker: what ``pull_given`` is to give


@functools.cache
def kept() -> Weights:
    """In a worker: the weights that its learners keep."""
    return workload.model_weights()


class BenchLearner:
    """Does next to nothing, so that the calls themselves are measured."""

    def __init__(self, client_id: str) -> None:
        self.received: Weights = {}
        self.seen = 0.0

    def no_op(self) -> None:
        """Nothing."""

    def push(self, weights: Weights) -> None:
        """Take weights and keep them until the next."""
        self.received = weights

    def received_digest(self) -> str:
        """Of what was pushed last."""
        return workload.digest(self.received)

    def pull(self) -> Weights:
        """Give weights that stay here; the caller is owed a copy."""
        return kept()

    def stock(self, count: int) -> None:
        """Make what so many ``pull_given`` are to give."""
        stocked[:] = [{name: tensor.clone() for name, tensor in kept().items()} for _ in range(count)]

    def pull_given(self) -> Weights:
        """Give weights away."""
        return stocked.pop()

    def set_model_weights(self, weights: Weights) -> None:
        """Read of weights, and keep none of them."""
        self.seen = float(weights["layer3"][500, 500])

    def what_was_seen(self) -> float:
        """The number that was read last."""
        return self.seen

    def train(self) -> dict[str, Any]:
        """What a learner gives after training: the same each time."""
        return {"model_weights": kept(), "num_samples": NUM_SAMPLES}


class Calls:
    """The workloads, through an open proxy."""

    def __init__(self, proxy: tfr.LearnerProxy) -> None:
        self.proxy = proxy
        self.client_ids = proxy.client_ids
        self.learner = proxy.client(self.client_ids[0])

    def repeats(self) -> dict[str, Callable[[], Repeat]]:
        """What makes each workload."""
        return {
            "noop": lambda: self.no_op,
            "gathered": lambda: self.gathered,
            "push": lambda: self.pushing(workload.model_weights()),
            "small": lambda: self.pushing(workload.small_weights()),
            "push_shared": lambda: self.push_shared,
            "push_anew": lambda: self.push_anew,
            "pull": lambda: self.pull,
            "pull_given": lambda: self.pull_given,
            "fan_group_2": lambda: self.fanning(2, self.by_group),
            "fan_group_64": lambda: self.fanning(64, self.by_group),
            "fan_loop_2": lambda: self.fanning(2, self.by_loop),
            "fan_loop_64": lambda: self.fanning(64, self.by_loop),
            "reduce_16": lambda: self.averaging(16, self.reduced),
            "reduce_64": lambda: self.averaging(64, self.reduced),
            "gather_16": lambda: self.averaging(16, self.gathered_average),
            "gather_64": lambda: self.averaging(64, self.gathered_average),
        }

    def some(self, count: int) -> list[str]:
        """So many clients, half of them on each of two workers."""
        half = count // 2
        return [*self.client_ids[:half], *self.client_ids[-half:]]

    async def no_op(self, count: int) -> Measured:
        """``noop``."""
        seconds, result = await timed(lambda: self.learner.no_op(), count)
        return Measured(seconds, str(result))

    async def gathered(self, count: int) -> Measured:
        """``gathered``."""
        handles = [self.proxy.client(client_id) for client_id in self.client_ids[: workload.NUM_GATHERED_LEARNERS]]
        rounds = range(workload.NUM_GATHERED_CALLS // len(handles))

        async def burst() -> list[Any]:
            return await asyncio.gather(*(handle.no_op() for _ in rounds for handle in handles))

        seconds, results = await timed(burst, count)
        return Measured(seconds, str(results[-1]))

    def pushing(self, weights: Weights) -> Repeat:
        """``push`` and ``small``."""

        async def repeat(count: int) -> Measured:
            seconds, _ = await timed(lambda: self.learner.push(weights), count)
            return Measured(seconds, await self.learner.received_digest())

        return repeat

    async def push_shared(self, count: int) -> Measured:
        """``push`` of a shared value that is on the worker before the time is taken."""
        ref = await self.proxy.share(workload.model_weights())
        try:
            await self.learner.push(ref)
            seconds, _ = await timed(lambda: self.learner.push(ref), count)
            return Measured(seconds, await self.learner.received_digest())
        finally:
            await ref.release()

    async def push_anew(self, count: int) -> Measured:
        """``push`` of a value that is shared for the call."""
        weights = workload.model_weights()

        async def once() -> None:
            ref = await self.proxy.share(weights)
            await self.learner.push(ref)
            await ref.release()

        seconds, _ = await timed(once, count)
        return Measured(seconds, await self.learner.received_digest())

    async def pull(self, count: int) -> Measured:
        """``pull``."""
        return await self.pulling(lambda: self.learner.pull(), count)

    async def pull_given(self, count: int) -> Measured:
        """``pull`` of what the learner does not keep; it is made before the time is taken."""
        await self.learner.stock(count)
        return await self.pulling(lambda: self.learner.pull_given(), count)

    async def pulling(self, call: Callable[[], Awaitable[Weights]], count: int) -> Measured:
        """Await weights so many times."""
        seconds, weights = await timed(call, count)
        return Measured(seconds, workload.digest(weights))

    def fanning(self, num_learners: int, send: Callable[[list[str], Weights], Awaitable[object]]) -> Repeat:
        """One model to so many learners."""
        client_ids, weights = self.some(num_learners), workload.model_weights()

        async def repeat(count: int) -> Measured:
            seconds, _ = await timed(lambda: send(client_ids, weights), count)
            seen = await self.proxy.clients(client_ids).call("what_was_seen")
            return Measured(seconds, str(set(seen.values())))

        return repeat

    async def by_group(self, client_ids: list[str], weights: Weights) -> object:
        """As a group call."""
        return await self.proxy.clients(client_ids).call("set_model_weights", weights)

    async def by_loop(self, client_ids: list[str], weights: Weights) -> object:
        """As the seed's gathered loop."""
        return await asyncio.gather(*(self.proxy.set_model_weights(client_id, weights) for client_id in client_ids))

    def averaging(self, num_learners: int, average: Callable[[list[str]], Awaitable[Weights]]) -> Repeat:
        """The average of what so many learners give; with the bytes that come, and the driver's growth meanwhile."""
        client_ids = self.some(num_learners)
        memory.give_back()
        # Of a driver that has had no models yet, where the process does nothing else.
        before_mb = memory.resident_mb()

        async def repeat(count: int) -> Measured:
            weights: Weights = {}

            async def once() -> None:
                nonlocal weights
                weights = {}
                weights = await average(client_ids)

            received_bytes = self.proxy.stats()["bytes_received"]
            memory.give_back()
            memory.forget_peak()
            seconds, _ = await timed(once, count)
            received_mb = (self.proxy.stats()["bytes_received"] - received_bytes) / count / 1e6
            extra = {"received_mb": received_mb, "growth_mb": memory.peak_mb() - before_mb}
            return Measured(seconds, workload.fingerprint(weights), extra)

        return repeat

    async def reduced(self, client_ids: list[str]) -> Weights:
        """Summed on the workers."""
        reducer = tfr.WeightedMean()
        weights: Weights = (await self.proxy.clients(client_ids).reduce("train", reducer)).value
        return weights

    async def gathered_average(self, client_ids: list[str]) -> Weights:
        """Gathered, then averaged in the driver."""
        results = await self.proxy.clients(client_ids).call("train")
        return workload.weighted_average((one["model_weights"], one["num_samples"]) for one in results.values())


@asynccontextmanager
async def prepare(workloads: tuple[str, ...], quick: bool) -> AsyncIterator[Mapping[str, Repeat]]:
    """All workloads on one proxy, with one worker or two."""
    torch.set_num_threads(1)
    num_clients, num_processes = 1, 1
    if "gathered" in workloads:
        num_clients, num_processes = workload.NUM_GATHERED_LEARNERS, 2
    elif any(name.startswith(("fan_", "reduce_", "gather_")) for name in workloads):
        num_clients, num_processes = NUM_MODEL_LEARNERS, 2
    runtime = {"execution_mode": "pseudo", "num_clients": num_clients, "num_processes": num_processes}
    async with tfr.LearnerProxy(BenchLearner, runtime=runtime) as proxy:
        known = Calls(proxy).repeats()
        repeats = {name: known[name]() for name in workloads if name in known}
        for name, repeat in repeats.items():
            await warm_up(repeat, 3 if name in ("noop", "push", "pull", "small") else 1)
        yield repeats


if __name__ == "__main__":
    serve(prepare, "torchfedrpc", "torch")
