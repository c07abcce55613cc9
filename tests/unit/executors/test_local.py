"""Local mode: a host that has closed has forgotten its batches."""

from __future__ import annotations

import logging

import pytest
from learners import Probe

import torchfedrpc as tfr
from torchfedrpc.config import RuntimeConfig
from torchfedrpc.events import EventBus
from torchfedrpc.executors.base import ExecutorSpec
from torchfedrpc.executors.durations import Durations
from torchfedrpc.executors.local import LocalLearners
from torchfedrpc.host.call import Batch, Call
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.wire.packing import pack


async def test_a_watched_batch_whose_proxy_has_closed_says_so() -> None:
    spec, _ = LearnerSpec.of(Probe, 11, RuntimeConfig())
    learners = LocalLearners(RuntimeConfig(), ExecutorSpec(spec, {"a": {}, "b": {}}, EventBus()), Durations())
    await learners.open()
    calls = {place: Call(1 + place, client, "work", pack(((), {}))) for place, client in enumerate("ab")}
    batch = Batch(-1, pack(tfr.Sum()), 2, tuple(calls.items()), is_watched=True)
    outcome = await learners.run_batch(batch)
    await learners.close("the proxy is closing")
    with pytest.raises(tfr.WorkerLostError, match="the proxy is closed"):
        await learners.advance(batch, len(outcome.of_calls))
    with pytest.raises(tfr.WorkerLostError, match="the proxy is closed"):
        await learners.run_batch(batch)


async def opened() -> LocalLearners:
    spec, _ = LearnerSpec.of(Probe, 11, RuntimeConfig())
    learners = LocalLearners(RuntimeConfig(), ExecutorSpec(spec, {"a": {}}, EventBus()), Durations())
    await learners.open()
    return learners


async def test_warnings_are_shown_without_a_configuration_of_logging(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    learners = await opened()
    logging.getLogger("torchfedrpc.anything").warning("no checkpoint of round 1")
    await learners.close("the proxy is closing")
    assert capsys.readouterr().err == "no checkpoint of round 1\n"


async def test_the_factory_of_records_is_as_before_afterwards() -> None:
    before = logging.getLogRecordFactory()
    learners = await opened()
    assert logging.getLogRecordFactory() != before
    await learners.close("the proxy is closing")
    assert logging.getLogRecordFactory() == before
