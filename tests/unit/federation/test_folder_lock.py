"""The lock of a checkpoint folder: one run has it, as long as its process lives."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from light import LightProcess, state_of
from saves import fail_at, locked

from torchfedrpc.errors import ConfigError
from torchfedrpc.federation.checkpoint_folder import CheckpointFolder


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[CheckpointFolder]:
    with locked(tmp_path / "run" / "checkpoints") as folder:
        yield folder


HOLDER = """
from pathlib import Path
from torchfedrpc.federation.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
try:
    lock.acquire()
except Exception as error:
    print(type(error).__name__, error, flush=True)
else:
    print("locked", lock.was_used, flush=True)
sys.stdin.readline()
lock.release()
print("released", flush=True)
sys.stdin.readline()
"""


def taken(folder: CheckpointFolder) -> bool:
    """Whether another process is refused."""
    with closing(LightProcess(HOLDER, folder.path)) as process:
        return process.line().startswith("ConfigError")


def test_a_second_run_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    with closing(LightProcess(HOLDER, tmp_path)) as holder:
        assert holder.line() == "locked False"
        for _ in range(2):  # a refused attempt does not take the lock away
            with pytest.raises(ConfigError) as raised:
                folder.lock()
            for text in (str(tmp_path), f"process {holder.pid} on {socket.gethostname()}", "folder of its own"):
                assert text in str(raised.value)
        holder.tell("release")
        assert holder.line() == "released"
        folder.lock()
        folder.unlock()


def test_the_name_of_an_earlier_holder_does_not_stay(tmp_path: Path, folder: CheckpointFolder) -> None:
    folder.unlock()
    (folder.path / "lock").write_bytes(b"process 1 on a machine with a very long name" * 3)
    folder.lock()
    with closing(LightProcess(HOLDER, folder.path)) as process:
        assert f"(process {os.getpid()} on {socket.gethostname()})" in process.line()


def test_a_crash_releases_the_lock(tmp_path: Path) -> None:
    with closing(LightProcess(HOLDER, tmp_path)) as holder:
        assert holder.line() == "locked False"
        holder.popen.send_signal(signal.SIGKILL)
        assert holder.ending() == -signal.SIGKILL
        with locked(tmp_path) as folder:
            assert folder.is_used


FORKED = """
import os
from pathlib import Path
from torchfedrpc.federation.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
lock.acquire()
if os.fork() == 0:
    print(os.getpid(), flush=True)
    sys.stdin.readline()
    lock.release()
    print("released", flush=True)
    sys.stdin.readline()
else:
    os.wait()
"""


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    with closing(LightProcess(FORKED, tmp_path)) as holder:
        child = int(holder.line())
        assert taken(CheckpointFolder(tmp_path))
        holder.popen.send_signal(signal.SIGKILL)
        holder.ending()
        with locked(tmp_path) as folder:
            assert state_of(child) not in "ZX"  # it lives, with the descriptor of the lock
            holder.tell("release")
            assert holder.line() == "released"
            assert taken(folder)  # what the child let go was not ours


def test_a_forked_child_that_lets_go_does_not_release_the_lock(tmp_path: Path) -> None:
    with closing(LightProcess(FORKED, tmp_path)) as holder:
        holder.line()
        holder.tell("release")
        assert holder.line() == "released"
        assert taken(CheckpointFolder(tmp_path))


def test_one_process_cannot_lock_a_folder_twice(tmp_path: Path, folder: CheckpointFolder) -> None:
    (tmp_path / "link").symlink_to(folder.path)
    for path in (folder.path, tmp_path / "link"):
        second = CheckpointFolder(path)
        with pytest.raises(ConfigError, match="in this process"):
            second.lock()
        second.unlock()
        assert taken(folder)
    folder.unlock()
    folder.unlock()
    assert not taken(folder)
    with locked(folder.path):
        pass


def test_whether_a_run_was_here_before_is_known(tmp_path: Path) -> None:
    for is_used in (False, True, True):
        with locked(tmp_path / "run") as folder:
            assert folder.is_used is is_used


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(ConfigError, match=re.escape(str(path))):
            CheckpointFolder(path).lock()


def test_a_lock_that_the_file_system_does_not_have_is_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lockf(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", lockf)
    with pytest.raises(ConfigError, match=f"{re.escape(str(tmp_path))} cannot be locked.*file system with locks"):
        CheckpointFolder(tmp_path).lock()


def test_a_folder_that_cannot_be_tidied_is_not_locked(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder.path / "round_000001.learners.tmp").write_bytes(b"half")
    folder.unlock()
    with monkeypatch.context() as patch:
        fail_at(patch, 1, lasting=False)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            folder.lock()
    assert not taken(folder)
