"""Sweeps of the ``torchfedrpc`` command: each launcher and sweeper, failed jobs, summaries, Ctrl-C and resumption."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import needs
from processes import environment
from test_ending import LIMIT_S, Run, started

ODD = """
import os
import signal
import sys
from pathlib import Path

import torch

from torchfedrpc.experiments.learners.classification import ClassificationLearner
from torchfedrpc.federation.algorithms.fedavg import FedAvgTrainer

leak = 0.0  # a job that saw the change of another would have other weights
was_warm = "torch._dynamo" in sys.modules


class Odd(ClassificationLearner):
    def train_epoch(self, *args, **kwargs):
        global leak
        if self._seed == 1 and self.client_id == "client_1" and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        result = super().train_epoch(*args, **kwargs)
        result["model_weights"] = {name: value + leak for name, value in result["model_weights"].items()}
        leak = float(self._seed)
        self._train_set().inputs.add_(leak)
        Path(f"warm-{self._seed}").write_text(f"{was_warm} {os.getppid()}")
        return result


class OddTrainer(FedAvgTrainer):
    async def train(self):
        if self._seed == 2:
            raise RuntimeError("the disk\\nis full")
        weights = await super().train()
        noise = torch.rand(())  # of the process's own stream
        if self._seed == 3:
            torch.set_default_dtype(torch.float64)
            torch.set_grad_enabled(False)
            torch.manual_seed(3)
        return {name: value + noise for name, value in weights.items()}
"""
SLOW = """
import time
from torchfedrpc.experiments.learners.classification import ClassificationLearner


class Slow(ClassificationLearner):
    def train_epoch(self, *args, **kwargs):
        if self._seed > 1 and not __import__("os").path.exists("fast"):
            print("slow", flush=True)
            time.sleep(60)
        return super().train_epoch(*args, **kwargs)
"""
SEARCH = """
# @package _global_
defaults:
  - override /hydra/sweeper: optuna
  - override /hydra/launcher: joblib
hydra:
  launcher:
    n_jobs: 2
  sweeper:
    n_trials: 4
    n_jobs: 2
    sampler:
      seed: 1
    params:
      learner.learning_rate: tag(log, interval(0.000001, 0.1))
