"""The checkpoints in a folder: what is kept of a run, in which space, and what is read after damage."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import random
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from saves import (
    CONFIG,
    content,
    content_in,
    flip,
    flip_blob,
    keys_in,
    learner,
    learners,
    loaded,
    locked,
    rounds_in,
    save,
    state_of,
)
from strangers import Stranger

import torchfedrpc as tfr
from torchfedrpc.errors import ConfigError, SerializationError, SnapshotError, UntrustedTypeError
from torchfedrpc.federation.checkpoint_store import CheckpointStore
from torchfedrpc.storage import BlobStore
from torchfedrpc.wire.packing import pack


@pytest.fixture
def store(tmp_path: Path) -> Iterator[CheckpointStore]:
    with locked(tmp_path / "run" / "checkpoints") as store:
        yield store


NAMES = ("client_1", "client_2", "client_3")
FIRST = (1, learners(1, *NAMES))
SECOND = (2, learners(2, *NAMES))


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with rounds 1 and 2, of which the second shares nothing with the first."""
    path = tmp_path / "two"
    with locked(path) as store:
        save(store, 2, save(store, 1, None, FIRST[1]), SECOND[1])
    return path


# What is kept.


def test_a_checkpoint_comes_back_as_it_was_given(store: CheckpointStore) -> None:
    layer = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    files = store.begin(7, None)
    files.add("client_1", b"one")
    files.add("../client 2\n", b"")
    files.add("client_1", b"one, once more")
    given = files.commit(CONFIG, pack({"layer": layer.state_dict(), "tied": [layer.weight, layer.weight[0]]}))
    for found in (given, loaded(store)):
        assert (found.round_num, found.config) == (7, CONFIG)
        assert dict(found.snapshots()) == {"client_1": b"one, once more", "../client 2\n": b""}
        state = found.read_state()
        assert torch.equal(state["layer"]["weight"], layer.weight)
        assert state["layer"]["weight"].dtype is torch.bfloat16
        assert state["tied"][0].data_ptr() == state["tied"][1].data_ptr()
        assert found.read_state()["tied"][0].data_ptr() != state["tied"][0].data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_state_on_a_gpu_comes_back_on_the_cpu(store: CheckpointStore) -> None:
    weights = torch.arange(100_000.0, device="cuda")
    store.begin(1, None).commit(CONFIG, pack({"weights": weights}))
    assert loaded(store).read_state()["weights"].tolist() == list(range(100_000))


def test_a_folder_without_checkpoints_has_none(tmp_path: Path, store: CheckpointStore) -> None:
    assert store.load() is None
    assert CheckpointStore(tmp_path / "nowhere").load() is None
    assert not (tmp_path / "nowhere").exists()


def test_a_run_without_learners_has_checkpoints_too(store: CheckpointStore) -> None:
    save(store, 2, save(store, 1))
    assert content(loaded(store)) == (2, {})


def test_a_parcel_can_be_opened_after_it_was_saved(store: CheckpointStore) -> None:
    state = pack(state_of(1))
    store.begin(1, None).commit(CONFIG, state)
    assert torch.equal(state.open(tfr.wire.allowlist.AllowList())["weights"], torch.ones(20))


def test_checkpoints_share_learners_that_have_not_changed(store: CheckpointStore) -> None:
    names = [f"client_{number}" for number in range(50)]
    base = save(store, 1, None, learners(1, *names))
    before = set(keys_in(store))
    changed = learners(2, "client_7", "client_50")
    found = save(store, 2, base, changed)
    digests = {hashlib.sha256(data).digest() for data in changed.values()}
    assert set(keys_in(store)) - before == {"round 2", found.state} | digests
    assert content(loaded(store)) == (2, learners(1, *names) | changed)


def test_equal_learners_are_stored_once(store: CheckpointStore) -> None:
    save(store, 1, None, dict.fromkeys(NAMES, b"as it was made"))
    assert len(keys_in(store)) == 3
    assert content(loaded(store)) == (1, dict.fromkeys(NAMES, b"as it was made"))


def test_the_newest_checkpoints_are_kept_and_nothing_else(store: CheckpointStore) -> None:
    base = None
    for round_num in range(1, 8):
        base = save(store, round_num, base, learners(round_num, "client_1", "client_2"))
        assert rounds_in(store) == list(range(max(1, round_num - 2), round_num + 1))
        assert len(keys_in(store)) == 4 * min(round_num, 3)


