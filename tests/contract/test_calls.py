"""Calls: the proxy's interface, handles, names, order, and what a running method knows of its call."""

from __future__ import annotations

import asyncio
import inspect
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Fresh, Latch, Seen, submitted

import torchfedrpc as tfr
from torchfedrpc.events import CallEnded, CallStarted, ProgressReported

GUARANTEES = (Path(__file__).parents[2] / "docs" / "guarantees.md").read_text(encoding="utf-8")
DOCUMENTED = [
    "mode",
    "calls",
    "failed_calls",
    "pending_calls",
    "bytes_sent",
    "bytes_received",
    "snapshot_bytes",
    "journal_bytes",
    "workers_lost",
    "workers",
]


async def test_the_seed_interface_reaches_the_methods_of_those_names(proxy: tfr.LearnerProxy, one: str) -> None:
    for name in ("train_epoch", "evaluate"):
        got = await getattr(proxy, name)(client_id=one, local_epochs=5)
        assert got == {"client": one, "method": name, "kwargs": {"local_epochs": 5}}
    assert await proxy.set_model_weights(client_id=one, weights={"w": 3}) is None
    assert await proxy.get_model_weights(client_id=one) == {"w": 3}
    assert await proxy.execute_remote_method(one, "echo", 1, two=2) == ((1,), {"two": 2})
    assert await proxy.custom_method(one, "echo", 1, two=2) == ((1,), {"two": 2})


async def test_the_client_of_the_seed_interface_may_be_positional(proxy: tfr.LearnerProxy, one: str) -> None:
    assert (await proxy.train_epoch(one))["client"] == one
    assert (await proxy.evaluate(one, batch=1))["kwargs"] == {"batch": 1}
    await proxy.set_model_weights(one, 4)
    assert await proxy.get_model_weights(one) == 4


async def test_any_method_is_awaited_on_a_handle(proxy: tfr.LearnerProxy, one: str) -> None:
    learner = proxy.client(one)
    assert learner.client_id == one
    assert await learner.echo(1, b=2) == ((1,), {"b": 2})
    assert await learner.echo_async() == ((), {})
    assert await learner.stream(1) == (1,)  # a name that the proxy has too


async def test_a_handle_completes_the_names_of_the_learners_methods(proxy: tfr.LearnerProxy, one: str) -> None:
    assert {"train_epoch", "echo", "hold_async", "options"} <= set(dir(proxy.client(one)))
    assert "_private" not in dir(proxy.client(one))


NAMES = [
    *("self", "client_id", "method", "method_name", "name", "timeout_s", "retries", "on_error"),
    *("args", "kwargs", "options", "call_id", "learner"),
]


@pytest.mark.parametrize("name", NAMES)
async def test_a_users_keyword_never_clashes_with_a_name_of_ours(
    proxy: tfr.LearnerProxy, one: str, name: str
) -> None:
    given = {name: f"the user's {name}"}
    assert await proxy.execute_remote_method(one, "echo", **given) == ((), given)
    assert await proxy.custom_method(one, "echo", **given) == ((), given)
    assert await proxy.client(one).echo(**given) == ((), given)
    assert (await proxy.clients([one]).echo(**given))[one] == ((), given)
    assert (await proxy.clients([one]).call("echo", **given))[one] == ((), given)
    assert (await proxy.clients({one: given}).call("echo"))[one] == ((), given)
    assert [pair async for pair in proxy.clients([one]).as_completed("echo", **given)] == [(one, ((), given))]
    assert await proxy.options(timeout_s=30).custom_method(one, "echo", **given) == ((), given)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "client_id"])
async def test_a_users_keyword_never_clashes_in_the_usual_methods(
    proxy: tfr.LearnerProxy, one: str, name: str
) -> None:
    given = {name: 1}
    assert (await proxy.train_epoch(one, **given))["kwargs"] == given
    assert (await proxy.evaluate(client_id=one, **given))["kwargs"] == given


@pytest.mark.parametrize("name", ["self", "client_id", "method", "timeout_s"])
async def test_a_users_keyword_never_clashes_in_a_stream(proxy: tfr.LearnerProxy, one: str, name: str) -> None:
    with pytest.raises(TypeError, match=rf"unexpected keyword argument '{name}'|multiple values for argument 'self'"):
        async for _ in proxy.stream(one, "count", 1, **{name: 1}):
            pass  # the learner's own signature refuses the name, so it got there


async def test_options_make_a_view_and_leave_the_proxy_as_it_is(
    proxy: tfr.LearnerProxy, fresh: Fresh, latch: Latch
) -> None:
    one, other = fresh.together(2)
    view = proxy.options(timeout_s=0.05)
    assert view.client_ids == proxy.client_ids
    (held,) = await submitted(proxy, proxy.custom_method(one, "hold", latch.path))
    with pytest.raises(tfr.CallTimeoutError):
        await view.custom_method(other, "hold", latch.path)
    assert not held.done()
    latch.open()
    assert await held == "released"


