"""Execution modes: which one a configuration means, what each refuses, and what they leave alone."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Latch, Seen
from learners import Probe
from nodes import listening_addresses
from own_mode import CountingExecutor
from processes import Process, children_of, environment, wait_for_end
from torchrun import LOADING, run_script, write_script

import torchfedrpc as tfr
from torchfedrpc.config import RuntimeConfig
from torchfedrpc.events import EventBus
from torchfedrpc.executors import distributed
from torchfedrpc.executors.router import resolve_mode
from torchfedrpc.launcher import Launch
from torchfedrpc.rpc.surroundings import Surroundings

LAUNCH = Launch(
    rank=0, world_size=3, local_rank=0, num_nodes=1, master_address="localhost", master_port=1, agent_store=True
)
MAIN = """
if __name__ == "__main__":
    print("result", tfr.run(main), flush=True)
"""

# Which mode a configuration means.


@pytest.mark.parametrize(
    ("runtime", "launch", "mode"),
    [
        ({}, None, "local"),
        ({}, LAUNCH, "distributed"),
        ({"num_processes": 2}, None, "pseudo"),
        ({"num_processes": 0}, None, "local"),
        ({"use_multiprocessing": True}, None, "pseudo"),
        ({"use_multiprocessing": True, "num_processes": 2}, LAUNCH, "distributed"),
        ({"client_endpoints": {"a": "worker1"}}, LAUNCH, "distributed"),
        ({"client_endpoints": {"a": "local"}}, None, "local"),
        ({"execution_mode": "local"}, LAUNCH, "local"),
        ({"execution_mode": "local", "num_processes": 4}, None, "local"),
        ({"execution_mode": "pseudo"}, LAUNCH, "pseudo"),
        ({"execution_mode": "pseudo", "num_processes": 4, "use_multiprocessing": True}, None, "pseudo"),
        ({"execution_mode": "distributed", "client_endpoints": {"a": "rank:2"}}, LAUNCH, "distributed"),
    ],
)
def test_a_configuration_and_a_launch_make_a_mode(runtime: dict[str, Any], launch: Launch | None, mode: str) -> None:
    assert resolve_mode(RuntimeConfig.of(runtime), launch) == mode


@pytest.mark.parametrize("endpoints", [{}, {"a": "local"}])
def test_distributed_without_a_launcher_runs_locally_with_a_warning(endpoints: dict[str, str]) -> None:
    with pytest.warns(UserWarning, match="torchrun"):
        proxy = tfr.LearnerProxy(
            Probe, ["a"], runtime={"execution_mode": "distributed", "client_endpoints": endpoints}
        )
    assert proxy.mode == "local"


@pytest.mark.parametrize("mode", ["auto", "distributed"])
@pytest.mark.parametrize("endpoint", ["worker1", "rank:2", "host:elsewhere"])
def test_endpoints_without_a_launcher_are_refused_with_the_torchrun_command(mode: str, endpoint: str) -> None:
    runtime = {"execution_mode": mode, "client_endpoints": {"a": endpoint, "b": endpoint}}
    with pytest.raises(tfr.ConfigError, match=r"torchrun --nproc-per-node=3") as caught:
        tfr.LearnerProxy(Probe, ["a", "b"], runtime=runtime)
    assert endpoint in str(caught.value)


BAD_ENDPOINTS = [
    "http://10.0.0.1",
    "https://10.0.0.1:80",
    "10.0.0.1:0",
    "nonsense",
    "worker",
    "workerx",
    "rank:x",
    "host:",
    "",
]


@pytest.mark.parametrize("mode", ["auto", "distributed", "pseudo", "local"])
@pytest.mark.parametrize("endpoint", BAD_ENDPOINTS)
def test_an_endpoint_of_no_known_form_is_refused_in_every_mode(mode: str, endpoint: str) -> None:
    with pytest.raises(tfr.ConfigError, match=r"client_endpoints\.a is .*one that listens as HOST:PORT"):
        tfr.LearnerProxy(Probe, ["a"], runtime={"execution_mode": mode, "client_endpoints": {"a": endpoint}})


@pytest.mark.parametrize("mode", ["auto", "distributed", "pseudo"])
def test_addresses_of_http_are_taken_with_one_warning(mode: str) -> None:
    endpoints = {"a": "http://10.0.0.1:80", "b": "http://10.0.0.2:80"}
    with pytest.warns(UserWarning, match="no HTTP is spoken") as warned:
        proxy = tfr.LearnerProxy(Probe, ["a", "b"], runtime={"execution_mode": mode, "client_endpoints": endpoints})
    assert len(warned) == 1
    assert proxy.mode == ("pseudo" if mode == "pseudo" else "distributed")


@pytest.mark.parametrize(("clients", "num_processes"), [(100, 3), (2, 2)])
async def test_pseudo_mode_starts_a_worker_for_each_core_that_this_process_may_use(
    monkeypatch: pytest.MonkeyPatch, clients: int, num_processes: int
) -> None:
    def start(num_processes: int, surroundings: Surroundings) -> None:
        raise RuntimeError(f"{num_processes} processes")

    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5, 9})
    monkeypatch.setattr(distributed, "ProcessSource", start)
    with pytest.raises(RuntimeError, match=f"{num_processes} processes"):
        await tfr.LearnerProxy(Probe, [str(number) for number in range(clients)], runtime="pseudo").__aenter__()


def test_an_endpoint_of_an_unknown_client_is_refused() -> None:
    with pytest.raises(tfr.ConfigError, match="'b', which is no client"):
        tfr.LearnerProxy(Probe, ["a"], runtime={"client_endpoints": {"b": "local"}})


def test_client_ids_given_to_a_proxy_come_before_those_of_its_configuration() -> None:
    runtime = {"num_clients": 3, "client_endpoints": {"a": "local"}}
    assert tfr.LearnerProxy(Probe, ["b", "a"], runtime=runtime).client_ids == ["b", "a"]


@pytest.mark.parametrize(
    ("runtime", "words"),
    [
        ({"execution_mode": "pseudo", "num_processes": 0}, "num_processes is 0"),
        ({"execution_mode": "pseudo", "num_processes": -1}, "num_processes"),
        ({"execution_mode": "psuedo"}, "did you mean 'pseudo'"),
        ({"execution_mod": "local"}, "did you mean 'execution_mode'"),
        ({"execution_mode": 3}, "execution_mode"),
        ({"num_clients": "3"}, "num_clients"),
        ({"num_clients": 0}, "num_clients"),
        ({"num_clients": True}, "num_clients"),
        ({"client_endpoints": {"a": 5}}, "client_endpoints"),
        ({"client_endpoints": ["a"]}, "client_endpoints"),
        ({"call_timeout_s": 0}, "call_timeout_s"),
        ({"transport": "tcp"}, "transport"),
        ({"isolation": "copy"}, "isolation"),
        ({"trusted_modules": "package"}, "trusted_modules"),
        ({"torch_threads": 1.5}, "torch_threads"),
        ([("execution_mode", "local")], "mapping"),
    ],
    ids=str,
)
def test_unknown_and_mistyped_settings_are_refused(runtime: Any, words: str) -> None:
    with pytest.raises(tfr.ConfigError, match=words):
        tfr.LearnerProxy(Probe, ["a"], runtime=runtime)


async def test_an_interface_that_does_not_exist_is_refused_and_the_next_proxy_opens() -> None:
    runtime = {"execution_mode": "pseudo", "num_processes": 1}
    with pytest.raises(tfr.ConfigError, match="no such network interface"):
        async with tfr.LearnerProxy(Probe, ["a"], runtime={**runtime, "interface": "nowhere0"}):
            pass
    async with tfr.LearnerProxy(Probe, ["a"], runtime={**runtime, "interface": "lo"}) as proxy:
        assert await proxy.custom_method("a", "same", 1) == 1


# What holds in one mode alone.


async def test_without_isolation_local_mode_passes_references() -> None:
    async with tfr.LearnerProxy(Probe, ["a"], runtime={"isolation": "none"}) as proxy:
        weights = {"w": torch.zeros(2), "function": lambda: 1}
        assert await proxy.custom_method("a", "same", weights) is weights
        await proxy.custom_method("a", "keep", weights)
        assert await proxy.custom_method("a", "live") is weights
        with pytest.raises(ValueError, match="plain"):
            await proxy.custom_method("a", "fail", "value")


async def test_without_isolation_worker_processes_copy_all_the_same() -> None:
    runtime = {"execution_mode": "pseudo", "num_processes": 1, "isolation": "none"}
    async with tfr.LearnerProxy(Probe, ["a"], runtime=runtime) as proxy:
        weights = torch.zeros(2)
        await proxy.custom_method("a", "keep", weights)
        weights += 1
        assert (await proxy.custom_method("a", "live")).sum() == 0


@pytest.mark.parametrize("mode", ["local", "pseudo"])
async def test_several_sync_methods_run_at_once_where_that_is_allowed(mode: str, latch: Latch) -> None:
    runtime = {"execution_mode": mode, "max_concurrent_calls": 3} | ({"num_processes": 1} if mode == "pseudo" else {})
    seen = Seen()
    async with tfr.LearnerProxy(Probe, ["a", "b", "c", "d"], runtime=runtime) as proxy:
        proxy.subscribe(seen)
        held = [asyncio.create_task(proxy.custom_method(one, "hold", latch.path)) for one in "abc"]
        for one in "abc":
            await seen.reported(one)
        with pytest.raises(tfr.CallTimeoutError):  # a fourth has to wait
            await proxy.options(timeout_s=0.1).custom_method("d", "same", 1)
        waiting = asyncio.create_task(proxy.custom_method("d", "append_async", 1))
        with pytest.raises(tfr.CallTimeoutError):
            await proxy.options(timeout_s=0.1).custom_method("a", "same", 1)
        assert not waiting.done()
        latch.open()
        assert await asyncio.gather(*held) == ["released"] * 3
        assert await waiting == 2
        first = [await proxy.custom_method(one, "draw_from_generator") for one in "ab"]
    async with tfr.LearnerProxy(Probe, ["a", "b"], runtime="local") as proxy:
        again = [await proxy.custom_method(one, "draw_from_generator") for one in "ab"]
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


async def test_a_mixed_run_has_some_clients_in_the_drivers_process() -> None:
    endpoints = {"a": "local", "b": "worker2"}
    runtime = {"execution_mode": "pseudo", "num_processes": 2, "client_endpoints": endpoints}
    async with tfr.LearnerProxy(Probe, ["a", "b", "c", "d"], runtime=runtime) as proxy:
        where = await proxy.clients().call("process_id")
        assert where["a"] == os.getpid()
        assert len(set(where.values())) == 3
        assert where["b"] == where["d"]
        with pytest.raises(ValueError, match="plain") as caught:
            await proxy.custom_method("a", "fail", "value")
        assert "on local" in caught.value.__notes__[-1]


async def test_a_killed_worker_ends_its_calls_and_no_others() -> None:
    runtime = {"execution_mode": "pseudo", "num_processes": 2, "max_recoveries": 1}
    async with asyncio.timeout(60), tfr.LearnerProxy(Probe, ["a", "b"], runtime=runtime) as proxy:
        await proxy.clients().call("same", 1)
        queued = [asyncio.create_task(proxy.custom_method("a", name)) for name in ("die", "echo", "context_async")]
        for result in await asyncio.gather(*queued, return_exceptions=True):
            assert isinstance(result, tfr.WorkerLostError)
            assert isinstance(result, ConnectionError)
            assert "worker1" in str(result)
        assert await proxy.custom_method("b", "same", 2) == 2
        with pytest.raises(tfr.WorkerLostError, match=r"a.*worker1"):
            await proxy.custom_method("a", "same", 1)
    async with tfr.LearnerProxy(Probe, ["a"], runtime=runtime | {"num_processes": 1}) as proxy:
        assert await proxy.custom_method("a", "same", 3) == 3


async def test_a_worker_that_dies_while_a_proxy_opens_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fatal_in_a_worker.py").write_text(
        f"import os\nif os.getpid() != {os.getpid()}:\n    os._exit(7)\n"
        "class Learner:\n    def __init__(self, client_id):\n        pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import fatal_in_a_worker

    with pytest.raises(tfr.WorkerLostError, match="worker1"):
        async with (
            asyncio.timeout(60),
            tfr.LearnerProxy(fatal_in_a_worker.Learner, ["a"], runtime={"num_processes": 1}),
        ):
            pass
    del sys.modules["fatal_in_a_worker"]


async def test_a_module_that_a_worker_cannot_import_is_a_config_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").write_text("from learners import Probe\n\n\nclass Learner(Probe): ...\n")
    with monkeypatch.context() as patched:
        patched.syspath_prepend(tmp_path)
        import only_here
    proxy = tfr.LearnerProxy(only_here.Learner, ["a"], runtime={"num_processes": 1})
    with pytest.raises(tfr.ConfigError, match=r"worker1.*only_here"):
        async with proxy:
            pass
    monkeypatch.syspath_prepend(tmp_path)
    async with proxy:  # the same one opens, once its worker finds the module
        assert await proxy.custom_method("a", "append", 1) == 1
    del sys.modules["only_here"]


# Addresses and processes.


async def test_driver_and_workers_listen_on_loopback_alone() -> None:
    async with tfr.LearnerProxy(Probe, ["a", "b"], runtime={"num_processes": 2}) as proxy:
        workers = set((await proxy.clients().call("process_id")).values())
        await proxy.clients().call("same", torch.zeros(100_000))
        found = {pid: listening_addresses(pid) for pid in [os.getpid(), *workers]}
    assert len(found) == 3
    assert all(found.values())  # the driver has the world's store, and all have an agent
    assert {address for addresses in found.values() for address in addresses} == {"127.0.0.1"}


async def test_local_mode_starts_no_process_and_listens_nowhere() -> None:
    before, children = listening_addresses(os.getpid()), children_of(os.getpid())
    async with tfr.LearnerProxy(Probe, ["a"], runtime="local") as proxy:
        assert await proxy.custom_method("a", "process_id") == os.getpid()
        assert children_of(os.getpid()) == children
        assert listening_addresses(os.getpid()) == before


def test_two_pseudo_runs_side_by_side_do_not_disturb_each_other(tmp_path: Path) -> None:
    script = write_script(
        tmp_path,
        """
        async def main():
            async with tfr.LearnerProxy(Probe, ["a", "b"], runtime={"num_processes": 1}, seed=4) as proxy:
                sys.stdout.write("open\\n")
                sys.stdout.flush()
                sys.stdin.readline()
                return repr(dict(await proxy.clients().call("draw")))
        """,
        MAIN,
    )
    one, other = (Process(sys.executable, str(script), takes_lines=True) for _ in range(2))
    with one, other:
        for run in (one, other):
            run.next_line("^open")
        for run in (one, other):  # both are open by now
            run.tell("go")
            assert run.ended() == 0, run.output
    outputs = [run.lines[-1] for run in (one, other)]
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("result {'a'")


@pytest.mark.parametrize(
    ("how", "busy"),
    [
        pytest.param("SIGKILL", True, marks=pytest.mark.slow),  # test_field_guide.py has one like it
        pytest.param("SIGKILL", False, marks=pytest.mark.slow),
        ("SIGKILL with a forked child", False),
        pytest.param("SIGTERM", True, marks=pytest.mark.slow),
        ("SIGINT", True),
        pytest.param("os._exit", False, marks=pytest.mark.slow),
    ],
)
def test_workers_end_within_5_s_of_their_driver_however_it_ends(tmp_path: Path, how: str, busy: bool) -> None:
    script = write_script(
        tmp_path,
        """
        import multiprocessing, time

        async def main(how, busy):
            async with tfr.LearnerProxy(Probe, ["a", "b"], runtime={"num_processes": 2}) as proxy:
                workers = await proxy.clients().call("process_id")
                pids = list(workers.values())
                if "child" in how:
                    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(300,), daemon=True)
                    child.start()
                    print("child", child.pid, flush=True)
                print("pids", *pids, flush=True)
                sys.stdin.readline()
                running, both_run = set(), asyncio.Event()

                def note(event):
                    if type(event).__name__ == "ProgressReported":
                        running.add(event.client_id)
                        if len(running) == 2:
                            both_run.set()

                if busy:
                    proxy.subscribe(note)
                    calls = [proxy.custom_method(one, "hold_regardless", "no such file") for one in "ab"]
                    tasks = [asyncio.create_task(call) for call in calls]
                    await both_run.wait()
                print("ready", flush=True)
                if how == "os._exit":
                    os._exit(3)
                await asyncio.sleep(300)

        if __name__ == "__main__":
            tfr.run(main, sys.argv[1], sys.argv[2] == "True")
        """,
    )
    with Process(sys.executable, str(script), how, str(busy), takes_lines=True) as driver:
        workers = [int(pid) for pid in driver.next_line("^pids").split()[1:]]
        child = [int(line.split()[1]) for line in driver.lines if line.startswith("child")]
        try:
            driver.tell("go")
            driver.next_line("^ready")
            if how != "os._exit":
                driver.signal(signal.Signals[how.split()[0]])
            wait_for_end([driver.pid], timeout_s=20 if how == "SIGINT" else 10)
            wait_for_end(workers, timeout_s=5)
        finally:
            for pid in child:
                os.kill(pid, signal.SIGKILL)


# Scripts.


@pytest.mark.parametrize("start", ["path", pytest.param("module", marks=pytest.mark.slow), "main of a package"])
def test_a_learner_of_the_script_loads_data_with_worker_processes(tmp_path: Path, start: str) -> None:
    script = write_script(
        tmp_path,
        LOADING,
        """
        async def load(runtime):
            async with tfr.LearnerProxy(Loading, ["a", "b"], runtime=runtime) as proxy:
                assert has_loaded(await proxy.clients().call("load"))
                try:
                    await proxy.custom_method("a", "fail")
                except Trouble as error:
                    return error.args

        async def main():
            return [await load("local"), await load({"num_processes": 1})]
        """,
        MAIN,
    )
    if start == "path":
        code, output = run_script(script)
    else:
        package = tmp_path / "package"
        package.mkdir()
        (package / "__init__.py").touch()
        name = "__main__" if start == "main of a package" else "part"
        script.rename(package / f"{name}.py")
        module = "package" if start == "main of a package" else "package.part"
        done = subprocess.run(
            [sys.executable, "-m", module],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=100,
        )
        code, output = done.returncode, done.stdout + done.stderr
    assert code == 0, output
    assert "result [('of the script',), ('of the script',)]" in output


def test_pseudo_mode_names_a_missing_main_guard(tmp_path: Path) -> None:
    script = write_script(
        tmp_path,
        """
        class Learner:
            def __init__(self, client_id):
                pass

        async def main():
            async with tfr.LearnerProxy(Learner, ["a"], runtime={"num_processes": 1}):
                pass

        tfr.run(main)
        """,
    )
    code, output = run_script(script)
    assert code != 0
    assert 'if __name__ == "__main__":' in output


def test_run_refuses_what_is_no_coroutine_function() -> None:
    with pytest.raises(tfr.ConfigError, match="coroutine function"):
        tfr.run(lambda: None)  # type: ignore[arg-type,return-value]


def test_run_returns_the_result_and_raises_the_error_of_main() -> None:
    async def main(value: int, *, fails: bool = False) -> int:
        if fails:
            raise ValueError(value)
        return value

    assert tfr.run(main, 5) == 5
    with pytest.raises(ValueError, match="6"):
        tfr.run(main, 6, fails=True)


# Without torch.distributed.rpc.


@pytest.mark.parametrize("hide", ["sys.modules['torch.distributed.rpc'] = None", "del torch._C._rpc_init"])
def test_without_torch_rpc_local_mode_works_and_pseudo_mode_is_refused(tmp_path: Path, hide: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys, torch\n{hide}\n"
        """