def test_a_snapshot_stays_while_a_kept_checkpoint_needs_it(store: CheckpointStore) -> None:
    base = save(store, 1, None, learners(1, "still", "moving"))
    for round_num in range(2, 9):
        base = save(store, round_num, base, learners(round_num, "moving"))
        assert content(loaded(store)) == (round_num, learners(1, "still") | learners(round_num, "moving"))
    store.unlock()
    for round_num in (8, 7):
        flip_blob(store.path, learner("moving", round_num))
    assert content_in(store.folder) == (6, learners(1, "still") | learners(6, "moving"))


def test_rounds_are_ordered_by_number(store: CheckpointStore) -> None:
    base = save(store, 999_999, None, learners(1, "client_1"))
    save(store, 1_000_000, base, learners(2, "client_1"))
    assert content(loaded(store)) == (1_000_000, learners(2, "client_1"))


def test_random_states_are_loaded_as_they_were_saved(tmp_path: Path) -> None:
    choose = random.Random(5)
    for number in range(6):
        with locked(tmp_path / str(number), num_kept=choose.randint(1, 3)) as store:
            base: Any = None
            expected: dict[str, Any] = {}
            for round_num in range(1, 25):
                names = [f"client_{choose.randrange(6)}" for _ in range(choose.randrange(4))]
                changed = {name: learner(name, round_num, choose.choice([0, 1, 300, 50_000])) for name in names}
                base = save(store, round_num, base, changed)
                expected = expected | changed
                if choose.random() < 0.3:
                    base = loaded(store)
                assert content(base) == (round_num, expected)
        assert content_in(tmp_path / str(number)) == (24, expected)


def test_the_file_stays_bounded_however_long_a_run_lasts(tmp_path: Path) -> None:
    names, num_bytes = [f"client_{number}" for number in range(20)], 20_000
    choose = random.Random(1)
    with locked(tmp_path, num_kept=2) as store:
        base = save(store, 0, None, learners(0, *names, num_bytes=num_bytes))
        for round_num in range(1, 60):
            base = save(store, round_num, base, learners(round_num, *choose.sample(names, 5), num_bytes=num_bytes))
            assert store.path.stat().st_size <= (20 + 2 * 5) * num_bytes * 1.3
        assert len(os.listdir(tmp_path)) == 3


# Another folder, and a new beginning.


def test_a_base_in_another_folder_is_copied(tmp_path: Path, store: CheckpointStore) -> None:
    with locked(tmp_path / "other") as other:
        save(other, 4, save(other, 3, None, learners(3, "client_1", "client_2")), learners(4, "client_2", "client_3"))
        before = other.path.read_bytes()
        base = save(store, 5, loaded(other), learners(5, "client_3"))
        base = save(store, 6, base, learners(6, "client_4"))
        assert other.path.read_bytes() == before
    shutil.rmtree(tmp_path / "other")
    expected = learners(3, "client_1") | learners(4, "client_2") | learners(5, "client_3") | learners(6, "client_4")
    assert content(loaded(store)) == (6, expected)


def test_a_run_that_begins_anew_sets_the_checkpoints_aside(store: CheckpointStore) -> None:
    assert store.set_aside() is None
    save(store, 2, save(store, 1, None, learners(1, "client_1")), learners(2, "client_2"))
    (store.folder / "notes.txt").write_bytes(b"a user's")
    expected = content(loaded(store))
    store.unlock()
    store.lock()
    aside = store.set_aside()
    assert aside == store.folder / "earlier_1"
    assert content_in(aside) == expected
    assert (store.folder / "notes.txt").exists()
    assert store.load() is None
    save(store, 1, None, learners(5, "client_3"))
    assert content(loaded(store)) == (1, learners(5, "client_3"))
    store.unlock()
    store.lock()
    assert store.set_aside() == store.folder / "earlier_2"


def test_damaged_checkpoints_can_be_set_aside(two: Path) -> None:
    (two / "checkpoints.sqlite").write_bytes(b"torn")
    with locked(two) as store:
        assert store.set_aside() == two / "earlier_1"
        save(store, 1, None, FIRST[1])
    assert content_in(two) == FIRST


