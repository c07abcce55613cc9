"""The folder of a run: closed to others, and written so that a link in it leads nowhere."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import needs
from torchrun import run_script, write_script

import torchfedrpc as tfr
from torchfedrpc.errors import ConfigError
from torchfedrpc.events import RoundEnded
from torchfedrpc.experiments import extras
from torchfedrpc.experiments.experiment import run_experiment
from torchfedrpc.experiments.experiment_config import ExperimentConfig
from torchfedrpc.experiments.history import History
from torchfedrpc.federation.checkpoint_store import CheckpointStore
from torchfedrpc.private_files import close_to_others, make_private, open_private, replaced
from torchfedrpc.wire.packing import pack


@pytest.fixture(autouse=True)
def _usual_umask() -> Iterator[None]:
    before = os.umask(0o002)
    yield
    os.umask(before)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """What a link leads to."""
    path = tmp_path / "target"
    path.write_text("precious")
    return path


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def write(path: Path) -> None:
    """All that a run writes into its folder, but for the picture."""
    proxy: Any = SimpleNamespace(
        stats=lambda: {"bytes_sent": 0, "bytes_received": 0}, subscribe=lambda callback: lambda: None
    )
    run = tfr.Run({}, proxy, None)
    history = History(path / "history.jsonl")
    history.on_run_start(run)
    history.on_round_end(run, RoundEnded(0, 1, {}))
    history.load_state_dict(history.state_dict())
    store = CheckpointStore(path / "checkpoints")
    for _ in range(2):
        store.lock()
        try:
            store.set_aside()
            save = store.begin(1, None)
            save.add("a", b"snapshot")
            save.commit({}, pack({}))
        finally:
            store.unlock()


def test_files_of_a_run_are_its_users_alone(tmp_path: Path) -> None:
    path = tmp_path / "run"
    make_private(path)
    write(path)
    found = [path, *path.rglob("*")]
    assert len(found) == 8
    assert {mode_of(entry) for entry in found if entry.is_dir()} == {0o700}
    assert {mode_of(entry) for entry in found if entry.is_file()} == {0o600}


@pytest.mark.parametrize(
    "name",
    ["history.jsonl", "history.jsonl.tmp", "checkpoints/checkpoints.sqlite.tmp", "checkpoints/lock.owner"],
)  # fmt: skip
def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path, target: Path, name: str) -> None:
    path = tmp_path / "run"
    (path / "checkpoints").mkdir(parents=True, mode=0o700)
    (path / "checkpoints").chmod(0o700)
    (path / name).symlink_to(target)
    write(path)
    assert target.read_text() == "precious"
    assert not (path / name).is_symlink()


def test_a_lock_that_is_a_link_is_refused(tmp_path: Path, target: Path) -> None:
    store = CheckpointStore(tmp_path / "run")
    make_private(store.folder)
    (store.folder / "lock").symlink_to(target)
    with pytest.raises(ConfigError, match=r"cannot hold checkpoints: .*it is a link"):
        store.lock()
    assert target.read_text() == "precious"


def test_checkpoints_that_are_a_link_are_not_read(tmp_path: Path, target: Path) -> None:
    store = CheckpointStore(tmp_path / "run")
    make_private(store.folder)
    (store.folder / "checkpoints.sqlite").symlink_to(target)
    with pytest.raises(OSError, match="it is a link"):
        store.load()
    assert target.read_text() == "precious"


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(OSError, match="pipe"):
        open_private(tmp_path / "pipe", os.O_WRONLY)
    with pytest.raises(OSError, match="no regular file"):
        open_private(tmp_path / "pipe", os.O_RDWR)


def test_write_that_fails_leaves_the_file_as_it_was(target: Path) -> None:
    writing = replaced(target)
    writing.__enter__().write(b"half")
    error = ZeroDivisionError()
    assert not writing.__exit__(type(error), error, None)  # it goes on its way
    assert target.read_text() == "precious"
    assert [entry.name for entry in target.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("mode", [0o770, 0o777, 0o707, 0o1777])
def test_a_folder_into_which_others_may_write_is_refused_with_what_to_do(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "shared"
    path.mkdir()
    path.chmod(mode)
    with pytest.raises(ConfigError, match=rf"others may write into .*mode {mode:04o}.*chmod 700 {path}"):
        CheckpointStore(path).lock()
    path.chmod(0o700)
    make_private(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a folder away")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "theirs"
    path.mkdir(mode=0o700)
    os.chown(path, 12345, -1)
    with pytest.raises(ConfigError, match=r"another user \(uid 12345\).*name a folder of your own"):
        make_private(path)


def test_a_folder_may_be_a_link_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir(mode=0o700)
    (tmp_path / "disk").chmod(0o700)
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    make_private(tmp_path / "run")
    write(tmp_path / "run")
    assert (tmp_path / "disk" / "history.jsonl").exists()


def test_a_folder_that_hydra_made_is_closed_to_others_unless_one_works_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "made" / "inner")
    close_to_others(tmp_path / "made")
    assert mode_of(tmp_path / "made") == 0o775
    monkeypatch.chdir(tmp_path)
    close_to_others(tmp_path / "made")
    assert mode_of(tmp_path / "made") == 0o700


@pytest.mark.parametrize(
    "drawing",
    [
        "torchfedrpc.experiments.metrics_plot import draw_metrics as draw; draw([], path)",
        "torchfedrpc.experiments.partition_plot import draw_partition as draw; draw({'a': one}, one, path)",
    ],
    ids=["metrics", "partition"],
)
def test_a_picture_follows_no_link(drawing: str, tmp_path: Path, target: Path) -> None:
    needs("matplotlib")
    (tmp_path / "metrics.png").symlink_to(target)
    draw = f"""
        from pathlib import Path
        import numpy as np
        path, one = Path(sys.argv[1]), np.zeros(1, dtype=np.int64)
        from {drawing}
    """
    status, output = run_script(write_script(tmp_path, draw), str(tmp_path / "metrics.png"))
    assert status == 0, output
    assert target.read_text() == "precious"
    assert (tmp_path / "metrics.png").read_bytes().startswith(b"\x89PNG")


async def test_an_experiments_model_follows_no_link(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "available", lambda name: False)
    path = tmp_path / "run"
    make_private(path)
    (path / "model.pt").symlink_to(target)
    config = ExperimentConfig.of(
        {
            "seed": 0,
            "runtime": {"execution_mode": "local", "num_clients": 2},
            "dataset": {"_target_": "torchfedrpc.experiments.data.synthetic.synthetic", "num_samples": 60},
            "partition": {"_target_": "torchfedrpc.experiments.data.partition.iid", "seed": 0},
            "model": {"_target_": "torchfedrpc.experiments.models.LogisticRegression"},
            "learner": {"_target_": "torchfedrpc.experiments.learners.classification.ClassificationLearner"},
            "trainer": {"_target_": "torchfedrpc.federation.algorithms.fedavg.FedAvgTrainer", "num_rounds": 1},
        }
    )
    await run_experiment(config, path)
    assert target.read_text() == "precious"
    assert torch.load(path / "model.pt", weights_only=True)
    assert mode_of(path / "model.pt") == mode_of(path / "history.jsonl") == 0o600
