"""A host and the ids of calls: one that is asked for again has the first outcome, until that is acknowledged."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from conftest import LoopErrors
from internals import stored_learners

from torchfedrpc.config import RuntimeConfig
from torchfedrpc.host import torch_settings
from torchfedrpc.host.activity import Activity
from torchfedrpc.host.call import Batch, Call, Outcome, Registration
from torchfedrpc.host.learner_host import LearnerHost
from torchfedrpc.host.process_state import ProcessState
from torchfedrpc.host.randomness import RandomStreams
from torchfedrpc.host.spec import LearnerSpec
from torchfedrpc.reduce import reducers
from torchfedrpc.wire.file import TensorFiles
from torchfedrpc.wire.packing import Parcel, pack

TIMEOUT_S = 20.0
opened = threading.Event()
waiting = threading.Event()


class Counting:
    """Counts its calls."""

    def __init__(self, client_id: str) -> None:
        self.count = 0

    def add(self) -> int:
        self.count += 1
        return self.count

    def add_once_opened(self) -> int:
        assert opened.wait(TIMEOUT_S)
        return self.add()

    async def add_on_loop(self) -> int:
        return self.add()

    def items(self) -> Iterator[int]:
        try:
            while True:
                yield self.add()
        finally:
            self.count += 100

    def ones(self) -> torch.Tensor:
        return torch.ones(1 << 20)

    def fail(self) -> None:
        raise ValueError(f"call {self.add()}")


@pytest.fixture
def host() -> Iterator[LearnerHost]:
    host = LearnerHost(LearnerSpec.of(Counting, 0, RuntimeConfig())[0])
    host.register(Registration("client_1", pack({})))
    yield host
    opened.clear()
    waiting.clear()
    assert host.close()


class SlowAtFirst(Counting):
    """Is made at once, unless it is the first one."""

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        if not waiting.is_set():
            waiting.set()
            assert opened.wait(TIMEOUT_S)


class Slow(Counting):
    """Is made and captured once `opened` is set; the learner of ``quick`` is made at once."""

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        if client_id != "quick":
            self._wait()

    def __getstate__(self) -> dict[str, int]:
        self._wait()
        return {"count": self.count}

    def _wait(self) -> None:
        waiting.set()
        assert opened.wait(TIMEOUT_S)


def call(call_id: int, method: str = "add", client_id: str = "client_1") -> Call:
    return Call(call_id, client_id, method, pack(((), {})))


def asked(host: LearnerHost, what: Call) -> Future[Outcome]:
    outcome: Future[Outcome] = Future()
    host.submit(what, outcome.set_result)
    return outcome


def result(host: LearnerHost, what: Call) -> object:
    return asked(host, what).result(TIMEOUT_S).result(what, host.allow, "worker1")


def test_repeated_id_has_the_first_outcome(host: LearnerHost) -> None:
    assert [result(host, call(1)) for _ in range(3)] == [1, 1, 1]
    for _ in range(2):
        with pytest.raises(ValueError, match="call 2"):
            result(host, call(2, "fail"))
    assert result(host, call(3)) == 3


def test_repeated_id_of_a_call_that_runs_or_waits_joins_it(host: LearnerHost) -> None:
    asked(host, call(1, "add_once_opened"))
    asked(host, call(2))
    repeated = asked(host, call(1, "add_once_opened")), asked(host, call(2))
    opened.set()
    values = [outcome.result(TIMEOUT_S).result(call(1), host.allow, "worker1") for outcome in repeated]
    assert values == [1, 2]
    assert result(host, call(3)) == 3


def test_outcome_is_forgotten_once_it_is_acknowledged(host: LearnerHost) -> None:
    assert [result(host, call(number)) for number in (1, 2)] == [1, 2]
    host.acknowledge([1])
    assert result(host, call(2)) == 2
    assert result(host, call(1)) == 3  # a new call to the host, which the driver does not send


@pytest.mark.parametrize("end", [lambda host: host.acknowledge([1]), lambda host: host.keep_only([2])])
def test_files_of_a_forgotten_outcome_are_used_again(host: LearnerHost, end: Callable[[LearnerHost], None]) -> None:
    def addresses(number: int) -> list[tuple[int, int]]:
        parcel = asked(host, call(number, "ones")).result(TIMEOUT_S).parcel
        assert isinstance(parcel, Parcel)
        assert parcel.files is not None
        return [address[:2] for address in parcel.files.addresses()]

    host.show_files(True)
    first, other = addresses(1), addresses(2)
    end(host)
    assert addresses(3) == first
    assert addresses(4) not in (first, other)


def test_reply_that_raises_leaves_the_host_to_other_calls(host: LearnerHost) -> None:
    def reply(outcome: Outcome) -> None:
        raise RuntimeError("nobody takes it")

    host.submit(call(1), reply)
    assert [result(host, call(2, "add_on_loop")), result(host, call(3))] == [2, 3]


@contextmanager
def host_of_one(learner: type, num_threads: int = 1) -> Iterator[LearnerHost]:
    """A host with one learner in memory."""
    runtime = RuntimeConfig(max_resident_learners=1, max_concurrent_calls=num_threads)
    host = LearnerHost(LearnerSpec.of(learner, 0, runtime)[0])
    for client_id in ("client_1", "quick"):
        host.register(Registration(client_id, pack({})))
    try:
        yield host
    finally:
        opened.set()
        assert host.close()
        opened.clear()
        waiting.clear()


@pytest.mark.parametrize("while_it", ["is made", "makes room"])
def test_a_call_that_is_cancelled_before_its_method_begins_never_begins(while_it: str) -> None:
    with host_of_one(Slow) as host:
        if while_it == "makes room":
            assert result(host, call(1, client_id="quick")) == 1
        cancelled = asked(host, call(2))
        assert waiting.wait(TIMEOUT_S)
        host.cancel(2)
        assert cancelled.result(TIMEOUT_S).kind == "cancelled"
        opened.set()
        assert result(host, call(3)) == 1
        assert host.mailbox("client_1").counts == {"add": 1}  # so its random streams are those of the first call


@pytest.mark.parametrize("is_rebuilt", [False, True])
def test_a_learner_that_leaves_while_it_is_evicted_is_not_on_disk(is_rebuilt: bool) -> None:
    with host_of_one(Slow) as host:
        assert result(host, call(1, client_id="quick")) == 1
        other = asked(host, call(2))
        assert waiting.wait(TIMEOUT_S)
        if is_rebuilt:
            host.register(Registration("quick", pack({}), build=1))
        else:
            host.forget("quick")
        opened.set()
        assert other.result(TIMEOUT_S).kind == "value"
        assert stored_learners(host) == []


def test_a_learner_made_by_a_call_of_an_earlier_build_takes_no_place_of_the_present_one() -> None:
    with host_of_one(SlowAtFirst, num_threads=2) as host:
        asked(host, call(1))
        assert waiting.wait(TIMEOUT_S)
        earlier = asked(host, call(2))
        host.register(Registration("client_1", pack({}), build=1))
        assert result(host, call(3)) == 1
        opened.set()
        assert earlier.result(TIMEOUT_S).result(call(2), host.allow, "worker1") == 2
        assert result(host, call(4, client_id="quick")) == 1
        assert (stored_learners(host), host.stats()["learners"]) == (["client_1"], 1)
        assert result(host, call(5)) == 2


def test_a_step_of_a_stream_that_is_cancelled_in_the_queue_makes_no_item(host: LearnerHost) -> None:
    host.register(Registration("client_2", pack({})))
    stream = replace(call(1, "items"), kind="stream")
    assert result(host, stream) == 1
    asked(host, call(2, "add_once_opened", "client_2"))
    step: Future[Outcome] = Future()
    host.advance(1, 1, step.set_result)
    host.cancel(1)
    assert step.result(TIMEOUT_S).kind == "cancelled"
    opened.set()
    assert result(host, call(3)) == 102  # one item, and the generator was closed


def test_cancelling_a_batch_does_not_wait_for_a_method_that_adds_results_up(
    host: LearnerHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = reducers.Entry.take

    def take_once_opened(entry: reducers.Entry, other: reducers.Entry, num_sums: int) -> None:
        waiting.set()
        assert opened.wait(TIMEOUT_S)
        take(entry, other, num_sums)
        merged.set()

    monkeypatch.setattr(reducers.Entry, "take", take_once_opened)
    merged = threading.Event()
    host.register(Registration("client_2", pack({})))
    calls = (0, call(1)), (1, call(2, client_id="client_2"))
    answered: Future[Outcome] = Future()
    host.run_batch(Batch(3, pack(reducers.Mean()), 2, calls), answered.set_result)
    assert waiting.wait(TIMEOUT_S)
    threading.Timer(1.0, opened.set).start()
    host.cancel(3)
    assert not opened.is_set()
    outcome = answered.result(TIMEOUT_S)
    assert merged.is_set()
    assert [(place, of_call.kind) for place, of_call in outcome.of_calls] == [(0, "value"), (1, "cancelled")]
    assert outcome.parcel is not None


def test_a_call_that_cannot_be_shown_as_running_leaves_the_host_to_other_learners() -> None:
    activity = Activity()
    spec, _ = LearnerSpec.of(Counting, 0, RuntimeConfig())
    host = LearnerHost(spec, ProcessState(spec, activity=activity))
    for client_id in ("client_1", "client_2"):
        host.register(Registration(client_id, pack({})))
    asked(host, call(2**63, client_id="client_2"))
    assert [result(host, call(1, "add_on_loop")), result(host, call(2))] == [1, 2]
    assert host.close()
    activity.close()


def test_random_streams_that_cannot_be_restored_leave_the_host_to_other_calls(
    monkeypatch: pytest.MonkeyPatch, loop_errors: LoopErrors
) -> None:
    give_back = RandomStreams.give_back
    num_failures = 0

    def fails_on_loop(streams: RandomStreams) -> None:
        nonlocal num_failures
        if threading.current_thread().name == "torchfedrpc-async" and not num_failures:
            num_failures += 1
            raise RuntimeError("out of memory")
        give_back(streams)

    monkeypatch.setattr(RandomStreams, "give_back", fails_on_loop)
    spec, _ = LearnerSpec.of(Counting, 0, RuntimeConfig())
    host = LearnerHost(spec, ProcessState(spec, in_driver=True), clients={"client_1": {}})
    asked(host, call(1, "add_on_loop"))
    assert result(host, call(2)) == 2
    assert num_failures == 1
    assert host.close()
    with pytest.raises(pytest.fail.Exception, match="out of memory"):
        loop_errors.check()


@pytest.mark.parametrize("method", ["add", "add_on_loop"])
def test_call_fails_if_a_setting_cannot_be_restored(
    host: LearnerHost, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    assert result(host, call(1)) == 1

    def fail(dtype: torch.dtype) -> None:
        raise RuntimeError("it cannot be set")

    fails = [
        one._replace(set=fail) if one.name == "torch.set_default_dtype" else one for one in torch_settings._SETTINGS
    ]
    monkeypatch.setattr(torch_settings, "_SETTINGS", fails)
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(RuntimeError, match="a call has changed a setting for good"):
            result(host, call(2, method))
    finally:
        torch.set_default_dtype(torch.float32)
    assert result(host, call(3)) == 2


class Large(Counting):
    """Has a state that snapshots carry in memory files."""

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        self.weights = torch.ones(1 << 20)


def test_a_later_snapshot_is_written_to_memory_that_no_reader_has() -> None:
    host = LearnerHost(LearnerSpec.of(Large, 0, RuntimeConfig())[0])
    host.register(Registration("client_1", pack({})))
    host.show_files(True)
    try:
        result(host, call(1))
        kept, first = snapshot_in_file(host, 2)
        _, second = snapshot_in_file(host, 3)
        assert first != second  # the driver still reads the first one
        del kept
        gc.collect()
        assert {snapshot_in_file(host, 4)[1], snapshot_in_file(host, 5)[1]} <= {first, second}
    finally:
        assert host.close()


def snapshot_in_file(host: LearnerHost, call_id: int) -> tuple[torch.Tensor, int]:
    """A snapshot as a driver has it, which has opened its file, and the number of that file."""
    outcome = asked(host, replace(call(call_id, "snapshot"), arguments=pack(None), kind="snapshot")).result(TIMEOUT_S)
    parcel = outcome.parcel
    assert isinstance(parcel, Parcel)
    assert parcel.files is not None
    addresses = parcel.files.addresses()
    (read,) = TensorFiles.at(addresses, os.getpid()).tensors()
    host.acknowledge([call_id])
    return read, addresses[0][1]