def test_a_run_without_base_drops_the_checkpoints_of_another(two: Path) -> None:
    with locked(two) as store:
        loaded(store)
        save(store, 1, None, learners(7, "client_1"))
        assert rounds_in(store) == [1]
    assert content_in(two) == (1, learners(7, "client_1"))


# What was begun.


def test_an_unfinished_file_is_removed(two: Path) -> None:
    for name in ("checkpoints.sqlite.tmp", "checkpoints.sqlite.tmp-journal"):
        (two / name).write_bytes(b"half")
    assert content_in(two) == SECOND
    assert sorted(path.name for path in two.iterdir()) == ["checkpoints.sqlite", "lock", "lock.owner"]


@pytest.mark.parametrize("with_base", [True, False])
def test_an_aborted_save_leaves_nothing(two: Path, with_base: bool) -> None:
    with locked(two) as store:
        base = loaded(store)
        before = set(keys_in(store))
        for added in ({}, {"client_1": b"abc"}):
            files = store.begin(3, base if with_base else None)
            for client_id, data in added.items():
                files.add(client_id, data)
            files.abort()
            files.abort()
            assert set(keys_in(store)) == before
        assert content(loaded(store)) == SECOND
    assert len(list(two.iterdir())) == 3


def test_a_committed_save_is_not_aborted(two: Path) -> None:
    with locked(two) as store:
        files = store.begin(3, loaded(store))
        files.add("client_1", b"abc")
        files.commit(CONFIG, pack(state_of(3)))
        files.abort()
        assert content(loaded(store)) == (3, SECOND[1] | {"client_1": b"abc"})


# Damage.


def test_a_changed_bit_anywhere_gives_a_whole_checkpoint_or_an_error(
    two: Path, caplog: pytest.LogCaptureFixture
) -> None:
    choose, path = random.Random(2), two / "checkpoints.sqlite"
    good = path.read_bytes()
    used = [position for position, byte in enumerate(good) if byte]
    outcomes = {"unchanged": 0, "older": 0}
    errors = []
    for position in [*range(100), *choose.sample(used, 150), *choose.sample(range(len(good)), 50)]:
        path.write_bytes(good)
        flip(path, position, choose.randrange(8))
        caplog.clear()
        with locked(two) as store:
            try:
                base = loaded(store)
            except SnapshotError as error:
                errors.append(str(error))
                continue
            found = content(base)
            assert found in (FIRST, SECOND)
            outcomes["unchanged" if found == SECOND else "older"] += 1
            assert ("round 1 is used" in caplog.text) == (found == FIRST)
            changed = learners(3, "client_1")
            save(store, 3, base, changed)
            assert content(loaded(store)) == (3, found[1] | changed)
        assert content_in(two) == (3, found[1] | changed)
    assert all("resume=never" in error for error in errors)
    assert min(len(errors), *outcomes.values()) >= 10


@pytest.mark.parametrize("num_bytes", [512, 4096])
def test_a_torn_sector_anywhere_gives_a_whole_checkpoint_or_an_error(two: Path, num_bytes: int) -> None:
    path = two / "checkpoints.sqlite"
    good = path.read_bytes()
    for start in range(0, len(good), num_bytes):
        path.write_bytes(good[:start] + bytes(num_bytes) + good[start + num_bytes :])
        with contextlib.suppress(SnapshotError):
            assert content_in(two) in (FIRST, SECOND)


