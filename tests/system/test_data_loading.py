"""Data of clients is loaded once in each process, whatever the data set, and shared by the clients there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import needs
from own_project import history, shell, write

COUNTED = """
    import os
    import torchfedrpc as tfr

    @tfr.dataset("counted")
    def counted(data, log="loads"):
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\\n")
        return data

    def saved():
        import datasets

        rows = {"x": [[number % 4.0] * 60 for number in range(200)], "label": [number % 10 for number in range(200)]}
        rows["user"] = [number % 8 for number in range(200)]
        return datasets.Dataset.from_dict(rows)
"""
RUN = """
    import asyncio, sys
    from pathlib import Path
    import yaml
    from torchfedrpc.experiments.experiment import run_experiment
    from torchfedrpc.experiments.experiment_config import ExperimentConfig

    if __name__ == "__main__":
        config = ExperimentConfig.of(yaml.safe_load(Path("command/config.yaml").read_text()))
        asyncio.run(run_experiment(config, Path("plain")))
"""
OF = "torchfedrpc.experiments.data"
SETTINGS = ["experiment=smoke", "dataset=counted", "partition=natural", "model.num_inputs=60"]
SETTINGS += ["runtime=pseudo", "runtime.num_processes=2", "runtime.num_clients=8", "trainer.num_rounds=2"]
SETTINGS += ["baseline=null"]


def write_leaf(folder: Path) -> None:
    for part, count in (("train", 12), ("test", 3)):
        users = [f"user {number}" for number in range(8)]
        data = {user: {"x": [[0.5] * 60] * count, "y": [*range(count)]} for user in users}
        content = {"users": users, "num_samples": [count] * 8, "user_data": data}
        (folder / part).mkdir()
        (folder / part / "all.json").write_text(json.dumps(content).replace("11", "9").replace("10", "8"))


@pytest.mark.parametrize(
    "recipe",
    [
        {"_target_": f"{OF}.fedprox_synthetic.fedprox_synthetic", "num_users": 8},
        {"_target_": f"{OF}.leaf.leaf", "root": "."},
        {
            "_target_": f"{OF}.hugging_face.hugging_face",
            "data": {"_target_": "counted.saved"},
            "input": "x",
            "group": "user",
        },
    ],
    ids=["fedprox_synthetic", "leaf", "hugging_face"],
)
def test_each_process_loads_the_data_of_its_clients_once(recipe: dict[str, Any], tmp_path: Path) -> None:
    if "hugging_face" in recipe["_target_"]:
        needs("datasets")
    write(tmp_path, counted=COUNTED, run=RUN)
    write_leaf(tmp_path)
    given = "dataset.data=" + json.dumps(recipe).replace('"', "").replace(": ", ":")
    shell(tmp_path, sys.executable, "-m", "torchfedrpc", *SETTINGS, given, "hydra.run.dir=command")
    loads = (tmp_path / "loads").read_text().split()
    assert len(loads) == len(set(loads)) == 2  # of the driver, and of the process that forks its workers
    (tmp_path / "loads").unlink()
    shell(tmp_path, sys.executable, "run.py")
    loads = (tmp_path / "loads").read_text().split()
    assert len(loads) == len(set(loads)) == 3  # of the driver and its two workers
    assert history(tmp_path / "plain") == history(tmp_path / "command")
