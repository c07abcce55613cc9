"""The folder of checkpoints: what is kept of a run, in which room, and what is read after damage."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from saves import (
    CONFIG,
    NUM_BYTES,
    content,
    files_in,
    flip,
    kinds,
    learner,
    learners,
    loaded,
    locked,
    save,
    state_of,
)
from strangers import Stranger

import torchfedrpc as tfr
from torchfedrpc.errors import ConfigError, SerializationError, SnapshotError, UntrustedTypeError
from torchfedrpc.federation.checkpoint_folder import CheckpointFolder
from torchfedrpc.wire.packing import pack


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[CheckpointFolder]:
    with locked(tmp_path / "run" / "checkpoints") as folder:
        yield folder


@pytest.fixture
def two(folder: CheckpointFolder) -> CheckpointFolder:
    """Rounds 1 and 2, of which the second needs nothing of the first's pack."""
    names = ("client_1", "client_2", "client_3")
    save(folder, 2, save(folder, 1, None, learners(1, *names)), learners(2, *names))
    return folder


FIRST = (1, learners(1, "client_1", "client_2", "client_3"))
SECOND = (2, learners(2, "client_1", "client_2", "client_3"))


# What is kept.


def test_a_checkpoint_comes_back_as_it_was_given(folder: CheckpointFolder) -> None:
    layer = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    files = folder.begin(7, None)
    files.add("client_1", b"one")
    files.add("../client 2\n", b"")
    files.add("client_1", b"one, once more")
    given = files.commit(CONFIG, pack({"layer": layer.state_dict(), "tied": [layer.weight, layer.weight[0]]}))
    for found in (given, loaded(folder), loaded(CheckpointFolder(folder.path))):
        assert (found.round_num, found.config) == (7, CONFIG)
        assert found.client_ids == ["client_1", "../client 2\n"]
        assert dict(found.snapshots()) == {"client_1": b"one, once more", "../client 2\n": b""}
        state = found.read_state()
        assert torch.equal(state["layer"]["weight"], layer.weight)
        assert state["layer"]["weight"].dtype is torch.bfloat16
        assert state["tied"][0].data_ptr() == state["tied"][1].data_ptr()
        assert found.read_state()["tied"][0].data_ptr() != state["tied"][0].data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_state_on_a_gpu_comes_back_on_the_cpu(folder: CheckpointFolder) -> None:
    weights = torch.arange(100_000.0, device="cuda")
    folder.begin(1, None).commit(CONFIG, pack({"weights": weights}))
    assert loaded(folder).read_state()["weights"].tolist() == list(range(100_000))


def test_a_folder_without_checkpoints_has_none(tmp_path: Path, folder: CheckpointFolder) -> None:
    assert folder.load() is None
    assert CheckpointFolder(tmp_path / "nowhere").load() is None
    assert not (tmp_path / "nowhere").exists()


def test_a_run_without_learners_has_checkpoints_too(folder: CheckpointFolder) -> None:
    save(folder, 2, save(folder, 1))
    assert content(loaded(folder)) == (2, {})
    assert kinds(folder) == (["round_000001.checkpoint", "round_000002.checkpoint"], [], [])


def test_a_parcel_can_be_opened_after_it_was_saved(folder: CheckpointFolder) -> None:
    state = pack(state_of(1))
    folder.begin(1, None).commit(CONFIG, state)
    assert torch.equal(state.open(tfr.wire.allowlist.AllowList())["weights"], torch.ones(20))


def test_only_changed_learners_are_written(folder: CheckpointFolder) -> None:
    names = [f"client_{number}" for number in range(50)]
    base = save(folder, 1, None, learners(1, *names))
    first = folder.path / "round_000001.learners"
    before = first.stat()
    save(folder, 2, base, learners(2, "client_7", "client_50"))
    assert (folder.path / "round_000002.learners").read_bytes() == b"".join(
        learners(2, "client_7", "client_50").values()
    )
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    expected = learners(1, *names) | learners(2, "client_7", "client_50")
    assert content(loaded(folder)) == (2, expected)