import torchfedrpc as tfr
from learners import Probe

async def main(runtime):
    async with tfr.LearnerProxy(Probe, ["a"], runtime=runtime) as proxy:
        return await proxy.custom_method("a", "same", 5), proxy.mode

print("result", tfr.run(main, "local"))
for runtime in ({"num_processes": 1}, "pseudo"):
    try:
        tfr.run(main, runtime)
    except tfr.ConfigError as error:
        print("refused", error)
print("result", tfr.run(main, None))
"""
    )
    code, output = run_script(script, fresh=True)
    assert code == 0, output
    assert output.count("result (5, 'local')") == 2, output
    assert output.count("execution_mode=local") == 2, output


# A mode of one's own.


async def test_users_mode_keeps_deadlines_errors_and_groups(latch: Latch) -> None:
    async with tfr.LearnerProxy(Probe, ["a", "b"], runtime="counting") as proxy:
        assert proxy.mode == "counting"
        assert CountingExecutor.log == ["open"]
        assert await proxy.clients().call("same", 1) == {"a": 1, "b": 1}
        with pytest.raises(ValueError, match="plain"):
            await proxy.custom_method("a", "fail", "value")
        with pytest.raises(tfr.CallTimeoutError):
            await proxy.options(timeout_s=0.1).custom_method("a", "hold", latch.path)
        assert await proxy.custom_method("a", "what_happened") == ["hold begins", "hold saw cancelled"]
        with pytest.raises(tfr.UnknownClientError):
            await proxy.custom_method("c", "same", 1)
        with pytest.raises(tfr.ConfigError, match="streams"):
            proxy.stream("a", "count", 1)


def test_a_mode_of_another_name_is_listed_with_the_known_ones() -> None:
    with pytest.raises(tfr.ConfigError, match="did you mean 'counting'"):
        tfr.LearnerProxy(Probe, ["a"], runtime="countin")


# The executors on their own.


@pytest.mark.parametrize(
    ("runtime", "kind"),
    [("local", tfr.LocalExecutor), ({"num_processes": 2}, tfr.PseudoExecutor)],
    ids=["local", "pseudo"],
)
async def test_an_executor_serves_without_a_proxy(runtime: Any, kind: type[tfr.AbstractExecutor]) -> None:
    from torchfedrpc.host.spec import LearnerSpec

    router = tfr.ExecutorRouter(runtime)
    executor = router.get_executor("a")
    assert type(executor) is kind
    assert router.mode == ("local" if kind is tfr.LocalExecutor else "pseudo")
    spec, _ = LearnerSpec.of(Probe, 0, RuntimeConfig.of(runtime))
    try:
        await executor.open(tfr.ExecutorSpec(spec, {"a": {}, "b": {}}, EventBus()))
        assert await executor.execute_method("a", "echo", 1, method_name=2) == ((1,), {"method_name": 2})
    finally:
        await executor.close()
    with pytest.raises(tfr.ConfigError, match=f"this {kind.__name__} was opened before.*make another"):
        await executor.open(tfr.ExecutorSpec(spec, {"a": {}}, EventBus()))
