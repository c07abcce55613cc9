"""A launch over two network namespaces, severed in the middle of a round; under torchrun, a rank of that launch."""

from __future__ import annotations

import contextlib
import json
import os
import random
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos_faults import Log, Scene, Timing
from chaos_run import ChaosTrainer, Digests, federate, open_proxy

import torchfedrpc as tfr
from torchfedrpc.observe.events import WorkerLost, WorldFormed

FAULT = "sever the link of two nodes"
NUM_ROUNDS = 4
_CUT_ROUND = 2  # the round before shows how long one takes
_NUM_RANKS = (2, 2)  # of each node; the driver is one of the first
_ADDRESSES = ("10.98.0.1", "10.98.0.2")
_PORT = 29423
_MARK = "chaos "
_START_S = 60.0
_END_S = 10.0  # in which the ranks beyond the cut have to be gone, beside the heartbeat's timeout
_TORCHRUN_S = 35.0  # torchrun gives its ranks 30 s to end


@dataclass
class Outcome:
    """What became of a launch.

    Attributes:
        digests: as `federate` gives them.
        struck: the workers beyond the cut.
        timing: of the cut.
        problem: what went wrong.
        is_hang: whether that is that it did not end.
        leftovers: processes that are still there after the end.
        output: what the ranks have printed.
    """

    digests: list[Digests] = field(default_factory=list)
    struck: list[str] = field(default_factory=list)
    timing: Timing = field(default_factory=lambda: Timing(None, None, None, 0))
    problem: str | None = None
    is_hang: bool = False
    leftovers: list[str] = field(default_factory=list)
    output: str = ""


def missing() -> str | None:
    """Why there can be no namespaces here; None where there can."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "needs root and iproute2"
    name = f"chaos{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
    return None if made.returncode == 0 else f"needs network namespaces ({made.stderr.strip()})"


def sever(draw: random.Random, heartbeat_timeout_s: float, seed: int, hang_s: float) -> Outcome:
    """Launch the run on two nodes, and sever them at a random moment of a round.

    Args:
        draw: draws the moment.
        heartbeat_timeout_s: the run's.
        seed: the run's.
        hang_s: seconds without a sign of the driver after which it hangs.
    """
    outcome = Outcome(struck=[f"worker{rank}" for rank in range(_NUM_RANKS[0], sum(_NUM_RANKS))])
    with _nodes() as names, contextlib.ExitStack() as launches:
        arguments = [str(heartbeat_timeout_s), str(seed)]
        driver, *_ = [launches.enter_context(_launch(names, node, arguments)) for node in range(len(names))]
        lines = _Lines(driver)
        cut_at: float | None = None
        seen: list[dict[str, Any]] = []
        while not seen or "digests" not in seen[-1]:
            line = lines.next(hang_s if seen else _START_S)
            if line is None:
                outcome.is_hang = driver.poll() is None
                outcome.problem = "HANG: no sign of the driver" if outcome.is_hang else "ERROR: the launch failed"
                break
            if not line.startswith(_MARK):
                continue
            seen.append(json.loads(line.removeprefix(_MARK)))
            if seen[-1].get("round") == _CUT_ROUND:
                time.sleep(draw.uniform(0.0, seen[-1]["round_s"]))
                cut_at = time.monotonic()
                _ip("-n", names[1], "link", "set", names[1], "down")
        outcome.output = lines.text
        if outcome.problem is None and cut_at is not None:
            outcome.digests = seen[-1]["digests"]
            outcome.timing = _timing(seen, cut_at, outcome.struck)
            outcome.leftovers = _still_there(names[1], heartbeat_timeout_s + _END_S)
    return outcome


def _timing(seen: list[dict[str, Any]], cut_at: float, struck: list[str]) -> Timing:
    lost = {entry["lost"]: entry["at"] for entry in seen if "lost" in entry}
    formed = [entry["at"] for entry in seen if "formed" in entry]
    (results_at,) = [entry["at"] for entry in seen if entry.get("results") == _CUT_ROUND]
    noticed_s = max(lost[label] for label in struck) - cut_at if lost.keys() >= set(struck) else None
    formed_s = max(formed) - cut_at if formed else None
    return Timing(noticed_s, formed_s, results_at - cut_at if results_at > cut_at else None, len(lost))


# The two nodes.


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def _nodes() -> Iterator[list[str]]:
    """Two namespaces and a cable between them, each end of it called as its namespace."""
    names = [f"chaos{os.getpid()}{letter}" for letter in "ab"]
    try:
        for name in names:
            _ip("netns", "add", name)
        cable = f"link add {names[0]} netns {names[0]} type veth peer name {names[1]} netns {names[1]}"
        _ip(*cable.split())
        for name, address in zip(names, _ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
            _ip("-n", name, "link", "set", name, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:  # the cable goes with them
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@contextlib.contextmanager
def _launch(names: list[str], node: int, arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
    """One node's torchrun; at the end it is ended, whatever state it is in."""
    command = ["ip", "netns", "exec", names[node], sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
    command += [f"--nproc-per-node={_NUM_RANKS[node]}", f"--node-rank={node}", f"--master-port={_PORT}"]
    command += [f"--master-addr={_ADDRESSES[0]}", __file__, *arguments]
    process = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if node == 0 else subprocess.DEVNULL,
        stderr=subprocess.STDOUT if node == 0 else subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # Ctrl-C is for us
    )
    try:
        yield process
    finally:
        # After the cut torchrun would wait five minutes for the other node.
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=_TORCHRUN_S)
        except subprocess.TimeoutExpired:
            for pid in _inside(names[node]):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.communicate()


