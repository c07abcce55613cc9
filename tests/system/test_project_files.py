"""Files around the package: versions agree, and what workflows and hooks run is there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from folders import ROOT

import torchfedrpc as tfr

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
BUILD_PARTS = ("scripts/release", "torchfedrpc/version.py", "CITATION.cff")


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps(workflow: Path) -> list[str]:
    """Return the commands of a workflow."""
    jobs = read(workflow)["jobs"].values()
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


def test_versions_and_licence_agree() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert str(citation["version"]) == tfr.__version__
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert PROJECT["license-files"] == ["LICENSE"]


def test_workflows_run_every_supported_python_and_scripts_that_exist() -> None:
    assert [workflow.stem for workflow in WORKFLOWS] == ["ci", "release"]
    commands = [command for workflow in WORKFLOWS for command in steps(workflow)]
    scripts = [word for command in commands for word in command.split()[:1] if not word.startswith(".venv/")]
    for script in scripts:
        if script != ".ci/run" or (ROOT / ".ci").exists():  # the sources of a release are without it
            assert os.access(ROOT / script, os.X_OK), script
    assert {".ci/run", "scripts/lower-bounds", "scripts/test", "scripts/release"} <= set(scripts)
    jobs = read(WORKFLOWS[0])["jobs"]
    pythons = jobs["linux"]["strategy"]["matrix"]["python"]
    assert pythons == [
        text.rpartition(" ")[2] for text in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d", text)
    ]
    assert f">={pythons[0]}" == PROJECT["requires-python"]
    assert jobs["local-mode"]["strategy"]["matrix"]["os"] == ["macos-latest", "windows-latest"]
    assert jobs["local-mode"]["env"]["TEST_MODES"] == "local"


def test_the_oldest_versions_are_those_of_the_requirements() -> None:
    script = (ROOT / "scripts" / "lower-bounds").read_text(encoding="utf-8")
    code = script.partition("<<'PYTHON'\n")[2].partition("PYTHON\n")[0]
    done = subprocess.run(
        ["python3", "-"], input=code, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["torch==2.6.*", "numpy==2.0.*", "hydra-core==1.3.2"]


def test_the_hook_before_a_commit_is_scripts_check() -> None:
    ((hook,),) = [repo["hooks"] for repo in read(ROOT / ".pre-commit-config.yaml")["repos"]]
    assert hook["entry"] == "scripts/check"
    assert hook["language"] == "system"


def test_issue_forms_ask_for_what_a_report_needs() -> None:
    forms = {path.stem: read(path) for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")}
    assert forms["config"]["blank_issues_enabled"] is True
    for name in ("bug_report", "feature_request"):
        assert {"name", "description", "body"} <= forms[name].keys()
        for field in forms[name]["body"]:
            assert {"type", "id", "attributes"} <= field.keys()
    assert "torchfedrpc info" in (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("tag", "changelog", "message"),
    [
        (f"v{tfr.__version__}", f"## Unreleased\n\n## {tfr.__version__} - 2026-01-31\n", ""),
        (f"v{tfr.__version__}", "## Unreleased\n", "the version of CHANGELOG.md is v"),
        ("v9.9.9", "## 9.9.9 - 2026-01-31\n", "the version of package is v"),
    ],
)
def test_a_release_needs_one_version_in_all_places(tmp_path: Path, tag: str, changelog: str, message: str) -> None:
    for part in BUILD_PARTS:
        (tmp_path / part).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / part, tmp_path / part)
    (tmp_path / "CHANGELOG.md").write_text(changelog)
    for stub, text in {"scripts/setup": "#!/bin/sh\n", ".venv/bin/python": '#!/bin/sh\necho "$@"\n'}.items():
        (tmp_path / stub).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / stub).write_text(text)
        (tmp_path / stub).chmod(0o755)
    done = subprocess.run(
        [tmp_path / "scripts" / "release", tag], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode == 0) == (not message)
    assert message in done.stderr
    assert ("-m build" in done.stdout) == (not message)
