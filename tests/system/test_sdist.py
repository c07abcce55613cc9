"""The source distribution: it has what the repository has, and its tests run from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from folders import ROOT

pytestmark = pytest.mark.timeout(300)  # they take seconds; a busy machine starts Python slowly

BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
OUTSIDE = {".gitignore", ".ci/run"}  # of the repository alone
NOT_SOURCES = shutil.ignore_patterns(
    *(".git", ".venv", "outputs", "multirun", "build", "dist", "__pycache__", ".peers", "*.egg-info", ".*_cache")
)


def run(*arguments: str, folder: Path, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCES)
    name = run("-c", BUILD, str(folder), folder=folder / "source").splitlines()[-1]
    with tarfile.open(folder / name) as archive:
        archive.extractall(folder, filter="data")
    return folder / name.removesuffix(".tar.gz")


def test_a_source_distribution_has_what_the_repository_has(unpacked: Path) -> None:
    files = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        tracked = {name for name in listed.splitlines() if (ROOT / name).exists()}
        assert tracked - files == OUTSIDE
    assert {"tests/conftest.py", "conf/config.yaml", "docs/security.md", "LICENSE"} <= files
    assert not [name for name in files if name.endswith((".pyc", ".so"))]


def test_tests_of_the_sdist_run_from_it(unpacked: Path, tmp_path: Path) -> None:
    code = "import torchfedrpc; print(torchfedrpc.__file__)"
    variables = {"PYTHONPATH": str(unpacked), "TEST_MODES": "local"}
    assert run("-c", code, folder=unpacked, **variables).strip() == str(unpacked / "torchfedrpc" / "__init__.py")
    chosen = ["tests/system/test_client_ids.py", "tests/contract/test_constructors.py"]
    options = ["-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'inner'}"]
    assert " passed" in run(*options, *chosen, folder=unpacked, **variables)
