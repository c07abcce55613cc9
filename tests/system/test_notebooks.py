"""Notebooks: cells, their interruption, and what is left when a kernel ends."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import needs
from doc_snippets import snippets
from folders import ROOT
from kernels import Kernel, Result, close_client_loop
from processes import descendants_of, is_alive
from workers import WorkerCommand, make_token

LEARNER = """
import asyncio, os, sys, time
import torch
import torchfedrpc as tfr

class Learner:
    def __init__(self, client_id):
        if client_id == "endless":
            self.spin()

    def same(self, value):
        return value

    def spin(self):
        print("begun", flush=True)
        while True:
            torch.ones(10).sum()

    def polite(self):
        print("begun", flush=True)
        while not tfr.current_call().cancelled:
            time.sleep(0.01)

    async def wait(self):
        print("begun", flush=True)
        await asyncio.sleep(1000)

    async def spin_async(self):
        self.spin()

    def items(self):
        yield 1
        self.spin()

    def stuck(self):
        print("begun", flush=True)
        time.sleep(1000)

    def fail(self):
        raise ValueError("of a cell")
"""
ANSWERS = "[await proxy.client(name).same(name) for name in ('a', 'b')]"
RUNTIMES = {"local": {"execution_mode": "local"}, "pseudo": {"num_processes": 2}}
PROMISED_S = 5.0


@pytest.fixture(scope="module", autouse=True)
def _installed() -> Iterator[None]:
    for module in ("cloudpickle", "ipykernel", "jupyter_client"):
        needs(module)
    yield
    close_client_loop()


@pytest.fixture(scope="module")
def kernel(_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    with Kernel(tmp_path_factory.mktemp("notebook")) as kernel:
        assert not kernel.run(LEARNER).error
        yield kernel


def interrupted(kernel: Kernel, code: str, mark: str = "begun", num_times: int = 1) -> Result:
    """Run a cell, interrupt it once it has printed a mark, and wait for its end."""
    cell = kernel.begin(code)
    kernel.until_printed(cell, mark)
    for _ in range(num_times):
        kernel.interrupt()
    return kernel.end(cell)


def ended_in_time(kernel: Kernel, code: str, num_attempts: int = 3) -> bool:
    """Whether an interrupt ends a cell in time; on a busy machine, in one of a few attempts."""
    for _ in range(num_attempts):
        result = interrupted(kernel, code)
        assert result.error in ("CancelledError", "KeyboardInterrupt")
        if result.seconds < PROMISED_S:
            return True
        kernel.run(ANSWERS)
    return False


@pytest.fixture(scope="class", params=RUNTIMES)
def opened(kernel: Kernel, request: pytest.FixtureRequest) -> Iterator[Kernel]:
    """The kernel with an open proxy, which one cell has opened."""
    runtime = RUNTIMES[request.param]
    result = kernel.run(f"proxy = await tfr.LearnerProxy(Learner, ['a', 'b', 'endless'], runtime={runtime}).open()")
    assert not result.error, result
    yield kernel
    assert not kernel.run("await proxy.close()").error


class TestProxyOfAnEarlierCell:
    """A proxy that one cell has opened, and another one uses."""

    @pytest.mark.parametrize(
        "code",
        [
            "await proxy.client('a').spin()",
            "await proxy.client('a').polite()",
            "await proxy.client('a').wait()",
            "await proxy.client('a').spin_async()",
            "await proxy.client('endless').same(1)",
            "await proxy.clients(['a', 'b']).spin()",
            "await proxy.clients(['a', 'b']).reduce('spin', tfr.Sum())",
            "async for item in proxy.stream('a', 'items'): pass",
            "async for _ in proxy.clients(['a', 'b']).as_completed('spin'): pass",
            "print('begun', flush=True); time.sleep(1000)",
        ],
    )
    def test_interrupt_ends_a_cell_and_the_next_one_uses_the_same_proxy(self, opened: Kernel, code: str) -> None:
        assert ended_in_time(opened, code)
        following = opened.run(ANSWERS)
        assert following.text.endswith("['a', 'b']"), following


def test_a_worker_process_whose_method_cannot_be_interrupted_is_replaced(kernel: Kernel) -> None:
    assert not kernel.run(
        "proxy = await tfr.LearnerProxy(Learner, ['a', 'b'], runtime={'num_processes': 1}).open()"
    ).error
    assert interrupted(kernel, "await proxy.client('a').stuck()").seconds < PROMISED_S
    following = kernel.run(f"{ANSWERS}, proxy.stats()['workers_lost']")
    assert following.text.endswith("(['a', 'b'], 1)"), following
    assert not kernel.run("await proxy.close()").error


@pytest.mark.parametrize("mode", RUNTIMES)
@pytest.mark.parametrize("num_times", [1, 2])
def test_interrupt_closes_a_proxy_with_its_block(kernel: Kernel, mode: str, num_times: int) -> None:
    block = f"async with tfr.LearnerProxy(Learner, ['a', 'b'], runtime={RUNTIMES[mode]}) as proxy:\n    "
    result = interrupted(kernel, block + "await proxy.clients().spin()", num_times=num_times)
    assert result.error == "CancelledError"
    assert result.seconds < PROMISED_S
    assert kernel.run(f"{block}print({ANSWERS})").text.endswith("['a', 'b']\n")


def test_interrupt_ends_the_opening_of_a_proxy(kernel: Kernel) -> None:
    begun = kernel.folder / "begun"
    (kernel.folder / "slow_to_import.py").write_text(
        "import time\nfrom pathlib import Path\nimport torchfedrpc.launcher\nclass Learner:\n    pass\n"
        "if torchfedrpc.launcher._is_worker:\n    Path('begun').touch()\n    time.sleep(1000)\n"
    )
    cell = kernel.begin(
        "import slow_to_import\n"
        "await tfr.LearnerProxy(slow_to_import.Learner, ['a'], runtime={'num_processes': 1}).open()"
    )
    while not begun.exists():  # what a worker prints arrives once the proxy is open
        time.sleep(0.05)
    kernel.interrupt()
    result = kernel.end(cell)
    assert result.error == "CancelledError"
    assert result.seconds < PROMISED_S
    assert kernel.run("tfr.LearnerProxy.current()").text == ""


def test_workers_that_listen_serve_a_notebook_with_importable_classes(kernel: Kernel, tmp_path: Path) -> None:
    (kernel.folder / "importable.py").write_text(LEARNER)
    token = make_token(tmp_path)
    with WorkerCommand("--listen", "127.0.0.1:0", "--token-file", token, folder=kernel.folder) as worker:
        address = worker.line("listening on ").removeprefix("listening on ")
        runtime = {"client_endpoints": {"a": address, "b": address}, "token_file": token}
        opening = "proxy = await tfr.LearnerProxy({}, ['a', 'b'], runtime=runtime).open()"
        refused = kernel.run(f"runtime = {runtime}\n" + opening.format("Learner"))
        assert refused.error == "ConfigError"
        assert "move them to a module" in refused.message
        assert not kernel.run("import importable\n" + opening.format("importable.Learner")).error
        cell = kernel.begin("await proxy.client('a').spin()")
        worker.line("begun")
        kernel.interrupt()
        assert kernel.end(cell).seconds < PROMISED_S
        following = kernel.run(ANSWERS)
        assert following.text.endswith("['a', 'b']"), following
        assert not kernel.run("await proxy.close()").error


def test_what_workers_print_and_raise_is_shown_in_the_cell(kernel: Kernel) -> None:
    assert not kernel.run("proxy = await tfr.LearnerProxy(Learner, ['a'], runtime={'num_processes': 1}).open()").error
    cell = kernel.begin("await proxy.client('a').polite()")
    kernel.until_printed(cell, "begun")  # while the method goes on
    kernel.interrupt()
    kernel.end(cell)
    cell = kernel.begin("await proxy.client('a').fail()")
    errors = [content for kind, content in kernel.messages(cell) if kind == "error"]
    text = "\n".join(errors[0]["traceback"])
    assert errors[0]["ename"] == "ValueError"
    assert 'raise ValueError("of a cell")' in text  # the worker has the lines of cells
    assert not kernel.run("await proxy.close()").error


@pytest.mark.parametrize("how", ["kill", "restart", "shutdown"])
def test_end_of_a_kernel_leaves_no_process(tmp_path: Path, how: str) -> None:
    with Kernel(tmp_path) as kernel:
        kernel.run(LEARNER)
        assert not kernel.run(
            "proxy = await tfr.LearnerProxy(Learner, ['a', 'b'], runtime={'num_processes': 2}).open()"
        ).error
        kernel.until_printed(kernel.begin("await proxy.clients().spin()"), "begun")
        processes = descendants_of(kernel.pid)
        assert len(processes) >= 3
        getattr(kernel, how)()
        deadline = time.monotonic() + PROMISED_S
        while any(map(is_alive, processes)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not [pid for pid in processes if is_alive(pid)]
        if how == "restart":
            assert kernel.run("1 + 1").text == "2"


def test_two_notebooks_run_side_by_side(tmp_path: Path) -> None:
    code = "async with tfr.LearnerProxy(Learner, ['a', 'b'], runtime={'num_processes': 1}) as proxy:\n    "
    with Kernel(tmp_path) as first, Kernel(tmp_path) as second:
        cells = []
        for kernel in (first, second):
            kernel.run(LEARNER)
            cells.append(kernel.begin(f"{code}print({ANSWERS})"))
        for kernel, cell in zip((first, second), cells, strict=True):
            assert "['a', 'b']" in kernel.end(cell).text


def test_the_cells_of_the_page_on_notebooks_run(tmp_path: Path) -> None:
    with Kernel(tmp_path) as kernel:
        for snippet in snippets(ROOT / "docs" / "notebooks.md"):
            if snippet.language == "python":
                result = kernel.run(snippet.code)
                assert not result.error, (snippet.place, result)


def outputs_of(notebook: Any) -> list[Any]:
    """The outputs of a notebook's cells, of which pictures are there by their size alone."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [
        output.get("text") or {kind: data for kind, data in output["data"].items() if kind != "image/png"}
        for output in outputs
    ]


