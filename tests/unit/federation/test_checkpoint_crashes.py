"""Checkpoints of a process that is killed, and on a disk that is full."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from disk_faults import failing_at, has_hooks
from processes import LightProcess
from saves import (
    CONFIG,
    Content,
    content,
    content_in,
    flip_blob,
    learner,
    learners,
    loaded,
    locked,
    rounds_in,
    save,
)

from torchfedrpc.wire.packing import pack

needs_hooks = pytest.mark.skipif(not has_hooks(), reason="SQLite is built into Python without its symbols")
CHANGED = learners(3, "b", "c", "f")
Scenario = Callable[[Path], tuple[Content, Content]]


# What is there before round 3 is saved, and after that.


def incremental(path: Path) -> tuple[Content, Content]:
    """Round 3 goes into the file, and rounds 0 and 1 out of it."""
    with locked(path, num_kept=2) as store:
        base = save(store, 0, None, learners(0, "z"))
        base = save(store, 1, base, learners(1, "a", "b", "c", "d", num_bytes=20_000) | learners(1, "e"))
        base = save(store, 2, base, learners(2, "a", "z"))
        before = content(base)
    return before, (3, before[1] | CHANGED)


def damaged(path: Path) -> tuple[Content, Content]:
    """The file is damaged, so round 3 goes into a new one."""
    expected = incremental(path)
    with locked(path, num_kept=3) as store:
        save(store, 3, loaded(store), learners(33, "a", "e"))
    flip_blob(path / "checkpoints.sqlite", learner("a", 33))
    return expected


SCENARIOS = pytest.mark.parametrize("scenario", [incremental, damaged])


@needs_hooks
@SCENARIOS
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from_then_on"])
def test_an_error_at_any_step_leaves_the_round_before_or_the_new_one(
    tmp_path: Path, scenario: Scenario, lasting: bool, caplog: pytest.LogCaptureFixture
) -> None:
    before, after = scenario(tmp_path / "first")
    outcomes = []
    for number in itertools.count(1):
        path = tmp_path / str(number)
        shutil.copytree(tmp_path / "first", path)
        with locked(path, num_kept=2) as store:
            base = loaded(store)
            caplog.clear()
            with failing_at(number, lasting=lasting) as steps:
                try:
                    saved = save(store, 3, base, CHANGED)
                except OSError:
                    saved = base
                    outcomes.append("before")
                else:
                    outcomes.append("after")
            if saved is not base and steps[0] >= number:
                assert "no longer needed" in caplog.text
            if saved is not base:
                assert content(saved) == after
            if number % 3 == 0:  # the run goes on
                expected = content(saved)[1] | learners(4, "a")
                assert content(save(store, 4, saved, learners(4, "a"))) == (4, expected)
        if number % 3:
            assert content_in(path) == (before if saved is base else after)
        shutil.rmtree(path)
        if steps[0] < number:
            break
    assert outcomes.count("before") >= 10
    assert outcomes.count("after") >= 1
    assert outcomes == sorted(outcomes, reverse=True)


KILLED = """
import os, shutil, signal
from pathlib import Path
first, base_round, config = Path(sys.argv[1]), int(sys.argv[2]), eval(sys.argv[3])
sys.path.insert(0, sys.argv[5])
from disk_faults import killed_at
from torchfedrpc.federation.checkpoint_store import CheckpointStore
from torchfedrpc.wire.packing import pack
import torch

changed = {name: bytes.fromhex(data) for name, data in eval(sys.argv[4]).items()}
state = pack({"weights": torch.full((20,), 3.0), "round": 3})

def save(path, number):
    store = CheckpointStore(path, num_kept=2)
    store.lock()
    base = store.load()
    assert base.round_num == base_round
    with killed_at(number):
        files = store.begin(3, base)
        for client_id, data in changed.items():
            files.add(client_id, data)
        files.commit(config, state)
    store.unlock()

