"""Starts and imports, each time in a fresh interpreter: two worker processes with torch until their first answer.

``start_torchfedrpc``: pseudo mode, from opening a proxy to the answers of both workers. ``start_again``: the same for
the second proxy of a process. ``start_spawn``: processes of multiprocessing that import torch. ``start_forkserver``:
the same, forked by a server that has imported torch before; its start is part of the time. ``start_forked``: two more
from that server. The imports of the interpreter itself are not timed. ``import_torchfedrpc``, ``import_torch``:
the import statement alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from protocol import Measured, Repeat, serve

_IMPORT = "import time; began = time.perf_counter(); import {}; print(time.perf_counter() - began)"
_OURS = """
import asyncio, time, torchfedrpc as tfr
from starts import Answering
async def main():
    runtime = {{"execution_mode": "pseudo", "num_processes": 2}}
    for is_timed in {timed}:
        began = time.perf_counter()
        async with tfr.LearnerProxy(Answering, ["a", "b"], runtime=runtime) as proxy:
            await proxy.clients().call("answer")
            if is_timed:
                print(time.perf_counter() - began)
if __name__ == "__main__":
    asyncio.run(main())
"""
_PROCESSES = """
import multiprocessing, time
from starts import use_torch
if __name__ == "__main__":
    import torch
    context = multiprocessing.get_context({method!r})
    if {method!r} == "forkserver":
        context.set_forkserver_preload(["torch"])
    for is_timed in {timed}:
        began = time.perf_counter()
        pipes = [context.Pipe() for _ in range(2)]
        workers = [context.Process(target=use_torch, args=(there,)) for _, there in pipes]
        for worker in workers:
            worker.start()
        for here, _ in pipes:
            here.recv()
        if is_timed:
            print(time.perf_counter() - began)
        for worker in workers:
            worker.join()
"""
_CODE = {
    "start_torchfedrpc": _OURS.format(timed=(True,)),
    "start_again": _OURS.format(timed=(False, True)),
    "start_spawn": _PROCESSES.format(method="spawn", timed=(True,)),
    "start_forkserver": _PROCESSES.format(method="forkserver", timed=(True,)),
    "start_forked": _PROCESSES.format(method="forkserver", timed=(False, True)),
    "import_torch": _IMPORT.format("torch"),
    "import_torchfedrpc": _IMPORT.format("torchfedrpc"),
}


class Answering:
    """A learner that answers."""

    def __init__(self, client_id: str) -> None: ...

    def answer(self) -> None:
        """Nothing."""


def use_torch(pipe: object) -> None:
    """In a process of multiprocessing."""
    import torch  # noqa: PLC0415

    pipe.send(len(torch.ones(2)))  # type: ignore[attr-defined]


@asynccontextmanager
async def prepare(workloads: tuple[str, ...]) -> AsyncIterator[Mapping[str, Repeat]]:
    """Any of them."""
    yield {workload: partial(started, _CODE[workload]) for workload in workloads}


def started(code: str, count: int) -> Measured:
    """Seconds that a script prints."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    seconds = []
    for _ in range(count):
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder) / "start.py"  # a file, since other processes import it
            script.write_text(f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{code}")
            command = [sys.executable, str(script)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=environment)
        seconds.append(float(done.stdout))
    return Measured(seconds, "started")


if __name__ == "__main__":
    serve(prepare)
