"""Checkpoints of a process that is killed, a machine that loses power, a disk that is full."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from light import LightProcess
from saves import (
    CONFIG,
    STEPS,
    content,
    fail_at,
    files_in,
    flip,
    kinds,
    learners,
    loaded,
    locked,
    save,
    state_of,
)

from torchfedrpc.federation.checkpoint_folder import CheckpointFolder
from torchfedrpc.wire.packing import pack


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[CheckpointFolder]:
    with locked(tmp_path / "run" / "checkpoints") as folder:
        yield folder


# Crashes as round 3 is saved: learners are copied from one pack to another, and a head and a pack are removed.


def usual(path: Path) -> tuple[tuple[int, Any], tuple[int, Any]]:
    """A folder before round 3, and what round 2 and round 3 are."""
    with locked(path, num_kept=2) as folder:
        base = save(folder, 0, None, learners(0, "z"))
        base = save(folder, 1, base, learners(1, "a", "b", "c", "d", num_bytes=2000) | learners(1, "e"))
        base = save(folder, 2, base, learners(2, "a", "z"))
        before = content(base)
    return before, (3, before[1] | CHANGED)


def gone_back(path: Path) -> tuple[tuple[int, Any], tuple[int, Any]]:
    """The same, and a round 3 that is damaged."""
    expected = usual(path)
    with locked(path, num_kept=2) as folder:
        shutil.copytree(path, path.parent / "kept")
        save(folder, 3, loaded(folder), learners(33, "a", "e"))
        shutil.copytree(path.parent / "kept", path, dirs_exist_ok=True)
        shutil.rmtree(path.parent / "kept")
        flip(path / "round_000003.learners", 30)
    return expected


CHANGED = learners(3, "b", "c", "f")
SCENARIOS = pytest.mark.parametrize("scenario", [usual, gone_back])


@SCENARIOS
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from_then_on"])
def test_an_error_at_any_step_leaves_what_was_there(
    tmp_path: Path, scenario: Any, lasting: bool, caplog: pytest.LogCaptureFixture
) -> None:
    before, after = scenario(tmp_path / "first")
    outcomes = []
    for number in itertools.count(1):
        shutil.copytree(tmp_path / "first", tmp_path / str(number))
        with locked(tmp_path / str(number), num_kept=2) as folder, pytest.MonkeyPatch.context() as patch:
            files = files_in(folder)
            base = loaded(folder)
            steps = fail_at(patch, number, lasting)
            caplog.clear()
            try:
                save(folder, 3, base, CHANGED)
            except OSError:
                patch.undo()
                if "round_000003.checkpoint" not in files_in(folder):  # the damaged one was replaced already
                    files.pop("round_000003.checkpoint", None)
                assert files_in(folder) == files
                assert content(loaded(folder)) == before
                outcomes.append("before")
            else:
                patch.undo()
                assert content(loaded(folder)) == after
                outcomes.append("after")
                if steps[0] >= number:
                    assert "no longer needed" in caplog.text
            save(folder, 4, loaded(folder), learners(4, "a"))
            assert_tidy(folder)
        if steps[0] < number:
            break
    assert outcomes.count("before") >= 10
    assert outcomes.count("after") >= 3  # the last of them undisturbed
    assert outcomes == sorted(outcomes, reverse=True)


def assert_tidy(folder: CheckpointFolder) -> None:
    """The kept checkpoints are two, and whatever else is there is a pack that one of them needs."""
    heads, packs, others = kinds(folder)
    assert len(heads) == 2
    assert not others
    needed = set()
    for _ in heads:
        found = loaded(folder)
        needed |= {entry.pack for entry in found.entries.values()}
        flip(folder.path / f"round_{found.round_num:06d}.checkpoint", 60)
    assert set(packs) == needed


KILLED = """
import os, shutil, signal
from pathlib import Path
from torchfedrpc.federation.checkpoint_folder import CheckpointFolder
from torchfedrpc.wire.packing import pack
import torch

first, base_round, config = Path(sys.argv[1]), int(sys.argv[2]), eval(sys.argv[3])
changed = {name: bytes.fromhex(data) for name, data in eval(sys.argv[4]).items()}
state = pack({"weights": torch.full((20,), 3.0), "round": 3})
count = 0

