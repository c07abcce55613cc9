"""The spool: values under keys in one file that nobody else can see."""

from __future__ import annotations

import errno
import os
import resource
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchfedrpc.host.spool import _BLOCK_BYTES, Spool


@pytest.fixture
def spool() -> Iterator[Spool]:
    with closing(Spool()) as spool:
        yield spool


def file_bytes() -> int:
    """The size of the one unnamed temporary file of this process."""
    folder = tempfile.gettempdir()
    sizes = [
        entry.stat().st_size
        for entry in Path("/proc/self/fd").iterdir()
        if os.path.exists(entry) and os.readlink(entry).startswith(folder)
    ]
    assert len(sizes) == 1
    return sizes[0]


def value(number: int, num_bytes: int) -> bytes:
    return bytes((number + index) % 251 for index in range(num_bytes))


@pytest.mark.parametrize("num_bytes", [0, 1, _BLOCK_BYTES - 1, _BLOCK_BYTES, _BLOCK_BYTES + 1, 3 * _BLOCK_BYTES + 7])
def test_what_is_put_is_what_one_gets(spool: Spool, num_bytes: int) -> None:
    spool.put("other", b"beside it")
    spool.put("client_1", value(1, num_bytes))
    assert spool.get("client_1") == value(1, num_bytes)
    assert spool.get("other") == b"beside it"


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_any_kind_of_bytes_can_be_put(spool: Spool, kind: type) -> None:
    spool.put(("client_1", 3), kind(b"abc"))
    assert spool.get(("client_1", 3)) == b"abc"


def test_a_missing_key_is_a_key_error(spool: Spool) -> None:
    with pytest.raises(KeyError, match="client_1"):
        spool.get("client_1")
    spool.put("client_1", b"abc")
    spool.discard("client_1")
    spool.discard("client_1")
    with pytest.raises(KeyError, match="client_1"):
        spool.get("client_1")


def test_the_file_does_not_grow_while_values_are_replaced(spool: Spool) -> None:
    for number in range(50):
        spool.put("client_1", value(number, 2 * _BLOCK_BYTES))
        spool.put("client_2", value(number, _BLOCK_BYTES))
    assert file_bytes() <= 5 * _BLOCK_BYTES


def test_blocks_that_lie_apart_hold_one_value(spool: Spool) -> None:
    for number in range(6):
        spool.put(number, value(number, _BLOCK_BYTES))
    for number in (1, 3, 5):
        spool.discard(number)
    spool.put("long", value(9, 3 * _BLOCK_BYTES))
    assert spool.get("long") == value(9, 3 * _BLOCK_BYTES)
    assert file_bytes() == 6 * _BLOCK_BYTES
    assert [spool.get(number) for number in (0, 2, 4)] == [value(number, _BLOCK_BYTES) for number in (0, 2, 4)]


def test_the_file_has_no_name() -> None:
    before = set(os.listdir(tempfile.gettempdir()))
    with closing(Spool()) as spool:
        spool.put("client_1", b"abc")
        assert set(os.listdir(tempfile.gettempdir())) == before


def test_a_disk_that_is_full_leaves_the_present_value(spool: Spool) -> None:
    spool.put("client_1", b"the present one")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * _BLOCK_BYTES, limits[1]))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            spool.put("client_1", value(1, 4 * _BLOCK_BYTES))
        assert spool.get("client_1") == b"the present one"
        spool.put("client_1", b"a short one")  # the blocks of the failed one are free again
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert spool.get("client_1") == b"a short one"


def test_a_closed_spool_is_empty_and_takes_nothing() -> None:
    spool = Spool()
    spool.put("client_1", b"abc")
    spool.close()
    spool.close()
    with pytest.raises(KeyError, match="client_1"):
        spool.get("client_1")
    with pytest.raises(ValueError, match="closed"):
        spool.put("client_1", b"abc")


def test_threads_do_not_get_into_each_others_values(spool: Spool) -> None:
    wrong: list[int] = []

    def use(number: int) -> None:
        for turn in range(30):
            data = value(number + turn, _BLOCK_BYTES * (turn % 3) + number)
            spool.put(number, data)
            if spool.get(number) != data:
                wrong.append(number)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@given(
    st.lists(
        st.tuples(st.sampled_from(["put", "discard"]), st.integers(0, 4), st.integers(0, 3 * _BLOCK_BYTES)),
        max_size=12,
    )
)
def test_it_is_a_dict_of_bytes(actions: list[tuple[str, int, int]]) -> None:
    expected: dict[int, bytes] = {}
    with closing(Spool()) as spool:
        for action, key, num_bytes in actions:
            if action == "put":
                expected[key] = value(key, 64) * (num_bytes // 64)
                spool.put(key, expected[key])
            else:
                expected.pop(key, None)
                spool.discard(key)
            assert {name: spool.get(name) for name in expected} == expected
            for name in set(range(5)) - expected.keys():
                with pytest.raises(KeyError):
                    spool.get(name)
