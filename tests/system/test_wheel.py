"""The wheel, in an environment with the core's requirements alone: its files, its commands and its configuration."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
from conftest import needs
from folders import ROOT
from packaging.requirements import Requirement
from workers import listening, make_token

EXTRAS = ("rich", "matplotlib", "sklearn", "tensorboard")
PARTS = ("pyproject.toml", "README.md", "LICENSE", "torchfedrpc", "conf")


def run(folder: Path, *command: str | Path) -> str:
    """Run a command in a folder, where no checkout is found; its output."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)], cwd=folder, env=variables, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wheel")


@pytest.fixture(scope="module")
def wheel(folder: Path) -> Path:
    """The wheel of this tree."""
    needs("setuptools")
    (folder / "tree").mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / "tree" / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, folder / "tree" / part)
    offline = ("--no-deps", "--no-index", "--no-cache-dir", "--disable-pip-version-check")
    run(folder, sys.executable, "-m", "pip", "wheel", *offline, "--no-build-isolation", "-w", folder, folder / "tree")
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def commands(folder: Path, wheel: Path) -> Path:
    """The folder of commands of an environment with the wheel and links to what it requires without extras."""
    run(folder, sys.executable, "-m", "venv", "--without-pip", "bare")
    commands = folder / "bare" / "bin"
    python = commands / "python"
    run(folder, sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    site = Path(run(folder, python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (installed,) = metadata.distributions(name="torchfedrpc", path=[str(site)])
    for distribution in required(installed, {}).values():
        for path in distribution.files or ():
            top = path.parts[0]
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    return commands


def required(
    distribution: metadata.Distribution, found: dict[str, metadata.Distribution]
) -> dict[str, metadata.Distribution]:
    """What a distribution requires without extras, and what that requires: name -> distribution."""
    for text in distribution.requires or ():
        requirement = Requirement(text)
        if requirement.name not in found and (
            requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        ):
            found[requirement.name] = metadata.distribution(requirement.name)
            required(found[requirement.name], found)
    return found


def test_the_wheel_has_all_modules_the_configuration_and_the_mark_of_its_types(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "torchfedrpc").rglob("*.py")}
    options = {f"torchfedrpc/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert "torchfedrpc/conf/config.yaml" in options
    experiments = ROOT / "torchfedrpc" / "experiments"
    files = [*(experiments / "commands" / "new-project").rglob("*"), *experiments.glob("report/report.*")]
    others = {path.relative_to(ROOT).as_posix() for path in files if path.is_file()}
    assert len(others) > 5
    assert names == modules | options | others | {"torchfedrpc/py.typed", "torchfedrpc/conf/__init__.py"}


def test_the_environment_has_the_wheel_and_none_of_the_extras(folder: Path, commands: Path) -> None:
    code = "import json; from importlib.util import find_spec; "
    code += f"print(json.dumps([find_spec('torchfedrpc').origin, *map(find_spec, {EXTRAS!r})]))"
    package, *extras = json.loads(run(folder, commands / "python", "-c", code))
    assert Path(package).is_relative_to(folder / "bare")
    assert extras == [None] * len(EXTRAS)


def test_both_console_scripts_of_the_wheel_do_an_experiment(folder: Path, commands: Path) -> None:
    token = make_token(folder)
    with listening(token, program=(str(commands / "torchfedrpc-worker"),)) as (_, address):
        output = run(
            folder,
            commands / "torchfedrpc",
            "experiment=smoke",
            f'+runtime.client_endpoints={{client_1: "{address}"}}',
            f"runtime.token_file={token}",
            "hydra.run.dir=outputs",
        )
    lines = output.splitlines()
    missing = "live bar and picture and charts in the report"
    assert f"without {missing}: pip install 'torchfedrpc[experiments]' brings them" in lines
    assert "4 clients, distributed mode" in lines
    assert len((folder / "outputs" / "history.jsonl").read_text().splitlines()) == 3
    assert (folder / "outputs" / "model.pt").exists()


def test_python_m_runs_the_wheel(folder: Path, commands: Path) -> None:
    assert f"torch: {torch.__version__}" in re.sub(
        " +", " ", run(folder, commands / "python", "-m", "torchfedrpc", "info")
    )
