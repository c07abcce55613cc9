"""The report of a run: what it says of whatever the output folder has, and how large it becomes."""

from __future__ import annotations

import json
import socket
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import needs
from made_run import make_run

import torchfedrpc as tfr
from torchfedrpc.experiments.commands import report
from torchfedrpc.experiments.job import Job
from torchfedrpc.experiments.report import charts
from torchfedrpc.experiments.report.data import RunData, sample
from torchfedrpc.experiments.report.page import make_page, write_report
from torchfedrpc.experiments.report.sections import Figure, Section, sections


def _sections(folder: Path) -> dict[str, Section]:
    return {section.name: section for section in sections(RunData.read(folder))}


def _figures(folder: Path) -> dict[str, Figure]:
    return {figure.name: figure for section in _sections(folder).values() for figure in section.figures}


def _page(folder: Path) -> str:
    return make_page(RunData.read(folder), None)


class _Strict(HTMLParser):
    """Fails where a tag is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "img", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_usual_run_has_a_figure_for_each_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = _figures(make_run(tmp_path, monkeypatch))
    assert [figure.caption for figure in figures.values()] == [
        "Accuracy by round",
        "Loss by round",
        "Accuracy by client",
        "Samples by client and class",
        "Share of each round in which a worker ran calls",
        "Calls of a round, by worker",
        "Events of workers",
        "Seconds of calls by stage and round",
        "Seconds of rounds",
        "Megabytes by round",
        "Seconds of calls by stage",
        "Workers",
        "Settings of the run",
    ]
    assert [column.title for column in figures["metric-0"].columns] == [
        "round",
        "test accuracy",
        "test accuracy, centralised",
    ]
    assert [row[2] for row in figures["events"].rows] == [
        "worker lost",
        "world formed",
        "worker joined",
        "replay ended",
    ]
    assert {row[1] for row in figures["events"].rows} == {8}
    assert len(figures["calls"].rows) == 200
    page = _page(tmp_path)
    for text in ("Finished", "0.866", "centralised 0.975", "runtime.num_processes"):
        assert text in page


def test_what_gives_access_is_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path, monkeypatch)
    with (tmp_path / "config.yaml").open("a") as file:
        file.write("\nlogger: {mlflow: {tracking_uri: 'https://me:hunter2@host/x', api_key: abc123}}\n")
    page = _page(tmp_path)
    assert "https://...@host/x" in page
    assert "hunter2" not in page
    assert "abc123" not in page


def test_a_report_says_which_run_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path, monkeypatch)
    with Job(tmp_path).recorded():
        pass
    (tmp_path / ".hydra").mkdir()
    overrides = ["seed=2", "+logger.x.password=hunter2", "hydra.run.dir=here"]
    (tmp_path / ".hydra" / "overrides.yaml").write_text("".join(f"- {one}\n" for one in overrides))
    page = _page(tmp_path)
    assert page.count("seed=2 +logger.x.password=(hidden)") == 2
    assert f"Begun on {socket.gethostname()} at 20" in page
    assert f"torch {torch.__version__}" in page
    assert "hunter2" not in page
    assert "hydra.run.dir" not in page


def test_a_page_closes_its_tags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = _Strict()
    parser.feed(_page(make_run(tmp_path, monkeypatch, client_ids=["</td>", "<b>", "&amp;"])))
    assert parser.open == ["html"]


@pytest.mark.parametrize(
    "missing", ["config.yaml", "history.jsonl", "baseline.jsonl", "clients.jsonl", "trace.json", "*"]
)
def test_a_report_is_made_of_the_files_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    make_run(tmp_path, monkeypatch)
    for path in tmp_path.glob(missing):
        path.unlink()
    assert len(_sections(tmp_path)) == 7
    assert "<h1>" in _page(tmp_path)


def test_a_run_that_was_cut_off_says_so_and_shows_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path, monkeypatch, num_rounds=4, ended=False)
    for name in ("history.jsonl", "trace.json"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) - 40])
    page = _page(tmp_path)
    assert "Not finished" in page
    assert "rounds so far: 3" in page
    assert len(_figures(tmp_path)["metric-0"].rows) == 3


@pytest.mark.parametrize(
    ("error", "word"),
    [
        ("CancelledError: ", "Interrupted"),
        ("SystemExit: 143", "Interrupted"),
        ("WorkerLostError: <gone>", "Failed"),
        (None, "Finished"),
    ],
)
def test_the_end_of_a_run_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str | None, word: str
) -> None:
    trace = make_run(tmp_path, monkeypatch) / "trace.json"
    ended = '"name":"run ended","cat":"run","pid":1,"tid":0'
    assert ended in trace.read_text()
    trace.write_text(trace.read_text().replace('"args":{"error":null', f'"args":{{"error":{json.dumps(error)}'))
    page = _page(tmp_path)
    assert f"<strong>{word}</strong>" in page
    assert "<gone>" not in page


def test_other_metrics_than_those_of_the_bundled_trainers_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = {"perplexity": 12.5, "valid_f1": 0.5, "train_f1": 0.6, "bleu": float("nan")}
    figures = _figures(make_run(tmp_path, monkeypatch, metrics=metrics))
    drawn = {
        figure.caption: [*(figure.series or {}).values()] for name, figure in figures.items() if "metric" in name
    }
    assert drawn == {"Perplexity by round": ["perplexity"], "F1 by round": ["valid f1", "train f1"]}
    assert "12.500" in _page(tmp_path)


def test_metrics_of_clients_have_charts_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["test_accuracy", "client_accuracy", "client_accuracy_spread", "client_loss_worst_decile"]
    figures = _figures(make_run(tmp_path, monkeypatch, metrics=dict.fromkeys(names, 0.5)))
    drawn = {
        figure.caption: [*(figure.series or {}).values()] for name, figure in figures.items() if "metric" in name
    }
    assert drawn["Client accuracy by round"] == ["client accuracy", "client accuracy spread"]
    assert drawn["Client loss by round"] == ["client loss worst decile"]
    assert drawn["Accuracy by round"] == ["test accuracy"]


def test_lines_join_the_points_of_a_metric_that_not_each_round_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = _figures(make_run(tmp_path, monkeypatch, metrics={"client_accuracy": 0.5}))
    spec = next(figure.spec for figure in figures.values() if figure.caption == "Client accuracy by round")
    assert spec is not None
    assert spec["transform"] == [{"filter": "isValid(datum.value)"}]


def test_missing_and_diverged_values_are_dashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path, monkeypatch, num_rounds=3)
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    lines[1]["test_loss"] = None
    lines[2]["test_loss"] = float("nan")
    del lines[2]["train_loss"]
    (tmp_path / "history.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [row[1:] for row in _figures(tmp_path)["metric-1"].rows][1:] == [
        [None, lines[1]["train_loss"]],
        [None, None],
    ]
    assert "nan" not in _page(tmp_path).lower()


def test_a_resumed_run_is_shown_whole_with_its_repeated_round_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = make_run(tmp_path, monkeypatch, num_rounds=3, lost_in=None, ended=False) / "trace.json"
    lines = trace.read_text().rstrip().removeprefix("[\n").split(",\n")
    again = next(number for number, line in enumerate(lines) if '"name":"round 3"' in line)
    started = next(line for line in lines if '"run started"' in line)
    trace.write_text("[\n" + ",\n".join([*lines, started, *lines[again:]]))
    figures = _figures(tmp_path)
    assert [row[0] for row in figures["stages"].rows] == [1, 2, 3]
    assert "resumed 1 time" in _sections(tmp_path)["recovery"].text


def test_of_a_long_run_some_rounds_and_those_with_a_loss_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path, monkeypatch, num_rounds=300, num_clients=40, lost_in=133)
    figures = _figures(tmp_path)
    shown = sorted({row[0] for row in figures["calls"].rows})
    assert {1, 134} <= set(shown)
    assert len(figures["calls"].rows) <= 1500
    assert len(figures["busy"].rows) == 60
    assert len(figures["metric-0"].rows) == 300


def test_many_clients_and_classes_are_sampled_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path, monkeypatch, num_rounds=1, num_clients=3000, num_classes=100)
    found = _sections(tmp_path)
    assert "500 of 3000 clients are shown" in found["clients"].text
    assert "200 of 3000 clients are shown" in found["partition"].text
    rows = found["clients"].figures[0].rows
    assert [row[2] for row in rows] == sorted(row[2] for row in rows)


@pytest.mark.parametrize(("num_items", "most"), [(0, 5), (1, 5), (5, 5), (6, 5), (1000, 2)])
def test_a_sample_has_the_first_and_the_last_item(num_items: int, most: int) -> None:
    items = range(num_items)
    found = sample(items, most)
    assert len(found) == min(num_items, most)
    assert found == sorted(set(found))
    assert set(found) >= {*items[:1], *items[-1:]}


def test_a_report_of_200_rounds_and_100_clients_is_below_2_mb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("vl_convert")
    make_run(tmp_path, monkeypatch, num_rounds=200, num_clients=100, num_workers=16)
    size = write_report(tmp_path).stat().st_size
    assert 1_000_000 < size < 2_000_000


def test_the_bundle_is_made_once_and_kept_in_a_private_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("vl_convert")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = charts.bundle()
    assert made is not None
    assert "vegaEmbed" in made
    assert "</script" not in made.lower()
    (kept,) = (tmp_path / "torchfedrpc").iterdir()
    assert kept.parent.stat().st_mode & 0o077 == 0
    kept.write_text("kept")
    assert charts.bundle() == "kept"


def test_a_cache_of_others_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("vl_convert")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert charts.bundle()
    (kept,) = (tmp_path / "torchfedrpc").iterdir()
    kept.write_text("changed")
    kept.parent.chmod(0o777)
    assert charts.bundle() != "changed"


def test_without_its_package_a_report_has_tables_and_says_what_brings_charts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    page = write_report(make_run(tmp_path, monkeypatch)).read_text(encoding="utf-8")
    assert "pip install" in page
    assert "<script" not in page
    assert page.count("<table>") == 13


class TestCommand:
    """``torchfedrpc report``."""

    def test_it_writes_into_the_folder_or_elsewhere(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "vl_convert", None)
        make_run(tmp_path / "run", monkeypatch)
        for arguments, path in (([], tmp_path / "run" / "report.html"), (["--output", "x.html"], Path("x.html"))):
            monkeypatch.chdir(tmp_path)
            assert report.main([str(tmp_path / "run"), *arguments]) == 0
            assert path.exists()
            assert capsys.readouterr().out.splitlines()[-1] == str(path)

    @pytest.mark.parametrize("name", ["missing", "empty"])
    def test_a_folder_without_a_run_is_refused(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(tfr.ConfigError, match=r"no output folder of a run.*history.jsonl"):
            report.main([str(tmp_path / name)])


def test_unreadable_lines_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path, monkeypatch, num_rounds=3)
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('[1]\n{"round": 3, "test_')
    data: Any = RunData.read(tmp_path)
    assert len(data.history) == 3
