"""How a run ends, with all its processes: by signals, and by an error of its main coroutine."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import Process, is_alive, wait_for_end
from torchrun import run_launch, write_script

STATUS = {signal.SIGINT: (130, -signal.SIGINT), signal.SIGTERM: (143,)}  # a shell shows -SIGINT as 130
SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
MOSTLY_SIGINT = pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
LIMIT_S = 5.0
MAIN = """
class Spinning:
    def __init__(self, client_id):
        pass

    def spin(self):
        ones = torch.ones(100, 100)
        print("ready", flush=True)
        while True:
            ones @ ones

async def main(mode, client):
    runtime = {"execution_mode": mode} | ({"num_processes": 2} if mode == "pseudo" else {})
    async with tfr.LearnerProxy(Spinning, ["a", "b"], runtime=runtime) as proxy:
        await proxy.custom_method(client, "spin")

if __name__ == "__main__":
    tfr.run(main, *sys.argv[1:])
"""
SWALLOWING = """
async def main():
    try:
        print("ready", flush=True)
        await asyncio.sleep(300)
    except asyncio.CancelledError:
        print("cancelled", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    print("cleaned up", flush=True)

if __name__ == "__main__":
    tfr.run(main)
"""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3")
ENDLESS = ("experiment=smoke", "trainer.num_rounds=1000000")


class Run(Process):
    """A process started by a test, with all that come of it: they have its working directory.

    Args:
        arguments: The interpreter's.
        folder: Its working directory, which no other process has.
    """

    def __init__(self, arguments: tuple[str, ...], folder: Path) -> None:
        self._folder = str(folder)
        super().__init__(sys.executable, *arguments, folder=folder, takes_lines=True)

    def members(self) -> list[int]:
        """The processes of this run that are alive."""
        return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and self._is_ours(entry)]

    def _is_ours(self, entry: Path) -> bool:
        try:
            return os.readlink(entry / "cwd") == self._folder and is_alive(int(entry.name))
        except OSError:  # it is gone, or another user's
            return False

    def end(self, *numbers: int, within_s: float = LIMIT_S) -> tuple[int, str]:
        """Send signals, wait until no process is left; returns the exit status and all output."""
        members = self.members()
        for number in numbers:
            self.signal(signal.Signals(number))
        try:
            wait_for_end(members, within_s)
            status = self.ended(within_s)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            pytest.fail(f"{error}\n{self.output}")
        assert not self.members()
        return status, self.output

    def close(self) -> None:
        """Kill all processes of this run."""
        for pid in self.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        super().close()


def started(folder: Path, *arguments: str) -> Run:
    return Run(arguments, folder)


# Whole processes, and what is left of them.


@pytest.mark.parametrize(("mode", "number"), [("local", signal.SIGINT), ("pseudo", signal.SIGTERM)])
def test_a_signal_ends_a_run_though_a_sync_method_goes_on(tmp_path: Path, mode: str, number: signal.Signals) -> None:
    with started(tmp_path, str(write_script(tmp_path, MAIN)), mode, "b") as run:
        run.next_line("ready$")
        status, output = run.end(number)
    assert status in STATUS[number], output
    assert ("KeyboardInterrupt" in output) == (number == signal.SIGINT)


@MOSTLY_SIGINT
@pytest.mark.parametrize("mode", [pytest.param("local", marks=pytest.mark.slow), "pseudo"])
def test_the_command_says_where_its_outputs_are_when_a_signal_ends_it(
    tmp_path: Path, mode: str, number: signal.Signals
) -> None:
    workers = ["runtime.num_processes=2"] if mode == "pseudo" else []
    with started(tmp_path, "-m", "torchfedrpc", *ENDLESS, f"runtime={mode}", *workers) as run:
        run.next_line("^round       2/1000000")
        status, output = run.end(number)
    assert status == 128 + number, output
    assert "Traceback" not in output
    outputs = Path(output.splitlines()[-1].removeprefix("interrupted; outputs so far: "))
    history = [json.loads(line)["round"] for line in (outputs / "history.jsonl").read_text().splitlines()]
    assert len(history) >= 2
    assert history == list(range(len(history)))


@MOSTLY_SIGINT
@pytest.mark.slow
def test_a_signal_ends_a_whole_sweep(tmp_path: Path, number: signal.Signals) -> None:
    sweep = ("-m", "seed=1,2", "hydra.sweep.dir=sweep")
    with started(tmp_path, "-m", "torchfedrpc", *sweep, *ENDLESS, "runtime=local") as run:
        run.next_line("^round       1/1000000")
        status, output = run.end(number)
    assert status == 128 + number, output
    assert (tmp_path / "sweep" / "0" / "history.jsonl").exists()
    assert not (tmp_path / "sweep" / "1").exists()


@MOSTLY_SIGINT
def test_a_signal_ends_a_run_whose_workers_are_only_starting(tmp_path: Path, number: signal.Signals) -> None:
    with started(tmp_path, "-B", str(write_script(tmp_path, MAIN)), "pseudo", "b") as run:
        while len(run.members()) < 2:  # the process that forks them imports torch
            assert run.process.poll() is None
            time.sleep(0.01)
        status, output = run.end(number)
    assert status in STATUS[number], output
    assert "ready" not in output


def test_a_second_signal_of_the_same_kind_is_immediate(tmp_path: Path) -> None:
    with started(tmp_path, str(write_script(tmp_path, SWALLOWING))) as run:
        run.next_line("^ready")
        run.signal(signal.SIGINT)
        run.next_line("^cancelled")
        status, output = run.end(signal.SIGINT, within_s=1.0)
    assert status == 130, output
    assert "cleaned up" not in output


def test_a_sigterm_that_follows_a_sigint_leaves_the_clean_up_alone(tmp_path: Path) -> None:
    with started(tmp_path, str(write_script(tmp_path, SWALLOWING))) as run:
        run.next_line("^ready")
        run.signal(signal.SIGINT)
        run.next_line("^cancelled")
        run.signal(signal.SIGTERM)
        run.tell("go")
        status, output = run.end()
    assert status in STATUS[signal.SIGINT], output
    assert "cleaned up" in output


@MOSTLY_SIGINT
def test_a_run_whose_clean_up_never_ends_is_ended(tmp_path: Path, number: signal.Signals) -> None:
    with started(tmp_path, str(write_script(tmp_path, SWALLOWING))) as run:
        run.next_line("^ready")
        status, output = run.end(number)
    assert status == 128 + number, output
    assert "cancelled" in output
    assert "cleaned up" not in output


BLOCKED_IN_C = """
import ctypes

async def main():
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
    libc.pthread_mutex_lock(mutex)
    print("ready", flush=True)
    libc.pthread_mutex_lock(mutex)

if __name__ == "__main__":
    tfr.run(main)
"""


@SIGNALS
@pytest.mark.slow
def test_a_run_that_blocks_for_ever_outside_python_is_ended(tmp_path: Path, number: signal.Signals) -> None:
    with started(tmp_path, str(write_script(tmp_path, BLOCKED_IN_C))) as run:
        run.next_line("^ready")
        status, output = run.end(number)
    assert status == 128 + number, output


@MOSTLY_SIGINT
def test_a_signal_to_torchrun_ends_all_ranks(tmp_path: Path, number: signal.Signals) -> None:
    with started(tmp_path, *TORCHRUN, str(write_script(tmp_path, MAIN)), "distributed", "b") as run:
        run.next_line("ready$")
        status, output = run.end(number, within_s=LIMIT_S + 5)  # the launcher looks at its ranks now and then
    assert status != 0, output
    assert "Unable to shutdown" not in output


@MOSTLY_SIGINT
@pytest.mark.slow
def test_a_signal_to_torchrun_ends_ranks_that_wait_for_a_driver_in_vain(
    tmp_path: Path, number: signal.Signals
) -> None:
    script = write_script(
        tmp_path,
        """
        import time

        async def main():
            pass

        if __name__ == "__main__":
            if os.environ["RANK"] == "0":
                time.sleep(300)
            if os.environ["RANK"] == "1":
                print("ready", flush=True)
            tfr.run(main)
        """,
    )
    with started(tmp_path, *TORCHRUN, str(script)) as run:
        run.next_line("^ready")
        status, output = run.end(number, within_s=LIMIT_S + 2)
    assert status != 0, output


@pytest.mark.timeout(180)
def test_torchrun_names_rank_0_when_main_fails_though_a_worker_is_at_a_method(tmp_path: Path) -> None:
    script = write_script(
        tmp_path,
        """
        async def main():
            async with tfr.LearnerProxy(Probe, ["a", "b"]) as proxy:
                await proxy.clients().call("same", 1)
                asyncio.ensure_future(proxy.custom_method("a", "nap", 300.0))
                raise ValueError("main fails")

        if __name__ == "__main__":
            tfr.run(main)
        """,
    )
    status, output = run_launch(script)
    assert status != 0
    assert "ValueError: main fails" in output
    cause = re.search(r"Root Cause.*?rank\s*:\s*(\d+)", output, re.DOTALL)
    assert cause is not None, output
    assert cause[1] == "0", output
