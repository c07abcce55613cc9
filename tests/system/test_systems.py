"""Other systems: where what Linux alone has is hidden, local mode works, and pseudo mode where there is one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

import pytest
from folders import ROOT, SUPPORT, TESTS
from processes import state_of, wait_for_end

pytestmark = pytest.mark.timeout(300)  # they take seconds; a busy machine starts Python slowly

# Kills a worker, then stops one; between the two and afterwards each client answers with the count of its calls.
LOSSES = """
import asyncio, os, signal
import torch
import torchfedrpc as tfr

class Counting:
    def __init__(self, client_id):
        self.count = torch.zeros(600_000)

    def add(self, weights):
        self.count += weights
        return self.count

    def pid(self):
        return os.getpid()

async def main():
    runtime = {"num_processes": 2, "heartbeat_timeout_s": 5}
    async with tfr.LearnerProxy(Counting, ["a", "b"], runtime=runtime) as proxy:
        for turn, number in enumerate([signal.SIGKILL, signal.SIGSTOP], start=1):
            counts = await proxy.clients().call("add", torch.ones(600_000))
            assert all(count.eq(turn).all() for count in counts.values()), counts
            os.kill(await proxy.client("a").pid(), number)
            async with asyncio.timeout(200):
                while proxy.stats()["workers_lost"] < turn:  # a signal strikes a moment later, behind a quick answer
                    await proxy.client("a").pid()
        print("lost", proxy.stats()["workers_lost"], flush=True)
        print("pids", *(await proxy.clients().call("pid")).values(), flush=True)
        if os.environ.get("WAIT"):
            await asyncio.sleep(250)

if __name__ == "__main__":
    tfr.run(main)
"""


def surroundings(system: str, **variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SUPPORT / "other_systems"), "HIDDEN_SYSTEM": system, **variables}


def run_on(system: str, *arguments: str, timeout_s: float = 280, **variables: str) -> str:
    """The output of Python on that system; it has to succeed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env=surroundings(system, **variables),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def contract(system: str, mode: str, *files: str, timeout_s: float = 280) -> None:
    """Run the tests of what users rely on, of that mode alone; in a folder of short names, for the sockets there.

    Without those of libraries, which look which system this is and then for what is hidden.
    """
    paths = [str(TESTS / "contract" / file) for file in files] or [str(TESTS / "contract")]
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        # Neither plugin is needed, and both import trio, which asks for what is hidden.
        options = ["-m", "pytest", "-q", "-n0", "-pno:cacheprovider", "-pno:anyio", f"--basetemp={folder}/inner"]
        options.append(f"--ignore={TESTS}/contract/test_libraries.py")
        output = run_on(system, *options, *paths, timeout_s=timeout_s, TEST_MODES=mode, HYPOTHESIS_NO_PLUGINS="1")
    assert " passed" in output
    assert not [other for other in {"local", "pseudo"} - {mode} if f"[{other}" in output]


HIDDEN = """
import os
for look in (lambda: os.memfd_create("x"), lambda: open("/proc/self/stat")):
    try:
        look()
    except (AttributeError, OSError) as error:
        print(type(error).__name__)
"""


@pytest.mark.parametrize(
    ("system", "error"), [("macos", "AttributeError"), ("windows", "AttributeError"), ("sandbox", "PermissionError")]
)
def test_the_names_of_a_system_are_hidden(system: str, error: str) -> None:
    assert run_on(system, "-c", HIDDEN).split() == [error, "FileNotFoundError"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("system", ["macos", "windows", "sandbox"])
def test_local_mode_behaves_as_on_linux(system: str) -> None:
    contract(system, "local", timeout_s=850)


def test_local_mode_shares_and_reduces_as_on_linux() -> None:
    contract("windows", "local", "test_sharing.py", "test_sharing_limits.py", "test_reduce_runs.py")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("system", ["macos", "sandbox"])
def test_pseudo_mode_behaves_as_on_linux(system: str) -> None:
    files = ["test_calls.py", "test_errors.py", "test_sharing.py", "test_reduce_runs.py", "test_closing.py"]
    contract(system, "pseudo", *files, timeout_s=850)


@pytest.mark.parametrize(
    ("system", "is_killed"),
    [("macos", True), pytest.param("macos", False, marks=pytest.mark.slow), ("sandbox", False)],
)
def test_killed_and_stopped_workers_are_replaced_and_all_end_with_their_driver_without_proc(
    system: str, is_killed: bool, tmp_path: Path
) -> None:
    script = tmp_path / "losses.py"
    script.write_text(LOSSES)
    driver = subprocess.Popen(
        [sys.executable, str(script)],
        env=surroundings(system, WAIT="yes" if is_killed else ""),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with driver:
        output: IO[str] | None = driver.stdout
        assert output is not None
        said = dict[str, str]()
        while "pids" not in said and (line := output.readline()):
            said |= dict([line.split(maxsplit=1)] if " " in line else [])
        assert int(said["lost"]) >= 2, said
        pids = [int(pid) for pid in said["pids"].split()]
        if is_killed:
            os.kill(pids[0], signal.SIGSTOP)
            driver.kill()
    assert driver.returncode == (-signal.SIGKILL if is_killed else 0)
    if is_killed:
        wait_for_end(pids, timeout_s=10)
    else:
        assert all(state_of(pid) == "X" for pid in pids)


def test_pseudo_mode_says_what_to_do_where_torch_has_no_rpc(tmp_path: Path) -> None:
    script = tmp_path / "losses.py"
    script.write_text(LOSSES)
    with pytest.raises(AssertionError, match=r"ConfigError: this build .*runtime\.execution_mode=local"):
        run_on("windows", str(script))


# A run, the same for more rounds, and a third by another process while this one holds the folder.
RESUMED = """
import subprocess, sys
from pathlib import Path
from torchfedrpc.experiments.cli import main
from torchfedrpc.storage import FileLock
if __name__ == "__main__":
    folder, *command = sys.argv[1:]
    for more in [], ["trainer.num_rounds=4"]:
        sys.argv[1:] = [*command, *more]
        main()
    lock = FileLock(Path(folder, "checkpoints", "lock"))
    sys.exit(subprocess.call([sys.executable, "-m", "torchfedrpc", *command]))
"""


def test_the_bundled_experiment_is_resumed_on_windows(tmp_path: Path) -> None:
    script = tmp_path / "resumed.py"
    script.write_text(RESUMED)
    command = ["experiment=smoke", "runtime=local", "resume=auto", f"hydra.run.dir={tmp_path}"]
    with pytest.raises(AssertionError, match="belong to a run that goes on"):
        run_on("windows", str(script), str(tmp_path), *command)
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 4