def test_the_last_few_are_kept_and_packs_go_with_their_heads(folder: CheckpointFolder) -> None:
    base = None
    for round_num in range(1, 8):
        base = save(folder, round_num, base, learners(round_num, "client_1", "client_2"))
        rounds = range(max(1, round_num - 2), round_num + 1)
        assert kinds(folder) == (
            [f"round_{number:06d}.checkpoint" for number in rounds],
            [f"round_{number:06d}.learners" for number in rounds],
            [],
        )


def test_a_pack_stays_while_a_kept_checkpoint_needs_it(folder: CheckpointFolder) -> None:
    base = save(folder, 1, None, learners(1, "still", "moving"))
    for round_num in range(2, 9):
        base = save(folder, round_num, base, learners(round_num, "moving"))
        assert content(loaded(folder)) == (round_num, learners(1, "still") | learners(round_num, "moving"))
    damage_newest(folder, 2)
    assert content(loaded(folder)) == (6, learners(1, "still") | learners(6, "moving"))


def damage_newest(folder: CheckpointFolder, count: int) -> None:
    for name in kinds(folder)[0][-count:]:
        flip(folder.path / name, 100)


def test_rounds_are_ordered_by_number_and_not_by_name(folder: CheckpointFolder) -> None:
    for base in (None, save(folder, 999_999, None, learners(1, "client_1"))):
        save(folder, 1_000_000 if base else 999_998, base, learners(2, "client_1"))
    assert content(loaded(folder)) == (1_000_000, learners(2, "client_1"))


@pytest.mark.parametrize("num_kept", [0, -1])
def test_keeping_none_is_refused(tmp_path: Path, num_kept: int) -> None:
    with pytest.raises(ConfigError, match=rf"{num_kept} checkpoints"):
        CheckpointFolder(tmp_path, num_kept=num_kept)


# Room on the disk.


def test_the_folder_stays_bounded_however_long_a_run_lasts(tmp_path: Path) -> None:
    names = [f"client_{number}" for number in range(40)]
    choose, num_live, num_added, num_written = random.Random(1), 40 * NUM_BYTES, 0, 0
    with locked(tmp_path, num_kept=2) as folder:
        expected = learners(0, *names)
        base = save(folder, 0, None, expected)
        for round_num in range(1, 300):
            changed = learners(round_num, *choose.sample(names, choose.choice([1, 1, 5])))
            expected = expected | changed
            base = save(folder, round_num, base, changed)
            num_added += sum(map(len, changed.values()))
            new_pack = folder.path / f"round_{round_num:06d}.learners"
            num_written += new_pack.stat().st_size
            needed = {entry.pack for entry in base.entries.values()}
            assert sum((folder.path / name).stat().st_size for name in needed) <= 2 * num_live
            assert sum((folder.path / name).stat().st_size for name in kinds(folder)[1]) <= 4 * num_live
            if round_num % 30 == 0:
                assert content(loaded(folder)) == (round_num, expected)
    assert num_written <= 2 * num_added


def test_one_learner_that_rests_does_not_keep_a_large_pack(folder: CheckpointFolder) -> None:
    names = [f"client_{number}" for number in range(20)]
    base = save(folder, 1, None, learners(1, *names, num_bytes=10_000) | learners(1, "resting"))
    for round_num in range(2, 6):
        base = save(folder, round_num, base, learners(round_num, *names, num_bytes=400))
    assert "round_000001.learners" not in kinds(folder)[1]
    expected = learners(1, "resting") | learners(5, *names, num_bytes=400)
    assert content(loaded(folder)) == (5, expected)