def _inside(name: str) -> list[int]:
    listed = subprocess.run(["ip", "netns", "pids", name], check=True, capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


def _still_there(name: str, timeout_s: float) -> list[str]:
    """The processes of a node, but for torchrun's own, that are there after so many seconds."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = []
        for pid in _inside(name):
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
                if command and "torch.distributed.run" not in command:
                    found.append(f"beyond the cut, process {pid} ({command[:100]})")
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


class _Lines:
    """The lines that a process prints, as they come."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.text = ""
        self._descriptor = process.stdout.fileno()
        self._num_taken = 0

    def next(self, timeout_s: float) -> str | None:
        """The next line; None where there is none within so many seconds, or no more."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._descriptor, selectors.EVENT_READ)
            deadline = time.monotonic() + timeout_s
            while (end := self.text.find("\n", self._num_taken)) < 0:
                if not selector.select(deadline - time.monotonic()):
                    return None
                data = os.read(self._descriptor, 65536)
                if not data:
                    return None
                self.text += data.decode(errors="replace")
        line = self.text[self._num_taken : end]
        self._num_taken = end + 1
        return line


# A rank.


async def run_as_driver() -> None:
    """Run, and print what happens."""
    heartbeat_timeout_s, seed = float(sys.argv[1]), int(sys.argv[2])
    log = Log()
    began: list[float] = []

    @contextlib.asynccontextmanager
    async def told(trainer: ChaosTrainer, round_num: int) -> AsyncIterator[None]:
        began.append(time.monotonic())
        _say(round=round_num, round_s=began[-1] - began[-2] if round_num else 0.0)
        scene = Scene(trainer, round_num, log, random.Random(), 0.0, heartbeat_timeout_s)
        yield
        _say(results=round_num, at=time.monotonic())
        if round_num == _CUT_ROUND:  # it may be cut when the results are there already
            await log.until(lambda: log.losses(began[-1]))
            await scene.over()

    runtime = {"execution_mode": "distributed", "heartbeat_timeout_s": heartbeat_timeout_s, "journal_max_calls": 5}
    async with open_proxy(runtime, seed) as proxy:
        proxy.subscribe(log)
        digests = await federate(proxy, NUM_ROUNDS, told)
        for at, event in log.entries:
            if isinstance(event, WorkerLost):
                _say(lost=event.worker, at=at)
            elif isinstance(event, WorldFormed):
                _say(formed=event.generation, at=at)
    _say(digests=digests)


def _say(**values: Any) -> None:
    sys.stdout.write(f"{_MARK}{json.dumps(values)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    tfr.run(run_as_driver)
