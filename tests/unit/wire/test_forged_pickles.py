"""Pickles built from the allow-list by chance: no crash, no file, no call, no second and no hundreds of megabytes."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import warnings
from pathlib import Path

import forged
import hostile
import pytest
from test_fuzz import look_at

from torchfedrpc.errors import SerializationError
from torchfedrpc.wire.allowlist import AllowList

_FORBIDDEN = (
    "open",
    "os.",
    "subprocess.",
    "socket.",
    "ctypes.",
    "exec",
    "compile",
    "shutil.",
    "pty.",
    "mmap.",
    "code.",
)
_BATCH = 2000  # for each process: to fork takes as long as some dozens of pickles
_MAX_SECONDS, _MAX_BYTES = 1.0, 200 << 20
_HARMED = 3


def _open_all(seeds: range, progress: int) -> None:
    """Open the pickles of these seeds and use what comes of them; each seed is written down before its turn."""
    allow, forger = AllowList([hostile.HERE]), forged.Forger()
    for _ in range(3):  # imports and caches of the first uses are no harm
        look_at(forged.parcel(hostile.whole(b"N")).open(allow))
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    events: list[str] = []

    def note(event: str, arguments: tuple[object, ...]) -> None:
        is_annotation = event == "compile" and arguments[0] in (b"int", b"str")  # torch reads those of its own
        if event.startswith(_FORBIDDEN) and watching and not is_annotation:
            events.append(f"{event}{arguments!r:.200}")

    watching = False
    sys.addaudithook(note)
    for seed in seeds:
        os.pwrite(progress, seed.to_bytes(8, "little"), 0)
        head = forger.pickle(seed)
        began, watching = time.process_time(), True
        try:
            look_at(forged.parcel(head).open(allow))
        except SerializationError:
            pass
        watching = False
        took, grown = time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - used
        if events or took > _MAX_SECONDS or grown > _MAX_BYTES or hostile.harm():
            os.write(2, f"seed {seed}: {events} {took:.1f} s {grown >> 20} MiB {hostile.harm()}\n{head!r}\n".encode())
            os._exit(_HARMED)


def _check(seeds: range, folder: Path) -> list[str]:
    """Open the pickles in a process of their own; return what went wrong, with its seed."""
    failures = []
    for first in range(seeds.start, seeds.stop, _BATCH):
        batch = range(first, min(first + _BATCH, seeds.stop))
        while batch:
            progress = os.open(folder / "seed", os.O_RDWR | os.O_CREAT)
            child = os.fork()
            if not child:
                status = 1
                try:
                    os.chdir(folder)
                    signal.alarm(300)
                    warnings.simplefilter("ignore")
                    _open_all(batch, progress)
                    status = 0
                finally:  # an error that is none of ours is printed by the hook
                    if status:
                        sys.excepthook(*sys.exc_info())
                    os._exit(status)
            _, status = os.waitpid(child, 0)
            seed = int.from_bytes(os.pread(progress, 8, 0), "little")
            os.close(progress)
            if not status:
                break
            failures.append(f"seed {seed}: exit status {os.waitstatus_to_exitcode(status)}")
            batch = range(seed + 1, batch.stop)
    return failures


def test_forged_pickles_harm_nothing(tmp_path: Path) -> None:
    assert _check(range(4000), tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seed"]


def test_forged_pickles_reach_the_rules() -> None:
    allow, forger = AllowList([hostile.HERE]), forged.Forger()
    made, refused = 0, set()
    for seed in range(3000):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                forged.parcel(forger.pickle(seed)).open(allow)
            made += 1
        except SerializationError as error:
            refused.add(str(error)[:25])
    assert made > 150
    assert len(refused) > 60


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_million_forged_pickles_harm_nothing(tmp_path: Path) -> None:
    assert _check(range(1_000_000), tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seed"]