def test_whatever_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    choose = random.Random(5)
    for number in range(12):
        with locked(tmp_path / str(number), num_kept=choose.randint(1, 3)) as folder:
            base, expected = None, {}
            for round_num in range(1, 25):
                names = [f"client_{choose.randrange(6)}" for _ in range(choose.randrange(4))]
                changed = {name: learner(name, round_num, choose.choice([0, 1, 300, 5000])) for name in names}
                base = save(folder, round_num, base, changed)
                expected = expected | changed
                if choose.random() < 0.3:
                    base = loaded(folder)
                assert content(loaded(folder)) == content(base) == (round_num, expected)


def test_many_small_writes_make_the_same_files(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, position: write(descriptor, data[:100], position))
    save(folder, 1, None, learners(1, "client_1", "client_2"))
    assert content(loaded(folder)) == (1, learners(1, "client_1", "client_2"))


# Another folder, and a new beginning.


def test_a_base_in_another_folder_is_copied(tmp_path: Path, folder: CheckpointFolder) -> None:
    with locked(tmp_path / "other") as other:
        middle = save(other, 3, None, learners(3, "client_1", "client_2"))
        save(other, 4, middle, learners(4, "client_2", "client_3"))
        base = save(folder, 5, loaded(other), learners(5, "client_3"))
        before = files_in(other)
        base = save(folder, 6, base, learners(6, "client_4"))
        assert files_in(other) == before
    shutil.rmtree(tmp_path / "other")
    expected = learners(3, "client_1") | learners(4, "client_2") | learners(5, "client_3") | learners(6, "client_4")
    assert content(loaded(folder)) == (6, expected)


def test_a_folder_by_another_path_is_the_same_folder(tmp_path: Path, folder: CheckpointFolder) -> None:
    (tmp_path / "link").symlink_to(folder.path)
    save(folder, 1, None, learners(1, "client_1", "client_2"))
    base = loaded(CheckpointFolder(tmp_path / "link"))
    save(folder, 2, base, learners(2, "client_2"))
    assert (folder.path / "round_000002.learners").stat().st_size == NUM_BYTES


def test_a_run_that_begins_anew_finds_nothing_and_what_was_there_is_set_aside(folder: CheckpointFolder) -> None:
    assert folder.set_aside() is None
    save(folder, 2, save(folder, 1, None, learners(1, "client_1")), learners(2, "client_2"))
    (folder.path / "round_000009.learners").write_bytes(b"of a crash")
    (folder.path / "notes.txt").write_bytes(b"a user's")
    expected = content(loaded(folder))
    aside = folder.set_aside()
    assert aside == folder.path / "earlier_1"
    assert content(loaded(CheckpointFolder(aside))) == expected
    assert files_in(folder) == {"notes.txt": b"a user's"}
    assert folder.load() is None
    save(folder, 1, None, learners(5, "client_3"))
    assert content(loaded(folder)) == (1, learners(5, "client_3"))
    assert folder.set_aside() == folder.path / "earlier_2"


def test_files_of_others_stay(folder: CheckpointFolder) -> None:
    names = [
        "notes.tmp",
        "round_1.checkpoint",
        "round_000001.learners.bak",
        "round_000001.txt",
        "xround_000001.learners",
    ]
    for name in names:
        (folder.path / name).write_bytes(b"a user's")
    base = None
    for round_num in range(1, 6):
        base = save(folder, round_num, base, learners(round_num, "client_1"))
    folder.set_aside()
    folder.unlock()
    folder.lock()
    assert sorted(files_in(folder)) == sorted(names)


# What was begun.


def test_half_written_files_are_ignored_and_removed(two: CheckpointFolder) -> None:
    for name in ("round_000003.learners.tmp", "round_000003.checkpoint.tmp"):
        (two.path / name).write_bytes(b"TFRCKPT\0 half")
    assert content(loaded(two)) == SECOND
    two.unlock()
    two.lock()
    assert content(loaded(two)) == SECOND
    assert not kinds(two)[2]


def test_what_is_aborted_leaves_nothing(two: CheckpointFolder) -> None:
    before = files_in(two)
    files = two.begin(3, loaded(two))
    files.abort()
    files = two.begin(3, loaded(two))
    files.add("client_1", b"abc")
    assert files_in(two) != before
    files.abort()
    files.abort()
    assert files_in(two) == before


