"""A consistent cut: what it keeps back, in which order it lets go, and how much of it is under way at once."""

from __future__ import annotations

import asyncio

import pytest

from torchfedrpc.executors import consistent_snapshot as cut_module
from torchfedrpc.executors import snapshot_throttle as module
from torchfedrpc.executors.consistent_snapshot import Cut


class Learners:
    """Gives states as a test tells it to, and notes what was asked and called, in order."""

    def __init__(self, num_bytes: int = 1) -> None:
        self.log: list[str] = []
        self.pending: dict[str, asyncio.Future[bytes]] = {}
        self._num_bytes = num_bytes

    async def take(self, client_id: str) -> bytes:
        self.log.append(f"state {client_id}")
        self.pending[client_id] = asyncio.get_running_loop().create_future()
        return await self.pending[client_id]

    async def call(self, cut: Cut, client_id: str, number: int = 0) -> None:
        await cut.passed(client_id)
        self.log.append(f"call {number} {client_id}")

    def answer(self, client_id: str) -> None:
        self.pending.pop(client_id).set_result(bytes(self._num_bytes))


async def turns(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_AT_ONCE", 2)


async def test_a_call_comes_behind_the_state_of_its_learner_and_brings_it_to_the_front() -> None:
    learners = Learners()
    cut = Cut("abcd", learners.take)
    following = asyncio.ensure_future(anext(cut))
    await turns()
    calls = [asyncio.ensure_future(learners.call(cut, "d", number)) for number in range(3)]
    await turns()
    await learners.call(cut, "a")
    await learners.call(cut, "x")  # not part of the cut
    assert learners.log == ["state a", "state b", "call 0 a", "call 0 x"]
    learners.answer("a")
    assert await following == ("a", b"\0")
    following = asyncio.ensure_future(anext(cut))
    await turns()
    assert learners.log[4:] == ["state d", "call 0 d", "call 1 d", "call 2 d"]
    for client_id in ("b", "d"):
        learners.answer(client_id)
    assert sorted([await following, await anext(cut)]) == [("b", b"\0"), ("d", b"\0")]
    last = asyncio.ensure_future(anext(cut))
    await turns()
    learners.answer("c")
    assert await last == ("c", b"\0")
    with pytest.raises(StopAsyncIteration):
        await anext(cut)
    await asyncio.gather(*calls)


async def test_a_newcomer_does_not_overtake_those_who_are_being_let_through() -> None:
    learners = Learners()
    cut = Cut("abc", learners.take)
    following = asyncio.ensure_future(anext(cut))
    await turns()
    calls = [asyncio.ensure_future(learners.call(cut, "c", number)) for number in range(3)]
    await turns()
    learners.answer("a")
    await following
    following = asyncio.ensure_future(anext(cut))
    while "state c" not in learners.log:
        await asyncio.sleep(0)
    calls.append(asyncio.ensure_future(learners.call(cut, "c", 3)))
    await asyncio.gather(*calls)
    assert [entry for entry in learners.log if entry.startswith("call")] == [f"call {n} c" for n in range(4)]
    learners.answer("b")
    await following
    cut.close()


async def test_a_caller_that_is_cancelled_holds_up_nobody() -> None:
    learners = Learners()
    cut = Cut("abc", learners.take)
    following = asyncio.ensure_future(anext(cut))
    await turns()
    calls = [asyncio.ensure_future(learners.call(cut, "c", number)) for number in range(3)]
    await turns()
    calls[0].cancel()
    learners.answer("a")
    await following
    following = asyncio.ensure_future(anext(cut))
    await asyncio.gather(*calls[1:])
    assert learners.log[-2:] == ["call 1 c", "call 2 c"]
    learners.answer("b")
    await following
    cut.close()


async def test_large_states_come_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUDGET_BYTES", 100)
    monkeypatch.setattr(module, "_FIRST_GUESS_BYTES", 1)
    learners = Learners(num_bytes=60)
    cut = Cut("abcd", learners.take)
    following = asyncio.ensure_future(anext(cut))
    await turns()
    assert len(learners.pending) == 2  # nobody knows yet
    learners.answer("a")
    await following
    following = asyncio.ensure_future(anext(cut))
    await turns()
    assert list(learners.pending) == ["b"]
    learners.answer("b")
    await following
    cut.close()


async def test_calls_behind_a_call_of_several_learners_wait_until_it_continues() -> None:
    learners = Learners()
    cut = Cut("abcd", learners.take)
    following = asyncio.ensure_future(anext(cut))
    await turns()
    assert list(learners.pending) == ["a", "b"]

    async def call_both() -> None:
        await cut.passed("c", "d")
        learners.log.append("call c and d")

    both = asyncio.ensure_future(call_both())
    await turns()
    later = [asyncio.ensure_future(learners.call(cut, client_id)) for client_id in "dc"]
    for client_id in ("a", "b"):
        assert "call c and d" not in learners.log
        assert not cut.is_over
        learners.answer(client_id)
        await following
        following = asyncio.ensure_future(anext(cut))
        await turns()
    await asyncio.gather(both, *later)
    assert learners.log[2:5] == ["state c", "state d", "call c and d"]
    assert sorted(learners.log[5:]) == ["call 0 c", "call 0 d"]
    assert cut.is_over
    following.cancel()
    cut.close()


async def test_a_cancelled_call_of_several_learners_holds_nobody_back() -> None:
    learners = Learners()
    cut = Cut("abcd", learners.take)
    following = asyncio.ensure_future(anext(cut))
    await turns()
    both = asyncio.ensure_future(cut.passed("a", "d"))
    await turns()
    later = [asyncio.ensure_future(learners.call(cut, client_id)) for client_id in "ad"]
    await turns()
    both.cancel()
    await turns()
    assert later[0].done()
    cut.close()
    await asyncio.gather(*later)
    assert cut.is_over
    following.cancel()


async def test_a_call_of_several_learners_may_be_cancelled_as_the_gates_open() -> None:
    learners = Learners()
    cut = Cut("ab", learners.take)
    both = asyncio.ensure_future(cut.passed("a", "b"))
    await asyncio.sleep(0)
    both.cancel()
    with pytest.raises(asyncio.CancelledError):
        await both
    await turns()
    await asyncio.wait_for(learners.call(cut, "a"), 5)
    await asyncio.wait_for(learners.call(cut, "b"), 5)
    assert cut.is_over
    cut.close()


async def test_snapshots_behind_busy_learners_hold_up_no_other_learner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut_module, "_STUCK_S", 0.05)
    learners = Learners()
    cut = Cut("abcd", learners.take)
    following = asyncio.ensure_future(anext(cut))
    await turns()
    assert list(learners.pending) == ["a", "b"]  # and they stay so
    await asyncio.wait_for(learners.call(cut, "c"), 5)
    await asyncio.wait_for(learners.call(cut, "d"), 5)
    assert learners.log[2:] == ["state c", "state d", "call 0 c", "call 0 d"]  # in place of both
    following.cancel()
    cut.close()


async def test_closing_lets_everybody_through() -> None:
    learners = Learners()
    cut = Cut("abcdef", learners.take)
    following = asyncio.ensure_future(anext(cut))
    await turns()
    calls = [asyncio.ensure_future(learners.call(cut, client_id)) for client_id in "fed"]
    await turns()
    cut.close()
    await asyncio.gather(*calls)
    await learners.call(cut, "c")
    assert "state d" not in learners.log
    with pytest.raises(asyncio.CancelledError):
        await following


async def test_a_state_that_cannot_be_taken_is_told_to_whoever_reads() -> None:
    async def fail(client_id: str) -> bytes:
        raise RuntimeError(client_id)

    cut = Cut("a", fail)
    with pytest.raises(RuntimeError, match="a"):
        await anext(cut)
    await cut.passed("a")
