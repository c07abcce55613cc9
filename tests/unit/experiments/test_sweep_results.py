"""Results of runs read from their folders: settings that differ, groups, targets, CSV, pictures and ``compare``."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import needs

from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments.commands import compare
from torchfedrpc.experiments.history import Cost
from torchfedrpc.experiments.sweeps.results import differing, find_runs, grouped, mean_and_std, read_run
from torchfedrpc.experiments.sweeps.summary import print_groups, print_runs, write_csv


def _run(
    folder: Path,
    *overrides: str,
    accuracies: Sequence[float | None] = (0.5, 0.75),
    status: str = "done",
    error: str = "",
    **metrics: Sequence[float | None],
) -> Path:
    """An output folder of a run with these overrides of its command line; None where a round lacks a metric."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {one}\n" for one in overrides))
    given = dict(one.lstrip("+").split("=", 1) for one in overrides)
    choices = {"trainer": given.pop("trainer", "fedavg"), "hydra/launcher": "basic"}
    (folder / ".hydra" / "hydra.yaml").write_text(json.dumps({"hydra": {"runtime": {"choices": choices}}}))
    lines = [f"{key}: {value}\n" for key, value in {"seed": "0", "lr": "0.1", **given}.items()]
    (folder / "config.yaml").write_text("".join(lines))
    records = [
        {
            "round": number,
            "test_accuracy": accuracy,
            "test_loss": 1.0,
            "train_loss": 1.0,
            "num_clients": 2,
            "seconds": 2.0,
            "bytes_sent": 1000,
            "bytes_received": 500,
            "a_later_key": 1,
            **{name: values[number] for name, values in metrics.items() if values[number] is not None},
        }
        for number, accuracy in enumerate(accuracies)
    ]
    (folder / "history.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    last = accuracies[-1] if accuracies and status == "done" else None
    (folder / "job.json").write_text(json.dumps({"status": status, "error": error, "accuracy": last}))
    return folder


def test_runs_are_found_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        _run(tmp_path / str(number))
    assert [run.folder.name for run in find_runs(tmp_path)] == ["1", "2", "10"]
    assert [run.folder for run in find_runs(tmp_path / "2")] == [tmp_path / "2"]


def test_a_run_has_its_numbers(tmp_path: Path) -> None:
    run = read_run(_run(tmp_path / "0", "seed=3", accuracies=(0.5, 0.75, 0.625)))
    assert (run.seed, run.status, run.accuracy, run.best(), run.loss) == ("3", "done", 0.625, 0.75, 1.0)
    assert (run.seconds, run.num_bytes) == (6.0, 4500)
    assert run.cost(0.7) == Cost(num_rounds=2, seconds=4.0, simulated_seconds=None, num_bytes=3000)
    assert run.cost(0.8) is None


def test_damaged_files_count_as_empty_and_a_cut_line_as_the_end(tmp_path: Path) -> None:
    folder = _run(tmp_path / "0", "seed=3")
    with (folder / "history.jsonl").open("a") as file:
        file.write('{"round": 2, "test_acc')
    assert len(read_run(folder).records) == 2
    for name in ("job.json", "config.yaml", ".hydra/overrides.yaml", ".hydra/hydra.yaml"):
        (folder / name).write_text("{[")
    run = read_run(folder)
    assert (run.status, run.accuracy, run.seed, len(run.records)) == ("unknown", 0.75, "", 2)


def test_settings_of_the_command_lines_differ_also_from_defaults(tmp_path: Path) -> None:
    _run(tmp_path / "0", "trainer=fedprox", "seed=1", "resume=auto")
    _run(tmp_path / "1", "seed=2")
    _run(tmp_path / "2", "seed=2", "lr=0.2")
    _run(tmp_path / "3", "seed=3", "lr=0.10")
    runs = find_runs(tmp_path)
    assert differing(runs) == ["trainer", "seed", "lr"]
    assert list(grouped(runs)) == ["trainer=fedprox lr=0.1", "trainer=fedavg lr=0.1", "trainer=fedavg lr=0.2"]


def test_runs_that_differ_in_their_seed_alone_are_one_group(tmp_path: Path) -> None:
    for seed in range(3):
        _run(tmp_path / str(seed), f"seed={seed}", f"+dataset.seed={seed}" if seed > 5 else "lr=1")
    assert [len(group) for group in grouped(find_runs(tmp_path)).values()] == [3]


def test_spread_is_the_standard_deviation_of_a_sample() -> None:
    assert mean_and_std([1.0, None, 4.0, 1.0]) == (2.0, 3**0.5)
    assert mean_and_std([1.0]) == (1.0, 0.0)
    assert mean_and_std([None]) is None


def test_tables_show_brackets_long_numbers_and_errors(tmp_path: Path) -> None:
    _run(tmp_path / "0", "lr=0.00012345678912", "names=[a]")
    _run(tmp_path / "1", "lr=2", "names=[b]", status="failed", error="RuntimeError: full", accuracies=())
    runs, stream = find_runs(tmp_path), io.StringIO()
    print_runs(runs, tmp_path, stream)
    print_groups(grouped(runs), stream, target=0.7)
    text = stream.getvalue()
    assert "0.0001235" in text
    assert "[a]" in text
    assert "job 1 failed: RuntimeError: full" in text
    assert "simulated" not in text
    assert "1 of 1" in text
    assert "0 of 0" in text


def test_csv_has_a_column_for_each_setting_and_the_numbers_to_the_target(tmp_path: Path) -> None:
    _run(tmp_path / "0", "seed=1", "lr=1")
    _run(tmp_path / "1", "seed=1", "lr=2", accuracies=(0.1, 0.2))
    write_csv(find_runs(tmp_path), tmp_path / "all.csv", target=0.6)
    with (tmp_path / "all.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["lr"] for row in rows] == ["1", "2"]
    assert [row["rounds_to_target"] for row in rows] == ["2", ""]
    assert [row["seconds_to_target"] for row in rows] == ["4.0", ""]
    assert [row["bytes_to_target"] for row in rows] == ["3000", ""]
    assert rows[0]["overrides"] == "seed=1 lr=1"
    assert "simulated_seconds_to_target" not in rows[0]


def test_simulated_seconds_to_the_target_are_shown_where_a_run_has_them(tmp_path: Path) -> None:
    _run(tmp_path / "0", "lr=1")
    simulated = _run(tmp_path / "1", "lr=2") / "history.jsonl"
    lines = [json.loads(line) for line in simulated.read_text().splitlines()]
    lines = [{**line, "simulated_seconds": 125.5 * (line["round"] + 1)} for line in lines]
    simulated.write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs, stream = find_runs(tmp_path), io.StringIO()
    write_csv(runs, tmp_path / "all.csv", target=0.6)
    with (tmp_path / "all.csv").open(newline="") as file:
        assert [row["simulated_seconds_to_target"] for row in csv.DictReader(file)] == ["", "251.0"]
    print_groups(grouped(runs), stream, target=0.6)
    assert "simulated" in stream.getvalue()
    assert "251.0" in stream.getvalue()


def _rewrite(folder: Path, **values: float) -> None:
    """Give all rounds of a run these values."""
    path = folder / "history.jsonl"
    lines = [{**json.loads(line), **values} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_traffic_has_a_column_where_a_run_has_some(tmp_path: Path) -> None:
    _rewrite(_run(tmp_path / "0", "lr=1"), bytes_sent=0, bytes_received=0)
    _run(tmp_path / "1", "lr=2")
    runs = find_runs(tmp_path)
    for some, has_traffic in ((runs, True), (runs[:1], False)):
        groups, by_run = io.StringIO(), io.StringIO()
        print_groups(grouped(some), groups, target=0.6)
        print_runs(some, tmp_path, by_run)
        assert ("MB to it" in groups.getvalue(), "MB" in by_run.getvalue()) == (has_traffic, has_traffic)
        assert has_traffic or "MB" not in groups.getvalue()


def test_a_cost_tells_traffic_and_updates_where_there_are_some(tmp_path: Path) -> None:
    _run(tmp_path / "0", "lr=1")
    _rewrite(_run(tmp_path / "1", "lr=2"), update_bytes=600_000.0)
    _rewrite(_run(tmp_path / "2", "lr=3"), update_bytes=650.0, bytes_sent=0, bytes_received=0)
    runs = find_runs(tmp_path)
    assert [str(run.cost(0.6)) for run in runs] == [
        "2 rounds, 4.0 s, 3 kB of traffic",
        "2 rounds, 4.0 s, 3 kB of traffic, 1.2 MB of updates",
        "2 rounds, 4.0 s, 1.3 kB of updates",
    ]
    write_csv(runs, tmp_path / "all.csv", target=0.6)
    with (tmp_path / "all.csv").open(newline="") as file:
        assert [row["update_bytes_to_target"] for row in csv.DictReader(file)] == ["", "1200000.0", "1300.0"]


@pytest.mark.parametrize("num_groups", [1, 3, 12, 20])
def test_picture_of_few_and_many_groups(tmp_path: Path, num_groups: int) -> None:
    needs("matplotlib")
    from torchfedrpc.experiments.sweeps.plot import draw_runs

    for group in range(num_groups):
        for seed in range(2):
            _run(tmp_path / f"{group}-{seed}", f"seed={seed}", f"lr={group}", accuracies=(0.1, 0.2 + group / 40))
    draw_runs(grouped(find_runs(tmp_path)), tmp_path / "all.png")
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


def test_picture_leaves_out_runs_that_are_not_done(tmp_path: Path) -> None:
    needs("matplotlib")
    from torchfedrpc.experiments.sweeps.plot import draw_runs

    for seed, (status, accuracies) in enumerate([("done", [0.1, 0.2, 0.3]), ("killed", [0.1])]):
        _run(tmp_path / "both" / str(seed), f"seed={seed}", status=status, accuracies=accuracies)
    _run(tmp_path / "one" / "0", "seed=0", accuracies=[0.1, 0.2, 0.3])
    for name in ("both", "one"):
        draw_runs(grouped(find_runs(tmp_path / name)), tmp_path / f"{name}.png")
    assert (tmp_path / "both.png").read_bytes() == (tmp_path / "one.png").read_bytes()


def test_compare_writes_table_csv_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(2):
        _run(tmp_path / "a" / str(seed), f"seed={seed}", "lr=1", accuracies=(0.5, 0.7))
        _run(tmp_path / "b" / str(seed), f"seed={seed}", "lr=2", accuracies=(0.5, 0.8))
    folders = [str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "b" / "0")]  # one of them twice
    assert compare.main([*folders, "--target", "0.75", "--output", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "4 jobs: 4 done" in text
    assert "lr=2" in text
    assert "0.800 ± 0.000" in text
    assert "2 of 2" in text
    assert "0 of 2" in text
    with (tmp_path / "out" / "compare.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 4


def test_compare_keeps_folders_apart_whose_runs_have_equal_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("old", "new"):
        _run(tmp_path / name, "seed=1")
    assert compare.main([str(tmp_path / "old"), str(tmp_path / "new"), "--output", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert str(tmp_path / "old") in text
    assert str(tmp_path / "new") in text


def test_compare_refuses_folders_without_runs_and_targets_that_are_no_accuracy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no run: name the output folder"):
        compare.main([str(tmp_path)])
    with pytest.raises(ConfigError, match="compare: the target of test_accuracy is above 0, up to 1, not 95"):
        compare.main([str(_run(tmp_path / "0")), "--target", "95"])


def _personal(folder: Path, *overrides: str) -> Path:
    """A run whose clients score their models after rounds 1 and 3, of 4."""
    return _run(
        folder,
        *overrides,
        accuracies=(0.5, 0.5, 0.5, 0.5),
        client_accuracy=(0.25, None, 0.875, None),
        client_accuracy_worst_decile=(0.125, None, 0.625, None),
        client_loss=(0.5, None, 0.25, None),
        staleness=(1.0, 2.0, 1.0, 1.0),
    )


def _compared(folder: Path, *arguments: str) -> list[dict[str, str]]:
    assert compare.main([str(folder), "--output", str(folder), *arguments]) == 0
    with (folder / "compare.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_compare_counts_by_the_metric_that_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _personal(tmp_path / "0", "seed=1")
    (row,) = _compared(tmp_path, "--metric", "client_accuracy", "--target", "0.8")
    assert (row["final_client_accuracy"], row["best_client_accuracy"]) == ("0.875", "0.875")
    assert (row["final_accuracy"], row["rounds_to_target"]) == ("0.5", "3")
    text = capsys.readouterr().out
    assert "final client accuracy" in text
    assert "final worst decile" in text
    assert "final accuracy" not in text
    assert "1 of 1" in text


def test_lower_losses_are_better_in_compare(tmp_path: Path) -> None:
    _personal(tmp_path / "0", "lr=1")
    (row,) = _compared(tmp_path, "--metric=client_loss", "--target=0.25")
    assert (row["best_client_loss"], row["rounds_to_target"]) == ("0.25", "3")


def test_a_metric_whose_name_tells_no_direction_has_no_best_value_and_no_target(tmp_path: Path) -> None:
    _personal(tmp_path / "0", "lr=1")
    (row,) = _compared(tmp_path, "--metric=staleness")
    assert row["final_staleness"] == "1.0"
    assert "best_staleness" not in row
    with pytest.raises(
        ConfigError, match="--target needs a metric of accuracy, loss or spread; the name of staleness"
    ):
        _compared(tmp_path, "--metric=staleness", "--target=1")


def test_a_metric_that_no_run_has_names_the_nearest(tmp_path: Path) -> None:
    _personal(tmp_path / "0", "lr=1")
    with pytest.raises(
        ConfigError, match=r"no run has the metric 'clients_accuracy' \(did you mean 'client_accuracy'"
    ):
        _compared(tmp_path, "--metric=clients_accuracy", "--target=0.5")


def test_tables_and_csv_of_a_sweep_have_the_accuracies_of_clients_where_a_run_has_them(tmp_path: Path) -> None:
    _personal(tmp_path / "0", "lr=1")
    _run(tmp_path / "1", "lr=2")
    runs, stream = find_runs(tmp_path), io.StringIO()
    write_csv(runs, tmp_path / "sweep.csv")
    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["final_client_accuracy"] for row in rows] == ["0.875", ""]
    assert [row["final_client_accuracy_worst_decile"] for row in rows] == ["0.625", ""]
    for tables in (lambda: print_runs(runs, tmp_path, stream), lambda: print_groups(grouped(runs), stream)):
        tables()
        assert "final client accuracy" in stream.getvalue()
        assert "0.625" in stream.getvalue()
        stream.truncate(0)
    write_csv(runs[1:], tmp_path / "sweep.csv")
    assert "client" not in (tmp_path / "sweep.csv").read_text()


def test_the_picture_has_each_value_at_its_round(tmp_path: Path) -> None:
    needs("matplotlib")
    from torchfedrpc.experiments.sweeps.plot import _by_round

    _personal(tmp_path / "0", "seed=1")
    _personal(tmp_path / "1", "seed=2")
    assert _by_round(find_runs(tmp_path), "client_accuracy") == ([1, 3], [0.25, 0.875], [0.0, 0.0])
