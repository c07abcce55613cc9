"""Traces of runs: of one whose worker is killed, and of one that resumes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import trace_format
from internals import subscribers_of
from learners import Mortal
from losses import Losses, kill, pseudo

import torchfedrpc as tfr
from torchfedrpc.experiments.trace import Trace

NUM_CLIENTS = 4
NUM_ROUNDS = 4


class StepTrainer(tfr.AbstractFederationTrainer):
    """Lets all clients step in each round; kills a worker in round ``kill_at``, and raises in round ``crash_at``."""

    async def train(self) -> None:
        async for round_num in self.rounds():
            if round_num == getattr(self.config, "crash_at", None):
                raise RuntimeError("the driver fails here")
            if round_num == getattr(self.config, "kill_at", None):
                losses = Losses()
                self.learner_proxy.subscribe(losses)
                kill(self.learner_proxy, "worker1")
                await losses.loss()
            await self.learner_proxy.clients().call("step")
            self.learner_proxy.publish(tfr.RoundEnded(round_num, NUM_ROUNDS, {"accuracy": 0.5}))


async def _run(path: Path, checkpoints: tfr.Checkpoints | None = None, **config: Any) -> list[dict[str, Any]]:
    clients = [f"client_{number}" for number in range(NUM_CLIENTS)]
    async with tfr.LearnerProxy(Mortal, clients, runtime=pseudo()) as proxy:
        trainer = StepTrainer({"num_rounds": NUM_ROUNDS, **config}, proxy)
        trainer.checkpoints = checkpoints
        trainer.callbacks = [Trace(path)]
        await trainer.train()
    return trace_format.load(path)


def _calls(events: list[dict[str, Any]], process: int | None = None) -> Counter[str]:
    return Counter(
        event["args"]["client"] for event in events if event["ph"] == "X" and process in (None, event["pid"])
    )


def _rounds(events: list[dict[str, Any]]) -> list[str]:
    return [event["name"] for event in events if event["ph"] == "B"]


async def test_a_run_with_a_killed_worker_has_a_valid_trace_with_all_calls_and_the_loss(tmp_path: Path) -> None:
    events = await _run(tmp_path / "trace.json", kill_at=2)
    trace_format.check(events)
    processes = {name: process for process, name in trace_format.process_names(events).items()}
    assert set(processes) == {"driver", "worker1", "worker2"}
    assert _rounds(events) == ["round 1", "round 2", "round 3", "round 4"]
    assert _calls(events) == {f"client_{number}": NUM_ROUNDS for number in range(NUM_CLIENTS)}
    assert all(_calls(events, processes[worker]) for worker in ("worker1", "worker2"))
    instants = [(event["name"], event["pid"]) for event in events if event["ph"] == "i"]
    assert ("worker lost", processes["worker1"]) in instants
    assert ("world formed", processes["driver"]) in instants
    assert instants[-1] == ("run ended", processes["driver"])
    begins = [event["ts"] for event in events if event["ph"] == "B"]
    ends = [event["ts"] for event in events if event["ph"] == "E"]
    for event in events:
        if event["ph"] == "X":
            middle = event["ts"] + event["dur"] / 2
            assert any(begin <= middle <= end for begin, end in zip(begins, ends, strict=True))


async def test_a_run_that_resumes_continues_the_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"

    async def attempt(**config: Any) -> list[dict[str, Any]]:
        # The configuration that must be equal is empty, since the two attempts differ in crash_at.
        with tfr.Checkpoints(tmp_path / "checkpoints", resume="auto", config={}) as checkpoints:
            return await _run(path, checkpoints, **config)

    try:
        await attempt(crash_at=2)
    except RuntimeError:
        pass
    events = await attempt()
    trace_format.check(events)
    assert _rounds(events) == ["round 1", "round 2", "round 3", "round 3", "round 4"]
    assert [event["name"] for event in events if event["ph"] == "i" and event["name"].startswith("run")] == [
        "run started",
        "run ended",
        "run started",
        "run ended",
    ]
    assert _calls(events) == {f"client_{number}": NUM_ROUNDS for number in range(NUM_CLIENTS)}


async def test_a_run_without_a_trace_has_no_subscriber() -> None:
    async with tfr.LearnerProxy(Mortal, ["client_1"], runtime="local") as proxy:
        trainer = StepTrainer({"num_rounds": 1}, proxy)
        async for _ in trainer.rounds():
            assert not subscribers_of(proxy)
