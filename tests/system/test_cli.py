"""The ``torchfedrpc`` command, as a user runs it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import needs
from processes import environment
from torchrun import run_launch

from torchfedrpc.experiments import cli
from torchfedrpc.rpc import launch, worker

SMOKE = ["experiment=smoke", "runtime=local"]
HIDE_EXTRAS = """
import sys
for module in ("rich", "matplotlib", "sklearn"):
    sys.modules[module] = None
from torchfedrpc.experiments.cli import main
main()
"""


def _command(
    folder: Path, *arguments: str, start: tuple[str, ...] = ("-m", "torchfedrpc"), timeout_s: float = 100
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *start, *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def _output_dir(done: subprocess.CompletedProcess[str]) -> Path:
    """The folder that the last line of a run names."""
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.splitlines()[-1].removeprefix("outputs: "))


def _history(outputs: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (outputs / "history.jsonl").read_text().splitlines()]


def _learned(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A history without the times and the traffic."""
    unlike = ("seconds", "bytes_sent", "bytes_received")
    return [{key: value for key, value in record.items() if key not in unlike} for record in history]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `smoke` has run."""
    return tmp_path_factory.mktemp("smoke")


@pytest.fixture(scope="module")
def smoke(folder: Path) -> subprocess.CompletedProcess[str]:
    """One run for several tests."""
    return _command(folder, *SMOKE)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep of four jobs: seeds by runtimes."""
    folder = tmp_path_factory.mktemp("sweep")
    watch = ["+hydra.callbacks.watch._target_=watching.Watch", f"+hydra.callbacks.watch.path={folder / 'held.jsonl'}"]
    jobs = ["experiment=smoke", "seed=1,2", "runtime=local,pseudo"]
    done = _command(folder, "-m", *jobs, "hydra.sweep.dir=sweep", *watch, timeout_s=200)
    assert done.returncode == 0, done.stderr
    return folder / "sweep"


def test_a_run_leaves_everything_in_one_folder(folder: Path, smoke: subprocess.CompletedProcess[str]) -> None:
    needs("matplotlib")
    outputs = _output_dir(smoke)
    assert outputs.parent.parent == folder / "outputs"

    history = _history(outputs)
    assert [record["round"] for record in history] == [0, 1, 2]
    assert history[-1]["test_accuracy"] > 0.7
    assert f"final test accuracy: {history[-1]['test_accuracy']:.3f}" in smoke.stdout
    assert history[-1]["num_clients"] == 4
    assert history[-1]["bytes_sent"] == 0

    weights = torch.load(outputs / "model.pt", weights_only=True)
    assert sorted(weights) == ["linear.bias", "linear.weight"]

    config = yaml.safe_load((outputs / "config.yaml").read_text())
    assert config["runtime"]["execution_mode"] == "local"
    assert config["dataset"]["seed"] == 0  # resolved

    for name in ("metrics.png", "partition.png"):
        assert (outputs / name).read_bytes().startswith(b"\x89PNG")


def test_without_a_terminal_progress_is_a_line_a_round(smoke: subprocess.CompletedProcess[str]) -> None:
    lines = smoke.stdout.splitlines()
    assert re.fullmatch(r"\[.*\]\[INFO\] - 4 clients in local mode: local \(process \d+ on .+\)", lines[0])
    assert lines[1] == "4 clients, local mode"
    assert [line.split("  ")[0] for line in lines[2:5]] == ["round 1/3", "round 2/3", "round 3/3"]


def test_a_run_ends_with_a_table_of_its_rounds(folder: Path, smoke: subprocess.CompletedProcess[str]) -> None:
    last = _history(_output_dir(smoke))[-1]
    _, _, end = smoke.stdout.partition("round 3/3")
    heading = next(line for line in end.splitlines() if "test accuracy" in line)
    assert re.findall(r"[a-z][a-z ]+[a-z]", heading) == [
        *("rounds", "test accuracy", "test loss", "train loss", "clients", "seconds")
    ]
    rows = [re.findall(r"[\d.]+", line) for line in end.splitlines() if re.match(r"\W*\d", line)]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert rows[-1][1:5] == [
        *(f"{last[name]:.3f}" for name in ("test_accuracy", "test_loss", "train_loss")),
        f"{last['num_clients']}",
    ]
    assert end.splitlines()[-3].startswith("centralised baseline: test accuracy ")


@pytest.mark.timeout(240)
def test_the_same_seed_gives_the_same_history(
    tmp_path: Path, smoke: subprocess.CompletedProcess[str], sweep: Path
) -> None:
    first = _learned(_history(_output_dir(smoke)))
    again = _output_dir(_command(tmp_path, *SMOKE, "hydra.run.dir=again"))
    assert first == _learned(_history(tmp_path / again))
    assert first != _learned(_history(sweep / "0"))


def test_a_sweep_runs_every_job_in_a_separate_folder(sweep: Path) -> None:
    seen = []
    for job in range(4):
        config = yaml.safe_load((sweep / str(job) / "config.yaml").read_text())
        seen.append((config["seed"], config["runtime"]["execution_mode"]))
        assert len(_history(sweep / str(job))) == 3
    assert seen == [(1, "local"), (1, "pseudo"), (2, "local"), (2, "pseudo")]


def test_the_jobs_of_a_sweep_give_the_same_history_in_each_runtime(sweep: Path) -> None:
    local_1, pseudo_1, local_2, pseudo_2 = (_learned(_history(sweep / str(job))) for job in range(4))
    assert local_1 == pseudo_1
    assert local_2 == pseudo_2
    assert local_1 != local_2


