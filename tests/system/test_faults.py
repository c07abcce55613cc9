"""Faults: they strike workers and the driver at the call that a user's test names, and change no result."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Seen
from losses import pseudo
from processes import LightProcess, ends_within, state_of
from torchrun import run_script, write_script

import torchfedrpc as tfr
from torchfedrpc.errors import ConfigError
from torchfedrpc.events import RoundStarted, WorkerLost
from torchfedrpc.host.faults import Fault, Saboteur
from torchfedrpc.testing import Faults

CLIENTS = [f"client_{number}" for number in range(6)]
SLACK_S = 5.0  # for a busy machine


class Counting:
    """A learner whose results depend on its state and its random streams."""

    def __init__(self, client_id: str) -> None:
        self.total = torch.zeros(3)

    def step(self) -> torch.Tensor:
        self.total += torch.rand(3)
        return self.total.clone()

    async def step_async(self) -> torch.Tensor:
        await asyncio.sleep(0)
        return self.step()

    def steps(self, num_steps: int) -> Iterator[torch.Tensor]:
        for _ in range(num_steps):
            yield self.step()


# A fault.


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"kind": "explode", "at_call": 1}, "no fault is called 'explode'"),
        ({"kind": "kill", "at_call": 0}, "at_call counts the calls of a worker from 1"),
        ({"kind": "kill", "at_call": 1.5}, "at_call counts"),
        ({"kind": "kill", "at_call": True}, "at_call counts"),
        ({"kind": "kill", "at_call": 1, "seconds": 1.0}, "kill is for good"),
        ({"kind": "sever", "at_call": 1, "seconds": 1.0}, "sever is for good"),
        ({"kind": "slow", "at_call": 1}, "needs seconds above 0"),
        ({"kind": "slow", "at_call": 1, "seconds": -1}, "finite number above 0, not -1"),
        ({"kind": "freeze", "at_call": 1, "seconds": float("inf")}, "finite number above 0, not inf"),
        ({"kind": "slow", "at_call": 1, "seconds": "2"}, "finite number above 0, not '2'"),
    ],
)
def test_arguments_of_no_fault_are_refused(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Fault(**fields)


def test_a_fault_survives_json() -> None:
    fault = Fault("slow", 3, 0.5)
    assert Fault(**json.loads(json.dumps(asdict(fault)))) == fault


# A saboteur, which strikes its own process.


@pytest.fixture
def saboteur() -> Iterator[Callable[..., LightProcess]]:
    """Start a process that reads call ids, a line each, begins these calls, and prints each that has begun."""
    started: list[LightProcess] = []

    def start(*faults: Fault) -> LightProcess:
        started.append(
            LightProcess(
                """
                import json
                from torchfedrpc.host.activity import Activity
                from torchfedrpc.host.faults import Fault, Saboteur

                class Printing(Activity):
                    def sever(self):
                        print("severed", flush=True)

                faults = [Fault(**fields) for fields in json.loads(sys.argv[1])]
                saboteur = Saboteur(faults, Printing())
                for line in sys.stdin:
                    saboteur.begin(int(line))
                    print("began", line, end="", flush=True)
                """,
                json.dumps([asdict(fault) for fault in faults]),
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.close()


def test_a_kill_strikes_before_the_call_begins(saboteur: Callable[..., LightProcess]) -> None:
    process = saboteur(Fault("kill", 2))
    process.tell("5")
    assert process.line() == "began 5"
    process.tell("6")
    assert process.line() == ""
    assert process.ending() == -signal.SIGKILL


def test_a_call_that_is_asked_for_again_counts_once(saboteur: Callable[..., LightProcess]) -> None:
    process = saboteur(Fault("sever", 2))
    for call_id in (5, 5, 5, 6, 7, 6):
        process.tell(str(call_id))
    said = [process.line() for _ in range(7)]
    assert said == ["began 5", "began 5", "began 5", "severed", "began 6", "began 7", "began 6"]


def test_a_freeze_stops_the_process_before_the_call_begins(saboteur: Callable[..., LightProcess]) -> None:
    process = saboteur(Fault("freeze", 1))
    process.tell("5")
    wait_until(lambda: state_of(process.pid) == "T")
    process.popen.send_signal(signal.SIGCONT)
    assert process.line() == "began 5"


def test_a_freeze_for_seconds_ends_by_itself(saboteur: Callable[..., LightProcess]) -> None:
    process = saboteur(Fault("freeze", 1, seconds=0.5))
    began = time.monotonic()
    process.tell("5")
    wait_until(lambda: state_of(process.pid) == "T")
    assert process.line() == "began 5"
    assert time.monotonic() - began >= 0.5
    process.tell("6")
    assert process.line() == "began 6"


def test_faults_at_one_call_strike_in_their_order(saboteur: Callable[..., LightProcess]) -> None:
    process = saboteur(Fault("sever", 1), Fault("sever", 1), Fault("kill", 1), Fault("sever", 1))
    process.tell("5")
    assert [process.line() for _ in range(3)] == ["severed", "severed", ""]
    assert process.ending() == -signal.SIGKILL


def test_slow_strikes_that_call_and_all_later_ones() -> None:
    saboteur = Saboteur([Fault("slow", 2, seconds=0.2)], None)

    def seconds(call_id: int) -> float:
        began = time.monotonic()
        saboteur.begin(call_id)
        return time.monotonic() - began

    before, struck, later, again = seconds(1), seconds(2), seconds(3), seconds(3)
    assert struck >= 0.2
    assert later >= 0.2
    assert max(before, again) < 0.2


def wait_until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SLACK_S
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# What a user writes.


def test_faults_are_added_without_changing_those_before() -> None:
    first = Faults().kill("worker1", at_call=5)
    second = first.freeze("worker2", at_call=9).sever("worker1", at_call=3).slow("worker2", at_call=1, seconds=0.2)
    assert first == Faults().kill("worker1", at_call=5)
    assert second.of_workers == (
        ("worker1", Fault("kill", 5)),
        ("worker2", Fault("freeze", 9)),
        ("worker1", Fault("sever", 3)),
        ("worker2", Fault("slow", 1, 0.2)),
    )


@pytest.mark.parametrize(
    ("add", "complaint"),
    [
        (lambda faults: faults.kill("worker1"), "by one of the two"),
        (lambda faults: faults.kill("worker1", at_call=1, at_round=1), "by one of the two"),
        (lambda faults: faults.kill("worker1", at_round=1), "only the driver has rounds"),
        (lambda faults: faults.kill("worker1", at_call=0), "from 1"),
        (lambda faults: faults.slow("worker1", at_call=1, seconds=0), "above 0"),
        (lambda faults: faults.slow("worker1", at_call=1, seconds=-1), "above 0"),
        (lambda faults: faults.kill("driver", at_call=1), "only workers have calls"),
        (lambda faults: faults.kill("driver", at_round=-1), "from 0"),
        (lambda faults: faults.slow("driver", at_round=1, seconds=0), "above 0"),
        (lambda faults: faults.freeze("driver", at_round=1), "hold up the test"),
        (lambda faults: faults.sever("driver", at_call=1), "sever each of its workers"),
    ],
)
def test_faults_that_make_no_sense_are_refused(add: Callable[[Faults], Faults], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        add(Faults())


# In local mode.


async def test_local_mode_knows_slow_alone() -> None:
    async with tfr.LearnerProxy(Counting, CLIENTS, runtime="local") as proxy:
        for faults in (
            Faults().kill("local", at_call=1),
            Faults().freeze("local", at_call=1),
            Faults().sever("local", at_call=1),
        ):
            with pytest.raises(ConfigError, match="only slow makes sense in local mode"):
                async with faults.injected(proxy):
                    pass


async def test_an_unknown_worker_is_refused_and_the_known_ones_are_named() -> None:
    async with tfr.LearnerProxy(Counting, CLIENTS, runtime="local") as proxy:
        with pytest.raises(ConfigError, match="no worker 'worker1': it has local"):
            async with Faults().slow("worker1", at_call=1, seconds=1).injected(proxy):
                pass


async def test_a_proxy_that_is_not_open_is_refused() -> None:
    with pytest.raises(ConfigError, match="not open"):
        async with Faults().injected(tfr.LearnerProxy(Counting, CLIENTS, runtime="local")):
            pass


async def test_slow_calls_take_longer_until_the_block_is_left() -> None:
    async def seconds_of_a_call(method: str) -> float:
        began = time.monotonic()
        await proxy.custom_method("client_1", method)
        return time.monotonic() - began

    async with tfr.LearnerProxy(Counting, CLIENTS, runtime="local") as proxy:
        await proxy.custom_method("client_1", "step")
        async with Faults().slow("local", at_call=2, seconds=0.5).injected(proxy):
            first, *later = [await seconds_of_a_call(method) for method in ("step", "step", "step_async")]
        after = await seconds_of_a_call("step")
    assert min(later) >= 0.5
    assert max(first, after) < 0.5


async def test_a_slow_call_meets_its_deadline() -> None:
    runtime = {"execution_mode": "local", "call_timeout_s": 0.5}
    async with tfr.LearnerProxy(Counting, CLIENTS, runtime=runtime) as proxy:
        async with Faults().slow("local", at_call=1, seconds=0.8).injected(proxy):
            with pytest.raises(tfr.CallTimeoutError):
                await proxy.custom_method("client_1", "step")
        await proxy.custom_method("client_1", "step")


# The driver, at a round.


async def test_a_driver_is_blocked_at_its_round_alone() -> None:
    def seconds_of_a_round(number: int) -> float:
        began = time.monotonic()
        proxy.publish(RoundStarted(number, 3))
        return time.monotonic() - began

    async with tfr.LearnerProxy(Counting, CLIENTS, runtime="local") as proxy:
        async with Faults().slow("driver", at_round=1, seconds=0.5).injected(proxy):
            seconds = [seconds_of_a_round(number) for number in range(3)]
        after = seconds_of_a_round(1)
    assert seconds[1] >= 0.5
    assert max(seconds[0], seconds[2], after) < 0.5


def test_a_frozen_driver_goes_on_after_so_many_seconds(tmp_path: Path) -> None:
    code = """
    import time
    from torchfedrpc.testing import Faults

    class Trainer(tfr.AbstractFederationTrainer):
        async def train(self):
            began = time.monotonic()
            async for number in self.rounds():
                print(number, time.monotonic() - began, flush=True)
                began = time.monotonic()

    async def main():
        async with tfr.LearnerProxy(dict, ["a"], runtime="local") as proxy:
            async with Faults().freeze("driver", at_round=1, seconds=0.5).injected(proxy):
                await Trainer({"num_rounds": 3}, proxy).train()

    asyncio.run(main())
    """
    rounds = [line.split() for line in output_of(tmp_path, code, status=0).splitlines()]
    assert [number for number, _ in rounds] == ["0", "1", "2"]
    assert [float(seconds) >= 0.5 for _, seconds in rounds] == [False, True, False]


def test_workers_end_with_a_driver_that_is_killed_at_a_round(tmp_path: Path) -> None:
    code = """
    from torchfedrpc.testing import Faults

    class Learner:
        def __init__(self, client_id): ...
        def pid(self): return os.getpid()

    class Trainer(tfr.AbstractFederationTrainer):
        async def train(self):
            async for number in self.rounds():
                print(number, *(await self.learner_proxy.clients().call("pid")).values(), flush=True)

    async def main():
        runtime = {"execution_mode": "pseudo", "num_processes": 2}
        async with tfr.LearnerProxy(Learner, ["a", "b"], runtime=runtime) as proxy:
            async with Faults().kill("driver", at_round=1).injected(proxy):
                await Trainer({"num_rounds": 3}, proxy).train()

    if __name__ == "__main__":
        asyncio.run(main())
    """
    number, *pids = output_of(tmp_path, code, status=-signal.SIGKILL).split()
    assert number == "0"
    assert len(pids) == 2
    assert all(ends_within(int(pid), 5.0) for pid in pids)


def output_of(folder: Path, code: str, status: int) -> str:
    ended, output = run_script(write_script(folder, code))
    assert ended == status, output
    return output


# Workers, at their calls: the results are those of a run that nothing struck.


async def results(
    runtime: dict[str, Any], faults: Faults, num_lost: int
) -> tuple[dict[str, list[torch.Tensor]], Sequence[str]]:
    """What every client gives in a run, by calls of each kind, and which workers were lost."""
    given: dict[str, list[torch.Tensor]] = {client_id: [] for client_id in CLIENTS}

    async def call_all(method: str) -> None:
        for client_id, result in (await proxy.clients().call(method)).items():
            given[client_id].append(result)

    async with tfr.LearnerProxy(Counting, CLIENTS, runtime=runtime, seed=3) as proxy:
        seen = Seen()
        proxy.subscribe(seen)
        async with faults.injected(proxy):
            await call_all("step")
            await call_all("step_async")
            for client_id in CLIENTS:
                try:
                    items = [item async for item in proxy.stream(client_id, "steps", 2)]
                except tfr.WorkerLostError:  # the learner is as it was before the stream
                    items = [item async for item in proxy.stream(client_id, "steps", 2)]
                given[client_id] += items
            await seen.until(lambda: len(lost(seen)) == num_lost)
            await call_all("step")
    return given, sorted(lost(seen))


def lost(seen: Seen) -> list[str]:
    return [event.worker for event in seen.events if isinstance(event, WorkerLost)]


SLOW = pytest.mark.slow  # each starts several processes


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        pytest.param(Faults().kill("worker1", at_call=3), ["worker1"], id="kill"),
        pytest.param(Faults().kill("worker2", at_call=8), ["worker2"], id="kill in a stream", marks=SLOW),
        pytest.param(
            Faults().kill("worker1", at_call=1).kill("worker2", at_call=1),
            ["worker1", "worker2"],
            id="kill both",
            marks=SLOW,
        ),
        pytest.param(Faults().freeze("worker1", at_call=3), ["worker1"], id="freeze", marks=SLOW),
        pytest.param(Faults().freeze("worker1", at_call=3, seconds=0.2), [], id="freeze for a moment", marks=SLOW),
        pytest.param(Faults().sever("worker2", at_call=5), ["worker2"], id="sever", marks=SLOW),
        pytest.param(Faults().slow("worker1", at_call=2, seconds=0.01), [], id="slow", marks=SLOW),
    ],
)
async def test_a_struck_worker_changes_no_result(faults: Faults, expected: list[str]) -> None:
    undisturbed, _ = await results({"execution_mode": "local"}, Faults(), 0)
    struck, lost = await results(pseudo(heartbeat_timeout_s=1), faults, len(expected))
    assert lost == expected
    for client_id in CLIENTS:
        assert len(struck[client_id]) == len(undisturbed[client_id]) == 5
        assert all(map(torch.equal, struck[client_id], undisturbed[client_id])), client_id


async def test_workers_that_are_not_struck_in_the_block_are_as_they_were_after_it() -> None:
    async with tfr.LearnerProxy(Counting, CLIENTS, runtime=pseudo(client_endpoints={"client_0": "local"})) as proxy:
        seen = Seen()
        proxy.subscribe(seen)
        with pytest.raises(ConfigError, match="no worker 'worker3': it has worker1, worker2, local"):
            async with Faults().kill("worker1", at_call=1).kill("worker3", at_call=1).injected(proxy):
                pass
        with pytest.raises(ConfigError, match="only slow makes sense"):
            async with Faults().kill("worker1", at_call=1).kill("local", at_call=1).injected(proxy):
                pass
        with pytest.raises(AssertionError, match="worker1 was to be killed at its call 4, which never came"):
            async with Faults().kill("worker1", at_call=4).kill("worker2", at_call=4).injected(proxy):
                await proxy.clients().call("step")
        await proxy.clients().call("step")
    assert lost(seen) == []