save(shutil.copytree(first, first.parent / "unkilled"), 0)  # imports what each child would import again
number, status = 0, 1
while status != 0:
    number += 1
    path = first.parent / f"killed_{number}"
    shutil.copytree(first, path)
    pid = os.fork()
    if pid == 0:
        save(path, number)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL), status
print(number)
"""


@needs_hooks
@SCENARIOS
def test_a_process_killed_at_any_step_leaves_the_round_before_or_the_new_one(
    tmp_path: Path, scenario: Scenario, caplog: pytest.LogCaptureFixture
) -> None:
    before, after = scenario(tmp_path / "first")
    changed = {name: data.hex() for name, data in CHANGED.items()}
    support = Path(__file__).parents[2] / "support"
    with closing(LightProcess(KILLED, tmp_path / "first", 2, CONFIG, changed, support)) as process:
        num_steps = int(process.line())
        assert process.ending() == 0
    outcomes = []
    caplog.clear()
    for number in range(1, num_steps + 1):
        with locked(tmp_path / f"killed_{number}", num_kept=2) as store:
            base = loaded(store)
            found = content(base)
            assert found in (before, after)
            outcomes.append(found[0])
            save(store, 4, base, learners(4, "a"))
            assert len(rounds_in(store)) <= 2
            assert not list(store.folder.glob("*tmp*"))
        assert content_in(store.folder) == (4, found[1] | learners(4, "a"))
    assert bool(caplog.records) == (scenario is damaged)
    assert outcomes.count(2) >= 10
    assert outcomes.count(3) >= 1
    assert outcomes == sorted(outcomes)


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "small"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(path)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root, and the right to mount a tmpfs")
    try:
        with locked(path) as store:
            base = save(store, 1, None, learners(1, "client_1", num_bytes=300_000))
            before = content(base)
            for changed in (
                {"client_2": bytes(900_000)},
                {f"client_{number}": learner("", number, 9_000) for number in range(99)},
            ):
                with pytest.raises(OSError, match="full") as raised:
                    save(store, 2, base, changed)
                assert raised.value.errno == errno.ENOSPC
                assert content(base) == before
            files = store.begin(2, base)
            files.add("client_2", b"abc")
            with pytest.raises(OSError, match="full"):
                files.commit(CONFIG, pack({"weights": torch.zeros(250_000)}))
            files.abort()
            assert content(base) == before
            base = save(store, 2, base, {"client_2": b"abc"})
            assert content(base) == (2, before[1] | {"client_2": b"abc"})
        assert content_in(path) == (2, before[1] | {"client_2": b"abc"})
    finally:
        subprocess.run(["umount", str(path)], check=True)


# Memory.

PEAK = """
import os
from pathlib import Path
import torch
from torchfedrpc.federation.checkpoint_store import CheckpointStore
from torchfedrpc.wire.packing import pack

def peak_kib():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])

def save(store, round_num, base, number, num_bytes):
    files = store.begin(round_num, base)
    for client in range(number):
        files.add(f"client_{client}", os.urandom(num_bytes))
    return files.commit({"lr": 0.1}, pack({"weights": torch.ones(1000)}))

def use(path, num_bytes):
    store, other = CheckpointStore(path, num_kept=1), CheckpointStore(path / "other")
    store.lock()
    other.lock()
    first = save(store, 1, None, 64, num_bytes)
    save(other, 2, first, 1, num_bytes)
    found = other.load()
    assert sum(len(data) for _, data in found.snapshots()) == 64 * num_bytes
    assert found.read_state()["weights"].sum() == 1000
    save(store, 2, first, 50, num_bytes)

use(Path(sys.argv[1]), 10_000)  # what is loaded and allocated once
before = peak_kib()
use(Path(sys.argv[2]), 2_000_000)
print(before, peak_kib())
"""


def test_the_learners_are_never_all_in_memory(tmp_path: Path) -> None:
    with closing(LightProcess(PEAK, tmp_path / "small", tmp_path / "large")) as process:
        before, after = map(int, process.line().split())
        assert process.ending() == 0
    assert after - before < 40 * 1024
