"""The history of a run: its lines, and what they count."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

import torchfedrpc as tfr
from torchfedrpc.events import RoundEnded
from torchfedrpc.experiments import history as history_module
from torchfedrpc.experiments.history import History
from torchfedrpc.proxy import LearnerProxy

METRICS = {"test_accuracy": 0.5, "test_loss": 1.5, "train_loss": 2.0, "num_clients": 3.0}
KEYS = [
    "round",
    "test_accuracy",
    "test_loss",
    "train_loss",
    "num_clients",
    "seconds",
    "bytes_sent",
    "bytes_received",
]


class FakeRun:
    """A clock and traffic that a test sets by hand."""

    def __init__(self) -> None:
        self.time_s = 100.0
        self.num_bytes = 1000

    def subscribe(self, callback: Callable[[tfr.Event], None]) -> Callable[[], None]:
        self.callback = callback
        return lambda: None

    def stats(self) -> dict[str, int]:
        return {"bytes_sent": self.num_bytes, "bytes_received": 2 * self.num_bytes}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    fake = FakeRun()
    monkeypatch.setattr(history_module, "time", SimpleNamespace(perf_counter=lambda: fake.time_s))
    return fake


def _history(path: Path, run: FakeRun) -> History:
    history = History(path)
    history.on_run_start(_of(run))
    return history


def _of(run: FakeRun, first_round: int = 0) -> tfr.Run:
    return tfr.Run({}, cast(LearnerProxy, run), None, first_round=first_round)


def _lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_round_is_a_line_with_these_keys_in_this_order(tmp_path: Path, run: FakeRun) -> None:
    history = _history(tmp_path / "history.jsonl", run)
    history.on_round_end(_of(run), RoundEnded(0, 2, METRICS))
    history.on_round_end(_of(run), RoundEnded(1, 2, METRICS))
    lines = _lines(tmp_path / "history.jsonl")
    assert [list(line) for line in lines] == [KEYS, KEYS]
    assert [line["round"] for line in lines] == [0, 1]
    assert lines[0]["test_accuracy"] == 0.5
    assert lines[0]["num_clients"] == 3


def test_a_line_is_in_the_file_as_soon_as_the_round_has_ended(tmp_path: Path, run: FakeRun) -> None:
    history = _history(tmp_path / "history.jsonl", run)
    assert _lines(tmp_path / "history.jsonl") == []
    history.on_round_end(_of(run), RoundEnded(0, 2, METRICS))
    assert len(_lines(tmp_path / "history.jsonl")) == 1


def test_time_and_traffic_are_those_of_the_round(tmp_path: Path, run: FakeRun) -> None:
    history = _history(tmp_path / "history.jsonl", run)
    for seconds, num_bytes in ((2.0, 10), (3.0, 30)):
        run.time_s += seconds
        run.num_bytes += num_bytes
        history.on_round_end(_of(run), RoundEnded(0, 2, METRICS))
    assert [record.seconds for record in history.records] == [2.0, 3.0]
    assert [record.bytes_sent for record in history.records] == [10, 30]
    assert [record.bytes_received for record in history.records] == [20, 60]


def test_measure_that_is_missing_is_null(tmp_path: Path, run: FakeRun) -> None:
    _history(tmp_path / "history.jsonl", run).on_round_end(_of(run), RoundEnded(0, 1, {}))
    (line,) = _lines(tmp_path / "history.jsonl")
    assert list(line) == KEYS
    assert line["test_accuracy"] is line["num_clients"] is None


def test_a_diverged_loss_is_null_so_that_the_line_stays_json(tmp_path: Path, run: FakeRun) -> None:
    ended = RoundEnded(0, 1, {**METRICS, "train_loss": float("nan")})
    _history(tmp_path / "history.jsonl", run).on_round_end(_of(run), ended)
    assert _lines(tmp_path / "history.jsonl")[0]["train_loss"] is None


def test_an_older_history_is_replaced(tmp_path: Path, run: FakeRun) -> None:
    (tmp_path / "history.jsonl").write_text("{}\n")
    _history(tmp_path / "history.jsonl", run)
    assert (tmp_path / "history.jsonl").read_text() == ""


def test_a_run_that_resumes_keeps_the_file_until_its_state_is_restored(tmp_path: Path, run: FakeRun) -> None:
    first = _history(tmp_path / "history.jsonl", run)
    for round_num in range(3):
        first.on_round_end(_of(run), RoundEnded(round_num, 5, METRICS))
        if round_num == 1:
            state = json.loads(json.dumps(first.state_dict()))
    second = History(tmp_path / "history.jsonl")
    assert len(_lines(tmp_path / "history.jsonl")) == 3
    second.load_state_dict(state)
    second.on_run_start(_of(run, first_round=2))
    assert [line["round"] for line in _lines(tmp_path / "history.jsonl")] == [0, 1]
    second.on_round_end(_of(run), RoundEnded(2, 5, {}))
    assert second.records[:2] == first.records[:2]
    assert [line["round"] for line in _lines(tmp_path / "history.jsonl")] == [0, 1, 2]


def test_a_metric_may_be_whatever_is_a_number(tmp_path: Path, run: FakeRun) -> None:
    metrics: Any = {"drift": torch.tensor(0.5), "norm": np.float32(2.0)}
    _history(tmp_path / "history.jsonl", run).on_round_end(_of(run), RoundEnded(0, 1, metrics))
    assert list(_lines(tmp_path / "history.jsonl")[0].items())[-2:] == [("drift", 0.5), ("norm", 2.0)]


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"seconds": 1.0}, "history.jsonl has a key 'seconds' of its own: rename"),
        ({"drift": "large"}, "the metric 'drift' of a round must be a number, not 'large'"),
        ({"drift": torch.zeros(2)}, "the metric 'drift' of a round must be a number, not tensor"),
    ],
)
def test_a_metric_that_cannot_be_kept_is_refused(
    metrics: dict[str, Any], words: str, tmp_path: Path, run: FakeRun
) -> None:
    history = _history(tmp_path / "history.jsonl", run)
    with pytest.raises(tfr.ConfigError, match=words):
        history.on_round_end(_of(run), RoundEnded(0, 1, metrics))


def test_the_first_round_begins_with_its_start(tmp_path: Path, run: FakeRun) -> None:
    history = _history(tmp_path / "history.jsonl", run)
    run.time_s += 60.0  # for other callbacks to start
    run.callback(tfr.RoundStarted(0, 2))
    run.time_s += 2.0
    history.on_round_end(_of(run), RoundEnded(0, 2, METRICS))
    assert history.records[0].seconds == 2.0


def test_a_diverged_metric_is_told_once(tmp_path: Path, run: FakeRun, caplog: pytest.LogCaptureFixture) -> None:
    history = _history(tmp_path / "history.jsonl", run)
    for round_num in range(2):
        history.on_round_end(_of(run), RoundEnded(round_num, 2, {**METRICS, "test_loss": float("nan")}))
    assert caplog.messages == ["test_loss is nan after round 1: the training may have diverged"]