def kill_at(number, name):
    real = getattr(os, name)

    def step(*arguments):
        global count
        count += 1
        if count == number:
            if name == "pwrite":  # a part of it has arrived
                real(arguments[0], arguments[1][: len(arguments[1]) // 2], arguments[2])
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    setattr(os, name, step)

number, status = 0, 1
while status != 0:
    number += 1
    path = first.parent / f"killed_{number}"
    shutil.copytree(first, path)
    pid = os.fork()
    if pid == 0:
        folder = CheckpointFolder(path, num_kept=2)
        folder.lock()
        base = folder.load()
        assert base.round_num == base_round
        for name in ("pwrite", "fsync", "replace", "unlink"):
            kill_at(number, name)
        files = folder.begin(3, base)
        for client_id, data in changed.items():
            files.add(client_id, data)
        files.commit(config, state)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL), status
print(number)
"""


@SCENARIOS
def test_a_process_killed_at_any_step_leaves_the_round_before_or_the_new_one(tmp_path: Path, scenario: Any) -> None:
    before, after = scenario(tmp_path / "first")
    changed = {name: data.hex() for name, data in CHANGED.items()}
    with closing(LightProcess(KILLED, tmp_path / "first", 2, CONFIG, changed)) as process:
        num_steps = int(process.line())
        assert process.ending() == 0
    outcomes = []
    for number in range(1, num_steps + 1):
        with locked(tmp_path / f"killed_{number}", num_kept=2) as folder:
            assert not kinds(folder)[2]  # what was half-written is gone
            found = content(loaded(folder))
            assert found in (before, after)
            outcomes.append(found[0])
            save(folder, 4, loaded(folder), learners(4, "a"))
            assert_tidy(folder)
    assert outcomes.count(2) >= 10
    assert outcomes.count(3) >= 3
    assert outcomes == sorted(outcomes)


@SCENARIOS
def test_a_machine_that_loses_power_at_any_step_has_the_round_before_or_the_new_one(
    tmp_path: Path, scenario: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = scenario(tmp_path / "run")
    with locked(tmp_path / "run", num_kept=2) as folder:
        disk = Disk(files_in(folder))
        disk.record(monkeypatch)
        saved = save(folder, 3, loaded(folder), CHANGED)
        monkeypatch.undo()
        assert {entry.pack for entry in saved.entries.values()} == {"round_000002.learners", saved.entries["d"].pack}
        assert saved.entries["d"].pack == saved.entries["b"].pack  # the one was copied, the other has changed
        assert files_in(folder).keys().isdisjoint(("round_000000.learners", "round_000001.checkpoint"))
    outcomes = []
    for steps, path in disk.after_power_losses(tmp_path / "disk"):
        found = content(loaded(CheckpointFolder(path)))
        if ("unlink", "round_000001.checkpoint") in steps:
            assert found == after
        elif ("replace", "round_000003.checkpoint.tmp", "round_000003.checkpoint") not in steps:
            assert found == before
        else:
            assert found in (before, after)
        outcomes.append(found[0])
        if scenario is usual:
            assert_every_head_is_whole(path)
    assert set(outcomes) == {2, 3}
    assert len(outcomes) >= 15


def test_a_machine_that_loses_power_as_a_run_begins_anew_has_no_head_without_its_packs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual(tmp_path / "run")
    with locked(tmp_path / "run") as folder:
        disk = Disk(files_in(folder))
        disk.record(monkeypatch)
        folder.set_aside()
        monkeypatch.undo()
    for _, path in disk.after_power_losses(tmp_path / "disk"):
        assert_every_head_is_whole(path)


def assert_every_head_is_whole(path: Path) -> None:
    folder = CheckpointFolder(path)
    for name in reversed(kinds(folder)[0]):
        assert name == f"round_{loaded(folder).round_num:06d}.checkpoint"
        (path / name).unlink()


class Disk:
    """What a disk may hold after power was lost: whatever was not waited for may be there or not.

    Content that was not synced is zeros; each change of a name that was not synced has happened or has not.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self._before = files
        self._steps: list[tuple[Any, ...]] = []

    def record(self, patch: pytest.MonkeyPatch) -> None:
        real = {name: getattr(os, name) for name in STEPS}

        def name_of(descriptor: int) -> str | None:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            return None if path.is_dir() else path.name

        def pwrite(descriptor: int, data: Any, position: int) -> int:
            self._steps.append(("write", name_of(descriptor), position, bytes(data)))
            return int(real["pwrite"](descriptor, data, position))

        def fsync(descriptor: int) -> None:
            self._steps.append(("sync", name_of(descriptor)))
            real["fsync"](descriptor)

        def replace(source: Any, target: Any) -> None:
            if Path(source).parent == Path(target).parent:
                self._steps.append(("replace", Path(source).name, Path(target).name))
            else:  # the folder that it goes to is not looked at
                self._steps.append(("unlink", Path(source).name))
            real["replace"](source, target)

        def unlink(path: Any) -> None:
            if os.path.lexists(path):
                self._steps.append(("unlink", Path(path).name))
            real["unlink"](path)

        for function in (pwrite, fsync, replace, unlink):
            patch.setattr(os, function.__name__, function)

    def after_power_losses(self, path: Path) -> Iterator[tuple[list[tuple[Any, ...]], Path]]:
        """The steps that were done before, and a folder with what is there then."""
        seen = set()
        for number in range(len(self._steps) + 1):
            for files in self._after(self._steps[:number]):
                if (key := (number, *files.items())) not in seen:
                    seen.add(key)
                    path.mkdir()
                    for name, data in files.items():
                        (path / name).write_bytes(data)
                    yield self._steps[:number], path
                    shutil.rmtree(path)

    def _after(self, steps: list[tuple[Any, ...]]) -> Iterator[dict[str, bytes]]:
        contents = {name: bytearray(data) for name, data in self._before.items()}  # as the running system sees them
        durable = dict(contents)
        synced = {id(data) for data in contents.values()}
        pending: list[tuple[str, str, bytearray | None]] = []
        for kind, name, *more in steps:
            if kind == "write":
                if name not in contents:
                    contents[name] = bytearray()
                    pending.append(("there", name, contents[name]))
                data = contents[name]
                data[more[0] : more[0] + len(more[1])] = more[1]
                synced.discard(id(data))
            elif kind == "sync" and name is not None:
                synced.add(id(contents[name]))
            elif kind == "sync":
                for change in pending:
                    apply(durable, *change)
                pending = []
            elif kind == "replace":
                contents[more[0]] = contents.pop(name)
                pending += [("gone", name, None), ("there", more[0], contents[more[0]])]
            else:
                contents.pop(name)
                pending.append(("gone", name, None))
        assert len(pending) < 10
        for happened in itertools.product((False, True), repeat=len(pending)):
            files = dict(durable)
            for change in itertools.compress(pending, happened):
                apply(files, *change)
            yield {
                name: bytes(data) if id(data) in synced else bytes(len(data)) for name, data in sorted(files.items())
            }


def apply(files: dict[str, bytearray], kind: str, name: str, data: bytearray | None) -> None:
    if kind == "gone":
        files.pop(name, None)
    else:
        assert data is not None
        files[name] = data


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "small"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(path)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root, and the right to mount a tmpfs")
    try:
        with locked(path) as folder:
            base = save(folder, 1, None, learners(1, "client_1", num_bytes=300_000))
            before = files_in(folder)
            for changed in ({"client_2": bytes(900_000)}, {f"client_{number}": bytes(9_000) for number in range(99)}):
                with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                    save(folder, 2, base, changed)
                assert files_in(folder) == before
            state = pack({"weights": torch.zeros(250_000)})
            files = folder.begin(2, base)
            files.add("client_2", b"abc")
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                files.commit(CONFIG, state)
            files.abort()
            assert files_in(folder) == before
            save(folder, 2, base, {"client_2": b"abc"})
            assert content(loaded(folder)) == (2, learners(1, "client_1", num_bytes=300_000) | {"client_2": b"abc"})
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_a_failed_add_can_be_made_again(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    files = folder.begin(1, None)
    files.add("client_1", b"one")
    with monkeypatch.context() as patch:
        fail_at(patch, 1, lasting=False)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            files.add("client_2", b"two")
    files.add("client_2", b"two")
    files.commit(CONFIG, pack(state_of(1)))
    assert content(loaded(folder)) == (1, {"client_1": b"one", "client_2": b"two"})


def test_a_file_system_that_cannot_sync_folders_has_checkpoints_too(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def fsync_files(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync_files)
    save(folder, 1, None, learners(1, "client_1"))
    assert content(loaded(folder)) == (1, learners(1, "client_1"))


# Memory.

PEAK = """
import os
from pathlib import Path
import torch
from torchfedrpc.federation.checkpoint_folder import CheckpointFolder
from torchfedrpc.wire.packing import pack

def peak_kib():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])

def save(folder, round_num, base, number, num_bytes):
    files = folder.begin(round_num, base)
    for client in range(number):
        files.add(f"client_{client}", os.urandom(num_bytes))
    return files.commit({"lr": 0.1}, pack({"weights": torch.ones(1000)}))

def use(path, num_bytes):
    folder, other = CheckpointFolder(path, num_kept=1), CheckpointFolder(path / "other")
    folder.lock()
    other.lock()
    first = save(folder, 1, None, 64, num_bytes)
    save(other, 2, first, 1, num_bytes)
    found = other.load()
    assert sum(len(data) for _, data in found.snapshots()) == 64 * num_bytes
    assert found.read_state()["weights"].sum() == 1000
    second = save(folder, 2, first, 50, num_bytes // 10)  # of the first so little is live that it is copied
    assert {entry.pack for entry in second.entries.values()} == {"round_000002.learners"}

use(Path(sys.argv[1]), 10_000)  # what is loaded and allocated once
before = peak_kib()
use(Path(sys.argv[2]), 4_000_000)
print(before, peak_kib())
"""


def test_the_learners_are_never_all_in_memory(tmp_path: Path) -> None:
    with closing(LightProcess(PEAK, tmp_path / "small", tmp_path / "large")) as process:
        before, after = map(int, process.line().split())
        assert process.ending() == 0
    assert after - before < 40 * 1024
