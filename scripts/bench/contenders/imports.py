"""Imports a library in a fresh interpreter: ``import_torchfedrpc`` and ``import_torch``; standard library only."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from protocol import Cannot, Measured, Repeat, serve

_CODE = "import time; began = time.perf_counter(); import {}; print(time.perf_counter() - began)"


@asynccontextmanager
async def prepare(workloads: tuple[str, ...], quick: bool) -> AsyncIterator[Mapping[str, Repeat | Cannot]]:
    """``import_NAME``, whatever the name."""
    yield {workload: importing(workload.removeprefix("import_")) for workload in workloads}


def importing(name: str) -> Repeat:
    """Seconds of the import statement alone; the first fills the file cache, and compiles as an installation does."""

    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}

    def once() -> float:
        command = [sys.executable, "-c", _CODE.format(name)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=environment)
        return float(done.stdout)

    once()
    return lambda count: Measured([once() for _ in range(count)], "imported")


if __name__ == "__main__":
    serve(prepare, {"python": platform.python_version()})
