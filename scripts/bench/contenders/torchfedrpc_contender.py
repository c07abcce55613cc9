"""torchfedrpc's calls, models on their way, sums on workers and FedAvg, as its users write them."""

from __future__ import annotations

import asyncio
import ctypes
import functools
import gc
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import workload
from protocol import Measured, Repeat, calling, serve, timed
from workload import Weights

import torchfedrpc as tfr

NUM_MODEL_LEARNERS = 64

stocked: list[Weights] = []  # in a worker: the weights that ``pull_given`` gives


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
        """Of the weights that were pushed last."""
        return workload.digest(self.received)

    def pull(self) -> Weights:
        """Give weights that stay here; the caller is owed a copy."""
        return kept()

    def stock(self, count: int) -> None:
        """Make the weights that so many ``pull_given`` give."""
        stocked[:] = [{name: tensor.clone() for name, tensor in kept().items()} for _ in range(count)]

    def pull_given(self) -> Weights:
        """Give weights away."""
        return stocked.pop()

    def set_model_weights(self, weights: Weights) -> None:
        """Read of weights, and keep none of them."""
        self.seen = float(weights["layer3"][500, 500])

    def get_seen(self) -> float:
        """The number that was read last."""
        return self.seen

    def train(self) -> dict[str, Any]:
        """The same results as of a training, each time."""
        return {"model_weights": kept(), "num_samples": workload.NUM_SAMPLES}


class StickyFedAvgLearner:
    """A client of FedAvg, which stays on its worker."""

    def __init__(self, client_id: str) -> None:
        self.number = int(client_id.removeprefix("client_")) - 1
        workload.client_data(self.number)

    def no_op(self) -> None:
        """Make the data of all clients, as other contenders do; a first call makes the learner."""
        workload.make_ready()

    def train_epoch(self, kind: str, weights: Weights) -> dict[str, Any]:
        """One local epoch from the given weights."""
        trained = workload.train_client(kind, weights, self.number)
        return {"model_weights": trained, "num_samples": workload.NUM_SAMPLES}


class FedAvgLearner(StickyFedAvgLearner):
    """A client of FedAvg, whose calls run anywhere."""

    stateless = True


class StickySleeper:
    """A client that sleeps, and stays on its worker."""

    def __init__(self, client_id: str) -> None:
        self.number = int(client_id.removeprefix("client_")) - 1

    def no_op(self) -> None:
        """Nothing; a first call makes the learner."""

    def sleep(self, kind: str) -> int:
        """Sleep as long as its client does, and give its number."""
        time.sleep(workload.sleep_s(kind, self.number))
        return self.number


class Sleeper(StickySleeper):
    """A client that sleeps anywhere."""

    stateless = True