async def test_options_add_up_on_proxies_handles_and_groups(proxy: tfr.LearnerProxy, one: str, latch: Latch) -> None:
    with pytest.raises(tfr.CallTimeoutError):
        await proxy.options(timeout_s=0.05).options(retries=1).client(one).hold(latch.path)
    with pytest.raises(tfr.CallTimeoutError):
        await proxy.client(one).options(timeout_s=0.05).hold(latch.path)
    with pytest.raises(tfr.GroupCallError):
        await proxy.clients([one]).options(timeout_s=0.05).hold(latch.path)


@pytest.mark.parametrize(
    "options",
    [
        {"timeout_s": 0},
        {"timeout_s": -1},
        {"timeout_s": float("nan")},
        {"timeout_s": "5"},
        {"retries": -1},
        {"retries": 1.5},
        {"on_error": "ignore"},
        {"min_results": 0},
        {"min_results": "2"},
        {"timeout": 3},
    ],
)
async def test_a_wrong_option_is_refused_when_it_is_set(
    proxy: tfr.LearnerProxy, one: str, options: dict[str, Any]
) -> None:
    for owner in (proxy, proxy.client(one), proxy.clients([one])):
        with pytest.raises(tfr.ConfigError, match=next(iter(options))):
            owner.options(**options)


async def test_an_unknown_option_names_the_nearest_one(proxy: tfr.LearnerProxy, one: str) -> None:
    for owner in (proxy, proxy.client(one), proxy.clients([one])):
        with pytest.raises(tfr.ConfigError, match=r"no option 'timeout' here \(did you mean 'timeout_s'\?\)"):
            owner.options(timeout=3)  # type: ignore[arg-type]
    with pytest.raises(tfr.ConfigError, match=r"no option 'min_results' here; it is for groups: proxy\.clients"):
        proxy.client(one).options(min_results=1)  # type: ignore[arg-type]


