"""The command line that gives a worker the interpreter flags, the folder and the variables of its driver."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import PREAMBLE

CODE = """
import json, logging, os
logging.basicConfig(level="WARNING")
from torchfedrpc.rpc.surroundings import Surroundings
if len(sys.argv) > 1:
    os.rmdir(sys.argv[1])
here = Surroundings.of_this_process(fixed_hashes=True)
print(json.dumps([here.flags, here.folder, here.variables.get("PYTHONHASHSEED")]))
"""


def told(flags: list[str], *arguments: str, cwd: Path, **variables: str) -> tuple[Any, str]:
    done = subprocess.run(
        [sys.executable, *flags, "-c", PREAMBLE + CODE, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=cwd,
        env=variables,
    )
    return json.loads(done.stdout), done.stderr


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["-O"],
        ["-OO", "-B", "-s", "-P"],
        ["-b"],
        ["-Wignore::FutureWarning", "-Werror::ResourceWarning"],
        ["-X", "dev"],
        ["-X", "utf8"],
        ["-X", "utf8=0"],
        ["-X", "no_debug_ranges"],
        ["-X", "int_max_str_digits=5000"],
        ["-X", "warn_default_encoding"],
    ],
)
def test_interpreter_flags_are_passed_on(tmp_path: Path, flags: list[str]) -> None:
    (found, folder, hash_seed), _ = told(flags, cwd=tmp_path)
    assert sorted(found) == sorted(flags)
    assert (folder, hash_seed) == (str(tmp_path), "1")
    assert told(found, cwd=tmp_path)[0][0] == found


@pytest.mark.parametrize(("own", "passed"), [("0", "0"), ("12", "12"), ("random", "1"), ("", "1")])
def test_hash_seed_of_the_driver_comes_before_the_fixed_one(tmp_path: Path, own: str, passed: str) -> None:
    assert told([], cwd=tmp_path, PYTHONHASHSEED=own)[0][2] == passed


def test_hash_seed_that_workers_cannot_read_is_warned_of(tmp_path: Path) -> None:
    assert "the order of a set of strings will differ" in told(["-E"], cwd=tmp_path)[1]


def test_folder_that_was_deleted_does_not_keep_workers_from_starting(tmp_path: Path) -> None:
    folder = tmp_path / "deleted"
    folder.mkdir()
    assert told([], str(folder), cwd=folder)[0][1] is None
