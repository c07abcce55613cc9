"""Distributed mode on one machine: the contract's suite, and what the launch adds to it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
from pathlib import Path

import pytest
from folders import SUPPORT, TESTS
from processes import Process, children_of, wait_for_end
from torchrun import LOADING, launched, rank_variables, run_launch, write_script

MAIN = """
if __name__ == "__main__":
    result = tfr.run(main)
    sys.stdout.write(f"result {os.environ['RANK']} {result}\\n")  # one piece, so that ranks do not mix
"""


MAIN_FILES = ["test_calls.py", "test_errors.py", "test_reduce_runs.py", "test_streams.py", "test_values.py"]


@pytest.mark.parametrize(
    ("files", "at_least"),
    [
        pytest.param(MAIN_FILES, 100, id="main", marks=pytest.mark.timeout(400)),
        pytest.param([""], 500, id="whole", marks=[pytest.mark.slow, pytest.mark.timeout(1500)]),
    ],
)
def test_the_contract_suite_passes_under_torchrun(files: list[str], at_least: int, tmp_path: Path) -> None:
    code, output = run_launch(
        SUPPORT / "under_torchrun.py",
        *("-v", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'base'}"),
        *(str(TESTS / "contract" / file) for file in files),
        fresh=True,
        timeout_s=1400,
    )
    assert code == 0, output
    passed = re.search(r"(\d+) passed", output)
    assert passed is not None, output
    assert int(passed[1]) >= at_least
    assert output.count("[distributed") >= at_least  # and not of another mode, as if there were no launch
    assert "[local" not in output


# One launch with several parts, one after another: each says what has become of it, and a test looks at that.

PARTS = """
    import socket, traceback

    ENDPOINTS = {
        "first": "worker1", "second": "rank:2", "here": "local",
        "machine": f"host:{socket.gethostname()}", "machine_too": f"host:{socket.gethostname()}",
    }
    BAD = ["worker3", "worker0", "rank:0", "rank:7", "host:nowhere", "nonsense", "http://x", "x:0", ""]

    async def in_workers():
        async with tfr.LearnerProxy(Probe, ["a", "b", "c", "d"]) as proxy:
            processes = await proxy.clients().call("process_id")
            assert len(set(processes.values())) == 2 and os.getpid() not in processes.values()
            return proxy.mode

    async def placed():
        runtime = {"client_endpoints": ENDPOINTS}
        async with tfr.LearnerProxy(Probe, [*ENDPOINTS, "x", "y"], runtime=runtime) as proxy:
            where = await proxy.clients().call("process_id")
            both = {where["first"], where["second"]}
            assert len(both) == 2 and where["here"] == os.getpid() not in both
            assert {where["machine"], where["machine_too"]} == both
            assert [where["x"], where["y"]] == [where["first"], where["second"]]
            stream = [item async for item in proxy.stream("here", "count", 2)]
            assert stream == [0, 1]
            for method in ("draw", "draw_async"):
                arguments = (1,) if method == "draw_async" else ()
                assert await proxy.clients().call(method, *arguments)
            return "placed"

    async def misplaced():
        for endpoint in BAD:
            try:
                async with tfr.LearnerProxy(Probe, ["a", "b"], runtime={"client_endpoints": {"a": endpoint}}):
                    raise AssertionError(endpoint)
            except tfr.ConfigError as error:
                assert "client_endpoints.a" in str(error) and "worker" in str(error), error
        async with tfr.LearnerProxy(Probe, ["a", "b"], runtime={"client_endpoints": {"a": "worker2"}}) as proxy:
            return dict(await proxy.clients().call("same", 1))

    async def one_after_another():
        seen = []
        for _ in range(3):
            async with tfr.LearnerProxy(Probe, ["a", "b"]) as proxy:
                assert await proxy.custom_method("a", "append", 1) == 1
                seen.append(tuple((await proxy.clients().call("process_id")).values()))
        async with tfr.LearnerProxy(Probe, ["a", "b"], runtime="local") as proxy:
            assert (await proxy.custom_method("a", "process_id")) == os.getpid()
        return len(set(seen)), len(set(seen[0]))

    async def halting():
        import halting
        late = tfr.LearnerProxy(halting.Late, ["a", "b"])
        for _ in range(2):
            try:
                async with late:
                    raise AssertionError("it opened")
            except tfr.ConfigError as error:
                assert "not on rank 1" in str(error) and "worker1" in str(error), error
        async with asyncio.timeout(60), tfr.LearnerProxy(Probe, ["a", "b"]) as proxy:
            same = dict(await proxy.clients().call("same", 1))
        open(halting.MARKER, "w").close()
        async with asyncio.timeout(60), late:
            return same, dict(await late.clients().call("same", 1))

    async def loading():
        async with tfr.LearnerProxy(Loading, ["a", "b"]) as proxy:
            assert has_loaded(await proxy.clients().call("load"))
        hidden = lambda client_id: Loading(client_id)
        try:
            tfr.LearnerProxy(hidden, ["a"])
        except tfr.ConfigError:
            return "loaded"

    async def main():
        for part in (in_workers, placed, misplaced, one_after_another, halting, loading):
            try:
                async with asyncio.timeout(90):
                    became = await part()
            except Exception:
                became = traceback.format_exc()
            sys.stdout.write(f"part {json.dumps([part.__name__, str(became)])}\\n")
        return "done"

    if __name__ == "__main__":
        os.environ["PLACE"] = os.environ["RANK"]  # which is hidden from learners
        if os.environ["RANK"] != "0":
            try:
                asyncio.run(in_workers())
            except tfr.ConfigError as error:
                sys.stdout.write(f"refused {os.environ['RANK']} {error}\\n")
        result = tfr.run(main)
        sys.stdout.write(f"result {os.environ['RANK']} {result}\\n")