def test_the_example_runs_and_has_the_outputs_that_are_stored_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("nbclient", "matplotlib", "markdown"):
        needs(module)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import nbformat
    from run_notebook import NOTEBOOK, page_of, run

    stored = nbformat.read(NOTEBOOK, as_version=4)
    assert outputs_of(run(NOTEBOOK)) == outputs_of(stored), "run scripts/notebook, which stores them"
    assert str(Path.home()) not in NOTEBOOK.read_text(encoding="utf-8")
    assert set(stored.metadata) == {"kernelspec", "language_info"}
    assert len(re.findall("<img ", page_of(stored))) == 2


def test_progress_is_a_bar_in_the_output_of_a_cell(kernel: Kernel) -> None:
    cell = kernel.run(
        """
from torchfedrpc.experiments.progress import live_progress
with live_progress() as show:
    show(tfr.RoundStarted(0, 3))
    show(tfr.CallStarted(1, "a", "train"))
    time.sleep(0.3)
    show(tfr.CallStarted(2, "b", "train"))
    show(tfr.RoundEnded(1, 3, {"test_accuracy": 0.5}))
"""
    )
    assert not cell.error, cell
    assert cell.displays[0] == "round 0/0"
    assert "round 0/3  2 in flight" in cell.displays
    assert cell.displays[-1] == "round 2/3  accuracy 0.500"