def test_a_file_that_is_cut_short_is_noticed(two: Path) -> None:
    path = two / "checkpoints.sqlite"
    good = path.read_bytes()
    for num_bytes in [*range(0, len(good), 1777), len(good) - 1]:
        path.write_bytes(good[:num_bytes])
        with contextlib.suppress(SnapshotError), locked(two) as store:
            found = loaded(store)
            assert found.is_in_damaged_file
            assert content(found) in (FIRST, SECOND)
    path.write_bytes(b"")
    with pytest.raises(SnapshotError, match=r"no store of torchfedrpc.*resume=never"):
        content_in(two)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(two: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = two / "checkpoints.sqlite"
    flip_blob(path, SECOND[1]["client_2"])
    with locked(two) as store:
        base = loaded(store)
        assert content(base) == FIRST
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert f"{path} is damaged, and round 1 is used: the snapshot of 'client_2' is damaged" in record.getMessage()
        inode = path.stat().st_ino
        base = save(store, 2, base, learners(22, "client_2"))  # into a new file, without the damage
        assert path.stat().st_ino != inode
        save(store, 3, base, learners(33, "client_3"))
        assert rounds_in(store) == [2, 3]
    caplog.clear()
    assert content_in(two) == (3, FIRST[1] | learners(22, "client_2") | learners(33, "client_3"))
    assert not caplog.records


def test_a_shared_snapshot_that_is_damaged_is_an_error(store: CheckpointStore) -> None:
    save(store, 2, save(store, 1, None, learners(1, "client_1", "client_2")), learners(2, "client_2"))
    flip_blob(store.path, learner("client_1", 1))
    store.unlock()
    with pytest.raises(SnapshotError, match=r"the snapshot of 'client_1' is damaged.*backup.*resume=never"):
        store.load()
    store.unlock()


def test_checkpoint_of_another_format_is_refused(two: Path) -> None:
    with contextlib.closing(sqlite3.connect(two / "checkpoints.sqlite")) as connection:
        connection.execute("PRAGMA user_version = 9")
    with pytest.raises(SnapshotError, match=r"has format 9 and .* reads format 1: use the version that wrote it"):
        content_in(two)


def test_database_of_another_program_is_refused(two: Path) -> None:
    (two / "checkpoints.sqlite").unlink()
    with contextlib.closing(sqlite3.connect(two / "checkpoints.sqlite")) as connection:
        connection.execute("CREATE TABLE notes (text)")
    with pytest.raises(SnapshotError, match="no store of torchfedrpc"):
        content_in(two)


def test_a_bad_disk_has_the_checkpoint_before(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    get, bad = BlobStore.get, hashlib.sha256(SECOND[1]["client_2"]).digest()
    code = errno.EIO

    def get_or_fail(self: BlobStore, key: str | bytes) -> bytes:
        if key == bad:
            raise OSError(code, os.strerror(code))
        return get(self, key)

    monkeypatch.setattr(BlobStore, "get", get_or_fail)
    assert content_in(two) == FIRST
    code = errno.EAGAIN  # it says nothing about the file
    with pytest.raises(OSError, match=os.strerror(errno.EAGAIN)):
        content_in(two)


def test_damage_after_the_file_was_verified_is_an_error(two: Path) -> None:
    with locked(two) as store:
        found = loaded(store)
        snapshots = found.snapshots()
        assert next(snapshots) == ("client_1", SECOND[1]["client_1"])
        with contextlib.closing(sqlite3.connect(store.path)) as connection:
            connection.execute("UPDATE chunks SET data = ? WHERE data = ?", (b"abc", SECOND[1]["client_2"]))
            connection.execute("DELETE FROM chunks WHERE key = ?", (found.state,))
            connection.commit()
        with pytest.raises(SnapshotError, match="the snapshot of 'client_2' is damaged"):
            next(snapshots)
        with pytest.raises(SnapshotError, match="the trainer's state is damaged or missing"):
            found.read_state()


def test_damage_in_a_running_run_is_left_behind_with_a_new_file(two: Path) -> None:
    with locked(two) as store:
        base = loaded(store)
        with contextlib.closing(sqlite3.connect(store.path)) as connection:
            connection.execute("DELETE FROM chunks WHERE key = 'round 1'")
            connection.execute("INSERT INTO chunks VALUES ('round 1', 0, x'00')")
            connection.commit()
        base = save(store, 3, base, learners(3, "client_1"))  # the older head cannot be read
        assert base.is_in_damaged_file
        inode = store.path.stat().st_ino
        base = save(store, 4, base, learners(4, "client_2"))
        assert store.path.stat().st_ino != inode
    assert content_in(two) == (4, SECOND[1] | learners(3, "client_1") | learners(4, "client_2"))


def test_a_damaged_base_in_another_folder_is_not_copied(tmp_path: Path, two: Path, store: CheckpointStore) -> None:
    with locked(two) as other:
        base = loaded(other)
        with contextlib.closing(sqlite3.connect(other.path)) as connection:
            connection.execute("UPDATE chunks SET data = ? WHERE data = ?", (b"abc", SECOND[1]["client_2"]))
            connection.commit()
        with pytest.raises(SnapshotError, match="the snapshot of 'client_2' is damaged"):
            save(store, 3, base, learners(3, "client_1"))
    assert not store.path.exists()
    assert sorted(path.name for path in store.folder.iterdir()) == ["lock", "lock.owner"]


# Trust.


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def forge(store: CheckpointStore, **changes: Any) -> None:
    """A head with a checksum that is right, and fields that need not be."""
    found = save(store, 1, None, {"client_1": b"abc"})
    fields = {name: getattr(found, name) for name in ("round_num", "config", "digests", "state")} | changes
    body = tfr.ParameterSerializer.serialize(fields)
    store.blobs.put("round 1", [hashlib.sha256(body).digest(), body])


def test_the_forged_heads_of_these_tests_are_well_formed(store: CheckpointStore) -> None:
    forge(store)
    assert content(loaded(store)) == (1, {"client_1": b"abc"})


def test_a_head_that_would_run_something_does_not(tmp_path: Path, store: CheckpointStore) -> None:
    marker = tmp_path / "marker"
    forge(store, config={"lr": Evil(marker)})
    with pytest.raises(UntrustedTypeError, match="system"):
        store.load()
    store.begin(1, None).commit(CONFIG, pack({"model": Evil(marker)}))
    found = loaded(store)
    with pytest.raises(UntrustedTypeError, match="system"):
        found.read_state(["torch", __name__])
    assert not marker.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"digests": {"client_1": hashlib.sha256(b"abd").digest()}},
        {"digests": {"client_1": b""}},
        {"digests": {"client_1": "round 1"}},
        {"digests": {1: hashlib.sha256(b"abc").digest()}},
        {"digests": [hashlib.sha256(b"abc").digest()]},
        {"state": b"round 1"},
        {"state": None},
        {"round_num": 2},
        {"round_num": "1"},
        {"config": [1]},
    ],
    ids=str,
)
def test_a_head_that_lies_is_refused(store: CheckpointStore, changes: dict[str, Any]) -> None:
    forge(store, **changes)
    with pytest.raises(SnapshotError, match=r"the head of round 1 holds something else|is damaged or missing"):
        store.load()