"""
HALTING = """
import os, time
MARKER = __file__ + ".may_be_imported"
FAILED = __file__ + ".has_failed"
if os.environ["PLACE"] == "1" and not os.path.exists(MARKER):
    open(FAILED, "w").close()
    raise ImportError("not on rank 1")
began = time.monotonic()
while os.environ["PLACE"] == "2" and not os.path.exists(FAILED) and time.monotonic() < began + 30:
    time.sleep(0.01)  # answers after the other
class Late:
    def __init__(self, client_id):
        pass
    def same(self, value):
        return value
"""


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the launch has printed."""
    folder = tmp_path_factory.mktemp("parts")
    (folder / "halting.py").write_text(HALTING)
    code, output = run_launch(write_script(folder, LOADING, PARTS))
    assert code == 0, output
    return output


@pytest.fixture
def became(output: str) -> dict[str, str]:
    """Part -> what has become of it."""
    lines = [line.removeprefix("part ") for line in output.splitlines() if line.startswith("part ")]
    return dict(map(json.loads, lines))


def test_the_result_is_rank_0s_alone(output: str, became: dict[str, str]) -> None:
    assert became["in_workers"] == "distributed"
    assert sorted(line for line in output.splitlines() if line.startswith("result")) == [
        "result 0 done",
        "result 1 None",
        "result 2 None",
    ]


def test_a_proxy_on_another_rank_is_refused(output: str) -> None:
    refused = sorted(line for line in output.splitlines() if line.startswith("refused"))
    assert [line.split()[1] for line in refused] == ["1", "2"]
    assert all("tfr.run(main)" in line for line in refused)


def test_clients_go_where_their_endpoints_say(became: dict[str, str]) -> None:
    assert became["placed"] == "placed"


def test_an_endpoint_that_does_not_exist_is_refused_and_the_next_proxy_opens(became: dict[str, str]) -> None:
    assert became["misplaced"] == "{'a': 1, 'b': 1}"


def test_proxies_one_after_another_use_the_same_workers(became: dict[str, str]) -> None:
    assert became["one_after_another"] == "(1, 2)"


def test_a_learner_that_one_worker_cannot_import_leaves_workers_and_proxy_well(became: dict[str, str]) -> None:
    assert became["halting"] == "({'a': 1, 'b': 1}, {'a': 1, 'b': 1})"


def test_a_learner_of_the_script_may_load_data_with_worker_processes(became: dict[str, str]) -> None:
    assert became["loading"] == "loaded"


# Launches of their own.


@pytest.mark.parametrize(
    "failing",
    [
        pytest.param("raise ValueError('main fails')", marks=pytest.mark.slow),  # test_ending.py has one like it
        pytest.param("sys.exit(5)", marks=pytest.mark.slow),
        "await proxy.custom_method('a', 'fail', 'value')",
        pytest.param("os._exit(3)", marks=pytest.mark.slow),
    ],
)
def test_an_error_of_main_ends_all_ranks_with_a_nonzero_exit(tmp_path: Path, failing: str) -> None:
    script = write_script(
        tmp_path,
        f"""
        async def main():
            async with tfr.LearnerProxy(Probe, ["a", "b"]) as proxy:
                await proxy.clients().call("same", 1)
                print("opened", flush=True)
                {failing}
        """,
        MAIN,
    )
    code, output = run_launch(script)
    assert code != 0, output
    assert "opened" in output, output
    assert not [line for line in output.splitlines() if line.startswith("result")], output


