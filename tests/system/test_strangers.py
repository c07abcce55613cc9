"""Strangers at the ports of an open proxy: nothing runs for them, they are answered at once, and the run goes on."""

from __future__ import annotations

import asyncio
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LAUNCHED
from internals import FirstWorker
from raw_peer import NUM_EMPTY, Outcome, attack
from torchrun import run_launch, write_script
from workers import listening, make_token

import torchfedrpc as tfr
from torchfedrpc.experiments.learners.classification import ClassificationLearner

pytestmark = pytest.mark.skipif(LAUNCHED, reason="starts launches of its own")

CLIENT = {
    "dataset": {"_target_": "torchfedrpc.experiments.data.synthetic.synthetic", "num_samples": 20},
    "model": {"_target_": "torchfedrpc.experiments.models.LogisticRegression"},
    "indices": np.arange(4),
}
MEDIAN_S = 0.1  # none takes longer than 3 s, which the peer sees to


async def attacked(runtime: dict[str, Any], canary: Path) -> dict[str, Outcome]:
    """Open a proxy, let a stranger attack its processes, and see that an honest call is answered as before."""
    learner = ClassificationLearner
    async with tfr.LearnerProxy(learner, {"a": CLIENT, "b": CLIENT}, runtime=runtime) as proxy:
        weights = await proxy.clients().call("get_model_weights")
        worker = FirstWorker(proxy)
        outcomes = await asyncio.to_thread(attack, worker.addresses, worker.secrets, canary)
        worker.skip(sum("forged, recipe" in name or "forged, malformed" in name for name in outcomes))
        async with asyncio.timeout(10):
            again = await proxy.clients().call("get_model_weights")
        assert all(map(torch.equal, again["a"].values(), weights["a"].values()))
        assert worker.is_there()
        return outcomes


def check(outcomes: dict[str, Outcome], canary: Path) -> None:
    """Nothing ran, and each request was refused in time and as it has to be."""
    assert not canary.exists()
    assert statistics.median(seconds for _, seconds in outcomes.values()) < MEDIAN_S
    assert len(outcomes) > NUM_EMPTY
    for name, (became, _) in outcomes.items():
        _, _, kind = name.partition(": ")
        if kind.startswith(("serve", "acknowledge", "rref", "empty")):
            assert became == "nothing", (name, became)
        elif kind == "forged, recipe by a resolver":  # it is text to us
            assert "answered failed ('TypeError'" in became, (name, became)
        elif kind.startswith("forged, recipe"):
            assert "answered failed ('torchfedrpc.errors.ConfigError'" in became, (name, became)
        elif kind.startswith("forged, malformed"):
            assert "answered failed ('torchfedrpc.errors.SerializationError'" in became, (name, became)
        elif kind.startswith("forged"):
            assert "SerializationError" in became, (name, became)
        elif not kind.endswith("by reference"):
            assert "UnpicklingError" in became, (name, became)
            assert "refused " in became, (name, became)


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


async def test_a_stranger_runs_nothing_in_pseudo_mode(canary: Path) -> None:
    check(await attacked({"execution_mode": "pseudo", "num_processes": 1}, canary), canary)


async def test_a_stranger_runs_nothing_in_a_worker_that_listens(canary: Path, tmp_path: Path) -> None:
    token = make_token(tmp_path)
    with listening(token) as (_, address):
        endpoints = {"a": address, "b": address}
        check(await attacked({"client_endpoints": endpoints, "token_file": token}, canary), canary)


def test_a_stranger_runs_nothing_in_a_launch(canary: Path, tmp_path: Path) -> None:
    script = write_script(
        tmp_path,
        f"""
        from pathlib import Path
        from test_strangers import attacked

        async def main():
            print("outcomes", json.dumps(await attacked({{}}, Path({str(canary)!r}))), flush=True)

        if __name__ == "__main__":
            tfr.run(main)
        """,
    )
    code, output = run_launch(script, num_processes=2)
    assert code == 0, output
    line = next(line for line in output.splitlines() if line.startswith("outcomes "))
    check(json.loads(line.removeprefix("outcomes ")), canary)