def test_what_is_committed_is_not_aborted(two: CheckpointFolder) -> None:
    files = two.begin(3, loaded(two))
    files.add("client_1", b"abc")
    files.commit(CONFIG, pack(state_of(3)))
    files.abort()
    assert content(loaded(two)) == (3, SECOND[1] | {"client_1": b"abc"})


# Damage.


def assert_passed_over(folder: CheckpointFolder, caplog: pytest.LogCaptureFixture, *named: str) -> None:
    caplog.clear()
    assert content(loaded(folder)) == FIRST
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for text in ("round_000002.checkpoint", *named):
        assert text in record.getMessage()


def test_a_changed_bit_anywhere_is_noticed(two: CheckpointFolder, caplog: pytest.LogCaptureFixture) -> None:
    choose = random.Random(2)
    for name in ("round_000002.checkpoint", "round_000002.learners"):
        path = two.path / name
        good = path.read_bytes()
        for position in [*range(0, len(good), 7), len(good) - 1]:
            flip(path, position, choose.randrange(8))
            assert_passed_over(two, caplog, name)
        path.write_bytes(good)
    assert content(loaded(two)) == SECOND


def test_a_file_that_is_cut_short_is_noticed(two: CheckpointFolder, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("round_000002.checkpoint", "round_000002.learners"):
        path = two.path / name
        good = path.read_bytes()
        for num_bytes in [*range(0, len(good), 23), len(good) - 1]:
            path.write_bytes(good[:num_bytes])
            assert_passed_over(two, caplog, name)
        path.write_bytes(good)
    (two.path / "round_000002.checkpoint").write_bytes(bytes(len(good)))
    assert_passed_over(two, caplog)


def test_a_head_with_something_after_it_is_noticed(two: CheckpointFolder, caplog: pytest.LogCaptureFixture) -> None:
    with (two.path / "round_000002.checkpoint").open("ab") as file:
        file.write(b"\0")
    assert_passed_over(two, caplog, "checksum")


def test_a_missing_pack_is_noticed(two: CheckpointFolder, caplog: pytest.LogCaptureFixture) -> None:
    (two.path / "round_000002.learners").unlink()
    assert_passed_over(two, caplog, "round_000002.learners is missing")


def test_a_pack_of_an_earlier_round_is_checked_too(folder: CheckpointFolder) -> None:
    save(folder, 2, save(folder, 1, None, learners(1, "client_1", "client_2")), learners(2, "client_2"))
    flip(folder.path / "round_000001.learners", 10)
    with pytest.raises(SnapshotError, match=r"round_000001\.learners is damaged between the bytes 0 and 500"):
        folder.load()


def test_another_format_is_passed_over(two: CheckpointFolder, caplog: pytest.LogCaptureFixture) -> None:
    path = two.path / "round_000002.checkpoint"
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, 8, 9)
    path.write_bytes(data)
    assert_passed_over(two, caplog, "format 9", "reads format 1")


