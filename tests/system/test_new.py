"""``torchfedrpc new``, ``resume`` and ``info``, as a user runs them."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from own_project import history, shell

from torchfedrpc.errors import ConfigError
from torchfedrpc.experiments.commands import info, new, resume
from torchfedrpc.experiments.run_folder import run_in_folder
from torchfedrpc.private_files import make_private
from torchfedrpc.storage import FileLock

COMMAND = [sys.executable, "-m", "torchfedrpc"]
QUICK = ["--config-dir", "conf", "experiment=quick", "baseline=null", "report=false"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "-m", "torchfedrpc"]


@pytest.mark.timeout(600)
def test_a_new_project_runs_in_every_mode_and_passes_its_tests(tmp_path: Path) -> None:
    project = tmp_path / "deep" / "project"
    assert f"cd {project}\n  torchfedrpc --config-dir conf experiment=quick" in shell(
        tmp_path, *COMMAND, "new", str(project)
    )
    for mode, start in {"local": COMMAND, "pseudo": COMMAND, "distributed": TORCHRUN}.items():
        told = shell(project, *start, *QUICK, f"runtime={mode}", f"hydra.run.dir={mode}")
        assert f"4 clients, {mode} mode" in told
    assert len(history(project / "local")) == 5
    assert history(project / "local") == history(project / "pseudo") == history(project / "distributed")
    pytest_here = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'of_tests'}"]
    assert "3 passed" in shell(project, *pytest_here, timeout_s=300)


def test_a_new_project_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ConfigError, match="is not an empty folder: give another name, nothing is overwritten"):
            new.main([str(folder)])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ConfigError, match="cannot be written: "):
        new.main(["/proc/self/project"])


@pytest.mark.parametrize(("command", "words"), [(new, "DIR"), (resume, "KEY=VALUE"), (info, "a call in each mode")])
def test_subcommands_have_a_help(command: object, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])  # type: ignore[attr-defined]
    assert ended.value.code == 0
    assert words in re.sub(r"\s+", " ", capsys.readouterr().out)


@pytest.mark.timeout(240)
def test_resume_continues_a_run_in_its_folder(tmp_path: Path) -> None:
    write = ["experiment=smoke", "runtime=local", "baseline=null", "report=false"]
    shell(tmp_path, *COMMAND, *write, "trainer.num_rounds=5", "hydra.run.dir=whole")
    shell(tmp_path, *COMMAND, *write, "trainer.num_rounds=3", "hydra.run.dir=part")
    told = shell(tmp_path, *COMMAND, "resume", "part", "trainer.num_rounds=5", "runtime.num_processes=1")
    assert re.search(r"^4 clients, (pseudo|local) mode, going on after round 3$", told, re.MULTILINE)
    assert "outputs: part" in told
    assert history(tmp_path / "part") == history(tmp_path / "whole")
    weights = [torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("part", "whole")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    config = yaml.safe_load((tmp_path / "part" / "config.yaml").read_text())
    assert (config["trainer"]["num_rounds"], config["resume"]) == (5, "auto")


def test_resume_says_what_a_folder_lacks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config.yaml: give a run's output folder"):
        resume.main([str(tmp_path / "nothing")])
    (tmp_path / "sweep" / "0").mkdir(parents=True)
    (tmp_path / "sweep" / "0" / "config.yaml").write_text("seed: 1\nresume: never\n")
    with pytest.raises(ConfigError, match=r"it is a sweep: resume one of its jobs, such as .*sweep/0$"):
        resume.main([str(tmp_path / "sweep")])
    with pytest.raises(ConfigError, match="'seed' is no KEY=VALUE"):
        resume.main([str(tmp_path / "sweep" / "0"), "seed"])


def settings(**changed: Any) -> DictConfig:
    """The configuration of a run of one round of logistic regression."""
    of = "torchfedrpc.experiments.{}".format
    values = {
        "seed": 0,
        "runtime": {"num_clients": 2},
        "dataset": {"_target_": of("data.synthetic.synthetic"), "num_samples": 100},
        "partition": {"_target_": of("data.partition.iid")},
        "model": {"_target_": of("models.LogisticRegression")},
        "learner": {"_target_": of("learners.classification.ClassificationLearner")},
        "trainer": {"_target_": "torchfedrpc.federation.algorithms.fedavg.FedAvgTrainer", "num_rounds": 1},
        "resume": "never",
    }
    return OmegaConf.create({**values, **changed})


def test_resume_needs_a_checkpoint(tmp_path: Path) -> None:
    OmegaConf.save(settings(), tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="has no checkpoint to resume from: the run ended before its first one"):
        resume.main([str(tmp_path)])


@pytest.mark.parametrize(
    ("changed", "words"), [({}, "belong to a run that goes on"), ({"trace": "yes"}, "trace must be true or false")]
)
def test_nothing_is_written_into_the_folder_of_a_run_that_goes_on(
    tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    make_private(tmp_path / "checkpoints")
    lock = FileLock(tmp_path / "checkpoints" / "lock")
    texts = {"job.json": '{"status": "running"}', "error.txt": "earlier", "config.yaml": "seed: 1"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=words):
        run_in_folder(settings(**changed), tmp_path)
    lock.release()
    assert {name: (tmp_path / name).read_text() for name in texts} == texts


def test_a_change_that_does_not_fit_the_checkpoint_leaves_the_configuration(tmp_path: Path) -> None:
    run_in_folder(settings(), tmp_path)
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"is of another configuration: proxy\.clients was"):
        resume.main([str(tmp_path), "runtime.num_clients=3"])
    assert (tmp_path / "config.yaml").read_text() == before
    assert resume.main([str(tmp_path)]) == 0


@pytest.mark.timeout(240)
def test_info_makes_a_call_in_each_mode(tmp_path: Path) -> None:
    told = shell(tmp_path, *COMMAND, "info", timeout_s=200)
    assert f"torch:                   {torch.__version__}" in told
    assert re.search(r"a call in local mode: +[\d.]+ ms in this process; the first after [\d.]+ s\n", told)
    for mode in ("pseudo", "distributed"):
        assert re.search(rf"a call in {mode} mode: +[\d.]+ ms in a worker; the first after [\d.]+ s\n", told), told
    assert list(tmp_path.iterdir()) == []


def test_info_tells_which_mode_fails_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def broken(mode: str) -> str:
        raise ConfigError("no workers here")

    monkeypatch.setattr(info, "_timed_call", broken)
    monkeypatch.setattr(
        info, "_LAUNCH", ("-c", "import sys; print('torchfedrpc: no rank', file=sys.stderr); sys.exit(3)")
    )
    assert info.main([]) == 1
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert lines[0] == "a call in local mode:        failed: ConfigError: no workers here"
    assert lines[2].endswith("failed: ConfigError: the launch ended with status 3: torchfedrpc: no rank")