class Calls:
    """The workloads, through an open proxy."""

    def __init__(self, proxy: tfr.LearnerProxy) -> None:
        self.proxy = proxy
        self.client_ids = proxy.client_ids
        self.learner = proxy.client(self.client_ids[0])

    def repeats(self) -> dict[str, Callable[[], Repeat]]:
        """Makers of the workloads."""
        learner = self.learner
        return {
            "noop": lambda: calling(lambda: learner.no_op(), str),
            "gathered": lambda: calling(self.burst, lambda results: str(results[-1])),
            "push": lambda: self.pushing(workload.model_weights()),
            "small": lambda: self.pushing(workload.small_weights()),
            "push_shared": lambda: self.push_shared,
            "push_anew": lambda: self.pushing(workload.model_weights(), self.share_and_push),
            "pull": lambda: calling(lambda: learner.pull(), workload.digest),
            "pull_given": lambda: self.pull_given,
            **{f"fan_group_{count}": partial(self.fanning, count, self.by_group) for count in (2, 64)},
            **{f"fan_loop_{count}": partial(self.fanning, count, self.by_loop) for count in (2, 64)},
            **{f"reduce_{count}": partial(self.averaging, count, self.reduced) for count in (16, 64)},
            "gather_64": lambda: self.averaging(64, self.gathered_average),
            **{
                f"{kind}{where}": partial(workload.rounds, kind, partial(self.fedavg_round, kind))
                for kind in workload.KINDS
                for where in ("", "_two", "_two_sticky")
            },
            **{
                f"{kind}_eight{which}": partial(workload.sleeping, kind, partial(self.sleeping_round, kind))
                for kind in workload.SLEEPS
                for which in ("", "_sticky")
            },
        }

    def some(self, count: int) -> list[str]:
        """So many clients, half of them on each of two workers."""
        half = count // 2
        return [*self.client_ids[:half], *self.client_ids[-half:]]

    async def burst(self) -> list[Any]:
        """``gathered``."""
        handles = [self.proxy.client(client_id) for client_id in self.client_ids[: workload.NUM_GATHERED_LEARNERS]]
        rounds = range(workload.NUM_GATHERED_CALLS // len(handles))
        return await asyncio.gather(*(handle.no_op() for _ in rounds for handle in handles))

    async def received_digest(self, _: object = None) -> str:
        """Of the weights that were pushed last."""
        return str(await self.learner.received_digest())

    def pushing(self, weights: Weights, push: Callable[[Weights], object] | None = None) -> Repeat:
        """``push``, ``small`` and ``push_anew``."""
        return calling(partial(push or self.learner.push, weights), self.received_digest)

    async def push_shared(self, count: int) -> Measured:
        """``push`` of a shared value that is on the worker before the time is taken."""
        ref = await self.proxy.share(workload.model_weights())
        await self.learner.push(ref)
        seconds, _ = await timed(lambda: self.learner.push(ref), count)
        digest = await self.received_digest()
        await ref.release()
        return Measured(seconds, digest)

    async def share_and_push(self, weights: Weights) -> None:
        """``push`` of a value that is shared for the call."""
        ref = await self.proxy.share(weights)
        await self.learner.push(ref)
        await ref.release()

    async def pull_given(self, count: int) -> Measured:
        """``pull`` of weights that the learner does not keep; they are made before the time is taken."""
        await self.learner.stock(count)
        seconds, weights = await timed(lambda: self.learner.pull_given(), count)
        return Measured(seconds, workload.digest(weights))

    def fanning(self, num_learners: int, send: Callable[[list[str], Weights], Awaitable[object]]) -> Repeat:
        """One model to so many learners."""
        client_ids, weights = self.some(num_learners), workload.model_weights()

        async def seen(_: object) -> str:
            return str(set((await self.proxy.clients(client_ids).call("get_seen")).values()))

        return calling(lambda: send(client_ids, weights), seen)

    async def by_group(self, client_ids: list[str], weights: Weights) -> object:
        """As a group call."""
        return await self.proxy.clients(client_ids).call("set_model_weights", weights)

    async def by_loop(self, client_ids: list[str], weights: Weights) -> object:
        """As the seed's gathered loop."""
        return await asyncio.gather(*(self.proxy.set_model_weights(client_id, weights) for client_id in client_ids))

    def averaging(self, num_learners: int, average: Callable[[list[str]], Awaitable[Weights]]) -> Repeat:
        """The average of so many learners' weights, with the bytes received and the growth of the driver."""
        client_ids = self.some(num_learners)
        return_free_memory()
        # Of a driver that has had no models yet, where the process does nothing else.
        before_mb = own_memory_mb("VmRSS")

        async def repeat(count: int) -> Measured:
            weights: Weights = {}

            async def once() -> None:
                nonlocal weights
                weights = {}
                weights = await average(client_ids)

            received_bytes = self.proxy.stats()["bytes_received"]
            return_free_memory()
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
            seconds, _ = await timed(once, count)
            received_mb = (self.proxy.stats()["bytes_received"] - received_bytes) / count / 1e6
            extra = {"received_mb": received_mb, "growth_mb": own_memory_mb("VmHWM") - before_mb}
            return Measured(seconds, workload.fingerprint(weights), extra)

        return repeat

    async def reduced(self, client_ids: list[str]) -> Weights:
        """Summed on the workers."""
        return dict((await self.proxy.clients(client_ids).reduce("train", tfr.WeightedMean())).value)

    async def gathered_average(self, client_ids: list[str]) -> Weights:
        """Gathered, then averaged in the driver."""
        results = await self.proxy.clients(client_ids).call("train")
        return workload.weighted_average((one["model_weights"], one["num_samples"]) for one in results.values())

    async def fedavg_round(self, kind: str, weights: Weights, round_num: int) -> Weights:
        """A round of FedAvg."""
        cohort = self.proxy.clients([self.client_ids[client] for client in workload.selected(round_num)])
        reduced = await cohort.reduce("train_epoch", tfr.WeightedMean(), kind=kind, weights=weights)
        return dict(reduced.value)

    async def sleeping_round(self, kind: str, round_num: int) -> int:
        """A round of clients that sleep."""
        cohort = self.proxy.clients([self.client_ids[client] for client in workload.sleepers(kind, round_num)])
        return int((await cohort.reduce("sleep", tfr.Sum, kind=kind)).value)


def return_free_memory() -> None:
    """Return free memory to the system, so that the next growth shows."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def own_memory_mb(key: str) -> float:
    """The memory of this process, ``VmRSS`` now or ``VmHWM`` at most, in units of 10**6 bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1.024e-3 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


@asynccontextmanager
async def prepare(workloads: tuple[str, ...]) -> AsyncIterator[Mapping[str, Repeat]]:
    """All workloads on one proxy, in this process, with one worker or two."""
    torch.set_num_threads(1)
    learner: type = BenchLearner
    runtime: dict[str, Any] = {"execution_mode": "pseudo", "num_clients": 1, "num_processes": 1}
    is_sticky = any(name.endswith("_sticky") for name in workloads)
    if any(name.startswith(workload.KINDS) for name in workloads):
        learner = StickyFedAvgLearner if is_sticky else FedAvgLearner
        runtime["num_clients"] = workload.NUM_CLIENTS
        runtime |= {"num_processes": 2} if any("_two" in name for name in workloads) else {}
        runtime["execution_mode"] = "pseudo" if runtime["num_processes"] == 2 else "local"
    elif any("_eight" in name for name in workloads):
        learner = StickySleeper if is_sticky else Sleeper
        runtime |= {"num_clients": workload.NUM_SLEEPERS, "num_processes": workload.NUM_SLEEPING_WORKERS}
    elif "gathered" in workloads:
        runtime |= {"num_clients": workload.NUM_GATHERED_LEARNERS, "num_processes": 2}
    elif any(name.startswith(("fan_", "reduce_", "gather_")) for name in workloads):
        runtime |= {"num_clients": NUM_MODEL_LEARNERS, "num_processes": 2}
    async with tfr.LearnerProxy(learner, runtime=runtime) as proxy:
        await proxy.clients().call("no_op")
        known = Calls(proxy).repeats()
        yield {name: known[name]() for name in workloads if name in known}


if __name__ == "__main__":
    serve(prepare, "torchfedrpc", "torch")