def test_each_job_of_a_sweep_leaves_its_process_clean(sweep: Path) -> None:
    held = [Counter(json.loads(line)) for line in (sweep.parent / "held.jsonl").read_text().splitlines()]
    assert len(held) == 4
    for job in held:
        kept = [one for one in job if one.startswith(("process", "thread", "shared memory", "temporary"))]
        assert kept == ["thread MainThread"]
    for job in held[2:]:  # the first job of each runtime opens what a process keeps: fonts, torch's thread pools
        assert not job - held[1]


def test_the_core_alone_runs_and_names_the_extra_that_brings_the_rest(tmp_path: Path) -> None:
    done = _command(tmp_path, *SMOKE, start=("-c", HIDE_EXTRAS))
    outputs = _output_dir(done)
    assert done.stdout.splitlines()[0] == (
        "without live bar and picture: pip install 'torchfedrpc[experiments]' brings them"
    )
    assert not list(outputs.glob("*.png"))
    assert (outputs / "model.pt").exists()


def test_digits_without_scikit_learn_name_the_extra(tmp_path: Path) -> None:
    done = _command(tmp_path, "runtime=local", start=("-c", HIDE_EXTRAS))
    assert done.returncode == 1
    assert "pip install 'torchfedrpc[experiments]'" in done.stderr


def test_the_resolved_configuration_can_be_shown(tmp_path: Path) -> None:
    done = _command(tmp_path, "--cfg", "job", "--resolve", "seed=5")
    assert yaml.safe_load(done.stdout)["trainer"]["seed"] == 5
    assert list(tmp_path.iterdir()) == []


def test_the_search_path_can_be_shown(tmp_path: Path) -> None:
    assert "pkg://torchfedrpc.conf" in _command(tmp_path, "--info", "searchpath").stdout


def test_a_setting_that_cannot_be_met_ends_the_command_with_its_error(tmp_path: Path) -> None:
    done = _command(tmp_path, *SMOKE, "trainer.clients_per_round=5")
    assert done.returncode == 1
    message = "the trainer's clients_per_round must be a whole number from 1 to 4, the number of clients, not 5"
    assert done.stderr.splitlines()[-1] == f"torchfedrpc: {message}"
    assert "Traceback" not in done.stderr


def test_hydra_runs_on_rank_0_only(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    served = []

    def serve(link: str, local_rank: int) -> worker.Ending:
        served.append((link, local_rank))
        return worker.Ending(True, "")

    monkeypatch.setattr(launch, "dial_driver", lambda launch: "link")
    monkeypatch.setattr(worker, "serve_launch", serve)
    monkeypatch.setattr(cli, "_task", lambda: pytest.fail("hydra has run"))
    monkeypatch.setattr(sys, "argv", ["torchfedrpc", "no_such_key=1"])
    cli.main()
    assert served == [("link", 1)]


def test_users_options_come_from_the_users_folder(tmp_path: Path) -> None:
    (tmp_path / "conf" / "trainer").mkdir(parents=True)
    (tmp_path / "conf" / "trainer" / "short.yaml").write_text("defaults: [fedavg, _self_]\nnum_rounds: 1\n")
    done = _command(tmp_path, "--config-dir", "conf", *SMOKE, "trainer=short", "trainer.num_rounds=2")
    assert len(_history(_output_dir(done))) == 2


def test_info_has_a_help_and_refuses_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for argument, status, text in (
        ("--help", 0, "usage: torchfedrpc info"),
        ("--help", 0, "torchfedrpc --help"),
        ("seed=1", 2, "unrecognized arguments: seed=1"),
    ):
        monkeypatch.setattr(sys, "argv", ["torchfedrpc", "info", argument])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == status
        assert text in "".join(capsys.readouterr())


def test_a_model_that_cannot_be_found_is_one_line_with_the_next_step(tmp_path: Path) -> None:
    done = _command(tmp_path, *SMOKE, "model._target_=torchfedrpc.experiments.models.MPL")
    assert done.returncode == 1
    assert re.match(r"torchfedrpc: cannot find .* \(did you mean 'MLP'\?\)", done.stderr.splitlines()[-1]), (
        done.stderr
    )
    assert "Traceback" not in done.stderr


LAUNCHER = """
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_store import ConfigStore

class ProcessLauncher(BasicLauncher):
    pass

node = {"_target_": f"{__name__}.ProcessLauncher"}
ConfigStore.instance().store(group="hydra/launcher", name="processes", node=node)
"""


def test_a_sweep_under_torchrun_by_another_launcher_names_the_one_that_works(tmp_path: Path) -> None:
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins" / "process_launcher.py").write_text(LAUNCHER)
    (tmp_path / "script.py").write_text("from torchfedrpc.experiments.cli import main\nmain()\n")
    arguments = ["-m", *SMOKE[:1], "hydra/launcher=processes", f"hydra.sweep.dir={tmp_path / 'sweep'}", "seed=1,2"]
    code, output = run_launch(tmp_path / "script.py", *arguments, num_processes=2)
    assert code != 0, output
    assert "hydra/launcher=processes (hydra_plugins.process_launcher.ProcessLauncher) starts the jobs" in output
    assert "set hydra/launcher=basic" in output
    assert not list(tmp_path.glob("sweep/*/history.jsonl"))


def test_info_tells_versions_and_the_road_between_processes(tmp_path: Path) -> None:
    done = _command(tmp_path, "info")
    assert done.returncode == 0, done.stderr
    assert f"torch:                   {torch.__version__}" in done.stdout
    assert "transport uv, channels cma basic" in done.stdout
    assert list(tmp_path.iterdir()) == []