@pytest.mark.slow
def test_an_error_before_any_proxy_ends_all_ranks_with_a_nonzero_exit(tmp_path: Path) -> None:
    script = write_script(
        tmp_path,
        """
        async def main():
            raise ValueError("main fails early")
        """,
        MAIN,
    )
    code, output = run_launch(script)
    assert code != 0, output
    assert "main fails early" in output, output


@pytest.mark.slow
def test_a_main_that_opens_no_proxy_ends_all_ranks_well(tmp_path: Path) -> None:
    script = write_script(tmp_path, "\nasync def main():\n    return 'nothing to do'\n", MAIN)
    code, output = run_launch(script)
    assert code == 0, output
    assert "result 0 nothing to do" in output, output


@pytest.mark.parametrize("busy", ["await asyncio.sleep(300)", "await proxy.clients().call('nap', 300.0)"])
def test_workers_end_within_5_s_of_a_killed_driver(tmp_path: Path, busy: str) -> None:
    script = write_script(
        tmp_path,
        f"""
        async def main():
            async with tfr.LearnerProxy(Probe, ["a", "b"]) as proxy:
                workers = await proxy.clients().call("process_id")
                print("pids", os.getpid(), *workers.values(), flush=True)
                {busy}
        """,
        MAIN,
    )
    with launched(script) as launch:
        line = launch.next_line("^pids")
        driver, *workers = map(int, line.split()[1:])
        assert sorted([driver, *workers]) == sorted(children_of(launch.pid))
        os.kill(launch.pid, signal.SIGSTOP)  # else torchrun would end them
        try:
            os.kill(driver, signal.SIGKILL)
            wait_for_end(workers, timeout_s=5)
        finally:
            os.kill(launch.pid, signal.SIGCONT)


@pytest.mark.slow
def test_a_proxy_of_a_launch_without_tfr_run_is_refused(tmp_path: Path) -> None:
    script = write_script(
        tmp_path,
        """
        async def main():
            async with tfr.LearnerProxy(Probe, ["a"]):
                pass

        try:
            asyncio.run(main())
        except tfr.ConfigError as error:
            sys.stdout.write(f"refused {error}\\n")
        """,
    )
    code, output = run_launch(script, num_processes=2)
    assert code == 0, output
    assert output.count("tfr.run(main)") == 2


def test_a_launch_of_one_process_runs_locally(tmp_path: Path) -> None:
    script = write_script(
        tmp_path,
        """
        async def main():
            async with tfr.LearnerProxy(Probe, ["a"]) as proxy:
                assert await proxy.custom_method("a", "same", 1) == 1
                return proxy.mode
        """,
        MAIN,
    )
    code, output = run_launch(script, num_processes=1)
    assert code == 0, output
    assert "result 0 local" in output, output


def test_ranks_that_environment_variables_alone_start_serve_on_loopback(tmp_path: Path) -> None:
    script = write_script(
        tmp_path,
        """
        from nodes import listening_addresses

        async def main():
            async with tfr.LearnerProxy(Probe, ["a"]) as proxy:
                worker = await proxy.custom_method("a", "process_id")
                assert worker != os.getpid()
                return proxy.mode, set(listening_addresses(worker))
        """,
        MAIN,
    )
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with contextlib.ExitStack() as stack:
        variables = [rank_variables(rank, rank, 2, "127.0.0.1", port) for rank in range(2)]
        commands = [Process(sys.executable, str(script), variables=of_one) for of_one in variables]
        ranks = [stack.enter_context(command) for command in commands]
        statuses = [rank.ended(timeout_s=100) for rank in ranks]
        output = "\n".join(rank.output for rank in ranks)
    assert statuses == [0, 0], output
    assert "result 0 ('distributed', {'127.0.0.1'})" in output
    assert "result 1 None" in output


@pytest.mark.slow
def test_a_launch_that_failed_is_started_again_by_torchrun(tmp_path: Path) -> None:
    script = write_script(
        tmp_path,
        f"""
        from pathlib import Path
        marker = Path({str(tmp_path / "failed once")!r})

        async def main():
            async with tfr.LearnerProxy(Probe, ["a", "b"]) as proxy:
                result = dict(await proxy.clients().call("same", 1))
                if not marker.exists():
                    marker.touch()
                    os._exit(1)
                return result
        """,
        MAIN,
    )
    code, output = run_launch(script, launcher=["--max-restarts=1"])
    assert code == 0, output
    assert "result 0 {'a': 1, 'b': 1}" in output, output
