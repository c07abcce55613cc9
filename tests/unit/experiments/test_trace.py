"""The trace of a run: Chrome's format, whatever happens in it and however it ends."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import trace_format
from made_run import FakeRun, TracedRun, make_run

import torchfedrpc as tfr
from torchfedrpc.events import CallEnded, CallTimes, RoundEnded, RoundStarted, RunEnded, WorkerLost
from torchfedrpc.experiments.trace import Trace, read_events, read_lines
from torchfedrpc.federation.callbacks import Run


@pytest.fixture
def traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TracedRun]:
    traced = TracedRun(tmp_path / "trace.json", monkeypatch)
    yield traced
    traced.kill()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trace.json"


def _call(call_id: int, worker: str = "worker1", *, times: CallTimes | None, **fields: Any) -> CallEnded:
    seconds = sum(vars(times).values()) if times is not None else 1.0
    given = {"client_id": "client_1", "method": "train_epoch", "seconds": seconds, "error": None, **fields}
    return CallEnded(call_id=call_id, worker=worker, times=times, **given)


def _slices(path: Path) -> list[dict[str, Any]]:
    return [event for event in trace_format.load(path) if event["ph"] == "X"]


def test_a_call_has_its_stages_one_after_another_on_its_workers_tracks(traced: TracedRun, path: Path) -> None:
    traced.at(10.0, _call(7, times=CallTimes(0.5, 0.1, 2.0, 0.2)))
    traced.end()
    events = trace_format.load(path)
    trace_format.check(events)
    end = 1_700_000_010_000_000
    (running,) = _slices(path)
    assert (running["ts"], running["dur"]) == (end - 2_200_000, 2_000_000)
    assert running["name"] == "train_epoch"
    assert running["args"]["client"] == "client_1"
    begins = {event["name"]: event["ts"] for event in events if event["ph"] == "b"}
    assert begins == {"queue": end - 2_800_000, "transfer": end - 2_300_000, "return": end - 200_000}
    assert trace_format.process_names(events)[running["pid"]] == "worker1"


def test_calls_that_run_at_once_have_tracks_beside_each_other(traced: TracedRun, path: Path) -> None:
    for number in range(3):
        traced.at(10.0 + number, _call(number, times=CallTimes(0, 0, 2.5, 0)))
    traced.at(20.0, _call(3, times=CallTimes(0, 0, 1.0, 0)))
    traced.end()
    trace_format.check(trace_format.load(path))
    assert [event["tid"] for event in _slices(path)] == [1, 2, 3, 1]


def test_clocks_that_differ_by_some_microseconds_make_no_track(traced: TracedRun, path: Path) -> None:
    traced.at(10.0, _call(1, times=CallTimes(0, 0, 1.0, 0)))
    traced.at(10.9995, _call(2, times=CallTimes(0, 0, 1.0, 0)))
    traced.end()
    trace_format.check(trace_format.load(path))
    assert [event["tid"] for event in _slices(path)] == [1, 1]


def test_a_call_that_no_worker_ran_waits_on_the_drivers_track(traced: TracedRun, path: Path) -> None:
    traced.at(10.0, _call(1, worker="", times=CallTimes(2.0, 0, 0, 0), error=TimeoutError()))
    traced.end()
    events = trace_format.load(path)
    trace_format.check(events)
    (waiting,) = [event for event in events if event["ph"] == "b"]
    assert trace_format.process_names(events)[waiting["pid"]] == "driver"
    assert not _slices(path)


def test_a_call_with_unknown_stages_is_one_slice(traced: TracedRun, path: Path) -> None:
    traced.at(10.0, _call(1, times=None, error=ValueError("bad")))
    traced.end()
    trace_format.check(trace_format.load(path))
    (running,) = _slices(path)
    assert (running["dur"], running["args"]["error"]) == (1_000_000, "ValueError")


def test_the_end_of_a_round_sums_its_calls_also_those_that_are_left_out(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = TracedRun(path, monkeypatch, max_calls=2)
    for round_num in range(2):
        traced.at(10.0 * round_num, RoundStarted(round_num, 2))
        for number in range(3):
            traced.at(10.0 * round_num + number, _call(number, times=CallTimes(1.0, 2.0, 0.25, 0.5)))
        traced.at(10.0 * round_num + 9, RoundEnded(round_num, 2, {"loss": float("nan")}))
    traced.end()
    assert len(_slices(path)) == 2
    ends = [event["args"] for event in trace_format.load(path) if event["ph"] == "E"]
    assert [end["round"] for end in ends] == [0, 1]
    for end in ends:
        assert end["calls"] == 3
        assert end["metrics"] == {"loss": None}
        assert end["stages"] == {"queue": 3.0, "transfer": 6.0, "run": 0.75, "return": 1.5}
        assert end["busy_s"] == {"worker1": 0.75}


def test_a_loss_is_an_instant_of_its_worker(traced: TracedRun, path: Path) -> None:
    traced.at(1.0, WorkerLost("worker2", "gone"))
    traced.at(2.0, RunEnded(RuntimeError("x" * 5000)))
    traced.end()
    events = trace_format.load(path)
    trace_format.check(events)
    lost, ended = (event for event in events if event["ph"] == "i")
    assert trace_format.process_names(events)[lost["pid"]] == "worker2"
    assert lost["args"] == {"worker": "worker2", "reason": "gone"}
    assert len(ended["args"]["error"]) < 1100


@pytest.mark.parametrize("client_id", ['"quoted"', "</script>", "🤖", "\ud800", "line\nbreak", "\u2028"])
def test_any_client_id_is_json_on_one_line(traced: TracedRun, path: Path, client_id: str) -> None:
    traced.at(1.0, _call(1, times=CallTimes(0.1, 0.1, 0.1, 0.1), client_id=client_id))
    traced.end()
    trace_format.check(trace_format.load(path))
    assert _slices(path)[0]["args"]["client"] == client_id
    assert list(read_events(path)) == [event for event in trace_format.load(path) if event["ph"] not in "be"]


def test_a_trace_that_a_kill_cuts_off_anywhere_has_all_events_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path / "run", monkeypatch, num_rounds=2, num_clients=3, ended=False)
    content = (folder / "trace.json").read_bytes()
    trace_format.check(trace_format.load(folder / "trace.json"))
    whole = list(read_lines(folder / "trace.json"))
    cut = tmp_path / "cut.json"
    for size in range(0, len(content), 31):
        cut.write_bytes(content[:size])
        lines = list(read_lines(cut))
        assert lines == whole[: len(lines)]
        assert len(lines) >= content[:size].count(b",\n")


def test_rounds_are_in_the_file_when_they_have_ended(traced: TracedRun, path: Path) -> None:
    traced.at(1.0, RoundStarted(0, 2))
    traced.at(2.0, RoundEnded(0, 2, {}))
    trace_format.check(trace_format.load(path))
    assert [event["ph"] for event in trace_format.load(path)][-2:] == ["B", "E"]


def test_memory_does_not_grow_with_the_calls(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = TracedRun(path, monkeypatch, max_calls=None)
    times = CallTimes(0.1, 0.1, 0.1, 0.1)
    peaks = []
    for many in (500, 4000):
        tracemalloc.start()
        for number in range(many):
            traced.at(float(number), _call(number, times=times))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    traced.end()
    assert peaks[1] < 1.5 * peaks[0]
    assert len(_slices(path)) == 4500


def test_a_resumed_run_continues_the_trace_with_the_same_tracks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = TracedRun(tmp_path / "trace.json", monkeypatch)
    first.at(0.5, RoundStarted(0, 2))
    first.at(1.0, _call(1, times=CallTimes(0.1, 0.1, 0.1, 0.1)))
    state = first.trace.state_dict()
    first.at(2.0, RoundEnded(0, 2, {}))
    first.at(2.0, RoundStarted(1, 2))
    for number in range(300):  # more than is kept in memory
        first.at(3.0, _call(number, worker="", times=CallTimes(0.1, 0, 0, 0)))
    first.kill()
    for number, path in enumerate((tmp_path / "trace.json", tmp_path / "other" / "trace.json"), start=1):
        path.parent.mkdir(exist_ok=True)
        second = TracedRun(path, monkeypatch, resumes=state)
        second.at(10.0 * number, RoundStarted(1, 2))
        second.at(10.0 * number + 1, _call(1, times=CallTimes(0.1, 0.1, 0.1, 0.1)))
        second.at(10.0 * number + 2, RoundEnded(1, 2, {}))
        second.end()
        events = trace_format.load(path)
        trace_format.check(events)
        assert list(trace_format.process_names(events).values()) == ["driver", "worker1"]
        assert len(_slices(path)) == 1 + number


def test_a_resumed_run_counts_the_calls_that_the_trace_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, times = tmp_path / "trace.json", CallTimes(0.1, 0.1, 0.1, 0.1)
    first = TracedRun(path, monkeypatch, max_calls=3)
    first.at(1.0, _call(1, times=times))
    first.at(2.0, _call(2, times=times))
    first.end()
    second = TracedRun(path, monkeypatch, max_calls=3, resumes=first.trace.state_dict())
    for number in range(3):
        second.at(10.0 + number, _call(number, times=times))
    second.end()
    assert len(_slices(path)) == 3


def test_a_run_from_the_start_replaces_the_trace(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text("[\n{}")
    TracedRun(path, monkeypatch).end()
    trace_format.check(trace_format.load(path))


@pytest.mark.parametrize("max_calls", [-1, 1.5, True, "10"])
def test_a_wrong_number_of_calls_is_refused(max_calls: Any) -> None:
    with pytest.raises(tfr.ConfigError, match=r"trace_calls.*at least 0"):
        Trace(max_calls=max_calls)


def test_a_trace_without_a_folder_is_refused() -> None:
    run = FakeRun(1)
    run.output_dir = None
    with pytest.raises(tfr.ConfigError, match="give it a path"):
        Trace().on_run_start(cast(Run, run))


def test_a_trace_is_json_at_its_end(traced: TracedRun, path: Path) -> None:
    traced.end()
    assert isinstance(json.loads(path.read_text()), list)