async def test_statistics_have_the_keys_that_are_documented(proxy: tfr.LearnerProxy, one: str) -> None:
    await proxy.custom_method(one, "same", 1)
    stats = proxy.stats()
    docstring = inspect.getdoc(tfr.LearnerProxy.stats) or ""
    assert re.findall(r"^    - ``(\w+)``:", docstring, re.MULTILINE) == DOCUMENTED
    table = GUARANTEES.partition("\n## Statistics\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    assert sorted(key for row in rows for key in re.findall(r"`(\w+)`", row)) == sorted(DOCUMENTED)
    assert sorted(stats) == sorted(DOCUMENTED)
    assert stats["mode"] == proxy.mode
    assert all(type(stats[key]) is int for key in DOCUMENTED if key not in ("mode", "workers"))
    keys = {"learners", "state", "machine", "address", "pid", "heartbeat_age_s", "round_trip_s", "bytes_sent"}
    keys |= {"bytes_received", "busy_s", "queue", "memory_bytes"}
    assert all(set(numbers) == keys for numbers in stats["workers"].values())
    assert sum(numbers["learners"] for numbers in stats["workers"].values()) > 0


async def test_an_option_that_is_not_given_stays_and_none_takes_it_back(
    proxy: tfr.LearnerProxy, fresh: Fresh, latch: Latch
) -> None:
    one, other = fresh.together(2)
    view = proxy.options(timeout_s=0.05, on_error="collect")
    (held,) = await submitted(proxy, view.clients([one]).options(timeout_s=None).call("hold", latch.path))
    late = await view.clients([other]).options(retries=1).call("hold", latch.path)
    assert isinstance(late.failures[other], tfr.CallTimeoutError)
    assert not held.done()
    latch.open()
    assert (await held)[one] == "released"


async def test_calls_of_one_learner_run_in_the_order_submitted(proxy: tfr.LearnerProxy, one: str) -> None:
    calls = [proxy.custom_method(one, "append", number) for number in range(200)]
    assert await asyncio.gather(*calls) == list(range(1, 201))
    assert await proxy.custom_method(one, "what_happened") == list(range(200))


async def test_calls_of_one_learner_run_one_at_a_time_async_ones_too(proxy: tfr.LearnerProxy, one: str) -> None:
    names = ["append_async" if number % 3 else "append" for number in range(30)]
    await asyncio.gather(*(proxy.custom_method(one, name, number) for number, name in enumerate(names)))
    expected: list[Any] = []
    for number, name in enumerate(names):
        expected += [("begin", number), ("end", number)] if name == "append_async" else [number]
    assert await proxy.custom_method(one, "what_happened") == expected


async def test_the_order_holds_from_the_very_first_call_of_many_learners(
    proxy: tfr.LearnerProxy, fresh: Fresh
) -> None:
    ids = fresh.apart(20)
    await asyncio.gather(*(proxy.custom_method(one, "append", number) for number in range(20) for one in ids))
    for one in ids:
        assert await proxy.custom_method(one, "what_happened") == list(range(20))


async def test_async_methods_of_different_learners_overlap(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    ids = fresh.together(5)
    calls = [proxy.options(timeout_s=30).custom_method(one, "meet", ids[0], 5) for one in ids]
    assert await asyncio.gather(*calls) == [5] * 5


async def test_no_step_of_an_async_method_runs_beside_a_sync_one(
    proxy: tfr.LearnerProxy, fresh: Fresh, latch: Latch, seen: Seen
) -> None:
    stepping, counting = fresh.together(2)
    steps = asyncio.create_task(proxy.custom_method(stepping, "count_own_steps", latch.path))
    await seen.reported(stepping)
    assert await proxy.custom_method(counting, "steps_meanwhile", 0.1) == 0
    assert await proxy.custom_method(counting, "steps_meanwhile", 0.0) == 0
    latch.open()
    assert await steps > 0


async def test_learners_of_a_process_wait_for_each_other_and_those_of_two_do_not(
    proxy: tfr.LearnerProxy, fresh: Fresh, latch: Latch, seen: Seen, num_hosts: int
) -> None:
    busy, neighbour = fresh.together(2)
    where = await proxy.clients([busy, neighbour, *fresh.apart(2)]).call("process_id")
    assert where[neighbour] == where[busy]
    elsewhere = [one for one in where if where[one] != where[busy]]
    assert len(elsewhere) == num_hosts - 1
    held = asyncio.create_task(proxy.custom_method(busy, "hold", latch.path))
    await seen.reported(busy)
    waiting = [asyncio.create_task(proxy.custom_method(neighbour, name, 1)) for name in ("same", "append")]
    for one in elsewhere * 20:
        assert await proxy.custom_method(one, "process_id") == where[one]
    with pytest.raises(tfr.CallTimeoutError):  # by its end the others would have run, too
        await proxy.options(timeout_s=0.2).custom_method(neighbour, "same", 2)
    assert not any(task.done() for task in waiting)
    latch.open()
    assert await held == "released"
    assert await asyncio.gather(*waiting) == [1, 1]


async def test_clients_live_where_the_mode_says(proxy: tfr.LearnerProxy, fresh: Fresh, num_hosts: int) -> None:
    results = await proxy.clients(fresh.apart(10)).call("process_id")
    assert len(set(results.values())) == num_hosts


async def test_a_learner_keeps_its_state_and_its_process(proxy: tfr.LearnerProxy, one: str) -> None:
    where = {await proxy.custom_method(one, "process_id") for _ in range(3)}
    assert len(where) == 1
    assert [await proxy.custom_method(one, "append", "x") for _ in range(3)] == [1, 2, 3]


async def test_current_call_tells_client_method_device_and_a_new_call_id(proxy: tfr.LearnerProxy, one: str) -> None:
    seen = []
    for method in ("context", "context_async"):
        context = await proxy.custom_method(one, method)
        seen.append(context.pop("call_id"))
        assert torch.device(context.pop("device")).type in ("cpu", "cuda")
        assert context == {"client_id": one, "method": method, "cancelled": False, "generator": True}
    streamed = [item async for item in proxy.stream(one, "context_stream")]
    assert streamed[0] == streamed[1]
    assert len({*seen, streamed[0]["call_id"]}) == 3


async def test_the_constructors_call_is_named_init(proxy: tfr.LearnerProxy, one: str) -> None:
    _, method = await proxy.custom_method(one, "drawn_at_birth")
    assert method == "__init__"


def test_current_call_outside_of_a_call_says_where_it_belongs() -> None:
    with pytest.raises(RuntimeError, match="constructor or method"):
        tfr.current_call()


async def test_a_shared_object_is_made_once_in_a_process(
    proxy: tfr.LearnerProxy, fresh: Fresh, num_hosts: int
) -> None:
    ids = fresh.apart(10)
    results = await proxy.clients(ids).call("shared_object", ids[0])
    assert len({process for process, _, _ in results.values()}) == num_hosts
    assert {times for _, times, _ in results.values()} == {1}


async def test_a_shared_object_is_the_same_in_every_process_for_any_first_caller(
    proxy: tfr.LearnerProxy, fresh: Fresh
) -> None:
    results = await proxy.clients(fresh.apart(4)).call("shared_object", "the same key")
    contents = [content for _, _, content in results.values()]
    assert all(torch.equal(contents[0], content) for content in contents)


async def test_reports_arrive_in_order_and_before_the_result(proxy: tfr.LearnerProxy, one: str, seen: Seen) -> None:
    values = [*range(50), {"loss": torch.tensor(0.5)}]
    assert await proxy.custom_method(one, "report_all", values) == "reported"
    kinds = [type(event) for event in seen.events]
    assert kinds == [CallStarted, *[ProgressReported] * 51, CallEnded]
    assert seen.progress(one)[:50] == list(range(50))
    assert torch.equal(seen.progress(one)[50]["loss"], torch.tensor(0.5))
    assert len({event.call_id for event in seen.events}) == 1  # type: ignore[attr-defined]


async def test_a_report_is_taken_by_value(proxy: tfr.LearnerProxy, one: str, seen: Seen) -> None:
    await proxy.custom_method(one, "report_live")
    assert [progress.item() for progress in seen.progress(one)] == [0, 1, 2]


async def test_a_report_that_cannot_be_sent_is_the_learners_error(proxy: tfr.LearnerProxy, one: str) -> None:
    with pytest.raises(tfr.SerializationError):
        await proxy.custom_method(one, "report_unsendable")
    assert await proxy.custom_method(one, "same", 1) == 1


async def test_a_subscriber_that_fails_harms_neither_calls_nor_other_subscribers(
    proxy: tfr.LearnerProxy, one: str, seen: Seen, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(event: object) -> None:
        raise ValueError("a bad subscriber")

    unsubscribe = proxy.subscribe(fail)
    later = Seen()
    unsubscribe_later = proxy.subscribe(later)
    try:
        assert await proxy.custom_method(one, "same", 1) == 1
    finally:
        unsubscribe()
        unsubscribe_later()
    assert len(later.events) == len(seen.events) == 2
    assert "a bad subscriber" in caplog.text
    await proxy.custom_method(one, "same", 1)
    assert len(later.events) == 2


async def test_stats_count_calls_failures_and_learners(
    proxy: tfr.LearnerProxy, one: str, mode: str, num_hosts: int
) -> None:
    before = proxy.stats()
    await proxy.custom_method(one, "same", torch.zeros(1000))
    with pytest.raises(ValueError, match="plain"):
        await proxy.custom_method(one, "fail", "value")
    after = proxy.stats()
    assert after["mode"] == mode == proxy.mode
    assert after["calls"] - before["calls"] == 2
    assert after["failed_calls"] - before["failed_calls"] == 1
    assert after["pending_calls"] == 0
    for name in ("bytes_sent", "bytes_received"):
        assert after[name] - before[name] >= (4000 if mode != "local" else 0)
    made = [sum(worker["learners"] for worker in stats["workers"].values()) for stats in (before, after)]
    assert made[1] - made[0] == 1
    assert len(after["workers"]) == num_hosts


async def test_stats_do_not_wait_for_a_method_that_runs(
    proxy: tfr.LearnerProxy, fresh: Fresh, latch: Latch, seen: Seen
) -> None:
    one, other = fresh.together(2)
    calls = [asyncio.create_task(proxy.custom_method(one, "hold", latch.path))]
    await seen.reported(one)
    calls += await submitted(proxy, proxy.custom_method(other, "same", 1))
    began = time.perf_counter()
    stats = proxy.stats()
    assert time.perf_counter() - began < 0.1
    assert stats["pending_calls"] == 2
    latch.open()
    await asyncio.gather(*calls)


async def test_a_proxy_knows_its_clients(proxy: tfr.LearnerProxy) -> None:
    assert proxy.client_ids[:2] == ["client_0", "client_1"]
    proxy.client_ids.clear()
    assert proxy.client_ids  # a list of one's own


async def test_gathered_calls_of_many_learners_all_end(proxy: tfr.LearnerProxy, fresh: Fresh) -> None:
    ids = fresh.apart(40)
    calls = [
        proxy.custom_method(ids[number % 40], "echo_async" if number % 2 else "echo", number) for number in range(800)
    ]
    results = await asyncio.gather(*calls)
    assert [args[0] for args, _ in results] == list(range(800))


async def test_retries_make_a_learner_again_and_nothing_twice(proxy: tfr.LearnerProxy, one: str) -> None:
    with pytest.raises(ValueError, match="fails"):
        await proxy.options(retries=3).custom_method(one, "fail_if", True)
    assert await proxy.custom_method(one, "append", 1) == 1
    with pytest.raises(ValueError, match="plain"):
        await proxy.options(retries=3).custom_method(one, "fail", "value")
    assert await proxy.options(retries=3).custom_method(one, "append", 2) == 2


@pytest.mark.parametrize("name", ["__class__", "_dispatcher_", "__len__"])
async def test_a_handle_has_no_private_methods(proxy: tfr.LearnerProxy, one: str, name: str) -> None:
    learner = proxy.client(one)
    if name == "__class__":
        assert learner.__class__ is tfr.LearnerHandle
    else:
        with pytest.raises(AttributeError):
            getattr(learner, name)
