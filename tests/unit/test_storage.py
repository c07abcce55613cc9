"""The store of blobs and the file lock."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from disk_faults import failing_at, has_hooks
from hypothesis import given
from hypothesis import strategies as st
from processes import LightProcess, state_of

from torchfedrpc.errors import SnapshotError
from torchfedrpc.storage import _CHUNK_BYTES, _PAGE_BYTES, BlobStore, FileLock


@pytest.fixture(params=["named", "temporary"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BlobStore]:
    with closing(BlobStore(tmp_path / "store" if request.param == "named" else None)) as store:
        yield store


@pytest.fixture
def temporary() -> Iterator[BlobStore]:
    with closing(BlobStore()) as store:
        yield store


def file_bytes() -> int:
    """The size of the one unnamed temporary file of this process."""
    entries = [entry for entry in Path("/proc/self/fd").iterdir() if os.path.exists(entry)]
    sizes = [entry.stat().st_size for entry in entries if "etilqs_" in os.readlink(entry)]
    assert len(sizes) == 1
    return sizes[0]


def value(number: int, num_bytes: int) -> bytes:
    return (bytes((number + index) % 251 for index in range(min(num_bytes, 251))) * (num_bytes // 251 + 1))[
        :num_bytes
    ]


# Blobs.


@pytest.mark.parametrize("num_bytes", [0, 1, _PAGE_BYTES, _CHUNK_BYTES - 1, _CHUNK_BYTES, 3 * _CHUNK_BYTES + 7])
def test_a_blob_comes_back_as_it_was_put(store: BlobStore, num_bytes: int) -> None:
    store.put("other", [b"beside it"])
    store.put("client_1", [value(1, num_bytes)])
    assert store.get("client_1") == value(1, num_bytes)
    assert store.get("other") == b"beside it"


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_a_blob_can_be_put_in_pieces_of_any_kind(store: BlobStore, kind: type) -> None:
    store.put(b"\x00\xff", iter([kind(b"ab"), b"", kind(b"c")]))
    assert store.get(b"\x00\xff") == b"abc"


def test_a_missing_key_is_a_key_error(store: BlobStore) -> None:
    with pytest.raises(KeyError, match="client_1"):
        store.get("client_1")
    store.put("client_1", [b"abc"])
    store.discard("client_1")
    store.discard("client_1")
    with pytest.raises(KeyError, match="client_1"):
        store.get("client_1")


def test_the_temporary_file_does_not_grow_while_blobs_are_replaced(temporary: BlobStore) -> None:
    for number in range(30):
        temporary.put("client_1", [value(number, 1_000_000)])
        temporary.put("client_2", [value(number, 3_000_000)])
    assert file_bytes() <= 1.1 * (4_000_000 + 3_000_000)


def test_the_temporary_file_has_no_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with closing(BlobStore()) as store:
        store.put("client_1", [bytes(10_000_000)])
        assert file_bytes() > 5_000_000
        assert not os.listdir(tmp_path)


def test_a_full_disk_leaves_the_present_blob(store: BlobStore) -> None:
    store.put("client_1", [value(1, 20_000)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6_000_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"disk I/O error|full"):
            store.put("client_1", [value(1, 20_000_000)])
        assert store.get("client_1") == value(1, 20_000)
        store.put("client_1", [value(2, 2_000_000)])  # the pages of the failed one are free again
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert store.get("client_1") == value(2, 2_000_000)


@pytest.mark.skipif(not has_hooks(), reason="SQLite is built into Python without its symbols")
def test_an_error_at_any_step_of_a_put_leaves_the_old_blob_or_the_new_one(tmp_path: Path) -> None:
    with closing(BlobStore(tmp_path / "store")) as store:
        present, number, steps = b"", 0, [1]
        store.put("key", [present])
        while steps[0] >= number:
            number += 1
            after = value(number, 100_000)
            with failing_at(number) as steps, contextlib.suppress(OSError):
                store.put("key", [after])
                present = after
            assert store.get("key") == present
    assert number > 10


def test_a_transaction_is_undone_as_a_whole(store: BlobStore) -> None:
    store.put("before", [b"abc"])
    store.begin()
    store.put("one", [b"1"])
    store.discard("before")
    store.rollback()
    store.rollback()
    assert list(store) == ["before"]
    store.begin()
    store.put("one", [b"1"])
    store.discard("before")
    store.commit()
    assert list(store) == ["one"]


def test_a_closed_store_takes_and_gives_nothing(store: BlobStore) -> None:
    store.put("client_1", [b"abc"])
    store.close()
    store.close()
    with pytest.raises(ValueError, match="is closed"):
        store.get("client_1")
    with pytest.raises(ValueError, match="is closed"):
        store.put("client_1", [b"abc"])


def test_threads_do_not_get_into_each_others_blobs(store: BlobStore) -> None:
    wrong: list[int] = []

    def use(number: int) -> None:
        for turn in range(30):
            data = value(number + turn, _PAGE_BYTES * (turn % 3) + number)
            store.put(str(number), [data])
            if store.get(str(number)) != data:
                wrong.append(number)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@given(
    st.lists(
        st.tuples(st.sampled_from(["put", "discard"]), st.integers(0, 4), st.integers(0, 3 * _PAGE_BYTES)),
        max_size=12,
    )
)
def test_a_store_is_a_dict_of_bytes(actions: list[tuple[str, int, int]]) -> None:
    expected: dict[str, bytes] = {}
    with closing(BlobStore()) as store:
        for action, number, num_bytes in actions:
            if action == "put":
                expected[str(number)] = value(number, num_bytes)
                store.put(str(number), [expected[str(number)]])
            else:
                expected.pop(str(number), None)
                store.discard(str(number))
            assert {key: store.get(str(key)) for key in store} == expected


def test_a_named_store_is_synced_at_each_commit(tmp_path: Path) -> None:
    with closing(BlobStore(tmp_path / "store")) as store:
        assert store._execute("PRAGMA synchronous") == [(2,)]  # FULL
        assert store._execute("PRAGMA journal_mode") == [("delete",)]


def test_a_named_store_is_found_again(tmp_path: Path) -> None:
    for number in range(3):
        with closing(BlobStore(tmp_path / "store")) as store:
            assert len(list(store)) == number
            store.put(str(number), [b"abc"])
            store.check()


def test_damage_is_an_error_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with closing(BlobStore(path)) as store:
        store.put("key", [bytes(1_000_000)])
    good = path.read_bytes()
    path.write_bytes(good[:_PAGE_BYTES] + b"\xaa" * (len(good) - _PAGE_BYTES))
    with closing(BlobStore(path)) as store:
        with pytest.raises(SnapshotError, match=f"{path} is damaged"):
            store.check()
        with pytest.raises(SnapshotError, match=f"{path} is damaged"):
            store.get("key")
    path.write_bytes(b"\xaa" * len(good))
    with pytest.raises(SnapshotError, match=f"{path} is damaged"):
        BlobStore(path)


def test_a_row_of_another_type_is_damage(tmp_path: Path) -> None:
    with closing(BlobStore(tmp_path / "store")) as store:
        with closing(sqlite3.connect(tmp_path / "store")) as connection:
            connection.execute("INSERT INTO chunks VALUES ('key', 0, 'text')")
            connection.commit()
        with pytest.raises(SnapshotError, match="a blob of another type"):
            store.get("key")


@pytest.mark.parametrize("kind", [BlobStore, FileLock])
def test_a_link_is_refused(tmp_path: Path, kind: type) -> None:
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="it is a link"):
        kind(tmp_path / "link")
    assert (tmp_path / "target").read_bytes() == b"precious"


def test_a_journal_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"precious")
    with closing(BlobStore(tmp_path / "store")) as store:
        (tmp_path / "store-journal").symlink_to(tmp_path / "target")
        with contextlib.suppress(OSError):
            store.put("key", [b"abc"])
    assert (tmp_path / "target").read_bytes() == b"precious"


# The file lock.

HOLDER = """
from pathlib import Path
from torchfedrpc.storage import FileLock
try:
    lock = FileLock(Path(sys.argv[1]))
