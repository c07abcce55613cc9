"""Workers come and go while a job runs: they listen, join, leave in order, and die."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Latch
from folders import SUPPORT
from internals import asks_to_leave, group_of, newcomers_of
from learners import Mortal
from losses import SEED, Losses, Steps, undisturbed
from processes import Process, descendants_of, environment, serving_for, wait_for_end
from torchrun import write_script
from workers import WorkerCommand, joining, listening, make_token

import torchfedrpc as tfr
from torchfedrpc.events import CallEnded, CallStarted, Event, WorkerJoined, WorkerLeft, WorkerLost
from torchfedrpc.executors import remote, snapshot_throttle
from torchfedrpc.host.call import Call
from torchfedrpc.rpc import sources, world
from torchfedrpc.rpc.control_link import Link
from torchfedrpc.rpc.handshake import UnreachableError, dial
from torchfedrpc.rpc.heartbeat_connection import dial_heartbeat
from torchfedrpc.rpc.heartbeat_process import BEAT, LEAVING
from torchfedrpc.rpc.member import Member

CLIENTS = [f"client_{number}" for number in range(6)]


class Comings(Losses):
    """The events of a proxy, among them who came and left."""

    def __call__(self, event: Event) -> None:
        if not isinstance(event, CallStarted | CallEnded):  # too many to look through
            super().__call__(event)

    def names(self, kind: type[WorkerJoined | WorkerLeft | WorkerLost]) -> list[str]:
        return [event.worker for event in self.events if isinstance(event, kind)]

    async def joined(self, count: int = 1) -> str:
        await self.until(lambda: len(self.names(WorkerJoined)) >= count, timeout_s=60.0)
        return self.names(WorkerJoined)[count - 1]

    async def left(self, count: int = 1) -> str:
        await self.until(lambda: len(self.names(WorkerLeft)) >= count, timeout_s=60.0)
        return self.names(WorkerLeft)[count - 1]


@pytest.fixture(scope="module")
def expected(runner: asyncio.Runner) -> dict[str, dict[str, Any]]:
    return runner.run(undisturbed(CLIENTS))


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_token(tmp_path_factory.mktemp("token"))


@contextlib.asynccontextmanager
async def opened(
    expected: dict[str, dict[str, Any]], **runtime: Any
) -> AsyncIterator[tuple[tfr.LearnerProxy, Steps, Comings]]:
    async with tfr.LearnerProxy(Mortal, CLIENTS, runtime=runtime, seed=SEED) as proxy:
        seen = Comings()
        proxy.subscribe(seen)
        yield proxy, Steps(proxy, expected), seen


def where(proxy: tfr.LearnerProxy) -> dict[str, str]:
    return {client: proxy._router.get_executor(client).worker_of(client) for client in CLIENTS}


@pytest.mark.filterwarnings("default:client_endpoints has addresses with http")
async def test_the_configuration_of_a_deployment_works_as_it_stands(
    token: str, expected: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHFEDRPC_TOKEN_FILE", token)
    with listening(token) as (first, one), listening(token) as (second, other):
        runtime = {
            "execution_mode": "distributed",
            "client_endpoints": {
                client: f"http://{(one, other)[number % 2]}" for number, client in enumerate(CLIENTS)
            },
        }
        for times in (1, 2):  # a worker is free again for the next job
            async with opened(expected, **runtime) as (proxy, steps, _):
                assert proxy.mode == "distributed"
                assert where(proxy) == {client: (one, other)[n % 2] for n, client in enumerate(CLIENTS)}
                await steps.check(*CLIENTS)
                processes = await proxy.clients().call("process_id")
                serving = [*serving_for(first.process.pid), *serving_for(second.process.pid)]
                assert processes == {client: serving[n % 2] for n, client in enumerate(CLIENTS)}
            first.line("free again", times)
            second.line("free again", times)
        first.signal(signal.SIGTERM)
        second.signal(signal.SIGINT)
        assert first.ended() == second.ended() == 0


async def test_a_listening_worker_that_is_killed_and_started_again_goes_on(
    token: str, expected: dict[str, dict[str, Any]]
) -> None:
    with listening(token) as (first, address):
        endpoints = dict.fromkeys(CLIENTS, address)
        async with opened(expected, client_endpoints=endpoints, token_file=token) as (_, steps, seen):
            await steps.check(*CLIENTS)
            (process,) = serving_for(first.process.pid)
            os.kill(process, signal.SIGKILL)  # the one that serves, and not the one that listens
            await steps.check(*CLIENTS)
            assert await seen.joined() == address
            children = descendants_of(first.process.pid)
            first.signal(signal.SIGKILL)
            first.ended()
            wait_for_end(children, 5.0)
            step = asyncio.ensure_future(steps.check(*CLIENTS))
            with listening(token, address):
                await step
                assert seen.names(WorkerLost) == [address, address]


async def test_a_second_driver_is_told_who_has_the_worker_and_a_dead_one_frees_it(
    token: str, expected: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    script = tmp_path / "holder.py"
    script.write_text(
        "import asyncio, sys\n"
        "import torchfedrpc as tfr\n"
        "from learners import Mortal\n"
        "async def main():\n"
        "    runtime = {'client_endpoints': {'a': sys.argv[1]}, 'token_file': sys.argv[2]}\n"
        "    async with tfr.LearnerProxy(Mortal, ['a'], runtime=runtime) as proxy:\n"
        "        await proxy.custom_method('a', 'step')\n"
        "        print('here', flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "if __name__ == '__main__':\n"
        "    tfr.run(main)\n"
    )
    with listening(token) as (worker, address):
        with Process(sys.executable, str(script), address, token) as holder:
            await asyncio.to_thread(holder.line, "here")
            began = time.monotonic()
            with pytest.raises(tfr.WorkerLostError, match=rf"has served holder\.py \(pid {holder.pid} on "):
                async with opened(expected, client_endpoints={CLIENTS[0]: address}, token_file=token):
                    raise AssertionError("it is busy")
            assert time.monotonic() - began < 10.0
        began = time.monotonic()
        await asyncio.to_thread(worker.line, "free again")
        assert time.monotonic() - began < 5.0


async def test_a_dead_endpoint_is_named_within_10_s(token: str, expected: dict[str, dict[str, Any]]) -> None:
    began = time.monotonic()
    with pytest.raises(tfr.WorkerLostError, match=r"no worker at 127\.0\.0\.1:9: .*--listen 127\.0\.0\.1:9"):
        async with opened(expected, client_endpoints={CLIENTS[0]: "127.0.0.1:9"}, token_file=token):
            raise AssertionError("nobody is there")
    assert time.monotonic() - began < 10.0


async def test_a_wrong_token_is_refused_by_both(
    token: str, expected: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    other = make_token(tmp_path)
    with listening(token) as (worker, address):
        with pytest.raises(tfr.ConfigError, match=rf"{address} refused the token"):
            async with opened(expected, client_endpoints={CLIENTS[0]: address}, token_file=other):
                raise AssertionError("it has another token")
        worker.line("it has another token")
        runtime = {"client_endpoints": {CLIENTS[0]: address}, "join_at": "127.0.0.1:0", "token_file": token}
        async with opened(expected, **runtime) as (proxy, steps, seen):
            assert proxy.join_address is not None
            with joining(proxy.join_address, other) as stranger:
                assert await asyncio.to_thread(stranger.ended) == 1
                assert "refused the token" in stranger.output
            await steps.check(*CLIENTS)
            assert seen.names(WorkerJoined) == []


async def test_workers_join_and_leave_a_running_job_and_no_call_is_lost_or_run_twice(
    token: str, expected: dict[str, dict[str, Any]], latch: Latch, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    runtime = {"execution_mode": "pseudo", "num_processes": 1, "join_at": "127.0.0.1:0", "token_file": token}
    async with opened(expected, **runtime) as (proxy, steps, seen):
        assert proxy.join_address is not None
        await steps.check(*CLIENTS)
        with joining(proxy.join_address, token) as first, joining(proxy.join_address, token) as second:
            await seen.joined(2)
            await steps.check(*CLIENTS)
            places = where(proxy)
            assert sorted(places.values()) == ["worker1"] * 2 + ["worker2"] * 2 + ["worker3"] * 2
            processes = await proxy.clients().call("process_id")
            process_of = {places[client]: processes[client] for client in CLIENTS}
            assert {process_of["worker2"], process_of["worker3"]} == {first.process.pid, second.process.pid}
            leaving = next(worker for worker in process_of if process_of[worker] == first.process.pid)
            held, queued = [client for client in CLIENTS if places[client] == leaving]
            holding = asyncio.ensure_future(proxy.custom_method(held, "note_and_hold", str(notes), latch.path))
            while not notes.exists():
                await asyncio.sleep(0.01)
            waiting = asyncio.ensure_future(proxy.custom_method(queued, "note", str(notes), "queued"))
            first.signal(signal.SIGTERM)
            behind = asyncio.ensure_future(proxy.custom_method(held, "note", str(notes), "behind"))
            await asyncio.sleep(0.5)
            assert not holding.done()
            latch.open()
            await asyncio.gather(holding, waiting, behind)
            assert await seen.left() == leaving
            assert await asyncio.to_thread(first.ended) == 0
            assert "left the run of" in first.output
            assert sorted(notes.read_text().splitlines()) == sorted(
                [f"{held} ", f"{queued} queued", f"{held} behind"]
            )
            await steps.check(*CLIENTS)
            assert leaving not in where(proxy).values()
            second.signal(signal.SIGKILL)
            await seen.loss()
            await steps.check(*CLIENTS)
            assert set(where(proxy).values()) == {"worker1"}
    assert seen.names(WorkerLost) == [other for other in ("worker2", "worker3") if other != leaving]


class Interrupted:
    def __init__(self, client_id: str) -> None: ...

    def interrupt(self) -> None:
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)


async def test_a_worker_hears_a_signal_that_does_not_interrupt_its_main_thread(token: str) -> None:
    address = free_address()
    with joining(address, token) as worker:
        runtime = {"join_at": address, "token_file": token}
        async with tfr.LearnerProxy(Interrupted, ["client_1"], runtime=runtime) as proxy:
            seen = Comings()
            proxy.subscribe(seen)
            await proxy.custom_method("client_1", "interrupt")
            assert await seen.left() == "worker1"
            assert await asyncio.to_thread(worker.ended) == 0


@pytest.mark.slow
async def test_learners_move_under_load_and_each_of_their_calls_is_made_once_and_in_order(
    token: str, expected: dict[str, dict[str, Any]]
) -> None:
    runtime = {"execution_mode": "pseudo", "num_processes": 1, "join_at": "127.0.0.1:0", "token_file": token}
    async with opened(expected, **runtime, journal_max_calls=2) as (proxy, _, seen):
        assert proxy.join_address is not None
        is_over = False

        async def load(client: str) -> int:
            num_calls = 0
            while not is_over:
                calls = [proxy.custom_method(client, "append", num_calls + number) for number in range(3)]
                assert await asyncio.gather(*calls) == [num_calls + 1, num_calls + 2, num_calls + 3]
                num_calls += 3
            return num_calls

        loads = [asyncio.ensure_future(load(client)) for client in CLIENTS]
        with joining(proxy.join_address, token) as first, joining(proxy.join_address, token) as second:
            await seen.joined(2)
            first.signal(signal.SIGTERM)
            await seen.left()
            assert await asyncio.to_thread(first.ended) == 0
            with joining(proxy.join_address, token):
                await seen.joined(3)
                second.signal(signal.SIGINT)
                await seen.left(2)
                assert await asyncio.to_thread(second.ended) == 0
                is_over = True
                num_calls = await asyncio.gather(*loads)
                happened = await proxy.clients().call("what_happened")
        assert [happened[client] for client in CLIENTS] == [list(range(count)) for count in num_calls]
        assert seen.names(WorkerLost) == []


async def test_workers_of_all_kinds_serve_one_run(token: str, expected: dict[str, dict[str, Any]]) -> None:
    with listening(token) as (_, address):
        runtime = {
            "execution_mode": "pseudo",
            "num_processes": 1,
            "client_endpoints": {CLIENTS[0]: address, CLIENTS[1]: "local", CLIENTS[2]: "worker1"},
            "join_at": "127.0.0.1:0",
            "token_file": token,
        }
        async with opened(expected, **runtime) as (proxy, steps, seen):
            assert proxy.join_address is not None
            with joining(proxy.join_address, token):
                await seen.joined()
                await steps.check(*CLIENTS)
                places = where(proxy)
                assert [places[client] for client in CLIENTS[:3]] == [address, "local", "worker1"]
                assert {places[client] for client in CLIENTS[3:]} == {"worker1", "worker2"}
                processes = await proxy.clients().call("process_id")
                assert len(set(processes.values())) == 4


async def test_a_run_of_nobody_waits_for_the_first_to_join_and_for_the_next_when_all_have_gone(
    token: str, expected: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    address = free_address()
    with joining(address, token) as first:
        async with opened(expected, join_at=address, token_file=token, rejoin_timeout_s=3.0) as (proxy, steps, seen):
            assert proxy.mode == "distributed"
            await steps.check(*CLIENTS)
            first.signal(signal.SIGTERM)
            assert await seen.left() == "worker1"
            began = time.monotonic()
            with pytest.raises(
                tfr.WorkerLostError, match=r"worker1 has left, and none has come in its place within 3 s"
            ):
                await proxy.custom_method(CLIENTS[0], "step")
            assert time.monotonic() - began < 5.0
            with joining(address, token) as second:
                await seen.joined()
                await steps.check(*CLIENTS)
                second.signal(signal.SIGTERM)
                second.signal(signal.SIGTERM)


async def test_a_listening_worker_that_is_asked_to_stop_leaves_its_learners_for_its_next_life(
    token: str, expected: dict[str, dict[str, Any]]
) -> None:
    with listening(token) as (first, address):
        endpoints = dict.fromkeys(CLIENTS, address)
        async with opened(expected, client_endpoints=endpoints, token_file=token) as (_, steps, seen):
            await steps.check(*CLIENTS)
            first.signal(signal.SIGTERM)
            assert await asyncio.to_thread(first.ended) == 0
            step = asyncio.ensure_future(steps.check(*CLIENTS))
            with listening(token, address):
                await step
            assert seen.names(WorkerLeft) == [address]
            assert seen.names(WorkerLost) == []


async def test_a_worker_that_dies_as_it_joins_does_no_harm(
    token: str, expected: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = {"execution_mode": "pseudo", "num_processes": 1, "join_at": "127.0.0.1:0", "token_file": token}
    async with opened(expected, **runtime) as (proxy, steps, seen):
        assert proxy.join_address is not None
        await steps.check(*CLIENTS)
        with joining(proxy.join_address, token) as worker:
            await asyncio.to_thread(worker.line, "reached the run of")
            worker.signal(signal.SIGKILL)
            await seen.loss()
        await steps.check(*CLIENTS)
        tell, struck = Member.tell, []

        async def strike(member: Member, message: Any) -> Any:
            """As the world is formed for it: the others have left theirs, and wait for it in the next."""
            if message["do"] == "join" and member.label != "worker1":
                struck.append(member.label)
                worker.signal(signal.SIGKILL)
            return await tell(member, message)

        with monkeypatch.context() as patched, joining(proxy.join_address, token) as worker:
            patched.setattr(Member, "tell", strike)
            await seen.loss(2)
            await steps.check(*CLIENTS)
        assert len(struck) == 1
        assert seen.names(WorkerJoined) == []
        with joining(proxy.join_address, token):
            assert await seen.joined() in ("worker2", "worker3", "worker4")
            await steps.check(*CLIENTS)


async def test_workers_that_are_of_no_use_do_a_run_no_harm(
    token: str, expected: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """As many as it takes for a world that cannot be formed to be given up."""
    runtime = {"execution_mode": "pseudo", "num_processes": 1, "join_at": "127.0.0.1:0", "token_file": token}
    async with opened(expected, **runtime) as (proxy, steps, seen):
        assert proxy.join_address is not None
        await steps.check(*CLIENTS)
        for number in range(1, 8):
            group_of(proxy)._num_failures[f"worker{number + 1}"] = 6  # as at an address, where each has the same name
            # It has no learner: what a worker that is started in another folder finds.
            guest = await until_up(proxy.join_address, token)
            answering = asyncio.ensure_future(asyncio.to_thread(_refuse, guest))
            await seen.loss(number)
            assert "no module named learners" in await answering
        await steps.check(*CLIENTS)
        assert proxy.stats()["workers"].keys() == {"worker1"}
    assert set(where(proxy).values()) == {"worker1"}


async def test_few_states_are_in_the_driver_at_once_as_learners_move(
    token: str, expected: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot_throttle, "_MAX_AT_ONCE", 1)
    runtime = {"execution_mode": "pseudo", "num_processes": 1, "join_at": "127.0.0.1:0", "token_file": token}
    async with opened(expected, **runtime) as (proxy, steps, seen):
        assert proxy.join_address is not None
        await steps.check(*CLIENTS)
        most: Counter[str] = Counter()
        submit = Member.submit

        async def counted(member: Member, call: Call) -> Any:
            is_snapshot = call.kind in ("snapshot", "restore")
            under_way[member.label] += is_snapshot
            most[member.label] = max(most[member.label], under_way[member.label])
            try:
                return await submit(member, call)
            finally:
                under_way[member.label] -= is_snapshot

        under_way: Counter[str] = Counter()
        monkeypatch.setattr(Member, "submit", counted)
        with joining(proxy.join_address, token) as worker:
            await seen.joined()
            await steps.check(*CLIENTS)
            worker.signal(signal.SIGTERM)
            await seen.left()
            await steps.check(*CLIENTS)
            os.kill(await proxy.custom_method(CLIENTS[0], "process_id"), signal.SIGKILL)
            await steps.check(*CLIENTS)
        assert most == {"worker1": 1, "worker2": 1}


async def _hide(proxy: tfr.LearnerProxy, hiding: list[str], steps: Steps, warned: Any) -> None:
    """Give learners an attribute that cannot be captured, and call them until the user is told."""
    await proxy.clients(hiding).call("hide", what="lock")
    await steps.check(*CLIENTS)
    async with asyncio.timeout(30):
        while not len(warned):
            await proxy.clients(hiding).call("process_id")


async def test_learners_that_cannot_be_captured_do_not_move(token: str, expected: dict[str, dict[str, Any]]) -> None:
    runtime = {"execution_mode": "pseudo", "num_processes": 1, "join_at": "127.0.0.1:0", "token_file": token}
    hiding = CLIENTS[::2]
    async with opened(expected, **runtime, journal_max_calls=1) as (proxy, steps, seen):
        assert proxy.join_address is not None
        with pytest.warns(UserWarning, match="could not be rebuilt if its worker were lost.*'hidden'") as warned:
            await _hide(proxy, hiding, steps, warned)
        with joining(proxy.join_address, token):
            await seen.joined()
            for _ in range(2):
                await steps.check(*CLIENTS)
            places = where(proxy)
        assert {places[client] for client in hiding} == {"worker1"}
        assert "worker2" in places.values()  # the others move


async def test_nobody_waits_for_one_who_takes_long_to_get_ready(
    token: str, expected: dict[str, dict[str, Any]]
) -> None:
    runtime = {"execution_mode": "pseudo", "num_processes": 2, "join_at": "127.0.0.1:0", "token_file": token}
    async with opened(expected, **runtime) as (proxy, steps, seen):
        assert proxy.join_address is not None
        guest = await until_up(proxy.join_address, token)
        heartbeat = await asyncio.to_thread(_connect, guest)
        beating = asyncio.ensure_future(_beat(heartbeat))
        message: Any = await asyncio.to_thread(guest.receive)  # which is not answered yet
        assert message["do"] == "prepare"
        heartbeat.send(LEAVING + b"\n")  # which is remembered, though worlds of others are formed
        for killed in (["worker1"], ["worker1", "worker2"]):
            client = next(client for client, label in where(proxy).items() if label == killed[-1])
            os.kill(await proxy.custom_method(client, "process_id"), signal.SIGKILL)
            await steps.check(*CLIENTS)
            assert seen.names(WorkerJoined) == killed
        assert "worker3" in newcomers_of(proxy)
        assert asks_to_leave(proxy, "worker3")
        group_of(proxy)._fail(tfr.WorkerLostError("a test wants it"))
        message = await asyncio.to_thread(guest.receive)
        assert message == {"do": "stop", "reason": "the run has no world any more"}
        beating.cancel()
        guest.close()
        heartbeat.close()


async def test_a_first_joiner_that_is_of_no_use_is_refused_and_the_run_waits_for_the_next(
    token: str, expected: dict[str, dict[str, Any]]
) -> None:
    address = free_address()
    proxy = tfr.LearnerProxy(Mortal, CLIENTS, runtime={"join_at": address, "token_file": token}, seed=SEED)
    entering = asyncio.ensure_future(proxy.__aenter__())
    guest = await until_up(address, token)
    assert "no module named learners" in await asyncio.to_thread(_refuse, guest)
    assert not entering.done()
    with joining(address, token) as worker:
        await entering
        await Steps(proxy, expected).check(*CLIENTS)
        assert set(where(proxy).values()) == {"worker2"}
        await proxy.__aexit__(None, None, None)
        assert await asyncio.to_thread(worker.ended) == 0
        worker.line("has ended well")


async def test_a_run_that_no_useful_worker_joins_ends_with_what_was_wrong_with_the_last(
    token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_FIRST_TIMEOUT_S", 5.0)
    address = free_address()
    proxy = tfr.LearnerProxy(Mortal, CLIENTS, runtime={"join_at": address, "token_file": token}, seed=SEED)
    entering = asyncio.ensure_future(proxy.__aenter__())
    guest = await until_up(address, token)
    await asyncio.to_thread(_refuse, guest)
    with pytest.raises(tfr.ConfigError, match=r"no worker that can serve has joined .*worker1 was lost .*no module"):
        await entering


async def test_workers_end_with_an_error_where_the_run_does(token: str, expected: dict[str, dict[str, Any]]) -> None:
    with listening(token) as (listener, address), contextlib.ExitStack() as stack:
        runtime = {"client_endpoints": {CLIENTS[0]: address}, "join_at": "127.0.0.1:0", "token_file": token}

        async def fail() -> None:
            async with opened(expected, **runtime) as (proxy, _, seen):
                assert proxy.join_address is not None
                workers.append(stack.enter_context(joining(proxy.join_address, token)))
                await seen.joined()
                raise ZeroDivisionError

        workers: list[WorkerCommand] = []
        with pytest.raises(ZeroDivisionError):
            await fail()
        (worker,) = workers
        assert await asyncio.to_thread(worker.ended) == 1
        worker.line("does without this worker: the run has failed with ZeroDivisionError")
        await asyncio.to_thread(listener.line, "ended with exit status 1")


async def test_a_worker_that_is_still_importing_as_the_run_fails_is_told_why(token: str) -> None:
    address = free_address()
    proxy = tfr.LearnerProxy(Mortal, CLIENTS, runtime={"join_at": address, "token_file": token})
    entering = asyncio.ensure_future(proxy.__aenter__())
    guest = await until_up(address, token)
    heartbeat = await asyncio.to_thread(_connect, guest)
    message: Any = await asyncio.to_thread(guest.receive)
    assert message["do"] == "prepare"
    entering.cancel()
    message = await asyncio.to_thread(guest.receive)
    assert message == {"do": "stop", "reason": "the run was interrupted"}  # so that it ends with status 1
    guest.close()
    heartbeat.close()
    with pytest.raises(asyncio.CancelledError):
        await entering


async def test_a_run_that_waits_for_its_first_worker_checks_its_interface(
    token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "_interface", "wg0")  # as after a proxy there
    refusal = r"torch RPC listens on .* here on wg0, .* this one is for lo\."
    runtime = {"join_at": free_address(), "token_file": token}
    with pytest.raises(tfr.ConfigError, match=refusal):  # at once, where the setting names it
        async with asyncio.timeout(10.0), tfr.LearnerProxy(Mortal, CLIENTS, runtime={**runtime, "interface": "lo"}):
            raise AssertionError("it opened")
    proxy = tfr.LearnerProxy(Mortal, CLIENTS, runtime=runtime)
    entering = asyncio.ensure_future(proxy.__aenter__())
    guest = await until_up(runtime["join_at"], token)
    message: Any = await asyncio.to_thread(guest.receive)
    guest.close()
    assert message["do"] == "stop"
    assert re.match(refusal, message["reason"])
    with pytest.raises(tfr.ConfigError, match=refusal):
        await entering


@pytest.mark.parametrize("begins_with", [{}, {"execution_mode": "pseudo", "num_processes": 1}], ids=["none", "one"])
async def test_a_heartbeat_timeout_that_is_too_short_for_another_machine_ends_only_a_run_without_workers(
    token: str, monkeypatch: pytest.MonkeyPatch, begins_with: dict[str, Any]
) -> None:
    monkeypatch.setattr(sources, "network_site", lambda: "another machine")
    refusal = r"runtime\.heartbeat_timeout_s=2 is too short for worker\d on .* set 5 or more$"
    address = free_address()
    runtime = {"join_at": address, "token_file": token, "heartbeat_timeout_s": 2.0}
    proxy = tfr.LearnerProxy(Mortal, CLIENTS[:1], runtime=runtime | begins_with, seed=SEED)
    entering = asyncio.ensure_future(proxy.__aenter__())
    guest = await until_up(address, token)
    message: Any = await asyncio.to_thread(guest.receive)
    guest.close()
    assert message["do"] == "stop"
    assert re.match(refusal, message["reason"])
    if begins_with:  # the worker is refused, and the run goes on with the one that it has
        await entering
        assert await proxy.custom_method(CLIENTS[0], "process_id")
        await proxy.__aexit__(None, None, None)
    else:
        with pytest.raises(tfr.ConfigError, match=refusal):
            await asyncio.wait_for(entering, 10.0)


DRIVER = """
    async def main(address, token, *waits):
        async with tfr.LearnerProxy(Probe, ["a"], runtime={"join_at": address, "token_file": token}) as proxy:
            await proxy.custom_method("a", "same", 1)
            print("here", flush=True)
            if waits:
                await asyncio.Event().wait()

    if __name__ == "__main__":
        tfr.run(main, *sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_driver_that_is_started_again_after_sigterm_gets_its_workers_back(token: str, tmp_path: Path) -> None:
    script, address = str(write_script(tmp_path, DRIVER)), free_address()
    join = f"{sys.executable} -m torchfedrpc.worker_cli --join {address} --token-file {token}"
    loop = subprocess.Popen(
        ["sh", "-c", f"until {join}; do sleep 0.2; done"],
        env=environment(),
        cwd=SUPPORT,
        start_new_session=True,
    )
    try:
        for waits, status in (["waits"], 143), ([], 0):
            driver = subprocess.Popen(
                [sys.executable, script, address, token, *waits], env=environment(), stdout=subprocess.PIPE, text=True
            )
            with driver:
                assert driver.stdout is not None
                assert driver.stdout.readline() == "here\n"
                if waits:
                    driver.terminate()
                assert driver.wait(30) == status
        assert loop.wait(30) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(loop.pid, signal.SIGKILL)
        loop.wait()


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


async def until_up(address: str, token: str) -> Link:
    """Join by hand a driver that is starting; returns the worker's end of the control link."""
    while True:
        try:
            link, _ = await dial(address, Path(token).read_bytes(), {"role": "worker"}, timeout_s=5.0)
            return link
        except UnreachableError:
            await asyncio.sleep(0.01)


def _connect(guest: Link) -> socket.socket:
    """Open the heartbeat connection by hand, as the driver asks first."""
    message: Any = guest.receive()
    assert message["do"] == "connect"
    connection = dial_heartbeat(message["host"], message["port"], bytes.fromhex(message["secret"]), 5.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        guest.send({"number": message["number"], "host": "127.0.0.1", "port": server.getsockname()[1]})
        server.accept()[0].close()
    return connection


async def _beat(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the driver has closed it
        while True:
            connection.send(BEAT)
            await asyncio.sleep(0.5)


def _refuse(guest: Link) -> str:
    """Answer that this worker has no learner; returns the reason with which it is stopped."""
    with _connect(guest):
        message: Any = guest.receive()
        guest.send({"number": message["number"], "error": "no module named learners", "traceback": ""})
        while (message := guest.receive()) is not None and message["do"] != "stop":
            pass
    guest.close()
    assert message is not None
    return str(message["reason"])


async def test_a_worker_that_is_asked_to_stop_as_the_run_begins_leaves_once_it_has_begun(
    token: str, expected: dict[str, dict[str, Any]]
) -> None:
    with listening(token) as (first, address):
        runtime = {"client_endpoints": {CLIENTS[0]: address}, "execution_mode": "pseudo", "num_processes": 1}
        opening = tfr.LearnerProxy(Mortal, CLIENTS, runtime=runtime | {"token_file": token}, seed=SEED)
        seen = Comings()
        opening.subscribe(seen)
        entering = asyncio.ensure_future(opening.__aenter__())
        await asyncio.to_thread(first.line, "worker process")
        first.signal(signal.SIGTERM)
        proxy = await entering
        try:
            assert await seen.left() == address
            assert await asyncio.to_thread(first.ended) == 0
            await Steps(proxy, expected).check(*CLIENTS[1:])
        finally:
            await proxy.__aexit__(None, None, None)
