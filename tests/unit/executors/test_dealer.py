"""Dealing of stateless calls: shares of the work, the least busy worker, and calls that an idle worker takes."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_workers import ALLOW, GIVEN_BACK, FakeWorker, call, table_of, until
from settling import settled, within

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.errors import WorkerLostError
from torchfedrpc.events import EventBus
from torchfedrpc.executors.dealer import Assignment, Dealer, Returned
from torchfedrpc.executors.durations import Durations
from torchfedrpc.executors.eligible_workers import EligibleWorkers
from torchfedrpc.executors.session import Run, SessionStream
from torchfedrpc.executors.stateless import StatelessSession
from torchfedrpc.host.call import Call, Outcome
from torchfedrpc.host.process import choose_device
from torchfedrpc.rpc.workers import Workers


def of(number: int, client_id: str = "a") -> Call:
    return call(number, client_id)


def stream(number: int, client_id: str) -> Call:
    return replace(call(number, client_id), kind="stream")


class Game:
    """A dealer, its workers, and the calls of the run."""

    def __init__(
        self,
        *labels: str,
        endpoints: dict[str, str] | None = None,
        machines: dict[str, str] | None = None,
        max_learners: int | None = None,
    ) -> None:
        self.workers = [FakeWorker(label) for label in labels]
        for worker in self.workers:
            worker.machine = (machines or {}).get(worker.label, "here")
        self.table: Workers = table_of(*self.workers)
        self.durations = Durations()
        self.clients: dict[str, dict[str, Any]] = {f"client_{number}": {} for number in range(40)}
        self.clients |= {name: {} for name in "abcdefs"}
        spec: Any = SimpleNamespace(
            learner=SimpleNamespace(allow_list=lambda: ALLOW), events=EventBus(), clients=self.clients
        )
        self.run = Run(RuntimeConfig(), spec, self.durations)
        self.busy: set[str] = set()
        eligible = EligibleWorkers(self.table, endpoints or {})
        eligible.note_machines()
        self.dealer = Dealer(self.run, self.table, eligible, max_learners, self.busy)
        self.returned: asyncio.Queue[Returned] = asyncio.Queue()

    def lasted(self, client_id: str, seconds: float) -> None:
        self.durations.note(of(0, client_id), Outcome("value", seconds=seconds))

    def deal(self, *numbers: int, are_ranges: bool = True, without: FakeWorker | None = None) -> dict[str, list[int]]:
        """Deal calls of clients of these numbers; the places of each worker."""
        calls = {number: of(number, f"client_{number}") for number in numbers}
        self.dealt, errors = self.dealer.deal(calls, self.returned, are_ranges=are_ranges, without=without)
        assert not errors
        return {one.worker.label: list(one.calls) for one in self.dealt}


# Dealing.


async def test_a_deal_gives_each_worker_neighbours() -> None:
    game = Game("worker1", "worker2")
    assert game.deal(*range(6)) == {"worker1": [0, 1, 2], "worker2": [3, 4, 5]}


async def test_a_deal_follows_earlier_durations_and_the_given_order() -> None:
    game = Game("worker1", "worker2")
    for number, seconds in enumerate([4.0, 1.0, 1.0, 1.0, 1.0]):
        game.lasted(f"client_{number}", seconds)
    assert game.deal(0, 4, 3, 2, 1) == {"worker1": [0], "worker2": [4, 3, 2, 1]}


async def test_a_deal_out_of_ranges_lets_the_first_begin_first() -> None:
    game = Game("worker1", "worker2")
    for number in range(6):
        game.lasted(f"client_{number}", 1.0 if number < 3 else 2.0)
    assert game.deal(0, 1, 2, 3, 4, 5, are_ranges=False) == {"worker1": [0, 2, 4], "worker2": [1, 3, 5]}


async def test_a_deal_knows_what_workers_have_already() -> None:
    game = Game("worker1", "worker2")
    for number in range(12):
        game.lasted(f"client_{number}", 1.0)
    game.deal(0, 1)
    game.dealer.end(game.dealt[1])
    assert game.deal(2, 3, 4) == {"worker1": [2], "worker2": [3, 4]}


async def test_fewer_calls_than_workers_go_to_different_devices() -> None:
    game = Game("worker1", "worker2", "worker3", "worker4")
    for worker, device in zip(game.workers, ["cuda:0", "cuda:0", "cuda:1", "cuda:1"], strict=True):
        worker.device = device
    assert list(game.deal(0, 1)) == ["worker1", "worker3"]


async def test_calls_go_to_the_gpu_with_the_least_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    game = Game("worker1", "worker2", "worker3", "worker4")
    for index, worker in enumerate(game.workers):
        worker.device = str(choose_device(index))
    game.lasted("a", 5.0)
    game.lasted("b", 1.0)
    game.lasted("c", 0.5)
    placed = [(await game.dealer.assign(of(number, client))).worker.label for number, client in enumerate("aacbb")]
    assert placed == ["worker1", "worker2", "worker3", "worker4", "worker3"]  # none is free, and cuda:0 has less
    game.dealer.end(next(iter(game.dealer._loads[game.workers[3]].assignments)))
    assert list(game.deal(0)) == ["worker4"]


async def test_an_idle_worker_of_a_busy_gpu_comes_behind_one_of_a_gpu_that_is_almost_free() -> None:
    game = Game("worker1", "worker2", "worker3", "worker4", "worker5")
    for worker, device in zip(game.workers, ["cuda:0", "cuda:0", "cuda:1", "cuda:1", "cpu"], strict=True):
        worker.device = device
    game.lasted("a", 5.0)
    game.lasted("b", 0.01)
    first, other = await game.dealer.assign(of(1, "a")), await game.dealer.assign(of(2, "b"))
    assert [first.worker.label, other.worker.label] == ["worker1", "worker3"]
    placed = [(await game.dealer.assign(of(number, "a"))).worker.label for number in (3, 4)]
    assert placed == ["worker5", "worker3"]


async def test_endpoints_restrict_the_workers() -> None:
    machines = {"worker1": "alpha", "worker2": "beta", "worker3": "beta"}
    endpoints = {"client_0": "host:beta", "client_1": "host:beta", "client_2": "rank:1", "client_3": "host:alpha"}
    game = Game(*machines, endpoints=endpoints, machines=machines)
    dealt = game.deal(0, 1, 2, 3)
    assert {place for label in ("worker2", "worker3") for place in dealt.get(label, [])} == {0, 1}
    assert dealt["worker1"] == [2, 3]


async def test_an_address_is_for_the_clients_that_name_it() -> None:
    game = Game("worker1", "10.0.0.1:80", endpoints={"client_0": "10.0.0.1:80"})
    assert game.deal(0, 1, 2) == {"10.0.0.1:80": [0], "worker1": [1, 2]}


# Single calls.


async def test_a_single_call_goes_to_the_worker_with_the_least_expected_work() -> None:
    game = Game("worker1", "worker2")
    game.lasted("a", 5.0)
    game.lasted("b", 1.0)
    placed = [(await game.dealer.assign(of(number, client))) for number, client in enumerate("abbbbb")]
    assert [one.worker.label for one in placed] == ["worker1", *["worker2"] * 5]
    assert all(one.worker.registrations.keys() >= {call.client_id for call in one.calls.values()} for one in placed)


async def test_a_call_without_a_worker_waits_for_one() -> None:
    game = Game("worker1")
    game.table.lose("worker1", "worker1 was lost")
    placing = asyncio.ensure_future(game.dealer.assign(of(1)))
    await settled()
    assert not placing.done()
    game.table["worker1"].newcomer = newcomer = FakeWorker("worker1")
    game.table.enlist(game.table["worker1"])
    game.table.serve()
    assert (await placing).worker is newcomer


async def test_a_call_whose_workers_are_all_given_up_fails_with_the_endpoint() -> None:
    game = Game("worker1", "worker2", endpoints={"a": "host:beta"}, machines={"worker2": "beta"})
    _, there = game.workers
    assert (await game.dealer.assign(of(1))).worker.label == "worker2"
    there.end()
    game.table.lose("worker2", "worker2 was lost (on purpose)")
    game.table["worker2"].machine = None
    game.table.give_up("worker2", "worker2 was lost (on purpose)")
    with pytest.raises(WorkerLostError, match=r"no worker is left where 'host:beta' wants it: worker2 was lost"):
        await game.dealer.assign(of(2))
    assert (await game.dealer.assign(of(3, "b"))).worker is game.workers[0]


async def test_a_rank_that_is_given_up_leaves_its_clients_to_the_others() -> None:
    game = Game("worker1", "worker2", endpoints={"a": "rank:2"})
    game.table.lose("worker2", "worker2 was lost")
    game.table.give_up("worker2", "worker2 was lost")
    assert (await game.dealer.assign(of(1))).worker is game.workers[0]


# Calls that an idle worker takes.


async def test_an_idle_worker_takes_the_second_half_of_what_has_not_begun() -> None:
    game = Game("worker1", "worker2")
    busy, idle = game.workers
    for number in range(8):
        game.lasted(f"client_{number}", 1.0)
    game.deal(*range(8))
    first, second = game.dealt
    busy.outcomes["take back 0 1 2 3"] = Outcome("value", of_calls=tuple((one, _given()) for one in (2, 3)))
    game.dealer.end(second)
    assert await within(game.returned.get()) == ([2, 3], busy)
    assert busy.log == ["take back 0 1 2 3"]
    assert idle.log == []
    assert list(first.calls) == [0, 1]
    assert game.deal(2, 3, without=busy) == {"worker2": [2, 3]}


def _given() -> Outcome:
    return Outcome("given_back", never_ran=True)


async def test_nothing_is_taken_that_is_not_worth_a_message() -> None:
    game = Game("worker1", "worker2")
    for number in range(4):
        game.lasted(f"client_{number}", 0.0005)
    game.deal(*range(4))
    game.dealer.end(game.dealt[1])
    await settled()
    assert game.workers[0].log == []


async def test_nothing_is_taken_from_a_worker_with_one_call() -> None:
    game = Game("worker1", "worker2")
    for number in range(2):
        game.lasted(f"client_{number}", 5.0)
    game.deal(0, 1)
    game.dealer.end(game.dealt[1])
    await settled()
    assert game.workers[0].log == []


async def test_of_calls_that_are_no_range_an_idle_worker_takes_every_second_one() -> None:
    game = Game("worker1", "worker2")
    for number in range(12):
        game.lasted(f"client_{number}", 1.0)
    game.deal(*range(12), are_ranges=False)
    first, second = game.dealt
    game.dealer.end(second)
    await until(lambda: len(game.workers[0].log) == 1)
    assert game.workers[0].log == ["take back 0 4 8 2 6 10"]  # of which the later half comes back
    game.dealer.end(first)


async def test_a_worker_is_asked_by_one_idle_worker_at_a_time() -> None:
    game = Game("worker1", "worker2", "worker3")
    for number in range(12):
        game.lasted(f"client_{number}", 1.0)
    game.deal(*range(12))
    game.workers[0].holds.add("take back")
    for one in game.dealt[1:]:
        game.dealer.end(one)
    await settled()
    assert game.workers[0].log == ["take back 0 1 2 3"]
    game.workers[0].end()
    await settled()


async def test_a_worker_that_joins_takes_calls() -> None:
    game = Game("worker1")
    for number in range(6):
        game.lasted(f"client_{number}", 1.0)
    game.deal(*range(6))
    newcomer = FakeWorker("worker2")
    source: Any = SimpleNamespace(replaces=False)
    game.table.enlist(game.table.admit(source, newcomer))
    game.table.serve()
    game.dealer.rebalance()
    await until(lambda: game.workers[0].log)
    assert game.workers[0].log == ["take back 0 1 2 3 4 5"]


async def test_calls_are_taken_that_the_idle_worker_may_run() -> None:
    endpoints = {f"client_{number}": "rank:1" for number in (0, 1, 2)}
    game = Game("worker1", "worker2", endpoints=endpoints)
    for number in range(8):
        game.lasted(f"client_{number}", 1.0)
    assert game.deal(*range(8)) == {"worker1": [0, 1, 2, 3], "worker2": [4, 5, 6, 7]}
    game.dealer.end(game.dealt[1])
    await settled()
    assert game.workers[0].log == ["take back 3"]


async def test_a_leaving_worker_gives_all_back_and_is_waited_for() -> None:
    game = Game("worker1", "worker2")
    game.deal(*range(4))
    first, _ = game.dealt
    leaver = game.workers[0]
    leaver.outcomes["take back 0 1"] = Outcome("value", of_calls=((1, _given()),))
    game.table.leave("worker1")
    clearing = asyncio.ensure_future(game.dealer.clear(leaver))
    assert await within(game.returned.get()) == ([1], leaver)
    assert not clearing.done()
    assert game.deal(1) == {"worker2": [1]}
    game.dealer.end(first)
    await clearing


async def test_an_answer_about_other_calls_is_ignored() -> None:
    game = Game("worker1", "worker2")
    for number in range(4):
        game.lasted(f"client_{number}", 1.0)
    game.deal(*range(4))
    first, second = game.dealt
    game.workers[0].outcomes["take back 0 1"] = Outcome(
        "value", of_calls=((77, _given()), (2, _given()), (1, _given()))
    )
    game.dealer.end(second)
    assert await within(game.returned.get()) == ([1], game.workers[0])
    assert list(first.calls) == [0]


async def test_a_worker_that_is_lost_as_it_is_asked_gives_nothing_back() -> None:
    game = Game("worker1", "worker2")
    for number in range(4):
        game.lasted(f"client_{number}", 1.0)
    game.deal(*range(4))
    first, second = game.dealt
    game.workers[0].holds.add("take back")
    game.dealer.end(second)
    await until(lambda: game.workers[0].waiting)
    game.workers[0].end(0)
    await settled()
    assert game.returned.empty()
    game.dealer.end(first)
    assert game.workers[0] not in game.dealer._loads


async def test_a_worker_that_is_much_later_than_expected_is_asked_without_another_event() -> None:
    game = Game("worker1", "worker2")
    for number in range(4):
        game.lasted(f"client_{number}", 0.002)
    game.deal(*range(4))
    game.dealer.end(game.dealt[1])
    assert not game.workers[0].log
    await until_asked(game.workers[0])
    assert game.workers[0].log == ["take back 0 1"]


async def until_asked(worker: FakeWorker) -> None:
    async with asyncio.timeout(10):
        while not worker.log:
            await asyncio.sleep(0.001)


# Learners that a worker has.


async def test_a_worker_forgets_the_learners_that_were_called_least_recently() -> None:
    game = Game("worker1", max_learners=3)
    (worker,) = game.workers
    for client_id in "abcad":
        game.dealer.end(await game.dealer.assign(of(1, client_id)))
    assert list(worker.registrations) == ["c", "a", "d"]
    assert worker.log == ["forget b"]


async def test_a_worker_keeps_the_learners_that_have_calls() -> None:
    game = Game("worker1", max_learners=1)
    game.busy |= {"a", "b"}
    for client_id in "abc":
        await game.dealer.assign(of(1, client_id))
    assert list(game.workers[0].registrations) == ["a", "b", "c"]
    game.busy.clear()
    await game.dealer.assign(of(1, "d"))
    assert list(game.workers[0].registrations) == ["d"]


async def test_learners_are_made_with_the_arguments_as_of_the_first_call_also_where_none_is_known_any_more() -> None:
    game = Game("worker1", "worker2")
    first, second = game.workers
    game.clients["a"]["scale"] = [1]
    game.dealer.register(first, "a")
    known = first.registrations["a"].kwargs
    first.forget("a")
    game.clients["a"]["scale"][0] = 2
    for worker in (first, second):
        game.dealer.register(worker, "a")
        assert worker.registrations["a"].kwargs is known


# Workers that are late, or stuck.


async def test_a_worker_without_waiting_calls_is_not_asked_again_and_another_is() -> None:
    game = Game("worker1", "worker2", "worker3")
    for number in range(12):
        game.lasted(f"client_{number}", 2.0 if number < 4 else 1.0)
    game.deal(*range(12))
    busiest = max(game.dealt, key=lambda one: sum(one.seconds.values()))
    others = [one for one in game.dealt if one is not busiest]
    busy: Any = busiest.worker
    busy.outcomes["take back " + " ".join(map(str, busiest.calls))] = Outcome("value")
    game.dealer.end(others[0])
    other: Any = others[1].worker
    await until(lambda: other.log)
    await settled()
    assert len(busy.log) == len(other.log) == 1


async def test_calls_that_a_late_worker_gives_back_do_not_go_to_it_again() -> None:
    game = Game("worker1", "worker2")
    game.deal(*range(8))  # of unknown duration
    first, second = game.dealt
    for number in range(4, 8):
        game.lasted(f"client_{number}", 0.5)
    given = tuple((call_id, _given()) for call_id in (2, 3))
    game.workers[0].outcomes["take back 0 1 2 3"] = Outcome("value", of_calls=given)
    await asyncio.sleep(0.03)
    game.dealer.end(second)
    places, giver = await within(game.returned.get())
    assert game.dealer._loads[game.workers[0]].seconds > 0
    assert game.deal(*places, without=giver) == {"worker2": [2, 3]}
    game.dealer.end(first)


async def test_a_worker_whose_method_ignores_its_cancellation_gets_no_calls_until_it_ends() -> None:
    game = Game("worker1", "worker2")
    first, second = game.workers
    call_of_a = of(1, "a")
    given = await game.dealer.assign(call_of_a)
    first.holds = {"barrier"}
    ending = asyncio.ensure_future(game.dealer.hold(call_of_a))
    game.dealer.end(given)
    await until(lambda: first.waiting)
    placed = [await game.dealer.assign(of(number, "b")) for number in (2, 3)]
    assert [one.worker for one in placed] == [second, second]
    assert game.deal(4, 5) == {"worker2": [4, 5]}
    assert not ending.done()
    first.release("barrier")
    await within(ending)
    assert (await game.dealer.assign(of(6, "c"))).worker is first


async def test_calls_behind_a_method_that_ignores_its_cancellation_are_taken_and_its_barrier_is_not() -> None:
    game = Game("worker1", "worker2")
    first, _ = game.workers
    call_of_a = of(1, "a")
    given = await game.dealer.assign(call_of_a)
    game.deal(2, 3)
    waiting, other = game.dealt
    first.holds = {"barrier", "take back"}
    ending = asyncio.ensure_future(game.dealer.hold(call_of_a))
    game.dealer.end(given)
    game.dealer.end(other)
    await until(lambda: "take back 2" in first.waiting)
    assert not ending.done()
    first.release("barrier")
    await within(ending)
    first.release("take back 2", Outcome("value"))
    await settled()
    game.dealer.end(waiting)
    assert not game.dealer._num_calls


async def test_a_worker_that_leaves_is_clear_once_its_method_that_was_cut_off_has_ended() -> None:
    game = Game("worker1", "worker2")
    first, _ = game.workers
    call_of_a = of(1, "a")
    given = await game.dealer.assign(call_of_a)
    first.holds = {"barrier"}
    ending = asyncio.ensure_future(game.dealer.hold(call_of_a))
    game.dealer.end(given)
    clearing = asyncio.ensure_future(game.dealer.clear(first))
    await settled()
    assert not clearing.done()
    first.release("barrier")
    await within(clearing)
    await within(ending)


async def test_a_single_call_that_was_given_back_goes_to_another_worker() -> None:
    game = Game("worker1", "worker2")
    first, second = game.workers
    game.dealer.end(await game.dealer.assign(of(1), without=first))
    await game.dealer.assign(of(2), without=first)
    assert list(game.dealer._loads) == [second]


async def test_a_worker_with_an_open_stream_takes_calls_and_gets_the_next_stream_last() -> None:
    game = Game("worker1", "worker2")
    first, second = game.workers
    streams = [await game.dealer.assign(stream(number, "s")) for number in (1, 2)]
    assert [one.worker for one in streams] == [first, second]
    for number in range(4):
        game.lasted(f"client_{number}", 5.0)
    game.dealer.deal({number: of(number, f"client_{number}") for number in range(3)}, game.returned, without=first)
    game.dealer.rebalance()
    await until(lambda: any("take back" in words for words in second.log))
    assert (await game.dealer.assign(of(7, "b"), without=second)).worker is first
    for one in streams:
        game.dealer.end(one)


async def test_a_worker_whose_calls_were_all_given_back_has_none_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    game, now = Game("worker1", "worker2"), 100.0
    monkeypatch.setattr("torchfedrpc.executors.dealer.time", SimpleNamespace(monotonic=lambda: now))
    busy, _ = game.workers
    busy.holds = {f"call {number}" for number in range(4)}
    given = [game.dealer._give(Assignment(busy, {n: of(n, f"client_{n}")}, {n: 1.0}, game.returned)) for n in (0, 1)]
    for n in (0, 1):
        game.run.in_background(busy.submit(of(n, f"client_{n}")))
    await settled()
    clearing = asyncio.ensure_future(game.dealer.clear(busy))
    await until(lambda: game.returned.qsize() == 2)
    now = 200.0
    game.dealer.rebalance()
    for one in given:
        game.dealer.end(one)
    await within(clearing)


async def test_a_call_that_is_cancelled_in_the_queue_leaves_the_time_of_the_one_that_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    game, now = Game("worker1", "worker2"), 100.0
    monkeypatch.setattr("torchfedrpc.executors.dealer.time", SimpleNamespace(monotonic=lambda: now))
    for client_id in ("client_1", "client_2", "client_3"):
        game.lasted(client_id, 10.0)
    _, other, queued = [await game.dealer.assign(of(number, f"client_{number}")) for number in (1, 2, 3)]
    now = 109.0
    game.dealer.end(queued)
    game.dealer.end(other)
    game.lasted("a", 7.0)
    await game.dealer.assign(of(4, "a"))
    assert (await game.dealer.assign(of(5, "b"))).worker is queued.worker  # it needs another 5 s, not 10


async def test_a_closed_stream_that_is_given_back_leaves_no_work_behind() -> None:
    game, joined = Game("worker1"), FakeWorker("worker2")
    (worker,) = game.workers
    worker.holds = {"stream", "cancel"}
    sessions: dict[str, StatelessSession] = {}
    session = sessions["s"] = StatelessSession("s", game.run, game.dealer, sessions)
    reading = SessionStream(SimpleNamespace(session=lambda client_id: session), stream(1, "s"))
    step = asyncio.ensure_future(reading.next())
    await until(lambda: "stream 1" in worker.waiting)
    reading.close()
    await until(lambda: "cancel 1" in worker.waiting)
    game.table.leave("worker1")
    worker.release("stream 1", GIVEN_BACK)
    await settled()
    worker.release("cancel 1", GIVEN_BACK)
    await settled()
    game.table.enlist(game.table.admit(SimpleNamespace(replaces=False), joined))  # type: ignore[arg-type]
    game.table.serve()
    assert (await within(step)).kind == "cancelled"
    await within(game.dealer.clear(joined))
    assert not sessions


async def test_the_learners_of_a_deal_are_forgotten_in_one_go() -> None:
    game = Game("worker1", max_learners=2)
    (worker,) = game.workers
    clients = [f"client_{number}" for number in range(10)]
    game.busy |= set(clients)
    game.deal(*range(10))
    assert list(worker.registrations) == clients
    game.busy -= set(clients)
    game.deal(9, 8)
    assert set(worker.registrations) == {"client_9", "client_8"}


async def test_calls_behind_a_method_that_was_cut_off_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    game, now = Game("worker1", "worker2"), 100.0
    monkeypatch.setattr("torchfedrpc.executors.dealer.time", SimpleNamespace(monotonic=lambda: now))
    game.lasted("a", 60.0)
    game.lasted("b", 1.0)
    game.lasted("c", 80.0)
    call_of_a = of(1, "a")
    given, other = await game.dealer.assign(call_of_a), await game.dealer.assign(of(2, "c"))
    behind = await game.dealer.assign(of(3, "b"))
    busy = game.workers[0]
    assert (given.worker, behind.worker) == (busy, busy)
    busy.holds = {"call 3", "barrier"}
    game.run.in_background(busy.submit(of(3, "b")))
    now = 140.0  # 21 s are expected to be left there
    game.dealer.end(other)
    await settled()
    assert not [words for words in busy.log if "take back" in words]
    ending = asyncio.ensure_future(game.dealer.hold(call_of_a))
    game.dealer.end(given)
    await until(lambda: any("take back" in words for words in busy.log) and "barrier" in busy.waiting)
    busy.release("barrier")
    await within(ending)