"""
SMOKE = ("experiment=smoke", "trainer.num_rounds=2")


def _sweep(folder: Path, *arguments: str, start: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *start, "-m", "torchfedrpc", "-m", *SMOKE, "hydra.sweep.dir=sweep", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=200, check=False
    )


def _rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep" / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _result(outputs: Path) -> tuple[list[Any], dict[str, torch.Tensor]]:
    lines = (outputs / "history.jsonl").read_text().splitlines()
    history = [(line["test_accuracy"], line["test_loss"], line["train_loss"]) for line in map(json.loads, lines)]
    return history, torch.load(outputs / "model.pt", weights_only=True)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A sweep in pseudo mode: a job loses a worker, one fails, one changes its process; and one like others."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "odd.py").write_text(ODD)
    targets = ("learner._target_=odd.Odd", "trainer._target_=odd.OddTrainer", "runtime=pseudo", "baseline=null")
    return folder, _sweep(folder, "seed=1,2,3,4", *targets)


@pytest.mark.timeout(400)
def test_the_last_job_of_a_sweep_has_the_bits_of_a_run_alone(
    odd: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder, _ = odd
    assert (folder / "killed").exists()
    (tmp_path / "odd.py").write_text(ODD)
    targets = ("learner._target_=odd.Odd", "trainer._target_=odd.OddTrainer", "runtime=pseudo", "baseline=null")
    command = [sys.executable, "-m", "torchfedrpc", *SMOKE, "seed=4", *targets, "hydra.run.dir=alone"]
    subprocess.run(command, cwd=tmp_path, env=environment(), check=True, timeout=200, capture_output=True)
    history, weights = _result(folder / "sweep" / "3")
    expected, expected_weights = _result(tmp_path / "alone")
    assert history == expected
    for name, tensor in expected_weights.items():
        assert tensor.dtype == weights[name].dtype
        assert torch.equal(tensor, weights[name])


def test_workers_of_all_jobs_are_forked_from_one_process_that_is_warm(
    odd: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = odd
    warm = {(folder / f"warm-{seed}").read_text() for seed in (1, 3, 4)}
    assert len(warm) == 1
    assert warm.pop().startswith("True ")


def test_a_failed_job_is_told_in_a_line_and_the_sweep_goes_on(
    odd: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = odd
    assert done.returncode == 1
    where = folder / "sweep" / "1" / "error.txt"
    line = f"job 1 failed: RuntimeError: the disk is full at odd.py:33 (traceback: {where})"
    assert line in done.stderr.splitlines()
    assert "HYDRA_FULL_ERROR" not in done.stderr
    assert "Traceback" not in done.stderr
    assert "in train\n    raise RuntimeError" in where.read_text()


def test_a_sweep_ends_with_a_table_a_csv_file_and_a_picture(
    odd: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    needs("matplotlib")
    folder, done = odd
    assert "4 jobs: 3 done, 1 failed" in done.stdout
    assert "job 1 failed: RuntimeError: the disk is full" in done.stdout
    assert done.stdout.splitlines()[-1] == f"sweep: {folder / 'sweep'}"
    rows = _rows(folder)
    assert [(row["job"], row["status"], row["seed"]) for row in rows] == [
        *(("0", "done", "1"), ("1", "failed", "2"), ("2", "done", "3"), ("3", "done", "4"))
    ]
    assert rows[1]["error"] == "RuntimeError: the disk is full at odd.py:33"
    assert rows[1]["final_accuracy"] == ""
    for row in (rows[0], rows[2], rows[3]):
        history = [json.loads(line) for line in (Path(row["output_dir"]) / "history.jsonl").read_text().splitlines()]
        assert float(row["best_accuracy"]) == max(record["test_accuracy"] for record in history)
        assert float(row["final_loss"]) == history[-1]["test_loss"]
        assert float(row["seconds"]) == pytest.approx(sum(record["seconds"] for record in history), abs=0.01)
        assert int(row["bytes"]) == sum(record["bytes_sent"] + record["bytes_received"] for record in history) > 0
        assert 0 <= float(row["final_accuracy"]) <= 1
        assert f"seed={row['seed']}" in row["overrides"]
    assert (folder / "sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.timeout(300)
def test_optuna_maximises_the_accuracy_by_jobs_of_joblib_at_once(tmp_path: Path) -> None:
    needs("hydra_plugins.hydra_optuna_sweeper")
    needs("hydra_plugins.hydra_joblib_launcher")
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "search.yaml").write_text(SEARCH)
    (tmp_path / "failing.py").write_text(
        "from torchfedrpc.federation.algorithms.fedavg import FedAvgTrainer\n"
        "class Failing(FedAvgTrainer):\n"
        "    async def train(self):\n"
        "        if not __import__('os').path.exists('one_failed'):\n"
        "            open('one_failed', 'w').close()\n"
        "            raise RuntimeError('once')\n"
        "        return await super().train()\n"
    )
    arguments = ("--config-dir", "conf", "+experiment@_global_=search", "trainer._target_=failing.Failing")
    command = [sys.executable, "-m", "torchfedrpc", "-m", *arguments, "hydra.sweep.dir=sweep"]
    smoke = ["dataset=synthetic", "model=logistic", "runtime.num_clients=4", "trainer.num_rounds=1", "baseline=null"]
    smoke.append("dataset.noise=6")  # so that accuracies differ
    done = subprocess.run(
        [*command, *smoke, "runtime=local"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 1, done.stderr  # one failed
    rows = _rows(tmp_path)
    assert len(rows) == 4
    accuracies = [float(row["final_accuracy"]) for row in rows if row["status"] == "done"]
    assert 2 <= len(accuracies) < 4  # two may fail at the same moment
    assert len({row["learner.learning_rate"] for row in rows}) == 4
    best = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
    assert best["best_value"] == max(accuracies)
    assert "n_jobs=2" in done.stdout


@pytest.mark.timeout(300)
def test_submitit_runs_jobs_as_local_processes(tmp_path: Path) -> None:
    needs("hydra_plugins.hydra_submitit_launcher")
    done = _sweep(tmp_path, "seed=1,2", "runtime=local", "hydra/launcher=submitit_local")
    assert done.returncode == 0, done.stderr
    assert [row["status"] for row in _rows(tmp_path)] == ["done", "done"]
    assert "2 jobs: 2 done" in done.stdout


@pytest.mark.timeout(300)
def test_ranks_of_a_launch_serve_job_after_job_of_rank_0(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = _sweep(tmp_path, "seed=1,2", start=torchrun)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("4 clients, distributed mode") == 2
    assert "2 jobs: 2 done" in done.stdout
    assert [row["status"] for row in _rows(tmp_path)] == ["done", "done"]


def _start_slow(folder: Path, *arguments: str) -> Run:
    (folder / "slow.py").write_text(SLOW)
    common = ("learner._target_=slow.Slow", "runtime=local", "hydra.sweep.dir=sweep", "seed=1,2,3")
    return started(folder, "-m", "torchfedrpc", "-m", *SMOKE, *common, *arguments)


def _states(folder: Path) -> list[str]:
    return [json.loads(path.read_text())["status"] for path in sorted(folder.glob("sweep/*/job.json"))]


@pytest.mark.timeout(300)
def test_ctrl_c_ends_a_sweep_with_the_table_and_resume_goes_on_with_the_unfinished_jobs(tmp_path: Path) -> None:
    with _start_slow(tmp_path) as run:
        run.next_line("^slow")
        other = _sweep(tmp_path, "seed=7", "runtime=local")
        assert other.returncode == 1
        assert f"torchfedrpc: another sweep uses {tmp_path / 'sweep'}" in other.stderr
        assert "hydra.sweep.dir" in other.stderr
        status, output = run.end(signal.SIGINT)
    assert status == 130, output
    assert "2 jobs: 1 done, 1 killed" in output  # in the middle of a method, which ends with the process
    assert [(row["job"], row["status"]) for row in _rows(tmp_path)] == [("0", "done"), ("1", "killed")]

    (tmp_path / "fast").touch()
    before = (tmp_path / "sweep" / "0" / "model.pt").stat().st_mtime_ns
    common = ("learner._target_=slow.Slow", "runtime=local", "seed=1,2,3", "resume=auto")
    done = _sweep(tmp_path, *common)
    assert done.returncode == 0, done.stderr
    assert "job 0 is done already: test accuracy" in done.stdout
    assert (tmp_path / "sweep" / "0" / "model.pt").stat().st_mtime_ns == before
    assert [row["status"] for row in _rows(tmp_path)] == ["done", "done", "done"]

    done = _sweep(tmp_path, *common, "trainer.num_rounds=3")  # other settings: the jobs go on
    assert done.returncode == 0, done.stderr
    assert "is done already" not in done.stdout
    assert [row["num_rounds"] for row in _rows(tmp_path)] == ["3", "3", "3"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_ctrl_c_ends_the_jobs_of_other_launchers(tmp_path: Path, launcher: str) -> None:
    needs(f"hydra_plugins.hydra_{launcher.removesuffix('_local')}_launcher")
    with _start_slow(tmp_path, f"hydra/launcher={launcher}") as run:
        while "done" not in _states(tmp_path) or len(_states(tmp_path)) < 2:
            assert run.process.poll() is None, run.output
            os.sched_yield()
        status, output = run.end(signal.SIGINT, within_s=LIMIT_S + 25)  # 3 s on a machine that is idle
    assert status == 130, output
    assert "1 done" in output
    assert _rows(tmp_path)[0]["status"] == "done"


def test_a_setting_that_a_job_lacks_names_the_job(tmp_path: Path) -> None:
    done = _sweep(tmp_path, "trainer=fedavg,fedbuff", "trainer.clients_per_round=2", "seed=1,2", "runtime=local")
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith("torchfedrpc: unknown key trainer.clients_per_round (known: ")
    assert line.endswith("adds one (in the job with trainer=fedbuff seed=1)")
    assert not list(tmp_path.glob("sweep/*/job.json"))


def test_a_launcher_that_is_not_installed_names_the_extra(tmp_path: Path) -> None:
    hidden = (
        "import sys\nsys.modules['hydra_plugins.hydra_joblib_launcher'] = None\n"
        "from torchfedrpc.experiments.cli import main\nmain()\n"
    )
    command = [sys.executable, "-c", hidden, "-m", *SMOKE, "hydra/launcher=joblib"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "torchfedrpc: hydra/launcher=joblib needs hydra_joblib_launcher, which is not installed: "
        "pip install 'torchfedrpc[sweeps]'"
    )