except BlockingIOError as error:
    print("taken by", error.strerror, flush=True)
else:
    print("locked", flush=True)
    sys.stdin.readline()
    lock.release()
    print("released", flush=True)
sys.stdin.readline()
"""


def is_taken(path: Path) -> bool:
    """Whether another process is refused."""
    with closing(LightProcess(HOLDER, path)) as process:
        return process.line().startswith("taken by")


def test_a_lock_excludes_others_until_it_is_released(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with closing(LightProcess(HOLDER, path)) as holder:
        assert holder.line() == "locked"
        for _ in range(2):  # a refused attempt does not take the lock away
            with pytest.raises(BlockingIOError, match=rf"process {holder.pid} on {socket.gethostname()}"):
                FileLock(path)
        holder.tell("release")
        assert holder.line() == "released"
        lock = FileLock(path)
        assert not lock.is_new
        assert is_taken(path)
        lock.release()
        lock.release()
    assert path.stat().st_size == 0
    assert sorted(os.listdir(tmp_path)) == ["lock", "lock.owner"]


def test_a_killed_process_releases_its_lock(tmp_path: Path) -> None:
    with closing(LightProcess(HOLDER, tmp_path / "lock")) as holder:
        assert holder.line() == "locked"
        holder.popen.send_signal(signal.SIGKILL)
        assert holder.ending() == -signal.SIGKILL
        FileLock(tmp_path / "lock").release()


def test_one_process_cannot_take_a_lock_twice(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    lock = FileLock(tmp_path / "lock")
    assert lock.is_new
    for path in (tmp_path / "lock", tmp_path / "link" / "lock"):
        with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on"):
            FileLock(path)
        assert is_taken(path)
    lock.release()
    assert not is_taken(tmp_path / "lock")


FORKED = """
import os
from pathlib import Path
from torchfedrpc.storage import FileLock
lock = FileLock(Path(sys.argv[1]))
if os.fork() == 0:
    print(os.getpid(), flush=True)
    sys.stdin.readline()
    lock.release()
    print("released", flush=True)
    sys.stdin.readline()
    os._exit(0)