def test_users_types_need_their_package_named(store: CheckpointStore) -> None:
    store.begin(1, None).commit(CONFIG, pack({"sampler": Stranger()}))
    found = loaded(store)
    with pytest.raises(UntrustedTypeError, match=r"trusted_modules=\[strangers\]"):
        found.read_state()
    assert type(found.read_state(["strangers"])["sampler"]) is Stranger


def test_a_configuration_that_could_not_be_read_is_refused_at_once(store: CheckpointStore) -> None:
    base = save(store, 1)
    before = set(keys_in(store))
    for value, error in ((Stranger(), UntrustedTypeError), (lambda: 0, SerializationError)):
        files = store.begin(2, base)
        files.add("client_1", b"abc")
        with pytest.raises(error):
            files.commit({"value": value}, pack(state_of(2)))
        files.abort()
        assert set(keys_in(store)) == before


# The folder belongs to one run.


def test_a_second_run_is_refused(tmp_path: Path, store: CheckpointStore) -> None:
    (tmp_path / "link").symlink_to(store.folder)
    for path in (store.folder, tmp_path / "link"):
        second = CheckpointStore(path)
        with pytest.raises(ConfigError, match=rf"belong to a run that goes on \(process {os.getpid()} on .*own"):
            second.lock()
        second.unlock()
    store.unlock()
    with locked(store.folder):
        pass


def test_an_earlier_run_in_the_folder_is_known(tmp_path: Path) -> None:
    for is_used in (False, True, True):
        with locked(tmp_path / "run") as store:
            assert store.is_used is is_used


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(ConfigError, match=f"{path} cannot hold checkpoints.*name another folder"):
            CheckpointStore(path).lock()


def test_a_folder_that_cannot_be_tidied_is_not_locked(store: CheckpointStore) -> None:
    store.unlock()
    (store.folder / "checkpoints.sqlite.tmp").mkdir()
    with pytest.raises(ConfigError, match="cannot hold checkpoints"):
        store.lock()
    (store.folder / "checkpoints.sqlite.tmp").rmdir()
    with locked(store.folder):
        pass
