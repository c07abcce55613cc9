"""Distributed mode on one machine: the behavioural suite, and what the launch adds to it."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from torchrun import TESTS, children_of, launched, run_launch, wait_for_end, write_script

MAIN = """
if __name__ == "__main__":
    result = tfr.run(main)
    sys.stdout.write(f"result {os.environ['RANK']} {result}\\n")  # one piece, so that ranks do not mix
"""


@pytest.mark.timeout(420)
def test_the_behavioural_suite_passes_under_torchrun(tmp_path: Path) -> None:
    code, output = run_launch(
        TESTS / "under_torchrun.py",
        *("-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'base'}", str(TESTS / "behaviour")),
        timeout_s=400,
    )
    assert code == 0, output
    passed = re.search(r"(\d+) passed", output)
    assert passed is not None, output
    assert int(passed[1]) > 300


def test_the_result_is_rank_0s_alone(tmp_path: Path) -> None:
    script = write_script(
        tmp_path,
        """
        async def main():
            async with tfr.LearnerProxy(Probe, ["a", "b", "c", "d"]) as proxy:
                processes = await proxy.clients().call("process_id")
                assert len(set(processes.values())) == 2 and os.getpid() not in processes.values()
                return proxy.mode
        """,
        MAIN,
    )
    code, output = run_launch(script)
    assert code == 0, output
    assert sorted(line for line in output.splitlines() if line.startswith("result")) == [
        "result 0 distributed",
        "result 1 None",
        "result 2 None",
    ]


@pytest.mark.parametrize(
    "failing",
    [
        "raise ValueError('main fails')",
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
        assert launch.stdout is not None
        lines = []
        for line in launch.stdout:
            lines.append(line)
            if line.startswith("pids"):
                break
        else:
            pytest.fail("".join(lines))
        driver, *workers = map(int, line.split()[1:])
        assert sorted([driver, *workers]) == sorted(children_of(launch.pid))
        os.kill(launch.pid, signal.SIGSTOP)  # else torchrun would end them
        try:
            os.kill(driver, signal.SIGKILL)
            wait_for_end(workers, timeout_s=5)
        finally:
            os.kill(launch.pid, signal.SIGCONT)


def test_a_proxy_on_another_rank_is_refused(tmp_path: Path) -> None:
    script = write_script(
        tmp_path,
        """
        async def main():
            async with tfr.LearnerProxy(Probe, ["a"]) as proxy:
                return await proxy.custom_method("a", "same", 1)

        if __name__ == "__main__":
            if os.environ["RANK"] != "0":
                try:
                    asyncio.run(main())
                except tfr.ConfigError as error:
                    sys.stdout.write(f"refused {os.environ['RANK']} {error}\\n")
            result = tfr.run(main)
            sys.stdout.write(f"result {result}\\n")
        """,
    )
    code, output = run_launch(script)
    assert code == 0, output
    refused = sorted(line for line in output.splitlines() if line.startswith("refused"))
    assert [line.split()[1] for line in refused] == ["1", "2"]
    assert all("tfr.run(main)" in line for line in refused)
    assert "result 1" in output, output


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


def test_clients_go_where_their_endpoints_say(tmp_path: Path) -> None:
    script = write_script(
        tmp_path,
        """
        import socket
        ENDPOINTS = {
            "first": "worker1", "second": "rank:2", "here": "local",
            "machine": f"host:{socket.gethostname()}", "machine_too": f"host:{socket.gethostname()}",
        }

        async def main():
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
        """,
        MAIN,
    )
    code, output = run_launch(script)
    assert code == 0, output
    assert "result 0 placed" in output, output


def test_an_endpoint_that_does_not_exist_is_refused_and_the_next_proxy_opens(tmp_path: Path) -> None:
    script = write_script(
        tmp_path,
        """
        BAD = ["worker3", "worker0", "rank:0", "rank:7", "host:nowhere", "nonsense", "http://x", "x:0", ""]

        async def main():
            for endpoint in BAD:
                try:
                    async with tfr.LearnerProxy(Probe, ["a", "b"], runtime={"client_endpoints": {"a": endpoint}}):
                        raise AssertionError(endpoint)
                except tfr.ConfigError as error:
                    assert "client_endpoints.a" in str(error) and "worker" in str(error), error
            async with tfr.LearnerProxy(Probe, ["a", "b"], runtime={"client_endpoints": {"a": "worker2"}}) as proxy:
                return dict(await proxy.clients().call("same", 1))
        """,
        MAIN,
    )
    code, output = run_launch(script)
    assert code == 0, output
    assert "result 0 {'a': 1, 'b': 1}" in output, output


def test_proxies_one_after_another_use_the_same_workers(tmp_path: Path) -> None:
    script = write_script(
        tmp_path,
        """
        async def main():
            seen = []
            for _ in range(3):
                async with tfr.LearnerProxy(Probe, ["a", "b"]) as proxy:
                    assert await proxy.custom_method("a", "append", 1) == 1
                    seen.append(tuple((await proxy.clients().call("process_id")).values()))
            async with tfr.LearnerProxy(Probe, ["a", "b"], runtime="local") as proxy:
                assert (await proxy.custom_method("a", "process_id")) == os.getpid()
            return len(set(seen)), len(set(seen[0]))
        """,
        MAIN,
    )
    code, output = run_launch(script)
    assert code == 0, output
    assert "result 0 (1, 2)" in output, output


def test_a_learner_that_one_worker_cannot_import_leaves_the_workers_well(tmp_path: Path) -> None:
    (tmp_path / "halting.py").write_text(
        "import os, time\n"
        "if os.environ['RANK'] == '1':\n    raise ImportError('not on rank 1')\n"
        "time.sleep(1.0 if os.environ['RANK'] == '2' else 0)  # answers long after the other\n"
        "class Late:\n    def __init__(self, client_id):\n        pass\n"
    )
    script = write_script(
        tmp_path,
        """
        async def main():
            import halting
            for _ in range(2):
                try:
                    async with tfr.LearnerProxy(halting.Late, ["a", "b"]):
                        raise AssertionError("it opened")
                except tfr.ConfigError as error:
                    assert "not on rank 1" in str(error) and "worker1" in str(error), error
            async with asyncio.timeout(60), tfr.LearnerProxy(Probe, ["a", "b"]) as proxy:
                return dict(await proxy.clients().call("same", 1))
        """,
        MAIN,
    )
    code, output = run_launch(script)
    assert code == 0, output
    assert "result 0 {'a': 1, 'b': 1}" in output, output


def test_a_learner_of_the_script_may_load_data_with_processes_of_its_own(tmp_path: Path) -> None:
    script = write_script(
        tmp_path,
        """
        class Result:
            def __init__(self, values):
                self.values = values

        class Loading:
            def __init__(self, client_id):
                self.data = torch.utils.data.TensorDataset(torch.arange(12.0))

            def load(self):
                loader = torch.utils.data.DataLoader(self.data, batch_size=3, num_workers=2, shuffle=True)
                return Result(sorted(value for (batch,) in loader for value in batch.tolist()))

        async def main():
            async with tfr.LearnerProxy(Loading, ["a", "b"]) as proxy:
                loaded = await proxy.clients().call("load")
                assert all(type(result) is Result and result.values == list(range(12)) for result in loaded.values())
            hidden = lambda client_id: Loading(client_id)
            try:
                tfr.LearnerProxy(hidden, ["a"])
            except tfr.ConfigError:
                return "loaded"
        """,
        MAIN,
    )
    code, output = run_launch(script)
    assert code == 0, output
    assert "result 0 loaded" in output, output


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
