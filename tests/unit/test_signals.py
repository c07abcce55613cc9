"""Signals that come in the course of a run in this process: what they interrupt, and what they leave alone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from processes import Process

import torchfedrpc as tfr
from torchfedrpc.signals import run_interruptible

ENDING = (signal.SIGINT, signal.SIGTERM)
SIGNALS = pytest.mark.parametrize("number", ENDING)


@pytest.fixture(autouse=True)
def _handlers_are_put_back() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in ENDING}
    yield
    assert {number: signal.getsignal(number) for number in ENDING} == before


def expect(number: signal.Signals) -> pytest.RaisesExc[Any]:
    """What stands for a signal."""
    if number == signal.SIGINT:
        return pytest.raises(KeyboardInterrupt)
    return pytest.raises(SystemExit, check=lambda error: error.code == 143)


@SIGNALS
def test_a_trainer_that_swallows_its_cancellation_does_not_hide_the_signal(number: signal.Signals) -> None:
    async def main() -> str:
        signal.raise_signal(number)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        return "finished"

    with expect(number):
        tfr.run(main)


@SIGNALS
def test_an_error_in_the_clean_up_does_not_hide_the_signal(number: signal.Signals) -> None:
    async def main() -> None:
        signal.raise_signal(number)
        try:
            await asyncio.sleep(60)
        finally:
            raise ValueError("clean-up fails")

    with expect(number) as raised:
        tfr.run(main)
    assert isinstance(raised.value.__cause__, ValueError)


@SIGNALS
@pytest.mark.parametrize("blocking", ["sleep", "loop"])
def test_a_main_coroutine_that_blocks_is_interrupted_and_cleans_up(number: signal.Signals, blocking: str) -> None:
    cleaned_up = False

    async def main() -> None:
        nonlocal cleaned_up
        signal.raise_signal(number)
        try:
            if blocking == "sleep":
                time.sleep(60)
            while True:
                pass
        finally:
            cleaned_up = True

    with expect(number):
        tfr.run(main)
    assert cleaned_up


def test_a_task_that_blocks_is_interrupted_and_the_main_coroutine_cleans_up() -> None:
    cleaned_up = False

    async def block() -> None:
        signal.raise_signal(signal.SIGINT)
        time.sleep(60)

    async def main() -> None:
        nonlocal cleaned_up
        try:
            await asyncio.create_task(block())
        finally:
            cleaned_up = True

    with pytest.raises(KeyboardInterrupt):
        tfr.run(main)
    assert cleaned_up


def test_the_notice_is_shown_once_and_for_a_signal_alone(capfd: pytest.CaptureFixture[str]) -> None:
    async def main(number: int | None) -> None:
        if number is not None:
            signal.raise_signal(number)
            await asyncio.sleep(60)

    run_interruptible(lambda: main(None), notice="outputs so far")
    assert capfd.readouterr().err == ""
    with pytest.raises(KeyboardInterrupt):
        run_interruptible(lambda: main(signal.SIGINT), notice="outputs so far")
    assert capfd.readouterr().err == "outputs so far\n"


def test_a_handler_that_a_script_has_set_stays() -> None:
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))

    async def main() -> str:
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0)
        return "finished"

    try:
        assert tfr.run(main) == "finished"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert came == [signal.SIGTERM]


def test_a_sigint_that_is_ignored_stays_so() -> None:
    async def main() -> str:
        signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(0)
        return "finished"

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as `&` in a script does for what follows
    try:
        assert tfr.run(main) == "finished"
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_in_another_thread_leaves_signals_alone() -> None:
    results: list[Any] = []
    before = [signal.getsignal(number) for number in ENDING]

    async def main() -> list[Any]:
        return [signal.getsignal(number) for number in ENDING]

    thread = threading.Thread(target=lambda: results.append(tfr.run(main)))
    thread.start()
    thread.join()
    assert results == [before]


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_a_run_where_a_loop_is_running_is_refused_and_leaves_it_alone() -> None:
    async def main() -> None:
        raise AssertionError("it ran")

    async def notebook() -> asyncio.AbstractEventLoop:
        with pytest.raises(tfr.ConfigError, match="starts an event loop, and one is running here"):
            tfr.run(main)
        return asyncio.get_event_loop()

    with asyncio.Runner() as runner:
        assert runner.run(notebook()) is runner.get_loop()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_has_the_handlers_from_before() -> None:
    before = [signal.getsignal(number) for number in ENDING]

    async def main() -> tuple[int, list[Any]]:
        pid = os.fork()
        here = [signal.getsignal(number) for number in ENDING]
        if pid == 0:
            os._exit(0 if here == before else 1)
        return os.waitpid(pid, 0)[1], here

    result = tfr.run(main)
    assert result is not None
    assert result[0] == 0
    assert result[1] != before


class Spinning:
    def __init__(self, client_id: str) -> None:
        self.ones = torch.ones(10, 10)

    def spin(self) -> None:
        while True:
            self.ones @ self.ones


def test_a_method_that_goes_on_regardless_is_stopped_when_the_run_has_ended() -> None:
    async def main() -> None:
        async with tfr.LearnerProxy(Spinning, ["a"], runtime="local") as proxy:
            with pytest.raises(tfr.CallTimeoutError):
                await proxy.options(timeout_s=0.1).custom_method("a", "spin")

    tfr.run(main)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("torchfedrpc")]


FORCED = """
import socket, threading, time
from torchfedrpc import signals

def last():
    print("the table", flush=True)
    threading.Event().wait()

async def main():
    time.sleep(0.5)  # longer than the sockets' timeout
    print("ready", flush=True)
    try:
        time.sleep(300)
    except KeyboardInterrupt:
        time.sleep(300)

socket.setdefaulttimeout(0.1)
signals.run_interruptible(main, at_forced_end=last)
"""


def test_a_process_that_is_ended_by_force_says_its_last_within_5_s() -> None:
    with Process(sys.executable, "-c", FORCED) as run:
        run.next_line("ready")
        run.signal(signal.SIGINT)
        run.next_line("the table", timeout_s=10)
        assert run.ended(10) == 130
