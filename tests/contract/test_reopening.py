"""A proxy that is opened again works like new: with new learners, and nothing of the session before."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import Seen
from learners import Probe

import torchfedrpc as tfr
from torchfedrpc.events import CallEnded, CallStarted, ProgressReported

CLIENTS = ["a", "b", "c"]
COUNTS = ("calls", "failed_calls", "pending_calls", "workers_lost", "bytes_sent", "bytes_received")


class Garbage:
    """Refers to itself, so that the garbage collector alone frees it."""

    def __init__(self) -> None:
        self.itself = self


@dataclass
class Session:
    """What a session has given."""

    opened: list[Any]  # what came of opening it twice at once
    before: dict[str, Any]
    results: list[Any]
    after: dict[str, Any]
    events: tuple[list[int], list[str]]  # call ids; kinds and methods
    ref: Any
    stream: AsyncIterator[Any]
    handle: tfr.LearnerHandle


def counts(proxy: tfr.LearnerProxy) -> dict[str, Any]:
    stats = proxy.stats()
    return {name: stats[name] for name in COUNTS}


def calls_in(seen: Seen) -> tuple[list[int], list[str]]:
    """The events of calls, whichever order they came in: call ids, and what they are of."""
    kinds = (CallStarted, CallEnded, ProgressReported)
    events = [event for event in seen.events if isinstance(event, kinds)]
    what = sorted(f"{type(event).__name__} {event.client_id}.{event.method}" for event in events)
    return sorted(event.call_id for event in events), what


async def run_session(proxy: tfr.LearnerProxy, seen: Seen) -> Session:
    seen.events.clear()
    opened = list(await asyncio.gather(proxy.__aenter__(), proxy.__aenter__(), return_exceptions=True))
    try:
        before = counts(proxy)
        results: list[Any] = [dict(await proxy.clients().call("draw")) for _ in range(2)]
        results += [await proxy.custom_method("a", "append", number) for number in range(2)]
        results += [
            await proxy.custom_method("b", "what_happened"),
            await proxy.custom_method("b", "report_all", [1]),
        ]
        with pytest.raises(ValueError, match="plain"):
            await proxy.custom_method("b", "fail", "value")
        ref = await proxy.share(torch.ones(5))
        results.append((await proxy.custom_method("c", "same", ref)).tolist())
        after = counts(proxy)
        stream = proxy.stream("a", "count", 5)  # left open, and the learner with it
        results.append(await anext(stream))
    finally:
        await proxy.__aexit__(None, None, None)
    return Session(opened, before, results, after, calls_in(seen), ref, stream, proxy.client("a"))


@pytest.fixture(scope="module")
def again(lone_runtime: dict[str, Any]) -> tfr.LearnerProxy:
    runtime = lone_runtime | {"max_resident_learners": 1, "journal_max_calls": 1}
    return tfr.LearnerProxy(Probe, CLIENTS, runtime=runtime, seed=3)


@pytest.fixture(scope="module")
def sessions(runner: asyncio.Runner, again: tfr.LearnerProxy) -> list[Session]:
    """Two sessions of one proxy."""
    seen = Seen()
    unsubscribe = again.subscribe(seen)

    async def both() -> list[Session]:
        return [await run_session(again, seen), await run_session(again, seen)]

    try:
        return runner.run(both())
    finally:
        unsubscribe()


@pytest.fixture(scope="module")
def garbage() -> list[Any]:
    """Weak references to garbage that the proxy finds there as it opens."""
    return []


@pytest.fixture(scope="module")
def proxy(
    runner: asyncio.Runner, sessions: list[Session], again: tfr.LearnerProxy, garbage: list[Any]
) -> Iterator[tfr.LearnerProxy]:
    """The same proxy, open for the third time."""
    gc.disable()
    try:
        garbage.append(weakref.ref(Garbage()))
        runner.run(again.__aenter__())
    finally:
        gc.enable()
    yield again
    runner.run(again.__aexit__(None, None, None))


def test_learners_and_seeds_of_a_second_session_begin_anew(sessions: list[Session]) -> None:
    assert repr(sessions[0].results) == repr(sessions[1].results)


def test_stats_of_a_second_session_begin_at_zero(sessions: list[Session]) -> None:
    assert sessions[1].before == dict.fromkeys(COUNTS, 0)
    assert sessions[1].after == sessions[0].after
    assert sessions[1].after["calls"] == 12


def test_events_of_a_second_session_are_those_of_the_first(sessions: list[Session]) -> None:
    assert sessions[0].events == sessions[1].events
    assert sessions[1].events[0][0] == 1
    assert "ProgressReported b.report_all" in sessions[1].events[1]


def test_proxy_opened_twice_at_once_refuses_the_second_opening(sessions: list[Session]) -> None:
    for session in sessions:
        first, second = session.opened
        assert isinstance(first, tfr.LearnerProxy)
        assert isinstance(second, tfr.ConfigError)
        assert "this proxy is open already: use it" in str(second)


async def test_shared_reference_of_an_earlier_session_is_refused(
    proxy: tfr.LearnerProxy, sessions: list[Session]
) -> None:
    for session in sessions:
        with pytest.raises(tfr.TorchFedRpcError, match="of a proxy that is closed: share the object again"):
            await proxy.custom_method("a", "same", session.ref)


async def test_stream_of_an_earlier_session_is_refused_and_holds_no_learner(
    proxy: tfr.LearnerProxy, sessions: list[Session]
) -> None:
    for session in sessions:
        with pytest.raises(
            tfr.ConfigError, match=r"before the proxy was closed: .*proxy\.stream\('a', 'count', \.\.\."
        ):
            await anext(session.stream)
    async with asyncio.timeout(20):
        assert await proxy.custom_method("a", "same", 1) == 1


async def test_handle_of_an_earlier_session_calls_the_learner_of_this_one(
    proxy: tfr.LearnerProxy, sessions: list[Session]
) -> None:
    assert await sessions[0].handle.append("x") == 1


# Python's garbage collector.


async def test_garbage_of_the_users_process_is_freed_while_a_proxy_is_open(
    proxy: tfr.LearnerProxy, garbage: list[Any]
) -> None:
    gc.collect()
    assert garbage[-1]() is None


async def test_workers_alone_freeze_what_they_have_imported(proxy: tfr.LearnerProxy, mode: str) -> None:
    num_frozen = set((await proxy.clients().call("num_frozen")).values())
    assert num_frozen == {gc.get_freeze_count()} if mode == "local" else min(num_frozen) > 10_000