else:
    os.wait()
"""


def test_a_forked_child_does_not_keep_a_lock(tmp_path: Path) -> None:
    with closing(LightProcess(FORKED, tmp_path / "lock")) as holder:
        child = int(holder.line())
        assert is_taken(tmp_path / "lock")
        holder.popen.send_signal(signal.SIGKILL)
        holder.ending()
        lock = FileLock(tmp_path / "lock")
        assert state_of(child) not in "ZX"  # it lives, with the descriptor of the lock
        holder.tell("release")
        assert holder.line() == "released"
        assert is_taken(tmp_path / "lock")  # the child has released nothing
        lock.release()


def test_a_forked_child_does_not_release_a_lock(tmp_path: Path) -> None:
    with closing(LightProcess(FORKED, tmp_path / "lock")) as holder:
        holder.line()
        holder.tell("release")
        assert holder.line() == "released"
        assert is_taken(tmp_path / "lock")


def test_a_forked_child_does_not_end_its_parents_transaction(tmp_path: Path) -> None:
    with closing(BlobStore(tmp_path / "store")) as store:
        store.begin()
        store.put("key", [bytes(8_000_000)])  # more than the cache: the journal is on disk
        if (pid := os.fork()) == 0:
            store.close()
            os._exit(0)
        os.waitpid(pid, 0)
        store.commit()
    with closing(BlobStore(tmp_path / "store")) as store:
        store.check()
        assert store.get("key") == bytes(8_000_000)