def test_a_head_under_another_name_is_passed_over(two: CheckpointFolder, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(two.path / "round_000001.checkpoint", two.path / "round_000002.checkpoint")
    assert_passed_over(two, caplog)


def test_a_disk_that_cannot_read_a_file_has_the_one_before(
    two: CheckpointFolder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pread, bad = os.pread, os.stat(two.path / "round_000002.learners").st_ino

    def failing(code: int) -> Callable[[int, int, int], bytes]:
        def pread_or_fail(descriptor: int, count: int, position: int) -> bytes:
            if os.fstat(descriptor).st_ino == bad:
                raise OSError(code, os.strerror(code))
            return pread(descriptor, count, position)

        return pread_or_fail

    monkeypatch.setattr(os, "pread", failing(errno.EIO))
    assert_passed_over(two, caplog, os.strerror(errno.EIO))
    monkeypatch.setattr(os, "pread", failing(errno.EMFILE))
    with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):  # it says nothing about the file
        two.load()


def test_where_all_are_damaged_the_error_says_so(two: CheckpointFolder) -> None:
    flip(two.path / "round_000001.checkpoint", 200)
    flip(two.path / "round_000002.learners", 600)
    with pytest.raises(SnapshotError) as raised:
        two.load()
    for text in (str(two.path), "round_000002.learners is damaged", "backup", "resume=never"):
        assert text in str(raised.value)


def test_what_changes_after_it_was_verified_is_an_error(two: CheckpointFolder) -> None:
    found = loaded(two)
    snapshots = found.snapshots()
    assert next(snapshots) == ("client_1", SECOND[1]["client_1"])
    flip(two.path / "round_000002.learners", 600)
    with pytest.raises(SnapshotError, match=r"round_000002\.learners is damaged"):
        next(snapshots)
    flip(two.path / "round_000002.checkpoint", 600)
    with pytest.raises(SnapshotError, match=r"round_000002\.checkpoint is damaged"):
        found.read_state()
    (two.path / "round_000002.learners").unlink()
    with pytest.raises(SnapshotError, match=r"round_000002\.learners is missing"):
        list(found.snapshots())


@pytest.mark.parametrize("damaged", ["round_000002.checkpoint", "round_000002.learners"])
def test_a_run_that_went_back_replaces_what_is_damaged(two: CheckpointFolder, damaged: str) -> None:
    base = save(two, 3, loaded(two), learners(3, "client_1"))
    flip(two.path / damaged, 200)
    flip(two.path / "round_000003.checkpoint", 200)
    base = loaded(two)
    assert base.round_num == 1
    base = save(two, 2, base, learners(22, "client_2"))
    expected = FIRST[1] | learners(22, "client_2")
    assert content(loaded(two)) == (2, expected)
    assert kinds(two) == (
        ["round_000001.checkpoint", "round_000002.checkpoint"],
        ["round_000001.learners", "round_000002-1.learners"],
        [],
    )
    save(two, 3, base, learners(33, "client_3"))
    assert content(loaded(two)) == (3, expected | learners(33, "client_3"))


def test_a_damaged_head_does_not_count_among_the_kept(two: CheckpointFolder) -> None:
    flip(two.path / "round_000001.checkpoint", 60)
    for round_num in (3, 4):
        base = save(two, round_num, loaded(two), learners(round_num, "client_1", "client_2", "client_3"))
        assert base.round_num == round_num
    assert kinds(two)[0] == [f"round_{number:06d}.checkpoint" for number in (2, 3, 4)]
    assert "round_000001.learners" not in kinds(two)[1]


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("is_missing", [False, True])
def test_learners_that_are_damaged_are_not_taken_over(
    tmp_path: Path, folder: CheckpointFolder, elsewhere: bool, is_missing: bool
) -> None:
    base = save(folder, 1, None, learners(1, "large", num_bytes=5000) | learners(1, "small"))
    pack_file = folder.path / "round_000001.learners"
    if is_missing:
        pack_file.unlink()
    else:
        flip(pack_file, 5200)
    with locked(tmp_path / "other") as other:
        target = other if elsewhere else folder
        before = files_in(target)
        with pytest.raises(SnapshotError, match=r"round_000001\.learners is (damaged|missing).*Resume"):
            save(target, 2, base, learners(2, "large"))  # so little of the pack is live that it moves
        assert files_in(target) == before


def test_what_is_damaged_and_was_gone_behind_does_not_count_among_the_kept(tmp_path: Path) -> None:
    with locked(tmp_path, num_kept=2) as folder:
        save(folder, 2, save(folder, 1, None, learners(1, "client_1")), learners(2, "client_1"))
        flip(folder.path / "round_000002.learners", 10)
        save(folder, 3, loaded(folder), learners(3, "client_1"))
        assert kinds(folder)[0] == ["round_000001.checkpoint", "round_000003.checkpoint"]
        assert "round_000002.learners" not in kinds(folder)[1]


# Trust.


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def place(pack: int = 0, offset: int = 0, num_bytes: int = 3) -> bytes:
    return struct.pack("<IQQ32s", pack, offset, num_bytes, hashlib.sha256(b"abc").digest())


def forge(folder: CheckpointFolder, **changes: Any) -> None:
    """A head with a checksum that is right, and fields that need not be."""
    (folder.path / "round_000001.learners").write_bytes(b"abc")
    fields: dict[str, Any] = {"round_num": 1, "config": CONFIG, "client_ids": ["client_1"]}
    fields |= {"packs": ["round_000001.learners"], "places": place()}
    body = tfr.ParameterSerializer.serialize(fields | changes)
    rest = struct.pack("<Q", len(body)) + body + tfr.ParameterSerializer.serialize(state_of(1))
    head = b"TFRCKPT\0" + struct.pack("<I", 1) + hashlib.sha256(rest).digest() + rest
    (folder.path / "round_000001.checkpoint").write_bytes(head)


def test_the_forged_heads_of_these_tests_are_well_formed(folder: CheckpointFolder) -> None:
    forge(folder)
    assert content(loaded(folder)) == (1, {"client_1": b"abc"})


def test_a_head_that_would_run_something_does_not(tmp_path: Path, folder: CheckpointFolder) -> None:
    marker = tmp_path / "marker"
    forge(folder, config={"lr": Evil(marker)})
    with pytest.raises(UntrustedTypeError, match="system"):
        folder.load()
    folder.begin(1, None).commit(CONFIG, pack({"model": Evil(marker)}))
    found = loaded(folder)
    with pytest.raises(UntrustedTypeError, match="system"):
        found.read_state(["torch", __name__])
    assert not marker.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"packs": ["../round_000001.learners"]},
        {"packs": ["/etc/passwd"]},
        {"packs": ["round_000001.learners/../../round_000001.learners"]},
        {"packs": [""]},
        {"packs": ["round_000001.learners\n"]},
        {"packs": [b"round_000001.learners"]},
        {"packs": ["lock"]},
        {"packs": []},
        {"packs": None},
        {"places": bytes(51)},
        {"places": b""},
        {"places": place(pack=1)},
        {"places": place(offset=1)},
        {"places": place(num_bytes=2**64 - 1)},
        {"places": place(offset=2**64 - 1)},
        {"places": place(num_bytes=2)},
        {"client_ids": [["client_1"]]},
        {"client_ids": ["client_1", "client_1"], "places": place() * 2},
        {"client_ids": "c"},
        {"round_num": 2},
        {"round_num": "1"},
        {"config": [1]},
    ],
    ids="".join,
)
def test_a_head_that_lies_is_refused(folder: CheckpointFolder, changes: dict[str, Any]) -> None:
    outside = folder.path.parent / "round_000001.learners"
    outside.write_bytes(b"abc")
    forge(folder, **changes)
    with pytest.raises(SnapshotError, match=r"round_000001\."):
        folder.load()


def test_types_of_ones_own_need_their_package_named(folder: CheckpointFolder) -> None:
    folder.begin(1, None).commit(CONFIG, pack({"sampler": Stranger()}))
    found = loaded(folder)
    with pytest.raises(UntrustedTypeError, match=r"trusted_modules=\[strangers\]"):
        found.read_state()
    assert type(found.read_state(["strangers"])["sampler"]) is Stranger


def test_a_configuration_that_could_not_be_read_is_refused_at_once(folder: CheckpointFolder) -> None:
    save(folder, 1)
    before = files_in(folder)
    for value, error in ((Stranger(), UntrustedTypeError), (lambda: 0, SerializationError)):
        files = folder.begin(2, None)
        files.add("client_1", b"abc")
        with pytest.raises(error):
            files.commit({"value": value}, pack(state_of(2)))
        files.abort()
        assert files_in(folder) == before
